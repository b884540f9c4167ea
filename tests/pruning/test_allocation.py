"""Allocation: against brute force, and what it may never do."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.anatomy import Site
from hfcompress.config import PruneConfig
from hfcompress.measurement.costs import Costs
from hfcompress.pruning import BudgetError, Curve, allocate
from hfcompress.pruning.allocation import counts_allowed


def make_site(name, units, cost, kind="neurons"):
    """A site without a model: allocation looks at nothing else."""
    return Site(
        name=name, kind=kind, stack="", layer=0, blocks=("",), readers=("",), writers=(), units=units, width=1, hidden=1,
        query_heads=0, parameters_per_unit=cost,
    )  # fmt: skip


def make_config(*, heads=(1, 0), neurons=(1, 0), **kwargs):
    """A config from (multiple of, at least) of each kind."""
    return PruneConfig(
        multiple_of={"heads": heads[0], "neurons": neurons[0]},
        at_least={"heads": heads[1], "neurons": neurons[1]},
        **kwargs,
    )


def make_costs(sites, *, fixed=0.0, rest=0.0, units=None):
    layers = dict.fromkeys([site.name.rpartition(".")[0] for site in sites], float(fixed))
    counts = units or {site.name: site.units for site in sites}
    arrays = {site.name: np.arange(counts[site.name] + 1) * float(site.parameters_per_unit) for site in sites}
    return Costs(quantity="parameters", rest=rest, fixed=layers, sites=arrays)


def allowed(site, config):
    """The counts a site may be left with, straight from the definition."""
    multiple, least = getattr(config.multiple_of, site.kind), getattr(config.at_least, site.kind)
    counts = {site.units} | ({0} if "sublayers" in config.units else set())
    if site.kind in config.units:
        counts |= {n for n in range(site.units) if n % multiple == 0 and n >= least}
    return counts


def run(sites, curves, costs, budget, config, **kwargs):
    kwargs.setdefault("original", {site.name: site.units for site in sites})
    return allocate(sites, curves, costs, budget, config, **kwargs)


def draw_curves(sites, seed):
    """Random curves, not convex."""
    curves = {}
    for number, site in enumerate(sites):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        steps = torch.rand(site.units, generator=generator, dtype=torch.float64) ** 3
        loss = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        curves[site.name] = Curve(torch.randperm(site.units, generator=generator), loss)
    return curves


def lost(sites, curves, counts):
    return sum(float(curves[s.name].loss[s.units - c]) for s, c in zip(sites, counts, strict=True))


@st.composite
def problems(draw, *, tiny=True):
    sites = []
    for number in range(draw(st.integers(1, 4 if tiny else 6))):
        kind = draw(st.sampled_from(["heads", "neurons"]))
        name = f"encoder.{number // 2}.{kind}{number}"
        sites.append(make_site(name, draw(st.integers(1, 5 if tiny else 30)), draw(st.integers(1, 9)), kind))
    pairs = st.tuples(st.integers(1, 3), st.integers(0, 2))
    units = draw(st.sampled_from([["heads", "neurons"], ["heads", "neurons", "sublayers"], ["neurons"], ["sublayers"]]))
    config = make_config(heads=draw(pairs), neurons=draw(pairs), units=units)
    return sites, draw_curves(sites, draw(st.integers(0, 10**6))), config, draw(st.floats(0.001, 1.0))


@settings(max_examples=250, deadline=None)
@given(problem=problems())
def test_against_brute_force(problem):
    """Whole numbers of parameters are multiples of a step, so the plan is the best of everything allowed under the budget."""
    sites, curves, config, share = problem
    costs = make_costs(sites)
    budget = float(math.ceil(share * costs.total({s.name: s.units for s in sites})))
    everything = list(itertools.product(*(sorted(allowed(site, config)) for site in sites)))
    affordable = [c for c in everything if costs.total(dict(zip([s.name for s in sites], c, strict=True))) <= budget]
    if not affordable:
        with pytest.raises(BudgetError, match="cannot be reached with units"):
            run(sites, curves, costs, budget, config)
        return
    plan = run(sites, curves, costs, budget, config)
    counts = tuple(len(plan.keep[site.name]) for site in sites)
    assert counts in affordable
    assert lost(sites, curves, counts) == pytest.approx(min(lost(sites, curves, c) for c in affordable), abs=1e-12)
    for site, count in zip(sites, counts, strict=True):
        assert plan.keep[site.name] == tuple(sorted(curves[site.name].order[site.units - count :].tolist()))


@settings(max_examples=150, deadline=None)
@given(problem=problems(), fixed=st.integers(0, 30), rest=st.integers(0, 20), seed=st.integers(0, 10**6))
def test_whole_layers_against_brute_force(problem, fixed, rest, seed):
    sites, curves, config, share = problem
    config = config.model_copy(update={"units": [*config.units, "layers"]})
    names = list(dict.fromkeys(site.name.rpartition(".")[0] for site in sites))
    costs = make_costs(sites, fixed=fixed, rest=float(rest))
    losses = {
        name: float(value) for name, value in zip(names, np.random.default_rng(seed).random(len(names)), strict=True)
    }
    budget = float(math.ceil(share * costs.total({s.name: s.units for s in sites})))
    must_stay = max(names, key=losses.get)  # one layer of a stack always stays
    best = math.inf
    for gone in itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names))):
        if must_stay in gone:
            continue
        left = [site for site in sites if site.name.rpartition(".")[0] not in gone]
        for counts in itertools.product(*(sorted(allowed(site, config)) for site in left)):
            units = dict(zip([s.name for s in left], counts, strict=True))
            if costs.total(units, layers=set(names) - set(gone)) <= budget:
                best = min(best, lost(left, curves, counts) + sum(losses[name] for name in gone))
    if math.isinf(best):
        with pytest.raises(BudgetError):
            run(sites, curves, costs, budget, config, layer_losses=losses)
        return
    plan = run(sites, curves, costs, budget, config, layer_losses=losses)
    left = [site for site in sites if site.name in plan.keep]
    kept = {f"encoder.{number}" for number in plan.layers.get("encoder", range(len(names)))}
    assert kept == {site.name.rpartition(".")[0] for site in left} and must_stay in kept
    counts = [len(plan.keep[site.name]) for site in left]
    assert costs.total({s.name: c for s, c in zip(left, counts, strict=True)}, layers=kept) <= budget
    found = lost(left, curves, counts) + sum(losses[name] for name in set(names) - kept)
    assert found == pytest.approx(best, abs=1e-12)


def test_a_model_of_32_layers_takes_a_moment():
    """No timing to pass or fail on but a runaway: 64 sites with up to 11,008 units."""
    sites = []
    for number in range(32):
        sites += [
            make_site(f"decoder.{number}.heads", 32, 67_000, "heads"),
            make_site(f"decoder.{number}.neurons", 11_008, 12),
        ]
    curves, costs = draw_curves(sites, 1), make_costs(sites)
    budget = 0.5 * costs.total({s.name: s.units for s in sites})
    start = time.perf_counter()
    plan = run(sites, curves, costs, budget, make_config(neurons=(64, 64), heads=(1, 1)))
    assert time.perf_counter() - start < 20
    spent = costs.total({name: len(units) for name, units in plan.keep.items()})
    assert 0.99 * budget < spent <= budget


def test_by_hand():
    """Two sites; removing costs 1, 2, 3, 4 per 10 parameters and 1, 3, 5 per 20."""
    sites = [make_site("e.0.a", 4, 10), make_site("e.0.b", 3, 20, "heads")]
    curves = {
        "e.0.a": Curve.from_scores(torch.tensor([1.0, 2, 3, 4])),
        "e.0.b": Curve.from_scores(torch.tensor([1.0, 3, 5])),
    }
    lost = {}
    for budget in (100, 90, 80, 70, 50, 40, 0):
        keep = run(sites, curves, make_costs(sites), budget, make_config()).keep
        assert 10 * len(keep["e.0.a"]) + 20 * len(keep["e.0.b"]) <= budget
        lost[budget] = sum(float(curves[s.name].loss[s.units - len(keep[s.name])]) for s in sites)
    # 1 neuron or 1 head; 1 head; both; 2 heads and 1 neuron (not 3 neurons and 1 head: 7); 2 heads and 2 neurons; everything.
    assert lost == {100: 0, 90: 1, 80: 1, 70: 2, 50: 5, 40: 7, 0: 19}


def test_kinds_that_are_not_asked_for_stay():
    sites = [make_site("e.0.a", 4, 10), make_site("e.0.b", 4, 10, "heads")]
    curves = {"e.0.a": Curve.from_scores(torch.ones(4)), "e.0.b": Curve.from_scores(torch.zeros(4))}
    config = make_config(units=["neurons"])
    assert run(sites, curves, make_costs(sites), 60, config).keep == {"e.0.a": (2, 3), "e.0.b": (0, 1, 2, 3)}
    with pytest.raises(
        BudgetError, match=r"39 parameters cannot be reached with units \['neurons'\].*at least 40 stay"
    ):
        run(sites, curves, make_costs(sites), 39, config)


def test_sublayers_alone_go_whole():
    sites = [make_site(f"e.{n}.a", 4, 10) for n in range(3)]
    curves = {s.name: Curve.from_scores(torch.ones(4) * (n + 1)) for n, s in enumerate(sites)}
    plan = run(sites, curves, make_costs(sites), 100, make_config(units=["sublayers"], neurons=(1, 2)))
    assert {name: len(units) for name, units in plan.keep.items()} == {"e.0.a": 0, "e.1.a": 4, "e.2.a": 4}


def test_what_is_gone_stays_gone():
    sites = [make_site("e.0.a", 4, 10), make_site("e.1.a", 0, 10)]
    curves = {"e.0.a": Curve.from_scores(torch.arange(4.0))}
    costs = make_costs(sites, units={"e.0.a": 8, "e.1.a": 8})
    plan = run(sites, curves, costs, 30, make_config(), original={"e.0.a": 8, "e.1.a": 8})
    assert plan.keep == {"e.0.a": (1, 2, 3), "e.1.a": ()}


# ---- scope "site" ----


def test_every_site_gives_the_same_share():
    sites = [make_site("e.0.a", 8, 10), make_site("e.1.a", 40, 3), make_site("e.2.b", 12, 50, "heads")]
    curves = draw_curves(sites, 3)
    plan = run(sites, curves, make_costs(sites), 600, make_config(scope="site"))
    assert [len(plan.keep[site.name]) for site in sites] == [6, 30, 9]
    with pytest.raises(BudgetError, match=r"same share of \['neurons'\] everywhere: at least 600 stay"):
        run(sites, curves, make_costs(sites), 599, make_config(scope="site", units=["neurons"]))


@settings(max_examples=100, deadline=None)
@given(problem=problems(tiny=False))
def test_the_same_share_is_the_largest_that_fits(problem):
    sites, curves, config, share = problem
    config = config.model_copy(update={"scope": "site", "units": ["heads", "neurons"]})
    costs = make_costs(sites)
    budget = share * costs.total({s.name: s.units for s in sites})
    try:
        plan = run(sites, curves, costs, budget, config)
    except BudgetError:
        assert costs.total({s.name: min(allowed(s, config)) for s in sites}) > budget
        return
    counts = {name: len(units) for name, units in plan.keep.items()}
    assert costs.total(counts) <= budget * (1 + 1e-9)
    assert all(counts[site.name] in allowed(site, config) for site in sites)
    shares = np.linspace(0, 1, 101)  # no finer share that fits keeps more
    for wanted in shares:
        other = {s.name: min(allowed(s, config), key=lambda c: (abs(c - wanted * s.units), c)) for s in sites}
        if costs.total(other) <= budget:
            assert costs.total(other) <= costs.total(counts) + 1e-9


# ---- uniform ----


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 4),
    units=st.integers(1, 20),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 10**6),
    multiple=st.integers(1, 4),
)
def test_uniform_means_the_same_count_in_every_layer(layers, units, share, seed, multiple):
    sites = [make_site(f"e.{n}.neurons", units, 7) for n in range(layers)]
    sites += [make_site(f"e.{n}.heads", 4, 50, "heads") for n in range(layers)]
    curves, costs = draw_curves(sites, seed), make_costs(sites)
    config = make_config(uniform=True, neurons=(multiple, 0))
    budget = float(math.ceil(share * costs.total({s.name: s.units for s in sites})))
    plan = run(sites, curves, costs, budget, config)
    counts = {name: len(kept) for name, kept in plan.keep.items()}
    for kind in ("neurons", "heads"):
        assert len({count for name, count in counts.items() if name.endswith(kind)}) == 1
    assert costs.total(counts) <= budget
    neurons, heads = (sorted(allowed(site, config)) for site in (sites[0], sites[-1]))
    affordable = [(n, h) for n in neurons for h in heads if layers * (7 * n + 50 * h) <= budget]
    best = min(lost(sites, curves, [n] * layers + [h] * layers) for n, h in affordable)
    assert lost(sites, curves, [counts[s.name] for s in sites]) == pytest.approx(best, abs=1e-12)


def test_layers_that_differ_cannot_be_made_alike():
    sites = [make_site("e.0.neurons", 8, 1), make_site("e.1.neurons", 6, 1)]
    with pytest.raises(BudgetError, match=r"already differ"):
        run(
            sites,
            draw_curves(sites, 1),
            make_costs(sites),
            7,
            make_config(uniform=True),
            original={s.name: 8 for s in sites},
        )


@pytest.mark.parametrize("scope", ["global", "site"])
def test_only_permitted_counts(scope):
    sites = [make_site("e.0.a", 12, 1), make_site("e.1.a", 12, 1), make_site("e.1.b", 4, 3, "heads")]
    permitted = {"e.0.a": {12, 8, 2}, "e.1.a": {12, 8, 2}, "e.1.b": {4}}
    for budget in range(16, 37):
        plan = run(
            sites, draw_curves(sites, budget), make_costs(sites), budget, make_config(scope=scope), permitted=permitted
        )
        assert all(len(units) in permitted[name] for name, units in plan.keep.items())


def test_many_counts_are_thinned_but_the_ends_stay():
    assert counts_allowed(20, multiple_of=8, at_least=1) == [20, 16, 8]
    site = make_site("e.0.a", 5000, 1)
    curves = {"e.0.a": Curve.from_scores(torch.ones(5000))}
    for budget, least in ((5000, 5000), (2500, 2400), (0, 0)):
        count = len(run([site], curves, make_costs([site]), budget, make_config()).keep["e.0.a"])
        assert least <= count <= budget
