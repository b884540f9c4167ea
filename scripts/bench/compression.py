"""Benchmark: pruning while fine-tuning, ours and other means, each for the same steps on the same data, with distillation or without.

    python scripts/bench/compression.py --task banking77 --teacher PATH --train FILE --eval FILE... --target 8 --method ours --seed 0
    python scripts/bench/compression.py --summary

One run is one file under scripts/bench/results/compression/; --summary prints the table of all of them and writes
scripts/bench/results/compression.json. Methods (with --no-distillation their names end in -plain):

    ours           optimal brain surgeon under measured time, least-squares repair, over all units; with --full-width all but the hidden width
    random         the same share of random units everywhere, as much as the measured time asks for
    magnitude      the units with the largest weights under measured time
    layers         every so many-th layer of the teacher (as few layers as come nearest to the target)
    torch_pruning  Torch-Pruning 1.6 (pip install torch-pruning): its dependency graph and its Taylor importance on 512 examples; the same
                   share of heads and neurons everywhere, the one whose measured time comes nearest to the target; all at the start
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from facts import run_facts
from sentences import ask_once, open_task

from hfcompress import CompressionTrainer, DistillationTrainer, PlainTrainer, PruningTrainer, Recipe
from hfcompress.anatomy import drop_layers, find_sites
from hfcompress.config import MeasureConfig, Target
from hfcompress.distillation import Teacher
from hfcompress.measurement import (
    accuracy,
    compare_latency,
    count_parameters,
    example_inputs,
    mcnemar,
    speedup,
)
from hfcompress.measurement.costs import flops_costs
from hfcompress.measurement.latency_table import fast_multiple
from hfcompress.pruning.budgets import Stopwatch
from hfcompress.runs.arguments import training_arguments
from hfcompress.runs.evaluation import predict

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = RESULTS / "compression"

# What the teachers had: epochs and learning rates of the same order.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"num_train_epochs": 1, "learning_rate": 5e-4, "warmup_steps": 100},
    "banking77": {"num_train_epochs": 5, "learning_rate": 5e-4, "warmup_steps": 100},
}
DISTILL = {"task": {"weight": 0.5}, "logits": {"weight": 0.5, "temperature": 2.0}, "hidden": {"weight": 10.0}}
TRAIN = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "weight_decay": 0.01,
    "logging_steps": 100,
    "save_strategy": "no",
    "optim": "adamw_torch_fused",
    "train_sampling_strategy": "group_by_length",
}
# Training examples that Torch-Pruning's importance is read from.
SAMPLES = 512
METHODS = ("ours", "random", "magnitude", "layers", "torch_pruning")
# Goals of the project at each target, as a share of the teacher's accuracy.
GOALS = {
    "sst2": {2.0: 1.0, 4.0: 0.995, 8.0: 0.99, 16.0: 0.97},
    "banking77": {2.0: 1.0, 4.0: 0.99, 8.0: 0.97},
}


def timed_target(target: float) -> dict[str, Any]:
    """How many times faster the layers are to be, and where that is measured."""
    return {"speedup": target, "scope": "layers", "batch": 32, "length": 64, "threads": 1}


def prune_section(method: str, target: float, *, full_width: bool = False) -> dict[str, Any] | None:
    """The recipe's section for a method; None if it does not prune while it trains."""
    if method in ("layers", "torch_pruning"):
        return None
    section = {
        "target": timed_target(target),
        "schedule": {"name": "polynomial", "start": 0.0, "end": 0.04, "updates": 2},
        "units": ["heads", "neurons", "sublayers", "layers", *([] if full_width else ["hidden"])],
        "criterion": {"name": "obs", "samples": 1024},
    }
    if method == "magnitude":
        return section | {"criterion": "magnitude", "repair": False, "units": ["heads", "neurons"]}
    if method == "random":
        return section | {"criterion": "random", "repair": False, "units": ["heads", "neurons"], "scope": "site"}
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS))
    parser.add_argument("--teacher", help="folder of the fine-tuned model")
    parser.add_argument("--train", help="parquet file with sentence and label")
    parser.add_argument("--eval", nargs="+", help="parquet files, pooled")
    parser.add_argument("--target", type=float, help="times faster than the teacher's layers")
    parser.add_argument("--method", default="ours", choices=METHODS)
    parser.add_argument("--distillation", action=argparse.BooleanOptionalAction, default=True, help="from the teacher")
    parser.add_argument(
        "--cache", type=Path, help="folder of what the teacher says, asked once; without it runs beside the student"
    )
    parser.add_argument("--full-width", action="store_true", help="leave the hidden width as it is, with ours")
    parser.add_argument("--learning-rate", type=float, help="another one than the task's")
    parser.add_argument("--max-steps", type=int, help="train so many steps only, to try the benchmark: nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/bench-compression")
    parser.add_argument("--summary", action="store_true", help="print the table of the runs there are")
    options = parser.parse_args()
    if options.summary:
        summarize()
        return
    missing = [name for name in ("task", "teacher", "train", "eval", "target") if getattr(options, name) is None]
    if missing:
        parser.error(f"a run needs --{' --'.join(missing)}")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hfcompress").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    result = run(options)
    if options.max_steps is None:
        RUNS.mkdir(parents=True, exist_ok=True)
        (RUNS / f"{run_name(options)}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=2))


def method_name(options: argparse.Namespace) -> str:
    name = options.method + "-full-width" * options.full_width
    return name if options.distillation else f"{name}-plain"


def run_name(options: argparse.Namespace) -> str:
    rate = "" if options.learning_rate is None else f"-lr{options.learning_rate:g}"
    return f"{options.task}-{method_name(options)}-{options.target:g}x-{options.seed}{rate}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run from the teacher to the numbers."""
    started = time.perf_counter()
    output = Path(options.output) / run_name(options)
    output.mkdir(parents=True, exist_ok=True)
    train = {**TRAIN, **TASKS[options.task]}
    train |= {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    train |= {} if options.max_steps is None else {"max_steps": options.max_steps}
    recipe = Recipe.from_dict(
        {
            "distill": DISTILL if options.distillation else None,
            "prune": prune_section(options.method, options.target, full_width=options.full_width),
            "train": train,
            "seed": options.seed,
        },
        source="the benchmark",
    )
    teacher, task = open_task(options.teacher, options.train, options.eval, seed=options.seed)
    student = copy.deepcopy(teacher)
    begun = time.perf_counter()
    if options.method == "layers":
        drop_layers(student, {"encoder": spread(teacher.config.num_hidden_layers, options.target)})
    if options.method == "torch_pruning":
        cut_with_torch_pruning(student, task, options.target, seed=options.seed)
    preparation_s = time.perf_counter() - begun
    trainer = make_trainer(options, recipe, student, teacher, task, output)
    begun = time.perf_counter()
    trainer.train()
    training_s = time.perf_counter() - begun
    if options.method != "torch_pruning":  # no config says what Torch-Pruning left, so nothing could load the folder
        trainer.save_model(str(output / "student"))
    return measure(options, teacher, trainer.model, task, recipe) | {
        "preparation_s": round(preparation_s, 1),
        "training_s": round(training_s, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def make_trainer(
    options: argparse.Namespace, recipe: Recipe, student: Any, teacher: Any, task: Any, output: Path
) -> transformers.Trainer:
    """The trainer that does what the recipe asks for, and nothing else."""
    settings: dict[str, Any] = {
        "model": student,
        "args": training_arguments(output / "checkpoints", recipe.train, seed=options.seed),
        "train_dataset": task.train_dataset,
        "data_collator": task.data_collator,
        "processing_class": task.processing_class,
    }
    if recipe.prune is not None or recipe.distill is not None:
        settings["recipe"] = recipe
    if recipe.distill is not None:
        full = copy.deepcopy(teacher)
        if options.cache is not None:
            layers = range(teacher.config.num_hidden_layers)
            full = ask_once(Teacher(full), task, options.cache, layers=layers)
        settings["teacher"] = full
        return (DistillationTrainer if recipe.prune is None else CompressionTrainer)(**settings)
    return (PlainTrainer if recipe.prune is None else PruningTrainer)(**settings)


def cut_with_torch_pruning(model: Any, task: Any, target: float, *, seed: int) -> None:
    """Cut a model in place with Torch-Pruning: groups of its dependency graph, scores of its Taylor importance.

    Its pruners of whole models fail on BERT, so the groups are cut one by one, of attention whole heads.
    """
    import torch_pruning  # only this method needs it

    kept = units_for(model, target)
    model.eval()
    chosen = np.random.default_rng(seed).permutation(len(task.train_dataset))[:SAMPLES].tolist()
    for start in range(0, len(chosen), 32):
        batch = task.data_collator([task.train_dataset[index] for index in chosen[start : start + 32]])
        model(**batch).loss.backward()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs(model, batch=2, length=8), output_transform=lambda outputs: outputs.logits
    )
    importance, prune = torch_pruning.importance.GroupTaylorImportance(), torch_pruning.prune_linear_out_channels
    for site in find_sites(model):
        root = model.get_submodule(site.writers[0].module)
        group = graph.get_pruning_group(root, prune, list(range(root.out_features)))
        scores = importance(group).view(site.units, site.width).sum(1)
        gone = scores.argsort()[: site.units - kept[site.name]]
        features = (gone[:, None] * site.width + torch.arange(site.width)).flatten().tolist()
        if features:
            graph.get_pruning_group(root, prune, features).prune()
    model.zero_grad()
    model.train()


def units_for(model: Any, target: float) -> dict[str, int]:
    """The same share of heads and neurons everywhere: the one whose measured speed comes nearest to the target."""
    sites, steps = find_sites(model), {"heads": 1, "neurons": fast_multiple(torch.device("cpu"))}
    stopwatch = Stopwatch(model, Target(**timed_target(target)), measure=MeasureConfig())
    layers = [layer.name for layer in stopwatch.layers]
    tried: list[tuple[float, dict[str, int]]] = []
    low, high = 0.0, 1.0
    for _ in range(9):
        share = (low + high) / 2
        units = {site.name: max(1, round(share * site.units / steps[site.kind])) * steps[site.kind] for site in sites}
        _, ratio = stopwatch.time(units, layers=layers)
        tried.append((abs(np.log(ratio / target)), units))
        low, high = (share, high) if ratio > target else (low, share)
    return min(tried, key=lambda pair: pair[0])[1]


def spread(layers: int, target: float) -> tuple[int, ...]:
    """Evenly spread layers, as many as come nearest to the target's share of the time."""
    count = max(1, round(layers / target))
    return tuple(sorted({round((number + 1) * layers / count) - 1 for number in range(count)}))


def measure(options: argparse.Namespace, teacher: Any, student: Any, task: Any, recipe: Recipe) -> dict[str, Any]:
    """Accuracy and speed of the student beside the teacher's, in one process."""
    ours, labels = predict(student, task)
    theirs, _ = predict(teacher, task)
    right, before = ours == labels, theirs == labels
    inputs = example_inputs(teacher, batch=32, length=64)
    models = {"teacher": teacher, "student": student.eval()}
    timed = compare_latency(models, inputs, rounds=21, warmup=3, threads=1, scope="layers")
    ratio = speedup(timed["teacher"], timed["student"])
    share = accuracy(ours, labels).value / accuracy(theirs, labels).value
    goal = GOALS[options.task].get(options.target)
    difference = right.astype(float) - before.astype(float)
    flops = [flops_costs(model, inputs, scope="layers").total({}) for model in (teacher, student)]
    figures = {
        "accuracy": {
            "value": 100 * accuracy(ours, labels).value,
            "unit": "%",
            "spread": None,
            "goal": None,
            "met": None,
        },
        "share_of_teacher": {
            "value": share,
            "unit": "of the teacher's accuracy",
            "spread": float(difference.std(ddof=1) / np.sqrt(len(difference)) / accuracy(theirs, labels).value),
            "goal": None if goal is None else f">= {goal}",
            "met": None if goal is None else bool(share >= goal),
            "p_value": mcnemar(before, right),
        },
        "layers_speedup": {
            "value": ratio.median,
            "unit": "x, median of ratios round by round",
            "spread": [ratio.p10, ratio.p90],
            "goal": f">= {0.95 * options.target:g}",
            "met": bool(ratio.median >= 0.95 * options.target),
        },
        "speedup_over_flops": {
            "value": ratio.median / (flops[0] / flops[1]),
            "unit": "measured speedup over FLOPs reduction of the layers",
            "spread": None,
            "goal": ">= 0.85" if options.target <= 4 else None,
            "met": None,
        },
    }
    if figures["speedup_over_flops"]["goal"]:
        figures["speedup_over_flops"]["met"] = bool(figures["speedup_over_flops"]["value"] >= 0.85)
    return {
        **run_facts(seed=options.seed),
        "data": {
            "name": options.task,
            "train_n": len(task.train_dataset),
            "n": len(labels),
            "fingerprint": task.fingerprint,
        },
        "method": method_name(options),
        "task": options.task,
        "target": options.target,
        "teacher_accuracy": 100 * accuracy(theirs, labels).value,
        "recipe": recipe.model_dump(include={"distill", "prune", "train"}, exclude_none=True),
        "units": {site.name: site.units for site in find_sites(student)},
        "parameters": count_parameters(student),
        "figures": figures,
    }


def summarize() -> None:
    """One table over all runs: mean and range over seeds."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RUNS.glob("*.json"))]
    groups: dict[tuple[str, float, str, float, float], list[dict[str, Any]]] = {}
    for one in runs:
        recipe = one["recipe"]
        hidden = recipe.get("distill", {}).get("hidden", {}).get("weight", 0.0)
        key = (one["task"], one["target"], one["method"], recipe["train"]["learning_rate"], hidden)
        groups.setdefault(key, []).append(one)
    table = []
    for (task, target, method, learning_rate, hidden), members in sorted(groups.items()):
        value = {name: [m["figures"][name]["value"] for m in members] for name in members[0]["figures"]}
        goal = GOALS[task].get(target)
        share = statistics.mean(value["share_of_teacher"])
        table.append(
            {
                "task": task,
                "target": target,
                "method": method,
                "learning_rate": learning_rate,
                "hidden_weight": hidden,
                "seeds": [m["seed"] for m in members],
                "accuracy": value["accuracy"],
                "mean_accuracy": statistics.mean(value["accuracy"]),
                "teacher_accuracy": members[0]["teacher_accuracy"],
                "share_of_teacher": share,
                "goal": goal,
                "met": None if goal is None or method != "ours" else bool(share >= goal),
                "layers_speedup": value["layers_speedup"],
                "speedup_over_flops": value["speedup_over_flops"],
                "training_s": [m["training_s"] for m in members],
                "commits": sorted({m["commit"] for m in members}),
            }
        )
    (RESULTS / "compression.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(
        f"{'task':<10} {'target':>6}  {'method':<19} {'rate':>6} {'hidden':>6} {'seeds':>5} {'accuracy':>9} {'of teacher':>10} {'goal':>6}  speedup"
    )
    for row in table:
        goal = "" if row["goal"] is None else f"{100 * row['goal']:.1f}"
        speeds = ", ".join(f"{speed:.2f}x" for speed in row["layers_speedup"])
        print(
            f"{row['task']:<10} {row['target']:>5g}x  {row['method']:<19} {row['learning_rate']:>6.0e} {row['hidden_weight']:>6g} {len(row['seeds']):>5} "
            f"{row['mean_accuracy']:>9.2f} {100 * row['share_of_teacher']:>10.2f} {goal:>6}  {speeds}"
        )


if __name__ == "__main__":
    main()
