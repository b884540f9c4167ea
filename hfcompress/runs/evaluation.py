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
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from hfcompress.checkpoints.adapters import base_of
from hfcompress.checkpoints.io import load
from hfcompress.config import MeasureConfig
from hfcompress.measurement import (
    Metric,
    compare_latency,
    count_flops,
    count_parameters,
    disk_bytes,
    example_inputs,
    mcnemar,
    memory_bytes,
    speedup,
)
from hfcompress.tasks import PreparedTask
from hfcompress.tasks.scores import decide

logger = logging.getLogger(__name__)


def run_on(model: nn.Module, task: PreparedTask) -> tuple[Any, Any]:
    """What scoring keeps of a model's outputs for the whole evaluation data, and the labels; arrays, or several.

    Lengths that differ from batch to batch are filled up with -100, as a Trainer does. Where there are no labels they are None.
    """
    device = next(model.parameters()).device
    scores = task.compute_metrics
    loader = DataLoader(task.eval_dataset, batch_size=scores.batch, collate_fn=task.data_collator)  # type: ignore[arg-type]
    outputs, labels = None, None
    model.eval()
    for inputs in tqdm(loader, desc="evaluating", leave=False, delay=2):
        given = tuple(inputs.pop(name).to(device) for name in task.label_columns)
        truth = given[0] if len(given) == 1 else given or None
        moved = {name: _fit(value, device, model) for name, value in inputs.items()}
        with torch.inference_mode():
            outputs = _append(outputs, scores.run(model, moved, truth))
        labels = _append(labels, truth)
    return nested_numpify(outputs), None if labels is None else nested_numpify(labels)


def _append(collected: Any, more: Any) -> Any:
    """Tensors of another batch, or several, below those collected so far, in main memory."""
    if more is None:
        return None
    more = tuple(part.cpu() for part in more) if isinstance(more, tuple) else more.cpu()
    return more if collected is None else nested_concat(collected, more, padding_index=-100)


def predict(model: nn.Module, task: PreparedTask) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of a classification for the whole evaluation data; shapes (n,), or (n, classes) for several labels at once."""
    outputs, labels = run_on(model, task)
    assert task.problem_type is not None
    return decide(outputs, task.problem_type), labels


def _fit(value: torch.Tensor, device: torch.device, model: nn.Module) -> torch.Tensor:
    """To the device; images also to the model's float type."""
    return value.to(device, dtype=model.dtype if value.is_floating_point() else None)  # type: ignore[arg-type]


Rate = Callable[[nn.Module], tuple[Metric, np.ndarray | None]]
"""Scores a model: the metric, and where answers are right or wrong which were right, shape (n,)."""


def rate_on(task: PreparedTask) -> Rate:
    """What scores models on the evaluation data of a task; where there are no labels, by the outputs of the first of them."""
    reference = None

    def rate(model: nn.Module) -> tuple[Metric, np.ndarray | None]:
        nonlocal reference
        outputs, labels = run_on(model, task)
        if labels is None:
            reference = outputs if reference is None else reference
        return task.compute_metrics.measure(outputs, reference if labels is None else labels)

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
            "disk_bytes": _with_base(folders[name]),
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


def _with_base(folder: Path) -> int:
    """Bytes on disk; of an adapter together with the model that it belongs to, without which it is nothing."""
    base = base_of(folder)
    return disk_bytes(folder) + (disk_bytes(base) if base is not None and Path(base).is_dir() else 0)


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
