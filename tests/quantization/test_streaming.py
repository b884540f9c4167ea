"""Layers streamed from disk: what is written is the same to the byte, and no two layers are in memory at once."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import hfcompress
from hfcompress.anatomy import find_sites, named_layers
from hfcompress.calibration import stream_layers
from hfcompress.config import DataConfig
from hfcompress.pruning import Plan, cut
from hfcompress.quantization import calibrated
from hfcompress.quantization.calibrated import round_at_once, round_on_data
from hfcompress.quantization.layers import layers_to_quantize, note_step, put_rounded
from hfcompress.runs import quantizing
from hfcompress.runs.examples import Examples
from tests.families import CONFIGS, choose_units, make_inputs, make_model, task_class

pytest.importorskip("bitsandbytes")

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped and forgotten on Linux only")


def save(case, folder, **changes):
    """A saved model, and batches for it."""
    name, _, how = (case, "", "") if case in CONFIGS else case.partition(":")
    model = make_model(name, task_class(name), **changes)
    if how == "pruned":
        cut(model, Plan(choose_units(find_sites(model), "both")))
    if how == "bfloat16":
        model.bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB" if how == "sharded" else "5GB")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (how == "sharded")
    return [dict(make_inputs(name, task_class(name), seed=seed)) for seed in (1, 2)]


def in_memory(folder, batches, written, target, *, dtype=None):
    """The road without streaming: the whole model in float32, rounded in place."""
    model = hfcompress.load(folder)
    rest = dtype or model.dtype
    formats = dict.fromkeys(layers_to_quantize(model), written)
    rounded = round_on_data(model.float(), batches, formats)
    put_rounded(model.to(rest), rounded)
    note_step(model, rounded, method="second order", calibration_n=3)
    model.save_pretrained(target)
    return rounded


@pytest.mark.parametrize(
    ("case", "written", "dtype"),
    [
        ("bert", "int4-g8-asym", None),
        ("bert:pruned", "nf4-dq", None),
        ("bert:sharded", "int3-g16", None),
        ("bert:bfloat16", "int4-g8", None),
        ("llama", "nf4", None),
        ("llama", "int4-g8", torch.bfloat16),
        ("llama:bfloat16", "fp4-dq", torch.float16),
        ("gemma", "int2-g8-asym", None),
        ("gpt2", "int4-g8", None),
        ("t5", "nf4-dq", None),
        ("t5", "int4-g8-asym", torch.bfloat16),
        ("t5:bfloat16", "int4-g8-asym", None),
        ("t5:pruned", "ternary-channel", None),
        ("bart:sharded", "int8", None),
        ("vit", "codebook3", None),
        ("swin", "int8-channel", None),
        ("albert", "nf4", None),
        ("dinov2:swiglu", "int4-g8", None),
    ],
)
def test_the_same_files(case, written, dtype, tmp_path, monkeypatch):
    changes = {"tie_word_embeddings": True} if case.startswith("llama") else {}
    batches = save(case, tmp_path / "whole", **changes)
    before = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    rounded = in_memory(tmp_path / "whole", batches, written, tmp_path / "expected", dtype=dtype)
    assert len(rounded) >= 6
    monkeypatch.setattr(quantizing, "read_examples", lambda *_, **__: Examples(batches, 3, None))
    monkeypatch.setattr(quantizing, "verify_folder", lambda _: [])  # in processes of its own
    data = DataConfig(train="none")
    quantizing.quantize_folder(
        str(tmp_path / "whole"), tmp_path / "streamed", written, data=data, dtype=dtype, say=lambda _: None
    )
    compared = {path.name for path in (tmp_path / "expected").iterdir()}
    assert {"model.safetensors", "config.json"} <= compared
    for name in compared:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == before, "it was only read"


@pytest.mark.parametrize("case", ["bert", "llama:sharded", "bart", "t5:pruned", "swin"])
def test_one_layer_at_a_time(case, tmp_path, monkeypatch):
    batches = save(case, tmp_path)
    model = hfcompress.load(tmp_path)
    formats = dict.fromkeys(layers_to_quantize(model), "int4-g8")
    layers = named_layers(model)
    matrices = {name: [p for p in layer.parameters() if p.dim() > 1] for name, layer in layers.items()}
    sizes = {name: [p.numel() for p in parameters] for name, parameters in matrices.items()}
    run, looked = [], []

    def present():
        now = {name: [p.numel() for p in parameters] for name, parameters in matrices.items()}
        here = {name for name, found in now.items() if any(found)}
        assert all(now[name] == sizes[name] for name in here), "a layer is there as a whole"
        return here

    for name, layer in layers.items():
        first = next(module for module in layer.modules() if isinstance(module, nn.Linear | Conv1D))
        first.register_forward_pre_hook(lambda *_, name=name: run.append((name, present())))
    real = calibrated._look
    monkeypatch.setattr(calibrated, "_look", lambda *given: looked.append(present()) or real(*given))
    with stream_layers(model) as streamed:
        assert present() == set()
        rounded = round_on_data(model, batches, formats, streamed=streamed)
        assert present() == set()
        put_rounded(model, rounded)
        assert present() == set()
    assert len(looked) == len(layers) and looked == [{name} for name in layers]
    assert {name for name, _ in run} == set(layers) and len(run) >= len(layers) * (1 + 2 * len(batches))
    assert all(here == {name} for name, here in run)
    left = [n for n, p in model.named_parameters() if p.numel() == 0]
    assert left == [] and len(rounded) == len(formats), "what is not rounded has its weights again"


def resident_bytes(file):
    """Pages of a mapped file that are in memory."""
    areas = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    found = [re.search(r"^Rss: +(\d+) kB", area, re.MULTILINE) for area in areas if str(file) in area]
    assert found, "the file is mapped"
    return sum(1024 * int(match[1]) for match in found)


LARGE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 6}


@LINUX
def test_pages_are_given_back(tmp_path):
    batches = save("bert", tmp_path, **LARGE)
    model = hfcompress.load(tmp_path)
    file, layer = tmp_path / "model.safetensors", 4 * (4 * 256**2 + 2 * 256 * 512)
    assert file.stat().st_size > 6 * layer
    seen = []
    with stream_layers(model) as streamed:
        for module in named_layers(model).values():
            module.register_forward_hook(lambda *_: seen.append(resident_bytes(file)))
        rounded = round_on_data(model, batches, dict.fromkeys(layers_to_quantize(model), "int4"), streamed=streamed)
        put_rounded(model, rounded)
        seen.append(resident_bytes(file))
    assert len(seen) > 6 * (1 + 2 * len(batches))
    assert max(seen) < 2 * layer, "with what lies around them in the file"
    again = hfcompress.load(tmp_path)  # and without streaming:
    assert sum(float(p.detach().abs().sum()) for p in again.parameters()) > 0 and resident_bytes(file) > 6 * layer


def test_what_was_cast_is_kept_in_memory(tmp_path, caplog):
    """float32 on disk, bfloat16 in the config: transformers casts while it loads."""
    batches = save("bert", tmp_path / "whole")
    config = tmp_path / "whole" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    expected = in_memory(tmp_path / "whole", batches, "int4-g8", tmp_path / "expected")
    model = hfcompress.load(tmp_path / "whole")
    assert model.dtype == torch.bfloat16
    caplog.set_level(logging.INFO, logger="hfcompress")
    with stream_layers(model) as streamed:
        found = round_on_data(model, batches, dict.fromkeys(expected, "int4-g8"), streamed=streamed)
    size = sum(p.nbytes for name, p in model.bfloat16().named_parameters() if ".layer." in name and p.dim() > 1)
    (line,) = [record.getMessage() for record in caplog.records if "streaming" in record.name]
    assert line == f"{size / 1e6:.0f} of {size / 1e6:.0f} MB of the layers are held in memory, not on disk"
    assert len(found) == 18 and all(torch.equal(found[name].codes, layer.codes) for name, layer in expected.items())


@LINUX
def test_what_was_changed_after_it_was_loaded_is_not_forgotten(tmp_path):
    """A page that was written to is in no file, and neither are those around it as far as the system tells."""
    save("bert", tmp_path, **LARGE)
    model = hfcompress.load(tmp_path)
    layers = model.bert.encoder.layer
    with torch.no_grad():
        layers[2].output.dense.weight.mul_(2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with stream_layers(model) as streamed:
        for _ in range(2):
            found = dict(streamed.named_weights())
            assert len(found) == len(expected) > 90
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_what_layers_share_with_others_stays_in_memory(tmp_path):
    batches, models = save("bert", tmp_path), []
    for _ in range(2):
        models.append(hfcompress.load(tmp_path))
        models[-1].bert.pooler.dense.weight = models[-1].bert.encoder.layer[0].attention.output.dense.weight
    model, expected = models
    formats = dict.fromkeys(layers_to_quantize(model), "int4-g8")
    whole = round_on_data(expected.float(), batches, formats)
    with stream_layers(model) as streamed:
        assert model.bert.pooler.dense.weight.shape == (32, 32)
        rounded = round_on_data(model, batches, formats, streamed=streamed)
    assert len(rounded) == 18 and all(torch.equal(rounded[name].codes, layer.codes) for name, layer in whole.items())
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["llama", "gpt2", "t5", "beit:shared"])
def test_the_model_is_what_it_is_in_memory(case, tmp_path):
    """After the context, whatever was put into the layers is there."""
    batches = save(case, tmp_path)
    whole = make_model(case, task_class(case))
    formats = dict.fromkeys(layers_to_quantize(whole), "int3-g8")
    expected = hfcompress.load(tmp_path).float()
    round_on_data(expected, batches, formats)
    model = hfcompress.load(tmp_path)
    forwards = [layer.forward.__func__ for layer in named_layers(model).values()]
    with stream_layers(model) as streamed:
        assert dict(streamed.named_weights()).keys() == whole.state_dict().keys()
        assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in streamed.named_weights())
        round_on_data(model, batches, formats, streamed=streamed)
    assert [layer.forward.__func__ for layer in named_layers(model).values()] == forwards
    compared = model.state_dict()
    assert compared.keys() == expected.state_dict().keys() and len(compared) > len(formats)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in compared.items())
    assert not all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in compared.items())


def test_an_error_leaves_a_whole_model(tmp_path):
    save("bert", tmp_path)
    model, whole = hfcompress.load(tmp_path), hfcompress.load(tmp_path)
    layer = model.bert.encoder.layer[1]
    with pytest.raises(RuntimeError, match="mine"), stream_layers(model) as streamed, streamed.held(layer):
        raise RuntimeError("mine")
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("first", ["in memory", "streamed"])
def test_one_goes_on_where_the_other_was(first, tmp_path, monkeypatch):
    batches = save("t5:bfloat16", tmp_path / "whole")
    formats = dict.fromkeys(layers_to_quantize(hfcompress.load(tmp_path / "whole")), "nf4-dq")

    def rounded(how):
        model = hfcompress.load(tmp_path / "whole")
        if how == "in memory":
            return round_on_data(model.float(), batches, formats, keep=tmp_path / "kept")
        with stream_layers(model) as streamed:
            return round_on_data(model, batches, formats, keep=tmp_path / "kept", streamed=streamed)

    expected = rounded(first)
    (tmp_path / "kept" / "layer-0003.safetensors").unlink()
    real, looked = calibrated._look, []
    monkeypatch.setattr(calibrated, "_look", lambda *given: looked.append(given[1]) or real(*given))
    found = rounded("streamed" if first == "in memory" else "in memory")
    assert looked == [3] and len(found) == len(formats) > 20
    assert all(torch.equal(layer.codes, expected[name].codes) for name, layer in found.items())
    assert all(torch.equal(layer.weight(), expected[name].weight()) for name, layer in found.items())


@pytest.mark.parametrize("known", [True, False])
def test_without_data(known, tmp_path):
    """Also of an architecture that is not in the table: nothing of it is streamed."""
    if known:
        save("bert:pruned", tmp_path)
    else:
        config = transformers.FNetConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
        transformers.FNetForSequenceClassification(config).save_pretrained(tmp_path)
    expected, model = hfcompress.load(tmp_path), hfcompress.load(tmp_path)
    formats = dict.fromkeys(layers_to_quantize(model), "int4-g8")
    whole = round_at_once(expected, formats, fit="mse")
    with stream_layers(model) as streamed:
        assert bool(streamed.layers) == known
        rounded = round_at_once(model, formats, fit="mse", streamed=streamed)
        assert (sum(p.numel() == 0 for p in model.parameters()) >= len(formats)) == known
    assert len(rounded) == len(formats) >= 4
    assert all(torch.equal(layer.codes, whole[name].codes) for name, layer in rounded.items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
