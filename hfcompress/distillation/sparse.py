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
    tail_indices: torch.Tensor,
    tail_mean_log_prob: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """KL(teacher || student) from the likeliest classes and some draws of the others: mean over items.

    sum_i p_i ln(p_i / q_i) over the k likeliest classes, and m (mean of ln p in the tail - (1/n) sum_j ln q(draw j)) for the tail of mass m,
    whose classes are drawn with probabilities p_i / m. Over the draws its mean is the divergence over all classes; and that of its gradient
    by the logits is q - p. Leaving the tail out instead would have the student put all of its mass on the k classes (Anshumann et al. 2025,
    "Sparse Logit Sampling", section 3), and taking it for one class would leave it the shape that the student gives it. Drawing in the tail
    only, the noise is small: with k = 0 it is `sampled_kl_divergence`. The temperature is 1: the tail cannot be softened without knowing it.

    Args:
        student_logits: Shape (..., classes), float; computed in float32.
        indices: The teacher's k likeliest classes, each once, shape (..., k), any integer type.
        log_probs: Logarithms of their probabilities, the same shape.
        tail_log_mass: Logarithm of what is left to the others, shape (...). Teacher and tail need not sum to exactly 1.
        tail_indices: Draws of the others with replacement, shape (..., n), any integer type; passed over where nothing is left to them.
        tail_mean_log_prob: Mean of the logarithms of the others' probabilities, each counted by its probability, shape (...).
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32; for some draws a little below 0.

    Example:
        >>> student = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
        >>> top, rest = torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log()
        >>> draws, mean = torch.tensor([[1, 3]]), torch.tensor([0.25]).log()
        >>> round(top_k_kl_divergence(student, torch.tensor([[2]]), top, rest, draws, mean).item(), 6)  # 0.5 ln 2 + 0.5 ln 1
        0.346574
    """
    every = F.log_softmax(student_logits.float(), dim=-1)
    teacher, mass = log_probs.detach().float(), tail_log_mass.detach().float().exp()
    total = (teacher.exp().sum(-1) + mass).log()  # 0 but for rounding to 16 bits
    top = (teacher - total.unsqueeze(-1)).exp() * (teacher - total.unsqueeze(-1) - every.gather(-1, indices.long()))
    drawn = every.gather(-1, tail_indices.long()).mean(-1)
    tail = (mass.log() - total).exp() * (tail_mean_log_prob.detach().float() - total - drawn)
    values = top.masked_fill(teacher == -torch.inf, 0.0).sum(-1) + tail.masked_fill(mass == 0, 0.0)
    return mean_over_items(values, mask=mask, count=count)


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
