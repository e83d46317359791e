"""fla's own GSAForCausalLM and ours, on the same weights, give the same logits.

    pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 einops    (beside torch, triton, transformers)
    python docs/results/fla_parity.py OUT.json [SECONDS]           on a GPU; SECONDS: the limit of chunk mode, 180
    TRITON_INTERPRET=1 python docs/results/fla_parity.py OUT.json  on a CPU: fla's kernels in Triton's interpreter

A random Llama of 4 layers, 4 heads on 2 kv heads, is converted with the preset `paper`, given random gates and norms,
exported, read by both, and converted back, which must return every tensor. fla reads up to 64 tokens with its recurrent
kernel and more with its chunked ones; these run last, in a process of their own, which is killed at the limit. fla's
kernels are not tuned: the first configuration of each list is taken, which changes its speed alone and saves minutes.

Largest difference of a logit over the largest logit. Bounds, set beforehand: float32 1e-4 (no tensor core has a part in
it up to 64 tokens), bfloat16 3e-2 (eight bits; fla rounds its gates to them too). The json is written after every step.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from triton.runtime.autotuner import Autotuner

from t2r.convert import convert
from t2r.convert.fla import export
from t2r.env import facts

BOUND = {"float32": 1e-4, "bfloat16": 3e-2}
RECURRENT = [(64, "bfloat16"), (64, "float32"), (20, "bfloat16"), (20, "float32")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
CHUNKED = (256, "bfloat16" if DEVICE == "cuda" else "float32")
VOCABULARY = 512


def take_first_configuration() -> None:
    """Of each kernel that is tuned from here on."""
    init = Autotuner.__init__

    def first(self, fn, arg_names, configs, *args, **kwargs):
        init(self, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = first


def lend_the_interpreter_integers() -> None:
    """Triton's interpreter counts loops in Python's integers, which lack the `to` that fla calls on them."""
    from fla.ops.common import chunk_h

    class Integer(int):
        def to(self, dtype):
            return self

    chunk_h.range = lambda *bounds: map(Integer, range(*bounds))


def make_models(folder: Path) -> int:
    """source, paper (with random gates), fla and back below `folder`; returns how many tensors came back equal."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "source")
    convert(str(folder / "source"), str(folder / "paper"), preset="paper", slots=64, verify=False)
    tensors = load_file(folder / "paper/model.safetensors")
    for name, tensor in tensors.items():
        if "f_proj" in name or "g_norm" in name:
            tensor.copy_(torch.randn(tensor.shape) * (0.5 if "f_proj" in name else 1.0))
    save_file(tensors, folder / "paper/model.safetensors", metadata={"format": "pt"})
    export(str(folder / "paper"), str(folder / "fla"), to="fla")
    convert(str(folder / "fla"), str(folder / "back"), verify=False)
    back = load_file(folder / "back/model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    return len(back)


@torch.no_grad()
def compare(folder: Path, length: int, dtype: str) -> dict:
    """Differences on two rows of `length` random tokens: of both from ours in float64, and of one from the other."""
    from fla.models import GSAForCausalLM

    def logits(cls, name: str, dtype: str) -> torch.Tensor:
        model = cls.from_pretrained(folder / name, dtype=getattr(torch, dtype)).to(DEVICE).eval()
        return model(tokens).logits.double()

    start = time.perf_counter()
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)
    exact = logits(AutoModelForCausalLM, "paper", "float64")
    ours, theirs = logits(AutoModelForCausalLM, "paper", dtype), logits(GSAForCausalLM, "fla", dtype)
    pairs = {"ours - theirs": (ours, theirs), "ours - float64": (ours, exact), "theirs - float64": (theirs, exact)}
    errors = {name: ((a - b).abs().max() / exact.abs().max()).item() for name, (a, b) in pairs.items()}
    one = {"tokens": length, "dtype": dtype, "bound": BOUND[dtype], "errors": errors}
    one |= {"passed": max(errors.values()) <= BOUND[dtype], "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(one), flush=True)
    return one


def main(out: str, limit: str = "180") -> None:
    made = tempfile.TemporaryDirectory()  # removed at exit
    folder = Path(made.name)
    names = ("t2r", "torch", "triton", "transformers", "cuda")
    record = {name: value for name, value in facts().items() if name in names}
    record |= {"device": DEVICE, "tensors equal after export and import": make_models(folder), "logits": []}

    def write(result: dict) -> None:
        record["logits"].append(result)
        Path(out).write_text(json.dumps(record, indent=1) + "\n")

    for length, dtype in RECURRENT:
        write(compare(folder, length, dtype))
    words = [sys.executable, __file__, "--chunked", str(folder)]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=float(limit))
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        chunked = found[0] if found else {"failed": f"exit code {done.returncode}"}
    except subprocess.TimeoutExpired:
        chunked = {"failed": f"not finished after {limit} s, and killed"}
    write({"tokens": CHUNKED[0], "dtype": CHUNKED[1], "passed": False} | chunked)
    print(json.dumps(record["logits"][-1]))
    sys.exit(not all(one["passed"] for one in record["logits"]))


if __name__ == "__main__":
    take_first_configuration()
    if sys.argv[1] == "--chunked":
        if DEVICE == "cpu":
            lend_the_interpreter_integers()
        compare(Path(sys.argv[2]), *CHUNKED)
    else:
        main(*sys.argv[1:])
