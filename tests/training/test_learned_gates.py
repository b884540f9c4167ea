"""Learned gates inside Trainer: the same however a batch is split, resumed bit by bit, logged, evaluated without noise."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import TrainerCallback

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.training import CompressionTrainer, PlainTrainer, PruningTrainer
from hfcompress.training.pruning import STATE_FILE, TENSORS_FILE
from tests.training.scenarios import Examples, arguments, compress, make_trainer, vector

LEARNED = {"criterion": {"name": "learned", "gate_learning_rate": 0.5}}
WITH_SUBLAYERS = {"prune": {"units": ["heads", "neurons", "sublayers"]}}
DESCENT = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


class Watches(TrainerCallback):
    """Keeps what the gates are after each optimizer step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.states: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gates = self.trainer.pruner.learned
        self.states.append({} if gates is None else gates.state())


def watched(folder: Path, **options: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    watches = Watches()
    trainer = make_trainer(folder, **options)
    trainer.add_callback(watches)
    watches.trainer = trainer
    trainer.train()
    return trainer, watches.states


@pytest.mark.parametrize("kind", [PruningTrainer, CompressionTrainer])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gates_do_not_depend_on_how_a_step_is_split(tmp_path: Path, family: str, kind: type) -> None:
    task = "token" if family == "bert" else "causal"
    options = {"trainer": kind, "family": family, "task": task, "hidden": 0.0, **LEARNED, **WITH_SUBLAYERS, **DESCENT}
    options |= {"train_sampling_strategy": "sequential", "data": Examples(family, task, 16, silent=True)}
    runs = [
        watched(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, **LOGGED, **options
        )
        for batch in (8, 4, 1)
    ]
    # Gates begin before the first step and end after the fourth of six.
    assert [bool(state) for state in runs[0][1]] == [True, True, True, False, False, False]
    compared = 0
    for trainer, states in runs[1:]:
        for ours, theirs in zip(states, runs[0][1], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if name.startswith(("log_alpha", "sublayer", "multipliers")):
                    torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3)
                    compared += 1
        torch.testing.assert_close(vector(trainer.model), vector(runs[0][0].model), rtol=1e-4, atol=1e-5)
        logs = [[e["loss_gates"] for e in t.state.log_history if "loss_gates" in e] for t in (trainer, runs[0][0])]
        assert len(logs[0]) == 4 and logs[0] == pytest.approx(logs[1], rel=1e-3, abs=1e-6)
    assert compared == 2 * 3 * (6 + 6 + 1)


def test_the_penalty_is_a_part_of_the_loss_and_the_cost_is_logged(tmp_path: Path) -> None:
    trainer, _ = compress(tmp_path, trainer=CompressionTrainer, **LEARNED, **LOGGED)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for number, entry in enumerate(logs):
        learning = number < 4
        assert ("loss_gates" in entry) == learning
        terms = [value for name, value in entry.items() if name.startswith("loss_")]
        assert len(terms) == (4 if learning else 3) and entry["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert ("expected_cost" in entry) == ("target_cost" in entry) == (number < 3)
    dense = trainer.pruner.budget.dense
    targets = [entry["target_cost"] for entry in logs[:3]]
    assert dense > targets[0] > targets[1] > targets[2] > trainer.pruner.budget.goals[0]
    assert all(trainer.pruner.budget.goals[0] < entry["expected_cost"] < dense for entry in logs[:3])
    assert 0.5 <= logs[-1]["sparsity"] < 0.6


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_resuming_is_exact_to_the_bit(tmp_path: Path, family: str) -> None:
    task = {"bert": "sequence", "llama": "causal"}[family]
    options = {"family": family, "task": task, "dropout": 0.1, "max_steps": 10, "n": 14, **LEARNED}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **LOGGED}
    prune = {"schedule": {"start": 0.2, "end": 0.7}, "units": ["heads", "neurons", "sublayers"]}
    whole, model = compress(tmp_path / "whole", save_strategy="steps", save_steps=1, prune=prune, **options)
    assert 0.5 <= whole.pruner.sparsity() < 0.6
    checked = 0
    for step, learning in ((1, False), (2, True), (4, True), (6, True), (7, False), (9, False)):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert json.loads((checkpoint / STATE_FILE).read_text())["learning"] == learning
        names = safetensors.torch.load_file(checkpoint / TENSORS_FILE).keys()
        assert any(name.startswith("learned.optimizer") for name in names) == (learning and step > 2)
        again, resumed = compress(tmp_path / "again", resume=checkpoint, prune=prune, **options)
        assert vector(resumed).shape == vector(model).shape, f"another plan from step {step}"
        assert torch.equal(vector(resumed), vector(model)), f"weights differ from step {step}"
        assert resumed.config.hfcompress == model.config.hfcompress
        states = [run.pruner.state() for run in (whole, again)]
        assert states[0] == states[1] and states[0][1] == {}
        logs = [
            [(e["loss"], e.get("loss_gates"), e.get("expected_cost"), e["sparsity"]) for e in log if "loss" in e]
            for log in (whole.state.log_history, again.state.log_history)
        ]
        assert len(logs[0]) == 10 and logs[0] == logs[1]
        checked += 1
    assert checked == 6 and not list(tmp_path.rglob("*gates*.pt"))


def test_evaluation_is_deterministic_and_changes_nothing(tmp_path: Path) -> None:
    class Evaluates(TrainerCallback):
        losses: list[tuple[float, float]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.losses.append(tuple(trainer.evaluate()["eval_loss"] for _ in range(2)))  # type: ignore[arg-type]

    weights = []
    for given in ({}, {"callbacks": [Evaluates()]}):
        trainer = make_trainer(
            tmp_path, trainer=PruningTrainer, given=given, **LEARNED
        )  # loaders draw from dropout's generator
        trainer.train()
        weights.append(vector(trainer.model))
    assert torch.equal(*weights)
    assert len(Evaluates.losses) == 6 and all(one == two for one, two in Evaluates.losses)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_gates_again(tmp_path: Path, reentrant: bool) -> None:
    from tests.training.scenarios import checkpointing

    options = {"trainer": PruningTrainer, **LEARNED, **WITH_SUBLAYERS, **DESCENT}
    _, plain = compress(tmp_path, **options)
    _, saving = compress(tmp_path, **checkpointing(use_reentrant=reentrant), **options)
    assert plain.config.hfcompress["units"] == saving.config.hfcompress["units"]
    torch.testing.assert_close(vector(saving), vector(plain), rtol=1e-4, atol=1e-6)


def test_warm_up_is_plain_training(tmp_path: Path) -> None:
    class Keeps(TrainerCallback):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.weights.append(vector(model))

    runs = []
    for kind in (PlainTrainer, PruningTrainer):
        keeps = Keeps()
        settings = {"prune": {"schedule": {"start": 0.5, "end": 0.8}}, "max_steps": 10, **LEARNED}
        compress(tmp_path, trainer=kind, dropout=0.1, given={"callbacks": [keeps]}, **settings)
        runs.append(keeps.weights)
    assert all(torch.equal(plain, pruned) for plain, pruned in zip(runs[0][:5], runs[1][:5], strict=True))
    assert not torch.equal(runs[0][5], runs[1][5])
    # The callback comes before the one that cuts, after step 8.
    assert len(runs[1][7]) == len(runs[0][7]) > len(runs[1][8]) == len(runs[1][9])
    assert not torch.equal(runs[1][8], runs[1][9]), "the cool-down must train"


def test_the_optimizer_holds_the_model_and_not_the_gates(tmp_path: Path) -> None:
    held = []

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            inside = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
            held.append(inside == {id(p) for p in model.parameters()})

    trainer = make_trainer(
        tmp_path, trainer=PruningTrainer, given={"callbacks": [Looks()]}, **LEARNED, **WITH_SUBLAYERS
    )
    trainer.train()
    assert held == [True] * 6
    trainer.save_model(str(tmp_path / "final"))
    assert torch.equal(vector(hfcompress.load(tmp_path / "final")), vector(trainer.model))
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_a_run_that_stops_early_keeps_what_the_gates_computed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stops(TrainerCallback):
        logits: torch.Tensor | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 3:
                model.eval()
                with torch.no_grad():
                    self.logits = model(**batch).logits
                control.should_training_stop = True

    batch = Examples("bert", "sequence", 4).batch(0, 1, 2, 3)
    batch.pop("labels")
    stops = Stops()
    trainer = make_trainer(tmp_path, trainer=PruningTrainer, **LEARNED)
    trainer.add_callback(stops)  # after the one that moves the gates
    with caplog.at_level(logging.WARNING):
        trainer.train()
    model = trainer.model
    assert "stopped before the schedule's end" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, stops.logits, rtol=1e-5, atol=3e-6)
    assert [site.units for site in find_sites(model)] == [4, 48] * 3


def test_a_run_that_was_interrupted_starts_anew_without_its_gates(tmp_path: Path) -> None:
    class Interrupts(TrainerCallback):
        armed = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.armed and state.global_step == 3:
                self.armed = False
                raise KeyboardInterrupt

    saving = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 2, **LEARNED}
    _, model = compress(tmp_path / "whole", trainer=PruningTrainer, **saving)
    trainer = make_trainer(tmp_path / "again", trainer=PruningTrainer, given={"callbacks": [Interrupts()]}, **saving)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.pruner.learned is not None
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(vector(trainer.model), vector(model))
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.parametrize(("before", "after"), [(10, 4), (4, 10)])
def test_a_run_of_another_length_still_reaches_the_target(tmp_path: Path, before: int, after: int) -> None:
    options = {"trainer": PruningTrainer, "prune": {"schedule": {"start": 0.5, "end": 0.8}}, **LEARNED}
    compress(tmp_path / "first", save_strategy="steps", save_steps=1, **{**options, "max_steps": before})
    resumed = {10: 3, 4: 2}[before]
    trainer, _ = compress(
        tmp_path / "then", resume=tmp_path / "first" / f"checkpoint-{resumed}", **{**options, "max_steps": after}
    )
    assert trainer.pruner.done and 0.5 <= trainer.pruner.sparsity() < 0.6


def test_a_target_in_milliseconds(tmp_path: Path) -> None:
    prune = {"target": {"speedup": 1.02, "batch": 1, "length": 4, "threads": 1}}
    trainer, model = compress(tmp_path, trainer=PruningTrainer, prune=prune, **LEARNED, **LOGGED)
    assert trainer.pruner.done and trainer.pruner.budget.costs.quantity == "latency_ms"
    costs = [entry["expected_cost"] for entry in trainer.state.log_history if "expected_cost" in entry]
    assert len(costs) == 3 and all(0 < cost <= trainer.pruner.budget.dense for cost in costs)
    assert model.config.hfcompress["steps"][0]["reached"][0]["wanted"] == pytest.approx(1.02)


def test_streamed_data_will_do(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(Examples("bert", "sequence", 16).rows)

    given = {"args": arguments(tmp_path, max_steps=5)}
    trainer, _ = compress(tmp_path, trainer=PruningTrainer, data=Stream(), given=given, **LEARNED)
    assert trainer.pruner.done and 0.5 <= trainer.pruner.sparsity() < 0.6
