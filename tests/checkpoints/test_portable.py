"""What a saved folder says: the config, and the modelling file that stands alone."""

from __future__ import annotations

import ast
import json

import pytest
import torch
import transformers

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.checkpoints.portable import MODELING_FILE, modeling_source, plain_config, portable_config
from hfcompress.checkpoints.record import add_step, read_steps, read_units
from hfcompress.pruning import Plan, cut
from tests.families import (
    CONFIGS,
    SEQ2SEQ,
    TEXT_TOWERS,
    TWO_TOWERS,
    choose_units,
    make_inputs,
    make_model,
    run_model,
    task_class,
)

# The schema counts neurons, so DINOv2's multiples have no place in it; it describes one stack, whose layers are those that the
# config counts, and each of which decides for itself. The sizes of single towers and of Falcon are others than below.
WITHOUT_PER_LAYER = (
    *("dinov2", "dinov2:swiglu", "swin", "albert", "albert:groups", "mpnet", "beit:shared", "bloom"),
    *(*SEQ2SEQ, *TWO_TOWERS, *TEXT_TOWERS, "clip_vision_model", "siglip_vision_model", "falcon", "falcon:mqa"),
)
WITH_PER_LAYER = [name for name in CONFIGS if name not in WITHOUT_PER_LAYER]


def saved_config(folder):
    return json.loads((folder / "config.json").read_text())


def make_cut(name, pattern, auto="AutoModel"):
    model = make_model(name, auto)
    cut(model, Plan(choose_units(find_sites(model), pattern)))
    return model


# ---- per_layer_config ----


def test_which_families_are_looked_at():
    assert len(CONFIGS) == 48 and len(WITH_PER_LAYER) == 27


@pytest.mark.parametrize("name", WITH_PER_LAYER)
def test_the_shapes_are_written_in_the_schema_of_transformers(name, tmp_path):
    model = make_cut(name, "both")
    model.save_pretrained(tmp_path)
    written = saved_config(tmp_path)
    heads_key, width_key = {
        "distilbert": ("n_heads", "hidden_dim"),
        "gpt2": ("n_head", "n_inner"),
        "opt": ("num_attention_heads", "ffn_dim"),
    }.get(name, ("num_attention_heads", "intermediate_size"))
    dense = {heads_key: 4, width_key: 48, "num_key_value_heads": written.get("num_key_value_heads")}
    said = {
        (int(layer), key): value
        for layer, values in written["per_layer_config"].items()
        for key, value in values.items()
    }
    compared = 0
    for site in find_sites(model):
        expected = {width_key: site.units}
        if site.kind == "heads":
            expected = {heads_key: site.units * site.query_heads}
            if dense["num_key_value_heads"] is not None:
                expected["num_key_value_heads"] = site.units
        for key, value in expected.items():
            # Only what differs from the value for all layers is written.
            assert said.pop((site.layer, key), dense[key]) == value
            compared += 1
    assert not said and compared in (6, 9)
    assert {key: written[key] for key in (heads_key, width_key)} == {heads_key: 4, width_key: 48}


