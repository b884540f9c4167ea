"""Products in int8 and fp8 by torchao: what they compute, that they save and load, and what is refused.

fp8 is made on the CPU here, where torchao multiplies it slowly but to the same end; its own check for a GPU is passed over.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from typing import get_args

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.checkpoints import hooks
from hfcompress.checkpoints.quantizer import DYNAMIC
from hfcompress.checkpoints.record import read_steps, read_units
from hfcompress.config import Dynamic, MeasureConfig, QuantizeConfig, Recipe, RecipeError
from hfcompress.hub import push_folder, save_probe, verify, verify_folder, write_card
from hfcompress.hub.results import words_of_row, words_of_rows
from hfcompress.measurement import count_flops, count_parameters, disk_bytes, example_inputs, memory_bytes
from hfcompress.pruning import Plan, cut
from hfcompress.quantization import dynamic, make_config, modules_to_skip, quantize, quantizing
from hfcompress.quantization.dynamic import adds_int8_exactly, is_dynamic
from hfcompress.runs import format_rows
from hfcompress.runs.evaluation import measure_folders
from tests.families import choose_units, make_inputs, make_model, predictions, run_model, task_class
from tests.hub.folders import all_fine
from tests.quantization.test_quantize import relative

quant_api = pytest.importorskip("torchao.quantization.quant_api")

# One of each kind; BART and CLIP have parameters outside of modules, CLIP and Wav2Vec2 no one table of input embeddings.
FAMILIES = ("bert", "deberta-v2", "vit", "llama", "t5", "bart", "clip", "wav2vec2")
UNEVEN = {0: 2, 1: 37, 2: 1, 3: 16, 4: 3, 5: 48}


@pytest.fixture
def fp8_anywhere(monkeypatch):
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    for module in (dynamic, quantizing):
        monkeypatch.setattr(module, "require_dynamic", lambda preset: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives folder, inputs and outputs of a saved float32 model; each is made once."""
    root = tmp_path_factory.mktemp("saved")

    @functools.cache
    def get(name, kind="whole"):
        model, inputs = make_model(name, task_class(name)), make_inputs(name, task_class(name))
        sites = find_sites(model)
        if kind == "uneven":
            cut(model, Plan({s.name: tuple(range(min(s.units, UNEVEN[i % 6]))) for i, s in enumerate(sites)}))
        if kind == "empty":
            cut(model, Plan(choose_units(sites, "empty")))
        folder = root / f"{name}-{kind}"
        model.save_pretrained(folder)
        return folder, inputs, predictions(run_model(model, inputs))

    return get


def dynamic_modules(model):
    return {name: module for name, module in model.named_modules() if is_dynamic(module)}


def outputs(model, inputs):
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return predictions(run_model(model, inputs)).float()


@pytest.mark.parametrize("preset", DYNAMIC)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["whole", "uneven"])
def test_a_preset_on_a_model(name, kind, preset, saved, tmp_path, fp8_anywhere):
    folder, inputs, full = saved(name, kind)
    model = quantize(folder, preset)
    assert not model.training and model.dtype == (torch.bfloat16 if preset == "fp8-dynamic" else torch.float32)
    found, whole = dynamic_modules(model), hfcompress.load(folder)
    sides = {n: m.weight.shape for n, m in whole.named_modules() if isinstance(m, nn.Linear)}
    odd = {n for n, shape in sides.items() if any(side % DYNAMIC[preset] for side in shape)}
    skip = set(modules_to_skip(whole))
    assert found.keys() == sides.keys() - skip - odd
    assert len(found) >= 6 and (kind == "whole" or odd - skip), "some layers are odd"
    for module in found.values():
        assert module.weight.qdata.dtype == (torch.int8 if preset == "int8-dynamic" else torch.float8_e4m3fn)
    (step,) = [step for step in read_steps(model.config) if step["step"] == "quantize"]
    assert step == {
        "step": "quantize",
        "preset": preset,
        "skipped": sorted(sides.keys() - found.keys()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(found),
    }
    got = outputs(model, inputs)
    if preset != "int8-dynamic" or adds_int8_exactly():
        assert 0 < relative(got, full) < (0.1 if preset == "int8-dynamic" else 0.35)
    model.save_pretrained(tmp_path / "small")
    kinds = {path.suffix for path in (tmp_path / "small").iterdir()}
    assert ".safetensors" in kinds and kinds <= {".safetensors", ".json", ".py"}
    plain = getattr(transformers, task_class(name)).from_pretrained(tmp_path / "small")
    for again in (hfcompress.load(tmp_path / "small"), plain):
        assert type(again) is type(model) and dynamic_modules(again).keys() == found.keys()
        assert torch.equal(outputs(again, inputs), got)
        assert read_units(again.config) == read_units(whole.config) and bool(read_units(again.config)) is (
            kind != "whole"
        )
    plain.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(hfcompress.load(tmp_path / "again"), inputs), got)


