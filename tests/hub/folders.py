"""Saved folders for the tests of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfcompress.anatomy import find_sites
from hfcompress.checkpoints.record import add_step
from hfcompress.config import DistillConfig, PruneConfig
from hfcompress.hub import save_probe
from hfcompress.hub.card import RESULTS_FILE
from hfcompress.hub.verify import RouteCheck
from hfcompress.pruning import Plan, cut
from tests.families import choose_units, make_model

UNITS = {"encoder.0.heads": [2, 4], "encoder.0.neurons": [43, 48], "encoder.1.heads": [1, 4]}


def save_pruned(folder: Path, *, pattern: str = "both", teacher: str = "somebody/teacher") -> Any:
    """A BERT classifier, distilled and pruned according to its record, with its probe."""
    model = make_model("bert", "AutoModelForSequenceClassification")
    keep = choose_units(find_sites(model), pattern)
    if pattern == "even":  # the plain config of BERT has no word for fewer heads
        keep |= {site.name: tuple(range(site.units)) for site in find_sites(model, kinds=["heads"])}
    cut(model, Plan(keep))
    add_step(
        model.config,
        "distill",
        teacher=teacher,
        settings=DistillConfig(hidden={"weight": 0.25}).model_dump(),
        optimizer_steps=1234,
    )
    units = {name: list(pair) for name, pair in model.config.hfcompress["units"].items()}
    add_step(
        model.config,
        "prune",
        settings=PruneConfig(target={"sparsity": 0.4}).model_dump(),
        sparsity=0.4321,
        units=units,
        optimizer_steps=1234,
    )
    model.save_pretrained(folder)
    save_probe(model, folder)
    return model


def row(name: str, folder: str, value: float, **more: Any) -> dict[str, Any]:
    """A row as a run measures it."""
    return {
        "name": name,
        "folder": folder,
        "metric": {"name": "accuracy", "value": value, "low": value - 0.021, "high": value + 0.019, "n": 1500},
        "parameters": 22_713_216,
        "disk_bytes": 90_871_000,
        "latency": {
            "median_ms": 12.34,
            "p10_ms": 11.96,
            "p90_ms": 14.02,
            "rounds": 15,
            "batch": 32,
            "length": 64,
            "device": "cpu",
            "threads": 2,
            "dtype": "float32",
        },
        **more,
    }


def write_results(folder: Path, **changes: Any) -> None:
    """A `results.json` as a run writes it."""
    results = {
        "rows": [
            row("teacher", "teacher", 0.9123),
            row("pruned", ".", 0.9051, speedup={"median": 2.114}, layers_speedup={"median": 2.301}),
        ],
        "task": "text-classification",
        "data": {"name": "nyu-mll/glue", "train_n": 67349, "eval_n": 1500, "fingerprint": "0123456789abcdef"},
        "name": "run-student",
        "base_model": "google-bert/bert-base-uncased",
        "command": "hfcompress run recipe.yaml seed=7",
        "seed": 7,
        "date": "2026-01-02",
        "commit": "abcdef0",
        "versions": {"hfcompress": "0.1.0", "torch": "2.13.0"},
    }
    (folder / RESULTS_FILE).write_text(json.dumps({**results, **changes}))


def all_fine(folder: Path, routes: list[str], timeout_s: float) -> list[RouteCheck]:
    """Stands in for the fresh processes where these are not what is tested."""
    return [RouteCheck(route, True, 2e-7, 1e-5) for route in routes]


def none_fine(folder: Path, routes: list[str], timeout_s: float) -> list[RouteCheck]:
    return [RouteCheck(route, False, 0.25, 1e-5, "outputs differ from those at saving") for route in routes]
