"""Learned gates: the distribution, the expected cost, the Lagrangian, and that what is cut equals what was gated."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call

from hfcompress.anatomy import find_sites
from hfcompress.config import MeasureConfig, PruneConfig, Recipe, RecipeError
from hfcompress.measurement import example_inputs
from hfcompress.measurement.costs import Costs, flops_costs, parameter_costs
from hfcompress.pruning import Budget, Gates, Plan, Pruner, cut
from hfcompress.pruning.learned import LearnedGates, hard_concrete_mean, hard_concrete_sample, probability_open
from tests.families import CONFIGS, largest_difference, make_inputs, make_model, predictions, run_model, task_class

ALL = ["heads", "neurons", "sublayers"]


def settings(units=("heads", "neurons"), *, rate=0.1, **changes) -> PruneConfig:
    values = {
        "units": list(units),
        "criterion": {"name": "learned", "gate_learning_rate": rate},
        "multiple_of": {"neurons": 4},
        "at_least": {"heads": 1, "neurons": 4},
        "schedule": {"start": 0.0, "end": 1.0},
        **changes,
    }
    recipe = Recipe.from_dict({"prune": values})
    assert recipe.prune is not None
    return recipe.prune


def staircase(model) -> Costs:
    """Made-up milliseconds: a unit costs the less the more there are, and the first one costs most."""
    sites = {s.name: np.sqrt(np.arange(s.units + 1.0)) * (1 + n / 3) for n, s in enumerate(find_sites(model))}
    return Costs("latency_ms", 5.0, {f"encoder.{n}": 0.5 for n in range(3)}, sites)


COSTS = {
    "parameters": lambda model: parameter_costs(model),
    "flops": lambda model: flops_costs(model, example_inputs(model, batch=1, length=8), scope="model"),
    "latency_ms": staircase,
}


def make_gates(model, units=("heads", "neurons"), *, costs="parameters", seed=0, **changes) -> LearnedGates:
    return LearnedGates(model, find_sites(model), COSTS[costs](model), settings(units, **changes), seed=seed)


def scatter(gates: LearnedGates, *, seed=0, spread=2.0) -> None:
    """Gates of all kinds: open, closed and between."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*gates.log_alpha.values(), *gates.sublayer_log_alpha.values()):
            value.copy_(torch.randn(value.shape, generator=generator) * spread)
    gates.sample(1)


# ---- the distribution ----


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 0.7, 4.0])
def test_a_gate_is_drawn_as_its_distribution_says(log_alpha):
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = hard_concrete_sample(torch.full_like(noise, log_alpha), noise)
    u = noise.numpy()
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
    np.testing.assert_allclose(drawn.numpy(), np.clip(1.2 * s - 0.1, 0, 1), atol=1e-12)
    # The distribution function at 0 and at 1, on paper: P(gate = 0) = 1 / (1 + 11^-b a), P(gate = 1) = 1 / (1 + 11^b / a).
    a, power = np.exp(log_alpha), 11 ** (2 / 3)
    assert probability_open(torch.tensor(log_alpha)).item() == pytest.approx(1 - 1 / (1 + power * a), abs=1e-6)
    assert float((drawn > 0).double().mean()) == pytest.approx(1 - 1 / (1 + power * a), abs=0.005)
    assert float((drawn == 1).double().mean()) == pytest.approx(1 / (1 + power / a), abs=0.005)
    expected = np.clip(1.2 / (1 + np.exp(-log_alpha)) - 0.1, 0, 1)
    assert hard_concrete_mean(torch.tensor(log_alpha)).item() == pytest.approx(expected, abs=1e-6)


def test_a_gate_has_a_gradient_where_it_is_between():
    log_alpha = torch.tensor([0.0, 5.0, -5.0, 0.5], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.5, 0.5, 0.5, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: hard_concrete_sample(x, noise), (log_alpha,))
    hard_concrete_sample(log_alpha, noise).sum().backward()
    assert log_alpha.grad is not None
    assert log_alpha.grad[0].item() == pytest.approx(1.2 * 0.25 / (2 / 3))  # sigmoid'(0) = 1/4
    assert log_alpha.grad[1] == log_alpha.grad[2] == 0


# ---- the expected cost ----


