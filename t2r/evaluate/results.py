"""All that was measured, as numbers: what report.json holds, and what the other forms of the report are drawn from."""

import json
import math
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers

from t2r import __version__
from t2r.evaluate.perplexity import Perplexity
from t2r.evaluate.run import ABLATION, ORIGINAL, Plan, from_json
from t2r.evaluate.statistics import Metric, paired, recovery
from t2r.evaluate.task import Outcome, Task

SCHEMA_VERSION = 2


class Results:
    """Facts about the run, and an outcome for each task and model.

    models: label -> facts about the model, in the order of the columns; the first is the original, if there is one.
    """

    def __init__(self, facts: dict, tasks: list[Task]) -> None:
        self.facts = facts
        self.tasks = tasks
        self.models: dict[str, dict] = {}
        self.outcomes: dict[str, dict[str, Outcome]] = {task.name: {} for task in tasks}
        self.compared: dict[str, list[tuple[str, str, dict]]] = {}

    def metrics(self, task: Task) -> Iterator[tuple[str, dict[str, Metric]]]:
        """(name, metric by label) of each number of a task."""
        by_label = {label: {m.name: m for m in o.metrics} for label, o in self.outcomes[task.name].items()}
        for name in dict.fromkeys(name for found in by_label.values() for name in found):
            yield name, {label: found[name] for label, found in by_label.items() if name in found}

    def has_curve(self, task: Task) -> bool:
        """Whether there is something to plot."""
        return task.plot is not None and any(m.x is not None for _, row in self.metrics(task) for m in row.values())

    def changes(self, task: Task) -> list[tuple[str, str, dict]]:
        """(metric, label, change against the original) of what was measured on the same items."""
        if task.name not in self.compared:  # a bootstrap of each, which every form of the report shows
            original = next(iter(self.models))
            self.compared[task.name] = [
                (name, label, change)
                for name, row in self.metrics(task)
                for label, metric in row.items()
                if label != original and original in row and (change := paired(row[original], metric))
            ]
        return self.compared[task.name]

    def recoveries(self) -> dict[str, dict[str, dict]]:
        """task -> label -> `statistics.recovery` of the task's first metric; "mean" -> label -> their mean."""
        original, found = next(iter(self.models)), {}
        for task in self.tasks:
            name, row = next(self.metrics(task), ("", {}))
            reference = row.get(original)
            if reference is None or reference.x is not None:
                continue
            kept = {label: recovery(reference, m) for label, m in row.items() if label != original}
            if kept and all(kept.values()):
                found[task.name] = {"metric": name, **kept}
        if len(found) > 1:
            labels = [label for label in self.models if all(label in row for row in found.values())]
            mean = {label: sum(row[label]["recovery"] for row in found.values()) / len(found) for label in labels}
            found["mean"] = {"metric": "", **{label: {"recovery": value} for label, value in mean.items()}}
        return found

    def warnings(self) -> list[str]:
        outcomes = [pair for row in self.outcomes.values() for pair in row.items()]
        outcomes = [(label, outcome) for label, outcome in outcomes if self.models[label]["what"] != ABLATION]
        found = [f"{label}: {warning}" for label, outcome in outcomes for warning in outcome.warnings]
        return found + list(self.idle_memories())

    def idle_memories(self) -> Iterator[str]:
        """What the window ablations say: a memory whose loss makes no perplexity worse has learned nothing."""
        labels = list(self.models)
        for label in labels:
            if self.models[label]["what"] != ABLATION:
                continue
            whole = labels[labels.index(label) - 1]
            for task in self.tasks:
                rows = [(name, row) for name, row in self.metrics(task) if whole in row and label in row]
                if not isinstance(task, Perplexity) or not rows:
                    continue
                name, row = rows[-1]
                change = paired(row[whole], row[label])
                if change["low"] is None or change["low"] <= 1:
                    bounds = "" if change["low"] is None else f" [{change['low']:.3f}, {change['high']:.3f}]"
                    what = f"without it {task.name} {name} changes by a factor of {change['ratio']:.3f}{bounds}"
                    yield f"{whole}: the memory adds nothing over the window: {what}"

    def to_dict(self) -> dict:
        """What report.json holds."""
        results: dict[str, dict] = {}
        for task in self.tasks:
            results[task.name] = {
                "metrics": {
                    name: {label: metric.to_dict() for label, metric in row.items()} for name, row in self.metrics(task)
                },
                "changes": {},
                "text": {label: o.text for label, o in self.outcomes[task.name].items() if o.text},
            }
            for name, label, change in self.changes(task):
                results[task.name]["changes"].setdefault(name, {})[label] = change
        report = {"schema_version": SCHEMA_VERSION, **self.facts, "models": self.models, "results": results}
        return finite({**report, "recovery": self.recoveries(), "warnings": self.warnings()})

    def items(self) -> Iterator[str]:
        """The lines of items.jsonl."""
        for task, outcomes in self.outcomes.items():
            for label, outcome in outcomes.items():
                for item, record in enumerate(outcome.records):
                    line = {"task": task, "model": label, "item": item, **record}
                    yield json.dumps(finite(line), ensure_ascii=False, default=str) + "\n"


def collect(plan: Plan, devices: Sequence[torch.device]) -> Results:
    """The results of a plan whose units are all finished."""
    recipe = plan.recipe
    facts = {
        **environment(devices),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": ",".join(map(str, devices)),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "recipe": recipe.to_dict(),
        "coverage": {task.name: task.coverage for task in recipe.tasks},
        "hashes": plan.digests,
        "notes": list(recipe.notes),
    }
    if plan.stored != plan.dtype and any(column.what == ORIGINAL for column in plan.columns):
        rounded = str(plan.stored).removeprefix("torch.")
        facts["notes"].append(f"The original's weights were rounded to {rounded}, which its conversion is stored in.")
    results = Results(facts, recipe.tasks)
    for column in plan.columns:
        contents = {task.name: json.loads(plan.unit(column, task).read_text("utf-8")) for task in plan.tasks(column)}
        if not contents:
            continue
        costs = [content["cost"] for content in contents.values()]
        results.models[column.label] = {
            "spec": column.entry.spec,
            "what": column.what,
            "model_type": next(iter(contents.values()))["model_type"],
            "gsa": getattr(column.entry.source.config, "gsa", None),
            "trained_tokens": column.entry.trained_tokens() if column.what != ABLATION else None,
            "fingerprint": column.entry.fingerprint(),
            "parameters": costs[0]["parameters"],
            "tokens": sum(cost["tokens"] for cost in costs),
            "seconds": round(sum(cost["seconds"] for cost in costs), 1),
        }
        for name, content in contents.items():
            results.outcomes[name][column.label] = from_json(content["outcome"])
    return results


def environment(devices: Sequence[torch.device]) -> dict:
    """Versions, and one line about the hardware."""
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if devices[0].type == "cuda":
        hardware = torch.cuda.get_device_name(devices[0])
        count = len(set(devices))
        hardware = f"{count} x {hardware}" if count > 1 else hardware
    versions = {"t2r": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        versions["lm-eval"] = version("lm-eval")
    except PackageNotFoundError:
        pass
    return {"versions": {**versions, "python": platform.python_version()}, "hardware": hardware}


def finite(value):
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
