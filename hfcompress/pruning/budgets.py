"""What a target means for a model: costs, what the dense model costs, and what each goal leaves."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from hfcompress.anatomy import find_sites
from hfcompress.anatomy.depth import full_depth
from hfcompress.anatomy.stream import built_model
from hfcompress.checkpoints.record import read_vocabulary
from hfcompress.config import MeasureConfig, Target
from hfcompress.measurement import compare_latency, example_inputs, speedup
from hfcompress.measurement.copies import cut_copy, find_layer_sites
from hfcompress.measurement.costs import Costs, ParameterScope, flops_costs, parameter_costs
from hfcompress.measurement.latency_table import LatencyTable, TableError, measure_latency_table
from hfcompress.pruning.plan import Plan, original_units

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


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
        fixed = {names.get(layer, layer): cost for layer, cost in self.costs.fixed.items()}
        kept = {layer: cost for layer, cost in fixed.items() if layer is not None}
        costs = dataclasses.replace(self.costs, fixed=kept, sites=rename_sites(self.costs.sites, names))
        return dataclasses.replace(self, costs=costs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {"costs": self.costs.to_dict(), "dense": self.dense, "goals": list(self.goals)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """What `to_dict` wrote."""
        return cls(Costs.from_dict(values["costs"]), float(values["dense"]), tuple(values["goals"]))


def rename_sites(values: Mapping[str, _T], names: Mapping[str, str | None]) -> dict[str, _T]:
    """What is known of sites, after layers were renumbered or dropped.

    Args:
        values: By site name.
        names: Layer name to its new one, None for those that are gone; layers not named keep theirs.

    Example:
        >>> rename_sites({"encoder.0.heads": 4, "encoder.1.heads": 6}, {"encoder.0": None, "encoder.1": "encoder.0"})
        {'encoder.0.heads': 6}
    """
    fresh = {}
    for key, value in values.items():
        layer, _, role = key.rpartition(".")
        target = names.get(layer, layer)
        if target is not None:
            fresh[f"{target}.{role}"] = value
    return fresh


def make_budget(model: nn.Module, target: Target, *, measure: MeasureConfig) -> Budget:
    """The budget of a target for a model; what was pruned from it before counts.

    Args:
        model: The model, not wrapped.
        target: With goals.
        measure: What the target does not say about how time is measured.

    Raises:
        ValueError: The target has no goals.
    """
    costs, dense = _costs(model, unpruned(model), target, measure)
    goals = tuple(_allowed(target, goal, dense) for goal in target.goals)
    logger.info("%s", describe(costs, dense, goals))
    return Budget(costs, dense, goals)


def describe(costs: Costs, dense: float, goals: Collection[float]) -> str:
    """One line for the log."""
    unit = {"parameters": "parameters", "flops": "FLOPs", "latency_ms": "ms"}[costs.quantity]
    return f"dense: {dense:,.4g} {unit}; to reach: {', '.join(f'{goal:,.4g}' for goal in goals)}"


def costs_of(model: nn.Module, target: Target, *, measure: MeasureConfig) -> Costs:
    """The costs of a model as it is, in the quantity of a target; times are measured, unless they were before.

    Args:
        model: The model, not wrapped.
        target: With goals.
        measure: What the target does not say about how time is measured.
    """
    if target.quantity in ("sparsity", "parameters"):
        scope: ParameterScope = "sites" if target.quantity == "sparsity" else target.scope
        return parameter_costs(model, scope=scope)
    if target.quantity == "flops":
        return flops_costs(model, timing_inputs(model, target, measure, batch=1), scope=target.scope)
    if target.quantity in ("speedup", "latency_ms"):
        return _table(model, target, measure).costs(model)
    raise ValueError(f"{target.quantity} has no budget of its own; it is looked for along a list of speedups")


def _table(model: nn.Module, target: Target, measure: MeasureConfig) -> LatencyTable:
    inputs = timing_inputs(model, target, measure)
    threads = target.threads if target.threads is not None else measure.threads
    return measure_latency_table(model, inputs, threads=threads, scope=target.scope)


def _costs(model: nn.Module, dense: nn.Module, target: Target, measure: MeasureConfig) -> tuple[Costs, float]:
    """The costs of a model as it is, and what it cost before anything was pruned."""
    if target.quantity not in ("speedup", "latency_ms"):
        costs = costs_of(model, target, measure=measure)
        return costs, (costs if dense is model else costs_of(dense, target, measure=measure)).total({})
    _require_device(model, target)
    table = _table(dense, target, measure)
    whole = table.costs(dense).total({})
    if _rows(model) != _rows(dense):  # what comes after the layers takes another time
        return costs_of(model, target, measure=measure), whole
    try:
        return table.costs(model), whole
    except TableError:  # its hidden width was cut, so its layers are others
        return costs_of(model, target, measure=measure), whole


def _rows(model: nn.Module) -> int | None:
    """Tokens of the vocabulary, if there is one."""
    return getattr(model.config, "vocab_size", None)


def _require_device(model: nn.Module, target: Target) -> None:
    """Time is measured where the model is; a target for another device cannot be met by that."""
    here = next(model.parameters()).device
    if target.device != "auto" and torch.device(target.device).type != here.type:
        raise ValueError(
            f"target.device is {target.device}, but the model is on {here}, and time is measured where the model is; "
            "run on that device, or leave target.device at auto"
        )


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
    """The model itself if nothing was pruned from it, else one with the shapes it had before and weights of no meaning.

    Layers that were dropped, hidden features and tokens that were cut count, too.
    """
    before = original_units(model)
    record = getattr(model.config, "hfcompress", None) or {}
    tokens = read_vocabulary(model.config)
    whole = all(site.units == before[site.name] for site in find_sites(model))
    if whole and tokens is None and not any(name in record for name in ("layers", "hidden")):
        return model
    config = full_depth(model)
    if tokens is not None:
        config.vocab_size = tokens[1]
    config.hfcompress = {name: part for name, part in record.items() if name not in ("units", "layers", "hidden")}
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # what is drawn here must not change the run
        fresh = type(model)._from_config(config, dtype=parameter.dtype)  # type: ignore[attr-defined]
    return fresh.to(parameter.device).eval()


def dense_parameters(model: nn.Module) -> int:
    """Parameters of all units before anything was pruned from a model, what sparsity is counted from."""
    config = full_depth(model)
    return sum(site.parameters_per_unit * site.units for site in find_sites(built_model(model, config)))


class Stopwatch:
    """Measures how fast a plan is, before anything is cut, against the model before anything was pruned from it.

    Args:
        model: The model; views of its weights as they are now are kept.
        target: Says batch, length, threads and scope.
        measure: What the target does not say.

    Attributes:
        layers: Layers of the model as it is now; the names of sites and layers are theirs from then on.
    """

    def __init__(self, model: nn.Module, target: Target, *, measure: MeasureConfig) -> None:
        self.start, dense = _whole_copy(model), unpruned(model)
        self.dense = self.start if dense is model else _whole_copy(dense)
        self.layers = find_layer_sites(self.start)
        self.inputs = timing_inputs(model, target, measure)
        self.threads = target.threads if target.threads is not None else measure.threads
        self.scope = target.scope

    def time(self, units: Mapping[str, int], *, layers: Collection[str], rounds: int = 11) -> tuple[float, float]:
        """Time a model with fewer units and layers.

        Args:
            units: Site name to units; sites not named keep all.
            layers: Names of the layers that stay.
            rounds: Timed rounds.

        Returns:
            Its median milliseconds, and its speedup over the model before anything was pruned.
        """
        chosen = [
            (layer, {role: units[site.name] for role, site in layer.sites.items() if site.name in units})
            for layer in self.layers
            if layer.name in layers
        ]
        pruned = cut_copy(self.start, chosen)
        models = {"dense": self.dense, "pruned": pruned}
        timed = compare_latency(models, self.inputs, rounds=rounds, warmup=2, threads=self.threads, scope=self.scope)
        return timed["pruned"].median_ms, speedup(timed["dense"], timed["pruned"]).median


def _whole_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the weights as they are now, and keeps them when the model is cut."""
    return cut_copy(model, [(layer, {}) for layer in find_layer_sites(model)])


def kept_units(plan: Plan) -> dict[str, int]:
    """Site name to the number of units that a plan leaves."""
    return {name: len(units) for name, units in plan.keep.items()}
