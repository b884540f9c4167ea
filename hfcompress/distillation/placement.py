"""What a distillation takes in memory, and where the teacher goes: worked out from shapes, before anything is loaded.

Weights, gradients and optimizer states follow from the shapes of parameters. Activations do not, so one step is run on
tensors without data (torch's fake tensors), and the bytes that are alive at once are counted: the same kernels and the
same saved tensors as in training, in a second or so, whatever the size of the model. A model for that is built with
`with torch.device("meta"): model = cls._from_config(config)`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast
from unittest import mock

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, pytorch_utils
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import StructureError, find_layers
from hfcompress.anatomy.sites import linear_features
from hfcompress.distillation.logits import kl_divergence
from hfcompress.distillation.students import shared_copy
from hfcompress.measurement import example_inputs, memory_bytes

Precision = Literal["float32", "bfloat16", "float16", "int8", "nf4", "nf4-dq"]
Sharding = Literal["none", "zero2", "zero3", "fsdp"]
# Where parameters are in shards, a teacher that takes no more than this share of the free memory stays whole: then no step waits for it.
WHOLE_SHARE = 0.2

_WIDTHS: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_MIXED = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# bitsandbytes: 4-bit weights in blocks of 64 with a float32 scale each, or with 8-bit scales in blocks of 256; one table of 16
# values a layer, and with quantized scales one of 256 and an offset.
_BLOCK, _SCALE_BLOCK, _TABLE_BYTES, _SCALE_TABLE_BYTES = 64, 256, 16 * 4, 256 * 4 + 4
# 8-bit optimizer states: blocks of 256 with a float32 scale; small tensors and embeddings keep 32 bits.
_STATE_BLOCK, _LEAST_8BIT = 256, 4096
# What fragmentation and the libraries' own workspaces may take.
_USABLE = 0.9


@dataclass(frozen=True)
class Placement:
    """What each part of a distillation takes in one process, and where the teacher goes.

    Attributes:
        student_bytes: The student's parameters and buffers.
        gradient_bytes: Gradients of what is trained.
        bucket_bytes: The copy of them that DistributedDataParallel averages.
        optimizer_bytes: States of the optimizer.
        activation_bytes: What a step keeps for the backward pass, and works with.
        teacher_bytes: The teacher as it is loaded; 0 without one.
        teacher_activation_bytes: What its forward pass works with.
        available_bytes: Memory that this process may use on `device`.
        device: Where the student is.
        optimizer: Its name in `TrainingArguments.optim`.
        teacher_precision: How the teacher is loaded; None without one.
        teacher_device: Where the teacher goes; None without one.
        fits: Whether all of it fits, with a tenth to spare.
        reason: Why this was chosen; where it does not fit, by how much, and what to change.
    """

    student_bytes: int
    gradient_bytes: int
    bucket_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    teacher_bytes: int
    teacher_activation_bytes: int
    available_bytes: int
    device: str
    optimizer: str
    teacher_precision: Precision | None
    teacher_device: str | None
    fits: bool
    reason: str

    @property
    def total_bytes(self) -> int:
        """All that is on the student's device."""
        teacher = self.teacher_bytes + self.teacher_activation_bytes
        return self._own_bytes + (teacher if self.teacher_device == self.device else 0)

    @property
    def _own_bytes(self) -> int:
        states = self.gradient_bytes + self.bucket_bytes + self.optimizer_bytes
        return self.student_bytes + states + self.activation_bytes

    def describe(self) -> str:
        """The parts in one line, to be logged before anything is loaded."""
        parts = [f"student {_said(self.student_bytes)}", f"gradients {_said(self.gradient_bytes)}"]
        if self.bucket_bytes:
            parts.append(f"gradient buckets {_said(self.bucket_bytes)}")
        parts.append(f"{self.optimizer} {_said(self.optimizer_bytes)}")
        if self.teacher_precision is not None:
            where = "" if self.teacher_device == self.device else f" on {self.teacher_device}"
            parts.append(f"teacher {_said(self.teacher_bytes)} {self.teacher_precision}{where}")
        activations = self.activation_bytes
        if self.teacher_device == self.device:
            activations += self.teacher_activation_bytes
        parts.append(f"activations about {_said(activations)}")
        total = f"{_said(self.total_bytes)} of {_said(self.available_bytes)} per process on {self.device}"
        return f"{', '.join(parts)}: {total}; {self.reason}"