@pytest.mark.parametrize("units", [["heads"], ["neurons"], ["sublayers"], ALL], ids="+".join)
@pytest.mark.parametrize("quantity", COSTS)
def test_the_expected_cost_by_hand(quantity, units):
    model = make_model("bert")
    gates = make_gates(model, units, costs=quantity)
    scatter(gates)
    costs, seen = COSTS[quantity](model), 0
    total = costs.rest + sum(costs.fixed.values())
    for site in find_sites(model):
        n = float(site.units)
        if site.kind in units:
            n = float((1 / (1 + np.exp(-gates.log_alpha[site.name].detach().double().numpy()) * 11 ** (-2 / 3))).sum())
        counts = [site.units] if site.kind not in units else [1, 2, 3, 4] if site.kind == "heads" else range(4, 49, 4)
        cost = np.interp(n, list(counts), [costs.sites[site.name][count] for count in counts])
        if "sublayers" in units:
            q = 1 / (1 + np.exp(-gates.sublayer_log_alpha[site.name].item()) * 11 ** (-2 / 3))
            cost, n = q * cost, q * n
        assert gates.expected_units()[site.name] == pytest.approx(n, rel=1e-5)
        total, seen = total + cost, seen + 1
    assert seen == 6
    assert gates.expected_cost().item() == pytest.approx(total, rel=1e-5)
    assert gates.dense == pytest.approx(costs.total({}))


