"""Products in int8 and fp8 by torchao: weights are rounded once, what enters a layer anew in each pass.

Other than packed weights, which are decoded to be multiplied, these are multiplied as they are: on a GPU, and with `torch.compile`,
that is faster. What is saved are safetensors, which transformers and torchao load without hfcompress.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence

import torch
from torch import nn
from transformers import TorchAoConfig

from hfcompress.checkpoints.quantizer import DYNAMIC

_TORCHAO = (0, 16)  # the first that keeps int8 weights in safetensors
_FP8_CAPABILITY = (8, 9)


def require_dynamic(preset: str) -> None:
    """Refuse a preset that cannot be made here, before anything is loaded.

    Args:
        preset: A name of `DYNAMIC`.

    Raises:
        ValueError: torchao is missing or too old, or fp8 finds no GPU that multiplies it.
    """
    least = ".".join(map(str, _TORCHAO))
    try:
        version = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version or tuple(int(part) for part in version.split(".")[:2]) < _TORCHAO:
        found = f", and here is {version}" if version else ""
        raise ValueError(
            f"{preset} needs torchao {least} or later{found}; install it with: pip install 'torchao>={least}'"
        )
    if preset != "fp8-dynamic":
        return
    needed = f"fp8-dynamic needs a GPU of compute capability {'.'.join(map(str, _FP8_CAPABILITY))} or more"
    if not torch.cuda.is_available():
        raise ValueError(f"{needed}, and here is none; int8-dynamic runs anywhere")
    capability = torch.cuda.get_device_capability()
    if capability < _FP8_CAPABILITY:
        name = torch.cuda.get_device_name()
        raise ValueError(f"{needed}, and {name} has {'.'.join(map(str, capability))}; int8-dynamic runs anywhere")


def dynamic_config(preset: str, *, skip: Sequence[str]) -> TorchAoConfig:
    """The settings of torchao: int8 with a scale per row of a weight and per token, or fp8 (e4m3) with the same.

    Args:
        preset: A name of `DYNAMIC`.
        skip: Modules to leave alone.

    Raises:
        ValueError: See `require_dynamic`.
    """
    require_dynamic(preset)
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )

    # Not set_inductor_config: that would change how everything else in this process is compiled.
    if preset == "int8-dynamic":
        # The second version of the format is the one that safetensors can hold.
        settings = Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
    else:
        # A scale for a whole tensor, the default, would make a text's outputs depend on the others of its batch. Rows of zeros, which
        # DeBERTa makes of padding, are divided by their largest value, which therefore has a least one.
        settings = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=1e-12, set_inductor_config=False
        )
    return TorchAoConfig(settings, modules_to_not_convert=list(skip))


@functools.cache
def adds_int8_exactly() -> bool:
    """Whether this CPU adds products of 8-bit numbers as they are.

    CPUs without VNNI (Intel's before Cascade Lake, AMD's before Zen 4) add them in pairs of 16 bits, in which the largest do not fit (oneDNN's
    documentation, "Nuances of int8 computations"). Files are not affected, nor are GPUs.
    """
    largest = torch.full((32, 32), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 32 * 127 * 127).all())


def left_alone(model: nn.Module, preset: str) -> list[str]:
    """Linear layers that cannot be multiplied so: of sides that a GPU does not take, or of a class with a product of its own.

    Args:
        model: The model, unquantized; its weights are not looked at.
        preset: A name of `DYNAMIC`.

    Example:
        >>> left_alone(nn.ModuleDict({"odd": nn.Linear(24, 12), "even": nn.Linear(24, 16)}), "int8-dynamic")
        ['odd']
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (type(module) is not nn.Linear or any(side % DYNAMIC[preset] for side in module.weight.shape))
    ]


def is_dynamic(module: nn.Module) -> bool:
    """Whether a layer's weight is one of torchao's."""
    return type(getattr(module, "weight", None)).__module__.startswith("torchao.")
