"""Verify a model of the shape of Mistral-7B-v0.1 (random weights) by layer, and how much memory that takes at most.

    python docs/results/verify-7b/measure.py /an/empty/folder LAYERS

LAYERS of its 32 layers: memory does not depend on it, time does, and the disk takes 0.9 GB a layer. Converts, then runs
`t2r verify --by-layer` in a process of its own. Writes measurements.json beside this file; the models are deleted.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(words: list) -> tuple[float, float, float, str]:
    """(wall seconds, CPU seconds, peak RSS in GB, what was printed) of a command that must succeed."""
    start = time.perf_counter()
    child = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{words} failed:\n{printed}")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9, printed


def make(folder: Path, layers: int) -> None:
    """A Mistral folder: the real config but for the number of layers, random weights, a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    config = MistralConfig(num_hidden_layers=layers, bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    MistralForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def main() -> None:
    work, layers = Path(sys.argv[1]), int(sys.argv[2])
    source, out = work / "source", work / "out"
    make(source, layers)
    t2r = [sys.executable, "-m", "t2r"]
    run([*t2r, "convert", source, out, "--no-verify", "--no-hash"])
    seconds, cpu, peak, printed = run([*t2r, "verify", out, "--source", source, "--by-layer"])
    results = {
        "layers": layers,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_rss_gb": peak,
        "report": printed.splitlines(),
    }
    (HERE / "measurements.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
