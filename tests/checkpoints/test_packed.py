"""Packed weights: bits side by side, layers that compute with them, and models that every way of loading brings back."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import hfcompress
from hfcompress.anatomy import StructureError, find_sites
from hfcompress.anatomy.sites import linear_features
from hfcompress.checkpoints.grids import Scheme
from hfcompress.checkpoints.packed import PackedLinear, pack, packed_bytes, unpack
from hfcompress.checkpoints.quantizer import PackedConfig
from hfcompress.pruning import Plan, cut
from hfcompress.quantization.calibrated import round_at_once
from hfcompress.quantization.fitting import fit_grid
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, put_rounded
from tests.families import choose_units, make_inputs, make_model, predictions, run_model, task_class

# One of each kind, and layouts whose blocks run on from row to row.
SCHEMES = [
    *("int2", "int3", "int4-g32-asym", "int5-tensor", "int6-channel", "int7-g48", "int8-g64", "int8-channel-asym"),
    *("fixed2", "fixed8-channel", "codebook1", "codebook3", "codebook8", "nf4-g64", "fp4-channel", "ternary", "binary"),
]
MIXED = ("nf4-dq", "int8", "int3", None, "ternary", "fp4")
FAMILIES = ("bert", "vit", "gpt2", "llama", "t5", "bart")


def quantized(name, formats, *, pattern=None, auto=None, dtype=torch.float32):
    """A tiny model with its layers written in the given formats in turn (None: as they are), and inputs for it."""
    auto = auto or task_class(name)
    model, inputs = make_model(name, auto), make_inputs(name, auto)
    if pattern:
        cut(model, Plan(choose_units(find_sites(model), pattern)))
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.to(dtype)
        model.config.dtype = dtype
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    formats = (formats,) if isinstance(formats, str) else formats
    turns = enumerate(layers_to_quantize(model))
    chosen = {layer: formats[turn % len(formats)] for turn, layer in turns if formats[turn % len(formats)]}
    put_rounded(model, round_at_once(model, chosen))
    return model, inputs, chosen


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def check_same(again, model, inputs):
    """Bit for bit: every tensor, every type, and what comes out."""
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and len(mine) > 20
    for key, value in mine.items():
        assert theirs[key].dtype == value.dtype and torch.equal(theirs[key], value), key
    assert type(again) is type(model) and not again.training
    assert torch.equal(predictions(run_model(again, inputs)), predictions(run_model(model, inputs)))


# ---- bits ----


def packed_slowly(codes, bits):
    """One long number, whose digits are the codes, cut into bytes; of three levels, five digits of base 3 a byte."""
    if bits == 1.6:
        groups = [codes[start : start + 5] for start in range(0, len(codes), 5)]
        return [sum(code * 3**place for place, code in enumerate(group)) for group in groups]
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    count = len(codes) if bits == 8 else -(-len(codes) // 8) * bits
    return list(number.to_bytes(count, "little"))


@pytest.mark.parametrize("bits", [*range(1, 9), 1.6])
def test_packing_is_a_long_number(bits):
    generator = torch.Generator().manual_seed(0)
    levels, looked_at = 3 if bits == 1.6 else 2**bits, 0
    for count in [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 131]:
        codes = torch.randint(0, levels, (count,), generator=generator).to(torch.uint8)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.tolist() == packed_slowly(codes.tolist(), bits)
        assert len(packed) == packed_bytes(count, bits)
        back = unpack(packed, bits, count)
        assert back.dtype == torch.uint8 and torch.equal(back, codes)
        looked_at += 1
    for code in (0, levels - 1):
        assert unpack(pack(torch.full((11,), code), bits), bits, 11).tolist() == [code] * 11
    assert looked_at == 16


def test_a_matrix_is_packed_row_by_row():
    codes = torch.arange(12).view(3, 4) % 8
    assert torch.equal(pack(codes, 3), pack(codes.flatten(), 3))


@pytest.mark.parametrize(
    ("count", "bits", "expected"),
    [(16, 1, 2), (17, 1, 3), (64, 3, 24), (9, 4, 8), (10, 1.6, 2), (11, 1.6, 3), (9, 8, 9), (0, 5, 0)],
)
def test_bytes_by_hand(count, bits, expected):
    assert packed_bytes(count, bits) == expected


# ---- layers ----


def make_linear(kind, *, bias=True, outputs=10, inputs=24):
    torch.manual_seed(0)
    linear = Conv1D(outputs, inputs) if kind is Conv1D else nn.Linear(inputs, outputs, bias=bias)
    linear.requires_grad_(False)
    if linear.bias is not None:
        linear.bias.normal_()
    return linear


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_multiplies_the_decoded_weights(name, kind):
    scheme, linear = Scheme.parse(name), make_linear(kind)
    weight = linear.weight.T if kind is Conv1D else linear.weight
    grid = fit_grid(weight, scheme, scale_dtype=torch.float16)
    codes = grid.encode(weight)
    packed = PackedLinear.of(linear, scheme, grid, codes, scale_dtype=torch.float16)
    x, decoded = torch.randn(3, 5, 24), grid.decode(codes).contiguous()  # the last bits hang on the order in memory
    assert torch.equal(packed.weight, decoded) and torch.equal(packed(x), F.linear(x, decoded, linear.bias))
    linear.weight.copy_(decoded.T if kind is Conv1D else decoded)
    torch.testing.assert_close(packed(x), linear(x))
    state = packed.state_dict()
    assert sum(t.numel() * t.element_size() for key, t in state.items() if key != "bias") == format_of(name).size_bytes(
        10, 24
    )
    assert state["codes"].dtype == torch.uint8 and state["scale"].dtype == torch.float16
    assert ("offset" in state) is scheme.affine and ("levels" in state) is (scheme.kind == "codebook")
    assert linear_features(packed) == (24, 10)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), packed(x)) and twin.source_cls is packed.source_cls is kind
    assert name.split("-")[0] in repr(packed)


def test_a_layer_without_bias_and_in_half_precision():
    linear = make_linear(nn.Linear, bias=False).to(torch.bfloat16)
    grid = fit_grid(linear.weight, Scheme.parse("int4"), scale_dtype=torch.float16)
    packed = PackedLinear.of(
        linear, Scheme.parse("int4"), grid, grid.encode(linear.weight.float()), scale_dtype=torch.float16
    )
    x = torch.randn(2, 24, dtype=torch.bfloat16, requires_grad=True)
    assert packed.bias is None and packed.weight.dtype == torch.bfloat16
    packed(x).sum().backward()  # gradients pass through
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(2, -1))
    assert not [*packed.parameters()]


def test_a_scale_that_its_type_cannot_hold():
    linear = make_linear(nn.Linear)
    linear.weight[0, 0] = 1e7
    grid = fit_grid(linear.weight, Scheme.parse("int4"))
    with pytest.raises(ValueError, match=r"^a scale of 1.25e\+06 does not fit into torch.float16$"):
        PackedLinear.of(linear, Scheme.parse("int4"), grid, grid.encode(linear.weight), scale_dtype=torch.float16)


# Bits per weight of a matrix of 1000 x 640: those of the codes, plus 16 bits of scale (and offset) per block.
BITS = {
    **{f"int{bits}": bits + 16 / 64 for bits in range(2, 8)},
    "int8-channel": 8 + 16 / 640,
    "int4-g32-asym": 4 + 2 * 16 / 32,
    "int4-channel-asym": 4 + 2 * 16 / 640,
    "fixed4": 4 + 16 / 640_000,
    "codebook4": 4 + 16 * 17 / 640_000,  # sixteen levels and a scale
    "nf4-g64": 4 + 16 / 64,  # without -g64 it is that of bitsandbytes
    "fp4-g128": 4 + 16 / 128,
    "ternary": 8 / 5 + 16 / 64,
    "ternary-channel": 8 / 5 + 16 / 640,
    "binary": 1 + 16 / 64,
}


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_bits_per_weight(name, bits):
    torch.manual_seed(0)
    linear = nn.Linear(640, 1000, bias=False).requires_grad_(False)
    form = format_of(name)
    grid = form.fit(linear.weight, fit="min-max")
    state = form.layer(linear, grid, grid.encode(linear.weight)).state_dict()
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert size_bytes == form.size_bytes(1000, 640) and size_bytes * 8 / 640_000 == pytest.approx(bits, abs=1e-9)
    if name == "ternary":
        assert size_bytes < 4 * 640_000 / 14


# ---- models ----


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_on_disk(name, tmp_path):
    model, _, chosen = quantized("bert", name)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    written = sum(
        tensor.numel() * tensor.element_size()
        for key, tensor in tensors.items()
        if key.rpartition(".")[0] in chosen and not key.endswith(".bias")
    )
    shapes = [(module.out_features, module.in_features) for module in packed_layers(model).values()]
    assert len(shapes) == len(chosen) == 18
    # A byte each that stops who loads it without hfcompress.
    assert written == sum(format_of(name).size_bytes(*shape) + 1 for shape in shapes)


@pytest.mark.parametrize("formats", ["int3", "codebook4", "int4-g32-asym", "ternary", MIXED], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back(name, formats, tmp_path):
    model, inputs, chosen = quantized(name, formats)
    model.save_pretrained(tmp_path / "first")
    again = getattr(transformers, task_class(name)).from_pretrained(tmp_path / "first")
    check_same(again, model, inputs)
    ours = [layer for layer, form in chosen.items() if form not in ("nf4-dq", "int8", "fp4")]
    assert sorted(packed_layers(again)) == sorted(ours) and len(ours) >= 4
    config = again.config.quantization_config
    assert config.quant_method == "hfcompress" and config.modules == model.config.quantization_config.modules
    again.save_pretrained(tmp_path / "second")  # what was loaded can be saved
    check_same(hfcompress.load(tmp_path / "second"), model, inputs)


@pytest.mark.parametrize("pattern", ["both", "empty"])
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_models(name, pattern, tmp_path):
    model, inputs, chosen = quantized(name, ("int3", "nf4-dq", "ternary"), pattern=pattern)
    model.save_pretrained(tmp_path)
    for again in (hfcompress.load(tmp_path), getattr(transformers, task_class(name)).from_pretrained(tmp_path)):
        check_same(again, model, inputs)
        assert find_sites(again) == find_sites(model) and len(packed_layers(again)) >= len(chosen) / 2 > 0


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_in_bfloat16(name, tmp_path):
    model, inputs, _ = quantized(name, MIXED, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = hfcompress.load(tmp_path)
    assert again.dtype == torch.bfloat16
    check_same(again, model, inputs)
    assert {module.scale.dtype for module in packed_layers(again).values()} == {torch.float16}
    widened = hfcompress.load(tmp_path, dtype=torch.float32)
    for layer, module in packed_layers(widened).items():
        assert torch.equal(module.scale, again.get_submodule(layer).scale) and module.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "bart"])
def test_without_the_head_and_with_a_new_one(name, tmp_path):
    model, inputs, _ = quantized(name, MIXED)
    model.save_pretrained(tmp_path / "whole")
    bare, facts = transformers.AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    base = model.base_model
    assert len(packed_layers(bare)) == len(packed_layers(base)) > 0
    assert not [key for key in facts["unexpected_keys"] if "layer" in key]
    assert not [key for key in facts["missing_keys"] if "pooler" not in key]
    theirs = bare.state_dict()
    same = [torch.equal(theirs[key], value) for key, value in base.state_dict().items()]
    assert len(same) > 20 and all(same)
    bare.save_pretrained(tmp_path / "bare")
    again = getattr(transformers, task_class(name)).from_pretrained(tmp_path / "bare")
    hidden = [run_model(m.base_model, inputs)["last_hidden_state"] for m in (again, model)]
    assert torch.equal(*hidden)


def test_only_a_part_of_the_model(tmp_path):
    model, _, _ = quantized("bart", "int3")
    model.save_pretrained(tmp_path)
    decoder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found = packed_layers(decoder)
    assert len(found) == 20 and all(".decoder." in name for name in found)  # two layers of ten
    assert all(torch.equal(m.codes, model.get_submodule(name).codes) for name, m in found.items())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_dequantize(name, tmp_path):
    model, inputs, _ = quantized(name, ("int3", "ternary", "nf4-dq", "fp4"))
    model.save_pretrained(tmp_path / "packed")
    expected = predictions(run_model(model, inputs))
    for packed in (model, hfcompress.load(tmp_path / "packed")):
        plain = packed.dequantize()
        kinds = {type(module).__name__ for module in plain.modules()}
        assert not kinds & {"PackedLinear", "Linear4bit"} and ("Conv1D" in kinds) is (name == "gpt2")
        assert not getattr(plain, "is_quantized", False) and not hasattr(plain.config, "quantization_config")
        torch.testing.assert_close(predictions(run_model(plain, inputs)), expected)
        plain.save_pretrained(tmp_path / "plain")
        again = getattr(transformers, task_class(name)).from_pretrained(tmp_path / "plain")
        assert torch.equal(predictions(run_model(again, inputs)), predictions(run_model(plain, inputs)))
    mixed, inputs, _ = quantized(name, MIXED)
    close = predictions(run_model(mixed, inputs))  # int8 of bitsandbytes rounds inputs, too
    plain = predictions(run_model(mixed.dequantize(), inputs))
    assert float((plain - close).norm() / close.norm()) < 0.05


def test_a_copy_of_a_model():
    model, inputs, _ = quantized("bert", MIXED)
    assert torch.equal(predictions(run_model(copy.deepcopy(model), inputs)), predictions(run_model(model, inputs)))


# ---- what is refused ----


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LAYER = "bert.encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "the weights were packed in format 2; this hfcompress reads 1: update it"),
        ({"modules": {LAYER: "int9"}}, "no quantization scheme 'int9'; there are int2 to int8,"),
        ({"modules": {LAYER: 3}}, "no quantization scheme '3'; there are int2 to int8,"),
        (
            {"modules": {LAYER + "r": "int3"}},
            f"config.json says that {LAYER}r is quantized, but BertForSequenceClassification has no",
        ),
        (
            {"modules": {LAYER: "int3", "bert.encoder": "int3"}},
            "config.json says that bert.encoder is quantized, but BertFor",
        ),
        ({"scale_dtype": "float64"}, "a type of scales and products is float16, bfloat16 or float32, not 'float64'"),
        ({"compute_dtype": "int8"}, "a type of scales and products is float16, bfloat16 or float32, not 'int8'"),
    ],
)
def test_a_config_that_is_wrong(changes, message, tmp_path):
    model, _, _ = quantized("bert", "int3")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        hfcompress.load(edited(tmp_path, **changes))
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


def test_another_scheme_than_was_written(tmp_path):
    model, _, chosen = quantized("bert", "int3")
    model.save_pretrained(tmp_path)
    for wrong in ("int4", "int3-g32"):
        edited(tmp_path, modules=chosen | {LAYER: wrong})
        with pytest.raises(StructureError, match="weights do not have the shapes"):
            hfcompress.load(tmp_path)


def test_nothing_of_another_architecture(tmp_path):
    with pytest.raises(
        ValueError, match=r"^config.json says that distilbert.encoder.layer.0.attention.output.dense is quantized"
    ):
        model, _, _ = quantized("bert", "int3")
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        edited(
            tmp_path, modules={"distil" + key: value for key, value in config["quantization_config"]["modules"].items()}
        )
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_types_of_scales():
    assert PackedConfig(scale_dtype="bfloat16").to_dict()["scale_dtype"] == "bfloat16"
    assert PackedConfig.from_dict(PackedConfig({"a": "int3"}).to_dict()).modules == {"a": "int3"}


# ---- training ----


def trainer_of(model, folder):
    rows = [{**{key: value[0] for key, value in make_inputs("bert").items()}, "labels": torch.tensor(1)}] * 4
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.01
    )
    return transformers.Trainer(model=model, args=settings, train_dataset=rows)


def test_a_packed_model_alone_is_not_trained(tmp_path):
    model, _, _ = quantized("bert", "int3")
    model.save_pretrained(tmp_path)
    for packed in (model, hfcompress.load(tmp_path)):
        with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
            trainer_of(packed, tmp_path / "run")


def test_adapters_on_other_layers_are_trained(tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs, chosen = quantized("bert", ("int3", None, "ternary"))
    whole = [name for name in layers_to_quantize(model) if name not in chosen]
    assert len(whole) == 6
    before = {name: module.codes.clone() for name, module in packed_layers(model).items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=whole, r=2, init_lora_weights=False))
    adapted(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(gradients) == 12 and all(g is not None and g.abs().max() > 0 for g in gradients)
    trainer = trainer_of(adapted, tmp_path)
    trainer.train()
    assert len(before) == 12
    assert all(torch.equal(adapted.base_model.model.get_submodule(name).codes, codes) for name, codes in before.items())


def test_adapters_on_packed_layers_are_refused():
    peft = pytest.importorskip("peft")
    model, _, chosen = quantized("bert", "int3")
    with pytest.raises(ValueError, match=r"PackedLinear.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=list(chosen)))


# ---- in processes of their own ----

_FRESH = """
import json, sys
if sys.argv[1] == "with":
    import hfcompress
