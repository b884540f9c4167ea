"""Multiple choice: a text, ways to go on, and the number of the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from transformers import DataCollatorForMultipleChoice

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import (
    Columns,
    choose_column,
    holds_classes,
    is_list,
    is_string,
    require_distinct,
    told,
)
from hfcompress.tasks.errors import DataError, unknown_name
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.sources import Source
from hfcompress.tasks.text import (
    TokenizedInputs,
    length_limit,
    log_cuts,
    map_rows,
    padding_multiple,
    require_text,
)

# A text, and what stands in front of each choice.
PAIRS = (
    ("sent1", "sent2"),
    ("ctx_a", "ctx_b"),
    ("article", "question"),
    ("passage", "question"),
    ("context", "question"),
    ("premise", "question"),
)
SINGLES = ("ctx", "context", "question", "sentence", "premise", "goal", "prompt", "startphrase", "text")
LISTS = ("choices", "endings", "options", "answers")
LABELS = ("label", "labels", "answer", "answerkey", "gold", "target", "correct")


class ChoiceInputs(TokenizedInputs):
    """One or two texts with as many choices in every row. The second text goes in front of each choice."""

    def find_columns(self, features: Mapping[str, Any], config: DataConfig) -> Columns:
        """The columns of texts, choices and labels.

        Raises:
            DataError: A column is not there, has the wrong type, or cannot be told from others.

        Example:
            >>> string = datasets.Value("string")
            >>> names = ("video-id", "sent1", "sent2", "gold-source", "ending0", "ending1")
            >>> features = {**dict.fromkeys(names, string), "label": datasets.ClassLabel(names=["0", "1"])}
            >>> ChoiceInputs().find_columns(features, DataConfig(train="a.csv"))
            Columns(label='label', inputs=('sent1', 'sent2'), choices=('ending0', 'ending1'))
        """
        choices = _find_choices(features, told(config.choices))
        rest = {name: feature for name, feature in features.items() if name not in choices}
        texts = told(config.text) or _customary_texts(rest)
        for name in texts:
            if name not in features:
                raise unknown_name("data.text", "column", name, features)
        if not texts or not all(is_string(features[name]) for name in texts):
            options: dict[str, Any] = {"fits": is_string, "wanted": "text", "customary": SINGLES}
            texts = (choose_column("data.text", "text", rest, name=texts[0] if texts else None, **options),)
        label = choose_column(
            "data.label",
            "numbers of the right choices",
            {name: feature for name, feature in features.items() if name not in (*texts, *choices)},
            name=config.label,
            customary=LABELS,
            fits=holds_classes,
            wanted="numbers or letters of choices",
        )
        require_distinct(*texts, *choices, label)
        return Columns(label, texts, choices)

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check that each row has text and as many choices; texts, a list of choices, and the number of the right one."""
        del config
        rows = source.rows.with_format(None)
        require_text(rows, columns.inputs, where=source.name)
        choices, names = _read_choices(rows, columns.choices)
        size = len(choices[0])
        odd = [row for row, each in enumerate(choices) if len(each) != size or any(text is None for text in each)]
        if odd or size < 2:
            row = odd[0] if odd else 0
            raise DataError(
                f"{source.name}: {len(choices[row])} choices in row {row:,} (counted from 0), {size} in the first; every row needs"
                " the same number, 2 or more, and none may be empty"
            )
        right = number_choices(rows[str(columns.label)], names, size=size, where=source.name)
        texts = {f"text{i}": rows[name] for i, name in enumerate(columns.inputs)}
        return datasets.Dataset.from_dict({**texts, "choices": choices, "labels": right})

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
        """Tokenize each choice with its text, cut at the longest length."""
        del seed
        limit, _ = length_limit(processor, config=config, model_config=model_config)
        encoded = map_rows(
            rows,
            tokenize_choices,
            config=config,
            where=where,
            remove_columns=[name for name in rows.column_names if name != "labels"],
            fn_kwargs={"tokenizer": processor, "limit": limit},
        )
        return log_cuts(encoded, where=where, limit=limit)

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Tensors of shape (batch, choices, length), padded to the longest choice."""
        multiple = padding_multiple(processor, config=config, model_config=model_config)
        return DataCollatorForMultipleChoice(processor, pad_to_multiple_of=multiple)


def _find_choices(features: Mapping[str, Any], given: tuple[str, ...]) -> tuple[str, ...]:
    """One column of lists, or several of text: as told, or by customary name, or numbered (ending0, ending1, ...)."""
    for name in given:
        if name not in features:
            raise unknown_name("data.choices", "column", name, features)
        if not (is_string(features[name]) if len(given) > 1 else _holds_lists(features[name])):
            wanted = "text" if len(given) > 1 else "lists of texts"
            raise DataError(f"data.choices: column {name!r} does not hold {wanted}")
    if given:
        return given
    families: dict[str, list[str]] = {}
    for name, feature in features.items():
        stem = re.fullmatch(r"(.*?[A-Za-z_])([0-9]+|[A-E])", name)
        if is_string(feature) and stem:
            families.setdefault(stem[1].casefold(), []).append(name)
    # sent1 and sent2 are texts, and not choices
    known = [found for stem, found in families.items() if stem.rstrip("_") in _STEMS and len(found) > 1]
    if len(known) == 1:
        return tuple(sorted(known[0], key=lambda name: (len(name), name)))
    options: dict[str, Any] = {"fits": _holds_lists, "customary": LISTS, "wanted": "lists of texts", "name": None}
    return (choose_column("data.choices", "choices", features, **options),)


_STEMS = frozenset(("ending", "choice", "option", "sol", "answer", "alternative", "opt", "end"))


def _holds_lists(feature: Any) -> bool:
    inner: Any = feature.get("text") if isinstance(feature, dict) else feature
    return is_list(inner) and is_string(inner.feature)


def _customary_texts(features: Mapping[str, Any]) -> tuple[str, ...]:
    by_fold = {name.casefold(): name for name in features}
    return next(((by_fold[a], by_fold[b]) for a, b in PAIRS if a in by_fold and b in by_fold), ())


def _read_choices(rows: datasets.Dataset, names: tuple[str, ...]) -> tuple[list[list[str]], list[list[str]] | None]:
    """The choices of each row, and what they are called there (A, B; 1, 2), if they are called anything."""
    if len(names) > 1:
        choices = [list(texts) for texts in zip(*(rows[name] for name in names), strict=True)]
        called = [re.sub(r".*?([0-9]+|[A-E])$", r"\1", name) for name in names]
        return choices, [called] * len(rows)
    values = list(rows[names[0]])
    if values and isinstance(values[0], dict):
        return [value["text"] for value in values], [value["label"] for value in values] if "label" in values[
            0
        ] else None
    return [value or [] for value in values], None


def number_choices(
    labels: Sequence[int | str | None], names: Sequence[Sequence[str]] | None, *, size: int, where: str
) -> list[int]:
    """The place of the right choice in each row, from 0.

    Args:
        labels: Numbers, from 0 (or from 1, if there is no 0 and the last one occurs); or what choices are called; or letters.
        names: What the choices are called in each row, if anything.
        size: How many there are.
        where: What to call the rows in a message.

    Returns:
        The places.

    Raises:
        DataError: A label is missing, or names no choice.

    Example:
        >>> number_choices(["B", "A"], None, size=2, where="train"), number_choices([1, 3, 2], None, size=3, where="train")
        ([1, 0], [0, 2, 1])
    """
    missing = [row for row, label in enumerate(labels) if label in (None, "", -1, "-1")]
    if missing:
        raise DataError(
            f"{where}: which choice is right is not said in {row_count(missing)}; evaluate on another split"
        )
    words = [str(label) for label in labels]
    from_one = "0" not in words and str(size) in words
    places = []
    for row, (label, word) in enumerate(zip(labels, words, strict=True)):
        if isinstance(label, str) and names is not None and word in names[row]:
            places.append(list(names[row]).index(word))
        else:
            places.append(int(word) - from_one if word.isdecimal() else ord(word) - ord("A") if len(word) == 1 else -1)
    odd = [row for row, place in enumerate(places) if not 0 <= place < size]
    if odd:
        raise DataError(f"{where}: label {words[odd[0]]!r} names none of the {size} choices in {row_count(odd)}")
    return places


def tokenize_choices(batch: Mapping[str, Sequence[Any]], *, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Tokenize a batch of texts with their choices.

    Args:
        batch: Columns "text0" and "choices", and "text1" for what goes in front of each choice.
        tokenizer: A Hugging Face tokenizer.
        limit: Longest length in tokens, special tokens included.

    Returns:
        What the tokenizer returns, in lists of one list per choice, and "truncated": whether a choice or its text was cut.
    """
    fronts = batch.get("text1", [""] * len(batch["text0"]))
    firsts = [text for text, each in zip(batch["text0"], batch["choices"], strict=True) for _ in each]
    seconds = [
        f"{front} {choice}".strip() for front, each in zip(fronts, batch["choices"], strict=True) for choice in each
    ]
    encoding = tokenizer(firsts, seconds, truncation=True, max_length=limit)
    size = len(batch["choices"][0])
    cut = [bool(one.overflowing) for one in encoding.encodings or ()] or [
        len(ids) > limit for ids in encoding["input_ids"]
    ]
    flat = {**encoding, "truncated": cut}
    nested = {name: [values[i : i + size] for i in range(0, len(values), size)] for name, values in flat.items()}
    return {**nested, "truncated": [any(each) for each in nested["truncated"]]}
