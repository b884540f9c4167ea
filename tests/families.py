"""One tiny config per architecture: every invariant runs on each of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

_BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
}
_TEXT = {**_BASE, "max_position_embeddings": 64}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
_IMAGE = {**_BASE, "image_size": 16, "patch_size": 8}
_IMAGE.pop("vocab_size")

CONFIGS: dict[str, dict] = {
    "bert": _TEXT,
    "roberta": {**_TEXT, "pad_token_id": 1},
    "electra": {**_TEXT, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100},
    "deberta-v2": {
        **_TEXT,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
    },
    "deberta-v2:shared": {
        **_TEXT,
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
    },
    "vit": _IMAGE,
    "deit": _IMAGE,
    "dinov2": {**_IMAGE, "mlp_ratio": 2},
    "dinov2:swiglu": {**_IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "vocab_size": 100, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "vocab_size": 100,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    "llama": _GROUPED,
    "llama:mha": {**_GROUPED, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_GROUPED, "sliding_window": 5},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma": {**_GROUPED, "head_dim": 16},
}
IMAGE_FAMILIES = ("vit", "deit", "dinov2", "dinov2:swiglu")
DECODERS = ("gpt2", "opt", "llama", "llama:mha", "mistral", "qwen2", "qwen3", "gemma")
HEADS = {
    "AutoModelForSequenceClassification": [n for n in CONFIGS if n not in IMAGE_FAMILIES],
    "AutoModelForTokenClassification": [n for n in CONFIGS if n not in (*IMAGE_FAMILIES, "opt", "gemma")],
    "AutoModelForQuestionAnswering": [n for n in CONFIGS if n not in (*IMAGE_FAMILIES, "gemma")],
    "AutoModelForCausalLM": list(DECODERS),
    "AutoModelForImageClassification": list(IMAGE_FAMILIES),
}


def make_config(name: str, **changes) -> transformers.PreTrainedConfig:
    """The tiny config of a family; the part of the name after a colon is a variant."""
    return transformers.CONFIG_MAPPING[name.partition(":")[0]](**{**CONFIGS[name], **changes})


def make_model(name: str, auto: str = "AutoModel", *, seed: int = 0, attention: str = "sdpa", **changes) -> nn.Module:
    """A tiny model with weights large enough that every unit matters, in eval mode."""
    torch.manual_seed(seed)
    config = make_config(name, **changes)
    if name == "deit" and auto == "AutoModelForImageClassification":
        config.architectures = ["DeiTForImageClassification"]  # two classes claim this task
    if name.startswith("deberta"):
        attention = "eager"
    model = getattr(transformers, auto).from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_inputs(name: str, *, batch: int = 2, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs for a tiny model; the last example of text is padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGE_FAMILIES:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, length - 3 :] = 0
        ids[-1, length - 3 :] = make_config(name).pad_token_id or 0
    return {"input_ids": ids, "attention_mask": mask}
