"""Losses on vectors and pooling: by hand and against other functions of torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from hfcompress.distillation import (
    contrastive,
    cosine_distance,
    mean_squared_error,
    patient_error,
    pool,
    similarity_preserving,
    unit_vectors,
)


def tensors(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def test_squared_error_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert mean_squared_error(student, teacher).item() == pytest.approx((2.5 + 5.0) / 2)


def test_cosine_is_the_embedding_loss_of_torch() -> None:
    student, teacher = tensors(3, 7, 8)
    flat, ones = (student.flatten(0, 1), teacher.flatten(0, 1)), torch.ones(21)
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    loss, plain = cosine_distance(ours, teacher), nn.CosineEmbeddingLoss()(theirs.flatten(0, 1), flat[1], ones)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    loss.backward()
    plain.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    assert patient_error(student, teacher).item() == pytest.approx(2 / 8 * plain.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [cosine_distance, patient_error, contrastive, similarity_preserving])
def test_only_directions_count(loss) -> None:
    student, teacher = tensors(6, 8)
    scales = torch.tensor([1e-25, 1e-3, 1.0, 7.0, 1e3, 1e25]).unsqueeze(1)
    if loss is similarity_preserving:  # rows of the Gram matrix weigh the others by their length
        scales = torch.tensor(1e25)
    assert loss(student * scales, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-5)


def test_vectors_of_zeros_get_no_gradient() -> None:
    student, teacher = tensors(4, 8)
    student[1] = 0.0
    student.requires_grad_()
    for loss in (cosine_distance, patient_error, contrastive, similarity_preserving):
        student.grad = None
        loss(student, teacher).backward()
        assert bool(torch.isfinite(student.grad).all()) and student.grad[0].abs().max().item() > 0
        if loss is not similarity_preserving:
            assert student.grad[1].abs().max().item() == 0.0
    assert unit_vectors(torch.zeros(2, 3)).abs().max().item() == 0.0


def test_similar_pairs_by_hand_and_with_other_widths() -> None:
    # Student vectors at right angles, the teacher's equal: rows (1, 0), (0, 1) against (h, h), (h, h) with h = sqrt(1/2).
    student, teacher = torch.eye(2), torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    h = math.sqrt(0.5)
    assert similarity_preserving(student, teacher).item() == pytest.approx((2 * h**2 + 2 * (1 - h) ** 2) / 4, rel=1e-6)
    # A rotation into more dimensions keeps all similarities.
    student, _ = tensors(6, 4)
    basis, _ = torch.linalg.qr(tensors(9, 4, seed=1)[0])
    assert similarity_preserving(student, student @ basis.T).item() == pytest.approx(0.0, abs=1e-10)


def test_contrastive_by_hand() -> None:
    # cos = 1 with its own, 0 with the two others, T = 1/2: -log(e^2 / (e^2 + 2)).
    vectors = 3 * torch.eye(3)
    expected = math.log(1 + 2 * math.exp(-2))
    assert contrastive(vectors, vectors, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)
    assert contrastive(vectors[:1], vectors[1:2]).item() == 0.0  # nothing to be told from
    # Without one example there is one negative fewer.
    mask = torch.tensor([True, False, True])
    assert contrastive(vectors, vectors, temperature=0.5, mask=mask).item() == pytest.approx(math.log(1 + math.exp(-2)))
    wrong = contrastive(vectors, vectors.roll(1, 0), temperature=0.5).item()
    assert wrong == pytest.approx(math.log(2 + math.exp(2)), rel=1e-6)


# ---- pooling ----


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_takes_the_tokens_wherever_they_are(side: str) -> None:
    hidden, _ = tensors(3, 6, 4)
    lengths = (6, 4, 1)
    mask = torch.zeros(3, 6, dtype=torch.long)
    kept = []
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(6 - length, 6)
        mask[row, where] = 1
        kept.append(hidden[row, where])
    spoilt = hidden.masked_fill(mask.unsqueeze(-1) == 0, float("nan")).requires_grad_()
    expected = {"mean": [x.mean(0) for x in kept], "cls": [x[0] for x in kept], "last": [x[-1] for x in kept]}
    for how, rows in expected.items():
        for given in (mask, mask.bool(), mask.float()):
            torch.testing.assert_close(pool(spoilt, given, how=how), torch.stack(rows))
        spoilt.grad = None
        pool(spoilt, mask, how=how).sum().backward()
        assert bool((spoilt.grad[mask == 0] == 0).all()) and bool((spoilt.grad != 0).any(-1).any(-1).all())


def test_pooling_without_a_mask_and_of_nothing() -> None:
    hidden, _ = tensors(2, 5, 3)
    for how, expected in (("mean", hidden.mean(1)), ("cls", hidden[:, 0]), ("last", hidden[:, -1])):
        torch.testing.assert_close(pool(hidden, how=how), expected)
    nothing = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    assert pool(hidden, nothing, how="mean")[0].tolist() == [0.0] * 3
    assert pool(hidden.bfloat16(), how="mean").dtype == torch.float32


def test_padding_does_not_move_the_embedding_of_a_model() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config, add_pooling_layer=False).eval()
    ids, pad = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0]])
    positions = torch.arange(3).unsqueeze(0)
    batches = {
        "right": ([ids, pad], [positions, pad], [1, 1, 1, 0, 0]),
        "left": ([pad, ids], [pad, positions], [0, 0, 1, 1, 1]),
    }
    with torch.no_grad():
        alone = model(ids).last_hidden_state
        for tokens, places, mask in batches.values():
            attention = torch.tensor([mask])
            hidden = model(
                torch.cat(tokens, 1), attention_mask=attention, position_ids=torch.cat(places, 1)
            ).last_hidden_state
            for how, expected in (("mean", alone.mean(1)), ("cls", alone[:, 0]), ("last", alone[:, -1])):
                torch.testing.assert_close(pool(hidden, attention, how=how), expected, rtol=1e-4, atol=1e-5)
