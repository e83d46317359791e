"""The table and the curve of smollm2-135m-exact, from the reports of its rows: python docs/results/rows.py

Reads docs/results/memory/ROW/report.json of every row; writes docs/results/memory/README.md and rows.png
beside it. The first table is the one at the top of the project's README.
"""

import json
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "memory"
ROWS = {  # what it is: (folder, column of its report)
    "original": ("64-30m", 0),
    "0 tokens": ("64-0", 1),
    "1.3M": ("64-1m", 1),
    "10.5M": ("64-10m", 1),
    "31.5M": ("64-30m", 1),
    "31.5M, seed 1": ("64-30m-seed1", 1),
    "100.7M": ("64-100m", 1),
    "100.7M, seed 1": ("64-100m-seed1", 1),
    "128 slots, 31.5M": ("128", 1),
    "hybrid, 31.5M": ("hybrid", 1),
    "31.5M, window only": ("64-30m", 2),
    "paper's start, 31.5M": ("paper", 1),
}
OTHERS = {
    "original": ("64-30m", 0),
    "31.5M": ("64-30m", 1),
    "gates at 3e-3": ("64-30m-text", 1),
    "and answers from the teacher": ("64-30m-teacher", 1),
    "and near": ("64-30m-near", 1),
    "0 tokens, near": ("64-0-near", 1),
    "1.3M, near": ("64-1m-near", 1),
    "10.5M, near": ("64-10m-near", 1),
    "128 slots, 31.5M": ("128", 1),
    "128 slots, as and near": ("128-near", 1),
}
COMMITS = {
    "79b2b20": ("64-30m-teacher", "64-30m-near", "64-0-near", "64-1m-near", "64-10m-near", "128-near"),
    "5dee82d": ("64-30m-seed1", "128", "hybrid"),
}
COMMIT = "4b51640"  # of the other rows
CURVE = ("0 tokens", "1.3M", "10.5M", "31.5M", "100.7M")
SHORT = (
    "original",
    "0 tokens",
    "1.3M",
    "31.5M",
    "100.7M",
    "128 slots, 31.5M",
    "31.5M, window only",
    "paper's start, 31.5M",
)
PERPLEXITY = {f"WikiText-2, perplexity @ {n}": (f"wikitext-{n}", f"first {n}") for n in (1024, 2048, 8192)}
LATE = {
    f"tokens {low:,} to {high - 1:,} of 65,536": ("wikitext-65536", f"[{low}, {high})")
    for low, high in ((0, 8192), (8192, 16384), (16384, 32768), (32768, 65536))
}
TASKS = {
    "PIQA": ("piqa", "acc"),
    "ARC-e": ("arc-easy", "acc"),
    "ARC-c": ("arc-challenge", "acc_norm"),
    "HellaSwag": ("hellaswag", "acc_norm"),
    "WinoGrande": ("winogrande", "acc"),
}
DISTANCES = (64, 128, 256, 512, 1024, 2048)
CODES = {
    f"a code of a list of eight, {n:,} tokens later": ("pairs-later", f"8 pairs, {n:,} tokens ago") for n in DISTANCES
}
NEEDLE = {f"needle, {n:,} tokens": ("needle", f"{n:,} tokens") for n in (256, 512, 1024, 2048, 4096)}
LAMBADA = {"LAMBADA, accuracy": ("lambada", "accuracy")}


class Column:
    """The numbers of one model of a row's report: the first is the original, the second the row's own."""

    def __init__(self, row: str, place: int) -> None:
        self.report = json.loads((FOLDER / row / "report.json").read_text())
        self.name = list(self.report["models"])[place]
        self.model = self.report["models"][self.name]

    @property
    def tokens(self) -> int:
        return self.model["trained_tokens"] or 0

    def number(self, task: str, metric: str) -> tuple[float, float]:
        """(value, standard error)"""
        one = self.report["results"][task]["metrics"][metric][self.name]
        return one["value"], one["stderr"]

    def mean(self) -> tuple[float, float]:
        """Of the five short tasks."""
        found = [self.number(*task) for task in TASKS.values()]
        return sum(value for value, _ in found) / len(found), sum(e * e for _, e in found) ** 0.5 / len(found)

    def cell(self, task: str, metric: str, error: bool) -> str:
        value, stderr = self.mean() if task == "mean" else self.number(task, metric)
        if task.startswith("wikitext"):
            digits = 2 if value < 1000 else 0
            return f"{value:,.{digits}f}" + (f" +- {stderr:,.{digits}f}" if error else "")
        return f"{100 * value:.1f}" + (f" +- {100 * stderr:.1f} %" if error else " %")