import torch, transformers
torch.set_num_threads(1)
found = []
for way, folder, auto in zip(sys.argv[2::3], sys.argv[3::3], sys.argv[4::3]):
    if way == "load":
        model = hfcompress.load(folder)
    else:
        model = getattr(transformers, auto).from_pretrained(folder)
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        logits = model(**expected["inputs"]).logits
    found.append(float((logits - expected["logits"]).abs().max()))
print(json.dumps(found))
"""


def run_fresh(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", _FRESH, *map(str, arguments)],
        env=environment,
        cwd=arguments[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_in_a_process_of_its_own(tmp_path):
    arguments = []
    for name, formats, way in [("bert", MIXED, "plain"), ("gpt2", "int3", "load"), ("vit", ("int3", "int8"), "plain")]:
        model, inputs, _ = quantized(name, formats, pattern="both")
        model.save_pretrained(tmp_path / name)
        expected = {"inputs": dict(inputs), "logits": run_model(model, inputs)["logits"]}
        torch.save(expected, tmp_path / name / "expected.pt")
        arguments += [way, tmp_path / name, task_class(name)]
    done = run_fresh("with", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0.0, 0.0, 0.0]


def test_without_hfcompress_there_is_an_error(tmp_path):
    """Not a model whose weights are drawn at random."""
    quantized("vit", ("int3", None))[0].save_pretrained(tmp_path)
    done = run_fresh("without", "plain", tmp_path, task_class("vit"))
    assert done.returncode != 0 and not done.stdout and "Unknown quantization type, got hfcompress" in done.stderr
    assert "MISMATCH" in done.stderr and "RuntimeError" in done.stderr.splitlines()[-1]
