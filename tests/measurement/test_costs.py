from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hfcompress.anatomy import StructureError, find_layers, find_sites, keep_units
from hfcompress.measurement import count_flops, count_parameters
from hfcompress.measurement.copies import cut_copy, find_layer_sites
from hfcompress.measurement.costs import Costs, flops_costs, parameter_costs
from tests.families import choose_units, largest_difference, make_inputs, make_model, run_model

# Several of everything: fused projections, groups of queries, norms inside attention, layers used again, stages,
# cross attention, and heads that all layers share.
FAMILIES = (
    "bert",
    "gpt2",
    "llama",
    "qwen3",
    "deberta-v2",
    "albert:groups",
    "modernbert",
    "swin",
    "bart",
    "t5",
    "bloom",
)
PATTERNS = ("both", "empty")
B, L, D, F, LAYERS, HEADS = 2, 9, 32, 48, 3, 4  # tests.families


def really_cut(model: nn.Module, pattern: str) -> tuple[nn.Module, dict[str, int]]:
    """The model after a real cut, and its units."""
    model = copy.deepcopy(model)
    sites = find_sites(model)
    keep = choose_units(sites, pattern)
    keep_units(model, sites, {name: torch.tensor(units, dtype=torch.long) for name, units in keep.items()})
    return model, {name: len(units) for name, units in keep.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_totals_are_those_of_the_model_that_is_really_cut(name):
    model, inputs = make_model(name), make_inputs(name)
    flops, parameters = flops_costs(model, inputs, scope="model"), parameter_costs(model, scope="model")
    assert list(flops.sites) == list(parameters.sites) == [site.name for site in find_sites(model)]
    assert list(flops.fixed) == list(parameters.fixed) == [layer.name for layer in find_layer_sites(model)]
    assert flops.total({}) == count_flops(model, inputs)
    assert parameters.total({}) == count_parameters(model)
    seen = set()
    for pattern in PATTERNS:
        cut, units = really_cut(model, pattern)
        assert flops.total(units) == count_flops(cut, inputs)
        assert parameters.total(units) == count_parameters(cut)
        seen.add(parameters.total(units))
    assert len(seen) == len(PATTERNS)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_pruned_model_has_costs_up_to_the_units_it_has_now(name):
    dense, inputs = make_model(name), make_inputs(name)
    pruned, left = really_cut(dense, "empty")
    for before, after in (
        (flops_costs(dense, inputs, scope="model"), flops_costs(pruned, inputs, scope="model")),
        (parameter_costs(dense, scope="model"), parameter_costs(pruned, scope="model")),
    ):
        assert after.rest == before.rest and after.fixed == before.fixed
        assert 0 in left.values()
        for site, units in left.items():
            np.testing.assert_array_equal(after.sites[site], before.sites[site][: units + 1])


def test_bert_by_hand():
    model = make_model("bert")
    linear, attention = 2 * B * L, 2 * 2 * B * L * L
    flops = flops_costs(model, make_inputs("bert"))
    head, neuron = 4 * linear * D * D // HEADS + attention * D // HEADS, 2 * linear * D
    assert flops.quantity == "flops" and flops.rest == 0 and set(flops.fixed.values()) == {0.0}
    np.testing.assert_array_equal(flops.sites["encoder.2.heads"], head * np.arange(HEADS + 1))
    np.testing.assert_array_equal(flops.sites["encoder.1.neurons"], neuron * np.arange(F + 1))
    layers = parameter_costs(model, scope="layers")
    assert layers.fixed["encoder.0"] == 2 * 2 * D + D + D  # two norms, and the biases of two readers
    assert layers.rest == 0
    assert layers.sites["encoder.0.heads"][1] == (3 * (D + 1) + D) * D // HEADS
    sites = parameter_costs(model)
    assert sites.total({}) == sum(site.units * site.parameters_per_unit for site in find_sites(model))
    assert sites.total(dict.fromkeys(sites.sites, 0)) == 0


def test_costs_never_fall_and_start_at_nothing():
    model, looked_at = make_model("qwen3"), 0
    for costs in (
        flops_costs(model, make_inputs("qwen3")),
        parameter_costs(model),
        parameter_costs(model, scope="layers"),
    ):
        for line in costs.sites.values():
            assert line[0] == 0 and (np.diff(line) >= 0).all() and line.dtype == np.float64
            looked_at += 1
    assert looked_at == 3 * LAYERS * 2


def test_layers_that_are_gone_cost_nothing():
    model, inputs = make_model("bert"), make_inputs("bert")
    flops, parameters = flops_costs(model, inputs, scope="model"), parameter_costs(model, scope="model")
    del model.encoder.layer[1]
    kept, units = ["encoder.0", "encoder.2"], {"encoder.1.heads": 2}
    assert flops.total(units, layers=kept) == count_flops(model, inputs)
    assert parameters.total(units, layers=kept) == count_parameters(model)


def test_what_layers_share_costs_the_share_of_the_layers_that_are_left():
    lines = {"encoder.heads": np.array([0.0, 9.0]), "decoder.0.neurons": np.array([0.0, 4.0])}
    costs = Costs("flops", 1.0, {"encoder.0": 2.0, "encoder.1": 2.0, "encoder.2": 2.0, "decoder.0": 3.0}, lines)
    assert costs.total({}) == 1 + 6 + 3 + 9 + 4
    assert costs.total({}, layers=["encoder.0", "decoder.0"]) == 1 + 2 + 3 + 3 + 4
    assert costs.total({"encoder.heads": 0}, layers=["encoder.0", "encoder.2"]) == 1 + 4
    assert costs.total({}, layers=[]) == 1


@pytest.mark.parametrize(
    ("units", "layers", "words"),
    [
        ({"encoder.0.head": 1}, None, "no site or layer 'encoder.0.head'; there are encoder.0.heads, encoder.0"),
        ({}, ["encoder.1"], "no site or layer 'encoder.1'"),
        ({"encoder.0.heads": 3}, None, "encoder.0.heads has 0 to 2 units, not 3"),
        ({"encoder.0.heads": -1}, None, "encoder.0.heads has 0 to 2 units, not -1"),
    ],
)
def test_what_there_is_not_is_an_error(units, layers, words):
    costs = Costs("flops", 0.0, {"encoder.0": 1.0}, {"encoder.0.heads": np.arange(3.0)})
    with pytest.raises(ValueError, match=words):
        costs.total(units, layers=layers)


def test_unknown_scopes_and_models_are_errors():
    model = make_model("bert")
    with pytest.raises(ValueError, match="scope='all' is not known; choose one of 'sites', 'layers', 'model'"):
        parameter_costs(model, scope="all")
    with pytest.raises(ValueError, match="scope='sites' is not known; choose one of 'model', 'layers'"):
        flops_costs(model, make_inputs("bert"), scope="sites")
    with pytest.raises(StructureError, match="cannot be cut"):
        parameter_costs(nn.Linear(2, 2))


# ---- the copies ----


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "t5"])
def test_a_copy_that_keeps_everything_computes_the_same_and_takes_no_memory(name):
    model, inputs = make_model(name), make_inputs(name)
    layers = find_layer_sites(model)
    whole = cut_copy(model, [(layer, {}) for layer in layers])
    assert largest_difference(run_model(model, inputs), run_model(whole, inputs)) == 0
    small = cut_copy(model, [(layer, dict.fromkeys(layer.sites, 1)) for layer in layers])
    run_model(small, inputs)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for parameter in (*whole.parameters(), *small.parameters()):
        assert parameter.untyped_storage().data_ptr() in own
        assert parameter.is_contiguous() and not parameter.requires_grad
    assert count_parameters(small) < count_parameters(whole) == count_parameters(model)


