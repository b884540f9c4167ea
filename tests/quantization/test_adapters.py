"""Adapters on quantized models: where they start, what comes back from disk, and merging."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.checkpoints.adapters import RECORD_FILE, base_of, read_config, save_record
from hfcompress.checkpoints.record import read_steps, read_units
from hfcompress.hub import save_probe, verify_folder
from hfcompress.pruning import Plan, cut
from hfcompress.quantization import PRESETS, add_adapters, loftq, merge_adapter, quantize, refit_weights
from hfcompress.quantization.adapters import low_rank, round_weight
from tests.families import choose_units, make_inputs, make_model, predictions, run_model, task_class
from tests.quantization.test_quantize import (
    FP4,
    NF4,
    quantized_modules,
    relative,
    rounded_in_blocks,
    rounded_in_rows,
)

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def weight(rows=48, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---- the pure functions ----


@pytest.mark.parametrize("preset", PRESETS)
def test_rounding_as_by_hand(preset):
    value = weight()
    codes = {"nf4": NF4, "fp4": FP4}.get(preset.partition("-")[0])
    numpy = value.double().numpy()
    expected = rounded_in_rows(numpy) if codes is None else rounded_in_blocks(numpy, codes)
    tolerance = {"int8": 2e-3}.get(preset, 0.02 if preset.endswith("dq") else 3e-3)  # of dq the scales are rounded
    assert relative(round_weight(value, preset), torch.tensor(expected).float()) < tolerance
    with pytest.raises(ValueError, match="no preset 'nf5'; there are int8"):
        round_weight(value, "nf5")


def test_the_nearest_matrix_of_a_rank():
    value = weight()
    u, values, v = np.linalg.svd(value.double().numpy())
    for rank in (1, 5):
        a, b = low_rank(value, rank)
        expected = (u[:, :rank] * values[:rank]) @ v[:rank]
        torch.testing.assert_close(b @ a, torch.tensor(expected).float(), rtol=1e-4, atol=1e-4)
        assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-4)
    a, b = low_rank(value, 60)  # more than there are rows
    assert (a.shape, b.shape) == ((60, 96), (48, 60))
    torch.testing.assert_close(b @ a, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_error_falls(preset):
    """Against plain quantization, which is also what adapters that start at zero leave; and with every rank and iteration."""
    value = weight()
    plain = float((value - round_weight(value, preset)).norm())
    errors = {}
    for rank, iterations in ((4, 1), (16, 1), (16, 5)):
        quantized, a, b = loftq(value, preset, rank, iterations=iterations)
        errors[rank, iterations] = float((value - quantized - b @ a).norm())
        if iterations == 1:
            assert torch.equal(quantized, round_weight(value, preset))
    assert errors[16, 1] < errors[4, 1] < plain
    if preset != "int8":  # whose rounding errors are noise without larger directions to take away
        assert errors[16, 5] < errors[16, 1]


def test_the_alternation_step_by_step():
    """Algorithm 1 of the paper, written out with numpy's decomposition."""
    value, product = weight().double().numpy(), 0.0
    for _ in range(3):
        quantized = round_weight(torch.tensor(value - product).float(), "nf4").double().numpy()
        u, values, v = np.linalg.svd(value - quantized)
        product = (u[:, :6] * values[:6]) @ v[:6]
    found, a, b = loftq(weight(), "nf4", 6, iterations=3)
    assert relative(found, torch.tensor(quantized).float()) < 1e-3
    assert relative(b @ a, torch.tensor(product).float()) < 1e-2


@pytest.mark.parametrize(("rank", "iterations"), [(0, 1), (1, 0)])
def test_ranks_and_iterations_below_one(rank, iterations):
    with pytest.raises(ValueError, match="rank and iterations are 1 or more"):
        loftq(weight(), "nf4", rank, iterations=iterations)


# ---- on a model ----


def saved(folder, name="bert", *, pruned=False):
    model = make_model(name, task_class(name), **({"hidden_size": 64} if name == "bert" else {}))
    if pruned:
        cut(model, Plan(choose_units(find_sites(model), "both")))
    model.save_pretrained(folder / "full")
    return model


