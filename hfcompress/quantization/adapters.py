"""Low-rank adapters on a quantized model: where they start (LoftQ), and how they become one model with it.

QLoRA (Dettmers et al. 2023) trains adapters on weights in 4 bits; LoftQ (Li et al. 2023) starts them at what quantization took away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration import linear_weight
from hfcompress.checkpoints.adapters import base_of, read_config, require_peft
from hfcompress.checkpoints.io import load
from hfcompress.checkpoints.packed import as_source
from hfcompress.checkpoints.quantizer import PRESETS
from hfcompress.checkpoints.record import add_step

Round = Callable[[torch.Tensor], torch.Tensor]


def round_weight(weight: torch.Tensor, preset: str) -> torch.Tensor:
    """A weight as bitsandbytes gives it back after quantizing it.

    Args:
        weight: Shape (outputs, inputs), float.
        preset: A name of `PRESETS`.

    Returns:
        The rounded values, same shape, float32.

    Raises:
        ValueError: No such preset.

    Example:
        >>> round_weight(torch.tensor([[1.0, 0.09, -0.5]]), "nf4").tolist()  # codes of NF4, times the largest value
        [[1.0, 0.07958029955625534, -0.5250730514526367]]
    """
    import bitsandbytes as bnb

    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    settings, weight = PRESETS[preset], weight.detach().float().contiguous()
    if settings.get("load_in_8bit"):
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return codes.float() * (scales[:, None] / 127)
    codes, state = bnb.functional.quantize_4bit(
        weight,
        quant_type=settings["bnb_4bit_quant_type"],
        compress_statistics=settings["bnb_4bit_use_double_quant"],
        blocksize=64,
    )
    return bnb.functional.dequantize_4bit(codes, state).reshape(weight.shape).float()


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest matrix of a rank, as a product (Eckart and Young 1936).

    Args:
        matrix: Shape (outputs, inputs).
        rank: 1 or more; what is above the smaller side is filled with zeros.

    Returns:
        a of shape (rank, inputs) and b of shape (outputs, rank), of equal norm, with b @ a near the matrix.

    Example:
        >>> a, b = low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
        >>> (b @ a).round(decimals=3).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    u, values, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    kept = min(rank, len(values))
    a, b = matrix.new_zeros(rank, matrix.shape[1]).float(), matrix.new_zeros(matrix.shape[0], rank).float()
    roots = values[:kept].sqrt()
    a[:kept], b[:, :kept] = roots[:, None] * v[:kept], u[:, :kept] * roots
    return a, b


def loftq(
    weight: torch.Tensor, preset: str, rank: int, *, iterations: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A quantized weight and a low-rank product that together are near the weight (LoftQ: Li et al. 2023, algorithm 1).

    In turn, the weight without the product is quantized, and the product is made the nearest to what is missing. With one iteration
    the quantized weight is that of plain quantization.

    Args:
        weight: Shape (outputs, inputs), float.
        preset: A name of `PRESETS`: how bitsandbytes rounds.
        rank: Of the product.
        iterations: 1 or more (T of the paper).

    Returns:
        The quantized weight's values, shape (outputs, inputs); a, shape (rank, inputs); b, shape (outputs, rank).

    Raises:
        ValueError: No such preset, or rank or iterations below 1.

    Example:
        >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> quantized, a, b = loftq(weight, "nf4", 8)
        >>> bool((weight - quantized - b @ a).norm() < (weight - quantized).norm())
        True
    """
    if rank < 1 or iterations < 1:
        raise ValueError(f"rank and iterations are 1 or more, not {rank} and {iterations}")
    return _alternate(weight.float(), lambda value: round_weight(value, preset), rank, iterations)


