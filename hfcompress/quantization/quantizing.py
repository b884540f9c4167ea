"""Quantization of a saved model with bitsandbytes, through transformers' own loader."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfcompress.checkpoints.io import load, model_class
from hfcompress.checkpoints.record import add_step
from hfcompress.quantization.presets import make_config, modules_to_skip

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantize(
    path_or_repo: str | Path,
    preset: str,
    *,
    skip: Sequence[str] = (),
    dtype: str = "auto",
    device_map: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a model, pruned or not, with its transformer layers quantized.

    Heads, poolers and everything else outside the transformer layers stays as it is. The result is an ordinary
    transformers model: `save_pretrained` and `from_pretrained` know what it is.

    Args:
        path_or_repo: A folder that `save_pretrained` wrote, or a repository on the Hub.
        preset: "int8", "nf4", "nf4-dq", "fp4" or "fp4-dq"; dq: the block scales are quantized as well.
        skip: Further modules to leave alone.
        dtype: Of everything that is not quantized: "auto" keeps what the model has; or a name of a float type.
        device_map: As for `from_pretrained`; None puts the whole model on this process's own GPU, or on the CPU.
        **kwargs: Passed to `from_pretrained`: revision, token, ...

    Returns:
        The quantized model in eval mode, with the step in its record.

    Raises:
        ValueError: Unknown preset or module, the model is quantized already, or bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantization needs bitsandbytes; install it with: pip install bitsandbytes")
    cls, config = model_class(path_or_repo, **{k: v for k, v in kwargs.items() if k in ("revision", "token")})
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path_or_repo} is quantized already; quantize the model it was made from")
    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; allowed: auto, {', '.join(_DTYPES)}")
    with torch.device("meta"):
        blank = cls._from_config(config)
    leave = modules_to_skip(blank, also=skip)
    rest = _DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
    model = load(
        path_or_repo,
        quantization_config=make_config(preset, skip=leave, dtype=rest),
        device_map=own_device_map() if device_map is None else device_map,
        dtype=rest,
        **kwargs,
    )
    count = sum(type(module).__module__.startswith("bitsandbytes") for module in model.modules())
    if count == 0:
        raise ValueError(
            f"nothing in {path_or_repo} was quantized: it has no linear layers that are not skipped ({leave})"
        )
    add_step(
        model.config, "quantize", preset=preset, skipped=leave, dtype=str(rest).removeprefix("torch."), layers=count
    )
    logger.info("quantized %d linear layers with %s; left alone: %s", count, preset, ", ".join(leave) or "nothing")
    return model


def own_device_map() -> dict[str, Any]:
    """The whole model on the device of this process: its own GPU under `accelerate launch`, else the CPU.

    A map made by one process and used by all would put every copy on the first GPU.
    """
    if not torch.cuda.is_available():
        return {"": "cpu"}
    from accelerate import PartialState

    return {"": PartialState().local_process_index}
