"""What a teacher says of a batch, in the form that a cache keeps; and which teacher it is."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hfcompress.anatomy import StructureError, find_stream, named_layers
from hfcompress.distillation.cache_format import ArraySpec, CacheContents, dtype_name, pack_indices
from hfcompress.distillation.cache_keys import CacheError, Layout, example_keys, key_inputs, row_mask
from hfcompress.distillation.capture import Wanted
from hfcompress.distillation.teachers import Teacher, with_decoder_inputs, without_adapters

_CHUNK = 512  # rows whose distribution is held in 32 bits at once
_DRAWN = 4  # of so many of the likeliest classes that are kept, one of the others is drawn


class Asking:
    """Gets from a teacher, for a batch, the rows that are kept.

    Args:
        teacher: The teacher.
        contents: What is kept.
        ignored: Names of tensors that do not identify an example.
        seed: Of draws.

    Raises:
        CacheError: The teacher has no such layers.
    """

    def __init__(self, teacher: Teacher, contents: CacheContents, ignored: frozenset[str], seed: int) -> None:
        self.teacher = teacher
        self.contents = contents
        self.ignored = ignored
        self.seed = seed
        self.reads_labels = False
        self.inputs: tuple[str, ...] = ()
        self.arrays: dict[str, ArraySpec] = {}
        self._generator = torch.Generator(teacher.device)
        self._decoder_layers = self._check_layers()

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """What examples have several of."""
        return ("tokens", "labels") if self.reads_labels else ("tokens",)

    def _check_layers(self) -> frozenset[int]:
        """Which of the layers see labels; all have to be there."""
        if not self.contents.hidden_layers:
            return frozenset()
        if len(self.teacher.models) > 1:
            raise CacheError("several teachers have no hidden states in common; leave out hidden_layers")
        names = list(named_layers(without_adapters(self.teacher.model)))
        if (last := max(self.contents.hidden_layers)) >= len(names):
            raise CacheError(f"hidden_layers has {last}, but the teacher's layers are 0 to {len(names) - 1}")
        return frozenset(number for number, name in enumerate(names) if name.startswith("decoder"))

    def begin(self, batch: Mapping[str, Any]) -> dict[str, ArraySpec]:
        """Ask about one example, to see what there is to keep."""
        config = getattr(self.teacher.model, "config", None)
        labels = batch.get("labels")
        self.reads_labels = bool(
            getattr(config, "is_encoder_decoder", False)
            and isinstance(labels, torch.Tensor)
            and labels.dim() == 2
            and not labels.is_floating_point()
        )
        self.inputs = tuple(key_inputs(batch, ignored=self.ignored, reads_labels=self.reads_labels))
        self.start(0)
        for name, (layout, rows, _) in self.ask(batch).items():
            self.arrays[name] = ArraySpec(dtype_name(rows), tuple(rows.shape[1:]), layout)
        return self.arrays

    def keys(self, batch: Mapping[str, Any]) -> np.ndarray:
        """What identifies the examples of a batch."""
        return example_keys(batch, ignored=self.ignored, reads_labels=self.reads_labels)

    def start(self, shard: int) -> None:
        """Draw for a shard the same way whoever writes it, and whatever was written before."""
        seed = hashlib.blake2b(
            f"{self.seed} {shard}".encode(), digest_size=4
        ).digest()  # generators look at 32 bits only
        self._generator.manual_seed(int.from_bytes(seed, "little"))

    def ask(self, batch: Mapping[str, Any]) -> dict[str, tuple[Layout, torch.Tensor, torch.Tensor | None]]:
        """By name: the layout, the rows of all examples one after the other, and how many each example has."""
        given = with_decoder_inputs(self.teacher.model, batch) if self.reads_labels else batch
        kind, kept = self.contents.logits, {}
        with _HeadInput(self.teacher if kind == "last_hidden" else None) as head:
            said = self.teacher(given, wanted=Wanted(hidden=frozenset(self.contents.hidden_layers)))
        if kind == "last_hidden":
            if not self.arrays:
                head.check(said.outputs["logits"])
            kept["last_hidden"] = self._rows(head.seen.to(torch.bfloat16), batch, of_decoder=True)
        elif kind is not None:
            for name, logits in _logits_of(said.outputs, self.teacher):
                layout, rows, counts = self._rows(logits, batch, of_decoder=True)
                rows = rows if name == "logits" else rows.squeeze(-1)
                for part, values in self._keep(rows, name).items():
                    kept[part] = layout, values, counts
        for number, states in said.hidden.items():
            kept[f"hidden_{number}"] = self._rows(
                states.to(torch.bfloat16), batch, of_decoder=number in self._decoder_layers
            )
        self._check(kept)
        return {name: (layout, rows.cpu(), counts) for name, (layout, rows, counts) in kept.items()}

    def _rows(
        self, values: torch.Tensor, batch: Mapping[str, Any], *, of_decoder: bool
    ) -> tuple[Layout, torch.Tensor, torch.Tensor | None]:
        """Those of padding left out."""
        layout: Layout = "labels" if of_decoder and self.reads_labels else "tokens"
        mask = row_mask(batch, layout) if values.dim() > 2 else None
        if mask is None:
            return "examples", values, None
        if mask.shape != values.shape[:2]:
            raise CacheError(
                f"the teacher gives {tuple(values.shape[:2])} positions for {tuple(mask.shape)} {layout}, so it cannot be told which are "
                "padding; keep logits only, or use inputs of one size without an attention mask"
            )
        return layout, values[mask.to(values.device)], mask.sum(1)

    def _keep(self, logits: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        """What is kept of logits, shape (rows, ..., classes)."""
        classes, contents = logits.shape[-1], self.contents
        if contents.logits == "all":
            return {name: logits.to(getattr(torch, contents.dtype))}
        if name != "logits":
            raise CacheError(f"{name} are one number a token; keep all logits")
        if contents.logits == "top_k" and contents.count > classes:
            raise CacheError(f"there are no top {contents.count} of {classes} classes; keep all logits")
        chunks: dict[str, list[torch.Tensor]] = defaultdict(list)
        for chunk in logits.reshape(-1, classes).split(_CHUNK):
            for part, values in self._sparse(F.log_softmax(chunk.float(), dim=-1)).items():
                chunks[part].append(values)
        return {
            part: torch.cat(values).view(*logits.shape[:-1], *values[0].shape[1:]) for part, values in chunks.items()
        }

    def _sparse(self, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The likeliest classes and draws of the others, or draws of all; shape (rows, classes)."""
        classes, count = log_probs.shape[-1], self.contents.count
        if self.contents.logits == "samples":
            drawn = torch.multinomial(log_probs.exp(), count, replacement=True, generator=self._generator)
            return pack_indices(drawn, classes=classes, name="sample_indices")
        top, indices = log_probs.topk(count, dim=-1)
        others = log_probs.scatter(-1, indices, -torch.inf)
        # Summed and not one less the others, which would leave nothing but rounding of a small mass.
        tail = others.logsumexp(-1)
        shares = (others - tail.unsqueeze(-1)).exp().nan_to_num(1.0)  # nothing left: any class, for it counts nothing
        drawn = torch.multinomial(shares, max(1, count // _DRAWN), replacement=True, generator=self._generator)
        mean = (tail - torch.special.entr(shares).sum(-1)).masked_fill(tail == -torch.inf, 0.0)
        return {
            **pack_indices(indices, classes=classes, name="top_indices"),
            "top_log_probs": top.half(),
            "tail_log_mass": tail,
            **pack_indices(drawn, classes=classes, name="tail_indices"),
            "tail_mean_log_prob": mean.half(),
        }

    def _check(self, kept: Mapping[str, tuple[Layout, torch.Tensor, Any]]) -> None:
        for name, (layout, rows, _) in kept.items():
            spec = self.arrays.get(name)
            if spec is not None and (spec.layout, spec.shape) != (layout, tuple(rows.shape[1:])):
                raise CacheError(
                    f"{name} has shape {tuple(rows.shape[1:])} for some examples and {spec.shape} for others; "
                    "use inputs of one size, or an attention mask"
                )
            if name != "tail_log_mass" and rows.is_floating_point() and not bool(rows.isfinite().all()):
                raise CacheError(
                    f"the teacher's {name} are not finite in {dtype_name(rows)}; keep them in another dtype, or check the teacher"
                )


class _HeadInput:
    """What enters the head of a language model while it runs; nothing if there is no teacher."""

    def __init__(self, teacher: Teacher | None) -> None:
        self.seen = torch.empty(0)
        self.head: nn.Module | None = None
        if teacher is not None:
            find = getattr(teacher.model, "get_output_embeddings", lambda: None)
            self.head = find() if len(teacher.models) == 1 else None
            if not isinstance(self.head, nn.Linear):
                raise CacheError(
                    f"{type(teacher.model).__name__} has no linear head over a vocabulary; keep all logits or top_k"
                )

    def __enter__(self) -> _HeadInput:
        if self.head is not None:
            self._handle = self.head.register_forward_pre_hook(self._see)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.head is not None:
            self._handle.remove()

    def _see(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.seen = args[0].detach()

    def check(self, logits: torch.Tensor) -> None:
        """Whether the head is the last thing that is done to logits."""
        assert self.head is not None
        again = self.head(self.seen).float()
        if again.shape != logits.shape or not torch.allclose(again, logits.float(), rtol=1e-5, atol=1e-6):
            raise CacheError(
                "the teacher changes its logits after the head (a soft cap, scale or bias), so hidden states do not give them; "
                "keep top_k or samples"
            )


def _logits_of(outputs: Mapping[str, Any], teacher: Teacher) -> list[tuple[str, torch.Tensor]]:
    names = [name for name in ("start_logits", "end_logits") if name in outputs] or ["logits"]
    if names[0] not in outputs:
        raise CacheError(
            f"{type(teacher.model).__name__} gives no logits, only {', '.join(outputs)}; keep hidden_layers alone"
        )
    # Those of question answering have one number for each token, and so no dimension of classes.
    return [(name, outputs[name] if name == "logits" else outputs[name].unsqueeze(-1)) for name in names]


def shape_of(models: Sequence[nn.Module]) -> tuple[tuple[int, ...], int]:
    """Layers in each stack, and features between them; nothing of several models, or of an architecture that is not known."""
    model = without_adapters(models[0])
    try:
        stacks = Counter(name.rpartition(".")[0] for name in named_layers(model))
    except StructureError:
        return (), 0
    try:
        width = find_stream(model).width
    except StructureError:  # quantized
        width = int(getattr(model.config, "hidden_size", 0))  # type: ignore[union-attr, arg-type]
    return (tuple(stacks.values()), width) if len(models) == 1 else ((), 0)


def dtype_of(models: Sequence[nn.Module]) -> str:
    """The types of the weights, such as "float32"."""
    types = {dtype_name(p) for model in models for p in model.parameters() if p.is_floating_point()}
    return " and ".join(sorted(types))


def hash_of(models: Sequence[nn.Module]) -> str:
    """SHA-256 of the weights as they are in memory: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_of(head: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
