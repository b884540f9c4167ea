"""The pruner alone, without a Trainer: budgets met, time verified, layers renumbered, states that survive the disk."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertForSequenceClassification

import hfcompress
from hfcompress.anatomy import StructureError, drop_layers, find_sites
from hfcompress.anatomy.depth import droppable_layers, full_depth
from hfcompress.config import MeasureConfig, PruneConfig
from hfcompress.measurement import count_flops, count_parameters, example_inputs
from hfcompress.measurement.costs import Costs, parameter_costs
from hfcompress.measurement.latency_table import TableError, fast_multiple
from hfcompress.pruning import BudgetError, Plan, Pruner, budgets, cut, make_budget
from hfcompress.pruning import pruner as module
from hfcompress.pruning.budgets import Budget, Stopwatch, dense_parameters, unpruned
from hfcompress.pruning.pruner import Due, due_updates, fit_to_device
from tests.families import largest_difference, make_inputs, make_model, run_model

LAYERS, HEADS, NEURONS = 4, 4, 48
AT_ONCE = {"name": "constant", "start": 0.0}
MEASURE = MeasureConfig(batch=2, length=8, rounds=3, warmup=0, threads=1, device="cpu")


def make(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": HEADS, "intermediate_size": NEURONS, "vocab_size": 60}
    settings = {**sizes, "num_hidden_layers": LAYERS, "initializer_range": 0.2, "max_position_embeddings": 16}
    return BertForSequenceClassification(BertConfig(**{**settings, **changes})).eval()


def batches(count: int = 3, size: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(60, (size, 7), generator=generator)} for _ in range(count)]


def configure(**changes: Any) -> PruneConfig:
    base = {
        "criterion": "magnitude",
        "schedule": AT_ONCE,
        "multiple_of": {"neurons": 1},
        "at_least": {"neurons": 1},
    }
    return PruneConfig.model_validate({**base, **changes})


def prune(model: Any, *, steps: int = 10, **changes: Any) -> Pruner:
    pruner = Pruner(model, configure(**changes), total_steps=steps, batches=batches, measure=MEASURE)
    for step in range(steps + 1):
        pruner.step(step)
    assert pruner.done
    return pruner


def units(model: Any) -> dict[str, int]:
    return {site.name: site.units for site in find_sites(model)}


# ---- targets ----


def prunable(model: Any) -> int:
    return sum(site.parameters_per_unit * site.units for site in find_sites(model))


def flops(model: Any) -> int:
    return count_flops(model, example_inputs(model, batch=1, length=8))


HEAD, NEURON = 4 * 8 * 32 + 3 * 8, 2 * 32 + 1  # parameters of one of each
QUANTITIES = {
    # what is counted by another road, and by how much a plan may miss it: the largest single unit
    "sparsity": (prunable, 0.4, HEAD),
    "parameters": (count_parameters, 0.7, HEAD),
    "flops": (flops, 0.6, 2 * 8 * (4 * 8 * 32) + 2 * 2 * 8 * 8 * 8),
}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("scope", ["global", "site"])
def test_budgets_are_met_and_used_up(quantity, scope):
    count, goal, chunk = QUANTITIES[quantity]
    model = make()
    dense = count(model)
    pruner = prune(model, target={quantity: goal}, scope=scope)
    allowed = (1 - goal) * dense if quantity == "sparsity" else goal * dense
    assert count(model) <= allowed
    # With the same share everywhere, a head goes in each layer at once.
    assert count(model) > allowed - chunk * (LAYERS if scope == "site" else 1)
    assert pruner.cost() == count(model), "the table of costs knows what the model costs"
    assert pruner.sparsity() == pytest.approx(1 - prunable(model) / prunable(make()), abs=1e-12)
    assert not pruner.reached


def test_numbers_above_one_are_absolute_and_what_is_more_than_the_model_has_changes_nothing(caplog):
    model = make()
    whole = count_parameters(model)
    prune(model, target={"parameters": whole - 5 * NEURON})
    assert whole - 5 * NEURON - HEAD < count_parameters(model) <= whole - 5 * NEURON
    with caplog.at_level(logging.WARNING, logger="hfcompress.pruning.budgets"):
        prune(model, target={"parameters": 10 * whole})
    assert "is more than the dense model has" in caplog.text


def test_parameters_of_the_layers_alone():
    model, inside = make(), sum(p.numel() for p in make().bert.encoder.parameters())
    prune(model, target={"parameters": 0.6, "scope": "layers"})
    left = sum(p.numel() for p in model.bert.encoder.parameters())
    assert 0.6 * inside - HEAD < left <= 0.6 * inside


def test_what_cannot_be_reached_is_said_at_once():
    model = make()
    with pytest.raises(
        BudgetError, match=r"^target parameters 0.1 is out of reach: .*at least .* stay; ask for less"
    ) as caught:
        Pruner(model, configure(target={"parameters": 0.1}), total_steps=10)
    assert "\n" not in str(caught.value) and units(model) == units(make())
    with pytest.raises(BudgetError, match=r"target sparsity 0.999 is out of reach"):
        Pruner(model, configure(target={"sparsity": [0.2, 0.999]}), total_steps=10)
    with pytest.raises(
        ValueError, match="3 targets cannot be reached in 2 optimizer steps; train longer, or give fewer"
    ):
        Pruner(model, configure(target={"sparsity": [0.1, 0.2, 0.3]}), total_steps=2)
    with pytest.raises(
        ValueError, match=r"max_drop needs a model's score .*`hfcompress prune --max-drop`, or give a list"
    ):
        Pruner(model, configure(target={"max_drop": 1.0}), total_steps=2)
    with pytest.raises(
        ValueError, match=r"the criterion obs and repair need examples .*; give calibration batches, or"
    ):
        Pruner(model, configure(criterion="obs"), total_steps=2)


# ---- time ----


class FakeTable:
    """Milliseconds in proportion to parameters, so that a plan's cost can be told without a clock."""

    scale = 1e-3

    def __init__(self, model: Any) -> None:
        self.shapes = {next(p.shape for n, p in model.named_parameters() if "LayerNorm" in n)}

    def costs(self, model: Any) -> Costs:
        if next(p.shape for n, p in model.named_parameters() if "LayerNorm" in n) not in self.shapes:
            raise TableError("other layers")
        known = parameter_costs(model, scope="layers")
        sites = {name: line * self.scale for name, line in known.sites.items()}
        return Costs("latency_ms", 4.0, {name: value * self.scale for name, value in known.fixed.items()}, sites)


