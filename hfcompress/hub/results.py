"""`results.json`: what a run measured, read, checked and put into words; the card and the report show nothing else."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hfcompress.measurement.metrics import PERCENTAGES

RESULTS_FILE = "results.json"
FASTER = 1.05  # times as fast; less is no gain
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w.-]*")


class _Part(BaseModel):
    """A part of `results.json`; what is not named is allowed, and so are whole numbers for others."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Metric(_Part):
    name: str
    value: float
    low: float
    high: float
    n: int


class _Latency(_Part):
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    batch: int
    length: int | None = None
    device: str
    threads: int
    dtype: str
    compiled: bool = False
    low: float | None = None
    high: float | None = None


class _Speedup(_Part):
    median: float
    low: float | None = None
    high: float | None = None


class _Change(_Part):
    drop: float
    low: float
    high: float
    unit: str
    p_value: float | None
    test: str
    n: int


class _Step(_Part):
    change: _Change | None = None
    speedup: _Speedup


class _Class(_Part):
    name: str
    n: int
    right: int


class _Energy(_Part):
    joules_per_input: float
    source: str


class _Row(_Part):
    name: str
    folder: str = ""
    metric: _Metric | None = None
    latency: _Latency
    speedup: _Speedup | None = None
    layers_speedup: _Speedup | None = None
    parameters: int
    disk_bytes: int
    change: _Change | None = None
    origin: str | None = None
    step: _Step | None = None
    classes: list[_Class] | None = None
    energy: _Energy | None = None


class _Source(_Part):
    name: str
    licence: str | None
    said_by: str | None = None


class _Results(_Part):
    rows: list[_Row] = []
    name: str | None = None
    task: str | None = None
    data: dict[str, Any] | None = None
    command: str | None = None
    base_model: str | None = None
    versions: dict[str, str] = {}
    lineage: dict[str, _Source] = {}
    history: dict[str, list[dict[str, float]]] = {}
    recipe: dict[str, Any] | None = None
    contract: dict[str, float] | None = None


def read_results(folder: Path) -> dict[str, Any]:
    """The numbers that a run measured; empty if there are none.

    Raises:
        ValueError: The file is not a JSON object with a list of rows, or a row lacks a number.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON; measure the model again") from None
    if not isinstance(results, dict) or not isinstance(results.get("rows", []), list):
        raise ValueError(f"{path} must hold an object with a list of rows; measure the model again")
    try:
        _Results.model_validate(results)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        reason = f"no {problem['loc'][-1]!r}" if problem["type"] == "missing" else f"{key}: {problem['msg']}"
        raise ValueError(f"{path} lacks numbers that the card shows ({reason}); measure the model again") from None
    return results


# ---- in words ----


def words_of_row(row: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a model in the table."""
    metric, latency, energy = row.get("metric"), row["latency"], row.get("energy")
    speedup, layers = row.get("speedup"), row.get("layers_speedup")
    return {
        "name": row["name"],
        "metric": words_of_score(metric) if metric is not None else "not measured",
        "lost": words_of_change(row.get("change")),
        "parameters": f"{row['parameters'] / 1e6:.2f} M",
        "disk": f"{row['disk_bytes'] / 1e6:.1f}",
        "latency": f"{latency['median_ms']:.1f} ({latency['p10_ms']:.1f} to {latency['p90_ms']:.1f})",
        "speedup": words_of_speedup(speedup) if speedup else "1",
        "layers": f"{layers['median']:.2f}x" if layers else "" if latency.get("compiled") else "1",
        "energy": f"{energy['joules_per_input']:.3g}" if energy else "",
    }