# ---- weights, gradients, optimizer ----


def weight_bytes(model: nn.Module, precision: Precision | None = None) -> int:
    """Bytes of a model's weights in a precision; quantized, with the scales that bitsandbytes keeps beside them.

    As `hfcompress.quantize` does it, only the linear layers inside the transformer layers are quantized; embeddings, heads,
    norms and biases keep the type they have.

    Args:
        model: A model that is not quantized; on the meta device, nothing is needed of it but its shapes.
        precision: A floating type or a bitsandbytes preset; None is what the model has.

    Returns:
        Bytes, tied weights once.

    Raises:
        ValueError: The precision is not known.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> with torch.device("meta"):
        ...     model = BertModel(BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64))
        >>> [weight_bytes(model, name) - weight_bytes(model, "float32") for name in ("bfloat16", "int8", "nf4")]
        [-4031616, -72192, -84096]
    """
    if precision is None:
        return memory_bytes(model)
    if precision in _WIDTHS:
        return sum(_in_width(tensor, _WIDTHS[precision]) for tensor in _tensors(model))
    if precision not in ("int8", "nf4", "nf4-dq"):
        raise ValueError(f"precision {precision!r} is not known; allowed: {', '.join(_WIDTHS)}, int8, nf4, nf4-dq")
    quantized = _quantizable(model)
    rest = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model) if id(tensor) not in quantized)
    return rest + sum(_quantized_bytes(count, rows, precision) for count, rows in quantized.values())


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _in_width(tensor: torch.Tensor, width_bytes: int) -> int:
    return tensor.numel() * (width_bytes if tensor.is_floating_point() else tensor.element_size())


def _quantizable(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Id to (entries, rows) of the weights that are quantized."""
    layers = [module for layer in find_layers(model) for module in layer.modules()]
    linear = [module for module in layers if isinstance(module, nn.Linear | Conv1D)]
    return {
        id(module.weight): (module.weight.numel(), linear_features(module)[1])
        for module in linear
        if module.weight.numel()
    }


def _quantized_bytes(count: int, rows: int, precision: str) -> int:
    if precision == "int8":
        return count + 4 * rows
    blocks = math.ceil(count / _BLOCK)
    stored = math.ceil(count / 2) + _TABLE_BYTES
    if precision == "nf4":
        return stored + 4 * blocks
    return stored + blocks + 4 * math.ceil(blocks / _SCALE_BLOCK) + _SCALE_TABLE_BYTES


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of a model: one entry for each trained parameter, in its type.

    Example:
        >>> gradient_bytes(nn.Linear(3, 5))
        80
    """
    return sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad
    )


