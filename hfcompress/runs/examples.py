"""Examples for a saved model, by what it was trained for: what to calibrate on, and what to score with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfcompress.config import DataConfig
from hfcompress.measurement import Answers, Metric
from hfcompress.runs.evaluation import Rate, rate_on
from hfcompress.tasks import PreparedTask, prepare
from hfcompress.tasks.columns import Columns, may_hold_labels, text_columns
from hfcompress.tasks.corpus import read_corpus
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.preparation import find_task
from hfcompress.tasks.scores import TokenScores
from hfcompress.tasks.sources import Source, read_rows, read_sources

_CLASSIFIERS = {"ForSequenceClassification": "text-classification", "ForImageClassification": "image-classification"}


def drop(dense: Metric, other: Metric) -> float:
    """How much worse a model is than the dense one: points of a share, per cent of what is better when lower (perplexity).

    Example:
        >>> drop(Metric("accuracy", 0.9, n=100, low=0.8, high=1.0), Metric("accuracy", 0.885, n=100, low=0.8, high=1.0))
        1.5
        >>> before, after = (Metric("perplexity", v, n=9, low=v - 1, high=v + 1, higher_is_better=False) for v in (10.0, 12.0))
        >>> drop(before, after)
        20.0
    """
    if not dense.higher_is_better:
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

    Classifiers are scored by their accuracy on labelled data, and only calibrated on data without labels; decoders are scored by their
    perplexity on text in blocks of `data.max_length` tokens; other text models are only calibrated.

    Args:
        model: The model.
        folder: Where it and its processor are.
        data: Files; `eval` is what is scored on, or a part of `train` that is held out.
        samples: Calibration examples (blocks of text for decoders).
        seed: Of the choice.
        batch: Examples in a batch.

    Raises:
        DataError: The data cannot be read, or there is too little of it; or the model needs more than a text or an image.
    """
    name = type(model).__name__
    kind = next((task for ending, task in _CLASSIFIERS.items() if name.endswith(ending)), None)
    if kind is not None and _has_labels(data, kind):
        return _classification(folder, data, kind, samples=samples, seed=seed, batch=batch)
    if kind is not None:
        return _unlabelled(model, folder, data, kind, samples=samples, seed=seed, batch=batch)
    if getattr(model.config, "is_encoder_decoder", False):
        raise DataError(f"{name} reads two texts; prune it while it trains, with Seq2SeqPruningTrainer")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise DataError(f"{name} reads {model.main_input_name}; this command knows texts and image classification")
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        tokenizer = find_task("text-classification").inputs.load_processor(
            folder, revision=None, trust_remote_code=False
        )
        return _blocks(tokenizer, data, samples=samples, seed=seed, batch=max(1, batch // 8))
    return _unlabelled(model, folder, data, "text-classification", samples=samples, seed=seed, batch=batch)


def _classification(folder: str, data: DataConfig, kind: str, *, samples: int, seed: int, batch: int) -> Examples:
    task = prepare(data, task=kind, model_name=folder, seed=seed, must_match=True)
    batches = _chosen(task.train_dataset, task.data_collator, samples=samples, seed=seed, batch=batch)
    return Examples(batches, min(samples, len(task.train_dataset)), rate_on(task), task)


def _unlabelled(
    model: nn.Module, folder: str, data: DataConfig, kind: str, *, samples: int, seed: int, batch: int
) -> Examples:
    """The inputs alone, encoded as those of a task."""
    inputs = find_task(kind).inputs
    if data.train is None:
        raise DataError("data.train: give a file or a folder of examples")
    processor = inputs.load_processor(folder, revision=None, trust_remote_code=False)
    if inputs.kind == "image":
        sources = [_images(data)]
        columns = Columns(None, (sources[0].rows.column_names[0],))
    else:
        sources = read_rows(data.train, key="data.train")
        columns = Columns(None, text_columns(sources[0].rows.features, _columns(data)))
        sources = [_filled(source, columns) for source in sources]
    opened = datasets.concatenate_datasets([inputs.open(source, columns, config=data) for source in sources])
    encoded = inputs.encode(opened, processor=processor, config=data, model_config=model.config, where="examples")
    collate = inputs.collator(processor, config=data, model_config=model.config)
    batches = _chosen(encoded, collate, samples=samples, seed=seed, batch=batch)
    return Examples(batches, min(samples, len(encoded)), None)


def _has_labels(data: DataConfig, kind: str) -> bool:
    """Whether data say, or seem to say, what is right."""
    if data.label is not None or data.name is not None or data.eval is not None:
        return True
    inputs = find_task(kind).inputs
    if inputs.kind == "image":
        return not _loose_images(data)
    if str(data.train).lower().endswith(".txt"):
        return False
    source, _ = read_sources(data, kind="text")
    return may_hold_labels(source.rows.features, data, "text")


def _loose_images(data: DataConfig) -> list[Path]:
    """Images that lie in a folder itself, not in one folder per class, if that is what was given."""
    folder = Path(str(data.train)).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    suffixes = {suffix for suffix, name in PIL.Image.registered_extensions().items() if name in PIL.Image.OPEN}
    return [path for path in files if path.suffix.lower() in suffixes and not path.name.startswith(".")]


def _images(data: DataConfig) -> Source:
    paths = [str(path.absolute()) for path in _loose_images(data)]
    rows = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    return Source(rows, Path(str(data.train)).name)


def _filled(source: Source, columns: Columns) -> Source:
    """Without rows that have no text: empty lines of a file are no examples."""
    lists = [source.rows[name] for name in columns.inputs]
    kept = [row for row, texts in enumerate(zip(*lists, strict=True)) if all(text and text.strip() for text in texts)]
    if not kept:
        raise DataError(f"data.train: {source.name} has no text")
    return Source(source.rows.select(kept), source.name, source.folder)


def _columns(data: DataConfig) -> list[str]:
    return [] if data.text is None else [data.text] if isinstance(data.text, str) else list(data.text)


def _chosen(dataset: Any, collate: Callable[[list[Any]], Any], *, samples: int, seed: int, batch: int) -> list[Any]:
    """Batches of a random choice, long texts with long ones."""
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:samples].tolist()
    rows = sorted((dataset[index] for index in chosen), key=lambda row: len(row.get("input_ids", ())))
    return [collate(rows[start : start + batch]) for start in range(0, len(rows), batch)]


def _blocks(tokenizer: Any, data: DataConfig, *, samples: int, seed: int, batch: int) -> Examples:
    """Text in one piece, cut into blocks of equal length."""
    if data.train is None:
        raise DataError("data.train: give a file of texts")
    train = _tokens(tokenizer, data.train, data)
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
    return Examples(batches, len(blocks), lambda candidate: rate_blocks(candidate, test, batch=batch))


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tokens(tokenizer: Any, file: str, data: DataConfig) -> torch.Tensor:
    """The texts of a file, one after the other, as blocks; shape (blocks, length)."""
    texts = "\n".join(text for text in read_corpus([file], text=_columns(data)) if text)
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // data.max_length
    return torch.tensor(ids[: count * data.max_length], dtype=torch.long).view(count, data.max_length)


def perplexity(model: nn.Module, blocks: torch.Tensor, *, batch: int = 8) -> Metric:
    """The perplexity alone of `rate_blocks`."""
    return rate_blocks(model, blocks, batch=batch)[0]


def rate_blocks(model: nn.Module, blocks: torch.Tensor, *, batch: int = 8) -> tuple[Metric, Answers]:
    """Exponential of the mean negative log-likelihood of each token given those before it in its block.

    Args:
        model: A causal language model.
        blocks: Token ids, int64, shape (blocks, length), length at least 2.
        batch: Blocks in a batch.

    Returns:
        The metric, whose 95 % interval is from the spread of the blocks' means and whose n is the number of tokens that are
        predicted; and the blocks' losses and tokens.
    """
    device = next(model.parameters()).device
    scores, kept = TokenScores(shifted=True), []
    model.eval()
    for start in tqdm(range(0, len(blocks), batch), desc="perplexity", leave=False, delay=2):
        ids = blocks[start : start + batch].to(device)
        with torch.inference_mode():
            kept.append(scores.run(model, _batch(ids), ids).cpu())
    return scores.measure(torch.cat(kept).numpy(), blocks.numpy())