@pytest.mark.parametrize("quantity", COSTS)
def test_the_gradient_of_the_expected_cost_equals_finite_differences(quantity):
    gates = make_gates(make_model("bert"), ALL, costs=quantity)
    scatter(gates, seed=2)
    (gates.expected_cost() / gates.dense).backward()
    compared = 0
    for value in (*gates.log_alpha.values(), *gates.sublayer_log_alpha.values()):
        flat, gradient = value.data.view(-1), value.grad.view(-1)
        for unit in {0, len(flat) // 2, len(flat) - 1}:
            before, sides = flat[unit].item(), []
            for step in (2**-9, -(2**-9)):
                flat[unit] = before + step
                sides.append((flat[unit].item(), gates.expected_cost().item() / gates.dense))
            flat[unit] = before
            slope = (sides[0][1] - sides[1][1]) / (sides[0][0] - sides[1][0])
            assert gradient[unit].item() == pytest.approx(slope, rel=1e-3, abs=1e-9)
            assert gradient[unit] > 0
            compared += 1
    assert compared == 6 * 3 + 6


def test_what_has_to_stay_costs_and_is_held_open():
    gates = make_gates(make_model("bert"), at_least={"heads": 2, "neurons": 12})
    with torch.no_grad():
        for value in gates.log_alpha.values():
            value.fill_(-9.0)
        gates.multipliers.copy_(torch.tensor([5.0, 1.0]))
    costs = parameter_costs(make_model("bert"))
    least = sum(costs.sites[f"encoder.{n}.heads"][2] + costs.sites[f"encoder.{n}.neurons"][12] for n in range(3))
    assert gates.expected_cost().item() == pytest.approx(least)
    gates.penalty(0.0).backward()
    assert all(bool((value.grad < 0).all()) for value in gates.log_alpha.values()), "descent has to open them"


# ---- the Lagrangian ----


def test_the_penalty_by_hand():
    gates = make_gates(make_model("bert"), ALL)
    with torch.no_grad():
        gates.multipliers.copy_(torch.tensor([2.0, 3.0]))
    over = gates.expected_cost().item() / gates.dense - 0.6  # of the costs that parameter_costs counts all is prunable
    penalty = gates.penalty(0.6 * gates.dense)
    assert penalty.item() == pytest.approx(2 * over + 3 * over**2)
    penalty.backward()
    assert gates.multipliers.grad is not None
    assert gates.multipliers.grad.tolist() == pytest.approx([over, over**2])


@pytest.mark.parametrize("units", [["heads", "neurons"], ["neurons", "sublayers"], ALL], ids="+".join)
@pytest.mark.parametrize("quantity", COSTS)
def test_the_penalty_drives_the_expected_cost_to_the_target(quantity, units):
    gates = make_gates(make_model("bert"), units, costs=quantity)
    scatter(gates, spread=0.5)
    flat = gates.costs.total({name: 0 for name in gates.sites})
    target = flat + 0.7 * (gates.dense - flat)
    before = abs(gates.expected_cost().item() - target)
    for _ in range(400):
        gates.update(target)
    after = abs(gates.expected_cost().item() - target)
    assert after < 0.01 * (gates.dense - flat) and after < before / 5


# ---- what the model computes ----


def by_ordinary_gates(model, values, inputs):
    """The outputs of a model with given gates, by the class that closes gates."""
    other = copy.deepcopy(model)
    for module in other.modules():
        module._forward_pre_hooks.clear()
    gates = Gates(other, find_sites(other))
    for name, value in values.items():
        gates.values[name].copy_(value)
    return run_model(other, inputs)


def test_training_draws_and_evaluation_does_not():
    model, inputs = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), make_inputs("bert")
    gates = make_gates(model, ALL, seed=5)
    scatter(gates)
    means = {name: gates.mean(name) for name in gates.sites}
    ours = run_model(model.eval(), inputs)
    assert largest_difference(ours, run_model(model, inputs)) == 0
    assert largest_difference(ours, by_ordinary_gates(model, means, inputs)) < 1e-5
    drawn = run_model(model.train(), inputs)
    values = {name: value.detach().clone() for name, value in gates.values.items()}
    assert largest_difference(drawn, by_ordinary_gates(model, values, inputs)) < 1e-5
    assert largest_difference(drawn, ours) > 0.01
    assert largest_difference(drawn, run_model(model, inputs)) == 0, "one sample per optimizer step"
    torch.rand(7)  # whoever draws in between changes nothing
    gates.sample(2)
    assert not all(torch.equal(values[name], gates.values[name]) for name in values)
    gates.sample(1)
    assert all(torch.equal(values[name], gates.values[name]) for name in values)
    gates.remove()
    assert largest_difference(run_model(model, inputs), run_model(make_model("bert"), inputs)) == 0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_the_gradient_reaches_the_gates_as_autograd_would(name):
    """The other road: one graph from log alpha through scaled weights to the loss."""
    model, inputs = make_model(name, task_class(name)), make_inputs(name, task_class(name))
    config = settings(ALL, at_least={"heads": 0, "neurons": 0})  # nothing has to stay, so nothing is held open
    gates = LearnedGates(model, find_sites(model), parameter_costs(model), config, seed=3)
    scatter(gates)
    log_alpha = {key: value.detach().clone().requires_grad_() for key, value in gates.log_alpha.items()}
    whole = {key: value.detach().clone().requires_grad_() for key, value in gates.sublayer_log_alpha.items()}
    weights = dict(model.named_parameters())
    scaled = {}
    for site in find_sites(model):
        noise = gates._noise[site.name]
        gate = hard_concrete_sample(log_alpha[site.name], noise[:-1]) * hard_concrete_sample(
            whole[site.name], noise[-1]
        )
        gate = gate.repeat_interleave(site.width)
        for reader in site.readers:
            rows = model.get_submodule(reader).weight.shape[0] == len(gate) and name == "gpt2"
            scaled[f"{reader}.weight"] = weights[f"{reader}.weight"] * (gate[:, None] if rows else gate)
    model.train(False)
    for reader in gates._readers.values():
        for module in reader:
            module.train()  # draws, without the dropout of the others
    for _ in range(2):  # two accumulated batches
        (predictions(model(**inputs)).square().mean() * 8).backward()
    gates.take_gradients(scale=4.0)
    gates.update(gates.dense)  # multipliers of zero: no penalty
    gates.remove()
    (predictions(functional_call(model, scaled, kwargs=inputs)).square().mean() * 4).backward()
    seen = 0
    for ours, theirs in ((gates.log_alpha, log_alpha), (gates.sublayer_log_alpha, whole)):
        for key in ours:
            largest = float(theirs[key].grad.abs().max())
            torch.testing.assert_close(ours[key].grad, theirs[key].grad, rtol=1e-3, atol=1e-4 * largest + 1e-9)
            seen += largest > 0
    assert seen >= len(gates.sites)


