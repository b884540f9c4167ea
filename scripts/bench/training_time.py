"""Benchmark: what gradual pruning costs beside plain fine-tuning for the same steps, and what it gives back by a model that gets faster.

    python scripts/bench/training_time.py --model PATH --train sst2_train.parquet

All runs are made in one process, from the same start and over the same batches, one after the other in every round and each round in
another order; what counts is the ratio to plain fine-tuning of the same round. The table of times is measured anew in each run
(normally it is kept on the machine). The pruner's own work takes the same time however long the run is, so few steps show it at its worst: the time
of a whole epoch is worked out from the parts and named so. Writes scripts/bench/results/training_time.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import logging
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from facts import run_facts

from hfcompress import CompressionTrainer, PlainTrainer, PruningTrainer, Recipe
from hfcompress.pruning import pruner as pruning
from hfcompress.runs.arguments import training_arguments
from hfcompress.tasks import prepare

RESULTS = Path(__file__).resolve().parent / "results" / "training_time.json"
TARGET = {"speedup": 2.0, "scope": "layers", "batch": 32, "length": 64, "threads": 1}
DISTILL = {"task": {"weight": 0.5}, "logits": {"weight": 0.5, "temperature": 2.0}}
EARLY = {"start": 0.0, "end": 0.3, "updates": 5}
# What each run does, and its goal as a multiple of the time of plain fine-tuning.
RUNS: dict[str, tuple[dict[str, Any], float | None]] = {
    "plain": ({}, None),
    "pruned_early": ({"prune": {"target": TARGET, "schedule": EARLY}}, 1.0),
    "pruned_by_default": ({"prune": {"target": TARGET}}, 1.0),
    "pruned_early_and_distilled": ({"prune": {"target": TARGET, "schedule": EARLY}, "distill": DISTILL}, 1.2),
    "pruned_by_default_and_distilled": ({"prune": {"target": TARGET}, "distill": DISTILL}, 1.2),
}
TRAIN = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "logging_steps": 100,
    "save_strategy": "no",
    "optim": "adamw_torch_fused",
    "train_sampling_strategy": "group_by_length",
    "disable_tqdm": True,
}
# Parts of the pruner's work: where the function stands, and what its time is called.
PARTS = {
    (pruning, "make_budget"): "table_of_times_s",
    (pruning, "rank_units"): "ranking_s",
    (pruning, "repair"): "repair_s",
    (pruning, "cut"): "cut_s",
    (pruning.Pruner, "_time"): "verification_s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the fine-tuned model, also the teacher")
    parser.add_argument("--train", required=True, help="parquet file with sentence and label")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS)[1:], default=list(RUNS)[1:], help="beside plain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS), help="file to write")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, Path(folder))
    result |= {
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=2))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs in all rounds, and the figures."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, dtype=torch.float32)
    data = {"train": options.train, "text": "sentence", "label": "label", "max_length": 64, "holdout": 0.01}
    recipe = Recipe.from_dict({"data": data})
    assert recipe.data is not None
    task = prepare(recipe.data, task="text-classification", model_name=options.model, seed=options.seed)
    epoch = math.ceil(len(task.train_dataset) / TRAIN["per_device_train_batch_size"])
    names = ["plain", *options.runs]
    go = functools.partial(run, model, task, seed=options.seed, folder=folder)
    go("plain", steps=max(2, options.steps // 20))  # what is slow at first is over then
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            rows[name].append(go(name, steps=options.steps))
            print(f"round {number + 1} {name} {json.dumps(rows[name][-1])}", flush=True)
    scale = epoch / options.steps
    figures: dict[str, Any] = {}
    for name in options.runs:
        goal = RUNS[name][1]
        pairs = list(zip(rows[name], rows["plain"], strict=True))
        figures[f"{name}_over_plain"] = ratio_figure(
            [mine["total_s"] / plain["total_s"] for mine, plain in pairs],
            f"ratio of wall times over {options.steps} steps, measured; median of rounds",
            goal,
        )
        figures[f"{name}_over_plain_epoch"] = ratio_figure(
            [(mine["pruner_s"] + scale * mine["training_s"]) / (scale * plain["training_s"]) for mine, plain in pairs],
            f"ratio for an epoch of {epoch} steps, extrapolated: the pruner's time + {scale:.2f} times the rest",
            goal,
        )
        figures[f"{name}_pruner"] = {
            "value": statistics.median(row["pruner_s"] for row in rows[name]),
            "unit": "s of the pruner's own work in a run, however long",
            "spread": [min(row["pruner_s"] for row in rows[name]), max(row["pruner_s"] for row in rows[name])],
            "goal": None,
            "met": None,
        }
    return {
        **run_facts(seed=options.seed),
        "data": {"name": "SST-2", "train_n": len(task.train_dataset), "n": None, "fingerprint": task.fingerprint},
        "train": TRAIN,
        "recipes": {name: RUNS[name][0] for name in names},
        "steps": options.steps,
        "steps_of_an_epoch": epoch,
        "figures": figures,
        "rows": rows,
    }


def ratio_figure(ratios: list[float], unit: str, goal: float | None) -> dict[str, Any]:
    value = statistics.median(ratios)
    return {
        "value": value,
        "unit": unit,
        "spread": [min(ratios), max(ratios)],
        "goal": None if goal is None else f"<= {goal}",
        "met": None if goal is None else value <= goal,
    }


def run(model: Any, task: Any, name: str, *, steps: int, seed: int, folder: Path) -> dict[str, float]:
    """Train a copy of a model; seconds of the whole, of the pruner's work and its parts, and of the rest."""
    recipe = Recipe.from_dict(RUNS[name][0])
    settings: dict[str, Any] = {
        "model": copy.deepcopy(model),
        "args": training_arguments(folder / "checkpoints", {**TRAIN, "max_steps": steps}, seed=seed),
        "train_dataset": task.train_dataset,
        "data_collator": task.data_collator,
        "processing_class": task.processing_class,
    }
    kind: Any = PlainTrainer
    if recipe.prune is not None:
        kind = PruningTrainer if recipe.distill is None else CompressionTrainer
        settings |= {"recipe": recipe} | ({} if recipe.distill is None else {"teacher": copy.deepcopy(model)})
    trainer = kind(**settings)
    # In a folder of its own the table of times is measured anew.
    tables = tempfile.mkdtemp(dir=folder)
    with mock.patch.dict(os.environ, HFCOMPRESS_CACHE=tables), clocks() as seconds:
        begun = time.perf_counter()
        trainer.train()
        total_s = time.perf_counter() - begun
    pruner_s = seconds.pop("pruner_s")
    row = {"total_s": total_s, "training_s": total_s - pruner_s, "pruner_s": pruner_s, **seconds}
    return {key: round(value, 2) for key, value in row.items()}


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds that the pruner takes while the context lasts: all of them, and those of the parts."""
    seconds = dict.fromkeys(("pruner_s", *PARTS.values()), 0.0)

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - begun

        return wrapper

    whole = {(pruning.Pruner, name): "pruner_s" for name in ("__init__", "step", "collect")}
    with contextlib.ExitStack() as stack:
        for (owner, name), part in (PARTS | whole).items():
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        yield seconds


if __name__ == "__main__":
    main()
