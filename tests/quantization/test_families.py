"""Every family, quantized: close to the same weights rounded by hand, saved, and loaded again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.checkpoints.record import read_steps
from hfcompress.pruning import Plan, cut
from hfcompress.quantization import modules_to_skip, quantize
from tests.families import CONFIGS, choose_units, make_inputs, make_model, predictions, run_model, task_class
from tests.quantization.test_quantize import by_hand, quantized_modules, relative

bnb = pytest.importorskip("bitsandbytes")

# transformers replaces nn.Linear and Conv1D only, and these have a class of their own.
OWN_LAYERS = ("falcon", "falcon:mqa")
NAMES = [name for name in CONFIGS if name not in OWN_LAYERS]
PRESETS = ("int8", "nf4-dq")
CLOSE = {"int8": 0.1, "nf4-dq": 0.02}  # int8 rounds inputs, too; of nf4-dq the scales are rounded
FRESH = ("t5", "siglip", "gpt2", "wav2vec2")  # in a process of their own as well
PRUNED = ("t5", "bart", "whisper", "swin", "clip", "modernbert", "gpt_neox")
# Inside the layers, and left alone all the same: joined on disk, or kept in float32 by transformers.
LEFT_INSIDE = {"dinov2:swiglu": r"mlp\.(gate|up)_proj$"} | dict.fromkeys(("t5", "t5:gated"), r"DenseReluDense\.wo$")


def in_layers(name):
    """Another road to what is inside: whatever is in a numbered layer."""
    return re.search(r"\.\d+\.(?!downsample)", f".{name}") is not None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of each family that a fresh process is to load, with inputs and logits."""
    return tmp_path_factory.mktemp("fresh"), []