@pytest.mark.parametrize(
    ("name", "preset", "pruned"),
    [
        ("bert", "nf4-dq", True),
        ("bert", "int8", False),
        ("gpt2", "nf4", False),
        ("t5", "fp4-dq", False),
        ("vit", "int8", True),
    ],
)
def test_save_reload_and_merge(name, preset, pruned, tmp_path):
    full, inputs = saved(tmp_path, name, pruned=pruned), make_inputs(name)
    small = quantize(tmp_path / "full", preset)
    plain = predictions(run_model(small, inputs))
    small.save_pretrained(tmp_path / "small")
    small = hfcompress.load(tmp_path / "small")
    linear = quantized_modules(small)
    adapted = add_adapters(small, full, rank=16).eval()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(linear) and all("lora_" in n for n in trained)
    got = predictions(run_model(adapted, inputs))
    assert not torch.equal(got, plain)
    # Each layer is nearer to the original than it was.
    for layer in linear:
        part = adapted.get_base_model().get_submodule(layer)
        original = full.get_submodule(layer).weight.detach()
        original = original.T if name == "gpt2" else original
        rounded = by_hand_weight(part.get_base_layer())
        product = part.get_delta_weight("default").detach()
        assert (original - rounded - product).norm() < 0.9 * (original - rounded).norm(), layer
    adapted.save_pretrained(tmp_path / "adapter")
    save_record(small.config, tmp_path / "adapter")

    assert base_of(tmp_path / "adapter") == str(tmp_path / "small")
    again = hfcompress.load(tmp_path / "adapter")
    assert type(again) is type(small) and torch.equal(predictions(run_model(again, inputs)), got)
    merged = merge_adapter(tmp_path / "adapter")
    assert not quantized_modules(merged) and not [n for n in merged.state_dict() if "lora" in n]
    exact = got if preset != "int8" else expected_without_activation_rounding(full, adapted, inputs)
    assert relative(predictions(run_model(merged, inputs)), exact) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    loaded = hfcompress.load(tmp_path / "merged")
    assert torch.equal(predictions(run_model(loaded, inputs)), predictions(run_model(merged, inputs)))
    assert [step["step"] for step in read_steps(loaded.config)] == ["quantize", "adapt", "merge"]
    assert read_units(loaded.config) == read_units(full.config) and bool(read_units(loaded.config)) is pruned
    assert getattr(loaded.config, "quantization_config", None) is None


def by_hand_weight(layer):
    """What a quantized layer holds, from its codes and scales."""
    if hasattr(layer.weight, "SCB"):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.detach().float() * scales[:, None] / 127
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        import bitsandbytes as bnb

        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = layer.weight.data.flatten()
    count = state.shape.numel()
    numbers = torch.stack([codes >> 4, codes & 15], 1).flatten().long()[:count]
    return (state.code[numbers] * absmax.repeat_interleave(64)[:count]).reshape(state.shape)


def expected_without_activation_rounding(full, adapted, inputs):
    """The float model with the weights that the quantized layers hold, and the products added."""
    for name, part in adapted.get_base_model().named_modules():
        if hasattr(part, "base_layer"):
            value = by_hand_weight(part.get_base_layer()) + part.get_delta_weight("default").detach()
            full.get_submodule(name).weight.data.copy_(value)
    return predictions(run_model(full, inputs))


