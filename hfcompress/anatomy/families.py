"""The table of architectures: where each keeps its layers, heads and neurons.

A new architecture is one entry here and one tiny config in `tests/families.py`; every invariant then runs on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from hfcompress.anatomy.sites import (
    Attention,
    Family,
    FeedForward,
    Site,
    Stack,
    StructureError,
    find_stacks,
    sites_of,
)

_SELF_ATTENTION = Attention("self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = FeedForward((("mlp.gate_proj", "mlp.up_proj"),), ("mlp.down_proj",))
_BERT_FEED_FORWARD = FeedForward((("intermediate.dense",),), ("output.dense",))
_VIT_ATTENTION = Attention(
    "attention",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    counts=("num_attention_heads",),
)
_FC = FeedForward((("fc1",),), ("fc2",))
_MLP_FC = FeedForward((("mlp.fc1",),), ("mlp.fc2",))


def _out_proj(module: str, role: str = "heads") -> Attention:
    """Attention as in BART: four projections, the last called out_proj."""
    query, key, value, output = (f"{module}.{name}_proj" for name in ("q", "k", "v", "out"))
    return Attention(module, query, key, value, output, counts=("num_heads",), role=role)


def _encoder_decoder() -> tuple[Stack, ...]:
    """Encoder and decoder as in BART, with config fields of their own."""
    return (
        Stack(
            "encoder",
            "encoder.layers",
            (_out_proj("self_attn"),),
            _FC,
            heads_key="encoder_attention_heads",
            width_key="encoder_ffn_dim",
        ),
        Stack(
            "decoder",
            "decoder.layers",
            (_out_proj("self_attn"), _out_proj("encoder_attn", role="cross_heads")),
            _FC,
            heads_key="decoder_attention_heads",
            width_key="decoder_ffn_dim",
            layers_key="decoder_layers",
        ),
    )


def _t5_attention(module: str, role: str = "heads") -> Attention:
    """The first layer computes a position bias per head for all: what is cut in one layer is cut in each."""
    query, key, value, output = (f"{module}.{name}" for name in "qkvo")
    return Attention(
        module,
        query,
        key,
        value,
        output,
        tables=(f"{module}.relative_attention_bias.weight",),
        shared=True,
        counts=("n_heads",),
        widths=("inner_dim",),
        returns=3,
        role=role,
    )


def _t5_feed_forward(layer: int) -> FeedForward:
    where = f"layer.{layer}.DenseReluDense"
    return FeedForward(((f"{where}.wi",), (f"{where}.wi_0", f"{where}.wi_1")), (f"{where}.wo",) * 2)


def _tower(name: str, path: str, config: str = "") -> Stack:
    """One encoder of CLIP or SigLIP."""
    return Stack(name, path, (_out_proj("self_attn"),), _MLP_FC, config=config)


FAMILIES: tuple[Family, ...] = (
    Family(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra"),
        (
            Stack(
                "encoder",
                "encoder.layer",
                (
                    Attention(
                        "attention.self",
                        "attention.self.query",
                        "attention.self.key",
                        "attention.self.value",
                        "attention.output.dense",
                        counts=("num_attention_heads",),
                        widths=("all_head_size",),
                    ),
                ),
                _BERT_FEED_FORWARD,
            ),
        ),
    ),
    Family(
        ("deberta-v2",),
        (
            Stack(
                "encoder",
                "encoder.layer",
                (
                    Attention(
                        "attention.self",
                        "attention.self.query_proj",
                        "attention.self.key_proj",
                        "attention.self.value_proj",
                        "attention.output.dense",
                        extra=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
                        counts=("num_attention_heads",),
                        widths=("all_head_size",),
                    ),
                ),
                _BERT_FEED_FORWARD,
                after_first="encoder.conv",
            ),
        ),
    ),
    Family(
        ("distilbert",),
        (
            Stack(
                "encoder",
                "transformer.layer",
                (
                    Attention(
                        "attention",
                        "attention.q_lin",
                        "attention.k_lin",
                        "attention.v_lin",
                        "attention.out_lin",
                        counts=("n_heads",),
                    ),
                ),
                FeedForward((("ffn.lin1",),), ("ffn.lin2",)),
            ),
        ),
        heads_key="n_heads",
        width_key="hidden_dim",
    ),
    Family(
        ("vit", "deit"),
        (Stack("encoder", "layers", (_VIT_ATTENTION,), _MLP_FC),),
        head_dim_key="head_dim",
    ),
    Family(
        ("beit",),
        (
            Stack(
                "encoder",
                "layers",
                (
                    replace(
                        _VIT_ATTENTION,
                        tables=("relative_position_bias.relative_position_bias_table",),
                        common=("shared_position_bias.relative_position_bias_table",),
                    ),
                ),
                _MLP_FC,
            ),
        ),
        head_dim_key="head_dim",
    ),
    Family(
        ("swin",),
        (
            Stack(
                "encoder",
                "encoder.layers.*.blocks",
                (replace(_VIT_ATTENTION, tables=("attention.relative_position_bias.relative_position_bias_table",)),),
                _MLP_FC,
                layers_key="depths",
            ),
        ),
        heads_key="num_heads",
        width_key="mlp_ratio",
        width_per_hidden=True,
    ),
    Family(
        ("dinov2",),
        (
            Stack(
                "encoder",
                "encoder.layer",
                (_VIT_ATTENTION,),
                FeedForward((("mlp.fc1",), ("mlp.gate_proj", "mlp.up_proj")), ("mlp.fc2", "mlp.down_proj")),
            ),
        ),
        head_dim_key="head_dim",
        width_key="mlp_ratio",
        width_per_hidden=True,
    ),
    Family(
        ("gpt2",),
        (
            Stack(
                "decoder",
                "h",
                (
                    Attention(
                        "attn",
                        "attn.c_attn",
                        "",
                        "",
                        "attn.c_proj",
                        fused="bands",
                        counts=("num_heads",),
                        widths=("split_size",),
                    ),
                ),
                FeedForward((("mlp.c_fc",),), ("mlp.c_proj",)),
            ),
        ),
        heads_key="n_head",
        width_key="n_inner",
    ),
    Family(
        ("opt",),
        (
            Stack(
                "decoder",
                "decoder.layers",
                (
                    Attention(
                        "self_attn",
                        "self_attn.q_proj",
                        "self_attn.k_proj",
                        "self_attn.v_proj",
                        "self_attn.out_proj",
                        counts=("num_heads",),
                    ),
                ),
                _FC,
            ),
        ),
        width_key="ffn_dim",
    ),
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        (Stack("decoder", "layers", (_SELF_ATTENTION,), _GATED),),
        kv_heads_key="num_key_value_heads",
        head_dim_key="head_dim",
    ),
    Family(
        ("phi",),
        (
            Stack(
                "decoder",
                "layers",
                (replace(_SELF_ATTENTION, output="self_attn.dense"),),
                _MLP_FC,
            ),
        ),
        kv_heads_key="num_key_value_heads",
        head_dim_key="head_dim",
    ),
    Family(
        ("phi3",),
        (
            Stack(
                "decoder",
                "layers",
                (
                    Attention(
                        "self_attn",
                        "self_attn.qkv_proj",
                        "",
                        "",
                        "self_attn.o_proj",
                        fused="bands",
                        kv_counts=("num_key_value_heads",),
                        counts_in_config=True,
                    ),
                ),
                FeedForward((("mlp.gate_up_proj",),), ("mlp.down_proj",), fused=True),
            ),
        ),
        kv_heads_key="num_key_value_heads",
        head_dim_key="head_dim",
    ),
    Family(
        ("gpt_neox",),
        (
            Stack(
                "decoder",
                "layers",
                (
                    Attention(
                        "attention",
                        "attention.query_key_value",
                        "",
                        "",
                        "attention.dense",
                        fused="interleaved",
                    ),
                ),
                FeedForward((("mlp.dense_h_to_4h",),), ("mlp.dense_4h_to_h",)),
            ),
        ),
    ),
    Family(
        ("falcon",),
        (
            Stack(
                "decoder",
                "h",
                (
                    Attention(
                        "self_attention",
                        "self_attention.query_key_value",
                        "",
                        "",
                        "self_attention.dense",
                        fused="interleaved",
                        counts=("num_heads",),
                        kv_counts=("num_kv_heads",),
                    ),
                ),
                FeedForward((("mlp.dense_h_to_4h",),), ("mlp.dense_4h_to_h",)),
            ),
        ),
        kv_heads_key="num_kv_heads",
        width_key="ffn_hidden_size",
    ),
    Family(
        ("bloom",),
        # Neurons only: the slope of each head's ALiBi bias follows from its number, so the heads left would get others'.
        (
            Stack(
                "decoder",
                "h",
                (),
                FeedForward((("mlp.dense_h_to_4h",),), ("mlp.dense_4h_to_h",)),
                fixed=(
                    Attention(
                        "self_attention",
                        "self_attention.query_key_value",
                        "",
                        "",
                        "self_attention.dense",
                        fused="interleaved",
                    ),
                ),
            ),
        ),
        width_key=None,
    ),
    Family(
        ("albert",),
        (
            Stack(
                "encoder",
                "encoder.albert_layer_groups.*.albert_layers",
                (
                    Attention(
                        "attention",
                        "attention.query",
                        "attention.key",
                        "attention.value",
                        "attention.dense",
                        counts=("num_attention_heads",),
                        widths=("all_head_size",),
                        after=("output_dropout",),
                        norm="LayerNorm",
                    ),
                ),
                FeedForward((("ffn",),), ("ffn_output",)),
            ),
        ),
    ),
    Family(
        ("mpnet",),
        (
            Stack(
                "encoder",
                "encoder.layer",
                (
                    Attention(
                        "attention.attn",
                        "attention.attn.q",
                        "attention.attn.k",
                        "attention.attn.v",
                        "attention.attn.o",
                        common=("encoder.relative_attention_bias.weight",),
                        counts=("num_attention_heads",),
                        widths=("all_head_size",),
                    ),
                ),
                _BERT_FEED_FORWARD,
            ),
        ),
    ),
    Family(
        ("modernbert",),
        (
            Stack(
                "encoder",
                "layers",
                (Attention("attn", "attn.Wqkv", "", "", "attn.Wo", fused="bands", after=("out_drop",)),),
                FeedForward((("mlp.Wi",),), ("mlp.Wo",), fused=True),
            ),
        ),
    ),
    Family(("bart", "mbart", "whisper"), _encoder_decoder()),
    Family(
        ("t5",),
        (
            Stack("encoder", "encoder.block", (_t5_attention("layer.0.SelfAttention"),), _t5_feed_forward(1)),
            Stack(
                "decoder",
                "decoder.block",
                (
                    _t5_attention("layer.0.SelfAttention"),
                    _t5_attention("layer.1.EncDecAttention", role="cross_heads"),
                ),
                _t5_feed_forward(2),
                layers_key="num_decoder_layers",
            ),
        ),
        heads_key="num_heads",
        head_dim_key="d_kv",
        width_key="d_ff",
    ),
    Family(
        ("wav2vec2", "hubert"),
        (
            Stack(
                "encoder",
                "encoder.layers",
                (_out_proj("attention"),),
                FeedForward((("feed_forward.intermediate_dense",),), ("feed_forward.output_dense",)),
            ),
        ),
    ),
    Family(
        ("clip", "siglip"),
        (
            _tower("text", "text_model.encoder.layers", "text_config"),
            _tower("vision", "vision_model.encoder.layers", "vision_config"),
        ),
    ),
    Family(("clip_text_model", "siglip_text_model"), (_tower("text", "encoder.layers"),)),
    Family(("clip_vision_model", "siglip_vision_model"), (_tower("vision", "encoder.layers"),)),
)

_EXPERTS = "its experts are three-dimensional weights, not linear layers"
_SLOPES = "the slopes of its position bias follow from the number of heads, so the heads left would get others'"
_OWN_ATTENTION = "its attention is no product of queries, keys and values that linear layers feed"

# What is known not to be cut exactly, and why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "llama4", "llama4_text", "mixtral", "olmoe",
            "phimoe", "qwen2_moe", "qwen3_moe", "switch_transformers",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("mpt",), _SLOPES),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "fnet"), "it has no attention"),
    **dict.fromkeys(("xlnet", "reformer", "funnel"), _OWN_ATTENTION),
    **dict.fromkeys(
        ("big_bird", "longformer", "led"), "its attention splits tokens into blocks in ways that were not verified"
    ),
    "deberta": "its queries, keys and values have biases of their own beside one projection without any; use deberta-v2",
    "gemma3": "it is a model of images and text; cut its text model, gemma3_text",
    "wavlm": "its position bias is gated per head by further layers",
}  # fmt: skip

# The same for a setting of a family that can be cut otherwise: model type and config field.
REFUSED_IF: dict[tuple[str, str], str] = {
    ("bloom", "slow_but_exact"): "with slow_but_exact it slices its neurons by the hidden size",
    ("falcon", "alibi"): _SLOPES,
}


def family_of(model: nn.Module) -> Family:
    """The family of a model, by the `model_type` of its config.

    Raises:
        StructureError: The architecture is not in the table, or is known not to be cut exactly.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    reasons = [REFUSED.get(str(model_type))]
    reasons += [
        reason for (name, field), reason in REFUSED_IF.items() if name == model_type and getattr(config, field, None)
    ]
    for reason in filter(None, reasons):
        raise StructureError(f"{type(model).__name__} with model_type {model_type!r} cannot be cut exactly: {reason}")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = sorted(name for family in FAMILIES for name in family.model_types)
    close = difflib.get_close_matches(str(model_type), known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise StructureError(
        f"{type(model).__name__} has model_type {model_type!r}{hint}, which cannot be cut; known are {', '.join(known)}; "
        "to add one, write an entry in hfcompress/anatomy/families.py as CONTRIBUTING.md says"
    )


def find_sites(model: nn.Module, *, kinds: Sequence[str] = ("heads", "neurons")) -> list[Site]:
    """Every place of a model where units can be cut, layer by layer, heads before neurons.

    Args:
        model: A transformers model with any head on top, or the bare model.
        kinds: Which kinds of units.

    Returns:
        The sites, with the units there are now.

    Raises:
        StructureError: The architecture is not known, or is not built as its family says.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
        >>> [(site.name, site.units, site.width) for site in find_sites(model)]
        [('encoder.0.heads', 4, 8), ('encoder.0.neurons', 64, 1)]
    """
    return [site for site in sites_of(model, family_of(model)) if site.kind in kinds]


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of a model in forward order (of all its stacks).

    Raises:
        StructureError: The architecture is not known.
    """
    stacks = find_stacks(model, family_of(model))
    if stacks is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    return [layer for _, _, layers in stacks for layer in layers]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer layers of a model in forward order, by the first part of their sites' names ("encoder.3").

    Raises:
        StructureError: The architecture is not known.
    """
    stacks = find_stacks(model, family_of(model))
    if stacks is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    return {f"{stack.name}.{number}": layer for stack, _, layers in stacks for number, layer in enumerate(layers)}