@pytest.fixture
def clock(monkeypatch):
    """A machine on which everything takes `factor` of what the table says, and `extra_ms`."""
    state = {"factor": 1.0, "extra_ms": 0.0, "timed": [], "tables": 0, "dense_ms": None}

    def table(model, inputs, **options):
        state["tables"] += 1
        state["options"] = options | {"shape": tuple(inputs["input_ids"].shape)}
        return FakeTable(model)

    def cost_ms(model, units, layers):
        known = FakeTable(model).costs(model)
        return state["factor"] * known.total(units, layers=layers) + state["extra_ms"]

    def time(self, units, *, layers, rounds=11):
        mine = cost_ms(self.start, units, layers)
        dense_ms = FakeTable(self.dense).costs(self.dense).total({})
        state["timed"].append((dict(units), set(layers), mine))
        return mine, dense_ms / mine

    monkeypatch.setattr(budgets, "measure_latency_table", table)
    monkeypatch.setattr(Stopwatch, "time", time)
    return state


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.15])
def test_the_plan_is_corrected_until_the_clock_agrees(clock, factor, caplog):
    clock["factor"] = factor  # of the pruned model only: the table is wrong about what is left
    model = make()
    with caplog.at_level(logging.INFO, logger="hfcompress.pruning.pruner"):
        pruner = prune(model, target={"speedup": 1.5})
    (found,) = pruner.reached
    assert found["speedup"] == pytest.approx(1.5, rel=0.05) and found["wanted"] == pytest.approx(1.5)
    assert found["goal"] == 0 and found["latency_ms"] == pytest.approx(clock["timed"][-1][2])
    dense_ms = FakeTable(make()).costs(make()).total({})
    by_hand = 4.0 + 1e-3 * sum(p.numel() for p in model.bert.encoder.parameters())
    assert pruner.cost() == pytest.approx(by_hand)
    assert factor * by_hand == pytest.approx(dense_ms / 1.5, rel=0.05), "what was timed is what was cut"
    assert len(clock["timed"]) == (1 if factor == 1.0 else len(clock["timed"])) <= 4
    assert clock["timed"][-1][0] == units(model)
    said = [record for record in caplog.records if "measured before the cut" in record.message]
    assert [record.levelname for record in said] == ["INFO"]
    assert clock["options"] == {"threads": 1, "scope": "model", "shape": (2, 8)}