def test_a_base_that_was_quantized_around_its_adapters(tmp_path):
    full, inputs = saved(tmp_path), make_inputs("bert")
    errors = {}
    for iterations in (1, 4):
        small = quantize(tmp_path / "full", "nf4")
        names = list(quantized_modules(small))
        before = {name: by_hand_weight(small.get_submodule(name)) for name in names}
        refit_weights(small, full, rank=16, iterations=iterations)
        after = {name: by_hand_weight(small.get_submodule(name)) for name in names}
        assert all(torch.equal(before[name], after[name]) is (iterations == 1) for name in names)
        small.save_pretrained(tmp_path / str(iterations))  # an ordinary checkpoint
        adapted = add_adapters(hfcompress.load(tmp_path / str(iterations)), full, rank=16).eval()
        products = {n: adapted.get_base_model().get_submodule(n).get_delta_weight("default").detach() for n in names}
        errors[iterations] = sum(
            float((full.get_submodule(n).weight.detach() - after[n] - products[n]).norm()) for n in names
        )
        for name in names:  # and both are what the pure function says
            quantized, a, b = loftq(full.get_submodule(name).weight.detach(), "nf4", 16, iterations=iterations)
            torch.testing.assert_close(after[name], quantized, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(products[name], b @ a, rtol=1e-2, atol=1e-3)
        adapted.save_pretrained(tmp_path / f"adapter-{iterations}")
        got = predictions(run_model(adapted, inputs))
        assert torch.equal(predictions(run_model(hfcompress.load(tmp_path / f"adapter-{iterations}"), inputs)), got)
    assert errors[4] < errors[1] and len(names) == 18


def test_starting_at_zero_changes_nothing(tmp_path):
    saved(tmp_path)
    small, inputs = quantize(tmp_path / "full", "nf4"), make_inputs("bert")
    plain = predictions(run_model(small, inputs))
    adapted = add_adapters(small, init="lora", targets=["query", "value"], rank=4).eval()
    assert torch.equal(predictions(run_model(adapted, inputs)), plain)
    assert len([n for n, p in adapted.named_parameters() if p.requires_grad]) == 2 * 2 * 3
    assert read_steps(small.config)[-1] == {
        "step": "adapt",
        "rank": 4,
        "alpha": 16,
        "init": "lora",
        "layers": 6,
        "dropout": 0.0,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pissa"}, "init 'pissa' is not known; allowed: loftq, lora"),
        ({}, "init: loftq starts from what quantization took away; pass full, the model in float, or set init to lora"),
        (
            {"init": "lora", "targets": ["querry"]},
            "targets names 'querry', which is no linear layer of BertForSequence",
        ),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    saved(tmp_path)
    small = quantize(tmp_path / "full", "nf4")
    with pytest.raises(ValueError) as caught:
        add_adapters(small, **options)
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


def test_models_that_do_not_fit(tmp_path, monkeypatch):
    full = saved(tmp_path)
    small = quantize(tmp_path / "full", "nf4")
    with pytest.raises(
        ValueError, match=r"is \(32, 32\) in the full model and \(64, 64\) in the quantized one; pass the model that"
    ):
        add_adapters(small, make_model("bert", task_class("bert")))
    with pytest.raises(
        ValueError, match=r"the full model has no bert.encoder.layer.0.* pass the model that was quantized"
    ):
        add_adapters(small, make_model("vit", task_class("vit")))
    with pytest.raises(ValueError, match="BertForSequenceClassification has no quantized layers to put adapters on"):
        add_adapters(full, full)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adapters need peft; install it with: pip install 'hfcompress\[adapters\]'"):
        add_adapters(small, full)


def test_merging_that_is_not_exact_is_refused(tmp_path):
    full = saved(tmp_path)
    small = quantize(tmp_path / "full", "nf4")
    small.save_pretrained(tmp_path / "small")
    add_adapters(hfcompress.load(tmp_path / "small"), full).save_pretrained(tmp_path / "adapter")
    for dtype in ("nf4", "int8", "bfloat16"):
        with pytest.raises(ValueError, match=rf"^merging into {dtype} is not exact, .*; merge into float32") as caught:
            merge_adapter(tmp_path / "adapter", dtype=dtype)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"holds no adapter; give the folder with adapter_config\.json"):
        merge_adapter(tmp_path / "small")
    with pytest.raises(ValueError, match="holds an adapter; make one model of it first with merge_adapter"):
        quantize(tmp_path / "adapter", "nf4")
    assert read_config(tmp_path / "adapter").model_type == "bert" and not (tmp_path / "adapter" / RECORD_FILE).exists()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say base_model_name_or_path"):
        base_of(tmp_path / "adapter")


# ---- a fresh process, with peft's own ways ----

_LOAD = """
import json, sys
folder = sys.argv[1]
import peft, torch, transformers
expected, found = torch.load(folder + "/expected.pt"), {}
base = transformers.AutoModelForSequenceClassification.from_pretrained(folder + "/small")
models = {
    "PeftModel": peft.PeftModel.from_pretrained(base, folder + "/adapter"),
    "AutoPeftModel": peft.AutoPeftModel.from_pretrained(folder + "/adapter"),
    "Auto": transformers.AutoModelForSequenceClassification.from_pretrained(folder + "/adapter"),
}
with torch.no_grad():
    for name, model in models.items():
        found[name] = float((model.eval()(**expected["inputs"]).logits - expected["got"]).abs().max())
assert "hfcompress" not in sys.modules
print(json.dumps(found))
"""


def test_plain_transformers_and_peft_in_a_fresh_process(tmp_path):
    """In 8 bits; those in 4 need hfcompress imported, as `verify_folder` does below."""
    full, inputs = saved(tmp_path), make_inputs("bert")
    quantize(tmp_path / "full", "int8").save_pretrained(tmp_path / "small")
    adapted = add_adapters(hfcompress.load(tmp_path / "small"), full).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save({"inputs": dict(inputs), "got": predictions(run_model(adapted, inputs))}, tmp_path / "expected.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"PeftModel", "AutoPeftModel", "Auto"} and max(found.values()) <= 1e-6


def test_an_adapters_folder_is_verified_by_peft_too(tmp_path):
    full = saved(tmp_path, pruned=True)
    quantize(tmp_path / "full", "nf4").save_pretrained(tmp_path / "small")
    adapted = add_adapters(hfcompress.load(tmp_path / "small"), full).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    save_probe(adapted, tmp_path / "adapter")
    checks = verify_folder(tmp_path / "adapter")
    assert [check.route for check in checks] == ["load", "auto", "peft"]
    for check in checks:
        assert check.ok and check.error is None and check.difference <= 1e-5, check