def _alternate(
    weight: torch.Tensor, quantize: Round, rank: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    quantized = quantize(weight)
    a, b = low_rank(weight - quantized, rank)
    for _ in range(iterations - 1):
        quantized = quantize(weight - b @ a)
        a, b = low_rank(weight - quantized, rank)
    return quantized, a, b


def refit_weights(
    model: nn.Module,
    full: nn.Module,
    *,
    rank: int = 8,
    iterations: int = 5,
    targets: str | Sequence[str] = "all-linear",
) -> None:
    """Quantize the weights of a quantized model anew around the adapters that they will get (LoftQ with several iterations), in place.

    Such a model is worse than plain quantization by itself, and of use only with adapters that `add_adapters` starts on it, with
    the same rank. It is saved like any other, before it gets them.

    Args:
        model: From `quantize`.
        full: The model it was made from, in float.
        rank: Of the adapters to come.
        iterations: T of the paper; with 1 nothing changes.
        targets: As for `add_adapters`.

    Raises:
        ValueError: The model is not quantized, a target is not there, or `full` does not fit.
    """
    for name in _chosen(model, targets):
        base, weight = model.get_submodule(name), _original(full, name)
        _check_fit(name, base, weight)
        if _bits(base):
            _alternate(weight.to(base.weight.device), partial(_requantized, base), rank, iterations)


def add_adapters(
    model: nn.Module,
    full: nn.Module | None = None,
    *,
    rank: int = 8,
    alpha: int = 16,
    targets: str | Sequence[str] = "all-linear",
    init: str = "loftq",
    dropout: float = 0.0,
) -> nn.Module:
    """Put trainable adapters on the quantized layers of a model; everything else is frozen.

    Args:
        model: From `quantize`, or such a folder loaded again (best with `**without_dropout(config)`); changed in place. Its weights stay as
            they are.
        full: The model it was made from, in float; `init="loftq"` needs it.
        rank: Of the adapters.
        alpha: Their product counts alpha / rank times.
        targets: "all-linear" for every quantized layer; or names of layers as they end, such as ["query", "value"].
        init: "loftq" starts with the product that is nearest to what quantization took away (with `refit_weights` before, this is the
            last step of LoftQ's alternation), "lora" with zero.
        dropout: In front of the adapters, in [0, 1).

    Returns:
        A `peft.PeftModel` around the model.

    Raises:
        ValueError: peft is missing, the model is not quantized, a target is not there, or `full` is missing or does not fit.
    """
    require_peft()
    import peft

    if init not in ("loftq", "lora"):
        raise ValueError(f"init {init!r} is not known; allowed: loftq, lora")
    if init == "loftq" and full is None:
        raise ValueError(
            "init: loftq starts from what quantization took away; pass full, the model in float, or set init to lora"
        )
    names = _chosen(model, targets)
    started = {}
    for name in names if full is not None and init == "loftq" else ():
        base, weight = model.get_submodule(name), _original(full, name)
        _check_fit(name, base, weight)
        started[name] = low_rank(weight.to(base.weight.device) - _values(base), rank)
    adapted: Any = peft.get_peft_model(
        model,  # type: ignore[arg-type]
        peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names),
    )
    with torch.no_grad():
        for name, factors in started.items():
            layer = adapted.get_base_model().get_submodule(name)
            root = (alpha / rank) ** 0.5
            for part, factor in zip((layer.lora_A, layer.lora_B), factors, strict=True):
                part["default"].weight.copy_(factor / root)
    add_step(model.config, "adapt", rank=rank, alpha=alpha, init=init, layers=len(names), dropout=dropout)
    return adapted


def without_dropout(config: Any) -> dict[str, float]:
    """The settings of a config that switch off its dropout, as `from_pretrained` takes them.

    What quantization took away is less than what dropout takes away at random: adapters that are trained with it learn about it
    instead, and end farther from the model in full precision than they began.

    Example:
        >>> from transformers import BertConfig
        >>> without_dropout(BertConfig())
        {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
    """
    return {
        name: 0.0
        for name, value in config.to_dict().items()
        if "drop" in name and isinstance(value, float) and value > 0
    }


def _chosen(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The full names of the layers that get adapters."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    quantized = [name for name in linear if _bits(model.get_submodule(name))]
    if not quantized:
        raise ValueError(f"{type(model).__name__} has no quantized layers to put adapters on; quantize it first")
    if targets == "all-linear":
        return quantized
    endings = [targets] if isinstance(targets, str) else list(targets)
    for ending in endings:
        if not any(name == ending or name.endswith(f".{ending}") for name in linear):
            raise ValueError(f"targets names {ending!r}, which is no linear layer of {type(model).__name__}")
    return [name for name in linear if any(name == ending or name.endswith(f".{ending}") for ending in endings)]


def _original(full: nn.Module, name: str) -> torch.Tensor:
    """The weight of a layer before quantization; shape (outputs, inputs), float32."""
    try:
        return linear_weight(full.get_submodule(name)).float()
    except AttributeError:
        raise ValueError(f"the full model has no {name}; pass the model that was quantized") from None


def _check_fit(name: str, base: Any, weight: torch.Tensor) -> None:
    shape = tuple(base.weight.quant_state.shape) if _bits(base) == 4 else tuple(base.weight.shape)
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"{name} is {tuple(weight.shape)} in the full model and {shape} in the quantized one; pass the model that was quantized"
        )


