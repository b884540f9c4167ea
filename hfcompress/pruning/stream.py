"""Importance of the features of the residual stream: one score per feature; higher means keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Stream, StreamDim, find_stream
from hfcompress.calibration import Batch, Moments, batch_loss, frozen, gram, real_tokens
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.evidence import Reduce
from hfcompress.pruning.obs import ReaderMoments, surgeon_curve


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


def stream_surgeon(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    stream: Stream | None = None,
    seed: int = 0,
    damping: float = 1e-2,
    reduce: Reduce | None = None,
) -> Curve:
    """Rank the features of the stream by optimal brain surgeon: what all that reads them loses when it makes up for them from the rest.

    The error of the layers that read the same (query, key and value, say) is weighed by the second moment of the gradient of the model's
    own predictions at what they read: with W their weights and g the gradients at their outputs that is W^T E[g g^T] W, so `surgeon_curve`
    is asked about a matrix with this square. The stream is read in many places, and a feature goes from all of them at once.

    Args:
        model: The model; it is left as it was.
        batches: Calibration inputs.
        stream: Its stream if it is known already; finding it takes a moment.
        seed: Of the answers that are drawn.
        damping: See `surgeon_curve`.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process.

    Returns:
        The curve, in nats per example. What norms would compute without the feature is not in it.

    Raises:
        ValueError: There is no data, or no part of the model that reads the stream is reached.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> curve = stream_surgeon(model, [{"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}])
        >>> sorted(curve.order.tolist()), curve.loss.shape
        ([0, 1, 2, 3, 4, 5, 6, 7], torch.Size([9]))
    """
    stream = find_stream(model) if stream is None else stream
    groups = _look(model, _readers(model, stream), batches, seed=seed)
    if not groups:
        raise ValueError("nothing that reads the hidden features is reached on this data, so they cannot be ranked")
    moments = []
    for inputs, gradients in groups:
        for tensor in (inputs.products, inputs.total, inputs.count, gradients):
            if reduce is not None:
                reduce(tensor)
        moments.append(ReaderMoments(_root(gradients), inputs.covariance()))
    return surgeon_curve(moments, width=1, damping=damping)


def _readers(model: nn.Module, stream: Stream) -> dict[str, nn.Module]:
    """The linear layers that read the stream once."""
    names = (entry.name.rpartition(".")[0] for entry in stream.dims if entry.role == "reads" and entry.copies == 1)
    modules = ((name, model.get_submodule(name)) for name in dict.fromkeys(names))
    return {name: module for name, module in modules if isinstance(module, nn.Linear | Conv1D)}


def _look(
    model: nn.Module, readers: dict[str, nn.Module], batches: Sequence[Batch], *, seed: int
) -> list[tuple[Moments, torch.Tensor]]:
    """Of all that readers have in common what enters them, and the second moment of the gradients there, per example."""
    generator = torch.Generator().manual_seed(seed)
    moments: dict[tuple[str, int], Moments] = {}
    gradients: dict[tuple[str, int], torch.Tensor] = {}
    examples = 0
    for batch in tqdm(batches, desc="gradients of the stream", leave=False, delay=2):
        with frozen(model), torch.enable_grad(), _watched(readers) as seen:
            loss, count = batch_loss(model, batch, loss="self", generator=generator)
            found = torch.autograd.grad(loss, [x for _, x in seen.values()], allow_unused=True)
        examples += count
        for (key, x), gradient in zip(seen.values(), found, strict=True):
            if gradient is None:
                continue
            width = x.shape[-1]
            moments.setdefault(key, Moments.zeros(width, x.device)).add(
                real_tokens(x.detach(), batch, decoder=key[0].startswith("decoder."))
            )
            square = gram(gradient.detach().reshape(-1, width).float()).double()
            gradients[key] = gradients[key] + square if key in gradients else square
    return [(moments[key], gradients[key] / examples) for key in gradients]


@contextlib.contextmanager
def _watched(readers: dict[str, nn.Module]) -> Iterator[dict[int, tuple[tuple[str, int], torch.Tensor]]]:
    """A context in which readers get a copy of what they read, one for all that read the same: what they alone do to it has a gradient."""
    seen: dict[int, tuple[tuple[str, int], torch.Tensor]] = {}
    held: list[torch.Tensor] = []  # an id is that of one tensor only while it lives
    calls: dict[str, int] = {}

    def hook(name: str) -> Callable[..., Any]:
        def enter(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0]
            if id(x) not in seen:
                held.append(x)
                number = calls[name] = calls.get(name, -1) + 1
                seen[id(x)] = (name, number), x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
            return (seen[id(x)][1], *args[1:])

        return enter

    with contextlib.ExitStack() as stack:
        for name, module in readers.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        yield seen


def _root(square: torch.Tensor) -> torch.Tensor:
    """A matrix R with R^T R as given, float32, without the directions that count for nothing."""
    values, vectors = torch.linalg.eigh(square.double())
    return (values.clamp(min=0).sqrt()[:, None] * vectors.T).float()
