"""The `train` section of a recipe becomes TrainingArguments, or one line that says why not."""

from __future__ import annotations

import pytest
import torch
import yaml

from hfcompress.config import RecipeError
from hfcompress.runs.arguments import training_arguments


def refusal(settings, **options):
    with pytest.raises(RecipeError) as caught:
        training_arguments("out", settings, seed=1, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_what_is_said_counts_and_the_rest_is_as_in_transformers(tmp_path):
    settings = {"num_train_epochs": 2, "learning_rate": 1e-4, "save_strategy": "no"}
    arguments = training_arguments(tmp_path, settings, seed=17)
    assert (arguments.num_train_epochs, arguments.learning_rate, arguments.seed) == (2, 1e-4, 17)
    assert str(arguments.output_dir) == str(tmp_path) and arguments.per_device_train_batch_size == 8
    assert arguments.report_to == []  # transformers would report to whatever happens to be installed
    assert settings == {"num_train_epochs": 2, "learning_rate": 1e-4, "save_strategy": "no"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_a_gpu_the_cpu_is_used():
    arguments = training_arguments("out", {}, seed=1)
    assert arguments.use_cpu and not arguments.dataloader_pin_memory and arguments.device.type == "cpu"


def test_defaults_of_ours_can_be_changed():
    assert training_arguments("out", {"report_to": ["tensorboard"]}, seed=1).report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("learnin_rate", "learning_rate"),
        ("num_epochs", "num_train_epochs"),
        ("per_device_train_batchsize", "per_device_train_batch_size"),
        ("warmup_step", "warmup_steps"),
    ],
)
def test_an_unknown_key_and_its_neighbour(key, near):
    assert refusal({key: 1}) == f"train.{key} is not a training argument; did you mean {near}?"


def test_an_unknown_key_without_neighbour():
    assert refusal({"zzz": 1}, section="teacher.train") == (
        "teacher.train.zzz is not a training argument; see transformers.TrainingArguments"
    )


def test_numbers_that_yaml_takes_for_text():
    read = yaml.safe_load("{learning_rate: 5e-5, weight_decay: 1e-2, warmup_steps: 10, lr_scheduler_type: linear}")
    assert read["learning_rate"] == "5e-5", "YAML 1.1 wants a point"
    arguments = training_arguments("out", read, seed=1)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.warmup_steps) == (5e-5, 1e-2, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "fast"}, "train.learning_rate must be a number, got 'fast'"),
        ({"per_device_train_batch_size": "8"}, "train.per_device_train_batch_size must be a whole number, got '8'"),
        ({"bf16": "please"}, "train.bf16 must be true or false, got 'please'"),
    ],
)
def test_text_where_a_number_belongs(settings, message):
    assert refusal(settings) == message


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "sometimes"},
        {"save_strategy": "epoch", "load_best_model_at_end": True, "eval_strategy": "no"},
        {"optim": "magic"},
        {"lr_scheduler_type": "zigzag"},
    ],
)
def test_a_value_that_is_not_allowed(settings):
    assert refusal(settings).startswith("train: ")
