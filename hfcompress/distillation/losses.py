"""What all losses share: student and teacher tensors in, a scalar out, the mean over items. Pure functions.

Each is a sum over items divided by a count. An item is what the loss is averaged over: an example, a token, a
position. `mask` says which items count; `count` replaces their number where the items of one optimizer step are spread over
several batches or processes, so that the sum over the parts equals the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Numbers per block: small beside the logits of a language model, and work enough for a GPU to outweigh starting it.
_BLOCK_SIZE = 2**22


def mean_over_items(
    values: torch.Tensor, *, mask: torch.Tensor | None = None, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Sum of the values that are not masked, divided by their number or by `count`.

    Args:
        values: One value per item, any shape, float.
        mask: True where an item counts, same shape; None means all.
        count: What to divide by; None means the number of items that count here (0 gives 0, not NaN).

    Returns:
        Scalar of the dtype of `values`.

    Example:
        >>> values = torch.tensor([1.0, 3.0, 100.0])
        >>> mean_over_items(values, mask=torch.tensor([True, True, False])).item()
        2.0
    """
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    if count is None:
        count = float(values.numel()) if mask is None else mask.sum()
    if isinstance(count, torch.Tensor):
        return values.sum() / count.clamp(min=1)
    return values.sum() / max(count, 1.0)


def mean_by_item(
    function: Callable[..., torch.Tensor],
    student: torch.Tensor,
    teacher: torch.Tensor,
    *given: torch.Tensor,
    gradient: Callable[..., torch.Tensor] | None = None,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean over items of a function of the student's and the teacher's vector, a block of items at a time.

    Nothing is kept from forward to backward but the inputs, which are there anyway. Backward computes each block once more and
    writes its gradient into one buffer of the student's shape and dtype, so that float32 copies are never larger than a
    block, however many items and classes there are. The gradient cannot be differentiated again.

    Args:
        function: Takes (items, features) of student and teacher in float32 (float64 where the student is) and (items,) of each
            of `given`; gives one value per item, shape (items,), that depends on this item alone.
        student: Shape (..., features), float.
        teacher: Shape (..., features of its own), float; gets no gradient.
        *given: What else there is to know of the items, shape (...).
        gradient: Takes the same; gives the derivatives of the values, shape (items, features). None lets autograd find them.
        mask: True where an item counts, shape (...). Where it is False anything may stand in the tensors, NaN included.
        count: See `mean_over_items`.

    Returns:
        Scalar, float32 (float64 where the student is).

    Example:
        >>> student, teacher = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 2)
        >>> mean_by_item(lambda ours, theirs: (ours - theirs).sum(-1), student, teacher).item()
        2.5
    """
    values = _ByBlock.apply(function, gradient, student, teacher.detach(), *given)
    return mean_over_items(values, mask=mask, count=count)


class _ByBlock(torch.autograd.Function):
    """One value per item, as `mean_by_item` says."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., torch.Tensor],
        gradient: Callable[..., torch.Tensor] | None,
        student: torch.Tensor,
        teacher: torch.Tensor,
        *given: torch.Tensor,
    ) -> torch.Tensor:
        ctx.function, ctx.gradient = function, gradient
        ctx.save_for_backward(student, teacher, *given)
        values = [function(*block) for block in _blocks(student, teacher, given)]
        return torch.cat(values).view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, *given = ctx.saved_tensors
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        places = _split(result, _rows_per_block(student, teacher))
        for place, (ours, theirs, *others, weights) in zip(
            places, _blocks(student, teacher, [*given, upstream]), strict=True
        ):
            if ctx.gradient is not None:
                part = ctx.gradient(ours, theirs, *others).mul_(weights.unsqueeze(-1))
            else:
                with torch.enable_grad():
                    variable = ours.detach().requires_grad_()
                    values = ctx.function(variable, theirs, *others)
                (part,) = torch.autograd.grad(values, variable, weights)
            # What stands at an item that does not count may not even be a number, and 0 times NaN is NaN.
            place.copy_(part.masked_fill_(weights.unsqueeze(-1) == 0, 0.0))
        return (None, None, result, *(None for _ in range(1 + len(given))))


def _blocks(
    student: torch.Tensor, teacher: torch.Tensor, given: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The items block by block: student and teacher in the precision of the result, and what else is given."""
    rows, dtype = _rows_per_block(student, teacher), _precision(student)
    parts = [_split(each, rows) for each in (student, teacher, *(each.unsqueeze(-1) for each in given))]
    for ours, theirs, *others in zip(*parts, strict=True):
        yield ours.to(dtype), theirs.to(dtype), *(each.squeeze(-1) for each in others)


def _rows_per_block(student: torch.Tensor, teacher: torch.Tensor) -> int:
    return max(1, _BLOCK_SIZE // max(student.shape[-1], teacher.shape[-1], 1))


def _split(tensor: torch.Tensor, rows: int) -> list[torch.Tensor]:
    """Matrices of at most so many rows, in order. Only rows that are not evenly spaced in memory are copied, a block at most."""
    if tensor.dim() <= 2:
        return list(tensor.reshape(-1, tensor.shape[-1]).split(rows))
    rows_each = tensor.shape[1:-1].numel()
    if rows_each > rows:
        return [block for part in tensor for block in _split(part, rows)]
    return [part.reshape(-1, tensor.shape[-1]) for part in tensor.split(max(1, rows // max(rows_each, 1)))]


def _precision(tensor: torch.Tensor) -> torch.dtype:
    """Float32, or float64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def comparable(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32 (float64 where the student is), the teacher without gradient, zeros where an item does not count.

    For losses that look at all items at once: whatever stands at padding, NaN included, reaches neither a sum nor a gradient.

    Args:
        student: Shape (..., features), float.
        teacher: Shape (..., features of its own), float.
        mask: True where an item counts, shape (...) or one that can be broadcast to it.

    Example:
        >>> student, teacher = torch.tensor([[1.0], [float("nan")]]), torch.tensor([[2.0], [3.0]])
        >>> [each.tolist() for each in comparable(student, teacher, mask=torch.tensor([True, False]))]
        [[[1.0], [0.0]], [[2.0], [0.0]]]
    """
    dtype = _precision(student)
    both = student.to(dtype), teacher.detach().to(dtype)
    if mask is None:
        return both
    student, teacher = (each.masked_fill(~mask.unsqueeze(-1), 0.0) for each in both)
    return student, teacher


def exactly(tensor: torch.Tensor) -> torch.autocast:
    """A context in which matrix products of float32 stay float32, whatever autocast is on around it.

    Example:
        >>> ones = torch.ones(1, 1)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), exactly(ones):
        ...     (ones @ ones).dtype
        torch.float32
    """
    return torch.autocast(tensor.device.type, enabled=False)
