"""Named settings of bitsandbytes and torchao, and which modules they leave alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import StructureError, family_of
from hfcompress.anatomy.sites import find_stacks, linear_features
from hfcompress.checkpoints.quantizer import DYNAMIC, PRESETS
from hfcompress.quantization.dynamic import dynamic_config


def modules_to_skip(model: nn.Module, *, also: Sequence[str] = ()) -> list[str]:
    """Linear layers that stay as they are: all outside the transformer layers, and those that would not load again.

    Outside are classifiers, question answering and language model heads, poolers and embedding projections: small, and most
    sensitive. transformers' own default quantizes classification heads. Inside, layers that lost all their units have nothing to
    quantize, and transformers stores some weights joined with others (gate and up of DINOv2's SwiGLU), which it cannot take apart
    again once they are quantized.

    Args:
        model: The model, unquantized; its weights are not looked at, so it may be on the meta device.
        also: Further modules to leave alone, by name, as in `named_modules`.

    Returns:
        Full module names, for `llm_int8_skip_modules`.

    Raises:
        ValueError: A name in `also` is not a module of the model.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> modules_to_skip(BertForSequenceClassification(config), also=["bert.encoder.layer.0.output.dense"])
        ['bert.encoder.layer.0.output.dense', 'bert.pooler.dense', 'classifier']
    """
    modules = dict(model.named_modules())
    for name in also:
        if name not in modules:
            raise ValueError(f"quantize.skip names {name!r}, which is not a module of {type(model).__name__}")
    try:
        stacks = find_stacks(model, family_of(model)) or []
        inside: tuple[str, ...] = tuple(f"{path}." for _, path, _ in stacks)
    except StructureError:
        # Not in the table: its layers are the module lists of the base model.
        inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))
    joined = [
        pattern
        for transform in get_model_conversion_mapping(model)  # type: ignore[arg-type]
        if isinstance(transform, WeightConverter)
        for pattern in transform.target_patterns
    ]
    skip = set(also)
    for name, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D) and (
            not name.startswith(inside)
            or 0 in linear_features(module)
            or any(re.search(pattern, f"{name}.weight") for pattern in joined)
        ):
            skip.add(name)
    return sorted(skip)


def make_config(
    preset: str,
    *,
    skip: Sequence[str],
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype | None = None,
    threshold: float | None = None,
) -> BitsAndBytesConfig | TorchAoConfig:
    """The settings of a preset, of bitsandbytes or of torchao.

    Args:
        preset: A name of `PRESETS` or of `DYNAMIC`.
        skip: Modules to leave alone.
        dtype: What 4-bit weights are multiplied in.
        storage: The type of the tensors that hold 4-bit codes; None is uint8. The codes are the same bytes in any. FSDP only shards
            parameters of one type together, so it needs the float type of everything else.
        threshold: Of int8: inputs of this size and more are multiplied in float (LLM.int8, section 3.2); 0 multiplies all in int8.
            None is 6.

    Raises:
        ValueError: No such preset, or a setting that is not of this one.

    Example:
        >>> make_config("nf4-dq", skip=["classifier"]).llm_int8_skip_modules
        ['classifier']
        >>> make_config("nf4", skip=[], storage=torch.bfloat16).bnb_4bit_quant_storage
        torch.bfloat16
    """
    if preset in DYNAMIC:
        if storage is not None or threshold is not None:
            raise ValueError(f"storage and threshold are of bitsandbytes, and {preset} is of torchao; leave them out")
        return dynamic_config(preset, skip=skip)
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join([*PRESETS, *DYNAMIC])}")
    settings = dict(PRESETS[preset])
    if settings.get("load_in_4bit"):
        if threshold is not None:
            raise ValueError(f"threshold is of int8, and {preset} has none; leave it out")
        settings["bnb_4bit_compute_dtype"] = dtype
        settings["bnb_4bit_quant_storage"] = storage or torch.uint8
    else:
        if storage is not None:
            raise ValueError(f"storage is of the 4-bit presets, and {preset} is stored as int8; leave it out")
        if threshold is not None:
            settings["llm_int8_threshold"] = float(threshold)
    return BitsAndBytesConfig(**settings, llm_int8_skip_modules=list(skip))