@pytest.mark.parametrize("factor", [0.5, 1.15])
def test_a_wrong_table_does_not_take_too_much_on_the_way(clock, factor):
    clock["factor"] = factor
    model = make()
    schedule = {"name": "linear", "start": 0.0, "end": 1.0, "updates": 5}
    pruner = Pruner(
        model, configure(target={"speedup": 2.5}, schedule=schedule), total_steps=10, batches=batches, measure=MEASURE
    )
    for step in range(11):
        pruner.step(step)
        if step == 4:  # as if stopped here and gone on elsewhere
            facts, tensors = pruner.state()
            fresh = Pruner(model, pruner.config, total_steps=10, batches=batches, measure=MEASURE, budget=pruner.budget)
            fresh.load_state(json.loads(json.dumps(facts)), tensors)
            assert fresh._floor == pruner._floor is not None
            pruner = fresh
    (found,) = pruner.reached
    assert pruner.done and found["speedup"] == pytest.approx(2.5, rel=0.05)


def test_time_is_measured_where_the_model_is():
    with pytest.raises(
        ValueError, match=r"target\.device is cuda, but the model is on cpu.* leave target\.device at auto"
    ):
        prune(make(), target={"speedup": 2.0, "device": "cuda"})


def test_milliseconds_are_compared_with_milliseconds(clock):
    clock["factor"] = 1.2
    dense_ms = FakeTable(make()).costs(make()).total({})
    goal = round(0.8 * dense_ms, 2)
    pruner = prune(make(), target={"latency_ms": goal, "batch": 3, "length": 4, "threads": 2, "scope": "layers"})
    (found,) = pruner.reached
    assert found["latency_ms"] == pytest.approx(goal, rel=0.05)
    assert found["wanted"] == pytest.approx(found["speedup"] * found["latency_ms"] / goal)
    assert clock["options"] == {"threads": 2, "scope": "layers", "shape": (3, 4)}


def test_a_miss_is_a_warning_that_says_by_how_much(clock, caplog):
    clock["extra_ms"] = 8.0  # that no cut takes away
    model = make()
    with caplog.at_level(logging.INFO, logger="hfcompress.pruning.pruner"):
        pruner = prune(model, target={"speedup": 2.5})
    (found,) = pruner.reached
    assert found["speedup"] < 2.5 * 0.95
    (said,) = [record for record in caplog.records if "measured before the cut" in record.message]
    percent = round(100 * (found["speedup"] / 2.5 - 1))
    assert said.levelname == "WARNING" and percent <= -5
    assert f"{found['speedup']:.2f}x of the dense model's speed, wanted 2.50x ({percent:+d} %); counts" in said.message
    best = min(clock["timed"], key=lambda entry: entry[2])
    assert units(model) == best[0], "of what was tried, the nearest is taken"


def test_a_stopwatch_times_what_it_is_told():
    model = make()
    watch = Stopwatch(model, configure(target={"speedup": 2}).target, measure=MEASURE)
    assert watch.dense is watch.start and watch.inputs["input_ids"].shape == (2, 8)
    before = model.bert.encoder.layer[0].output.dense.weight
    assert watch.dense.bert.encoder.layer[0].output.dense.weight.data_ptr() == before.data_ptr(), "no copy of weights"
    prune(model, target={"sparsity": 0.5})
    latency_ms, ratio = watch.time({"encoder.0.neurons": 4}, layers={"encoder.0"}, rounds=5)
    assert latency_ms > 0 and ratio > 1.3, "a quarter of the layers"
    sizes = [len(watch.start.bert.encoder.layer), len(watch.dense.bert.encoder.layer)]
    assert sizes == [LAYERS, LAYERS]


