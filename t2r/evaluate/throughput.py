"""Speed, memory and state of a model by length of the context and batch: what a recurrent state is for."""

import dataclasses
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from t2r.errors import UserError
from t2r.evaluate.efficiency import cache_bytes, some_tokens
from t2r.evaluate.statistics import Metric
from t2r.evaluate.task import Outcome, Place, Plot, Task
from t2r.modeling.cache import CACHE


@dataclass
class Throughput(Task):
    """A context of each of `contexts` tokens for each of `batches` texts at once, read `segment` tokens at a time, then
    `new` tokens written to each, the better of `repeats` runs after a warm-up.

    cpu_tokens: of the largest context times batch on a CPU. Where the device's memory ends, longer contexts are left
    out for that batch.
    """

    contexts: list[int] = dataclasses.field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    )
    batches: list[int] = dataclasses.field(default_factory=lambda: [1, 8])
    segment: int = 4096
    new: int = 32
    repeats: int = 2

    about: ClassVar[str] = (
        "Reading a context of so many tokens, then writing on, each of a batch of texts. Decode: all texts together. "
        "First token: seconds from the start. State: bytes of the whole cache, measured. Peak: of the GPU's memory, "
        "weights included; not measured on a CPU."
    )
    plot: ClassVar[Plot] = Plot("Decoding speed by context", "context (tokens)", "tokens/s, first batch size")
    quality: ClassVar[bool] = False

    def prepare(self, tokenizer, place: Place) -> list[tuple[int, int]]:
        if min([*self.contexts, *self.batches, self.segment, self.repeats]) < 1 or self.new < 2:
            raise UserError("contexts, batches, segment and repeats start at 1, new at 2", where=f"task {self.name}")
        points = [(batch, context) for batch in self.batches for context in self.contexts]
        if self.cpu_tokens is not None and place.on_cpu:
            points = [(batch, context) for batch, context in points if batch * context <= self.cpu_tokens]
        points = points[: self.items]
        if not points:
            raise UserError("no context is small enough for `cpu_tokens`", where=f"task {self.name}")
        self.coverage = f"{len(points)} of {len(self.batches) * len(self.contexts)} points"
        return points

    def run(self, model, items: list[tuple[int, int]]) -> Outcome:
        metrics, records, ended = [], [], {}
        self.point(model, 1, min(context for _, context in items))
        for batch, context in items:
            if batch in ended:
                continue
            try:
                runs = [self.point(model, batch, context) for _ in range(self.repeats)]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                ended[batch] = context
                continue
            best = {
                "prefill": batch * context / min(run["first"] for run in runs),
                "decode": batch * (self.new - 1) / min(run["rest"] for run in runs),
                "first": min(run["first"] for run in runs),
                "state": runs[0]["state"],
                "peak": max(run["peak"] for run in runs),
            }
            records.append({"batch": batch, "context": context, **best, "runs": runs})
        units = {"decode": "tokens/s", "prefill": "tokens/s", "first": "s", "state": "bytes", "peak": "bytes"}
        names = {"first": "first token", "peak": "peak memory"}
        for key, unit in units.items():
            for record in records:
                if key == "peak" and not record["peak"]:
                    continue
                name = f"{names.get(key, key)}, {record['batch']} x {record['context']:,}"
                x = record["context"] if key == "decode" and record["batch"] == self.batches[0] else None
                metrics.append(Metric(name, unit, record[key], x=x))
        text = "\n".join(f"batch {batch}: out of memory from {context:,} tokens on" for batch, context in ended.items())
        return Outcome(metrics, records, text)

    @torch.inference_mode()
    def point(self, model, batch: int, context: int) -> dict[str, float]:
        """Seconds to the first new token and for the rest, bytes of the cache, peak bytes of a GPU (else 0)."""
        from transformers import DynamicCache

        ids = some_tokens(model, context).expand(batch, -1)
        cuda = model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        cache, start = DynamicCache(config=model.config), time.perf_counter()
        for part in ids.split(self.segment, dim=1):
            logits = model(part, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
        stamps = []
        while True:
            ids = logits[:, -1].argmax(-1, keepdim=True)
            ids[0].item()  # waits for the device
            stamps.append(time.perf_counter() - start)
            if len(stamps) == self.new:
                break
            logits = model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
        peak = torch.cuda.max_memory_allocated(model.device) if cuda else 0
        state = cache_bytes(cache)
        return {"first": stamps[0], "rest": stamps[-1] - stamps[0], "state": state, "peak": peak}
