"""The report: everything that a run measured on one page, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import hfcompress
from hfcompress.checkpoints.adapters import ADAPTER_FILE, read_config
from hfcompress.checkpoints.record import read_layers
from hfcompress.checkpoints.staging import staged_file
from hfcompress.hub.card import (
    SHOWN_CLASSES,
    describe_steps,
    steps_of,
    summarize,
    teacher_of,
    units_of,
    ways_to_load,
)
from hfcompress.hub.contract import contract_of, judge, measured, verdict, wanted
from hfcompress.hub.figures import Point, draw_bars, draw_curves, draw_points
from hfcompress.hub.picture import curves_of
from hfcompress.hub.results import (
    RESULTS_FILE,
    base_name,
    class_changes,
    command_without_paths,
    is_finite,
    read_results,
    repository_of,
    words_of_data,
    words_of_lineage,
    words_of_row,
    words_of_rows,
    words_of_steps,
    words_of_threads,
)
from hfcompress.measurement.metrics import PERCENTAGES

REPORT_FILE = "report.html"
_PAGES = Path(__file__).with_name("pages")


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run, or of one model.

    Args:
        folder: The folder of a run, or that of a model with its `results.json`.
        path: The file to write; None is `report.html` in the folder.

    Returns:
        The file.

    Raises:
        ValueError: There is nothing to report, or `results.json` is not what a run writes; one line.
        OSError: The file cannot be written.
    """
    folder = Path(folder)
    page = render_report(folder)
    path = folder / REPORT_FILE if path is None else Path(path)
    with staged_file(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def render_report(folder: Path) -> str:
    """The report as HTML; see `write_report`."""
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder} holds no {RESULTS_FILE}; give the folder of a run (hfcompress run), or of a model that hfcompress pruned or "
            "quantized"
        )
    results = read_results(folder)
    rows = results.get("rows", [])
    chosen = chosen_row(rows)
    about = _about_model(folder, chosen)
    contracts = _contracts(results)
    compared = class_changes(rows[0], chosen) if chosen is not None and chosen is not rows[0] else []
    return render_page(
        "report.html",
        title=results.get("name") or folder.resolve().name,
        task=results.get("task"),
        verdict=_run_verdict(contracts),
        contracts=contracts,
        contract_notes=[
            f"{contract['name']}, {clause['wanted']}: {clause['note']}."
            for contract in contracts
            for clause in contract["clauses"]
            if clause["note"]
        ],
        tiles=_tiles(rows[0], chosen) if chosen is not None and chosen is not rows[0] else [],
        baseline=rows[0]["name"] if rows else "",
        chosen=chosen["name"] if chosen is not None else "",
        rows=[words_of_row(row) for row in rows],
        labels=words_of_rows(results),
        effects=words_of_steps(rows) if len(rows) > 2 else [],
        tradeoff=draw_tradeoff(rows),
        curves=_curves(results.get("history") or {}),
        classes=compared[:SHOWN_CLASSES],
        class_count=len(compared),
        base_model=repository_of(results.get("base_model")) or base_name(results),
        data=words_of_data(results),
        licences=words_of_lineage(results),
        environment=_environment(results),
        command=command_without_paths(results.get("command")),
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False) if results.get("recipe") else None,
        **about,
    )


def render_page(template: str, **content: Any) -> str:
    """A page of the package; all that is put into it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["split"] = _split
    return environment.get_template(template).render(version=hfcompress.__version__, **content)


def _split(text: str) -> tuple[str, str]:
    """A number, and the interval behind it."""
    for mark in (" [", " ("):
        value, bracket, rest = text.partition(mark)
        if bracket:
            return value, bracket.strip() + rest
    return text, ""


def chosen_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that a page is about: the model in this folder, the student of a run, or the last one."""
    for folder in (".", "student"):
        for row in rows:
            if row.get("folder") == folder:
                return row
    return rows[-1] if rows else None


