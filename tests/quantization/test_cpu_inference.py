"""Packing 4-bit weights for the CPU: the same outputs but for bfloat16, an exact way back, and no harm done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.pruning import Plan, cut
from hfcompress.quantization import pack_for_cpu, quantize, unpack_for_cpu
from hfcompress.quantization.cpu_inference import Packed
from tests.families import make_inputs, make_model, predictions, run_model, task_class
from tests.quantization.test_quantize import quantized_modules, relative, repacks

bnb = pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 128}
NEURONS = (96, 128, 64)  # what the down projections read: 96 is no multiple of 64


@pytest.fixture
def folder(tmp_path):
    """A decoder whose layers have 96, 128 and 64 neurons."""
    model = make_model("llama", task_class("llama"), **SIZES)
    sites = find_sites(model, kinds=["neurons"])
    cut(model, Plan({site.name: tuple(range(count)) for site, count in zip(sites, NEURONS, strict=True)}))
    model.save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def small(folder, preset="nf4-dq", **options):
    return quantize(folder, preset, **options)


@repacks
@pytest.mark.parametrize("preset", ["nf4", "nf4-dq", "fp4-dq"])
def test_outputs_stay_but_for_bfloat16_and_unpacking_is_exact(folder, preset, tmp_path):
    model, inputs = small(folder, preset), make_inputs("llama")
    first = predictions(run_model(model, inputs))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = pack_for_cpu(model)
    assert list(done.left) == ["model.layers.0.mlp.down_proj"]
    assert (
        done.left["model.layers.0.mlp.down_proj"] == "96 inputs and 64 outputs; the kernel takes multiples of 64 and 32"
    )
    assert {*done.packed, *done.left} == quantized_modules(model).keys() and len(done.packed) == 20
    assert str(done) == "packed 20 of 21 layers in 4 bits for this CPU"
    packed = predictions(run_model(model, inputs))
    assert 1e-5 < relative(packed, first) < 0.05
    assert pack_for_cpu(model) == done  # again changes nothing
    assert torch.equal(predictions(run_model(model, inputs)), packed)
    unpack_for_cpu(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(predictions(run_model(model, inputs)), first)

    pack_for_cpu(model)
    run_model(model, inputs)
    model.save_pretrained(tmp_path / "small")  # unpacks first
    assert torch.equal(predictions(run_model(hfcompress.load(tmp_path / "small"), inputs)), first)
    assert torch.equal(predictions(run_model(model, inputs)), first)


@repacks
def test_storage_in_floats_comes_back_too(folder):
    model, inputs = small(folder, storage="bfloat16"), make_inputs("llama")
    first = predictions(run_model(model, inputs))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack_for_cpu(model)
    run_model(model, inputs)
    unpack_for_cpu(model)
    after = model.state_dict()
    assert all(
        torch.equal(after[name].view(torch.uint8), value.view(torch.uint8))
        for name, value in before.items()
        if value.dim()
    )
    assert torch.equal(predictions(run_model(model, inputs)), first)


@repacks
def test_gradients_are_refused_while_packed(folder):
    model, inputs = small(folder), make_inputs("llama")
    pack_for_cpu(model)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"^packed weights pass no gradients; call unpack_for_cpu\(model\) before training"
    ):
        model(**inputs)
    unpack_for_cpu(model)
    model(**inputs).logits.sum().backward()
    assert float(model.model.embed_tokens.weight.grad.abs().max()) > 0


@repacks
def test_what_cannot_be_packed(folder):
    with pytest.raises(ValueError, match="in training mode, and packed weights are for inference only"):
        pack_for_cpu(small(folder).train())
    with pytest.raises(ValueError, match="Linear has no layers in 4 bits; quantize it with nf4 or fp4 first"):
        pack_for_cpu(nn.Linear(64, 64))
    model = nn.Linear(4, 4)
    unpack_for_cpu(model)  # nothing to do


def test_without_the_instructions_it_is_refused(monkeypatch):
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: False)
    with pytest.raises(ValueError, match=r"^this CPU has no AVX512-BF16"):
        pack_for_cpu(nn.Linear(64, 64))


def test_what_was_done_in_a_line():
    assert str(Packed(("a", "b"), {"c": "no"})) == "packed 2 of 3 layers in 4 bits for this CPU"