def rounded_rows(values):
    """Each row divided by a 127.5th of its largest value and rounded: codes of -128 to 127, and the divisors, both exact."""
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127.5)
    codes = np.clip(np.round(values * (np.float32(1) / scales)), -128, 127)  # in 32 bits: the largest one lies at a tie
    return codes.astype(np.float64), scales.astype(np.float64)


@pytest.mark.skipif(not adds_int8_exactly(), reason="this CPU adds 8-bit products inexactly")
def test_int8_is_what_it_is_by_hand(saved):
    folder, _, _ = saved("bert")
    name = "bert.encoder.layer.1.intermediate.dense"
    whole, small = (model.get_submodule(name) for model in (hfcompress.load(folder), quantize(folder, "int8-dynamic")))
    entering = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    weight, scale = rounded_rows(whole.weight.detach().numpy())
    codes, step = rounded_rows(entering.numpy())
    assert np.array_equal(small.weight.qdata.numpy(), weight)
    expected = (codes @ weight.T) * step * scale.T + whole.bias.detach().double().numpy()
    with torch.no_grad():
        assert np.abs(small(entering).numpy() - expected).max() < 1e-5
        assert np.abs(whole(entering).numpy() - expected).max() > 1e-4


def test_a_cpu_that_adds_inexactly_is_named(saved, monkeypatch, caplog):
    folder, _, _ = saved("bert")
    for exact in (True, False):
        monkeypatch.setattr("hfcompress.quantization.quantizing.adds_int8_exactly", lambda exact=exact: exact)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hfcompress"):
            quantize(folder, "int8-dynamic")
        assert ("adds 8-bit products inexactly" in caplog.text) is not exact


def test_a_text_does_not_depend_on_the_others_of_its_batch(saved, fp8_anywhere):
    folder, inputs, _ = saved("bert")
    for preset in DYNAMIC:
        model = quantize(folder, preset)
        first = {name: value[:1] for name, value in inputs.items()}
        torch.testing.assert_close(outputs(model, first), outputs(model, inputs)[:1], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("bart", "whole"), ("bert", "uneven")])
def test_it_loads_by_every_way_in_a_fresh_process(name, kind, saved, tmp_path):
    folder, _, _ = saved(name, kind)
    model = quantize(folder, "int8-dynamic")
    model.save_pretrained(tmp_path)
    save_probe(model, tmp_path)
    checks = verify_folder(tmp_path)
    assert [check.route for check in checks] == ["load", "auto", "plain" if kind == "whole" else "remote"]
    assert [(check.ok, check.difference) for check in checks] == [(True, 0.0)] * 3
    card = write_card(tmp_path, checks=checks).read_text()
    assert f"{len(dynamic_modules(model))} linear layers with torchao (int8-dynamic)" in card
    assert (
        card.count("torchao has to be installed:") == card.count("\nmodel.compile()") == (1 if kind == "whole" else 3)
    )


