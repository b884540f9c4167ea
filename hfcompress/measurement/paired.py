"""What separates two models that answered the same examples: the difference of their scores, with an interval and a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfcompress.measurement.metrics import Z95, Metric, mcnemar

Kind = Literal["share", "ratio", "perplexity", "correlation"]
_RESAMPLES = 2000
_AT_ONCE = 4_000_000  # numbers in a part of the bootstrap


@dataclass(frozen=True, eq=False)
class Answers:
    """What a score is made of, example by example.

    Attributes:
        kind: How the score comes of it: "share" and "ratio" are the sum of `tops` by the sum of `bottoms`, where in a share tops are 0
            or 1 and bottoms 1; "perplexity" is the exponential of that ratio; "correlation" is Pearson's, of both columns.
        tops: Shape (n,).
        bottoms: Shape (n,).
        predicted: The class of each example as predicted, shape (n,); None where there are no classes.
        labels: The true one, shape (n,).

    Raises:
        ValueError: The kind is not known, or the columns differ in length.

    Example:
        >>> answers = Answers.of_classes([0, 1, 1], [0, 1, 0])
        >>> answers.tops.tolist(), round(answers.score(), 4)
        ([1.0, 1.0, 0.0], 0.6667)
    """

    kind: Kind
    tops: NDArray[np.float64]
    bottoms: NDArray[np.float64]
    predicted: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is not known; choose one of {', '.join(map(repr, get_args(Kind)))}")
        columns = [c for c in (self.tops, self.bottoms, self.predicted, self.labels) if c is not None]
        if any(c.ndim != 1 or len(c) != len(self.tops) for c in columns) or not len(self.tops):
            raise ValueError(
                f"columns of shapes {', '.join(str(c.shape) for c in columns)} are not one value per example"
            )

    def __len__(self) -> int:
        return len(self.tops)

    @classmethod
    def of_classes(cls, predicted: ArrayLike, labels: ArrayLike) -> Answers:
        """Of a classification: right where the predicted class, an integer, is the true one."""
        ours, theirs = np.asarray(predicted, dtype=np.int64), np.asarray(labels, dtype=np.int64)
        return cls("share", (ours == theirs).astype(np.float64), np.ones(len(ours)), ours, theirs)

    @property
    def right(self) -> NDArray[np.bool_] | None:
        """Which examples were answered right, shape (n,); None where there is more than right and wrong."""
        return self.tops == 1 if self.kind == "share" else None

    def score(self) -> float:
        """The score of all examples."""
        return float(self._scores(np.arange(len(self))[None])[0])

    def _scores(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The score of each choice of examples, shape (choices, n); not a number where a choice has none."""
        tops, bottoms = self.tops[rows], self.bottoms[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind != "correlation":
                ratio = tops.sum(1) / bottoms.sum(1)
                return np.exp(ratio) if self.kind == "perplexity" else ratio
            tops, bottoms = tops - tops.mean(1, keepdims=True), bottoms - bottoms.mean(1, keepdims=True)
            return (tops * bottoms).sum(1) / np.sqrt((tops**2).sum(1) * (bottoms**2).sum(1))


@dataclass(frozen=True)
class Change:
    """How much worse a model is than another: positive where it lost, negative where it gained.

    Attributes:
        drop: Points (hundredths of the score), or per cent of the other's perplexity.
        low: Lower end of its 95 % interval.
        high: Upper end.
        unit: "points" or "per cent".
        p_value: Of the hypothesis that both are equally good; None where nothing was tested.
        test: What gave interval and p-value.
        n: Examples.
    """

    drop: float
    low: float
    high: float
    unit: Literal["points", "per cent"]
    p_value: float | None
    test: str
    n: int


def compare_answers(before: Answers, after: Answers, *, resamples: int = _RESAMPLES, seed: int = 0) -> Change:
    """How much was lost between two models on the same examples.

    Of answers that are right or wrong the interval is Tango's (1998, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design", equation 5), which has a width even where the models never differ, and the p-value
    McNemar's, exact. Of all other scores both come of the paired bootstrap (Efron 1979; Koehn 2004): examples are drawn with
    replacement, the same for both models, and the percentiles of the differences are taken.

    Args:
        before: Of the first model.
        after: Of the other model, on the same examples in the same order.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: They are of different kinds or numbers of examples, or of fewer than 2.

    Example:
        >>> before = Answers.of_classes([1] * 90 + [0] * 10, [1] * 100)
        >>> after = Answers.of_classes([1] * 84 + [0] * 16, [1] * 100)
        >>> change = compare_answers(before, after)
        >>> change.drop, round(change.low, 2), round(change.high, 2), change.p_value, change.test
        (6.0, 2.08, 12.48, 0.03125, 'McNemar, exact')
    """
    if before.kind != after.kind or len(before) != len(after):
        raise ValueError(
            f"{len(before)} answers ({before.kind}) and {len(after)} ({after.kind}) are not of the same examples"
        )
    n = len(before)
    if n < 2:
        raise ValueError(f"{n} example is too few to compare two models; give at least 2")
    unit: Literal["points", "per cent"] = "per cent" if before.kind == "perplexity" else "points"
    if before.kind == "share":
        return _compare_shares(before, after)
    columns = (before.tops, before.bottoms, after.tops, after.bottoms)
    if not all(np.isfinite(column).all() for column in columns):
        return Change(math.inf, math.inf, math.inf, unit, None, "none: a score is not finite", n)
    lost = _loss(before, after)
    drop = float(lost(np.arange(n)[None])[0])
    draws = np.concatenate([lost(rows) for rows in _drawn(n, resamples, seed)])
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, (2.5, 97.5)) if len(draws) else (drop, drop)
    beyond = min(int(np.sum(draws <= 0)), int(np.sum(draws >= 0)))
    p_value = min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    return Change(drop, min(float(low), drop), max(float(high), drop), unit, p_value, "paired bootstrap", n)


