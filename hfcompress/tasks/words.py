"""Words with a tag each (token classification): tags go to the first token of a word; whole entities are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, choose_column, holds_classes, is_list, is_string, require_distinct, told
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.scores import RatioScores
from hfcompress.tasks.sources import Source
from hfcompress.tasks.text import TokenizedInputs, length_limit, log_cuts, map_rows

WORDS = ("tokens", "words", "token", "sentence", "text")
TAGS = ("ner_tags", "ner", "tags", "labels", "label", "entities", "pos_tags", "upos", "pos")


class WordInputs(TokenizedInputs):
    """Lists of words, with a list of as many tags."""

    needs_words = True

    def find_columns(self, features: Mapping[str, Any], config: DataConfig) -> Columns:
        """The columns of words and of tags.

        Raises:
            DataError: A column is not there, has the wrong type, or cannot be told from others.

        Example:
            >>> string, tag = datasets.Value("string"), datasets.ClassLabel(names=["O", "B-PER"])
            >>> features = {"id": string, "tokens": datasets.List(string), "ner_tags": datasets.List(tag)}
            >>> WordInputs().find_columns(features, DataConfig(train="a.json"))
            Columns(label='ner_tags', inputs=('tokens',), choices=())
        """
        names = told(config.text)
        if len(names) > 1:
            raise DataError(f"data.text: words stand in one column, not in {len(names)}")
        others = {
            name: feature for name, feature in features.items() if name != config.label and name.casefold() not in TAGS
        }
        words = choose_column(
            "data.text",
            "words",
            features if names else others,
            name=names[0] if names else None,
            customary=WORDS,
            fits=_holds_words,
            wanted="lists of words",
        )
        tags = choose_column(
            "data.label",
            "tags",
            features if config.label else {name: feature for name, feature in features.items() if name != words},
            name=config.label,
            customary=TAGS,
            fits=lambda feature: is_list(feature) and holds_classes(feature.feature),
            wanted="lists of tags",
        )
        require_distinct(words, tags)
        return Columns(tags, (words,))

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check that each row has words, and as many as it has tags."""
        del config
        rows = source.rows.with_format(None)
        every, tags = rows[columns.inputs[0]], rows[str(columns.label)]
        empty = [row for row, words in enumerate(every) if not words or any(word is None for word in words)]
        if empty:
            raise DataError(
                f"{source.name}: no words in column {columns.inputs[0]} in {row_count(empty)}; drop the rows"
            )
        odd = [row for row, pair in enumerate(zip(every, tags, strict=True)) if len(pair[0]) != len(pair[1] or ())]
        if odd:
            raise DataError(f"{source.name}: not as many tags as words in {row_count(odd)}; each word needs one tag")
        return rows.select_columns([columns.inputs[0]])

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
        """Tokenize, cut at the longest length, and put the number of each tag at the first token of its word."""
        del seed
        limit, _ = length_limit(processor, config=config, model_config=model_config)
        name = next(name for name in rows.column_names if name != "labels")
        encoded = map_rows(
            rows,
            tokenize_words,
            config=config,
            where=where,
            remove_columns=[name],
            fn_kwargs={"name": name, "tokenizer": processor, "limit": limit},
        )
        return log_cuts(encoded, where=where, limit=limit)


def _holds_words(feature: Any) -> bool:
    return is_list(feature) and is_string(feature.feature)


def tokenize_words(batch: Mapping[str, Sequence[Any]], *, name: str, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Tokenize a batch of lists of words.

    Args:
        batch: A column of words, and a column "labels" with a number for each.
        name: The column of words.
        tokenizer: A fast Hugging Face tokenizer.
        limit: Longest length in tokens, special tokens included.

    Returns:
        What the tokenizer returns; "labels", the number of a word's tag at its first token and -100 at all others; and
        "truncated", whether tokens were cut off each row.
    """
    encoding = tokenizer(list(batch[name]), is_split_into_words=True, truncation=True, max_length=limit)
    labels = []
    for row, tags in enumerate(batch["labels"]):
        words = encoding.word_ids(row)
        before = [None, *words[:-1]]
        labels.append(
            [-100 if word is None or word == last else tags[word] for word, last in zip(words, before, strict=True)]
        )
    return {**encoding, "labels": labels, "truncated": [bool(one.overflowing) for one in encoding.encodings]}


def find_entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities that the tags of a sentence mark, as the CoNLL evaluation reads them.

    An entity goes on where I (or E, L) of the same kind follows B or I; anything else but O begins a new one. So IOB1, IOB2,
    IOBES and BILOU are all read, and tags that break their own scheme still mark something.

    Args:
        tags: "O", or a letter, "-" and a kind for each word.

    Returns:
        Kind, first word and the word after the last of each.

    Example:
        >>> sorted(find_entities(["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG"]))
        [('LOC', 3, 4), ('LOC', 4, 5), ('ORG', 5, 6), ('PER', 0, 2)]
    """
    found: set[tuple[str, int, int]] = set()
    letter, kind, start = "O", "", 0
    for position, tag in enumerate([*tags, "O"]):
        now, _, its = tag.partition("-")
        if now in ("I", "E", "L") and letter in ("B", "I") and its == kind:
            letter = now
            continue
        if letter != "O":
            found.add((kind, start, position))
        letter, kind, start = now, its, position
    return found


@dataclass(frozen=True)
class TagScores(RatioScores):
    """F1 of whole entities, with precision, recall and the accuracy of tags; of tags that mark no entities accuracy alone.

    Attributes:
        names: Name of each tag by its number.

    Example:
        >>> from transformers import EvalPrediction
        >>> scores = TagScores(("O", "B-PER", "I-PER"))
        >>> predicted, true = np.array([[1, 2, 0, 1]]), np.array([[1, 2, 1, -100]])
        >>> {name: round(value, 3) for name, value in scores(EvalPrediction(predicted, true)).items()}
        {'f1': 0.667, 'precision': 1.0, 'recall': 0.5, 'accuracy': 0.667}
    """

    names: tuple[str, ...]

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """F1 where tags mark entities, else accuracy."""
        return "f1" if any(name.startswith(("B-", "I-")) for name in self.names) else "accuracy"

    def reduce(self, outputs: Any, labels: Any) -> Any:
        """The likeliest tag of each token, shape (batch, length)."""
        return super().reduce(outputs, labels).argmax(-1)

    def parts(self, outputs: Any, labels: Any) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Hits, entities predicted and entities there are, of each sentence."""
        predicted = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs)
        predicted = predicted.argmax(-1) if predicted.ndim == 3 else predicted
        truth = np.asarray(labels)
        counts = np.array([self._count(*pair) for pair in zip(predicted, truth, strict=True)], dtype=np.float64)
        hits, found, there, right, words = counts.T
        share = {"accuracy": (right, words)}
        if self.metric_name == "accuracy":
            return share
        return {"f1": (2 * hits, found + there), "precision": (hits, found), "recall": (hits, there), **share}

    def _count(self, predicted: NDArray[np.int64], truth: NDArray[np.int64]) -> tuple[int, ...]:
        known = truth != -100
        ours, theirs = predicted[known], truth[known]
        found, there = (find_entities([self.names[number] for number in side]) for side in (ours, theirs))
        return len(found & there), len(found), len(there), int((ours == theirs).sum()), len(theirs)