def test_gradients_that_overflowed_are_left_out():
    model, inputs = make_model("bert").train(), make_inputs("bert")
    gates = make_gates(model)
    with torch.no_grad():
        gates.multipliers.fill_(1.0)
    before = gates.state()
    (model(**inputs).last_hidden_state.sum() * float("inf")).backward()
    gates.take_gradients()
    gates.update(0.0)
    assert all(torch.equal(value, before[name]) for name, value in gates.state().items())
    gates.sample(2)
    gates.update(0.0)
    assert not torch.equal(gates.state()["multipliers"], before["multipliers"])


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_weights_compute_what_the_gates_did(name):
    model, inputs = make_model(name, task_class(name)), make_inputs(name, task_class(name))
    dense = run_model(model, inputs)
    gates = LearnedGates(model, find_sites(model), parameter_costs(model), settings(ALL))
    scatter(gates)
    with torch.no_grad():
        for value in gates.sublayer_log_alpha.values():
            value.abs_()
    gates.sample(1)
    gated = run_model(model, inputs)
    gates.fold()
    folded = run_model(model, inputs)
    scale = max(float(value.abs().max()) for value in gated.values())
    assert largest_difference(folded, gated) < 2e-5 * max(1.0, scale)
    assert largest_difference(dense, gated) > 1e-3
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- with the pruner ----


def learn(model, config, *, steps, **changes):
    """A run in which only the gates learn, to keep what the dense model computes; the pruner, before its last step."""
    inputs = make_inputs("bert", batch=8)
    with torch.no_grad():
        wanted = model.eval()(**inputs).last_hidden_state
    pruner = Pruner(model, config, total_steps=steps, **changes)
    for step in range(steps):
        pruner.step(step)
        model.train()
        (model(**inputs).last_hidden_state - wanted).square().mean().backward()
        pruner.collect()
    return pruner


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TARGETS = {"sparsity": 0.5, "flops": 0.6, "parameters": 0.7, "speedup": 1.4}


@pytest.mark.parametrize("quantity", TARGETS)
@pytest.mark.parametrize("units", [["heads", "neurons"], ALL], ids="+".join)
def test_what_is_cut_equals_what_was_gated_and_meets_the_budget(units, quantity):
    model, inputs = make_model("bert", **NO_DROPOUT), make_inputs("bert")
    config = settings(units, rate=0.3, target={quantity: TARGETS[quantity]})
    given = {}
    if quantity == "speedup":  # by a table that is known: what is measured on a busy machine is no test
        costs = staircase(model)
        given = {"budget": Budget(costs, costs.total({}), (costs.total({}) / 1.4,))}
    pruner = learn(model, config, steps=30, measure=MeasureConfig(batch=1, length=4, rounds=3, threads=1), **given)
    pruner._stopwatch = None
    assert not pruner.done and pruner.learned is not None
    gated = copy.deepcopy(model).eval()
    before = {site.name: site.units for site in find_sites(model)}
    learned, plans = copy.copy(pruner.learned), []
    take = pruner._verified

    def keep(*args):
        plans.append(take(*args))
        return plans[-1]

    pruner._verified = keep
    changes = pruner.step(30)
    assert changes and pruner.done and pruner.learned is None
    values = {}
    for name, units_before in before.items():
        kept = torch.zeros(units_before)
        kept[list(plans[0].keep[name])] = 1.0
        values[name] = learned.mean(name) * kept
    assert largest_difference(run_model(model.eval(), inputs), by_ordinary_gates(gated, values, inputs)) < 1e-5
    left = {site.name: site.units for site in find_sites(model)}
    assert sum(before.values()) > sum(left.values())
    assert 0.8 * pruner.budget.goals[0] < pruner.cost() <= pruner.budget.goals[0] * (1 + 1e-9)
    assert pruner.step(31) == [] and pruner.learning() is None


def test_planted_units_are_closed_first():
    model = make_model("bert", **NO_DROPOUT)
    planted = {"heads": [1, 3], "neurons": list(range(0, 48, 2))}
    for site in find_sites(model):
        columns = model.get_submodule(site.readers[0]).weight.data.view(-1, site.units, site.width)
        columns[:, planted[site.kind]] = 0.0
    pruner = learn(model, settings(rate=0.2, target={"sparsity": 0.5}, multiple_of={"neurons": 1}), steps=60)
    gates, seen = pruner.learned, 0
    assert gates is not None
    for name, site in gates.sites.items():
        rest = [unit for unit in range(site.units) if unit not in planted[site.kind]]
        ranked = gates.curves()[name].order.tolist()
        assert set(ranked[: len(rest)]) == set(planted[site.kind]), name
        assert gates.mean(name)[planted[site.kind]].max() == 0 < gates.mean(name)[rest].max()
        seen += 1
    assert seen == 6
    dense = {name: len(curve.order) for name, curve in gates.curves().items()}
    pruner.step(60)
    assert 0.5 <= pruner.sparsity() < 0.51
    assert all(abs(site.units - dense[site.name] / 2) <= 2 for site in find_sites(model))


