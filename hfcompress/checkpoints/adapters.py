"""Folders and repositories that hold an adapter alone: which model it belongs to, and what was done to both."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file, find_adapter_config_file

from hfcompress.anatomy import StructureError
from hfcompress.checkpoints.damage import damage_named, require_few_layers

ADAPTER_FILE = "adapter_config.json"
# Beside the adapter, which has no config.json for the record to live in: one would pass for a model's.
RECORD_FILE = "hfcompress_record.json"


def require_peft() -> None:
    """Refuse to go on without peft, which is optional.

    Raises:
        ValueError: It is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("adapters need peft; install it with: pip install 'hfcompress[adapters]'")


def base_of(path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """The folder or repository of the model that an adapter belongs to; None if there is no adapter.

    Raises:
        ValueError: The adapter does not say it.
    """
    file = find_adapter_config_file(str(path_or_repo), revision=revision, token=token)
    if file is None:
        return None
    said = _read_json(Path(file))
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{path_or_repo}: {ADAPTER_FILE} does not say base_model_name_or_path; set it to the base's folder"
        )
    return base


def read_config(path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Any:
    """The config of a model; of an adapter that of its base, with what was done to both in its record.

    Raises:
        OSError: There is no such folder or repository.
        ValueError: It is an adapter, and peft is not installed.
    """
    try:
        return _read_plainly(path_or_repo, revision=revision, token=token)
    except (OSError, ValueError):  # which of the two depends on the release
        base = base_of(path_or_repo, revision=revision, token=token)
        if base is None:
            raise
    require_peft()
    config = _read_plainly(base, token=token)
    record = cached_file(
        str(path_or_repo), RECORD_FILE, revision=revision, token=token, _raise_exceptions_for_missing_entries=False
    )
    if record is not None:
        config.hfcompress = _read_json(Path(record))
    return config


def _read_plainly(path_or_repo: str | Path, **where: Any) -> Any:
    with damage_named(path_or_repo):
        values, _ = PretrainedConfig.get_config_dict(path_or_repo, **where)
        require_few_layers(path_or_repo, values)
        names = values.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise StructureError(
                f"{path_or_repo}: architectures in config.json is {str(names)[:80]}, must be a list of names; save the model again"
            )
        return AutoConfig.from_pretrained(path_or_repo, **where)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is not valid JSON; save the adapter again") from None


def save_record(config: Any, folder: str | Path) -> None:
    """Put the record of a model with adapters beside its adapter; a model without a record leaves no file."""
    record = getattr(config, "hfcompress", None)
    if record is not None:
        (Path(folder) / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
