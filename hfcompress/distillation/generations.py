"""Sequence-level distillation: the teacher writes the targets that a student then learns as if they were labels.

Source: Kim and Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2: instead of all sequences with the teacher's
probabilities, the student learns the one that the teacher's beam search finds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import PreTrainedModel

_IGNORED = -100
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int64")),
        "attention_mask": datasets.List(datasets.Value("int8")),
        "labels": datasets.List(datasets.Value("int64")),
    }
)
_SETTINGS_FILE = "settings.json"
_FINGERPRINT_ENTRIES = 16  # of each parameter


def generate_targets(
    teacher: PreTrainedModel,
    dataset: datasets.Dataset | Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    pad_token_id: int | None = None,
    seed: int = 0,
    shard_size: int = 1024,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> datasets.Dataset:
    """Let a teacher write a target for every example, and keep them in a folder.

    Examples are taken in shards, one file each, which appear whole or not at all: a run that was stopped goes on with the
    shards that are missing, and gives what it would have given. A shard depends on nothing but its examples and the seed, so
    the number of processes may change, too. All other settings of generation are those of `teacher.generation_config`.

    Args:
        teacher: A causal or encoder-decoder language model; switched to eval mode, and back.
        dataset: Examples with `input_ids` (the prompt, or what the encoder reads) and, if these are padded, `attention_mask`.
            Labels and other columns are not looked at.
        folder: Where the shards are kept.
        max_new_tokens: Tokens to write at most, 1 or more.
        batch_size: Examples at once; those of similar length together.
        num_beams: Beams that are kept; 1 is greedy.
        do_sample: Whether to draw from the teacher's distribution instead of taking what is likeliest.
        temperature: What logits are divided by when drawing.
        pad_token_id: The padding token; None is what the teacher's settings say, or its first end token.
        seed: Of everything drawn.
        shard_size: Examples in a file.
        rank: Number of this process; it takes the shards rank, rank + world_size, ...
        world_size: Number of processes. Each needs its own call; `load_targets` then gives the rows of all.
        progress: Whether to show a progress bar.

    Returns:
        The rows of this process, in the order of the dataset: `input_ids`, `attention_mask` and `labels`, unpadded. For
        encoder-decoders labels are what was written, with its end token. For causal models input_ids are prompt and
        completion, and labels are -100 on the prompt.

    Raises:
        ValueError: The folder holds targets of other examples, another teacher or other settings, an example is empty, or a
            setting is out of range.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, bos_token_id=0, eos_token_id=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = generate_targets(
        ...         GPT2LMHeadModel(config), [{"input_ids": [5, 6, 7]}], folder, max_new_tokens=1, progress=False
        ...     )
        ...     len(rows[0]["input_ids"]), rows[0]["labels"][:3]
        (4, [-100, -100, -100])
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name}={value} is not allowed: must be 1 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not allowed: must be from 0 to {world_size - 1}")
    if do_sample and not temperature > 0:
        raise ValueError(f"temperature={temperature} is not allowed: must be above 0")
    prompts = _read_prompts(dataset)
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": do_sample}
    if do_sample:
        generation["temperature"] = temperature
    generation["pad_token_id"] = _pad_token(teacher) if pad_token_id is None else pad_token_id
    target = Path(folder)
    _settle(
        target,
        {
            **generation,
            "batch_size": batch_size,
            "seed": seed,
            "shard_size": shard_size,
            "examples": len(prompts),
            "examples_hash": _hash_prompts(prompts),
            "teacher_hash": _hash_teacher(teacher),
        },
        rank=rank,
    )
    starts = range(0, len(prompts), shard_size)
    mine = [number for number in range(len(starts)) if number % world_size == rank]
    was_training = teacher.training
    teacher.eval()
    try:
        with tqdm(total=sum(len(prompts[starts[n] :][:shard_size]) for n in mine), disable=not progress) as bar:
            bar.set_description("teacher's targets")
            for number in mine:
                shard = prompts[starts[number] : starts[number] + shard_size]
                if not _shard_file(target, number).is_file():
                    rows = _generate_shard(
                        teacher, shard, generation, batch_size, seed=_shard_seed(seed, number), bar=bar
                    )
                    _write(rows, _shard_file(target, number), rank=rank)
                else:
                    bar.update(len(shard))
    finally:
        teacher.train(was_training)
    return _read([_shard_file(target, number) for number in mine])


