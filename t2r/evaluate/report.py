"""A comparison as a folder: report.md, report.json, items.jsonl and plots; and as a table for the terminal."""

import json
import math
import os
import platform
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2r.errors import UserError
from t2r.evaluate.statistics import Metric, paired
from t2r.evaluate.task import Outcome, Task

SCHEMA_VERSION = 1


class Results:
    """All that was measured: facts about the run, and an outcome for each task and model.

    models: label -> facts about the model, in the order of the columns; the first is the original.
    """

    def __init__(self, facts: dict, tasks: list[Task]) -> None:
        self.facts = facts
        self.tasks = tasks
        self.models: dict[str, dict] = {}
        self.outcomes: dict[str, dict[str, Outcome]] = {task.name: {} for task in tasks}

    def metrics(self, task: Task) -> Iterator[tuple[str, dict[str, Metric]]]:
        """(name, metric by label) of each number of a task."""
        by_label = {label: {m.name: m for m in o.metrics} for label, o in self.outcomes[task.name].items()}
        for name in next(iter(by_label.values())):
            yield name, {label: found[name] for label, found in by_label.items()}

    def has_curve(self, task: Task) -> bool:
        """Whether there is something to plot."""
        return task.plot is not None and any(m.x is not None for _, row in self.metrics(task) for m in row.values())

    def changes(self, task: Task) -> Iterator[tuple[str, str, dict]]:
        """(metric, label, change against the original) of what was measured on the same items."""
        original = next(iter(self.models))
        for name, row in self.metrics(task):
            for label, metric in row.items():
                if label != original and (change := paired(row[original], metric)):
                    yield name, label, change

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
        return {"schema_version": SCHEMA_VERSION, **self.facts, "models": self.models, "results": results}


def environment(device) -> dict:
    """Versions, and one line about the hardware."""
    import torch
    import transformers

    from t2r import __version__

    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    versions = {"t2r": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": {**versions, "python": platform.python_version()}, "hardware": hardware}


def check_absent(out: Path) -> None:
    """Raise UserError where something lies at `out`."""
    if not os.path.lexists(out):
        return
    number = 2
    while os.path.lexists(free := out.with_name(f"{out.name}-{number}")):
        number += 1
    raise UserError(f"{out} already exists", where="--out", next=f"t2r compare ... --out {shlex.quote(str(free))}")


@contextmanager
def named_fault(out: Path) -> Iterator[None]:
    """A full disk or a missing permission as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write there: {error.strerror}", where=out) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` at the end, or removed when anything goes wrong."""
    aside = out.with_name(f".{out.name}.partial-{secrets.token_hex(2)}")
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        with named_fault(out):
            aside.mkdir(parents=True)
        yield aside
        check_absent(out)
        with named_fault(out):
            os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def write(results: Results, folder: Path) -> None:
    """Fill `folder`."""
    from t2r.evaluate.plots import plot

    images = {task.name: plot(results, task, folder) for task in results.tasks if results.has_curve(task)}
    report = json.dumps(finite(results.to_dict()), indent=1, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(report, encoding="utf-8")
    (folder / "report.md").write_text(markdown(results, images), encoding="utf-8")
    with open(folder / "items.jsonl", "w", encoding="utf-8") as file:
        for task, outcomes in results.outcomes.items():
            for label, outcome in outcomes.items():
                for item, record in enumerate(outcome.records):
                    line = {"task": task, "model": label, "item": item, **record}
                    file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")


def finite(value):
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(results: Results, images: dict[str, str]) -> str:
    facts, labels = results.facts, list(results.models)
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    recipe = facts["recipe"]["name"]
    parts = [
        f"# {labels[0]} against {', '.join(labels[1:])}",
        f"Recipe `{recipe}` on {facts['hardware']}, {facts['dtype']} for all models. {versions}. {facts['date']}.",
        table(
            ["model", "what", "parameters", "tokens read", "seconds"],
            [
                [label, m["what"], f"{m['parameters']:,}", f"{m['tokens']:,}", f"{m['seconds']:.0f}"]
                for label, m in results.models.items()
            ],
        ),
    ]
    parts += facts["notes"]
    for task in results.tasks:
        outcomes, coverage = results.outcomes[task.name], facts["coverage"][task.name]
        coverage = f" Here: {coverage}." if coverage else ""
        parts += [f"## {task.name}", task.about + coverage]
        rows = [[name, *(cell(row.get(label)) for label in labels)] for name, row in results.metrics(task)]
        if rows:
            parts.append(table(["", *labels], rows))
        if task.name in images:
            parts.append(f"![{task.plot.title}]({images[task.name]})")
        changes = list(results.changes(task))
        if changes:
            parts.append(f"Change against {labels[0]} on the same items, with its standard error:")
            others = [label for label in labels[1:] if label in outcomes]
            found = {(name, label): change_cell(change) for name, label, change in changes}
            names = dict.fromkeys(name for name, _, _ in changes)
            parts.append(table(["", *others], [[n, *(found[n, label] for label in others)] for n in names]))
        for label, outcome in outcomes.items():
            if outcome.text:
                quoted = "\n".join(f"> {line}".rstrip() for line in outcome.text.splitlines())
                parts.append(f"{label}:\n\n{quoted}")
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(metric: Metric | None) -> str:
    """A number with its error: perplexities with the standard error, shares with the 95 % interval."""
    if metric is None:
        return ""
    if metric.unit == "bytes":
        return human_bytes(metric.value)
    if metric.unit == "share":
        return f"{100 * metric.value:.1f} % [{100 * metric.low:.0f}, {100 * metric.high:.0f}]"
    if metric.unit == "ppl":
        value = number(metric.value)
        return value if metric.stderr is None else f"{value} +- {number(metric.stderr)}"
    return f"{number(metric.value)} {metric.unit}"


def change_cell(change: dict) -> str:
    error = change["stderr"]
    if "ratio" in change:
        return f"x {change['ratio']:.3f}" + ("" if error is None else f" +- {error:.3f}")
    text = f"{100 * change['difference']:+.1f}" + ("" if error is None else f" +- {100 * error:.1f}")
    return f"{text} points (McNemar p = {change['p']:.2g})"


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def human_bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} GB"


def summary(results: Results) -> str:
    """The table for the terminal: every number of every model."""
    labels = list(results.models)
    rows = [["", *labels]]
    for task in results.tasks:
        rows += [
            [f"{task.name} {name}", *(cell(row.get(label)) for label in labels)] for name, row in results.metrics(task)
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        lines.append(name.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)))
    return "\n".join(line.rstrip() for line in lines)
