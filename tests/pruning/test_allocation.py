"""Allocation: against brute force, and what it may never do."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.anatomy import Site
from hfcompress.config import PruneConfig
from hfcompress.pruning import BudgetError, allocate


def make_site(name, units, cost, kind="neurons"):
    """A site without a model: allocation looks at nothing else."""
    return Site(
        name=name, kind=kind, layer=0, block="", reader="", writers=(), units=units, width=1, query_heads=0,
        parameters_per_unit=cost,
    )  # fmt: skip


def make_config(*, heads=(1, 0), neurons=(1, 0), **kwargs):
    """A config from (multiple of, at least) of each kind."""
    return PruneConfig(
        multiple_of={"heads": heads[0], "neurons": neurons[0]},
        at_least={"heads": heads[1], "neurons": neurons[1]},
        **kwargs,
    )


def allowed(site, config):
    """The counts a site may be left with, straight from the definition."""
    multiple, least = getattr(config.multiple_of, site.kind), getattr(config.at_least, site.kind)
    if site.kind not in config.units:
        return {site.units}
    return {n for n in range(site.units) if n % multiple == 0 and n >= least} | {site.units}


def removed(sites, counts):
    return sum(site.parameters_per_unit * (site.units - count) for site, count in zip(sites, counts, strict=True))


def lost(sites, scores, counts):
    """The score that goes when each site keeps its best units."""
    return sum(
        float(scores[site.name].double().sort(descending=True).values[count:].sum())
        for site, count in zip(sites, counts, strict=True)
    )


def largest_chunk(sites, config):
    """The most parameters that are dropped together."""
    return max(
        site.parameters_per_unit * (upper - lower)
        for site in sites
        for lower, upper in itertools.pairwise([*sorted(allowed(site, config)), site.units])
    )


@st.composite
def problems(draw, *, tiny):
    sites = []
    for number in range(draw(st.integers(1, 3 if tiny else 6))):
        kind = draw(st.sampled_from(["heads", "neurons"]))
        sites.append(make_site(f"{number}", draw(st.integers(1, 5 if tiny else 30)), draw(st.integers(1, 9)), kind))
    pairs = st.tuples(st.integers(1, 3), st.integers(0, 2))
    config = make_config(heads=draw(pairs), neurons=draw(pairs))
    seed = draw(st.integers(0, 10**6))
    scores = {
        site.name: torch.rand(site.units, generator=torch.Generator().manual_seed(seed + number))
        * site.parameters_per_unit
        for number, site in enumerate(sites)
    }
    return sites, scores, config, draw(st.floats(0, 0.999))


def solve(sites, scores, config, sparsity, **kwargs):
    return allocate(sites, scores, {site.name: site.units for site in sites}, config, sparsity=sparsity, **kwargs)


@settings(max_examples=200, deadline=None)
@given(problem=problems(tiny=True))
def test_against_brute_force(problem):
    """Of everything allowed: the budget is met; whatever removes as much loses no less; and it is refused only if nothing does."""
    sites, scores, config, sparsity = problem
    total = removed(sites, [0] * len(sites))
    budget = sparsity * total
    everything = list(itertools.product(*(sorted(allowed(site, config)) for site in sites)))
    try:
        plan = solve(sites, scores, config, sparsity)
    except BudgetError as error:
        largest = max(removed(sites, counts) for counts in everything)
        assert largest < budget
        assert f"at most {largest / total:.3f}" in str(error)
        return
    counts = tuple(len(plan.keep[site.name]) for site in sites)
    assert counts in everything
    gone = removed(sites, counts)
    assert gone >= budget - 1e-6 * total
    # The weakest per parameter go first, so no other choice removes at least as much and loses less.
    best = min(lost(sites, scores, other) for other in everything if removed(sites, other) >= gone)
    assert lost(sites, scores, counts) <= best + 1e-6
    for site, count in zip(sites, counts, strict=True):
        weakest_kept = min((float(scores[site.name][unit]) for unit in plan.keep[site.name]), default=float("inf"))
        dropped = set(range(site.units)) - set(plan.keep[site.name])
        assert all(float(scores[site.name][unit]) <= weakest_kept for unit in dropped)
        assert plan.keep[site.name] == tuple(sorted(plan.keep[site.name])) and len(plan.keep[site.name]) == count


@settings(max_examples=200, deadline=None)
@given(problem=problems(tiny=False))
def test_the_budget_is_met_with_at_most_one_chunk_too_many(problem):
    sites, scores, config, sparsity = problem
    total = removed(sites, [0] * len(sites))
    try:
        plan = solve(sites, scores, config, sparsity)
    except BudgetError:
        floor = removed(sites, [min(allowed(site, config)) for site in sites])
        assert floor < sparsity * total
        return
    gone = removed(sites, [len(plan.keep[site.name]) for site in sites])
    assert gone >= sparsity * total - 1e-6 * total
    assert gone == 0 or gone < sparsity * total + largest_chunk(sites, config) + 1e-6
    for site in sites:
        count, kind = len(plan.keep[site.name]), site.kind
        assert count == site.units or count % getattr(config.multiple_of, kind) == 0
        assert count >= min(site.units, getattr(config.at_least, kind))


@settings(max_examples=150, deadline=None)
@given(problem=problems(tiny=False), more=st.floats(0, 0.999), scope=st.sampled_from(["global", "site"]))
def test_more_sparsity_never_brings_a_unit_back(problem, more, scope):
    sites, scores, config, sparsity = problem
    config = config.model_copy(update={"scope": scope})
    try:
        low, high = (solve(sites, scores, config, value) for value in sorted((sparsity, more)))
    except BudgetError:
        return
    assert low.keep.keys() == high.keep.keys() == {site.name for site in sites}
    assert all(set(high.keep[name]) <= set(low.keep[name]) for name in low.keep)


@settings(max_examples=150, deadline=None)
@given(problem=problems(tiny=False), value=st.sampled_from([0.0, 0.1, 1.0, 1 / 3]), double=st.booleans())
def test_ties_are_broken_the_same_way_every_time(problem, value, double):
    """Equal scores per parameter everywhere: the first units of a site stay, and still not one chunk too many goes."""
    sites, _, config, sparsity = problem
    dtype = torch.float64 if double else torch.float32
    scores = {s.name: torch.full((s.units,), value, dtype=dtype) * s.parameters_per_unit for s in sites}
    total = removed(sites, [0] * len(sites))
    try:
        plan = solve(sites, scores, config, sparsity)
    except BudgetError:
        return
    assert plan == solve(sites, {name: score.clone() for name, score in scores.items()}, config, sparsity)
    assert all(units == tuple(range(len(units))) for units in plan.keep.values())
    gone = removed(sites, [len(plan.keep[site.name]) for site in sites])
    assert gone == 0 or gone < sparsity * total + largest_chunk(sites, config) + 1e-6


def test_rounding_does_not_turn_ties_around():
    """In float64 five times 0.1 over five is a little less than 0.1: the first unit has to go before the other five all the
    same, or all six go where one is asked for."""
    scores = {"a": torch.full((6,), 0.1, dtype=torch.float64)}
    plan = solve([make_site("a", 6, 7)], scores, make_config(neurons=(5, 0)), 1 / 6)
    assert plan.keep == {"a": (0, 1, 2, 3, 4)}


def test_by_hand():
    """Two sites; per parameter the scores are 1, 2, 3, 4 and 0.5, 1.5, 2.5."""
    sites = [make_site("a", 4, 10), make_site("b", 3, 20, "heads")]
    scores = {"a": torch.tensor([10.0, 20, 30, 40]), "b": torch.tensor([10.0, 30, 50])}
    config = make_config()
    kept = {}
    for sparsity in (0.0, 0.2, 0.21, 0.31, 0.5, 0.6, 0.99):
        plan = solve(sites, scores, config, sparsity)
        kept[sparsity] = (plan.keep["a"], plan.keep["b"])
    assert kept == {
        0.0: ((0, 1, 2, 3), (0, 1, 2)),
        0.2: ((0, 1, 2, 3), (1, 2)),  # 20 of 100
        0.21: ((1, 2, 3), (1, 2)),  # 30
        0.31: ((1, 2, 3), (2,)),  # 50
        0.5: ((1, 2, 3), (2,)),
        0.6: ((2, 3), (2,)),
        0.99: ((), ()),
    }


def test_kinds_that_are_not_asked_for_stay():
    sites = [make_site("a", 4, 10), make_site("b", 4, 10, "heads")]
    scores = {"a": torch.ones(4), "b": torch.zeros(4)}
    plan = solve(sites, scores, make_config(units=["neurons"]), 0.25)
    assert plan.keep == {"a": (0, 1), "b": (0, 1, 2, 3)}
    with pytest.raises(BudgetError, match=r"0\.600 cannot be reached with units \['neurons'\].*at most 0\.500"):
        solve(sites, scores, make_config(units=["neurons"]), 0.6)


def test_a_budget_out_of_reach_names_what_is_in_reach():
    sites = [make_site("a", 16, 3), make_site("b", 4, 10, "heads")]
    scores = {"a": torch.rand(16), "b": torch.rand(4)}
    config = make_config(neurons=(8, 8), heads=(1, 1))
    # 8 neurons and 3 heads can go: 24 + 30 of 88.
    with pytest.raises(BudgetError, match=r"0\.700 .*at_least heads 1, neurons 8: at most 0\.614; ask for less"):
        solve(sites, scores, config, 0.7)
    plan = solve(sites, scores, config, 54 / 88)
    assert (len(plan.keep["a"]), len(plan.keep["b"])) == (8, 1)


@pytest.mark.parametrize("scope", ["global", "site"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad, scope):
    sites = [make_site("encoder.0.neurons", 4, 10), make_site("encoder.1.neurons", 4, 10)]
    scores = {"encoder.0.neurons": torch.rand(4), "encoder.1.neurons": torch.tensor([1.0, bad, 2.0, 3.0])}
    with pytest.raises(BudgetError, match=r"encoder\.1\.neurons: scores hold NaN or infinity"):
        solve(sites, scores, make_config(scope=scope), 0.5)


# ---- a model that was pruned before ----


def test_the_budget_counts_from_the_dense_model():
    """Of 200 parameters 60 are gone already: half of all are 40 more."""
    sites = [make_site("a", 4, 10), make_site("b", 10, 10), make_site("skipped", 0, 10)]
    scores = {"a": torch.arange(4.0) + 100, "b": torch.arange(10.0)}
    original = {"a": 5, "b": 10, "skipped": 5}
    plan = allocate(sites, scores, original, make_config(), sparsity=0.5)
    assert plan.keep == {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9), "skipped": ()}
    nothing = allocate(sites, scores, original, make_config(), sparsity=0.2)
    assert nothing.keep == {"a": (0, 1, 2, 3), "b": tuple(range(10)), "skipped": ()}


@settings(max_examples=100, deadline=None)
@given(problem=problems(tiny=False), first=st.floats(0, 0.9))
def test_two_steps_end_where_one_does(problem, first):
    """With the same scores, pruning in two steps leaves the units that one step leaves."""
    sites, scores, config, second = problem
    original = {site.name: site.units for site in sites}
    first, second = sorted((first, second))
    try:
        once = allocate(sites, scores, original, config, sparsity=second)
    except BudgetError:
        return
    half = allocate(sites, scores, original, config, sparsity=first)
    left = [make_site(s.name, len(half.keep[s.name]), s.parameters_per_unit, s.kind) for s in sites]
    left_scores = {name: scores[name][list(units)] for name, units in half.keep.items()}
    twice = allocate(left, left_scores, original, config, sparsity=second)
    assert {name: tuple(half.keep[name][unit] for unit in units) for name, units in twice.keep.items()} == once.keep


# ---- scope "site" ----


def test_every_site_gives_the_same_share():
    sites = [make_site("a", 8, 10), make_site("b", 40, 3), make_site("c", 12, 50, "heads")]
    scores = {site.name: torch.rand(site.units) for site in sites}
    plan = solve(sites, scores, make_config(scope="site"), 0.25)
    assert [len(plan.keep[site.name]) for site in sites] == [6, 30, 9]
    # Neurons are 200 of 800 parameters; a quarter of all is more than there are.
    with pytest.raises(BudgetError, match=r"\['neurons'\] would all have to go"):
        solve(sites, scores, make_config(scope="site", units=["neurons"]), 0.25)
    plan = solve(sites, scores, make_config(scope="site", units=["neurons"]), 0.125)
    assert [len(plan.keep[site.name]) for site in sites] == [4, 20, 12]


@settings(max_examples=100, deadline=None)
@given(problem=problems(tiny=False))
def test_the_same_share_as_near_as_is_allowed(problem):
    sites, scores, config, sparsity = problem
    plan = solve(sites, scores, config.model_copy(update={"scope": "site"}), sparsity)
    for site in sites:
        wanted = (1 - sparsity) * site.units
        nearest = min(abs(count - wanted) for count in allowed(site, config))
        assert len(plan.keep[site.name]) in allowed(site, config)
        assert abs(len(plan.keep[site.name]) - wanted) <= nearest + 1e-6


def test_the_same_share_of_the_dense_model():
    sites = [make_site("a", 6, 10), make_site("b", 8, 10)]
    scores = {"a": torch.rand(6), "b": torch.rand(8)}
    plan = allocate(sites, scores, {"a": 8, "b": 8}, make_config(scope="site"), sparsity=0.5)
    assert [len(plan.keep[name]) for name in "ab"] == [4, 4]


# ---- uniform ----


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(1, 4),
    units=st.integers(1, 20),
    sparsity=st.floats(0, 0.95),
    seed=st.integers(0, 10**6),
    scope=st.sampled_from(["global", "site"]),
    multiple=st.integers(1, 4),
)
def test_uniform_means_the_same_count_in_every_layer(layers, units, sparsity, seed, scope, multiple):
    sites = [make_site(f"{n}.neurons", units, 7) for n in range(layers)]
    sites += [make_site(f"{n}.heads", 4, 50, "heads") for n in range(layers)]
    generator = torch.Generator().manual_seed(seed)
    scores = {site.name: torch.rand(site.units, generator=generator) * site.parameters_per_unit for site in sites}
    config = make_config(uniform=True, scope=scope, neurons=(multiple, 0))
    plan = solve(sites, scores, config, sparsity)
    for kind in ("neurons", "heads"):
        assert len({len(kept) for name, kept in plan.keep.items() if name.endswith(kind)}) == 1
    for site in sites:  # each layer keeps its own best
        best = scores[site.name].sort(descending=True, stable=True).indices[: len(plan.keep[site.name])]
        assert plan.keep[site.name] == tuple(sorted(best.tolist()))
    if scope == "global":
        gone = removed(sites, [len(plan.keep[site.name]) for site in sites])
        total = removed(sites, [0] * len(sites))
        assert gone >= sparsity * total - 1e-6 * total
        # At most one rank of one kind in all layers is too many.
        assert gone <= sparsity * total + layers * max(7 * multiple, 7 * (units % multiple), 50) + 1e-6


def test_layers_that_differ_cannot_be_made_alike():
    sites = [make_site("0.neurons", 8, 1), make_site("1.neurons", 6, 1)]
    scores = {site.name: torch.rand(site.units) for site in sites}
    with pytest.raises(BudgetError, match=r"their neurons already differ \(\[6, 8\]\); start from an even model"):
        solve(sites, scores, make_config(uniform=True), 0.5)


@pytest.mark.parametrize("scope", ["global", "site"])
def test_only_permitted_counts(scope):
    sites = [make_site("a", 12, 1), make_site("b", 12, 1), make_site("c", 4, 3, "heads")]
    scores = {site.name: torch.rand(site.units, generator=torch.Generator().manual_seed(3)) for site in sites}
    permitted = {"neurons": {12, 8, 2}, "heads": {4}}
    config = make_config(scope=scope)
    seen = set()
    for sparsity in (0.0, 0.1, 0.2, 0.3, 0.4, {"global": 0.55, "site": 0.6}[scope]):
        plan = solve(sites, scores, config, sparsity, permitted=permitted)
        assert len(plan.keep["c"]) == 4
        seen |= {len(plan.keep["a"]), len(plan.keep["b"])}
    assert seen == {12, 8, 2}
