"""Converted folders, read by a Python that has torch and transformers and no t2r: the same numbers as t2r's own?

    python3 -m venv /tmp/clean && /tmp/clean/bin/pip install torch transformers
    python docs/results/clean_environment.py SOURCE /tmp/clean/bin/python OUT.json

Converts SOURCE with 64 slots three times: exact, paper, and exact with every fourth layer left with softmax. Both
Pythons then tokenise a text, read 300 tokens and a padded batch, and continue both by 40 tokens. Exit code 1 unless
all numbers are equal, bit for bit. Both should have the same versions of torch and transformers.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CLEAN = ("t2r", "triton", "einops", "numba", "gguf", "peft", "datasets", "deepspeed", "accelerate", "omegaconf")


@torch.inference_mode()
def read(out: str, text: str, *folders: str) -> None:
    """Write to OUT what this Python makes of the folders, and what it is."""
    found = {}
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :300]
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        batch = tokenizer([text[:700], text[:90], text[100:400]], padding=True, return_tensors="pt")
        settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        found[Path(folder).name] = {
            "tokens of the text": ids,
            "logits": model(ids).logits,
            "continuation": model.generate(ids, **settings)[:, ids.shape[1] :],
            "logits of a left-padded batch": model(**batch).logits[batch.attention_mask == 1],
            "continuation of the batch": model.generate(**batch, **settings)[:, batch.input_ids.shape[1] :],
        }
    modules = {cls.__module__ for cls in type(model).__mro__ if cls.__name__.startswith("GSA")}
    what = {
        "python": platform.python_version(),
        "packages": {d.name: d.version for d in sorted(distributions(), key=lambda d: d.name.lower())},
        "importable": [name for name in CLEAN if find_spec(name)],
        "classes from": sorted(re.sub(r"transformers_modules\..*\.", "", name) for name in modules),
    }
    torch.save((found, what), out)


def start(words: list[str], out: Path, text: str, folders: list[Path]) -> tuple[dict, dict, float]:
    """What `read` finds in another Python whose working directory is empty, and the seconds that took."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(out.parent), "HF_HUB_OFFLINE": "1"}
    environment |= {key: os.environ[key] for key in ("OMP_NUM_THREADS",) if key in os.environ}
    if words[0] == sys.executable:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    empty = out.with_suffix(".cwd")
    empty.mkdir()
    begin = time.perf_counter()
    command = [*words, str(Path(__file__).resolve()), "--read", str(out), text, *map(str, folders)]
    subprocess.run(command, cwd=empty, env=environment, check=True)
    return *torch.load(out), time.perf_counter() - begin


def main(source: str, clean: str, out: str) -> None:
    from t2r.convert import convert
    from t2r.convert.source import open_source
    from t2r.convert.verify import TEXT

    made = tempfile.TemporaryDirectory()  # removed at exit
    folder = Path(made.name)
    kept = ",".join(map(str, range(3, open_source(source).config.num_hidden_layers, 4)))
    options = {"exact": {}, "paper": {"preset": "paper"}, "hybrid": {"keep_softmax": kept}}
    for name, chosen in options.items():
        convert(source, str(folder / name), slots=64, verify=False, **chosen)
    folders = [folder / name for name in options]
    ours, here, _ = start([sys.executable], folder / "ours.pt", TEXT, folders)
    theirs, there, seconds = start([clean, "-I"], folder / "theirs.pt", TEXT, folders)
    assert not there["importable"], f"{clean} is no clean environment: it has {', '.join(there['importable'])}"
    results = {
        name: {
            what: {
                "shape": list(values.shape),
                "equal": torch.equal(values, theirs[name][what]),
                "largest difference": (values.double() - theirs[name][what].double()).abs().max().item(),
            }
            for what, values in answers.items()
        }
        for name, answers in ours.items()
    }
    same = {"torch", "transformers", "tokenizers", "safetensors", "numpy"}
    here["packages"] = {name: version for name, version in here["packages"].items() if name in same}
    record = {"source": Path(source).name, "options": options, "clean": there, "t2r": here, "results": results}
    Path(out).write_text(json.dumps(record, indent=1) + "\n")
    unequal = [f"{name}: {what}" for name, found in results.items() for what, one in found.items() if not one["equal"]]
    print(f"{seconds:.0f} s without t2r;", "differs: " + ", ".join(unequal) if unequal else "everything is equal")
    sys.exit(bool(unequal))


if __name__ == "__main__":
    read(*sys.argv[2:]) if sys.argv[1] == "--read" else main(*sys.argv[1:])
