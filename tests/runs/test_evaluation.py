"""Models scored on the evaluation data of a task: as by a Trainer, whatever the task."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import transformers

from hfcompress.config import DataConfig, Recipe, RecipeError
from hfcompress.runs.arguments import training_arguments
from hfcompress.runs.evaluation import predict, rate_on, run_on
from hfcompress.runs.examples import drop
from hfcompress.runs.pipeline import Run
from hfcompress.tasks import prepare
from hfcompress.training import PlainTrainer, Seq2SeqPlainTrainer
from tests.scripts import material

TASKS = {
    "text-classification": material.text_classification,
    "token-classification": material.token_classification,
    "question-answering": material.question_answering,
    "multiple-choice": material.multiple_choice,
    "fill-mask": material.masked_lm,
    "text-generation": material.causal_lm,
    "text2text-generation": material.seq2seq,
    "audio-classification": material.audio_classification,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def ready(task, folder):
    """A prepared task and a model for it."""
    (folder / "r.yaml").write_text("")
    told = Recipe.from_yaml(folder / "r.yaml", overrides=TASKS[task](folder))
    prepared = prepare(told.data, task=task, model_name=str(folder / "model"))
    transformers.set_seed(0)
    auto = getattr(transformers, prepared.auto_class)
    return prepared, auto.from_pretrained(folder / "model", **prepared.model_kwargs)


@pytest.mark.parametrize("task", TASKS)
def test_a_rating_is_what_a_trainer_says(task, tmp_path):
    prepared, model = ready(task, tmp_path)
    longest = prepared.compute_metrics.longest if prepared.generates else None
    # Batches of another size: what differs in length is filled up.
    settings = {"per_device_eval_batch_size": 3, "disable_tqdm": True}
    arguments = training_arguments(tmp_path / "out", settings, seed=0, generate_up_to=longest)
    trainer = (Seq2SeqPlainTrainer if prepared.generates else PlainTrainer)(
        model,
        arguments,
        eval_dataset=prepared.eval_dataset,
        data_collator=prepared.data_collator,
        processing_class=prepared.processing_class,
        compute_metrics=prepared.compute_metrics,
        preprocess_logits_for_metrics=prepared.preprocess_logits_for_metrics,
    )
    said = trainer.evaluate()
    metric, answers = rate_on(prepared)(model)
    assert metric.name == prepared.metric_name
    assert metric.value == pytest.approx(said[f"eval_{metric.name}"], rel=1e-4, abs=1e-6)
    assert metric.low <= metric.value <= metric.high and metric.n > 0
    assert answers.score() == pytest.approx(metric.value)
    if answers.right is not None:
        assert answers.right.mean() == pytest.approx(said["eval_accuracy"])
    kinds = {"fill-mask": "perplexity", "text-generation": "perplexity"}
    ratios = ("token-classification", "question-answering", "text2text-generation")
    assert answers.kind == kinds.get(task, "ratio" if task in ratios else "share")


def test_embeddings_are_compared_with_the_first_model(tmp_path):
    material.sentence_embeddings(tmp_path)
    data = DataConfig(train=str(tmp_path / "train.txt"), holdout=0.5)
    prepared = prepare(data, task="feature-extraction", model_name=str(tmp_path / "model"))
    model = transformers.AutoModel.from_pretrained(tmp_path / "model")
    rate = rate_on(prepared)
    first, _ = rate(model)
    assert (first.name, first.n) == ("cosine_similarity", 20) and first.value == pytest.approx(1.0, abs=1e-6)
    before, _ = run_on(model, prepared)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    after, nothing = run_on(model, prepared)
    assert nothing is None and before.shape == (20, 32)
    second, _ = rate(model)
    expected = torch.nn.functional.cosine_similarity(torch.tensor(before), torch.tensor(after)).mean().item()
    assert second.value == pytest.approx(expected, abs=1e-5) and second.value < 1
    assert drop(first, second) == pytest.approx(100 * (first.value - second.value), abs=1e-5)


def test_predictions_of_a_classification(tmp_path):
    prepared, model = ready("text-classification", tmp_path)
    predictions, labels = predict(model, prepared)
    assert predictions.shape == labels.shape == (8,) and set(predictions) <= {0, 1}
    assert np.array_equal(labels, prepared.eval_dataset["labels"])


# ---- what tasks ask of a run ----


def run_of(folder, task, **train):
    (folder / "r.yaml").write_text("distill: {}\n")
    given = [*TASKS[task](folder), f"task={task}", f"model.name={folder / 'model'}", f"output={folder / 'run'}"]
    recipe = Recipe.from_yaml(folder / "r.yaml", overrides=given).model_copy(update={"train": train})
    return Run(recipe, command="x")


def arguments_of(run, task):
    return run._arguments(task, run.output / "x", run.recipe.train, "train")


@pytest.mark.parametrize(
    ("task", "metric", "better"),
    [
        ("text-generation", "perplexity", False),
        ("text-generation", "eval_loss", False),
        ("text-classification", "accuracy", True),
        ("text-classification", "eval_accuracy", True),
    ],
)
def test_which_way_a_metric_is_better(task, metric, better, tmp_path):
    train = {"metric_for_best_model": metric, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    run = run_of(tmp_path, task, **train)
    assert arguments_of(run, run.prepare()).greater_is_better is better


def test_a_task_that_generates_says_how_much(tmp_path):
    run = run_of(tmp_path, "text2text-generation", max_steps=2)
    arguments = arguments_of(run, run.prepare())
    assert isinstance(arguments, transformers.Seq2SeqTrainingArguments)
    assert arguments.predict_with_generate and arguments.generation_max_length == 5


def test_windows_are_evaluated_in_their_order(tmp_path):
    run = run_of(tmp_path, "question-answering", train_sampling_strategy="group_by_length")
    with pytest.raises(RecipeError, match=r"^train.train_sampling_strategy: .* question-answering needs its order"):
        arguments_of(run, run.prepare())
