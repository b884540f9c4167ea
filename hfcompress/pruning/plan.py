"""The plan: which units stay, per site. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy import Change, StructureError, find_sites, keep_units
from hfcompress.anatomy.sites import RECORD_VERSION, check_record


@dataclass(frozen=True)
class Plan:
    """Which units stay.

    Attributes:
        keep: Site name to the indices of the units that stay, ascending, counted in the model as it is.

    Example:
        >>> Plan.from_dict(Plan({"encoder.0.heads": (0, 2)}).to_dict())
        Plan(keep={'encoder.0.heads': (0, 2)})
    """

    keep: dict[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {"keep": {name: list(units) for name, units in self.keep.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        return cls({name: tuple(units) for name, units in values["keep"].items()})


def cut(model: nn.Module, plan: Plan) -> list[Change]:
    """Remove in place what a plan drops; afterwards the forward equals the gated forward.

    The shapes are written to `model.config.hfcompress`, from which `from_pretrained` rebuilds them; the steps recorded
    there stay. A sublayer with no units left is skipped: it only adds the bias of its last projection.

    Args:
        model: A transformers model, not wrapped, not quantized.
        plan: Which units stay; sites not named stay as they are.

    Returns:
        The parameters that were replaced, for an optimizer that holds the old ones.

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
    changes = keep_units(
        model, sites, {name: torch.tensor(units, dtype=torch.long) for name, units in plan.keep.items()}
    )
    left = {site.name: site.units for site in find_sites(model)}
    units = {name: [left[name], before[name]] for name in left if left[name] != before[name]}
    if units:
        config.hfcompress = {**(getattr(config, "hfcompress", None) or {}), "version": RECORD_VERSION, "units": units}
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
