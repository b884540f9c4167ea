"""The record: what was done to a base model, in order. It lives in `config.hfcompress`, so in `config.json` beside the
weights, and travels with the model through every save, load and push.

    {"version": 1, "units": {"encoder.0.heads": [6, 12], ...}, "steps": [{"step": "prune", ...}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hfcompress.anatomy import StructureError, check_record
from hfcompress.anatomy.sites import RECORD_VERSION

_MAX_STEPS = 1000


def read_steps(config: Any) -> list[dict[str, Any]]:
    """The steps recorded in a model's config, oldest first; empty if there is no record.

    Raises:
        StructureError: The record is not valid.
    """
    record = getattr(config, "hfcompress", None)
    if record is None:
        return []
    check_record(record)
    steps = record.get("steps", [])
    if not isinstance(steps, list) or len(steps) > _MAX_STEPS or not all(isinstance(s, Mapping) for s in steps):
        raise StructureError(f"config.hfcompress.steps must be a list of at most {_MAX_STEPS} mappings")
    return [dict(step) for step in steps]


def add_step(config: Any, step: str, **details: Any) -> None:
    """Append a step to the record of a model's config, in place.

    Args:
        config: The model's config.
        step: What was done: "distill", "prune", "quantize", ...
        **details: JSON-able facts about it; floats are kept as they are.

    Raises:
        TypeError: A detail is not JSON-able.
        StructureError: The record that is there is not valid.

    Example:
        >>> from transformers import BertConfig
        >>> config = BertConfig()
        >>> add_step(config, "prune", criterion="magnitude", sparsity=0.5)
        >>> read_steps(config)
        [{'step': 'prune', 'criterion': 'magnitude', 'sparsity': 0.5}]
    """
    details = json.loads(json.dumps(details))
    steps = [*read_steps(config), {"step": step, **details}]
    config.hfcompress = {"version": RECORD_VERSION, **(getattr(config, "hfcompress", None) or {}), "steps": steps}


def read_units(config: Any) -> dict[str, tuple[int, int]]:
    """Site name to (units left, units before) as recorded; empty if nothing was pruned.

    Raises:
        StructureError: The record is not valid.
    """
    record = getattr(config, "hfcompress", None)
    return {} if record is None else check_record(record)
