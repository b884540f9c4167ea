"""What sites are worth, against a loop with gates by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from hfcompress.anatomy import find_sites
from hfcompress.pruning import Curve, Gates, measure_sensitivity, rank_units
from tests.families import make_inputs, make_model, task_class

SHARES = (0.75, 0.5, 0.25, 0.0)


def random_curves(model: torch.nn.Module) -> dict[str, Curve]:
    generator = torch.Generator().manual_seed(3)
    sites = [site for site in find_sites(model) if site.units]
    return {site.name: Curve.from_scores(torch.rand(site.units, generator=generator)) for site in sites}


def counts(units: int) -> list[int]:
    """Three quarters, half, a quarter, none, rounded down, none twice."""
    found: list[int] = []
    for left in (3 * units // 4, units // 2, units // 4, 0):
        if left not in found:
            found.append(left)
    return found


def batches(name: str, auto: str) -> list[dict[str, torch.Tensor]]:
    return [{**make_inputs(name, auto, seed=seed)} for seed in (0, 1)]


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_against_a_loop_by_hand(name):
    auto = task_class(name)
    model = make_model(name, auto)
    data, curves = batches(name, auto), random_curves(model)
    found = measure_sensitivity(model, data, curves)
    sites = find_sites(model)
    assert [entry.site for entry in found] == [site.name for site in sites] and len(found) == 6
    checked = 0
    for site, entry in zip(sites, found, strict=True):
        assert list(entry.left) == counts(site.units) and entry.units == site.units
        for left, value in zip(entry.left, entry.divergence, strict=True):
            total, examples = 0.0, 0
            for batch in data:
                inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
                with torch.no_grad():
                    before = log_softmax(model(**inputs).logits.double(), -1)
                    gates = Gates(model, [site])
                    gates.close({site.name: curves[site.name].order[: site.units - left].tolist()})
                    after = log_softmax(model(**inputs).logits.double(), -1)
                    gates.remove()
                each = kl_div(after, before, reduction="none", log_target=True).sum(-1)
                if each.dim() == 2 and "attention_mask" in inputs:
                    each = each * inputs["attention_mask"]
                total += float(each.sum())
                examples += len(each)
            assert value == pytest.approx(total / examples, rel=1e-3, abs=1e-6)
            checked += value > 0
        gone = [site.units - left for left in entry.left]
        assert list(entry.expected) == [float(curves[site.name].loss[count]) for count in gone]
    assert checked > 10


def test_hidden_states_are_compared_by_half_the_squared_distance():
    model = make_model("bert")
    curves, (batch, _) = random_curves(model), batches("bert", "AutoModel")
    (first, *_) = measure_sensitivity(model, [batch], curves, shares=(0.0,))
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        gates = Gates(model, find_sites(model)[:1])
        gates.close({"encoder.0.heads": range(4)})
        after = model(**batch).last_hidden_state
        gates.remove()
    mask = batch["attention_mask"][..., None] if "attention_mask" in batch else 1
    expected = float(((before - after).square() * mask).sum() / 2 / len(before))
    assert first.left == (0,) and first.divergence == (pytest.approx(expected, rel=1e-4),)


def test_nothing_is_left_behind():
    model = make_model("bert", "AutoModelForSequenceClassification")
    model.train()
    model.bert.embeddings.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    measure_sensitivity(model, batches("bert", "AutoModelForSequenceClassification")[:1], random_curves(model))
    assert model.training and not model.bert.embeddings.training and model.classifier.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_few_units_and_shares_of_ones_own():
    model = make_model("bert", "AutoModelForSequenceClassification", num_attention_heads=1, intermediate_size=3)
    data = batches("bert", "AutoModelForSequenceClassification")
    found = measure_sensitivity(model, data, random_curves(model))
    assert [entry.left for entry in found] == [(0,), (2, 1, 0)] * 3, "a point with all units would say nothing"
    found = measure_sensitivity(model, data, random_curves(model), shares=(0.99, 0.5))
    assert [entry.left for entry in found] == [(0,), (2, 1)] * 3
    with pytest.raises(ValueError, match="there is no calibration data; pass at least one batch"):
        measure_sensitivity(model, [], random_curves(model))


def test_what_nobody_reads_is_worth_nothing():
    model = make_model("bert", "AutoModelForSequenceClassification")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.zero_()
    data = batches("bert", "AutoModelForSequenceClassification")
    found = {entry.site: entry for entry in measure_sensitivity(model, data, rank_units(model, "obs", data))}
    assert max(found["encoder.1.neurons"].divergence) < 1e-9 < min(found["encoder.0.neurons"].divergence[-1:])
    assert max(found["encoder.1.neurons"].expected) < 1e-9
    again = json.loads(json.dumps([entry.to_dict() for entry in found.values()]))
    assert again[0]["site"] == "encoder.0.heads" and again[0]["left"] == [3, 2, 1, 0] and len(again) == 6


def test_what_layers_decide_together_is_closed_together():
    model = make_model("t5", "AutoModelForSeq2SeqLM")
    data = [make_inputs("t5", "AutoModelForSeq2SeqLM")]
    found = {entry.site: entry for entry in measure_sensitivity(model, data, random_curves(model), shares=(0.0,))}
    assert {"encoder.heads", "encoder.0.neurons"} <= set(found)
    assert all(value > 0 for value in found["encoder.heads"].divergence)
