"""Several runs side by side: what each lost and gained, paired where their models answered the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfcompress.hub.predictions import read_answers
from hfcompress.hub.report import draw_tradeoff, render_page
from hfcompress.hub.results import (
    RESULTS_FILE,
    read_results,
    words_of_change,
    words_of_data,
    words_of_row,
    words_of_rows,
    words_of_speedup,
    words_of_threads,
)
from hfcompress.measurement import Answers, Metric, compare_answers, compare_metrics

_CONDITIONS = ("device", "threads", "batch", "length", "dtype")


@dataclass(frozen=True)
class Entry:
    """A model of a run.

    Attributes:
        name: What it is called in the comparison.
        row: Its row of `results.json`.
        results: The whole of it.
        answers: What it answered, or None.
        fingerprint: Of the examples it answered, or None.
    """

    name: str
    row: dict[str, Any]
    results: dict[str, Any]
    answers: Answers | None
    fingerprint: str | None


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        entries: The models, the first is what the others are compared with.
        changes: What each other model lost against the first, as `asdict` of a `Change`; None where it cannot be said.
        folders: What the folders are called.
        settings: Keys of their recipes that differ, to the value in each; empty where not all have kept their recipe.
        warnings: What keeps numbers from being compared, a line each.
    """

    entries: list[Entry]
    changes: list[dict[str, Any] | None]
    folders: list[str]
    settings: dict[str, list[Any]]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        rows = [{**entry.row, "name": entry.name} for entry in self.entries]
        against = dict(zip([entry.name for entry in self.entries[1:]], self.changes, strict=True))
        settings = [
            dict(zip(self.settings, values, strict=True)) for values in zip(*self.settings.values(), strict=True)
        ]
        return {
            "rows": rows,
            "against_first": against,
            "settings": dict(zip(self.folders, settings, strict=False)),
            "warnings": self.warnings,
        }


def compare_folders(folders: Sequence[str | Path]) -> Comparison:
    """Put runs, or single models, side by side.

    Of a run's folder all new models take part; of a model's folder that model.

    Args:
        folders: Two or more, each with `results.json`.

    Raises:
        ValueError: A folder holds no results, or only one model is left to compare; one line.
    """
    groups = [_entries(Path(folder), several=len(folders) > 1) for folder in folders]
    entries = [entry for group in groups for entry in group]
    if len(entries) < 2:
        raise ValueError(
            "there is only one model to compare; give two folders, or the folder of a run with several models"
        )
    changes = [_change(entries[0], other) for other in entries[1:]]
    names = [Path(folder).resolve().name for folder in folders]
    settings = _settings([group[0].results for group in groups])
    return Comparison(entries, changes, names, settings, _warnings(entries, changes))


def _entries(folder: Path, *, several: bool) -> list[Entry]:
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder} holds no {RESULTS_FILE}; give folders of runs, or of models that hfcompress measured"
        )
    results = read_results(folder)
    rows = results.get("rows", [])
    if not rows:
        raise ValueError(f"{folder}/{RESULTS_FILE} has no rows: nothing was measured there")
    answers, fingerprint = read_answers(folder)
    own = [row for row in rows if row.get("folder") == "."]
    chosen = own or rows[1:] or rows
    label = folder.resolve().name
    return [
        Entry(
            label if own else f"{label}: {row['name']}" if several else row["name"],
            row,
            results,
            answers.get(row["name"]),
            fingerprint,
        )
        for row in chosen
    ]


def _change(first: Entry, other: Entry) -> dict[str, Any] | None:
    """What was lost between two models: paired on the same examples, else by their intervals; None of other metrics."""
    ours, theirs = first.row.get("metric"), other.row.get("metric")
    if not ours or not theirs or ours["name"] != theirs["name"]:
        return None
    same = first.fingerprint is not None and first.fingerprint == other.fingerprint
    if first.answers is not None and other.answers is not None and same and len(first.answers) == len(other.answers):
        return asdict(compare_answers(first.answers, other.answers))
    fields = ("name", "value", "n", "low", "high", "higher_is_better")
    before, after = (Metric(**{key: metric[key] for key in fields if key in metric}) for metric in (ours, theirs))
    return asdict(compare_metrics(before, after))


