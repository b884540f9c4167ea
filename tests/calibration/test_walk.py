"""A walk layer by layer is the plain forward pass, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

from hfcompress.anatomy import find_sites, named_layers
from hfcompress.calibration import LayerWalk, frozen, to_device, with_decoder
from tests.families import CONFIGS, make_inputs, make_model, run_model


def plain_forward(model, batches):
    """What leaves each layer and what enters each reader in a plain forward pass, per batch (and call)."""
    layers = {name: [] for name in named_layers(model)}
    readers = {path: [[] for _ in batches] for site in find_sites(model) for path in site.readers}
    number = [0]
    handles = []
    for name, layer in named_layers(model).items():

        def after(_module, _args, output, name=name):
            layers[name].append((output if torch.is_tensor(output) else output[0]).clone())

        handles.append(layer.register_forward_hook(after))
    for path in readers:

        def before(_module, args, path=path):
            readers[path][number[0]].append(args[0].clone())

        handles.append(model.get_submodule(path).register_forward_pre_hook(before))
    for number[0], batch in enumerate(batches):
        run_model(model, batch)
    for handle in handles:
        handle.remove()
    return layers, readers


def close(one, other):
    return torch.allclose(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_walk_is_the_plain_forward_pass(name):
    model = make_model(name)
    batches = [make_inputs(name, seed=seed, batch=seed + 1) for seed in (1, 2)]
    layers, readers = plain_forward(model, batches)
    walk = LayerWalk(model, batches)
    seen, left = [], 0
    for step, (layer, _) in enumerate(walk.steps):
        walk.enter(step)
        for path in walk.readers(step):
            for batch in (0, 1, 0):  # a second run finds what the first found: nothing is kept in a cache
                calls = walk.run_until(step, batch, model.get_submodule(path))
                assert len(calls) == len(readers[path][batch]) >= 1
                assert all(close(one, other) for one, other in zip(calls, readers[path][batch], strict=True))
            seen.append(path)
        walk.leave(step)
        if not walk.whole:
            assert all(close(one, other) for one, other in zip(walk.hidden, layers[layer], strict=True))
            left += len(walk.hidden)
    assert walk.whole == name.startswith("albert")
    assert sorted(seen) == sorted(readers) and len(seen) >= 2
    assert left == (0 if walk.whole else 2 * len(layers))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "swin"])
def test_layers_that_change_on_the_way_are_seen_by_the_next(name):
    model, batches = make_model(name), [make_inputs(name)]
    walk = LayerWalk(model, batches)
    for step, (_, layer) in enumerate(walk.steps):
        walk.enter(step)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(0.7)
        walk.leave(step)
    layers, _ = plain_forward(model, batches)
    assert close(walk.hidden[0], layers[walk.steps[-1][0]][0])


def test_outputs_that_are_known_are_not_computed_again():
    model, batches = make_model("bert"), [make_inputs("bert")]
    walk = LayerWalk(model, batches)
    walk.enter(0)
    walk.leave(0, [torch.zeros_like(walk.hidden[0])])
    walk.enter(1)
    assert float(walk.hidden[0].abs().max()) == 0


def test_a_walk_needs_data():
    with pytest.raises(ValueError, match="no calibration data; pass at least one batch"):
        LayerWalk(make_model("bert"), [])


def test_labels_stay_behind_and_numbers_get_the_models_type():
    model = make_model("vit").bfloat16()
    batch = {"pixel_values": torch.randn(1, 3, 16, 16), "labels": torch.tensor([1]), "interpolate_pos_encoding": False}
    moved = to_device(batch, model)
    assert set(moved) == {"pixel_values", "interpolate_pos_encoding"} and moved["pixel_values"].dtype == torch.bfloat16
    assert to_device(batch, model, labels=True)["labels"].dtype == torch.int64


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_labels_make_the_inputs_of_a_decoder(name):
    """A collator that knows no model leaves that to the model; the walk sees the same tokens."""
    model = make_model(name, "AutoModelForSeq2SeqLM")
    ids = make_inputs(name)["input_ids"]
    labels = torch.tensor([[7, 8, 9, 2], [5, 2, -100, -100]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    completed = with_decoder(batch, model)
    assert completed["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    with torch.no_grad():
        own = model(**batch).logits
        ours = model(**to_device(batch, model)).logits
    real = labels != -100
    assert close(own[real], ours[real])
    assert with_decoder(completed, model).keys() == completed.keys()


def test_others_batches_stay_as_they_are():
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])}
    assert with_decoder(batch, make_model("gpt2", "AutoModelForCausalLM")) is batch


def test_frozen_puts_everything_back():
    model = make_model("bert").train()
    model.encoder.layer[0].eval()
    model.encoder.layer[1].attention.self.query.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert [module.training for module in model.modules()] == modes and False in modes and True in modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained and trained.count(False) == 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
