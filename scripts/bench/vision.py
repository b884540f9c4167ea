"""Benchmark: a small ViT on CIFAR-10, pruned to 2x measured speed of its layers with distillation in a few epochs.

    python scripts/bench/vision.py --train cifar10_train20k.parquet --eval cifar10_test2k.parquet --output runs/bench-vision

There is no pretrained vision model among the packages, so the teacher is trained from nothing, once: it is kept under --output and used
again. Beside the student stands a control: the teacher, trained on for the same epochs without pruning or distillation. Writes
scripts/bench/results/vision.json.

With --half the student is every second layer of the teacher, and the control the same trained on labels alone; each with as many seeds as
--seeds says. Writes scripts/bench/results/vision_half.json.
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
from datasets import load_dataset
from facts import run_facts
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hfcompress import CompressionTrainer, DistillationTrainer, PlainTrainer, Recipe
from hfcompress.anatomy import drop_layers, find_sites
from hfcompress.measurement import (
    accuracy,
    compare_latency,
    count_parameters,
    example_inputs,
    mcnemar,
    speedup,
)
from hfcompress.measurement.costs import flops_costs
from hfcompress.runs.arguments import training_arguments

RESULTS = Path(__file__).resolve().parent / "results"
MODEL = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 768,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
TRAIN = {
    "per_device_train_batch_size": 64,
    "weight_decay": 0.05,
    "warmup_steps": 100,
    "logging_steps": 100,
    "save_strategy": "no",
    "optim": "adamw_torch_fused",
}
TEACHER = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
STUDENT = {"learning_rate": 5e-4, "lr_scheduler_type": "cosine"}
BATCH = 32  # of which time is measured
# With --half. Directions only: a ViT's layers add to a stream of any length, so a squared error has no scale that a weight would suit.
HIDDEN = {"weight": 10.0, "loss": "patient"}
POINTS = 1.0  # that the student may be below the teacher
CHANNEL_MEANS, CHANNEL_DEVIATIONS = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class Images(Dataset[dict[str, torch.Tensor]]):
    """Images in memory; in training each is shifted by up to four pixels and perhaps mirrored.

    Args:
        pixels: Integers from 0 to 255, uint8, shape (n, 3, 32, 32).
        labels: int64, shape (n,).
        augment: Whether to shift and mirror.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, *, augment: bool) -> None:
        self.pixels, self.labels, self.augment = pixels, labels, augment
        self.padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4)) if augment else pixels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.padded[index]
        if self.augment:
            down, right, mirrored = (int(torch.randint(high, ())) for high in (9, 9, 2))
            image = image[:, down : down + 32, right : right + 32]
            image = image.flip(-1) if mirrored else image
        return {"pixel_values": normalized(image), "labels": self.labels[index]}


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1 per channel; shape (..., 3, height, width)."""
    means, deviations = (torch.tensor(values)[:, None, None] for values in (CHANNEL_MEANS, CHANNEL_DEVIATIONS))
    return (pixels / 255 - means) / deviations


def read(path: str, *, augment: bool) -> Images:
    """Decode a parquet file with an image column and a column of labels."""
    rows = load_dataset("parquet", data_files=path, split="train")
    column = next(name for name, feature in rows.features.items() if type(feature).__name__ == "Image")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows[column]])
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(rows["label"]), augment=augment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="parquet file with images and labels")
    parser.add_argument("--eval", required=True, help="parquet file with images and labels")
    parser.add_argument(
        "--output", required=True, help="folder of the teacher, which is used again, and of the student"
    )
    parser.add_argument("--target", type=float, default=2.0, help="times faster than the teacher's layers")
    parser.add_argument("--teacher-epochs", type=int, default=14)
    parser.add_argument("--epochs", type=int, default=4, help="of the student")
    parser.add_argument("--half", action="store_true", help="distil into half of the layers, and prune nothing")
    parser.add_argument("--seeds", type=int, default=3, help="of each student with --half")
    parser.add_argument("--max-steps", type=int, help="train so many steps only, to try the benchmark: nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hfcompress").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = (halve(options) if options.half else run(options)) | {
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if options.max_steps is None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / ("vision_half.json" if options.half else "vision.json")
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=2))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """From the images to the numbers."""
    output, train, test = Path(options.output), read(options.train, augment=True), read(options.eval, augment=False)
    teacher, facts = find_teacher(options, output / "teacher", train)
    recipe = Recipe.from_dict(
        {
            "distill": {"task": {"weight": 0.5}, "logits": {"weight": 0.5, "temperature": 2.0}},
            "prune": {
                "target": {"speedup": options.target, "scope": "layers", "batch": BATCH, "threads": 1},
                "schedule": {"name": "polynomial", "start": 0.0, "end": 0.2, "updates": 5},
                "units": ["heads", "neurons", "sublayers"],
                "criterion": {"name": "obs", "samples": 1024},
            },
            "train": TRAIN | STUDENT | {"num_train_epochs": options.epochs} | limit(options),
            "seed": options.seed,
        }
    )
    settings: dict[str, Any] = {
        "args": training_arguments(output / "checkpoints", recipe.train, seed=options.seed),
        "train_dataset": train,
    }
    trainer = CompressionTrainer(copy.deepcopy(teacher), teacher=copy.deepcopy(teacher), recipe=recipe, **settings)
    begun = time.perf_counter()
    trainer.train()
    training_s = time.perf_counter() - begun
    trainer.save_model(str(output / "student"))
    student = trainer.model.eval()
    control = PlainTrainer(copy.deepcopy(teacher), **settings)
    control.train()
    models = {"teacher": teacher, "student": student, "control": control.model.eval()}
    return {
        **run_facts(seed=options.seed),
        "data": {"name": "CIFAR-10, parts of it", "train_n": len(train), "n": len(test)},
        "teacher": facts,
        "recipe": recipe.model_dump(include={"distill", "prune", "train"}, exclude_none=True),
        "training_s": round(training_s, 1),
        "units": {site.name: site.units for site in find_sites(student)},
        "parameters": {"teacher": count_parameters(teacher), "student": count_parameters(student)},
        "figures": measure(models, test, options.target),
    }


def halve(options: argparse.Namespace) -> dict[str, Any]:
    """Students with half of the layers: on labels alone, and distilled."""
    output, train, test = Path(options.output), read(options.train, augment=True), read(options.eval, augment=False)
    teacher, facts = find_teacher(options, output / "teacher", train)
    student = copy.deepcopy(teacher)
    drop_layers(student, {"encoder": tuple(range(1, MODEL["num_hidden_layers"], 2))})
    recipe = Recipe.from_dict(
        {
            "distill": {
                "task": {"weight": 0.5},
                "logits": {"weight": 0.5, "temperature": 2.0},
                "hidden": HIDDEN,
            },
            "train": TRAIN | STUDENT | {"num_train_epochs": options.epochs} | limit(options),
        }
    )
    found: dict[str, list[float]] = {"labels": [], "distilled": []}
    for seed in range(options.seeds):
        settings: dict[str, Any] = {
            "args": training_arguments(output / "checkpoints", recipe.train, seed=seed),
            "train_dataset": train,
        }
        plain = PlainTrainer(copy.deepcopy(student), **settings)
        distilled = DistillationTrainer(
            copy.deepcopy(student), teacher=copy.deepcopy(teacher), recipe=recipe, **settings
        )
        for name, trainer in (("labels", plain), ("distilled", distilled)):
            transformers.set_seed(seed)
            trainer.train()
            right = predict(trainer.model.eval(), test) == test.labels.numpy()
            found[name].append(100 * float(right.mean()))
            print(f"seed {seed}, {name}: {found[name][-1]:.2f}", flush=True)
    means = {name: statistics.mean(values) for name, values in found.items()}
    return {
        **run_facts(seed=0),
        "data": {"name": "CIFAR-10, parts of it", "train_n": len(train), "n": len(test)},
        "teacher": facts,
        "recipe": recipe.model_dump(include={"distill", "train"}, exclude_none=True),
        "figures": {
            "teacher_accuracy": {
                "value": 100 * float((predict(teacher, test) == test.labels.numpy()).mean()),
                "unit": "%",
                "spread": None,
                "goal": None,
                "met": None,
            },
            "labels_accuracy": {
                "value": means["labels"],
                "unit": f"%, mean of {options.seeds} seeds",
                "spread": found["labels"],
                "goal": None,
                "met": None,
            },
            "distilled_accuracy": {
                "value": means["distilled"],
                "unit": f"%, mean of {options.seeds} seeds",
                "spread": found["distilled"],
                "goal": "> labels_accuracy",
                "met": means["distilled"] > means["labels"],
            },
        },
    }


def limit(options: argparse.Namespace) -> dict[str, int]:
    return {} if options.max_steps is None else {"max_steps": options.max_steps}


def find_teacher(options: argparse.Namespace, folder: Path, train: Images) -> tuple[ViTForImageClassification, Any]:
    """The teacher that is there, or a new one; and how it was trained."""
    notes = folder / "teacher.json"
    if notes.exists():
        facts = json.loads(notes.read_text(encoding="utf-8"))
        return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval(), facts
    settings = TRAIN | TEACHER | {"num_train_epochs": options.teacher_epochs} | limit(options)
    torch.manual_seed(options.seed)
    trainer = PlainTrainer(
        model=ViTForImageClassification(ViTConfig(**MODEL)),
        args=training_arguments(folder.parent / "checkpoints", settings, seed=options.seed),
        train_dataset=train,
    )
    begun = time.perf_counter()
    trainer.train()
    facts = {
        "model": MODEL,
        "train": settings,
        "seed": options.seed,
        "training_s": round(time.perf_counter() - begun, 1),
    }
    if options.max_steps is None:
        trainer.model.save_pretrained(folder)
        side = {"height": MODEL["image_size"], "width": MODEL["image_size"]}
        ViTImageProcessor(size=side, image_mean=CHANNEL_MEANS, image_std=CHANNEL_DEVIATIONS).save_pretrained(folder)
        notes.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return trainer.model.eval(), facts


def measure(models: dict[str, Any], test: Images, target: float) -> dict[str, Any]:
    """Accuracy and speed of the student beside the teacher's, in one process."""
    labels = test.labels.numpy()
    answers = {name: predict(model, test) for name, model in models.items()}
    right = {name: given == labels for name, given in answers.items()}
    found = {name: accuracy(given, labels) for name, given in answers.items()}
    lost = 100 * (right["teacher"].astype(float) - right["student"].astype(float))
    inputs = example_inputs(models["teacher"], batch=BATCH)
    timed = compare_latency(models, inputs, rounds=21, warmup=3, threads=1, scope="layers")
    ratio = speedup(timed["teacher"], timed["student"])
    dense, left = (flops_costs(models[name], inputs, scope="layers").total({}) for name in ("teacher", "student"))
    return {
        **{
            f"{name}_accuracy": {
                "value": 100 * metric.value,
                "unit": "%",
                "spread": [100 * metric.low, 100 * metric.high],
                "goal": None,
                "met": None,
            }
            for name, metric in found.items()
        },
        "accuracy_lost": {
            "value": float(lost.mean()),
            "unit": "points below the teacher, paired",
            "spread": float(lost.std(ddof=1) / np.sqrt(len(lost))),
            "goal": f"<= {POINTS}",
            "met": bool(lost.mean() <= POINTS),
            "p_value": mcnemar(right["teacher"], right["student"]),
        },
        "layers_speedup": {
            "value": ratio.median,
            "unit": "x, median of ratios round by round",
            "spread": [ratio.p10, ratio.p90],
            "goal": f">= {0.95 * target:g}",
            "met": bool(ratio.median >= 0.95 * target),
        },
        "flops_reduction": {
            "value": dense / left,
            "unit": "x, of the layers",
            "spread": None,
            "goal": None,
            "met": None,
        },
    }


def predict(model: Any, test: Images) -> np.ndarray:
    """The classes that a model finds most likely; shape (n,)."""
    with torch.inference_mode():
        parts = [model(pixel_values=normalized(part)).logits.argmax(-1) for part in test.pixels.split(128)]
    return torch.cat(parts).numpy()


if __name__ == "__main__":
    main()
