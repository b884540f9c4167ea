"""Loading a compressed model by the class its config names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn

import hfcompress.checkpoints.hooks as hooks
from hfcompress.anatomy import StructureError, find_sites
from hfcompress.checkpoints.adapters import base_of, read_config
from hfcompress.checkpoints.damage import damage_named, require_complete, require_room
from hfcompress.checkpoints.hashes import verified_commit
from hfcompress.checkpoints.record import read_steps, read_units


def load(path_or_repo: str | Path, *, revision: str | None = None, **kwargs: Any) -> nn.Module:
    """Load a model, pruned and quantized as its record says, with the class it was saved from.

    Only safetensors are read, never pickles, and no code from the repository is run. What is downloaded is compared with the hashes in
    the repository's card, if it was pushed with hfcompress; the Auto classes compare nothing.

    Args:
        path_or_repo: A folder, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        **kwargs: Passed to `from_pretrained`: dtype, device_map, quantization_config, token, ...

    Returns:
        The model in eval mode.

    Raises:
        StructureError: The record is not valid, the config does not name a class of transformers, or weights are damaged or missing.
        TamperedError: A file of the repository is not the one that was pushed.
        OSError: There is no such folder or repository, or you may not see it.

    Example:
        >>> import tempfile, hfcompress
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
        >>> changes = hfcompress.cut(model, hfcompress.Plan({"encoder.0.heads": (1,)}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = hfcompress.load(folder)
        >>> again.encoder.layer[0].attention.self.num_attention_heads
        1
    """
    token = kwargs.get("token")
    if not Path(path_or_repo).is_dir():
        names = ("token", "cache_dir", "local_files_only", "force_download")
        where = {name: kwargs[name] for name in names if name in kwargs}
        commit = verified_commit(str(path_or_repo), revision=revision, **where)
        if commit is not None:  # what was compared is what is loaded
            revision = commit
            kwargs.pop("force_download", None)
    cls, config = model_class(path_or_repo, revision=revision, token=token)
    if revision is not None and base_of(path_or_repo, revision=revision, token=token) is not None:
        # transformers would look for the same revision of the model that the adapter belongs to.
        kwargs["adapter_kwargs"] = {"revision": revision, **(kwargs.get("adapter_kwargs") or {})}
        revision = None
    wants_info = kwargs.pop("output_loading_info", False)
    with damage_named(path_or_repo):
        if Path(path_or_repo).is_dir():
            require_room(Path(path_or_repo), cls, config)
        settings = {"revision": revision, "use_safetensors": True, "output_loading_info": True, **kwargs}
        model, info = cls.from_pretrained(path_or_repo, **settings)
    require_complete(path_or_repo, info["missing_keys"])
    return (model, info) if wants_info else model


def model_class(
    path_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Any, Any]:
    """The class of transformers that a folder or repository was saved from, and its config, with the record checked.

    Raises:
        StructureError: The record is not valid, or the config does not name a class of transformers.
        OSError: There is no such folder or repository.
    """
    hooks.install()
    try:
        config = read_config(path_or_repo, revision=revision, token=token)
    except OSError as error:
        if Path(path_or_repo).is_dir():
            raise OSError(" ".join(str(error).split())) from error
        raise OSError(f"{path_or_repo} is no folder, and could not be had from the Hub: {_reason(error)}") from error
    read_steps(config)
    return _named_class(config, path_or_repo), config


def units_left(config: Any) -> dict[str, tuple[int, int]]:
    """Site name to (units left, units before) of every site, also of those that nothing was cut from; from the config alone.

    Raises:
        StructureError: The record is not valid, or the config does not name a class of transformers.
    """
    hooks.install()
    with torch.device("meta"):
        sites = find_sites(_named_class(config, config.name_or_path or "the model")._from_config(config))
    before = {name: int(pair[1]) for name, pair in read_units(config).items()}
    for step in read_steps(config):
        # A model whose plain config says its shapes keeps what it had before in the step that pruned it.
        before = {name: int(pair[1]) for name, pair in step.get("units", {}).items()} | before
    return {site.name: (site.units, before.get(site.name, site.units)) for site in sites}


def _named_class(config: Any, name: str | Path) -> Any:
    architectures = config.architectures if isinstance(config.architectures, list) else []
    cls = getattr(transformers, str(architectures[0]), None) if len(architectures) == 1 else None
    if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
        raise StructureError(
            f"{name}: config.architectures is {str(config.architectures)[:80]}, which is not one class of transformers "
            f"{transformers.__version__}; load it with the Auto class of your task"
        )
    return cls


def _reason(error: OSError) -> str:
    """Why a repository cannot be had, in one line."""
    cause = error.__cause__
    if isinstance(cause, GatedRepoError):
        return "it is gated; ask for access on its page, and log in with: hf auth login"
    if isinstance(cause, RepositoryNotFoundError):
        return "there is no such repository, or it is private; log in with: hf auth login, or give token"
    return (str(error).splitlines() or [type(error).__name__])[0]
