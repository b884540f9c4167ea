"""What the plain config of an architecture can say about shapes that are the same in all layers."""

from __future__ import annotations

import copy
import logging
from typing import Any

from hfcompress.anatomy.sites import Family, Site

logger = logging.getLogger(__name__)


def uniform_config(config: Any, family: Family, *, heads: Site, neurons: Site, units: tuple[int, int]) -> Any | None:
    """A config that says: so many heads and so many neurons in every layer. None if the architecture has no words for it.

    The answer is only as good as the architecture's own validation; `portable_config` builds a model to be sure.

    Args:
        config: The config to start from; left as it is.
        family: Its family.
        heads: Any of the model's sites of heads with units left.
        neurons: Any of its sites of neurons.
        units: Units of heads and of neurons that every layer has.

    Returns:
        The new config, or None.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import family_of, find_sites
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
        >>> heads, neurons = find_sites(model)
        >>> uniform_config(model.config, family_of(model), heads=heads, neurons=neurons, units=(4, 16)).intermediate_size
        16
        >>> uniform_config(model.config, family_of(model), heads=heads, neurons=neurons, units=(3, 16)) is None
        True
    """
    groups, count = units
    config = copy.deepcopy(config)
    if not groups or not count:
        return None
    per_group = heads.query_heads
    if family.head_dim_key is None and groups * per_group != getattr(config, family.heads_key):
        return None
    try:
        if family.head_dim_key is not None:
            setattr(config, family.head_dim_key, heads.width // per_group)
        setattr(config, family.heads_key, groups * per_group)
        if family.kv_heads_key is not None:
            setattr(config, family.kv_heads_key, groups)
        if not _set_width(config, family, count, before=neurons.units):
            return None
        return type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        # Strict configs validate what is set and what is read back, with errors of many kinds; the answer is then no.
        logger.debug("%s does not take %s heads and %s neurons: %s", type(config).__name__, groups, count, error)
        return None


def _set_width(config: Any, family: Family, count: int, *, before: int) -> bool:
    """Write the number of neurons; False if the config cannot say it."""
    if family.width_key is None:
        return count == before
    if not family.width_per_hidden:
        setattr(config, family.width_key, count)
        return True
    if count % config.hidden_size:
        return count == before
    setattr(config, family.width_key, count // config.hidden_size)
    return True
