"""What a target means for a model: costs, what the dense model costs, and what each goal leaves."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy import find_sites
from hfcompress.config import MeasureConfig, Target
from hfcompress.measurement import compare_latency, example_inputs, speedup
from hfcompress.measurement.copies import cut_copy, find_layer_sites
from hfcompress.measurement.costs import Costs, flops_costs, parameter_costs
from hfcompress.measurement.latency_table import measure_latency_table
from hfcompress.pruning.plan import Plan, original_units

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """Costs and goals in one quantity.

    Attributes:
        costs: What each site costs with each number of units.
        dense: What the model costs without pruning.
        goals: What it may cost at each of the targets, in their order, falling.
    """

    costs: Costs
    dense: float
    goals: tuple[float, ...]

    def at(self, goal: int, share: float) -> float:
        """What the model may cost when a share of the way to a goal (from the goal before it) is due."""
        start = self.dense if goal == 0 else self.goals[goal - 1]
        return self.goals[goal] if share >= 1 else start + share * (self.goals[goal] - start)

    def without_layers(self, names: Mapping[str, str | None]) -> Budget:
        """After layers went: layer name to its new one, None for those that are gone."""
        return dataclasses.replace(self, costs=renamed_costs(self.costs, names))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {"costs": self.costs.to_dict(), "dense": self.dense, "goals": list(self.goals)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """What `to_dict` wrote."""
        return cls(Costs.from_dict(values["costs"]), float(values["dense"]), tuple(values["goals"]))


def renamed_costs(costs: Costs, names: Mapping[str, str | None]) -> Costs:
    """Costs after layers were renumbered or dropped (None)."""

    def renamed(old: Mapping[str, Any], layer_of: Any) -> dict[str, Any]:
        fresh = {}
        for key, value in old.items():
            layer, rest = layer_of(key)
            target = names.get(layer, layer)
            if target is not None:
                fresh[target + rest] = value
        return fresh

    return dataclasses.replace(
        costs,
        fixed=renamed(costs.fixed, lambda key: (key, "")),
        sites=renamed(costs.sites, lambda key: (key.rpartition(".")[0], "." + key.rpartition(".")[2])),
    )


def make_budget(model: nn.Module, target: Target, *, measure: MeasureConfig) -> Budget:
    """The budget of a target for a model; what was pruned from it before counts.

    Args:
        model: The model, not wrapped.
        target: With goals.
        measure: What the target does not say about how time is measured.

    Raises:
        ValueError: The target has no goals, or is no smaller than the model.
    """
    dense_model = unpruned(model)
    costs = _costs(dense_model, target, measure)
    dense = costs.total({site.name: site.units for site in find_sites(dense_model)})
    goals = tuple(_allowed(target, goal, dense) for goal in target.goals)
    logger.info("%s", describe(costs, dense, goals))
    return Budget(costs, dense, goals)


def describe(costs: Costs, dense: float, goals: Collection[float]) -> str:
    """One line for the log."""
    unit = {"parameters": "parameters", "flops": "FLOPs", "latency_ms": "ms"}[costs.quantity]
    return f"dense: {dense:,.4g} {unit}; to reach: {', '.join(f'{goal:,.4g}' for goal in goals)}"


def _costs(model: nn.Module, target: Target, measure: MeasureConfig) -> Costs:
    if target.quantity == "sparsity":
        return parameter_costs(model, scope="sites")
    if target.quantity == "parameters":
        return parameter_costs(model, scope="model")
    if target.quantity == "flops":
        return flops_costs(model, timing_inputs(model, target, measure, batch=1), scope=target.scope)
    if target.quantity in ("speedup", "latency_ms"):
        inputs = timing_inputs(model, target, measure)
        threads = target.threads if target.threads is not None else measure.threads
        return measure_latency_table(model, inputs, threads=threads, scope=target.scope).costs(model)
    raise ValueError(f"{target.quantity} has no budget of its own; it is looked for along a list of speedups")


def timing_inputs(
    model: nn.Module, target: Target, measure: MeasureConfig, *, batch: int | None = None
) -> dict[str, torch.Tensor]:
    """Inputs of the batch and length that a target names."""
    text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    length = (target.length or measure.length) if text else None
    return example_inputs(model, batch=batch or target.batch or measure.batch, length=length)


def _allowed(target: Target, goal: float, dense: float) -> float:
    if target.quantity == "sparsity":
        return (1 - goal) * dense
    if target.quantity == "speedup":
        return dense / goal
    allowed = goal * dense if target.quantity in ("parameters", "flops") and goal <= 1 else goal
    if allowed > dense * (1 + 1e-9):
        logger.warning("%s %s is more than the dense model has (%.4g): nothing goes", target.quantity, goal, dense)
    return allowed


def unpruned(model: nn.Module) -> nn.Module:
    """The model itself if nothing was pruned from it, else one with the shapes it had before and weights of no meaning."""
    before = original_units(model)
    if all(site.units == before[site.name] for site in find_sites(model)):
        return model
    config = copy.deepcopy(model.config)
    config.hfcompress = {key: value for key, value in config.hfcompress.items() if key not in ("units", "hidden")}  # type: ignore[union-attr, operator]
    parameter = next(model.parameters())
    fresh = type(model)._from_config(config, dtype=parameter.dtype)  # type: ignore[attr-defined]
    return fresh.to(parameter.device).eval()


class Stopwatch:
    """Measures how fast a plan is, before anything is cut, against the model as it was when this was made.

    Args:
        model: The dense model; views of its weights are kept.
        target: Says batch, length, threads and scope.
        measure: What the target does not say.
    """

    def __init__(self, model: nn.Module, target: Target, *, measure: MeasureConfig) -> None:
        dense = unpruned(model)
        self.layers = find_layer_sites(dense)
        self.dense = cut_copy(dense, [(layer, {}) for layer in self.layers])
        self.inputs = timing_inputs(model, target, measure)
        self.threads = target.threads if target.threads is not None else measure.threads
        self.scope = target.scope

    def time(self, units: Mapping[str, int], *, rounds: int = 11) -> tuple[float, float]:
        """Median milliseconds of the model with so many units (site names of the dense model) and its speedup over the dense model.

        Layers none of whose sites are named are left out.
        """
        chosen = []
        for layer in self.layers:
            mine = {role: units[site.name] for role, site in layer.sites.items() if site.name in units}
            if mine:
                chosen.append((layer, mine))
        pruned = cut_copy(self.dense, [(self._own(layer), mine) for layer, mine in chosen])
        models = {"dense": self.dense, "pruned": pruned}
        timed = compare_latency(models, self.inputs, rounds=rounds, warmup=2, threads=self.threads, scope=self.scope)
        return timed["pruned"].median_ms, speedup(timed["dense"], timed["pruned"]).median

    def _own(self, layer: Any) -> Any:
        return next(own for own in find_layer_sites(self.dense) if own.name == layer.name)


def kept_units(plan: Plan) -> dict[str, int]:
    """Site name to the number of units that a plan leaves."""
    return {name: len(units) for name, units in plan.keep.items()}
