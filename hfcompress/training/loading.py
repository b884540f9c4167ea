"""Loading a checkpoint into a live model whose shapes may be larger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.anatomy import (
    Change,
    StructureError,
    drop_layers,
    family_of,
    find_sites,
    find_stream,
    keep_hidden,
    keep_units,
)
from hfcompress.anatomy.depth import layer_lists
from hfcompress.anatomy.sites import RECORD_VERSION, Stack, find_stacks
from hfcompress.checkpoints.record import read_units


def load_weights(model: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Load a checkpoint into a live model, in place, cutting the model to the checkpoint's shapes first.

    Args:
        model: The model; its units, layers and hidden features may be more than the checkpoint's, never fewer.
        folder: A folder that `save_pretrained` wrote.

    Returns:
        The parameters that were replaced because they were cut, for an optimizer that holds the old ones.

    Raises:
        StructureError: The checkpoint is of another architecture or size, or holds more than the model has left.
        OSError: The folder holds no checkpoint.
    """
    # The class would read any config as its own.
    model_type = type(model.config).get_config_dict(folder)[0].get("model_type")
    if model_type != model.config.model_type:
        raise StructureError(f"{folder} holds a {model_type}, the model is a {model.config.model_type}")
    fresh = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    changes = [] if _misfit(model, fresh) is None else _match_shapes(model, fresh, folder)
    misfit = _misfit(model, fresh)
    if misfit is not None:
        name, here, there = misfit
        raise StructureError(f"{folder} does not fit the model: {name} is {there} there and {here} here")
    model.load_state_dict(fresh.state_dict())
    record = getattr(fresh.config, "hfcompress", None)
    if record is not None:
        ours = getattr(model.config, "hfcompress", None) or {}
        model.config.hfcompress = {**record, **{key: ours[key] for key in ("units", "layers", "hidden") if key in ours}}
    return changes


def _misfit(model: nn.Module, fresh: nn.Module) -> tuple[str, Any, Any] | None:
    """The first name whose tensors differ in shape, with both shapes (None where there is no such tensor)."""
    ours, theirs = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, fresh))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return name, ours.get(name), theirs.get(name)
    return None


def _match_shapes(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Cut `model` to the layers, units and hidden features of `fresh`, in place, and record it."""
    try:
        family_of(model)
    except StructureError:
        return []  # an architecture without sites was never cut
    changes = _match_layers(model, fresh, folder)
    changes += _match_units(model, fresh, folder)
    return changes + _match_hidden(model, fresh, folder)


def _match_layers(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Drop layers that `fresh` does not have: those stay that have the units, and are of the kinds, that it has.

    Which ones matters no further, because their weights are loaded.
    """
    stacks = {stack.name: (stack, layers) for stack, _, layers in find_stacks(model, family_of(model)) or []}
    keep = {}
    for stack, _, layers in find_stacks(fresh, family_of(fresh)) or []:
        if stack.name not in stacks or len(layers) > len(stacks[stack.name][1]):
            has = len(stacks[stack.name][1]) if stack.name in stacks else 0
            raise StructureError(
                f"{folder} has {len(layers)} layers in {stack.name}, the model only {has}; start from the unpruned model"
            )
        if len(layers) == len(stacks[stack.name][1]):
            continue
        ours, theirs = (_kinds(m, stack, n) for m, n in ((model, len(stacks[stack.name][1])), (fresh, len(layers))))
        chosen = _subsequence(ours, theirs)
        if chosen is None:
            raise StructureError(
                f"{folder} has layers in {stack.name} that are of another kind than the model's, or have more units; start "
                "from the unpruned model"
            )
        keep[stack.name] = chosen
    return drop_layers(model, keep)


_Kind = tuple[tuple[Any, ...], dict[str, int]]


def _kinds(model: PreTrainedModel, stack: Stack, count: int) -> list[_Kind]:
    """For each layer, what the config's lists with one entry per layer say of it, and its units by role."""
    config = getattr(model.config, stack.config) if stack.config else model.config
    said = list(zip(*(getattr(config, name) for name in layer_lists(config, count)), strict=True)) or [()] * count
    units: list[dict[str, int]] = [{} for _ in range(count)]
    for site in find_sites(model):
        if site.stack == stack.name and site.layer is not None:
            units[site.layer][site.name.rpartition(".")[2]] = site.units
    return list(zip(said, units, strict=True))


def _subsequence(whole: Sequence[_Kind], part: Sequence[_Kind]) -> tuple[int, ...] | None:
    """The first indices of `whole`, ascending, whose layers are like those of `part`; None if there are none."""
    found, start = [], 0
    for said, units in part:
        fits = (
            n
            for n in range(start, len(whole))
            if whole[n][0] == said and all(whole[n][1].get(role, 0) >= left for role, left in units.items())
        )
        index = next(fits, None)
        if index is None:
            return None
        found.append(index)
        start = index + 1
    return tuple(found)


def _match_hidden(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Cut the hidden width to that of `fresh`, and record it."""
    if _misfit(model, fresh) is None:
        return []
    try:
        ours, left = find_stream(model), find_stream(fresh).width
    except StructureError:
        return []  # such an architecture was never cut; the caller says what differs
    if left > ours.width:
        raise StructureError(
            f"{folder} has {left} hidden features, the model only {ours.width}; start from the unpruned model"
        )
    changes = keep_hidden(model, torch.arange(left))
    if changes:
        record = getattr(model.config, "hfcompress", None) or {}
        model.config.hfcompress = {"version": RECORD_VERSION, **record, "hidden": [left, ours.before]}
    return changes


def _match_units(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Cut units to those of `fresh`, and record it."""
    sites = find_sites(model)
    left = {site.name: site.units for site in find_sites(fresh)}
    before = {site.name: site.units for site in sites} | {
        name: pair[1] for name, pair in read_units(model.config).items()
    }
    if left.keys() != {site.name for site in sites}:
        raise StructureError(f"{folder} has {len(left)} places to prune, the model {len(sites)}: they differ in layers")
    for site in sites:
        if left[site.name] > site.units:
            raise StructureError(
                f"{folder} has {left[site.name]} units in {site.name}, the model only {site.units}; start from the unpruned model"
            )
    changes = keep_units(
        model, sites, {site.name: torch.arange(left[site.name]) for site in sites if left[site.name] < site.units}
    )
    units = {name: [left[name], before[name]] for name in left if left[name] != before[name]}
    if units:
        record = dict(getattr(model.config, "hfcompress", None) or {"version": RECORD_VERSION})
        model.config.hfcompress = {**record, "units": units}
    return changes
