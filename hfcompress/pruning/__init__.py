"""Structured pruning: gates, criteria, schedules, allocation, and the cut."""

from hfcompress.pruning.allocation import BudgetError, allocate
from hfcompress.pruning.criteria import CRITERIA, Evidence
from hfcompress.pruning.gates import Gates, gate_gradients
from hfcompress.pruning.plan import Plan, cut, original_units
from hfcompress.pruning.pruner import Pruner
from hfcompress.pruning.schedules import make_schedule, update_steps

__all__ = [
    "CRITERIA",
    "BudgetError",
    "Evidence",
    "Gates",
    "Plan",
    "Pruner",
    "allocate",
    "cut",
    "gate_gradients",
    "make_schedule",
    "original_units",
    "update_steps",
]
