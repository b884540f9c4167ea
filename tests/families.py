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
_GPT = {**_TEXT, "pad_token_id": 0}
# Encoder and decoder differ in layers, heads and neurons, so that nothing of one can pass for the other's.
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "vocab_size": 100,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"d_model": 32, "d_ff": 48, "num_heads": 4, "vocab_size": 100, "pad_token_id": 0, "decoder_start_token_id": 0}
_TEXT_TOWER = {
    **_BASE,
    "max_position_embeddings": 16,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 1,
    "projection_dim": 16,
    "projection_size": 24,
}
_VISION_TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
}
_AUDIO = {
    **_BASE,
    "vocab_size": 30,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "mask_time_prob": 0.0,
}

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
    "gemma2": {**_GROUPED, "head_dim": 16, "sliding_window": 5},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "sliding_window": 5},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "gpt_neox": _GPT,
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "ffn_hidden_size": 48,
        "vocab_size": 100,
        "pad_token_id": 0,
        "bias": True,
    },
    "falcon:mqa": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "multi_query": True,
        "ffn_hidden_size": 48,
        "vocab_size": 100,
        "pad_token_id": 0,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "pad_token_id": 0},
    "albert": {**_TEXT, "embedding_size": 16},
    "albert:groups": {**_TEXT, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2},
    "mpnet": {**_TEXT, "pad_token_id": 1},
    "modernbert": {
        **_TEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "bart": {**_SEQ2SEQ, "max_position_embeddings": 64},
    "mbart": {**_SEQ2SEQ, "max_position_embeddings": 64},
    "t5": {**_T5, "d_kv": 8, "num_layers": 3, "num_decoder_layers": 2},
    "t5:gated": {
        **_T5,
        "d_kv": 16,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "whisper": {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32},
    "wav2vec2": _AUDIO,
    "hubert": {**_AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    "beit": {**_IMAGE, "use_relative_position_bias": True},
    "beit:shared": {**_IMAGE, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
    "swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 4,
        "mlp_ratio": 2.0,
    },
    "clip": {"text_config": _TEXT_TOWER, "vision_config": _VISION_TOWER, "projection_dim": 16},
    "clip_text_model": _TEXT_TOWER,
    "clip_vision_model": _VISION_TOWER,
    "siglip": {"text_config": _TEXT_TOWER, "vision_config": _VISION_TOWER},
    "siglip_text_model": _TEXT_TOWER,
    "siglip_vision_model": _VISION_TOWER,
}
_IMAGE_CLASSIFIERS = ("vit", "deit", "dinov2", "dinov2:swiglu", "beit", "beit:shared", "swin")
IMAGE_FAMILIES = (*_IMAGE_CLASSIFIERS, "clip_vision_model", "siglip_vision_model")
AUDIO_FAMILIES = ("wav2vec2", "hubert")
TWO_TOWERS = ("clip", "siglip")
TEXT_TOWERS = ("clip_text_model", "siglip_text_model")
SEQ2SEQ = ("bart", "mbart", "t5", "t5:gated", "whisper")
DECODERS = (
    *(
        "gpt2",
        "opt",
        "llama",
        "llama:mha",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
    ),
    *("gpt_neox", "falcon", "falcon:mqa", "bloom"),
)
_OTHER_INPUTS = (*IMAGE_FAMILIES, *AUDIO_FAMILIES, *TWO_TOWERS, *SEQ2SEQ)
# Encoders and decoders of text alone.
TEXT = tuple(name for name in CONFIGS if name not in _OTHER_INPUTS)
_TEXT_WITH_HEADS = [name for name in TEXT if name not in TEXT_TOWERS]
HEADS = {
    "AutoModelForSequenceClassification": _TEXT_WITH_HEADS,
    "AutoModelForTokenClassification": [
        *(n for n in _TEXT_WITH_HEADS if n not in ("opt", "gemma", "gemma2", "gemma3_text")),
        "t5",  # the encoder alone
    ],
    "AutoModelForQuestionAnswering": [
        *(n for n in _TEXT_WITH_HEADS if n not in ("gemma", "gemma2", "gemma3_text", "phi", "phi3")),
        "bart",
        "t5",
    ],
    # Of BART and Whisper the decoder alone.
    "AutoModelForCausalLM": [*DECODERS, "bart", "whisper"],
    "AutoModelForMaskedLM": ["bert", "albert", "mpnet", "modernbert"],
    "AutoModelForSeq2SeqLM": ["bart", "mbart", "t5", "t5:gated"],
    "AutoModelForSpeechSeq2Seq": ["whisper"],
    "AutoModelForCTC": list(AUDIO_FAMILIES),
    "AutoModelForAudioClassification": [*AUDIO_FAMILIES, "whisper"],  # of Whisper the encoder alone
    "AutoModelForImageClassification": [*_IMAGE_CLASSIFIERS, "clip", "siglip"],  # of the latter the vision tower alone
    "AutoModelForZeroShotImageClassification": list(TWO_TOWERS),
}


# Attention is computed in one way only there.
ONLY_EAGER = ("deberta-v2", "deberta-v2:shared", "gemma2", "bloom", "mpnet")
# Bloom's heads stay, and multi-query attention has one unit per layer.
NO_HEADS_TO_CHOOSE = ("bloom", "falcon:mqa")


def task_class(name: str) -> str:
    """The Auto class that a family is mostly used with."""
    for names, auto in (
        (_IMAGE_CLASSIFIERS, "AutoModelForImageClassification"),
        ((*TEXT_TOWERS, "clip_vision_model", "siglip_vision_model"), "AutoModel"),
        (TWO_TOWERS, "AutoModelForZeroShotImageClassification"),
        (("whisper",), "AutoModelForSpeechSeq2Seq"),
        (SEQ2SEQ, "AutoModelForSeq2SeqLM"),
        (AUDIO_FAMILIES, "AutoModelForCTC"),
        (DECODERS, "AutoModelForCausalLM"),
    ):
        if name in names:
            return auto
    return "AutoModelForSequenceClassification"


def auto_class(name: str, auto: str) -> type:
    """The Auto class, or the class itself where no Auto class covers it."""
    stock = "SiglipTextModel" if name == "siglip_text_model" and auto == "AutoModel" else auto
    return getattr(transformers, stock)


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
    cls = auto_class(name, auto)
    if hasattr(cls, "from_config"):
        model = cls.from_config(config, attn_implementation=attention)
    else:
        config._attn_implementation = attention
        model = cls._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_inputs(
    name: str, auto: str = "AutoModel", *, batch: int = 2, length: int = 9, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Inputs for a tiny model; the last example of text or speech is padded at the end.

    Args:
        name: The family.
        auto: What is on top, for heads that take a part of the model only.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGE_FAMILIES or (name in TWO_TOWERS and auto == "AutoModelForImageClassification"):
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name in AUDIO_FAMILIES:
        mask = torch.ones(batch, 400, dtype=torch.long)
        mask[-1, 300:] = 0
        return {"input_values": torch.randn(batch, 400, generator=generator) * mask, "attention_mask": mask}
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if name in TEXT_TOWERS + TWO_TOWERS:
        ids.clamp_(max=97)
        ids[:, length - 4] = 99  # the end of the text, where CLIP takes its embedding
    if batch > 1:
        mask[-1, length - 3 :] = 0
        config = make_config(name)
        ids[-1, length - 3 :] = getattr(config, "text_config", config).pad_token_id or 0
    text = {"input_ids": ids, "attention_mask": mask}
    if name in TWO_TOWERS:
        return {**text, "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    alone = auto in ("AutoModelForCausalLM", "AutoModelForTokenClassification")
    if name not in SEQ2SEQ or alone:
        return {"input_ids": ids} if name == "whisper" else text
    # The decoder reads something else than the encoder.
    decoder = {"decoder_input_ids": ids[:, : length - 4].flip(1).contiguous()}
    if name != "whisper":
        return {**text, **decoder}
    sound = {"input_features": torch.randn(batch, 8, 24, generator=generator)}
    return sound if auto == "AutoModelForAudioClassification" else {**sound, **decoder}


def predictions(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a model is there for: logits, or the hidden states of a bare model."""
    return outputs[next(name for name in ("logits", "logits_per_image", "last_hidden_state") if name in outputs)]


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


def patterns_of(name: str) -> tuple[str, ...]:
    """The patterns that change something."""
    return PATTERNS[1:] if name in NO_HEADS_TO_CHOOSE else PATTERNS


def choose_units(sites: Sequence[Site], pattern: str, *, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Which units stay in each site, chosen at random.

    "heads", "neurons" and "both" leave a different number in each layer, "empty" leaves none in some sublayers (in the
    first attention, too), "even" leaves half of everything.
    """
    keep = {}
    for number, site in enumerate(sites):
        shares = _LEFT[pattern][site.kind]
        share = shares[(site.layer or 0) % len(shares)]
        count = max(1, int(site.units * share)) if share else 0
        generator = torch.Generator().manual_seed(1000 * seed + number)
        keep[site.name] = tuple(torch.randperm(site.units, generator=generator)[:count].sort().values.tolist())
    return keep


def others(site: Site, keep: Iterable[int]) -> list[int]:
    """The units of a site that are not kept."""
    return sorted(set(range(site.units)) - set(keep))
