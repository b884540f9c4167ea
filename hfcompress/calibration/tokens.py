"""Which positions of an activation are tokens, and which are padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfcompress.calibration.walk import Batch


def token_mask(batch: Batch, shape: Sequence[int], *, decoder: bool = False) -> torch.Tensor | None:
    """Which positions of an activation are real, from the attention mask of the same shape; None if there is none.

    Args:
        batch: Inputs of the model.
        shape: Batch and length of the activation.
        decoder: Whether it is one of the decoder's: where the decoder has inputs of its own, only its own mask counts, but for what has
            another length: that is what it reads of the encoder.

    Example:
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
        >>> token_mask(batch, (1, 3)).tolist(), token_mask(batch, (1, 5))
        ([[True, True, False]], None)
        >>> both = {**batch, "decoder_attention_mask": torch.tensor([[1, 0]])}
        >>> token_mask(both, (1, 2), decoder=True).tolist(), token_mask(both, (1, 3), decoder=True).tolist()
        ([[True, False]], [[True, True, False]])
    """
    theirs = [value for name, value in batch.items() if name.startswith("decoder_") and isinstance(value, torch.Tensor)]
    own = decoder and bool(theirs) and any(tuple(value.shape[:2]) == tuple(shape[:2]) for value in theirs)
    mask = batch.get("decoder_attention_mask" if own else "attention_mask")
    if isinstance(mask, torch.Tensor) and tuple(mask.shape) == tuple(shape[:2]):
        return mask.bool()
    return None


def real_tokens(features: torch.Tensor, batch: Batch, *, decoder: bool = False) -> torch.Tensor:
    """The activations of real positions, shape (tokens, features)."""
    width = features.shape[-1]
    if features.dim() == 2:  # some layers see batch and length as one dimension
        ids = batch.get("decoder_input_ids") if decoder else None
        ids = batch.get("input_ids") if ids is None else ids
        if isinstance(ids, torch.Tensor) and ids.numel() == len(features):
            features = features.view(*ids.shape, width)
    if features.dim() == 3:
        mask = token_mask(batch, features.shape, decoder=decoder)
        if mask is not None:
            return features[mask.to(features.device)]
    return features.flatten(0, -2)
