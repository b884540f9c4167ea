"""What a plan removes may not show: the cut model computes what the gated model computes, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

from hfcompress.anatomy import FAMILIES, find_sites
from hfcompress.pruning import Gates, Plan, cut
from tests.families import (
    CONFIGS,
    DECODERS,
    HEADS,
    ONLY_EAGER,
    SEQ2SEQ,
    TEXT,
    choose_units,
    largest_difference,
    make_inputs,
    make_model,
    others,
    patterns_of,
    predictions,
    run_model,
    task_class,
)

BARE = [
    (name, attention)
    for name in CONFIGS
    for attention in ("eager", "sdpa")
    if (name, attention) not in [(only, "sdpa") for only in ONLY_EAGER]
]
WITH_HEAD = [(name, auto) for auto, names in HEADS.items() for name in names]
READS_TEXT = [*TEXT, *(name for name in SEQ2SEQ if name != "whisper")]
TOLERANCE = 3e-5  # of float32: sums in another order, which hangs on the CPU


def close(model, keep):
    """Gates on a model, closed on all units that are not kept."""
    sites = find_sites(model)
    gates = Gates(model, sites)
    gates.close({site.name: others(site, keep[site.name]) for site in sites})
    return gates


def check(model, inputs, pattern):
    """The gated and the cut model agree, and both differ from the model as it was."""
    keep = choose_units(find_sites(model), pattern)
    dense = run_model(model, inputs)
    gates = close(model, keep)
    gated = run_model(model, inputs)
    gates.remove()
    cut(model, Plan(keep))
    assert {site.name: site.units for site in find_sites(model)} == {name: len(units) for name, units in keep.items()}
    assert largest_difference(gated, run_model(model, inputs)) <= TOLERANCE
    assert largest_difference(gated, dense) > 1e-3, "nothing was gated: the comparison could not have failed"


def test_the_tables_cover_everything():
    assert len(CONFIGS) == 48
    types = {name.partition(":")[0] for name in CONFIGS}
    assert types == {model_type for family in FAMILIES for model_type in family.model_types}, (
        "an entry without a config"
    )
    assert len(BARE) == 2 * 48 - 5
    assert set(CONFIGS) - {name for name, _ in WITH_HEAD} == {
        f"{name}_{tower}_model" for name in ("clip", "siglip") for tower in ("text", "vision")
    }, "models of one tower have no heads"
    assert len(WITH_HEAD) == 121
    assert len(READS_TEXT) == 34 and len(DECODERS) == 16 and set(DECODERS) < set(TEXT)


@pytest.mark.parametrize(("name", "attention"), BARE)
def test_the_bare_model(name, attention):
    model, inputs = make_model(name, attention=attention), make_inputs(name)
    assert model.config._attn_implementation == attention
    for pattern in patterns_of(name):
        check(copy.deepcopy(model), inputs, pattern)


@pytest.mark.parametrize(("name", "auto"), WITH_HEAD)
def test_every_head_on_top(name, auto):
    model, inputs = make_model(name, auto), make_inputs(name, auto)
    for pattern in ("both", "empty"):
        check(copy.deepcopy(model), inputs, pattern)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_left_at_all(name):
    """Without any unit in any layer the model still runs, and equals the one whose gates are all closed."""
    model, inputs = make_model(name), make_inputs(name)
    keep = {site.name: () for site in find_sites(model)}
    gates = close(model, keep)
    gated = run_model(model, inputs)
    gates.remove()
    cut(model, Plan(keep))
    assert largest_difference(gated, run_model(model, inputs)) <= TOLERANCE


@pytest.mark.parametrize("name", READS_TEXT)
def test_padding_does_not_matter_to_a_cut_model(name):
    """Real tokens get the same output in a padded batch as alone."""
    model, inputs = make_model(name), make_inputs(name)
    cut(model, Plan(choose_units(find_sites(model), "both")))
    real = int(inputs["attention_mask"][-1].sum())
    assert real < inputs["input_ids"].shape[1]
    alone = {key: value[-1:, :real] for key, value in inputs.items()}
    apart = run_model(model, alone)["last_hidden_state"]
    together = run_model(model, inputs)["last_hidden_state"][-1:, : apart.shape[1]]
    assert apart.shape[1] == alone.get("decoder_input_ids", alone["input_ids"]).shape[1]
    assert float((apart - together).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_cutting_twice_equals_cutting_once(name):
    model, inputs = make_model(name), make_inputs(name)
    keep = choose_units(find_sites(model), "both")
    step = {site.name: tuple(sorted({*keep[site.name], *range(0, site.units, 2)})) for site in find_sites(model)}
    once = copy.deepcopy(model)
    cut(once, Plan(keep))
    cut(model, Plan(step))
    cut(model, Plan({site: tuple(step[site].index(unit) for unit in units) for site, units in keep.items()}))
    assert largest_difference(run_model(once, inputs), run_model(model, inputs)) <= TOLERANCE
    assert once.config.hfcompress == model.config.hfcompress


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_model_trains(name):
    """Every parameter that is left of a cut model gets the gradient that it gets behind closed gates."""
    model = make_model(name, task_class(name))
    inputs = make_inputs(name)
    keep = choose_units(find_sites(model), "both")
    gated = copy.deepcopy(model)
    close(gated, keep)
    changes = cut(model, Plan(keep))
    new_to_old = {id(change.new): change for change in changes}
    for one in (model, gated):
        predictions(one(**inputs)).square().mean().backward()
    compared = 0
    by_name = dict(gated.named_parameters())
    for path, parameter in model.named_parameters():
        expected = by_name[path].grad
        if expected is None:
            assert parameter.grad is None
            continue
        change = new_to_old.get(id(parameter))
        if change is not None:
            expected = expected.index_select(change.dim, change.index)
        torch.testing.assert_close(parameter.grad, expected, atol=3e-5, rtol=1e-4)
        compared += 1
    assert compared > 20


def left_padded(name):
    """Two prompts of different length, the shorter one filled up at its start."""
    inputs = make_inputs(name)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}


def generate(model, inputs, **kwargs):
    """Six greedy tokens with their scores."""
    out = model.generate(
        **inputs,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **kwargs,
    )
    scores = torch.stack(out.scores, 1)
    return out.sequences, torch.where(scores.isfinite(), scores, torch.zeros_like(scores))


# "empty" skips the attention of the first layer, from whose cache decoders read how far they are.
@pytest.mark.parametrize("pattern", ["both", "empty"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_every_cache(name, pattern):
    model, inputs = make_model(name, "AutoModelForCausalLM"), left_padded(name)
    assert int(inputs["attention_mask"][-1, 0]) == 0 and int(inputs["attention_mask"][0, 0]) == 1
    keep = choose_units(find_sites(model), pattern)
    gates = close(model, keep)
    # Without a cache nothing can go wrong with one: this is the other road.
    expected, expected_scores = generate(model, inputs, use_cache=False)
    gated = {kind: generate(model, inputs, cache_implementation=kind) for kind in ("dynamic", "static")}
    gates.remove()
    cut(model, Plan(keep))
    assert name == "bloom" or bool(find_sites(model)[0].units) is (pattern == "both")
    assert expected.shape == (2, inputs["input_ids"].shape[1] + 6)
    checked = 0
    for kind, (tokens, scores) in gated.items():
        cut_tokens, cut_scores = generate(model, inputs, cache_implementation=kind)
        assert torch.equal(cut_tokens, tokens) and torch.equal(cut_tokens, expected), kind
        assert float((cut_scores - scores).abs().max()) <= 1e-4, kind
        assert float((cut_scores - expected_scores).abs().max()) <= 1e-4, kind
        checked += 1
    assert checked == 2


@pytest.mark.parametrize("pattern", ["both", "empty"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_generation_of_encoder_decoders(name, pattern):
    """Caches of both attentions of the decoder, and beams, which reorder them."""
    auto = task_class(name)
    model = make_model(name, auto)
    inputs = {key: value for key, value in make_inputs(name, auto).items() if key != "decoder_input_ids"}
    keep = choose_units(find_sites(model), pattern)
    gates = close(model, keep)
    ways = {"greedy": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}
    expected = {
        way: generate(model, inputs, use_cache=False, **kwargs) for way, kwargs in ways.items() if way != "static"
    }
    expected["static"] = expected["greedy"]
    gates.remove()
    cut(model, Plan(keep))
    left = {site.name: site.units for site in find_sites(model, kinds=["heads"])}
    assert all(left.values()) is (pattern == "both") and any("cross_heads" in site for site in left)
    for way, kwargs in ways.items():
        tokens, scores = generate(model, inputs, **kwargs)
        assert torch.equal(tokens, expected[way][0]), way
        assert float((scores - expected[way][1]).abs().max()) <= 1e-4, way


def test_generation_would_notice_a_wrong_cut():
    """A unit too few changes the tokens, so the comparisons above can fail."""
    model, inputs = make_model("llama", "AutoModelForCausalLM"), left_padded("llama")
    before, _ = generate(model, inputs)
    cut(model, Plan(choose_units(find_sites(model), "both")))
    assert not torch.equal(generate(model, inputs)[0], before)
