from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from hfcompress.tasks import DataError, load_metric
from hfcompress.tasks.scores import Scores

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("extra", [False, True])
def test_single_labels_against_sklearn(extra):
    logits, labels = RNG.normal(size=(200, 5)), RNG.integers(0, 5, 200)
    outputs = (logits, RNG.normal(size=(200, 3))) if extra else logits
    scores = Scores("single_label_classification")(EvalPrediction(outputs, labels))
    predicted = logits.argmax(1)
    assert scores == pytest.approx(
        {"accuracy": accuracy_score(labels, predicted), "macro_f1": f1_score(labels, predicted, average="macro")}
    )


def test_several_labels_against_sklearn():
    logits, labels = RNG.normal(size=(100, 4)), RNG.integers(0, 2, (100, 4)).astype(np.float32)
    scores = Scores("multi_label_classification")(EvalPrediction(logits, labels))
    predicted = (1 / (1 + np.exp(-logits)) > 0.5).astype(int)
    expected = {"accuracy": accuracy_score(labels, predicted), "macro_f1": f1_score(labels, predicted, average="macro")}
    assert scores == pytest.approx(expected)
    nothing = Scores("multi_label_classification")(EvalPrediction(-np.ones((3, 2)), np.zeros((3, 2))))
    assert nothing == {"accuracy": 1.0, "macro_f1": 0.0}


@pytest.mark.parametrize("shape", [(60, 1), (60,)])
def test_a_quantity_against_scipy(shape):
    logits, labels = RNG.normal(size=shape), RNG.normal(size=60)
    scores = Scores("regression")(EvalPrediction(logits, labels))
    expected = {"pearson": pearsonr(logits.ravel(), labels)[0], "mse": np.mean((logits.ravel() - labels) ** 2)}
    assert scores == pytest.approx(expected)


def test_a_quantity_that_is_constant_or_not_finite_does_not_end_the_training(caplog):
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    assert Scores("regression")(EvalPrediction(np.ones((4, 1)), labels)) == {"pearson": 0.0, "mse": 1.5}
    scores = Scores("regression")(EvalPrediction(np.array([1.0, np.nan, 0.0, 2.0]), labels))
    assert np.isnan(scores["pearson"])
    assert "1 of 4 outputs of the model are not finite" in caplog.text


SCRIPT = """
import datasets
import evaluate


class Hits(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, points=1):
        return {"hits": points * sum(p == r for p, r in zip(predictions, references))}
"""


def test_a_metric_script_is_loaded_and_given_its_options(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_CACHE", tmp_path / "cache")
    file = tmp_path / "hits.py"
    file.write_text(SCRIPT)
    metric = load_metric(str(file), points=10)
    scores = Scores("single_label_classification", metric)(EvalPrediction(np.eye(3), np.array([0, 1, 0])))
    assert scores == {"hits": 20.0}


def test_a_metric_that_cannot_be_had_is_one_line(monkeypatch):
    import evaluate

    def load(name):
        raise FileNotFoundError(f"Couldn't find a module script at {name}.\nmore")

    monkeypatch.setattr(evaluate, "load", load)
    with pytest.raises(DataError, match=r"metric 'acuracy' cannot be loaded: Couldn't find .* built-in ones") as error:
        load_metric("acuracy")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="there is no such file"):
        load_metric("no/metric.py")
