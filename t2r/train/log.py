"""What a run says while it trains: metrics.jsonl, one line an optimizer step, and a progress bar or plain lines."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from t2r.errors import UserError
from t2r.schema import LogConfig, StageConfig
from t2r.train.cost import Flops
from t2r.train.trackers import flat, open_tracker

METRICS = "metrics.jsonl"


class Log:
    """The log of one stage, kept by the first process; it goes on where the checkpoint at step `start` was written.

    flops: operations of a token; peak: what all processes could do of them in a second, None where that is unknown.
    """

    def __init__(
        self, out: Path, stage: StageConfig, start: int, flops: Flops, peak: float | None, settings: LogConfig
    ) -> None:
        from tqdm import tqdm

        self.stage, self.out, self.flops, self.peak = stage, out, flops, peak
        self.skipped = 0
        self.trackers = [open_tracker(name, settings.project, out, str(out)) for name in settings.trackers]
        try:
            self.file = self.reopen(out / METRICS, start)
        except OSError as error:
            raise UserError(f"cannot write there: {error.strerror}", where=out / METRICS) from error
        self.bar = tqdm(total=stage.steps, initial=start, desc=stage.kind, unit="step", disable=not sys.stderr.isatty())
        self.every = max(1, stage.steps // 20)
        self.time = time.perf_counter()

    def reopen(self, path: Path, start: int):
        """The file without the steps that an interrupted run logged but its last checkpoint does not know."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(path) if start and line["step"] <= start]
        self.skipped = sum(line.get("skipped", False) for line in kept)
        aside = path.with_name(f".{path.name}")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, path)
        return open(path, "a", buffering=1)

    def step(self, step: int, metrics: dict[str, float], rates: dict[str, float], norm: float, skipped: bool) -> None:
        now = time.perf_counter()
        speed, self.time = self.stage.batch_tokens / (now - self.time), now
        record = {
            "step": step,
            "tokens": step * self.stage.batch_tokens,
            **metrics,
            "lr": rates,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "memory_bytes": memory(),
        }
        if self.peak:
            record["mfu"] = speed * self.flops.total / self.peak
        if skipped:
            self.skipped += 1
            record |= {"skipped": True, "skipped_steps": self.skipped}
        self.write(record)
        line = f"loss {metrics['loss']:.4f}, {speed:,.0f} tokens/s, {record['memory_bytes'] / 1e9:.1f} GB"
        if self.peak:
            line += f", {record['mfu']:.1%} MFU"
        self.bar.set_postfix_str(line)
        self.bar.update()
        if skipped or (self.bar.disable and (step % self.every == 0 or step == self.stage.steps)):
            note = f": not finite, step skipped ({self.skipped} so far)" if skipped else ""
            self.say(f"step {step}/{self.stage.steps}: {line}{note}")

    def validation(self, step: int, found: dict) -> None:
        """What `validate` found, and teacher_ppl."""
        self.write({"step": step, "tokens": step * self.stage.batch_tokens, **found})
        ours, teacher = found["ppl"].get("all", math.nan), found["teacher_ppl"].get("all", math.nan)
        what = f"validation loss {found['validation_loss']:.4f}, ppl {ours:.2f} (teacher {teacher:.2f})"
        self.say(f"step {step}/{self.stage.steps}: {what}")

    def say(self, line: str) -> None:
        self.bar.write(f"{self.stage.kind} {line}", file=sys.stderr)

    def write(self, record: dict) -> None:
        try:
            self.file.write(json.dumps(finite(record)) + "\n")
        except OSError as error:
            raise UserError(f"cannot write: {error.strerror}", where=self.out / METRICS) from error
        for send, _ in self.trackers:
            send(record["step"], flat(record))

    def resume_clock(self) -> None:
        """Time spent on something else than steps does not count."""
        self.time = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        for _, end in self.trackers:
            end()


def read(path: Path) -> list[dict]:
    """The records of a metrics file, up to where a kill may have cut it."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def finite(value: object) -> object:
    """The same without NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory() -> int:
    """Most bytes in use so far: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
