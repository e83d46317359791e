"""A report as text: report.md, and the table for the terminal."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from t2r.evaluate.results import Results
from t2r.evaluate.statistics import Metric
from t2r.evaluate.task import Task


def write(results: Results, folder: Path, log_samples: bool) -> None:
    """Fill `folder` with every form of the report."""
    from t2r.evaluate.html import html
    from t2r.evaluate.plots import plot

    images = {task.name: plot(results, task, folder) for task in results.tasks if results.has_curve(task)}
    report = json.dumps(results.to_dict(), indent=1, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(report, encoding="utf-8")
    (folder / "report.md").write_text(markdown(results, images), encoding="utf-8")
    (folder / "report.html").write_text(html(results, folder, images), encoding="utf-8")
    if log_samples:
        with open(folder / "items.jsonl", "w", encoding="utf-8") as file:
            file.writelines(results.items())


def markdown(results: Results, images: dict[str, str]) -> str:
    parts = [f"# {title(results)}", headline(results), table(*models_table(results))]
    parts += [f"**{warning}**" for warning in results.warnings()] + results.facts["notes"]
    if results.recoveries():
        parts += ["## Recovery", RECOVERY, table(*recovery_table(results))]
    for task in results.tasks:
        parts += [f"## {task.name}", about(results, task)]
        for head, rows in tables(results, task):
            parts.append(table(head, rows))
        if task.name in images:
            parts.insert(-1, f"![{task.plot.title}]({images[task.name]})")
        for label, text in texts(results, task):
            text = f"```text\n{text}\n```"
            parts.append(f"{label}:\n\n{text}" if len(text) < LONG else folded(label, f"\n\n{text}\n\n"))
    return "\n\n".join(parts) + "\n"


LONG = 1500  # characters of a text that is folded away


def folded(label: str, body: str) -> str:
    """HTML, which Markdown may hold."""
    return f"<details><summary>{label}</summary>{body}</details>"


RECOVERY = (
    "Share of what the original scores above chance, on the first number of each task, with the 95 % interval of a "
    "bootstrap over the items. Tasks on which the original itself is not above chance by two standard errors are left "
    "out."
)


def title(results: Results) -> str:
    first, *others = results.models
    return f"{first} against {', '.join(others)}" if others else first


def headline(results: Results) -> str:
    facts = results.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    where = f"Recipe `{facts['recipe']['name']}` on {facts['hardware']}, {facts['dtype']} for all models."
    return f"{where} {versions}. {facts['date']}."


def about(results: Results, task: Task) -> str:
    coverage = results.facts["coverage"][task.name]
    return task.about + (f" Here: {coverage}." if coverage else "")


def models_table(results: Results) -> tuple[list[str], list[list[str]]]:
    head = ["model", "what", "parameters", "trained on", "tokens read", "seconds"]
    rows = []
    for label, m in results.models.items():
        trained = "" if m["trained_tokens"] is None else f"{m['trained_tokens']:,}"
        rows.append([label, m["what"], f"{m['parameters']:,}", trained, f"{m['tokens']:,}", f"{m['seconds']:.0f}"])
    return head, rows


def recovery_table(results: Results) -> tuple[list[str], list[list[str]]]:
    found = results.recoveries()
    labels = [label for label in results.models if any(label in row for row in found.values())]
    rows = [
        [" ".join(filter(None, (name, row["metric"]))), *(recovery_cell(row.get(label)) for label in labels)]
        for name, row in found.items()
    ]
    return ["", *labels], rows


def tables(results: Results, task: Task) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(head, rows) of the numbers of a task, and of their changes against the original."""
    outcomes = results.outcomes[task.name]
    labels = [label for label in results.models if label in outcomes]
    rows = [[name, *(cell(row.get(label)) for label in labels)] for name, row in numbers(results, task)]
    if rows:
        yield ["", *labels], rows
    found = {(name, label): change_cell(change) for name, label, change in results.changes(task)}
    names, others = dict.fromkeys(name for name, _ in found), dict.fromkeys(label for _, label in found)
    if found:
        head = [f"against {next(iter(results.models))}, same items, 95 %", *others]
        yield head, [[name, *(found.get((name, label), "") for label in others)] for name in names]


def numbers(results: Results, task: Task) -> Iterator[tuple[str, dict[str, Metric]]]:
    """The metrics of a task that go into a table: those of single layers are in its plot and its text."""
    return ((name, row) for name, row in results.metrics(task) if not re.fullmatch(r"layer \d+", name))


def texts(results: Results, task: Task) -> Iterator[tuple[str, str]]:
    for label, outcome in results.outcomes[task.name].items():
        if outcome.text:
            yield label, outcome.text


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(metric: Metric | None) -> str:
    """A number with its error: perplexities and scores with the standard error, shares with the 95 % interval."""
    if metric is None:
        return ""
    if metric.unit == "bytes":
        return human_bytes(metric.value)
    if metric.unit == "share":
        return f"{100 * metric.value:.1f} % [{100 * metric.low:.0f}, {100 * metric.high:.0f}]"
    if metric.unit in ("ppl", "score"):
        value = number(metric.value)
        return value if metric.stderr is None else f"{value} +- {number(metric.stderr)}"
    return f"{number(metric.value)} {metric.unit}"


def recovery_cell(found: dict | None) -> str:
    if found is None:
        return ""
    bounds = f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]" if "low" in found else ""
    return f"{100 * found['recovery']:.1f} %{bounds}"


def change_cell(change: dict) -> str:
    """A ratio of perplexities, or a difference, with its bootstrap interval."""
    if "ratio" in change:
        return f"x {change['ratio']:.3f}" + bounds(change, ".3f")
    if "p" not in change:
        return f"{change['difference']:+.3g}" + bounds(change, "+.3g")
    points = {key: None if change[key] is None else 100 * change[key] for key in ("difference", "low", "high")}
    return f"{points['difference']:+.1f}{bounds(points, '+.1f')} points (McNemar p = {change['p']:.2g})"


def bounds(change: dict, form: str) -> str:
    return "" if change["low"] is None else f" [{change['low']:{form}}, {change['high']:{form}}]"


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
    """The table for the terminal: every number of every model but those of single layers, recovery, warnings, notes."""
    labels = list(results.models)
    rows = [["", *labels]]
    for task in results.tasks:
        rows += [
            [f"{task.name} {name}", *(cell(row.get(label)) for label in labels)] for name, row in numbers(results, task)
        ]
    if results.recoveries():
        head, kept = recovery_table(results)
        rows += [
            [f"recovery {row[0]}", *(dict(zip(head[1:], row[1:], strict=True)).get(label, "") for label in labels)]
            for row in kept
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        lines.append(name.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)))
    lines += [f"\n{sentence}" for sentence in (*results.warnings(), *results.facts["notes"])]
    return "\n".join(line.rstrip() for line in lines)
