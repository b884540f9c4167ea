"""What must hold on a GPU as it does on the CPU; skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.measurement import compare_latency, example_inputs, memory_bytes
from hfcompress.pruning import Gates, Plan, cut
from hfcompress.quantization import PRESETS
from tests.families import CONFIGS, make_inputs, make_model, predictions

pytestmark = pytest.mark.gpu

UNEVEN = {"heads": (2, 1, 3), "neurons": (37, 20, 48)}


def uneven_plan(model: nn.Module) -> Plan:
    """Different counts in each layer, odd widths among them."""
    sites = find_sites(model)
    kept = {site.name: UNEVEN[site.kind][(site.layer or 0) % 3] for site in sites}
    return Plan({site.name: tuple(range(min(site.units, kept[site.name]))) for site in sites})


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{name: value.cuda() for name, value in inputs.items()})
    return predictions(result).float()


@pytest.mark.parametrize("name", CONFIGS)
def test_cut_equals_gated(name: str) -> None:
    model, inputs = make_model(name).cuda(), make_inputs(name)
    plan = uneven_plan(model)
    gates = Gates(model, find_sites(model))
    gates.close({site: set(range(len(gates.values[site]))) - set(kept) for site, kept in plan.keep.items()})
    gated = outputs(model, inputs)
    gates.remove()
    cut(model, plan)
    torch.testing.assert_close(outputs(model, inputs), gated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", "AutoModelForSequenceClassification"),
        ("vit", "AutoModelForImageClassification"),
        ("gpt2", "AutoModelForCausalLM"),
        ("llama", "AutoModelForCausalLM"),
    ],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_quantized_model_saves_and_reloads(name: str, auto: str, preset: str, pruned: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = make_model(name, auto), make_inputs(name)
    if pruned:
        cut(model, uneven_plan(model))
    model.save_pretrained(tmp_path / "full")
    full = outputs(model.cuda(), inputs)
    quantized = hfcompress.quantize(tmp_path / "full", preset)
    assert next(quantized.parameters()).is_cuda
    first = outputs(quantized, inputs)
    assert (first - full).abs().max() < 0.6 * full.abs().max()
    quantized.save_pretrained(tmp_path / "small")
    again = hfcompress.load(tmp_path / "small")
    torch.testing.assert_close(outputs(again, inputs), first, rtol=1e-3, atol=1e-3)
    assert memory_bytes(again) == memory_bytes(quantized)


def test_generation_with_uneven_groups() -> None:
    model = make_model("llama", "AutoModelForCausalLM").cuda()
    cut(model, uneven_plan(model))
    inputs = {name: value.cuda() for name, value in make_inputs("llama", batch=1).items()}
    results = [
        model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation=kind)
        for kind in ("dynamic", "static")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_training_prunes_and_distils(precision: dict[str, bool], tmp_path: Path) -> None:
    from tests.training.scenarios import compress

    trainer, model = compress(tmp_path, use_cpu=False, max_steps=8, **precision)
    assert next(model.parameters()).is_cuda
    assert trainer.pruner.done
    assert trainer.pruner.sparsity() >= 0.5
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_resume_goes_on_exactly(tmp_path: Path) -> None:
    from tests.training.scenarios import compress, vector

    _, whole = compress(tmp_path / "a", use_cpu=False, max_steps=8, save_strategy="steps", save_steps=4, dropout=0.1)
    _, resumed = compress(
        tmp_path / "b", use_cpu=False, max_steps=8, dropout=0.1, resume=str(tmp_path / "a" / "checkpoint-4")
    )
    torch.testing.assert_close(vector(resumed), vector(whole), rtol=1e-5, atol=1e-6)


def test_one_process_group_on_nccl(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", "29517"]
    options = {"use_cpu": False, "ddp_find_unused_parameters": False}
    done = subprocess.run(
        [*command, "-m", "tests.training.scenarios", str(tmp_path), json.dumps(options)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "facts.json").read_text())["units"]


def test_pruning_makes_a_gpu_faster_too() -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 6}
    dense = make_model("bert", max_position_embeddings=512, **sizes).cuda()
    small = make_model("bert", max_position_embeddings=512, **sizes).cuda()
    cut(small, Plan({s.name: tuple(range(s.units // 4)) for s in find_sites(small)}))
    inputs = example_inputs(dense, batch=64, length=256)
    timed = compare_latency({"dense": dense, "small": small}, inputs, rounds=10, warmup=3, scope="layers")
    assert timed["small"].median_ms < timed["dense"].median_ms