def columns(rows: Iterable[str]) -> dict[str, Column]:
    return {row: Column(*(ROWS | OTHERS)[row]) for row in rows}


def table(measures: dict[str, tuple[str, str]], shown: dict[str, Column], error: bool) -> list[str]:
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    return lines + [
        f"| {label} | " + " | ".join(column.cell(*measure, error) for column in shown.values()) + " |"
        for label, measure in measures.items()
    ]


def short() -> list[str]:
    mean = {f"{', '.join(TASKS)}, mean": ("mean", "")}
    return table(PERPLEXITY | LAMBADA | mean | dict(list(CODES.items())[1:5]), columns(SHORT), error=False)


def full(rows: Iterable[str]) -> list[str]:
    mean = {"mean of the five": ("mean", "")}
    return table(PERPLEXITY | LATE | LAMBADA | TASKS | mean | CODES | NEEDLE, columns(rows), error=True)


def made() -> list[str]:
    """How each row was made."""
    lines = ["| row | slots a layer | tokens | seed | commit | hardware |", "|---|---|---|---|---|---|"]
    for row in dict(place for place in (ROWS | OTHERS).values() if place[1] == 1):
        column, config = Column(row, 1), FOLDER / row / "config.yaml"
        name, seed = row, ""
        if config.exists():
            name = f"[{row}]({row}/config.yaml)"
            seed = next(line.split()[1] for line in config.read_text().splitlines() if line.startswith("seed:"))
        commit = next((commit for commit, rows in COMMITS.items() if row in rows), COMMIT)
        slots, hardware = column.model["gsa"]["slots"], column.report["hardware"]
        lines.append(f"| {' | '.join(map(str, (name, slots, f'{column.tokens:,}', seed, commit, hardware)))} |")
    return lines


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (original,), trained = columns(["original"]).values(), columns(CURVE).values()
    tokens = [column.tokens / 1e6 for column in trained]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for n in (1024, 2048):
        key = f"wikitext-{n}", f"first {n}"
        left.plot(tokens, [c.number(*key)[0] / original.number(*key)[0] for c in trained], "o-", label=f"@ {n}")
    left.set(xlabel="million tokens", ylabel="perplexity, original = 1", ylim=(1, None))
    for n in (128, 256, 512, 1024):
        key = CODES[f"a code of a list of eight, {n:,} tokens later"]
        (line,) = right.plot(tokens, [100 * c.number(*key)[0] for c in trained], "o-", label=f"{n:,} tokens later")
        right.axhline(100 * original.number(*key)[0], color=line.get_color(), ls=":", lw=1)
    right.set(xlabel="million tokens", ylabel="codes recalled, %", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks([0, 1, 10, 30, 100], ["0", "1", "10", "30", "100"])
        axes.set_xlim(-0.2, 150)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "rows.png", dpi=110)


def page() -> str:
    parts = [
        "# SmolLM2-135M-Instruct without a key-value cache",
        "Written by [rows.py](../rows.py) from the reports beside it. Recipe `memory`: test text, all items, bfloat16, "
        "standard errors over blocks or items. Slots are those of a layer on average, by need (hybrid and paper's "
        "start: as many in each).",
        "\n".join(short()),
        "![Perplexity and recall by tokens of training; dotted: the original](rows.png)",
        "\n".join(full(ROWS)),
        "What the recipe was before, a change a column: gates at 3e-3 and warmed up over four steps, not at 1e-3 and "
        "over 16; answers of lookups learnt from the teacher's logits, not from the text; `convert.eviction_reach` "
        "near, not far (near is younger than the configurations beside it, which do not name it).",
        "\n".join(full(OTHERS)),
        "\n".join(made()),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    plot()
    (FOLDER / "README.md").write_text(page())
    print("\n".join(short()))
