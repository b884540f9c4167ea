"""What a loss is averaged over, counted for a whole optimizer step: all accumulated batches of all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

IGNORED = -100


@dataclass(frozen=True)
class ItemCounts:
    """Items of one optimizer step, and the factor that makes up for the averaging of gradients over processes.

    Attributes:
        examples: Examples, scalar tensor.
        labels: Labels that are not ignored; equals `examples` for batches without "labels".
        tokens: Tokens that are not padding; equals `examples` for batches without an attention mask.
        scale: Number of processes whose gradients are averaged.
    """

    examples: torch.Tensor
    labels: torch.Tensor
    tokens: torch.Tensor
    scale: float = 1.0

    @classmethod
    def from_tensor(cls, counts: torch.Tensor, *, scale: float = 1.0) -> ItemCounts:
        """The three counts from one tensor of shape (3,)."""
        return cls(counts[0], counts[1], counts[2], scale)


def label_mask(labels: torch.Tensor, *, shifted: bool) -> torch.Tensor:
    """True where a label counts; causal models predict the next token, so their first label is never a target.

    Example:
        >>> label_mask(torch.tensor([[5, -100, 7]]), shifted=True).tolist()
        [[False, True]]
    """
    return (labels[..., 1:] if shifted else labels) != IGNORED


def count_items(
    batches: Sequence[Mapping[str, Any]], *, shifted: bool, device: torch.device | str | None = None
) -> torch.Tensor:
    """Examples, labels and tokens of some batches.

    Args:
        batches: Inputs as a model gets them.
        shifted: Whether the model predicts the next token.
        device: Where the result is wanted.

    Returns:
        Shape (3,), float32: exact up to 2^24 items.

    Example:
        >>> batch = {"labels": torch.tensor([1, 0]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
        >>> count_items([batch, batch], shifted=False).tolist()
        [4.0, 4.0, 6.0]
    """
    total = torch.zeros(3, device=device)
    for batch in batches:
        examples = batch_size(batch)
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        total[0] += examples
        total[1] += label_mask(labels, shifted=shifted).sum().to(total.device) if _is_tensor(labels) else examples
        total[2] += mask.sum().to(total.device) if _is_tensor(mask) else examples
    return total


def _is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def batch_size(batch: Mapping[str, Any]) -> int:
    """Examples in a batch: the first dimension of its first tensor."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    raise ValueError(f"the batch holds no tensors, only {', '.join(batch) or 'nothing'}; check the data collator")
