"""Align, distill and lm on one GPU and on two under ZeRO 1, 2 and 3, at the same global batch: losses, speed, memory.

    python docs/results/zero.py SOURCE CONVERTED OUT.json [KEY=VALUE ...]

How far rounding alone takes losses apart is shown by one GPU that takes each step in twice as many forwards.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from t2r.env import facts
from t2r.train.log import METRICS, read

RUNS = {  # processes, ZeRO, rows of a forward
    "1 GPU": (1, 1, 16), "1 GPU, more forwards": (1, 1, 8), "2 GPUs, ZeRO 1": (2, 1, 16),
    "2 GPUs, ZeRO 2": (2, 2, 16), "2 GPUs, ZeRO 3": (2, 3, 16),
}  # fmt: skip
STAGES = {"align": "gates: 1e-3, mixer: 1e-4", "distill": "gates: 1e-3, mixer: 1e-4, body: 1e-4"}
STAGES["lm"] = STAGES["distill"]
STEPS = 12


def configuration(source: str) -> str:
    stages = "".join(
        f"  - {{kind: {kind}, tokens: {STEPS * 32768}, context: 1024, batch_tokens: 32768, lr: {{{rates}}}}}\n"
        for kind, rates in STAGES.items()
    )
    return f"source: {source}\ndevice: cuda\ndata: {{train: [shipped:train]}}\nstages:\n{stages}"


def main(source: str, converted: str, out: str, words: list[str]) -> None:
    record: dict = {"facts": facts(), "steps": STEPS, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "stages.yaml"
        config.write_text(configuration(source))
        for name, (processes, zero, rows) in RUNS.items():
            run, begin = Path(folder) / name.replace(" ", "-").replace(",", ""), time.time()
            command = [sys.executable, "-m", "t2r", "finetune", "--config", str(config), "--model", converted]
            command += ["--out", str(run), "--processes", str(processes), f"deepspeed.zero={zero}", *words]
            command += [f"stages.{i}.micro_batch={rows}" for i in range(len(STAGES))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                record["runs"][name] = {"failed": done.stdout[-2000:] + done.stderr[-3000:]}
                continue
            steps = {
                kind: [line for line in read(run / f"{i}-{kind}" / METRICS) if "loss" in line]
                for i, kind in enumerate(STAGES, start=1)
            }
            record["runs"][name] = {"seconds": time.time() - begin, "steps": steps}
            print(f"{name}: {time.time() - begin:.0f} s", flush=True)
            Path(out).write_text(json.dumps(record, indent=1))
    want = record["runs"]["1 GPU"].get("steps", {})
    for name, run in record["runs"].items():
        for kind, lines in run.get("steps", {}).items():
            apart = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines, want[kind], strict=True)]
            run.setdefault("furthest", {})[kind] = max(apart)
        print(name, run.get("furthest", run.get("failed")), flush=True)
    Path(out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
