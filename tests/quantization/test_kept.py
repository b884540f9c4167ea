"""A calibration that is stopped goes on where it was."""

from __future__ import annotations

import copy

import pytest
import torch

from hfcompress.quantization import calibrated
from hfcompress.quantization.calibrated import round_on_data
from hfcompress.quantization.layers import layers_to_quantize
from tests.families import make_inputs, make_model


class Stopped(Exception):
    pass


@pytest.mark.parametrize("written", ["nf4-dq", "int3-g16-asym", "codebook3", "int8"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_goes_on_where_it_was(tmp_path, monkeypatch, family, written):
    model, batches = make_model(family), [make_inputs(family)]
    formats = dict.fromkeys(layers_to_quantize(model), written)
    whole = copy.deepcopy(model)
    expected = round_on_data(whole, batches, formats)
    real, looked = calibrated._look, []

    def look(walk, step, modules):
        looked.append(step)
        if len(looked) == 3:
            raise Stopped
        return real(walk, step, modules)

    monkeypatch.setattr(calibrated, "_look", look)
    with pytest.raises(Stopped):
        round_on_data(copy.deepcopy(model), batches, formats, keep=tmp_path / "k")
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == [
        "layer-0000.safetensors",
        "layer-0001.safetensors",
        "plan.json",
    ]
    again = copy.deepcopy(model)
    found = round_on_data(again, batches, formats, keep=tmp_path / "k")
    assert looked == [0, 1, 2, 2], "the two layers that were there are not looked at again"
    assert found.keys() == expected.keys() and len(found) == len(formats)
    for name, layer in found.items():
        assert torch.equal(layer.codes, expected[name].codes) and torch.equal(layer.weight(), expected[name].weight())
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_a_torn_file_is_written_again(tmp_path):
    model, batches = make_model("bert"), [make_inputs("bert")]
    formats = dict.fromkeys(layers_to_quantize(model), "int4")
    expected = round_on_data(copy.deepcopy(model), batches, formats, keep=tmp_path / "k")
    path = tmp_path / "k" / "layer-0001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    found = round_on_data(copy.deepcopy(model), batches, formats, keep=tmp_path / "k")
    assert all(torch.equal(found[name].codes, layer.codes) for name, layer in expected.items())
    assert path.stat().st_size > 100


def test_the_folder_of_another_run_is_refused(tmp_path):
    model, batches = make_model("bert"), [make_inputs("bert")]
    names = layers_to_quantize(model)
    round_on_data(copy.deepcopy(model), batches, dict.fromkeys(names, "int4"), keep=tmp_path / "k")
    for formats, data in (
        (dict.fromkeys(names, "int3"), batches),
        (dict.fromkeys(names, "int4"), [{k: v.flip(0) for k, v in batches[0].items()}]),
    ):
        with pytest.raises(ValueError, match="another model, data or format"):
            round_on_data(copy.deepcopy(model), data, formats, keep=tmp_path / "k")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        round_on_data(model, batches, dict.fromkeys(names, "int4"), keep=tmp_path / "full")
