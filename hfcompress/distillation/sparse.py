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
    """KL(teacher || student) of the likeliest teacher that what was kept allows: mean over items.

    Of the teacher are known its k likeliest classes, the mass of all others, and that none of the others is likelier than the k-th. Of all
    distributions p for which that holds, the one nearest to the student counts: in the tail p_i = min(c q_i, p_k), with the c that gives the
    tail its mass. So the value is at most the divergence over all classes, and at least sum_i p_i ln(p_i / q_i) + p_rest ln(p_rest / q_rest),
    where the others are one class; where no p_k bounds, it is just that. The gradient by the logits is q - p: what the student thinks too
    likely in the tail is pushed down. Leaving the tail out instead would have the student put all of its mass on the k classes (Anshumann
    et al. 2025, section 3). At most k classes of the tail are held at p_k. The temperature is 1: the tail cannot be softened without
    knowing it.

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
        >>> student = torch.tensor([[0.6, 0.1, 0.2, 0.1]]).log()  # the others share 0.4, and no one has more than 0.2
        >>> top, rest = torch.tensor([[0.4, 0.2]]).log(), torch.tensor([0.4]).log()
        >>> round(top_k_kl_divergence(student, torch.tensor([[2, 3]]), top, rest).item(), 6)
        0.334795
    """
    every, indices = F.log_softmax(student_logits.float(), dim=-1), indices.long()
    student, teacher = every.gather(-1, indices), log_probs.detach().float()
    if indices.shape[-1] < every.shape[-1]:
        tail, mass = every.scatter(-1, indices, -torch.inf), tail_log_mass.detach().float().exp().unsqueeze(-1)
        bound = teacher.amin(-1, keepdim=True)
        more, held = _held_at_bound(tail.detach(), mass, bound.exp(), at_most=indices.shape[-1])
        likely = every.gather(-1, more)
        # In place, for this is as large as all logits; what is not held stays in the rest, and counts for nothing beside it.
        rest = tail.scatter_(-1, more, likely.masked_fill(held, -torch.inf)).logsumexp(-1, keepdim=True)
        left = mass - held.sum(-1, keepdim=True) * bound.exp()
        student = torch.cat([student, likely, rest], dim=-1)
        teacher = torch.cat([teacher, bound.where(held, -torch.inf), left.clamp_min(0.0).log()], dim=-1)
    teacher = F.log_softmax(teacher, dim=-1)  # rounding to 16 bits moved the sum
    terms = teacher.exp() * (teacher - student)
    return mean_over_items(terms.masked_fill(teacher == -torch.inf, 0.0).sum(-1), mask=mask, count=count)


def _held_at_bound(
    tail: torch.Tensor, mass: torch.Tensor, bound: torch.Tensor, *, at_most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's likeliest classes of the tail, and for which of them min(c q, bound) is the bound; both (..., classes looked at)."""
    count = min(at_most, tail.shape[-1] - at_most)
    largest, classes = tail.topk(count, dim=-1)
    largest = largest.exp()
    before = largest.cumsum(-1) - largest
    number = torch.arange(count, device=tail.device)
    # With the likelier ones held, would the same factor for all others put this one over the bound? And is there mass for one more?
    q_left = (tail.exp().sum(-1, keepdim=True) - before).clamp_min(0.0)
    over = ((mass - number * bound) * largest > bound * q_left) & (mass > (number + 1) * bound)
    return classes, over.long().cumprod(-1).bool()


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
