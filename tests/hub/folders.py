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


def change(drop: float, half: float) -> dict:
    ends = {"drop": drop, "low": drop - half, "high": drop + half, "unit": "points", "p_value": 0.0464}
    return {**ends, "test": "McNemar, exact", "n": 1500}


def speedup(median: float) -> dict:
    return {
        "median": median,
        "p10": median - 0.2,
        "p90": median + 0.2,
        "low": median - 0.1,
        "high": median + 0.1,
        "rounds": 15,
    }


def classes(*right: int) -> list[dict]:
    return [{"name": f"class {number}", "n": 100, "right": count} for number, count in enumerate(right)]


def save_run(folder, *, name: str = "small", label: str = "pruned", **changes) -> None:
    """A folder with a pruned model and everything that `results.json` can hold."""
    save_pruned(folder)
    rows = [
        row("teacher", "teacher", 0.9123, classes=classes(90, 80, 70)),
        row(
            label,
            ".",
            0.9051,
            speedup=speedup(2.11),
            layers_speedup={"median": 2.3},
            origin="teacher",
            change=change(0.72, 0.5),
            classes=classes(89, 60, 75),
            energy={"joules_per_input": 0.021, "source": "RAPL, processor packages and memory"},
        ),
        row(
            f"{label} + int8",
            "student-int8",
            0.9011,
            speedup=speedup(1.2),
            origin=label,
            change=change(1.12, 0.6),
            step={"change": change(0.4, 0.3), "speedup": speedup(0.57)},
            disk_bytes=30_000_000,
        ),
    ]
    log = [{"step": step, "loss": 1 / step, "loss_task": 0.5 / step, "sparsity": step / 100} for step in range(1, 51)]
    lineage = {
        "base": {"name": "google-bert/bert-base-uncased", "licence": "apache-2.0", "said_by": "its card"},
        "data": {"name": "films", "licence": None, "said_by": None},
    }
    more = {
        "rows": rows,
        "name": name,
        "contract": {"max_drop": 1.0, "min_speedup": 1.8, "max_mb": 100.0},
        "history": {"student": [*log, {"step": 50, "eval_loss": 0.4}, {"step": 50, "train_runtime": 173.2}]},
        "lineage": lineage,
        "recipe": {"task": "text-classification", "prune": {"target": {"speedup": 2.0}}},
    }
    write_results(folder, **{**more, **changes})


def all_fine(folder: Path, routes: list[str], timeout_s: float) -> list[RouteCheck]:
    """Stands in for the fresh processes where these are not what is tested."""
    return [RouteCheck(route, True, 2e-7, 1e-5) for route in routes]


def none_fine(folder: Path, routes: list[str], timeout_s: float) -> list[RouteCheck]:
    return [RouteCheck(route, False, 0.25, 1e-5, "outputs differ from those at saving") for route in routes]
