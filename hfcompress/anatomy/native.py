"""What the plain config of an architecture can say about shapes that are the same in all layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hfcompress.anatomy.sites import Family, Site, Stack

logger = logging.getLogger(__name__)


def uniform_config(
    config: Any, family: Family, sites: Sequence[Site], *, units: Mapping[str, int] | None = None
) -> Any | None:
    """A config that says how many units every site has. None if the architecture has no words for it.

    Sites that one field describes must have the same number of units; encoders and decoders, or two towers, may have
    fields of their own. The answer is only as good as the architecture's own validation; `portable_config` builds a model
    to be sure.

    Args:
        config: The config to start from; left as it is.
        family: Its family.
        sites: All sites of the model.
        units: Site name to units, where they are others than now.

    Returns:
        The new config, or None.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import family_of, find_sites
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
        >>> ask = lambda units: uniform_config(model.config, family_of(model), find_sites(model), units=units)
        >>> ask({"encoder.0.neurons": 16}).intermediate_size
        16
        >>> ask({"encoder.0.heads": 3}) is None
        True
    """
    config = copy.deepcopy(config)
    said: dict[tuple[str, str], int | float] = {}
    try:
        for site in sites:
            count = site.units if units is None else units.get(site.name, site.units)
            stack = next(s for s in family.stacks if s.name == site.stack.partition(".")[0])
            part = getattr(config, stack.config) if stack.config else config
            fields = (
                _heads(part, family, stack, site, count)
                if site.kind == "heads"
                else _width(part, family, stack, site, count)
            )
            if not count or fields is None:
                return None
            for field, value in fields.items():
                if said.setdefault((stack.config, field), value) != value:
                    return None
        for (part_name, field), value in said.items():
            setattr(getattr(config, part_name) if part_name else config, field, value)
        return type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RuntimeError, StrictDataclassError) as error:
        # Strict configs validate what is set and what is read back, with errors of many kinds; the answer is then no.
        logger.debug("%s does not take these shapes: %s", type(config).__name__, error)
        return None


def _heads(config: Any, family: Family, stack: Stack, site: Site, groups: int) -> dict[str, int] | None:
    """Fields for a number of heads (or key-value groups); None if the config cannot say it."""
    key = family.heads_key if stack.heads_key is None else stack.heads_key
    heads = groups * site.query_heads
    if family.head_dim_key is None:
        # The head dimension follows from the number of heads, so that must stay; a list has one number for each stage.
        now = getattr(config, key)
        if heads != now and not isinstance(now, list | tuple):
            return None
        return {} if groups == site.units else None
    fields = {family.head_dim_key: site.width // site.query_heads, key: heads}
    return fields | ({} if family.kv_heads_key is None else {family.kv_heads_key: groups})


def _width(config: Any, family: Family, stack: Stack, site: Site, count: int) -> dict[str, int | float] | None:
    """The field for a number of neurons; None if the config cannot say it."""
    key = family.width_key if stack.width_key is None else stack.width_key
    if key is None:
        return {} if count == site.units else None
    if not family.width_per_hidden:
        return {key: count}
    if count % site.hidden == 0 or isinstance(getattr(config, key), float):
        value = count / site.hidden
        return {key: value if isinstance(getattr(config, key), float) else int(value)}
    return {} if count == site.units else None


def forget_per_layer(config: Any) -> None:
    """Drop per-layer settings that an earlier save left in a config, in place; they are computed anew when it is saved."""
    if getattr(config, "is_heterogeneous", False):
        config.per_layer_config = None
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
