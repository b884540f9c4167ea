"""How predictions are scored during training: our own metrics, or one of `evaluate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfcompress.tasks.errors import DataError, first_line
from hfcompress.tasks.labels import ProblemType

logger = logging.getLogger(__name__)

MAIN_METRIC: Mapping[ProblemType, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "macro_f1",
    "regression": "pearson",
}

MetricFunction = Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]


@dataclass(frozen=True)
class Scores:
    """What a Trainer takes as `compute_metrics`.

    Attributes:
        problem_type: What kind of labels there are.
        metric: Takes predictions and labels and returns named numbers; None for our own metrics: accuracy and
            macro_f1 for classes (several classes at once: accuracy is the share of rows with all of them right),
            pearson and mse for a quantity.

    Example:
        >>> from transformers import EvalPrediction
        >>> logits = np.array([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0], [5.0, 0.0]])
        >>> scores = Scores("single_label_classification")(EvalPrediction(logits, np.array([0, 1, 0, 0])))
        >>> scores["accuracy"], round(scores["macro_f1"], 4)
        (0.75, 0.7333)
    """

    problem_type: ProblemType
    metric: MetricFunction | None = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Score an `EvalPrediction`; of several outputs of the model the first is taken as the logits."""
        outputs, labels = prediction.predictions, prediction.label_ids
        logits = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs)
        labels = np.asarray(labels[0] if isinstance(labels, (tuple, list)) else labels)
        if not np.isfinite(logits).all():
            logger.warning("%d of %d outputs of the model are not finite", np.sum(~np.isfinite(logits)), logits.size)
        predictions = decide(logits, self.problem_type)
        if self.metric is not None:
            return self.metric(predictions, labels)
        return _OWN[self.problem_type](predictions, labels)


def decide(logits: NDArray[Any], problem_type: ProblemType) -> NDArray[Any]:
    """Predictions from a model's outputs.

    Args:
        logits: Outputs, shape (n, classes); (n, 1) or (n,) for regression.
        problem_type: What kind of labels there are.

    Returns:
        Class numbers, shape (n,); or 0 and 1, shape (n, classes), 1 where the logit is above 0 (a probability
        above one half); or numbers, shape (n,).

    Example:
        >>> decide(np.array([[0.1, 0.9, -3.0]]), "multi_label_classification")
        array([[1, 1, 0]])
    """
    if problem_type == "single_label_classification":
        return np.argmax(logits, axis=-1)
    if problem_type == "multi_label_classification":
        return (logits > 0).astype(np.int64)
    return logits.reshape(len(logits))


def _score_classes(predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    from hfcompress.measurement.metrics import accuracy, macro_f1

    # One resample: the interval is not wanted here, at each evaluation of a training.
    return {
        "accuracy": accuracy(predictions, labels).value,
        "macro_f1": macro_f1(predictions, labels, resamples=1).value,
    }


def _score_label_sets(predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    from hfcompress.measurement.metrics import accuracy

    truth = labels.astype(np.int64)
    hits = np.sum(predictions * truth, axis=0)
    mentions = predictions.sum(axis=0) + truth.sum(axis=0)
    occurs = mentions > 0
    f1 = 2 * hits[occurs] / mentions[occurs]
    exact = (predictions == truth).all(axis=1)
    return {
        "accuracy": accuracy(exact, np.ones(len(exact), dtype=bool)).value,
        "macro_f1": float(f1.mean()) if len(f1) else 0.0,
    }


def _score_quantity(predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    from hfcompress.measurement.metrics import pearson

    predictions, labels = predictions.astype(np.float64), labels.reshape(-1).astype(np.float64)
    mse = float(np.mean((predictions - labels) ** 2))
    if not np.isfinite(predictions).all():
        return {"pearson": float("nan"), "mse": mse}
    if np.ptp(predictions) == 0:
        # An untrained model may well say the same of every example: no correlation, and no reason to stop.
        return {"pearson": 0.0, "mse": mse}
    return {"pearson": pearson(predictions, labels).value, "mse": mse}


_OWN: Mapping[ProblemType, MetricFunction] = {
    "single_label_classification": _score_classes,
    "multi_label_classification": _score_label_sets,
    "regression": _score_quantity,
}


@dataclass(frozen=True)
class _EvaluateMetric:
    module: Any
    options: Mapping[str, Any]

    def __call__(self, predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        result = self.module.compute(predictions=predictions, references=labels, **self.options) or {}
        return {name: float(value) for name, value in result.items() if np.ndim(value) == 0}


def load_metric(name: str, **options: Any) -> MetricFunction:
    """Load a metric of `evaluate`.

    Args:
        name: Its name on the Hub, such as "f1", or the path of a metric script or of the folder it is in.
        **options: Passed each time it is computed, such as `average="macro"`.

    Returns:
        A function of predictions and labels that returns named numbers.

    Raises:
        DataError: It cannot be had: not there, no network, or a package it needs is missing.

    Example:
        >>> load_metric("no/such/metric.py")
        Traceback (most recent call last):
        ...
        hfcompress.tasks.errors.DataError: metric 'no/such/metric.py' cannot be loaded: there is no such file
    """
    import evaluate

    if name.endswith(".py") and not Path(name).is_file():
        raise DataError(f"metric {name!r} cannot be loaded: there is no such file")
    try:
        module = evaluate.load(name)
    except (OSError, ImportError, ValueError) as error:
        raise DataError(
            f"metric {name!r} cannot be loaded: {first_line(error)}; evaluate fetches metrics from the Hub:"
            " without a network give the path of a metric script, or leave the metric out to use the built-in ones"
        ) from error
    return _EvaluateMetric(module, dict(options))
