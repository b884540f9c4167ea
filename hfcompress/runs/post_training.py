"""Pruning without training: rank, allocate, cut and repair a saved model in minutes."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from hfcompress.checkpoints.io import load
from hfcompress.checkpoints.record import add_step, read_units
from hfcompress.config import CriterionConfig, DataConfig, MeasureConfig, PruneConfig
from hfcompress.hub import save_probe, verify_folder, write_card
from hfcompress.hub.lineage import describe_source
from hfcompress.hub.predictions import save_answers
from hfcompress.hub.results import RESULTS_FILE, without_paths
from hfcompress.hub.verify import VerificationError
from hfcompress.measurement import Metric, provenance
from hfcompress.pruning import (
    BudgetError,
    Curve,
    LayerSensitivity,
    Pruner,
    Sensitivity,
    Widths,
    fit_to_device,
    measure_layers,
    measure_sensitivity,
    rank_units,
)
from hfcompress.quantization.bits import FLOATS, BitCost, By, bit_costs, format_for, size_bytes
from hfcompress.runs.evaluation import Rate, device_of, measure_and_keep
from hfcompress.runs.examples import Examples, drop, read_examples
from hfcompress.runs.processors import copy_processor
from hfcompress.runs.vocabulary import cut_for
from hfcompress.tasks.corpus import read_corpus

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What came out.

    Attributes:
        model: The pruned model.
        target: The target that was carried out.
        reached: What was measured before the cut: speedup, milliseconds; empty where time was not the target.
        metric: Of the model, where it was looked for by its score.
    """

    model: nn.Module
    target: dict[str, Any]
    reached: list[dict[str, Any]]
    metric: Metric | None = None


def prune_once(
    model: nn.Module,
    config: PruneConfig,
    batches: list[dict[str, Any]],
    *,
    measure: MeasureConfig,
    seed: int = 0,
    curves: dict[str, Curve] | None = None,
    widths: Widths | None = None,
) -> Pruned:
    """Prune a model in place, at once, without training: rank, allocate, verify, cut, repair.

    Args:
        model: The model.
        config: With a target that has one goal; the schedule is not used.
        batches: Calibration inputs.
        measure: What the target does not say about how time is measured.
        seed: Of everything random.
        curves: What `rank_units` gave for this model, if it was ranked before.
        widths: Narrower copies of this model, if they were made before.

    Raises:
        BudgetError: The target cannot be reached.
        ValueError: There are several targets, or the criterion learns from training.
    """
    refuse_training_criteria(config)
    if len(config.target.goals) != 1:
        raise ValueError(
            f"pruning without training has one target, not {len(config.target.goals)}; give a single number"
        )
    config = _at_once(config)
    pruner = Pruner(
        model,
        config,
        total_steps=1,
        seed=seed,
        batches=lambda: batches,
        measure=measure,
        curves=curves,
        widths=widths,
    )
    pruner.step(0)
    add_step(
        model.config,
        "prune",
        settings={**config.model_dump(), "schedule": None},
        sparsity=round(pruner.sparsity(), 6),
        reached=pruner.reached,
        units={name: list(pair) for name, pair in read_units(model.config).items()},
        optimizer_steps=0,
    )
    return Pruned(model, config.target.model_dump(exclude_none=True), pruner.reached)


def _at_once(config: PruneConfig) -> PruneConfig:
    """The settings with which everything is done in one step."""
    schedule = config.schedule.model_copy(update={"name": "constant", "start": 0.0})
    repair = True if config.repair is None else config.repair
    return config.model_copy(update={"schedule": schedule, "repair": repair, "cut": "gradual"})


def refuse_training_criteria(config: PruneConfig) -> None:
    """Refuse criteria that only training can feed.

    Raises:
        ValueError: The criterion learns from training.
    """
    if config.criterion.name in ("learned", "movement"):
        raise ValueError(
            f"the criterion {config.criterion.name} needs training (hfcompress run); without it use obs, or another criterion"
        )


