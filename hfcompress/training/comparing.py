"""Which tensors of student and teacher are compared in a batch, over which items, and how much each comparison weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hfcompress.anatomy import Change, StructureError, family_of, find_stream
from hfcompress.anatomy.sites import find_stacks
from hfcompress.checkpoints.record import read_hidden
from hfcompress.config import DistillConfig, Ramp, ever_positive, value_at
from hfcompress.distillation import (
    ATTENTION_LOSSES,
    EMBEDDING_LOSSES,
    HIDDEN_LOSSES,
    LOGIT_LOSSES,
    AttentionInputs,
    Captured,
    LayerMap,
    Targets,
    Wanted,
    attention_map,
    best_match,
    binary_kl_divergence,
    make_map,
    mean_squared_error,
    pool,
    relation_divergence,
    sampled_kl_divergence,
    standardize,
    top_k_kl_divergence,
    uniform_map,
    universal_logit_distance,
)
from hfcompress.training.items import IGNORED, ItemCounts, batch_size, label_mask

# CoFi (Xia et al. 2022, section 3.2) compares four of twelve teacher layers.
_DYNAMIC_EVERY = 3
_MOST_RELATION_HEADS = 12


@dataclass(frozen=True)
class Seen:
    """A batch, and what the student made of it.

    Attributes:
        inputs: The batch.
        outputs: The student's outputs.
        captured: What it computed on the way.
        counts: Items of the whole optimizer step.
        progress: Share of the run that is done, in [0, 1].
        problem_type: As in the student's config, which transformers fills in when it first sees labels.
    """

    inputs: Mapping[str, Any]
    outputs: Any
    captured: Captured
    counts: ItemCounts
    progress: float
    problem_type: str | None = None


@dataclass(frozen=True)
class Shape:
    """The layers of a model and the width between them; of a teacher that is not here, as its cache says.

    Attributes:
        layers: Number of layers of each stack.
        width: Features of the hidden states.
        decoder: Numbers of the layers that read the answer and not the input, where there is an encoder as well.
    """

    layers: tuple[int, ...]
    width: int
    decoder: frozenset[int] = frozenset()


class Comparison:
    """The terms of one distillation.

    Args:
        config: What is compared.
        shifted: Whether the models predict the next token.
        classes: Number of leading classes that both models share; None is all.
        frames_of: For sound: number of frames and mask of samples in, mask of frames out.
    """

    def __init__(
        self,
        config: DistillConfig,
        *,
        shifted: bool,
        classes: int | None = None,
        frames_of: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.config = config
        self.shifted = shifted
        self.classes = classes
        self.frames_of = frames_of
        self.hidden: LayerMap = ()
        self.attentions: LayerMap = ()
        self.relations: LayerMap = ()
        self.projections = nn.ModuleDict()
        self.features: torch.Tensor | None = None
        self.distances: torch.Tensor | None = None
        self._embedded: tuple[int, int] | None = None
        self._student: Shape | None = None
        self._choices: tuple[int, ...] = ()

    @property
    def looks_inside(self) -> bool:
        """Whether more than predictions is compared."""
        return any(
            ever_positive(term.weight)
            for term in (self.config.hidden, self.config.attentions, self.config.relations, self.config.embeddings)
        )

    def pair(self, student: Shape, teacher: Shape) -> None:
        """Decide which layers are compared, for the layers that the student has now. Changes this object."""
        config = self.config
        if student == self._student or not self.looks_inside:
            return
        self._student = student
        self._choices = tuple(range(teacher.layers[0]))[_DYNAMIC_EVERY - 1 :: _DYNAMIC_EVERY] or (
            teacher.layers[0] - 1,
        )
        for name in ("hidden", "attentions", "relations"):
            term = getattr(config, name)
            if ever_positive(term.weight):
                setattr(
                    self, name, pair_layers(term.layers, student=student, teacher=teacher, key=f"distill.{name}.layers")
                )
        if ever_positive(config.embeddings.weight):
            self._embedded = student.layers[0] - 1, teacher.layers[0] - 1
        if config.hidden.layers == "dynamic" and self.hidden:
            if len(student.layers) > 1:
                raise ValueError(
                    "distill.hidden.layers: dynamic is for one stack of layers; use all, last, skip or pairs"
                )
            # Before anything is known, the student layer at the same relative depth: its map to the teacher, turned round.
            depths = dict(uniform_map(teacher.layers[0], student.layers[0]))
            self.hidden = tuple((depths[t], t) for t in self._choices)

    @property
    def dynamic(self) -> bool:
        """Whether the map of hidden states is found anew at each step."""
        return bool(self.hidden) and self.config.hidden.layers == "dynamic"

    def wanted(self) -> tuple[Wanted, Wanted]:
        """What to look at in the student and in the teacher."""
        mine, theirs = {s for s, _ in self.hidden}, {t for _, t in self.hidden}
        if self.dynamic:
            assert self._student is not None
            mine |= set(range(self._student.layers[0]))
        if self._embedded is not None:
            mine.add(self._embedded[0])
            theirs.add(self._embedded[1])
        inside = self.attentions + self.relations
        return (
            Wanted(frozenset(mine), frozenset(s for s, _ in inside)),
            Wanted(frozenset(theirs), frozenset(t for _, t in inside)),
        )

    def make_projections(self, student: Shape, teacher: Shape) -> None:
        """Linear maps from the student's to the teacher's width, where they differ. Changes this object."""
        if student.width == teacher.width or len(self.projections):
            return
        names = ["shared"] if self.dynamic else [f"{s}_{t}" for s, t in self.hidden]
        if self._embedded is not None and self.config.embeddings.loss != "similarity":
            names.append("embeddings")
        for name in names:
            self.projections[name] = nn.Linear(student.width, teacher.width, bias=False)

    def narrow(self, kept: torch.Tensor) -> list[Change]:
        """Follow a student that loses hidden features. Changes this object.

        Where its hidden states had the teacher's width, what is left is compared with the same features of the teacher from now on; where a
        projection lies between, that has as many inputs less.

        Args:
            kept: The features that stay, int64, ascending, counted in the student as it was.

        Returns:
            The parameters of projections that were replaced, for the optimizer.
        """
        if not len(self.projections):
            self.features = kept if self.features is None else self.features[kept]
            return []
        changes = []
        for projection in self.projections.values():
            old = projection.weight
            index = kept.to(old.device)
            new = nn.Parameter(old.detach()[:, index])
            projection.weight, projection.in_features = new, len(kept)
            changes.append(Change(old, new, 1, index))
        return changes

    def _of_teacher(self, hidden: torch.Tensor) -> torch.Tensor:
        """The features of the teacher's hidden states that the student still has."""
        return hidden if self.features is None else hidden[..., self.features.to(hidden.device)]

    def _project(self, hidden: torch.Tensor, key: str) -> torch.Tensor:
        return self.projections[key](hidden.float()) if key in self.projections else hidden

    # ---- the terms ----

    def terms(self, seen: Seen, targets: Targets) -> dict[str, torch.Tensor]:
        """The weighted terms by name, each the sum over this batch divided by the items of the optimizer step."""
        config = self.config
        found: dict[str, tuple[float | Ramp, Callable[[], torch.Tensor]]] = {
            "logits": (config.logits.weight, partial(self._logits, seen, targets)),
            "hidden": (config.hidden.weight, partial(self._hidden, seen, targets)),
            "attentions": (config.attentions.weight, partial(self._attentions, seen, targets)),
            "relations": (config.relations.weight, partial(self._relations, seen, targets)),
            "embeddings": (config.embeddings.weight, partial(self._embeddings, seen, targets)),
        }
        # A term whose weight is 0 for now stays: the same names in every log, and a gradient for every output.
        return {
            name: value_at(weight, seen.progress) * value()
            for name, (weight, value) in found.items()
            if ever_positive(weight)
        }

    def _logits(self, seen: Seen, targets: Targets) -> torch.Tensor:
        """The divergence of the two models' predictions, over the items that the task predicts."""
        if "start_logits" in seen.outputs:
            return self._spans(seen, targets)
        ours = seen.outputs.get("logits")
        if ours is None:
            raise ValueError(
                "the student predicts nothing (it is a model without a head); set distill.logits.weight to 0 and compare embeddings or hidden"
            )
        if "logits" not in targets.outputs:
            return self._cached(ours, seen, targets)
        theirs = targets.outputs["logits"].to(ours.device)
        config = self.config.logits
        if config.loss == "uld":
            return self._other_vocabulary(ours, theirs, seen)
        if self.classes is not None:
            ours, theirs = ours[..., : self.classes], theirs[..., : self.classes]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the student predicts {tuple(ours.shape)} and the teacher {tuple(theirs.shape)} for the same batch; "
                "both need the same labels or vocabulary and the same tokenizer (or distill.logits.loss: uld)"
            )
        if seen.problem_type == "regression" or ours.shape[-1] == 1:
            return mean_squared_error(ours, theirs, count=seen.counts.examples)
        if seen.problem_type == "multi_label_classification":
            return self._yes_or_no(ours, theirs, seen)
        labels = seen.inputs.get("labels")
        if ours.dim() == 2:
            return self._diverge(ours, theirs, labels, None, seen.counts.examples, seen)
        mask, count = self._predicted(ours, seen)
        if self.shifted:
            # Masked and not cut off: a slice would get a second gradient as large as all logits.
            mask = torch.ones_like(ours[:, :-1, 0], dtype=torch.bool) if mask is None else mask
            mask = F.pad(mask, (0, 1), value=False)
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if labels is not None else None
        return self._diverge(ours, theirs, labels, mask, count, seen)

    def _predicted(self, ours: torch.Tensor, seen: Seen) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Of a sequence of predictions, those that count, and how many the optimizer step has."""
        labels, attention, counts = seen.inputs.get("labels"), seen.inputs.get("attention_mask"), seen.counts
        shifted = self.shifted
        if labels is not None:
            return label_mask(labels, shifted=shifted), counts.labels
        if attention is not None:
            # Without labels every real token counts; the first has nothing before it that could predict it.
            mask = (attention[..., 1:] * attention[..., :-1] if shifted else attention).bool()
            return mask, counts.tokens - counts.examples if shifted else counts.tokens
        return None, counts.examples * (ours.shape[1] - int(shifted))

    def _diverge(
        self,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        labels: torch.Tensor | None,
        mask: torch.Tensor | None,
        count: torch.Tensor,
        seen: Seen,
    ) -> torch.Tensor:
        config = self.config.logits
        loss = LOGIT_LOSSES[config.loss]
        options: dict[str, Any] = {"mask": mask, "count": count}
        if loss.temperature:
            options["temperature"] = value_at(config.temperature, seen.progress)
        if config.beta is not None:
            options["beta"] = config.beta
        if loss.labels and labels is not None and labels.shape == ours.shape[:-1]:
            options["labels"] = labels
        if config.standardize:
            ours, theirs = standardize(ours), standardize(theirs)
        return loss.function(ours, theirs, **options)

    def _yes_or_no(self, ours: torch.Tensor, theirs: torch.Tensor, seen: Seen) -> torch.Tensor:
        config = self.config.logits
        if config.loss == "mse":
            return mean_squared_error(ours, theirs, count=seen.counts.examples)
        if config.loss != "kl" or config.standardize:
            raise ValueError(
                f"distill.logits.loss: {config.loss}{' with standardize' * config.standardize} compares classes of which one is right; "
                "for several labels at once use kl or mse"
            )
        temperature = value_at(config.temperature, seen.progress)
        return binary_kl_divergence(ours, theirs, temperature=temperature, count=seen.counts.examples)

    def _other_vocabulary(self, ours: torch.Tensor, theirs: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Predictions over two vocabularies, from the first token of each one's answer on."""
        masks = []
        for prefix, logits in (("", ours), ("teacher_", theirs)):
            labels, attention = (seen.inputs.get(prefix + name) for name in ("labels", "attention_mask"))
            mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            if labels is not None:
                mask = labels != IGNORED
            elif attention is not None:
                mask = attention.bool()
            masks.append(mask[:, 1:] if self.shifted else mask)
        if self.shifted:
            ours, theirs = ours[:, :-1], theirs[:, :-1]
        counts = seen.counts  # of the student's own tokens: those that are compared are known batch by batch only
        count = counts.tokens if seen.inputs.get("labels") is None else counts.labels
        return universal_logit_distance(
            ours, theirs, student_mask=masks[0], teacher_mask=masks[1].to(ours.device), count=count
        )

    def _cached(self, ours: torch.Tensor, seen: Seen, targets: Targets) -> torch.Tensor:
        """Predictions against what a cache keeps in the place of logits."""
        said, config = targets.outputs, self.config.logits
        sparse = {name: value.to(ours.device) for name, value in said.items()}
        if not {"top_indices", "sample_indices"} & sparse.keys():
            raise ValueError(
                f"the teacher gives no logits (only {', '.join(said) or 'nothing'}); it needs the same kind of head as the student"
            )
        if config.loss != "kl" or value_at(config.temperature, seen.progress) != 1.0 or config.standardize:
            raise ValueError(
                "the cache keeps a part of the probabilities only, which serves distill.logits.loss: kl with temperature: 1; "
                "cache all logits or the last hidden state for others"
            )
        mask, count = self._predicted(ours, seen)
        end = -1 if self.shifted else None
        ours, sparse = ours[:, :end], {name: value[:, :end] for name, value in sparse.items()}
        if "top_indices" in sparse:
            parts = ("top_indices", "top_log_probs", "tail_log_mass", "tail_indices", "tail_mean_log_prob")
            return top_k_kl_divergence(ours, *(sparse[part] for part in parts), mask=mask, count=count)
        return sampled_kl_divergence(ours, sparse["sample_indices"], mask=mask, count=count)

    def _spans(self, seen: Seen, targets: Targets) -> torch.Tensor:
        """Question answering: where the answer starts and where it ends, mean of both; padding is no candidate."""
        if "start_logits" not in targets.outputs:
            raise ValueError("the teacher gives no spans; it needs the same kind of head as the student")
        attention, losses = seen.inputs.get("attention_mask"), []
        for name, label in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
            ours, theirs = seen.outputs[name], targets.outputs[name].to(seen.outputs[name].device)
            if attention is not None:
                padding = attention == 0
                ours, theirs = (x.float().masked_fill(padding, -1e9) for x in (ours, theirs))
            losses.append(self._diverge(ours, theirs, seen.inputs.get(label), None, seen.counts.examples, seen))
        return torch.stack(losses).mean()

    def _hidden(self, seen: Seen, targets: Targets) -> torch.Tensor:
        """Mean over the layer pairs, then over tokens that are not padding (of all image patches)."""
        if self.dynamic:
            self._note_distances(seen, targets)
        losses = [self._distance(s, t, seen, targets) for s, t in self.hidden]
        return torch.stack(losses).mean()

    def _distance(self, student: int, teacher: int, seen: Seen, targets: Targets) -> torch.Tensor:
        mine = self._project(seen.captured.hidden[student], "shared" if self.dynamic else f"{student}_{teacher}")
        target = self._of_teacher(targets.hidden[teacher]).to(mine.device)
        if mine.shape[:-1] != target.shape[:-1]:
            raise ValueError(
                f"layer {student} of the student gives {tuple(mine.shape[:-1])} tokens and layer {teacher} of the teacher "
                f"{tuple(target.shape[:-1])}; compare layers of the same length: distill.hidden.layers takes pairs"
            )
        return self._over_tokens(HIDDEN_LOSSES[self.config.hidden.loss], mine, target, student, seen)

    def _over_tokens(
        self,
        loss: Callable[..., torch.Tensor],
        mine: torch.Tensor,
        target: torch.Tensor,
        layer: int,
        seen: Seen,
        *,
        dim: int = 1,
    ) -> torch.Tensor:
        """A loss over the tokens of a layer that are not padding; `dim` is where they stand (the first is the batch)."""
        counts, items = seen.counts, mine.shape[0] * mine.shape[dim]
        if self._is_decoder(layer):
            return loss(mine, target, mask=seen.inputs["labels"] != IGNORED, count=counts.labels)
        attention = seen.inputs.get("attention_mask")
        if attention is None:
            rows = mine.shape[:-1].numel() if dim == 1 else items  # image patches may stand in a square
            return loss(mine, target, mask=None, count=counts.examples * (rows / batch_size(seen.inputs)))
        mask = attention.reshape(-1, attention.shape[-1]).bool()  # of several choices each is a row
        if mask.shape == (mine.shape[0], mine.shape[dim]):
            return loss(mine, target, mask=mask, count=counts.tokens)
        frames = self._frames(mine.shape[dim], attention)
        # Frames are counted by nobody else: the mean of each example, then over examples.
        each = [
            loss(mine[i : i + 1], target[i : i + 1], mask=frames[i : i + 1], count=frames[i].sum())
            for i in range(len(frames))
        ]
        return torch.stack(each).sum() / counts.examples

    def _frames(self, length: int, attention: torch.Tensor) -> torch.Tensor:
        """Which frames of a sound are not padding."""
        if self.frames_of is None:
            raise ValueError(
                f"hidden states have {length} places and the attention mask {attention.shape[-1]}; which of them are padding is not known "
                "for this architecture: compare logits only"
            )
        return self.frames_of(length, attention).bool()

    def _is_decoder(self, layer: int) -> bool:
        return self._student is not None and layer in self._student.decoder

    def _attentions(self, seen: Seen, targets: Targets) -> torch.Tensor:
        """Mean over the layer pairs."""
        config, losses = self.config.attentions, []
        for student, teacher in self.attentions:
            maps = [_map_of(side[number]) for side, number in self._sides(seen, targets, student, teacher)]
            if config.heads == "each" and maps[0].shape[1] != maps[1].shape[1]:
                raise ValueError(
                    f"layer {student} of the student has {maps[0].shape[1]} heads and layer {teacher} of the teacher {maps[1].shape[1]}; "
                    "set distill.attentions.heads to mean, or compare relations"
                )
            loss = partial(ATTENTION_LOSSES[config.loss], average_heads=config.heads == "mean")
            losses.append(self._over_tokens(loss, maps[0], maps[1].to(maps[0].device), student, seen, dim=2))
        return torch.stack(losses).mean()

    def _relations(self, seen: Seen, targets: Targets) -> torch.Tensor:
        """Mean over the layer pairs and over what is related."""
        config, losses = self.config.relations, []
        for student, teacher in self.relations:
            ours, theirs = (side[number] for side, number in self._sides(seen, targets, student, teacher))
            for name in config.of:
                mine, target = getattr(ours, name), getattr(theirs, name)
                heads = config.heads or _relation_heads(_width(mine), _width(target))
                loss = partial(relation_divergence, relation_heads=heads)
                losses.append(self._over_tokens(loss, mine, target.to(mine.device), student, seen, dim=2))
        return torch.stack(losses).mean()

    def _sides(self, seen: Seen, targets: Targets, student: int, teacher: int) -> tuple[Any, Any]:
        return (seen.captured.attention, student), (targets.attention, teacher)

    def _embeddings(self, seen: Seen, targets: Targets) -> torch.Tensor:
        """One vector per example (or choice)."""
        assert self._embedded is not None
        config, attention = self.config.embeddings, seen.inputs.get("attention_mask")
        pooled = []
        for outputs, hidden, number, mask in (
            (seen.outputs, seen.captured.hidden, self._embedded[0], attention),
            (targets.outputs, targets.hidden, self._embedded[1], seen.inputs.get("teacher_attention_mask", attention)),
        ):
            last = outputs.get("last_hidden_state")
            last = hidden[number] if last is None else last
            if mask is not None:
                mask = mask.reshape(-1, mask.shape[-1])
                if mask.shape[1] != last.shape[1]:
                    mask = self._frames(last.shape[1], mask)
            pooled.append(pool(last, mask, how=config.pooling))
        mine, target = self._project(pooled[0], "embeddings"), self._of_teacher(pooled[1]).to(pooled[0].device)
        options: dict[str, Any] = {"temperature": config.temperature} if config.loss == "contrastive" else {}
        count = seen.counts.examples * (len(mine) / batch_size(seen.inputs))
        return EMBEDDING_LOSSES[config.loss](mine, target, count=count, **options)

    # ---- a map that is found anew ----

    def _note_distances(self, seen: Seen, targets: Targets) -> None:
        assert self._student is not None
        with torch.no_grad():
            device = seen.captured.hidden[0].device
            distances = torch.zeros(self._student.layers[0], max(self._choices) + 1, device=device)
            for student in range(self._student.layers[0]):
                for teacher in self._choices:
                    distances[student, teacher] = self._distance(student, teacher, seen, targets)
        self.distances = distances if self.distances is None else self.distances + distances

    def match_again(self, distances: torch.Tensor) -> None:
        """Take the nearest student layers, in order, by the distances of a whole optimizer step. Changes this object.

        Args:
            distances: Shape (student layers, teacher layers); those of teacher layers that are not compared are not looked at.
        """
        self.hidden = best_match(distances, self._choices)
        self.distances = None


