"""The table of architectures: where each keeps its layers, heads and neurons.

A new architecture is one entry here and one tiny config in `tests/families.py`; every invariant then runs on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

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
        (Stack("encoder", "layers", (_VIT_ATTENTION,), FeedForward((("mlp.fc1",),), ("mlp.fc2",))),),
        head_dim_key="head_dim",
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
                        fused=True,
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
                FeedForward((("fc1",),), ("fc2",)),
            ),
        ),
        width_key="ffn_dim",
    ),
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "gemma"),
        (Stack("decoder", "layers", (_SELF_ATTENTION,), _GATED),),
        kv_heads_key="num_key_value_heads",
        head_dim_key="head_dim",
    ),
)


def family_of(model: nn.Module) -> Family:
    """The family of a model, by the `model_type` of its config.

    Raises:
        StructureError: The architecture is not in the table.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
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
