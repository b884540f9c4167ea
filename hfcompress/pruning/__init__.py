"""Structured pruning: gates, criteria, schedules, allocation, and the cut."""

from hfcompress.pruning.allocation import BudgetError, allocate
from hfcompress.pruning.budgets import Budget, make_budget
from hfcompress.pruning.criteria import CRITERIA
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.evidence import Evidence
from hfcompress.pruning.gates import Gates, gate_gradients
from hfcompress.pruning.plan import Plan, cut, original_units
from hfcompress.pruning.pruner import Pruner, fit_to_device
from hfcompress.pruning.ranking import rank_units
from hfcompress.pruning.repair import repair
from hfcompress.pruning.schedules import make_schedule, update_steps
from hfcompress.pruning.sensitivity import LayerSensitivity, Sensitivity, measure_layers, measure_sensitivity
from hfcompress.pruning.stream import stream_gradients, stream_magnitude, stream_surgeon
from hfcompress.pruning.stream_repair import repair_stream
from hfcompress.pruning.widths import Widths

__all__ = [
    "CRITERIA",
    "Budget",
    "BudgetError",
    "Curve",
    "Evidence",
    "Gates",
    "LayerSensitivity",
    "Plan",
    "Pruner",
    "Sensitivity",
    "Widths",
    "allocate",
    "cut",
    "fit_to_device",
    "gate_gradients",
    "make_budget",
    "make_schedule",
    "measure_layers",
    "measure_sensitivity",
    "original_units",
    "rank_units",
    "repair",
    "repair_stream",
    "stream_gradients",
    "stream_magnitude",
    "stream_surgeon",
    "update_steps",
]
