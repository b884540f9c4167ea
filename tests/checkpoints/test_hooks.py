"""What `import hfcompress` changes in transformers, and what it leaves alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers

import hfcompress
from hfcompress.anatomy import StructureError, find_sites
from hfcompress.checkpoints import hooks
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.pruning import Plan, cut
from tests.families import choose_units, make_config, make_inputs, make_model, run_model


def test_installing_twice_changes_nothing():
    cls = transformers.PreTrainedModel
    before = cls.post_init, cls.save_pretrained
    hooks.install()
    hooks.patch_transformers(transformers.modeling_utils)
    assert (cls.post_init, cls.save_pretrained) == before
    assert cls.post_init.hfcompress
    assert cls.save_pretrained.__name__ == "save_pretrained" and cls.save_pretrained.__doc__


def test_models_without_a_record_are_left_alone(tmp_path):
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"hfcompress", "auto_map", "per_layer_config"} & written.keys()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_an_unknown_architecture_with_steps_but_no_units(tmp_path):
    """Distilled or quantized models of any kind have a record; only cut ones need a family."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 20}
    config = transformers.FNetConfig(**sizes, tpu_short_seq_length=8)
    config.hfcompress = {"version": 1, "steps": [{"step": "distill"}]}
    model = transformers.FNetModel(config)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / MODELING_FILE).exists()
    again = transformers.FNetModel.from_pretrained(tmp_path)
    assert again.config.hfcompress["steps"] == [{"step": "distill"}]
    config.hfcompress = {"version": 1, "units": {"encoder.0.heads": [1, 2]}}
    with pytest.raises(StructureError, match="'fnet'"):
        transformers.FNetModel(config)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "opt", "llama"])
def test_a_config_with_a_record_builds_cut_models(name):
    model = make_model(name)
    cut(model, Plan(choose_units(find_sites(model), "empty")))
    built = transformers.AutoModel.from_config(make_config(name, hfcompress=model.config.hfcompress))
    assert [site.units for site in find_sites(built)] == [site.units for site in find_sites(model)]
    with torch.device("meta"):
        empty = transformers.AutoModel.from_config(make_config(name, hfcompress=model.config.hfcompress))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    built.load_state_dict(model.state_dict())
    built.eval()
    inputs = make_inputs(name)
    expected = run_model(model, inputs)["last_hidden_state"]
    assert float((run_model(built, inputs)["last_hidden_state"] - expected).abs().max()) <= 1e-5


HOSTILE = [
    {},
    [],
    5,
    "units",
    {"version": None},
    {"version": 2},
    {"version": True},
    {"version": 1, "units": None},
    {"version": 1, "units": [["encoder.0.heads", [1, 4]]]},
    {"version": 1, "units": {"encoder.0.heads": [-1, 4]}},
    {"version": 1, "units": {"encoder.0.heads": [1, -4]}},
    {"version": 1, "units": {"encoder.0.heads": [5, 4]}},
    {"version": 1, "units": {"encoder.0.heads": [10**12, 10**12]}},
    {"version": 1, "units": {"encoder.0.heads": [10**12 - 1, 10**12]}},
    {"version": 1, "units": {"encoder.0.heads": [2, 10**12]}},
    {"version": 1, "units": {"encoder.0.neurons": [10, 49]}},
    {"version": 1, "units": {"encoder.0.heads": [True, 4]}},
    {"version": 1, "units": {"encoder.0.heads": [1.0, 4]}},
    {"version": 1, "units": {"encoder.0.heads": ["1", 4]}},
    {"version": 1, "units": {"encoder.0.heads": [[1], 4]}},
    {"version": 1, "units": {"encoder.9.heads": [1, 4]}},
    {"version": 1, "units": {"embeddings": [1, 4]}},
]


def test_hostile_records_do_not_build_models():
    refused = 0
    for record in HOSTILE:
        config = make_config("bert")
        config.hfcompress = record
        start = time.perf_counter()
        with pytest.raises(StructureError, match=r"config\.hfcompress"):
            transformers.AutoModel.from_config(config)
        assert time.perf_counter() - start < 2
        refused += 1
    assert refused == 22


