"""Distillation from a few classes of the teacher's distribution: what a cache keeps where there are too many classes for all.

As in `losses`, each is a mean over items, with `mask` and `count`. The temperature is 1: that of what was kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hfcompress.distillation.losses import mean_over_items


def top_k_kl_divergence(
    student_logits: torch.Tensor,
    indices: torch.Tensor,
    log_probs: torch.Tensor,
    tail_log_mass: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """KL(teacher || student) where all classes but the k likeliest are one: mean over items.

    sum_i p_i ln(p_i / q_i) + p_rest ln(p_rest / q_rest) over the k classes and the rest. It is at most the divergence over all classes and
    differs from it by p_rest times the divergence within the rest. Leaving the rest out instead would have the student put all of its mass
    on the k classes (Anshumann et al. 2025, section 3). The temperature is 1: the rest cannot be softened without knowing it.

    Args:
        student_logits: Shape (..., classes), float; computed in float32.
        indices: The teacher's k likeliest classes, each once, shape (..., k), any integer type.
        log_probs: Logarithms of their probabilities, the same shape.
        tail_log_mass: Logarithm of what is left to the others, shape (...); passed over where k is all classes. Teacher and tail
            need not sum to exactly 1.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0.

    Example:
        >>> student = torch.zeros(1, 4)
        >>> top, rest = torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log()
        >>> round(top_k_kl_divergence(student, torch.tensor([[2]]), top, rest).item(), 6)  # 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75)
        0.143841
    """
    every, indices = F.log_softmax(student_logits.float(), dim=-1), indices.long()
    student, teacher = every.gather(-1, indices), log_probs.detach().float()
    if indices.shape[-1] < every.shape[-1]:
        rest = every.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        student = torch.cat([student, rest], dim=-1)
        teacher = torch.cat([teacher, tail_log_mass.detach().float().unsqueeze(-1)], dim=-1)
    teacher = F.log_softmax(teacher, dim=-1)  # rounding to 16 bits moved the sum
    terms = teacher.exp() * (teacher - student)
    return mean_over_items(terms.masked_fill(teacher == -torch.inf, 0.0).sum(-1), mask=mask, count=count)


def sampled_kl_divergence(
    student_logits: torch.Tensor,
    sample_indices: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Cross entropy to the frequencies of classes drawn from the teacher: mean over items.

    -(1/n) sum_j ln q(class of draw j). Its gradient, softmax(student) less the frequencies, is that of KL(teacher || student) in
    expectation, for the frequencies have the teacher's probabilities as their mean (Anshumann et al. 2025, section 4: random sampling
    knowledge distillation at proposal temperature 1). The value is larger than the divergence by the teacher's entropy, also in
    expectation. The temperature is 1.

    Args:
        student_logits: Shape (..., classes), float; computed in float32.
        sample_indices: Draws with replacement, shape (..., n), any integer type.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0.

    Example:
        >>> student = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> round(sampled_kl_divergence(student, torch.tensor([[0, 0, 0, 2]])).item(), 6)  # 0.75 ln 2 + 0.25 ln 4
        0.866434
    """
    log_probs = F.log_softmax(student_logits.float(), dim=-1)
    values = -log_probs.gather(-1, sample_indices.long()).mean(-1)
    return mean_over_items(values, mask=mask, count=count)
