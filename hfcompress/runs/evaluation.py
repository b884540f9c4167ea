"""Scores and timings of saved models, side by side in one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hfcompress.checkpoints.io import load
from hfcompress.config import MeasureConfig
from hfcompress.measurement import (
    Metric,
    accuracy,
    compare_latency,
    count_flops,
    count_parameters,
    disk_bytes,
    example_inputs,
    mcnemar,
    memory_bytes,
    pearson,
    speedup,
)
from hfcompress.tasks import PreparedTask
from hfcompress.tasks.scores import decide

logger = logging.getLogger(__name__)


def predict(model: nn.Module, task: PreparedTask, *, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels for the whole evaluation data; shapes (n,), or (n, classes) for several labels at once."""
    device = next(model.parameters()).device
    loader = DataLoader(task.eval_dataset, batch_size=batch, collate_fn=task.data_collator)  # type: ignore[arg-type]
    logits, labels = [], []
    model.eval()
    for inputs in tqdm(loader, desc="evaluating", leave=False, delay=2):
        labels.append(inputs.pop("labels"))
        moved = {name: _fit(value, device, model) for name, value in inputs.items()}
        with torch.inference_mode():
            logits.append(model(**moved).logits.float().cpu())
    return decide(torch.cat(logits).numpy(), task.problem_type), torch.cat(labels).numpy()


def _fit(value: torch.Tensor, device: torch.device, model: nn.Module) -> torch.Tensor:
    """To the device; images also to the model's float type."""
    return value.to(device, dtype=model.dtype if value.is_floating_point() else None)  # type: ignore[arg-type]


def score(predictions: np.ndarray, labels: np.ndarray, task: PreparedTask) -> Metric:
    """Accuracy (of several labels at once: all of them right), or the correlation of a quantity, with its 95 % interval."""
    if task.problem_type == "multi_label_classification":
        exact = (predictions == labels).all(axis=1)
        return accuracy(exact, np.ones(len(exact), dtype=bool))
    return pearson(predictions, labels) if task.problem_type == "regression" else accuracy(predictions, labels)


Rate = Callable[[nn.Module], tuple[Metric, np.ndarray | None]]
"""Scores a model: the metric, and for classification which examples were right, shape (n,)."""


def rate_on(task: PreparedTask) -> Rate:
    """What scores a model on the evaluation data of a task."""

    def rate(model: nn.Module) -> tuple[Metric, np.ndarray | None]:
        predictions, labels = predict(model, task)
        single = task.problem_type == "single_label_classification"
        return score(predictions, labels, task), predictions == labels if single else None

    return rate


def measure_folders(folders: Mapping[str, Path], rate: Rate | None, config: MeasureConfig) -> list[dict[str, Any]]:
    """One row per saved model: score, size, FLOPs, latency, and speedup over the first.

    Args:
        folders: Name to folder, the baseline first.
        rate: What scores them; None measures size and speed only.
        config: How latency is measured.

    Returns:
        Rows of JSON-able data.
    """
    device = device_of(config.device)
    models = {name: _on(load(folder), device) for name, folder in folders.items()}
    first = next(iter(models.values()))
    inputs = example_inputs(first, batch=config.batch, length=config.length if _reads_tokens(first) else None)
    timing = {"rounds": config.rounds, "warmup": config.warmup, "threads": config.threads}
    whole = compare_latency(models, inputs, scope="model", **timing)  # type: ignore[arg-type]
    layers = compare_latency(models, inputs, scope="layers", **timing)  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []
    baseline, right = next(iter(models)), None
    for name, model in models.items():
        row: dict[str, Any] = {"name": name, "folder": str(folders[name])}
        if rate is not None:
            metric, correct = rate(model)
            row["metric"] = asdict(metric)
            if correct is not None:
                right = correct if right is None else right
                row["p_value_against_first"] = None if name == baseline else mcnemar(right, correct)
        row |= {
            "parameters": count_parameters(model),
            "disk_bytes": disk_bytes(folders[name]),
            "memory_bytes": memory_bytes(model),
            "flops_per_input": count_flops(model, inputs) // config.batch,
            "latency": whole[name].to_dict(),
            "layers_latency": layers[name].to_dict(),
        }
        if name != baseline:
            row["speedup"] = asdict(speedup(whole[baseline], whole[name]))
            row["layers_speedup"] = asdict(speedup(layers[baseline], layers[name]))
        rows.append(row)
    return rows


def device_of(name: str) -> torch.device:
    """The device that a recipe names; "auto" is the GPU if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    placed = getattr(model, "quantization_method", None) is not None
    return model.eval() if placed else model.to(device).eval()


def _reads_tokens(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "input_ids") not in ("pixel_values", "input_values")
