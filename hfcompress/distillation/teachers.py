"""Teachers: whatever gives targets for a batch. Each is only read, and none is ever an optimizer's or a wrapper's business."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from hfcompress.distillation.capture import NOTHING, AttentionInputs, Captured, Wanted, capture
from hfcompress.measurement.latency import is_movable

OWN_INPUTS = "teacher_"
OWN_ANSWERS = "on_policy"  # marks a batch whose answers the student wrote


@dataclass
class Targets:
    """What a teacher says of a batch.

    Attributes:
        outputs: By the names that models use: "logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output".
            From a cache also what it keeps in their place (see `hfcompress.distillation.cache`).
        hidden: Outputs of layers by number, shape (batch, length, hidden).
        attention: What attention was computed from, by number of the layer.
    """

    outputs: Mapping[str, Any]
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)


class Teacher:
    """A live model that is only read: in eval mode, without gradients.

    Inputs whose names begin with "teacher_" are for it alone: where a batch has some, it gets those (without that beginning)
    and not the student's, so that it may have a tokenizer or an image size of its own.

    Args:
        model: A transformers model, of any precision and on any device.
        label_names: Inputs that are not given to it.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> teacher = Teacher(BertForSequenceClassification(config))
        >>> teacher({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([0])}).outputs["logits"].shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module, *, label_names: Sequence[str] = ("labels",)) -> None:
        self.model = model.eval().requires_grad_(False)
        parameters = inspect.signature(model.forward).parameters
        self._accepted = None if _takes_anything(parameters) else set(parameters)
        self.withheld = {*label_names, "labels", "num_items_in_batch"}

    shares_weights = False  # with the student

    @property
    def device(self) -> torch.device:
        """Where its inputs have to be."""
        return next(self.model.parameters()).device

    @property
    def models(self) -> list[nn.Module]:
        """The models that are asked."""
        return [self.model]

    def to(self, device: torch.device) -> None:
        """Move it, in place, unless it is quantized or already spread over devices by a device map."""
        if is_movable(self.model) and not getattr(self.model, "hf_device_map", None):
            self.model.to(device)  # type: ignore[call-overload]

    def __call__(self, inputs: Mapping[str, Any], *, wanted: Wanted = NOTHING) -> Targets:
        """What it says of a batch; labels are withheld, and so is what its forward does not take. Inputs stay as they are."""
        given = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in own_inputs(inputs).items()
            if name not in self.withheld and (self._accepted is None or name in self._accepted)
        }
        self.model.eval()
        with torch.no_grad(), capture(self.model, wanted) as seen:
            outputs = self.model(**given)
        return _targets(outputs, seen)


class AdapterTeacher(Teacher):
    """The student's own base model: without its adapters, or with other ones. There is no second copy of the weights.

    Args:
        model: A PEFT model whose active adapter is trained.
        adapter: The adapter that teaches; None is the base model without any.
        label_names: Inputs that are not given to it.
    """

    def __init__(
        self, model: nn.Module, *, adapter: str | None = None, label_names: Sequence[str] = ("labels",)
    ) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"{type(model).__name__} has no adapters; wrap it with peft.get_peft_model, or give another model as the teacher"
            )
        known = list(getattr(model, "peft_config", {}))
        if adapter is not None and adapter not in known:
            raise ValueError(f"there is no adapter {adapter!r}; the model has {', '.join(known)}")
        self.model = model
        self.adapter = adapter
        base = model.get_base_model()  # type: ignore[operator]
        parameters = inspect.signature(base.forward).parameters
        self._accepted = None if _takes_anything(parameters) else set(parameters)
        self.withheld = {*label_names, "labels", "num_items_in_batch"}

    shares_weights = True

    def to(self, device: torch.device) -> None:
        """It is where the student is."""

    def __call__(self, inputs: Mapping[str, Any], *, wanted: Wanted = NOTHING) -> Targets:
        """What it says of a batch; see `Teacher`. The model is as before afterwards: mode, active adapter, what is trained."""
        model: Any = self.model
        modes = {module: module.training for module in model.modules()}
        given = {
            name: value
            for name, value in own_inputs(inputs).items()
            if name not in self.withheld and (self._accepted is None or name in self._accepted)
        }
        base = model.get_base_model()
        active, trained = model.active_adapter, {p for p in model.parameters() if p.requires_grad}
        model.eval()
        try:
            with torch.no_grad(), capture(base, wanted) as seen:
                if self.adapter is None:
                    with model.disable_adapter():
                        outputs = base(**given)
                else:
                    model.set_adapter(self.adapter)
                    outputs = base(**given)
        finally:
            if self.adapter is not None:
                model.set_adapter(active)
            for module, training in modes.items():
                module.training = training
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in trained)
        return _targets(outputs, seen)


