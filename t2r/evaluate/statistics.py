"""Numbers with their uncertainty, and differences between two models on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

Z95 = 1.959964


@dataclass
class Metric:
    """One number of a report.

    unit: "ppl" (exp of a mean loss), "share" (of items that are right, 0 to 1), "score" (mean of one number an item),
        or a plain quantity: "bytes", "tokens/s".
    low, high: 95 % interval. stderr: standard error of value. n: independent samples. None: not a statistic.
    x: where the number stands on its task's horizontal axis, in tokens.
    chance: of a share, what guessing gives.
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
    chance: float | None = None
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
    return Metric(name, "ppl", value, low, high, value * error, len(losses), x, samples=losses)


def share(name: str, hits: Sequence[bool], x: float | None = None, chance: float | None = None) -> Metric:
    """Share of hits with Wilson's interval."""
    n, value = len(hits), mean(hits)
    error, samples = math.sqrt(value * (1 - value) / n), [float(hit) for hit in hits]
    return Metric(name, "share", value, *wilson(sum(hits), n), error, n, x, chance, samples)


def score(name: str, values: Sequence[float], x: float | None = None) -> Metric:
    """Mean of one number an item, with a normal interval."""
    value, error = mean(values), mean_error(values)
    low, high = (None, None) if error is None else (value - Z95 * error, value + Z95 * error)
    return Metric(name, "score", value, low, high, error, len(values), x, samples=values)


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
    n, ways, total = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):
        total += ways
        ways = ways * (n - k) // (k + 1)  # n over k + 1
    return min(1.0, 2 * total / 2**n)


def paired(original: Metric, other: Metric) -> dict | None:
    """What changed on the same items, or None where a metric has no samples.

    ppl: {"ratio", "stderr", "low", "high"}, the ratio of the perplexities. share, score: {"difference", "stderr",
    "low", "high"}; of a share also "p", from `mcnemar`. low, high: 95 % interval by bootstrap over the items.
    """
    if not original.samples or len(original.samples) != len(other.samples):
        return None
    differences = [b - a for a, b in zip(original.samples, other.samples, strict=True)]
    change, error = mean(differences), mean_error(differences)
    low, high = interval(resampled(differences)[:, 0]) if error is not None else (None, None)
    if original.unit == "ppl":
        ratio = exp(change)
        bounds = {"low": None, "high": None} if low is None else {"low": exp(low), "high": exp(high)}
        return {"ratio": ratio, "stderr": None if error is None else ratio * error, **bounds}
    found = {"difference": change, "stderr": error, "low": low, "high": high}
    return found | {"p": mcnemar(original.samples, other.samples)} if original.unit == "share" else found


def recovery(original: Metric, other: Metric) -> dict | None:
    """How much of what the original has above chance the other one has: {"recovery", "low", "high"}, 1 is all of it.

    The interval is by bootstrap over the items. None where the original is not above chance by two standard errors:
    there is nothing to recover then.
    """
    if original.unit not in ("share", "score") or not original.samples or len(original.samples) != len(other.samples):
        return None
    base = original.chance or 0.0
    if not original.value - base > 2 * (original.stderr or math.inf):
        return None
    means = resampled(original.samples, other.samples)
    # a resample whose original is at chance says nothing; it is as rare as the two standard errors make it
    sound = means[means[:, 0] > base]
    low, high = interval((sound[:, 1] - base) / (sound[:, 0] - base))
    return {"recovery": (other.value - base) / (original.value - base), "low": low, "high": high}


def resampled(*columns: Sequence[float], times: int = 2000) -> numpy.ndarray:
    """[times, len(columns)] means of bootstrap resamples of the items, the same items for all columns; always the same.

    Counts how often each distinct item is drawn, so that 0/1 samples cost nothing.
    """
    distinct, counts = numpy.unique(numpy.array(columns, dtype=float).T, axis=0, return_counts=True)
    n = counts.sum()
    generator = numpy.random.default_rng(0)
    parts = [generator.multinomial(n, counts / n, size=size) @ distinct / n for size in [100] * (times // 100)]
    return numpy.concatenate(parts)


def interval(samples: numpy.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = numpy.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
