"""Which models can be exported, and what they are traced and checked with."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy import StructureError, family_of
from hfcompress.anatomy.sites import find_stacks
from hfcompress.export.formats import ExportError
from hfcompress.measurement import example_inputs

# One pass gives the answer, and every one of these was seen to give the same as in torch.
MODEL_TYPES = (
    "albert",
    "beit",
    "bert",
    "camembert",
    "clip_text_model",
    "clip_vision_model",
    "deberta-v2",
    "deit",
    "dinov2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "siglip_text_model",
    "siglip_vision_model",
    "swin",
    "vit",
    "xlm-roberta",
)


def check_exportable(model: nn.Module) -> None:
    """Refuse a model that cannot be exported.

    Args:
        model: As it was loaded.

    Raises:
        ExportError: It is quantized already, or no encoder of texts or images.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> check_exportable(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1)))
        Traceback (most recent call last):
        ...
        hfcompress.export.formats.ExportError: GPT2Model (gpt2) cannot be exported; what can is albert, beit, bert, ...
    """
    config: Any = model.config
    if getattr(model, "quantization_method", None) is not None:
        raise ExportError(f"{type(model).__name__} is quantized with bitsandbytes; export the model it was made from")
    if config.model_type not in MODEL_TYPES or getattr(config, "is_decoder", False):
        kind = "a decoder" if getattr(config, "is_decoder", False) else config.model_type
        raise ExportError(
            f"{type(model).__name__} ({kind}) cannot be exported; what can is {', '.join(MODEL_TYPES)} "
            "(encoders, whose answer takes one pass)"
        )


def reads_text(model: nn.Module) -> bool:
    """Whether it reads tokens; the others read pixels."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def longest_text(model: nn.Module) -> int:
    """The most tokens that a model has positions for; a very large number where positions are relative.

    Example:
        >>> from transformers import RobertaConfig, RobertaModel
        >>> config = RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=20)
        >>> longest_text(RobertaModel(config))  # positions are counted from the padding id + 1
        18
    """
    limit: int = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def padded_inputs(model: nn.Module, *, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Made-up inputs, the last text of several padded to a third of its length; with segments where a model reads them.

    Args:
        model: The model.
        batch: Rows.
        length: Tokens per row; not used for images.
        seed: The same seed gives the same inputs.

    Returns:
        All that the exported graph takes, in its order.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        >>> inputs = padded_inputs(model, batch=2, length=6)
        >>> list(inputs), inputs["attention_mask"].tolist()
        (['input_ids', 'attention_mask', 'token_type_ids'], [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    """
    if not reads_text(model):
        return example_inputs(model, batch=batch, seed=seed)
    config: Any = model.config
    inputs = example_inputs(model, batch=batch, length=length, seed=seed)
    if batch > 1:
        inputs["attention_mask"][-1, -(-length // 3) :] = 0
        inputs["input_ids"][-1, -(-length // 3) :] = getattr(config, "pad_token_id", None) or 0
    takes = inspect.signature(model.forward).parameters
    if "token_type_ids" in takes and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        inputs["token_type_ids"][:, length // 2 :] = 1
    return inputs


def outside_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights that stay in float: those of linear layers and convolutions outside the transformer layers.

    Classifiers, poolers and patch embeddings are small, and most sensitive; `hfcompress quantize` leaves them alone, too.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> len(outside_weights(BertModel(config)))
        1
    """
    try:
        inside = tuple(f"{path}." for _, path, _ in find_stacks(model, family_of(model)) or ())
    except StructureError:
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(inside)
    ]
