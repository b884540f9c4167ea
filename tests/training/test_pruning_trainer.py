"""Gradual pruning inside Trainer: how much, when, by which importance, and that everything works afterwards."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import FNetConfig, FNetForSequenceClassification, Seq2SeqTrainingArguments, TrainerCallback

import hfcompress
from hfcompress.anatomy import StructureError, find_sites
from hfcompress.config import Recipe
from hfcompress.pruning import BudgetError, Gates
from hfcompress.training import PlainTrainer, PruningTrainer, Seq2SeqCompressionTrainer, Seq2SeqPruningTrainer
from tests.families import make_model
from tests.training.scenarios import Examples, arguments, build, compress, make_trainer, vector

RUNS = {"bert": "sequence", "vit": "image", "gpt2": "causal", "llama": "causal"}
HIDDEN, NEURONS, LAYERS, CHUNK = 32, 48, 3, 4


def prune(folder: Path, **options: Any) -> tuple[PruningTrainer, Any]:
    return compress(folder, trainer=PruningTrainer, **options)


def prunable(family: str) -> tuple[int, int]:
    """Parameters of all heads and neurons of the dense model, and of the largest chunk, counted on paper."""
    if family == "llama":  # grouped-query attention: 2 groups of 2 query heads; no biases; gate, up and down
        group = 2 * 8 * HIDDEN * 2 + 2 * 8 * HIDDEN
        return LAYERS * (2 * group + NEURONS * 3 * HIDDEN), max(group, CHUNK * 3 * HIDDEN)
    head = 3 * 8 * (HIDDEN + 1) + 8 * HIDDEN  # rows of query, key and value with biases, columns of the output
    neuron = HIDDEN + 1 + HIDDEN
    return LAYERS * (4 * head + NEURONS * neuron), max(head, CHUNK * neuron)


class Sizes(TrainerCallback):
    """Number of parameters when each step begins, and the weights."""

    def __init__(self) -> None:
        self.parameters: list[int] = []
        self.weights: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append(vector(model))
        self.parameters.append(self.weights[-1].numel())

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.on_step_begin(args, state, control, model)


class StopsAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


# ---- how much and when ----


@pytest.mark.parametrize("criterion", ["first_order", "magnitude", "random"])
@pytest.mark.parametrize("family", RUNS)
def test_the_target_is_reached_and_both_ways_of_cutting_agree(tmp_path: Path, family: str, criterion: str) -> None:
    # Plain descent, for Adam makes noise as large as what it divides by.
    descent = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    options = {"family": family, "task": RUNS[family], "criterion": criterion, "sparsity": 0.45, **descent}
    dense = vector(build(family, RUNS[family], seed=0)).numel()
    total, chunk = prunable(family)
    trainer, model = prune(tmp_path, cut="gradual", **options)
    removed = dense - vector(model).numel()
    assert 0.45 * total <= removed < 0.45 * total + chunk
    assert trainer.pruner.sparsity() == pytest.approx(removed / total, rel=1e-9)
    other, at_end = prune(tmp_path, cut="end", **options)
    assert other.pruner.done and other.pruner.gates is None and trainer.pruner.done
    if criterion == "random":  # drawn anew at each update, for the units there are
        assert 0.45 * total <= dense - vector(at_end).numel() < 0.45 * total + chunk
        return
    assert at_end.config.hfcompress["units"] == model.config.hfcompress["units"]
    torch.testing.assert_close(vector(at_end), vector(model), rtol=1e-4, atol=1e-5)
    assert not torch.equal(vector(model), vector(build(family, RUNS[family], seed=0))[: vector(model).numel()])


def test_random_choices_follow_the_seed(tmp_path: Path) -> None:
    def kept(seed: int) -> torch.Tensor:
        settings = {"criterion": "random", "seed": seed, "learning_rate": 0.0, "data_seed": 1}
        return vector(prune(tmp_path, **settings)[1])

    assert torch.equal(kept(3), kept(3))
    first, second = kept(3), kept(4)
    assert first.shape != second.shape or not torch.equal(first, second)


SCHEDULES = {
    # name: settings, updates after these steps of 10, share of the target by then
    "polynomial": (
        {"start": 0.2, "end": 0.8, "updates": 3},
        {4: 1 - (2 / 3) ** 3, 6: 1 - (1 / 3) ** 3, 8: 1.0},
    ),
    "linear": ({"name": "linear", "start": 0.0, "end": 0.5, "updates": 2}, {2: 0.4, 5: 1.0}),
    "constant": ({"name": "constant", "start": 0.3}, {3: 1.0}),
    "at once": ({"name": "constant", "start": 0.0}, {0: 1.0}),
}


@pytest.mark.parametrize("cut", ["gradual", "end"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_units_go_at_the_steps_of_the_schedule(tmp_path: Path, name: str, cut: str) -> None:
    settings, shares = SCHEDULES[name]
    sizes = Sizes()
    options = {"criterion": "magnitude", "prune": {"schedule": settings}, "sparsity": 0.5, "max_steps": 10}
    trainer, _ = prune(
        tmp_path, cut=cut, logging_strategy="steps", logging_steps=1, given={"callbacks": [sizes]}, **options
    )
    dense, (total, chunk) = vector(build("bert", "sequence", seed=0)).numel(), prunable("bert")
    assert len(sizes.parameters) == 11
    reached = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry}
    assert list(reached) == list(range(1, 11))
    for step, parameters in enumerate(sizes.parameters):  # as it is after `step` optimizer steps
        share = max((due for at, due in shares.items() if at <= step), default=0.0)
        closed = round(reached.get(step, 0.5 if 0 in shares else 0.0) * total)
        assert 0.5 * share * total - total * 1e-4 <= closed < 0.5 * share * total + chunk or share == closed == 0
        if cut == "gradual":
            assert dense - parameters == pytest.approx(closed, abs=total * 1e-4)
        else:
            assert (dense - parameters > 0) == (share == 1.0), "closed units are cut at the last update only"


def test_warm_up_is_plain_training_and_cool_down_goes_on(tmp_path: Path) -> None:
    runs = []
    for kind in (PlainTrainer, PruningTrainer):
        sizes = Sizes()
        settings = {"prune": {"schedule": {"name": "constant", "start": 0.5}}, "max_steps": 8}
        compress(tmp_path, trainer=kind, dropout=0.1, given={"callbacks": [sizes]}, **settings)
        runs.append(sizes)
    plain, pruned = runs
    assert all(torch.equal(plain.weights[step], pruned.weights[step]) for step in range(4))
    assert pruned.parameters[4] < plain.parameters[4] == plain.parameters[8]
    assert len(set(pruned.parameters[4:])) == 1
    for step in range(4, 8):
        assert not torch.equal(pruned.weights[step], pruned.weights[step + 1]), "the cool-down must train"


@pytest.mark.parametrize("units", [["heads"], ["neurons"]])
def test_one_kind_of_units(tmp_path: Path, units: list[str]) -> None:
    _, model = prune(tmp_path, sparsity=0.25, prune={"units": units})
    touched = {name.rpartition(".")[2] for name in model.config.hfcompress["units"]}
    assert touched == set(units)


@pytest.mark.parametrize("cut", ["gradual", "end"])
def test_multiples_and_minimum(tmp_path: Path, cut: str) -> None:
    section = {"multiple_of": {"heads": 2, "neurons": 16}, "at_least": {"heads": 2, "neurons": 16}}
    _, model = prune(tmp_path, sparsity=0.4, cut=cut, prune=section)
    seen = 0
    for site in find_sites(model):
        assert site.units in ((2, 4) if site.kind == "heads" else (16, 32, 48))
        seen += 1
    assert seen == 6


def test_the_same_share_everywhere(tmp_path: Path) -> None:
    _, model = prune(tmp_path, sparsity=0.5, prune={"scope": "site"})
    assert [site.units for site in find_sites(model)] == [2, 24] * 3


@pytest.mark.parametrize("cut", ["gradual", "end"])
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_sublayers_may_go_altogether(tmp_path: Path, family: str, cut: str) -> None:
    section = {"units": ["heads"], "at_least": {"heads": 0}}
    total, _ = prunable(family)
    heads = LAYERS * 4 * (3 * 8 * (HIDDEN + 1) + 8 * HIDDEN)
    trainer, model = prune(
        tmp_path, family=family, task=RUNS[family], sparsity=0.95 * heads / total, cut=cut, prune=section, max_steps=12
    )
    left = [site.units for site in find_sites(model, kinds=["heads"])]
    assert left.count(0) >= 2 and sum(left) <= 1
    trainer.save_model(str(tmp_path / "final"))
    assert torch.equal(vector(hfcompress.load(tmp_path / "final")), vector(model))
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


# ---- importance ----


class GateGradients(TrainerCallback):
    """The other road: gates of our own on the live model, whose gradients autograd collects."""

    def __init__(self) -> None:
        self.gates: Gates | None = None
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gates = Gates(model, find_sites(model))
        self.gates.require_grad()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        assert self.gates is not None
        self.steps.append(self.gates.take_gradients())


@pytest.mark.parametrize("family", RUNS)
def test_importance_is_the_mean_squared_gradient_of_gates(tmp_path: Path, family: str) -> None:
    gates = GateGradients()
    trainer = make_trainer(
        tmp_path,
        trainer=PruningTrainer,
        family=family,
        task=RUNS[family],
        prune={"schedule": {"name": "constant", "start": 0.9}},
        max_steps=4,  # the update is after the third
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_grad_norm=1e-3,  # clipped after importance was read
        given={"callbacks": [gates, StopsAfter(3)]},
    )
    seen: list[dict[str, torch.Tensor]] = []
    collected: list[float] = []

    class Reads(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            facts, tensors = trainer.pruner.state()
            seen.append({name: value.clone() for name, value in tensors.items()})
            collected.append(facts["collected"])

    trainer.add_callback(Reads())
    trainer.train()
    assert len(gates.steps) == 3 and collected == [1.0, 2.0, 3.0]
    kept = {"squares": torch.square, "sums": lambda gradient: gradient}
    assert (
        set(seen[2]) == {f"importance.{key}.{site}" for site in gates.steps[0] for key in kept} and len(seen[2]) == 12
    )
    for name in gates.steps[0]:
        for key, function in kept.items():
            expected = torch.stack([function(step[name]) for step in gates.steps]).mean(0)
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(seen[2][f"importance.{key}.{name}"] / 3, expected, rtol=1e-4, atol=1e-7)


def test_earlier_intervals_count_half(tmp_path: Path) -> None:
    gates = GateGradients()
    schedule = {"name": "linear", "start": 0.0, "end": 1.0, "updates": 2}
    trainer = make_trainer(
        tmp_path,
        trainer=PruningTrainer,
        prune={"schedule": schedule, "units": ["neurons"]},
        sparsity=0.2,
        cut="end",
        max_steps=4,
        given={"callbacks": [gates]},
    )
    last: dict[str, Any] = {}

    class Reads(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            last["facts"], last["tensors"] = trainer.pruner.state()

    trainer.add_callback(Reads())
    trainer.train()
    # Updates after steps 2 and 4: by then two steps count half and two count in full.
    assert last["facts"]["collected"] == 3.0
    for name in ("encoder.0.heads", "encoder.1.heads", "encoder.2.heads"):
        steps = [step[name].square() for step in gates.steps]
        expected = (steps[0] + steps[1]) / 2 + steps[2] + steps[3]
        torch.testing.assert_close(last["tensors"][f"importance.squares.{name}"], expected, rtol=1e-4, atol=1e-7)


def test_the_weakest_units_go_first(tmp_path: Path) -> None:
    # Units whose outputs nobody reads have no influence on the loss: whichever criterion, they go before all others.
    for criterion in ("first_order", "magnitude"):
        model = build("bert", "sequence", seed=0)
        with torch.no_grad():
            for number, layer in enumerate(model.bert.encoder.layer):
                weak = range(4 * number, 4 * number + 24)
                layer.output.dense.weight[:, weak] *= 1e-4
                layer.intermediate.dense.weight[weak] *= 1e-4
        marks = [layer.intermediate.dense.weight.detach().clone() for layer in model.bert.encoder.layer]
        total, _ = prunable("bert")
        half = 0.5 * LAYERS * NEURONS * (2 * HIDDEN + 1) / total
        prune(
            tmp_path, model=model, sparsity=half, criterion=criterion, learning_rate=0.0, prune={"units": ["neurons"]}
        )
        for number, layer in enumerate(model.bert.encoder.layer):
            strong = [i for i in range(NEURONS) if i not in range(4 * number, 4 * number + 24)]
            assert torch.equal(layer.intermediate.dense.weight, marks[number][strong])


@pytest.mark.parametrize("criterion", ["first_order", "magnitude"])
def test_closed_units_stay_behind_dead_ones(tmp_path: Path, criterion: str) -> None:
    # Neurons that never fire have no gradient and no weight, as closed ones: none of them may stay in the place of another.
    results = {}
    for cut in ("gradual", "end"):
        model = build("bert", "sequence", seed=0)
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                for parameter in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
                    parameter[::2] = 0.0
                layer.output.dense.weight[:, ::2] = 0.0
        section = {"units": ["neurons"], "multiple_of": {"neurons": 1}}
        _, model = prune(tmp_path, model=model, cut=cut, sparsity=0.2, criterion=criterion, prune=section)
        results[cut] = [site.units for site in find_sites(model, kinds=["neurons"])]
    total, _ = prunable("bert")
    gone = LAYERS * NEURONS - sum(results["end"])
    assert gone == -(-round(0.2 * total) // (2 * HIDDEN + 1))
    assert sum(results["end"]) == sum(results["gradual"])


# ---- afterwards ----


@pytest.mark.parametrize("cut", ["gradual", "end"])
@pytest.mark.parametrize("family", RUNS)
def test_everything_works_after_the_cut(tmp_path: Path, family: str, cut: str) -> None:
    trainer, model = prune(tmp_path, family=family, task=RUNS[family], cut=cut, optim="adamw_torch", weight_decay=0.1)
    data = trainer.eval_dataset
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters())) and {id(p) for p in held} == {id(p) for p in model.parameters()}
    decayed = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
    names = set(trainer.get_decay_parameter_names(model))
    assert decayed == {id(p) for name, p in model.named_parameters() if name in names}
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    metrics, predicted = trainer.evaluate(), trainer.predict(data)
    trainer.save_model(str(tmp_path / "final"))
    again = hfcompress.load(tmp_path / "final")
    assert type(again) is type(model)
    with torch.no_grad():
        logits = again(**{name: value for name, value in data.batch(*range(16)).items() if name != "labels"}).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits, rtol=1e-5, atol=1e-5)
    assert metrics["eval_loss"] == pytest.approx(predicted.metrics["test_loss"], rel=1e-6)
    [step] = again.config.hfcompress["steps"]
    units = {site.name: site.units for site in find_sites(model)}
    assert step["step"] == "prune" and {n: pair[0] for n, pair in step["units"].items()}.items() <= units.items()
    assert step["sparsity"] == pytest.approx(trainer.pruner.sparsity(), abs=1e-6)


def test_a_second_run_trains_and_does_not_prune_more(tmp_path: Path) -> None:
    trainer, model = prune(tmp_path)
    before, units = vector(model), dict(model.config.hfcompress["units"])
    trainer.train()
    assert model.config.hfcompress["units"] == units
    changed = [not torch.equal(old, new) for old, new in zip(before, vector(model), strict=True)]
    assert sum(changed) > 0.5 * len(changed)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert [step["step"] for step in model.config.hfcompress["steps"]] == ["prune", "prune"]
    assert trainer.pruner.done


def test_pruning_goes_on_from_a_saved_model(tmp_path: Path) -> None:
    trainer, _ = prune(tmp_path, sparsity=0.3)
    trainer.save_model(str(tmp_path / "first"))
    again = hfcompress.load(tmp_path / "first")
    dense, (total, chunk) = vector(build("bert", "sequence", seed=0)).numel(), prunable("bert")
    prune(tmp_path, model=again, sparsity=0.6)
    removed = dense - vector(again).numel()
    assert 0.6 * total <= removed < 0.6 * total + chunk, "the budget counts from the dense model"
    assert all(pair[1] in (4, NEURONS) for pair in again.config.hfcompress["units"].values())


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2"])
def test_uniform_results_need_nothing_but_transformers(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"family": family, "task": RUNS[family], "sparsity": 0.3, "prune": {"uniform": True}}
    trainer, model = prune(tmp_path, save_strategy="steps", save_steps=3, **options)
    by_kind: dict[str, set[int]] = {"heads": set(), "neurons": set()}
    for site in find_sites(model):
        by_kind[site.kind].add(site.units)
    assert all(len(counts) == 1 for counts in by_kind.values())
    assert by_kind["neurons"] < {*range(NEURONS)} or by_kind["heads"] < {1, 2, 3}
    trainer.save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert "auto_map" not in config and "units" not in config["hfcompress"]
    inputs = trainer.eval_dataset.batch(0, 1)
    inputs.pop("labels")
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    original = transformers.PreTrainedModel.post_init.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "post_init", original)  # hfcompress does nothing here
        plain = type(model).from_pretrained(tmp_path / "final")
        with torch.no_grad():
            assert torch.equal(plain.eval()(**inputs).logits, expected)
    _, resumed = prune(tmp_path / "again", resume=tmp_path / "checkpoint-3", **options)
    assert torch.equal(vector(resumed), vector(model))


@pytest.mark.parametrize("kind", [Seq2SeqPruningTrainer, Seq2SeqCompressionTrainer])
def test_the_seq2seq_siblings_prune_decoders(tmp_path: Path, kind: type) -> None:
    model, data = build("llama", "causal", seed=0), Examples("llama", "causal", 8)
    parts = ("prune",) if kind is Seq2SeqPruningTrainer else ("distill", "prune")
    settings = {"target": {"sparsity": 0.3}, "multiple_of": {"neurons": 4}, "schedule": {"start": 0.1, "end": 0.7}}
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=6, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    given = {} if kind is Seq2SeqPruningTrainer else {"teacher": build("llama", "causal", seed=7)}
    recipe = Recipe.from_dict({part: {"distill": {}, "prune": settings}[part] for part in parts})
    trainer = kind(model=model, args=args, train_dataset=data, eval_dataset=data, recipe=recipe, **given)
    trainer.train()
    assert 0.3 <= trainer.pruner.sparsity() < 0.4
    assert [step["step"] for step in model.config.hfcompress["steps"]] == [*reversed(parts)]
    assert trainer.evaluate()["eval_loss"] > 0


# ---- stopping early, and what cannot be done ----


@pytest.mark.parametrize("cut", ["gradual", "end"])
def test_a_run_that_stops_early_is_left_whole(tmp_path: Path, cut: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"cut": cut, "max_steps": 10, "given": {"callbacks": [StopsAfter(5)]}}
    with caplog.at_level(logging.WARNING, logger="hfcompress.training.pruning"):
        trainer, model = prune(tmp_path, **options)
    assert "training stopped before the schedule's end: sparsity is 0.48" in caplog.text  # 0.963 of 0.5, and a bit
    assert not any(module._forward_pre_hooks for module in model.modules())
    before = trainer.predict(trainer.eval_dataset).predictions
    trainer.save_model(str(tmp_path / "final"))
    again = hfcompress.load(tmp_path / "final")
    batch = trainer.eval_dataset.batch(*range(16))
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, torch.from_numpy(before), rtol=1e-5, atol=1e-5)
    if cut == "end":
        assert vector(model).numel() == vector(build("bert", "sequence", seed=0)).numel()
        closed = [int((layer.output.dense.weight.abs().sum(0) == 0).sum()) for layer in model.bert.encoder.layer]
        assert sum(closed) > 0, "closed units must stay without effect"


def refused(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_cannot_be_pruned(tmp_path: Path) -> None:
    frozen = build("bert", "sequence", seed=0)
    frozen.bert.encoder.requires_grad_(False)
    refused(ValueError, "is frozen, so the criterion first_order cannot", lambda: prune(tmp_path, model=frozen))
    trainer, _ = prune(tmp_path, model=frozen, criterion="magnitude")
    assert trainer.pruner.done
    begun = Sizes()
    options = {"sparsity": 0.7, "prune": {"units": ["heads"]}, "given": {"callbacks": [begun]}}
    refused(BudgetError, "target sparsity 0.7 is out of reach: .* at_least heads 1", lambda: prune(tmp_path, **options))
    assert not begun.parameters, "what cannot be reached has to be said before the training"
    early = {"schedule": {"name": "constant", "start": 0.0}}
    trainer, _ = prune(tmp_path, prune=early)  # before the first step calibration data stand in for steps
    assert trainer.pruner.done
    movement = {**early, "criterion": "movement"}
    refused(ValueError, "movement adds up gradients of many optimizer steps", lambda: prune(tmp_path, prune=movement))
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "tpu_short_seq_length": 8,
    }
    fnet = FNetForSequenceClassification(FNetConfig(**sizes))
    refused(StructureError, "model_type 'fnet'", lambda: prune(tmp_path, model=fnet))


def test_a_bare_recipe_has_sensible_defaults(tmp_path: Path) -> None:
    model, data = (
        make_model("bert", "AutoModelForSequenceClassification", intermediate_size=64),
        Examples("bert", "x", 8),
    )
    for row in data.rows:
        row["labels"] = row["input_ids"][0] % 2
    trainer = PruningTrainer(model=model, args=arguments(tmp_path, max_steps=8), train_dataset=data)
    trainer.train()
    assert 0.5 <= trainer.pruner.sparsity() < 0.62


# ---- examples, goals, layers ----

EXAMPLES = {"criterion": {"name": "obs", "samples": 12}}
LAYERED = {"target": {"parameters": [0.8, 0.4], "scope": "layers"}, "units": ["layers", "neurons"]}
LAYERED |= {"at_least": {"neurons": 40}}


@pytest.mark.parametrize("family", RUNS)
def test_the_second_order_criterion_does_not_care_how_a_step_is_split(tmp_path: Path, family: str) -> None:
    descent = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "per_device_eval_batch_size": 4}
    runs = [
        prune(
            tmp_path,
            family=family,
            task=RUNS[family],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            **EXAMPLES,
            **descent,
        )[1]
        for batch in (8, 2)
    ]
    assert runs[0].config.hfcompress["units"] == runs[1].config.hfcompress["units"]
    torch.testing.assert_close(vector(runs[0]), vector(runs[1]), rtol=1e-3, atol=1e-3)
    dense, (total, chunk) = vector(build(family, RUNS[family], seed=0)).numel(), prunable(family)
    assert 0.5 * total <= dense - vector(runs[0]).numel() < 0.5 * total + chunk


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_repair_keeps_more_of_the_model(tmp_path: Path, family: str, precision: str) -> None:
    data = Examples(family, RUNS[family])
    batch = data.batch(*range(12))
    labels = batch.pop("labels")
    with torch.no_grad():
        before = build(family, RUNS[family], seed=0).eval()(**batch).logits
    lost = {}
    for repair in (False, True):
        schedule = {"name": "linear", "start": 0.0, "end": 0.5, "updates": 2}
        options = {**EXAMPLES, "prune": {"repair": repair, "schedule": schedule}, "learning_rate": 0.0, "dropout": 0.1}
        options |= {"bf16": True} if precision == "bfloat16" else {}
        _, model = prune(tmp_path, family=family, task=RUNS[family], sparsity=0.4, data=data, **options)
        assert model.training, "repair leaves the mode as it was"
        with torch.no_grad():
            now = model.eval()(**batch).logits.float()
        real = (labels != -100).unsqueeze(-1) if labels.dim() == 2 else torch.ones(())
        lost[repair] = float(((now - before) * real).square().mean())
    assert 0 < lost[True] < 0.8 * lost[False]


def test_examples_are_a_random_choice_of_the_training_data(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer=PruningTrainer, n=40, **EXAMPLES, per_device_eval_batch_size=5)
    found = trainer._calibration_batches()
    assert [len(batch["input_ids"]) for batch in found] == [5, 5, 2] and "labels" in found[0]
    everything = [tuple(row["input_ids"].tolist()) for row in trainer.train_dataset.rows]
    chosen = [everything.index(tuple(ids.tolist())) for batch in found for ids in batch["input_ids"]]
    assert len(set(chosen)) == 12 and chosen != list(range(12))
    again = make_trainer(tmp_path, trainer=PruningTrainer, n=40, **EXAMPLES, per_device_eval_batch_size=5)
    assert torch.equal(again._calibration_batches()[0]["input_ids"], found[0]["input_ids"])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(Examples("bert", "sequence", 16).rows)

    refused(
        ValueError,
        "looks at examples by number, which a streamed dataset does not have; use first_order with repair: false",
        lambda: prune(tmp_path, data=Stream(), **EXAMPLES),
    )


@pytest.mark.parametrize(("family", "criterion"), [("bert", "first_order"), ("llama", "first_order"), ("vit", "obs")])
def test_one_run_leaves_a_model_at_each_target(tmp_path: Path, family: str, criterion: str) -> None:
    goals = [0.2, 0.35, 0.5]
    section = {"target": {"sparsity": goals}, "schedule": {"start": 0.1, "end": 0.9, "updates": 2}}
    sizes = Sizes()
    trainer, model = prune(
        tmp_path,
        family=family,
        task=RUNS[family],
        criterion={"name": criterion, "samples": 12},
        prune=section,
        max_steps=12,
        given={"callbacks": [sizes]},
    )
    assert {goal: folder.name for goal, folder in trainer.goal_folders.items()} == {
        0.2: "sparsity-0.2",
        0.35: "sparsity-0.35",
    }
    dense, (total, chunk) = vector(build(family, RUNS[family], seed=0)).numel(), prunable(family)
    for number, goal in enumerate(goals):
        saved = hfcompress.load(trainer.goal_folders[goal]) if goal != 0.5 else model
        removed = dense - vector(saved).numel()
        assert goal * total <= removed < goal * total + chunk
        [step] = saved.config.hfcompress["steps"]
        assert step["optimizer_steps"] == 4 * (number + 1) and step["sparsity"] == pytest.approx(
            removed / total, abs=1e-6
        )
        assert step["settings"]["target"]["sparsity"] == goals
        # What is saved is the model as it was after that step, which then went on.
        assert torch.equal(vector(saved), sizes.weights[4 * (number + 1)])
    assert not torch.equal(sizes.weights[4][-20:], sizes.weights[5][-20:])
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    state = trainer.optimizer.state_dict()["state"]
    assert all(int(entry["step"]) == 12 for entry in state.values()) and len(state) == len(held)
    assert trainer.pruner.done and trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "gpt2"])
def test_layers_go_while_the_others_train_and_learn_from_the_teacher(tmp_path: Path, family: str) -> None:
    sizes = Sizes()
    options = {"family": family, "task": RUNS[family], "prune": LAYERED, "hidden": 0.5, "optim": "adamw_torch"}
    trainer, model = compress(tmp_path, max_steps=8, **EXAMPLES, given={"callbacks": [sizes]}, **options)
    ((left, before),) = model.config.hfcompress["layers"].values()
    assert (left, before) == (1, 3) and len(set(sizes.parameters)) > 2
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert len(trainer.optimizer.state_dict()["state"]) == len(held)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(sizes.weights[-2], sizes.weights[-1])
    assert trainer.comparison.hidden == ((0, 2),), "the last layer that is left is compared with the teacher's last"
    trainer.save_model(str(tmp_path / "final"))
    again = hfcompress.load(tmp_path / "final")
    batch = trainer.eval_dataset.batch(*range(4))
    batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    goal = hfcompress.load(trainer.goal_folders[0.8])
    ((middle, _),) = goal.config.hfcompress["layers"].values()
    assert middle == 2


def test_what_does_not_go_with_layers(tmp_path: Path) -> None:
    numbered = {"hidden": {"weight": 1.0, "layers": [[0, 0], [2, 2]]}}
    refused(
        ValueError,
        "names layers by their number, which changes while prune.units: layers drops some; use all or last",
        lambda: compress(tmp_path, prune=LAYERED, distill=numbered),
    )
    refused(
        ValueError,
        "hidden states of 32 and 64 features are compared through a projection .* set distill.hidden.weight to 0",
        lambda: compress(tmp_path, prune=LAYERED, hidden=0.5, teacher_width=64),
    )
    _, model = compress(tmp_path, prune=LAYERED, distill={"hidden": {"weight": 1.0, "layers": "last"}}, **EXAMPLES)
    assert model.config.hfcompress["layers"]


def test_a_narrow_student_learns_through_projections_of_its_real_width(tmp_path: Path) -> None:
    student = build("bert", "sequence", seed=0)
    hfcompress.cut(student, hfcompress.Plan({}, {}, tuple(range(20))))
    assert student.config.hidden_size == 32, "the config says what there was before"
    trainer, _ = compress(tmp_path, model=student, hidden=1.0, prune={"units": ["neurons"]}, sparsity=0.1)
    assert {(p.in_features, p.out_features) for p in trainer._projections.values()} == {(20, 32)}
    assert len(trainer._projections) == 3