def shape_of(model: nn.Module) -> Shape:
    """The layers of a model, and the width between them.

    Raises:
        StructureError: The architecture is not known.
    """
    stacks = find_stacks(model, family_of(model))
    if stacks is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    names = [stack.name for stack, _, layers in stacks for _ in layers]
    both = getattr(model.config, "is_encoder_decoder", False)
    decoder = frozenset(number for number, name in enumerate(names) if both and name.startswith("decoder"))
    return Shape(tuple(len(layers) for _, _, layers in stacks), _stream_width(model), decoder)


def _stream_width(model: nn.Module) -> int:
    """Features of the hidden states between layers: the config says how many there were before the hidden width was cut."""
    try:
        return find_stream(model).width
    except StructureError:  # with adapters, or quantized
        hidden = read_hidden(model.config)
        return int(model.config.hidden_size) if hidden is None else hidden[0]  # type: ignore[union-attr, arg-type]


def pair_layers(layers: Any, *, student: Shape, teacher: Shape, key: str) -> LayerMap:
    """A layer map for models with one or several stacks: each stack of one with the same stack of the other.

    Example:
        >>> pair_layers("all", student=Shape((2, 1), 8), teacher=Shape((4, 2), 8), key="layers")
        ((0, 1), (1, 3), (2, 5))
    """
    if layers == "dynamic":
        layers = "all"
    if isinstance(layers, list) or len(student.layers) != len(teacher.layers):
        return make_map(layers, student_layers=sum(student.layers), teacher_layers=sum(teacher.layers), key=key)
    pairs: list[tuple[int, int]] = []
    ours = theirs = 0
    for mine, other in zip(student.layers, teacher.layers, strict=True):
        pairs += [
            (s + ours, t + theirs) for s, t in make_map(layers, student_layers=mine, teacher_layers=other, key=key)
        ]
        ours, theirs = ours + mine, theirs + other
    return tuple(pairs)


def _map_of(attention: AttentionInputs) -> torch.Tensor:
    mask = attention.mask
    if attention.bias is not None:
        bias = attention.bias
        mask = (
            bias if mask is None else torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
        )
    causal = attention.is_causal and attention.mask is None  # where there is a mask it says so itself
    return attention_map(
        attention.queries,
        attention.keys,
        mask=mask,
        scaling=attention.scaling,
        is_causal=causal,
        softcap=attention.softcap,
    )


def _width(vectors: torch.Tensor) -> int:
    """Features of all heads together; shape (batch, heads, length, features)."""
    return vectors.shape[1] * vectors.shape[3]


def _relation_heads(ours: int, theirs: int) -> int:
    """The largest number of relation heads that divides both widths.

    Example:
        >>> _relation_heads(384, 768), _relation_heads(224, 384)
        (12, 8)
    """
    return next(heads for heads in range(_MOST_RELATION_HEADS, 0, -1) if ours % heads == 0 and theirs % heads == 0)
