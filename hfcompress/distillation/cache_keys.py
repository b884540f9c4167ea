"""What identifies an example: its inputs, and not the batch that it is in."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

Layout = Literal["examples", "tokens", "labels"]
KEY_BYTES = 16
_NO_LABEL = -100
# What models take these for where there are none: then they say nothing, and an example with them is the one without.
_DEFAULTS = {"attention_mask": 1, "decoder_attention_mask": 1, "token_type_ids": 0}


class CacheError(ValueError):
    """A cache cannot be used or made; the message is one line."""


def token_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Where the tokens of a batch are: bool, shape (batch, length); None where there are none, as for images.

    For multiple choice the shape is (batch, choices, length).

    Example:
        >>> token_mask({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}).tolist()
        [[True, False]]
    """
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, torch.Tensor) and (
        mask.dim() == 2 or (isinstance(ids, torch.Tensor) and mask.shape == ids.shape)
    ):
        return mask != 0
    return torch.ones_like(ids, dtype=torch.bool) if isinstance(ids, torch.Tensor) and ids.dim() > 1 else None


def row_mask(batch: Mapping[str, Any], layout: Layout) -> torch.Tensor | None:
    """Where the rows of a layout are in a batch: bool, shape (batch, length); None where examples have no positions."""
    if layout == "labels":
        return batch["labels"] != _NO_LABEL
    return token_mask(batch) if layout == "tokens" else None


def key_inputs(
    batch: Mapping[str, Any], *, ignored: Collection[str] = (), reads_labels: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a batch that identify its examples, by name in order: all but labels and what is ignored.

    Labels are named as transformers knows them: by "label" in the name, and start_positions and end_positions.

    Raises:
        CacheError: There are none, or they are not of equally many examples.

    Example:
        >>> list(key_inputs({"pixel_values": torch.zeros(2, 3), "labels": torch.zeros(2), "name": "a"}))
        ['pixel_values']
    """
    found = {
        name: value
        for name, value in sorted(batch.items())
        if isinstance(value, torch.Tensor)
        and value.dim() > 0
        and name not in ignored
        and (not _is_label(name) or (reads_labels and name == "labels"))
    }
    sizes = {len(value) for value in found.values()}
    if len(sizes) != 1:
        raise CacheError(
            f"a batch holds tensors of {' and '.join(map(str, sorted(sizes))) or 'no'} examples ({', '.join(found or batch)}); "
            "the cache needs a collator that makes one row per example"
        )
    return found


def _is_label(name: str) -> bool:
    return "label" in name or name in ("start_positions", "end_positions")


def example_keys(batch: Mapping[str, Any], *, ignored: Collection[str] = (), reads_labels: bool = False) -> np.ndarray:
    """What identifies each example of a batch, whatever else is in the batch and on whatever side it is padded.

    A 16-byte BLAKE2b over the tensors that are inputs, by name, each as int64 or float32. Of tensors with a place for each token those
    of padding are left out; others, such as pixels, count whole. A mask of ones and token types of zeros are as if they were not there.

    Args:
        batch: Inputs, tensors on the CPU.
        ignored: Names that do not count.
        reads_labels: Whether labels count: of an encoder with a decoder. Places of -100 are padding.

    Returns:
        Shape (batch,), dtype S16.

    Example:
        >>> short = {"input_ids": torch.tensor([[7, 8]])}
        >>> padded = {"input_ids": torch.tensor([[0, 7, 8], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
        >>> (example_keys(padded) == example_keys(short)).tolist()
        [True, False]
    """
    named = key_inputs(batch, ignored=ignored, reads_labels=reads_labels)
    digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in next(iter(named.values()))]
    found = {"tokens": token_mask(batch), "labels": row_mask(batch, "labels") if reads_labels else None}
    masks = {layout: mask for layout, mask in found.items() if mask is not None}
    places = {layout: _places(mask.cpu().numpy()) for layout, mask in masks.items()}
    for name, tensor in named.items():
        layout = next((layout for layout, mask in masks.items() if _follows(name, tensor, layout, mask)), None)
        values = tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64).numpy()
        if layout is not None:
            values = values.reshape(-1, *values.shape[masks[layout].dim() - 1 :])  # each choice is a row
        for row in range(len(values)):
            digest = digests[row * len(digests) // len(values)]
            here = places[layout][row] if layout is not None else slice(None)
            part = values[row][here] if values.ndim > 1 else values[row : row + 1]
            if name in _DEFAULTS and (part == _DEFAULTS[name]).all():
                continue
            digest.update(f"{name} {part.dtype.char}{part.shape} ".encode())
            digest.update(np.ascontiguousarray(part).data)
            if isinstance(here, np.ndarray):  # padding in between: where it is counts
                digest.update((here - here[0]).tobytes())
    return np.array([digest.digest() for digest in digests], dtype=f"S{KEY_BYTES}")


def _follows(name: str, tensor: torch.Tensor, layout: str, mask: torch.Tensor) -> bool:
    """Whether a tensor has an entry for each place of a mask."""
    if (layout == "labels") != (name == "labels" or name.startswith("decoder_")):
        return False
    same = tensor.shape[: mask.dim()] == mask.shape
    return same and (tensor.dim() == mask.dim() or not tensor.is_floating_point())


def _places(mask: np.ndarray) -> list[slice | np.ndarray]:
    """Where each row of a mask is true: a slice, or the numbers where there are gaps."""
    length = mask.shape[-1]
    mask = mask.reshape(-1, length)
    starts, counts = mask.argmax(1).tolist(), mask.sum(1).tolist()
    ends = (length - mask[:, ::-1].argmax(1)).tolist()
    return [
        slice(start, start + count) if count == 0 or end - start == count else np.flatnonzero(mask[row])
        for row, (start, end, count) in enumerate(zip(starts, ends, counts, strict=True))
    ]


def fingerprint(keys: np.ndarray | Sequence[bytes]) -> str:
    """Hash of keys in order, 32 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(keys, dtype=f"S{KEY_BYTES}").tobytes(), digest_size=16).hexdigest()