def _settings(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys of the recipes that are not the same in all; a section that some recipe lacks altogether is one key."""
    recipes = [each.get("recipe") or {} for each in results]
    if not all(recipes):
        return {}
    shared = {section for section in recipes[0] if all(section in recipe for recipe in recipes)}
    flat = [_flat({key: value if key in shared else "set" for key, value in recipe.items()}) for recipe in recipes]
    keys = dict.fromkeys(key for settings in flat for key in settings if key != "output")
    found = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested keys with dots between them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _warnings(entries: Sequence[Entry], changes: Sequence[Mapping[str, Any] | None]) -> list[str]:
    first, found, apart = entries[0], [], []
    for other, change in zip(entries[1:], changes, strict=True):
        differing = [
            f"{key} {first.row['latency'].get(key)} and {other.row['latency'].get(key)}"
            for key in _CONDITIONS
            if first.row["latency"].get(key) != other.row["latency"].get(key)
        ]
        if differing:
            found.append(f"latencies of {first.name} and {other.name} are not comparable: {'; '.join(differing)}")
        elif first.results is not other.results:
            apart.append(other.name)
        if change is None:
            found.append(f"scores of {first.name} and {other.name} are not comparable: not the same metric, or none")
        elif change["p_value"] is None:
            found.append(
                f"{first.name} and {other.name} did not answer the same examples, so their scores are compared unpaired"
            )
    if apart:
        found.append(
            f"the latency of {first.name} was not measured together with that of {', '.join(apart)}; speedups, each over its own "
            "baseline, say more (hfcompress measure times all in turn)"
        )
    return found


def format_comparison(found: Comparison) -> str:
    """As aligned text: the table, settings that differ, and warnings."""
    lines = [
        [
            "model",
            "score",
            "lost against the first",
            "parameters",
            "MB disk",
            "latency ms",
            "speedup over its baseline",
        ],
        *(_cells(entry, change) for entry, change in zip(found.entries, [None, *found.changes], strict=True)),
    ]
    blocks = [_aligned(lines)]
    if found.settings:
        shown = [[key, *(_shown(value) for value in values)] for key, values in found.settings.items()]
        blocks.append(_aligned([["setting", *found.folders], *shown]))
    blocks.append("\n".join(f"note: {warning}" for warning in found.warnings))
    return "\n\n".join(block for block in blocks if block)


def _cells(entry: Entry, change: Mapping[str, Any] | None) -> list[str]:
    words = words_of_row(entry.row)
    speedup = entry.row.get("speedup")
    score = words["metric"] if not entry.row.get("metric") else f"{entry.row['metric']['name']} {words['metric']}"
    faster = words_of_speedup(speedup) if speedup else "1"
    return [entry.name, score, words_of_change(change), words["parameters"], words["disk"], words["latency"], faster]


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def render_comparison(found: Comparison) -> str:
    """The comparison as a page like the report."""
    rows = [{**entry.row, "name": entry.name} for entry in found.entries]
    changes: list[dict[str, Any] | None] = [None, *found.changes]
    shown = [{**words_of_row(row), "lost": words_of_change(change)} for row, change in zip(rows, changes, strict=True)]
    labels = words_of_rows({"rows": rows})
    tests = list(dict.fromkeys(change["test"] for change in found.changes if change))
    units = [change["unit"] for change in found.changes if change]
    labels["lost_label"] = f"lost against 1, {units[0]}" if units else ""
    labels["latency_label"] = "see below" if len({_conditions(row) for row in rows}) > 1 else labels["latency_label"]
    same = len({(row.get("metric") or {}).get("name") for row in rows}) == 1
    firsts = {id(entry.results): entry for entry in reversed(found.entries)}.values()
    about = [(words_of_data(entry.results), _conditions(entry.row)) for entry in reversed(firsts)]
    return render_page(
        "compare.html",
        title="Comparison",
        names=[entry.name for entry in found.entries],
        folders=found.folders,
        rows=shown,
        labels=labels,
        tests=tests,
        chosen=None,
        tradeoff=draw_tradeoff(rows) if same else None,
        settings={key: [_shown(value) for value in values] for key, values in found.settings.items()},
        warnings=found.warnings,
        about=[(name, *words) for name, words in zip(found.folders, about, strict=True)],
    )


def _conditions(row: Mapping[str, Any]) -> str:
    latency = row["latency"]
    size = f"batch {latency['batch']}" + (f" x {latency['length']} tokens" if latency.get("length") else "")
    return f"{latency['device']}, {words_of_threads(latency['threads'])}, {size}, {latency['dtype']}"
