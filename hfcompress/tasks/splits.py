"""Choosing rows: holding some out for evaluation, and taking a random part."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from hfcompress.tasks.errors import DataError


def hold_out(
    size: int, *, share: float, seed: int, classes: Sequence[Hashable] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split row numbers at random into training and evaluation rows.

    Args:
        size: Number of rows.
        share: Share of the rows to evaluate on, in (0, 1).
        seed: Of the random choice.
        classes: Class of each row. With it every class gives its share, up to rounding (largest remainders),
            and keeps at least one row to train on.

    Returns:
        Row numbers to train on and row numbers to evaluate on, both sorted.

    Raises:
        DataError: There are too few rows.

    Example:
        >>> train, held = hold_out(8, share=0.5, seed=0, classes=list("aaaaaabb"))
        >>> len(train), int((held < 6).sum()), int((held >= 6).sum())
        (4, 3, 1)
    """
    if size < 2:
        raise DataError(f"data: {size} row is too few to hold some out for evaluation; give data.eval")
    rng = np.random.default_rng([seed, 0])
    total = min(max(1, round(share * size)), size - 1)
    if classes is None:
        held = rng.permutation(size)[:total]
    else:
        names, member, counts = np.unique(
            np.asarray([str(c) for c in classes]), return_inverse=True, return_counts=True
        )
        parts = _shares(counts, total)
        rows = [rng.permutation(np.flatnonzero(member == i))[: parts[i]] for i in range(len(names))]
        held = np.concatenate(rows)
        if len(held) == 0:
            raise DataError("data: every class has a single row, so none can be held out; give data.eval")
    held = np.sort(held)
    return np.setdiff1d(np.arange(size), held), held


def _shares(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """How many rows each class gives so that they sum to `total`, or to fewer where classes have single rows."""
    exact = counts * total / counts.sum()
    parts = np.floor(exact).astype(np.int64)  # below counts, as total is below their sum
    for i in np.argsort(parts - exact, kind="stable"):
        if parts.sum() < total and parts[i] < counts[i] - 1:
            parts[i] += 1
    return parts


def take(size: int, *, limit: int | None, seed: int, stream: int) -> NDArray[np.int64] | None:
    """Choose `limit` of `size` row numbers at random.

    Args:
        size: Number of rows.
        limit: Number of rows to take, or None for all.
        seed: Of the random choice.
        stream: Tells apart choices made with the same seed.

    Returns:
        The row numbers, sorted; None if all rows stay.

    Example:
        >>> len(take(100, limit=7, seed=0, stream=1)), take(5, limit=7, seed=0, stream=1)
        (7, None)
    """
    if limit is None or limit >= size:
        return None
    return np.sort(np.random.default_rng([seed, stream]).choice(size, limit, replace=False))
