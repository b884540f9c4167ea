"""Layer maps: which student layer learns from which teacher layer. Plain pairs, counted from 0."""

from __future__ import annotations

from typing import Literal

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


def make_map(layers: Literal["all", "last"] | list[list[int]], *, student_layers: int, teacher_layers: int) -> LayerMap:
    """The layer map that a recipe asks for.

    Raises:
        ValueError: A pair names a layer that is not there.

    Example:
        >>> make_map("last", student_layers=3, teacher_layers=6)
        ((2, 5),)
    """
    pairs = uniform_map(student_layers, teacher_layers)
    if layers == "all":
        return pairs
    if layers == "last":
        return pairs[-1:]
    for student, teacher in layers:
        if not (0 <= student < student_layers and 0 <= teacher < teacher_layers):
            raise ValueError(
                f"distill.hidden.layers has [{student}, {teacher}], but the student has layers 0 to {student_layers - 1} "
                f"and the teacher 0 to {teacher_layers - 1}"
            )
    return tuple((student, teacher) for student, teacher in layers)
