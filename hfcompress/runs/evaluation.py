"""Scores and timings of saved models, side by side in one process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from hfcompress.checkpoints.adapters import base_of
from hfcompress.checkpoints.io import load
from hfcompress.config import MeasureConfig
from hfcompress.measurement import (
    Answers,
    Latency,
    Metric,
    compare_answers,
    compare_latency,
    count_flops,
    count_parameters,
    disk_bytes,
    example_inputs,
    median_interval,
    memory_bytes,
    speedup,
)
from hfcompress.measurement.energy import Counter, energy_of, find_counter
from hfcompress.measurement.latency import is_movable, timed, torch_threads
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


Rate = Callable[[nn.Module], tuple[Metric, Answers | None]]
"""Scores a model: the metric, and what it is made of, example by example."""


def rate_on(task: PreparedTask) -> Rate:
    """What scores models on the evaluation data of a task; where there are no labels, by the outputs of the first of them."""
    reference = None

    def rate(model: nn.Module) -> tuple[Metric, Answers | None]:
        nonlocal reference
        outputs, labels = run_on(model, task)
        if labels is None:
            reference = outputs if reference is None else reference
        return task.compute_metrics.measure(outputs, reference if labels is None else labels)

    return rate


@dataclass(frozen=True)
class Measured:
    """What was measured of several models side by side.

    Attributes:
        rows: One per model, JSON-able; see `measure_folders`.
        answers: What each answered to the examples, by the name of its row; empty where nothing was scored.
    """

    rows: list[dict[str, Any]]
    answers: dict[str, Answers]


def measure_folders(folders: Mapping[str, Path], rate: Rate | None, config: MeasureConfig) -> list[dict[str, Any]]:
    """One row per saved model: score, size, FLOPs, latency, and speedup over the first.

    Args:
        folders: Name to folder, the baseline first.
        rate: What scores them; None measures size and speed only.
        config: How latency is measured.

    Returns:
        Rows of JSON-able data.
    """
    return measure_and_keep(folders, rate, config).rows


def measure_and_keep(
    folders: Mapping[str, Path],
    rate: Rate | Mapping[str, Rate] | None,
    config: MeasureConfig,
    *,
    origins: Mapping[str, str] | None = None,
    class_names: Sequence[str] = (),
) -> Measured:
    """`measure_folders`, with what each model answered, and what each step from one model to the next did.

    Each row after the first says in "change" what was lost against the first, and where the model was made from another one than
    the first also in "step" what was lost and gained against that one, all paired: the same examples, the same rounds.

    Args:
        folders: As for `measure_folders`.
        rate: As for `measure_folders`; or what scores each model, by name, where they encode texts differently.
        config: As for `measure_folders`.
        origins: Name of each model to that of the one it was made from; by default the first.
        class_names: Where answers are classes, their names: rows then say how many of each were found.
    """
    device = device_of(config.device)
    models = {name: _on(load(folder), device) for name, folder in folders.items()}
    # What the one with the fewest tokens reads, all can read.
    first = min(models.values(), key=lambda model: getattr(model.config, "vocab_size", None) or 0)
    inputs = example_inputs(first, batch=config.batch, length=length_for(first, config))
    rates: Mapping[str, Rate] = (
        rate if isinstance(rate, Mapping) else {} if rate is None else dict.fromkeys(models, rate)
    )
    whole, layers = _time(models, inputs, config)
    counter = find_counter(device)
    rows: list[dict[str, Any]] = []
    answers: dict[str, Answers] = {}
    baseline = next(iter(models))
    for name, model in models.items():
        row: dict[str, Any] = {"name": name, "folder": str(folders[name])}
        if name in rates:
            metric, answered = rates[name](model)
            row["metric"] = asdict(metric)
            if answered is not None:
                answers[name] = answered
                row |= _by_class(answered, class_names)
        row |= {
            "parameters": count_parameters(model),
            "disk_bytes": _with_base(folders[name]),
            "memory_bytes": memory_bytes(model),
            "flops_per_input": count_flops(model, inputs) // config.batch,
            "latency": _with_interval(whole[name].to_dict() | {"compiled": config.compile}, whole[name].samples_ms),
        }
        if layers:
            row["layers_latency"] = layers[name].to_dict()
        if counter is not None:
            row["energy"] = _count_energy(model, inputs, config, counter)
        if name != baseline:
            row |= _change(answers, baseline, name)
            row["speedup"] = _faster(whole[baseline], whole[name])
            if layers:
                row["layers_speedup"] = _faster(layers[baseline], layers[name])
            origin = (origins or {}).get(name, baseline)
            row["origin"] = origin
            if origin != baseline:
                row["step"] = {**_change(answers, origin, name), "speedup": _faster(whole[origin], whole[name])}
        rows.append(row)
    return Measured(rows, answers)


def _time(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Any], config: MeasureConfig
) -> tuple[dict[str, Latency], dict[str, Latency]]:
    """The times of whole models, and those of their layers, which nothing enters or leaves where all is compiled."""
    timing: dict[str, Any] = {"rounds": config.rounds, "warmup": config.warmup, "threads": config.threads}
    if not config.compile:
        whole = compare_latency(models, inputs, scope="model", **timing)
        return whole, compare_latency(models, inputs, scope="layers", **timing)
    from torch._dynamo.exc import TorchDynamoException

    compiled: dict[str, Any] = {name: torch.compile(model) for name, model in models.items()}
    timing["warmup"] = max(1, config.warmup)  # they are compiled in the first round
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # of torchao's tensors
            return compare_latency(compiled, inputs, scope="model", **timing), {}
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__  # first who, then what
        raise ValueError(f"torch.compile does not work here ({reason}); measure without it") from error


def _change(answers: Mapping[str, Answers], before: str, after: str) -> dict[str, Any]:
    """What was lost from one model to another, if both answered enough examples."""
    if before not in answers or after not in answers or len(answers[before]) < 2:
        return {}
    return {"change": asdict(compare_answers(answers[before], answers[after]))}


def _by_class(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """How many examples there are of each class, and how many were found."""
    if answers.predicted is None or answers.labels is None or not names:
        return {}
    there = np.bincount(answers.labels, minlength=len(names))
    found = np.bincount(answers.labels[answers.predicted == answers.labels], minlength=len(names))
    counts = zip(names, there.tolist(), found.tolist(), strict=True)
    return {"classes": [{"name": str(name), "n": n, "right": right} for name, n, right in counts]}


def _faster(before: Latency, after: Latency) -> dict[str, Any]:
    """Median and percentiles of the ratios round by round, and the interval of the median."""
    ratios = np.divide(before.samples_ms, after.samples_ms)
    return _with_interval({**asdict(speedup(before, after)), "rounds": len(ratios)}, ratios)


def _with_interval(measured: dict[str, Any], samples: ArrayLike) -> dict[str, Any]:
    """With the 95 % interval of the median, where there are rounds enough for one."""
    interval = median_interval(samples)
    return measured if interval is None else {**measured, "low": interval[0], "high": interval[1]}


def _count_energy(model: nn.Module, inputs: Any, config: MeasureConfig, counter: Counter) -> dict[str, Any]:
    """Joules per input, of as many forward passes as are timed."""
    with torch_threads(config.threads), timed(model, inputs, "model") as timer, torch.no_grad():
        timer.run()
        with energy_of(counter) as energy:
            for _ in range(config.rounds):
                timer.run()
    assert energy.joules is not None
    return {"joules_per_input": energy.joules / (config.rounds * config.batch), "source": energy.source}


def _with_base(folder: Path) -> int:
    """Bytes on disk; of an adapter together with the model that it belongs to, without which it is nothing."""
    base = base_of(folder)
    return disk_bytes(folder) + (disk_bytes(base) if base is not None and Path(base).is_dir() else 0)


def device_of(name: str) -> torch.device:
    """The device that a recipe names; "auto" is the GPU if there is one.

    Raises:
        ValueError: There is no such device here.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # also asks whether it can hold something
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"device {name!r} cannot be used here; give auto or one of {', '.join(there)}") from error
    return device


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval() if is_movable(model) else model.eval()


def length_for(model: nn.Module, config: MeasureConfig) -> int | None:
    """Tokens per row of made-up inputs; None where a model reads no tokens."""
    reads_tokens = getattr(model, "main_input_name", "input_ids") not in ("pixel_values", "input_values")
    return config.length if reads_tokens else None
