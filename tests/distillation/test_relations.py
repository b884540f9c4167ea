"""Attention maps against torch and transformers, and relations against the papers' formulas with loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from hfcompress.distillation import attention_kl, attention_map, attention_mse, relation, relation_divergence


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through_values(queries: torch.Tensor, keys: torch.Tensor, **options) -> torch.Tensor:
    """The map of `scaled_dot_product_attention`, read off by letting it mix unit vectors."""
    length = keys.shape[-2]
    values = torch.eye(length).expand(keys.shape[0], keys.shape[1], length, length)
    return F.scaled_dot_product_attention(queries, keys, values, **options)


MASKS = {
    "none": None,
    "boolean": torch.arange(2 * 1 * 6 * 6).view(2, 1, 6, 6) * 5 % 7 > 2,
    "padding": torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()[:, None, None, :],
    "nowhere": torch.arange(36).view(1, 1, 6, 6) >= 12,
    "added": tensor(1, 4, 6, 6, seed=9),
    "minus infinity": torch.zeros(6, 6).masked_fill(torch.arange(36).view(6, 6) % 5 < 2, -torch.inf),
    "minus infinity everywhere": torch.zeros(6, 6).masked_fill(torch.arange(36).view(6, 6) < 12, -torch.inf),
}


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
def test_the_map_is_that_of_torch(name: str, key_heads: int, scaling: float | None) -> None:
    queries, keys, mask = tensor(2, 4, 6, 8), tensor(2, key_heads, 6, 8, seed=1), MASKS[name]
    ours = attention_map(queries, keys, scaling=scaling, mask=mask)
    theirs = through_values(queries, keys, scale=scaling, attn_mask=mask, enable_gqa=True)
    assert ours.shape == (2, 4, 6, 6) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    sums = ours.sum(-1)
    assert bool(((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()) and bool((sums == 0).any()) == ("where" in name)


@pytest.mark.parametrize("lengths", [(6, 6), (3, 6), (6, 3)])
def test_causal_as_in_torch(lengths: tuple[int, int]) -> None:
    queries, keys = tensor(2, 4, lengths[0], 8), tensor(2, 2, lengths[1], 8, seed=1)
    theirs = through_values(queries, keys, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention_map(queries, keys, is_causal=True), theirs, rtol=1e-5, atol=1e-6)
    padding = torch.ones(2, 1, 1, lengths[1], dtype=torch.bool)
    padding[0, ..., 0] = False  # to the left: the first query may look nowhere
    both = attention_map(queries, keys, mask=padding, is_causal=True)
    expected = through_values(queries, keys, attn_mask=padding & torch.ones(lengths).tril().bool(), enable_gqa=True)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_map_is_that_of_eager_attention(key_heads: int, softcap: float | None) -> None:
    queries, keys = tensor(2, 4, 6, 8), tensor(2, key_heads, 6, 8, seed=1)
    least = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, 6, 6).masked_fill(~MASKS["boolean"], least)
    module = SimpleNamespace(num_key_value_groups=4 // key_heads, training=False, head_dim=8)
    _, theirs = eager_attention_forward(module, queries, keys, keys, mask, scaling=0.2, softcap=softcap)
    ours = attention_map(queries, keys, scaling=0.2, mask=mask, softcap=softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def small(config: type, **more):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "vocab_size": 30,
    }
    torch.manual_seed(0)
    return config(**sizes, attn_implementation="eager", **more)


MODELS = {
    "bert": (BertModel, lambda: small(BertConfig)),
    "llama": (LlamaModel, lambda: small(LlamaConfig, num_key_value_heads=2)),
    "gemma2": (
        Gemma2Model,
        lambda: small(Gemma2Config, num_key_value_heads=1, head_dim=8, sliding_window=3, attn_logit_softcapping=0.5),
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_map_is_the_one_that_models_report(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = MODELS[family]
    model = kind(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from even maps
    module = __import__(kind.__module__, fromlist=["x"])
    calls, eager = [], module.eager_attention_forward

    def spy(layer, query, key, value, attention_mask, **options):
        calls.append((query, key, attention_mask, options))
        return eager(layer, query, key, value, attention_mask, **options)

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        reported = model(torch.arange(10).view(2, 5), attention_mask=attention, output_attentions=True).attentions
    assert len(calls) == len(reported) == 2
    for (query, key, mask, options), theirs in zip(calls, reported, strict=True):
        ours = attention_map(query, key, scaling=options["scaling"], mask=mask, softcap=options.get("softcap"))
        rows = attention.bool()[:, None, :, None].expand_as(theirs)
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-5, atol=1e-6)
        assert (theirs[rows] - theirs[rows].mean()).abs().max().item() > 0.1


def test_the_gradient_of_a_map() -> None:
    queries, keys = (tensor(1, 4, 3, 2).double().requires_grad_(), tensor(1, 2, 3, 2, seed=1).double().requires_grad_())
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    assert torch.autograd.gradcheck(lambda q, k: attention_map(q, k, mask=mask, softcap=2.0), (queries, keys))


def test_half_precision_and_autocast_give_float32() -> None:
    queries, keys = tensor(1, 4, 3, 2).bfloat16(), tensor(1, 4, 3, 2, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attention_map(queries, keys)
    assert torch.equal(ours, attention_map(queries.float(), keys.float())) and ours.dtype == torch.float32


def test_heads_that_cannot_share_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="4 heads of queries cannot share 3 heads of keys"):
        attention_map(tensor(1, 4, 3, 2), tensor(1, 3, 3, 2))


# ---- losses on maps ----


def test_squared_error_is_that_of_torch_without_padding() -> None:
    student, teacher = tensor(2, 3, 5, 5).softmax(-1), tensor(2, 3, 5, 5, seed=1).softmax(-1)
    assert attention_mse(student, teacher).item() == pytest.approx(F.mse_loss(student, teacher).item(), rel=1e-5)
    kl = F.kl_div(student.log(), teacher, reduction="sum") / (2 * 3 * 5)
    assert attention_kl(student, teacher).item() == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss", [attention_mse, attention_kl, relation_divergence])
def test_more_padding_changes_nothing(loss, side: str) -> None:
    if loss is relation_divergence:
        pair, options = [tensor(2, 5, 8, seed=s) for s in (0, 1)], {"relation_heads": 4}
        widths = (0, 0, 0, 3) if side == "right" else (0, 0, 3, 0)
    else:
        pair, options = [tensor(2, 3, 5, 5, seed=s).softmax(-1) for s in (0, 1)], {}
        widths = (0, 3, 0, 3) if side == "right" else (3, 0, 3, 0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    padded = [F.pad(x, widths, value=float("nan")) for x in pair]
    more = F.pad(mask, widths[-2:], value=False)
    assert more.shape == (2, 8)
    expected = loss(*pair, mask=mask, **options).item()
    assert loss(*padded, mask=more, **options).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [attention_mse, attention_kl])
def test_other_numbers_of_heads_are_compared_by_their_mean_only(loss) -> None:
    student, teacher = tensor(2, 2, 5, 5).softmax(-1), tensor(2, 6, 5, 5, seed=1).softmax(-1)
    with pytest.raises(ValueError, match=r"\(2, 2, 5, 5\).*\(2, 6, 5, 5\).*average_heads=True") as caught:
        loss(student, teacher)
    assert "\n" not in str(caught.value)
    means = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    assert loss(student, teacher, average_heads=True).item() == pytest.approx(loss(*means).item(), rel=1e-6)
    with pytest.raises(ValueError, match="tokens must be the same"):
        loss(student, tensor(2, 2, 6, 6).softmax(-1), average_heads=True)


def test_a_student_that_is_blind_to_a_key_is_not_lost() -> None:
    teacher = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    student = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    expected = (math.log(0.5) - 0.5 * math.log(1e-12)) / 2
    assert attention_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # In float16 the derivative of the logarithm of its smallest number is infinite.
    nearly = torch.tensor([[[[1.0, 6e-8], [1.0, 0.0]]]], dtype=torch.float16, requires_grad=True)
    attention_kl(nearly, teacher).backward()
    assert bool((nearly > 0)[..., 0, 1].all()) and bool(torch.isfinite(nearly.grad).all())


# ---- relations ----


def slow_relation(x: np.ndarray, heads: int) -> np.ndarray:
    """Of one example, with loops: x of shape (length, width)."""
    length, width = x.shape
    size = width // heads
    result = np.zeros((heads, length, length))
    for head in range(heads):
        for i in range(length):
            scores = [
                x[i, head * size : (head + 1) * size] @ x[j, head * size : (head + 1) * size] for j in range(length)
            ]
            e = np.exp(np.array(scores) / math.sqrt(size))
            result[head, i] = e / e.sum()
    return result


def test_relation_against_loops() -> None:
    x = tensor(2, 5, 12)
    for heads in (1, 3, 4, 12):
        expected = np.stack([slow_relation(each.double().numpy(), heads) for each in x])
        np.testing.assert_allclose(relation(x, heads).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_heads_are_joined_as_the_model_joins_them() -> None:
    flat = tensor(2, 5, 12)
    per_head = flat.view(2, 5, 3, 4).transpose(1, 2)
    torch.testing.assert_close(relation(per_head, 6), relation(flat, 6))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    masked = relation(per_head, 6, mask=mask)
    torch.testing.assert_close(masked[:1, :, :3, :3], relation(flat[:1, :3], 6))
    assert masked[0, ..., 3:].abs().max().item() == 0.0
    torch.testing.assert_close(masked.sum(-1), torch.ones(2, 6, 5))


def test_models_of_other_widths_and_heads() -> None:
    # Keys of grouped-query attention: 2 heads of 6 features against 4 heads of 5.
    student, teacher = tensor(2, 2, 5, 6), tensor(2, 4, 5, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    values = []
    for example, length in ((0, 3), (1, 5)):
        q, p = (
            slow_relation(x[example, :, :length].transpose(0, 1).flatten(1).double().numpy(), 4)
            for x in (student, teacher)
        )
        values += list((p * np.log(p / q)).sum(-1).mean(0))
    assert len(values) == 8
    loss = relation_divergence(student, teacher, relation_heads=4, mask=mask)
    assert loss.item() == pytest.approx(np.mean(values), rel=1e-4)


@pytest.mark.parametrize("heads", [5, 24, 0, -2])
def test_widths_that_cannot_be_split_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match=f"width of 12 cannot be split into {heads} relation heads") as caught:
        relation_divergence(tensor(2, 5, 12), tensor(2, 5, 24), relation_heads=heads)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="width of 18"):
        relation_divergence(tensor(2, 5, 12), tensor(2, 5, 18), relation_heads=12)


def test_a_rotation_of_each_relation_head_is_not_seen() -> None:
    x = tensor(2, 5, 8)
    rotation, _ = torch.linalg.qr(tensor(4, 4, seed=3))
    turned = torch.cat([x[..., :4] @ rotation, x[..., 4:] @ rotation], dim=-1)
    assert relation_divergence(turned, x, relation_heads=2).item() == pytest.approx(0.0, abs=1e-5)
    assert relation_divergence(turned, x, relation_heads=4).item() > 0.1
