"""How large a model is: parameters of its architecture, bytes in memory, bytes on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of the architecture, whatever number of bits each is stored in.

    A bitsandbytes 4-bit weight holds two parameters a byte and counts with its logical shape, and so does a weight that hfcompress
    packed. Tied weights count once.

    Args:
        model: Any module, quantized or not.

    Returns:
        The number of scalar parameters.

    Example:
        >>> count_parameters(nn.Linear(3, 5))
        20
    """
    counted: dict[int, int] = {}
    for module in model.modules():
        if hasattr(module, "scheme") and hasattr(module, "in_features"):  # packed: its weight is codes in a buffer
            counted[id(module)] = math.prod((module.out_features, module.in_features))
        for parameter in module.parameters(recurse=False):
            counted.setdefault(id(parameter), _logical_elements(module, parameter))
    return sum(counted.values())


def memory_bytes(model: nn.Module) -> int:
    """Bytes that the weights of a model take in memory, as they are stored now.

    Counts parameters and buffers (the non-persistent ones too) and what bitsandbytes keeps beside them:
    scales and code books of 4-bit weights, row scales of 8-bit weights. `get_memory_footprint` of
    transformers leaves those out. Memory that is shared (tied weights) counts once. Gradients, optimizer
    state and activations are not counted.

    Args:
        model: Any module, quantized or not; on the meta device the result is what it would take.

    Returns:
        Size in bytes.

    Example:
        >>> memory_bytes(nn.Linear(3, 5)), memory_bytes(nn.Linear(3, 5).half())
        (80, 40)
    """
    sizes: dict[tuple[Any, ...], int] = {}
    for module in model.modules():
        for tensor in _stored_tensors(module):
            place = (id(tensor),) if tensor.is_meta else (tensor.device, tensor.data_ptr())
            size_bytes = tensor.numel() * tensor.element_size()
            sizes[place] = max(size_bytes, sizes.get(place, 0))
    return sum(sizes.values())


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files (`*.safetensors`) of a saved model or adapter; config and tokenizer do not
    count.

    Args:
        folder: Where `save_pretrained` wrote; the shards of a sharded model are summed.

    Returns:
        Size in bytes.

    Raises:
        ValueError: The folder does not exist or has no such file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"weight": torch.zeros(1000)}, f"{folder}/model.safetensors")
        ...     4000 < disk_bytes(folder) < 4200
        True
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; pass the folder that save_pretrained wrote")
    files = list(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no *.safetensors file; save the model there with save_pretrained first")
    return sum(file.stat().st_size for file in files)


def _logical_elements(module: nn.Module, parameter: nn.Parameter) -> int:
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is None and parameter is getattr(module, "weight", None):
        # Wrappers such as FSDP turn the 4-bit weight into a plain parameter; the module still has the state.
        quant_state = getattr(module, "quant_state", None)
    if quant_state is None:
        return parameter.numel()
    shape = getattr(quant_state, "shape", None)
    return math.prod((module.out_features, module.in_features) if shape is None else shape)


def _stored_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        yield from _plain_tensors(tensor)
    weight = getattr(module, "weight", None)
    for holder in (getattr(weight, "quant_state", None), getattr(module, "quant_state", None)):
        yield from _tensors_of(holder)
        yield from _tensors_of(getattr(holder, "state2", None))  # the quantized scales of double quantization
    # 8 bit: the scales are on the weight before the first forward, on the module's matmul state after it.
    yield from (t for t in (getattr(weight, "CB", None), getattr(weight, "SCB", None)) if torch.is_tensor(t))
    if hasattr(weight, "has_fp16_weights"):
        yield from _tensors_of(getattr(module, "state", None))


def _tensors_of(holder: object) -> Iterator[torch.Tensor]:
    yield from (value for value in getattr(holder, "__dict__", {}).values() if torch.is_tensor(value))


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Those with memory of their own: a wrapper subclass (sharded, quantized by others) only has parts."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))