def prune_within(
    model: nn.Module,
    config: PruneConfig,
    examples: Examples,
    *,
    measure: MeasureConfig,
    seed: int = 0,
    trials: int = 6,
    fastest: float = 16.0,
    dense: Metric | None = None,
    say: Callable[[str], None] = logger.info,
) -> Pruned:
    """The fastest model that loses no more than `config.target.max_drop`: speedups are tried, halving what is in doubt.

    Args:
        model: The dense model; it is not changed.
        config: With `target.max_drop`, in points of a share or per cent of perplexity.
        examples: With a score.
        measure: How time is measured.
        seed: Of everything random.
        trials: Speedups that are tried at most.
        fastest: The largest of them.
        dense: What is compared with, if that is not the score of `model`.
        say: Told of each trial.

    Raises:
        ValueError: There is nothing to score with.
        BudgetError: Not even the smallest cut stays within the bound.
    """
    if examples.rate is None or config.target.max_drop is None:
        raise ValueError("max_drop needs data to score on: give labelled examples (or text for a decoder)")
    dense = dense or examples.rate(model)[0]
    say(f"dense: {dense.name} {dense.value:.4g} (n={dense.n:,})")
    refuse_training_criteria(config)
    curves = rank_units(model, config.criterion.name, examples.batches, seed=seed)  # the same for every trial
    widths: Widths | None = None
    if "hidden" in config.units:
        fitted = fit_to_device(_at_once(config), model)
        widths = Widths(model, fitted, examples.batches, repairs=fitted.repair is not False, seed=seed)
    best: Pruned | None = None
    low, high = 1.0, fastest
    for trial in range(trials):
        # Halving the logarithm; the first guess is near where most models are.
        wanted = 2.0 if trial == 0 else (low * high) ** 0.5
        others = dict.fromkeys(("sparsity", "latency_ms", "parameters", "flops", "max_drop"))
        target = config.target.model_copy(update={**others, "speedup": wanted})
        candidate = copy.deepcopy(model)
        try:
            pruned = prune_once(
                candidate,
                config.model_copy(update={"target": target}),
                examples.batches,
                measure=measure,
                seed=seed,
                curves=curves,
                widths=widths,
            )
        except BudgetError as error:
            say(f"{wanted:.2f}x: {error}")
            high = wanted
            continue
        found, _ = examples.rate(candidate)
        lost = drop(dense, found)
        say(f"{wanted:.2f}x: {found.name} {found.value:.4g}, {lost:.2f} lost")
        if lost <= config.target.max_drop:
            best, low = Pruned(candidate, pruned.target, pruned.reached, found), wanted
        else:
            high = wanted
        if high / low < 1.05:
            break
    if best is None:
        raise BudgetError(
            f"no speedup that was tried (down to {high:.2f}x) stays within a drop of {config.target.max_drop}"
        )
    return best


def prune_folder(
    source: str,
    output: Path,
    config: PruneConfig,
    data: DataConfig,
    *,
    measure: MeasureConfig,
    seed: int,
    command: str,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Prune a saved model, save, verify and measure it, and write its card.

    Args:
        source: Folder or Hub repository of the model.
        output: Folder to write; it must be empty or not exist.
        config: What to prune.
        data: Where the examples are.
        measure: How time is measured.
        seed: Of everything random.
        command: What was typed, for the card.
        say: Told what is being done.

    Returns:
        The rows of the table: the dense and the pruned model.

    Raises:
        ValueError: Something does not fit; nothing was written.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        start, rate_dense = source, None
        if "vocabulary" in config.units:
            start, rate_dense = _with_fewer_tokens(source, scratch, config, data, measure=measure, seed=seed, say=say)
        return _prune_from(
            start,
            source,
            output,
            config,
            data,
            rate_dense=rate_dense,
            started=started,
            measure=measure,
            seed=seed,
            command=command,
            say=say,
        )


def _with_fewer_tokens(
    source: str,
    scratch: str,
    config: PruneConfig,
    data: DataConfig,
    *,
    measure: MeasureConfig,
    seed: int,
    say: Callable[[str], None],
) -> tuple[str, Rate | None]:
    """The model with the vocabulary that the data use, in a folder, and what scores the model as it was.

    A classifier is scored on texts in its own tokens. The perplexities of two vocabularies cannot be compared: there the model with all else
    as it was and fewer tokens stands for it.
    """
    if data.train is None:
        raise ValueError("units: vocabulary counts the tokens of texts; give a file of them")
    model, _ = _open(source, measure)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"units: vocabulary is for texts, and {type(model).__name__} reads none; leave it out")
    columns = [] if data.text is None else [data.text] if isinstance(data.text, str) else list(data.text)
    folder = Path(scratch, short_name(source))
    done = cut_for(source, read_corpus([data.train], text=columns), folder, config)
    say(
        f"The vocabulary keeps {done.tokens[1]:,} of {done.tokens[0]:,} tokens; {done.texts_share:.1%} of the texts read as before"
    )
    examples = read_examples(model, source, data, samples=1, seed=seed)
    if examples.task is not None or examples.rate is None:
        return str(folder), examples.rate
    smaller, _ = _open(str(folder), measure)
    rate = read_examples(smaller, str(folder), data, samples=1, seed=seed).rate
    assert rate is not None
    return str(folder), lambda _: rate(smaller)


