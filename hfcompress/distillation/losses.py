"""Distillation losses: student and teacher tensors in, a scalar out. Pure functions.

Each is a sum over items divided by a count. An item is what the loss is averaged over: an example, a token, a
position. `mask` says which items count; `count` replaces their number where the items of one optimizer step are spread over
several batches or processes, so that the sum over the parts equals the loss of the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mean_over_items(
    values: torch.Tensor, *, mask: torch.Tensor | None = None, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Sum of the values that are not masked, divided by their number or by `count`.

    Args:
        values: One value per item, any shape, float.
        mask: True where an item counts, same shape; None means all.
        count: What to divide by; None means the number of items that count here (0 gives 0, not NaN).

    Returns:
        Scalar of the dtype of `values`.

    Example:
        >>> values = torch.tensor([1.0, 3.0, 100.0])
        >>> mean_over_items(values, mask=torch.tensor([True, True, False])).item()
        2.0
    """
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    if count is None:
        count = float(values.numel()) if mask is None else mask.sum()
    if isinstance(count, torch.Tensor):
        return values.sum() / count.clamp(min=1)
    return values.sum() / max(count, 1.0)


def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over items.

    Source: Hinton, Vinyals, Dean 2015, section 2; the factor T^2 keeps the gradients' size independent of T
    (section 2.1). With T = 1 this is the soft-target cross entropy less the teacher's entropy, a constant.

    Args:
        student_logits: Shape (..., classes), float; computed in float32.
        teacher_logits: The same shape; gets no gradient.
        temperature: T, above 0.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986122886681098]])
        >>> round(kl_divergence(student, teacher).item(), 6)  # 0.25 ln(0.25/0.5) + 0.75 ln(0.75/0.5)
        0.130812
    """
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    values = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2
    return mean_over_items(values, mask=mask, count=count)


def binary_kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """`kl_divergence` for independent yes/no labels: mean over labels of the divergence of two-way distributions.

    Args:
        student_logits: Shape (..., labels), float: log-odds of each label.
        teacher_logits: The same shape.
        temperature: T, above 0.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0.

    Example:
        >>> student, teacher = torch.tensor([[0.0]]), torch.tensor([[1.0986122886681098]])
        >>> round(binary_kl_divergence(student, teacher).item(), 6)
        0.130812
    """

    def two_way(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float() / temperature
        return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)

    values = F.kl_div(two_way(student_logits), two_way(teacher_logits.detach()), reduction="none", log_target=True)
    return mean_over_items(values.sum(-1).mean(-1) * temperature**2, mask=mask, count=count)


def mean_squared_error(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean over features of the squared difference, mean over items.

    For hidden states: TinyBERT (Jiao et al. 2020), equation 9, with the student already projected to the teacher's width.

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
    values = (student.float() - teacher.detach().float()).square().mean(-1)
    return mean_over_items(values, mask=mask, count=count)
