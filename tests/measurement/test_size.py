from __future__ import annotations

import math

import bitsandbytes as bnb
import pytest
import torch
import transformers
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hfcompress.measurement import count_parameters, disk_bytes, memory_bytes
from tests.families import CONFIGS, make_model

IN, OUT = 128, 64
WEIGHTS = IN * OUT
BLOCKS = WEIGHTS // 64  # one scale a block of 64 weights
FOUR_BIT = {
    # packed weight + absmax (float32) + code book of 16 floats
    False: WEIGHTS // 2 + BLOCKS * 4 + 16 * 4,
    # absmax in 8 bit, one float per 256 of them, its code book of 256 floats, and the offset
    True: WEIGHTS // 2 + BLOCKS * 1 + 16 * 4 + math.ceil(BLOCKS / 256) * 4 + 256 * 4 + 4,
}


def linear_4bit(*, double: bool) -> nn.Module:
    linear = bnb.nn.Linear4bit(IN, OUT, compress_statistics=double, quant_type="nf4").to("cpu")
    linear.support_avx512bf16_for_cpu = False
    return linear.eval()


def quantized_bert(folder, **options) -> nn.Module:
    make_model("bert", "AutoModelForSequenceClassification", hidden_size=64).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **options)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)


def test_parameters_of_bert_by_hand():
    d, f, layers, vocabulary, positions = 32, 48, 3, 100, 64
    embeddings = (vocabulary + positions + 2) * d + 2 * d
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    pooler, classifier = d * d + d, d * 2 + 2
    model = make_model("bert", "AutoModelForSequenceClassification")
    assert count_parameters(model) == embeddings + layers * layer + pooler + classifier


def test_tied_weights_count_once_in_parameters_and_bytes():
    tied = make_model("gpt2", "AutoModelForCausalLM")
    untied = make_model("gpt2", "AutoModelForCausalLM", tie_word_embeddings=False)
    table = 100 * 32
    assert count_parameters(untied) - count_parameters(tied) == table
    assert memory_bytes(untied) - memory_bytes(tied) == 4 * table


def test_every_family_agrees_with_transformers_on_dense_models():
    for name in CONFIGS:
        model = make_model(name)
        assert count_parameters(model) == model.num_parameters()
        assert memory_bytes(model) == model.get_memory_footprint()
    assert len(CONFIGS) >= 15


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_linear_by_hand_before_and_after_a_forward(double):
    linear = linear_4bit(double=double)
    for _ in range(2):
        assert count_parameters(linear) == WEIGHTS + OUT
        assert memory_bytes(linear) == FOUR_BIT[double] + OUT * 4
        linear(torch.ones(2, IN))


def test_four_bit_weight_that_lost_its_state_is_counted_through_its_module():
    linear = linear_4bit(double=True)
    linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)
    assert count_parameters(linear) == WEIGHTS + OUT
    assert memory_bytes(linear) == FOUR_BIT[True] + OUT * 4
    linear.quant_state.shape = None
    assert count_parameters(linear) == WEIGHTS + OUT


def test_four_bit_weight_not_quantized_yet_has_its_full_size():
    linear = bnb.nn.Linear4bit(IN, OUT)
    assert count_parameters(linear) == WEIGHTS + OUT
    assert memory_bytes(linear) == 4 * (WEIGHTS + OUT)


def test_four_bit_weight_packed_for_the_cpu_keeps_its_number_of_parameters():
    linear = linear_4bit(double=True)
    pack = bnb.functional._convert_weight_packed_for_cpu
    linear.weight.data, linear.weight.quant_state = pack(linear.weight.data, linear.weight.quant_state)
    assert count_parameters(linear) == WEIGHTS + OUT
    # Packing undoes the double quantization: scales in bfloat16; the offset stays behind.
    assert memory_bytes(linear) == WEIGHTS // 2 + BLOCKS * 2 + 16 * 4 + 4 + OUT * 4


def test_eight_bit_linear_by_hand_before_and_after_a_forward():
    linear = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=0.0).to("cpu").eval()
    for _ in range(2):
        assert count_parameters(linear) == WEIGHTS + OUT
        assert memory_bytes(linear) == WEIGHTS + OUT * 4 + OUT * 4  # int8 weight, a scale per row, bias
        linear(torch.ones(2, IN))


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
)
def test_quantized_bert_agrees_with_its_state_dict(tmp_path, options):
    dense = make_model("bert", "AutoModelForSequenceClassification", hidden_size=64)
    model = quantized_bert(tmp_path, **options)
    quantized = sum(isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for m in model.modules())
    assert quantized == 3 * 6 + 1
    assert count_parameters(model) == dense.num_parameters()

    def in_memory(name: str) -> bool:  # neither the packed scalars nor the marker of the 8-bit layout
        return "bitsandbytes__" not in name and not name.endswith("weight_format")

    state = {name: value for name, value in model.state_dict().items() if in_memory(name)}
    stored = sum(value.numel() * value.element_size() for value in state.values())
    kept = model.state_dict().keys()
    stored += sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n not in kept)
    offsets = 4 * quantized if options.get("bnb_4bit_use_double_quant") else 0
    assert memory_bytes(model) == stored + offsets
    assert memory_bytes(model) > model.get_memory_footprint()


def test_buffers_and_wrapper_subclasses_count_what_they_hold():
    module = nn.Module()
    module.register_buffer("saved", torch.zeros(10, dtype=torch.int64))
    module.register_buffer("unsaved", torch.zeros(3, dtype=torch.bool), persistent=False)
    module.weight = nn.Parameter(TwoTensor(torch.zeros(5), torch.ones(5)))
    module.bias = nn.Parameter(TwoTensor(torch.zeros(7), torch.ones(7)))
    assert memory_bytes(module) == 10 * 8 + 3 + 2 * (5 + 7) * 4


def test_a_model_on_the_meta_device_has_the_size_it_will_take():
    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3), nn.Embedding(0, 4))
    assert memory_bytes(hollow) == 4 * (15 + 5 + 15 + 3)


def test_disk_bytes_sums_the_shards_and_nothing_else(tmp_path):
    for name, size in (("model-1.safetensors", 1000), ("model-2.safetensors", 234), ("config.json", 77)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert disk_bytes(tmp_path) == disk_bytes(str(tmp_path)) == 1234


def test_disk_bytes_of_a_saved_model_is_its_parameters_and_a_header(tmp_path):
    model = make_model("llama", "AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    assert 4 * count_parameters(model) < disk_bytes(tmp_path) < 4 * count_parameters(model) + 8192


def test_disk_bytes_says_what_is_missing(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors file"):
        disk_bytes(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        disk_bytes(tmp_path / "absent")
