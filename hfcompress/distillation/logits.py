"""Losses between predictions: the student's logits and the teacher's, over classes or over a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hfcompress.distillation.features import cosine_distance, mean_squared_error, unit_vectors
from hfcompress.distillation.losses import comparable, mean_by_item, mean_over_items


@dataclass(frozen=True)
class LogitLoss:
    """A loss on logits.

    Attributes:
        function: (student, teacher, *, mask, count), both of shape (..., classes).
        temperature: Whether it takes a temperature.
        itemwise: Whether it is a mean over items, hence the same however the items of a step are split into batches. Otherwise it
            compares items of the batch at hand with each other.
        labels: Whether it takes the true classes.
    """

    function: Callable[..., torch.Tensor]
    temperature: bool = False
    itemwise: bool = True
    labels: bool = False


# ---- divergences ----


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
        student_logits: Shape (..., classes), float; computed in float32, a block of items at a time.
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

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = ((x / temperature).log_softmax(-1) for x in (ours, theirs))
        return _kl(theirs, ours) * temperature**2

    def gradient(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (ours / temperature).softmax(-1).sub_((theirs / temperature).softmax(-1)).mul_(temperature)

    return mean_by_item(by_item, student_logits, teacher_logits, gradient=gradient, mask=mask, count=count)


def reverse_kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """T^2 KL(softmax(student / T) || softmax(teacher / T)), mean over items: the student seeks the teacher's modes.

    Source: MiniLLM (Gu et al. 2024), section 2.1, but token by token on whatever text is given; the factor T^2 as in `kl_divergence`.

    Args:
        student_logits: Shape (..., classes), float; computed in float32, a block of items at a time.
        teacher_logits: The same shape; gets no gradient.
        temperature: T, above 0.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986122886681098]])
        >>> round(reverse_kl_divergence(student, teacher).item(), 6)  # 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75)
        0.143841
    """

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = ((x / temperature).log_softmax(-1) for x in (ours, theirs))
        return _kl(ours, theirs) * temperature**2

    return mean_by_item(by_item, student_logits, teacher_logits, mask=mask, count=count)


def jensen_shannon_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """T^2 (beta KL(P || M) + (1 - beta) KL(Q || M)) with teacher P, student Q and M = beta P + (1 - beta) Q, mean over items.

    Its gradients go from those of the forward to those of the reverse divergence: divided by beta it tends to KL(P || Q) as beta
    tends to 0, divided by 1 - beta to KL(Q || P) as beta tends to 1. At 0 and 1 itself it would be 0 everywhere.

    Source: Agarwal et al. 2024 (generalized knowledge distillation), section 2, JSD(beta); the factor T^2 as in `kl_divergence`.

    Args:
        student_logits: Shape (..., classes), float; computed in float32, a block of items at a time.
        teacher_logits: The same shape; gets no gradient.
        beta: The teacher's share of the mixture, in (0, 1).
        temperature: T, above 0.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0; with T = 1 at most the entropy of (beta, 1 - beta), ln 2 for one half.

    Raises:
        ValueError: beta is not in (0, 1).

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986122886681098]])
        >>> loss = jensen_shannon_divergence(student, teacher)  # M = (3/8, 5/8)
        >>> round(loss.item(), 6)  # (1/4 ln 2/3 + 3/4 ln 6/5 + 1/2 ln 4/3 + 1/2 ln 4/5) / 2
        0.033822
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta of the Jensen-Shannon divergence is a share in (0, 1), not {beta}; take kl_divergence instead of 0 and "
            "reverse_kl_divergence instead of 1"
        )
    shares = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = ((x / temperature).log_softmax(-1) for x in (ours, theirs))
        mixture = torch.logaddexp(theirs + shares[0], ours + shares[1])
        return (beta * _kl(theirs, mixture) + (1 - beta) * _kl(ours, mixture)) * temperature**2

    return mean_by_item(by_item, student_logits, teacher_logits, mask=mask, count=count)


def total_variation(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Half the sum of |softmax(teacher) - softmax(student)|, mean over items.

    Source: f-divergence minimization for sequence-level distillation (Wen et al. 2023), the total variation distance, step by step.

    Args:
        student_logits: Shape (..., classes), float; computed in float32, a block of items at a time.
        teacher_logits: The same shape; gets no gradient.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, in [0, 1].

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986122886681098]])
        >>> round(total_variation(student, teacher).item(), 6)  # (|0.25 - 0.5| + |0.75 - 0.5|) / 2
        0.25
    """

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (ours.softmax(-1) - theirs.softmax(-1)).abs().sum(-1) / 2

    return mean_by_item(by_item, student_logits, teacher_logits, mask=mask, count=count)


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

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = (
            torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], dim=-1) for x in (ours / temperature, theirs / temperature)
        )
        return _kl(theirs, ours).mean(-1) * temperature**2

    return mean_by_item(by_item, student_logits, teacher_logits, mask=mask, count=count)


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first || second) of log-probabilities, over the last dimension."""
    return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)


# ---- with a target class ----