def test_it_is_pushed_and_pulled_with_its_hashes(saved, tmp_path, local_hub, monkeypatch):
    folder, inputs, _ = saved("bert", "uneven")
    monkeypatch.setattr(verify, "_run_child", all_fine)
    model = quantize(folder, "int8-dynamic")
    model.save_pretrained(tmp_path)
    save_probe(model, tmp_path)
    push_folder(tmp_path, "tester/small")
    again = hfcompress.load("tester/small")
    assert dynamic_modules(again).keys() == dynamic_modules(model).keys()
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_what_is_measured(saved, tmp_path, monkeypatch):
    folder, _, _ = saved("bert")
    model, whole = quantize(folder, "int8-dynamic"), hfcompress.load(folder)
    model.save_pretrained(tmp_path)
    inputs = example_inputs(whole, batch=2, length=5)
    assert count_parameters(model) == count_parameters(whole)
    assert count_flops(model, inputs) == count_flops(whole, inputs)
    weights = [module.weight for module in dynamic_modules(model).values()]
    # A byte for four, and a scale and (of the same numbers) a zero for each row.
    saving = sum(3 * weight.numel() - 5 * weight.shape[0] for weight in weights)
    assert memory_bytes(whole) - memory_bytes(model) == saving
    assert disk_bytes(folder) > disk_bytes(tmp_path)
    compiled = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda one: compiled.append(type(one)) or real(one, backend="eager"))
    settings = MeasureConfig(batch=2, length=5, rounds=3, warmup=0, threads=1, device="cpu", compile=True)
    rows = measure_folders({"original": folder, "int8-dynamic": tmp_path}, None, settings)
    assert compiled == [type(whole)] * 2
    assert [row["latency"]["compiled"] for row in rows] == [True, True] and rows[1]["speedup"]["median"] > 0
    assert not any("layers" in key for row in rows for key in row), "what is compiled has no layers to be timed"
    assert "of the layers" not in format_rows(rows) and [words_of_row(row)["layers"] for row in rows] == ["", ""]
    assert any("torch.compile" in note for note in words_of_rows({"rows": rows})["notes"])


def test_where_nothing_can_be_compiled(saved, monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    def fail(**inputs):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)

    def broken(model):
        model.forward = fail
        return model

    folder, _, _ = saved("bert")
    monkeypatch.setattr(torch, "compile", broken)
    settings = MeasureConfig(batch=2, length=5, rounds=3, threads=1, device="cpu", compile=True)
    with pytest.raises(
        ValueError, match=r"^torch\.compile does not work here \(.*no compiler.*\); measure without it$"
    ):
        measure_folders({"original": folder}, None, settings)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("int9-dynamic", {}, "no preset 'int9-dynamic'; there are int8, nf4, nf4-dq, fp4, fp4-dq, int8-dynamic, fp8-dynamic"),
        ("int8-dynamic", {"storage": "bfloat16"}, "storage and threshold are of bitsandbytes, and int8-dynamic is of torchao"),
        ("int8-dynamic", {"threshold": 1.0}, "storage and threshold are of bitsandbytes"),
        ("int8-dynamic", {"compute_dtype": "bfloat16"}, "compute_dtype is of 4-bit weights, and int8-dynamic has none"),
        ("fp8-dynamic", {"dtype": "float32"}, "fp8-dynamic multiplies in bfloat16, not float32; leave dtype out"),
        ("int8-dynamic", {"skip": ["clasifier"]}, "quantize.skip names 'clasifier', which is not a module"),
        ("int8-dynamic", {"skip": ["bert.encoder"]}, "nothing in "),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(preset, options, message, saved, fp8_anywhere):
    with pytest.raises(ValueError) as caught:
        quantize(saved("bert")[0], preset, **options)
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {}, "transformers does not quantize Conv1D"),
        ("falcon", {}, "transformers does not quantize FalconLinear"),
        ("bert", {"hidden_size": 36, "intermediate_size": 36}, "none has sides that are multiples of 8"),
    ],
)
def test_models_that_have_nothing_to_quantize(name, changes, reason, tmp_path):
    make_model(name, task_class(name), **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^nothing in .* was quantized: of its linear layers, {reason}$"):
        quantize(tmp_path, "int8-dynamic")


@pytest.mark.parametrize(
    ("preset", "version", "gpu", "message"),
    [
        ("int8-dynamic", None, None, r"int8-dynamic needs torchao 0\.16 or later; install it with: pip install 'torchao>=0\.16'"),
        ("int8-dynamic", "0.15.0", None, r"int8-dynamic needs torchao 0\.16 or later, and here is 0\.15\.0; install it"),
        ("fp8-dynamic", "0.16.0+cpu", None, r"fp8-dynamic needs a GPU of compute capability 8\.9 or more, and here is none; int8-dynamic"),
        ("fp8-dynamic", "1.0", (8, 6), r"fp8-dynamic needs a GPU of compute capability 8\.9 or more, and A10 has 8\.6; int8-dynamic"),
        ("int8-dynamic", "1.0", None, None),
        ("fp8-dynamic", "0.18.0", (9, 0), None),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_anything_is_loaded(preset, version, gpu, message, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A10")
    if message is None:
        dynamic.require_dynamic(preset)
        return
    with pytest.raises(ValueError, match=f"^{message}"):
        quantize("no/such/folder", preset)


def test_a_run_that_cannot_end_does_not_begin(tmp_path, monkeypatch):
    from hfcompress.runs import Run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sections = {"task": "text-classification", "data": {"train": "x.csv"}, "teacher": {"name": "there"}}
    recipe = Recipe.from_dict({**sections, "quantize": {"presets": ["fp8-dynamic"]}, "output": str(tmp_path / "run")})
    with pytest.raises(ValueError, match="fp8-dynamic needs a GPU"):
        Run(recipe, command="the test")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"presets": ["int8-dynamic"], "samples": 8}, "int8-dynamic rounds each weight to the nearest number; leave out it or samples"),
        ({"presets": ["int8-dynamic"], "recover": {}}, "recover puts adapters on layers of bitsandbytes, not on int8-dynamic"),
        ({"presets": ["fp8-dynamic"], "dtype": "float16"}, "fp8-dynamic multiplies in bfloat16, not float16"),
        ({"presets": ["int8-dynamik"]}, "did you mean int8-dynamic? Allowed: 'int8-dynamic', 'fp8-dynamic' of torchao"),
        ({"presets": ["nf5"]}, "did you mean nf4?"),
    ],
)  # fmt: skip
def test_recipes(section, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"quantize": section})
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_what_a_recipe_passes_on():
    assert tuple(DYNAMIC) == get_args(Dynamic)
    config = QuantizeConfig(presets=["int8-dynamic", "nf4"], threshold=2.0, dtype="bfloat16", skip=["a"])
    assert config.settings_of("int8-dynamic") == {"skip": ["a"], "dtype": "bfloat16"}
    assert [config.while_loading(preset) for preset in ("int8-dynamic", "nf4", "int3")] == [True, True, False]
    with pytest.raises(RecipeError, match="'int8-dynamic' is not allowed"):
        Recipe.from_dict({"qat": {"format": "int8-dynamic"}})