def optimizer_bytes(model: nn.Module, optim: str = "adamw_torch") -> int:
    """Bytes that an optimizer keeps for a model from the first step on.

    Args:
        model: The model; what is not trained has no states.
        optim: A name as in `TrainingArguments.optim`. Those not told apart here (GaLore, APOLLO and others with fewer
            states than AdamW) count as AdamW.

    Returns:
        Bytes: two float32 numbers per float32 parameter for AdamW, two bytes and scales with 8 bits, nothing for plain SGD.

    Example:
        >>> [optimizer_bytes(nn.Linear(100, 50), name) for name in ("adamw_torch", "sgd", "adafactor")]
        [40400, 0, 800]
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(
        _state_bytes(parameter, optim, is_embedding=id(parameter) in embeddings)
        for parameter in model.parameters()
        if parameter.requires_grad
    )


def _state_bytes(parameter: torch.Tensor, optim: str, *, is_embedding: bool) -> int:
    count, own = parameter.numel(), parameter.element_size()
    if optim in ("sgd", "lomo"):
        return 0
    if optim in ("adafactor", "adalomo"):
        # Means of squares over rows and over columns, instead of one for each entry.
        return 4 * (count if parameter.dim() < 2 else count // parameter.shape[-1] + count // parameter.shape[-2])
    states = 1 if any(name in optim for name in ("lion", "rmsprop", "adagrad", "schedule_free_sgd")) else 2
    states += "ademamix" in optim
    if "4bit" in optim:
        return states * (math.ceil(count / 2) + 4 * math.ceil(count / 128))
    if "8bit" in optim:
        small = count < _LEAST_8BIT or is_embedding
        return states * (4 * count if small else count + 4 * math.ceil(count / _STATE_BLOCK))
    is_torch = optim.startswith(("adamw_torch", "adagrad", "rmsprop")) and "bnb" not in optim
    return states * count * (own if is_torch else 4)


# ---- activations ----


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, but for those that were there before."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # as long as they live, no other has their address
        self._sizes = {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Fake tensors have no values. What models ask for (is anything infinite, is this layer to be skipped) is false.
            kind = args[0].dtype
            return False if kind is torch.bool else 0.0 if kind.is_floating_point else 0
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def activation_bytes(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    *,
    train: bool = True,
    gradient_checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Bytes that one step takes at its peak, beside weights and gradients: a step is run on tensors without data.

    With `train` that is a forward pass, the divergence from a teacher's logits and the cross entropy, and the backward pass;
    without, a forward pass that keeps nothing. Kernels are those of the device, which decides what attention keeps.

    Args:
        model: A transformers model of any dtype, left as it is; on the meta device, nothing is needed of it but its shapes.
        inputs: What its forward takes, on any device, such as `example_inputs` gives; masks are left out, as values are unknown.
        train: Whether there is a backward pass.
        gradient_checkpointing: Whether layers are run again in the backward pass.
        autocast: What products are computed in, if not in the dtype of the weights.
        device: Where the model is going to be.

    Returns:
        Bytes.

    Raises:
        ValueError: The model does not support gradient checkpointing.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=1, intermediate_size=8)
        >>> with torch.device("meta"):
        ...     model = BertForSequenceClassification(config)
        >>> inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
        >>> one, two = (activation_bytes(model, {"input_ids": ids}) for ids in (torch.zeros(8, 64).long(), torch.zeros(16, 64).long()))
        >>> 1.8 < two / one <= 2.2 and activation_bytes(model, inputs, train=False) < activation_bytes(model, inputs)
        True
    """
    kind = torch.device(device).type
    ready = shared_copy(model).train(train)
    if gradient_checkpointing:
        switch = getattr(ready, "activation_checkpointing_enable", None) or ready.gradient_checkpointing_enable
        switch()
    # Masks hide positions but save nothing, and mask code is where models look at values.
    shapes = {name: value for name, value in inputs.items() if torch.is_tensor(value) and name != "attention_mask"}
    try:
        return _run_without_data(ready, shapes, train=train, autocast=autocast, device=kind)
    except (RuntimeError, NotImplementedError):
        if kind == "cpu":
            raise
        # Not every backend has kernels for such tensors; those of the CPU keep as much or more.
        return _run_without_data(ready, shapes, train=train, autocast=autocast, device="cpu")


def _run_without_data(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    *,
    train: bool,
    autocast: torch.dtype | None,
    device: str,
) -> int:
    # Caches of tensors, which are switched off for compilers, must not take in tensors without data.
    compiling = mock.patch.object(pytorch_utils, "is_torchdynamo_compiling", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True), compiling:
        weights = _empty_weights(model, device, train=train)
        given = {name: _like(tensor, device) for name, tensor in inputs.items()}
        gradients = [tensor.grad for tensor in weights if tensor.grad is not None]
        mixed = contextlib.nullcontext() if autocast is None else torch.autocast(device, autocast)
        with torch.set_grad_enabled(train), _LiveBytes([*weights, *given.values(), *gradients]) as counter:
            with mixed:
                outputs = model(**given)
            if train:
                _stand_in_loss(outputs).backward()
    return counter.peak


def _empty_weights(model: nn.Module, device: str, *, train: bool) -> list[torch.Tensor]:
    """Put tensors without data, and gradients for them, in the place of all parameters and buffers, in place."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor, device).requires_grad_(train and tensor.requires_grad)
                held[name] = made[id(tensor)]  # type: ignore[assignment]
    for tensor in made.values():
        tensor.grad = torch.empty_like(tensor).detach() if tensor.requires_grad else None
    return list(made.values())


def _like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _stand_in_loss(outputs: Mapping[str, Any]) -> torch.Tensor:
    """Divergence from a teacher and cross entropy for everything that is predicted; what else comes out takes next to nothing."""
    total = torch.zeros(())
    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            continue
        if "logits" not in name or value.dim() < 2:
            total = total + value.float().mean().cpu()
            continue
        rows = value.flatten(0, -2)
        targets = torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
        task = F.cross_entropy(rows.float(), targets)
        total = total + (kl_divergence(value, torch.empty_like(value).detach()) + task).cpu()
    return total


# ---- the plan ----


def available_bytes(device: torch.device | str, *, local_world_size: int = 1) -> int:
    """Memory that one process may still use: what is free on its GPU, or its share of what the machine has available.

    Example:
        >>> available_bytes("cpu", local_world_size=2) > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // local_world_size


