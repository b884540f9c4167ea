"""Benchmark: how much faster a pruned and exported model answers on one CPU thread, and what that costs.

    python scripts/bench/export.py --teacher PATH --student PATH --calibration FILE --eval FILE...

Teacher and student are exported to every format; each is scored on all evaluation data in its own runtime, and timed on one thread in turns with
the teacher in torch, in 32 bits, at batch 8 and lengths 64 and 128. Writes scripts/bench/results/export.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from facts import run_facts
from sentences import pooled
from torch import nn

from hfcompress import load
from hfcompress.config import DataConfig
from hfcompress.export import FORMATS, ExportedModel, export_formats
from hfcompress.measurement import (
    accuracy,
    compare_latency,
    count_parameters,
    example_inputs,
    mcnemar,
    speedup,
)
from hfcompress.runs.evaluation import predict
from hfcompress.runs.examples import Examples, read_examples

RESULTS = Path(__file__).resolve().parent / "results"
BATCH, LENGTHS = 8, (64, 128)
LEAST_SPEEDUP, MOST_POINTS = 6.0, 1.5
BASELINE = "teacher, torch float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the fine-tuned model")
    parser.add_argument("--student", required=True, help="folder of the pruned model")
    parser.add_argument("--calibration", required=True, help="parquet file with sentence and label")
    parser.add_argument("--eval", required=True, nargs="+", help="parquet files with sentence and label, pooled")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--samples", type=int, default=300, help="sentences to calibrate on")
    parser.add_argument("--max-eval", type=int, default=None, help="score on at most so many, for a trial")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=None, help="folder for the exports (default: a temporary one)")
    parser.add_argument("--results", default=str(RESULTS / "export.json"))
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(options.output or scratch))
    result = {
        **run_facts(seed=options.seed),
        **result,
        "wall_s": round(time.perf_counter() - started, 1),
    }
    Path(options.results).parent.mkdir(parents=True, exist_ok=True)
    Path(options.results).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=2))


def measure(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """All forms of both models: score, time, size, and the figures that follow."""
    originals: dict[str, Any] = {name: load(getattr(options, name)).float().eval() for name in ("teacher", "student")}
    examples = open_data(options, originals["teacher"])
    models: dict[str, nn.Module] = {f"{name}, torch float32": model for name, model in originals.items()}
    sizes = {f"{name}, torch float32": 4 * count_parameters(model) for name, model in originals.items()}
    checks: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for name, model in originals.items():
        done = export_formats(
            getattr(options, name),
            {form: output / name / form for form in options.formats},
            batches=examples.batches,
            model=model,
            say=lambda text, name=name: print(f"{name}: {text}", file=sys.stderr),
        )
        for form, one in done.items():
            models[f"{name}, {form}"] = ExportedModel(one.folder, threads=1)
            sizes[f"{name}, {form}"], checks[f"{name}, {form}"] = one.size_bytes, one.check.to_dict()
            versions |= json.loads((one.folder / "export.json").read_text(encoding="utf-8"))["versions"]
    times: dict[int, Any] = {
        length: compare_latency(
            models,
            example_inputs(originals["teacher"], batch=BATCH, length=length),
            rounds=options.rounds,
            threads=1,
        )
        for length in LENGTHS
    }
    rows, right = [], {}
    for name, model in models.items():
        predictions, labels = predict(model, examples.task)  # type: ignore[arg-type]
        right[name] = predictions == labels
        difference = 100 * (right[BASELINE].astype(float) - right[name].astype(float))
        rows.append(
            {
                "name": name,
                "accuracy": asdict(accuracy(predictions, labels)),
                "points_lost": float(difference.mean()),
                "points_lost_error": float(difference.std() / np.sqrt(len(difference))),
                "p_value_against_teacher": mcnemar(right[BASELINE], right[name]),
                "size_bytes": sizes[name],
                "check": checks.get(name),
                "latency": {length: times[length][name].to_dict() for length in LENGTHS},
                "speedup": {
                    length: asdict(speedup(times[length][BASELINE], times[length][name])) for length in LENGTHS
                },
            }
        )
        print(
            f"{name:<32} {100 * rows[-1]['accuracy']['value']:6.2f} %  {sizes[name] / 1e6:6.1f} MB  "
            + "  ".join(f"{length}: {rows[-1]['speedup'][length]['median']:.2f}x" for length in LENGTHS),
            file=sys.stderr,
        )
    assert examples.task is not None
    return {
        "rows": rows,
        "n": len(labels),
        "fingerprint": examples.task.fingerprint,
        "calibration_n": examples.n,
        "batch": BATCH,
        "rounds": options.rounds,
        "export_versions": versions,
        "figures": figures_of(rows),
    }


def open_data(options: argparse.Namespace, teacher: Any) -> Examples:
    """Calibration batches without padding to speak of, and the evaluation data as a task."""
    with pooled(options.eval) as held_out:
        data = DataConfig(
            train=options.calibration,
            eval=held_out,
            text="sentence",
            label="label",
            max_length=64,
            max_eval=options.max_eval,
        )
        return read_examples(teacher, options.teacher, data, samples=options.samples, seed=options.seed, batch=8)


def figures_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best pruned int8 form of those with 8-bit arithmetic: the one that is fastest at the lengths taken together."""
    int8 = [row for row in rows if row["name"].startswith("student, ") and "int8" in row["name"]]
    if not int8:
        return {}
    best = max(int8, key=lambda row: np.prod([row["speedup"][length]["median"] for length in LENGTHS]))
    figures = {}
    for length in LENGTHS:
        times = best["speedup"][length]
        figures[f"speedup_at_{length}"] = {
            "value": times["median"],
            "unit": f"times faster than the teacher in torch float32, {best['name']}, batch {BATCH}, one thread",
            "spread": [times["p10"], times["p90"]],
            "goal": f">= {LEAST_SPEEDUP}",
            "met": bool(times["median"] >= LEAST_SPEEDUP),
        }
    lost, error = best["points_lost"], best["points_lost_error"]
    figures["points_lost"] = {
        "value": lost,
        "unit": f"points of accuracy, {best['name']}",
        "spread": [lost - 1.96 * error, lost + 1.96 * error],
        "goal": f"<= {MOST_POINTS}",
        "met": bool(lost <= MOST_POINTS),
    }
    return figures


if __name__ == "__main__":
    main()
