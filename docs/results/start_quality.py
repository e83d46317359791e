"""The zero-token starts on WikiText-2: teacher, the teacher's windowed attention, exact and paper starts.

python docs/results/start_quality.py TEACHER WIKI.npy OUT.json NAME=MODEL ...      (WIKI.npy: int32 token ids)
"""

import json
import math
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import t2r  # noqa: F401
from t2r.convert.checks import ring_window
from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.env import facts
from t2r.evaluate.perplexity import losses
from t2r.modeling import GSAConfig


@torch.inference_mode()
def perplexity(model, ids: torch.Tensor, block: int, mask: torch.Tensor | None = None) -> dict:
    """Over all whole blocks: every token but a block's first is predicted. stderr_log: of the mean over blocks."""
    blocks = ids[: len(ids) // block * block].view(-1, block)
    rows = []
    for batch in blocks.split(8 * 1024 // block):
        logits = model(batch, attention_mask=mask, use_cache=False).logits
        rows.append(losses(logits[:, :-1], batch[:, 1:]).double().mean(-1))
    rows = torch.cat(rows)
    return {
        "ppl": rows.mean().exp().item(),
        "stderr_log": (rows.std() / math.sqrt(len(rows))).item(),
        "blocks": len(rows),
    }


def main(teacher_spec: str, wiki: str, out: str, *models: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.from_numpy(np.load(wiki)).long().to(device)
    results = {}

    def measure(name: str, model, window: GSAConfig | None = None) -> None:
        for block in (1024, 2048):
            mask = None
            if window is not None:
                seen = ring_window(window, block).to(device)
                mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
            results.setdefault(name, {})[block] = perplexity(model, ids, block, mask)
            print(name, block, results[name][block], flush=True)

    teacher = load_source(open_source(teacher_spec)).to(device)
    measure("teacher", teacher)
    for pair in models:
        name, folder = pair.split("=")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        gsa = GSAConfig.of(model.config)
        if gsa.ring:
            measure(f"teacher, window of {gsa.slots} with {gsa.sinks} sinks", teacher, gsa)
        measure(name, model)
    with open(out, "w") as file:
        json.dump({"environment": facts(), "text": "WikiText-2 test (raw)", "perplexity": results}, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