def _about_model(folder: Path, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the model itself says: what was done, what is left, how to load it."""
    nothing = {
        "summary": "",
        "steps": ["Not known: the model is not in this folder."],
        "bars": None,
        "ways": [],
        "teacher": "none",
    }
    place = folder / (row.get("folder") or ".") if row is not None else folder
    home = folder.resolve()
    if not place.resolve().is_relative_to(home) or not any(
        (place / n).is_file() for n in ("config.json", ADAPTER_FILE)
    ):
        return nothing
    config = read_config(place)
    units = units_of(config)
    name = home.name if place.resolve() == home else f"{home.name}/{place.name}"
    return {
        "summary": summarize(config, units),
        "steps": describe_steps(steps_of(config)),
        "bars": draw_bars(units, layers=read_layers(config)) if units else None,
        "ways": ways_to_load(place, config, f"path/to/{name}"),
        "teacher": teacher_of(steps_of(config)),
    }


def _contracts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the contract says of each new model."""
    if not results.get("contract"):
        return []
    contract, found = contract_of(results), []
    for row in results["rows"][1:]:
        clauses = judge(contract, row)
        words = [{"wanted": wanted(c), "found": measured(c), "status": c.status, "note": c.note} for c in clauses]
        found.append({"name": row["name"], "status": verdict(clauses), "clauses": words})
    return found


def _run_verdict(contracts: list[dict[str, Any]]) -> str | None:
    statuses = [contract["status"] for contract in contracts]
    return next((status for status in ("met", "undecided", "failed") if status in statuses), None)


def _tiles(first: Mapping[str, Any], row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers that matter most, with their intervals."""
    tiles = []
    speedup = row.get("speedup")
    if speedup:
        ends = [speedup.get(end) for end in ("low", "high")]
        spread = f"95 % interval {ends[0]:.2f} to {ends[1]:.2f}" if is_finite(*ends) else ""
        tiles.append({"figure": f"{speedup['median']:.2f}×", "what": "as fast", "range": spread})
    change, metric = row.get("change"), row.get("metric")
    if change and metric:
        what = f"{'per cent of ' if change['unit'] != 'points' else 'points of '}{metric['name'].replace('_', ' ')}"
        figure = f"{-change['drop'] or 0.0:+.2f}".replace("-", "−")
        spread = f"95 % interval {-change['high']:+.2f} to {-change['low']:+.2f}".replace("-", "−")
        if change["unit"] != "points":  # more perplexity is worse
            figure, spread = f"{change['drop']:+.1f} %", f"95 % interval {change['low']:+.1f} to {change['high']:+.1f}"
            what = metric["name"].replace("_", " ")
        tiles.append({"figure": figure, "what": what, "range": spread})
    disk, before = row["disk_bytes"] / 1e6, first["disk_bytes"] / 1e6
    if before:
        share = f"{100 * (disk / before - 1):+.0f} %".replace("-", "−")
        tiles.append({"figure": share, "what": "on disk", "range": f"{disk:.1f} MB after {before:.1f} MB"})
    energy, spent = row.get("energy"), first.get("energy")
    if energy and spent and spent["joules_per_input"] > 0:
        share = f"{100 * (energy['joules_per_input'] / spent['joules_per_input'] - 1):+.0f} %".replace("-", "−")
        after = f"{energy['joules_per_input']:.3g} J after {spent['joules_per_input']:.3g} J an input"
        tiles.append({"figure": share, "what": "energy", "range": after})
    return tiles


def draw_tradeoff(rows: list[dict[str, Any]]) -> Any:
    """Score against latency of all rows with a score; None where there are not two with numbers that can be drawn."""
    points = []
    for row in rows:
        metric, latency = row.get("metric") or {}, row["latency"]
        ends: list[Any] = [part.get(key) for part, keys in ((latency, _LATENCY), (metric, _SCORE)) for key in keys]
        if is_finite(*ends):
            points.append(Point(row["name"], (ends[0], ends[1], ends[2]), (ends[3], ends[4], ends[5])))
    if len(points) < 2 or len(points) < len(rows):
        return None
    name = rows[0]["metric"]["name"]
    latency = words_of_rows({"rows": rows})["latency_label"]
    label = f"latency in ms ({latency})"
    return draw_points(points, x_label=label, y_label=name.replace("_", " "), percent=name in PERCENTAGES)


_LATENCY, _SCORE = ("p10_ms", "median_ms", "p90_ms"), ("low", "value", "high")


def _curves(history: Mapping[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    found = []
    for name, log in history.items():
        curves = curves_of(log)
        if not curves:
            continue
        seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None)
        words = f"{seconds:,.0f} seconds of training" if is_finite(seconds) else ""
        found.append({"name": name, "picture": draw_curves(curves), "seconds": words})
    return found


def _environment(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Under which conditions all this was measured."""
    rows = results.get("rows") or []
    found: list[tuple[str, Any]] = []
    if rows:
        latency = rows[0]["latency"]
        size = words_of_rows(results)["latency_label"]
        found += [
            ("Device", latency["device"]),
            (
                "Settings",
                f"{words_of_threads(latency['threads'])}, {size}, {latency['dtype']}, {latency['rounds']} rounds",
            ),
            ("Energy", rows[0]["energy"]["source"] if rows[0].get("energy") else "not measurable on that machine"),
        ]
    found.append(
        ("Versions", ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()))
    )
    found += [("Date", results.get("date")), ("Seed", results.get("seed"))]
    commit = results.get("commit")
    found.append(("Commit", f"{commit}{' with local changes' if results.get('dirty') else ''}" if commit else None))
    fingerprint = (results.get("data") or {}).get("fingerprint")
    found.append(("Evaluation data", f"SHA-256 {fingerprint}..." if fingerprint else None))
    return [(name, str(value)) for name, value in found if value not in (None, "")]
