"""Which modules a preset leaves alone, and what the settings say."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import find_sites
from hfcompress.config import Preset
from hfcompress.pruning import Plan, cut
from hfcompress.quantization import PRESETS, make_config, modules_to_skip
from tests.families import CONFIGS, HEADS, choose_units, make_model

HEADED = [(name, auto) for auto, names in HEADS.items() for name in names]

# Everything outside the layers, written down by hand.
OUTSIDE = {
    ("bert", "AutoModelForSequenceClassification"): ["bert.pooler.dense", "classifier"],
    ("bert", "AutoModelForQuestionAnswering"): ["qa_outputs"],
    ("bert", "AutoModelForTokenClassification"): ["classifier"],
    ("roberta", "AutoModelForSequenceClassification"): ["classifier.dense", "classifier.out_proj"],
    ("distilbert", "AutoModelForSequenceClassification"): ["classifier", "pre_classifier"],
    ("deberta-v2", "AutoModelForSequenceClassification"): ["classifier", "pooler.dense"],
    ("electra", "AutoModelForSequenceClassification"): [
        "classifier.dense",
        "classifier.out_proj",
        "electra.embeddings_project",
    ],
    ("vit", "AutoModelForImageClassification"): ["classifier"],
    ("dinov2", "AutoModelForImageClassification"): ["classifier"],
    ("gpt2", "AutoModelForCausalLM"): ["lm_head"],
    ("gpt2", "AutoModelForSequenceClassification"): ["score"],
    ("opt", "AutoModelForCausalLM"): ["lm_head"],
    ("llama", "AutoModelForCausalLM"): ["lm_head"],
    ("llama", "AutoModelForQuestionAnswering"): ["qa_outputs"],
}


@pytest.mark.parametrize(("name", "auto"), OUTSIDE)
def test_heads_poolers_and_projections_are_left_alone(name, auto):
    assert modules_to_skip(make_model(name, auto)) == OUTSIDE[name, auto]


def test_every_family_with_every_head():
    """Another road: whatever is not in a numbered layer, or joined with another on disk (DINOv2's SwiGLU)."""
    seen = set()
    for name, auto in HEADED:
        model = make_model(name, auto)
        linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        assert modules_to_skip(model) == sorted(
            key
            for key in linear
            if not re.search(r"\.\d+\.(?!downsample)", f".{key}")
            or (name == "dinov2:swiglu" and key.endswith(("gate_proj", "up_proj")))
        ), name
        seen.add(name)
    assert len(seen) == 44 and len(HEADED) == 121


def test_a_model_without_weights_gives_the_same():
    with torch.device("meta"):
        model = make_blank("bert")
    assert modules_to_skip(model) == ["bert.pooler.dense", "classifier"]


def make_blank(name):
    config = transformers.CONFIG_MAPPING[name](**CONFIGS[name])
    return transformers.AutoModelForSequenceClassification.from_config(config)


def test_an_architecture_that_is_not_in_the_table():
    config = transformers.XLNetConfig(vocab_size=20, d_model=16, n_layer=2, n_head=2, d_inner=16)
    model = transformers.XLNetForSequenceClassification(config)
    assert modules_to_skip(model) == ["logits_proj", "sequence_summary.summary"]


def test_layers_that_lost_all_units_are_left_alone():
    model = make_model("llama", "AutoModelForCausalLM")
    cut(model, Plan(choose_units(find_sites(model), "empty")))  # attention 0 and 2, neurons 1 and 2
    # What is skipped has its queries, keys and values taken out, and an output projection without inputs left.
    projections = {"self_attn": "o", "mlp": ["down", "gate", "up"]}
    expected = [
        f"model.layers.{layer}.{part}.{which}_proj"
        for layer, part in ((0, "self_attn"), (1, "mlp"), (2, "self_attn"), (2, "mlp"))
        for which in projections[part]
    ]
    assert modules_to_skip(model) == sorted([*expected, "lm_head"])


def test_further_modules():
    model = make_model("vit", "AutoModelForImageClassification")
    first = next(
        name for name, module in model.named_modules() if re.search(r"\.0\.", name) and not list(module.children())
    )
    assert modules_to_skip(model, also=[first]) == sorted([first, "classifier"])
    with pytest.raises(ValueError, match=r"^quantize.skip names 'clasifier', which is not a module of ViTFor"):
        modules_to_skip(model, also=["clasifier"])


def test_what_each_preset_says():
    assert tuple(PRESETS) == get_args(Preset)
    said = {}
    for preset in PRESETS:
        config = make_config(preset, skip=("a", "b"), dtype=torch.bfloat16)
        assert config.llm_int8_skip_modules == ["a", "b"]
        bits = 8 if config.load_in_8bit else 4
        assert config.load_in_4bit is (bits == 4)
        said[preset] = (bits, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) if bits == 4 else (bits,)
        assert bits == 8 or config.bnb_4bit_compute_dtype == torch.bfloat16
    assert said == {
        "int8": (8,),
        "nf4": (4, "nf4", False),
        "nf4-dq": (4, "nf4", True),
        "fp4": (4, "fp4", False),
        "fp4-dq": (4, "fp4", True),
    }
    with pytest.raises(
        ValueError, match=r"^no preset 'nf5'; there are int8, nf4, nf4-dq, fp4, fp4-dq, int8-dynamic, fp8-dynamic$"
    ):
        make_config("nf5", skip=[])
    assert PRESETS["int8"] == {"load_in_8bit": True, "llm_int8_threshold": 6.0}  # making configs changes nothing
