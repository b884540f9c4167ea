"""Criteria: the scores by another road, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import find_sites
from hfcompress.pruning import CRITERIA, Evidence, Plan, cut
from hfcompress.pruning.criteria import first_order, magnitude, random
from tests.families import make_model


def squared_weights(model):
    """Sum of squares over the weights of all linear layers, biases left out."""
    return sum(
        float(module.weight.detach().double().square().sum())
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ) + sum(
        float(parameter.detach().double().square().sum())
        for path, parameter in model.named_parameters()
        if "relative_attention_bias" in path or "relative_position_bias_table" in path
    )


# All layouts: three projections, one in bands, one interleaved, gate and up in one, tables, several readers.
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "deberta-v2",
        "gpt2",
        "llama",
        "modernbert",
        "phi3",
        "gpt_neox",
        "falcon",
        "albert",
        "mpnet",
        "t5:gated",
        "beit",
    ],
)
def test_magnitude_is_what_a_cut_takes_away(name):
    model = make_model(name)
    total, compared = squared_weights(model), 0
    sites = find_sites(model)
    for site in (next(s for s in sites if s.kind == "heads"), next(s for s in sites if s.kind == "neurons")):
        scores = magnitude(site, Evidence(model))
        assert scores.shape == (site.units,) and scores.dtype == torch.float32
        for unit in (0, site.units - 1):
            smaller = copy.deepcopy(model)
            cut(smaller, Plan({site.name: tuple(u for u in range(site.units) if u != unit)}))
            assert float(scores[unit]) == pytest.approx(total - squared_weights(smaller), rel=1e-4)
            compared += 1
    assert compared == 4


def test_magnitude_leaves_the_model_alone_and_reads_half_precision():
    model = make_model("bert").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = [magnitude(site, Evidence(model)) for site in find_sites(model)]
    assert all(score.dtype == torch.float32 and not score.requires_grad for score in scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_first_order_is_the_gradient_it_is_given():
    model = make_model("bert")
    site = find_sites(model)[0]
    gradients = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.bfloat16)
    scores = first_order(site, Evidence(model, gate_gradients=gradients))
    assert scores.dtype == torch.float32 and scores.tolist() == [0.5, 0.0, 2.0, 1.0]


def test_first_order_needs_gradients():
    model = make_model("bert")
    with pytest.raises(ValueError, match=r"encoder\.0\.heads: .* needs gate gradients.*start the schedule later"):
        first_order(find_sites(model)[0], Evidence(model))


def test_random_is_uniform_per_parameter_and_repeats():
    model = make_model("bert", hidden_size=64, intermediate_size=4000, num_hidden_layers=1)
    heads, neurons = find_sites(model)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            random(site, Evidence(model, generator=generator)) / site.parameters_per_unit for site in (heads, neurons)
        ]

    first, second, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])
    assert first[1].shape == (4000,) and float(first[1].min()) >= 0 and float(first[1].max()) <= 1
    # The mean of 4,000 uniform draws is 1/2 with a standard deviation of 0.0046.
    assert float(first[1].mean()) == pytest.approx(0.5, abs=0.02)


def test_the_table_of_criteria():
    assert list(CRITERIA.items()) == [("first_order", first_order), ("magnitude", magnitude), ("random", random)]
    model = make_model("llama")
    looked_at = 0
    for criterion in CRITERIA.values():
        for site in find_sites(model):
            evidence = Evidence(model, torch.rand(site.units), torch.Generator().manual_seed(0))
            scores = criterion(site, evidence)
            assert scores.shape == (site.units,) and bool((scores >= 0).all())
            looked_at += 1
    assert looked_at == 18
