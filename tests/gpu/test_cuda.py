"""What must hold on a GPU as it does on the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.config import MeasureConfig
from hfcompress.measurement import compare_latency, example_inputs, memory_bytes
from hfcompress.pruning import Gates, Plan, cut
from hfcompress.quantization import DYNAMIC, PRESETS
from hfcompress.quantization.dynamic import is_dynamic
from hfcompress.runs.evaluation import measure_folders
from tests.families import CONFIGS, make_inputs, make_model, predictions, task_class
from tests.quantization.test_quantize import by_hand, quantized_modules, relative

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


@pytest.mark.parametrize("preset", DYNAMIC)
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "t5", "clip"])
@pytest.mark.parametrize("pruned", [False, True])
def test_what_torchao_multiplies_saves_reloads_and_compiles(
    name: str, preset: str, pruned: bool, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    if preset == "fp8-dynamic" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU that multiplies fp8")
    model = make_model(name, task_class(name))
    inputs = make_inputs(name, task_class(name))
    if pruned:
        cut(model, uneven_plan(model))
    model.save_pretrained(tmp_path / "full")
    full = outputs(model.cuda(), inputs)
    small = hfcompress.quantize(tmp_path / "full", preset)
    inputs = {key: value.to(small.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    assert any(is_dynamic(module) for module in small.modules())
    first = outputs(small, inputs)
    assert 0 < relative(first, full) < (0.1 if preset == "int8-dynamic" else 0.35)
    small.save_pretrained(tmp_path / "small")
    again = hfcompress.load(tmp_path / "small").cuda()
    torch.testing.assert_close(outputs(again, inputs), first, rtol=1e-3, atol=1e-3)
    assert memory_bytes(again) == memory_bytes(small) < memory_bytes(model)
    assert relative(outputs(torch.compile(again), inputs), first) < 0.05


@pytest.mark.parametrize("preset", DYNAMIC)
def test_what_torchao_multiplies_is_faster_than_what_is_whole(preset: str, tmp_path: Path) -> None:
    """Wide layers and many tokens, where products take the time."""
    pytest.importorskip("torchao")
    if preset == "fp8-dynamic" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU that multiplies fp8")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 16}
    model = BertModel(BertConfig(**sizes, vocab_size=100)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    hfcompress.quantize(tmp_path / "full", preset).save_pretrained(tmp_path / "small")
    folders = {"full": tmp_path / "full", "small": tmp_path / "small"}
    rows = measure_folders(folders, None, MeasureConfig(batch=64, length=256, device="cuda", compile=True))
    assert rows[1]["speedup"]["median"] > 1.05 and rows[1]["latency"]["compiled"]


@pytest.mark.parametrize("preset", ["int8", "nf4-dq"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("falcon")])
def test_every_family_is_quantized_and_reloads(name: str, preset: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = make_model(name, task_class(name)), make_inputs(name, task_class(name))
    model.save_pretrained(tmp_path / "full")
    quantized = hfcompress.quantize(tmp_path / "full", preset)
    assert quantized_modules(quantized) and {p.device.type for p in quantized.parameters()} == {"cuda"}
    first = outputs(quantized, inputs)
    reference = by_hand(tmp_path / "full", quantized_modules(quantized), preset).cuda()
    assert relative(first, outputs(reference, inputs)) < 0.1
    quantized.save_pretrained(tmp_path / "small")
    torch.testing.assert_close(outputs(hfcompress.load(tmp_path / "small"), inputs), first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_storage_that_fsdp_shards(storage: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = make_model("llama", "AutoModelForCausalLM"), make_inputs("llama")
    model.save_pretrained(tmp_path / "full")
    small = hfcompress.quantize(tmp_path / "full", "nf4-dq", dtype=storage, storage=storage)
    assert {p.dtype for p in small.parameters()} == {getattr(torch, storage)}
    first = outputs(small, inputs)
    small.save_pretrained(tmp_path / "small")
    torch.testing.assert_close(outputs(hfcompress.load(tmp_path / "small"), inputs), first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preset", ["int8", "nf4-dq"])
def test_adapters_recover_save_reload_and_merge(preset: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from hfcompress.quantization import merge_adapter
    from tests.quantization.recovering import adapters_of, make_trainer
    from tests.training.scenarios import Examples, build

    build("bert", "sequence", seed=7, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "full")
    options = {"use_cpu": False, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps"}
    options |= {"eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(tmp_path, preset, tmp_path / "run", **options)
    start = adapters_of(trainer.model).clone()
    trainer.train()
    assert next(trainer.model.parameters()).is_cuda and not torch.equal(adapters_of(trainer.model), start)
    inputs = {
        name: value for name, value in Examples("bert", "sequence", 8).batch(*range(8)).items() if name != "labels"
    }
    got = outputs(trainer.model.eval(), inputs)
    again = hfcompress.load(trainer.state.best_model_checkpoint)  # the best was loaded at the end
    torch.testing.assert_close(outputs(again.eval(), inputs), got, rtol=1e-3, atol=1e-3)
    trainer.save_model(str(tmp_path / "adapter"))
    merged = merge_adapter(tmp_path / "adapter").cuda()
    # Of int8 each layer's inputs are no longer rounded; in 4 bits kernels add up in another order.
    assert relative(outputs(merged, inputs), got) < (0.1 if preset == "int8" else 1e-2)
    resumed = make_trainer(tmp_path, preset, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    best = [state.state.best_model_checkpoint.rpartition("-")[2] for state in (trainer, resumed)]
    if best[0] == best[1]:
        torch.testing.assert_close(adapters_of(resumed.model), adapters_of(trainer.model), rtol=1e-3, atol=1e-4)


def test_a_base_is_quantized_around_its_adapters(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from hfcompress.quantization import add_adapters, refit_weights

    model, inputs = make_model("llama", "AutoModelForCausalLM"), make_inputs("llama")
    model.save_pretrained(tmp_path / "full")
    for preset in ("int8", "nf4"):
        small = hfcompress.quantize(tmp_path / "full", preset)
        plain = outputs(small, inputs)
        refit_weights(small, model, rank=8, iterations=3)
        assert not torch.equal(outputs(small, inputs), plain)
        small.save_pretrained(tmp_path / preset)
        adapted = add_adapters(hfcompress.load(tmp_path / preset), model, rank=8).eval()
        assert next(adapted.parameters()).is_cuda
        adapted.save_pretrained(tmp_path / f"{preset}-adapter")
        again = hfcompress.load(tmp_path / f"{preset}-adapter")
        torch.testing.assert_close(outputs(again, inputs), outputs(adapted, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("preset", ["int8", "nf4-dq"])
def test_layers_are_spread_over_two_gpus(preset: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = make_model("llama", "AutoModelForCausalLM", num_hidden_layers=8), make_inputs("llama")
    model.save_pretrained(tmp_path / "full")
    one = outputs(hfcompress.quantize(tmp_path / "full", preset), inputs)
    small = hfcompress.quantize(tmp_path / "full", preset, device_map="balanced")
    assert len({p.device.index for p in small.parameters()}) == 2
    assert len(quantized_modules(small)) == 7 * 8
    torch.testing.assert_close(outputs(small, inputs), one, rtol=1e-3, atol=1e-3)


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
    from tests.training.launching import launch, read_facts

    launch(tmp_path / "run", {"bert": {"ddp_find_unused_parameters": False}}, processes=1, gpu=True)
    assert read_facts(tmp_path / "run", "bert")["units"]


def test_pruning_makes_a_gpu_faster_too() -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 6}
    dense = make_model("bert", max_position_embeddings=512, **sizes).cuda()
    small = make_model("bert", max_position_embeddings=512, **sizes).cuda()
    cut(small, Plan({s.name: tuple(range(s.units // 4)) for s in find_sites(small)}))
    inputs = example_inputs(dense, batch=64, length=256)
    timed = compare_latency({"dense": dense, "small": small}, inputs, rounds=10, warmup=3, scope="layers")
    assert timed["small"].median_ms < timed["dense"].median_ms
