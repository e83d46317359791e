"""The run of a recipe over models, in units of one task on one model: each is stored when it is done.

Units are what an interrupted run keeps and what several devices share.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from tqdm import tqdm

from t2r import __version__
from t2r.errors import UserError
from t2r.evaluate.models import Entry, common_tokenizer, load, open_models, pick_dtype, window_only
from t2r.evaluate.recipe import load_recipe
from t2r.evaluate.statistics import Metric
from t2r.evaluate.task import Outcome, Place, Task, check_data

ORIGINAL, CONVERTED, ABLATION = "original", "converted", "window ablation"


@dataclass
class Column:
    """A model as the report shows it. what: ORIGINAL, CONVERTED or ABLATION, which is a converted model without what
    its gates have learned."""  # fmt: skip

    label: str
    what: str
    entry: Entry


@dataclass(frozen=True)
class Request:
    """What was asked for, in words that another process can read: the arguments of `t2r.evaluate.compare`."""

    models: tuple[str, ...]
    recipe: str = "quick"
    out: str | None = None
    limit: int | None = None
    dtype: str | None = None
    data: str | None = None
    batch_size: int | str | None = None
    allow_code: bool = False
    device: str | None = None
    log_samples: bool = False
    notes: tuple[str, ...] = ()


class Plan:
    """All that a worker needs. out: the folder to make; aside: where it is made, with the finished units below.
    stored: the dtype that originals are rounded to first. digests: of each task's items.

    Raises UserError for whatever the user can mend; nothing is written.
    """

    def __init__(self, request: Request, on_cpu: bool) -> None:
        self.request = request
        self.recipe = load_recipe(request.recipe, request.limit, request.batch_size)
        self.recipe.notes += request.notes
        place = Place(self.recipe.folder, check_data(request.data), on_cpu, request.allow_code)
        self.entries = open_models(list(request.models))
        self.tokenizer = common_tokenizer(self.entries)
        self.dtype, self.stored = pick_dtype(self.entries, request.dtype)
        self.items = self.recipe.prepare(self.tokenizer, place)
        self.digests = {task.name: task.digest(self.items[task.name]) for task in self.recipe.tasks}
        self.columns = columns(self.entries, self.recipe.ablation)
        verb = "compare" if len(self.entries) > 1 else "eval"
        label = self.entries[min(1, len(self.entries) - 1)].label
        self.out = Path(request.out if request.out is not None else f"runs/{verb}-{label}").expanduser()
        self.aside = self.out.with_name(f".{self.out.name}.partial")
        self.folder = self.aside / "units"

    def tasks(self, column: Column) -> list[Task]:
        """The tasks that say something about a column: an ablation is not asked what does not depend on the weights'
        values, the first model is not compared with itself, and not every task is for originals."""
        chosen = [task for task in self.recipe.tasks if task.quality or column.what != ABLATION]
        if column.what == ORIGINAL:
            chosen = [task for task in chosen if not task.converted_only]
        return [task for task in chosen if not (task.against_original and column is self.columns[0])]

    def unit(self, column: Column, task: Task) -> Path:
        """The file of a finished unit, named after everything that its numbers depend on but the device: another
        machine goes on with the units of the first."""
        parts = [asdict(task) | {"batch_size": None}, self.digests[task.name], column.what, str(self.dtype)]
        parts += [__version__, str(self.stored), column.entry.fingerprint()]
        if task.against_original:
            parts.append(self.columns[0].entry.fingerprint())
        key = sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return self.folder / f"{task.name}-{key}.json"

    def units(self) -> list[tuple[Column, Task, Path]]:
        return [(c, task, self.unit(c, task)) for c in self.columns for task in self.tasks(c)]


def columns(entries: list[Entry], ablation: bool) -> list[Column]:
    """The columns of a report. An ablation follows each converted model whose gates have learned something."""
    found = []
    for entry in entries:
        found.append(Column(entry.label, CONVERTED if entry.is_converted else ORIGINAL, entry))
        if ablation and entry.has_learned():
            found.append(Column(f"{entry.label}, window only", ABLATION, entry))
    return found


def work(plan: Plan, device: torch.device) -> None:
    """Run every unit that is neither finished nor taken by another worker, one model in memory at a time, and the
    original beside it where a task compares the two."""
    reference = None
    compares = any(task.against_original for task in plan.recipe.tasks)
    for column in plan.columns:
        units = [(task, plan.unit(column, task)) for task in plan.tasks(column)]
        model = None
        bar = tqdm([unit for unit in units if not unit[1].exists()], column.label, disable=not sys.stderr.isatty())
        for task, file in bar:
            if not claim(file):
                continue
            try:
                if model is None:
                    model = load(column.entry, plan.dtype, plan.stored, device)
                    if column.what == ABLATION:
                        window_only(model)
                    if compares and column is plan.columns[0]:
                        reference = model
                if task.against_original and reference is None:
                    reference = load(plan.columns[0].entry, plan.dtype, plan.stored, device)
                finish(plan, column, task, model, reference, file)
            finally:
                file.with_suffix(".claim").unlink(missing_ok=True)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def claim(file: Path) -> bool:
    """Whether this worker is the one to make the unit."""
    try:
        os.close(os.open(file.with_suffix(".claim"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    if file.exists():  # finished between our look and our claim
        file.with_suffix(".claim").unlink()
        return False
    return True


def finish(plan: Plan, column: Column, task: Task, model, reference, file: Path) -> None:
    """Run one unit and store it."""
    counter, began = TokenCounter(model), time.perf_counter()
    items = plan.items[task.name]
    try:
        outcome = task.run(model, items, reference) if task.against_original else task.run(model, items)
    except torch.OutOfMemoryError as error:
        what = f"out of memory in {task.name} on {column.label}"
        raise UserError(what, where=str(model.device), nearest="--batch-size auto, or a smaller dtype") from error
    finally:
        tokens = counter.close()
    seconds = time.perf_counter() - began
    cost = {"tokens": tokens, "seconds": round(seconds, 1), "parameters": sum(p.numel() for p in model.parameters())}
    content = {"outcome": to_json(outcome), "cost": cost, "model_type": model.config.model_type}
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.rename(file)
    if not sys.stderr.isatty():
        print(f"{column.label}: {task.name} {seconds:.1f} s", file=sys.stderr, flush=True)


def to_json(outcome: Outcome) -> dict:
    metrics = [vars(metric) | {"samples": list(metric.samples)} for metric in outcome.metrics]
    return {"metrics": metrics, "records": outcome.records, "text": outcome.text, "warnings": outcome.warnings}


def from_json(content: dict) -> Outcome:
    metrics = [Metric(**metric) for metric in content["metrics"]]
    return Outcome(metrics, content["records"], content["text"], content["warnings"])


def run(plan: Plan, devices: Sequence[torch.device]) -> None:
    """Finish all units, with one worker process for each device where there are several, or one of them several times.
    Raises UserError."""
    for stale in plan.folder.glob("*.claim"):
        stale.unlink()
    if len(devices) == 1:
        work(plan, devices[0])
        return
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    faults = context.SimpleQueue()
    known = [entry.fingerprint() for entry in plan.entries]
    workers = [context.Process(target=worker, args=(plan.request, device, known, faults)) for device in devices]
    for process in workers:
        process.start()
    try:
        for process in workers:
            process.join()
    finally:
        for process in workers:
            process.terminate()
    if not faults.empty():
        raise UserError(faults.get())
    if any(process.exitcode for process in workers):
        raise UserError("a worker ended without a word", where=", ".join(map(str, devices)), nearest="one device")


def worker(request: Request, device: torch.device, fingerprints: list[str], faults) -> None:
    """A process of `run`. It prepares the items again: tasks of lm-eval do not travel between processes.
    fingerprints: of the models, which are not read again for it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        plan = Plan(request, device.type == "cpu")
        for entry, known in zip(plan.entries, fingerprints, strict=True):
            entry.digest = known
        work(plan, device)
    except UserError as error:
        faults.put(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


class TokenCounter:
    """Counts the tokens that a model reads, padding included."""

    def __init__(self, model) -> None:
        self.tokens = 0
        self.hook = model.get_input_embeddings().register_forward_pre_hook(self.count)

    def count(self, module, args) -> None:
        self.tokens += args[0].numel()

    def close(self) -> int:
        self.hook.remove()
        return self.tokens
