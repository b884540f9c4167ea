"""Importance of hidden features, against gates in the forward pass and sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import find_sites, find_stream
from hfcompress.pruning import Plan, cut, stream_gradients, stream_magnitude
from tests.families import make_inputs, make_model, task_class


def gate_readers(model, gate):
    """Multiply a gate into what every linear layer reads that is no output projection of units."""
    inner = {path for site in find_sites(model) for path in site.readers}
    hooked = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and path not in inner:
            module.register_forward_pre_hook(lambda _module, args: (args[0] * gate, *args[1:]))
            hooked += 1
    return hooked


@pytest.mark.parametrize(
    ("name", "readers"), [("bert", 3 * 4 + 2), ("vit", 3 * 4 + 1), ("qwen3", 3 * 5 + 1), ("gpt2", 3 * 2 + 1)]
)
def test_gradients_are_those_of_gates_at_the_readers(name, readers):
    model, inputs = make_model(name, task_class(name), tie_word_embeddings=False), make_inputs(name, task_class(name))
    cut(model, Plan({find_sites(model)[0].name: (1,)}, hidden=tuple(range(2, 26))))
    model(**inputs).logits.square().mean().backward()
    width = 24
    if name == "bert":  # what reads the pooled features is gated, too: they are part of the stream
        assert model.classifier.in_features == width
    gradients = stream_gradients(model)
    gate = torch.ones(width, requires_grad=True)
    assert gate_readers(model, gate) == readers
    model(**inputs).logits.square().mean().backward()
    torch.testing.assert_close(gradients, gate.grad, rtol=1e-4, atol=1e-5)
    assert float(gradients.abs().max()) > 1e-3
    assert torch.equal(stream_gradients(make_model(name)), torch.zeros(32))


def test_a_tied_head_is_gated_with_the_embeddings():
    model, inputs = make_model("gpt2", "AutoModelForCausalLM"), make_inputs("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model(**inputs).logits.square().mean().backward()
    gradients, gate = stream_gradients(model), torch.ones(32, requires_grad=True)
    gate_readers(model, gate)
    model.transformer.wte.register_forward_hook(lambda _module, _args, output: output * gate)
    model(**inputs).logits.square().mean().backward()
    torch.testing.assert_close(gradients, gate.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_reader_is_refused():
    model = make_model("bert")
    model.pooler.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight is frozen"):
        stream_gradients(model)


def test_magnitude_by_hand():
    model = make_model("mistral", "AutoModelForCausalLM", num_hidden_layers=1, tie_word_embeddings=True)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    expected = model.model.embed_tokens.weight.square().sum(0)  # tied with the head: once
    for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        expected = expected + module.weight.square().sum(0)
    for module in (attention.o_proj, mlp.down_proj):
        expected = expected + module.weight.square().sum(1)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        expected = expected + norm.weight.square()
    torch.testing.assert_close(stream_magnitude(model), expected.detach())
    torch.testing.assert_close(stream_magnitude(model, stream=find_stream(model)), expected.detach())
