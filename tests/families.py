"""One tiny config per architecture: every invariant runs on each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import transformers
from torch import nn

from hfcompress.anatomy import Site

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
    "xlm-roberta": {**_TEXT, "pad_token_id": 1, "max_position_embeddings": 66},
    "camembert": {**_TEXT, "pad_token_id": 1, "max_position_embeddings": 66},
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
    "gpt2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 48,
        "vocab_size": 100,
        "n_positions": 64,
        "pad_token_id": 0,
    },
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


# Attention is computed in one way only there.
ONLY_EAGER = ("deberta-v2", "deberta-v2:shared")


def task_class(name: str) -> str:
    """The Auto class that a family is mostly used with."""
    if name in IMAGE_FAMILIES:
        return "AutoModelForImageClassification"
    return "AutoModelForCausalLM" if name in DECODERS else "AutoModelForSequenceClassification"


def make_config(name: str, **changes) -> transformers.PreTrainedConfig:
    """The tiny config of a family; the part of the name after a colon is a variant."""
    return transformers.CONFIG_MAPPING[name.partition(":")[0]](**{**CONFIGS[name], **changes})


def make_model(name: str, auto: str = "AutoModel", *, seed: int = 0, attention: str = "sdpa", **changes) -> nn.Module:
    """A tiny model with weights large enough that every unit matters, in eval mode."""
    torch.manual_seed(seed)
    config = make_config(name, **changes)
    if name == "deit" and auto == "AutoModelForImageClassification":
        config.architectures = ["DeiTForImageClassification"]  # two classes claim this task
    if name in ONLY_EAGER:
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


def run_model(model: nn.Module, inputs: Mapping[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
    """Every tensor among the outputs of a model, by name, without gradients."""
    with torch.no_grad():
        outputs = model(**inputs, **kwargs)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of outputs with the same names and shapes."""
    assert one.keys() == other.keys() and one, f"{list(one)} and {list(other)}"
    assert all(one[name].shape == other[name].shape for name in one)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# Shares of the units that stay, for the layers in turn.
_LEFT = {
    "heads": {"heads": (0.75, 0.25, 0.5), "neurons": (1.0, 1.0, 1.0)},
    "neurons": {"heads": (1.0, 1.0, 1.0), "neurons": (0.3, 0.9, 0.6)},
    "both": {"heads": (0.5, 0.25, 0.75), "neurons": (0.9, 0.3, 0.6)},
    "empty": {"heads": (0.0, 0.5, 0.0), "neurons": (0.4, 0.0, 0.0)},
    "even": {"heads": (0.5, 0.5, 0.5), "neurons": (0.5, 0.5, 0.5)},
}
PATTERNS = ("heads", "neurons", "both", "empty")


def choose_units(sites: Sequence[Site], pattern: str, *, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Which units stay in each site, chosen at random.

    "heads", "neurons" and "both" leave a different number in each layer, "empty" leaves none in some sublayers (in the
    first attention, too), "even" leaves half of everything.
    """
    keep = {}
    for number, site in enumerate(sites):
        shares = _LEFT[pattern][site.kind]
        share = shares[site.layer % len(shares)]
        count = max(1, int(site.units * share)) if share else 0
        generator = torch.Generator().manual_seed(1000 * seed + number)
        keep[site.name] = tuple(torch.randperm(site.units, generator=generator)[:count].sort().values.tolist())
    return keep


def others(site: Site, keep: Iterable[int]) -> list[int]:
    """The units of a site that are not kept."""
    return sorted(set(range(site.units)) - set(keep))