@pytest.mark.parametrize("name", WITH_PER_LAYER)
def test_the_schema_does_not_stand_in_the_way(name, tmp_path):
    """The config reads as before, and everything that loads reads the values it needs."""
    model = make_cut(name, "both", task_class(name))
    model.save_pretrained(tmp_path)
    assert "per_layer_config" in saved_config(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.num_attention_heads == 4 and config.hidden_size == 32
    assert [config.per_layer_config[n].num_attention_heads for n in range(3)] == [
        site.units * site.query_heads for site in find_sites(model, kinds=["heads"])
    ]
    again = getattr(transformers, task_class(name)).from_pretrained(tmp_path)
    expected = run_model(model, make_inputs(name))["logits"]
    assert float((run_model(again, make_inputs(name))["logits"] - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_where_the_schema_has_no_words_it_is_not_used(name, tmp_path):
    make_cut(name, "empty").save_pretrained(tmp_path)
    written = saved_config(tmp_path)
    assert "per_layer_config" not in written and "allow_global_per_layer_attribute_access" not in written
    assert written["hfcompress"]["units"] and written["auto_map"]


def test_saving_again_after_more_cutting_updates_it(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (0, 1), "encoder.2.neurons": tuple(range(10))}))
    model.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["per_layer_config"] == {
        "0": {"num_attention_heads": 2},
        "2": {"intermediate_size": 10},
    }
    again = hfcompress.load(tmp_path)
    cut(again, Plan({"encoder.1.heads": (2,), "encoder.2.neurons": tuple(range(5))}))
    again.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["per_layer_config"] == {
        "0": {"num_attention_heads": 2},
        "1": {"num_attention_heads": 1},
        "2": {"intermediate_size": 5},
    }
    units = {"encoder.0.heads": (2, 4), "encoder.1.heads": (1, 4), "encoder.2.neurons": (5, 48)}
    third = hfcompress.load(tmp_path)
    assert read_units(third.config) == units
    expected = run_model(again, make_inputs("bert"))["last_hidden_state"]
    assert torch.equal(run_model(third, make_inputs("bert"))["last_hidden_state"], expected)
    # Once all of a layer is gone the schema has no words any more.
    cut(third, Plan({"encoder.0.heads": ()}))
    third.save_pretrained(tmp_path)
    assert "per_layer_config" not in saved_config(tmp_path)
    assert read_units(hfcompress.load(tmp_path).config) == units | {"encoder.0.heads": (0, 4)}


# ---- plain configs ----


def test_layers_that_become_alike_need_no_record(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.neurons": tuple(range(24))}))
    add_step(model.config, "prune", sparsity=0.5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / MODELING_FILE).exists() and "auto_map" in saved_config(tmp_path)
    cut(model, Plan({f"encoder.{n}.neurons": tuple(range(24)) for n in (1, 2)}))
    model.save_pretrained(tmp_path)
    written = saved_config(tmp_path)
    assert written["intermediate_size"] == 24
    assert not {"auto_map", "per_layer_config"} & written.keys() and not (tmp_path / MODELING_FILE).exists()
    assert written["hfcompress"] == {"version": 1, "steps": [{"step": "prune", "sparsity": 0.5}]}
    again = hfcompress.load(tmp_path)
    assert read_steps(again.config) == [{"step": "prune", "sparsity": 0.5}] and read_units(again.config) == {}
    expected = run_model(model, make_inputs("bert"))["last_hidden_state"]
    assert torch.equal(run_model(again, make_inputs("bert"))["last_hidden_state"], expected)


def test_a_model_that_was_loaded_plainly_can_be_cut_on(tmp_path):
    model = make_model("vit")
    cut(model, Plan(choose_units(find_sites(model), "even")))
    model.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["num_attention_heads"] == 2 and saved_config(tmp_path)["intermediate_size"] == 24
    again = hfcompress.load(tmp_path)
    cut(again, Plan({"encoder.1.heads": (0,)}))
    again.save_pretrained(tmp_path)
    assert read_units(hfcompress.load(tmp_path).config) == {"encoder.1.heads": (1, 2)}


def test_heads_that_a_config_cannot_say_keep_their_record():
    """BERT derives the head dimension from the number of heads, so two heads of 8 features are not the two of its config."""
    model = make_cut("bert", "even")
    assert {site.units for site in find_sites(model, kinds=["heads"])} == {2}
    assert plain_config(model) is None
    assert read_units(portable_config(model))["encoder.0.heads"] == (2, 4)


def test_a_width_that_the_heads_do_not_divide_is_saved_with_a_record(tmp_path):
    """CLIP's config refuses such a width with an error of its own, which is no ValueError."""
    model = make_model("clip_vision_model")
    cut(model, Plan({}, {}, tuple(range(16))))
    assert model.config.num_attention_heads == 3
    model.save_pretrained(tmp_path)
    again, inputs = hfcompress.load(tmp_path), make_inputs("clip_vision_model")
    with torch.no_grad():
        assert torch.equal(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_the_config_of_an_uncut_model_is_only_copied():
    model = make_model("bert")
    add_step(model.config, "distill")
    config = portable_config(model)
    assert config is not model.config and config.to_dict() == model.config.to_dict()
    assert not hasattr(config, "auto_map")


def test_somebody_elses_remote_code_is_left_alone(tmp_path):
    model = make_model("bert")
    add_step(model.config, "distill")
    model.config.auto_map = {"AutoModel": "modeling_theirs.Theirs"}
    (tmp_path / "modeling_theirs.py").write_text("# theirs")
    model.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["auto_map"] == {"AutoModel": "modeling_theirs.Theirs"}
    assert (tmp_path / "modeling_theirs.py").exists() and not (tmp_path / MODELING_FILE).exists()


# ---- the modelling file ----


@pytest.mark.parametrize("name", CONFIGS)
def test_the_modelling_file_needs_nothing_of_ours(name):
    model = make_model(name, task_class(name))
    source = modeling_source(model)
    tree = ast.parse(source)
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"__future__", "collections", "dataclasses", "typing", "torch", "transformers"}
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for cls in (type(model), type(model.base_model)):
        assert ast.unparse(defined[cls.__name__].bases[0]) == f"transformers.{cls.__name__}"
    assert model.config.model_type in source


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", "AutoModelForSequenceClassification"),
        ("bert", "AutoModelForTokenClassification"),
        ("roberta", "AutoModelForQuestionAnswering"),
        ("llama", "AutoModelForCausalLM"),
        ("deit", "AutoModelForImageClassification"),
        ("bert", "AutoModel"),
    ],
)
def test_the_auto_map_names_the_classes_in_the_file(name, auto, tmp_path):
    model = make_cut(name, "both", auto)
    model.save_pretrained(tmp_path)
    written = saved_config(tmp_path)
    assert written["auto_map"]["AutoModel"] == f"modeling_hfcompress.{type(model.base_model).__name__}"
    assert written["auto_map"][auto] == f"modeling_hfcompress.{type(model).__name__}"
    assert written["architectures"] == [type(model).__name__] and written["model_type"] == name
    source = (tmp_path / MODELING_FILE).read_text()
    assert all(f"class {target.partition('.')[2]}(transformers." in source for target in written["auto_map"].values())
    assert source == modeling_source(model)


def test_a_folder_holds_safetensors_and_text_only(tmp_path):
    make_cut("bert", "both").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", MODELING_FILE]
