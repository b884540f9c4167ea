"""Benchmark: MiniLM fine-tuned on SST-2, pruned to 2x measured encoder speedup with distillation, in one epoch of 20,000.

    python scripts/bench/sst2_2x.py --teacher PATH --train sst2_train.parquet --eval sst2_dev.parquet sst2_test.parquet

Writes scripts/bench/results/sst2_2x.json, and the pruned model, its card and results under --output.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from facts import run_facts
from sentences import open_task

from hfcompress import CompressionTrainer, Recipe
from hfcompress.config import MeasureConfig
from hfcompress.hub import save_probe, verify_folder, write_card
from hfcompress.measurement import accuracy, mcnemar
from hfcompress.runs.arguments import training_arguments
from hfcompress.runs.evaluation import measure_folders, predict, rate_on
from hfcompress.runs.table import format_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sst2_2x.json"
SENTENCES = 20_000

RECIPE = {
    "distill": {
        "task": {"weight": 0.5},
        "logits": {"weight": 0.5, "temperature": 2.0},
        "hidden": {"weight": 10.0, "layers": "all"},
    },
    "prune": {
        "target": {"speedup": 2.1, "scope": "layers", "batch": 32, "length": 64},
        "units": ["heads", "neurons", "sublayers"],
        "criterion": {"name": "obs", "samples": 1024},
        "schedule": {"name": "polynomial", "start": 0.0, "end": 0.1, "updates": 3},
    },
    "train": {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-4,
        "warmup_steps": 30,
        "logging_steps": 50,
        "save_strategy": "no",
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "group_by_length",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the fine-tuned model")
    parser.add_argument("--train", required=True, help="parquet file with sentence and label")
    parser.add_argument("--eval", required=True, nargs="+", help="parquet files, pooled")
    parser.add_argument("--output", default="runs/bench-sst2-2x")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()

    output = Path(options.output)
    recipe = Recipe.from_dict({**RECIPE, "seed": options.seed}, source="the benchmark")
    teacher, task = open_task(options.teacher, options.train, options.eval, seed=options.seed, max_train=SENTENCES)
    teacher.save_pretrained(output / "teacher")
    trainer = CompressionTrainer(
        model=copy.deepcopy(teacher),
        teacher=teacher,
        recipe=recipe,
        args=training_arguments(output / "checkpoints", recipe.train, seed=options.seed),
        train_dataset=task.train_dataset,
        data_collator=task.data_collator,
        processing_class=task.processing_class,
    )
    training_started = time.perf_counter()
    trainer.train()
    training_s = time.perf_counter() - training_started
    student = output / "student"
    trainer.save_model(str(student))
    save_probe(trainer.model, student)

    folders = {"teacher": output / "teacher", "pruned": student}
    measured = measure_folders(
        folders, rate_on(task), MeasureConfig(batch=32, length=64, threads=options.threads, rounds=21, warmup=3)
    )
    agreement = compare(teacher, trainer.model, task)
    figures = make_figures(measured, agreement)
    for row in measured:
        row["folder"] = Path(row["folder"]).name
    write_results(options, task, measured, figures, training_s=training_s, wall_s=time.perf_counter() - started)
    publish(student, measured)
    print(format_rows(measured))
    print(json.dumps(figures, indent=2))


def compare(teacher: torch.nn.Module, student: torch.nn.Module, task: Any) -> dict[str, Any]:
    """Paired comparison of the two models' predictions."""
    ours, labels = predict(student, task)
    theirs, _ = predict(teacher, task)
    right, before = ours == labels, theirs == labels
    difference = right.astype(float) - before.astype(float)
    return {
        "teacher": accuracy(theirs, labels).value,
        "student": accuracy(ours, labels).value,
        "points": 100 * float(difference.mean()),
        "standard_error_points": 100 * float(difference.std(ddof=1) / np.sqrt(len(difference))),
        "p_value": mcnemar(before, right),
        "n": len(labels),
    }


def make_figures(rows: list[dict[str, Any]], paired: dict[str, Any]) -> dict[str, Any]:
    teacher, pruned = rows
    speedup = pruned["layers_speedup"]
    return {
        "encoder_speedup": {
            "value": speedup["median"],
            "unit": "x, median of ratios round by round",
            "spread": [speedup["p10"], speedup["p90"]],
            "goal": ">= 2.0",
            "met": speedup["median"] >= 2.0,
        },
        "accuracy_lost": {
            "value": -paired["points"],
            "unit": "points, paired",
            "spread": paired["standard_error_points"],
            "goal": "<= 1.5",
            "met": -paired["points"] <= 1.5,
            "p_value": paired["p_value"],
        },
        "flops_reduction": {
            "value": teacher["flops_per_input"] / pruned["flops_per_input"],
            "unit": "x",
            "spread": None,
            "goal": None,
            "met": None,
        },
    }


def write_results(
    options: argparse.Namespace,
    task: Any,
    rows: list[dict[str, Any]],
    figures: dict[str, Any],
    *,
    training_s: float,
    wall_s: float,
) -> None:
    result = {
        **run_facts(seed=options.seed, threads=options.threads),
        "data": {
            "name": "SST-2, dev and test pooled",
            "train_n": len(task.train_dataset),
            "n": len(task.eval_dataset),
            "fingerprint": task.fingerprint,
        },
        "recipe": {section: RECIPE[section] for section in ("distill", "prune", "train")},
        "wall_s": round(wall_s, 1),
        "training_s": round(training_s, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "figures": figures,
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def publish(student: Path, rows: list[dict[str, Any]]) -> None:
    """Write the card of the pruned model."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    own = {
        "rows": [{**row, "folder": "." if row["folder"] == "student" else row["folder"]} for row in rows],
        "name": "minilm-sst2-pruned-2x",
        "data": {"name": "stanfordnlp/sst2", "train_n": result["data"]["train_n"], "eval_n": result["data"]["n"]},
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "command": result["command"],
        **{key: result[key] for key in ("date", "seed", "commit", "versions")},
    }
    (student / "results.json").write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    checks = verify_folder(student)
    if not all(check.ok for check in checks):
        sys.exit(f"the pruned model does not load: {checks}")
    write_card(student, base_model=own["base_model"], checks=checks, license="apache-2.0", language="en")


if __name__ == "__main__":
    main()
