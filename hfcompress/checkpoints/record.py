"""The record: what was done to a base model, in order. It lives in `config.hfcompress`, so in `config.json` beside the
weights, and travels with the model through every save, load and push.

    {"version": 1, "units": {"encoder.0.heads": [6, 12], ...}, "layers": {"encoder": [4, 6]}, "hidden": [320, 384],
     "steps": [{"step": "prune", ...}, ...]}

All but the version may be absent. Layers are there for information: the plain config says how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hfcompress.anatomy import StructureError, check_record
from hfcompress.anatomy.sites import RECORD_VERSION, recorded_hidden, recorded_layers

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
    for step in steps:
        check_record({"version": RECORD_VERSION, "units": step.get("units", {})})
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


def read_layers(config: Any) -> dict[str, tuple[int, int]]:
    """Stack name to (layers left, layers before) as recorded; empty if none were dropped.

    Raises:
        StructureError: The record is not valid.
    """
    record = getattr(config, "hfcompress", None)
    check_record({"version": RECORD_VERSION} if record is None else record)
    return {} if record is None else recorded_layers(record)


def read_hidden(config: Any) -> tuple[int, int] | None:
    """Hidden features (left, before) as recorded; None if none were cut, or if the plain config says it.

    Raises:
        StructureError: The record is not valid.
    """
    record = getattr(config, "hfcompress", None)
    check_record({"version": RECORD_VERSION} if record is None else record)
    return None if record is None else recorded_hidden(record)


def read_vocabulary(config: Any) -> tuple[int, int] | None:
    """Tokens (left, before) by the steps that were recorded; None if none were cut.

    Raises:
        StructureError: The record is not valid.

    Example:
        >>> from transformers import BertConfig
        >>> config = BertConfig()
        >>> add_step(config, "vocabulary", left=8000, before=30522)
        >>> read_vocabulary(config)
        (8000, 30522)
    """
    steps = [step for step in read_steps(config) if step.get("step") == "vocabulary"]
    return (steps[-1]["left"], steps[0]["before"]) if steps else None


def needs_building(config: Any) -> bool:
    """Whether a config records shapes that the plain class does not build: units or hidden features that are gone.

    Raises:
        StructureError: The record is not valid.
    """
    return bool(read_units(config)) or read_hidden(config) is not None
