"""All losses between a student and a teacher, each with its definition written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from hfcompress.distillation import (
    attention_kl,
    attention_mse,
    binary_kl_divergence,
    contrastive,
    correlation_distance,
    cosine_distance,
    decoupled_divergence,
    hard_label_cross_entropy,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    patient_error,
    relation_divergence,
    reverse_kl_divergence,
    similarity_preserving,
    standardize,
    total_variation,
    universal_logit_distance,
)

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """A loss, and what is to be expected of it.

    `items` is how many leading dimensions the mask has; `expected` gives one value per item of (student, teacher, mask) in
    float64. Losses `by_item` work block by block. `at_equality` is the value there, if it is one.
    """

    loss: Callable[..., torch.Tensor]
    expected: Callable[[Array, Array, Array], Array]
    shape: tuple[int, ...] = (6, 4, 5)
    items: int = 2
    itemwise: bool = True
    by_item: bool = True
    at_equality: float | None = 0.0
    maps: bool = False
    garbage: float = float("nan")

    def tensors(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        pair = (2 * torch.randn(*self.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        student, teacher = (x.softmax(-1) if self.maps else x for x in pair)
        return student.to(dtype), teacher.to(dtype)

    def mask(self) -> torch.Tensor:
        """About half, and nothing of the last two examples."""
        shape = self.shape[: self.items] if not self.maps else (self.shape[0], self.shape[-1])
        mask = torch.arange(int(np.prod(shape))).view(shape) * 5 % 7 > 2
        if self.items > 1:
            mask[-2:] = False
        return mask

    def spoil(self, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The same with rubbish wherever nothing counts."""
        if self.maps:
            return tensor.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), self.garbage)
        return tensor.masked_fill(~mask.unsqueeze(-1), self.garbage)

    def expected_mean(self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> float:
        arrays = (x.detach().double().numpy() for x in (student, teacher))
        return float(self.expected(*arrays, mask.numpy())[mask.numpy()].mean())


# ---- the definitions ----


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: Array, q: Array) -> Array:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum(-1)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def np_kl(s: Array, t: Array, _m: Array) -> Array:
    return 4 * kl(softmax(t / 2), softmax(s / 2))


def np_reverse(s: Array, t: Array, _m: Array) -> Array:
    return 4 * kl(softmax(s / 2), softmax(t / 2))


def np_jensen(s: Array, t: Array, _m: Array) -> Array:
    p, q = softmax(t / 2), softmax(s / 2)
    m = 0.3 * p + 0.7 * q
    return 4 * (0.3 * kl(p, m) + 0.7 * kl(q, m))


def np_variation(s: Array, t: Array, _m: Array) -> Array:
    return np.maximum(softmax(s) - softmax(t), 0).sum(-1)  # what one has more is what the other has less


def np_binary(s: Array, t: Array, _m: Array) -> Array:
    p, q = (1 / (1 + np.exp(-x / 2)) for x in (t, s))
    return 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(-1)


def np_hard(s: Array, t: Array, _m: Array) -> Array:
    return -np.log(np.take_along_axis(softmax(s), t.argmax(-1)[..., None], -1))[..., 0]


def np_decoupled(s: Array, t: Array, _m: Array, *, labels: Array | None = None) -> Array:
    target = t.argmax(-1) if labels is None else labels
    values = np.zeros(t.shape[:-1])
    for place in np.ndindex(*t.shape[:-1]):
        p, q, c = softmax(t[place] / 2), softmax(s[place] / 2), target[place]
        rest = [i for i in range(len(p)) if i != c]
        tckd = kl(np.array([p[c], 1 - p[c]]), np.array([q[c], 1 - q[c]]))
        nckd = kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
        values[place] = 4 * (0.5 * tckd + 3 * nckd)
    return values


def np_dist(s: Array, t: Array, m: Array) -> Array:
    p, q = softmax(t / 2)[m], softmax(s / 2)[m]
    intra = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(p.shape[1])])
    values = np.zeros(m.shape)
    values[m] = [4 * (2 * (1 - np.corrcoef(a, b)[0, 1]) + 3 * intra) for a, b in zip(p, q, strict=True)]
    return values


