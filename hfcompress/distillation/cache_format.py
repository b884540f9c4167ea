"""The files of a teacher cache: what is kept of an example, the shards it is in, and the manifest that says what a folder holds.

A folder has `manifest.json` and files `shard-00000.safetensors`, each with the keys of its examples, and for each thing that is kept the
rows of all its examples, one after the other; `tokens_offsets` says where those of each example begin.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from hfcompress.config import Section
from hfcompress.distillation.cache_keys import KEY_BYTES, CacheError, Layout

MANIFEST_FILE = "manifest.json"
HEAD_FILE = "head.safetensors"
LogitsKind = Literal["all", "top_k", "samples", "last_hidden"]
KEYS = "keys"


@dataclass(frozen=True)
class CacheContents:
    """What is kept of a teacher's outputs for each example.

    Attributes:
        logits: "all" of them; "top_k": the `count` likeliest classes with their log-probabilities, how likely all others are together,
            and a quarter as many of them drawn, so that what is learned has no bias; "samples": `count` classes drawn with replacement
            from the teacher's distribution (Anshumann et al. 2025, "Sparse Logit Sampling"), whose frequencies are targets without bias;
            "last_hidden": what enters the head of a language model, in bfloat16, with the head once for all; or None. The last three
            are for many classes.
        count: Classes or draws, at least 1.
        hidden_layers: Layers whose outputs are kept in bfloat16, counted from 0 as `find_layers` does.
        dtype: Type of the logits where all are kept.

    Raises:
        CacheError: A value is not allowed.

    Example:
        >>> CacheContents("top_k", count=32, hidden_layers=(1, 3)).hidden_layers
        (1, 3)
    """

    logits: LogitsKind | None = "all"
    count: int = 64
    hidden_layers: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.logits not in ("all", "top_k", "samples", "last_hidden", None):
            raise CacheError(f"logits is {self.logits!r}, but must be all, top_k, samples, last_hidden or None")
        if self.count < 1:
            raise CacheError(f"count is {self.count}, but must be at least 1")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise CacheError(f"dtype is {self.dtype!r}, but must be float32, bfloat16 or float16")
        if self.hidden_layers and min(self.hidden_layers) < 0:
            raise CacheError(f"hidden_layers has {min(self.hidden_layers)}, but layers are counted from 0")
        if self.logits is None and not self.hidden_layers:
            raise CacheError("nothing is to be kept; set logits or hidden_layers")

    def __str__(self) -> str:
        kinds = {"all": f"logits in {self.dtype}", "top_k": f"top {self.count}", "samples": f"{self.count} samples"}
        said = [kinds.get(self.logits, "last hidden states")] if self.logits is not None else []
        if self.hidden_layers:
            said.append(f"hidden states of layers {', '.join(map(str, self.hidden_layers))}")
        return " and ".join(said)


@dataclass(frozen=True)
class ArraySpec:
    """One array in every shard.

    Attributes:
        dtype: Name of a type of torch.
        shape: Of one row.
        layout: What has a row: an example, each of its tokens, or each of its labels.

    Example:
        >>> ArraySpec("float16", (64,), "tokens").row_bytes
        128
    """

    dtype: str
    shape: tuple[int, ...]
    layout: Layout

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


class Manifest(Section):
    """What a folder holds.

    Attributes:
        version: Of the format.
        teacher: Name of the teacher; paths of a machine do not belong here.
        teacher_sha256: Of its weights, by name and type.
        teacher_dtype: What it ran in.
        contents: What is kept.
        seed: Of draws.
        data_fingerprint: Hash over the keys of all examples, in order.
        inputs: Names of the tensors that identify an example.
        ignored: Names of tensors that do not.
        reads_labels: Whether labels are among the inputs, as for an encoder with a decoder.
        examples: Different examples.
        tokens: Their tokens, without padding; 0 for images.
        shard_examples: Examples in each shard but the last.
        arrays: What each shard holds.
        layers: Layers in each stack of the teacher; empty if its architecture is not known.
        width: Features of its hidden states; 0 if not known.
        complete: Whether all shards are there.
        size_bytes: Of all files but this one, where complete.
        versions: Of the packages that made it.
    """

    version: Literal[2] = 2
    teacher: str
    teacher_sha256: str
    teacher_dtype: str
    contents: CacheContents
    seed: int = 0
    data_fingerprint: str
    inputs: tuple[str, ...]
    ignored: tuple[str, ...]
    reads_labels: bool
    examples: int
    tokens: int
    shard_examples: int
    arrays: dict[str, ArraySpec]
    layers: tuple[int, ...] = ()
    width: int = 0
    complete: bool = False
    size_bytes: int = 0
    versions: dict[str, str] = {}

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.examples // self.shard_examples)

    def shard_name(self, number: int) -> str:
        """Name of a shard's file."""
        return f"shard-{number:05d}.safetensors"

    def shard_size(self, number: int) -> int:
        """Examples in a shard."""
        return min(self.shard_examples, self.examples - number * self.shard_examples)

    def difference(self, other: Manifest) -> str | None:
        """What another plan for the same folder has that this one has not, in words; None if it is the same."""
        if (self.teacher_sha256, self.teacher_dtype) != (other.teacher_sha256, other.teacher_dtype):
            mine, theirs = (f"{m.teacher}, {m.teacher_dtype}, sha256 {m.teacher_sha256[:8]}" for m in (self, other))
            return f"another teacher ({mine}; not {theirs})"
        if self.contents != other.contents:
            return f"other contents ({self.contents}; not {other.contents})"
        if self.contents.logits in ("samples", "top_k") and self.seed != other.seed:
            return f"draws of another seed ({self.seed}; not {other.seed})"
        if (self.data_fingerprint, self.ignored, self.arrays) != (
            other.data_fingerprint,
            other.ignored,
            other.arrays,
        ):
            return f"other data, tokenizer, length or order ({self.examples:,} examples; not {other.examples:,})"
        return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        CacheError: There is none, or it cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(
            f"{folder} holds no teacher cache ({MANIFEST_FILE} is missing); make one with hfcompress cache-teacher"
        ) from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its text"
        raise CacheError(f"{path} is damaged or of another version: {where}: {first['msg']}; make it again") from None


