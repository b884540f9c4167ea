"""Models that say what a sentence is, and their data: parquet files with sentence and label."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import load_dataset

from hfcompress import Recipe
from hfcompress.distillation import CacheContents, CachedTeacher, Teacher, write_cache
from hfcompress.tasks import prepare

LENGTH = 64  # tokens


@contextmanager
def pooled(files: Sequence[str]) -> Iterator[str]:
    """One file with the rows of several, while it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "eval.parquet"
        rows = [load_dataset("parquet", data_files=file, split="train") for file in files]
        datasets.concatenate_datasets(rows).to_parquet(path)
        yield str(path)


def open_task(
    model: str, train: str, evaluation: Sequence[str], *, seed: int = 0, max_train: int | None = None
) -> tuple[Any, Any]:
    """A fine-tuned model in float32, and its task with training and pooled evaluation data; without the latter few training sentences."""
    cls = transformers.AutoModelForSequenceClassification
    loaded = cls.from_pretrained(model, dtype=torch.float32).eval()
    with pooled(evaluation or [train]) as held_out:
        data = {
            "train": train,
            "eval": held_out,
            "text": "sentence",
            "label": "label",
            "max_length": LENGTH,
            "max_train": max_train,
        }
        recipe = Recipe.from_dict({"data": data | ({} if evaluation else {"max_eval": 64})}, source="the benchmark")
        assert recipe.data is not None
        names = [loaded.config.id2label[number] for number in sorted(loaded.config.id2label)]
        task = prepare(
            recipe.data, task="text-classification", model_name=model, seed=seed, must_match=True, label_names=names
        )
    return loaded, task


def ask_once(teacher: Teacher, task: Any, folder: Path, *, layers: Sequence[int]) -> CachedTeacher:
    """What the teacher says of the training data, with the outputs of some layers; it runs only if it has not."""
    contents = CacheContents("all", hidden_layers=tuple(layers))
    write_cache(teacher, task.train_dataset, task.data_collator, folder, contents, batch_size=64)
    return CachedTeacher(folder)