def test_nothing_is_touched_before_the_start_and_the_target_warms_up():
    model, inputs = make_model("bert", **NO_DROPOUT), make_inputs("bert")
    dense = run_model(model, inputs)
    config = settings(target={"sparsity": 0.4}, schedule={"name": "linear", "start": 0.25, "end": 0.75})
    pruner = Pruner(model, config, total_steps=8)
    for step in (0, 1):
        pruner.step(step)
        assert pruner.learned is None and pruner.learning() is None
        assert largest_difference(run_model(model, inputs), dense) == 0
    targets = []
    for step in (2, 3, 4, 5):
        pruner.step(step)
        found = pruner.learning()
        assert found is not None
        targets.append(found["target_cost"] / pruner.budget.dense)
    assert targets == pytest.approx([0.9, 0.8, 0.7, 0.6])
    pruner.step(6)
    assert pruner.done and 0.4 <= pruner.sparsity() < 0.5


def test_the_state_goes_on_exactly():
    config = settings(ALL, rate=0.3, target={"sparsity": 0.5})
    model = make_model("bert", **NO_DROPOUT)
    pruner = learn(model, config, steps=9)
    facts, tensors = pruner.state()
    other_model = copy.deepcopy(model)
    for module in other_model.modules():
        module._forward_pre_hooks.clear()
    other = Pruner(other_model, config, total_steps=9)
    other.load_state(facts, tensors)
    assert other.state()[0] == facts
    assert tensors.keys() == other.state()[1].keys() and len(tensors) == 12 + 1 + 13 * 3
    for name, value in pruner.learned.values.items():
        assert torch.equal(value, other.learned.values[name])
    inputs = make_inputs("bert")
    for one, trained in ((pruner, model), (other, other_model)):
        one.learned.take_gradients()  # what `learn` left
        trained.train()(**inputs).last_hidden_state.square().mean().backward()
        one.collect()
        one.step(9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    assert model.config.hfcompress == other_model.config.hfcompress


def test_a_run_that_stops_early_leaves_what_the_gates_computed():
    model, inputs = make_model("bert", **NO_DROPOUT), make_inputs("bert")
    pruner = learn(model, settings(rate=0.5, target={"sparsity": 0.5}), steps=10)
    gated = run_model(model.eval(), inputs)
    pruner.finish()
    assert not pruner.done and pruner.learned is None
    assert largest_difference(run_model(model, inputs), gated) < 1e-5
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_second_pruning_counts_from_the_dense_model():
    model = make_model("bert", **NO_DROPOUT)
    cut(model, Plan({"encoder.0.heads": (0, 2), "encoder.1.neurons": tuple(range(8)), "encoder.2.heads": ()}))
    pruner = learn(model, settings(rate=0.3, target={"sparsity": 0.6}), steps=20)
    pruner.step(20)
    assert 0.6 <= pruner.sparsity() < 0.7
    assert [site.units for site in find_sites(model)][4] == 0


# ---- what is refused ----

REFUSED = {
    "uniform": ({"uniform": True}, "learned finds each layer's own size"),
    "site": ({"scope": "site"}, "scope: site has no use for it"),
    "layers": ({"units": ["neurons", "layers"]}, "no gates on whole layers"),
    "goals": ({"target": {"speedup": [2, 3]}}, "works towards one target"),
    "drop": ({"target": {"max_drop": 1.0}}, "works towards one target"),
    "constant": ({"schedule": {"name": "constant"}}, "needs time between start and end"),
    "rate": ({"criterion": {"name": "learned", "gate_learning_rate": 0.0}}, "prune.criterion.gate_learning_rate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(case):
    changes, words = REFUSED[case]
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.from_dict({"prune": {"criterion": "learned", **changes}})
    assert "\n" not in str(caught.value)


def test_no_time_to_learn_is_refused():
    config = settings(schedule={"start": 0.1, "end": 0.15})
    with pytest.raises(
        ValueError, match=r"no optimizer step between start \(0.1\) and end \(0.15\) of 10; train longer"
    ):
        Pruner(make_model("bert"), config, total_steps=10)
    assert len(REFUSED) == 7
