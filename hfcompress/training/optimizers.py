"""Keeping optimizers and DistributedDataParallel consistent with a model whose parameters were cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hfcompress.anatomy import Change

logger = logging.getLogger(__name__)


def replace_parameters(optimizer: torch.optim.Optimizer, changes: Sequence[Change]) -> None:
    """Put the cut parameters in the place of the old ones, in place, and cut their moments along with them.

    What one change put in may be replaced by a later one, and so on.

    State that does not have the shape of its parameter (factored or 8-bit moments) cannot be cut and starts anew.

    Args:
        optimizer: The optimizer, not wrapped.
        changes: What a cut returned.

    Example:
        >>> old = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> optimizer = torch.optim.Adam([old])
        >>> old.grad = torch.tensor([1.0, 0.0, 2.0])
        >>> optimizer.step()
        >>> new = nn.Parameter(old.detach()[[0, 2]])
        >>> replace_parameters(optimizer, [Change(old, new, 0, torch.tensor([0, 2]))])
        >>> optimizer.state[new]["exp_avg"]
        tensor([0.1000, 0.2000])
    """
    by_parameter = {id(change.old): change for change in changes}
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            if id(parameter) not in by_parameter:
                kept.append(parameter)
                continue
            state = optimizer.state.pop(parameter, None)
            last: nn.Parameter | None = parameter
            while last is not None and id(last) in by_parameter:
                change = by_parameter[id(last)]
                last = change.new
                if state and last is not None:
                    state = _cut_state(state, change)
            if last is None:
                continue
            kept.append(last)
            if state:
                optimizer.state[last] = state
        group["params"] = kept


def _cut_state(state: dict[str, Any], change: Change) -> dict[str, Any]:
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.numel() > 1}
    if any(value.shape != change.old.shape or not value.is_floating_point() for value in tensors.values()):
        logger.warning("this optimizer's state cannot be cut; it starts anew for the parameters that were")
        return {}
    return {
        name: value.index_select(change.dim, change.index.to(value.device)) if name in tensors else value
        for name, value in state.items()
    }


def rebuild_reducer(wrapped: nn.Module) -> None:
    """Make DistributedDataParallel see the model's present parameters, in place; anything else is left alone.

    Its reducer holds on to the parameters it was built with: without this, processes drift apart silently after a cut. The
    training loop keeps a reference to the wrapper, so the wrapper stays and its contents are replaced.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        return
    fresh = DistributedDataParallel(
        wrapped.module,
        device_ids=wrapped.device_ids,
        output_device=wrapped.output_device,
        process_group=wrapped.process_group,
        bucket_cap_mb=_bucket_cap_mb(wrapped),
        find_unused_parameters=wrapped.find_unused_parameters,
        gradient_as_bucket_view=wrapped.gradient_as_bucket_view,
        static_graph=wrapped.static_graph,
    )
    # As an argument this is deprecated from torch 2.13 on; as an attribute it means the same everywhere.
    fresh.broadcast_buffers = wrapped.broadcast_buffers
    wrapped.__dict__.update(fresh.__dict__)


def _bucket_cap_mb(wrapped: DistributedDataParallel) -> float | None:
    return None if wrapped.bucket_bytes_cap_default else wrapped.bucket_bytes_cap / 2**20
