"""Schedules: from 0 to exactly 1, never falling, and the steps at which they are followed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.config import ScheduleConfig
from hfcompress.pruning.schedules import constant, linear, make_schedule, polynomial, update_steps

share = st.floats(0, 1, allow_subnormal=False)


@st.composite
def configs(draw):
    start, end = sorted((draw(share), draw(share)))
    return ScheduleConfig(
        name=draw(st.sampled_from(["polynomial", "linear", "constant"])) if start < end < 1 else "constant",
        power=draw(st.floats(0.01, 100)),
        start=min(start, 0.999),
        end=max(end, 1e-9),
        updates=draw(st.integers(1, 200)),
    )


@pytest.mark.parametrize(
    ("progress", "expected"),
    # 1 - (1 - t)^3 for t = 0, 1/4, 1/2, 3/4, 1, by hand
    [(0.0, 0.0), (0.2, 0.0), (0.3, 37 / 64), (0.4, 56 / 64), (0.5, 63 / 64), (0.6, 1.0), (0.61, 1.0), (1.0, 1.0)],
)
def test_the_default_by_hand(progress, expected):
    schedule = make_schedule(ScheduleConfig(start=0.2, end=0.6))
    assert schedule(progress) == pytest.approx(expected, abs=1e-12)


def test_linear_and_constant_by_hand():
    straight = make_schedule(ScheduleConfig(name="linear", start=0.25, end=0.75, power=7.0))
    assert [straight(x / 8) for x in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    at_once = make_schedule(ScheduleConfig(name="constant", start=0.5, end=0.1))
    assert [at_once(x / 8) for x in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert polynomial(power=2, start=0.0, end=1.0)(0.5) == 0.75
    assert linear()(0.3) == pytest.approx(0.3)
    assert constant()(0.0) == 1.0


@settings(max_examples=300, deadline=None)
@given(config=configs(), points=st.lists(share, min_size=2, max_size=20))
def test_from_zero_to_exactly_one_and_never_falling(config, points):
    schedule = make_schedule(config)
    values = [schedule(point) for point in sorted(points)]
    assert all(0 <= value <= 1 for value in values)
    assert values == sorted(values)
    assert schedule(1.0) == 1.0
    if config.name == "constant":
        assert schedule(config.start) == 1.0
        assert config.start == 0 or schedule(config.start / 2) == 0.0
    else:
        assert schedule(config.start) == 0.0 == schedule(0.0)
        assert schedule(config.end) == 1.0


@settings(max_examples=300, deadline=None)
@given(config=configs(), total=st.integers(1, 5000))
def test_update_steps(config, total):
    steps = update_steps(config, total)
    assert steps == sorted(set(steps)) and all(type(step) is int for step in steps)
    assert 1 <= len(steps) <= config.updates
    assert steps[0] >= 0 and steps[-1] <= total
    if config.name == "constant":
        assert steps == [steps[0]]
        assert -1 < steps[0] - config.start * total < 1e-6
    else:
        assert -1 < steps[-1] - config.end * total < 1e-6
        assert steps[0] >= int(config.start * total)


@pytest.mark.parametrize(
    ("settings_", "total", "expected"),
    [
        ({"start": 0.0, "end": 1.0, "updates": 4}, 8, [2, 4, 6, 8]),
        ({"start": 0.5, "end": 1.0, "updates": 4}, 8, [5, 6, 7, 8]),
        ({"start": 0.5, "end": 1.0, "updates": 100}, 8, [5, 6, 7, 8]),
        ({"start": 0.0, "end": 1.0, "updates": 1}, 8, [8]),
        ({"start": 0.0, "end": 0.29, "updates": 1}, 100, [29]),  # 0.29 * 100 is 28.999999999999996
        ({"start": 0.1, "end": 0.6, "updates": 20}, 1, [0]),
        ({"name": "constant", "start": 0.0}, 50, [0]),
        ({"name": "constant", "start": 0.29}, 100, [29]),
    ],
)
def test_update_steps_by_hand(settings_, total, expected):
    assert update_steps(ScheduleConfig(**settings_), total) == expected
