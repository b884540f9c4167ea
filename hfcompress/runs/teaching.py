"""From a recipe's `teacher` section to what teaches in its run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from hfcompress.checkpoints.damage import damage_named
from hfcompress.checkpoints.io import load, model_class
from hfcompress.config import DistillConfig, Recipe, RecipeError, TeacherConfig, ever_positive
from hfcompress.distillation import (
    AverageTeacher,
    CacheContents,
    CachedTeacher,
    Ensemble,
    Placement,
    Teacher,
    plan_placement,
)
from hfcompress.distillation.cache_writing import in_bytes
from hfcompress.distillation.placement import Sharding
from hfcompress.measurement.memory import memory_named
from hfcompress.quantization import quantize
from hfcompress.runs.caching import cache_task
from hfcompress.training.comparing import Comparison, shape_of
from hfcompress.training.distilling import FEWER_BITS

logger = logging.getLogger(__name__)

CACHE_FOLDER = "teacher-cache"


def open_teachers(recipe: Recipe, folder: Path, student: nn.Module, args: Any, task: Any, output: Path) -> Teacher:
    """What the student learns from in this run.

    Args:
        recipe: With a `distill` section.
        folder: The one teacher, unless the recipe names several.
        student: Will be trained.
        args: The training arguments.
        task: What is trained on, as `prepare` gives it.
        output: Folder of the run; a cache is kept in it.

    Returns:
        The teacher.

    Raises:
        RecipeError: What is asked for does not go together.
        ValueError: A teacher cannot be loaded.
    """
    assert recipe.distill is not None
    config = recipe.teacher or TeacherConfig()
    if config.average is not None:
        return AverageTeacher(decay=config.average)
    names = config.names if len(config.names) > 1 else [str(folder)]
    plan = _place(names, student, args, cached=config.cache, length=task.max_length)
    teachers = [_open(name, config, plan, args, task.label_columns) for name in names]
    teacher = teachers[0]
    if len(teachers) > 1:
        teacher = Ensemble(teachers, weights=config.weights, combine=config.combine)
    if not config.cache:
        return teacher
    return _cached(teacher, recipe.distill, student, args, task, output / CACHE_FOLDER)


def _place(names: Sequence[str], student: nn.Module, args: Any, *, cached: bool, length: int | None) -> Placement:
    """Count what the run takes in each process, from configs alone, and say where the teachers go."""
    teachers = []
    for name in names:
        cls, teacher_config = model_class(name)
        with damage_named(name), torch.device("meta"):
            teachers.append(cls._from_config(teacher_config))
    state = PartialState()
    plan = plan_placement(
        student,  # type: ignore[arg-type]
        None if cached else teachers,
        batch=args.per_device_train_batch_size,
        length=length,
        optim=str(getattr(args.optim, "value", args.optim)),
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        gradient_checkpointing=bool(getattr(args, "gradient_checkpointing", False)),
        world_size=state.num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        sharding=_sharding(),
        device=args.device,
    )
    logger.info("%s", plan.describe())
    return plan


def _sharding() -> Sharding:
    """What will be in shards, as a launcher and the training arguments say; there is no trainer yet to ask."""
    if is_deepspeed_zero3_enabled():
        return "zero3"
    if str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
        return "zero2"
    return "fsdp" if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")) else "none"


def _open(name: str, config: TeacherConfig, plan: Placement, args: Any, label_names: Sequence[str]) -> Teacher:
    """One teacher in the precision and on the device that the recipe names, or that the plan chose."""
    precision = config.precision
    if precision == "auto":
        precision = plan.teacher_precision or "float32"  # type: ignore[assignment]
    device = config.device
    if device == "auto":
        device = str(plan.teacher_device or args.device)
    model: Any
    known = f"; in {plan.teacher_precision} it takes {in_bytes(plan.teacher_bytes)}" if plan.teacher_precision else ""
    free = f"{in_bytes(plan.available_bytes)} were free on {plan.device}{known}"
    with memory_named(
        lambda: (
            f"the teacher {name}, loaded in {precision} on {device}, ran out of memory. Of that {free}. {FEWER_BITS}"
        )
    ):
        if precision in ("int8", "nf4"):
            model = quantize(name, precision, device_map={"": device})
        else:
            model = load(name, dtype=getattr(torch, precision)).to(device)
    return Teacher(model, label_names=label_names)


def _cached(
    teacher: Teacher, distill: DistillConfig, student: nn.Module, args: Any, task: Any, folder: Path
) -> CachedTeacher:
    """Let a teacher run over the training data, unless it has, and read what it said."""
    cache_task(
        teacher,
        task,
        folder,
        contents_for(distill, student, teacher),
        batch=args.per_device_eval_batch_size,
        seed=args.seed,
    )
    PartialState().wait_for_everyone()
    return CachedTeacher(folder)


def contents_for(distill: DistillConfig, student: nn.Module, teacher: Teacher) -> CacheContents:
    """What a cache has to keep for what is compared.

    Of classes all logits are kept; of a vocabulary the 64 likeliest tokens where that will do (the divergence "kl" at temperature
    1), and else the last hidden states, of which logits are made again.

    Raises:
        RecipeError: Something is compared that is not cached.
    """
    for name in ("attentions", "relations"):
        if ever_positive(getattr(distill, name).weight):
            raise RecipeError(
                f"teacher.cache keeps no attention, so distill.{name} needs the teacher itself; set cache to false"
            )
    if distill.on_policy is not None:
        raise RecipeError(
            "teacher.cache has not seen what the student will write; leave out distill.on_policy or cache"
        )
    hidden: tuple[int, ...] = ()
    comparison = Comparison(distill, shifted=False)
    if comparison.looks_inside:
        comparison.pair(shape_of(student), shape_of(teacher.model))
        hidden = tuple(sorted(comparison.wanted()[1].hidden))
    if not ever_positive(distill.logits.weight):
        return CacheContents(None, hidden_layers=hidden)
    if student.get_output_embeddings() is None:  # type: ignore[operator]
        return CacheContents("all", hidden_layers=hidden)
    coarse = distill.logits.loss == "kl" and distill.logits.temperature == 1 and not distill.logits.standardize
    return CacheContents("top_k" if coarse else "last_hidden", hidden_layers=hidden)
