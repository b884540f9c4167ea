"""Losses between vectors: hidden states of tokens, and one embedding per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from hfcompress.distillation.losses import comparable, exactly, mean_by_item, mean_over_items

Pooling = Literal["mean", "cls", "last"]


def unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length one in the same directions. A vector of zeros stays as it is and gets no gradient.

    Args:
        vectors: Shape (..., features), float32 or float64, of any size: squares neither overflow nor vanish.

    Example:
        >>> unit_vectors(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    scale = vectors.detach().abs().amax(-1, keepdim=True)
    vectors = vectors / scale.masked_fill(scale == 0, torch.inf)
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, torch.inf)


# ---- vector by vector ----


def mean_squared_error(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean over features of the squared difference, mean over items.

    For hidden states: TinyBERT (Jiao et al. 2020), equation 9, with the student already projected to the teacher's width.
    For logits: Kim et al. 2021, where it is the sum over classes.

    Args:
        student: Shape (..., features), float; computed in float32.
        teacher: The same shape; gets no gradient.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0.

    Example:
        >>> mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        2.5
    """

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (ours - theirs).square().mean(-1)

    def gradient(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (ours - theirs).mul_(2 / ours.shape[-1])

    return mean_by_item(by_item, student, teacher, gradient=gradient, mask=mask, count=count)


def cosine_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """1 - cos(student, teacher), mean over items.

    Source: DistilBERT (Sanh et al. 2019), section 3, the cosine embedding loss of hidden states. Computed as half the
    squared distance of the two directions, which is the same number and exactly 0 at equality.

    Args:
        student: Shape (..., features), float; computed in float32. Zeros have no direction, and get no gradient.
        teacher: The same shape; gets no gradient.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, in [0, 2].

    Example:
        >>> round(cosine_distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])).item(), 6)  # 1 - 3/5
        0.4
    """

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (unit_vectors(ours) - unit_vectors(theirs)).square().sum(-1) / 2

    return mean_by_item(by_item, student, teacher, mask=mask, count=count)


def patient_error(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """`mean_squared_error` of vectors scaled to length one, mean over items.

    Source: Patient Knowledge Distillation (Sun et al. 2019), equation 7: there the items are the [CLS] tokens, here all that count,
    and features are averaged, not summed. It is the cosine distance times 2 / features.

    Args:
        student: Shape (..., features), float; computed in float32.
        teacher: The same shape; gets no gradient.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, in [0, 4 / features].

    Example:
        >>> loss = patient_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
        >>> round(loss.item(), 6)  # ((0.6 - 1)^2 + 0.8^2) / 2
        0.4
    """

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (unit_vectors(ours) - unit_vectors(theirs)).square().mean(-1)

    return mean_by_item(by_item, student, teacher, mask=mask, count=count)


# ---- within a batch ----


def similarity_preserving(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Examples that are alike for the teacher are to be alike for the student: ||G_teacher - G_student||^2 / batch^2.

    G is the batch's Gram matrix Q Q^T with each row scaled to length one; only the batch at hand is compared. Where `count` is
    given, the value counts in proportion to the batch's share of the examples.

    Source: Tung and Mori 2019, section 3.

    Args:
        student: Shape (batch, features), float; computed in float32.
        teacher: Shape (batch, features of its own); gets no gradient.
        mask: True where an example counts, shape (batch,).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, in [0, 4 / batch].

    Example:
        >>> student, teacher = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> loss = similarity_preserving(student, teacher)
        >>> round(loss.item(), 6)  # rows (h, h) and (h, h) against (1, 0) and (0, 1), h = sqrt(1/2): (2 h^2 + 2 (1 - h)^2) / 4
        0.292893
    """
    ours, theirs = comparable(student, teacher, mask=mask)
    with exactly(ours):
        # The scale of all vectors together falls out of the rows; divided by it, products do not overflow.
        grams = [
            x @ x.mT for x in (x / x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny) for x in (ours, theirs))
        ]
    difference = (unit_vectors(grams[0]) - unit_vectors(grams[1])).square().sum()
    examples = ours.shape[0] if mask is None else mask.sum().clamp(min=1)
    return mean_over_items((difference / examples**2).expand(ours.shape[0]), mask=mask, count=count)


def contrastive(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 0.05,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """-log of the softmax, over the batch's teacher vectors j, of cos(student_i, teacher_j) / temperature at j = i; mean over i.

    InfoNCE (van den Oord et al. 2018, equation 4): the teacher's vector of the same example is the positive, those of the other
    examples of the batch at hand are the negatives. Contrastive Representation Distillation (Tian et al. 2020) has the same aim, but
    another estimator: noise-contrastive estimation with negatives from a memory of the whole data set. The minimum is not 0,
    nor exactly at equality, as long as the teacher's own vectors are alike.

    Args:
        student: Shape (batch, features), float; computed in float32.
        teacher: The same shape; gets no gradient.
        temperature: Above 0.
        mask: True where an example counts, as positive and as negative, shape (batch,).
        count: See `mean_over_items`; the negatives are those of this batch all the same.

    Returns:
        Scalar, float32, in [0, log(batch) + 2 / temperature].

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(contrastive(vectors, vectors, temperature=1.0).item(), 6)  # log(1 + 1/e)
        0.313262
    """
    ours, theirs = comparable(student, teacher, mask=mask)
    with exactly(ours):
        similarity = unit_vectors(ours) @ unit_vectors(theirs).mT / temperature
    if mask is not None:
        similarity = similarity.masked_fill(~mask, torch.finfo(similarity.dtype).min)
    positives = torch.arange(ours.shape[0], device=ours.device)
    return mean_over_items(F.cross_entropy(similarity, positives, reduction="none"), mask=mask, count=count)


# ---- one vector per example ----


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *, how: Pooling = "mean") -> torch.Tensor:
    """One vector per example from the hidden states of its tokens, wherever the padding is.

    Args:
        hidden: Shape (batch, length, features), float.
        attention_mask: Not 0 where there is a token, shape (batch, length); None means everywhere.
        how: "mean" of the tokens, the first ("cls"), or the "last" of them. An example without tokens gives zeros as its mean.

    Returns:
        Shape (batch, features): for "mean" float32 (float64 where `hidden` is), otherwise of the dtype of `hidden`.

    Example:
        >>> hidden = torch.tensor([[[9.0], [1.0], [3.0]]])
        >>> [pool(hidden, torch.tensor([[0, 1, 1]]), how=how).item() for how in ("mean", "cls", "last")]
        [2.0, 1.0, 3.0]
    """
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    tokens = attention_mask != 0
    if how == "mean":
        hidden, _ = comparable(hidden, hidden, mask=tokens)
        return hidden.sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    if how == "cls":
        chosen = places.masked_fill(~tokens, hidden.shape[1] - 1).amin(1)
    else:
        chosen = places.masked_fill(~tokens, 0).amax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]


HIDDEN_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
    "patient": patient_error,
}
"""Name to loss of vectors, one per item: (student, teacher, *, mask, count), shape (..., features)."""

EMBEDDING_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cosine": cosine_distance,
    "mse": mean_squared_error,
    "similarity": similarity_preserving,
    "contrastive": contrastive,
}
"""Name to loss of vectors, one per example: shape (batch, features). The last two compare within the batch at hand."""