@pytest.mark.parametrize("name", NAMES)
def test_a_family(name, tmp_path, written):
    model = make_model(name, task_class(name))
    if name in PRUNED:
        cut(model, Plan(choose_units(find_sites(model), "both")))
    inputs = make_inputs(name, task_class(name))
    model.save_pretrained(tmp_path / "full")
    # Both presets where there is something special, and one in turn for the others.
    for preset in PRESETS if name in (*FRESH, *LEFT_INSIDE) else PRESETS[NAMES.index(name) % 2 :][:1]:
        small = quantize(tmp_path / "full", preset)
        found = quantized_modules(small)
        linear = [n for n, m in small.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        left = [n for n in linear if n not in found]
        stay = [n for n in linear if not in_layers(n) or re.search(LEFT_INSIDE.get(name, "^$"), n)]
        assert left == stay and found
        assert read_steps(small.config)[-1]["skipped"] == sorted(stay)
        assert {type(small.get_submodule(n)) for n in stay} <= {
            nn.Linear,
            Conv1D,
            nn.modules.linear.NonDynamicallyQuantizableLinear,
        }
        for n in stay:
            assert torch.equal(small.get_submodule(n).weight, model.get_submodule(n).weight), n
        got = predictions(run_model(small, inputs))
        assert relative(got, predictions(run_model(by_hand(tmp_path / "full", found, preset), inputs))) < CLOSE[preset]
        assert relative(got, predictions(run_model(model, inputs))) > 1e-4
        folder = written[0] / f"{name.replace(':', '-')}-{preset}"
        small.save_pretrained(folder)
        again = hfcompress.load(folder)
        assert quantized_modules(again).keys() == found.keys()
        assert torch.equal(predictions(run_model(again, inputs)), got)
        if name in FRESH:
            torch.save({"inputs": dict(inputs), "got": got}, folder / "expected.pt")
            written[1].append(folder)


def test_how_much_is_looked_at():
    assert len(NAMES) == len(CONFIGS) - 2 and len(CONFIGS) >= 48
    assert {"t5", "bart", "whisper", "deberta-v2", "albert", "distilbert", "modernbert", "mpnet"} <= set(NAMES)
    assert {"clip", "siglip", "wav2vec2", "swin", "gpt2", "gpt_neox"} <= set(NAMES)


_LOAD = """
import json, sys
import hfcompress, torch
from hfcompress.hub.verify import probe_outputs
found = {}
for folder in sys.argv[1:]:
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        outputs = hfcompress.load(folder)(**expected["inputs"])
    found[folder] = float((probe_outputs(outputs) - expected["got"]).abs().max())
print(json.dumps(found))
"""


def test_a_fresh_process_gives_the_same_logits(written, tmp_path):
    folders = [str(folder) for folder in written[1]]
    if len(folders) < len(FRESH) * len(PRESETS):
        pytest.skip("needs all of test_a_family in this process")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *folders],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == set(folders) and set(found.values()) == {0.0}


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_layers_of_a_class_of_their_own_are_refused(name, tmp_path):
    make_model(name, task_class(name)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was quantized: .* transformers does not quantize FalconLinear$"):
        quantize(tmp_path, "nf4")


def test_heads_that_are_attention_of_torch_itself_are_never_quantized():
    """SigLIP pools with nn.MultiheadAttention, which reads its projections' weights itself."""
    assert [n for n in modules_to_skip(make_model("siglip_vision_model")) if "head" in n] == [
        "head.attention.out_proj",
        "head.mlp.fc1",
        "head.mlp.fc2",
    ]


def test_what_transformers_keeps_in_float32_is_in_the_record(tmp_path):
    """T5's `wo` is kept by some releases; whatever is left in float has to be listed."""
    make_model("t5", task_class("t5")).save_pretrained(tmp_path)
    small = quantize(tmp_path, "nf4", dtype="bfloat16")
    step = read_steps(small.config)[-1]
    linear = {n for n, m in small.named_modules() if isinstance(m, nn.Linear) and n not in quantized_modules(small)}
    assert set(step["skipped"]) == linear and step["layers"] == len(quantized_modules(small))


# ---- how 4-bit weights are held and multiplied, and int8's threshold ----


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_storage_that_fsdp_shards(name, storage, tmp_path):
    model, inputs = make_model(name, task_class(name)), make_inputs(name)
    cut(model, Plan(choose_units(find_sites(model), "neurons")))
    model.save_pretrained(tmp_path / "full")
    bytes_of = quantized_modules(quantize(tmp_path / "full", "nf4-dq", dtype=storage))
    small = quantize(tmp_path / "full", "nf4-dq", dtype=storage, storage=storage)
    found = quantized_modules(small)
    kind = getattr(torch, storage)
    assert {p.dtype for p in small.parameters()} == {kind}  # one type, so one flat shard
    assert found.keys() == bytes_of.keys()
    for layer, module in found.items():  # and the codes are the same
        assert torch.equal(module.weight.data.view(torch.uint8).flatten(), bytes_of[layer].weight.data.flatten()), layer
    got = predictions(run_model(small, inputs))
    small.save_pretrained(tmp_path / "small")
    again = hfcompress.load(tmp_path / "small")
    assert {p.dtype for p in again.parameters()} == {kind}
    assert torch.equal(predictions(run_model(again, inputs)), got)
    assert read_steps(again.config)[-1]["storage"] == storage


def test_what_4_bit_weights_are_multiplied_in(tmp_path):
    model, inputs = make_model("bert", task_class("bert")), make_inputs("bert")
    model.save_pretrained(tmp_path / "full")
    exact = predictions(run_model(quantize(tmp_path / "full", "nf4"), inputs))
    small = quantize(tmp_path / "full", "nf4", compute_dtype="bfloat16")
    got = predictions(run_model(small, inputs))
    assert {m.compute_dtype for m in quantized_modules(small).values()} == {torch.bfloat16}
    assert small.classifier.weight.dtype == got.dtype == torch.float32
    assert 1e-5 < relative(got, exact) < 0.05
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(predictions(run_model(hfcompress.load(tmp_path / "small"), inputs)), got)
    assert read_steps(small.config)[-1]["compute_dtype"] == "bfloat16"


def test_the_threshold_of_int8(tmp_path):
    model, inputs = make_model("bert", task_class("bert")), make_inputs("bert")
    model.save_pretrained(tmp_path / "full")
    full, errors = predictions(run_model(model, inputs)), {}
    for threshold in (None, 0.0, 1e-3):
        small = quantize(tmp_path / "full", "int8", threshold=threshold)
        assert {m.state.threshold for m in quantized_modules(small).values()} == {
            6.0 if threshold is None else threshold
        }
        got = predictions(run_model(small, inputs))
        errors[threshold] = relative(got, full)
        small.save_pretrained(tmp_path / str(threshold))
        assert torch.equal(predictions(run_model(hfcompress.load(tmp_path / str(threshold)), inputs)), got)
    # Where nearly all inputs are outliers they are multiplied in float, and only the weights are rounded.
    assert errors[1e-3] < errors[0.0]


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("int8", {"storage": "bfloat16"}, "storage is of the 4-bit presets, and int8 is stored as int8; leave it out"),
        ("nf4", {"threshold": 3.0}, "threshold is of int8, and nf4 has none; leave it out"),
        ("nf4", {"storage": "uint8"}, "storage 'uint8' is not known; allowed: auto, float32, bfloat16, float16"),
        (
            "nf4",
            {"compute_dtype": "int8"},
            "compute_dtype 'int8' is not known; allowed: auto, float32, bfloat16, float16",
        ),
        (
            "nf4",
            {"device_map": {"bert": 0, "classifier": "cpu"}},
            "device_map puts some layers on cpu and others elsewhere, where they would not be quantized; use GPUs only, or the CPU for all of it",
        ),
        (
            "int8",
            {"device_map": {"bert": 0, "classifier": "disk"}},
            "device_map puts some layers on disk and others elsewhere, where they would not be quantized; use GPUs only, or the CPU for all of it",
        ),
    ],
)
def test_what_is_refused(preset, options, message, tmp_path):
    make_model("bert", task_class("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        quantize(tmp_path, preset, **options)
    assert str(caught.value) == message


def test_offloading_to_the_cpu_quantizes_nothing_without_the_check(tmp_path):
    """The trap that the line above keeps users from; should this fail, transformers has closed it."""
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    make_model("bert", task_class("bert")).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=settings, device_map={"": "cpu"}
    )
    assert not quantized_modules(model)


# ---- which GPU gets what ----


@pytest.mark.parametrize(("name", "preset"), [("llama", "int8"), ("llama", "nf4"), ("bert", "nf4-dq"), ("t5", "int8")])
def test_layers_are_spread_over_two_gpus(name, preset):
    """As `device_map="auto"` plans it, on the meta device: two GPUs, each too small for the whole model."""
    from accelerate import infer_auto_device_map
    from transformers.quantizers.auto import AutoHfQuantizer

    from hfcompress.quantization import make_config
    from tests.families import auto_class
    from tests.families import make_config as model_config

    with torch.device("meta"):
        model = auto_class(name, task_class(name)).from_config(model_config(name))
    settings = make_config(preset, skip=modules_to_skip(model))
    AutoHfQuantizer.from_config(settings, pre_quantized=False).preprocess_model(model=model, device_map=None)
    found = quantized_modules(model)
    assert found and all(module.weight.is_meta for module in found.values())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    planned = infer_auto_device_map(
        model, max_memory={0: int(0.7 * size), 1: size}, no_split_module_classes=sorted(model._no_split_modules)
    )
    assert set(planned.values()) == {0, 1}
    place = {
        layer: {where for prefix, where in planned.items() if layer == prefix or layer.startswith(f"{prefix}.")}
        for layer, _ in model.named_parameters()
    }
    assert all(len(where) == 1 for where in place.values())
    blocks = {re.match(r".*?\.\d+\.", layer).group() for layer in place if in_layers(layer)}
    for block in blocks:  # none is split
        assert len({next(iter(where)) for layer, where in place.items() if layer.startswith(block)}) == 1, block
    assert len(blocks) >= 3
