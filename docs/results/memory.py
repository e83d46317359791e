"""A queue of experiments on what a small model remembers past its window: convert, train, measure, one after the other.

    python docs/results/memory.py QUEUE.json OUT.json SOURCE DATA VALIDATION.raw [SECONDS]

QUEUE.json: a list of {"name", "prediction", "convert": options of ConvertConfig, "words": words for
configs/smollm2-135m-exact.yaml}. DATA: folder of train-*.jsonl.zst and validation-*.jsonl.zst. Each trained model is
measured by its perplexity on the whole blocks of 1024 and 2048 tokens of VALIDATION.raw, in bfloat16 as the teacher.
OUT.json is written after every experiment; those that are in it are not run again, and none is begun after SECONDS.
"""

import gc
import json
import math
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import t2r  # noqa: F401
from t2r.convert import convert
from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.env import facts
from t2r.evaluate.perplexity import token_nll
from t2r.train.finetune import finetune
from t2r.train.log import read

CONFIG = "smollm2-135m-exact"
BLOCKS = (1024, 2048)
EDGES = (0, 64, 256, 512, 1024, 2048)


def measure(model, ids: torch.Tensor) -> dict:
    """Perplexity by length of a block, and by position in the longest."""
    found = {}
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16).eval()
    for block in BLOCKS:
        blocks = ids[: len(ids) // block * block].view(-1, block)
        nll = torch.cat([token_nll(model, part) for part in blocks.split(32 * 1024 // block)]).double()
        mean = nll.mean(-1)
        found[str(block)] = mean.mean().exp().item()
        found[f"{block} stderr of log"] = (mean.std() / math.sqrt(len(mean))).item()
    bounds = zip(EDGES, EDGES[1:], strict=False)
    found["by position"] = {f"{a}-{b}": nll[:, max(a - 1, 0) : b - 1].mean().exp().item() for a, b in bounds}
    return found


def run(experiment: dict, source: str, data: str, ids: torch.Tensor, starts: Path) -> dict:
    options = {"preset": "exact", "slots": 64} | experiment.get("convert", {})
    start = starts / "-".join(f"{k}{v}" for k, v in options.items()).replace("/", "_")
    if not start.exists():
        convert(source, str(start), verify=False, hash=False, **options)
    out = Path(tempfile.mkdtemp())
    words = [
        f"source={source}",
        f'data.train=["{data}/train-*.jsonl.zst"]',
        f'data.validation=["{data}/validation-*.jsonl.zst"]',
        f"convert={json.dumps(options)}",
        *experiment["words"],
    ]
    begin = time.time()
    try:
        finetune(CONFIG, words, model=str(start), out=str(out / "run"))
        seconds = time.time() - begin
        stages = {}
        for metrics in sorted(out.glob("run/*-*/metrics.jsonl")):
            lines = read(metrics)
            speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
            stages[metrics.parent.name] = {
                "loss": [line["loss"] for line in lines if "loss" in line][:: max(1, len(lines) // 20)],
                "tokens_per_second": speeds[len(speeds) // 2],
                "validation": [line for line in lines if "validation_loss" in line],
            }
        model = AutoModelForCausalLM.from_pretrained(out / "run" / "model", dtype=torch.float32)
        return {"seconds": seconds, "stages": stages, **measure(model, ids)}
    finally:
        shutil.rmtree(out)


def main(queue: str, out: str, source: str, data: str, text: str, seconds: str = "1e9") -> None:
    begin = time.time()
    tokenizer = open_source(source).load_tokenizer()
    ids = torch.tensor(tokenizer.encode(Path(text).read_text(encoding="utf-8")))
    results = json.loads(Path(out).read_text()) if Path(out).exists() else {"environment": facts(), "experiments": []}
    known = {row["name"] for row in results["experiments"]}

    def keep(row: dict) -> None:
        results["experiments"].append(row)
        Path(out).write_text(json.dumps(results, indent=1) + "\n")
        short = {k: v for k, v in row.items() if k not in ("stages", "words", "prediction")}
        print(json.dumps(short), flush=True)
        gc.collect()

    if "teacher" not in known:
        keep({"name": "teacher"} | measure(load_source(open_source(source)), ids))
    with tempfile.TemporaryDirectory() as starts:
        for experiment in json.loads(Path(queue).read_text()):
            if experiment["name"] in known or time.time() - begin > float(seconds):
                continue
            try:
                keep(experiment | run(experiment, source, data, ids, Path(starts)))
            except Exception:  # a failed experiment is a result, and the next one may work
                keep(experiment | {"error": traceback.format_exc()[-2000:]})


if __name__ == "__main__":
    main(*sys.argv[1:])
