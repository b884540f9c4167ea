"""Paired differences: against formulas by hand, exhaustive enumeration, simulation and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from hfcompress.measurement import Answers, Metric, compare_answers, compare_metrics, mcnemar, median_interval
from hfcompress.measurement.paired import tango_interval


def right(count: int, n: int) -> Answers:
    return Answers.of_classes([1] * count + [0] * (n - count), [1] * n)


def test_scores_are_those_of_each_kind():
    assert right(3, 4).score() == 0.75 and right(3, 4).right.tolist() == [True] * 3 + [False]
    columns = np.array([2.0, 4.0]), np.array([4.0, 8.0])
    assert Answers("ratio", *columns).score() == 0.5 and Answers("ratio", *columns).right is None
    assert Answers("perplexity", *columns).score() == pytest.approx(math.exp(0.5))
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    assert Answers("correlation", x, y).score() == pytest.approx(stats.pearsonr(x, y).statistic)


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(0, 0, 10), (1, 0, 44), (9, 16, 263), (30, 0, 30), (5, 5, 12), (0, 7, 900)]
)
def test_tangos_interval_ends_where_his_statistic_is_two_sided_five_per_cent(lost, gained, n):
    """The statistic anew: the likeliest shares under a difference are found by a search, not by his quadratic equation."""

    def z_of(delta: float) -> float:
        def unlikely(share: float) -> float:  # of gaining; losing is that plus the difference
            both = 1 - 2 * share - delta
            terms = ((lost, share + delta), (gained, share), (n - lost - gained, both))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

        low, high = max(0.0, -delta), (1 - delta) / 2
        share = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return (lost - gained - n * delta) / math.sqrt(n * (2 * share + delta * (1 - delta)))

    low, high = tango_interval(lost, gained, n)
    assert -1 <= low < (lost - gained) / n < high <= 1 or lost == n
    checked = 0
    for end, z in ((low, stats.norm.ppf(0.975)), (high, -stats.norm.ppf(0.975))):
        if abs(end) < 0.9999:
            assert z_of(end) == pytest.approx(z, abs=2e-3)
            checked += 1
    assert checked >= 1


def test_the_interval_covers_what_it_should():
    """600 simulated pairs of models that differ by 3 points in truth."""
    generator, n, covered = np.random.default_rng(0), 250, 0
    for _ in range(600):
        lost, gained, _ = generator.multinomial(n, [0.07, 0.04, 0.89])
        low, high = tango_interval(int(lost), int(gained), n)
        covered += low <= 0.03 <= high
    assert 0.93 <= covered / 600 <= 0.97


def test_shares_are_tested_by_mcnemar():
    generator = np.random.default_rng(1)
    first, second = (generator.random(400) < p for p in (0.9, 0.86))
    labels = np.ones(400, dtype=int)
    change = compare_answers(*(Answers.of_classes(side.astype(int), labels) for side in (first, second)))
    lost, gained = int(np.sum(first & ~second)), int(np.sum(~first & second))
    assert change.drop == pytest.approx(100 * (lost - gained) / 400)
    assert change.p_value == mcnemar(first, second) == pytest.approx(stats.binomtest(lost, lost + gained).pvalue)
    assert (change.low, change.high) == tuple(100 * end for end in tango_interval(lost, gained, 400))
    assert (change.unit, change.test, change.n) == ("points", "McNemar, exact", 400)


def test_models_that_never_differ_are_not_known_to_be_equal():
    change = compare_answers(right(5, 6), right(5, 6))
    assert change.drop == 0 and change.p_value == 1
    z = stats.norm.ppf(0.975)
    assert (change.low, change.high) == pytest.approx((-100 * z**2 / (6 + z**2), 100 * z**2 / (6 + z**2)))


def entities(seed: int, n: int = 400) -> tuple[Answers, Answers]:
    """Ratio scores of two models on the same sentences, the second worse."""
    generator = np.random.default_rng(seed)
    bottoms = generator.integers(1, 9, n).astype(float)
    tops = generator.binomial(bottoms.astype(int), 0.9).astype(float)
    worse = generator.binomial(tops.astype(int), 0.97).astype(float)
    return Answers("ratio", tops, bottoms), Answers("ratio", worse, bottoms)


def test_the_paired_bootstrap_agrees_with_the_normal_interval_of_paired_differences():
    before, after = entities(0)
    change = compare_answers(before, after)
    total = before.bottoms.sum()
    residuals = (before.tops - after.tops) - (before.score() - after.score()) * before.bottoms
    half = 196 * math.sqrt(400 / 399 * np.sum(residuals**2)) / total
    assert change.drop == pytest.approx(100 * (before.score() - after.score()))
    assert (change.low, change.high) == pytest.approx((change.drop - half, change.drop + half), abs=0.12 * half)
    assert change.p_value < 0.01 and change.test == "paired bootstrap"
    # Pairing is what makes it narrow: the same scores as if of other examples.
    apart = compare_metrics(*(metric_of(answers) for answers in (before, after)))
    assert apart.drop == pytest.approx(change.drop) and apart.high - apart.low > 2 * (change.high - change.low)
    assert apart.p_value is None


def metric_of(answers: Answers) -> Metric:
    value = answers.score()
    half = 1.96 * math.sqrt(np.sum((answers.tops - value * answers.bottoms) ** 2)) / answers.bottoms.sum()
    return Metric("f1", value, len(answers), value - half, value + half)


def test_the_bootstrap_of_few_examples_is_that_of_all_draws():
    """Of three examples there are 27 draws."""
    before = Answers("ratio", np.array([1.0, 0.5, 0.0]), np.ones(3))
    after = Answers("ratio", np.array([0.0, 0.5, 0.25]), np.ones(3))
    lost = [np.mean([(1.0, 0.0, -0.25)[i] for i in draw]) for draw in itertools.product(range(3), repeat=3)]
    change = compare_answers(before, after, resamples=20_000)
    ends = 100 * np.percentile(np.repeat(lost, 1000), (2.5, 97.5))
    assert (change.low, change.high) == pytest.approx(tuple(ends))
    share = min(np.mean(np.array(lost) <= 0), np.mean(np.array(lost) >= 0))
    assert change.p_value == pytest.approx(2 * share, abs=0.02)


def test_a_perplexity_is_lost_in_per_cent():
    generator = np.random.default_rng(2)
    tokens = generator.integers(20, 60, 200).astype(float)
    losses = tokens * generator.normal(3.0, 0.2, 200)
    before, after = Answers("perplexity", losses, tokens), Answers("perplexity", losses + 0.1 * tokens, tokens)
    change = compare_answers(before, after)
    assert change.drop == pytest.approx(100 * math.expm1(0.1)) and change.unit == "per cent"
    assert (change.low, change.high) == pytest.approx((change.drop, change.drop)), "each block lost the same"
    assert compare_answers(after, before).drop == pytest.approx(100 * math.expm1(-0.1))
    metrics = [Metric("perplexity", a.score(), 200, a.score() * 0.97, a.score() * 1.03, False) for a in (before, after)]
    apart = compare_metrics(*metrics)
    assert apart.drop == pytest.approx(change.drop) and apart.low < change.drop < apart.high
    half = math.hypot(math.log(1.03), -math.log(0.97))
    assert apart.high == pytest.approx(100 * math.expm1(0.1 + half), rel=1e-6)


def test_a_loss_that_is_not_finite_is_lost_altogether():
    before = Answers("perplexity", np.array([1.0, 2.0]), np.ones(2))
    after = Answers("perplexity", np.array([1.0, np.nan]), np.ones(2))
    assert compare_answers(before, after).drop == math.inf


def test_correlations_are_compared_in_pairs():
    generator = np.random.default_rng(3)
    labels = generator.normal(size=300)
    close, far = (labels + scale * generator.normal(size=300) for scale in (0.3, 0.6))
    change = compare_answers(Answers("correlation", close, labels), Answers("correlation", far, labels))
    expected = stats.pearsonr(close, labels).statistic - stats.pearsonr(far, labels).statistic
    theirs = stats.bootstrap(
        (close, far, labels),
        lambda a, b, c: stats.pearsonr(a, c).statistic - stats.pearsonr(b, c).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert change.drop == pytest.approx(100 * expected)
    assert (change.low, change.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1.0)
    assert change.p_value < 0.01


def test_the_same_seed_gives_the_same_and_parts_of_the_bootstrap_do_not_matter(monkeypatch):
    before, after = entities(5, n=50)
    first = compare_answers(before, after)
    assert compare_answers(before, after) == first != compare_answers(before, after, seed=1)
    monkeypatch.setattr("hfcompress.measurement.paired._AT_ONCE", 1000)
    assert compare_answers(before, after).low == pytest.approx(first.low, abs=0.3)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (right(1, 2), right(1, 3), "2 answers (share) and 3 (share) are not of the same examples"),
        (right(1, 2), entities(0, n=2)[0], "2 answers (share) and 2 (ratio) are not of the same examples"),
        (right(1, 1), right(1, 1), "1 example is too few to compare two models"),
    ],
)
def test_what_cannot_be_compared(before, after, message):
    with pytest.raises(ValueError) as caught:
        compare_answers(before, after)
    assert str(caught.value).startswith(message)


def test_columns_have_one_value_per_example():
    for columns in ((np.ones(2), np.ones(3)), (np.ones((2, 2)), np.ones(2)), (np.ones(0), np.ones(0))):
        with pytest.raises(ValueError, match="are not one value per example"):
            Answers("ratio", *columns)
    with pytest.raises(ValueError, match="kind='mean' is not known"):
        Answers("mean", np.ones(2), np.ones(2))


def test_the_interval_of_a_median_covers_it_whatever_the_distribution():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        low, high = median_interval(generator.exponential(size=15))
        covered += low <= math.log(2) <= high
    exact = 1 - 2 * stats.binom.cdf(3, 15, 0.5)
    assert covered / 1000 == pytest.approx(exact, abs=0.015) and exact >= 0.95
    # Of 6 values it is their range, of fewer there is none; of many it is narrow.
    assert median_interval([5, 1, 2, 3, 4, 6]) == (1.0, 6.0) and median_interval([1, 2, 3, 4, 5]) is None
    low, high = median_interval(np.arange(10_000))
    assert high - low == pytest.approx(1.96 * math.sqrt(10_000), rel=0.02)
