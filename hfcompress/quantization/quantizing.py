"""Quantization of a saved model with bitsandbytes or torchao, through transformers' own loader."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.checkpoints.adapters import ADAPTER_FILE
from hfcompress.checkpoints.damage import damage_named
from hfcompress.checkpoints.io import load, model_class
from hfcompress.checkpoints.quantizer import DYNAMIC
from hfcompress.checkpoints.record import add_step
from hfcompress.quantization.dynamic import adds_int8_exactly, is_dynamic, left_alone, require_dynamic
from hfcompress.quantization.presets import make_config, modules_to_skip

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantize(
    path_or_repo: str | Path,
    preset: str,
    *,
    skip: Sequence[str] = (),
    dtype: str = "auto",
    compute_dtype: str = "auto",
    storage: str | None = None,
    threshold: float | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a model, pruned or not, with its transformer layers quantized.

    Heads, poolers and everything else outside the transformer layers stays as it is. The result is an ordinary
    transformers model: `save_pretrained` and `from_pretrained` know what it is.

    Args:
        path_or_repo: A folder that `save_pretrained` wrote, or a repository on the Hub.
        preset: "int8", "nf4", "nf4-dq", "fp4" or "fp4-dq" of bitsandbytes; dq: the block scales are quantized as well. Or "int8-dynamic"
            or "fp8-dynamic" of torchao, which multiply in int8 or fp8: see `hfcompress.quantization.dynamic`.
        skip: Further modules to leave alone.
        dtype: Of everything that is not quantized: "auto" keeps what the model has (bfloat16 with "fp8-dynamic", which multiplies in
            nothing else); or a name of a float type.
        compute_dtype: What 4-bit weights are multiplied in: "auto" is `dtype`; or a name of a float type.
        storage: Of 4-bit weights: the float type that FSDP shards them as, which has to be `dtype`; None is uint8.
        threshold: Of int8: inputs of this size and more are multiplied in float; None is 6, and 0 multiplies all in int8.
        device_map: As for `from_pretrained`: "auto" spreads the layers over all GPUs, for inference; None puts the whole model on this
            process's own GPU, or on the CPU.
        **kwargs: Passed to `from_pretrained`: revision, token, max_memory, ...

    Returns:
        The quantized model in eval mode, with the step in its record.

    Raises:
        ValueError: Unknown preset, module or type, the model is quantized already, the device map mixes CPU and GPU, bitsandbytes or
            torchao is missing, or there is no GPU for fp8.
    """
    if preset in DYNAMIC:
        require_dynamic(preset)
        dtype = _dynamic_dtype(preset, dtype, compute_dtype)
    elif importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantization needs bitsandbytes; install it with: pip install bitsandbytes")
    if (Path(path_or_repo) / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{path_or_repo} holds an adapter; make one model of it first with merge_adapter, and quantize that"
        )
    cls, config = model_class(path_or_repo, **{k: v for k, v in kwargs.items() if k in ("revision", "token")})
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path_or_repo} is quantized already; quantize the model it was made from")
    for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype), ("storage", storage or "auto")):
        if value != "auto" and value not in _DTYPES:
            raise ValueError(f"{name} {value!r} is not known; allowed: auto, {', '.join(_DTYPES)}")
    _check_device_map(device_map)
    with damage_named(path_or_repo), torch.device("meta"):
        blank = cls._from_config(config)
    leave = modules_to_skip(blank, also=skip)
    odd = left_alone(blank, preset) if preset in DYNAMIC else []
    rest = _DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
    model = load(
        path_or_repo,
        quantization_config=make_config(
            preset,
            skip=sorted({*leave, *odd}),
            dtype=_DTYPES.get(compute_dtype, rest),
            storage=_DTYPES.get(storage or "auto"),
            threshold=threshold,
        ),
        device_map=own_device_map() if device_map is None else device_map,
        dtype=rest,
        **kwargs,
    )
    count = sum(_is_quantized(module) for module in model.modules())
    # As it came out: transformers also leaves alone what it keeps in float32 (T5's wo), and layers of a class of their own.
    left = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not _is_quantized(m)}
    if count == 0:
        kinds = {type(module).__name__ for name, module in left.items() if name not in leave}
        reason = f"all are skipped ({leave})"
        if odd and kinds == {"Linear"}:
            reason = f"none has sides that are multiples of {DYNAMIC[preset]}"
        elif kinds:
            reason = f"transformers does not quantize {', '.join(sorted(kinds))}"
        raise ValueError(f"nothing in {path_or_repo} was quantized: of its linear layers, {reason}")
    if preset == "int8-dynamic" and model.device.type == "cpu" and not adds_int8_exactly():
        logger.warning(
            "this CPU (without VNNI) adds 8-bit products inexactly: what %s gives on it is wrong; on others it is right",
            preset,
        )
    facts: dict[str, Any] = {"storage": storage} if storage else {}
    facts |= {"threshold": threshold} if threshold is not None else {}
    facts |= {"compute_dtype": compute_dtype} if compute_dtype != "auto" else {}
    add_step(
        model.config,
        "quantize",
        preset=preset,
        skipped=sorted(left),
        dtype=str(rest).removeprefix("torch."),
        layers=count,
        **facts,
    )
    logger.info("quantized %d linear layers with %s; left alone: %s", count, preset, ", ".join(left) or "nothing")
    return model


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes") or is_dynamic(module)


def _dynamic_dtype(preset: str, dtype: str, compute_dtype: str) -> str:
    """The type of everything that torchao does not quantize."""
    if compute_dtype != "auto":
        raise ValueError(f"compute_dtype is of 4-bit weights, and {preset} has none; leave it out")
    if preset != "fp8-dynamic":
        return dtype
    if dtype not in ("auto", "bfloat16"):
        raise ValueError(f"fp8-dynamic multiplies in bfloat16, not {dtype}; leave dtype out")
    return "bfloat16"


def _check_device_map(device_map: Any) -> None:
    """Refuse what transformers would answer with layers that are silently not quantized."""
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"device_map puts some layers on {', '.join(sorted(places & {'cpu', 'disk'}))} and others elsewhere, where they would not be "
            "quantized; use GPUs only, or the CPU for all of it"
        )


def own_device_map() -> dict[str, Any]:
    """The whole model on the device of this process: its own GPU under `accelerate launch`, else the CPU.

    A map made by one process and used by all would put every copy on the first GPU.
    """
    if not torch.cuda.is_available():
        return {"": "cpu"}
    from accelerate import PartialState

    return {"": PartialState().local_process_index}
