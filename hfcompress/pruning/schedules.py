"""Schedules: the progress of a run in, the share of the target that is due out.

A schedule is a closure over its settings. Progress is the share of optimizer steps done, in [0, 1]; the result is the
share of the target sparsity that should be reached by then, in [0, 1]: 0 up to `start`, 1 from `end` on, never falling.
"""

from __future__ import annotations

from collections.abc import Callable

from hfcompress.config import ScheduleConfig

Schedule = Callable[[float], float]


def polynomial(*, power: float = 3.0, start: float = 0.0, end: float = 1.0) -> Schedule:
    """1 - (1 - t)^power with t the progress from start to end (Zhu and Gupta 2017, equation 1, for an initial sparsity of 0).

    Example:
        >>> schedule = polynomial(power=3, start=0.25, end=0.75)
        >>> schedule(0.25), schedule(0.5), schedule(0.75), schedule(1.0)
        (0.0, 0.875, 1.0, 1.0)
    """

    def share(progress: float) -> float:
        if progress >= end:
            return 1.0
        if progress <= start:
            return 0.0
        return 1.0 - (1.0 - (progress - start) / (end - start)) ** power

    return share


def linear(*, start: float = 0.0, end: float = 1.0) -> Schedule:
    """A straight line from 0 at start to 1 at end.

    Example:
        >>> linear(start=0.0, end=0.5)(0.25)
        0.5
    """
    return polynomial(power=1.0, start=start, end=end)


def constant(*, start: float = 0.0) -> Schedule:
    """The whole target at once, as soon as `start` is reached.

    Example:
        >>> schedule = constant(start=0.3)
        >>> schedule(0.29), schedule(0.3)
        (0.0, 1.0)
    """

    def share(progress: float) -> float:
        return 1.0 if progress >= start else 0.0

    return share


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that a recipe asks for.

    Example:
        >>> make_schedule(ScheduleConfig(name="linear", start=0.0, end=1.0))(0.5)
        0.5
    """
    if config.name == "constant":
        return constant(start=config.start)
    power = config.power if config.name == "polynomial" else 1.0
    return polynomial(power=power, start=config.start, end=config.end)


def update_steps(config: ScheduleConfig, total_steps: int) -> list[int]:
    """The optimizer steps after which the plan is renewed, ascending, each between 0 and total_steps.

    Step 0 is before the first optimizer step. The last one is where the whole target is due.

    Args:
        config: The schedule.
        total_steps: Optimizer steps of the run, at least 1.

    Example:
        >>> update_steps(ScheduleConfig(start=0.0, end=0.5, updates=5), 100)
        [10, 20, 30, 40, 50]
        >>> update_steps(ScheduleConfig(name="constant", start=0.25), 100)
        [25]
    """
    # The small number keeps 0.29 * 100 = 28.999... from losing a step.
    first, last = (int(share * total_steps + 1e-9) for share in (config.start, config.end))
    if config.name == "constant":
        return [first]
    count = min(config.updates, max(last - first, 1))
    return sorted({first + round((last - first) * (number + 1) / count) for number in range(count)})
