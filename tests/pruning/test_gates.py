"""Gates: their gradient is the importance, and what they close can be written into the weights."""

from __future__ import annotations

import copy

import pytest
import torch

from hfcompress.anatomy import find_sites
from hfcompress.config import PruneConfig
from hfcompress.pruning import Gates, Plan, Pruner, cut, gate_gradients
from tests.families import (
    CONFIGS,
    choose_units,
    largest_difference,
    make_inputs,
    make_model,
    others,
    predictions,
    run_model,
    task_class,
)

# Weights of the central difference of fourth order.
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


def test_every_family_is_here():
    assert len(CONFIGS) == 48


def loss_of(model, inputs):
    """A number that depends on every output in another way."""
    hidden = predictions(model(**inputs))
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    return (hidden * weights).sum() + (hidden.sin() * weights.flip(0)).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_of_a_gate_equals_finite_differences(name):
    """In float64; the norms of some families compute in float32, which the tolerance allows for."""
    smooth = {"feed_forward_proj": "gelu"} if name == "t5" else {}
    model = make_model(name, **smooth).double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in make_inputs(name).items()}
    found = find_sites(model)
    gates = Gates(model, found)
    gates.require_grad()
    loss_of(model, inputs).backward()
    gradients = gates.take_gradients()
    by_weight = gate_gradients(model, found)
    gates.require_grad(False)
    # Powers of two, so that 1 + step is exact. With OPT's ReLU only a small step stays on one side of every kink; T5 does
    # not scale its attention, so that one head in all layers changes much.
    step = {"opt": 2.0**-16, "t5": 2.0**-8, "t5:gated": 2.0**-8}.get(name, 2.0**-5)
    compared = {"heads": 0, "neurons": 0}
    for site in found:
        gradient = gradients[site.name]
        assert gradient.shape == (site.units,) and gradient.dtype == torch.float32
        largest = float(gradient.abs().max())
        assert largest > 1e-2, "the loss does not depend on this site"
        torch.testing.assert_close(by_weight[site.name], gradient, atol=1e-4 * largest, rtol=1e-4)
        for unit in range(site.units) if site.kind == "heads" else (0, site.units // 2, site.units - 1):
            difference = 0.0
            for steps, weight in STENCIL:
                gates.values[site.name][unit] = 1 + steps * step
                with torch.no_grad():
                    difference += weight * float(loss_of(model, inputs))
            gates.values[site.name][unit] = 1.0
            assert float(gradient[unit]) == pytest.approx(difference / step, abs=2e-3 * largest), (site.name, unit)
            compared[site.kind] += 1
    of_kind = {kind: [site.units for site in found if site.kind == kind] for kind in compared}
    assert compared == {"heads": sum(of_kind["heads"]), "neurons": 3 * len(of_kind["neurons"])}
    assert compared["neurons"] >= 3


@pytest.mark.parametrize("name", CONFIGS)
def test_written_into_the_weights(name):
    """Afterwards the weights alone compute what the gates did, and only columns of closed units have changed."""
    model, inputs = make_model(name, task_class(name)), make_inputs(name)
    found, dense = find_sites(model), run_model(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for pattern in ("both", "empty"):
        model.load_state_dict(before)
        keep = choose_units(found, pattern)
        gates = Gates(model, found)
        gates.close({site.name: others(site, keep[site.name]) for site in found})
        gated = run_model(model, inputs)
        gates.write_into_weights()
        assert largest_difference(run_model(model, inputs), gated) <= 1e-5  # gates on
        gates.remove()
        assert largest_difference(run_model(model, inputs), gated) <= 1e-5  # and off
        assert largest_difference(gated, dense) > 1e-3
        zeroed = sum(
            site.width * len(others(site, keep[site.name])) * site.hidden * len(site.readers) for site in found
        )
        after = model.state_dict()
        changed = {key: int((after[key] != before[key]).sum()) for key in before}
        assert sum(changed.values()) == zeroed
        assert {key for key, count in changed.items() if count} <= {
            f"{path}.weight" for site in found for path in site.readers
        }
        assert all(bool((after[key][after[key] != before[key]] == 0).all()) for key in before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "vit"])
def test_writing_into_the_weights_and_cutting_agree(name):
    model, inputs = make_model(name), make_inputs(name)
    keep = choose_units(find_sites(model), "both")
    gates = Gates(model, find_sites(model))
    gates.close({site.name: others(site, keep[site.name]) for site in find_sites(model)})
    gates.write_into_weights()
    gates.remove()
    expected = run_model(model, inputs)
    cut(model, Plan(keep))
    assert largest_difference(run_model(model, inputs), expected) <= 1e-5


def test_open_gates_change_nothing():
    looked_at = 0
    for name in CONFIGS:
        model, inputs = make_model(name), make_inputs(name)
        dense = run_model(model, inputs)
        gates = Gates(model, find_sites(model))
        assert largest_difference(run_model(model, inputs), dense) == 0
        before = [id(parameter) for parameter in model.parameters()]
        gates.write_into_weights()
        gates.remove()
        assert largest_difference(run_model(model, inputs), dense) == 0
        assert [id(parameter) for parameter in model.parameters()] == before
        looked_at += 1
    assert looked_at == 48


def test_gates_are_no_part_of_the_model():
    model = make_model("bert")
    names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    gates = Gates(model, find_sites(model))
    gates.require_grad()
    assert (list(model.state_dict()), [name for name, _ in model.named_parameters()]) == names
    assert all(value.is_leaf and value.dtype == torch.float32 for value in gates.values.values())


def test_closing_and_reopening():
    model, inputs = make_model("bert"), make_inputs("bert")
    dense = run_model(model, inputs)
    gates = Gates(model, find_sites(model))
    gates.close({"encoder.0.heads": [3]})
    gates.close({"encoder.0.heads": torch.tensor([1]), "encoder.2.neurons": range(47)})
    assert gates.open_units("encoder.0.heads").tolist() == [0, 2]
    assert gates.open_units("encoder.1.heads").tolist() == [0, 1, 2, 3]
    assert gates.open_units("encoder.2.neurons").tolist() == [47]
    assert gates.open_units("encoder.2.neurons").dtype == torch.int64
    assert largest_difference(run_model(model, inputs), dense) > 1e-3
    gates.remove()
    assert largest_difference(run_model(model, inputs), dense) == 0
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_gradients_add_up_until_they_are_taken():
    model = make_model("bert")
    found = find_sites(model)
    gates = Gates(model, found)
    first, second = make_inputs("bert", seed=1), make_inputs("bert", seed=2)

    def backward(inputs):
        loss_of(model, inputs).backward()

    gates.require_grad()
    taken = []
    for batches in ([first], [second], [first, second]):
        for inputs in batches:
            backward(inputs)
        taken.append(gates.take_gradients())
    for site in found:
        torch.testing.assert_close(taken[2][site.name], taken[0][site.name] + taken[1][site.name], atol=1e-3, rtol=1e-4)
        assert float(taken[0][site.name].abs().max()) > 0
    assert all(float(value.abs().max()) == 0 for value in gates.take_gradients().values())
    gates.require_grad(False)
    backward(first)
    assert all(value.grad is None and not value.requires_grad for value in gates.values.values())


def test_gates_in_half_precision_keep_the_models_dtype():
    model, inputs = make_model("llama").bfloat16(), make_inputs("llama")
    gates = Gates(model, find_sites(model))
    gates.close({"decoder.0.neurons": range(40)})
    gates.require_grad()
    hidden = model(**inputs).last_hidden_state
    hidden.float().square().sum().backward()
    assert hidden.dtype == torch.bfloat16
    assert gates.take_gradients()["decoder.1.heads"].dtype == torch.float32


def test_a_model_that_was_cut_can_be_gated_again():
    model, inputs = make_model("bert"), make_inputs("bert")
    cut(model, Plan(choose_units(find_sites(model), "empty")))
    found = find_sites(model)
    gates = Gates(model, found)
    assert set(gates.values) == {site.name for site in found if site.units}
    assert len(gates.values) == 2  # of the six sublayers, the plan leaves units in two
    keep = {name: tuple(range(len(value) // 2)) for name, value in gates.values.items()}
    gates.close({name: range(len(value) // 2, len(value)) for name, value in gates.values.items()})
    gated = run_model(model, inputs)
    gates.remove()
    cut(model, Plan(keep))
    assert largest_difference(run_model(model, inputs), gated) <= 1e-5


def test_closed_units_stay_the_first_to_go():
    """With dead neurons, whose importance is exactly 0, closing more never closes more than is asked for."""
    config = PruneConfig(
        units=["neurons"],
        target={"sparsity": 0.3},
        cut="end",
        criterion="first_order",
        multiple_of={"neurons": 1},
        at_least={"neurons": 0},
        schedule={"name": "linear", "start": 0.0, "end": 1.0, "updates": 3},
    )
    model = make_model("opt")
    pruner = Pruner(model, config, total_steps=3)
    largest = max(site.parameters_per_unit for site in find_sites(model))
    total = sum(site.parameters_per_unit * site.units for site in find_sites(model))
    for step, dead in ((1, range(30)), (2, range(48)), (3, range(20, 48))):
        for site in pruner.sites:
            importance = torch.ones(site.units)
            if site.kind == "neurons":
                importance[list(dead)] = 0.0
            pruner._importance[site.name] = {"squares": importance, "sums": importance}
        pruner._collected = 1.0
        pruner.step(step)
        assert 0.1 * step <= pruner.sparsity() < 0.1 * step + largest / total
    assert pruner.done and find_sites(model)[1].units < 48


# ---- gradients of the weights ----


def test_gradients_of_weights_add_up_as_theirs_do():
    model, found = make_model("gpt2"), find_sites(make_model("gpt2"))
    expected = {site.name: torch.zeros(site.units) for site in found}
    for seed in (1, 2):
        gates = Gates(model, found)
        gates.require_grad()
        loss_of(model, make_inputs("gpt2", seed=seed)).backward()
        expected = {name: expected[name] + gradient for name, gradient in gates.take_gradients().items()}
        gates.remove()
    for name, gradient in gate_gradients(model, found).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-4)


def test_layers_that_were_not_reached_get_zeros():
    model = make_model("bert")
    found = find_sites(model)
    model.encoder.layer[0](torch.randn(1, 4, 32)).sum().backward()
    gradients = gate_gradients(model, found)
    assert [float(gradients[site.name].abs().sum()) > 0 for site in found] == [True, True, False, False, False, False]
    assert all(gradients[site.name].shape == (site.units,) for site in found)


def test_frozen_readers_are_refused():
    model = make_model("bert")
    frozen = copy.deepcopy(model)
    frozen.encoder.layer[1].output.dense.requires_grad_(False)
    loss_of(frozen, make_inputs("bert")).backward()
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense is frozen.*use magnitude"):
        gate_gradients(frozen, find_sites(frozen))