# ---- several goals ----


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (AT_ONCE, 4, [Due(0, 0, 1.0), Due(2, 1, 1.0)]),
        ({"name": "constant", "start": 0.5}, 8, [Due(2, 0, 1.0), Due(6, 1, 1.0)]),
        (
            {"name": "linear", "start": 0.5, "end": 1.0, "updates": 2},
            16,
            [Due(6, 0, 0.5), Due(8, 0, 1.0), Due(12, 1, 0.5), Due(16, 1, 1.0)],
        ),
        ({"start": 0.1, "end": 0.6, "updates": 20}, 2, [Due(0, 0, 1.0), Due(1, 1, 1.0)]),
    ],
)
def test_each_goal_has_its_part_of_the_run(schedule, steps, expected):
    config = configure(target={"sparsity": [0.2, 0.4]}, schedule=schedule)
    assert due_updates(config, steps) == expected


@pytest.mark.parametrize("steps", [3, 7, 10, 100])
def test_every_goal_is_due_within_the_run_and_before_it_is_said_to_be_reached(steps):
    config = configure(target={"sparsity": [0.1, 0.2, 0.3]}, schedule={"start": 0.1, "end": 1.0})
    due = due_updates(config, steps)
    pruner = Pruner(make(), config, total_steps=steps)
    ends = {pruner.goal_at(step): step for step in range(steps + 1) if pruner.goal_at(step) is not None}
    assert list(ends) == [0, 1, 2] and ends[2] == steps
    for goal, end in ends.items():
        last = [update for update in due if update.goal == goal][-1]
        assert last.share == 1.0 and last.step <= end
    assert [update.goal for update in due] == sorted(update.goal for update in due)


def test_one_model_after_the_other():
    model, seen = make(), []
    config = configure(target={"sparsity": [0.2, 0.4, 0.6]}, schedule={"start": 0.0, "end": 1.0, "updates": 2})
    pruner = Pruner(model, config, total_steps=12)
    total, before = prunable(model), None
    for step in range(13):
        pruner.step(step)
        left = units(model)
        assert before is None or all(left[name] <= before[name] for name in left), "what is gone stays gone"
        before = left
        if pruner.goal_at(step) is not None:
            seen.append(1 - prunable(model) / total)
            assert pruner.done == (len(seen) == 3)
    assert len(seen) == 3
    for reached, wanted in zip(seen, (0.2, 0.4, 0.6), strict=True):
        assert wanted <= reached < wanted + HEAD / total


# ---- sublayers and layers ----


def test_a_whole_sublayer_goes_where_it_is_worth_least():
    model = make()
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight.mul_(1e-4)
        model.bert.encoder.layer[2].intermediate.dense.weight.mul_(1e-4)
    share = NEURONS * NEURON / prunable(model)
    pruner = prune(model, target={"sparsity": share}, units=["sublayers"])
    left = units(model)
    assert left.pop("encoder.2.neurons") == 0 and set(left.values()) == {HEADS, NEURONS}
    assert pruner.sparsity() == pytest.approx(share)


def identity(layer: Any) -> None:
    """Make a layer of BERT do next to nothing: only its norms are left."""
    with torch.no_grad():
        for part in (layer.attention.output.dense, layer.output.dense):
            part.weight.mul_(1e-3)
            part.bias.zero_()


LAYERED = {"units": ["layers"], "target": {"parameters": 0.65, "scope": "layers"}}


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
def test_the_layers_that_do_least_go_and_the_others_are_renumbered(criterion):
    model = make()
    for number in (0, 2):
        identity(model.bert.encoder.layer[number])
    kept = [model.bert.encoder.layer[n].output.dense.bias for n in (1, 3)]
    pruner = prune(
        model, criterion=criterion, repair=False, **{**LAYERED, "target": {"parameters": 0.5, "scope": "layers"}}
    )
    assert model.config.hfcompress["layers"] == {"encoder": [2, 4]} and model.config.num_hidden_layers == 2
    assert all(layer.output.dense.bias is bias for layer, bias in zip(model.bert.encoder.layer, kept, strict=True))
    assert set(pruner.original) == {f"encoder.{n}.{role}" for n in (0, 1) for role in ("heads", "neurons")}
    assert list(pruner.budget.costs.fixed) == ["encoder.0", "encoder.1"]
    assert pruner.sparsity() == pytest.approx(0.5)
    assert pruner.cost() == sum(p.numel() for p in model.bert.encoder.parameters())


