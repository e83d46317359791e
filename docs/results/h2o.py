"""H2O eviction (arXiv 2306.14048) on a source, as a yardstick: half of the kept tokens the most recent ones, half those
that got most attention so far; per kv head, training-free. It sees the attention itself, which no RNN does.

    python docs/results/h2o.py SOURCE TEXT OUT.json [BLOCK] [BLOCKS] [SLOTS ...]

Perplexity of SOURCE on the first BLOCKS (0: all) whole blocks of BLOCK tokens of TEXT, with full attention and with
each number of kept tokens. Shape legend: B blocks, T tokens, H kv heads, G query heads per kv head, D head dim.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.env import facts
from t2r.evaluate.perplexity import token_nll


def h2o(module, query, key, value, mask, scaling=None, slots=64, **options):
    """query [B,H*G,T,D], key and value [B,H,T,D] -> o [B,T,H*G,D]. Token t reads what is kept and itself; then, if
    more than `slots` tokens are kept, the one outside the last slots / 2 with the least attention so far goes."""
    (B, H, T, D), device = key.shape, key.device
    q = query.unflatten(1, (H, -1))
    kept = torch.zeros(B, H, T, dtype=torch.bool, device=device)
    score = torch.zeros(B, H, T, device=device)
    out = torch.empty(B, T, H, q.shape[2], D, device=device, dtype=value.dtype)
    for t in range(T):
        kept[:, :, t] = True
        logits = scaling * torch.einsum("bhgd,bhjd->bhgj", q[:, :, :, t], key[:, :, : t + 1]).float()
        p = logits.masked_fill(~kept[:, :, None, : t + 1], -torch.inf).softmax(-1)
        out[:, t] = torch.einsum("bhgj,bhjd->bhgd", p.to(value.dtype), value[:, :, : t + 1])
        score[:, :, : t + 1] += p.sum(2)
        if t >= slots:
            old = kept[:, :, : t + 1 - slots // 2]
            gone = torch.where(old, score[:, :, : t + 1 - slots // 2], torch.inf).argmin(-1, keepdim=True)
            kept.scatter_(2, gone, False)
    return out.flatten(2, 3), None


@torch.inference_mode()
def main(source: str, text: str, out: str, block: str = "1024", count: str = "0", *slots: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_source(source)
    model = load_source(opened, torch.float32).to(device)
    ids = torch.tensor(opened.load_tokenizer().encode(Path(text).read_text(encoding="utf-8")))
    size = int(block)
    blocks = ids[: len(ids) // size * size].view(-1, size)[: int(count) or None]
    result = {"environment": facts(), "source": source, "text": text, "block": size, "blocks": len(blocks), "rows": {}}
    before = model.config._attn_implementation
    for budget in (None, *map(int, slots or ("64", "128"))):
        if budget:
            ALL_ATTENTION_FUNCTIONS.register("h2o", partial(h2o, slots=budget))
            model.config._attn_implementation = "h2o"
        losses = torch.cat([token_nll(model, part).double().mean(-1) for part in blocks.split(64)])
        row = {"ppl": losses.mean().exp().item(), "stderr of log": (losses.std() / math.sqrt(len(losses))).item()}
        result["rows"][str(budget or "full")] = row | {"losses": [round(x, 5) for x in losses.tolist()]}
        print(budget or "full", row, flush=True)
        model.config._attn_implementation = before
        Path(out).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
