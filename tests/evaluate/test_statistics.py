"""Intervals, tests and differences against their definitions."""

import math
import random
import re

import numpy
import pytest

from t2r.evaluate.report import change_cell
from t2r.evaluate.statistics import mcnemar, mean_error, paired, perplexity, recovery, resampled, score, share, wilson


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for hits in range(33):
        low, high = wilson(hits, 32)
        assert 0 <= low <= hits / 32 <= high <= 1


def test_mcnemar():
    first = [1] * 2 + [0] * 10 + [1] * 30
    second = [0] * 2 + [1] * 10 + [1] * 30
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(first, first) == 1.0


def test_paired_changes():
    a, b = perplexity("p", [1.0, 2.0, 3.0]), perplexity("p", [1.5, 2.5, 3.5])
    assert a.value == pytest.approx(math.exp(2)) and a.stderr == pytest.approx(math.exp(2) / math.sqrt(3))
    same = math.exp(0.5)
    assert paired(a, b) == pytest.approx({"ratio": same, "stderr": 0.0, "low": same, "high": same})
    change = paired(share("s", [True, False, False, True]), share("s", [True, True, True, True]))
    # of four items two are gained: a resample gains a binomial number of four
    expected = {"difference": 0.5, "stderr": math.sqrt(1 / 3 / 4), "low": 0.0, "high": 1.0, "p": 0.5}
    assert change == pytest.approx(expected)
    assert paired(share("s", [True]), share("s", [True, False])) is None
    assert perplexity("p", [2000.0, 2000.0]).value == math.inf


def test_bootstrap_agrees_with_the_normal_interval_and_is_always_the_same():
    values = [random.gauss(1.0, 2.0) for _ in range(400)]
    means = resampled(values)
    assert means.shape == (2000, 1) and numpy.array_equal(means, resampled(values))
    assert means.mean() == pytest.approx(sum(values) / 400, abs=0.02)
    assert means.std() == pytest.approx(mean_error(values), rel=0.06)
    # columns share their items: a difference that is the same for every item has no spread
    both = resampled(values, [value + 1 for value in values])
    assert numpy.ptp(both[:, 1] - both[:, 0]) < 1e-9


def test_recovery_is_chance_corrected():
    original = share("acc", [1] * 70 + [0] * 30, chance=0.25)
    other = share("acc", [1] * 40 + [0] * 60, chance=0.25)
    found = recovery(original, other)
    assert found["recovery"] == pytest.approx((0.40 - 0.25) / (0.70 - 0.25))
    assert found["low"] < found["recovery"] < found["high"] and found["high"] - found["low"] < 0.6
    assert recovery(original, original) == pytest.approx({"recovery": 1.0, "low": 1.0, "high": 1.0})
    by_chance = share("acc", [1] * 30 + [0] * 70, chance=0.25)
    assert recovery(by_chance, other) is None  # nothing above chance to recover
    assert recovery(perplexity("p", [1.0]), perplexity("p", [1.0])) is None
    assert recovery(score("f1", [4.0, 8.0, 6.0]), score("f1", [2.0, 4.0, 3.0]))["recovery"] == pytest.approx(0.5)


def test_changes_are_told_with_their_intervals():
    better = paired(share("s", [1, 0] * 50), share("s", [1, 1, 1, 0] * 25))
    assert re.fullmatch(r"\+25.0 \[\+1\d\.\d, \+3\d\.\d\] points \(McNemar p = 6e-08\)", change_cell(better))
    worse = paired(perplexity("p", [1.0, 2.0, 3.0]), perplexity("p", [1.1, 2.1, 3.1]))
    assert change_cell(worse) == "x 1.105 [1.105, 1.105]"
    assert change_cell(paired(perplexity("p", [1.0]), perplexity("p", [1.1]))) == "x 1.105"
    assert change_cell(paired(score("f", [1.0, 2.0]), score("f", [3.0, 4.0]))) == "+2 [+2, +2]"
