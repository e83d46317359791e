"""Many reports in one table: what each converted model recovers of its original, and after how many tokens."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t2r.errors import UserError
from t2r.evaluate.html import inline, page, table
from t2r.evaluate.results import SCHEMA_VERSION

NAME = "leaderboard"


@dataclass
class Row:
    """A converted model of one report. tokens: it was trained on. recovery: task -> share of the original, 1 is all."""

    report: str
    recipe: str
    original: str
    model: str
    tokens: int
    recovery: dict[str, float]

    @property
    def mean(self) -> float:
        return self.recovery.get("mean", next(iter(self.recovery.values())))


def leaderboard(folder: str, out: str | None = None) -> None:
    """Collect every report.json below `folder`, print the table, and write it to `out`, by default DIR/leaderboard:
    leaderboard.md, .html, .json and the plot of recovery against tokens.

    Raises UserError where there is no report with a recovery, and where `out` exists with something else in it.
    """
    from t2r.evaluate.plots import require_matplotlib

    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {folder}", next="t2r compare ORIGINAL CONVERTED")
    target = Path(out).expanduser() if out else root / NAME
    if target.exists() and not (target / f"{NAME}.json").exists():
        raise UserError(f"{target} exists and is no leaderboard", where="--out", nearest=f"{target}-2")
    require_matplotlib()
    skipped: list[str] = []
    found = sorted(rows(root, skipped), key=lambda row: (row.recipe, row.original, -row.mean))
    for reason in skipped:
        print(reason)
    if not found:
        raise UserError(
            "no report with a recovery", where=root, next="t2r compare ORIGINAL CONVERTED --recipe commonsense"
        )
    head, body = as_table(found)
    try:
        target.mkdir(exist_ok=True, parents=True)
        image = plot(found, target)
        parts = [f"# Leaderboard of {root}", markdown(head, body), f"![Recovery by tokens]({image})"]
        write(target / f"{NAME}.md", "\n\n".join(parts) + "\n")
        write(target / f"{NAME}.json", json.dumps([vars(row) for row in found], indent=1) + "\n")
        drawing = inline(target / f"{NAME}.svg", NAME)
        write(target / f"{NAME}.html", page(f"Leaderboard of {root}", [table(head, body), drawing]))
    except OSError as error:
        raise UserError(f"cannot write there: {error.strerror}", where=target) from error
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    for line in [head, *body]:
        cells = zip(line[3:], widths[3:], strict=True)
        texts = (word.ljust(width) for word, width in zip(line[:3], widths[:3], strict=True))
        print("  ".join([*texts, *(cell.rjust(width) for cell, width in cells)]).rstrip())
    print(f"\nwrote {target / f'{NAME}.md'}")


def rows(root: Path, skipped: list[str]) -> Iterator[Row]:
    """The rows of all reports; of those that cannot be used a line in `skipped`."""
    for file in sorted(root.rglob("report.json")):
        name = str(file.parent.relative_to(root))
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            version, models, recovery = report["schema_version"], report["models"], report.get("recovery", {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.append(f"skipped {name}: not a report ({type(error).__name__})")
            continue
        if version != SCHEMA_VERSION:
            skipped.append(f"skipped {name}: its schema is {version}, this t2r reads {SCHEMA_VERSION}")
            continue
        if not recovery:
            skipped.append(f"skipped {name}: recipe {report['recipe']['name']} has no task with a recovery")
            continue
        original = next(iter(models))
        for label, model in models.items():
            own = {task: row[label]["recovery"] for task, row in recovery.items() if label in row}
            if label != original and own:
                yield Row(name, report["recipe"]["name"], original, label, model["trained_tokens"] or 0, own)


def as_table(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    tasks = list(dict.fromkeys(task for row in found for task in row.recovery if task != "mean"))
    head = ["report", "model", "recipe", "tokens", "mean", *tasks]
    body = []
    for row in found:
        cells = [percent(row.recovery.get(task)) for task in tasks]
        body.append([row.report, row.model, row.recipe, f"{row.tokens:,}", percent(row.mean), *cells])
    return head, body


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(found: list[Row], folder: Path) -> str:
    """Draw mean recovery by tokens of training, one line for each recipe and original; the file's name."""
    from t2r.evaluate.plots import STYLES, new_figure, save

    figure, axes = new_figure()
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(f"{row.recipe}, {row.original}", []).append(row)
    for i, (name, own) in enumerate(groups.items()):
        colour, marker, dashes = STYLES[i % len(STYLES)]
        own = sorted(own, key=lambda row: row.tokens)
        xs, ys = [row.tokens for row in own], [100 * row.mean for row in own]
        axes.plot(xs, ys, label=name, color=colour, marker=marker, linestyle=dashes)
        for x, y, row in zip(xs, ys, own, strict=True):
            axes.annotate(row.model, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xscale("symlog", linthresh=1e5)
    axes.set(title="Recovery by tokens", xlabel="tokens of training", ylabel="recovery of the original (%)")
    axes.legend(frameon=False, fontsize=8)
    return save(figure, folder, NAME)


def write(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)
