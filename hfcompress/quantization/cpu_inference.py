"""The form of 4-bit weights in which CPUs with AVX512-BF16 multiply them fastest; for inference, and only when asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_ROWS, _COLUMNS = 32, 64  # what the kernel takes at a time
_STATE = "_before_packing"


@dataclass(frozen=True)
class Packed:
    """What `pack_for_cpu` did.

    Attributes:
        packed: Names of the layers that were packed.
        left: Name to reason for the 4-bit layers that were not.
    """

    packed: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        """In a line, for a log."""
        return f"packed {len(self.packed)} of {len(self.packed) + len(self.left)} layers in 4 bits for this CPU"


def pack_for_cpu(model: nn.Module) -> Packed:
    """Pack the 4-bit weights of a model for fast inference on this CPU, in place.

    bitsandbytes packs them so by itself in the first forward pass, which corrupts what is saved later and breaks training and odd
    widths; hfcompress switches that off, and this does it where it is safe. Products are then computed in bfloat16, so outputs change
    by its rounding. It pays for few tokens at a time, as when a decoder writes: a layer of 1024 x 1024 took 0.3 of the time for one
    token and 0.5 for eight (one thread, against unpacked), but twice as long for 512. The model is for inference until `unpack_for_cpu`: a pass that would need gradients is refused. Saving unpacks
    first, to the bit.

    Args:
        model: Quantized with nf4 or fp4, on the CPU.

    Returns:
        Which layers were packed, and which were not and why.

    Raises:
        ValueError: The CPU has no AVX512-BF16, the model is in training mode, or has no 4-bit layers.
    """
    import bitsandbytes as bnb
    from bitsandbytes import functional

    if not functional.has_avx512bf16():
        raise ValueError("this CPU has no AVX512-BF16, for which 4-bit weights would be packed; use the model as it is")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers in 4 bits; quantize it with nf4 or fp4 first")
    if model.training:
        raise ValueError(
            "the model is in training mode, and packed weights are for inference only; call model.eval() first"
        )
    packed, left = [], {}
    for name, module in layers.items():
        reason = _why_not(module)
        if reason:
            left[name] = reason
        elif not hasattr(module, _STATE):
            _pack(module, functional)
        if not reason:
            packed.append(name)
    return Packed(tuple(packed), left)


def unpack_for_cpu(model: nn.Module) -> None:
    """Undo `pack_for_cpu` exactly, in place; a model that is not packed stays as it is."""
    for module in _packed(model):
        _unpack(module)


def _packed(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, _STATE))


def _why_not(module: Any) -> str:
    rows, columns = module.weight.quant_state.shape
    if module.weight.device.type != "cpu":
        return f"it is on {module.weight.device}"
    if rows % _ROWS or columns % _COLUMNS or module.weight.quant_state.blocksize % _COLUMNS:
        return f"{columns} inputs and {rows} outputs; the kernel takes multiples of {_COLUMNS} and {_ROWS}"
    return ""


def _pack(module: Any, functional: Any) -> None:
    weight = module.weight
    # Of the scales the packed form keeps bfloat16 only, so the way back is kept here: they are an eighth of the codes, or less.
    before = copy.copy(weight.quant_state)
    codes, state = functional._convert_weight_packed_for_cpu(weight.data, copy.copy(weight.quant_state))
    shape, dtype = weight.data.shape, weight.data.dtype
    weight.data, weight.quant_state, module.quant_state = codes, state, state
    hooks = (
        module.register_forward_pre_hook(_refuse_gradients),
        module.register_state_dict_pre_hook(lambda own, *_: _unpack(own)),
    )
    setattr(module, _STATE, (before, shape, dtype, hooks))


def _unpack(module: Any) -> None:
    from bitsandbytes import functional

    if not hasattr(module, _STATE):
        return
    before, shape, dtype, hooks = getattr(module, _STATE)
    delattr(module, _STATE)
    # The codes come back as they were; bitsandbytes' own way back rounds the scales.
    scratch = copy.copy(module.weight.quant_state)
    scratch.original_nested, scratch.original_storage_type = False, None
    codes, _ = functional._convert_weight_packed_for_cpu_inverse(module.weight.data, scratch)
    module.weight.data = codes.reshape(-1).view(dtype).reshape(shape)
    module.weight.quant_state = module.quant_state = before
    for hook in hooks:
        hook.remove()


def _refuse_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: ARG001
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise ValueError(
            "packed weights pass no gradients; call unpack_for_cpu(model) before training, or use torch.no_grad()"
        )