def test_layers_go_step_by_step_and_importance_goes_with_its_layer():
    model = make()
    config = configure(
        criterion="first_order",
        target={"parameters": [0.75, 0.5], "scope": "layers"},
        units=["layers", "neurons"],
        schedule=AT_ONCE,
    )
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"start": 0.5})})
    pruner = Pruner(model, config, total_steps=8)
    identity(model.bert.encoder.layer[1])
    for step in range(1, 9):
        model.zero_grad()
        batch = batches(1)[0]
        model(**batch, labels=torch.arange(8) % 2).loss.backward()
        pruner.collect()
        before = {name: dict(seen) for name, seen in pruner._importance.items()}
        layers = len(model.bert.encoder.layer)
        pruner.step(step)
        now = pruner._importance
        assert set(now) == {site.name for site in find_sites(model)}
        assert all(len(seen["squares"]) == units(model)[name] for name, seen in now.items())
        if len(model.bert.encoder.layer) < layers and step == 2:
            halves = [before[f"encoder.{n}.heads"]["squares"] / 2 for n in (0, 2, 3)]
            for number, half in enumerate(halves):
                torch.testing.assert_close(now[f"encoder.{number}.heads"]["squares"], half)
    assert pruner.done and len(model.bert.encoder.layer) < LAYERS
    assert set(pruner.original) == set(units(model))


def test_what_is_timed_has_the_layers_that_stay(clock):
    model = make()
    for number in (0, 2):
        identity(model.bert.encoder.layer[number])
    config = configure(
        criterion="obs",
        repair=False,
        units=["layers", "neurons"],
        target={"speedup": [1.3, 2.2]},
        at_least={"neurons": 8},
    )
    pruner = Pruner(model, config, total_steps=4, batches=batches, measure=MEASURE)
    for step in range(5):
        pruner.step(step)
    assert len(pruner.reached) == 2 and pruner.done
    left = len(model.bert.encoder.layer)
    timed, layers, _ = clock["timed"][-1]
    assert len(layers) == left < LAYERS and {"encoder.0", "encoder.2"} & layers == set(), (
        "names of the model as it began"
    )
    now = units(model)
    for new, old in enumerate(sorted(layers)):
        for role in ("heads", "neurons"):
            assert timed[f"{old}.{role}"] == now[f"encoder.{new}.{role}"]
    assert pruner.reached[1]["speedup"] == pytest.approx(2.2, rel=0.05)


def test_what_a_layer_cannot_do_without_stays():
    t5 = make_model("t5", "AutoModelForSeq2SeqLM")
    layers = {f"{stack}.{n}" for stack in ("encoder", "decoder") for n in range(len(getattr(t5, stack).block))}
    assert droppable_layers(t5) == layers - {"encoder.0", "decoder.0"} and len(layers) > 4
    assert droppable_layers(make()) == {f"encoder.{n}" for n in range(LAYERS)}
    assert droppable_layers(make(num_hidden_layers=2)) == {"encoder.0", "encoder.1"}
    config = configure(units=["layers"], target={"parameters": 0.9, "scope": "layers"})
    pruner = Pruner(t5, config, total_steps=1)
    pruner.step(0)
    assert pruner.done and t5.config.hfcompress["layers"]
    assert t5.encoder.block[0].layer[0].SelfAttention.has_relative_attention_bias
    shared = AlbertModel(
        AlbertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=60, num_hidden_layers=3)
    )
    with pytest.raises(StructureError, match="AlbertModel has no layer that it could do without") as caught:
        Pruner(shared, config, total_steps=1)
    assert "\n" not in str(caught.value)
    both = Pruner(shared, configure(units=["layers", "neurons"], target={"sparsity": 0.1}), total_steps=1)
    both.step(0)
    assert both.done and units(shared)["encoder.0.neurons"] < NEURONS
    with pytest.raises(StructureError, match="has no layer that it could do without"):
        droppable_layers(make(num_hidden_layers=1))


