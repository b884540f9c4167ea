"""Putting rounded weights into a model: layers of bitsandbytes or packed ones, and the config that loads them again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from hfcompress.calibration import give_back_memory
from hfcompress.checkpoints.packed import PackedLinear
from hfcompress.checkpoints.quantizer import PRESETS, PackedConfig
from hfcompress.checkpoints.record import add_step
from hfcompress.quantization.formats import Rounded
from hfcompress.quantization.presets import make_config, modules_to_skip


def layers_to_quantize(model: nn.Module, *, skip: tuple[str, ...] = ()) -> list[str]:
    """Linear layers that are quantized: all but those of `modules_to_skip`."""
    left = set(modules_to_skip(model, also=skip))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in left and not _stays_float(model, name)
    ]


def _stays_float(model: nn.Module, name: str) -> bool:
    """What transformers keeps in float32 whatever is asked for, such as `wo` of T5."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))


def put_rounded(
    model: PreTrainedModel,
    rounded: Mapping[str, Rounded],
    *,
    compute_dtype: torch.dtype | None = None,
    inputs: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> None:
    """Replace linear layers by ones that hold their rounded weights, in place, and say so in the config and the record.

    If all layers are written in one way that bitsandbytes has, the result is an ordinary model of transformers and bitsandbytes; else
    `import hfcompress` is needed to load what is saved of it.

    Args:
        model: The model that was rounded, in evaluation mode.
        rounded: The layers, by name.
        compute_dtype: What 4-bit weights of bitsandbytes are multiplied in; None is the type of the model.
        inputs: Of packed layers that round what enters them: step and zero point (see `hfcompress.checkpoints.inputs`).

    Raises:
        ValueError: There are none, or the inputs of a layer of bitsandbytes are to be rounded.
    """
    if not rounded:
        raise ValueError("no layer was rounded")
    inputs = inputs or {}
    compute = compute_dtype or model.dtype
    for name, layer in rounded.items():
        linear = model.get_submodule(name)
        model.set_submodule(name, layer.format.layer(linear, layer.grid, layer.codes, compute_dtype=compute))
        give_back_memory()
    names = {name: layer.format.name for name, layer in rounded.items()}
    written = {*names.values()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    skipped = sorted(name for name in linears if name not in rounded)
    if len(written) == 1 and written <= PRESETS.keys():
        config = make_config(next(iter(written)), skip=skipped, dtype=compute)
    else:
        config = PackedConfig(names, compute_dtype=str(compute).removeprefix("torch."), int8_inputs=list(inputs))
    for name, grid in inputs.items():
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear), "PackedConfig has refused it"
        packed.round_inputs(*grid)
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer.postprocess_model(model)


def note_step(model: PreTrainedModel, rounded: Mapping[str, Rounded], **details: object) -> None:
    """Write into the record what was done."""
    names = {name: layer.format.name for name, layer in rounded.items()}
    counts = {form: sum(name == form for name in names.values()) for form in sorted({*names.values()})}
    add_step(model.config, "quantize", preset=", ".join(counts), layers=counts, **details)
