"""Reading a teacher cache: what the teacher said of the examples of a batch, found by their inputs.

The teacher ran once (`write_cache`); further epochs, seeds, sweeps and processes read files that are mapped into memory. An example is
found by its content, so neither order, batch, padding nor process matters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from hfcompress.distillation.cache_format import (
    HEAD_FILE,
    KEYS,
    CacheContents,
    Manifest,
    read_manifest,
    read_shard,
    unpack_indices,
)
from hfcompress.distillation.cache_keys import KEY_BYTES, CacheError, example_keys, key_inputs, row_mask
from hfcompress.distillation.teachers import OWN_INPUTS, own_inputs

_PACKED = frozenset(("top_indices", "tail_indices", "sample_indices"))


class TeacherCache:
    """What a teacher said, on disk. Make one with `open`; it can be pickled, and is opened anew where it is unpickled.

    Attributes:
        folder: Where it is.
        manifest: What it holds.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfcompress.distillation import CacheContents, Teacher, write_cache
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> teacher = Teacher(BertForSequenceClassification(config))
        >>> examples = [{"input_ids": [5, 6]}, {"input_ids": [7, 8]}]
        >>> def collate(rows):
        ...     return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_cache(teacher, examples, collate, folder, CacheContents("all"), progress=False)
        ...     cache = TeacherCache.open(folder)
        ...     batch = CachingCollator(collate, cache)(examples[1:])
        >>> torch.allclose(batch["teacher_logits"], teacher(collate(examples[1:])).outputs["logits"], atol=1e-5)
        True
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self.folder = folder
        self.manifest = manifest
        # As bytes, because numpy slices fast but does not know bfloat16.
        self._rows = {
            name: [_as_bytes(shard[name], spec.row_bytes) for shard in shards] for name, spec in manifest.arrays.items()
        }
        layouts = {spec.layout for spec in manifest.arrays.values()} - {"examples"}
        self._offsets = {layout: [shard[f"{layout}_offsets"].numpy() for shard in shards] for layout in layouts}
        self._starts = np.arange(len(shards)) * manifest.shard_examples
        keys = np.concatenate([shard[KEYS].numpy() for shard in shards]).view(f"S{KEY_BYTES}")[:, 0]
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TeacherCache:
        """Open a cache that is complete.

        Raises:
            CacheError: There is none, it is not complete, or a file is damaged.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        if not manifest.complete:
            there = sum((path / manifest.shard_name(number)).is_file() for number in range(manifest.shards))
            raise CacheError(
                f"{path} is not complete: {there} of {manifest.shards} shards are there; run what made it again, it goes on where it was"
            )
        return cls(path, manifest, [read_shard(path, manifest, number) for number in range(manifest.shards)])

    def __reduce__(self) -> Any:
        return TeacherCache.open, (str(self.folder.absolute()),)

    def __len__(self) -> int:
        """Different examples."""
        return self.manifest.examples

    @property
    def contents(self) -> CacheContents:
        """What is kept."""
        return self.manifest.contents

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Where examples are.

        Args:
            keys: As of `example_keys`, shape (n,).

        Returns:
            Numbers of rows, int64, shape (n,); -1 for an example that is not there.
        """
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._order[at], -1)

    def targets(
        self, batch: Mapping[str, Any], *, hidden_layers: Collection[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """What the teacher said of a batch, in the batch's layout; padding is 0.

        Args:
            batch: Inputs on the CPU.
            hidden_layers: Of the layers that are kept those to read; None is all.

        Returns:
            Of these, what the cache keeps: "teacher_logits" (or "teacher_start_logits" and "teacher_end_logits"); "teacher_top_indices"
            (int32), "teacher_top_log_probs", "teacher_tail_log_mass", "teacher_tail_indices" (int32) and "teacher_tail_mean_log_prob";
            "teacher_sample_indices" (int32); "teacher_last_hidden"; "teacher_hidden_3" for layer 3. Shape (batch, length, ...) where there is something for each token.

        Raises:
            CacheError: An example is not in the cache.
        """
        batch = own_inputs(batch)
        manifest = self.manifest
        keys = example_keys(batch, ignored=manifest.ignored, reads_labels=manifest.reads_labels)
        rows = self.lookup(keys)
        if (rows < 0).any():
            raise CacheError(self._why(batch, int((rows < 0).sum()), len(rows)))
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))
        left_out = set() if hidden_layers is None else set(self.contents.hidden_layers) - set(hidden_layers)
        names = manifest.arrays.keys() - {f"hidden_{layer}" for layer in left_out}
        found = {name: self._read(name, places) for name in names}
        for name in _PACKED & found.keys():
            found[name] = unpack_indices(found, name)
            found.pop(f"{name}_high", None)
        return {OWN_INPUTS + name: self._laid_out(name, values, batch) for name, values in found.items()}

    def _read(self, name: str, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The rows of some examples (shard, number in it), one after the other."""
        spec, rows = self.manifest.arrays[name], self._rows[name]
        if spec.layout == "examples":
            parts = [rows[shard][number : number + 1] for shard, number in places]
        else:
            offsets = self._offsets[spec.layout]
            parts = [rows[shard][offsets[shard][number] : offsets[shard][number + 1]] for shard, number in places]
        return torch.from_numpy(np.concatenate(parts)).view(getattr(torch, spec.dtype)).view(-1, *spec.shape)

    def _laid_out(self, name: str, values: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """Rows where the batch has their tokens."""
        mask = row_mask(batch, self.manifest.arrays[name].layout)
        if mask is None:
            return values
        padded = values.new_zeros(*mask.shape, *values.shape[1:])
        padded[mask] = values
        return padded

    def _why(self, batch: Mapping[str, Any], missing: int, of: int) -> str:
        """What may be the cause of examples that are not there."""
        names = key_inputs(batch, ignored=self.manifest.ignored, reads_labels=self.manifest.reads_labels)
        cause = (
            "they are other data, or of another tokenizer or length, or the collator or data set changes inputs at random "
            "(masking, augmentation), which a cache cannot follow"
        )
        mine, theirs = ({name for name in some if "mask" not in name} for some in (names, self.manifest.inputs))
        if mine != theirs:
            cause = f"the batch has {', '.join(sorted(mine))}, and the cache was made from {', '.join(sorted(theirs))}"
        return f"{missing} of {of} examples are not in the teacher cache {self.folder}: {cause}"

    def load_head(self) -> nn.Linear:
        """The head of the language model, to make logits of "teacher_last_hidden": exact but for bfloat16.

        Raises:
            CacheError: The cache does not keep the last hidden states.
        """
        if self.contents.logits != "last_hidden":
            raise CacheError(f"{self.folder} keeps {self.contents}, so it has no head; make it with logits last_hidden")
        weights = load_file(self.folder / HEAD_FILE)
        classes, width = weights["weight"].shape
        head = nn.Linear(width, classes, bias="bias" in weights, device="meta")
        head.load_state_dict(weights, assign=True)
        return head.requires_grad_(False)


def _as_bytes(rows: torch.Tensor, row_bytes: int) -> np.ndarray:
    """A view of rows as bytes, shape (rows, bytes); nothing is read."""
    flat = rows.reshape(len(rows), row_bytes // rows.element_size())
    return flat.view(torch.uint8).numpy()


@dataclass(frozen=True)
class CachingCollator:
    """A collator that adds to each batch what the teacher said of it; so that is read in the workers of a data loader.

    Attributes:
        collate: Makes a batch of examples.
        cache: Where it is looked up.
        hidden_layers: Of the layers that are kept those to read; None is all.
    """

    collate: Callable[[list[Any]], Mapping[str, Any]]
    cache: TeacherCache
    hidden_layers: frozenset[int] | None = None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """The batch with its targets; see `TeacherCache.targets`.

        Raises:
            CacheError: An example is not in the cache.
        """
        batch = self.collate(examples)
        return {**batch, **self.cache.targets(batch, hidden_layers=self.hidden_layers)}
