"""A text written for a text (summaries, translations): both tokenized, what is generated scored by ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DataCollatorForSeq2Seq

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, choose_column, is_string, require_distinct, told, with_parts
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.scores import RatioScores
from hfcompress.tasks.sources import Source
from hfcompress.tasks.text import (
    TokenizedInputs,
    length_limit,
    log_cuts,
    map_rows,
    padding_multiple,
    require_text,
)

SOURCES = (
    "source",
    "src",
    "input",
    "input_text",
    "source_text",
    "article",
    "document",
    "dialogue",
    "dialog",
    "body",
    "text",
)
TARGETS = ("target", "tgt", "output", "target_text", "output_text", "summary", "highlights", "abstract", "translation")


class WritingInputs(TokenizedInputs):
    """A text, and the text to write for it."""

    def find_columns(self, features: Mapping[str, Any], config: DataConfig) -> Columns:
        """The columns of source and target; the parts of a column of translations count as columns.

        Raises:
            DataError: A column is not there, holds something else, or cannot be told from others.

        Example:
            >>> pair = datasets.Translation(["de", "en"])
            >>> told = DataConfig(train="a.json", text="en", label="de")
            >>> WritingInputs().find_columns({"id": datasets.Value("string"), "translation": pair}, told)
            Columns(label='translation.de', inputs=('translation.en',), choices=())
        """
        if len(told(config.text)) > 1:
            raise DataError("data.text: name one column; the text to write stands in data.label")
        flat = with_parts(features)
        source, target = (full_name(name, flat) for name in ((*told(config.text), None)[0], config.label))
        options: dict[str, Any] = {"fits": is_string, "wanted": "text"}
        rest = {name: feature for name, feature in flat.items() if name not in (target, source)}
        target = choose_column(
            "data.label", "texts to write", flat if target else rest, name=target, customary=TARGETS, **options
        )
        rest.pop(target, None)
        source = choose_column(
            "data.text", "texts", flat if source else rest, name=source, customary=SOURCES, **options
        )
        require_distinct(source, target)
        return Columns(target, (source,))

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check that each row has both; columns "source", with the prefix that is asked for, and "target"."""
        tops = dict.fromkeys(name if name in source.rows.features else name.partition(".")[0] for name in columns.all)
        rows = source.rows.with_format(None).select_columns(list(tops)).flatten()
        for name in columns.all:
            require_text(rows, [name], where=source.name)
        texts = [config.prefix + text for text in rows[columns.inputs[0]]]
        return datasets.Dataset.from_dict({"source": texts, "target": list(rows[str(columns.label)])})

    def encode(
        self,
        rows: datasets.Dataset,
        *,
        processor: Any,
        config: DataConfig,
        model_config: Any,
        where: str,
        seed: int = 0,
    ) -> datasets.Dataset:
        """Tokenize both, each cut at its longest length."""
        del seed
        limit, _ = length_limit(processor, config=config, model_config=model_config)
        encoded = map_rows(
            rows,
            tokenize_pairs,
            config=config,
            where=where,
            remove_columns=rows.column_names,
            fn_kwargs={"tokenizer": processor, "limit": limit, "target_limit": config.max_target_length},
        )
        return log_cuts(encoded, where=where, limit=limit)

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Pad texts and labels to the longest of the batch."""
        multiple = padding_multiple(processor, config=config, model_config=model_config)
        return DataCollatorForSeq2Seq(processor, pad_to_multiple_of=multiple)

    def model_kwargs(self, processor: Any, model_config: Any) -> dict[str, Any]:
        """Nothing: encoder-decoders know their padding token, which starts or follows what they write."""
        del processor, model_config
        return {}


def full_name(name: str | None, features: Mapping[str, Any]) -> str | None:
    """A language of a column of translations under its full name; any other name as it is.

    Example:
        >>> full_name("en", {"translation": None, "translation.en": None}), full_name("a", {"a": None})
        ('translation.en', 'a')
    """
    whole = [other for other in features if name is not None and other.endswith(f".{name}")]
    return whole[0] if name not in features and len(whole) == 1 else name


def tokenize_pairs(
    batch: Mapping[str, Sequence[str]], *, tokenizer: Any, limit: int, target_limit: int
) -> dict[str, Any]:
    """Tokenize a batch of texts and of the texts to write for them.

    Args:
        batch: Columns "source" and "target".
        tokenizer: A Hugging Face tokenizer.
        limit: Longest source in tokens.
        target_limit: Longest target in tokens.

    Returns:
        What the tokenizer returns; "labels", the target's tokens; and "truncated", whether a source is as long as allowed.
    """
    encoding = tokenizer(list(batch["source"]), truncation=True, max_length=limit)
    labels = tokenizer(text_target=list(batch["target"]), truncation=True, max_length=target_limit)["input_ids"]
    cut = [bool(one.overflowing) for one in encoding.encodings or ()] or [
        len(ids) >= limit for ids in encoding["input_ids"]
    ]
    return {**encoding, "labels": labels, "truncated": cut}


def rouge_l(written: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L; Lin 2004, section 3.1, with beta 1), without regard to case.

    Words are runs of letters and digits, without stemming, as in Google's `rouge_score`, but of any script.

    Example:
        >>> round(rouge_l("police kill the gunman", "police killed the gunman"), 2), rouge_l("", "a")
        (0.75, 0.0)
    """
    ours, theirs = (re.findall(r"[^\W_]+", text.lower()) for text in (written, reference))
    if not ours or not theirs:
        return 0.0
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = row
        row = [0]
        for position, other in enumerate(theirs):
            row.append(before[position] + 1 if word == other else max(before[position + 1], row[position]))
    return 2 * row[-1] / (len(ours) + len(theirs))


@dataclass(frozen=True)
class WritingScores(RatioScores):
    """ROUGE-L of what a model writes.

    Attributes:
        tokenizer: The tokenizer.
        longest: Tokens that are written at most.
    """

    tokenizer: Any
    longest: int
    metric_name: str = "rougeL"
    batch: ClassVar[int] = 32

    def run(self, model: nn.Module, inputs: Mapping[str, Any], labels: Any) -> torch.Tensor:
        """What the model writes, token ids of shape (batch, up to longest)."""
        del labels
        return model.generate(**inputs, max_length=self.longest)  # type: ignore[operator]

    def parts(self, outputs: Any, labels: Any) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """ROUGE-L of each text."""
        written, references = (self._decode(np.asarray(side)) for side in (outputs, labels))
        scores = np.array([rouge_l(*pair) for pair in zip(written, references, strict=True)])
        return {self.metric_name: (scores, np.ones(len(scores)))}

    def _decode(self, ids: NDArray[np.int64]) -> list[str]:
        known = np.where(ids < 0, self.tokenizer.pad_token_id, ids)  # -100 where nothing is
        return self.tokenizer.batch_decode(known, skip_special_tokens=True)
