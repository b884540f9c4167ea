"""From a saved teacher and some data to a cache of what the teacher says of them."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset
from transformers.trainer_utils import RemoveColumnsCollator

from hfcompress.checkpoints.io import load
from hfcompress.config import DataConfig, Recipe, RecipeError
from hfcompress.distillation import CacheContents, Teacher, write_cache
from hfcompress.distillation.cache_format import Manifest
from hfcompress.measurement.latency import is_movable
from hfcompress.runs.evaluation import device_of
from hfcompress.tasks import PreparedTask, prepare
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.preparation import TASKS


def cache_task(
    teacher: Teacher,
    task: PreparedTask,
    folder: str | Path,
    contents: CacheContents,
    *,
    batch: int = 32,
    seed: int = 0,
    with_eval: bool = False,
) -> Manifest:
    """Keep what a teacher says of a task's training examples, in a folder; each process of a launcher writes a part.

    Args:
        teacher: The teacher, on its device.
        task: The prepared task.
        folder: Where to write, or to go on.
        contents: What is kept.
        batch: Examples the teacher is asked about at once.
        seed: Of draws.
        with_eval: Keep the evaluation examples too: with another seed others are held out.

    Returns:
        The manifest; complete once all processes are done.

    Raises:
        CacheError: See `write_cache`.
    """
    dataset: Any = task.train_dataset
    if with_eval and task.eval_dataset.column_names == dataset.column_names:
        dataset = ConcatDataset([dataset, task.eval_dataset])  # type: ignore[list-item]
    # As a Trainer does: what forward does not take, collators need not know.
    taken = [*inspect.signature(teacher.model.forward).parameters, "label", "label_ids", *task.label_columns]
    collate = RemoveColumnsCollator(task.data_collator, taken)
    rank, world_size = processes()
    return write_cache(
        teacher,
        dataset,
        collate,
        folder,
        contents,
        batch_size=batch,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def cache_teacher(
    teacher: str,
    data: DataConfig,
    folder: str | Path,
    contents: CacheContents,
    *,
    task: str | None = None,
    encoded_for: str | None = None,
    device: str = "auto",
    batch: int = 32,
    seed: int = 42,
) -> Manifest:
    """Keep what a saved teacher says of the training examples of some data.

    Args:
        teacher: Folder or Hub repository of the teacher. It runs in the precision it was saved in.
        data: Where the examples are. Without evaluation data those that may be held out are kept too.
        folder: Where to write, or to go on.
        contents: What is kept.
        task: A key of `TASKS`; None is what the teacher was made for.
        encoded_for: Folder or repository of the model that is trained on them, where its tokenizer or processor counts.
        device: Where the teacher runs; "auto" is the GPU of this process, if there is one.
        batch: Examples it is asked about at once.
        seed: Of what is held out, and of draws.

    Returns:
        The manifest.

    Raises:
        DataError: The data cannot be used.
        CacheError: See `write_cache`.
    """
    model = load_teacher(teacher, device)
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if not reads_text and getattr(model, "quantization_method", None) is None:
        model = model.float()  # pixels and sound come in 32 bits
    prepared = prepare(
        data, task=task or _task_of(model), model_name=encoded_for or teacher, seed=seed, must_match=encoded_for is None
    )
    return cache_task(
        Teacher(model, label_names=prepared.label_columns),
        prepared,
        folder,
        contents,
        batch=batch,
        seed=seed,
        with_eval=data.eval is None,
    )


def cache_recipe(
    recipe: Recipe, folder: str | Path, contents: CacheContents, *, device: str = "auto", batch: int = 32
) -> Manifest:
    """Keep what a recipe's teacher says of its training data.

    Raises:
        RecipeError: The recipe does not say which data, or has no one teacher that is there.
    """
    if recipe.data is None or recipe.task is None:
        raise RecipeError("the recipe needs task and data, to know what its teacher is asked about")
    named = recipe.teacher.name if recipe.teacher is not None else None
    made = Path(recipe.output or "") / "teacher"
    if named is None and (made / "config.json").is_file():
        named = str(made)
    if not isinstance(named, str):
        raise RecipeError(
            "the recipe names no teacher, or several; set teacher.name to one, or run the recipe first to train it"
        )
    return cache_teacher(
        named,
        recipe.data,
        folder,
        contents,
        task=recipe.task,
        encoded_for=None if recipe.model is None else recipe.model.name,
        device=device,
        batch=batch,
        seed=recipe.seed,
    )


def _task_of(model: nn.Module) -> str:
    """The task that a model was made for, by the name of its class."""
    name = type(model).__name__
    for task, spec in TASKS.items():
        heads = spec.heads or (spec.auto_class.removeprefix("AutoModel"),)
        if any(head and head in name for head in heads):
            return task
    raise DataError(f"{name} says no task it was made for; give --task, one of {', '.join(TASKS)}")


def processes() -> tuple[int, int]:
    """Number of this process, and of all, as a launcher says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def load_teacher(teacher: str, device: str) -> Any:
    """Load a saved model, in the precision it was saved in, onto a device; of several GPUs onto the one of this process.

    Raises:
        ValueError: There is no such device here.
    """
    where = _own_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # bitsandbytes puts what it loads on the current one
    model = load(teacher)
    return model.to(where) if is_movable(model) else model


def _own_device(name: str) -> torch.device:
    device = device_of(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
