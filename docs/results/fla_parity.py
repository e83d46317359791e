"""On a GPU: fla's own GSAForCausalLM and ours, on the same weights, give the same logits.

    python docs/results/fla_parity.py OUT.json        (needs flash-linear-attention 0.6.0 on the path)

A random Llama with 2 kv heads is converted with the preset `paper`, given random gates and norms, exported, and read by
both. Against ours in float64, float32 must agree to 1e-3 of the largest logit (fla's products are tf32), bfloat16 to
3e-2.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2r.convert import convert
from t2r.convert.fla import export
from t2r.env import facts

BOUND = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def main(out: str) -> None:
    from fla.models import GSAForCausalLM

    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "source")
    convert(str(folder / "source"), str(folder / "paper"), preset="paper", slots=64, verify=False)
    weights = folder / "paper" / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "f_proj" in name or "g_norm" in name:
            tensor.copy_(torch.randn(tensor.shape) * (0.5 if "f_proj" in name else 1.0))
    save_file(tensors, weights, metadata={"format": "pt"})
    export(str(folder / "paper"), str(folder / "fla"), to="fla")
    tokens = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(folder / "paper", dtype=torch.float64).cuda()(tokens).logits
        errors = {}
        for dtype in BOUND:
            for name, cls, part in (("ours", AutoModelForCausalLM, "paper"), ("fla", GSAForCausalLM, "fla")):
                model = cls.from_pretrained(folder / part, dtype=dtype).cuda().eval()
                difference = (model(tokens).logits.double() - exact).abs().max() / exact.abs().max()
                errors[f"{name} {dtype}"] = difference.item()
    print(json.dumps(errors, indent=1))
    Path(out).write_text(json.dumps({"facts": facts(), "errors": errors}, indent=1) + "\n")
    worst = {key: error for key, error in errors.items() if error > BOUND[getattr(torch, key.rpartition(".")[2])]}
    if worst:
        sys.exit(f"over the bound: {worst}")


if __name__ == "__main__":
    main(sys.argv[1])
