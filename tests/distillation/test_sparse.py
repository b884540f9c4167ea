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


def top(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a cache keeps of logits, with numpy."""
    probabilities = np.exp(teacher.numpy())
    probabilities /= probabilities.sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1)
    kept = np.take_along_axis(probabilities, order, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(kept[..., k:].sum(-1))
    return torch.from_numpy(order[..., :k].copy()), torch.from_numpy(np.log(kept[..., :k])), torch.from_numpy(tail)


def test_the_value_is_that_of_the_coarser_distributions_and_the_rest_is_what_the_whole_has_more():
    student, teacher = logits(0, 5, 9), logits(1, 5, 9)
    q, p = (np.exp(x.numpy()) / np.exp(x.numpy()).sum(-1, keepdims=True) for x in (student, teacher))
    looked_at = 0
    for k in (1, 3, 8):
        indices, log_probs, tail = top(teacher, k)
        by_hand, within = [], []
        for row in range(5):
            kept = set(indices[row].tolist())
            rest = [i for i in range(9) if i not in kept]
            p_rest, q_rest = p[row, rest].sum(), q[row, rest].sum()
            terms = [p[row, i] * math.log(p[row, i] / q[row, i]) for i in kept]
            by_hand.append(sum(terms) + p_rest * math.log(p_rest / q_rest))
            inside = [p[row, i] / p_rest * math.log((p[row, i] / p_rest) / (q[row, i] / q_rest)) for i in rest]
            within.append(p_rest * sum(inside))
            looked_at += 1
        found = top_k_kl_divergence(student, indices, log_probs, tail)
        assert found.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
        # The chain rule of the divergence.
        assert kl_divergence(student, teacher).item() == pytest.approx(np.mean(by_hand) + np.mean(within), rel=1e-5)
    assert looked_at == 15


def test_the_gradient_moves_the_rest_as_one():
    student, teacher = logits(2, 3, 7).requires_grad_(), logits(3, 3, 7)
    indices, log_probs, tail = top(teacher, 2)
    (found,) = torch.autograd.grad(top_k_kl_divergence(student, indices, log_probs, tail, count=1.0), student)
    q, p = (x.detach().softmax(-1).numpy() for x in (student, teacher))
    expected = np.empty_like(q)
    for row in range(3):
        kept = indices[row].tolist()
        rest = [i for i in range(7) if i not in kept]
        expected[row, kept] = q[row, kept] - p[row, kept]
        expected[row, rest] = q[row, rest] * (1 - p[row, rest].sum() / q[row, rest].sum())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_with_all_classes_it_is_the_divergence():
    student, teacher = logits(4, 4, 6).requires_grad_(), logits(5, 4, 6)
    indices, log_probs, tail = top(teacher, 6)
    assert (tail == -torch.inf).all()
    mine, whole = top_k_kl_divergence(student, indices, log_probs, tail), kl_divergence(student, teacher)
    assert mine.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (mine, whole)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("certain", [0.0, 40.0, 1000.0])
def test_neither_a_certain_teacher_nor_a_certain_student_gives_nan(certain):
    student = torch.tensor([[certain, 0.0, 0.0, -certain]], requires_grad=True)
    indices, log_probs = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[0.0, -torch.inf]])
    loss = top_k_kl_divergence(student, indices, log_probs, torch.tensor([-torch.inf]))
    loss.backward()
    expected = 0.0 if certain else math.log(4)
    assert loss.item() == pytest.approx(expected, abs=1e-6) and bool(student.grad.isfinite().all())


def test_rounding_to_16_bits_keeps_it_a_divergence():
    teacher = logits(6, 200, 50)
    indices, log_probs, tail = top(teacher, 8)
    same = top_k_kl_divergence(teacher, indices, log_probs.half(), tail.half())
    assert 0 <= same.item() < 1e-5


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
