from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hfcompress.measurement import count_flops
from tests.families import CONFIGS, make_inputs, make_model

B, L, D, F, LAYERS, HEADS, VOCABULARY = 2, 9, 32, 48, 3, 4, 100  # tests.families


def linear(rows: int, fan_in: int, fan_out: int) -> int:
    return 2 * rows * fan_in * fan_out


def attention(queries: int, width: int) -> int:
    return 2 * 2 * B * queries * queries * width  # scores, and the sum over values


def bert_flops(*, d: int = D, f: int = F) -> int:
    layer = linear(B * L, d, 4 * d) + attention(L, d) + 2 * linear(B * L, d, f)
    return LAYERS * layer + linear(B, d, d) + linear(B, d, 2)


def test_bert_by_hand():
    model = make_model("bert", "AutoModelForSequenceClassification")
    assert count_flops(model, make_inputs("bert")) == bert_flops()


def test_vit_by_hand():
    patches = (16 // 8) ** 2
    tokens = patches + 1
    embedding = linear(B * patches, 3 * 8 * 8, D)
    layer = linear(B * tokens, D, 4 * D) + attention(tokens, D) + 2 * linear(B * tokens, D, F)
    model = make_model("vit", "AutoModelForImageClassification")
    assert count_flops(model, make_inputs("vit")) == embedding + LAYERS * layer + linear(B, D, 2)


def test_llama_with_grouped_queries_by_hand():
    query_output, key_value = 2 * linear(B * L, D, D), 2 * linear(B * L, D, D // 2)
    layer = query_output + key_value + attention(L, D) + 3 * linear(B * L, D, F)
    dense = LAYERS * layer + linear(B * L, D, VOCABULARY)
    rotary = 2 * (8 // 2) * L  # an outer product: elementwise to some versions of torch, a matrix product to others
    model = make_model("llama", "AutoModelForCausalLM")
    assert count_flops(model, make_inputs("llama")) in (dense, dense + rotary)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_agrees_with_its_own_eager_forward(name):
    model, inputs = make_model(name), make_inputs(name)
    live = make_model(name, attention="eager").requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        live(**inputs)
    assert count_flops(model, inputs) == counter.get_total_flops() > 2 * D * D


def test_the_attention_of_every_implementation_is_counted():
    counts = {
        count_flops(make_model("bert", "AutoModelForSequenceClassification", attention=kind), make_inputs("bert"))
        for kind in ("eager", "sdpa", "flex_attention")
    }
    assert counts == {bert_flops()}


def test_routed_experts_are_counted_for_the_tokens_they_get():
    shared = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = transformers.MixtralConfig(
        **shared, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY
    )
    model = transformers.MixtralForCausalLM(config)
    one_expert = 3 * linear(B * L, D, F)
    dense = count_flops(make_model("llama", "AutoModelForCausalLM"), make_inputs("llama"))
    router = linear(B * L, D, 4)
    assert count_flops(model, make_inputs("llama")) == dense + LAYERS * (one_expert + router)


def test_a_model_cut_in_place_is_counted_as_it_is():
    model = make_model("bert", "AutoModelForSequenceClassification")
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense = nn.Linear(D, 20)
        layer.output.dense = nn.Linear(20, D)
    assert count_flops(model, make_inputs("bert")) == bert_flops(f=20)


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_model_costs_what_the_dense_one_does(tmp_path, options, dtype):
    dense = make_model("bert", "AutoModelForSequenceClassification", hidden_size=64)
    dense.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **options)
    model = type(dense).from_pretrained(tmp_path, quantization_config=config, dtype=dtype)
    assert count_flops(model, make_inputs("bert")) == bert_flops(d=64)


def test_adapters_are_counted_on_top():
    model = make_model("bert", "AutoModelForSequenceClassification")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query"]))
    lora = linear(B * L, D, 4) + linear(B * L, 4, D)
    assert count_flops(adapted, make_inputs("bert")) == bert_flops() + LAYERS * lora


def test_a_model_on_many_devices_is_counted_on_one():
    model = make_model("bert", "AutoModelForSequenceClassification")
    for layer in model.bert.encoder.layer:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cuda:7"))
    assert count_flops(model, make_inputs("bert")) == bert_flops()
    assert all(hasattr(layer, "_hf_hook") for layer in model.bert.encoder.layer)


def test_a_model_too_large_for_this_machine_is_counted_without_its_weights():
    with torch.device("meta"):
        shape = {"hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64}
        model = transformers.BertModel(transformers.BertConfig(**shape, num_hidden_layers=96))
        inputs = {name: torch.ones(8, 512, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    products = 96 * 8 * 512 * (12 * 8192**2 + 2 * 512 * 8192) + 8 * 8192**2  # with those of the pooler
    assert count_flops(model, inputs) == 2 * products


def test_attention_that_a_model_calls_itself_is_counted():
    class Attend(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            mask = None if mask.all() else mask  # looks at values
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    inputs = {"x": torch.zeros(B, HEADS, L, D // HEADS), "mask": torch.ones(L, L, dtype=torch.bool)}
    assert count_flops(Attend(), inputs) == attention(L, D)


def test_flops_follow_the_inputs():
    model = make_model("gpt2", "AutoModelForCausalLM")
    short, long, wide = (
        count_flops(model, make_inputs("gpt2", batch=batch, length=length))
        for batch, length in ((2, 6), (2, 12), (6, 6))
    )
    assert wide == 3 * short
    assert long - 2 * short == LAYERS * (attention(12, D) - 2 * attention(6, D)) > 0


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "vit"])
def test_model_and_inputs_stay_as_they_were(name):
    model, inputs = make_model(name).train(), make_inputs(name)
    seen: list[torch.Tensor] = []
    heavy = torch.zeros(3)
    model.register_forward_hook(lambda *_: seen.append(heavy))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    settings, given = copy.deepcopy(model.config.to_dict()), {key: value.clone() for key, value in inputs.items()}
    attention_before = model.config._attn_implementation
    count_flops(model, inputs)
    assert not seen
    assert model.training
    assert model.config.to_dict() == settings
    assert model.config._attn_implementation == attention_before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
    assert inputs.keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in inputs.items())


def test_wrong_inputs_are_still_an_error():
    with pytest.raises(TypeError, match="pixels"):
        count_flops(nn.Linear(2, 2), {"pixels": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_flops(nn.Linear(2, 2), {"input": torch.zeros(2, 3)})
