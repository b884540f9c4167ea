"""Layer maps: which student layer learns from which teacher layer. Plain pairs, counted from 0."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

LayerMap = tuple[tuple[int, int], ...]


def uniform_map(student_layers: int, teacher_layers: int) -> LayerMap:
    """Each student layer with the teacher layer that ends at the same relative depth; last goes with last.

    Source: TinyBERT (Jiao et al. 2020), section 4.1, for g(m) = 3m with 4 and 12 layers.

    Example:
        >>> uniform_map(4, 12)
        ((0, 2), (1, 5), (2, 8), (3, 11))
        >>> uniform_map(2, 2)
        ((0, 0), (1, 1))
    """
    # Rounded half up in whole numbers; the first layers of a student deeper than its teacher share the teacher's first.
    ends = [(2 * (i + 1) * teacher_layers + student_layers) // (2 * student_layers) for i in range(student_layers)]
    return tuple((i, max(end, 1) - 1) for i, end in enumerate(ends))


def skip_map(student_layers: int, teacher_layers: int) -> LayerMap:
    """Each student layer but the last with every k-th teacher layer, k = teacher_layers // student_layers.

    Source: Patient Knowledge Distillation (Sun et al. 2019), PKD-Skip. The last layers are left out, as in the paper, since
    they are next to the predictions, which are compared anyway. Where k is rounded down, the teacher's upper layers stay unused.

    Raises:
        ValueError: The student has only one layer, or more than the teacher.

    Example:
        >>> skip_map(6, 12)  # the teacher's 2nd, 4th, 6th, 8th and 10th
        ((0, 1), (1, 3), (2, 5), (3, 7), (4, 9))
    """
    if not 2 <= student_layers <= teacher_layers:
        raise ValueError(
            f"layers: skip leaves the student's last layer out and takes every k-th of the teacher's, so the student needs 2 to "
            f"{teacher_layers} layers, not {student_layers}; use all or last"
        )
    every = teacher_layers // student_layers
    return tuple((i, (i + 1) * every - 1) for i in range(student_layers - 1))


def best_match(distances: torch.Tensor, teacher_layers: Sequence[int], *, ordered: bool = True) -> LayerMap:
    """Each chosen teacher layer with the student layer nearest to it, found anew from measured distances.

    Source: CoFi (Xia et al. 2022), section 3.2: m(i) = argmin over j of the distance of student layer j to teacher layer i. The order
    constraint (a deeper teacher layer never goes with a shallower student layer) is met exactly: of all matches that keep it
    this has the least sum of distances.

    Args:
        distances: Shape (student layers, teacher layers), float; inf where a student layer is not there any more.
        teacher_layers: Numbers of the chosen teacher layers.
        ordered: Whether student layers may not decrease from one chosen teacher layer to the next.

    Returns:
        (student layer, teacher layer) for each chosen one, by teacher layer; of equally near ones the shallower.

    Raises:
        ValueError: A chosen teacher layer is not there, or its distances are not numbers or all infinite.

    Example:
        >>> distances = torch.tensor([[5.0, 1.0], [2.0, 3.0], [9.0, 4.0]])
        >>> best_match(distances, (0, 1), ordered=False)
        ((1, 0), (0, 1))
        >>> best_match(distances, (0, 1))  # 2 + 3 is less than 5 + 1
        ((1, 0), (1, 1))
    """
    rows, chosen = distances.tolist(), sorted(teacher_layers)
    there = all(0 <= teacher < distances.shape[1] for teacher in chosen)
    if not there or any(row[teacher] != row[teacher] for row in rows for teacher in chosen):
        raise ValueError(
            f"teacher layers {chosen} cannot be matched: each needs distances that are numbers, and there are those of layers 0 to "
            f"{distances.shape[1] - 1}"
        )
    match = _in_order(rows, chosen) if ordered else [min(range(len(rows)), key=lambda j: rows[j][i]) for i in chosen]
    pairs = tuple(zip(match, chosen, strict=True))
    if any(rows[student][teacher] == torch.inf for student, teacher in pairs):
        raise ValueError(f"teacher layers {chosen} cannot be matched: all distances to one of them are infinite")
    return pairs


def _in_order(rows: list[list[float]], chosen: list[int]) -> list[int]:
    """For each chosen column a row, never one above the row before, with the least sum."""
    # Per column and row j: the least sum so far with any row up to j in this column, and which row that is.
    best, steps = [(0.0, 0)] * len(rows), []
    for column in chosen:
        best = list(
            accumulate(
                ((total + row[column], j) for j, ((total, _), row) in enumerate(zip(best, rows, strict=True))), min
            )
        )
        steps.append(best)
    match, last = [], len(rows) - 1
    for best in reversed(steps):
        last = best[last][1]
        match.append(last)
    return match[::-1]


def make_map(
    layers: Literal["all", "last", "skip"] | list[list[int]],
    *,
    student_layers: int,
    teacher_layers: int,
    key: str = "distill.hidden.layers",
) -> LayerMap:
    """The layer map that a recipe asks for (under `key`): `uniform_map`, its last pair, `skip_map`, or pairs of its own.

    Raises:
        ValueError: A pair names a layer that is not there, or there are no layers to skip.

    Example:
        >>> make_map("last", student_layers=3, teacher_layers=6)
        ((2, 5),)
    """
    pairs = uniform_map(student_layers, teacher_layers)
    if layers == "all":
        return pairs
    if layers == "last":
        return pairs[-1:]
    if layers == "skip":
        return skip_map(student_layers, teacher_layers)
    for student, teacher in layers:
        if not (0 <= student < student_layers and 0 <= teacher < teacher_layers):
            raise ValueError(
                f"{key} has [{student}, {teacher}], but the student has layers 0 to {student_layers - 1} "
                f"and the teacher 0 to {teacher_layers - 1}"
            )
    return tuple((student, teacher) for student, teacher in layers)
