"""TrainingArguments from the `train` section of a recipe."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hfcompress.config import RecipeError


def training_arguments(
    output: str | Path,
    settings: dict[str, Any],
    *,
    seed: int,
    section: str = "train",
    generate_up_to: int | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """Training arguments for one stage of a run.

    What the recipe does not say is as in transformers, but: nothing is reported anywhere unless asked (`report_to`), and
    without a GPU the CPU is used, also by several processes.

    Args:
        output: Folder for checkpoints.
        settings: Fields of `TrainingArguments`.
        seed: Of data order, dropout and initialisation.
        section: Name of the recipe's section, for error messages.
        generate_up_to: Longest text that a sequence-to-sequence model generates when it is evaluated, in tokens; None for
            other models.
        defaults: Further fields, for those that the recipe does not name.

    Raises:
        RecipeError: A field does not exist or its value is not allowed; one line.

    Example:
        >>> training_arguments("out", {"max_steps": 5}, seed=1).max_steps
        5
        >>> training_arguments("out", {"learnin_rate": 5}, seed=1)
        Traceback (most recent call last):
        ...
        hfcompress.config.RecipeError: train.learnin_rate is not a training argument; did you mean learning_rate?
    """
    cls = TrainingArguments if generate_up_to is None else Seq2SeqTrainingArguments
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls) if field.init}
    for key in settings:
        if key not in fields:
            close = difflib.get_close_matches(key, sorted(fields), n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see transformers.TrainingArguments"
            raise RecipeError(f"{section}.{key} is not a training argument{hint}")
    settings = {key: _value(f"{section}.{key}", value, fields[key]) for key, value in settings.items()}
    ours: dict[str, Any] = {"report_to": "none", **(defaults or {})}
    if not torch.accelerator.is_available():
        ours |= {"use_cpu": True, "dataloader_pin_memory": False}
    if generate_up_to is not None:
        ours |= {"predict_with_generate": True, "generation_max_length": generate_up_to}
    try:
        return cls(str(output), seed=seed, **{**ours, **settings})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{section}: {' '.join(str(error).split())}") from error


def _value(key: str, value: Any, kind: str) -> Any:
    """A number where a number belongs; text (to plain YAML, 5e-5 is text) would fail in the midst of training."""
    if not isinstance(value, str) or "str" in kind or not any(word in kind for word in ("float", "int", "bool")):
        return value
    try:
        if "float" in kind:
            return float(value)
    except ValueError:
        raise RecipeError(f"{key} must be a number, got {value!r}") from None
    wanted = "a whole number" if "int" in kind else "true or false"
    raise RecipeError(f"{key} must be {wanted}, got {value!r}")