def plan_placement(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Sequence[PreTrainedModel] | None,
    *,
    batch: int,
    length: int | None = None,
    optim: str = "adamw_torch",
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    gradient_checkpointing: bool = False,
    trainable_parameters: int | None = None,
    world_size: int = 1,
    local_world_size: int = 1,
    sharding: Sharding = "none",
    device: torch.device | str = "cpu",
    device_memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
) -> Placement:
    """Choose where the teacher goes and in which precision, so that a distillation fits.

    In this order, the first that fits: the teacher beside the student in its own type, in bfloat16, with 8 and with 4 bits,
    and, where the student is on a GPU, on the CPU in its own type.

    Args:
        student: The student; on the meta device, nothing is needed of it but its shapes.
        teacher: The teacher, likewise; several of them, which answer one after the other, go to one place; None if there is none, or its
            outputs are cached.
        batch: Examples in a batch of one process.
        length: Tokens per example, the longest there is; None for images.
        optim: As in `TrainingArguments.optim`.
        mixed_precision: As in `accelerate`: what products are computed in.
        gradient_checkpointing: As in `TrainingArguments`.
        trainable_parameters: How many parameters are trained, if adapters will be put on; None is what the student says.
        world_size: Processes.
        local_world_size: Processes on this machine, which share its memory.
        sharding: What is divided among processes: "zero2" gradients and optimizer states, "zero3" and "fsdp" parameters, too.
        device: Where the student is trained.
        device_memory_bytes: What one process may use on that device; None is what is free.
        host_memory_bytes: What one process may use of the machine's memory; None is its share of what is available.

    Returns:
        The plan, which may be that it does not fit.

    Raises:
        ValueError: The models take other inputs than text, images or sound, or a setting is not known.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64)
        >>> with torch.device("meta"):
        ...     student, teacher = (BertForSequenceClassification(config) for _ in range(2))
        >>> plan = plan_placement(student, teacher, batch=4, length=16, device_memory_bytes=10**9)
        >>> plan.describe()  # doctest: +ELLIPSIS
        'student 8.2 MB, gradients 8.2 MB, adamw_torch 16.3 MB, teacher 8.2 MB float32, activations about ...
        >>> plan_placement(student, teacher, batch=4, length=16, device_memory_bytes=50 * 10**6).teacher_precision
        'bfloat16'
    """
    if mixed_precision not in _MIXED:
        raise ValueError(f"mixed_precision {mixed_precision!r} is not known; allowed: {', '.join(_MIXED)}")
    if sharding not in ("none", "zero2", "zero3", "fsdp"):
        raise ValueError(f"sharding {sharding!r} is not known; allowed: none, zero2, zero3, fsdp")
    device = torch.device(device)
    settings: dict[str, Any] = {"autocast": _MIXED[mixed_precision], "device": device}
    inputs = example_inputs(student, batch=batch, length=length)
    gradients, states = gradient_bytes(student), optimizer_bytes(student, optim)
    if trainable_parameters is not None:
        share = trainable_parameters / max(1, sum(p.numel() for p in student.parameters() if p.requires_grad))
        gradients, states = int(gradients * share), int(states * share)
    shards = 1 if sharding == "none" else world_size
    room = (
        available_bytes(device, local_world_size=local_world_size)
        if device_memory_bytes is None
        else device_memory_bytes
    )
    plan = Placement(
        student_bytes=weight_bytes(student) // (shards if sharding in ("zero3", "fsdp") else 1),
        gradient_bytes=gradients // shards,
        bucket_bytes=gradients if sharding == "none" and world_size > 1 else 0,
        optimizer_bytes=states // shards,
        activation_bytes=activation_bytes(student, inputs, gradient_checkpointing=gradient_checkpointing, **settings),
        teacher_bytes=0,
        teacher_activation_bytes=0,
        available_bytes=room,
        device=str(device),
        optimizer=optim,
        teacher_precision=None,
        teacher_device=None,
        fits=True,
        reason="there is no teacher to place",
    )
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, PreTrainedModel) else list(teacher)
    if teachers:
        host = room if device.type == "cpu" else host_memory_bytes
        if host is None:
            host = available_bytes("cpu", local_world_size=local_world_size)
        given = [(model, example_inputs(model, batch=batch, length=length)) for model in teachers]
        work = max(activation_bytes(model, inputs, train=False, **settings) for model, inputs in given)
        parts = world_size if sharding in ("zero3", "fsdp") else 1
        plan = _place(replace(plan, teacher_activation_bytes=work), teachers, host, parts=parts)
    if _missing(plan) <= 0:
        return plan
    advice = _advice(plan, batch)
    if not gradient_checkpointing and student.supports_gradient_checkpointing:
        less = activation_bytes(student, inputs, gradient_checkpointing=True, **settings)
        if less < plan.activation_bytes:
            advice.append(f"turn on gradient checkpointing (saves {_said(plan.activation_bytes - less)})")
    reason = f"it does not fit: {_said(_missing(plan))} too much; {', or '.join(advice) or 'take a smaller student'}"
    return replace(plan, fits=False, reason=reason)


