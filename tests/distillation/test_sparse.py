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


def nearest_teacher(q: np.ndarray, p: np.ndarray, k: int) -> np.ndarray:
    """What was kept of p, and min(c q, p_k) elsewhere, with c found by bisection; shape (classes,)."""
    order = np.argsort(-p)
    rest, bound = order[k:], p[order[k - 1]]
    low, high = 0.0, 1e9
    for _ in range(300):
        factor = (low + high) / 2
        low, high = (factor, high) if np.minimum(factor * q[rest], bound).sum() < p[rest].sum() else (low, factor)
    found = p.copy()
    found[rest] = np.minimum(high * q[rest], bound)
    return found


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_it_is_the_least_divergence_that_what_was_kept_allows(k):
    student, teacher = logits(0, 40, 9, scale=1.5), logits(1, 40, 9)
    q, p = student.softmax(-1).numpy(), teacher.softmax(-1).numpy()
    indices, log_probs, tail = top(teacher, k)
    held = 0
    for row in range(40):
        found = top_k_kl_divergence(student[row], indices[row], log_probs[row], tail[row]).item()
        guess = nearest_teacher(q[row], p[row], k)
        bound, rest = p[row, indices[row, -1]], [i for i in range(9) if i not in indices[row].tolist()]
        kept = indices[row].numpy()
        at_bound = int((guess[rest] > bound * (1 - 1e-9)).sum())
        held += at_bound > 0
        coarse = divergence(
            np.append(p[row, kept], p[row, rest].sum()),
            np.append(q[row, kept], q[row, rest].sum()),
        )
        assert coarse - 5e-6 <= found <= divergence(p[row], q[row]) + 5e-6
        if at_bound <= k:
            assert found == pytest.approx(divergence(guess, q[row]), rel=1e-4)
    assert k == 8 or held > 2


def test_the_gradient_pushes_down_what_the_student_thinks_too_likely():
    student, teacher = logits(2, 30, 7).requires_grad_(), logits(3, 30, 7)
    indices, log_probs, tail = top(teacher, 4)  # of the three others at most three can be held
    (found,) = torch.autograd.grad(top_k_kl_divergence(student, indices, log_probs, tail, count=1.0), student)
    q, p = (x.detach().softmax(-1).numpy() for x in (student, teacher))
    expected = np.stack([q[row] - nearest_teacher(q[row], p[row], 4) for row in range(30)])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    whole = q - p
    assert np.abs(found.numpy() - whole).sum() < np.abs(whole).sum() / 10


def test_no_more_than_k_classes_are_held():
    student = torch.tensor([[0.01, 0.3, 0.29, 0.28, 0.12]]).log()
    value = top_k_kl_divergence(student, torch.tensor([[0]]), torch.tensor([[0.2]]).log(), torch.tensor([0.8]).log())
    # One of the three that would be is held at 0.2, the others share 0.6.
    expected = [(0.2, 0.01), (0.2, 0.3), (0.6, 0.69)]
    assert value.item() == pytest.approx(sum(p * math.log(p / q) for p, q in expected), rel=1e-5)


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