def _prune_from(
    start: str,
    source: str,
    output: Path,
    config: PruneConfig,
    data: DataConfig,
    *,
    rate_dense: Rate | None,
    started: float,
    measure: MeasureConfig,
    seed: int,
    command: str,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """`prune_folder` from the model to start with, which may have fewer tokens than the source that it is measured beside."""
    model, dtype = _open(start, measure)
    examples = read_examples(model, start, data, samples=config.criterion.samples, seed=seed)
    say(f"Calibrating on {examples.n:,} examples")
    if config.target.max_drop is not None:
        dense = None if rate_dense is None else rate_dense(_open(source, measure)[0])[0]
        pruned = prune_within(model, config, examples, measure=measure, seed=seed, say=say, dense=dense)
    else:
        pruned = prune_once(model, config, examples.batches, measure=measure, seed=seed)
    say(f"Pruned and repaired in {time.perf_counter() - started:.0f} s; saving and loading again by every way")
    pruned.model.to(dtype)  # type: ignore[call-overload]
    pruned.model.save_pretrained(output)  # type: ignore[operator]
    save_probe(pruned.model, output)
    copy_processor(start, output)
    checks = verify_folder(output)
    failed = [check for check in checks if not check.ok]
    if failed:
        raise VerificationError(f"{output} does not load through {failed[0].route}: {failed[0].error}")
    say("Scoring and timing")
    found = measure_and_keep(
        {"dense": local_folder(source), "pruned": output},
        examples.rate
        if rate_dense is None or examples.rate is None
        else {"dense": rate_dense, "pruned": examples.rate},
        measure,
        class_names=examples.task.label_names if examples.task is not None else (),
    )
    rows = found.rows
    for row in rows:
        row["folder"] = "." if row["name"] == "pruned" else short_name(source)
    sections = {"prune": config, "data": data, "measure": measure}
    results = {
        "rows": rows,
        "name": output.resolve().name,
        "data": {"name": data.title or data.name or Path(str(data.train)).name, "calibration_n": examples.n},
        "command": command,
        "base_model": None if Path(source).is_dir() else source,
        "lineage": lineage_of_folder(source, data),
        "recipe": without_paths({k: section.model_dump(exclude_unset=True) for k, section in sections.items()}),
        "wall_s": round(time.perf_counter() - started, 1),
        **provenance(seed=seed),
    }
    if examples.task is not None:
        results["data"] |= {"eval_n": len(examples.task.eval_dataset), "fingerprint": examples.task.fingerprint}
    if found.answers:
        fingerprint = examples.task.fingerprint if examples.task is not None else None
        save_answers(found.answers, output, fingerprint=fingerprint)
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_card(output, base_model=results["base_model"], checks=checks)
    return rows


def lineage_of_folder(source: str, data: DataConfig | None) -> dict[str, Any]:
    """What a saved model and its data are called, and their licences as far as those are said."""
    found = {"base": describe_source(short_name(source) if Path(source).is_dir() else source, source)}
    if data is not None:
        name = data.title or data.name or Path(str(data.train)).name
        found["data"] = describe_source(name, data.name or data.train, kind="dataset")
    return found


def _open(source: str, measure: MeasureConfig) -> tuple[nn.Module, torch.dtype]:
    """A saved model in 32 bits on the device, in evaluation mode, and the type it was saved in.

    Raises:
        ValueError: It is quantized.
    """
    model = load(source)
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(f"{source} is quantized, so nothing can be cut from it; prune first and quantize after that")
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return model.float().to(device_of(measure.device)).eval(), dtype


def short_name(source: str) -> str:
    """What a folder or repository is called."""
    return Path(source).resolve().name if Path(source).is_dir() else source.rpartition("/")[2]


def local_folder(source: str) -> Path:
    """The folder of a model, fetched from the Hub if it is there."""
    return Path(source) if Path(source).is_dir() else Path(snapshot_download(source))


def sensitivity_of(
    source: str, criterion: CriterionConfig, data: DataConfig, *, measure: MeasureConfig, seed: int
) -> tuple[list[Sensitivity], list[LayerSensitivity]]:
    """What the units of each site of a saved model are worth, and its layers; see `measure_sensitivity` and `measure_layers`."""
    model, _ = _open(source, measure)
    examples = read_examples(model, source, data, samples=criterion.samples, seed=seed)
    curves = rank_units(model, criterion.name, examples.batches, seed=seed)
    return measure_sensitivity(model, examples.batches, curves), measure_layers(model, examples.batches)


def bit_costs_of(
    source: str, bits: Sequence[str], data: DataConfig, *, by: By, samples: int, measure: MeasureConfig, seed: int
) -> tuple[dict[str, dict[str, BitCost]], int]:
    """What each linear layer of a saved model costs in each format, and the bytes of all that is not quantized.

    Args:
        source: Folder or Hub repository of the model.
        bits: Numbers of bits or names of formats: see `format_for`.
        data: Where the examples are.
        by: See `bit_costs`.
        samples: Examples to look at.
        measure: The device.
        seed: Of the choice of examples, and of what is drawn.

    Raises:
        ValueError: The model is quantized, or a format is not known.
    """
    model, dtype = _open(source, measure)
    kept = str(dtype).removeprefix("torch.")
    examples = read_examples(model, source, data, samples=samples, seed=seed)
    costs = bit_costs(model, examples.batches, [format_for(each, kept=kept) for each in bits], by=by, seed=seed)
    everything = FLOATS[kept] * sum(parameter.numel() for parameter in model.parameters())
    return costs, everything - sum(size_bytes(model.get_submodule(name), kept) for name in costs)
