"""The contract: what a compressed model may lose and has to gain, and whether what was measured says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hfcompress.config import ContractConfig
from hfcompress.hub.results import read_results

Status = Literal["met", "failed", "undecided"]
EXIT_STATUS: Mapping[Status, int] = {"met": 0, "failed": 1, "undecided": 3}


class ContractError(ValueError):
    """A folder fails the contract that its recipe carries; the message is one line."""


@dataclass(frozen=True)
class Clause:
    """One bound, held against what was measured.

    Attributes:
        name: Field of `ContractConfig`.
        bound: The bound.
        value: What was measured; None where nothing was.
        low: Lower end of its 95 % interval; the value itself where it has none to have.
        high: Upper end.
        unit: Of all of these.
        status: "met" or "failed" where the whole interval lies on that side of the bound, else "undecided".
        note: What would decide it.
    """

    name: str
    bound: float
    value: float | None
    low: float | None
    high: float | None
    unit: str
    status: Status
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def judge(contract: ContractConfig, row: Mapping[str, Any]) -> list[Clause]:
    """Hold a row of `results.json` against a contract.

    Args:
        contract: The bounds.
        row: A model's row, measured beside its baseline.

    Example:
        >>> row = {"disk_bytes": 50e6, "change": {"drop": 0.6, "low": -0.2, "high": 1.4, "unit": "points", "n": 1000}}
        >>> [(clause.name, clause.status) for clause in judge(ContractConfig(max_drop=1.0, max_mb=60), row)]
        [('max_drop', 'undecided'), ('max_mb', 'met')]
    """
    found = []
    if contract.max_drop is not None:
        found.append(_judge_drop(contract.max_drop, row.get("change")))
    if contract.min_speedup is not None:
        found.append(_judge_time("min_speedup", contract.min_speedup, row.get("speedup"), "median", "x"))
    if contract.max_mb is not None:
        size = row["disk_bytes"] / 1e6
        status: Status = "met" if size <= contract.max_mb else "failed"
        found.append(Clause("max_mb", contract.max_mb, size, size, size, "MB", status))
    if contract.max_latency_ms is not None:
        found.append(_judge_time("max_latency_ms", contract.max_latency_ms, row.get("latency"), "median_ms", "ms"))
    return found


def _judge_drop(bound: float, change: Mapping[str, Any] | None) -> Clause:
    if change is None:
        return Clause(
            "max_drop", bound, None, None, None, "points", "undecided", "nothing was scored; give labelled data"
        )
    value, low, high = (float(change[key]) for key in ("drop", "low", "high"))
    status = _side(-high, -low, -bound)
    note = "" if status != "undecided" else _enough(value, low, high, bound, int(change["n"]), "examples")
    return Clause("max_drop", bound, value, low, high, change["unit"], status, note)


def _judge_time(name: str, bound: float, measured: Mapping[str, Any] | None, key: str, unit: str) -> Clause:
    if measured is None:
        return Clause(name, bound, None, None, None, unit, "undecided", "nothing was timed against a baseline")
    value, low, high = (measured.get(end) for end in (key, "low", "high"))
    if low is None or high is None:
        return Clause(name, bound, value, None, None, unit, "undecided", "6 rounds at least give an interval")
    status = _side(low, high, bound) if name.startswith("min") else _side(-high, -low, -bound)
    rounds = int(measured.get("rounds") or 15)
    note = "" if status != "undecided" else _enough(float(value or 0), low, high, bound, rounds, "rounds")
    return Clause(name, bound, value, low, high, unit, status, note)


def _side(low: float, high: float, least: float) -> Status:
    """Whether an interval lies above a bound, below it, or across."""
    return "met" if low >= least else "failed" if high < least else "undecided"


def _enough(value: float, low: float, high: float, bound: float, n: int, what: str) -> str:
    """About how many examples would decide it, if the estimate stays: intervals shrink with the root of their number."""
    half = high - value if value <= bound else value - low
    if bound == value or not math.isfinite(half):
        return f"the estimate is at the bound, so more {what} may never decide it"
    needed = math.ceil(n * (half / (bound - value)) ** 2)
    rounded = math.ceil(needed / (scale := 10 ** max(0, len(str(needed)) - 2))) * scale
    return f"about {rounded:,} {what} would decide it, if the estimate stays ({n:,} were used)"


def verdict(clauses: Iterable[Clause]) -> Status:
    """Of all clauses: failed if any is, undecided if any is and none failed.

    Example:
        >>> verdict([])
        'met'
    """
    statuses = {clause.status for clause in clauses}
    return "failed" if "failed" in statuses else "undecided" if "undecided" in statuses else "met"


def best_verdict(verdicts: Sequence[Status]) -> Status:
    """Of several models that are alternatives: it is enough that one keeps the contract.

    Example:
        >>> best_verdict(["failed", "undecided"])
        'undecided'
    """
    return min(verdicts, key=["met", "undecided", "failed"].index)


def describe(clause: Clause) -> str:
    """A clause in one line.

    Example:
        >>> describe(Clause("max_mb", 60.0, 66.6, 66.6, 66.6, "MB", "failed"))
        'at most 60 MB on disk: 66.6 MB: failed'
    """
    note = f" ({clause.note})" if clause.note else ""
    return f"{wanted(clause)}: {measured(clause)}: {clause.status}{note}"


def wanted(clause: Clause) -> str:
    """What a clause asks for."""
    return _WORDS[clause.name][0].format(bound=f"{clause.bound:g}", unit=clause.unit)


def measured(clause: Clause) -> str:
    """What was measured for a clause, with its interval."""
    digits = _WORDS[clause.name][1]
    if clause.value is None:
        return "not measured"
    unit = clause.unit if clause.unit == "x" else f" {clause.unit}"
    interval = ""
    if clause.low is not None and clause.low != clause.high:
        interval = f" [{clause.low:.{digits}f}, {clause.high:.{digits}f}]"
    return f"{clause.value:.{digits}f}{unit}{interval}"


_WORDS = {
    "max_drop": ("at most {bound} {unit} worse", 2),
    "min_speedup": ("at least {bound}x as fast", 2),
    "max_mb": ("at most {bound} MB on disk", 1),
    "max_latency_ms": ("at most {bound} ms a batch", 1),
}


def require_contract(folder: str | Path) -> None:
    """Refuse a folder that fails the contract of the recipe that made it, by the numbers that were measured then.

    What could not be decided is not refused, and neither is a folder without a contract.

    Args:
        folder: A model's folder with its `results.json`.

    Raises:
        ContractError: It fails.
        ValueError: `results.json` is not what a run writes.
    """
    results = read_results(Path(folder))
    contract = results.get("contract")
    if contract is None:
        return
    for row in results.get("rows", []):
        if row.get("folder") == ".":
            failed = [clause for clause in judge(contract_of(results), row) if clause.status == "failed"]
            if failed:
                raise ContractError(
                    f"{folder} fails the contract of its recipe: {'; '.join(describe(clause) for clause in failed)}; "
                    "compress less, or change the contract and run again"
                )


def contract_of(results: Mapping[str, Any]) -> ContractConfig:
    """The contract in `results.json`.

    Raises:
        ValueError: It is none.
    """
    try:
        return ContractConfig.model_validate(results["contract"], strict=False)
    except ValueError:
        raise ValueError("the contract in results.json is not what a run writes; measure the model again") from None