def read_shard(folder: Path, manifest: Manifest, number: int) -> dict[str, torch.Tensor]:
    """The tensors of a shard, mapped into memory: nothing is read before it is used.

    Returns:
        "keys" (uint8, shape (examples, 16)), "tokens_offsets" and the like, and the arrays of the manifest.

    Raises:
        CacheError: The file is missing, cut off, or holds something else than the manifest says.
    """
    path = folder / manifest.shard_name(number)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CacheError(f"{path} is missing; run what made the cache again, it goes on where it was") from None
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and run what made the cache again") from None
    if (wrong := _fault(tensors, manifest, manifest.shard_size(number))) is not None:
        raise CacheError(f"{path} is damaged ({wrong}); delete it and run what made the cache again")
    return tensors


def _fault(tensors: Mapping[str, torch.Tensor], manifest: Manifest, examples: int) -> str | None:
    """What a shard has that it should not have."""
    layouts = sorted({spec.layout for spec in manifest.arrays.values()} - {"examples"})
    expected = {KEYS, *manifest.arrays, *(f"{layout}_offsets" for layout in layouts)}
    if tensors.keys() != expected:
        return f"it holds {', '.join(sorted(tensors))}, not {', '.join(sorted(expected))}"
    if tensors[KEYS].shape != (examples, KEY_BYTES):
        return f"it holds {len(tensors[KEYS])} keys, not {examples}"
    rows = {"examples": examples}
    for layout in layouts:
        offsets = tensors[f"{layout}_offsets"]
        if len(offsets) != examples + 1 or int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            return f"its {layout}_offsets are not those of {examples} examples"
        rows[layout] = int(offsets[-1])
    for name, spec in manifest.arrays.items():
        found = tensors[name]
        if found.shape != (rows[spec.layout], *spec.shape) or dtype_name(found) != spec.dtype:
            return f"{name} is {dtype_name(found)} of shape {tuple(found.shape)}"
    return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that at any time there is the whole of it or nothing, even if the machine stops."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    put_in_place(part, path)


def put_in_place(part: Path, path: Path) -> None:
    """Give a written file its name once it is safely on the disk."""
    for target in (part, path.parent):
        if target is not part:
            part.replace(path)
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def dtype_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's type without "torch"."""
    return str(tensor.dtype).removeprefix("torch.")


# ---- class numbers in few bytes ----


def pack_indices(indices: torch.Tensor, *, classes: int, name: str) -> dict[str, torch.Tensor]:
    """Class numbers in 2 bytes, or in 2.5 where there are more than 65,536 classes.

    Args:
        indices: int64, shape (..., k).
        classes: How many there are, at most 2^20.
        name: Of the result.

    Returns:
        `name`: the low 16 bits, uint16; and for many classes `name`_high: the other 4 bits, two in a byte, uint8, shape
        (..., ceil(k / 2)).

    Raises:
        CacheError: There are too many classes.

    Example:
        >>> packed = pack_indices(torch.tensor([[65541, 2, 3]]), classes=100_000, name="top")
        >>> packed["top"].tolist(), packed["top_high"].tolist(), unpack_indices(packed, "top").tolist()
        ([[5, 2, 3]], [[1, 0]], [[65541, 2, 3]])
    """
    if classes > 1 << 20:
        raise CacheError(f"{classes:,} classes are too many: at most {1 << 20:,} can be numbered; keep last_hidden")
    packed = {name: (indices & 0xFFFF).to(torch.uint16)}
    if classes > 1 << 16:
        high = torch.nn.functional.pad(indices >> 16, (0, indices.shape[-1] % 2))
        packed[f"{name}_high"] = (high[..., ::2] | (high[..., 1::2] << 4)).to(torch.uint8)
    return packed


def unpack_indices(packed: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """What `pack_indices` was given, as int32."""
    low = packed[name].to(torch.int32)
    if f"{name}_high" not in packed:
        return low
    high = packed[f"{name}_high"].to(torch.int32)
    return low | (torch.stack([high & 15, high >> 4], dim=-1).flatten(-2)[..., : low.shape[-1]] << 16)
