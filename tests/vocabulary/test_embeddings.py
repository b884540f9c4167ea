from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from hfcompress.vocabulary import VocabularyError, cut_vocabulary, named_ids
from tests.families import CONFIGS, largest_difference, make_inputs, make_model, run_model
from tests.vocabulary.models import MODELS, make

TEXT_FAMILIES = [name for name in CONFIGS if any(key.endswith("input_ids") for key in make_inputs(name))]
EVEN = [0, 1, 2, *range(3, 99, 2), 99]


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_every_family_that_reads_tokens(name):
    model = make_model(name, bos_token_id=0, eos_token_id=2)
    inputs = make_inputs(name)
    if type(model.config).sub_configs:
        with pytest.raises(VocabularyError, match="does not read tokens of one vocabulary"):
            cut_vocabulary(model, EVEN)
        return
    ids = {key: value for key, value in inputs.items() if key.endswith("input_ids")}
    ids = {key: torch.where(value > 2, value | 1, value) for key, value in ids.items()}
    before = run_model(model, {**inputs, **ids})
    cut_vocabulary(model, EVEN)
    new_ids = torch.full((100,), -1)
    new_ids[EVEN] = torch.arange(len(EVEN))
    after = run_model(model, {**inputs, **{key: new_ids[value] for key, value in ids.items()}})
    assert largest_difference(before, after) == 0
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(EVEN)
    assert len(TEXT_FAMILIES) >= 16


@pytest.mark.parametrize("name", MODELS)
def test_what_is_tied_stays_tied_and_nothing_else_changes(name):
    model, _ = make(name)
    rows, kept = model.config.vocab_size, [*range(300), model.config.vocab_size - 6]
    old = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    groups = shared(model)
    changes = cut_vocabulary(model, [i for i in range(rows) if i in {*kept, *named_ids(model)}])
    assert shared(model) == groups
    assert max(len(group) for group in groups) >= (1 if "untied" in name or name == "llama" else 2) or "cl" in name
    index = changes[0].index
    replaced = 0
    for n, p in model.named_parameters(remove_duplicate=False):
        if p.shape == old[n].shape:
            assert torch.equal(p, old[n])
        else:
            assert torch.equal(p, old[n][index]) and p.requires_grad
            replaced += 1
    assert replaced >= len(changes) >= 1
    new = {id(p) for p in model.parameters()}
    assert all(id(c.new) in new and id(c.old) not in new and c.dim == 0 for c in changes)
    output = model.get_output_embeddings()
    if output is not None:
        assert output.out_features == len(index) == output.weight.shape[0]
    embedding = model.get_input_embeddings()
    assert embedding.num_embeddings == len(index) == model.config.vocab_size


