"""Allocation: curves, costs and a budget in, the plan with the least loss out. Pure.

Loss and cost both add up over sites, so the best plan under a budget is a knapsack that dynamic programming solves: budgets in
parameters, FLOPs or measured milliseconds differ only in the costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from hfcompress.anatomy import Site
from hfcompress.config import PruneConfig
from hfcompress.knapsack import Choice, Option, least_cost, solve
from hfcompress.measurement.costs import Costs
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.plan import Plan

_OPTIONS = 64  # counts that are tried per site; of more, as many evenly spread ones


class BudgetError(ValueError):
    """The budget cannot be met under the constraints."""


def allocate(
    sites: Sequence[Site],
    curves: Mapping[str, Curve],
    costs: Costs,
    budget: float,
    config: PruneConfig,
    *,
    original: Mapping[str, int],
    permitted: Mapping[str, Collection[int]] | None = None,
    layer_losses: Mapping[str, float] | None = None,
) -> Plan:
    """Choose what stays so that the cost is at most the budget and the expected loss is the least.

    Args:
        sites: All sites of the model as it is.
        curves: Site name to curve; sites without units need none.
        costs: Of the model as it is; its arrays may go beyond the units there are now.
        budget: In the quantity of `costs`, compared with `costs.total`.
        config: Which kinds, scope, multiples, minimum and uniformity.
        original: Site name to units before anything was pruned; "site" takes its share of these.
        permitted: Site name to the counts that it may be left with; None means all.
        layer_losses: Layer name ("encoder.3") to the loss of dropping it whole, in the unit of the curves; None (or a
            layer not named) keeps it. At least one layer of each stack stays.

    Returns:
        The plan, with an entry for every site of the layers that stay. Units already gone stay gone.

    Raises:
        BudgetError: Even the smallest model that the constraints allow costs more.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> from hfcompress.measurement.costs import parameter_costs
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8))
        >>> sites, costs = find_sites(model), parameter_costs(model)
        >>> curves = {site.name: Curve.from_scores(torch.arange(site.units).float()) for site in sites}
        >>> config = PruneConfig(units=["neurons"], multiple_of={"neurons": 2}, at_least={"neurons": 2})
        >>> units = {site.name: site.units for site in sites}
        >>> plan = allocate(sites, curves, costs, costs.total(units) - 60, config, original=units)
        >>> sorted(len(plan.keep[f"encoder.{n}.neurons"]) for n in (0, 1)), plan.keep["encoder.1.heads"]
        ([6, 6], (0, 1))
    """
    groups = _groups(sites, config, original)
    dropped: set[str] = set()
    if config.scope == "site":
        counts = _same_share(sites, costs, budget, config, original, permitted)
    else:
        counts, dropped = _least_loss(groups, curves, costs, budget, config, permitted, layer_losses or {})
    keep: dict[str, tuple[int, ...]] = {}
    layers: dict[str, list[int]] = {}
    for site in sites:
        if layer_name(site) in dropped:
            continue
        count = counts.get(site.name, site.units)
        keep[site.name] = tuple(range(site.units)) if count == site.units else curves[site.name].kept(count)
    for name in costs.fixed:
        stack, _, number = name.rpartition(".")
        layers.setdefault(stack, [])
        if name not in dropped:
            layers[stack].append(int(number))
    return Plan(keep, {stack: tuple(sorted(kept)) for stack, kept in layers.items()} if dropped else {})


def layer_name(site: Site) -> str:
    """The layer that a site belongs to: "encoder.3" of "encoder.3.heads"."""
    return site.name.rpartition(".")[0]


def counts_allowed(units: int, *, multiple_of: int, at_least: int) -> list[int]:
    """Counts that a site may be left with, descending, starting with what it has.

    Example:
        >>> counts_allowed(20, multiple_of=8, at_least=1)
        [20, 16, 8]
        >>> counts_allowed(4, multiple_of=1, at_least=0)
        [4, 3, 2, 1, 0]
    """
    lower = [count for count in range(0, units, multiple_of) if count >= at_least]
    return [units, *reversed(lower)]


def alike(sites: Sequence[Site], original: Mapping[str, int]) -> list[list[Site]]:
    """Sites that "uniform" keeps alike in one group: of one kind, and of one size before anything was pruned.

    Raises:
        BudgetError: Sites of a group differ already.
    """
    groups: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.kind, original[site.name]), []).append(site)
    for (kind, _), group in groups.items():
        if len({site.units for site in group}) > 1:
            counts = sorted({site.units for site in group})
            raise BudgetError(
                f"layers cannot be made alike: their {kind} already differ ({counts}); start from an even model"
            )
    return list(groups.values())


def _groups(sites: Sequence[Site], config: PruneConfig, original: Mapping[str, int]) -> list[list[Site]]:
    """Sites that are decided together."""
    with_units = [site for site in sites if site.units]
    return alike(with_units, original) if config.uniform else [[site] for site in with_units]


def _allowed(site: Site, config: PruneConfig, permitted: Mapping[str, Collection[int]] | None) -> list[int]:
    counts = [site.units]
    if site.kind in config.units:
        multiple_of, at_least = getattr(config.multiple_of, site.kind), getattr(config.at_least, site.kind)
        counts = counts_allowed(site.units, multiple_of=multiple_of, at_least=at_least)
    if "sublayers" in config.units and 0 not in counts:
        counts.append(0)
    if permitted is not None:
        counts = [site.units, *(count for count in counts[1:] if count in permitted[site.name])]
    if len(counts) > _OPTIONS:
        chosen = np.unique(np.linspace(0, len(counts) - 1, _OPTIONS).round().astype(int))
        counts = [counts[index] for index in chosen]
    return counts


def _least_loss(
    groups: list[list[Site]],
    curves: Mapping[str, Curve],
    costs: Costs,
    budget: float,
    config: PruneConfig,
    permitted: Mapping[str, Collection[int]] | None,
    layer_losses: Mapping[str, float],
) -> tuple[dict[str, int], set[str]]:
    """Counts by site, and the layers that go."""
    options = []
    for group in groups:
        counts = _allowed(group[0], config, permitted)
        options.append(
            tuple(
                Option(
                    count,
                    sum(float(curves[site.name].loss[site.units - count]) for site in group),
                    sum(float(costs.sites[site.name][count]) for site in group),
                )
                for count in counts
            )
        )
    if config.uniform:
        layers = [Choice(tuple(options), fixed=sum(costs.fixed.values()))]
        members = [list(range(len(groups)))]
        names: list[str | None] = [None]
    else:
        layers, members, names = [], [], []
        for name, fixed in costs.fixed.items():
            mine = [index for index, group in enumerate(groups) if layer_name(group[0]) == name]
            layers.append(Choice(tuple(options[index] for index in mine), fixed, layer_losses.get(name)))
            members.append(mine)
            names.append(name)
        shared = [index for index in range(len(groups)) if not any(index in mine for mine in members)]
        layers.append(Choice(tuple(options[index] for index in shared)))
        members.append(shared)
        names.append(None)
    layers = _keep_one_per_stack(layers, names)
    choice = solve(layers, budget - costs.rest)
    if choice is None:
        least = costs.rest + sum(least_cost(layer) for layer in layers)
        raise BudgetError(
            f"{budget:,.4g} {costs.quantity} cannot be reached with units {config.units}, at_least heads "
            f"{config.at_least.heads}, neurons {config.at_least.neurons}: at least {least:,.4g} stay; ask for less, "
            "allow more units (sublayers, layers), or lower at_least"
        )
    left: dict[str, int] = {}
    dropped: set[str] = set()
    for layer, mine, chosen in zip(names, members, choice, strict=True):
        if chosen is None:
            assert layer is not None
            dropped.add(layer)
            continue
        for index, option in zip(mine, chosen, strict=True):
            left |= {site.name: option.value for site in groups[index]}
    return left, dropped


def _keep_one_per_stack(layers: list[Choice], names: Sequence[str | None]) -> list[Choice]:
    """The layer of each stack that would cost most to drop has to stay."""
    kept = list(layers)
    stacks: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name is not None:
            stacks.setdefault(name.rpartition(".")[0], []).append(index)
    for indices in stacks.values():
        if all(kept[index].loss_without is not None for index in indices):
            most = max(indices, key=lambda index: kept[index].loss_without or 0.0)
            kept[most] = dataclasses.replace(kept[most], loss_without=None)
    return kept


def _same_share(
    sites: Sequence[Site],
    costs: Costs,
    budget: float,
    config: PruneConfig,
    original: Mapping[str, int],
    permitted: Mapping[str, Collection[int]] | None,
) -> dict[str, int]:
    """The same share of every site, the largest that the budget allows, as near as multiples and minimum let it be."""
    options = {site.name: _allowed(site, config, permitted) for site in sites if site.units}
    empty = {site.name: 0 for site in sites if not site.units}

    def counts(share: float) -> dict[str, int]:
        return empty | {
            name: min(allowed, key=lambda count: (abs(count - share * original[name]), count))
            for name, allowed in options.items()
        }

    low, high = 0.0, 1.0
    if costs.total(counts(high)) <= budget * (1 + 1e-9):
        return counts(high)
    if costs.total(counts(low)) > budget * (1 + 1e-9):
        raise BudgetError(
            f"{budget:,.4g} {costs.quantity} cannot be reached with the same share of {config.units} everywhere: at least "
            f"{costs.total(counts(low)):,.4g} stay; ask for less or allow more units"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(counts(middle)) <= budget * (1 + 1e-9) else (low, middle)
    return counts(low)
