"""Losses on a part of the teacher's distribution, against the whole of it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hfcompress.distillation import kl_divergence, sampled_kl_divergence, top_k_kl_divergence


def logits(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def top(teacher: torch.Tensor, k: int, *, drawn: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """What a cache keeps of logits, with numpy: likeliest classes, their log-probabilities, and of the others mass, draws, mean logarithm."""
    probabilities = np.exp(teacher.numpy())
    probabilities /= probabilities.sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1)
    kept = np.take_along_axis(probabilities, order, -1)
    others, mass = kept[..., k:], kept[..., k:].sum(-1)
    draws, means = np.zeros((*mass.shape, drawn), dtype=int), np.zeros(mass.shape)
    generator = np.random.default_rng(seed)
    for place in np.ndindex(mass.shape):
        if k < teacher.shape[-1]:
            shares = others[place] / mass[place]
            draws[place] = generator.choice(order[place][k:], size=drawn, p=shares)
            means[place] = (shares * np.log(others[place])).sum()
    with np.errstate(divide="ignore"):
        parts = order[..., :k].copy(), np.log(kept[..., :k]), np.log(mass), draws, means
    return tuple(torch.from_numpy(np.asarray(part)) for part in parts)


def test_values_and_gradients_by_hand():
    student, teacher = logits(0, 40, 9, scale=1.5).requires_grad_(), logits(1, 40, 9)
    parts = indices, log_probs, tail, draws, means = top(teacher, 4, drawn=5)
    q, expected, gradient = student.detach().softmax(-1).numpy(), 0.0, np.zeros((40, 9))
    for row in range(40):
        mass = math.exp(tail[row])
        for i, log_p in zip(indices[row].tolist(), log_probs[row].tolist(), strict=True):
            expected += math.exp(log_p) * (log_p - math.log(q[row, i])) / 40
            gradient[row, i] -= math.exp(log_p) / 40
        expected += mass * float(means[row]) / 40
        for draw in draws[row].tolist():
            assert draw not in indices[row].tolist()
            expected -= mass * math.log(q[row, draw]) / 5 / 40
            gradient[row, draw] -= mass / 5 / 40
    loss = top_k_kl_divergence(student, *parts)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(torch.autograd.grad(loss, student)[0].numpy(), gradient + q / 40, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_its_mean_over_the_draws_is_the_divergence(k):
    """All that could be drawn, each with its probability: no chance is left in this test."""
    student, teacher = logits(2, 1, 5).requires_grad_(), logits(3, 1, 5)
    indices, log_probs, tail, _, means = top(teacher, k)
    p = teacher.softmax(-1)[0].tolist()
    others = [i for i in range(5) if i not in indices[0].tolist()]
    mass = sum(p[i] for i in others)
    expected, mean, drawn = torch.zeros(1, 5, dtype=torch.float64), 0.0, 0
    for draws in itertools.product(others, repeat=3):
        loss = top_k_kl_divergence(student, indices, log_probs, tail, torch.tensor([draws]), means)
        probability = math.prod(p[i] / mass for i in draws)
        expected += probability * torch.autograd.grad(loss, student)[0]
        mean += probability * loss.item()
        drawn += 1
    whole = kl_divergence(student, teacher)
    assert drawn == (5 - k) ** 3
    assert mean == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(expected, torch.autograd.grad(whole, student)[0], atol=1e-6, rtol=1e-5)


def test_with_all_classes_it_is_the_divergence():
    student, teacher = logits(4, 4, 6).requires_grad_(), logits(5, 4, 6)
    parts = top(teacher, 6)
    assert (parts[2] == -torch.inf).all()
    mine, whole = top_k_kl_divergence(student, *parts), kl_divergence(student, teacher)
    assert mine.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (mine, whole)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("certain", [0.0, 40.0, 1000.0, math.inf])
def test_neither_a_certain_teacher_nor_a_certain_student_gives_nan(certain):
    student = torch.tensor([[0.0 if certain == math.inf else certain, 0.0, 0.0, -certain]], requires_grad=True)
    indices, log_probs = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[0.0, -torch.inf]])
    nothing, drawn = torch.tensor([-torch.inf]), torch.tensor([[2, 3]], dtype=torch.int32)
    loss = top_k_kl_divergence(student, indices, log_probs, nothing, drawn, torch.zeros(1))
    loss.backward()
    expected = {0.0: math.log(4), math.inf: math.log(3)}.get(certain, 0.0)
    assert loss.item() == pytest.approx(expected, abs=1e-6) and bool(student.grad.isfinite().all())


def test_rounding_to_16_bits_keeps_it_a_divergence():
    teacher = logits(6, 200, 9)
    indices, log_probs, tail, draws, means = top(teacher, 8)  # of one other there is one draw
    same = top_k_kl_divergence(teacher, indices, log_probs.half(), tail.float(), draws, means.half())
    assert abs(same.item()) < 2e-5


@pytest.mark.parametrize("kind", ["top_k", "samples"])
def test_masked_items_do_not_count_and_parts_sum_to_the_whole(kind):
    student, teacher = logits(7, 4, 3, 8), logits(8, 4, 3, 8)
    parts = top(teacher, 3) if kind == "top_k" else (torch.randint(0, 8, (4, 3, 5)),)
    loss = top_k_kl_divergence if kind == "top_k" else sampled_kl_divergence
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, True, True]])
    whole = loss(student, *parts, mask=mask)
    chosen = loss(student[mask], *(part[mask] for part in parts))
    halves = [
        loss(student[half], *(part[half] for part in parts), mask=mask[half], count=mask.sum())
        for half in (slice(0, 2), slice(2, 4))
    ]
    assert whole.item() == pytest.approx(chosen.item(), rel=1e-6)
    assert whole.item() == pytest.approx(sum(half.item() for half in halves), rel=1e-6)
    nothing = loss(student, *parts, mask=torch.zeros_like(mask))
    assert nothing.item() == 0


def test_the_expected_gradient_of_samples_is_that_of_the_divergence():
    """All that could be drawn, each with its probability: no chance is left in this test."""
    student, teacher = logits(9, 1, 3).requires_grad_(), logits(10, 1, 3)
    p = teacher.softmax(-1)[0].tolist()
    expected, mean, drawn = torch.zeros(1, 3, dtype=torch.float64), 0.0, 0
    for draws in itertools.product(range(3), repeat=4):
        loss = sampled_kl_divergence(student, torch.tensor([draws]))
        probability = math.prod(p[i] for i in draws)
        expected += probability * torch.autograd.grad(loss, student)[0]
        mean += probability * loss.item()
        drawn += 1
    whole = kl_divergence(student, teacher)
    assert drawn == 81
    torch.testing.assert_close(expected, torch.autograd.grad(whole, student)[0], atol=1e-6, rtol=1e-5)
    entropy = -sum(each * math.log(each) for each in p)
    assert mean == pytest.approx(whole.item() + entropy, rel=1e-5)


def test_samples_are_a_cross_entropy_to_frequencies():
    student, draws = logits(11, 2, 5), torch.tensor([[0, 0, 4, 1], [3, 3, 3, 3]], dtype=torch.int32)
    frequencies = torch.stack([torch.bincount(row, minlength=5) / 4 for row in draws])
    expected = torch.nn.functional.cross_entropy(student, frequencies.double())
    assert sampled_kl_divergence(student, draws).item() == pytest.approx(expected.item(), rel=1e-6)
