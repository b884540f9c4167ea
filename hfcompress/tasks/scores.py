"""How a model's outputs are scored, in training and on a card: our own metrics, or one of `evaluate`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hfcompress.measurement import Answers, Metric, accuracy, macro_f1, pearson
from hfcompress.measurement.metrics import ratio_of_sums
from hfcompress.tasks.errors import DataError, first_line
from hfcompress.tasks.labels import ProblemType

logger = logging.getLogger(__name__)

MAIN_METRIC: Mapping[ProblemType, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "macro_f1",
    "regression": "pearson",
}

MetricFunction = Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]


class Scoring(ABC):
    """Scores a model: what a Trainer takes as `compute_metrics` and `preprocess_logits_for_metrics`, and a number with its interval.

    Attributes:
        metric_name: The number that counts.
        higher_is_better: Whether more of it is better.
        batch: Examples that a model is given at once.
        in_order: Whether outputs have to come in the order of the evaluation data.
    """

    metric_name: str
    higher_is_better: ClassVar[bool] = True
    batch: ClassVar[int] = 64
    in_order: ClassVar[bool] = False

    def run(self, model: nn.Module, inputs: Mapping[str, Any], labels: Any) -> Any:
        """What is kept of a model's outputs for a batch.

        Args:
            model: A model of the task.
            inputs: Its inputs, on its device, without labels.
            labels: The labels, a tensor or several; None where there are none.

        Returns:
            A tensor or several, with a row per example; lengths may differ from batch to batch.
        """
        return self.reduce(model(**inputs)["logits"], labels)

    def reduce(self, outputs: Any, labels: Any) -> Any:
        """Keep of a batch's outputs what scoring needs; of several outputs the first."""
        del labels
        return outputs[0] if isinstance(outputs, (tuple, list)) else outputs

    @abstractmethod
    def __call__(self, prediction: Any) -> dict[str, float]:
        """Score an `EvalPrediction`."""

    @abstractmethod
    def measure(self, outputs: Any, labels: Any) -> tuple[Metric, Answers]:
        """The metric that counts with its 95 % interval, and what it is made of, example by example."""


class RatioScores(Scoring):
    """Scores that are ratios of sums over examples, such as means."""

    @abstractmethod
    def parts(self, outputs: Any, labels: Any) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Name to what is summed up above and below the line, each of shape (n,); the metric that counts is among them."""

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Score an `EvalPrediction`."""
        parts = self.parts(prediction.predictions, prediction.label_ids)
        return {name: ratio_of_sums(*pair)[0] for name, pair in parts.items()}

    def measure(self, outputs: Any, labels: Any) -> tuple[Metric, Answers]:
        """The metric that counts with its 95 % interval, and its parts."""
        tops, bottoms = self.parts(outputs, labels)[self.metric_name]
        value, low, high = ratio_of_sums(tops, bottoms)
        low = max(low, 0.0 if (tops >= 0).all() else -1.0)
        metric = Metric(self.metric_name, value, len(tops), low, min(high, 1.0))
        return metric, Answers("ratio", tops, bottoms)