def hard_label_cross_entropy(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Cross entropy of the student with the class that the teacher finds likeliest, mean over items.

    Source: DeiT (Touvron et al. 2021), equation 3, the teacher's half.

    Args:
        student_logits: Shape (..., classes), float; computed in float32, a block of items at a time.
        teacher_logits: The same shape; gets no gradient.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0. It is not 0 where the student equals a teacher that is in doubt.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 1.0986122886681098]]), torch.tensor([[2.0, 1.0]])
        >>> round(hard_label_cross_entropy(student, teacher).item(), 6)  # -ln(1/4)
        1.386294
    """

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(ours, theirs.argmax(-1), reduction="none")

    return mean_by_item(by_item, student_logits, teacher_logits, mask=mask, count=count)


def decoupled_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """T^2 (alpha TCKD + beta NCKD), mean over items: the target class against the rest, and the rest among themselves.

    TCKD is the divergence of (p, 1 - p) with p the probability of the target; NCKD that of the distributions over the other classes.
    `kl_divergence` is alpha = 1 with beta = 1 - p of the teacher, which drops what a sure teacher knows of the other classes.

    Source: Zhao et al. 2022 (decoupled knowledge distillation), equation 7.

    Args:
        student_logits: Shape (..., classes), float, at least 2 classes; computed in float32, a block of items at a time.
        teacher_logits: The same shape; gets no gradient.
        labels: The target classes, whole numbers, shape (...); items with a label below 0 do not count. None means the classes
            that the teacher finds likeliest.
        alpha: Weight of TCKD, at least 0.
        beta: Weight of NCKD, at least 0.
        temperature: T, above 0.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, at least 0.

    Example:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 3.0, 1.0]]).log()
        >>> loss = decoupled_divergence(student, teacher, labels=torch.tensor([1]), beta=2.0)
        >>> round(loss.item(), 6)  # (1/2, 1/2) against (1/3, 2/3), and twice (2/3, 1/3) against (1/2, 1/2)
        0.172158
    """
    if labels is not None:
        mask = labels >= 0 if mask is None else mask & (labels >= 0)

    def by_item(ours: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        target = (theirs.argmax(-1) if targets is None else targets.clamp(min=0)).unsqueeze(-1)
        others = torch.arange(ours.shape[-1] - 1, device=ours.device)
        others = others + (others >= target)
        pairs, rests = [], []
        for logits in (ours / temperature, theirs / temperature):
            rest = logits.gather(-1, others)
            rests.append(rest.log_softmax(-1))
            pair = torch.cat([logits.gather(-1, target), rest.logsumexp(-1, keepdim=True)], dim=-1)
            pairs.append(pair.log_softmax(-1))
        return (alpha * _kl(pairs[1], pairs[0]) + beta * _kl(rests[1], rests[0])) * temperature**2

    given = () if labels is None else (labels,)
    return mean_by_item(by_item, student_logits, teacher_logits, *given, mask=mask, count=count)


# ---- correlations ----


def correlation_distance(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """T^2 (beta inter + gamma intra): one minus Pearson's correlation of probabilities, which may differ in scale and shift.

    inter correlates the classes of each item, mean over items. intra correlates the items of each class, mean over classes: it sees
    the batch at hand only, so it is not the same when a batch is split. Where `count` is given, it counts in proportion to
    the batch's share of the items. All items are looked at together, so memory is a few float32 copies of the logits.

    Source: DIST (Huang et al. 2022), section 4; the factor T^2 is in the authors' code.

    Args:
        student_logits: Shape (..., classes), float; computed in float32.
        teacher_logits: The same shape; gets no gradient.
        beta: Weight of inter, at least 0.
        gamma: Weight of intra, at least 0.
        temperature: T, above 0.
        mask: True where an item counts, shape (...).
        count: See `mean_over_items`.

    Returns:
        Scalar, float32, in [0, 2 T^2 (beta + gamma)].

    Example:
        >>> student, teacher = torch.tensor([[2.0, 3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0, 2.0]]).log()
        >>> round(correlation_distance(student, teacher).item(), 6)  # (0, 1, -1) against (-1, 1, 0): 1 - 1/2; one item has no intra
        0.5
    """
    ours, theirs = comparable(student_logits, teacher_logits, mask=mask)
    ours, theirs = ((x / temperature).softmax(-1).flatten(0, -2) for x in (ours, theirs))
    mask = torch.ones_like(ours[:, 0], dtype=torch.bool) if mask is None else mask.flatten()
    inter = _one_less_correlation(ours, theirs, ours.new_ones(ours.shape[-1]))
    intra = _one_less_correlation(ours.mT, theirs.mT, mask.to(ours.dtype)).mean()
    return mean_over_items(beta * inter + gamma * intra, mask=mask, count=count) * temperature**2


def _one_less_correlation(first: torch.Tensor, second: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, where `counts` is 1 (elsewhere 0). Rows that are constant on both sides give 0."""
    return (_deviations(first, counts) - _deviations(second, counts)).square().sum(-1) / 2