class AverageTeacher(Teacher):
    """The student's own earlier self: an exponential moving average of its weights (Tarvainen and Valpola 2017, mean teacher).

    Args:
        decay: Share that stays at each optimizer step, in [0, 1). Early on it is less, (1 + step) / (10 + step), so that the random
            beginning is forgotten.
        label_names: Inputs that are not given to it.
    """

    def __init__(self, *, decay: float = 0.999, label_names: Sequence[str] = ("labels",)) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, but it is a share in [0, 1)")
        self.decay = decay
        self._label_names = label_names

    def follow(self, student: nn.Module) -> None:
        """Start as a copy of a student."""
        super().__init__(copy.deepcopy(student), label_names=self._label_names)

    def update(self, student: nn.Module, *, step: int) -> None:
        """Move towards the student after an optimizer step.

        Args:
            student: The model that is trained.
            step: Optimizer steps done, from 1.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
                now = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs  # of a student in shards
                mine.lerp_(now.detach().to(mine.dtype), 1 - decay)
            for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)


class Ensemble(Teacher):
    """Several teachers whose predictions are made one.

    Args:
        teachers: Two or more.
        weights: One each, summing to any positive number; by default equal.
        combine: "probabilities" is the logarithm of the weighted mean of their probabilities, "logits" the weighted mean of their
            logits; "confident" takes for each item the teacher whose largest probability is the largest, and "correct" the
            one that gives the label the largest probability, weights being factors.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> teacher = Ensemble([Teacher(BertForSequenceClassification(config)) for _ in range(2)])
        >>> teacher({"input_ids": torch.tensor([[5, 6]])}).outputs["logits"].exp().sum().round(decimals=4).item()
        1.0
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        weights: Sequence[float] | None = None,
        combine: Literal["probabilities", "logits", "confident", "correct"] = "probabilities",
    ) -> None:
        if len(teachers) < 2:
            raise ValueError(f"an ensemble takes two teachers or more, not {len(teachers)}")
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"{len(teachers)} teachers need as many weights, none below 0 and not all 0; got {weights}"
            )
        self.teachers = list(teachers)
        self.model = self.teachers[0].model
        self.weights = [weight / sum(weights) for weight in weights]
        self.combine = combine
        self.withheld = set().union(*(teacher.withheld for teacher in teachers))

    @property
    def models(self) -> list[nn.Module]:
        """The models that are asked."""
        return [model for teacher in self.teachers for model in teacher.models]

    def to(self, device: torch.device) -> None:
        """Move each."""
        for teacher in self.teachers:
            teacher.to(device)

    def __call__(self, inputs: Mapping[str, Any], *, wanted: Wanted = NOTHING) -> Targets:
        """What they say together; layers of several models are not compared.

        Raises:
            ValueError: More than predictions is wanted, or a batch without labels is to be routed by them.
        """
        if wanted:
            raise ValueError(
                "several teachers are compared by their predictions only; set the weights of hidden, attentions and relations to 0"
            )
        said = [teacher(inputs).outputs for teacher in self.teachers]
        names = [name for name in ("logits", "start_logits", "end_logits") if name in said[0]]
        return Targets({name: self._combined([one[name] for one in said], inputs, name) for name in names})

    def _combined(self, logits: list[torch.Tensor], inputs: Mapping[str, Any], name: str) -> torch.Tensor:
        if any(one.shape != logits[0].shape for one in logits):
            shapes = ", ".join(str(tuple(one.shape)) for one in logits)
            raise ValueError(
                f"the teachers predict different things ({shapes}); all need the same labels or vocabulary"
            )
        stacked = torch.stack([one.to(logits[0].device).float() for one in logits])
        weights = torch.tensor(self.weights, device=stacked.device)
        column = weights.view(-1, *[1] * (stacked.dim() - 1))
        if self.combine == "logits":
            return (stacked * column).sum(0)
        log_probs = F.log_softmax(stacked, dim=-1)
        if self.combine == "probabilities":
            return (log_probs + column.log()).logsumexp(0)
        merit = log_probs.amax(-1) if self.combine == "confident" else _log_prob_of_labels(log_probs, inputs, name)
        best = (merit + column.log().squeeze(-1)).argmax(0)
        return stacked.gather(0, best[None, ..., None].expand(1, *stacked.shape[1:]))[0]