def test_model_stays_as_it_was():
    model, inputs = make_model("bert").train(), make_inputs("bert")
    called = []
    model.encoder.layer[0].register_forward_hook(lambda *_: called.append(1))
    state, before = {key: value.clone() for key, value in model.state_dict().items()}, model.config.to_dict()
    parameters = [id(parameter) for parameter in model.parameters()]
    flops_costs(model, inputs, scope="model")
    parameter_costs(model, scope="model")
    assert model.training and not called and model.config.to_dict() == before
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_layer_may_be_in_a_copy_twice_with_other_units():
    model = make_model("bert")
    first, _, last = find_layer_sites(model)
    double = cut_copy(model, [(last, {"heads": 0}), (first, {}), (last, {"neurons": 5})])
    assert [site.units for site in find_sites(double)] == [0, F, HEADS, F, HEADS, 5]
    one, _, other = find_layers(double)
    called = []
    one.register_forward_hook(lambda *_: called.append("one"))
    run_model(double, make_inputs("bert"))
    assert called == ["one"] and one is not other


def test_a_copy_cannot_have_more_units_than_there_are():
    model = make_model("bert")
    layer = find_layer_sites(model)[0]
    with pytest.raises(StructureError, match=r"encoder\.0\.heads has 4 units, not 5"):
        cut_copy(model, [(layer, {"heads": 5})])
