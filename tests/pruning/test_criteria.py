"""Criteria: the scores by another road, on every architecture."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress import config
from hfcompress.anatomy import find_sites
from hfcompress.pruning import CRITERIA, Curve, Evidence, Plan, cut
from hfcompress.pruning.criteria import (
    Criterion,
    activation_apoz,
    first_order,
    fisher_block,
    magnitude,
    magnitude_l1,
    random,
)
from hfcompress.pruning.evidence import Activations, ExampleGradients, StepGradients
from hfcompress.pruning.obs import ReaderMoments
from tests.families import make_model


def sum_of_weights(model, power):
    """Sum of |w| or w^2 over the weights of all linear layers, biases left out."""
    return sum(
        float(module.weight.detach().double().abs().pow(power).sum())
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ) + sum(
        float(parameter.detach().double().abs().pow(power).sum())
        for path, parameter in model.named_parameters()
        if "relative_attention_bias" in path or "relative_position_bias_table" in path
    )


@pytest.mark.parametrize(("criterion", "power"), [(magnitude, 2), (magnitude_l1, 1)])
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
def test_magnitude_is_what_a_cut_takes_away(name, criterion, power):
    model = make_model(name)
    total, compared = sum_of_weights(model, power), 0
    sites = find_sites(model)
    for site in (next(s for s in sites if s.kind == "heads"), next(s for s in sites if s.kind == "neurons")):
        scores = criterion(site, Evidence(model))
        assert scores.shape == (site.units,) and scores.dtype == torch.float32
        for unit in (0, site.units - 1):
            smaller = copy.deepcopy(model)
            cut(smaller, Plan({site.name: tuple(u for u in range(site.units) if u != unit)}))
            assert float(scores[unit]) == pytest.approx(total - sum_of_weights(smaller, power), rel=1e-4)
            compared += 1
    assert compared == 4


def test_magnitude_leaves_the_model_alone_and_reads_half_precision():
    model = make_model("bert").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = [magnitude(site, Evidence(model)) for site in find_sites(model)]
    assert all(score.dtype == torch.float32 and not score.requires_grad for score in scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.needs])
def test_what_a_criterion_needs_has_to_be_there(name):
    model = make_model("bert")
    with pytest.raises(ValueError, match=r"encoder\.0\.heads: this criterion reads .*none were collected"):
        CRITERIA[name].function(find_sites(model)[0], Evidence(model))


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


def make_evidence(model, site, generator):
    """All that there is, at random."""
    products = torch.rand(site.units, site.units)
    outputs, inputs = site.hidden, site.units * site.width
    steps = StepGradients(torch.rand(site.units), torch.randn(site.units))
    readers = [ReaderMoments(torch.randn(outputs, inputs), torch.eye(inputs)) for _ in site.readers]
    return Evidence(
        model,
        generator,
        steps,
        ExampleGradients(torch.rand(site.units), torch.rand(site.units), products @ products.T, steps),
        Activations(*torch.rand(3, site.units)),
        torch.rand(site.units),
        tuple(readers),
    )


def test_the_table_of_criteria():
    # What is learned during training is no function of evidence.
    assert set(CRITERIA) | {"learned"} == set(typing.get_args(config.CriterionName)) and len(CRITERIA) >= 13
    fields = {field.name for field in dataclasses.fields(Evidence)}
    assert {criterion.needs for criterion in CRITERIA.values()} - {None} <= fields
    assert all(isinstance(criterion, Criterion) for criterion in CRITERIA.values())
    model = make_model("llama")
    looked_at = 0
    for name, criterion in CRITERIA.items():
        for site in find_sites(model):
            result = criterion.function(site, make_evidence(model, site, torch.Generator().manual_seed(0)))
            if isinstance(result, Curve):
                assert sorted(result.order.tolist()) == list(range(site.units))
                assert result.loss.shape == (site.units + 1,) and bool((result.loss.diff() >= 0).all())
            else:
                assert result.shape == (site.units,) and (name == "movement" or bool((result >= 0).all()))
            looked_at += 1
    assert looked_at == 6 * len(CRITERIA)


def test_scores_are_what_the_evidence_says():
    model = make_model("bert")
    site = find_sites(model)[0]
    evidence = make_evidence(model, site, None)
    expected = {
        "first_order": evidence.steps.squares,
        "movement": -evidence.steps.sums,
        "taylor": evidence.examples.absolute,
        "fisher": evidence.examples.squares / 2,
        "hessian": evidence.curvature / 2,
        "activation_mean": evidence.activations.absolute,
        "activation_variance": evidence.activations.variance,
        "activation_apoz": 8 - evidence.activations.zeros,
    }
    for name, value in expected.items():
        torch.testing.assert_close(CRITERIA[name].function(site, evidence), value)
    assert len(expected) == 8 and site.width == 8


def test_half_precision_gradients_become_scores_in_float32():
    gradients = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.bfloat16)
    scores = first_order(SimpleNamespace(name="a"), Evidence(None, steps=StepGradients(gradients, gradients)))
    assert scores.dtype == torch.float32 and scores.tolist() == [0.5, 0.0, 2.0, 1.0]


def test_apoz_of_readers_that_decide_together_counts_them_all():
    site = SimpleNamespace(name="a", width=2, readers=("x", "y", "z"))
    seen = Activations(torch.zeros(1), torch.zeros(1), torch.tensor([1.5]))
    assert activation_apoz(site, Evidence(None, activations=seen)).tolist() == [4.5]


# ---- pairs of units ----


def block_curve(fisher):
    fisher = torch.tensor(fisher, dtype=torch.float32)
    evidence = Evidence(None, examples=ExampleGradients(None, fisher.diagonal(), fisher, None))
    return fisher_block(SimpleNamespace(name="a"), evidence)


@pytest.mark.parametrize("seed", range(6))
def test_fisher_block_is_greedy_removal_and_near_the_best_of_all_sets(seed):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(12, 6)) * rng.uniform(0.3, 3, size=6) + rng.normal(size=(12, 1)) * (seed % 3)
    fisher = gradients.T @ gradients / 12
    curve = block_curve(fisher)

    def loss(units):
        m = np.isin(np.arange(6), list(units)).astype(float)
        return 0.5 * m @ fisher @ m

    order = []
    for _ in range(6):
        order.append(min(set(range(6)) - set(order), key=lambda unit: loss([*order, unit])))
    assert curve.order.tolist() == order
    expected = np.maximum.accumulate([loss(order[:k]) for k in range(7)])
    np.testing.assert_allclose(curve.loss, expected, rtol=1e-5, atol=1e-7)
    best = [min(loss(units) for units in itertools.combinations(range(6), k)) for k in range(7)]
    assert float(curve.loss[1]) == pytest.approx(best[1]) and float(curve.loss[6]) == pytest.approx(max(expected))
    assert all(best[k] * (1 - 1e-5) - 1e-7 <= float(curve.loss[k]) <= 2 * best[k] + 1e-7 for k in range(7))


def test_fisher_block_sees_what_the_diagonal_does_not():
    """Units 0 and 1 do the same, units 2 and 3 cancel: exhaustive search keeps one of the first and drops both of the others."""
    g = np.array([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.1, -1.1, 0.0], [0.0, 0.0, 0.0, 0.0, 1.6]])
    fisher = g.T @ g / 3
    curve = block_curve(fisher)
    sets = list(itertools.combinations(range(5), 3))
    losses = {units: 0.5 * fisher[np.ix_(units, units)].sum() for units in sets}
    best = min(losses, key=losses.get)
    assert len(sets) == 10 and set(curve.order[:3].tolist()) == set(best) and {2, 3} < set(best)
    assert sorted(np.argsort(np.diag(fisher), kind="stable")[:3].tolist()) != sorted(best)
    assert bool((curve.loss.diff() >= 0).all())
