"""Texts, single or in pairs: checked, tokenized, padded per batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, DataCollatorForTokenClassification, DataCollatorWithPadding

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns
from hfcompress.tasks.errors import DataError, loading
from hfcompress.tasks.inputs import Inputs
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.sources import Source

logger = logging.getLogger(__name__)

PAD_TO = 8  # Tensor cores and vector units are fastest with lengths that are multiples of 8.
# Part of the cache key of tokenized data; raise it whenever tokenize() writes something else.
TOKENIZE_VERSION = 1


class TokenizedInputs(Inputs):
    """Inputs for a model that takes `input_ids`.

    Attributes:
        needs_words: Whether the tokenizer must be able to say which token belongs to which word or character.
    """

    needs_words = False

    def load_processor(self, model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
        """Load the tokenizer; one without a padding token (GPT-2, Llama) pads with its end-of-text token."""
        tokenizer = _load_tokenizer(model_name, revision=revision, trust_remote_code=trust_remote_code)
        if not self.needs_words:
            return tokenizer
        if not tokenizer.is_fast:
            raise DataError(f"{model_name}: its tokenizer cannot say where in the text its tokens are; use a fast one")
        if getattr(tokenizer, "add_prefix_space", None) is False:  # such tokenizers refuse words otherwise
            options = {"revision": revision, "trust_remote_code": trust_remote_code, "add_prefix_space": True}
            tokenizer = _load_tokenizer(model_name, **options)
        return tokenizer

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Pad each batch to its longest text; labels per token with -100."""
        multiple = padding_multiple(processor, config=config, model_config=model_config)
        return DataCollatorForTokenClassification(processor, pad_to_multiple_of=multiple)

    def longest(self, processor: Any, *, config: DataConfig, model_config: Any) -> int | None:
        """The longest text in tokens."""
        return length_limit(processor, config=config, model_config=model_config)[0]

    def model_kwargs(self, processor: Any, model_config: Any) -> dict[str, Any]:
        """The padding token of a model that does not know one: it finds the last token of a text by it."""
        return {} if model_config.pad_token_id is not None else {"pad_token_id": processor.pad_token_id}


def open_tokenizer(model_name: str | Path, **options: Any) -> Any:
    """The tokenizer of a model as it was saved.

    Raises:
        DataError: There is none, or it is damaged.
    """
    with loading(f"{model_name}: its tokenizer"):
        return AutoTokenizer.from_pretrained(model_name, **options)


def _load_tokenizer(model_name: str, **options: Any) -> Any:
    tokenizer = open_tokenizer(model_name, **options)
    # Where there are no tokenizer files, transformers quietly makes one that knows only the special tokens (and
    # for SentencePiece models a blank): every word would become "unknown".
    if len(tokenizer) - len(set(tokenizer.all_special_tokens)) <= 2:
        raise DataError(f"{model_name}: has no tokenizer: it knows no words; save one beside the model")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(f"{model_name}: its tokenizer has neither a padding nor an end-of-text token; add one")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s has no padding token; padding with %s", model_name, tokenizer.eos_token)
    return tokenizer


class TextInputs(TokenizedInputs):
    """Single texts, or pairs."""

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check that each row has text. Of a pair one may be blank, but neither may be missing."""
        del config
        rows = source.rows.with_format(None).select_columns(list(columns.inputs))
        require_text(rows, columns.inputs, where=source.name)
        return rows

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
        """Tokenize without padding, cut at the longest length, and log once how many texts were cut."""
        del seed
        names = [name for name in rows.column_names if name != "labels"]
        limit, _ = length_limit(processor, config=config, model_config=model_config)
        encoded = map_rows(
            rows,
            tokenize,
            config=config,
            where=where,
            remove_columns=names,
            fn_kwargs={"names": names, "tokenizer": processor, "limit": limit, "version": TOKENIZE_VERSION},
        )
        return log_cuts(encoded, where=where, limit=limit)

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Pad each batch to its longest text, rounded up to a multiple of 8 where the model has room for it."""
        multiple = padding_multiple(processor, config=config, model_config=model_config)
        return DataCollatorWithPadding(processor, pad_to_multiple_of=multiple)

    def contents(self, rows: datasets.Dataset) -> Iterator[bytes]:
        """The texts in UTF-8; those of a pair each with their length in front, so that they cannot run together."""
        names = [name for name in rows.column_names if name != "labels"]
        for batch in rows.select_columns(names).iter(batch_size=10_000):
            for texts in zip(*(batch[name] for name in names), strict=True):
                encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
                yield b"".join(len(text).to_bytes(8, "little") + text for text in encoded)


