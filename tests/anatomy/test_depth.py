"""Whole layers: what is renamed, what is written into the config, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hfcompress.anatomy import StructureError, check_record, drop_layers, find_sites
from hfcompress.pruning import Plan, cut
from tests.families import make_inputs, make_model, run_model


def test_the_list_is_shortened_in_place_and_parameters_are_reported_once():
    model = make_model("bert")
    layers, before = model.encoder.layer, list(model.encoder.layer)
    gone = {id(p) for p in before[1].parameters()}
    changes = drop_layers(model, {"encoder": (0, 2)})
    assert model.encoder.layer is layers and list(layers) == [before[0], before[2]]
    assert len(changes) == 16 and {id(change.old) for change in changes} == gone
    assert all(change.new is None for change in changes)
    assert model.config.num_hidden_layers == 2


def test_cache_indices_follow_and_kinds_of_attention_stay():
    model = make_model("qwen2", num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2)
    model.config.sliding_window = 4
    cut(model, Plan({"decoder.3.heads": ()}))
    drop_layers(model, {"decoder": (0, 3)})
    assert [layer.self_attn.layer_idx for layer in model.layers] == [0, 1]
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert type(model.layers[1].self_attn).__name__ == "SkippedAttention"
    assert run_model(model, make_inputs("qwen2"))["last_hidden_state"].shape == (2, 9, 32)


def test_units_are_counted_under_the_new_numbers():
    model = make_model("bert")
    cut(model, Plan({"encoder.1.heads": (0,), "encoder.2.heads": (0, 3), "encoder.0.neurons": (1, 2)}))
    drop_layers(model, {"encoder": (0, 2)})
    assert model.config.hfcompress == {
        "version": 1,
        "units": {"encoder.0.neurons": [2, 48], "encoder.1.heads": [2, 4]},
        "layers": {"encoder": [2, 3]},
    }
    drop_layers(model, {"encoder": (1,)})
    assert model.config.hfcompress["layers"] == {"encoder": [1, 3]}
    assert model.config.hfcompress["units"] == {"encoder.0.heads": [2, 4]}
    assert [site.units for site in find_sites(model)] == [2, 48]


def test_decisions_of_all_layers_have_no_number():
    model = make_model("t5", "AutoModelForSeq2SeqLM")
    cut(model, Plan({"encoder.heads": (0, 2), "encoder.2.neurons": (0, 1)}))
    drop_layers(model, {"encoder": (0, 2), "decoder": (0,)})
    assert model.config.hfcompress["units"] == {"encoder.heads": [2, 4], "encoder.1.neurons": [2, 48]}
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (2, 1)


def test_a_stage_has_its_own_number_of_layers():
    model = make_model("swin")
    drop_layers(model, {"encoder.0": (0,)})
    assert list(model.config.depths) == [1, 1] and model.config.hfcompress["layers"] == {"encoder.0": [1, 2]}


def test_vision_backbones_name_their_layers_anew():
    model = make_model("dinov2")
    drop_layers(model, {"encoder": (0, 2)})
    assert model.config.stage_names == ["stem", "stage1", "stage2"] and model.config.out_features == ["stage2"]
    again = type(model.config).from_dict(model.config.to_dict())
    assert again.stage_names == ["stem", "stage1", "stage2"]


@pytest.mark.parametrize(
    ("name", "changes", "keep", "reason"),
    [
        ("bert", {}, {"encoder": ()}, "at least one"),
        ("bert", {}, {"encoder": (0, 3)}, "between 0 and 2"),
        ("bert", {}, {"encoder": (2, 0)}, "ascending"),
        ("bert", {}, {"decoder": (0,)}, "no such stack: decoder; the model has encoder"),
        ("albert", {}, {"encoder": (0, 1)}, "they are shared"),
        ("t5", {}, {"encoder": (1, 2)}, "keep layer 0 in place"),
        ("modernbert", {}, {"encoder": (1, 2)}, "attn_norm"),
        ("swin", {}, {"encoder.0": (1,)}, "shift_size"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"decoder": (0, 2)}, "scaling"),
        ("deberta-v2", {"conv_kernel_size": 3}, {"encoder": (1, 2)}, "layer 0 must stay, because encoder.conv"),
        ("wav2vec2:weighted", {}, {"encoder": (0, 2)}, "layer_weights depends on the number of layers"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_touched(name, changes, keep, reason):
    if name.endswith(":weighted"):
        name = name.partition(":")[0]
        model = make_model(name, "AutoModelForAudioClassification", use_weighted_layer_sum=True)
    else:
        model = make_model(name, **changes)
    before, config = [id(p) for p in model.parameters()], model.config.to_dict()
    with pytest.raises(StructureError, match=reason) as error:
        cut(model, Plan({find_sites(model)[-1].name: (0,)}, keep))
    assert "\n" not in str(error.value)
    assert [id(p) for p in model.parameters()] == before and model.config.to_dict() == config


def test_what_is_alike_at_its_new_place_is_not_refused():
    model = make_model("deberta-v2", conv_kernel_size=3)
    drop_layers(model, {"encoder": (0, 2)})
    gpt = make_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    drop_layers(gpt, {"decoder": (0, 1)})
    assert len(model.encoder.layer) == len(gpt.h) == 2
    assert drop_layers(gpt, {"decoder": (0, 1)}) == [] == drop_layers(gpt, {})


@pytest.mark.parametrize("value", [[3], {"encoder": [0, 3]}, {"encoder": [4, 3]}, {"encoder": "3"}])
def test_a_bad_record_of_layers_is_refused(value):
    with pytest.raises(StructureError, match=r"config\.hfcompress\.layers"):
        check_record({"version": 1, "layers": value})


def test_shared_parameters_stay():
    """A parameter that a layer that goes shares with one that stays is not reported as gone."""
    model = make_model("bert")
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight
    assert len(drop_layers(model, {"encoder": (0, 2)})) == 15
    assert torch.isfinite(run_model(model, make_inputs("bert"))["last_hidden_state"]).all()