def load_targets(folder: str | Path) -> datasets.Dataset:
    """All rows that `generate_targets` kept in a folder, of all processes, in the order of the examples.

    Args:
        folder: The folder.

    Returns:
        A dataset that is read from the files as it is used.

    Raises:
        ValueError: There are none, or some are missing.
    """
    path = Path(folder) / _SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no targets; write them with generate_targets")
    settings = json.loads(path.read_text(encoding="utf-8"))
    count = -(-settings["examples"] // settings["shard_size"])
    files = [_shard_file(Path(folder), number) for number in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {count} files are missing ({missing[0]}, ...); call generate_targets again on every process"
        )
    return _read(files)


# ---- examples ----


def _read_prompts(dataset: datasets.Dataset | Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The token ids of every example, without padding."""
    prompts = []
    for number, example in enumerate(dataset):
        if "input_ids" not in example:
            raise ValueError(
                f"example {number} has no input_ids, it has {', '.join(map(str, example))}; tokenize it first"
            )
        ids = [int(token) for token in example["input_ids"]]
        mask = example.get("attention_mask")
        if mask is not None:
            ids = [token for token, is_real in zip(ids, mask, strict=True) if is_real]
        if not ids:
            raise ValueError(f"example {number} is empty: there is nothing to go on from")
        prompts.append(ids)
    return prompts


def _hash_prompts(prompts: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt).encode())
    return digest.hexdigest()[:16]


def _hash_teacher(teacher: PreTrainedModel) -> str:
    """Tells one teacher from another by the first entries of every parameter."""
    digest = hashlib.sha256(type(teacher).__name__.encode())
    for name, parameter in teacher.named_parameters():
        first = parameter.detach().reshape(-1)[:_FINGERPRINT_ENTRIES]
        digest.update(f"{name} {tuple(parameter.shape)} {first.float().tolist()}".encode())
    return digest.hexdigest()[:16]


def _pad_token(teacher: PreTrainedModel) -> int:
    """The padding token that a teacher's settings name, or its first end token: what is padded is masked or cut off."""
    found = teacher.generation_config.pad_token_id
    ends = _end_tokens(teacher)
    if found is None and not ends:
        raise ValueError(f"{type(teacher).__name__} names no padding token and no end token; give pad_token_id")
    return int(found) if found is not None else ends[0]


def _end_tokens(teacher: PreTrainedModel) -> list[int]:
    ends = teacher.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


# ---- files ----


def _settle(folder: Path, settings: Mapping[str, Any], *, rank: int) -> None:
    """Write down what is generated, or make sure that it is what is there already."""
    path = folder / _SETTINGS_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        _replace(path, lambda partial: partial.write_text(json.dumps(settings, indent=2), encoding="utf-8"), rank=rank)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if there.get(name) != value:
            what = {"examples_hash": "the examples", "teacher_hash": "the teacher"}.get(name, name)
            raise ValueError(
                f"{folder} holds targets with other settings: {what} was {there.get(name)} and is {value}; give another folder, or remove it"
            )


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"targets-{number:05d}.arrow"


def _write(rows: Sequence[Mapping[str, list[int]]], path: Path, *, rank: int) -> None:
    def fill(partial: Path) -> None:
        with ArrowWriter(path=str(partial), features=_FEATURES) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()

    _replace(path, fill, rank=rank)


def _replace(path: Path, fill: Callable[[Path], Any], *, rank: int) -> None:
    """Write a file so that nobody ever sees half of it; what a process that was stopped left is overwritten."""
    partial = path.with_name(f".{path.name}.{rank}")
    fill(partial)
    os.replace(partial, path)


def _read(files: Sequence[Path]) -> datasets.Dataset:
    if not files:
        return datasets.Dataset.from_dict({name: [] for name in _FEATURES}, features=_FEATURES)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


# ---- generation ----


def _shard_seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def _generate_shard(
    teacher: PreTrainedModel,
    prompts: Sequence[list[int]],
    generation: Mapping[str, Any],
    batch_size: int,
    *,
    seed: int,
    bar: Any,
) -> list[dict[str, list[int]]]:
    """Rows of one shard, in the order of its prompts."""
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    rows: dict[int, dict[str, list[int]]] = {}
    devices = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            written = _generate_batch(teacher, [prompts[number] for number in numbers], generation)
            for number, tokens in zip(numbers, written, strict=True):
                rows[number] = _row(prompts[number], tokens, is_causal=not teacher.config.is_encoder_decoder)
            bar.update(len(numbers))
    return [rows[number] for number in range(len(prompts))]


def _generate_batch(
    teacher: PreTrainedModel, prompts: Sequence[list[int]], generation: Mapping[str, Any]
) -> list[list[int]]:
    """What the teacher writes to each prompt, up to the first end token, which is kept."""
    is_causal = not teacher.config.is_encoder_decoder
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), generation["pad_token_id"], dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        # A causal model goes on from the last position, so padding has to come first.
        where = slice(longest - len(prompt), None) if is_causal else slice(len(prompt))
        ids[number, where] = torch.tensor(prompt, dtype=torch.long)
        mask[number, where] = 1
    given = {"input_ids": ids.to(teacher.device), "attention_mask": mask.to(teacher.device)}
    sequences = teacher.generate(**given, **generation)  # type: ignore[operator]
    # Decoders of encoder-decoders begin with a start token, which labels do not have.
    written = sequences[:, longest if is_causal else 1 :].tolist()
    ends = set(_end_tokens(teacher))
    return [_up_to_end(tokens, ends) for tokens in written]


def _up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """A sequence up to and with its first end token."""
    last = next((number for number, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: last + 1]


def _row(prompt: list[int], written: list[int], *, is_causal: bool) -> dict[str, list[int]]:
    ids = [*prompt, *written] if is_causal else prompt
    labels = [*[_IGNORED] * len(prompt), *written] if is_causal else written
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