def compare_metrics(before: Metric, after: Metric) -> Change:
    """How much was lost between two scores of different examples: the interval of independent scores.

    Each end adds the distances of both scores to their own ends as if at right angles (Newcombe 1998, "Interval estimation for the
    difference between independent proportions", method 10; Zou and Donner 2008 for any score).

    Raises:
        ValueError: They are different metrics.

    Example:
        >>> before, after = (Metric("accuracy", v, n=100, low=v - 0.03, high=v + 0.04) for v in (0.9, 0.8))
        >>> change = compare_metrics(before, after)
        >>> round(change.drop, 2), round(change.low, 2), round(change.high, 2), change.p_value
        (10.0, 5.0, 15.0, None)
    """
    if before.name != after.name:
        raise ValueError(f"{before.name} and {after.name} cannot be compared")
    relative = not before.higher_is_better
    # The logarithm of a perplexity has a symmetric interval; more of it is a loss.
    first, second = (_logarithm(after), _logarithm(before)) if relative else (before, after)
    difference = first.value - second.value
    low = difference - math.hypot(first.value - first.low, second.high - second.value)
    high = difference + math.hypot(first.high - first.value, second.value - second.low)
    drop, low, high = (100 * (math.expm1(x) if relative else x) for x in (difference, low, high))
    test = "none: other examples, intervals of independent scores"
    return Change(drop, low, high, "per cent" if relative else "points", None, test, min(before.n, after.n))


def _logarithm(metric: Metric) -> Metric:
    value, low, high = (math.log(end) if end > 0 else -math.inf for end in (metric.value, metric.low, metric.high))
    return Metric(metric.name, value, metric.n, low, high)


def _compare_shares(before: Answers, after: Answers) -> Change:
    n = len(before)
    lost = int(np.sum((before.tops == 1) & (after.tops != 1)))
    gained = int(np.sum((before.tops != 1) & (after.tops == 1)))
    low, high = tango_interval(lost, gained, n)
    p_value = mcnemar(before.tops == 1, after.tops == 1)
    return Change(100 * (lost - gained) / n, 100 * low, 100 * high, "points", p_value, "McNemar, exact", n)


def tango_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a difference of two shares on the same examples (Tango 1998, equation 5).

    Args:
        lost: Examples that the first model alone got right.
        gained: Those that the second alone got right.
        n: All examples.

    Returns:
        Lower and upper end of (lost - gained) / n.

    Example:
        >>> [round(end, 4) for end in tango_interval(0, 0, 100)]  # z² / (n + z²)
        [-0.037, 0.037]
    """

    def z_of(delta: float) -> float:
        """Tango's statistic, which falls with the difference that is supposed."""
        b = -lost - gained + (2 * n - lost + gained) * delta
        c = -gained * delta * (1 - delta)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        gap = lost - gained - n * delta
        return gap / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, gap) if gap else 0.0

    middle = (lost - gained) / n
    return _root(lambda delta: z_of(delta) - Z95, -1.0, middle), _root(lambda delta: z_of(delta) + Z95, middle, 1.0)


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0, by halving; an end where it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _loss(before: Answers, after: Answers) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """What is lost on each choice of examples: points, or per cent of the perplexity."""
    if before.kind == "perplexity":
        return lambda rows: 100 * (after._scores(rows) / before._scores(rows) - 1)
    return lambda rows: 100 * (before._scores(rows) - after._scores(rows))


def _drawn(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Choices of examples with replacement, in parts that fit into memory; shape (choices, n) each."""
    generator = np.random.default_rng(seed)
    part = max(1, _AT_ONCE // n)
    for start in range(0, resamples, part):
        yield generator.integers(n, size=(min(part, resamples - start), n))


def median_interval(values: ArrayLike) -> tuple[float, float] | None:
    """A 95 % interval of the median that supposes nothing of the distribution (Thompson 1936): two of the sorted values.

    Args:
        values: Shape (n,), drawn independently.

    Returns:
        The ends; None of fewer than 6 values, whose whole range covers the median less surely than that.

    Example:
        >>> median_interval(range(1, 16))
        (4.0, 12.0)
        >>> median_interval([1.0, 2.0]) is None
        True
    """
    numbers = np.sort(np.asarray(values, dtype=np.float64))
    n, tail, rank = len(numbers), 0.0, 0
    while (tail := tail + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    return (float(numbers[rank - 1]), float(numbers[n - rank])) if rank else None
