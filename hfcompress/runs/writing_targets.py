"""From a saved teacher and some texts to a file of what it writes to each, which recipes train on as if it were labelled data.

Source: Kim and Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hfcompress.checkpoints.io import model_class
from hfcompress.checkpoints.staging import require_writable, staged_file
from hfcompress.config import DataConfig
from hfcompress.distillation import generate_targets, load_targets
from hfcompress.runs.caching import load_teacher, processes
from hfcompress.tasks.columns import choose_column, is_string, told, with_parts
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.language import (
    COMPLETIONS,
    IGNORED,
    MESSAGES,
    PROMPTS,
    holds_messages,
    start_tokens,
    tokenize_completions,
    write_chat,
)
from hfcompress.tasks.preparation import find_task
from hfcompress.tasks.sources import Source, read_sources
from hfcompress.tasks.splits import take
from hfcompress.tasks.text import TOKENIZE_VERSION, cache_is_writable, length_limit, log_cuts, require_text, tokenize
from hfcompress.tasks.writing import SOURCES, TARGETS, full_name, tokenize_pairs

logger = logging.getLogger(__name__)

_UNCUT = 10**9  # tokens
_BATCH = 1000  # rows
_LEAST_BATCHES, _MOST_SHARDS = 4, 256
_PATIENCE = timedelta(days=30)  # processes with long texts take longer than others


@dataclass(frozen=True)
class Written:
    """What a teacher wrote.

    Attributes:
        file: Where it is, rows of JSON.
        task: The task that trains on it, a key of `TASKS`.
        columns: What the rows hold.
        rows: Number of rows.
        blank: Examples that have no row, as the teacher wrote nothing.
        unfinished: Rows whose text has no end: there were no more tokens left to write.
        tokens: Tokens that were written, their ends included.
        lengths: What a recipe sets so that nothing is cut: `max_length`, and of encoder-decoders `max_target_length`, tokens.
    """

    file: Path
    task: str
    columns: tuple[str, ...]
    rows: int
    blank: int
    unfinished: int
    tokens: int
    lengths: dict[str, int]


def write_targets(
    teacher: str,
    data: DataConfig,
    file: str | Path,
    *,
    new_tokens: int,
    beams: int = 1,
    temperature: float | None = None,
    batch: int = 8,
    device: str = "auto",
    seed: int = 42,
) -> Written | None:
    """Let a saved teacher write a text to every training example of some data, and keep examples and texts in a file.

    What is done lies in a folder beside the file, named as the file with ".parts" behind, until the file is whole; started again
    with the same arguments, only what is missing is done. Each process of a launcher does a part.

    Args:
        teacher: Folder or Hub repository of a causal or encoder-decoder language model. It runs in the precision it was saved in.
        data: Where the texts, prompts or chats are; `max_length` tokens of each are read, and `max_train` of them.
        file: Where to write.
        new_tokens: Tokens to write at most, 1 or more.
        beams: Beams that are kept; 1 is greedy.
        temperature: What logits are divided by to draw from the teacher's distribution; None takes what is likeliest.
        batch: Examples at once.
        device: Where the teacher runs; "auto" is the GPU of this process, if there is one.
        seed: Of all that is drawn.

    Returns:
        What was written; None in processes other than the first, which puts the file together.

    Raises:
        DataError: The data cannot be used, or the teacher wrote nothing.
        ValueError: The teacher writes no texts, the file is there already, or what lies beside it is of another run.
    """
    target = Path(file)
    parts = target.with_name(f"{target.name}.parts")
    rank, world_size = processes()
    if target.exists():
        raise ValueError(f"{file} is there already; give another file, or remove it")
    if _is_foreign(parts):
        raise ValueError(f"{parts} is in the way: parts of {target.name} are kept there; give another file")
    if rank == 0:
        require_writable(target)
    cls, config = model_class(teacher)
    task = task_of(cls.__name__, is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)))
    tokenizer = find_task(task).inputs.load_processor(teacher, revision=None, trust_remote_code=False)
    rows = read_examples(data, task=task, seed=seed)
    prompts = encode_examples(rows, tokenizer=tokenizer, data=data, model_config=config, new_tokens=new_tokens)
    with _meeting(world_size) as wait_for_all:
        model = load_teacher(teacher, device)
        settings = model.generation_config
        settings.eos_token_id = end_tokens(settings.eos_token_id, tokenizer, is_chat="messages" in rows.column_names)
        logger.info(
            "%s examples, at most %d tokens are written to each; parts are kept in %s",
            f"{len(rows):,}",
            new_tokens,
            parts,
        )
        generate_targets(
            model,
            prompts,
            parts,
            max_new_tokens=new_tokens,
            batch_size=batch,
            num_beams=beams,
            do_sample=temperature is not None,
            temperature=1.0 if temperature is None else temperature,
            pad_token_id=tokenizer.pad_token_id if settings.pad_token_id is None else None,
            seed=seed,
            shard_size=shard_size(len(rows), batch),
            rank=rank,
            world_size=world_size,
            progress=rank == 0,
        )
        wait_for_all()
    if rank > 0:
        return None
    with staged_file(target) as staged:
        written = put_together(
            rows, load_targets(parts), staged, tokenizer=tokenizer, ends=settings.eos_token_id, prefix=data.prefix
        )
    shutil.rmtree(parts)
    return replace(written, file=target, task=task)


def _is_foreign(parts: Path) -> bool:
    """Whether a folder holds something that was not kept by a run that was stopped."""
    names = {entry.name for entry in parts.iterdir()} if parts.is_dir() else set()
    return "settings.json" not in names and any(not name.startswith(".") for name in names)


def task_of(name: str, *, is_encoder_decoder: bool) -> str:
    """The task of a class that writes texts.

    Raises:
        ValueError: It writes none.

    Example:
        >>> task_of("T5ForConditionalGeneration", is_encoder_decoder=True), task_of("GPT2LMHeadModel", is_encoder_decoder=False)
        ('text2text-generation', 'text-generation')
    """
    task, known = (
        ("text2text-generation", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        if is_encoder_decoder
        else ("text-generation", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    if name not in known.values():
        raise ValueError(f"{name} writes no texts; give a causal language model or an encoder-decoder")
    return task


def shard_size(examples: int, batch: int) -> int:
    """Examples in a part: few, for a run that is stopped loses one, but no more parts than can be open at a time.

    It does not depend on the processes, so that their number may change when a run goes on.

    Example:
        >>> shard_size(100, 8), shard_size(1_000_000, 8)
        (32, 3912)
    """
    return batch * max(_LEAST_BATCHES, -(-examples // (_MOST_SHARDS * batch)))


# ---- what is asked ----


def read_examples(data: DataConfig, *, task: str, seed: int = 0) -> datasets.Dataset:
    r"""Read what a teacher writes to.

    Args:
        data: Where it is: of columns only `text` counts, the others are found by type and customary name.
        task: "text-generation" or "text2text-generation".
        seed: Of the choice where `max_train` asks for less than all.

    Returns:
        One column, by the name that `task` knows it by: "source" (without the prefix), "prompt", or "messages" up to what is to be
        answered.

    Raises:
        DataError: There is no such column, it cannot be told from others, an example is empty, or a prefix does not fit.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "news.csv")
        ...     _ = file.write_text("article,summary\nIt rained.,Rain\nIt snowed.,Snow\n")
        ...     read_examples(DataConfig(train=str(file)), task="text2text-generation")[0]
        {'source': 'It rained.'}
    """
    source, _ = read_sources(data, kind="text")
    is_causal = task == "text-generation"
    if is_causal and data.prefix:
        raise DataError("a prefix is for encoder-decoders; causal models read prompts as they are, so put it into them")
    column = find_source(source.rows.features, data, is_causal=is_causal)
    rows = _open(source, column, is_causal=is_causal)
    chosen = take(len(rows), limit=data.max_train, seed=seed, stream=1)
    return rows if chosen is None else rows.select(chosen)


def find_source(features: Mapping[str, Any], data: DataConfig, *, is_causal: bool) -> str:
    """The column that a teacher writes to: the one that training would read, whether or not there is one to learn.

    Raises:
        DataError: It is not there, holds something else, or cannot be told from others.

    Example:
        >>> string, data = datasets.Value("string"), DataConfig(train="a.csv")
        >>> find_source({"id": string, "question": string, "answer": string}, data, is_causal=True)
        'question'
    """
    names = told(data.text)
    if len(names) > 1:
        raise DataError("data.text: name one column")
    name = names[0] if names else None
    customary, answers = ((*PROMPTS, "text"), COMPLETIONS) if is_causal else (SOURCES, TARGETS)
    if is_causal:
        chats = [other for other, feature in features.items() if holds_messages(feature)]
        if name in chats or (name is None and chats):
            options: dict[str, Any] = {"fits": holds_messages, "wanted": "messages", "customary": MESSAGES}
            return choose_column("data.text", "messages", features, name=name, **options)
    else:
        features = with_parts(features)
        name = full_name(name, features)
    questions = {other: feature for other, feature in features.items() if other.casefold() not in answers}
    options = {"fits": is_string, "wanted": "text", "customary": customary}
    what = "prompts" if is_causal else "texts"
    return choose_column("data.text", what, features if name else questions or features, name=name, **options)


def _open(source: Source, column: str, *, is_causal: bool) -> datasets.Dataset:
    """One column, checked, by the name of what it holds."""
    top = column if column in source.rows.features else column.partition(".")[0]
    rows = source.rows.with_format(None).select_columns([top])
    if is_causal and holds_messages(rows.features[column]):
        rows = rows if column == "messages" else rows.rename_column(column, "messages")
        rows = rows.map(_without_answer, keep_in_memory=not cache_is_writable(rows), desc="reading chats")
        empty = [row for row, messages in enumerate(rows["messages"]) if not messages]
        if empty:
            raise DataError(f"{source.name}: no message to answer in {row_count(empty)}; drop the rows")
        return rows
    rows = rows.flatten().select_columns([column])
    if source.is_lines:  # a blank line is no example
        rows = rows.select([row for row, text in enumerate(rows[column]) if text and text.strip()])
        if not len(rows):
            raise DataError(f"{source.name}: holds no text")
    require_text(rows, [column], where=source.name)
    name = "prompt" if is_causal else "source"
    return rows if column == name else rows.rename_column(column, name)


def _without_answer(example: Mapping[str, Any]) -> dict[str, Any]:
    messages = list(example["messages"] or ())
    return {"messages": messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages}


def encode_examples(
    rows: datasets.Dataset, *, tokenizer: Any, data: DataConfig, model_config: Any, new_tokens: int
) -> datasets.Dataset:
    """Tokenize examples exactly as training does: with the prefix, the start tokens, or the chat template.

    Args:
        rows: What `read_examples` gave.
        tokenizer: The teacher's.
        data: The longest length counts, and the prefix.
        model_config: Configuration of the teacher; it must have room for what is written, too.
        new_tokens: Tokens that will be written at most.

    Returns:
        "input_ids" and whatever else the tokenizer gives.

    Raises:
        DataError: There is no chat template, or it does not fit the messages.
        ValueError: The teacher has no room for so many tokens.
    """
    limit, room = length_limit(tokenizer, config=data, model_config=model_config)
    if "source" in rows.column_names:
        positions = getattr(model_config, "max_position_embeddings", None)
        if positions is not None and new_tokens > positions:
            raise ValueError(f"new_tokens={new_tokens} is not allowed: the teacher writes at most {positions} tokens")
    elif room is not None:
        if new_tokens > room - 2:
            raise ValueError(
                f"new_tokens={new_tokens} is not allowed: the teacher has room for {room} tokens, its prompt included; give fewer"
            )
        limit = min(limit, room - new_tokens)
    encoded = rows.map(
        _tokenize,
        batched=True,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "limit": limit, "prefix": data.prefix},
        keep_in_memory=not cache_is_writable(rows),
        desc="tokenizing",
    )
    return log_cuts(encoded, where="examples", limit=limit)


def _tokenize(batch: Mapping[str, Sequence[Any]], *, tokenizer: Any, limit: int, prefix: str) -> dict[str, Any]:
    if "source" in batch:
        texts = [prefix + text for text in batch["source"]]
        return tokenize({"text": texts}, names=["text"], tokenizer=tokenizer, limit=limit, version=TOKENIZE_VERSION)
    # A prompt is what training would not learn, whatever the answer; of what is too long the beginning goes, as there.
    columns = _answered(batch, ["."] * len(next(iter(batch.values()))))
    whole = tokenize_completions(columns, tokenizer=tokenizer, limit=_UNCUT)
    pairs = zip(whole["input_ids"], whole["labels"], strict=True)
    prompts = [ids[: labels.count(IGNORED)] for ids, labels in pairs]
    first = [] if "messages" in batch else start_tokens(tokenizer)
    return {
        "input_ids": [ids if len(ids) <= limit else [*first, *ids[len(ids) - limit + len(first) :]] for ids in prompts],
        "truncated": [len(ids) > limit for ids in prompts],
    }


def end_tokens(known: int | Sequence[int] | None, tokenizer: Any, *, is_chat: bool) -> list[int]:
    """The tokens that end what a teacher writes: those its settings name, and those that training puts there.

    Args:
        known: What the teacher's settings say.
        tokenizer: Its tokenizer.
        is_chat: Whether it answers messages: the chat template then says what an answer ends with.
    """
    ends = [known] if isinstance(known, int) else list(known or ())
    if is_chat:
        answer = "42"
        _, completion = write_chat(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], tokenizer
        )
        closing = tokenizer(completion.partition(answer)[2], add_special_tokens=False)["input_ids"][:1]
        ends += [token for token in closing if token in tokenizer.all_special_ids]
    ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(ends))


# ---- what was written ----


def put_together(
    rows: datasets.Dataset,
    targets: datasets.Dataset,
    file: Path,
    *,
    tokenizer: Any,
    ends: Sequence[int],
    prefix: str = "",
) -> Written:
    """Write a file of examples and of what a teacher wrote to them; where it wrote nothing there is no row.

    Args:
        rows: What `read_examples` gave.
        targets: What `load_targets` gave of them.
        file: The file, JSON lines.
        tokenizer: The teacher's.
        ends: Tokens that end a text.
        prefix: What the teacher read in front of each source; it does not get into the file, as a recipe says it again.

    Raises:
        DataError: The teacher wrote nothing at all.
    """
    count, blank, unfinished, tokens = 0, 0, 0, 0
    lengths: dict[str, int] = {}
    columns = tuple(_answered(rows[:1], ["."]))
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for start in range(0, len(rows), _BATCH):
            labels = targets[start : start + _BATCH]["labels"]
            written = [[token for token in each if token != IGNORED] for each in labels]
            whole = [bool(each) and each[-1] in ends for each in written]
            texts = tokenizer.batch_decode(
                [each[:-1] if ended else each for each, ended in zip(written, whole, strict=True)],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            kept = [number for number, text in enumerate(texts) if text.strip()]
            blank += len(texts) - len(kept)
            if not kept:
                continue
            batch = _answered(rows[start : start + _BATCH], texts)
            batch = {name: [values[number] for number in kept] for name, values in batch.items()}
            for values in zip(*batch.values(), strict=True):
                lines.write(json.dumps(dict(zip(batch, values, strict=True)), ensure_ascii=False) + "\n")
            count += len(kept)
            unfinished += sum(not whole[number] for number in kept)
            tokens += sum(len(written[number]) for number in kept)
            for name, length in _lengths(batch, tokenizer, prefix).items():
                lengths[name] = max(length, lengths.get(name, 2))
    if not count:
        raise DataError("the teacher wrote nothing to any of the examples; see what it writes by hand")
    return Written(file, "", columns, count, blank, unfinished, tokens, lengths)


def _answered(batch: Mapping[str, Sequence[Any]], texts: Sequence[str]) -> dict[str, list[Any]]:
    """Examples with a text for each, in the columns that training reads."""
    name, examples = next(iter(batch.items()))
    if name == "messages":
        # With the keys of the others: readers take rows whose messages differ in theirs for something else.
        answers = [
            {**dict.fromkeys(messages[0]), "role": "assistant", "content": text}
            for messages, text in zip(examples, texts, strict=True)
        ]
        return {name: [[*messages, answer] for messages, answer in zip(examples, answers, strict=True)]}
    return {name: list(examples), "target" if name == "source" else "completion": list(texts)}


def _lengths(batch: Mapping[str, Sequence[Any]], tokenizer: Any, prefix: str) -> dict[str, int]:
    """The longest row in tokens as training reads it, by the key of a recipe that limits it."""
    if "source" in batch:
        given = {**batch, "source": [prefix + text for text in batch["source"]]}
        read = tokenize_pairs(given, tokenizer=tokenizer, limit=_UNCUT, target_limit=_UNCUT)
        return {"max_length": max(map(len, read["input_ids"])), "max_target_length": max(map(len, read["labels"]))}
    read = tokenize_completions(batch, tokenizer=tokenizer, limit=_UNCUT)
    return {"max_length": max(map(len, read["input_ids"]))}


@contextlib.contextmanager
def _meeting(world_size: int) -> Iterator[Callable[[], Any]]:
    """Where processes wait for each other, however long one of them takes."""
    if world_size == 1:
        yield lambda: None
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield torch.distributed.barrier
    finally:
        torch.distributed.destroy_process_group()
