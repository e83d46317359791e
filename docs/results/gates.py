"""Have the gates learned anything? Mean skipped share of a slot's turn and mean write off turn, layer by layer.

At the exact start both are 0: on turn every token is written whole, off turn nothing is.

    python docs/results/gates.py MODEL WIKI.npy OUT.json      (WIKI.npy: int32 token ids, >= 8192)
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import t2r  # noqa: F401
from t2r.env import facts
from t2r.kernels.gsa.spec import gates
from t2r.modeling.attention import GSAttention


@torch.inference_mode()
def main(folder: str, wiki: str, out: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    ids = torch.from_numpy(np.load(wiki)[:8192]).long().view(8, 1024).to(device)
    positions = torch.arange(1024, device=device).expand(8, -1)
    rows = []

    def measure(module, args, kwargs) -> None:
        x = module.f_proj(kwargs["hidden_states"]).unflatten(-1, (module.kv_heads, module.gsa.slots))
        forget, _ = gates(x, positions, module.gsa.spec, module.write, module.keep, None)
        turn = module.gsa.spec.turn(positions)[:, :, None, None] == torch.arange(module.gsa.slots, device=device)
        turn = turn.expand_as(forget)
        skipped, off = 1 - forget[turn], forget[~turn]
        rows.append(
            {
                "skipped_on_turn": skipped.mean().item(),
                "turns_skipped_by_half": (skipped > 0.5).float().mean().item(),
                "written_off_turn": off.mean().item(),
                "largest_off_turn": off.max().item(),
            }
        )

    for module in model.modules():
        if isinstance(module, GSAttention):
            module.register_forward_pre_hook(measure, with_kwargs=True)
    model(ids, use_cache=False)
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    print(mean)
    with open(out, "w") as file:
        json.dump({"environment": facts(), "mean": mean, "layers": rows}, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
