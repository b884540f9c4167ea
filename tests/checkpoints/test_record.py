"""The record in a config: written, read, refused."""

from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.anatomy import StructureError
from hfcompress.checkpoints.record import add_step, read_steps, read_units


def make_config(record=None):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    if record is not None:
        config.hfcompress = record
    return config


def through_json(config):
    """What is left of a config after it was written to a file and read again."""
    return type(config).from_dict(json.loads(config.to_json_string()))


def test_without_a_record_nothing_was_done():
    assert read_steps(make_config()) == [] and read_units(make_config()) == {}
    assert read_steps(make_config({"version": 1})) == [] and read_units(make_config({"version": 1})) == {}


def test_steps_are_kept_in_order_and_survive_a_file():
    config = make_config()
    add_step(config, "distill", teacher="somebody/model", weights={"task": 0.5, "logits": 0.5})
    add_step(config, "prune", sparsity=1 / 3, heads=[1, 2], note=None)
    expected = [
        {"step": "distill", "teacher": "somebody/model", "weights": {"task": 0.5, "logits": 0.5}},
        {"step": "prune", "sparsity": 1 / 3, "heads": [1, 2], "note": None},
    ]
    assert read_steps(config) == read_steps(through_json(config)) == expected
    assert config.hfcompress["version"] == 1
    add_step(config, "quantize", preset="nf4")
    assert [step["step"] for step in read_steps(config)] == ["distill", "prune", "quantize"]


def test_adding_a_step_leaves_the_units():
    config = make_config({"version": 1, "units": {"encoder.0.heads": [2, 4]}})
    add_step(config, "prune")
    assert read_units(config) == read_units(through_json(config)) == {"encoder.0.heads": (2, 4)}


def test_what_is_read_or_given_is_not_shared_with_the_record():
    details = [1, 2]
    config = make_config()
    add_step(config, "prune", counts=details)
    details.append(3)
    read_steps(config)[0]["step"] = "changed"
    read_steps(config).append({})
    assert read_steps(config) == [{"step": "prune", "counts": [1, 2]}]


def test_what_is_no_json_is_refused():
    config = make_config()
    with pytest.raises(TypeError, match="not JSON serializable"):
        add_step(config, "prune", model=object())
    assert not hasattr(config, "hfcompress")


@pytest.mark.parametrize(
    "steps",
    [None, 5, "prune", {"step": "prune"}, [None], ["prune"], [["step", "prune"]], [{"step": "prune"}, 1], [{}] * 1001],
)
def test_hostile_steps_are_refused(steps):
    config = make_config({"version": 1, "steps": steps})
    with pytest.raises(StructureError, match=r"config\.hfcompress\.steps must be a list of at most 1000 mappings"):
        read_steps(config)
    before = dict(config.hfcompress)
    with pytest.raises(StructureError):
        add_step(config, "prune")
    assert config.hfcompress == before


@pytest.mark.parametrize(
    "record",
    [[], "x", 1, True, {}, {"version": 2}, {"version": "1"}, {"version": 1, "units": {"encoder.0.heads": [3, 2]}}],
)
def test_hostile_records_are_refused(record):
    config = make_config(record)
    for read in (read_steps, read_units, lambda config: add_step(config, "prune")):
        with pytest.raises(StructureError, match=r"config\.hfcompress"):
            read(config)
    assert config.hfcompress == record


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
records = json_like | st.fixed_dictionaries(
    {"version": st.just(1) | json_like},
    optional={
        "units": json_like,
        "steps": st.lists(st.dictionaries(st.text(max_size=4), json_like), max_size=3) | json_like,
    },
)


@settings(max_examples=120, deadline=None)
@given(record=records)
def test_fuzzed_records_are_read_or_refused(record):
    config = make_config()
    config.hfcompress = record
    for read in (read_steps, read_units):
        try:
            value = read(config)
        except StructureError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert isinstance(value, list if read is read_steps else dict)


@settings(max_examples=100, deadline=None)
@given(details=st.dictionaries(st.text("abc_", min_size=1, max_size=4), json_like, max_size=3))
def test_any_json_goes_in_and_comes_out(details):
    config = make_config()
    add_step(config, "prune", **details)
    expected = json.dumps({"step": "prune", **details}, sort_keys=True)
    assert json.dumps(read_steps(config)[0], sort_keys=True) == expected
