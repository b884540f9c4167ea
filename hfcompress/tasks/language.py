"""Language modelling: text whose masked tokens are to be found, or whose next tokens are."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import jinja2
import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, choose_column, is_list, is_string, text_columns, told
from hfcompress.tasks.errors import DataError, first_line
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.sources import Source
from hfcompress.tasks.text import (
    TextInputs,
    TokenizedInputs,
    length_limit,
    log_cuts,
    map_rows,
    padding_multiple,
    require_text,
)

logger = logging.getLogger(__name__)

PROMPTS = ("prompt", "instruction", "question", "input", "query")
COMPLETIONS = ("completion", "response", "answer", "output", "chosen")
MESSAGES = ("messages", "conversations", "conversation", "chat")
IGNORED = -100


class UnlabelledInputs(TextInputs):
    """Single texts or pairs, and nothing that is said about them."""

    def find_columns(self, features: Mapping[str, Any], config: DataConfig) -> Columns:
        """The columns of text.

        Raises:
            DataError: A column is not there, holds something else, or cannot be told from others.
        """
        return Columns(None, text_columns(features, told(config.text)))

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Take the rows that have text, and say how many others there are."""
        texts = zip(*(source.rows[name] for name in columns.inputs), strict=True)
        kept = [row for row, each in enumerate(texts) if any(text and text.strip() for text in each)]
        if not kept:
            raise DataError(f"{source.name}: holds no text in column {' or '.join(columns.inputs)}")
        if len(kept) < len(source.rows):
            logger.info("%s: %s rows without text are left out", source.name, f"{len(source.rows) - len(kept):,}")
        return super().open(replace(source, rows=source.rows.select(kept)), columns, config=config)


class MaskedInputs(UnlabelledInputs):
    """Texts some of whose tokens are masked: in training other ones in each epoch, in evaluation always the same."""

    def load_processor(self, model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
        """Load the tokenizer, which must have a token for what is masked."""
        tokenizer = super().load_processor(model_name, revision=revision, trust_remote_code=trust_remote_code)
        if tokenizer.mask_token is None:
            raise DataError(f"{model_name}: its tokenizer has no mask token; use a model made for fill-mask")
        return tokenizer

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
        """Tokenize; mask what is evaluated on, and what is trained on if masks are to be fixed."""
        options: dict[str, Any] = {"processor": processor, "config": config, "model_config": model_config}
        encoded = super().encode(rows, where=where, **options)
        if where != "eval" and not config.fixed_masks:
            return encoded
        return map_rows(
            encoded,
            mask_tokens,
            config=config,
            where=where,
            doing="masking",
            batched=False,
            fn_kwargs={"tokenizer": processor, "seed": seed},
        )

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Mask what is not masked yet, and pad each batch to its longest text."""
        return MaskingCollator(processor, padding_multiple(processor, config=config, model_config=model_config))


@dataclass(frozen=True)
class MaskingCollator:
    """Masks 15 % of the tokens at random, as BERT was trained (Devlin et al. 2019, section 3.1), where none are masked yet.

    Attributes:
        tokenizer: A Hugging Face tokenizer with a mask token.
        multiple: What padded lengths are a multiple of, or None.
    """

    tokenizer: Any
    multiple: int | None = None

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """A batch with "labels": the token where one was masked, -100 elsewhere."""
        collator = DataCollatorForTokenClassification if "labels" in features[0] else DataCollatorForLanguageModeling
        return collator(self.tokenizer, pad_to_multiple_of=self.multiple)(features)


def mask_tokens(example: Mapping[str, Any], *, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Mask an encoded text; which tokens follows from the text and the seed alone.

    Args:
        example: With "input_ids".
        tokenizer: A Hugging Face tokenizer with a mask token.
        seed: In [0, 2^32).

    Returns:
        "input_ids" with masks, and "labels": what was there, -100 elsewhere.
    """
    ids = torch.tensor([example["input_ids"]])
    masking = DataCollatorForLanguageModeling(tokenizer)
    masking.generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), seed))
    masked, labels = masking.torch_mask_tokens(ids)
    return {"input_ids": masked[0].tolist(), "labels": labels[0].tolist()}


