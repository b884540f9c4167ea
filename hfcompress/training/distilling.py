"""Distillation inside a Trainer: who teaches, what comes with the model into checkpoints, and when."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hfcompress.anatomy import Change
from hfcompress.checkpoints.damage import damage_named
from hfcompress.checkpoints.record import add_step
from hfcompress.config import DistillConfig, Recipe, ever_positive, value_at
from hfcompress.distillation import (
    AverageTeacher,
    CachedTeacher,
    CachingCollator,
    Ensemble,
    Teacher,
    capture,
    match_vocabularies,
    student_inputs,
)
from hfcompress.distillation.cache_format import MANIFEST_FILE
from hfcompress.distillation.cache_writing import in_bytes
from hfcompress.distillation.teachers import OWN_ANSWERS, name_of, with_decoder_inputs, without_adapters
from hfcompress.measurement import memory_bytes
from hfcompress.measurement.memory import memory_named
from hfcompress.training.comparing import Comparison, Seen, Shape, shape_of
from hfcompress.training.dropout import dropout_off
from hfcompress.training.exact import ExactTrainerMixin
from hfcompress.training.items import ItemCounts
from hfcompress.training.on_policy import OnPolicy
from hfcompress.training.self_test import check_gradients
from hfcompress.training.sharded import class_of, in_full_view, loading_whole, place_teacher

logger = logging.getLogger(__name__)

PROJECTIONS_FILE = "hfcompress_projections.safetensors"
AVERAGE_FILE = "hfcompress_average.safetensors"
STATE_FILE = "hfcompress_distillation.json"
FEWER_BITS = (
    "Load the teacher in fewer bits (teacher.precision: bfloat16, int8 or nf4) or on another device (teacher.device), or let it run "
    "once before (teacher.cache: true, or hfcompress cache-teacher)"
)

TeacherLike: TypeAlias = PreTrainedModel | str | os.PathLike[str] | Teacher | Sequence[Any]


class DistillationMixin(ExactTrainerMixin):
    """Adds a teacher to a Trainer.

    * `_loss_terms`: adds the terms that compare student and teacher. The teacher runs first, so that its activations are gone
      before the student's are there.
    * `get_batch_samples`: with `on_policy`, replaces answers by the student's own before they are counted.
    * `get_train_dataloader`: lets the workers read a cached teacher's targets.
    * `_set_signature_columns_if_needed`: keeps the columns that are for the teacher alone.
    * `create_optimizer`: adds the projections between hidden states of different widths, if there are any.
    * `training_step`: switches the student's dropout off; averages the projections' gradients over processes, as the wrapper does for
      the model's.
    * `_save_optimizer_and_scheduler`: keeps in checkpoints what a run needs to go on and is no part of the model.

    The teacher is no part of the Trainer's model: it is in eval mode, has no gradients, is never prepared, optimized or saved. Each
    process has it once, whole and beside the student; only where parameters are in shards (FSDP, ZeRO-3) and it takes more than a
    fifth of the free memory, it is held in shards as well. In evaluation only the labels count (or the teacher, where there are none).
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        *args: Any,
        teacher: TeacherLike | None = None,
        recipe: Recipe | None = None,
        **kwargs: Any,
    ) -> None:
        recipe = recipe if recipe is not None else Recipe(distill=DistillConfig())
        self.recipe = recipe
        self.distill: DistillConfig | None = recipe.distill
        self.teacher: Teacher | None = None
        self.comparison: Comparison | None = None
        self._on_policy: OnPolicy | None = None
        self._resumed_from: str | None = None
        self._teacher_digest: str | None = None
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
        self.add_callback(_DistillationCallback(self))

    # ---- who teaches whom ----

    def _student(self) -> Any:
        """The transformers model that learns."""
        return without_adapters(self.accelerator.unwrap_model(self.model))

    def _set_teacher(self, teacher: TeacherLike) -> None:
        assert self.distill is not None
        student = self._student()
        named = str(teacher) if isinstance(teacher, str | os.PathLike) else type(teacher).__name__
        with memory_named(
            lambda: (
                f"the teacher {named} did not fit beside the student on {self.args.device}: out of memory. {FEWER_BITS}"
            )
        ):
            self.teacher = self._as_teacher(teacher, student)
            self._refuse_in_shards()
            self._place_teacher()
        if self.distill.on_policy is not None:
            self._on_policy = OnPolicy(self.distill.on_policy, student, seed=self.args.seed)
            if isinstance(self.teacher, CachedTeacher):
                raise ValueError(
                    "a cached teacher has not seen what the student will write; leave out distill.on_policy, or use the teacher itself"
                )
        self.comparison = Comparison(
            self.distill,
            shifted=self._predicts_next_token,
            classes=self._shared_classes(student),
            frames_of=getattr(student, "_get_feature_vector_attention_mask", None),
        )
        if self.comparison.looks_inside:
            self._refuse_numbers_that_change()
            self.comparison.pair(self._student_shape(), self._teacher_shape())

    def _refuse_in_shards(self) -> None:
        """Say what does not work where parameters are in shards."""
        assert self.teacher is not None and self.distill is not None
        if self.sharding not in ("zero3", "fsdp"):
            return
        if self.distill.on_policy is not None:
            self._refuse("distill.on_policy, where each process writes texts of its own length,")
        if self.teacher.shares_weights:
            self._refuse("distilling from the student's own base model")
        if self.sharding == "zero3" and isinstance(self.teacher, AverageTeacher):
            self._refuse("an average of the student's weights")

    def _place_teacher(self) -> None:
        """Once per process beside the student; in shards like the student, if parameters are in shards and it is large."""
        assert self.teacher is not None
        own = self.teacher.shares_weights or isinstance(self.teacher, AverageTeacher)
        if self.teacher.models and not own:
            self._teacher_digest = _digest(self.teacher.models)
        if isinstance(self.teacher, AverageTeacher | CachedTeacher) or self.sharding not in ("zero3", "fsdp"):
            self.teacher.to(self.args.device)
            return
        if not place_teacher(self.teacher.models, self):
            self.teacher.to(self.args.device)

    def _as_teacher(self, teacher: TeacherLike, student: nn.Module) -> Teacher:
        if isinstance(teacher, AverageTeacher):
            if self.recipe.prune is not None:
                raise ValueError(
                    "an average of the student's weights cannot follow a student that is pruned; prune in a run of its own"
                )
            teacher.follow(student)
            return teacher
        if isinstance(teacher, Teacher):
            for model in teacher.models:
                self._check_teacher(student, model, shares=teacher.shares_weights)
            return teacher
        if isinstance(teacher, str | os.PathLike):
            if (Path(teacher) / MANIFEST_FILE).is_file():
                return CachedTeacher(teacher)
            with loading_whole(), damage_named(str(teacher)):
                teacher = class_of(student).from_pretrained(teacher, use_safetensors=True)
        if isinstance(teacher, list | tuple):
            return Ensemble([self._as_teacher(one, student) for one in teacher])
        self._check_teacher(student, teacher)  # type: ignore[arg-type]
        return Teacher(teacher, label_names=self.label_names)  # type: ignore[arg-type]

    def _check_teacher(self, student: Any, teacher: Any, *, shares: bool = False) -> None:
        if not shares:
            _check_nothing_is_shared(student, teacher)
        _check_outputs_match(student, teacher)

    def _shared_classes(self, student: Any) -> int | None:
        """Leading classes that both models predict, where their vocabularies differ by padding only."""
        assert self.teacher is not None and self.distill is not None
        if not ever_positive(self.distill.logits.weight) or self.distill.logits.loss == "uld" or _classifies(student):
            return None
        models = [model for model in self.teacher.models if hasattr(model, "config")]
        seen = [in_full_view(model) for model in (student, *models) if _has_output(model)]
        sizes = {model.get_output_embeddings().weight.shape[0] for model in seen}  # type: ignore[operator]
        if len(sizes) < 2:
            return None
        return min(match_vocabularies(student, model, student_tokenizer=self.processing_class) for model in models)

    def _refuse_numbers_that_change(self) -> None:
        assert self.distill is not None
        for name in ("hidden", "attentions", "relations"):
            term = getattr(self.distill, name)
            if ever_positive(term.weight) and self._layers_go() and isinstance(term.layers, list):
                raise ValueError(
                    f"distill.{name}.layers names layers by their number, which changes while prune.units: layers drops some; use all or last"
                )

    def _layers_go(self) -> bool:
        """Whether the student loses layers while it is trained."""
        prune = self.recipe.prune
        return prune is not None and "layers" in prune.units

    def _student_shape(self) -> Shape:
        return shape_of(in_full_view(self._student()))

    def _teacher_shape(self) -> Shape:
        assert self.teacher is not None
        if isinstance(self.teacher, CachedTeacher):
            return Shape(self.teacher.cache.manifest.layers, self.teacher.cache.manifest.width)
        if isinstance(self.teacher, Ensemble):
            raise ValueError(
                "several teachers are compared by their predictions only; set the weights of hidden, attentions, relations and embeddings to 0"
            )
        return shape_of(in_full_view(without_adapters(self.teacher.model)))

    # ---- batches ----

    def get_train_dataloader(self) -> Any:
        """Trainer's, whose workers also read what a cached teacher said."""
        collate: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = self._with_cache(collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def _with_cache(self, collate: Any) -> Any:
        """A collator that adds what a cached teacher said, if the teacher is one: of what it keeps only what is compared."""
        if not isinstance(self.teacher, CachedTeacher) or self.comparison is None:
            return collate
        layers = None if self._layers_go() else self.comparison.wanted()[1].hidden
        return CachingCollator(collate, self.teacher.cache, layers)

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        names = getattr(self.train_dataset, "column_names", None)
        if fresh and isinstance(names, list):
            self._signature_columns += [name for name in names if name.startswith("teacher_")]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of one optimizer step; with `on_policy` with answers of the student's own."""
        if self._on_policy is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        own = self._on_policy.rewrite(
            epoch_iterator, self._student(), step=self.state.global_step, rank=self.args.process_index, device=device
        )
        return super().get_batch_samples(own, num_batches, device)

    # ---- loss ----

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward, without dropout unless the recipe asks for it."""
        with nullcontext() if self.distill is None or self.distill.dropout else dropout_off(self._student()):
            return super().training_step(model, inputs, *args, **kwargs)

    def _loss_terms(
        self, model: nn.Module, inputs: Mapping[str, Any], counts: ItemCounts
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        has_labels = any(inputs.get(name) is not None for name in self.label_names)
        if self.teacher is None or self.distill is None or (not model.training and has_labels and not self._testing):
            return super()._loss_terms(model, student_inputs(inputs), counts)
        assert self.comparison is not None
        student = without_adapters(self.accelerator.unwrap_model(model))
        if self.comparison.looks_inside and self._layers_go():
            self.comparison.pair(self._student_shape(), self._teacher_shape())
        of_student, of_teacher = self.comparison.wanted()
        with self.accelerator.autocast(), memory_named(self._say_teacher_is_too_large):
            targets = self.teacher(with_decoder_inputs(student, inputs), wanted=of_teacher)
        given = student_inputs(inputs)
        with capture(student, of_student) as captured:
            outputs = self._run_model(model, given)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        terms: dict[str, torch.Tensor] = {}
        if has_labels and ever_positive(self.distill.task.weight) and not inputs.get(OWN_ANSWERS):
            task = self._task_loss(outputs, given, counts)
            if task is not None:
                terms["task"] = value_at(self.distill.task.weight, progress) * task
        problem = getattr(student.config, "problem_type", None)
        terms |= self.comparison.terms(Seen(inputs, outputs, captured, counts, progress, problem), targets)
        if not {"task", "logits"} & terms.keys():
            # Inner terms alone do not reach the head, and DistributedDataParallel waits for the gradient of every output.
            name = next(iter(terms))
            terms[name] = terms[name] + _nothing_of(outputs)
        return outputs, terms

    def _say_teacher_is_too_large(self) -> str:
        assert self.teacher is not None
        weights = sum(memory_bytes(model) for model in self.teacher.models)
        return (
            f"step {self.state.global_step + 1}: the teacher ({_names_of(self.teacher)}, {in_bytes(weights)} of weights on {self.teacher.device}) ran "
            f"out of memory. {self._smaller_batch}; or {FEWER_BITS[0].lower()}{FEWER_BITS[1:]}"
        )

    # ---- projections ----

    @property
    def _projections(self) -> nn.ModuleDict:
        return nn.ModuleDict() if self.comparison is None else self.comparison.projections

    def _make_beside(self) -> list[nn.Parameter]:
        """The projections between unequal widths."""
        self._make_projections()
        self._load_projections()
        return [*super()._make_beside(), *self._projections.parameters()]

    def _make_projections(self) -> None:
        if self.comparison is None or not self.comparison.looks_inside or self.teacher is None:
            return
        ours, theirs = self._student_shape(), self._teacher_shape()
        kept = self._kept_features()
        if kept is not None and kept[1] == theirs.width:
            self.comparison.features = torch.tensor(kept[0])
        else:
            self.comparison.make_projections(ours, theirs)
        if len(self._projections) and self._layers_go() and not self.comparison.dynamic:
            raise ValueError(
                f"hidden states of {ours.width} and {theirs.width} features are compared through a projection for each layer, which cannot "
                "follow prune.units: layers; set distill.hidden.weight to 0, or drop layers in a run of their own"
            )
        self._projections.to(self.args.device)

    def _follow_narrowing(self, kept: tuple[int, ...]) -> list[Change]:
        if self.comparison is None or not self.comparison.looks_inside:
            return []
        changes = self.comparison.narrow(torch.tensor(kept))
        fresh = {id(change.old): change.new for change in changes if change.new is not None}
        self._beside = [fresh.get(id(parameter), parameter) for parameter in self._beside]
        return changes

    def _load_projections(self) -> None:
        """Those of the checkpoint that is resumed from, if any; in any case the same on all processes."""
        path = Path(self._resumed_from or "") / PROJECTIONS_FILE
        if self._resumed_from and len(self._projections) and path.is_file():
            safetensors.torch.load_model(self._projections, path)
        for parameter in self._projections.parameters():
            if self.args.world_size > 1:
                torch.distributed.broadcast(parameter.data, src=0)

    # ---- a run ----

    def _begin_run(self) -> None:
        super()._begin_run()
        self._resumed_from = None
        self._projections.zero_grad()  # of a step that was interrupted
        if self.model_init is not None and self.comparison is not None:
            self.comparison.projections, self.comparison.features = nn.ModuleDict(), None

    def _start_distilling(self) -> None:
        """Before the first step: take up what a checkpoint kept, and look whether the loss is what it should be."""
        if self.comparison is None or self.teacher is None or self.distill is None:
            return
        if isinstance(self.teacher, AverageTeacher) and self._resumed_from is None and self.model_init is not None:
            self.teacher.follow(self._student())
        if self._resumed_from is not None:
            self._take_up(Path(self._resumed_from))
            self._load_projections()  # in shards, a run learns only now what it goes on from
        elif self.distill.self_test:
            with memory_named(self._say_student_is_too_large):
                check_gradients(self)

    def _take_up(self, folder: Path) -> None:
        assert self.comparison is not None
        if isinstance(self.teacher, AverageTeacher):
            path = folder / AVERAGE_FILE
            if not path.is_file():
                raise ValueError(
                    f"{folder} was not written by a run with an average as its teacher ({path.name} is missing)"
                )
            safetensors.torch.load_model(self.teacher.model, path)
            self.teacher.to(self.args.device)
        if self.comparison.dynamic and (folder / STATE_FILE).is_file():
            pairs = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["hidden"]
            self.comparison.hidden = tuple((student, teacher) for student, teacher in pairs)

    def _end_step(self) -> None:
        """After an optimizer step: what follows the student."""
        self._projections.zero_grad()
        if isinstance(self.teacher, AverageTeacher):
            self.teacher.update(self._student(), step=self.state.global_step)
        comparison = self.comparison
        if comparison is not None and comparison.dynamic and comparison.distances is not None:
            distances = comparison.distances
            if self.args.world_size > 1:
                torch.distributed.all_reduce(distances)
            comparison.match_again(distances)

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"teacher": self._teacher_digest}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _note_resumed(self, folder: str) -> None:
        super()._note_resumed(folder)
        self._resumed_from = folder

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        if len(self._projections):
            safetensors.torch.save_model(self._projections, str(folder / PROJECTIONS_FILE))
        if isinstance(self.teacher, AverageTeacher):
            safetensors.torch.save_model(self.teacher.model, str(folder / AVERAGE_FILE))
        if self.comparison is not None and self.comparison.dynamic:
            facts = {"hidden": [list(pair) for pair in self.comparison.hidden]}
            (folder / STATE_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def _record_steps(self) -> None:
        super()._record_steps()
        if self.distill is None or self.teacher is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        add_step(
            model.config,
            "distill",
            teacher=_names_of(self.teacher),
            settings=self.distill.model_dump(),
            optimizer_steps=self.state.global_step,
        )


def _names_of(teacher: Teacher) -> str:
    """The teacher, or all of several."""
    if isinstance(teacher, CachedTeacher):
        return teacher.cache.manifest.teacher
    return ", ".join(name_of(without_adapters(model)) for model in teacher.models)


class _DistillationCallback(TrainerCallback):
    """Does for what is beside the model what the training loop does for the model."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._start_distilling()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer._end_step()


def _digest(models: Sequence[nn.Module]) -> str:
    """Tells teachers apart: CRC-32 of the names, shapes and first numbers of all their weights."""
    value = 0
    for model in models:
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                first = tensor.detach().reshape(-1)[:64].cpu().contiguous().view(torch.uint8).numpy().tobytes()
                value = zlib.crc32(f"{name} {tuple(tensor.shape)} ".encode() + first, value)
    return f"{value:08x}"


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


def _has_output(model: Any) -> bool:
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def _classifies(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("Classification") and "num_labels" in dir(model.config)
