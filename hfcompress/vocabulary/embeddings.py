"""A model with fewer tokens: everything whose size follows from the vocabulary, and every id that its configs name.

What follows from the vocabulary is not looked up by name. The architecture is built twice without memory (on the meta
device), from the config as it is and from the config with the smaller vocabulary, and what differs is what has to be cut:
embeddings, heads and their biases, buffers, padding indices.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.anatomy import Change
from hfcompress.checkpoints.record import add_step
from hfcompress.vocabulary.tokenizer import VocabularyError

_ID_KEY = re.compile(r"(^|_)token_ids?$")
# A token that is gone is never produced, so what is said about it may go as well.
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens")
_BY_NAME = ("lang_to_id", "task_to_id")
_OTHER_KEYS = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")


def cut_vocabulary(model: nn.Module, kept: Iterable[int]) -> list[Change]:
    """Remove tokens from a model in place: from the embeddings, the heads over the vocabulary and all configs.

    For texts whose tokens all stay the outputs are those of before (logits: those of the tokens that stay). Tied weights
    stay tied. The step is written to the record; what was pruned before stays as it is.

    Args:
        model: A transformers model of text, pruned or not, neither wrapped nor quantized.
        kept: Ids that stay, ascending; the i-th becomes i. Rows for ids that no token has may be left out.

    Returns:
        The parameters that were replaced, for an optimizer that holds the old ones.

    Raises:
        VocabularyError: The ids do not fit the model, lack one that a config names (`named_ids` lists those), or the
            architecture uses its vocabulary in a way that is not known here. Nothing is changed then.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
        >>> model = BertForMaskedLM(config)
        >>> changes = cut_vocabulary(model, [0, 1, 2, 7, 8, 9])
        >>> [tuple(change.new.shape) for change in changes], model.config.vocab_size
        ([(6, 32), (6,)], 6)
        >>> model.config.hfcompress["steps"]
        [{'step': 'vocabulary', 'left': 6, 'before': 50}]
    """
    rows = _rows(model)
    ids = [int(i) for i in kept]
    if not ids or any(later <= earlier for earlier, later in itertools.pairwise(ids)):
        raise VocabularyError("the ids to keep must be ascending, each one once, and at least one; sort them first")
    if ids[0] < 0 or ids[-1] >= rows:
        raise VocabularyError(
            f"id {ids[0] if ids[0] < 0 else ids[-1]} is to stay, but the embeddings have {rows:,} rows; "
            "give the tokenizer of this model, or resize the embeddings to it first"
        )
    if len(ids) == rows:
        return []
    new_ids = {old: new for new, old in enumerate(ids)}
    settings = [(config, _renumbered(config, new_ids, rows)) for config in _configs(model)]
    plan = _plan(model, rows, len(ids), new_ids)
    for config, values in settings:
        for key, value in values.items():
            setattr(config, key, value)
    changes = _apply(model, plan, torch.tensor(ids, dtype=torch.long))
    add_step(model.config, "vocabulary", left=len(ids), before=rows)
    return changes


def named_ids(model: nn.Module) -> list[int]:
    """Ids that the configs of a model name and that have to stay: padding, start and end, ...

    Raises:
        VocabularyError: The model is of a kind that cannot be cut.

    Example:
        >>> from transformers import BartConfig, BartModel
        >>> sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
        >>> heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
        >>> named_ids(BartModel(BartConfig(vocab_size=50, **sizes, **heads)))
        [0, 1, 2]
    """
    rows, found = _rows(model), set()

    def note(i: int) -> int:
        found.add(i)
        return i

    for config in _configs(model):
        for key, value in vars(config).items():
            if value is not None and key not in (*_FORBIDDEN, "bad_words_ids", "sequence_bias"):
                _translated(key, value, note)
    return sorted(i for i in found if 0 <= i < rows)


def _rows(model: nn.Module) -> int:
    """Rows of the embeddings, of a model that can be cut."""
    if not isinstance(model, PreTrainedModel):
        raise VocabularyError(f"{type(model).__name__} is no transformers model; unwrap it, and merge adapters, first")
    name = type(model).__name__
    if getattr(model.config, "quantization_config", None) is not None:
        raise VocabularyError(f"{name} is quantized; cut the vocabulary first, quantize after that")
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if type(model.config).sub_configs or not isinstance(embeddings, nn.Embedding):
        raise VocabularyError(f"{name} does not read tokens of one vocabulary, and only models that do can be cut")
    rows = embeddings.num_embeddings
    if rows != model.config.vocab_size:
        raise VocabularyError(
            f"{name} has {rows:,} embeddings, its config says {model.config.vocab_size:,}; use resize_token_embeddings first"
        )
    return rows


# ---- configs ----


def _configs(model: Any) -> Iterator[Any]:
    """Every config a model reads: its own, the copies of its parts, and the one for generation."""
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    generation = getattr(model, "generation_config", None)
    yield from configs.values()
    if generation is not None:
        yield generation


def _renumbered(config: Any, new_ids: dict[int, int], rows: int) -> dict[str, Any]:
    """The fields of a config that change, with their new values.

    Ids outside the vocabulary (defaults of the architecture that were never meant) stay as they are.
    """

    def translate(i: int) -> int | None:
        return new_ids.get(i) if 0 <= i < rows else i

    values: dict[str, Any] = {"vocab_size": len(new_ids)} if isinstance(config, PreTrainedConfig) else {}
    for key, value in vars(config).items():
        if value is None:
            continue
        new = _translated(key, value, translate)
        if new is None and key not in (*_FORBIDDEN, "bad_words_ids", "sequence_bias"):
            raise VocabularyError(
                f"{type(config).__name__}.{key} is {value}, which is not among the ids to keep; add it (named_ids lists all such ids)"
            )
        if new != value:
            values[key] = new
    return values


def _translated(key: str, value: Any, translate: Callable[[int], int | None]) -> Any:
    """The value of one field with new ids; None if an id in it is gone that is needed, or if nothing is left of it."""
    if _ID_KEY.search(key):
        return _some(value, translate) if isinstance(value, list | tuple) else _all(value, translate)
    if key in _FORBIDDEN:
        return _some(value, translate)
    if key == "bad_words_ids":
        return [new for words in value if (new := _all(words, translate)) is not None] or None
    if key == "force_words_ids":
        return _all(value, translate)
    if key == "forced_decoder_ids":
        pairs = [[place, None if i is None else translate(i)] for place, i in value]
        return (
            None if any(new is None and i is not None for (_, new), (_, i) in zip(pairs, value, strict=True)) else pairs
        )
    if key == "sequence_bias":
        if isinstance(value, dict):
            found = [(_all(words, translate), bias) for words, bias in value.items()]
            return {tuple(words): bias for words, bias in found if words is not None} or None
        return [[new, bias] for words, bias in value if (new := _all(words, translate)) is not None] or None
    if key in _BY_NAME:
        return {name: new for name, i in value.items() if (new := translate(i)) is not None} or None
    return value


def _some(values: Any, translate: Callable[[int], int | None]) -> list[int] | None:
    """Those of several ids that are left; None if none are."""
    return [new for i in values if (new := translate(i)) is not None] or (None if len(values) else [])


def _all(value: Any, translate: Callable[[int], int | None]) -> Any:
    """An id, or lists of them, all of which have to be there; else None."""
    if isinstance(value, list | tuple):
        new = [_all(one, translate) for one in value]
        return None if any(one is None for one in new) else new
    return translate(value) if type(value) is int else value


# ---- weights ----


@dataclass(frozen=True)
class _CutPlan:
    """What of a model follows from its vocabulary.

    Attributes:
        tensors: Module path, name and dimension of each parameter and buffer.
        numbers: Module path, name and new value of each number that a module holds.
    """

    tensors: list[tuple[str, str, int]]
    numbers: list[tuple[str, str, int | None]]


def _plan(model: Any, rows: int, left: int, new_ids: dict[int, int]) -> _CutPlan:
    """Compare two builds of the architecture, and with them the model itself."""
    config = copy.deepcopy(model.config)
    before = dict(_blank(model, config).named_modules())
    for key, value in _renumbered(config, new_ids, rows).items():
        setattr(config, key, value)
    after = dict(_blank(model, config).named_modules())
    live = dict(model.named_modules())
    tensors, numbers = [], []
    for path, module in before.items():
        if path not in live or path not in after:
            raise VocabularyError(f"{type(model).__name__} is not built as its config says: {path} is missing")
        for name, tensor in _tensors(module):
            dim = _changed_dim(f"{path}.{name}", tensor, dict(_tensors(after[path]))[name], (rows, left))
            if dim is not None:
                if dict(_tensors(live[path]))[name].shape != tensor.shape:
                    raise VocabularyError(
                        f"{path}.{name} has another shape than the config says; cut an unchanged model"
                    )
                tensors.append((path, name, dim))
        for name, value in vars(module).items():
            new = vars(after[path]).get(name, value)
            if isinstance(value, int | None) and isinstance(new, int | None) and new != value:
                numbers.append((path, name, new))
    _check(model, live, _CutPlan(tensors, numbers))
    return _CutPlan(tensors, numbers)


def _blank(model: Any, config: Any) -> nn.Module:
    restored = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        return type(model)._from_config(restored)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _changed_dim(name: str, before: torch.Tensor, after: torch.Tensor, sizes: tuple[int, int]) -> int | None:
    """The dimension that counts tokens, or None."""
    if before.shape == after.shape:
        return None
    changed = [dim for dim, pair in enumerate(zip(before.shape, after.shape, strict=True)) if pair[0] != pair[1]]
    if len(changed) != 1 or (before.shape[changed[0]], after.shape[changed[0]]) != sizes:
        raise VocabularyError(
            f"{name} would go from {tuple(before.shape)} to {tuple(after.shape)} with the vocabulary from {sizes[0]} to "
            f"{sizes[1]}; such a use of the vocabulary cannot be cut"
        )
    return changed[0]


def _check(model: Any, live: dict[str, nn.Module], plan: _CutPlan) -> None:
    """Whether all that should be cut was found, and nothing else depends on an id that moves."""
    found = {id(dict(_tensors(live[path]))[name]) for path, name, _ in plan.tensors}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and id(module.weight) not in found:
            raise VocabularyError(
                f"the size of a {type(module).__name__} of {type(model).__name__} does not follow from vocab_size"
            )
    paths = {path for path, _, _ in plan.tensors}
    for path, name, new in plan.numbers:
        if name == "padding_idx" and path not in paths and any(True for _ in _tensors(live[path])):
            raise VocabularyError(
                f"{path} counts positions from the id of the padding token, which would become {new}; keep all ids before it"
            )


def _apply(model: nn.Module, plan: _CutPlan, index: torch.Tensor) -> list[Change]:
    """Replace tensors and numbers; what was shared stays shared."""
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old ones stay alive, so that ids stay theirs
    changes = []
    for path, name, dim in plan.tensors:
        module = model.get_submodule(path)
        old = getattr(module, name)
        if id(old) not in replaced:
            new = old.detach().index_select(dim, index.to(old.device))
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
                changes.append(Change(old, new, dim, index))
            replaced[id(old)] = (old, new)
        setattr(module, name, replaced[id(old)][1])
    for path, name, value in plan.numbers:
        setattr(model.get_submodule(path), name, value)
    return changes
