"""Floating-point operations of one forward pass, counted on a weightless copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_META = torch.device("meta")
_KERNEL_CHOICES = ("_attn_implementation", "_experts_implementation")  # config fields; "eager" is counted in full


def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Floating-point operations of one forward pass for these inputs: two for each multiply-add.

    Counts matrix products and convolutions, those inside attention too; elementwise work, normalisation,
    softmax and table look-ups do not count. What is masked counts, as the hardware computes it all the same:
    causal and padded positions are not subtracted. Quantized layers count as the dense layers they stand for.

    The count is taken from a copy of the model as it is now (pruned in place, with adapters, quantized),
    which has shapes but no weights, so it takes no memory and next to no time. Models that look at values on
    their way are run on zeros instead. Neither the model nor the inputs are changed; hooks on the model are
    not called.

    Args:
        model: A transformers model.
        inputs: Keyword arguments of its forward, such as those of `example_inputs`.

    Returns:
        The number of operations; divide by 2 for multiply-adds (MACs).

    Example:
        >>> count_flops(nn.Linear(8, 16), {"input": torch.zeros(4, 8)}) == 2 * 4 * 8 * 16
        True
    """
    try:
        # The mask hides positions but saves no operation, and mask code is where models look at values.
        shapes = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return _count(model, shapes, _META)
    except (RuntimeError, NotImplementedError):  # no values on the meta device
        devices = [value.device for value in inputs.values() if torch.is_tensor(value)]
        return _count(model, inputs, devices[0] if devices else torch.device("cpu"))


def _count(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> int:
    skeleton = _skeleton(model, device).eval()
    inputs = {name: _float32(value.to(device)) if torch.is_tensor(value) else value for name, value in inputs.items()}
    # Fused attention kernels are not all known to the counter: take the one that is made of matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        skeleton(**inputs)
    return counter.get_total_flops()


def _skeleton(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the model whose parameters are zeros without memory, which runs on any device in float32.

    `copy.deepcopy` takes what it finds in its memo instead of copying, so the weights are never duplicated.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes."):
            memo[id(module)] = _dense(module, device)
            continue
        for attribute, value in vars(module).items():
            if attribute.endswith("_hooks"):  # they belong to who set them, and may hold tensors or a whole trainer
                memo[id(value)] = type(value)()
            elif torch.is_tensor(value):
                memo[id(value)] = _float32(value.detach().to(device))
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = _zeros(parameter.shape, parameter.dtype, device)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = _float32(buffer.detach().to(device))
    skeleton = copy.deepcopy(model, memo)
    remove_hook_from_module(skeleton, recurse=True)  # of a device map: they would move tensors to other devices
    for module in skeleton.modules():
        config = getattr(module, "config", None)
        for name in _KERNEL_CHOICES:
            if hasattr(config, name):
                setattr(config, name, "eager")
    return skeleton


def _dense(module: nn.Linear, device: torch.device) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device=_META)
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, _zeros(parameter.shape, torch.float32, device))
    return linear


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(_float32(torch.zeros((), dtype=dtype, device=device)).expand(shape), requires_grad=False)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    """One precision for all floating tensors: what casts between several (bitsandbytes) is not copied."""
    return tensor.float() if tensor.is_floating_point() else tensor
