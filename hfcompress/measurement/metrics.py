"""Task metrics with 95 % intervals, and a paired test: how sure a number is.

Plain numpy on predictions and labels that are already there; nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = NormalDist().inv_cdf(0.975)
PERCENTAGES = frozenset(  # metrics that people write in per cent
    ("accuracy", "agreement", "macro_f1", "f1", "exact_match", "rougeL")
)


@dataclass(frozen=True)
class Metric:
    """A measured number and its 95 % confidence interval.

    Attributes:
        name: What was measured.
        value: The number itself, as a fraction (not in percent) where it is one.
        n: Number of examples behind it.
        low: Lower end of the interval.
        high: Upper end of the interval.
        higher_is_better: Whether more of it is better.
    """

    name: str
    value: float
    n: int
    low: float
    high: float
    higher_is_better: bool = True


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> Metric:
    """Share of predictions that equal their label, with the score interval.

    The interval is that of Wilson (1927, "Probable inference, the law of succession, and statistical
    inference", JASA 22): it stays within [0, 1] and has a width even where all or none are right.

    Args:
        predictions: Predicted classes (not logits), shape (n,).
        labels: True classes, shape (n,).

    Returns:
        The metric "accuracy", in [0, 1].

    Raises:
        ValueError: The two differ in length, are empty or are not one-dimensional.

    Example:
        >>> metric = accuracy([0, 1, 1, 0], [0, 1, 0, 0])
        >>> metric.value, round(metric.low, 3), round(metric.high, 3)
        (0.75, 0.301, 0.954)
    """
    predicted, true = _pair(predictions, labels, "predictions", "labels")
    n = len(true)
    value = float(np.mean(predicted == true))
    shrink = 1 + Z95**2 / n
    center = (value + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(value * (1 - value) / n + Z95**2 / (4 * n**2))
    low, high = max(0.0, center - half), min(1.0, center + half)
    return Metric("accuracy", value, n, min(value, low), max(value, high))  # value is inside, but for rounding


def mean_interval(
    values: ArrayLike,
    name: str,
    *,
    method: Literal["normal", "bootstrap"] = "normal",
    resamples: int = 1000,
    seed: int = 0,
) -> Metric:
    """Mean of one number per example, with an interval.

    Args:
        values: One finite number per example, shape (n,), n at least 2.
        name: What the numbers are, for example "loss".
        method: "normal" adds 1.96 standard errors to either side; "bootstrap" takes percentiles of the means
            of resampled examples (Efron 1979), for few or skewed values.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        The metric of that name.

    Raises:
        ValueError: There are fewer than 2 values, one is not finite, or the method is not known.

    Example:
        >>> metric = mean_interval([1.0, 2.0, 3.0], "loss")
        >>> metric.value, round(metric.low, 3), round(metric.high, 3)
        (2.0, 0.868, 3.132)
    """
    numbers = _numbers(values, "values")
    n = len(numbers)
    if n < 2:
        raise ValueError(f"values has length {n}; an interval needs at least 2")
    value = float(numbers.mean())
    if method == "normal":
        half = Z95 * float(numbers.std(ddof=1)) / math.sqrt(n)
        return Metric(name, value, n, value - half, value + half)
    if method == "bootstrap":
        low, high = _bootstrap(lambda rows: float(numbers[rows].mean()), n, resamples=resamples, seed=seed)
        return Metric(name, value, n, low, high)
    raise ValueError(f"method={method!r} is not known; choose 'normal' or 'bootstrap'")


def ratio_of_sums(tops: ArrayLike, bottoms: ArrayLike) -> tuple[float, float, float]:
    """Ratio of two sums over the same examples, with an interval.

    Means are such ratios (of values and ones), and so are the F1 score of all entities of a corpus (of twice the hits and of what
    was predicted and is true) and the mean loss of all its tokens. The interval is 1.96 standard errors of the ratio
    estimator (Cochran 1977, "Sampling Techniques", equation 6.13) to either side.

    Args:
        tops: One number per example, shape (n,).
        bottoms: One number per example, 0 or more, shape (n,).

    Returns:
        Ratio, lower and upper end. All 0 where the bottoms are; of one example the ends are the ratio itself.

    Raises:
        ValueError: The two differ in length, are empty, or a number is not finite.

    Example:
        >>> [round(number, 4) for number in ratio_of_sums([1.0, 3.0], [2.0, 2.0])]
        [1.0, 0.02, 1.98]
    """
    _pair(tops, bottoms, "tops", "bottoms")
    above, below = _numbers(tops, "tops"), _numbers(bottoms, "bottoms")
    n, total = len(above), float(below.sum())
    if total == 0:
        return 0.0, 0.0, 0.0
    value = float(above.sum()) / total
    spread = float(np.sum((above - value * below) ** 2))
    half = Z95 * math.sqrt(n / (n - 1) * spread) / total if n > 1 else 0.0
    return value, value - half, value + half


def macro_f1(predictions: ArrayLike, labels: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Metric:
    """Mean over the classes of the F1 score, with a bootstrap percentile interval (Efron 1979).

    F1 is 2 TP / (2 TP + FP + FN); the classes are those that occur among predictions or labels, as in
    scikit-learn, in each bootstrap sample anew.

    Args:
        predictions: Predicted classes (not logits), shape (n,).
        labels: True classes, shape (n,).
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        The metric "macro_f1", in [0, 1].

    Raises:
        ValueError: The two differ in length, are empty or are not one-dimensional.

    Example:
        >>> round(macro_f1([0, 1, 1, 0], [0, 1, 0, 0]).value, 4)
        0.7333
    """
    predicted, true = _pair(predictions, labels, "predictions", "labels")
    n = len(true)
    classes, codes = np.unique(np.concatenate((predicted, true)), return_inverse=True)
    predicted_codes, true_codes = codes[:n], codes[n:]

    def score(rows: NDArray[np.int64]) -> float:
        ours, theirs = predicted_codes[rows], true_codes[rows]
        hits = np.bincount(ours[ours == theirs], minlength=len(classes))
        mentions = np.bincount(ours, minlength=len(classes)) + np.bincount(theirs, minlength=len(classes))
        occurs = mentions > 0
        return float(np.mean(2 * hits[occurs] / mentions[occurs]))

    low, high = _bootstrap(score, n, resamples=resamples, seed=seed)
    return Metric("macro_f1", score(np.arange(n)), n, low, high)


def pearson(predictions: ArrayLike, labels: ArrayLike) -> Metric:
    """Pearson correlation, with the interval of Fisher's z transformation (Fisher 1921, "On the probable
    error").

    Args:
        predictions: Predicted numbers, finite, shape (n,), n at least 4.
        labels: True numbers, finite, shape (n,).

    Returns:
        The metric "pearson", in [-1, 1].

    Raises:
        ValueError: The two differ in length, are shorter than 4, hold a number that is not finite, or one is
            constant.

    Example:
        >>> metric = pearson([1, 2, 3, 4, 5], [1, 2, 3, 5, 4])
        >>> round(metric.value, 3), round(metric.low, 3), round(metric.high, 3)
        (0.9, 0.086, 0.993)
    """
    _pair(predictions, labels, "predictions", "labels")
    predicted, true = _numbers(predictions, "predictions"), _numbers(labels, "labels")
    n = len(true)
    if n < 4:
        raise ValueError(f"predictions and labels have length {n}; an interval of a correlation needs at least 4")
    for name, numbers in (("predictions", predicted), ("labels", true)):
        if np.all(numbers == numbers[0]):
            raise ValueError(f"{name} are all {numbers[0]:g}; a correlation needs numbers that differ")
    value = float(np.clip(np.corrcoef(predicted, true)[0, 1], -1, 1))
    if abs(value) == 1:
        return Metric("pearson", value, n, value, value)
    center, half = math.atanh(value), Z95 / math.sqrt(n - 3)
    return Metric("pearson", value, n, math.tanh(center - half), math.tanh(center + half))


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Whether two models that answered the same examples differ: exact two-sided p-value (McNemar 1947).

    Only the examples count that one model got right and the other wrong; if the models are equally good, each
    of these is a fair coin.

    Args:
        correct_a: Whether the first model was right, booleans or 0 and 1, shape (n,).
        correct_b: The same of the second model, on the same examples.

    Returns:
        The p-value in (0, 1]; 1 where the models never differ.

    Raises:
        ValueError: The two differ in length, are empty, or hold something else than true and false.

    Example:
        >>> mcnemar([True] * 6 + [False], [False] * 6 + [False])  # 2 / 2**6
        0.03125
    """
    first, second = _pair(correct_a, correct_b, "correct_a", "correct_b")
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("correct_a and correct_b must hold booleans: whether each example was answered right")
    only_a = int(np.sum((first == 1) & (second == 0)))
    only_b = int(np.sum((first == 0) & (second == 1)))
    n = only_a + only_b
    tail = coefficient = 1
    for k in range(min(only_a, only_b)):  # binomial coefficients one from the other, exact
        coefficient = coefficient * (n - k) // (k + 1)
        tail += coefficient
    return min(1.0, 2 * tail / 2**n)


def _bootstrap(
    score: Callable[[NDArray[np.int64]], float], n: int, *, resamples: int, seed: int
) -> tuple[float, float]:
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: need at least 1")
    generator = np.random.default_rng(seed)
    scores = [score(generator.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(low), float(high)


def _pair(first: ArrayLike, second: ArrayLike, first_name: str, second_name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    ours, theirs = _column(first, first_name), _column(second, second_name)
    if len(ours) != len(theirs):
        raise ValueError(
            f"{first_name} has length {len(ours)}, {second_name} {len(theirs)}; both must be of the same examples"
        )
    return ours, theirs


def _column(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; need one value per example, shape (n,)")
    if not len(array):
        raise ValueError(f"{name} is empty; need at least one example")
    return array


def _numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    numbers = _column(values, name).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds {int(np.sum(~np.isfinite(numbers)))} values that are not finite")
    return numbers
