"""Knapsacks: of each part one of several options, so that the losses add up to the least and the costs stay within a budget. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_CELLS = 4096  # steps that the budget is divided into
_STATES = (64, 2**18)  # of the exact search: those of the first try, and most there may be


@dataclass(frozen=True)
class Option:
    """One of several ways, of which one is taken.

    Attributes:
        value: What it stands for, such as a number of units or the name of a format.
        loss: What it makes worse.
        cost: In the quantity of the budget.
    """

    value: Any
    loss: float
    cost: float


@dataclass(frozen=True)
class Choice:
    """What is decided about one part, such as a layer: an option of each group, or, where that is allowed, to leave all of it out.

    Attributes:
        groups: For each group its options.
        fixed: What the part costs besides.
        loss_without: What it makes worse to leave the whole part out, which costs nothing; None if it has to stay.
    """

    groups: tuple[tuple[Option, ...], ...]
    fixed: float = 0.0
    loss_without: float | None = None


def least_cost(part: Choice) -> float:
    """What a part costs at least."""
    if part.loss_without is not None:
        return 0.0
    return part.fixed + sum(min(option.cost for option in group) for group in part.groups)


def solve(parts: Sequence[Choice], budget: float, *, cells: int = _CELLS) -> list[list[Option] | None] | None:
    """The choices with the least total loss whose total cost is at most the budget, by dynamic programming.

    Exact where all costs are whole multiples of something of which the budget has at most `cells`. Elsewhere costs are rounded to
    that many steps, so the result is the optimum of a problem whose costs differ from the true ones by half a step
    each. What is returned never exceeds the budget.

    Args:
        parts: What can be chosen.
        budget: Of the sum of all costs.
        cells: Resolution.

    Returns:
        For each part one option per group, or None where the part goes; None if there is no choice within the budget.

    Example:
        >>> group = (Option(2, 0.0, 2.0), Option(1, 1.0, 1.0), Option(0, 5.0, 0.0))
        >>> [[option.value for option in chosen] for chosen in solve([Choice((group,)), Choice((group, group))], 4.0)]
        [[1], [1, 2]]
    """
    least = sum(least_cost(part) for part in parts)
    if least > budget * (1 + 1e-9) + 1e-12:
        return None
    step = _common_divisor(parts)
    if step and budget / step <= cells:
        return _solve_rounded(parts, step, math.floor(budget / step * (1 + 1e-9)))
    allowance = budget
    for _ in range(8):
        choice = _solve_rounded(parts, allowance / cells if allowance > 0 else 1.0, cells)
        if choice is None:
            break
        over = _cost_of(parts, choice) - budget
        if over <= 1e-9 * max(1.0, abs(budget)):
            return choice
        allowance -= max(over, budget / cells)
    # Rounding leaves nothing: take the cheapest of everything.
    return [
        None
        if part.loss_without is not None
        else [min(group, key=lambda option: (option.cost, option.loss)) for group in part.groups]
        for part in parts
    ]


def _cost_of(parts: Sequence[Choice], choice: Sequence[list[Option] | None]) -> float:
    return sum(
        part.fixed + sum(option.cost for option in chosen)
        for part, chosen in zip(parts, choice, strict=True)
        if chosen is not None
    )


def _common_divisor(parts: Sequence[Choice]) -> int:
    """The greatest common divisor of all costs; 0 if they are no whole numbers."""
    costs = [part.fixed for part in parts]
    costs += [option.cost for part in parts for group in part.groups for option in group]
    if any(cost != int(cost) for cost in costs):
        return 0
    return math.gcd(*(int(cost) for cost in costs))


def _solve_rounded(parts: Sequence[Choice], step: float, cells: int) -> list[list[Option] | None] | None:
    def rounded(cost: float) -> int:
        return max(0, round(cost / step))

    best = np.zeros(cells + 1)  # best[c]: least loss of the parts so far with a cost of at most c steps
    trail: list[tuple[np.ndarray | None, list[np.ndarray]]] = []
    for part in parts:
        before = best
        best = _shifted(before, rounded(part.fixed))
        picks = []
        for group in part.groups:
            fresh = np.full(cells + 1, np.inf)
            pick = np.zeros(cells + 1, dtype=np.int32)
            for number, option in enumerate(group):
                cost = rounded(option.cost)
                if cost > cells:
                    continue
                candidate = best[: cells + 1 - cost] + option.loss
                better = candidate < fresh[cost:]
                fresh[cost:][better] = candidate[better]
                pick[cost:][better] = number
            best = fresh
            picks.append(pick)
        gone = None
        if part.loss_without is not None:
            gone = before + part.loss_without <= best
            best = np.where(gone, before + part.loss_without, best)
        trail.append((gone, picks))
    if not math.isfinite(best[cells]):
        return None
    place = cells
    choice: list[list[Option] | None] = []
    for part, (gone, picks) in zip(reversed(parts), reversed(trail), strict=True):
        if gone is not None and gone[place]:
            choice.append(None)
            continue
        chosen: list[Option] = []
        for group, pick in zip(reversed(part.groups), reversed(picks), strict=True):
            option = group[pick[place]]
            place -= rounded(option.cost)
            chosen.append(option)
        place -= rounded(part.fixed)
        choice.append(list(reversed(chosen)))
    return list(reversed(choice))


def _shifted(values: np.ndarray, by: int) -> np.ndarray:
    if by == 0:
        return values.copy()
    moved = np.full_like(values, np.inf)
    if by < len(values):
        moved[by:] = values[:-by]
    return moved


def solve_exactly(groups: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """One option of each group, with the least total loss whose total cost is at most the budget: the optimum, for any costs.

    All choices for the first groups that could still be the best are carried on: those that no other beats in both loss and cost, and
    whose loss and the least that the other groups can add (their linear relaxation: Sinha and Zoltners 1979) stay below a choice
    that is known. With convex losses there are few. Where there are more than a quarter of a million the most promising are
    kept, and the optimum is no longer proved.

    Args:
        groups: The options of each; losses and costs are finite.
        budget: Of the sum of all costs.

    Returns:
        An option of each group; None if the budget is less than the cheapest cost.

    Example:
        >>> group = (Option(2, 0.0, 2.5), Option(1, 1.0, 1.25), Option(0, 5.0, 0.0))
        >>> sorted(option.value for option in solve_exactly([group, group, group], 6.3))
        [1, 2, 2]
    """
    tails = [(np.zeros(1), np.zeros(1))]  # of the groups that follow: costs, and the least loss that each allows
    for group in reversed(groups):
        tails.append(_joined(tails[-1], _hull(group)))
    tails.reverse()
    allowed = budget * (1 + 1e-12) if budget > 0 else budget
    found: list[Option] | None = None
    for most in _STATES:
        known = math.inf if found is None else sum(option.loss for option in found)
        found = _search(groups, tails[1:], allowed, known, most) or found
    return found


_Polyline = tuple[np.ndarray, np.ndarray]


def _search(
    groups: Sequence[Sequence[Option]], tails: Sequence[_Polyline], budget: float, known: float, most: int
) -> list[Option] | None:
    """The best choice that is better than the one that is known, keeping the `most` most promising of each step."""
    cost, loss = np.zeros(1), np.zeros(1)
    trail = []
    for group, (tail_cost, tail_loss) in zip(groups, tails, strict=True):
        costs = np.add.outer(cost, [option.cost for option in group]).ravel()
        losses = np.add.outer(loss, [option.loss for option in group]).ravel()
        bound = losses + np.interp(budget - costs, tail_cost, tail_loss, left=np.inf)
        kept = np.flatnonzero(bound < known)
        kept = kept[np.lexsort((losses[kept], costs[kept]))]
        least = np.minimum.accumulate(np.concatenate([[np.inf], losses[kept]]))
        kept = kept[losses[kept] < least[:-1]]
        if len(kept) > most:
            kept = kept[np.argpartition(bound[kept], most)[:most]]
        trail.append(kept)
        cost, loss = costs[kept], losses[kept]
    if not len(loss):
        return None
    place, choice = int(loss.argmin()), []
    for group, kept in zip(reversed(groups), reversed(trail), strict=True):
        place, number = divmod(int(kept[place]), len(group))
        choice.append(group[number])
    return choice[::-1]


def _hull(group: Sequence[Option]) -> _Polyline:
    """Costs rising and losses falling: the corners of the largest convex function below all options."""
    points: list[tuple[float, float]] = []
    for cost, loss in sorted((option.cost, option.loss) for option in group):
        if points and loss >= points[-1][1]:
            continue
        while len(points) > 1 and _above(points[-2], points[-1], (cost, loss)):
            points.pop()
        points.append((cost, loss))
    costs, losses = zip(*points, strict=True)
    return np.array(costs), np.array(losses)


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether a point is on or above the line between its neighbours."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])


def _joined(one: _Polyline, other: _Polyline) -> _Polyline:
    """The convex function of both together: their pieces, the steepest first."""
    widths, drops = (np.concatenate([np.diff(one[axis]), np.diff(other[axis])]) for axis in (0, 1))
    order = np.argsort(drops / widths, kind="stable")
    starts = [one[axis][:1] + other[axis][:1] for axis in (0, 1)]
    return (
        np.concatenate([starts[0], starts[0] + widths[order].cumsum()]),
        np.concatenate([starts[1], starts[1] + drops[order].cumsum()]),
    )