def test_hostile_records_do_not_load(tmp_path, monkeypatch):
    """Refused by every loader before the file with the weights is even opened."""
    model = make_model("bert", "AutoModelForSequenceClassification")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    model.save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    opened = []
    real = transformers.modeling_utils.safe_open
    monkeypatch.setattr(
        transformers.modeling_utils, "safe_open", lambda *args, **kwargs: opened.append(args) or real(*args, **kwargs)
    )
    loaders = (hfcompress.load, transformers.AutoModelForSequenceClassification.from_pretrained)
    refused = 0
    for record in HOSTILE:
        (tmp_path / "config.json").write_text(json.dumps({**good, "hfcompress": record}))
        for loader in loaders:
            with pytest.raises(StructureError, match=r"config\.hfcompress"):
                loader(tmp_path)
            refused += 1
    assert refused == 44 and opened == []
    (tmp_path / "config.json").write_text(json.dumps(good))
    for loader in loaders:
        assert find_sites(loader(tmp_path))[0].units == 1
    assert len(opened) == 2


def test_steps_are_checked_by_load(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hfcompress"]["steps"] = "prune"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StructureError, match="steps must be a list"):
        hfcompress.load(tmp_path)


@pytest.mark.parametrize(
    "architectures",
    [None, [], ["BertModel", "BertForMaskedLM"], ["NoSuchModel"], ["utils"], ["BertConfig"], ["os"], [""]],
)
def test_load_needs_one_class_of_transformers(tmp_path, architectures):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(
        StructureError, match=r"architectures is .*not one class of transformers .*; load it with the Auto"
    ):
        hfcompress.load(tmp_path)


def test_load_of_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError):
        hfcompress.load(tmp_path / "nothing")


def test_load_reads_no_pickles(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        hfcompress.load(tmp_path)


def test_load_takes_what_from_pretrained_takes(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    model.save_pretrained(tmp_path)
    again = hfcompress.load(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert again.dtype == torch.bfloat16 and again.config._attn_implementation == "eager" and not again.training


# ---- saving ----


def test_saving_leaves_the_live_model_alone(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    config, before = model.config, json.dumps(model.config.to_dict(), sort_keys=True)
    model.save_pretrained(tmp_path / "a")
    assert model.config is config and json.dumps(config.to_dict(), sort_keys=True) == before
    assert "_get_files_timestamps" not in vars(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "file")
    assert model.config is config and "_get_files_timestamps" not in vars(model)


def test_other_processes_do_not_write(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / MODELING_FILE).exists() and not (tmp_path / "config.json").exists()


def test_arguments_go_through(tmp_path):
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert find_sites(hfcompress.load(tmp_path / "sharded"))[0].units == 1

    def zeros():
        return {name: torch.zeros_like(value) for name, value in model.state_dict().items()}

    model.save_pretrained(tmp_path / "by name", state_dict=zeros())
    model.save_pretrained(tmp_path / "by place", True, zeros())
    for folder in ("by name", "by place"):
        again = hfcompress.load(tmp_path / folder)
        assert all(not bool(parameter.any()) for parameter in again.parameters()), folder


class FakeHub:
    """Stands in for the client of the Hub: notes what would be committed."""

    def __init__(self):
        self.uploaded = set()

    def create_repo(self, repo_id, **_kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, *_args, operations, **_kwargs):
        self.uploaded |= {operation.path_in_repo for operation in operations}

    def create_branch(self, *_args, **_kwargs):
        pass


def test_saving_and_pushing_in_one_call_uploads_the_modelling_file(tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr(transformers.modeling_utils, "hf_api", lambda *_args: hub)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda *_args: hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", lambda *_args, **_kwargs: card)
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": (1,)}))
    (tmp_path / "notes.txt").write_text("not to be pushed")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="somebody/model")
    assert hub.uploaded == {"README.md", "config.json", "model.safetensors", MODELING_FILE}


# ---- bitsandbytes ----


def test_the_repacking_of_bitsandbytes_is_switched_off():
    module = ModuleType("bitsandbytes.nn.modules")
    hooks.patch_bitsandbytes(module)
    assert not hasattr(module, "has_avx512bf16"), "a version without the defect was changed"
    module.has_avx512bf16 = lambda: True
    hooks.patch_bitsandbytes(module)
    assert module.has_avx512bf16() is False


def test_the_installed_bitsandbytes_is_patched():
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    assert not hasattr(modules, "has_avx512bf16") or modules.has_avx512bf16() is False
    assert modules.Linear4bit(4, 4).support_avx512bf16_for_cpu is False
