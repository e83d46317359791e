"""Line plots of a comparison, one per task: colours of Okabe and Ito, with markers and dashes for print."""

from pathlib import Path
from types import SimpleNamespace

from t2r.errors import UserError
from t2r.evaluate.task import Task

# black is the original's
STYLES = [
    ("#000000", "o", "-"), ("#0072B2", "s", "-"), ("#D55E00", "^", "--"), ("#009E73", "D", "-."),
    ("#CC79A7", "v", ":"), ("#E69F00", "P", "--"), ("#56B4E9", "X", "-."),
]  # fmt: skip


def require_matplotlib() -> None:
    """Raise UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the plots need matplotlib", next="pip install 't2r[demo]'") from error


def plot(results, task: Task, folder: Path) -> str:
    """Draw a task's metrics that have an x, one line per model (NAME.png, NAME.svg in `folder`); the first's name."""
    from matplotlib.ticker import (
        EngFormatter,
        FixedLocator,
        FuncFormatter,
        MaxNLocator,
        NullLocator,
        PercentFormatter,
    )

    figure, axes = new_figure()
    spec, unit = task.plot, ""
    ticks: set[float] = set()
    heights: list[float] = []
    outcomes = results.outcomes[task.name]
    for i, label in enumerate(results.models):
        metrics = [m for m in outcomes.get(label, SimpleNamespace(metrics=[])).metrics if m.x is not None]
        if not metrics:
            continue
        unit, (colour, marker, dashes) = metrics[0].unit, STYLES[i % len(STYLES)]
        xs, values, errors = [m.x for m in metrics], [m.value for m in metrics], None
        ticks |= set(xs)
        heights += values
        # A perplexity's interval is the spread between texts, which all models share: it says nothing of their order.
        if unit == "share":
            errors = [[m.value - m.low for m in metrics], [m.high - m.value for m in metrics]]
            xs = [x * 1.03 ** (i - (len(results.models) - 1) / 2) for x in xs]  # or equal models hide each other
        axes.errorbar(
            xs, values, yerr=errors, label=label, color=colour, marker=marker, linestyle=dashes,
            markersize=6, linewidth=1.8, elinewidth=1, capsize=3,
        )  # fmt: skip
    if spec.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(x)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if unit != "share" and max(heights) > 20 * min(heights) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    if unit == "share":
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if unit == "bytes":
        axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.set(title=spec.title, xlabel=spec.x, ylabel=spec.y)
    figure.legend(loc="outside lower center", ncols=min(3, len(results.models)), frameon=False)
    return save(figure, folder, task.name)


def new_figure():
    """(figure, its one pair of axes)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, folder: Path, name: str) -> str:
    """Write NAME.png and NAME.svg; the first's name."""
    import matplotlib

    figure.savefig(folder / f"{name}.png", dpi=150)
    # letters stay letters, and the same numbers give the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"{name}.png"


def tokens(x: float) -> str:
    """A position or length in tokens: 96, 1.5K, 128K, 3,000."""
    return f"{x / 1024:g}K" if x >= 1024 and x % 512 == 0 else f"{x:,g}"