def _deviations(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Direction of what is left of each row less its mean, where `counts` is 1; zeros if that is rounding errors only."""
    centred = (x - (x * counts).sum(-1, keepdim=True) / counts.sum().clamp(min=1)) * counts
    spread, size = (each.detach().abs().amax(-1, keepdim=True) for each in (centred, x * counts))
    return unit_vectors(centred.masked_fill(spread <= 8 * torch.finfo(x.dtype).eps * size, 0.0))


# ---- vocabularies that differ ----


def universal_logit_distance(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    student_mask: torch.Tensor | None = None,
    teacher_mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Sum of |p_i - q_i| of the sorted probabilities, mean over positions: for models with different tokenizers.

    It is the Wasserstein distance where moving probability costs the same between any two tokens. The smaller vocabulary is
    filled up with probabilities of 0. Within each example the first position that counts for the student goes with the first that
    counts for the teacher, and so on to the end of the shorter answer.

    Source: ULD (Boizard et al. 2024), section 3.

    Args:
        student_logits: Shape (batch, length, vocabulary), float; computed in float32, a block of positions at a time.
        teacher_logits: Shape (batch, length of its own, vocabulary of its own); gets no gradient.
        student_mask: True where a position belongs to the answer, shape (batch, length).
        teacher_mask: The same for the teacher.
        count: See `mean_over_items`; of the positions of a part there are `count_aligned`.

    Returns:
        Scalar, float32, in [0, 2].

    Example:
        >>> student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 2.0, 1.0], [0.0, 0.0, 9.0]]]).log()
        >>> loss = universal_logit_distance(student, teacher)
        >>> round(loss.item(), 6)  # (1/2, 1/2, 0) against (1/2, 1/4, 1/4)
        0.5
    """
    student_mask, teacher_mask = (
        torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask
        for logits, mask in ((student_logits, student_mask), (teacher_logits, teacher_mask))
    )
    length = min(student_logits.shape[1], teacher_logits.shape[1])
    width = max(student_logits.shape[-1], teacher_logits.shape[-1])

    def by_item(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = (
            F.pad(x.softmax(-1).sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (ours, theirs)
        )
        return (ours - theirs).abs().sum(-1)

    both = torch.arange(length, device=student_mask.device) < _aligned(student_mask, teacher_mask).unsqueeze(-1)
    return mean_by_item(
        by_item,
        _from_the_first(student_logits, student_mask, length=length),
        _from_the_first(teacher_logits, teacher_mask, length=length),
        mask=both,
        count=count,
    )


def count_aligned(student_mask: torch.Tensor, teacher_mask: torch.Tensor) -> torch.Tensor:
    """Number of positions that `universal_logit_distance` compares: of each example those of the shorter answer.

    Args:
        student_mask: True where a position belongs to the answer, shape (batch, length).
        teacher_mask: Shape (batch, length of its own).

    Returns:
        Scalar, int64.

    Example:
        >>> count_aligned(torch.tensor([[True, False], [True, True]]), torch.tensor([[True] * 3] * 2)).item()
        3
    """
    return _aligned(student_mask, teacher_mask).sum()


def _aligned(student_mask: torch.Tensor, teacher_mask: torch.Tensor) -> torch.Tensor:
    return torch.minimum(student_mask.sum(1), teacher_mask.sum(1))


def _from_the_first(logits: torch.Tensor, mask: torch.Tensor, *, length: int) -> torch.Tensor:
    """The positions that count moved to the front, in their order."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :length]
    return logits[torch.arange(logits.shape[0], device=logits.device).unsqueeze(1), order]


# ---- before any of them ----


def standardize(logits: torch.Tensor) -> torch.Tensor:
    """Logits less their mean, divided by their standard deviation, item by item.

    Given the student's and the teacher's, the losses with a temperature compare how classes stand to each other whatever the size of
    the logits; the temperature is then what the paper calls the base temperature.

    Source: Sun et al. 2024 (logit standardization), algorithm 1. The deviation is that of all classes (with 1 / classes).

    Args:
        logits: Shape (..., classes), float.

    Returns:
        The same shape, float32 (float64 where `logits` are). Logits that are all alike give zeros, without gradient.

    Example:
        >>> standardize(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.0000,  1.0000]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _deviations(logits, logits.new_ones(logits.shape[-1])) * logits.shape[-1] ** 0.5


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "kl": LogitLoss(kl_divergence, temperature=True),
    "reverse_kl": LogitLoss(reverse_kl_divergence, temperature=True),
    "jensen_shannon": LogitLoss(jensen_shannon_divergence, temperature=True),
    "total_variation": LogitLoss(total_variation),
    "mse": LogitLoss(mean_squared_error),
    "cosine": LogitLoss(cosine_distance),
    "hard_label": LogitLoss(hard_label_cross_entropy),
    "decoupled": LogitLoss(decoupled_divergence, temperature=True, labels=True),
    "dist": LogitLoss(correlation_distance, temperature=True, itemwise=False),
}
"""Name to loss of two predictions over the same classes. For other vocabularies there is `universal_logit_distance`."""
