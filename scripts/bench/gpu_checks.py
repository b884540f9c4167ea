"""Checks that need a GPU: presets save and reload with the same outputs, memory, and the speedup of a pruned BERT-base.

    python scripts/bench/gpu_checks.py

Writes scripts/bench/results/gpu_checks.json. Weights are random: nothing here is about accuracy.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hfcompress
from hfcompress.measurement import compare_latency, count_flops, example_inputs, memory_bytes, provenance, speedup
from hfcompress.quantization import PRESETS

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_checks.json"


def half(model: torch.nn.Module, share: float) -> hfcompress.Plan:
    keep = {}
    for site in hfcompress.find_sites(model):
        step = 64 if site.kind == "neurons" else 1
        keep[site.name] = tuple(range(max(step, round(site.units * share) // step * step)))
    return hfcompress.Plan(keep)


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=2816,
        vocab_size=32000,
    )
    return {"bert-base": BertForSequenceClassification(BertConfig()), "llama-8x1024": LlamaForCausalLM(llama)}


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.float()


def check_presets(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """Each preset on the pruned model: error to the full model, difference after save and reload, memory."""
    hfcompress.cut(model, half(model, 0.45))
    model.save_pretrained(folder / "full")
    full = model.cuda().eval()
    inputs = example_inputs(full, batch=8, length=64)
    reference, found = logits(full, inputs), {}
    for preset in PRESETS:
        small = hfcompress.quantize(folder / "full", preset)
        first = logits(small, inputs)
        small.save_pretrained(folder / preset)
        again = hfcompress.load(folder / preset)
        found[preset] = {
            "relative_error": float((first - reference).norm() / reference.norm()),
            "reload_difference": float((logits(again, inputs) - first).abs().max()),
            "memory_share": memory_bytes(small) / memory_bytes(full),
            "device": str(next(small.parameters()).device),
        }
    return found


def time_pruned(dtype: torch.dtype) -> dict[str, Any]:
    """Speedup of the layers of a pruned BERT-base over the dense one, in one process, interleaved."""
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig()).to("cuda", dtype).eval()
    found = {}
    for share in (0.5, 0.25):
        small = BertForSequenceClassification(BertConfig()).to("cuda", dtype).eval()
        hfcompress.cut(small, half(small, share))
        inputs = example_inputs(dense, batch=32, length=128)
        timed = compare_latency({"dense": dense, "small": small}, inputs, rounds=50, warmup=10, scope="layers")
        ratio = speedup(timed["dense"], timed["small"])
        found[f"units left {share}"] = {
            "value": ratio.median,
            "spread": [ratio.p10, ratio.p90],
            "unit": "x",
            "flops_reduction": count_flops(dense, inputs) / count_flops(small, inputs),
            "dense_ms": timed["dense"].median_ms,
        }
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_checks: there is no CUDA device")
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        presets = {name: check_presets(model, Path(scratch) / name) for name, model in models().items()}
    figures = {
        "presets": presets,
        "speedup_float32": time_pruned(torch.float32),
        "speedup_bfloat16": time_pruned(torch.bfloat16),
    }
    result = {
        "command": "python scripts/bench/gpu_checks.py",
        **provenance(seed=0),
        "device": {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "data": {"name": "random tokens", "n": 8, "fingerprint": None},
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "figures": figures,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
