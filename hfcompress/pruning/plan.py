"""The plan: which units, layers and hidden features stay. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy import Change, StructureError, drop_layers, find_sites, find_stream, keep_hidden, keep_units
from hfcompress.anatomy.depth import check_layers
from hfcompress.anatomy.sites import RECORD_VERSION, check_record
from hfcompress.anatomy.stream import check_index, cut_stream


@dataclass(frozen=True)
class Plan:
    """What stays; everything is counted in the model as it is before any of the plan is carried out.

    Attributes:
        keep: Site name to the indices of the units that stay, ascending.
        layers: Stack name to the indices of the layers that stay, ascending; stacks not named keep all.
        hidden: Indices of the features of the residual stream that stay, ascending; None for all.

    Example:
        >>> Plan.from_dict(Plan({"encoder.0.heads": (0, 2)}, layers={"encoder": (0, 1)}).to_dict())
        Plan(keep={'encoder.0.heads': (0, 2)}, layers={'encoder': (0, 1)}, hidden=None)
    """

    keep: dict[str, tuple[int, ...]]
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    hidden: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        values: dict[str, Any] = {"keep": {name: list(units) for name, units in self.keep.items()}}
        if self.layers:
            values["layers"] = {name: list(layers) for name, layers in self.layers.items()}
        if self.hidden is not None:
            values["hidden"] = list(self.hidden)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        hidden = values.get("hidden")
        return cls(
            {name: tuple(units) for name, units in values["keep"].items()},
            {name: tuple(layers) for name, layers in values.get("layers", {}).items()},
            None if hidden is None else tuple(hidden),
        )


def cut(model: nn.Module, plan: Plan) -> list[Change]:
    """Remove in place what a plan drops; afterwards the forward equals the gated forward.

    The shapes are written to `model.config.hfcompress`, from which `from_pretrained` rebuilds them; the steps recorded
    there stay. A sublayer with no units left is skipped: it only adds the bias of its last projection. First units go,
    then layers, then hidden features; the plan is checked before anything is touched.

    Args:
        model: A transformers model, not wrapped, not quantized.
        plan: What stays; sites and stacks not named stay as they are.

    Returns:
        The parameters that were replaced, in order, for an optimizer that holds the old ones; what one step put in may be
        replaced by the next.

    Raises:
        StructureError: The plan does not fit the model.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
        >>> changes = cut(model, Plan({"encoder.0.heads": (1, 2), "encoder.0.neurons": tuple(range(16))}))
        >>> model.config.hfcompress["units"]
        {'encoder.0.heads': [2, 4], 'encoder.0.neurons': [16, 64]}
    """
    sites = find_sites(model)
    config = model.config
    before = original_units(model)
    hidden = None if plan.hidden is None else torch.tensor(plan.hidden, dtype=torch.long)
    check_layers(model, plan.layers)
    if hidden is not None:
        stream = find_stream(model)
        check_index(stream, hidden)
    changes = keep_units(
        model, sites, {name: torch.tensor(units, dtype=torch.long) for name, units in plan.keep.items()}
    )
    left = {site.name: site.units for site in find_sites(model)}
    units = {name: [left[name], before[name]] for name in left if left[name] != before[name]}
    if units:
        config.hfcompress = {**(getattr(config, "hfcompress", None) or {}), "version": RECORD_VERSION, "units": units}
    changes += drop_layers(model, plan.layers)
    if hidden is not None and hidden.numel() < stream.width:
        # What was found before holds no longer if modules went.
        changes += cut_stream(model, stream, hidden) if not (plan.keep or plan.layers) else keep_hidden(model, hidden)
        record = getattr(config, "hfcompress", None) or {}
        config.hfcompress = {"version": RECORD_VERSION, **record, "hidden": [hidden.numel(), stream.before]}
    return changes


def original_units(model: nn.Module) -> dict[str, int]:
    """Units of every site before anything was pruned, from the model's own record.

    Raises:
        StructureError: The record in the model's config is not valid.
    """
    recorded = getattr(model.config, "hfcompress", None)
    before = {name: pair[1] for name, pair in check_record(recorded).items()} if recorded is not None else {}
    return {site.name: before.get(site.name, site.units) for site in find_sites(model)}


__all__ = ["Plan", "StructureError", "cut", "original_units"]