def np_standardized(s: Array, t: Array, m: Array) -> Array:
    z = [(x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (s, t)]
    return np_kl(*z, m)


def np_universal(s: Array, t: Array, m: Array) -> Array:
    return np.abs(np.sort(softmax(s), -1) - np.sort(softmax(t), -1)).sum(-1)


def np_similarity(s: Array, t: Array, m: Array) -> Array:
    gs, gt = (unit(x[m] @ x[m].T) for x in (s, t))
    return np.full(m.shape, ((gs - gt) ** 2).mean())


def np_contrastive(s: Array, t: Array, m: Array) -> Array:
    values = np.zeros(m.shape)
    values[m] = -np.log(np.diag(softmax(unit(s[m]) @ unit(t[m]).T / 0.5)))
    return values


def np_attention(s: Array, t: Array, m: Array, *, by: str) -> Array:
    values = np.zeros(m.shape)
    for b, i in zip(*np.nonzero(m), strict=True):
        p, q = t[b, :, i][:, m[b]], s[b, :, i][:, m[b]]
        values[b, i] = (((p - q) ** 2).mean(-1) if by == "mse" else kl(p, q)).mean()
    return values


def np_relation(s: Array, t: Array, m: Array) -> Array:
    values = np.zeros(m.shape)
    for b in np.flatnonzero(m.any(-1)):
        for head in range(2):
            maps = []
            for x in (t, s):
                a = np.split(x[b][m[b]], 2, axis=-1)[head]
                maps.append(softmax(a @ a.T / np.sqrt(a.shape[-1])))
            values[b, m[b]] += kl(*maps) / 2
    return values


# ---- the table ----


def standardized_kl(student: torch.Tensor, teacher: torch.Tensor, **options) -> torch.Tensor:
    return kl_divergence(standardize(student), standardize(teacher), temperature=2.0, **options)


def universal(student: torch.Tensor, teacher: torch.Tensor, *, mask=None, count=None) -> torch.Tensor:
    return universal_logit_distance(student, teacher, student_mask=mask, teacher_mask=mask, count=count)


CASES: dict[str, Case] = {
    "kl": Case(partial(kl_divergence, temperature=2.0), np_kl),
    "reverse_kl": Case(partial(reverse_kl_divergence, temperature=2.0), np_reverse),
    "jensen_shannon": Case(partial(jensen_shannon_divergence, beta=0.3, temperature=2.0), np_jensen),
    "total_variation": Case(total_variation, np_variation),
    "binary": Case(partial(binary_kl_divergence, temperature=2.0), np_binary),
    "hard_label": Case(hard_label_cross_entropy, np_hard, at_equality=None),
    "decoupled": Case(partial(decoupled_divergence, alpha=0.5, beta=3.0, temperature=2.0), np_decoupled),
    "dist": Case(
        partial(correlation_distance, beta=2.0, gamma=3.0, temperature=2.0), np_dist, itemwise=False, by_item=False
    ),
    "standardized": Case(standardized_kl, np_standardized, garbage=1e30),
    "universal": Case(universal, np_universal),
    "mse": Case(mean_squared_error, lambda s, t, _m: ((s - t) ** 2).mean(-1)),
    "cosine": Case(cosine_distance, lambda s, t, _m: 1 - (unit(s) * unit(t)).sum(-1)),
    "patient": Case(patient_error, lambda s, t, _m: ((unit(s) - unit(t)) ** 2).mean(-1)),
    "similarity": Case(similarity_preserving, np_similarity, shape=(9, 5), items=1, itemwise=False, by_item=False),
    "contrastive": Case(
        partial(contrastive, temperature=0.5),
        np_contrastive,
        shape=(9, 5),
        items=1,
        itemwise=False,
        by_item=False,
        at_equality=None,
    ),
    "attention_mse": Case(attention_mse, partial(np_attention, by="mse"), shape=(6, 3, 5, 5), by_item=False, maps=True),
    "attention_kl": Case(
        attention_kl, partial(np_attention, by="kl"), shape=(6, 3, 5, 5), by_item=False, at_equality=0.0, maps=True
    ),
    "relation": Case(partial(relation_divergence, relation_heads=2), np_relation, shape=(6, 5, 8), by_item=False),
}