def _bits(module: nn.Module) -> int:
    """8 or 4 of a layer of bitsandbytes, else 0."""
    kind = type(module).__name__ if type(module).__module__.startswith("bitsandbytes") else ""
    return {"Linear8bitLt": 8, "Linear4bit": 4}.get(kind, 0)


def _values(base: Any) -> torch.Tensor:
    """What a quantized layer multiplies with; shape (outputs, inputs), float32."""
    import bitsandbytes as bnb

    if _bits(base) == 0:
        return linear_weight(base).float()
    weight = base.weight
    if _bits(base) == 4:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).reshape(weight.quant_state.shape).float()
    scales = weight.SCB if weight.SCB is not None else base.state.SCB
    codes = weight.data if base.state.CB is None else base.state.CB
    return codes.float() * (scales.float()[:, None] / 127)


def _requantized(base: Any, value: torch.Tensor) -> torch.Tensor:
    """Quantize a value into a layer as transformers does when it loads one, and say what came out."""
    import bitsandbytes as bnb

    device, old = base.weight.device, base.weight
    if _bits(base) == 4:
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(old, name) for name in names}
        value = value.to("cpu", old.quant_state.dtype)
        base.weight = bnb.nn.Params4bit(value, requires_grad=False, module=base, **settings).to(device)
    elif _bits(base) == 8:
        base.weight = bnb.nn.Int8Params(value.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        base.state.CB = base.state.SCB = None  # of the old weight; the next forward pass takes those of the new one
    return _values(base)


def merge_adapter(path_or_repo: str | Path, *, dtype: str = "float32", **kwargs: Any) -> nn.Module:
    """One model in float of a quantized model and its adapter: each weight is what its layer multiplied with, and the product added.

    The outputs are those of both together, but for rounding in float, and of int8 the rounding of each layer's inputs, which goes.
    `quantize` makes a smaller model of it again, which is then another one.

    Args:
        path_or_repo: A folder or repository that holds an adapter.
        dtype: "float32". A type of fewer bits would round the sum, and a preset quantize it anew: neither is the same model.
        **kwargs: Passed to `from_pretrained`: revision, token, device_map, ...

    Returns:
        An ordinary transformers model in eval mode, with the step in its record.

    Raises:
        ValueError: It holds no adapter, or one that is not of LoRA, or `dtype` is another.
    """
    if dtype != "float32":
        raise ValueError(
            f"merging into {dtype} is not exact, for the sum of weight and adapter is rounded again; merge into float32, and quantize that "
            "or keep the adapter beside its model"
        )
    require_peft()
    import peft

    names = {key: value for key, value in kwargs.items() if key in ("revision", "token")}
    base = base_of(path_or_repo, **names)
    if base is None:
        raise ValueError(f"{path_or_repo} holds no adapter; give the folder with adapter_config.json")
    own = {key: value for key, value in kwargs.items() if key != "revision"}  # that is of the adapter
    model: Any = peft.PeftModel.from_pretrained(load(base, **own), str(path_or_repo), **names)  # type: ignore[arg-type]
    model = model.get_base_model()
    done = _to_float(model)
    # A model of its own: the one at hand remembers how to save what it was loaded as.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    config.hfcompress = getattr(read_config(path_or_repo, **names), "hfcompress", None)
    merged = type(model)(config).float()
    merged.load_state_dict(model.state_dict())
    add_step(merged.config, "merge", layers=done)
    return merged.eval()


@torch.no_grad()
def _to_float(model: nn.Module) -> int:
    """Replace each quantized layer by one in float, with its adapter added, in place; says how many had one."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = 0
    adapted: list[str] = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            raise ValueError(
                f"{name} has an adapter of the kind {type(layer).__name__}, and only those of LoRA are merged"
            )
        inside = any(name.startswith(f"{other}.") for other in adapted)
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            weight = _values(base)
            for adapter in layer.active_adapters:
                product = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
                weight = weight + layer.scaling[adapter] * product
            model.set_submodule(name, _float_layer(base, weight))
            adapted.append(name)
            merged += 1
        elif _bits(layer) and not inside:
            model.set_submodule(name, _float_layer(layer, _values(layer)))
    return merged


def _float_layer(base: Any, weight: torch.Tensor) -> nn.Module:
    """A layer of the kind that was there before quantization; `weight` has the shape (outputs, inputs)."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None)
    layer.weight = nn.Parameter(weight.float())
    if base.bias is not None:
        layer.bias = nn.Parameter(base.bias.detach().float())
    return as_source(layer, getattr(base, "source_cls", type(base)))
