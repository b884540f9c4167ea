"""Examples for a saved model, by what it was trained for: what to calibrate on, and what to score with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfcompress.config import DataConfig
from hfcompress.measurement import Metric
from hfcompress.runs.evaluation import Rate, rate_on
from hfcompress.tasks import PreparedTask, prepare
from hfcompress.tasks.corpus import read_corpus
from hfcompress.tasks.errors import DataError

_CLASSIFIERS = {"ForSequenceClassification": "text-classification", "ForImageClassification": "image-classification"}


def drop(dense: Metric, other: Metric) -> float:
    """How much worse a model is than the dense one: points of a share, per cent of perplexity.

    Example:
        >>> drop(Metric("accuracy", 0.9, n=100, low=0.8, high=1.0), Metric("accuracy", 0.885, n=100, low=0.8, high=1.0))
        1.5
        >>> drop(Metric("perplexity", 10.0, n=9, low=9.0, high=11.0), Metric("perplexity", 12.0, n=9, low=11.0, high=13.0))
        20.0
    """
    if dense.name == "perplexity":
        return round(100 * (other.value / dense.value - 1), 6)
    return round(100 * (dense.value - other.value), 6)


@dataclass(frozen=True)
class Examples:
    """What one model is calibrated and scored on.

    Attributes:
        batches: Calibration batches, long texts with long ones.
        n: Examples in them.
        rate: Scores a model; None without evaluation data.
        task: The prepared task of a classifier; None otherwise.
    """

    batches: list[dict[str, Any]]
    n: int
    rate: Rate | None
    task: PreparedTask | None = None


def read_examples(
    model: nn.Module,
    folder: str,
    data: DataConfig,
    *,
    samples: int,
    seed: int,
    batch: int = 32,
) -> Examples:
    """Calibration batches and a score for a model.

    Classifiers are scored by their accuracy on labelled data; decoders by their perplexity on text in blocks of `data.max_length` tokens;
    other text models are only calibrated.

    Args:
        model: The model.
        folder: Where it and its processor are.
        data: Files; `eval` is what is scored on, or a part of `train` that is held out.
        samples: Calibration examples (blocks of text for decoders).
        seed: Of the choice.
        batch: Examples in a batch.

    Raises:
        DataError: The data cannot be read, or there is too little of it.
    """
    name = type(model).__name__
    kind = next((task for ending, task in _CLASSIFIERS.items() if name.endswith(ending)), None)
    if kind is not None:
        return _classification(model, folder, data, kind, samples=samples, seed=seed, batch=batch)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise DataError(f"{name} reads {model.main_input_name}; this command knows texts and image classification")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return _blocks(tokenizer, data, samples=samples, seed=seed, batch=max(1, batch // 8))
    texts = [text for text in read_corpus([str(data.train)], text=_columns(data)) if text]
    chosen = np.random.default_rng(seed).permutation(len(texts))[:samples]
    batches = _encode(tokenizer, [texts[index] for index in chosen], data.max_length, batch)
    return Examples(batches, len(chosen), None)


def _classification(
    model: nn.Module, folder: str, data: DataConfig, kind: str, *, samples: int, seed: int, batch: int
) -> Examples:
    names = model.config.id2label  # type: ignore[union-attr]
    labels = [names[number] for number in sorted(names)]  # type: ignore[operator, index, arg-type]
    task = prepare(data, task=kind, model_name=folder, seed=seed, must_match=True, label_names=labels)  # type: ignore[arg-type]
    dataset = task.train_dataset
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:samples].tolist()
    rows = sorted((dataset[index] for index in chosen), key=lambda row: len(row.get("input_ids", ())))
    batches = [task.data_collator(rows[start : start + batch]) for start in range(0, len(rows), batch)]

    return Examples(batches, len(rows), rate_on(task), task)


def _columns(data: DataConfig) -> list[str]:
    return [] if data.text is None else [data.text] if isinstance(data.text, str) else list(data.text)


def _encode(tokenizer: Any, texts: Sequence[str], length: int, batch: int) -> list[dict[str, Any]]:
    encoded = [tokenizer(text, truncation=True, max_length=length) for text in texts]
    encoded.sort(key=lambda row: len(row["input_ids"]))
    return [
        dict(tokenizer.pad(encoded[start : start + batch], return_tensors="pt"))
        for start in range(0, len(encoded), batch)
    ]


def _blocks(tokenizer: Any, data: DataConfig, *, samples: int, seed: int, batch: int) -> Examples:
    """Text in one piece, cut into blocks of equal length."""
    train = _tokens(tokenizer, str(data.train), data)
    if data.eval is None:
        held_out = max(1, int(len(train) * data.holdout))
        train, test = train[:-held_out], train[-held_out:]
    else:
        test = _tokens(tokenizer, data.eval, data)
    if data.max_eval is not None:
        test = test[: data.max_eval]
    if not len(train) or not len(test):
        raise DataError(
            f"the text is shorter than two blocks of {data.max_length} tokens; give more text or a smaller length"
        )
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:samples]
    blocks = train[chosen]
    batches = [_batch(blocks[start : start + batch]) for start in range(0, len(blocks), batch)]
    return Examples(batches, len(blocks), lambda candidate: (perplexity(candidate, test, batch=batch), None))


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tokens(tokenizer: Any, file: str, data: DataConfig) -> torch.Tensor:
    """The texts of a file, one after the other, as blocks; shape (blocks, length)."""
    texts = "\n".join(text for text in read_corpus([file], text=_columns(data)) if text)
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // data.max_length
    return torch.tensor(ids[: count * data.max_length], dtype=torch.long).view(count, data.max_length)


def perplexity(model: nn.Module, blocks: torch.Tensor, *, batch: int = 8) -> Metric:
    """Exponential of the mean negative log-likelihood of each token given those before it in its block.

    Args:
        model: A causal language model.
        blocks: Token ids, int64, shape (blocks, length), length at least 2.
        batch: Blocks in a batch.

    Returns:
        The metric; its 95 % interval is from the spread of the blocks' means, n is the number of tokens that are predicted.
    """
    device = next(model.parameters()).device
    losses = []
    model.eval()
    for start in tqdm(range(0, len(blocks), batch), desc="perplexity", leave=False, delay=2):
        ids = blocks[start : start + batch].to(device)
        with torch.inference_mode():
            logits = model(**_batch(ids)).logits.float()
        every = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(every.mean(1).double().cpu())
    means = torch.cat(losses)
    mean = float(means.mean())
    margin = 1.96 * float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0
    value, low, high = (math.exp(number) for number in (mean, mean - margin, mean + margin))
    return Metric("perplexity", value, n=blocks[:, 1:].numel(), low=low, high=high)
