from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from hfcompress.measurement import Metric, accuracy, macro_f1, mcnemar, mean_interval, pearson


def answers(right: int, n: int) -> tuple[list[int], list[int]]:
    return [1] * right + [0] * (n - right), [1] * n


def guesses(n: int, classes: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and predictions that are right in about 60 %."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    return np.where(generator.random(n) < 0.6, labels, generator.integers(classes, size=n)), labels


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 7), (81, 263), (91_300, 100_000)])
def test_accuracy_and_its_wilson_interval_agree_with_scipy(right, n):
    metric = accuracy(*answers(right, n))
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert metric == Metric(
        "accuracy", right / n, n, pytest.approx(interval.low, abs=1e-12), pytest.approx(interval.high, abs=1e-12)
    )
    assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_wilson_interval_by_hand():
    # 81 of 263, the example of Newcombe (1998), table I: 0.2553 to 0.3662
    metric = accuracy(*answers(81, 263))
    assert (round(metric.low, 4), round(metric.high, 4)) == (0.2553, 0.3662)


def test_accuracy_takes_names_and_arrays():
    assert accuracy(["cat", "dog", "cat"], np.array(["cat", "dog", "dog"])).value == pytest.approx(2 / 3)
    predictions, labels = guesses(500, 4, seed=0)
    assert accuracy(predictions, labels).value == pytest.approx(accuracy_score(labels, predictions))


def test_mean_by_normal_approximation_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=50)
    metric = mean_interval(values, "loss")
    low, high = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert (metric.name, metric.n) == ("loss", 50)
    assert (metric.low, metric.value, metric.high) == pytest.approx((low, values.mean(), high))


def test_mean_by_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=50)
    metric = mean_interval(values, "loss", method="bootstrap", resamples=5000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert metric.value == pytest.approx(values.mean())
    assert (metric.low, metric.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_intervals_cover_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    runs = 400
    hits = {"normal": 0, "bootstrap": 0}
    for _ in range(runs):
        values = generator.normal(3.0, 2.0, size=60)
        for method in hits:
            metric = mean_interval(values, "x", method=method, resamples=200)
            hits[method] += metric.low <= 3.0 <= metric.high
    assert all(0.91 < count / runs < 0.98 for count in hits.values())


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_macro_f1_agrees_with_sklearn(classes):
    predictions, labels = guesses(120, classes, seed=classes)
    metric = macro_f1(predictions, labels, resamples=10)
    assert metric.value == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert (metric.name, metric.n) == ("macro_f1", 120)


def test_macro_f1_with_classes_that_only_one_side_has():
    predictions, labels = ["a", "b", "b", "x"], ["a", "b", "c", "c"]
    # F1 of a: 1; of b: 2/3; of c: 0 (never predicted); of x: 0 (never true)
    assert macro_f1(predictions, labels, resamples=1).value == pytest.approx((1 + 2 / 3) / 4)


def test_macro_f1_interval_agrees_with_scipy_over_sklearn():
    predictions, labels = guesses(80, 3, seed=1)
    metric = macro_f1(predictions, labels, resamples=2000)
    theirs = stats.bootstrap(
        (labels, predictions),
        lambda y, p: f1_score(y, p, average="macro"),
        paired=True,
        vectorized=False,
        n_resamples=500,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (metric.low, metric.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_a_perfect_score_has_a_perfect_bootstrap():
    assert macro_f1([0, 1, 2, 2], [0, 1, 2, 2]) == Metric("macro_f1", 1.0, 4, 1.0, 1.0)


@pytest.mark.parametrize(
    "interval",
    [
        lambda seed: macro_f1(*guesses(50, 3, seed=0), seed=seed, resamples=50),
        lambda seed: mean_interval(guesses(50, 9, seed=0)[0], "x", method="bootstrap", seed=seed, resamples=50),
    ],
)
def test_a_bootstrap_is_the_same_for_the_same_seed(interval):
    assert interval(0) == interval(0) != interval(1)


@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_pearson_agrees_with_scipy(noise):
    generator = np.random.default_rng(0)
    labels = generator.uniform(0, 5, size=40)
    predictions = -2 * labels + 1 + noise * generator.normal(size=40)
    metric, theirs = pearson(predictions, labels), stats.pearsonr(predictions, labels)
    interval = theirs.confidence_interval(0.95)
    expected = (interval.low, theirs.statistic, interval.high)
    assert (metric.low, metric.value, metric.high) == pytest.approx(expected, abs=1e-7)
    assert metric.n == 40


def test_pearson_of_equal_numbers_is_one():
    metric = pearson([1, 2, 3, 4], [1, 2, 3, 4])
    assert (metric.low, metric.value, metric.high) == pytest.approx((1, 1, 1))


def test_mcnemar_agrees_with_the_binomial_test_of_scipy():
    cases = [(only_a, only_b) for only_a in range(8) for only_b in range(8)] + [(400, 460), (1200, 1000)]
    for only_a, only_b in cases:
        a = [True] * only_a + [False] * only_b + [True, False]
        b = [False] * only_a + [True] * only_b + [True, False]
        n = only_a + only_b
        expected = stats.binomtest(only_a, n).pvalue if n else 1.0
        assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert len(cases) == 66


def test_mcnemar_by_hand_and_from_either_side():
    a, b = [1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1]
    # 5 against 1: 2 * (C(6,0) + C(6,1)) / 2**6
    assert mcnemar(a, b) == mcnemar(b, a) == 2 * (math.comb(6, 0) + math.comb(6, 1)) / 2**6


def test_mcnemar_of_many_examples_is_exact_and_quick():
    a = np.zeros(40_000, dtype=bool)
    a[:20_100] = True
    # 20,100 against 19,900: the tail of the binomial by the regularized incomplete beta function
    assert mcnemar(a, ~a) == pytest.approx(2 * stats.binom.cdf(19_900, 40_000, 0.5), rel=1e-9)


@pytest.mark.parametrize("metric", [accuracy, macro_f1, pearson, mcnemar])
def test_lengths_that_differ_and_no_examples_are_an_error(metric):
    with pytest.raises(ValueError, match=r"length 4, .* 5"):
        metric([0, 1, 0, 1], [0, 1, 0, 1, 1])
    with pytest.raises(ValueError, match="is empty"):
        metric([], [])
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        metric([[0, 1], [1, 0]], [0, 1])


def test_what_has_no_interval_is_an_error():
    with pytest.raises(ValueError, match="is empty"):
        mean_interval([], "loss")
    with pytest.raises(ValueError, match="length 1"):
        mean_interval([1.0], "loss")
    with pytest.raises(ValueError, match="1 values that are not finite"):
        mean_interval([1.0, math.nan], "loss")
    with pytest.raises(ValueError, match="choose 'normal' or 'bootstrap'"):
        mean_interval([1.0, 2.0], "loss", method="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resamples=0"):
        mean_interval([1.0, 2.0], "loss", method="bootstrap", resamples=0)
    with pytest.raises(ValueError, match="length 3"):
        pearson([1, 2, 3], [1, 2, 4])
    with pytest.raises(ValueError, match="labels are all 2"):
        pearson([1, 2, 3, 4], [2, 2, 2, 2])
    with pytest.raises(ValueError, match="must hold booleans"):
        mcnemar([0, 1, 2], [0, 1, 1])