# ---- repair ----


def test_repair_makes_up_for_what_was_cut():
    dense, results = make(), {}
    batch = batches(1, 16)[0]
    with torch.no_grad():
        expected = dense(**batch).logits
    for repair in (False, True):
        model = make()
        prune(model, criterion="obs", target={"sparsity": 0.4}, repair=repair)
        with torch.no_grad():
            results[repair] = float((model(**batch).logits - expected).square().mean())
        if not repair:
            first = model.bert.encoder.layer[0].output.dense.weight
            assert all(
                any(torch.equal(c, d) for d in make().bert.encoder.layer[0].output.dense.weight.T) for c in first.T
            )
    assert results[True] < 0.5 * results[False]
    # Without a word, criteria that look at examples repair, and others do not; behind gates nothing is repaired.
    asked = {("obs", "gradual"): True, ("first_order", "gradual"): False, ("magnitude", "gradual"): False}
    asked |= {("fisher", "gradual"): True, ("obs", "end"): False}
    for (criterion, when), repairs in asked.items():
        pruner = Pruner(make(), configure(criterion=criterion, cut=when), total_steps=4, batches=batches)
        assert pruner._repairs is repairs, (criterion, when)


def test_obs_behind_gates_cuts_at_the_end():
    model = make()
    schedule = {"name": "linear", "start": 0.0, "end": 1.0, "updates": 2}
    pruner = Pruner(model, configure(criterion="obs", cut="end", schedule=schedule), total_steps=4, batches=batches)
    for step in range(1, 5):
        pruner.step(step)
        assert (count_parameters(model) < count_parameters(make())) == (step == 4)
    assert pruner.done and 0.5 <= pruner.sparsity() < 0.5 + HEAD / prunable(make())


# ---- models that were pruned before ----


def pruned_before(*, hidden: bool = False, layers: bool = True) -> BertForSequenceClassification:
    model = make()
    keep = {"encoder.1.neurons": tuple(range(20)), "encoder.3.heads": (0, 2)}
    cut(model, Plan(keep, {"encoder": (1, 3)} if layers else {}, tuple(range(24)) if hidden else None))
    return model


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("layers", [False, True])
def test_the_model_before_anything_was_pruned(hidden, layers):
    model = pruned_before(hidden=hidden, layers=layers)
    state = torch.random.get_rng_state()
    dense = unpruned(model)
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn from the run's random numbers"
    assert type(dense) is type(model) and not dense.training
    shapes = {name: parameter.shape for name, parameter in make().named_parameters()}
    assert {name: parameter.shape for name, parameter in dense.named_parameters()} == shapes
    assert dense_parameters(model) == prunable(make())
    assert unpruned(make()) is not None and unpruned(dense) is dense
    whole = make()
    assert unpruned(whole) is whole


def test_depth_is_restored_with_what_each_layer_is():
    kinds = ["sliding_attention", "full_attention"] * 2
    model = make_model("qwen2", "AutoModelForCausalLM", num_hidden_layers=4, layer_types=kinds, sliding_window=4)
    drop_layers(model, {"decoder": (0, 3)})
    config = full_depth(model)
    assert config.num_hidden_layers == 4
    assert config.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert model.config.num_hidden_layers == 2, "the model's own config is left alone"
    two = make_model("bart", "AutoModelForSeq2SeqLM")
    drop_layers(two, {"encoder": (0,), "decoder": (1,)})
    assert (full_depth(two).encoder_layers, full_depth(two).decoder_layers) == (3, 2)
    assert count_parameters(unpruned(two)) == count_parameters(make_model("bart", "AutoModelForSeq2SeqLM"))


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_targets_count_from_the_dense_model(quantity):
    count, goal, chunk = QUANTITIES[quantity]
    goal = {"sparsity": 0.8, "parameters": 0.25, "flops": 0.2}[quantity]
    dense, model = count(make()), pruned_before(hidden=True)
    already = count(model)
    pruner = prune(model, target={quantity: goal})
    allowed = (1 - goal) * dense if quantity == "sparsity" else goal * dense
    assert allowed - chunk < count(model) <= allowed < already
    assert pruner.cost() == count(model)
    assert pruner.sparsity() == pytest.approx(1 - prunable(model) / prunable(make()))
    assert model.config.hfcompress["layers"] == {"encoder": [2, 4]}