def _missing(plan: Placement) -> int:
    """Bytes that a plan takes more than there are, with a tenth to spare; 0 or less if it fits."""
    return plan.total_bytes - int(plan.available_bytes * _USABLE)


def _place(plan: Placement, teachers: Sequence[PreTrainedModel], host_bytes: int, *, parts: int) -> Placement:
    """The first way to have the teachers that fits; the smallest if none does. Large ones are divided into `parts`, unless quantized."""
    one = len(teachers) == 1
    named, stay, go, be = ("the teacher", "stays", "goes", "is") if one else ("the teachers", "stay", "go", "are")
    fit = "it fits" if one else "they fit"
    own = cast(
        Precision,
        str(max((model.dtype for model in teachers), key=lambda dtype: dtype.itemsize)).removeprefix("torch."),
    )
    smaller: tuple[Precision, ...] = ("bfloat16", "int8", "nf4") if own == "float32" else ("int8", "nf4")
    first: Placement | None = None
    for precision in (own, *smaller):
        try:
            sizes = [weight_bytes(model, precision) for model in teachers]
        except StructureError:  # where its layers are is not known, so they are not quantized
            break
        if precision not in ("int8", "nf4"):
            large = int(plan.available_bytes * WHOLE_SHARE)
            sizes = [size // parts if size > large else size for size in sizes]
        tried = replace(plan, teacher_bytes=sum(sizes), teacher_precision=precision, teacher_device=plan.device)
        first = first or tried
        if _missing(tried) <= 0:
            if tried is first:
                return replace(tried, reason=f"{named} {stay} on {plan.device} in {own} because {fit}")
            return replace(
                tried, reason=f"{named} {be} loaded in {precision}: {own} is {_said(_missing(first))} too much"
            )
    assert first is not None
    on_host = replace(first, teacher_device="cpu")
    if plan.device != "cpu" and _missing(on_host) <= 0:
        needed = on_host.teacher_bytes + on_host.teacher_activation_bytes
        if needed <= int(host_bytes * _USABLE):
            return replace(
                on_host,
                reason=f"{named} {go} to the cpu in {own}: on {plan.device} even {tried.teacher_precision} is {_said(_missing(tried))} too much",
            )
    return tried


def _advice(plan: Placement, batch: int) -> list[str]:
    """What would make a plan fit, in the order of how little it costs."""
    advice = []
    activations = plan.activation_bytes + plan.teacher_activation_bytes
    room = activations - _missing(plan)
    if room >= activations / batch:
        advice.append(f"use a batch of {int(room * batch / activations)}, accumulating gradients")
    if plan.teacher_precision is not None:
        advice.append(
            f"cache the teacher's outputs (saves {_said(plan.teacher_bytes + plan.teacher_activation_bytes)})"
        )
    return advice


def _said(size_bytes: int) -> str:
    """A size in the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            return f"{value:.1f} {unit}" if value < 100 and unit != "kB" else f"{value:.0f} {unit}"
    return f"{size_bytes} bytes"
