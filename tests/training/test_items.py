from __future__ import annotations

import pytest
import torch

from hfcompress.training.items import ItemCounts, batch_size, count_items, label_mask

TEXT = {
    "input_ids": torch.tensor([[4, 5, 6, 0], [7, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
}


def test_examples_labels_and_tokens_of_several_batches() -> None:
    token = {**TEXT, "labels": torch.tensor([[1, 2, -100, -100], [-100, 1, -100, -100]])}
    silent = {**TEXT, "labels": torch.full((2, 4), -100)}
    assert count_items([token], shifted=False).tolist() == [2, 3, 5]
    assert count_items([token, silent, token], shifted=False).tolist() == [6, 6, 15]
    # The first position of each row is no target of a causal model: labels 2 (row 0) and 1 (row 1) are left.
    assert count_items([token], shifted=True).tolist() == [2, 2, 5]
    assert count_items([silent], shifted=True).tolist() == [2, 0, 5]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([1, 0]), 2),
        (torch.tensor([1, -100]), 1),
        (torch.tensor([0.5, -1.5]), 2),  # regression
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), 6),  # several labels an example
        ([{"boxes": 1}, {"boxes": 2}], 2),  # no tensor: an example is what counts
        (None, 2),
    ],
)
def test_kinds_of_labels(labels: object, expected: int) -> None:
    batch = {**TEXT, "labels": labels} if labels is not None else TEXT
    assert count_items([batch], shifted=False).tolist() == [2, expected, 5]


def test_without_a_mask_an_example_counts_as_one_token() -> None:
    images = {"pixel_values": torch.zeros(3, 3, 4, 4), "labels": torch.tensor([0, 1, 2])}
    assert count_items([images, images], shifted=False).tolist() == [6, 6, 6]


def test_no_batch_has_nothing() -> None:
    counts = count_items([], shifted=False)
    assert counts.tolist() == [0, 0, 0] and counts.dtype == torch.float32


def test_large_counts_are_exact() -> None:
    batch = {"labels": torch.zeros(2**12, 2**11, dtype=torch.int8)}  # 2^23 labels
    assert count_items([batch], shifted=False)[1].item() == 2**23


def test_the_batch_is_left_as_it_was() -> None:
    batch = {**TEXT, "labels": torch.tensor([1, -100])}
    before = {name: value.clone() for name, value in batch.items()}
    count_items([batch], shifted=False)
    assert all(torch.equal(batch[name], before[name]) for name in before) and len(before) == 3


def test_label_mask() -> None:
    labels = torch.tensor([[3, -100, 4], [-100, -100, 0]])
    assert label_mask(labels, shifted=False).tolist() == [[True, False, True], [False, False, True]]
    assert label_mask(labels, shifted=True).tolist() == [[False, True], [False, True]]


def test_batch_size_looks_past_what_has_no_examples() -> None:
    assert batch_size({"return_loss": True, "scale": torch.tensor(2.0), "input_ids": torch.zeros(5, 2)}) == 5
    with pytest.raises(ValueError, match="holds no tensors, only flag; check the data collator"):
        batch_size({"flag": True})
    with pytest.raises(ValueError, match="only nothing"):
        batch_size({})


def test_counts_by_name() -> None:
    counts = ItemCounts.from_tensor(torch.tensor([1.0, 2.0, 3.0]), scale=4.0)
    assert (counts.examples.item(), counts.labels.item(), counts.tokens.item(), counts.scale) == (1, 2, 3, 4)