def test_what_was_reached_before_needs_nothing_more():
    model = pruned_before()
    before = units(model)
    prune(model, target={"sparsity": 0.3})
    assert units(model) == before


@pytest.mark.parametrize("hidden", [False, True])
def test_time_counts_from_the_dense_model(clock, hidden):
    model = pruned_before(hidden=hidden)
    dense_ms = FakeTable(make()).costs(make()).total({})
    wanted = 3.2 if hidden else 2.4
    pruner = prune(model, target={"speedup": wanted})
    assert clock["tables"] == (2 if hidden else 1), "layers of another width have times of their own"
    assert pruner.budget.dense == pytest.approx(dense_ms)
    assert list(pruner.budget.costs.fixed) == ["encoder.0", "encoder.1"]
    by_hand = 4.0 + 1e-3 * sum(p.numel() for p in model.bert.encoder.parameters())
    assert pruner.cost() == pytest.approx(by_hand)
    assert dense_ms / by_hand == pytest.approx(wanted, rel=0.05)
    assert clock["timed"][-1][1] == {"encoder.0", "encoder.1"}


def test_layers_that_were_dropped_before_count_as_gone(caplog):
    model = pruned_before()
    with caplog.at_level(logging.INFO, logger="hfcompress.pruning.pruner"):
        prune(model, target={"sparsity": 0.8})
    assert "and 2 of 4 layers; sparsity 0.8" in caplog.text


def test_a_stopwatch_has_the_model_before_beside_the_one_that_is_timed():
    model = pruned_before(hidden=True)
    watch = Stopwatch(model, configure(target={"speedup": 2}).target, measure=MEASURE)
    assert count_parameters(watch.dense) == count_parameters(make())
    assert count_parameters(watch.start) == count_parameters(model)
    latency_ms, ratio = watch.time({"encoder.0.neurons": 4}, layers={"encoder.0", "encoder.1"}, rounds=3)
    assert latency_ms > 0 and ratio > 0


# ---- devices ----


def test_multiples_that_fit_the_device():
    config = PruneConfig()
    fitted = fit_to_device(config, make())
    assert fitted.multiple_of.neurons == fast_multiple("cpu") == 16
    assert config.multiple_of.neurons == "auto" and fit_to_device(fitted, make()) is fitted
    meta = make().to("meta")
    assert fit_to_device(config, meta).multiple_of.neurons == 64, "what is no CPU counts as a GPU"
    assert fit_to_device(configure(multiple_of={"neurons": 3}), meta).multiple_of.neurons == 3


# ---- states ----


