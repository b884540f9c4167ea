"""Writing a teacher cache: the teacher runs once over a data set, shard by shard.

Each shard is a file that is there as a whole or not at all, so the work may be stopped at any time and goes on where it was, and several
processes each write shards of their own without talking to each other.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hfcompress.distillation.cache_asking import Asking, dtype_of, hash_of, shape_of, weights_of
from hfcompress.distillation.cache_format import (
    HEAD_FILE,
    KEYS,
    MANIFEST_FILE,
    ArraySpec,
    CacheContents,
    Manifest,
    put_in_place,
    read_manifest,
    read_shard,
    write_whole,
)
from hfcompress.distillation.cache_keys import KEY_BYTES, CacheError, Layout, fingerprint, row_mask
from hfcompress.distillation.teachers import Teacher, name_of, own_inputs
from hfcompress.measurement import provenance

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256_000_000
_SHARD_EXAMPLES = 4096


def write_cache(
    teacher: Teacher,
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    folder: str | os.PathLike[str],
    contents: CacheContents,
    *,
    batch_size: int = 32,
    shard_examples: int | None = None,
    ignored: Collection[str] = (),
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Manifest:
    """Ask a teacher about every example of a data set and keep what it says.

    The data are read twice: once for what identifies each example, and once for the teacher, long examples with long ones. An example that
    occurs several times is kept once. Started again with the same arguments, only what is missing is done.

    Args:
        teacher: The teacher, on its device.
        dataset: Examples by number; has a length.
        collate: Makes a batch of a list of examples, as in training. It must not change them at random.
        folder: Where to write; new, empty, or holding a part of the same cache.
        contents: What is kept.
        batch_size: Examples the teacher is asked about at once.
        shard_examples: Examples in a file; by default at most 4,096, and at most 256 MB.
        ignored: Names of tensors in a batch that do not matter to the teacher and may differ in training, besides its labels.
        seed: Of draws.
        workers: Processes that read the data; 0 reads in this one.
        rank: Number of this process: of `world_size` shards in a row it writes the `rank`-th.
        world_size: Processes that write at the same time. Wait for all before reading.
        progress: Show progress bars.

    Returns:
        The manifest; `complete` is False while shards of other processes are missing.

    Raises:
        CacheError: The folder holds something else; there is not enough room; the data change from one reading to the next; or the
            teacher does not give what is to be kept.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise CacheError("the data set has no length or is empty; give one whose examples can be read by number")
    if not 0 <= rank < world_size:
        raise CacheError(f"rank {rank} is not one of {world_size} processes (counted from 0)")
    path = Path(folder)
    asking = Asking(teacher, contents, frozenset({*ignored, *teacher.withheld} - {"labels"}), seed)
    reading = _Reading(dataset, collate, workers)
    arrays = asking.begin(own_inputs(collate([dataset[0]])))
    survey = _look_at(reading, asking, batch_size, progress=progress and rank == 0)
    counts: dict[Layout, int] = {"examples": len(survey.first)}
    counts |= {layout: int(lengths[survey.first].sum()) for layout, lengths in survey.lengths.items()}
    size_bytes = estimate_size(arrays, counts)
    size = max(1, min(_SHARD_EXAMPLES, _SHARD_BYTES * counts["examples"] // max(size_bytes, 1)))
    layers, width = shape_of(teacher.models)
    manifest = Manifest(
        teacher=" + ".join(name_of(model) for model in teacher.models),
        teacher_sha256=hash_of(teacher.models),
        teacher_dtype=dtype_of(teacher.models),
        contents=contents,
        seed=seed,
        data_fingerprint=fingerprint(survey.keys),
        inputs=asking.inputs,
        ignored=tuple(sorted(asking.ignored)),
        reads_labels=asking.reads_labels,
        examples=counts["examples"],
        tokens=counts["tokens"],
        shard_examples=size if shard_examples is None else shard_examples,
        arrays=arrays,
        layers=layers,
        width=width,
        versions=provenance(seed=seed)["versions"],
    )
    manifest = _claim(path, manifest, keep_size=shard_examples is None)
    missing = [number for number in range(manifest.shards) if not _is_there(path, manifest, number)]
    head = save(weights_of(teacher.model.get_output_embeddings())) if contents.logits == "last_hidden" else b""  # type: ignore[operator]
    if missing:
        _say_size(path, counts, size_bytes + len(head), missing=len(missing) / manifest.shards)
    if head and not (path / HEAD_FILE).is_file():
        write_whole(path / HEAD_FILE, head)
    mine = [number for number in missing if number % world_size == rank]
    total = sum(manifest.shard_size(number) for number in mine)
    with tqdm(total=total, desc="asking the teacher", unit="ex", disable=not progress or rank > 0) as bar:
        for number in mine:
            first = survey.first[number * manifest.shard_examples :][: manifest.shard_examples]
            asking.start(number)
            tensors = _ask_about(first, survey, reading, asking, batch_size=batch_size, bar=bar)
            _write_shard(path / manifest.shard_name(number), tensors)
    return _finish(path, manifest)


def estimate_size(arrays: Mapping[str, ArraySpec], counts: Mapping[Layout, int]) -> int:
    """Size of a cache in bytes, without the few kilobytes of headers.

    Args:
        arrays: What is kept.
        counts: Number of "examples", and of "tokens" and "labels" where something is kept for each.

    Example:
        >>> arrays = {"top_indices": ArraySpec("uint16", (64,), "tokens"), "top_log_probs": ArraySpec("float16", (64,), "tokens")}
        >>> estimate_size(arrays, {"examples": 10, "tokens": 1000})  # 256 bytes a token, and keys and offsets
        256240
    """
    layouts = {spec.layout for spec in arrays.values()} - {"examples"}
    kept = sum(spec.row_bytes * counts[spec.layout] for spec in arrays.values())
    return kept + counts["examples"] * (KEY_BYTES + 8 * len(layouts))


# ---- the data ----


@dataclass(frozen=True)
class _Reading:
    """A data set that is read in batches of chosen examples."""

    dataset: Any
    collate: Callable[[list[Any]], Mapping[str, Any]]
    workers: int

    def batches(self, groups: Sequence[Sequence[int]]) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch_sampler=groups,  # type: ignore[arg-type]
            collate_fn=self.collate,
            num_workers=self.workers,
        )


@dataclass(frozen=True)
class _Survey:
    """What is known of the data before the teacher runs.

    Attributes:
        keys: Of all examples in order.
        first: Numbers of the examples that did not occur before.
        lengths: Tokens and labels of each example.
    """

    keys: np.ndarray
    first: np.ndarray
    lengths: dict[Layout, np.ndarray]


def _look_at(reading: _Reading, asking: Asking, batch_size: int, *, progress: bool) -> _Survey:
    keys, lengths = [], defaultdict(list)
    n = len(reading.dataset)
    groups = [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]
    bar = tqdm(reading.batches(groups), desc="reading the data", leave=False, delay=2, disable=not progress)
    for group, whole in zip(groups, bar, strict=True):
        batch = own_inputs(whole)
        keys.append(asking.keys(batch))
        if len(keys[-1]) != len(group):
            raise CacheError(
                f"the collator made {len(keys[-1])} rows of {len(group)} examples; the cache needs one row per example"
            )
        for layout in asking.layouts:
            mask = row_mask(batch, layout)
            lengths[layout].append(np.zeros(len(group), int) if mask is None else mask.flatten(1).sum(1).numpy())
    every = np.concatenate(keys)
    return _Survey(
        every,
        np.sort(np.unique(every, return_index=True)[1]),
        {layout: np.concatenate(counts) for layout, counts in lengths.items()},
    )


# ---- the folder ----


def _claim(folder: Path, manifest: Manifest, *, keep_size: bool) -> Manifest:
    """Make the folder hold this manifest, or take the one that is there if it is of the same cache."""
    if not (folder / MANIFEST_FILE).is_file():
        others = [entry.name for entry in folder.iterdir() if entry.name[0] != "."] if folder.is_dir() else []
        if folder.exists() and (not folder.is_dir() or others):
            raise CacheError(f"{folder} is not empty and holds no teacher cache; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder, manifest)
        return manifest
    there = read_manifest(folder)
    if (difference := there.difference(manifest)) is not None:
        raise CacheError(f"{folder} holds a cache of {difference}; give another folder, or delete this one")
    if not keep_size and there.shard_examples != manifest.shard_examples:
        raise CacheError(
            f"{folder} has shards of {there.shard_examples:,} examples, not {manifest.shard_examples:,}; leave out shard_examples"
        )
    return there


def _save(folder: Path, manifest: Manifest) -> None:
    write_whole(folder / MANIFEST_FILE, f"{manifest.model_dump_json(indent=2)}\n".encode())


def _is_there(folder: Path, manifest: Manifest, number: int) -> bool:
    if not (folder / manifest.shard_name(number)).is_file():
        return False
    try:
        read_shard(folder, manifest, number)
    except CacheError as error:
        logger.warning("%s; writing it again", str(error).partition(";")[0])
        return False
    return True


def _say_size(folder: Path, counts: Mapping[Layout, int], size_bytes: int, *, missing: float) -> None:
    """Say how much will be written, and refuse what does not fit."""
    free = shutil.disk_usage(folder).free
    size, room = in_bytes(size_bytes), in_bytes(free)
    if size_bytes * missing > free:
        raise CacheError(f"the cache takes about {size}, but only {room} are free in {folder}; keep less, or elsewhere")
    tokens = f", {counts['tokens']:,} tokens" if counts["tokens"] else ""
    logger.info("%s examples%s: about %s in %s; %s free", f"{counts['examples']:,}", tokens, size, folder, room)


def in_bytes(number: int) -> str:
    """A size in words.

    Example:
        >>> in_bytes(84_300_000), in_bytes(12_000_000_000), in_bytes(900)
        ('84.3 MB', '12.0 GB', '0.9 kB')
    """
    return next(
        f"{number / unit:.1f} {name}"
        for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        if number >= unit or unit == 1e3
    )


def _ask_about(
    examples: np.ndarray, survey: _Survey, reading: _Reading, asking: Asking, *, batch_size: int, bar: Any
) -> dict[str, torch.Tensor]:
    """The tensors of a shard: what the teacher says of some examples, long ones with long ones."""
    order = examples[np.argsort(sum(lengths[examples] for lengths in survey.lengths.values()), kind="stable")]
    groups = [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    counts: dict[Layout, list[torch.Tensor]] = defaultdict(list)
    for group, whole in zip(groups, reading.batches(groups), strict=True):
        batch = own_inputs(whole)
        changed = asking.keys(batch) != survey.keys[group]
        if changed.any():
            raise CacheError(
                f"{int(changed.sum())} of {len(group)} examples changed since they were read before: the collator or data set changes inputs at "
                "random (masking, augmentation), which a cache cannot follow; leave that out, or ask the teacher in training"
            )
        said = asking.ask(batch)
        for name, (_, values, _) in said.items():
            rows[name].append(values)
        for layout, lengths in {layout: lengths for layout, _, lengths in said.values() if lengths is not None}.items():
            counts[layout].append(lengths)
        bar.update(len(group))
    keys = np.frombuffer(survey.keys[order].tobytes(), dtype=np.uint8).reshape(-1, KEY_BYTES).copy()
    tensors = {KEYS: torch.from_numpy(keys)} | {name: torch.cat(parts).contiguous() for name, parts in rows.items()}
    for layout, parts in counts.items():
        tensors[f"{layout}_offsets"] = F.pad(torch.cat(parts).long().cumsum(0), (1, 0))
    return tensors


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part)
    put_in_place(part, path)


def _finish(folder: Path, manifest: Manifest) -> Manifest:
    """Say in the manifest that all is there, if it is; whoever is last does."""
    names = [manifest.shard_name(number) for number in range(manifest.shards)]
    names += [HEAD_FILE] if manifest.contents.logits == "last_hidden" else []
    if manifest.complete or not all((folder / name).is_file() for name in names):
        return manifest
    size_bytes = sum((folder / name).stat().st_size for name in names)
    manifest = manifest.model_copy(update={"complete": True, "size_bytes": size_bytes})
    _save(folder, manifest)
    return manifest
