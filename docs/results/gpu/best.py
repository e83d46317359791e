"""Waits for the first stages of some rows, then says the row of the lowest loss over their last hundred steps, where
all have read the same text: python best.py NAME ... . Rows that failed are not waited for; if all did, nothing is said.
"""

import json
import sys
import time
from pathlib import Path

ROOT, WINDOW = Path("/root"), 100


def loss(name: str) -> float:
    """Of the row, once it is known."""
    run = ROOT / "runs" / name
    while not (run / "2-distill").exists():
        if f" {name}: failed" in (ROOT / "log/rows.log").read_text():
            return float("inf")
        time.sleep(1)
    steps = [json.loads(line) for line in (run / "1-distill/metrics.jsonl").read_text().splitlines()]
    found = [step["loss"] for step in steps if "loss" in step][-WINDOW:]
    return sum(found) / len(found)


losses = {name: loss(name) for name in sys.argv[1:]}
print(losses, file=sys.stderr)
best = min(losses, key=losses.get)
print(best if losses[best] < float("inf") else "")
