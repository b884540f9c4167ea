"""Distillation inside a Trainer: which tensors of student and teacher are compared, and which items count."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hfcompress.anatomy import StructureError, find_layers, find_stream
from hfcompress.checkpoints.record import add_step, read_hidden
from hfcompress.config import DistillConfig, Recipe
from hfcompress.distillation import (
    Teacher,
    binary_kl_divergence,
    capture_outputs,
    kl_divergence,
    make_map,
    mean_over_items,
    mean_squared_error,
)
from hfcompress.training.exact import ExactTrainerMixin
from hfcompress.training.items import ItemCounts, label_mask

logger = logging.getLogger(__name__)

PROJECTIONS_FILE = "hfcompress_projections.safetensors"


class DistillationMixin(ExactTrainerMixin):
    """Adds a teacher to a Trainer.

    * `_loss_terms`: adds the terms that compare student and teacher.
    * `create_optimizer`: adds the projections between hidden states of different widths, if there are any.
    * `training_step`: averages their gradients over processes, as the wrapper does for the model's.
    * `_save_optimizer_and_scheduler`: keeps these projections in checkpoints; they are never part of the model.

    The teacher is no part of the Trainer's model: it is in eval mode, has no gradients, is never wrapped, prepared,
    optimized or saved. In evaluation only the labels count (or the teacher, where there are none).
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        *args: Any,
        teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
        recipe: Recipe | None = None,
        **kwargs: Any,
    ) -> None:
        recipe = recipe if recipe is not None else Recipe(distill=DistillConfig())
        self.recipe = recipe
        self.distill: DistillConfig | None = recipe.distill
        self.teacher: Teacher | None = None
        self._projections = nn.ModuleDict()
        self._layer_pairs: tuple[tuple[int, int], ...] = ()
        self._student_layers = 0
        self._resumed_from: str | None = None
        super().__init__(model, *args, recipe=recipe, **kwargs)
        if self.distill is None:
            if teacher is not None:
                raise ValueError(
                    "a teacher was given, but the recipe has no distill section; add one, or leave out teacher"
                )
            return
        if teacher is None:
            raise ValueError(
                "the recipe asks for distillation, but no teacher was given; pass teacher=a model or a path"
            )
        self._set_teacher(teacher)
        self.add_callback(_ProjectionCallback(self))

    def _set_teacher(self, teacher: PreTrainedModel | str | os.PathLike[str]) -> None:
        assert self.distill is not None
        student = without_adapters(self.accelerator.unwrap_model(self.model))
        if isinstance(teacher, str | os.PathLike):
            teacher = type(student).from_pretrained(teacher, use_safetensors=True)
        _check_nothing_is_shared(student, teacher)
        _check_outputs_match(student, teacher)
        self.teacher = Teacher(teacher, label_names=self.label_names)
        self.teacher.to(self.args.device)
        if self.distill.hidden.weight > 0:
            if self._layers_go() and isinstance(self.distill.hidden.layers, list):
                raise ValueError(
                    "distill.hidden.layers names layers by their number, which changes while prune.units: layers drops some; use all or last"
                )
            self._pair_layers(student)

    def _layers_go(self) -> bool:
        """Whether the student loses layers while it is trained."""
        prune = self.recipe.prune
        return prune is not None and "layers" in prune.units

    def _pair_layers(self, student: nn.Module) -> None:
        """Which layers are compared, for the layers that the student has now."""
        assert self.distill is not None and self.teacher is not None
        self._student_layers = len(find_layers(student))
        self._layer_pairs = make_map(
            self.distill.hidden.layers,
            student_layers=self._student_layers,
            teacher_layers=len(find_layers(self.teacher.model)),
        )

    # ---- loss ----

    def _loss_terms(
        self, model: nn.Module, inputs: Mapping[str, Any], counts: ItemCounts
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        has_labels = any(inputs.get(name) is not None for name in self.label_names)
        if self.teacher is None or self.distill is None or (not model.training and has_labels):
            return super()._loss_terms(model, inputs, counts)
        student = without_adapters(self.accelerator.unwrap_model(model))
        asked = _with_decoder_inputs(student, inputs)
        if self._layer_pairs and self._layers_go() and len(find_layers(student)) != self._student_layers:
            self._pair_layers(student)
        with self._capture(student, side=0) as ours:
            outputs = self._run_model(model, inputs)
        with self._capture(self.teacher.model, side=1) as theirs, self.accelerator.autocast():
            targets = self.teacher(asked)
        terms: dict[str, torch.Tensor] = {}
        task = self._task_loss(outputs, inputs, counts) if self.distill.task.weight > 0 and has_labels else None
        if task is not None:
            terms["task"] = self.distill.task.weight * task
        if self.distill.logits.weight > 0:
            terms["logits"] = self.distill.logits.weight * self._logits_loss(student, outputs, targets, inputs, counts)
        if self._layer_pairs:
            hidden = self.distill.hidden.weight * self._hidden_loss(ours, theirs, inputs, counts)
            # Alone it does not reach the head, and DistributedDataParallel waits for the gradient of every output.
            terms["hidden"] = hidden if terms else hidden + _nothing_of(outputs)
        return outputs, terms

    def _capture(self, model: nn.Module, *, side: int) -> contextlib.AbstractContextManager[dict[int, torch.Tensor]]:
        if not self._layer_pairs:
            return contextlib.nullcontext({})
        layers = find_layers(model)
        return capture_outputs({pair[side]: layers[pair[side]] for pair in self._layer_pairs})

    def _logits_loss(
        self, student: nn.Module, outputs: Any, targets: Any, inputs: Mapping[str, Any], counts: ItemCounts
    ) -> torch.Tensor:
        """The divergence of the two models' predictions, over the items that the task predicts."""
        assert self.distill is not None and self.teacher is not None
        temperature = self.distill.logits.temperature
        spans = "start_logits" in outputs
        if ("start_logits" if spans else "logits") not in targets:
            raise ValueError(
                f"the teacher {type(self.teacher.model).__name__} gives no {'spans' if spans else 'logits'}; "
                "it needs the same kind of head as the student"
            )
        if spans:
            return self._span_loss(outputs, targets, inputs, counts)
        ours, theirs = outputs["logits"], targets["logits"].to(outputs["logits"].device)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the student predicts {tuple(ours.shape)} and the teacher {tuple(theirs.shape)} for the same batch; "
                "both need the same labels or vocabulary and the same tokenizer"
            )
        problem = getattr(student.config, "problem_type", None)
        if problem == "regression" or ours.shape[-1] == 1:
            return mean_squared_error(ours, theirs, count=counts.examples)
        if problem == "multi_label_classification":
            return binary_kl_divergence(ours, theirs, temperature=temperature, count=counts.examples)
        if ours.dim() == 2:
            return kl_divergence(ours, theirs, temperature=temperature, count=counts.examples)
        labels, attention = inputs.get("labels"), inputs.get("attention_mask")
        shifted = self._predicts_next_token
        if labels is not None:
            mask, count = label_mask(labels, shifted=shifted), counts.labels
        elif attention is not None:
            # Without labels every real token counts; the first has nothing before it that could predict it.
            mask = (attention[..., 1:] * attention[..., :-1] if shifted else attention).bool()
            count = counts.tokens - counts.examples if shifted else counts.tokens
        else:
            mask, count = None, counts.examples * (ours.shape[1] - int(shifted))
        if shifted:
            ours, theirs = ours[:, :-1], theirs[:, :-1]
        return kl_divergence(ours, theirs, temperature=temperature, mask=mask, count=count)

    def _span_loss(self, outputs: Any, targets: Any, inputs: Mapping[str, Any], counts: ItemCounts) -> torch.Tensor:
        """Question answering: where the answer starts and where it ends, mean of both; padding is no candidate."""
        assert self.distill is not None
        attention, losses = inputs.get("attention_mask"), []
        for name in ("start_logits", "end_logits"):
            ours, theirs = outputs[name], targets[name].to(outputs[name].device)
            if attention is not None:
                padding = attention == 0
                ours, theirs = (x.float().masked_fill(padding, -1e9) for x in (ours, theirs))
            losses.append(
                kl_divergence(ours, theirs, temperature=self.distill.logits.temperature, count=counts.examples)
            )
        return torch.stack(losses).mean()

    def _hidden_loss(
        self,
        ours: Mapping[int, torch.Tensor],
        theirs: Mapping[int, torch.Tensor],
        inputs: Mapping[str, Any],
        counts: ItemCounts,
    ) -> torch.Tensor:
        """Mean over the layer pairs, then over tokens that are not padding (of all image patches)."""
        mask, losses = inputs.get("attention_mask"), []
        for student, teacher in self._layer_pairs:
            mine, target = ours[student], theirs[teacher].to(ours[student].device)
            if (key := f"{student}_{teacher}") in self._projections:
                mine = self._projections[key](mine.float())
            if mask is not None:
                losses.append(mean_squared_error(mine, target, mask=mask.bool(), count=counts.tokens))
            else:
                per_example = (mine.float() - target.detach().float()).square().flatten(1).mean(1)
                losses.append(mean_over_items(per_example, count=counts.examples))
        return torch.stack(losses).mean()

    # ---- projections ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as Trainer does, with a group for the projections between unequal widths."""
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        self._make_projections()
        self._load_projections()
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        fresh = [parameter for parameter in self._projections.parameters() if id(parameter) not in known]
        if fresh:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    "distill.hidden between different widths needs projections, which FSDP and DeepSpeed do not train here; "
                    "use plain data parallelism, or layers of equal width"
                )
            optimizer.add_param_group({"params": fresh, "weight_decay": 0.0})
        return optimizer

    def _make_projections(self) -> None:
        if not self._layer_pairs or self.teacher is None or len(self._projections):
            return
        student = self.accelerator.unwrap_model(self.model)
        widths = _stream_width(without_adapters(student)), _stream_width(self.teacher.model)
        if widths[0] == widths[1]:
            return
        if self._layers_go():
            raise ValueError(
                f"hidden states of {widths[0]} and {widths[1]} features are compared through a projection for each layer, which cannot "
                "follow prune.units: layers; set distill.hidden.weight to 0, or drop layers in a run of their own"
            )
        for pair in self._layer_pairs:
            self._projections[f"{pair[0]}_{pair[1]}"] = nn.Linear(*widths, bias=False)
        self._projections.to(self.args.device)

    def _load_projections(self) -> None:
        """Those of the checkpoint that is resumed from, if any; in any case the same on all processes."""
        path = Path(self._resumed_from or "") / PROJECTIONS_FILE
        if self._resumed_from and len(self._projections) and path.is_file():
            safetensors.torch.load_model(self._projections, path)
        for parameter in self._projections.parameters():
            if self.args.world_size > 1:
                torch.distributed.broadcast(parameter.data, src=0)

    def _begin_run(self) -> None:
        super()._begin_run()
        self._resumed_from = None
        self._projections.zero_grad()  # of a step that was interrupted
        if self.model_init is not None:
            self._projections = nn.ModuleDict()

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward as in Trainer, and the projections' gradients averaged over processes."""
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[arg-type]
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            for parameter in self._projections.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.args.world_size
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if len(self._projections) and self.args.should_save:
            safetensors.torch.save_model(self._projections, str(Path(output_dir) / PROJECTIONS_FILE))

    def _record_steps(self) -> None:
        super()._record_steps()
        if self.distill is None or self.teacher is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        teacher = self.teacher.model
        add_step(
            model.config,
            "distill",
            teacher=_name_of(teacher),
            settings=self.distill.model_dump(),
            optimizer_steps=self.state.global_step,
        )