# ---- defects of others ----


def without_guard(monkeypatch, cls, name):
    monkeypatch.setattr(hooks, "install", lambda: None)  # which every loading calls
    monkeypatch.setattr(cls, name, getattr(cls, name).__wrapped__)


def test_parameters_outside_of_modules_break_what_is_saved_without_the_guard(saved, tmp_path, monkeypatch):
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    without_guard(monkeypatch, TorchAoHfQuantizer, "get_state_dict_and_metadata")
    quantize(saved("bart")[0], "int8-dynamic").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        hfcompress.load(tmp_path)


def test_models_of_several_embeddings_are_not_quantized_without_the_guard(saved, monkeypatch):
    from transformers.integrations.torchao import TorchAoQuantize

    without_guard(monkeypatch, TorchAoQuantize, "convert")
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        quantize(saved("clip")[0], "int8-dynamic")


def test_what_was_loaded_is_not_saved_without_the_guard(saved, tmp_path, monkeypatch):
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    quantize(saved("bert")[0], "int8-dynamic").save_pretrained(tmp_path / "small")
    without_guard(monkeypatch, TorchAoHfQuantizer, "_process_model_after_weight_loading")
    with pytest.raises(NotImplementedError):
        hfcompress.load(tmp_path / "small").save_pretrained(tmp_path / "again")


def test_without_a_least_value_rows_of_zeros_are_no_numbers(saved, fp8_anywhere, monkeypatch):
    """DeBERTa takes padding out of the embeddings; should this fail, torchao has learned to divide zeros."""
    folder, inputs, _ = saved("deberta-v2")
    assert (inputs["attention_mask"] == 0).any()
    settings = make_config("fp8-dynamic", skip=modules_to_skip(hfcompress.load(folder)))
    settings.quant_type.activation_value_lb = None
    model = hfcompress.load(folder, quantization_config=settings, dtype=torch.bfloat16)
    assert not outputs(model, inputs).isfinite().all()


def test_torchao_that_is_missing_is_named_when_a_model_is_loaded(saved, tmp_path, monkeypatch):
    quantize(saved("bert")[0], "int8-dynamic").save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.utils.quantization_config.is_torchao_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install `?torchao") as caught:
        hfcompress.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and os.path.isdir(tmp_path)
