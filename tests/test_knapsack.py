"""Knapsacks against brute force."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.knapsack import Choice, Option, solve, solve_exactly


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0))
def test_costs_that_are_no_multiples_of_a_step(seed, share):
    """Never over the budget, and no worse than the best under a budget that is smaller by the rounding."""
    rng = np.random.default_rng(seed)
    groups = [
        [Option(n, float(loss), float(cost)) for n, (loss, cost) in enumerate(rng.random((4, 2)))] for _ in range(5)
    ]
    budget = share * sum(max(option.cost for option in group) for group in groups)
    layers = [Choice(tuple(tuple(group) for group in groups))]
    choice = solve(layers, budget)
    everything = list(itertools.product(*groups))
    fits = [c for c in everything if sum(o.cost for o in c) <= budget]
    if not fits:
        assert choice is None
        return
    assert choice is not None and choice[0] is not None
    assert sum(o.cost for o in choice[0]) <= budget * (1 + 1e-9)
    smaller = [c for c in everything if sum(o.cost for o in c) <= budget * (1 - 6 / 4096)]
    best = min((sum(o.loss for o in c) for c in smaller), default=math.inf)
    assert sum(o.loss for o in choice[0]) <= best + 1e-12


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.0, 1.1),
    groups=st.integers(1, 5),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_the_exact_search_finds_the_optimum(seed, share, groups, levels):
    """Costs and losses with ties and without, losses that do not fall with the cost, groups with one option."""
    rng = np.random.default_rng(seed)
    problem = [
        [
            Option(n, float(loss), float(cost))
            for n, (loss, cost) in enumerate(rng.integers(0, levels, (rng.integers(1, 6), 2)) / 7)
        ]
        for _ in range(groups)
    ]
    budget = share * sum(max(option.cost for option in group) for group in problem)
    fits = [c for c in itertools.product(*problem) if sum(o.cost for o in c) <= budget * (1 + 1e-12)]
    choice = solve_exactly(problem, budget)
    if not fits:
        assert choice is None
        return
    assert choice is not None and all(option in group for option, group in zip(choice, problem, strict=True))
    assert sum(o.cost for o in choice) <= budget * (1 + 1e-9)
    assert sum(o.loss for o in choice) == pytest.approx(min(sum(o.loss for o in c) for c in fits), abs=1e-9)


@pytest.mark.parametrize("swapped", [False, True], ids=["bytes", "loss"])
def test_the_exact_search_is_no_worse_than_fine_steps_and_quick(swapped):
    """210 layers with six formats each, as SmolLM2 has them; a budget of bytes, and one of loss."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([110_592, 331_776, 884_736], 210)
    groups = []
    for size in sizes:
        weight = float(np.exp(rng.normal(0, 2)))
        pairs = [
            (weight * 4.0**-bits * rng.uniform(0.7, 1.4), float(size * bits // 8 + 37)) for bits in (2, 3, 4, 5, 6, 8)
        ]
        groups.append([Option(n, *(pair[::-1] if swapped else pair)) for n, pair in enumerate(pairs)])
    budget = sum(group[3].cost for group in groups)
    start = time.perf_counter()
    exact = solve_exactly(groups, budget)
    assert time.perf_counter() - start < 20
    stepped = solve([Choice((tuple(group),)) for group in groups], budget, cells=20_000)
    assert exact is not None and stepped is not None
    found = sum(option.loss for option in exact)
    rough = sum(chosen[0].loss for chosen in stepped if chosen is not None)
    assert sum(option.cost for option in exact) <= budget * (1 + 1e-9) and len(exact) == 210
    assert found <= rough <= 1.01 * found
