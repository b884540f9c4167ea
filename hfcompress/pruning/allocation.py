"""Allocation: scores and a budget in, a plan out. Pure.

The units of each site are ranked by score and tied into chunks that are dropped together, so that what is left is a
multiple of what the caller asked for. All chunks of all sites then stand in one list, by score per parameter, and the
weakest go until the budget is met.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from hfcompress.anatomy import Site
from hfcompress.config import PruneConfig
from hfcompress.pruning.plan import Plan

logger = logging.getLogger(__name__)


class BudgetError(ValueError):
    """The budget cannot be met under the constraints."""


@dataclass(frozen=True)
class _Chunk:
    """Units that are dropped together: the same ranks in one site, or in all sites of a kind when they must be alike."""

    density: float  # score per parameter
    parameters: int
    group: int
    rank: int  # units of each site of the group that stay when this chunk goes


def allocate(
    sites: Sequence[Site],
    scores: Mapping[str, torch.Tensor],
    original: Mapping[str, int],
    config: PruneConfig,
    *,
    sparsity: float,
    permitted: Mapping[str, Collection[int]] | None = None,
) -> Plan:
    """Choose the units that stay so that at least a given share of the prunable parameters is gone.

    Args:
        sites: All sites of the model as it is.
        scores: Site name to one score per unit, float, shape (units,); higher = keep; sums over the unit's weights.
            Sites without units need none.
        original: Site name to units before anything was pruned; the budget counts from there.
        config: Which kinds, scope, multiples, minimum and uniformity.
        sparsity: Share of the parameters of all heads and neurons (of the dense model) that is to be gone, in [0, 1).
        permitted: Kind to the counts that a site may be left with; None means all.

    Returns:
        The plan, with an entry for every site. Units already gone stay gone; never more than one chunk too many goes.

    Raises:
        BudgetError: Even the smallest model that the constraints allow is larger.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8))
        >>> sites = find_sites(model)
        >>> scores = {site.name: torch.arange(site.units).float() for site in sites}
        >>> config = PruneConfig(units=["neurons"], multiple_of={"neurons": 2}, at_least={"neurons": 2})
        >>> plan = allocate(sites, scores, {site.name: site.units for site in sites}, config, sparsity=0.05)
        >>> plan.keep["encoder.0.neurons"], plan.keep["encoder.1.heads"]
        ((2, 3, 4, 5, 6, 7), (0, 1))
    """
    costs = {site.name: site.parameters_per_unit for site in sites}
    for name in (site.name for site in sites if site.units):
        if not bool(torch.isfinite(scores[name]).all()):
            raise BudgetError(
                f"{name}: scores hold NaN or infinity; the training has diverged or a gradient overflowed"
            )
    total = sum(costs[name] * original[name] for name in costs)
    alive = sum(site.parameters_per_unit * site.units for site in sites)
    budget = alive - (1.0 - sparsity) * total
    prunable = [site for site in sites if site.units and site.kind in config.units]
    kept = {site.name: site.units for site in sites}
    order = {
        site.name: torch.argsort(scores[site.name].detach().cpu(), descending=True, stable=True) for site in prunable
    }
    groups = _alike(prunable) if config.uniform else [[site] for site in prunable]
    if config.scope == "site":
        chosen = sum(costs[site.name] * original[site.name] for site in sites if site.kind in config.units)
        _same_share(prunable, original, config, permitted, sparsity * total / max(1, chosen), kept)
    else:
        _weakest_first(groups, order, scores, config, permitted, budget, kept)
    gone = sum(costs[name] * (site.units - kept[name]) for site in sites for name in [site.name])
    if gone < budget * (1 - 1e-9) and config.scope == "global":
        reachable = 1 - (alive - gone) / total
        raise BudgetError(
            f"a sparsity of {sparsity:.3f} cannot be reached with units {config.units} and at_least heads "
            f"{config.at_least.heads}, neurons {config.at_least.neurons}: at most {reachable:.3f}; ask for less, "
            "allow more units, or lower at_least"
        )
    keep = {site.name: tuple(range(site.units)) for site in sites}
    for site in prunable:
        keep[site.name] = tuple(sorted(order[site.name][: kept[site.name]].tolist()))
    return Plan(keep)


def _alike(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites of one kind in one group."""
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    for kind, group in kinds.items():
        if len({site.units for site in group}) > 1:
            counts = sorted({site.units for site in group})
            raise BudgetError(
                f"layers cannot be made alike: their {kind} already differ ({counts}); start from an even model"
            )
    return list(kinds.values())


def _allowed(site: Site, config: PruneConfig, permitted: Mapping[str, Collection[int]] | None) -> list[int]:
    multiple_of, at_least = getattr(config.multiple_of, site.kind), getattr(config.at_least, site.kind)
    counts = counts_allowed(site.units, multiple_of=multiple_of, at_least=at_least)
    return counts if permitted is None else [site.units, *(c for c in counts[1:] if c in permitted[site.kind])]


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


def _weakest_first(
    groups: list[list[Site]],
    order: Mapping[str, torch.Tensor],
    scores: Mapping[str, torch.Tensor],
    config: PruneConfig,
    permitted: Mapping[str, Collection[int]] | None,
    budget: float,
    kept: dict[str, int],
) -> None:
    """Drop chunks by score per parameter until the budget is gone; writes the counts into `kept`."""
    chunks = []
    for number, group in enumerate(groups):
        allowed = _allowed(group[0], config, permitted)
        ranked = torch.stack([scores[site.name].detach().cpu().double()[order[site.name]] for site in group]).sum(0)
        cost = sum(site.parameters_per_unit for site in group)
        density = -math.inf
        for upper, lower in itertools.pairwise(allowed):
            # Within a group scores fall with rank; the maximum keeps rounding from turning the order of ties around.
            density = max(density, float(ranked[lower:upper].sum()) / (cost * (upper - lower)))
            chunks.append(_Chunk(density, cost * (upper - lower), number, lower))
    chunks.sort(key=lambda chunk: (chunk.density, -chunk.rank, chunk.group))
    gone = 0
    for chunk in chunks:
        if gone >= budget * (1 - 1e-9):
            return
        gone += chunk.parameters
        for site in groups[chunk.group]:
            kept[site.name] = min(kept[site.name], chunk.rank)


def _same_share(
    sites: list[Site],
    original: Mapping[str, int],
    config: PruneConfig,
    permitted: Mapping[str, Collection[int]] | None,
    share: float,
    kept: dict[str, int],
) -> None:
    """Drop the same share of every site, as near as multiples and minimum allow; writes the counts into `kept`."""
    if share >= 1:
        raise BudgetError(
            f"units {config.units} would all have to go to reach the sparsity; ask for less or allow more units"
        )
    for site in sites:
        wanted = (1 - share) * original[site.name]
        allowed = _allowed(site, config, permitted)
        kept[site.name] = min(allowed, key=lambda count: (abs(count - wanted), count))