class LanguageInputs(TokenizedInputs):
    """Text to go on with: one long text, prompts with their completions, or chats whose last message is learned."""

    def find_columns(self, features: Mapping[str, Any], config: DataConfig) -> Columns:
        """The column of text; or of prompts, and of completions as label; or of messages.

        Raises:
            DataError: A column is not there, holds something else, or cannot be told from others.

        Example:
            >>> string = datasets.Value("string")
            >>> inputs, config = LanguageInputs(), DataConfig(train="a.json")
            >>> inputs.find_columns({"prompt": string, "completion": string}, config)
            Columns(label='completion', inputs=('prompt',), choices=())
            >>> inputs.find_columns({"id": string, "messages": datasets.List({"role": string, "content": string})}, config)
            Columns(label=None, inputs=('messages',), choices=())
        """
        texts = told(config.text)
        if len(texts) > 1:
            raise DataError("data.text: name one column; completions stand in data.label")
        name, label = (texts[0] if texts else None), config.label
        chats = [other for other, feature in features.items() if holds_messages(feature)]
        if name in chats or (name is None and label is None and chats):
            options: dict[str, Any] = {"fits": holds_messages, "wanted": "messages", "customary": MESSAGES}
            return Columns(None, (choose_column("data.text", "messages", features, name=name, **options),))
        folded = {other.casefold() for other in features}
        if label is None and (
            name is not None or "text" in folded or not (folded & {*PROMPTS} and folded & {*COMPLETIONS})
        ):
            return Columns(None, text_columns(features, texts)[:1])
        options = {"fits": is_string, "wanted": "text"}
        prompt = choose_column("data.text", "prompts", features, name=name, customary=PROMPTS, **options)
        rest = {other: feature for other, feature in features.items() if other != prompt}
        return Columns(
            choose_column("data.label", "completions", rest, name=label, customary=COMPLETIONS, **options), (prompt,)
        )

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Columns "prompt" and "completion", or "messages", or of a long text "lines" (as of a file) or "text" (documents).

        Of a long text any part may be blank, but not all. Rows of a table are taken for lines where most end with a line break.
        """
        del config
        rows = source.rows.with_format(None).select_columns(list(columns.all))
        name = columns.inputs[0]
        if columns.label is not None:
            require_text(rows, [name, columns.label], where=source.name)
            names = {name: "prompt", columns.label: "completion"}
            return rows.rename_columns({old: new for old, new in names.items() if old != new})
        if holds_messages(rows.features[name]):
            short = [row for row, messages in enumerate(rows[name]) if len(messages or ()) < 2]
            if short:
                raise DataError(f"{source.name}: less than two messages in {row_count(short)}; drop the rows")
            return rows if name == "messages" else rows.rename_column(name, "messages")
        texts = [text or "" for text in rows[name]]
        written = [text for text in texts if text.strip()]
        if not written:
            raise DataError(f"{source.name}: holds no text in column {name}")
        lines = source.is_lines or sum(text.endswith("\n") for text in written) > len(written) / 2
        return datasets.Dataset.from_dict(
            {"lines": [text.removesuffix("\n") for text in texts]} if lines else {"text": texts}
        )

    def is_one_text(self, rows: datasets.Dataset) -> bool:
        """Whether rows are parts of one long text, and neither prompts nor chats."""
        return rows.column_names[0] in ("text", "lines")

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
        """Cut a long text into blocks of the longest length; of prompts and chats learn only the completion."""
        del seed
        limit, _ = length_limit(processor, config=config, model_config=model_config)
        together = self.is_one_text(rows)
        encoded = map_rows(
            rows,
            tokenize_parts if together else tokenize_completions,
            config=config,
            where=where,
            remove_columns=rows.column_names,
            fn_kwargs={"tokenizer": processor} | ({} if together else {"limit": limit}),
        )
        if not together:
            return log_cuts(encoded, where=where, limit=limit)
        blocks = cut_blocks(encoded["input_ids"], length=limit, start=start_tokens(processor))
        if not len(blocks):
            raise DataError(
                f"{where}: the text is shorter than a block of {limit} tokens; give more or set data.max_length"
            )
        logger.info("%s: %s blocks of %d tokens", where, f"{len(blocks):,}", limit)
        return datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def holds_messages(feature: Any) -> bool:
    """Whether a column holds chats: lists of messages, each with a role and its content.

    Example:
        >>> string = datasets.Value("string")
        >>> holds_messages(datasets.List({"role": string, "content": string})), holds_messages(datasets.List(string))
        (True, False)
    """
    return is_list(feature) and isinstance(feature.feature, dict) and {"role", "content"} <= set(feature.feature)


def start_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts in front of every text: the begin-of-text token, or nothing."""
    with_marks, without = (tokenizer("a", add_special_tokens=marks)["input_ids"] for marks in (True, False))
    return list(with_marks[:1]) if with_marks[:1] != without[:1] else []


