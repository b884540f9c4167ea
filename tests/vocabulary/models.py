"""Tiny models with the tokenizers that go with them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.families import make_model
from tests.vocabulary.tokenizers import trained

_SEQ2SEQ = {
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    },
}
_NAMES = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")

# Name: (architecture, Auto class, tokenizer, changes of the config)
MODELS: dict[str, tuple[str, str, str, dict]] = {
    "bert": ("bert", "AutoModelForMaskedLM", "wordpiece", {}),
    "bert untied": ("bert", "AutoModelForMaskedLM", "wordpiece", {"tie_word_embeddings": False}),
    "bert classifier": ("bert", "AutoModelForSequenceClassification", "wordpiece", {}),
    "distilbert": ("distilbert", "AutoModelForMaskedLM", "wordpiece", {}),
    "electra": ("electra", "AutoModelForMaskedLM", "wordpiece", {}),
    "deberta-v2": ("deberta-v2", "AutoModelForMaskedLM", "wordpiece", {}),
    "roberta": ("roberta", "AutoModelForMaskedLM", "roberta", {}),
    "xlm-roberta classifier": ("xlm-roberta", "AutoModelForSequenceClassification", "xlm-roberta", {}),
    "gpt2": ("gpt2", "AutoModelForCausalLM", "bytelevel", {}),
    "gpt2 classifier": ("gpt2", "AutoModelForSequenceClassification", "bytelevel", {}),
    "opt": ("opt", "AutoModelForCausalLM", "bytelevel", {}),
    "llama": ("llama", "AutoModelForCausalLM", "llama", {"tie_word_embeddings": False}),
    "qwen3 tied": ("qwen3", "AutoModelForCausalLM", "llama", {"tie_word_embeddings": True}),
    "t5": ("t5", "AutoModelForSeq2SeqLM", "t5", {}),
    "mt5 untied": ("mt5", "AutoModelForSeq2SeqLM", "unigram", {"tie_word_embeddings": False}),
    "bart": ("bart", "AutoModelForSeq2SeqLM", "roberta", {}),
}
DECODERS = [name for name, entry in MODELS.items() if entry[1] == "AutoModelForCausalLM"]
SEQ2SEQ = [name for name, entry in MODELS.items() if entry[1] == "AutoModelForSeq2SeqLM"]
PADDING_ROWS = 5  # more rows than tokens, as many models have


def make(name: str) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A model with random weights, whose config names the special tokens of its tokenizer."""
    architecture, auto, kind, changes = MODELS[name]
    tokenizer = trained(kind)
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id", None) for n in _NAMES}
    changes = {
        **{key: i for key, i in ids.items() if i is not None},
        "vocab_size": len(tokenizer) + PADDING_ROWS,
        **changes,
    }
    if architecture not in _SEQ2SEQ:
        return make_model(architecture, auto, **changes), tokenizer
    torch.manual_seed(0)
    changes["decoder_start_token_id"] = changes["eos_token_id"] if architecture == "bart" else changes["pad_token_id"]
    config = transformers.CONFIG_MAPPING[architecture](**_SEQ2SEQ[architecture], **changes)
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        if architecture == "bart":
            model.final_logits_bias.normal_(std=0.2)
    return model.eval(), tokenizer