def _log_prob_of_labels(log_probs: torch.Tensor, inputs: Mapping[str, Any], name: str) -> torch.Tensor:
    """What each teacher (first dimension) gives the labels; 0 where there is none."""
    key = {"start_logits": "start_positions", "end_logits": "end_positions"}.get(name, "labels")
    labels = inputs.get(key)
    if labels is None or labels.is_floating_point() or labels.shape != log_probs.shape[1:-1]:
        raise ValueError(
            f"combine: correct routes by labels, one class for each item, which the batch does not have ({key}); use confident"
        )
    labels = labels.to(log_probs.device)
    index = labels.clamp(min=0)[None, ..., None].expand(len(log_probs), *labels.shape, 1)
    return log_probs.gather(-1, index)[..., 0].masked_fill(labels < 0, 0.0)


class CachedTeacher(Teacher):
    """A teacher that ran before: what it said is in a folder that `hfcompress cache-teacher` wrote.

    What a batch needs is read by the workers of the data loader and comes with the batch.

    Args:
        folder: The cache.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from hfcompress.distillation.cache import TeacherCache

        self.cache = TeacherCache.open(folder)
        self._head = self.cache.load_head() if self.cache.contents.logits == "last_hidden" else None
        self.withheld = {"labels", "num_items_in_batch"}

    @property
    def models(self) -> list[nn.Module]:
        """None: it is not here."""
        return []

    def to(self, device: torch.device) -> None:
        """Move the head, if logits are made of last hidden states."""
        if self._head is not None:
            self._head.to(device)

    def __call__(self, inputs: Mapping[str, Any], *, wanted: Wanted = NOTHING) -> Targets:
        """What the batch brought along.

        Raises:
            ValueError: The batch brought nothing, or the cache does not hold what is wanted.
        """
        outputs = {
            name.removeprefix(OWN_INPUTS): value for name, value in inputs.items() if name.startswith(OWN_INPUTS)
        }
        if not outputs:
            raise ValueError(
                "the batch comes without the cached targets; let the trainer make the data loader, or wrap the collator in CachingCollator"
            )
        if self._head is not None:
            with torch.no_grad():
                outputs["logits"] = self._head(outputs.pop("last_hidden").to(self._head.weight.dtype))
        hidden = {int(name[7:]): outputs.pop(name) for name in list(outputs) if name.startswith("hidden_")}
        if wanted.attention or wanted.hidden - hidden.keys():
            what = (
                "attention" if wanted.attention else f"the hidden states of layer {min(wanted.hidden - hidden.keys())}"
            )
            raise ValueError(
                f"the cache does not hold {what}; make it with --hidden-layers, or use the teacher itself (attention is never cached)"
            )
        return Targets(outputs, hidden={number: hidden[number] for number in wanted.hidden})


def without_adapters(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, adapters in place; any other model as it is."""
    return getattr(model, "get_base_model", lambda: model)()


def name_of(model: nn.Module) -> str:
    """A model's repository, or the last part of its folder: paths of this machine do not belong in a record."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() else name


def with_decoder_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a teacher with a decoder is given in the place of labels: the decoder inputs that `model` would make of them.

    Raises:
        ValueError: There are no labels, or the model does not say what follows from them.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return inputs
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError("distilling a sequence-to-sequence model needs labels: they are what its decoder reads")
    if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
        return inputs
    prepare: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise ValueError(
            f"{type(model).__name__} does not say how its decoder inputs follow from labels; "
            "let the data collator add decoder_input_ids"
        )
    return {**inputs, "decoder_input_ids": prepare(labels=labels)}


def own_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher gets of a batch: the inputs that are for it alone, if there are any.

    Example:
        >>> own_inputs({"input_ids": 1, "teacher_input_ids": 2})
        {'input_ids': 2}
        >>> own_inputs({"input_ids": 1})
        {'input_ids': 1}
    """
    own = {name.removeprefix(OWN_INPUTS): value for name, value in inputs.items() if name.startswith(OWN_INPUTS)}
    return own or student_inputs(inputs)


def student_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the student gets of a batch: everything but what is for the teacher alone.

    Example:
        >>> student_inputs({"input_ids": 1, "teacher_input_ids": 2})
        {'input_ids': 1}
    """
    return {name: value for name, value in inputs.items() if not name.startswith(OWN_INPUTS) and name != OWN_ANSWERS}


def _targets(outputs: Any, seen: Captured) -> Targets:
    first = outputs if isinstance(outputs, torch.Tensor | Mapping) else outputs[0]
    named = first if isinstance(first, Mapping) else {"logits": first}
    return Targets(named, hidden=seen.hidden, attention=seen.attention)


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether unknown inputs are passed on; a model that takes keyword arguments still names its real inputs."""
    kinds = {parameter.kind for parameter in parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds and len(parameters) <= 2