def tokenize_parts(batch: Mapping[str, Sequence[str]], *, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Tokenize parts of one long text.

    Args:
        batch: Column "lines", which are put together with line breaks between them, or "text", documents that end
            with the end-of-text token each.
        tokenizer: A Hugging Face tokenizer.

    Returns:
        "input_ids": of all lines together, or of each document; without any start token.
    """
    options = {"add_special_tokens": False, "verbose": False}
    if "lines" in batch:
        return {"input_ids": [tokenizer("".join(f"{line}\n" for line in batch["lines"]), **options)["input_ids"]]}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {
        "input_ids": [ids + end for ids in tokenizer([*batch["text"]], **options)["input_ids"]] if batch["text"] else []
    }


def cut_blocks(parts: Sequence[Sequence[int]], *, length: int, start: Sequence[int] = ()) -> np.ndarray:
    """Put tokens one after the other and cut them into blocks; what is left over at the end is dropped.

    Args:
        parts: Token ids.
        length: Tokens in a block.
        start: Tokens that every block begins with.

    Returns:
        Shape (blocks, length), int64.

    Example:
        >>> cut_blocks([[1, 2, 3], [4], [5, 6, 7]], length=4, start=[9]).tolist()
        [[9, 1, 2, 3], [9, 4, 5, 6]]
    """
    ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    width = length - len(start)
    blocks = ids[: len(ids) // width * width].reshape(-1, width)
    return np.hstack([np.tile(np.asarray(start, dtype=np.int64), (len(blocks), 1)), blocks])


def tokenize_completions(batch: Mapping[str, Sequence[Any]], *, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Tokenize prompts and completions one after the other; of what is too long the beginning of the prompt goes first.

    Args:
        batch: Columns "prompt" and "completion", or "messages", whose last is the completion.
        tokenizer: A Hugging Face tokenizer, for messages with a chat template.
        limit: Longest length in tokens.

    Returns:
        "input_ids"; "labels", -100 on the prompt; and "truncated".

    Raises:
        DataError: There is no chat template, or it writes a chat otherwise when it goes on.
    """
    chats = "messages" in batch
    pairs = (
        [write_chat(each, tokenizer) for each in batch["messages"]]
        if chats
        else zip(batch["prompt"], batch["completion"], strict=True)
    )
    end = [] if chats or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    first = [] if chats else start_tokens(tokenizer)
    encoded: dict[str, list[Any]] = {"input_ids": [], "labels": [], "truncated": []}
    for texts in pairs:
        prompt, completion = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        completion = [*completion, *end][: limit - len(first)]
        room = limit - len(first) - len(completion)
        kept = [*first, *prompt[max(0, len(prompt) - room) :]]
        encoded["input_ids"].append([*kept, *completion])
        encoded["labels"].append([IGNORED] * len(kept) + completion)
        encoded["truncated"].append(len(prompt) > room)
    return encoded


def write_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[str, str]:
    """A chat as the template writes it: up to where the last message begins, and the rest with what ends it.

    Raises:
        DataError: There is no chat template, it refuses the messages, or it writes a chat otherwise when it goes on.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "data.text: the tokenizer has no chat template to write messages with; use a model made for chats"
        )
    try:
        prompt = tokenizer.apply_chat_template(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except jinja2.TemplateError as error:
        raise DataError(f"data.text: the chat template refuses messages: {first_line(error)}") from error
    if not whole.startswith(prompt):
        raise DataError(
            "data.text: the chat template writes a chat otherwise when another message follows; use prompts"
        )
    return prompt, whole[len(prompt) :]
