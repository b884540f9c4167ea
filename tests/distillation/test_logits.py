"""Losses on logits: by hand, against other functions of torch, and what the papers say of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance
from torch import nn

from hfcompress.distillation import (
    binary_kl_divergence,
    correlation_distance,
    count_aligned,
    decoupled_divergence,
    hard_label_cross_entropy,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    reverse_kl_divergence,
    standardize,
    total_variation,
    universal_logit_distance,
)
from tests.distillation.cases import np_decoupled

EVEN, QUARTER = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])  # (1/2, 1/2) and (1/4, 3/4)
DIVERGENCES = (kl_divergence, reverse_kl_divergence, jensen_shannon_divergence, decoupled_divergence)


def tensors(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2, torch.randn(*shape, generator=generator) * 2


# ---- by hand ----


def test_kl_by_hand() -> None:
    # KL = 1/4 ln 1/2 + 3/4 ln 3/2 = 3/4 ln 3 - ln 2, and with T = 2 it is multiplied by 4.
    for temperature in (1.0, 2.0):
        loss = kl_divergence(EVEN, temperature * QUARTER, temperature=temperature)
        assert loss.item() == pytest.approx(temperature**2 * (0.75 * math.log(3) - math.log(2)), rel=3e-6)


def test_the_others_by_hand() -> None:
    reverse = math.log(2) - 0.5 * math.log(3)  # 1/2 ln 2 + 1/2 ln 2/3
    assert reverse_kl_divergence(EVEN, QUARTER).item() == pytest.approx(reverse, rel=1e-6)
    assert reverse_kl_divergence(EVEN, 3 * QUARTER, temperature=3.0).item() == pytest.approx(9 * reverse, rel=1e-6)
    assert total_variation(EVEN, QUARTER).item() == pytest.approx(0.25)
    assert hard_label_cross_entropy(QUARTER, -QUARTER).item() == pytest.approx(math.log(4), rel=1e-6)
    # M = 1/4 (1/4, 3/4) + 3/4 (1/2, 1/2) = (7/16, 9/16)
    expected = (math.log(4 / 7) / 4 + 3 * math.log(12 / 9) / 4) / 4 + 3 * (math.log(8 / 7) + math.log(8 / 9)) / 8
    assert jensen_shannon_divergence(EVEN, QUARTER, beta=0.25).item() == pytest.approx(expected, rel=1e-5)


def test_binary_by_hand() -> None:
    # sigmoid(ln 3) = 3/4 against 1/2 for the first label, equal for the second; mean over the two labels.
    loss = binary_kl_divergence(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]))
    assert loss.item() == pytest.approx((0.75 * math.log(3) - math.log(2)) / 2, rel=1e-6)


# ---- against torch ----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 7)])
def test_kl_and_its_gradient_are_those_of_cross_entropy(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = tensors(*shape)
    p = (teacher / temperature).softmax(-1).flatten(0, -2)
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    kl_divergence(ours, teacher, temperature=temperature).backward()
    plain = temperature**2 * nn.CrossEntropyLoss()((theirs / temperature).flatten(0, -2), p)
    plain.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    entropy = temperature**2 * torch.distributions.Categorical(probs=p).entropy().mean()
    assert kl_divergence(student, teacher, temperature=temperature).item() == pytest.approx(
        (plain - entropy).item(), rel=1e-5
    )


def test_binary_is_binary_cross_entropy_less_entropy() -> None:
    student, teacher = tensors(2, 4, 7)
    p = (teacher / 3).sigmoid()
    expected = nn.BCEWithLogitsLoss()(student / 3, p) - torch.distributions.Bernoulli(probs=p).entropy().mean()
    loss = binary_kl_divergence(student, teacher, temperature=3.0)
    assert loss.item() == pytest.approx(9 * expected.item(), rel=1e-5)


def test_squared_error_is_that_of_torch() -> None:
    student, teacher = tensors(2, 4, 7)
    assert mean_squared_error(student, teacher).item() == pytest.approx(nn.MSELoss()(student, teacher).item(), rel=1e-6)


def test_jensen_shannon_is_that_of_scipy() -> None:
    student, teacher = tensors(30, 5)
    distances = jensenshannon(student.double().softmax(-1), teacher.double().softmax(-1), axis=-1)
    assert jensen_shannon_divergence(student, teacher).item() == pytest.approx((distances**2).mean(), rel=1e-5)


# ---- what is known of them ----


def test_the_factor_keeps_the_gradient_independent_of_the_temperature() -> None:
    # Hinton et al. 2015, equation 4: for a high temperature the gradient tends to (student - teacher) / classes.
    student, teacher = tensors(1, 5)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    for loss in (kl_divergence, reverse_kl_divergence):
        variable = student.clone().requires_grad_()
        loss(variable, teacher, temperature=1000.0).backward()
        torch.testing.assert_close(variable.grad, (student - teacher) / 5, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("loss", [*DIVERGENCES, total_variation, hard_label_cross_entropy, correlation_distance])
def test_a_constant_added_to_all_logits_changes_nothing(loss) -> None:
    student, teacher = tensors(4, 5)
    assert loss(student + 3.0, teacher - 2.0).item() == pytest.approx(loss(student, teacher).item(), rel=1e-5)


def test_jensen_shannon_goes_from_the_forward_to_the_reverse_divergence() -> None:
    student, teacher = (x.double() for x in tensors(4, 5))
    for beta, scale, limit in ((1e-6, 1e6, kl_divergence), (1 - 1e-6, 1e6, reverse_kl_divergence)):
        loss = jensen_shannon_divergence(student, teacher, beta=beta).item()
        assert scale * loss == pytest.approx(limit(student, teacher).item(), rel=1e-3)
    half = jensen_shannon_divergence(student, teacher).item()
    assert half == pytest.approx(jensen_shannon_divergence(teacher, student).item(), rel=1e-10)
    assert jensen_shannon_divergence(100 * student, -100 * student).item() == pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 2.0])
def test_a_share_outside_of_0_to_1_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"\(0, 1\), not {beta}") as caught:
        jensen_shannon_divergence(EVEN, QUARTER, beta=beta)
    assert "\n" not in str(caught.value)


def test_decoupled_with_the_right_weight_is_the_divergence_itself() -> None:
    # Zhao et al. 2022, equation 5: KL = TCKD + (1 - p of the target) NCKD, for each item.
    for seed in range(10):
        student, teacher = (x.double() for x in tensors(1, 6, seed=seed))
        label = torch.tensor([seed % 6])
        rest = 1 - (teacher / 2).softmax(-1)[0, seed % 6].item()
        loss = decoupled_divergence(student, teacher, labels=label, beta=rest, temperature=2.0)
        assert loss.item() == pytest.approx(kl_divergence(student, teacher, temperature=2.0).item(), rel=1e-10)


def test_decoupled_with_labels() -> None:
    student, teacher = (x.double() for x in tensors(3, 4, 5))
    labels = torch.arange(12).view(3, 4) * 7 % 5
    assert not torch.equal(labels, teacher.argmax(-1))
    knobs = {"alpha": 0.5, "beta": 3.0, "temperature": 2.0}
    expected = np_decoupled(student.numpy(), teacher.numpy(), None, labels=labels.numpy())
    assert decoupled_divergence(student, teacher, labels=labels, **knobs).item() == pytest.approx(expected.mean())
    same = decoupled_divergence(student, teacher, labels=teacher.argmax(-1), **knobs)
    assert same.item() == decoupled_divergence(student, teacher, **knobs).item()
    ignored = torch.arange(12).view(3, 4) % 3 == 1
    mask = torch.arange(12).view(3, 4) < 9
    for given, counting in ((None, ~ignored), (mask, mask & ~ignored)):
        loss = decoupled_divergence(student, teacher, labels=labels.masked_fill(ignored, -100), mask=given, **knobs)
        assert loss.item() == pytest.approx(expected[counting.numpy()].mean())
    assert torch.autograd.gradcheck(
        lambda variable: decoupled_divergence(variable, teacher, labels=labels), student.requires_grad_()
    )


def test_two_classes_have_nothing_to_decouple() -> None:
    student, teacher = tensors(4, 2)
    assert decoupled_divergence(student, teacher).item() == pytest.approx(
        kl_divergence(student, teacher).item(), rel=1e-5
    )


def test_correlation_is_blind_to_scale_and_shift_of_probabilities() -> None:
    teacher = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.5, 0.2], [0.6, 0.3, 0.1]])
    student = 0.25 * teacher + 0.25  # adds up to one again
    assert correlation_distance(student.log(), teacher.log()).item() == pytest.approx(0.0, abs=1e-6)
    assert kl_divergence(student.log(), teacher.log()).item() > 0.05


def test_correlation_of_probabilities_whose_squares_are_nothing() -> None:
    # In float32 squares of 1e-25 vanish; correlations do not.
    small = torch.tensor([[0.0, -57.0, -58.0], [0.0, -58.0, -56.0], [0.0, -56.0, -57.5]])
    other = torch.tensor([[0.0, -57.0, -56.0], [0.0, -58.0, -57.0], [0.0, -56.5, -57.5]])
    p, q = (x.double().softmax(-1).numpy() for x in (small, other))
    loss = correlation_distance(other, small, beta=0.0).item()
    per_class = [1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in (1, 2)]
    assert loss == pytest.approx(sum(per_class) / 3, rel=1e-4)  # the first class is 1 everywhere, on both sides


def test_equal_items_have_no_correlation_and_no_gradient() -> None:
    student = torch.tensor([[0.1, 0.2, 0.3]]).repeat(7, 1).requires_grad_()
    loss = correlation_distance(student, student.detach() * 2, beta=0.0)
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().max().item() == 0.0


# ---- extremes ----


def test_extreme_logits_have_the_right_value() -> None:
    # The teacher is sure of class 1, the student of class 0 by a margin of 2e4: KL = 2e4 at T = 1.
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert kl_divergence(student, teacher).item() == pytest.approx(2e4)
    assert reverse_kl_divergence(student, teacher).item() == pytest.approx(2e4)
    assert jensen_shannon_divergence(student, teacher).item() == pytest.approx(math.log(2))
    assert total_variation(student, teacher).item() == pytest.approx(1.0)
    assert decoupled_divergence(student, teacher).item() == pytest.approx(2e4)
    assert binary_kl_divergence(student[:, 1:], teacher[:, 1:]).item() == pytest.approx(1e4)
    assert standardize(student).tolist() == [[pytest.approx(1.0), pytest.approx(-1.0)]]


# ---- standardize ----


def test_standardize() -> None:
    logits, _ = tensors(3, 4, 6)
    expected = F.layer_norm(logits.double(), (6,), eps=0.0)
    torch.testing.assert_close(standardize(logits).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(standardize(5 * logits + 3).double(), expected, rtol=1e-5, atol=1e-5)
    assert standardize(logits.bfloat16()).dtype == torch.float32 and standardize(logits.double()).dtype == torch.float64


def test_standardizing_what_is_all_alike() -> None:
    for value in (0.0, 0.1, 1e4, 1e30):
        logits = torch.full((2, 7), value, requires_grad=True)
        result = standardize(logits)
        result.sum().backward()
        assert result.abs().max().item() == 0.0 and logits.grad.abs().max().item() == 0.0


# ---- other vocabularies ----


def slow_universal(student, teacher, student_mask, teacher_mask) -> list[float]:
    """One value per aligned position, with loops and lists."""
    values = []
    for ours, theirs, m, n in zip(student, teacher, student_mask, teacher_mask, strict=True):
        for i, j in zip(np.flatnonzero(m), np.flatnonzero(n), strict=False):
            p, q = (sorted(np.exp(x) / np.exp(x).sum(), reverse=True) for x in (ours[i], theirs[j]))
            width = max(len(p), len(q))
            p, q = (list(x) + [0.0] * (width - len(x)) for x in (p, q))
            values.append(sum(abs(a - b) for a, b in zip(p, q, strict=True)))
    return values


@pytest.mark.parametrize("sizes", [(7, 5, 11, 8), (4, 9, 6, 13)])
def test_universal_distance_with_other_lengths_and_vocabularies(sizes: tuple[int, ...]) -> None:
    length, other_length, vocabulary, other_vocabulary = sizes
    student, _ = tensors(5, length, vocabulary)
    teacher, _ = tensors(5, other_length, other_vocabulary, seed=1)
    places = torch.arange(5).unsqueeze(1)
    mask = torch.arange(length) >= places % 3  # a prompt to the left
    other_mask = (torch.arange(other_length) >= places % 2 + 1) & (torch.arange(other_length) < 4)
    other_mask[3] = False  # one without an answer
    other_mask[2] = torch.arange(other_length) % 2 == 0  # and one with gaps
    values = slow_universal(student.double().numpy(), teacher.double().numpy(), mask.numpy(), other_mask.numpy())
    assert 5 < len(values) < 5 * min(length, other_length)
    assert count_aligned(mask, other_mask).item() == len(values)
    spoilt = student.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    loss = universal_logit_distance(
        spoilt, teacher.masked_fill(~other_mask.unsqueeze(-1), float("nan")), student_mask=mask, teacher_mask=other_mask
    )
    loss.backward()
    assert loss.item() == pytest.approx(np.mean(values), rel=1e-5)
    used = (spoilt.grad != 0).any(-1)
    assert bool(torch.isfinite(spoilt.grad).all()) and int(used.sum()) == len(values) and not bool(used[3].any())
    parts = [
        universal_logit_distance(
            student[p], teacher[p], student_mask=mask[p], teacher_mask=other_mask[p], count=len(values)
        )
        for p in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    assert sum(parts).item() == pytest.approx(np.mean(values), rel=1e-5)


def test_universal_distance_is_blind_to_the_order_of_the_vocabulary() -> None:
    student, _ = tensors(2, 3, 9)
    teacher = student[..., torch.randperm(9, generator=torch.Generator().manual_seed(3))]
    assert universal_logit_distance(student, teacher).item() == pytest.approx(0.0, abs=1e-6)
    # Sorted probabilities as samples: the distance of scipy is the mean over classes instead of the sum.
    _, teacher = tensors(1, 1, 9)
    expected = 9 * wasserstein_distance(student[0, 0].softmax(-1), teacher[0, 0].softmax(-1))
    assert universal_logit_distance(student[:1, :1], teacher).item() == pytest.approx(expected, rel=1e-5)