@dataclass(frozen=True)
class TokenScores(Scoring):
    """Perplexity: the exponential of the mean negative log-likelihood of the tokens that are predicted.

    Attributes:
        shifted: Whether each position predicts the next token, as in a decoder; else its own, where it was masked.

    Example:
        >>> from transformers import EvalPrediction
        >>> logits = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log().expand(2, 3, 4)
        >>> labels = torch.tensor([[3, 0, 0], [1, 0, -100]])
        >>> scores = TokenScores(shifted=True)
        >>> kept = scores.reduce(logits, labels)
        >>> {name: round(value, 4) for name, value in scores(EvalPrediction(kept.numpy(), labels.numpy())).items()}
        {'perplexity': 1.4286}
    """

    shifted: bool
    metric_name: str = "perplexity"
    higher_is_better: ClassVar[bool] = False
    batch: ClassVar[int] = 8

    def reduce(self, outputs: Any, labels: Any) -> torch.Tensor:
        """Sum of the losses and number of the tokens of each example, shape (batch, 2)."""
        logits = super().reduce(outputs, labels).float()
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # One row per token: over a dimension in the middle torch sums less exactly. The loss is 0 where a label is -100.
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return torch.stack([losses.view(labels.shape).sum(1), (labels != -100).sum(1)], 1)

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Score an `EvalPrediction`, whether or not its outputs were reduced."""
        return {self.metric_name: self.measure(prediction.predictions, prediction.label_ids)[0].value}

    def measure(self, outputs: Any, labels: Any) -> tuple[Metric, Answers]:
        """The perplexity; n is the number of tokens that are predicted."""
        kept = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs)
        if kept.ndim == 3:
            kept = self.reduce(torch.from_numpy(kept), torch.from_numpy(np.asarray(labels))).numpy()
        n = int(kept[:, 1].sum())
        if n == 0:
            raise DataError("no token of the evaluation data is predicted; give more or longer texts")
        answers = Answers("perplexity", kept[:, 0].astype(np.float64), kept[:, 1].astype(np.float64))
        if not np.isfinite(kept).all():
            logger.warning("the loss of %d examples is not finite", np.sum(~np.isfinite(kept).all(1)))
            return Metric(self.metric_name, np.inf, n, np.inf, np.inf, higher_is_better=False), answers
        value, low, high = (float(np.exp(end)) for end in ratio_of_sums(kept[:, 0], kept[:, 1]))
        return Metric(self.metric_name, value, n, low, high, higher_is_better=False), answers


@dataclass(frozen=True)
class EmbeddingScores(RatioScores):
    """How close embeddings of texts, means over their tokens, are to those of another model; the "labels" are the other's.

    Example:
        >>> scores = EmbeddingScores()
        >>> metric, _ = scores.measure(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [2.0, 0.0]]))
        >>> round(metric.value, 4)  # 24 / 25 and 1
        0.98
    """

    metric_name: str = "cosine_similarity"

    def run(self, model: nn.Module, inputs: Mapping[str, Any], labels: Any) -> torch.Tensor:
        """The mean of the last hidden states over the tokens that are not padding, shape (batch, hidden)."""
        del labels
        hidden = model(**inputs)["last_hidden_state"].float()
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def parts(self, outputs: Any, labels: Any) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """The cosine of each pair."""
        ours, theirs = (np.asarray(side, dtype=np.float64) for side in (outputs, labels))
        if ours.shape != theirs.shape:
            raise ValueError(
                f"embeddings of {ours.shape[-1]} and {theirs.shape[-1]} features cannot be compared; keep the hidden width"
            )
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        return {self.metric_name: ((ours * theirs).sum(1) / lengths, np.ones(len(ours)))}


@dataclass(frozen=True)
class Scores(Scoring):
    """Scores of classes and of quantities.

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

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """Of our own metrics the one that counts; else the name of the metric."""
        if self.metric is None:
            return MAIN_METRIC[self.problem_type]
        return getattr(self.metric, "name", getattr(self.metric, "__name__", "metric"))

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

    def measure(self, outputs: Any, labels: Any) -> tuple[Metric, Answers]:
        """Accuracy (of several labels at once: all of them right), or the correlation of a quantity."""
        predictions = decide(np.asarray(outputs), self.problem_type)
        if self.problem_type == "regression":
            ours, theirs = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (predictions, labels))
            return pearson(predictions, labels), Answers("correlation", ours, theirs)
        if self.problem_type == "multi_label_classification":
            right = (predictions == labels).all(axis=1)
            ones = np.ones(len(right))
            return accuracy(right, ones.astype(bool)), Answers("share", right.astype(np.float64), ones)
        return accuracy(predictions, labels), Answers.of_classes(predictions, labels)


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
    # One resample: the interval is not wanted here, at each evaluation of a training.
    return {
        "accuracy": accuracy(predictions, labels).value,
        "macro_f1": macro_f1(predictions, labels, resamples=1).value,
    }


def _score_label_sets(predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
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
    name: str
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
    # Metrics of evaluate return their number under their own name; a path's last part is that name.
    return _EvaluateMetric(name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".py"), module, dict(options))