def from_disk(pruner: Pruner, folder: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    facts, tensors = pruner.state()
    (folder / "facts.json").write_text(json.dumps(facts))
    safetensors.torch.save_file(tensors, folder / "tensors.safetensors")
    return json.loads((folder / "facts.json").read_text()), safetensors.torch.load_file(folder / "tensors.safetensors")


def equal_states(one: Pruner, other: Pruner) -> bool:
    facts, tensors = one.state()
    again, others = other.state()
    assert facts == again, [name for name in facts if facts[name] != again[name]]
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


RUNS = {
    "first_order": {"criterion": "first_order", "target": {"sparsity": 0.5}},
    "end": {"criterion": "first_order", "target": {"sparsity": 0.5}, "cut": "end"},
    "obs": {"criterion": "obs", "target": {"sparsity": [0.2, 0.5]}},
    "layers": {"criterion": "obs", "target": {"speedup": [1.2, 2.0]}, "units": ["layers", "neurons"]},
    "layers and gradients": {
        "criterion": "first_order",
        "target": {"parameters": [0.8, 0.5], "scope": "layers"},
        "units": ["layers", "heads", "neurons", "sublayers"],
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_taken_up_in_the_middle_ends_alike(name, clock, tmp_path):
    config = configure(schedule={"start": 0.1, "end": 1.0, "updates": 2}, **RUNS[name])

    def go_on(pruner: Pruner, first: int, last: int) -> None:
        for step in range(first, last + 1):
            pruner.model.zero_grad()
            pruner.model(**batches(1)[0], labels=(torch.arange(8) + step) % 2).loss.backward()
            pruner.collect()
            pruner.step(step)

    whole = Pruner(make(), config, total_steps=8, batches=batches, measure=MEASURE)
    go_on(whole, 1, 5)
    assert not whole.done
    facts, tensors = from_disk(whole, tmp_path)
    if whole.gates is None:
        assert count_parameters(whole.model) < count_parameters(make()), "something is gone in the middle"
    whole.model.save_pretrained(tmp_path / "model")
    model = hfcompress.load(tmp_path / "model")
    again = Pruner(
        model, config, total_steps=8, batches=batches, budget=Budget.from_dict(facts["budget"]), measure=MEASURE
    )
    again.load_state(facts, tensors)
    assert equal_states(whole, again)
    tables = clock["tables"]
    for pruner in (whole, again):
        go_on(pruner, 6, 8)
        assert pruner.done
    assert clock["tables"] == tables, "the budget is not measured again"
    assert equal_states(whole, again)
    assert units(model) == units(whole.model) and model.config.hfcompress == whole.model.config.hfcompress
    state = whole.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert len(whole.reached) == (2 if name == "layers" else 0)


def test_a_budget_survives_json():
    costs = Costs("latency_ms", 0.1, {"encoder.0": 1 / 3}, {"encoder.0.heads": np.array([0.0, 0.1, 2 / 3])})
    budget = Budget(costs, 1.1, (0.7, 1 / 7))
    again = Budget.from_dict(json.loads(json.dumps(budget.to_dict())))
    assert again.to_dict() == budget.to_dict() and again.goals == budget.goals and again.dense == budget.dense
    assert np.array_equal(again.costs.sites["encoder.0.heads"], costs.sites["encoder.0.heads"])
    assert budget.at(0, 0.5) == pytest.approx(0.9) and budget.at(1, 0.0) == 0.7 and budget.at(1, 1.0) == 1 / 7
    gone = budget.without_layers({"encoder.0": None})
    assert not gone.costs.fixed and not gone.costs.sites
    moved = budget.without_layers({"encoder.0": "encoder.4"})
    assert list(moved.costs.sites) == ["encoder.4.heads"] and dataclasses.replace(moved, costs=costs) == budget


def test_auto_stays_what_it_was_on_another_machine(monkeypatch):
    config = PruneConfig(criterion="magnitude", target={"sparsity": 0.2})
    first = Pruner(make(), config, total_steps=4)
    facts, tensors = first.state()
    monkeypatch.setattr(module, "fast_multiple", lambda device: 64)
    again = Pruner(make(), config, total_steps=4)
    assert again.config.multiple_of.neurons == 64
    again.load_state(facts, tensors)
    assert again.config.multiple_of.neurons == 16


def test_make_budget_by_hand():
    model = make()
    budget = make_budget(model, configure(target={"sparsity": [0.25, 0.5]}).target, measure=MEASURE)
    total = LAYERS * (HEADS * HEAD + NEURONS * NEURON)
    assert budget.dense == total and budget.goals == (0.75 * total, 0.5 * total)
    with pytest.raises(ValueError, match="max_drop has no budget of its own"):
        make_budget(model, configure(target={"max_drop": 1.0}).target, measure=MEASURE)


def test_the_cut_model_computes_the_same_after_a_reload(tmp_path):
    for name, auto, changes in (("llama", "AutoModelForCausalLM", {}), ("vit", "AutoModelForImageClassification", {})):
        model = make_model(name, auto, **changes)
        pruner = Pruner(
            model,
            configure(units=["layers", "heads", "neurons"], target={"parameters": 0.5, "scope": "layers"}),
            total_steps=1,
        )
        pruner.step(0)
        model.save_pretrained(tmp_path / name)
        again = hfcompress.load(tmp_path / name)
        inputs = make_inputs(name, auto)
        assert largest_difference(run_model(again, inputs), run_model(model, inputs)) == 0
        assert again.config.hfcompress == model.config.hfcompress