def _stream_width(model: nn.Module) -> int:
    """Features of the hidden states between layers: the config says how many there were before the hidden width was cut."""
    try:
        return find_stream(model).width
    except StructureError:  # of an architecture that is not known, with adapters, or quantized
        hidden = read_hidden(model.config)
        return int(model.config.hidden_size) if hidden is None else hidden[0]  # type: ignore[union-attr, arg-type]


def _name_of(teacher: nn.Module) -> str:
    """The teacher's repository, or the last part of its folder: paths of this machine do not belong in a record."""
    name = str(getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__)  # type: ignore[union-attr]
    return Path(name).name if Path(name).exists() else name


class _ProjectionCallback(TrainerCallback):
    """Does for the projections what the training loop does for the model's parameters."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer._projections.zero_grad()


def without_adapters(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, adapters in place; any other model as it is."""
    return getattr(model, "get_base_model", lambda: model)()


def _with_decoder_inputs(student: PreTrainedModel, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a teacher with a decoder has to be given in the place of labels: the same decoder inputs as the student."""
    if not getattr(student.config, "is_encoder_decoder", False):
        return inputs
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError("distilling a sequence-to-sequence model needs labels: they are what its decoder reads")
    if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
        return inputs
    prepare = getattr(student, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise ValueError(
            f"{type(student).__name__} does not say how its decoder inputs follow from labels; "
            "let the data collator add decoder_input_ids"
        )
    return {**inputs, "decoder_input_ids": prepare(labels=labels)}


def _nothing_of(outputs: Any) -> Any:
    """Zero, but with a gradient (of zeros) for every tensor that a model returned."""
    found = outputs.values() if isinstance(outputs, Mapping) else outputs
    return sum(0.0 * value.float().sum() for value in found if isinstance(value, torch.Tensor) and value.requires_grad)


def _check_nothing_is_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that would be trained with the student, or freeze it."""
    if teacher is student:
        raise ValueError("teacher and model are the same object; pass a copy: copy.deepcopy(model) or from_pretrained")
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = next((name for name, parameter in student.named_parameters() if id(parameter) in theirs), None)
    if shared is not None:
        raise ValueError(f"teacher and model share {shared}; pass a copy: copy.deepcopy(model) or from_pretrained")


def _check_outputs_match(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher whose predictions cannot be compared, and warn of labels in another order."""
    ours, theirs = student.config, teacher.config
    if _classifies(student) and _classifies(teacher):
        if ours.num_labels != theirs.num_labels:
            raise ValueError(
                f"the student has {ours.num_labels} labels and the teacher {theirs.num_labels}; give both the same num_labels"
            )
        # By number: many configs list them in the order of their numbers as text (0, 1, 10, 11, 2, ...).
        names = [[name for _, name in sorted((config.id2label or {}).items())] for config in (ours, theirs)]
        given = [not all(str(name).startswith("LABEL_") for name in side) for side in names]
        if all(given) and names[0] != names[1]:
            if sorted(map(str, names[0])) == sorted(map(str, names[1])):
                raise ValueError(
                    f"student and teacher have the same labels in another order ({names[0][:3]}... and {names[1][:3]}...); "
                    "set the student's id2label to the teacher's"
                )
            logger.warning("student and teacher name their labels differently: %s and %s", names[0][:5], names[1][:5])


def _classifies(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("Classification") and "num_labels" in dir(model.config)
