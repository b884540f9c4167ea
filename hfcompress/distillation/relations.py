"""Losses between relations of tokens: attention maps, and how queries, keys or values are related among themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hfcompress.distillation.losses import comparable, exactly, mean_over_items

# Below this a probability of the student is as good as 0; its logarithm's derivative times a loss scale stays finite.
_LEAST_PROBABILITY = 1e-12


# ---- attention maps ----


def attention_map(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
) -> torch.Tensor:
    """The probabilities with which attention mixes values, as `scaled_dot_product_attention` and eager attention have them.

    softmax(cap(queries keys^T scaling) + mask) with cap(x) = softcap tanh(x / softcap).

    Args:
        queries: Shape (batch, heads, length, features), float; computed in float32.
        keys: Shape (batch, key heads, key length, features); heads is a multiple of key heads, each for as many queries' heads that
            follow one another (grouped-query attention).
        scaling: None means 1 / sqrt(features).
        mask: Boolean, True where a query may look, or a float that is added; anything that can be broadcast to the result.
        is_causal: Query i looks at keys 0 to i, as well as `mask` allows; counted from the first key, as torch does.
        softcap: Above 0 (Gemma 2); None leaves it out.

    Returns:
        Shape (batch, heads, length, key length), float32 (float64 where `queries` are). Rows add up to 1; those of queries that may look
        nowhere (False or -inf everywhere) are 0.

    Raises:
        ValueError: The heads are no multiple of the key heads.

    Example:
        >>> queries, keys = torch.ones(1, 1, 2, 1), torch.tensor([[[[0.0], [1.0986122886681098]]]])
        >>> [[round(p, 6) for p in row] for row in attention_map(queries, keys, is_causal=True)[0, 0].tolist()]
        [[1.0, 0.0], [0.25, 0.75]]
    """
    heads, key_heads = queries.shape[1], keys.shape[1]
    if heads % key_heads:
        raise ValueError(
            f"{heads} heads of queries cannot share {key_heads} heads of keys; their number must be a multiple"
        )
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(dtype), keys.to(dtype).repeat_interleave(heads // key_heads, dim=1)
    with exactly(queries):
        scores = queries @ keys.mT * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if is_causal:
        allowed = allowed.tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        nowhere = mask == -torch.inf
        allowed = allowed & ~nowhere
        scores = scores + mask.masked_fill(nowhere, 0.0)
    return scores.masked_fill(~allowed, torch.finfo(dtype).min).softmax(-1).masked_fill(~allowed, 0.0)


def attention_mse(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    average_heads: bool = False,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean over heads and keys of the squared difference of attention maps, mean over queries.

    Source: TinyBERT (Jiao et al. 2020), equation 7, with probabilities where the paper takes scores before the softmax. Padding is
    left out on both sides: with `mask` the mean is over the keys that count, so padding more changes nothing.

    Args:
        student: Attention maps, shape (batch, heads, length, length), float; computed in float32.
        teacher: The same shape (but for the heads, if they are averaged); gets no gradient.
        average_heads: Compare the means over heads, for models with different numbers of heads.
        mask: True where a token counts, as query and as key, shape (batch, length).
        count: See `mean_over_items`; items are queries, so it is the number of tokens.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ValueError: The maps have different shapes.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
        >>> attention_mse(student, teacher).item()  # rows 0 and 1/4
        0.125
    """
    ours, theirs = _comparable_maps(student, teacher, mask, average_heads)
    keys = ours.shape[-1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
    return mean_over_items((ours - theirs).square().sum(-1).mean(1) / keys, mask=mask, count=count)


def attention_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    average_heads: bool = False,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """KL(teacher || student) of the rows of attention maps, mean over heads, mean over queries.

    Source: MiniLM (Wang et al. 2020), equation 6, at any layer.

    Args:
        student: Attention maps (probabilities), shape (batch, heads, length, length), float; computed in float32.
        teacher: The same shape (but for the heads, if they are averaged); gets no gradient.
        average_heads: Compare the means over heads, for models with different numbers of heads.
        mask: True where a token counts, as query and as key, shape (batch, length).
        count: See `mean_over_items`; items are queries, so it is the number of tokens.

    Returns:
        Scalar, float32, at least 0 but for rounding. Probabilities below 1e-12 (6e-5 in float16) count as that.

    Raises:
        ValueError: The maps have different shapes.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> round(attention_kl(student, teacher).item(), 6)  # rows 0 and 0.25 ln(0.25/0.5) + 0.75 ln(0.75/0.5)
        0.065406
    """
    ours, theirs = _comparable_maps(student, teacher, mask, average_heads)
    # The gradient comes back in the student's dtype, and half precision has no room for 1 / 1e-12.
    least = max(_LEAST_PROBABILITY, torch.finfo(student.dtype).tiny)
    values = F.kl_div(ours.clamp(min=least).log(), theirs, reduction="none").sum(-1).mean(1)
    return mean_over_items(values, mask=mask, count=count)


def _comparable_maps(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, average_heads: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if mask is not None:
        both = comparable(student, teacher, mask=mask.unsqueeze(1))
        ours, theirs = (maps.masked_fill(~mask[:, None, None, :], 0.0) for maps in both)
    else:
        ours, theirs = comparable(student, teacher)
    if average_heads:
        ours, theirs = ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"attention maps of shape {tuple(student.shape)} cannot be compared with {tuple(teacher.shape)}: "
            "average_heads=True compares models with different heads, and tokens must be the same"
        )
    return ours, theirs


ATTENTION_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": attention_mse, "kl": attention_kl}
"""Name to loss of attention maps: (student, teacher, *, average_heads, mask, count)."""


# ---- relations of MiniLM ----


def relation(vectors: torch.Tensor, heads: int, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How tokens are related by their queries, keys or values: softmax(A A^T / sqrt(features)) for each relation head.

    Source: MiniLMv2 (Wang et al. 2021), equations 4 and 5: the attention heads' vectors are joined and split anew into relation
    heads, A being what one of them gets of all tokens.

    Args:
        vectors: Shape (batch, length, width), or (batch, attention heads, length, features), float; computed in float32. Of
            grouped-query attention, the keys' and values' own heads.
        heads: Relation heads, a divisor of the width.
        mask: True where a token counts, shape (batch, length); the others are related to by nobody.

    Returns:
        Shape (batch, heads, length, length), float32 (float64 where `vectors` are).

    Raises:
        ValueError: The width cannot be split.

    Example:
        >>> vectors = torch.tensor([[[1.0, 0.0], [1.0986122886681098, 0.0]]])
        >>> round(relation(vectors, 2)[0, 0, 0, 1].item(), 6)  # softmax of (1, ln 3) with one feature a head
        0.524633
        >>> relation(vectors, 2)[0, 1, 0].tolist()
        [0.5, 0.5]
    """
    parts = _relation_parts(vectors, heads)
    parts, _ = comparable(parts, parts, mask=None if mask is None else mask.unsqueeze(1))
    return _log_relation(parts, mask).exp().mT


def relation_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    relation_heads: int,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """KL(teacher || student) of the rows of `relation`, mean over relation heads, mean over tokens.

    Source: MiniLMv2 (Wang et al. 2021), equations 3 to 5, for one kind of vectors; the paper adds those of queries, keys and values.

    Args:
        student: Shape (batch, length, width) or (batch, attention heads, length, features), float; computed in float32.
        teacher: The same, with a width and attention heads of its own; gets no gradient.
        relation_heads: A divisor of both widths.
        mask: True where a token counts, shape (batch, length).
        count: See `mean_over_items`; items are tokens.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ValueError: One of the widths cannot be split.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 4), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> loss = relation_divergence(student, teacher, relation_heads=2)
        >>> p = torch.tensor([1.0, 0.0]).softmax(-1)  # the first token of the first head; the other three rows are even
        >>> round(loss.item(), 6) == round(((p * (2 * p).log()).sum() / 4).item(), 6)
        True
    """
    parts = (_relation_parts(vectors, relation_heads) for vectors in (student, teacher))
    ours, theirs = comparable(*parts, mask=None if mask is None else mask.unsqueeze(1))
    values = _RelationDivergence.apply(ours, theirs, mask).mean(1)
    return mean_over_items(values, mask=mask, count=count)


def _relation_parts(vectors: torch.Tensor, heads: int) -> torch.Tensor:
    """Vectors split into relation heads, shape (batch, heads, length, features)."""
    width = vectors.shape[-1] * (vectors.shape[1] if vectors.dim() == 4 else 1)
    if heads < 1 or width % heads:
        raise ValueError(
            f"a width of {width} cannot be split into {heads} relation heads; take a number that divides both models' widths"
        )
    if vectors.dim() == 3 or vectors.shape[1] != heads:
        if vectors.dim() == 4:
            vectors = vectors.transpose(1, 2).flatten(2)
        vectors = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
    return vectors


def _log_relation(parts: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logarithms of `relation`, transposed: the relations of a token stand in a column.

    The products of tokens are the same both ways round, and a softmax over columns is as fast for sentences of a few tokens as for long
    ones; over rows shorter than a vector register it is not.
    """
    with exactly(parts):
        scores = parts @ parts.mT
    scores *= parts.shape[-1] ** -0.5
    if mask is not None:
        padding = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        scores += padding[:, None, :, None]
    return scores.log_softmax(-2)


class _RelationDivergence(torch.autograd.Function):
    """KL(teacher || student) of the relations of each token; the gradient of both softmaxes and products in one."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        ours, theirs = _log_relation(student, mask), _log_relation(teacher, mask)
        probabilities = theirs.exp()
        divergence = (probabilities * theirs.sub_(ours)).sum(-2)
        ctx.save_for_backward(student, ours.exp_().sub_(probabilities))
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student, difference = ctx.saved_tensors
        scores = difference * (gradient * student.shape[-1] ** -0.5).unsqueeze(-2)
        with exactly(scores):
            return (scores + scores.mT) @ student, None, None
