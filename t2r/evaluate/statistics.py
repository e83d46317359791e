"""Numbers with their uncertainty, and differences between two models on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Z95 = 1.959964


@dataclass
class Metric:
    """One number of a report.

    unit: "ppl" (exp of a mean loss), "share" (of items that are right, 0 to 1), or a plain quantity: "bytes",
        "tokens/s".
    low, high: 95 % interval. stderr: standard error of value. n: independent samples. None: not a statistic.
    x: where the number stands on its task's horizontal axis, in tokens.
    samples: one per item, in the order of the items, the same for every model: losses in nats or 0/1.
    """

    name: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int | None = None
    x: float | None = None
    samples: Sequence[float] = field(default=(), repr=False)

    def to_dict(self) -> dict:
        """For report.json: without the samples, which items.jsonl has."""
        return {key: value for key, value in vars(self).items() if key not in ("name", "samples")}


def perplexity(name: str, losses: Sequence[float], x: float | None = None) -> Metric:
    """exp of the mean of `losses` (nats, one per independent sample); the interval is exp of the mean's."""
    average, error = mean(losses), mean_error(losses)
    value = exp(average)
    if error is None:
        return Metric(name, "ppl", value, n=1, x=x, samples=losses)
    low, high = exp(average - Z95 * error), exp(average + Z95 * error)
    return Metric(name, "ppl", value, low, high, value * error, len(losses), x, losses)


def share(name: str, hits: Sequence[bool], x: float | None = None) -> Metric:
    """Share of hits with Wilson's interval."""
    n, value = len(hits), mean(hits)
    error, samples = math.sqrt(value * (1 - value) / n), [float(hit) for hit in hits]
    return Metric(name, "share", value, *wilson(sum(hits), n), error, n, x, samples)


def mean(samples: Sequence[float]) -> float:
    return sum(samples) / len(samples)


def mean_error(samples: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single sample."""
    n, average = len(samples), mean(samples)
    return math.sqrt(sum((x - average) ** 2 for x in samples) / (n - 1) / n) if n > 1 else None


def exp(x: float) -> float:
    """e^x, infinite where a float ends: a broken model's perplexity is a finding, not a crash."""
    return math.exp(x) if not x > 700 else math.inf


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion, sound for few items and near 0 and 1 (Wilson 1927)."""
    p, z2 = hits / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # rounding must not push the bounds past the value itself at 0 and 1
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p of McNemar's test that two models are right equally often, from 0/1 on the same items."""
    gained = sum(b > a for a, b in zip(first, second, strict=True))
    lost = sum(b < a for a, b in zip(first, second, strict=True))
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)


def paired(original: Metric, other: Metric) -> dict | None:
    """What changed on the same items, or None where a metric has no samples.

    ppl: {"ratio", "stderr"}, the ratio of the perplexities. share: {"difference", "stderr", "p"}, p from `mcnemar`.
    """
    if not original.samples:
        return None
    differences = [b - a for a, b in zip(original.samples, other.samples, strict=True)]
    change, error = mean(differences), mean_error(differences)
    if original.unit == "share":
        return {"difference": change, "stderr": error, "p": mcnemar(original.samples, other.samples)}
    ratio = exp(change)
    return {"ratio": ratio, "stderr": None if error is None else ratio * error}
