"""The residual stream: what is part of it, by hand, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfcompress.anatomy import StructureError, check_record, find_stream, keep_hidden
from hfcompress.pruning import Plan, cut
from tests.families import largest_difference, make_inputs, make_model, run_model
from tests.references import at, gate_hidden

# Each by hand: parameter, dimension, what it does. {L} stands for each layer.
_NORM = (("weight", 0, "scales"), ("bias", 0, "scales"))
BY_HAND = {
    "bert": {
        "embeddings": {
            "word_embeddings.weight": "1w",
            "position_embeddings.weight": "1w",
            "token_type_embeddings.weight": "1w",
        },
        "norms": [
            "embeddings.LayerNorm",
            "encoder.layer.{L}.attention.output.LayerNorm",
            "encoder.layer.{L}.output.LayerNorm",
        ],
        "reads": [
            "encoder.layer.{L}.attention.self.query",
            "encoder.layer.{L}.attention.self.key",
            "encoder.layer.{L}.attention.self.value",
            "encoder.layer.{L}.intermediate.dense",
            "pooler.dense",
        ],
        "writes": ["encoder.layer.{L}.attention.output.dense", "encoder.layer.{L}.output.dense", "pooler.dense"],
    },
    "vit": {
        "embeddings": {"cls_token": "2w", "position_embeddings": "2w"},
        "norms": ["layernorm", "layers.{L}.layernorm_before", "layers.{L}.layernorm_after"],
        "reads": [
            "layers.{L}.attention.q_proj",
            "layers.{L}.attention.k_proj",
            "layers.{L}.attention.v_proj",
            "layers.{L}.mlp.fc1",
            "pooler.dense",
        ],
        "writes": [
            "embeddings.patch_embeddings.projection",
            "layers.{L}.attention.o_proj",
            "layers.{L}.mlp.fc2",
            "pooler.dense",
        ],
    },
}


def by_hand(name):
    table, found = BY_HAND[name], set()
    every = lambda paths: [path.replace("{L}", str(n)) for path in paths for n in range(3)]  # noqa: E731
    found |= {(f"embeddings.{path}", int(code[0]), "writes") for path, code in table["embeddings"].items()}
    found |= {(f"{path}.{short}", dim, role) for path in every(table["norms"]) for short, dim, role in _NORM}
    found |= {(f"{path}.weight", 1, "reads") for path in every(table["reads"])}
    for path in every(table["writes"]):
        found |= {(f"{path}.weight", 0, "writes"), (f"{path}.bias", 0, "writes")}
    return found


@pytest.mark.parametrize("name", BY_HAND)
def test_the_dimensions_found_are_those_found_by_hand(name):
    stream = find_stream(make_model(name))
    assert {(entry.name, entry.dim, entry.role) for entry in stream.dims} == by_hand(name)
    assert len(stream.dims) == len(by_hand(name)) > 40
    assert (stream.width, stream.before) == (32, 32) and all(entry.copies == 1 for entry in stream.dims)


def test_decoders_by_hand():
    found = {
        (entry.name, entry.dim, entry.role) for entry in find_stream(make_model("gpt2", "AutoModelForCausalLM")).dims
    }
    expected = {
        ("transformer.wte.weight", 1, "writes"),
        ("transformer.wpe.weight", 1, "writes"),
        ("lm_head.weight", 1, "reads"),
    }
    norms = ["transformer.ln_f", *(f"transformer.h.{n}.ln_{m}" for n in range(3) for m in (1, 2))]
    expected |= {(f"{path}.{short}", dim, role) for path in norms for short, dim, role in _NORM}
    for n in range(3):  # transformers' Conv1D keeps input features first
        where = f"transformer.h.{n}"
        expected |= {(f"{where}.attn.c_attn.weight", 0, "reads"), (f"{where}.mlp.c_fc.weight", 0, "reads")}
        for path in (f"{where}.attn.c_proj", f"{where}.mlp.c_proj"):
            expected |= {(f"{path}.weight", 1, "writes"), (f"{path}.bias", 0, "writes")}
    assert found == expected

    found = {
        (entry.name, entry.dim, entry.role) for entry in find_stream(make_model("qwen3", "AutoModelForCausalLM")).dims
    }
    expected = {
        ("model.embed_tokens.weight", 1, "writes"),
        ("lm_head.weight", 1, "reads"),
        ("model.norm.weight", 0, "scales"),
    }
    for n in range(3):  # and not the norms of queries and keys
        where = f"model.layers.{n}"
        expected |= {
            (f"{where}.{norm}.weight", 0, "scales") for norm in ("input_layernorm", "post_attention_layernorm")
        }
        expected |= {(f"{where}.self_attn.{p}_proj.weight", 1, "reads") for p in "qkv"}
        expected |= {(f"{where}.mlp.{p}_proj.weight", 1, "reads") for p in ("gate", "up")}
        expected |= {(f"{where}.self_attn.o_proj.weight", 0, "writes"), (f"{where}.mlp.down_proj.weight", 0, "writes")}
    assert found == expected


def test_two_tokens_side_by_side_are_two_copies():
    model = make_model("dinov2", "AutoModelForImageClassification")
    entry = next(entry for entry in find_stream(model).dims if entry.name == "classifier.weight")
    assert (entry.copies, entry.role) == (2, "reads")
    old = model.classifier.weight
    keep_hidden(model, torch.tensor([0, 5, 31]))
    assert torch.equal(model.classifier.weight, old[:, [0, 5, 31, 32, 37, 63]])


VARIANTS = [
    ("electra", {"embedding_size": 32}, "AutoModelForMaskedLM"),
    ("electra", {"embedding_size": 16}, "AutoModelForMaskedLM"),
    ("albert", {"embedding_size": 32}, "AutoModelForMaskedLM"),
    ("opt", {"word_embed_proj_dim": 16}, "AutoModelForCausalLM"),
    ("deberta-v2", {"conv_kernel_size": 3}, "AutoModelForSequenceClassification"),
    ("deberta-v2", {}, "AutoModelForMaskedLM"),
    ("bert", {}, "AutoModelForNextSentencePrediction"),
    ("bert", {}, "AutoModelForPreTraining"),
    ("roberta", {}, "AutoModelForMaskedLM"),
    ("distilbert", {}, "AutoModelForMaskedLM"),
    ("gpt2", {"n_inner": None}, "AutoModelForCausalLM"),
    ("mistral", {"tie_word_embeddings": True}, "AutoModelForCausalLM"),
    ("bart", {"scale_embedding": True}, "AutoModelForSeq2SeqLM"),
    ("vit", {"pooler_output_size": 24}, "AutoModel"),
    ("siglip_vision_model", {"vision_use_head": False}, "AutoModel"),
]


@pytest.mark.parametrize(("name", "changes", "auto"), VARIANTS)
def test_variants_are_closed_alike(name, changes, auto):
    model, inputs = make_model(name, auto, **changes), make_inputs(name, auto)
    index = (0, 1, 4, 5, 9, 10, 11, 17, 18, 20, 21, 23)
    if name == "albert":  # its embeddings are as wide as the stream but no part of it: they go through a projection
        assert not any("word_embeddings" in entry.name for entry in find_stream(model).dims)
        keep_hidden(model, torch.tensor(index))
        assert model.albert.embeddings.word_embeddings.embedding_dim == 32
        assert run_model(model, inputs)["logits"].shape == (2, 9, 100)
        return
    gated = copy.deepcopy(model)
    gate_hidden(gated, index)
    cut(model, Plan({}, hidden=index))
    outputs = run_model(model, inputs)
    assert largest_difference(at(run_model(gated, inputs), index, outputs), outputs) <= 2e-5


def test_numbers_of_modules_follow():
    model = make_model("gpt2", "AutoModelForCausalLM")
    cut(model, Plan({}, hidden=tuple(range(20))))
    checked = 0
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == tuple(module.weight.shape)
        elif isinstance(module, nn.Embedding):
            assert (module.num_embeddings, module.embedding_dim) == tuple(module.weight.shape)
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif hasattr(module, "nx"):
            assert (module.nx, module.nf) == tuple(module.weight.shape)
        else:
            continue
        checked += 1
    assert checked == 7 + 2 + 1 + 12
    assert model.config.n_embd == 32, "what the stock class builds"


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    model = make_model("mistral", "AutoModelForCausalLM", tie_word_embeddings=True).bfloat16()
    model.model.norm.weight.requires_grad_(False)
    changes = keep_hidden(model, torch.arange(8))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape == (100, 8)
    assert sum(change.new is model.lm_head.weight for change in changes) == 1
    assert not model.model.norm.weight.requires_grad and model.model.embed_tokens.weight.requires_grad
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_constants_that_follow_the_width_stay():
    gemma = make_model("gemma")
    keep_hidden(gemma, torch.arange(8))
    assert float(gemma.embed_tokens.embed_scale) == pytest.approx(32**0.5)
    t5 = make_model("t5", "AutoModelForSeq2SeqLM")
    keep_hidden(t5, torch.arange(8))
    assert t5.model_dim == 32


@pytest.mark.parametrize("index", [(), (0, 32), (-1, 3), (3, 1), (2, 2)])
def test_a_bad_index_is_refused_before_anything_is_touched(index):
    model = make_model("bert")
    before = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(StructureError, match="hidden features to keep must be ascending, between 0 and 31"):
        cut(model, Plan({"encoder.0.heads": (0,)}, hidden=index))
    assert [id(parameter) for parameter in model.parameters()] == before and not hasattr(model.config, "hfcompress")


def test_what_is_not_as_its_config_says_is_refused():
    adapted = make_model("bert")
    adapted.encoder.layer[0].adapter = nn.Linear(32, 4)
    with pytest.raises(StructureError, match=r"encoder\.layer\.0\.adapter\.weight is not a parameter"):
        find_stream(adapted)
    uneven = make_model("bert")
    uneven.embeddings.word_embeddings = nn.Embedding(100, 30)
    with pytest.raises(StructureError, match="hidden widths 30, 32"):
        find_stream(uneven)
    quantized = make_model("bert")
    quantized.pooler.dense.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(StructureError, match=r"pooler\.dense\.weight: torch\.int8 cannot be cut"):
        keep_hidden(quantized, torch.arange(8))


@pytest.mark.parametrize(
    ("name", "reason"), [("wav2vec2", "groups"), ("clip", "no single hidden width"), ("swin", "follow")]
)
def test_streams_that_cannot_be_cut(name, reason):
    with pytest.raises(StructureError, match=reason) as error:
        find_stream(make_model(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [3, [3], [0, 4], [5, 4], [1.0, 4], "ab"])
def test_a_bad_record_of_the_width_is_refused(value):
    with pytest.raises(StructureError, match=r"config\.hfcompress\.hidden"):
        check_record({"version": 1, "hidden": value})


def test_a_record_that_does_not_fit_is_refused():
    config = make_model("bert").config
    config.hfcompress = {"version": 1, "hidden": [8, 24]}
    with pytest.raises(StructureError, match="says 24 features before, the config builds 32"):
        type(make_model("bert"))(config)
