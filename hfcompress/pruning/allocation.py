"""Allocation: curves, costs and a budget in, the plan with the least loss out. Pure.

Loss and cost both add up over sites, so the best plan under a budget is a knapsack that dynamic programming solves: budgets in
parameters, FLOPs or measured milliseconds differ only in the costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hfcompress.anatomy import Site
from hfcompress.config import PruneConfig
from hfcompress.measurement.costs import Costs
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.plan import Plan

_CELLS = 4096  # steps that the budget is divided into
_OPTIONS = 64  # counts that are tried per site; of more, as many evenly spread ones


class BudgetError(ValueError):
    """The budget cannot be met under the constraints."""


@dataclass(frozen=True)
class Option:
    """One way to leave a group of sites.

    Attributes:
        units: What is left of each site of the group.
        loss: Expected increase of the loss.
        cost: In the quantity of the budget.
    """

    units: int
    loss: float
    cost: float


@dataclass(frozen=True)
class Layer:
    """The choices in one layer.

    Attributes:
        groups: For each group of sites its options.
        fixed: What the layer costs besides.
        loss_without: Expected increase of the loss if the whole layer goes; None if it has to stay.
    """

    groups: tuple[tuple[Option, ...], ...]
    fixed: float = 0.0
    loss_without: float | None = None


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
        layers = [Layer(tuple(options), fixed=sum(costs.fixed.values()))]
        members = [list(range(len(groups)))]
        names: list[str | None] = [None]
    else:
        layers, members, names = [], [], []
        for name, fixed in costs.fixed.items():
            mine = [index for index, group in enumerate(groups) if layer_name(group[0]) == name]
            layers.append(Layer(tuple(options[index] for index in mine), fixed, layer_losses.get(name)))
            members.append(mine)
            names.append(name)
        shared = [index for index in range(len(groups)) if not any(index in mine for mine in members)]
        layers.append(Layer(tuple(options[index] for index in shared)))
        members.append(shared)
        names.append(None)
    layers = _keep_one_per_stack(layers, names)
    choice = solve(layers, budget - costs.rest)
    if choice is None:
        least = costs.rest + sum(_cheapest(layer) for layer in layers)
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
            left |= {site.name: option.units for site in groups[index]}
    return left, dropped


def _keep_one_per_stack(layers: list[Layer], names: Sequence[str | None]) -> list[Layer]:
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


def _cheapest(layer: Layer) -> float:
    if layer.loss_without is not None:
        return 0.0
    return layer.fixed + sum(min(option.cost for option in group) for group in layer.groups)


def solve(layers: Sequence[Layer], budget: float, *, cells: int = _CELLS) -> list[list[Option] | None] | None:
    """The choices with the least total loss whose total cost is at most the budget, by dynamic programming.

    Exact where all costs are whole multiples of something of which the budget has at most `cells`. Elsewhere costs are rounded to
    that many steps, so the result is the optimum of a problem whose costs differ from the true ones by half a step
    each. What is returned never exceeds the budget.

    Args:
        layers: What can be chosen.
        budget: Of the sum of all costs.
        cells: Resolution.

    Returns:
        For each layer one option per group, or None where the layer goes; None if there is no choice within the budget.

    Example:
        >>> group = (Option(2, 0.0, 2.0), Option(1, 1.0, 1.0), Option(0, 5.0, 0.0))
        >>> [[option.units for option in chosen] for chosen in solve([Layer((group,)), Layer((group, group))], 4.0)]
        [[1], [1, 2]]
    """
    least = sum(_cheapest(layer) for layer in layers)
    if least > budget * (1 + 1e-9) + 1e-12:
        return None
    step = _common_divisor(layers)
    if step and budget / step <= cells:
        return _solve_rounded(layers, step, math.floor(budget / step * (1 + 1e-9)))
    allowance = budget
    for _ in range(8):
        choice = _solve_rounded(layers, allowance / cells if allowance > 0 else 1.0, cells)
        if choice is None:
            break
        over = _cost_of(layers, choice) - budget
        if over <= 1e-9 * max(1.0, abs(budget)):
            return choice
        allowance -= max(over, budget / cells)
    # Rounding leaves nothing: take the cheapest of everything.
    return [
        None
        if layer.loss_without is not None
        else [min(group, key=lambda option: (option.cost, option.loss)) for group in layer.groups]
        for layer in layers
    ]


def _cost_of(layers: Sequence[Layer], choice: Sequence[list[Option] | None]) -> float:
    return sum(
        layer.fixed + sum(option.cost for option in chosen)
        for layer, chosen in zip(layers, choice, strict=True)
        if chosen is not None
    )


def _common_divisor(layers: Sequence[Layer]) -> int:
    """The greatest common divisor of all costs; 0 if they are no whole numbers."""
    costs = [layer.fixed for layer in layers]
    costs += [option.cost for layer in layers for group in layer.groups for option in group]
    if any(cost != int(cost) for cost in costs):
        return 0
    return math.gcd(*(int(cost) for cost in costs))


def _solve_rounded(layers: Sequence[Layer], step: float, cells: int) -> list[list[Option] | None] | None:
    def rounded(cost: float) -> int:
        return max(0, round(cost / step))

    best = np.zeros(cells + 1)  # best[c]: least loss of the layers so far with a cost of at most c steps
    trail: list[tuple[np.ndarray | None, list[np.ndarray]]] = []
    for layer in layers:
        before = best
        best = _shifted(before, rounded(layer.fixed))
        picks = []
        for group in layer.groups:
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
        if layer.loss_without is not None:
            gone = before + layer.loss_without <= best
            best = np.where(gone, before + layer.loss_without, best)
        trail.append((gone, picks))
    if not math.isfinite(best[cells]):
        return None
    place = cells
    choice: list[list[Option] | None] = []
    for layer, (gone, picks) in zip(reversed(layers), reversed(trail), strict=True):
        if gone is not None and gone[place]:
            choice.append(None)
            continue
        chosen: list[Option] = []
        for group, pick in zip(reversed(layer.groups), reversed(picks), strict=True):
            option = group[pick[place]]
            place -= rounded(option.cost)
            chosen.append(option)
        place -= rounded(layer.fixed)
        choice.append(list(reversed(chosen)))
    return list(reversed(choice))


def _shifted(values: np.ndarray, by: int) -> np.ndarray:
    if by == 0:
        return values.copy()
    moved = np.full_like(values, np.inf)
    if by < len(values):
        moved[by:] = values[:-by]
    return moved


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
