"""The picture at the end of a stage: loss, perplexity by position against the teacher's, half-lives and slot use."""

from pathlib import Path

from t2r.train.log import METRICS, read
from t2r.train.validation import HALF_LIVES, USES

PLOT = "training.svg"


def plot(out: Path) -> Path | None:
    """Draw out/training.svg from out/metrics.jsonl. None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read(out / METRICS)
    steps = [r for r in records if r.get("loss") is not None]
    checks = [r for r in records if "validation_loss" in r]
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, ppl, lives, use = figure.subplots(2, 2).flat
    loss.plot([r["tokens"] for r in steps], [r["loss"] for r in steps], label="training")
    loss.plot([r["tokens"] for r in checks], [r["validation_loss"] for r in checks], "o-", label="held out")
    loss.set(title="Loss", xlabel="tokens", yscale="log" if positive(steps, checks) else "linear")
    loss.legend()
    if checks:
        draw_checks(checks, ppl, lives, use)
    figure.savefig(out / PLOT)
    return out / PLOT


def positive(steps: list[dict], checks: list[dict]) -> bool:
    return all(r["loss"] > 0 for r in steps) and all((r["validation_loss"] or 0) > 0 for r in checks)


def draw_checks(checks: list[dict], ppl, lives, use) -> None:
    first, last = checks[0], checks[-1]
    lines = {"before": first["ppl"], "after": last["ppl"], "teacher": last.get("teacher_ppl", {})}
    for label, values in lines.items():
        buckets = [name for name in last["ppl"] if name in values and name != "all"]
        ppl.plot(buckets, [values[name] for name in buckets], "o-", label=label)
    ppl.set(title="Held-out perplexity by position", xlabel="position in the document")
    ppl.legend()
    for axis, key, bounds, title in (
        (lives, "half_life", [str(b) for b in HALF_LIVES], "Half-life of slots (tokens, up to)"),
        (use, "use", [f"{b:g}" for b in USES[1:]], "Share of the reads (1 is even, up to)"),
    ):
        names = [*bounds, "more"]
        for label, record, shift in (("before", first, -0.2), ("after", last, 0.2)):
            axis.bar([i + shift for i in range(len(names))], record["gates"][key], width=0.4, label=label)
        axis.set(title=title, ylabel="slots")
        axis.set_xticks(range(len(names)), names, rotation=60)
        axis.legend()
