"""Cutting the hidden width: features of the residual stream are removed from the whole model at once."""

from __future__ import annotations

import torch
from torch import nn

from hfcompress.anatomy.families import family_of
from hfcompress.anatomy.sites import Change
from hfcompress.anatomy.stream import Stream, cut_stream, stream_of


def find_stream(model: nn.Module) -> Stream:
    """Every dimension of every parameter of a model that carries features of the residual stream.

    Everything as wide as the stream by the architecture's own config is part of it: embeddings of all kinds, norms, inputs
    of query, key, value and up projections, outputs of the projections that add to it, poolers, heads on top.

    Args:
        model: A transformers model with any head on top, or the bare model, with any units left.

    Returns:
        The stream.

    Raises:
        StructureError: The architecture is not known, has no single hidden width, or mixes features in groups.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
        >>> stream = find_stream(model)
        >>> stream.width, len(stream.dims)
        (32, 20)
        >>> [(entry.dim, entry.role) for entry in stream.dims if entry.name == "encoder.layer.0.output.dense.weight"]
        [(0, 'writes')]
    """
    return stream_of(model, family_of(model))


def keep_hidden(model: nn.Module, index: torch.Tensor) -> list[Change]:
    """Keep only some features of the residual stream, in place; the config is left as it is.

    Afterwards the model computes what it computed with the other features zero everywhere and with norms (LayerNorm,
    RMSNorm) over the features that are kept. Constants that follow the hidden width (Gemma scales its embeddings, T5 its
    outputs) stay as they were. `hfcompress.cut` does this and writes the record from which the model is loaded again.

    Args:
        model: A transformers model, not wrapped, not quantized.
        index: The features that stay, int64, ascending, counted in the model as it is.

    Returns:
        The parameters that were replaced, in order: one with two dimensions in the stream is replaced twice.

    Raises:
        StructureError: The index does not fit, or `find_stream` refuses the model.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
        >>> changes = keep_hidden(model, torch.arange(24))
        >>> model.encoder.layer[0].attention.self.query, model.pooler.dense
        (Linear(in_features=24, out_features=32, bias=True), Linear(in_features=24, out_features=24, bias=True))
    """
    return cut_stream(model, find_stream(model), index)
