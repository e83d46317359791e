"""Perplexity of exact starts before they are made, by the slots of their layers, on every fifth block of a text.

python docs/results/slots.py SOURCE TEXT.raw OUT.json 64 128 32,32,64,...      (one number, or one for each layer)
"""

import json
import sys
from pathlib import Path

import torch

from t2r.convert.allocate import Windows
from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.env import facts

BLOCK, EVERY, TOGETHER = 1024, 5, 4


@torch.inference_mode()
def main(source: str, text: str, out: str, *choices: str) -> None:
    opened = open_source(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_source(opened).to(device)
    ids = torch.tensor(opened.load_tokenizer().encode(Path(text).read_text(encoding="utf-8")), device=device)
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)[::EVERY]
    losses: dict[str, list[float]] = {"full": [], **{choice: [] for choice in choices}}
    for part in blocks[: len(blocks) // TOGETHER * TOGETHER].split(TOGETHER):
        windows = Windows(model, part, sinks=4)
        losses["full"].append(windows.full)
        for choice in choices:
            sizes = [int(size) for size in choice.split(",")]
            sizes = sizes * len(windows.layers) if len(sizes) == 1 else sizes
            losses[choice].append(windows.measure(sizes))
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        record = {"environment": facts(), "text": Path(text).name, "blocks": TOGETHER * len(losses["full"])}
        record |= {"loss": means, "losses": losses}
        Path(out).write_text(json.dumps(record, indent=1) + "\n")
        print(record["blocks"], means, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
