"""Second moments against numpy and against what is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfcompress.anatomy import find_sites
from hfcompress.calibration import LayerWalk, gram, linear_weight, output_gradients, real_tokens, step_moments
from tests.families import make_inputs, make_model, run_model


def reader_inputs(model, batches):
    """Rows of what enters each reader at real positions, by numpy."""
    rows = {path: [] for site in find_sites(model) for path in site.readers}
    batch = {}
    handles = []
    for path in rows:

        def hook(_module, args, path=path):
            features = args[0].detach().numpy()
            decodes = "decoder_input_ids" in batch and "decoder" in path
            mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
            if mask is not None and mask.numel() == features[..., 0].size:
                features = features[mask.numpy().astype(bool).reshape(features.shape[:-1])]
            rows[path].append(features.reshape(-1, features.shape[-1]))

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    for each in batches:
        batch.clear()
        batch.update(each)
        run_model(model, each)
    for handle in handles:
        handle.remove()
    return {path: np.concatenate(parts).astype(np.float64) for path, parts in rows.items()}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "albert", "bart", "t5", "swin", "opt"])
def test_moments_equal_numpys(name):
    model = make_model(name)
    batches = [make_inputs(name, seed=seed, batch=3) for seed in range(3)]
    expected = reader_inputs(model, batches)
    walk, compared = LayerWalk(model, batches), 0
    for step in range(len(walk.steps)):
        walk.enter(step)
        moments = step_moments(walk, step, {path: model.get_submodule(path) for path in walk.readers(step)})
        for path, seen in moments.items():
            rows = expected[path]
            assert int(seen.count) == len(rows)
            np.testing.assert_allclose(seen.covariance(), np.cov(rows.T, bias=True), atol=1e-4)
            np.testing.assert_allclose(seen.second_moment(), rows.T @ rows / len(rows), atol=1e-4)
            compared += 1
    assert compared == len(expected) >= 2


def test_padding_does_not_matter():
    model, batches = make_model("bert"), [make_inputs("bert", seed=seed) for seed in range(2)]
    other = [
        {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 42)} for batch in batches
    ]
    assert any(not torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, other, strict=True))
    found = []
    for each in (batches, other):
        walk = LayerWalk(model, each)
        walk.enter(0)
        path = walk.readers(0)[1]
        found.append(step_moments(walk, 0, {path: model.get_submodule(path)})[path])
    assert torch.allclose(found[0].products, found[1].products, atol=1e-4)


def test_an_encoders_mask_is_not_the_decoders():
    """Also where both happen to be of one length."""
    features = torch.arange(12.0).view(1, 3, 4)
    batch = {"attention_mask": torch.tensor([[1, 0, 0]]), "decoder_input_ids": torch.tensor([[1, 2, 3]])}
    assert len(real_tokens(features, batch)) == 1
    assert len(real_tokens(features, batch, decoder=True)) == 3
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 0]])
    assert len(real_tokens(features, batch, decoder=True)) == 2


def test_positions_and_batch_in_one_dimension():
    features = torch.arange(12.0).view(6, 2)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    assert real_tokens(features, batch)[:, 0].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("width", [5, 800, 1000])
def test_gram(width):
    x = torch.randn(7, width, dtype=torch.float64)
    np.testing.assert_allclose(gram(x), x.numpy().T @ x.numpy(), atol=1e-9)


def test_gradients_of_predictions_are_the_exact_fisher_information():
    """At the logits, of one example many times: diag(p) - p p^T; before a layer without activation: W^T (...) W."""
    model = make_model("bert", "AutoModelForSequenceClassification", num_labels=3, num_hidden_layers=1)
    batch = {key: value[:1].expand(400, -1) for key, value in make_inputs("bert").items()}
    p = run_model(model, {key: value[:1] for key, value in batch.items()})["logits"][0].softmax(0)
    assert float(p.max()) < 0.98
    exact = torch.diag(p) - torch.outer(p, p)
    modules = {"logits": model.classifier, "pooled": model.dropout}
    found = output_gradients(model, modules, [batch] * 10)
    weight = linear_weight(model.classifier)
    np.testing.assert_allclose(found["logits"], exact, atol=0.02)
    np.testing.assert_allclose(found["pooled"], weight.T @ found["logits"] @ weight, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "falcon", "t5"])
def test_gradients_add_up_over_tokens_and_are_a_mean_over_examples(name):
    """One batch of four examples and four batches of one, with answers that are certain."""
    model = make_model(name)
    inputs = make_inputs(name, batch=4)
    modules = {path: model.get_submodule(path) for site in find_sites(model) for path in site.readers}
    whole = output_gradients(model, modules, [inputs], seed=3)
    assert sorted(whole) == sorted(modules)
    again = output_gradients(model, modules, [inputs], seed=3)
    other = output_gradients(model, modules, [inputs], seed=4)
    for path, value in whole.items():
        assert torch.equal(value, again[path]) and not torch.equal(value, other[path])
        assert value.shape == (32, 32) and torch.allclose(value, value.T, atol=1e-4 * float(value.abs().max()))
        assert float(torch.linalg.eigvalsh(value.double())[0]) >= -1e-4 * float(value.abs().max())
    # The noise of hidden states is drawn number by number: twice the same batch is twice the draws.
    twice = output_gradients(model, modules, [inputs, inputs], seed=3)
    assert all(twice[path].shape == value.shape for path, value in whole.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_conv1d_is_turned():
    model = make_model("gpt2")
    reader = model.h[0].mlp.c_proj
    assert torch.equal(linear_weight(reader), reader.weight.T) and linear_weight(reader).shape == (32, 48)
