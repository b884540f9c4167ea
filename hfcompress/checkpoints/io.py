"""Loading a compressed model by the class its config names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from torch import nn

import hfcompress.checkpoints.hooks as hooks
from hfcompress.anatomy import StructureError
from hfcompress.checkpoints.adapters import read_config
from hfcompress.checkpoints.record import read_steps


def load(path_or_repo: str | Path, *, revision: str | None = None, **kwargs: Any) -> nn.Module:
    """Load a model, pruned and quantized as its record says, with the class it was saved from.

    Only safetensors are read, never pickles, and no code from the repository is run.

    Args:
        path_or_repo: A folder, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        **kwargs: Passed to `from_pretrained`: dtype, device_map, quantization_config, token, ...

    Returns:
        The model in eval mode.

    Raises:
        StructureError: The record is not valid, or the config does not name a class of transformers.
        OSError: There is no such folder or repository.

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
    cls, _ = model_class(path_or_repo, revision=revision, token=kwargs.get("token"))
    return cls.from_pretrained(path_or_repo, revision=revision, use_safetensors=True, **kwargs)


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
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{path_or_repo} is no folder, and could not be had from the Hub: {reason}") from error
    read_steps(config)
    architectures = config.architectures or []
    cls = getattr(transformers, str(architectures[0]), None) if len(architectures) == 1 else None
    if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
        raise StructureError(
            f"{path_or_repo}: config.architectures is {architectures}, which is not one class of transformers "
            f"{transformers.__version__}; load it with the Auto class of your task"
        )
    return cls, config