def require_text(rows: datasets.Dataset, names: Sequence[str], *, where: str) -> None:
    """Check that each row has text in one of some columns, and a text, if an empty one, in all of them.

    Raises:
        DataError: One line that says in how many rows there is none.
    """
    missing: list[int] = []
    start = 0
    for batch in rows.select_columns(list(names)).iter(batch_size=10_000):
        for offset, texts in enumerate(zip(*(batch[name] for name in names), strict=True)):
            if any(text is None for text in texts) or not any(text.strip() for text in texts):
                missing.append(start + offset)
        start += len(batch[names[0]])
    if missing:
        raise DataError(
            f"{where}: no text in column {' or '.join(names)} in {row_count(missing)}; drop the rows or fill them in"
        )


def log_cuts(encoded: datasets.Dataset, *, where: str, limit: int) -> datasets.Dataset:
    """Say how many rows were cut, and take away the column "truncated" that says which."""
    cut = sum(encoded["truncated"])
    logger.info(
        "%s: %s of %s texts (%.1f %%) are longer than %d tokens and are cut there",
        where,
        f"{cut:,}",
        f"{len(encoded):,}",
        100 * cut / len(encoded),
        limit,
    )
    return encoded.remove_columns("truncated")


def tokenize(
    batch: dict[str, Sequence[str]], *, names: Sequence[str], tokenizer: Any, limit: int, version: int
) -> dict[str, Any]:
    """Tokenize a batch of texts or of pairs of texts.

    Args:
        batch: Columns of text.
        names: The one or two columns to read.
        tokenizer: A Hugging Face tokenizer.
        limit: Longest length in tokens, special tokens included.
        version: Only there to be part of the cache key.

    Returns:
        What the tokenizer returns, and "truncated": whether tokens were cut off each row.
    """
    del version
    encoding = tokenizer(*(list(batch[name]) for name in names), truncation=True, max_length=limit)
    if encoding.encodings is not None:
        truncated = [bool(one.overflowing) for one in encoding.encodings]
    else:  # a tokenizer written in Python does not keep what it cuts off: count again what is as long as allowed
        truncated = [len(ids) >= limit for ids in encoding["input_ids"]]
        for row in [row for row, full in enumerate(truncated) if full]:
            whole = tokenizer(*(batch[name][row] for name in names), truncation=False, verbose=False)
            truncated[row] = len(whole["input_ids"]) > limit
    return {**encoding, "truncated": truncated}


def length_limit(processor: Any, *, config: DataConfig, model_config: Any) -> tuple[int, int | None]:
    """The longest text in tokens, and the longest the model has room for.

    Args:
        processor: The tokenizer.
        config: The `data` section of a recipe; its `max_length` counts where the model has room for it.
        model_config: Configuration of the model.

    Returns:
        The limit, and the model's room or None if it knows none.

    Example:
        >>> from types import SimpleNamespace
        >>> tokenizer, model = SimpleNamespace(model_max_length=512), SimpleNamespace(max_position_embeddings=64)
        >>> length_limit(tokenizer, config=DataConfig(train="a.csv"), model_config=model)
        (64, 64)
    """
    known = [
        int(room)
        for room in (processor.model_max_length, getattr(model_config, "max_position_embeddings", None))
        if room is not None and 0 < room < 10**9  # tokenizers that know no limit say 10**30
    ]
    room = min(known) if known else None
    return (config.max_length, None) if room is None else (min(config.max_length, room), room)


def padding_multiple(processor: Any, *, config: DataConfig, model_config: Any) -> int | None:
    """What padded lengths are a multiple of: 8, or None where the model has no room for that."""
    limit, room = length_limit(processor, config=config, model_config=model_config)
    return PAD_TO if room is None or -(-limit // PAD_TO) * PAD_TO <= room else None


def map_rows(
    rows: datasets.Dataset,
    function: Callable[..., Any],
    *,
    config: DataConfig,
    where: str,
    doing: str = "tokenizing",
    batched: bool = True,
    **options: Any,
) -> datasets.Dataset:
    """Rows that a function was applied to, by as many workers as the recipe says; kept on disk if that can be.

    Args:
        rows: The rows.
        function: As `datasets.Dataset.map` takes it.
        config: The section `data`.
        where: "train" or "eval", for the progress bar.
        doing: What is done, for the progress bar.
        batched: Whether the function takes many rows at once.
        **options: As of `datasets.Dataset.map`.

    Example:
        >>> rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
        >>> double = lambda batch: {"text": [2 * text for text in batch["text"]]}
        >>> map_rows(rows, double, config=DataConfig(train="a.csv"), where="train")["text"][:]
        ['aa', 'bb']
    """
    return rows.map(
        function,
        batched=batched,
        num_proc=config.workers if config.workers > 1 else None,
        keep_in_memory=not cache_is_writable(rows),
        desc=f"{doing} {where}",
        **options,
    )


def cache_is_writable(rows: datasets.Dataset) -> bool:
    """Whether results may be cached beside the data (which save_to_disk may have put into a read-only folder)."""
    return all(os.access(Path(file["filename"]).parent, os.W_OK) for file in rows.cache_files)