def words_of_score(metric: Mapping[str, Any]) -> str:
    """Value and interval; shares in per cent."""
    factor, digits = (100, 2) if metric["name"] in PERCENTAGES else (1, 4)
    value, low, high = (f"{factor * metric[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def words_of_change(change: Mapping[str, Any] | None) -> str:
    """What was lost, with interval and p-value; a gain is negative.

    Example:
        >>> words_of_change({"drop": 1.004, "low": 0.03, "high": 1.98, "p_value": 0.0464})
        '1.00 [0.03, 1.98], p = 0.046'
    """
    if change is None:
        return ""
    p_value = change.get("p_value")
    test = "" if p_value is None else ", p < 0.001" if p_value < 0.001 else f", p = {p_value:.2g}"
    return f"{change['drop']:.2f} [{change['low']:.2f}, {change['high']:.2f}]{test}".replace("-0.00", "0.00")


def words_of_speedup(speedup: Mapping[str, Any]) -> str:
    """The median, with its interval where there is one."""
    if speedup.get("low") is None or speedup.get("high") is None:
        return f"{speedup['median']:.2f}x"
    return f"{speedup['median']:.2f}x [{speedup['low']:.2f}, {speedup['high']:.2f}]"


def words_of_threads(count: int) -> str:
    """How many threads."""
    return f"{count} thread{'s' * (count != 1)}"


def words_of_rows(results: Mapping[str, Any]) -> dict[str, Any]:
    """The heads of the table's columns, and under which conditions its numbers were measured."""
    rows = results.get("rows") or []
    if not rows:
        return {
            "metric_label": "",
            "lost_label": "",
            "latency_label": "",
            "energy_label": "",
            "notes": [],
            "conditions": None,
        }
    first = rows[0]
    metric, latency = first.get("metric"), first["latency"]
    size = f"batch {latency['batch']}" + (f" x {latency['length']} tokens" if latency.get("length") else "")
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    changes = [row["change"] for row in rows if row.get("change")]
    energies = [row["energy"] for row in rows if row.get("energy")]
    bracketed = any((row.get("speedup") or {}).get("low") is not None for row in rows)
    notes = ["In brackets: the 95 % interval."]
    if metric and metric["name"] == "agreement":
        notes.append(f"Agreement: the share of predictions that are those of {first['name']}.")
    if changes:
        tests = " and ".join(dict.fromkeys(change["test"] for change in changes))
        notes.append(f"Lost: against the first row on the same examples, a gain is negative; test: {tests}.")
    notes.append(
        f"Latency: median (10th to 90th percentile) of {latency['rounds']} rounds, all models in turn in one process; "
        "speedups are medians of the ratios round by round"
        + (" with the interval of the median" if bracketed else "")
        + (
            ". All went through torch.compile."
            if latency.get("compiled")
            else ", that of the layers without embeddings and head."
        )
    )
    notes += words_of_no_gain(rows)
    if energies:
        notes.append(f"Energy: {energies[0]['source']}, idle power included.")
    return {
        "metric_label": f"{metric['name'].replace('_', ' ')}, n = {metric['n']:,}" if metric else "score",
        "lost_label": f"lost, {changes[0]['unit']}" if changes else "",
        "latency_label": size,
        "energy_label": "joules per input" if energies else "",
        "notes": notes,
        "conditions": (
            f"On {latency['device']}, {words_of_threads(latency['threads'])}, {size}, {latency['dtype']}"
            f"{', compiled' if latency.get('compiled') else ''}; {versions}; "
            f"seed {results.get('seed')}; {results.get('date')}; commit {results.get('commit') or 'not known'}."
        ),
    }


def words_of_steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What each step from a model to the next did to score, time and size; empty where there is only one."""
    found = []
    for origin, row, effect in _steps(rows):
        found.append(
            {
                "from": origin["name"],
                "to": row["name"],
                "lost": words_of_change(effect.get("change")) or "not measured",
                "speedup": words_of_speedup(effect["speedup"]) if effect.get("speedup") else "not measured",
                "size": f"{100 * (row['disk_bytes'] / origin['disk_bytes'] - 1):+.0f} %"
                if origin["disk_bytes"]
                else "",
            }
        )
    return found


def _steps(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """Each model, what it was made from (before it), and what was lost and gained by that (after it)."""
    by_name = {row["name"]: row for row in rows}
    for row in rows[1:]:
        origin = by_name.get(row.get("origin") or rows[0]["name"], rows[0])
        yield origin, row, row.get("step") or {"change": row.get("change"), "speedup": row.get("speedup")}


def words_of_no_gain(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence about each model that is not faster (by a twentieth) than what it was made from, or not smaller, as measured.

    Example:
        >>> whole = {"name": "original", "disk_bytes": 91_000_000}
        >>> words_of_no_gain([whole, {"name": "nf4-dq", "disk_bytes": 51_000_000, "speedup": {"median": 0.8}}])
        ['nf4-dq is smaller, not faster: 56 % of the size of original, 0.80x its speed.']
        >>> words_of_no_gain([whole, {"name": "pruned", "disk_bytes": 51_000_000, "speedup": {"median": 1.8}}])
        []
        >>> words_of_no_gain([whole, {"name": "wide", "disk_bytes": 101_000_000, "speedup": {"median": 0.9}}])
        ['wide is neither smaller nor faster: 111 % of the size of original, 0.90x its speed.']
    """
    found = []
    for origin, row, effect in _steps(rows):
        if not effect.get("speedup"):
            continue
        speed, size = effect["speedup"]["median"], row["disk_bytes"] / origin["disk_bytes"]
        kind = {
            (True, False): "smaller, not faster",
            (False, True): "faster, not smaller",
            (False, False): "neither smaller nor faster",
        }.get((size < 1, speed > FASTER))
        if kind is not None:
            found.append(
                f"{row['name']} is {kind}: {100 * size:.0f} % of the size of {origin['name']}, {speed:.2f}x its speed."
            )
    return found


def class_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Share of each class that is found, before and after, those that lost most first.

    Args:
        before: A row of the table.
        after: Another one, measured on the same examples.

    Returns:
        Name, n, shares before and after in [0, 1], and points lost; empty if there are no classes, or none with examples.

    Example:
        >>> rows = [{"classes": [{"name": "up", "n": 4, "right": right}]} for right in (4, 3)]
        >>> class_changes(*rows)
        [{'name': 'up', 'n': 4, 'before': 1.0, 'after': 0.75, 'lost': 25.0}]
    """
    found = []
    for ours, theirs in zip(before.get("classes") or [], after.get("classes") or [], strict=False):
        if ours["n"] > 0 and (ours["name"], ours["n"]) == (theirs["name"], theirs["n"]):
            first, second = ours["right"] / ours["n"], theirs["right"] / ours["n"]
            lost = round(100 * (first - second), 6)
            found.append({"name": ours["name"], "n": ours["n"], "before": first, "after": second, "lost": lost})
    return sorted(found, key=lambda change: -change["lost"])


def words_of_data(results: Mapping[str, Any]) -> str:
    """The data, and how many examples of it served what."""
    data = results.get("data") or {}
    if not data:
        return "not said"
    uses = (("train_n", "for training"), ("calibration_n", "for calibration"), ("eval_n", "for evaluation"))
    counts = [f"{data[key]:,} {use}" for key, use in uses if isinstance(data.get(key), int)]
    counts[:1] = [count.replace(" for", " examples for", 1) for count in counts[:1]]
    listed = " and ".join(filter(None, [", ".join(counts[:-1]), *counts[-1:]]))
    return f"{data.get('name')}, {listed}" if counts else str(data.get("name"))


def words_of_lineage(results: Mapping[str, Any]) -> dict[str, str]:
    """The licence of "base", "teacher" and "data", as far as it is said anywhere; empty where there is no such part.

    Example:
        >>> words_of_lineage({"lineage": {"data": {"name": "films", "licence": None}}})
        {'base': '', 'teacher': '', 'data': 'licence not known'}
    """
    lineage, words = results.get("lineage") or {}, {}
    for part in ("base", "teacher", "data"):
        source = lineage.get(part)
        if not source:
            words[part] = ""
        elif source.get("licence"):
            words[part] = f"licence {source['licence']}, as {source['said_by']} says"
        else:
            words[part] = "licence not known"
    return words


def base_name(results: Mapping[str, Any]) -> str:
    """What the model was made from is called, where it is on no Hub."""
    return ((results.get("lineage") or {}).get("base") or {}).get("name") or "not said"


def repository_of(name: str | None) -> str | None:
    """A name that can be a repository; a path of this machine cannot, and stays out of the card."""
    return name if name and _REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def public_name(name: Any) -> str:
    """How a model is called in the card: its repository, or the last part of a path of this machine."""
    return repository_of(str(name or "")) or Path(str(name or "")).name or "not said"


def without_paths(value: Any) -> Any:
    """Plain data, or a command line, with the absolute paths of this machine shortened to their last part.

    Example:
        >>> without_paths({"train": "/home/me/films.csv", "max_length": 64})
        {'train': 'path/to/films.csv', 'max_length': 64}
    """
    if isinstance(value, Mapping):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(each) for each in value]
    return f"path/to/{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value


def command_without_paths(command: str | None) -> str | None:
    """A command line with the absolute paths of this machine shortened to their last part."""
    if command is None:
        return None
    words = []
    for word in shlex.split(command):
        key, equals, value = word.rpartition("=")
        words.append(f"{key}{equals}{without_paths(value)}")
    return shlex.join(words)


def is_finite(*numbers: Any) -> bool:
    """Whether all of these are numbers that can be drawn."""
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
