"""What people use of Trainer goes on working: logs, searches, precision, data of every kind, adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.training import CompressionTrainer, DistillationTrainer, PlainTrainer, PruningTrainer
from tests.families import make_model
from tests.training.scenarios import Examples, Gradients, build, checkpointing, compress, make_trainer, vector

# ---- logs ----


def terms_by_hand(batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """The three terms of the shared recipe on one batch, without weights, for the models that `make_trainer` builds."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        ours, theirs = (build("bert", "sequence", seed=s)(**inputs, output_hidden_states=True) for s in (0, 7))
    real = batch["attention_mask"].bool()
    pairs = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    p, q = theirs.logits.div(2).softmax(-1), ours.logits.div(2).softmax(-1)
    return {
        "task": -ours.logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean().item(),
        "logits": 4 * (p * (p / q).log()).sum(-1).mean().item(),
        "hidden": torch.stack([F.mse_loss(mine[real], its[real]) for mine, its in pairs]).mean().item(),
    }


class Logs(TrainerCallback):
    """Stands in for a logging target such as TensorBoard."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_logged_terms_are_means_over_steps(tmp_path: Path) -> None:
    logs, data = Logs(), Examples("bert", "sequence", 16)
    trainer = make_trainer(
        tmp_path,
        data=data,
        given={"callbacks": [logs]},
        learning_rate=0.0,  # so the models stay those that the terms are computed with by hand
        prune={"schedule": {"name": "constant", "start": 0.7}},
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=2,
    )
    trainer.train()
    lines = [line for line in logs.seen if "loss" in line]
    assert [line["sparsity"] > 0 for line in lines] == [False, True, True]  # cut after step 4 of 6
    assert 0.5 <= lines[1]["sparsity"] < 0.6
    units = {site.name: site.units for site in find_sites(trainer.model)}
    for role, all_of_it in (("heads", 12), ("neurons", 144)):
        left = sum(count for name, count in units.items() if name.endswith(role))
        assert [line[f"{role}_left"] for line in lines] == [all_of_it, left, left] and left < all_of_it
    assert all(100 < line["peak_memory_mb"] < 100_000 for line in lines)
    assert next(entry for entry in trainer.state.log_history if "loss" in entry).items() >= lines[0].items()
    for number, line in enumerate(lines[:2]):
        steps = [terms_by_hand(data.batch(*range(first, first + 4))) for first in (8 * number, 8 * number + 4)]
        for name in ("task", "logits", "hidden"):
            expected = 0.5 * sum(step[name] for step in steps) / 2
            assert line[f"loss_{name}"] == pytest.approx(expected, rel=1e-5)
        assert line["loss"] == pytest.approx(
            sum(line[f"loss_{name}"] for name in ("task", "logits", "hidden")), rel=1e-5
        )
    assert {"grad_norm", "learning_rate", "epoch"} <= lines[0].keys()


def test_what_was_not_logged_is_not_carried_into_the_next_run(tmp_path: Path) -> None:
    options = {"learning_rate": 0.0, "max_steps": 3, "logging_strategy": "steps", "logging_steps": 2, "n": 4}
    trainer = make_trainer(tmp_path, trainer=DistillationTrainer, **options)
    for _ in range(2):  # the third step of each run is never logged
        trainer.train()
        [line] = [entry for entry in trainer.state.log_history if "loss_task" in entry]
        expected = terms_by_hand(trainer.train_dataset.batch(*range(4)))
        assert line["step"] == 2
        for name, value in expected.items():
            assert line[f"loss_{name}"] == pytest.approx(0.5 * value, rel=1e-5)


def test_logs_without_a_teacher_or_pruning_stay_as_they_are(tmp_path: Path) -> None:
    trainer, _ = compress(tmp_path, trainer=PlainTrainer, logging_strategy="steps", logging_steps=3)
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == 2
    assert all(set(line) == {"loss", "grad_norm", "learning_rate", "epoch", "step", "peak_memory_mb"} for line in lines)


def test_evaluation_of_several_sets_with_metrics(tmp_path: Path) -> None:
    first, second = Examples("bert", "sequence", 8), Examples("bert", "sequence", 4)
    given = {
        "eval_dataset": {"one": first, "two": second},
        "compute_metrics": lambda p: {"size": len(p.predictions), "classes": int(p.predictions.max())},
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
    trainer, _ = compress(tmp_path, given=given, eval_strategy="steps", eval_steps=3, eval_on_start=True)
    entries = trainer.state.log_history
    assert [entry["eval_one_size"] for entry in entries if "eval_one_size" in entry] == [8, 8, 8]
    assert [entry["eval_two_size"] for entry in entries if "eval_two_size" in entry] == [4, 4, 4]


# ---- model_init and searches ----


def starts_afresh() -> Any:
    return build("bert", "sequence", seed=0, dropout=0.1)


@pytest.mark.parametrize("kind", [DistillationTrainer, PruningTrainer, CompressionTrainer])
def test_runs_of_one_trainer_with_model_init_know_nothing_of_each_other(tmp_path: Path, kind: type) -> None:
    wide = {} if kind is PruningTrainer else {"teacher_width": 64}
    options = {"trainer": kind, "given": {"model_init": starts_afresh}, **wide}

    def fresh(rate: float) -> torch.Tensor:
        return vector(compress(tmp_path, learning_rate=rate, **options)[1])

    expected = [fresh(1e-3), fresh(5e-3)]
    assert expected[0].shape != expected[1].shape or not torch.equal(*expected)
    trainer = make_trainer(tmp_path, **options)
    for rate, wanted in ((1e-3, expected[0]), (5e-3, expected[1]), (1e-3, expected[0])):
        trainer.args.learning_rate = rate
        trainer.train()
        assert torch.equal(vector(trainer.model), wanted)


class TwoTrials:
    """A backend for `hyperparameter_search` that needs no package: it tries two learning rates."""

    name = "optuna"

    def ensure_available(self) -> None: ...

    def run(self, trainer: Any, n_trials: int, direction: str, **_: Any) -> BestRun:
        runs = []
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={}))
            runs.append(BestRun(str(number), trainer.compute_objective(trainer.evaluate()), {"number": number}))
        return min(runs, key=lambda run: run.objective)


def test_hyperparameter_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, TwoTrials)
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    options = {"given": {"model_init": starts_afresh}, "teacher_width": 64, "save_strategy": "steps", "save_steps": 6}
    rates = [1e-6, 1e-2]
    losses = [compress(tmp_path / "x", learning_rate=rate, **options)[0].evaluate()["eval_loss"] for rate in rates]
    trainer = make_trainer(tmp_path / "search", **options)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": rates[trial.number]}, n_trials=2, backend="optuna"
    )
    assert losses[0] != losses[1]
    assert best.objective == pytest.approx(min(losses), rel=1e-6)
    assert int(best.run_id) == losses.index(min(losses))
    folders = sorted(
        str(path.relative_to(tmp_path / "search")) for path in (tmp_path / "search").glob("run-*/checkpoint-6")
    )
    assert folders == ["run-0/checkpoint-6", "run-1/checkpoint-6"]
    for folder in folders:
        assert hfcompress.load(tmp_path / "search" / folder).config.hfcompress["units"]


# ---- precision and memory ----


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, family: str) -> None:
    task = {"bert": "sequence", "vit": "image"}.get(family, "causal")
    runs = []
    for extra in ({}, checkpointing(use_reentrant=False)):
        captured = Gradients()
        _, model = compress(
            tmp_path, family=family, task=task, optim="sgd", given={"callbacks": [captured]}, max_steps=5, **extra
        )
        runs.append((captured.steps, vector(model)))
    for plain, recomputed in zip(runs[0][0], runs[1][0], strict=True):
        assert plain.keys() == recomputed.keys() and len(plain) > 20
        for name in plain:
            torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-5)
    assert runs[0][1].shape == runs[1][1].shape


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_bfloat16_on_cpu(tmp_path: Path, family: str) -> None:
    task = {"bert": "sequence", "vit": "image", "llama": "causal"}[family]
    options = {"family": family, "task": task, "teacher_width": 64, "logging_strategy": "steps", "logging_steps": 1}
    runs = [compress(tmp_path, bf16=bf16, **options) for bf16 in (False, True)]
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run, _ in runs]
    assert len(losses[0]) == len(losses[1]) == 6 and losses[0] != losses[1]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.03)
    trainer, model = runs[1]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer._projections.parameters()} == {torch.float32}
    assert 0.5 <= trainer.pruner.sparsity() < 0.62
    trainer.save_model(str(tmp_path / "final"))
    again = hfcompress.load(tmp_path / "final")
    assert torch.equal(vector(again), vector(model)) and again.dtype == torch.float32


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    model = build("bert", "sequence", seed=0).to(torch.bfloat16)
    trainer, _ = compress(tmp_path / "whole", model=model, save_strategy="steps", save_steps=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and trainer.pruner.done
    again = build("bert", "sequence", seed=0).to(torch.bfloat16)
    compress(tmp_path / "again", model=again, resume=tmp_path / "whole" / "checkpoint-3")
    assert torch.equal(vector(again), vector(model))


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch_fused", "rmsprop", "adagrad"])
def test_other_optimizers(tmp_path: Path, optim: str) -> None:
    trainer, model = compress(tmp_path, optim=optim, teacher_width=64)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in [*model.parameters(), *trainer._projections.parameters()]}
    assert 0.5 <= trainer.pruner.sparsity() < 0.6
    assert bool(torch.isfinite(vector(model)).all())


# ---- data ----


def test_label_names(tmp_path: Path) -> None:
    # A model with two outputs of labels: both are withheld from the teacher and given back by predict.
    rows = []
    for row in Examples("bert", "sequence", 8).rows:
        rows.append({**row, "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)})
        rows[-1].pop("labels")
    student, teacher = (make_model("bert", "AutoModelForQuestionAnswering", seed=s) for s in (0, 7))
    options = {"trainer": DistillationTrainer, "model": student, "teacher": teacher, "data": rows}
    trainer = make_trainer(tmp_path, label_names=["start_positions", "end_positions"], **options)
    trainer.train()
    predicted = trainer.predict(rows)
    assert [labels.tolist() for labels in predicted.label_ids] == [[1] * 8, [2] * 8]
    assert predicted.metrics["test_loss"] > 0
    # With one of the two named the run is the same: the loss is the model's own.
    again = make_model("bert", "AutoModelForQuestionAnswering", seed=0)
    make_trainer(tmp_path, label_names=["start_positions"], **{**options, "model": again}).train()
    assert torch.equal(vector(again), vector(student))


class Stream(IterableDataset):
    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.rows)


def test_streams(tmp_path: Path) -> None:
    rows = Examples("bert", "sequence", 16).rows
    options = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 1, "max_steps": 7}
    trainer, model = compress(tmp_path / "whole", data=Stream(rows), **options)
    assert trainer.state.global_step == 7 and 0.5 <= trainer.pruner.sparsity() < 0.6
    _, same = compress(tmp_path / "listed", data=rows, train_sampling_strategy="sequential", **options)
    assert torch.equal(vector(same), vector(model))
    _, resumed = compress(tmp_path / "again", data=Stream(rows), resume=tmp_path / "whole" / "checkpoint-3", **options)
    assert torch.equal(vector(resumed), vector(model))


def ragged(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads to the longest of the batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([list(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def sentences(n: int = 16) -> list[dict[str, Any]]:
    examples = Examples("bert", "sequence", n).rows
    return [
        {"input_ids": row["input_ids"][row["attention_mask"].bool()].tolist(), "labels": int(row["labels"])}
        for row in examples
    ]


def test_padding_makes_no_difference(tmp_path: Path) -> None:
    options = {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.05}
    _, longest = compress(tmp_path, data=sentences(), given={"data_collator": ragged}, **options)
    _, twelve = compress(tmp_path, data=Examples("bert", "sequence", 16), **options)
    torch.testing.assert_close(vector(longest), vector(twelve), rtol=1e-4, atol=1e-6)


def test_grouping_by_length(tmp_path: Path) -> None:
    padding: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = ragged(rows)
        padding.append(int((batch["attention_mask"] == 0).sum()))
        return batch

    options: dict[str, Any] = {"data": sentences(64), "given": {"data_collator": collate}, "dropout": 0.1}
    compress(tmp_path, max_steps=16, **options)
    at_random, padding = sum(padding), []
    options["train_sampling_strategy"] = "group_by_length"
    _, model = compress(tmp_path / "whole", max_steps=16, save_strategy="steps", save_steps=5, **options)
    assert sum(padding) < at_random / 2
    _, resumed = compress(tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-5", max_steps=16, **options)
    assert torch.equal(vector(resumed), vector(model))


def test_datasets_with_other_columns(tmp_path: Path) -> None:
    rows = [{**row, "sentence": "never given to a model", "idx": i} for i, row in enumerate(sentences())]
    data = datasets.Dataset.from_list(rows)
    trainer, model = compress(tmp_path, data=data, given={"data_collator": ragged})
    _, same = compress(tmp_path, data=sentences(), given={"data_collator": ragged})
    assert torch.equal(vector(model), vector(same))
    assert trainer.predict(data).predictions.shape == (16, 3)


# ---- adapters ----


def with_adapters(seed: int = 0) -> Any:
    torch.manual_seed(11)
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    return get_peft_model(build("bert", "sequence", seed=seed), config)


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_a_student_with_adapters(tmp_path: Path, hidden: float) -> None:
    build("bert", "sequence", seed=7).save_pretrained(tmp_path / "teacher")
    options: dict[str, Any] = {"trainer": DistillationTrainer, "teacher": str(tmp_path / "teacher"), "hidden": hidden}
    options |= {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    student = with_adapters()
    frozen = {name: p.clone() for name, p in student.named_parameters() if not p.requires_grad}
    learns = {name: p.clone() for name, p in student.named_parameters() if p.requires_grad}
    trainer, model = compress(tmp_path / "whole", model=student, **options)
    after = dict(model.named_parameters())
    assert len(frozen) > 40 and all(torch.equal(after[name], old) for name, old in frozen.items())
    assert len(learns) == 14 and all(not torch.equal(after[name], old) for name, old in learns.items())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    again = PeftModel.from_pretrained(build("bert", "sequence", seed=0), tmp_path / "whole" / "checkpoint-6")
    batch = trainer.train_dataset.batch(0, 1)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    _, resumed = compress(
        tmp_path / "again", model=with_adapters(), resume=tmp_path / "whole" / "checkpoint-3", **options
    )
    assert all(torch.equal(value, after[name]) for name, value in resumed.named_parameters())


def test_adapters_and_accumulation(tmp_path: Path) -> None:
    found = []
    for size in (8, 4):
        captured = Gradients()
        compress(
            tmp_path,
            trainer=DistillationTrainer,
            model=with_adapters(),
            given={"callbacks": [captured]},
            max_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        found.append(torch.cat([gradient.flatten() for gradient in captured.steps[0].values()]))
    assert found[0].norm() > 1e-2 and ((found[1] - found[0]).norm() / found[0].norm()).item() < 1e-6


def test_the_best_adapters_are_loaded(tmp_path: Path) -> None:
    scores = [0.1, 0.9, 0.2]
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    given = {"compute_metrics": lambda _: {"score": scores.pop(0)}}
    options = {"trainer": DistillationTrainer, "learning_rate": 1e-2, "given": given, **settings}
    trainer, model = compress(tmp_path, model=with_adapters(), **options)
    best = PeftModel.from_pretrained(build("bert", "sequence", seed=0), tmp_path / "checkpoint-2")
    theirs = dict(best.named_parameters())
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


def test_adapters_are_not_pruned(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer=PruningTrainer, model=with_adapters())
    with pytest.raises(ValueError, match=r"a model with adapters cannot be pruned.*; prune first") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