def shared(model):
    """Names of parameters, those of one tensor together."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return sorted(map(sorted, groups.values()))


def test_the_bias_of_bart_and_of_berts_decoder():
    model, _ = make("bart")
    before = model.final_logits_bias.clone()
    kept = [*range(5), *range(100, 200)]
    cut_vocabulary(model, kept)
    assert torch.equal(model.final_logits_bias, before[:, kept])
    assert "final_logits_bias" in model.state_dict()
    model, _ = make("bert")
    bias = model.cls.predictions.bias.detach().clone()
    kept = [0, *range(100, 200), *range(396, 400)]
    cut_vocabulary(model, kept)
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert torch.equal(model.cls.predictions.bias, bias[kept])


def test_every_id_in_the_configs():
    model, _ = make("bart")
    config, generation = model.config, model.generation_config
    config.vision_feature_layer = 7  # no id of a token
    generation.eos_token_id = [2, 40, 60]
    generation.forced_bos_token_id, generation.forced_eos_token_id = 30, [2]
    generation.suppress_tokens, generation.begin_suppress_tokens = [7, 40], [7]
    generation.bad_words_ids = [[30, 40], [30, 7], [8]]
    generation.force_words_ids = [[30], [[40, 60], [2]]]
    generation.forced_decoder_ids = [[1, 30], [2, None]]
    generation.sequence_bias = [[[40, 30], 1.5], [[7], -1.0]]
    generation.lang_to_id = {"en": 60, "xx": 9}
    generation.max_new_tokens = 30
    config.prefix_token_ids = [30]
    cut_vocabulary(model, [0, 1, 2, 3, 4, 30, 40, 50, 60])
    assert generation.eos_token_id == [2, 6, 8]
    assert (generation.forced_bos_token_id, generation.forced_eos_token_id) == (5, [2])
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([6], None)
    assert generation.bad_words_ids == [[5, 6]]
    assert generation.force_words_ids == [[5], [[6, 8], [2]]]
    assert generation.forced_decoder_ids == [[1, 5], [2, None]]
    assert generation.sequence_bias == [[[6, 5], 1.5]]
    assert generation.lang_to_id == {"en": 8}
    assert generation.max_new_tokens == 30 and config.vision_feature_layer == 7
    assert config.prefix_token_ids == [5] and config.vocab_size == 9


def test_special_tokens_that_move():
    model, tokenizer = make("bert")
    mask = tokenizer.mask_token_id
    embedding = model.get_input_embeddings()
    assert (mask, tokenizer.pad_token_id, embedding.padding_idx) == (399, 0, 0)
    cut_vocabulary(model, [0, 1, 2, 3, *range(396, 400)])
    assert model.config.mask_token_id == 7 and model.config.pad_token_id == 0
    model, tokenizer = make("gpt2")  # one token is all: behind all others
    assert named_ids(model) == [595]
    cut_vocabulary(model, [5, 6, 7, 595])
    assert {model.config.pad_token_id, model.config.eos_token_id, model.generation_config.eos_token_id} == {3}
    model, tokenizer = make("opt")
    assert model.get_input_embeddings().padding_idx == 595
    cut_vocabulary(model, [5, 6, 7, 595])
    assert model.get_input_embeddings().padding_idx == 3
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[3, 0, 1]])).logits).all()


def test_the_parts_of_t5_know_it_too():
    model, _ = make("t5")
    kept = [0, 1, 2, *range(10, 50), *range(303, 310)]
    cut_vocabulary(model, kept)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    assert len(configs) == 3 and {config.vocab_size for config in configs.values()} == {50}


def test_ids_that_were_never_meant_stay():
    model = make_model("gpt2", "AutoModelForCausalLM")
    assert model.config.bos_token_id == 50256 and named_ids(model) == [0]
    cut_vocabulary(model, range(50))
    assert (model.config.bos_token_id, model.config.vocab_size) == (50256, 50)


def test_frozen_weights_and_dtypes_stay():
    model = make_model("bert", "AutoModelForMaskedLM").to(torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    cut_vocabulary(model, range(40))
    weight = model.get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad
    assert isinstance(weight, nn.Parameter) and model.cls.predictions.decoder.weight is weight


def test_nothing_to_do():
    model = make_model("bert")
    assert cut_vocabulary(model, range(100)) == []
    assert getattr(model.config, "hfcompress", None) is None


def untouched(model, copied):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True)) and (
        model.config.to_dict() == copied.config.to_dict()
    )


def test_what_does_not_fit_changes_nothing():
    model = make_model("roberta", "AutoModelForMaskedLM", bos_token_id=0, eos_token_id=2)
    copied = copy.deepcopy(model)
    for kept, message in (
        ([0, 1, 2, 100], "id 100 is to stay, but the embeddings have 100 rows"),
        ([-1, 0, 1, 2], "id -1 is to stay"),
        ([1, 0], "must be ascending"),
        ([1, 1], "must be ascending"),
        ([], "at least one"),
        ([0, 1, 5], r"RobertaConfig.eos_token_id is 2, which is not among the ids to keep; add it \(named_ids"),
        ([1, 2, 5], "RobertaConfig.bos_token_id is 0"),
    ):
        with pytest.raises(VocabularyError, match=message):
            cut_vocabulary(model, kept)
        assert untouched(model, copied)


def test_positions_that_start_at_the_padding_token():
    model = make_model("roberta", pad_token_id=2, bos_token_id=2, eos_token_id=3)
    copied = copy.deepcopy(model)
    with pytest.raises(
        VocabularyError, match="counts positions from the id of the padding token, which would become 1"
    ):
        cut_vocabulary(model, [0, 2, 3, 4])
    assert untouched(model, copied)
    cut_vocabulary(model, [0, 1, 2, 3, 9])  # its id stays


def test_models_that_cannot_be_cut():
    with pytest.raises(VocabularyError, match="Linear is no transformers model"):
        cut_vocabulary(nn.Linear(2, 2), [0])
    model = make_model("bert")
    model.config.quantization_config = {"load_in_8bit": True}
    with pytest.raises(VocabularyError, match="BertModel is quantized; cut the vocabulary first"):
        cut_vocabulary(model, [0])
    with pytest.raises(VocabularyError, match="ViTModel does not read tokens of one vocabulary"):
        named_ids(make_model("vit"))
    model = make_model("bert")
    model.config.vocab_size = 99
    with pytest.raises(VocabularyError, match="has 100 embeddings, its config says 99"):
        cut_vocabulary(model, [0])
    model = make_model("bert", "AutoModelForMaskedLM")
    model.cls.predictions.decoder = nn.Linear(32, 7)  # a head of one's own, no longer over the vocabulary
    with pytest.raises(VocabularyError, match=r"decoder\.weight has another shape than the config says"):
        cut_vocabulary(model, range(50))


def test_a_use_of_the_vocabulary_that_is_not_known():
    class Odd(transformers.BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.pairs = nn.Parameter(torch.zeros(config.vocab_size, config.vocab_size))

    config = make_model("bert").config
    with pytest.raises(VocabularyError, match=r"pairs would go from \(100, 100\) to \(50, 50\)"):
        cut_vocabulary(Odd(config), range(50))
