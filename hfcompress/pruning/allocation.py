"""Allocation: scores and a budget in, a plan out. Pure.

The units of each site are ranked by score and tied into chunks that are dropped together, so that what is left is a
multiple of what the caller asked for. All chunks of all sites then stand in one list, by score per parameter, and the
weakest go until the budget is met.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
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

    score: float
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
) -> Plan:
    """Choose the units that stay so that at least a given share of the prunable parameters is gone.

    Args:
        sites: Sites of the model as it is.
        scores: Site name to one score per unit, float, shape (units,); higher = keep; sums over the unit's weights.
        original: Site name to units before anything was pruned; the budget counts from there.
        config: Which kinds, scope, multiples, minimum and uniformity.
        sparsity: Share of the parameters of all heads and neurons (of the dense model) that is to be gone, in [0, 1).

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
    names = [site.name for site in sites if site.units]
    costs = {site.name: site.parameters_per_unit for site in sites}
    for name in names:
        if not bool(torch.isfinite(scores[name]).all()):
            raise BudgetError(
                f"{name}: scores hold NaN or infinity; the training has diverged or a gradient overflowed"
            )
    total = sum(costs[name] * original[name] for name in names)
    alive = sum(site.parameters_per_unit * site.units for site in sites)
    budget = alive - (1.0 - sparsity) * total
    prunable = [site for site in sites if site.units and site.kind in config.units]
    kept = {site.name: site.units for site in sites}
    order = {
        site.name: torch.argsort(scores[site.name].detach().cpu(), descending=True, stable=True) for site in prunable
    }
    groups = _alike(prunable) if config.uniform else [[site] for site in prunable]
    if config.scope == "site":
        _same_share(groups, original, config, sparsity * total / max(1, _cost(prunable, original)), kept)
    else:
        _weakest_first(groups, order, scores, config, budget, kept)
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


def _cost(sites: Sequence[Site], original: Mapping[str, int]) -> int:
    return sum(site.parameters_per_unit * original[site.name] for site in sites)


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
    budget: float,
    kept: dict[str, int],
) -> None:
    """Drop chunks by score per parameter until the budget is gone; writes the counts into `kept`."""
    chunks = []
    for number, group in enumerate(groups):
        kind, units = group[0].kind, group[0].units
        allowed = counts_allowed(
            units, multiple_of=getattr(config.multiple_of, kind), at_least=getattr(config.at_least, kind)
        )
        ranked = torch.stack([scores[site.name].detach().cpu().double()[order[site.name]] for site in group]).sum(0)
        cost = sum(site.parameters_per_unit for site in group)
        for upper, lower in itertools.pairwise(allowed):
            chunks.append(_Chunk(float(ranked[lower:upper].sum()), cost * (upper - lower), number, lower))
    # Within a group scores fall with rank, so the order by density is also the order of ranks; ties go by rank.
    chunks.sort(key=lambda chunk: (chunk.score / chunk.parameters, -chunk.rank, chunk.group))
    gone = 0
    for chunk in chunks:
        if gone >= budget * (1 - 1e-9):
            return
        gone += chunk.parameters
        for site in groups[chunk.group]:
            kept[site.name] = min(kept[site.name], chunk.rank)


def _same_share(
    groups: list[list[Site]],
    original: Mapping[str, int],
    config: PruneConfig,
    share: float,
    kept: dict[str, int],
) -> None:
    """Drop the same share of every site, as near as multiples and minimum allow; writes the counts into `kept`."""
    if share >= 1:
        raise BudgetError(
            f"a sparsity of {share:.2f} of the chosen units cannot be reached; ask for less or allow more units"
        )
    for group in groups:
        kind = group[0].kind
        for site in group:
            allowed = counts_allowed(
                site.units,
                multiple_of=getattr(config.multiple_of, kind),
                at_least=getattr(config.at_least, kind),
            )
            wanted = (1 - share) * original[site.name]
            kept[site.name] = min(allowed, key=lambda count: (abs(count - wanted), count))
