"""Importance of the features of the residual stream: one score per feature; higher means keep."""

from __future__ import annotations

import torch
from torch import nn

from hfcompress.anatomy import Stream, StreamDim, find_stream


def stream_magnitude(model: nn.Module, *, stream: Stream | None = None) -> torch.Tensor:
    """Sum of squared weights of each feature of the stream, over everything that reads, writes or scales it.

    The squared L2 norm of all that goes with the feature, as `magnitude` for units. Tied weights count once.

    Args:
        model: The model.
        stream: Its stream if it is known already; finding it takes a moment.

    Returns:
        Scores, float32, shape (width,), at least 0, on the CPU.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> scores = stream_magnitude(model)
        >>> with torch.no_grad():
        ...     _ = model.embeddings.LayerNorm.weight[3].add_(1.0)  # it was 1
        >>> (stream_magnitude(model) - scores).round(decimals=3).tolist()
        [0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    """
    stream = find_stream(model) if stream is None else stream
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total, seen = torch.zeros(stream.width), set()
    for entry in stream.dims:
        weight = parameters.get(entry.name)
        if weight is None or (id(weight), entry.dim) in seen:
            continue
        seen.add((id(weight), entry.dim))
        total += _per_feature(weight.detach().float().square(), entry, stream.width)
    return total


def stream_gradients(model: nn.Module, *, stream: Stream | None = None) -> torch.Tensor:
    """Gradient of the loss with respect to an open gate on every feature of the stream, at all its readers at once.

    A gate g_i that multiplies feature i in the input of every linear layer that reads the stream scales column i of each, so
    dL/dg_i at 1 is the sum over these columns of weight times gradient: the first-order change of the loss when no reader
    sees the feature any more (Molchanov et al. 2019, equation 8, as `gate_gradients` for units). What norms would compute
    without the feature is not in it. A language model head whose weights are tied to the embeddings has one gradient for
    both, so there the gate is on the embeddings, too.

    Args:
        model: The model after a backward pass, not wrapped.
        stream: Its stream if it is known already; finding it takes a moment.

    Returns:
        float32, shape (width,), on the CPU; readers that the backward pass did not reach add nothing.

    Raises:
        ValueError: A reader is frozen.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4)).eval()
        >>> model(input_ids=torch.tensor([[5, 6, 7]])).pooler_output.sum().backward()
        >>> stream_gradients(model).shape
        torch.Size([8])
    """
    stream = find_stream(model) if stream is None else stream
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = torch.zeros(stream.width)
    for entry in stream.dims:
        weight = parameters.get(entry.name)
        if weight is None or entry.role != "reads":
            continue
        if not weight.requires_grad:
            raise ValueError(
                f"{entry.name} is frozen, so gradients cannot tell what it reads; train it, or use stream_magnitude"
            )
        if weight.grad is not None:
            total += _per_feature(weight.detach().float() * weight.grad.detach().float(), entry, stream.width)
    return total


def _per_feature(values: torch.Tensor, entry: StreamDim, width: int) -> torch.Tensor:
    """Sum over all dimensions but the one in the stream, and over the copies of the stream in it."""
    return values.movedim(entry.dim, 0).reshape(entry.copies, width, -1).sum((0, 2)).cpu()
