"""The residual stream: every dimension of every parameter that carries hidden features, and their removal.

Where the stream is, is not written in a table: the class is built twice without memory (on the meta device), once as the
config says and once with twice the hidden width, and what grew along is the stream, but for the dimensions that belong to
units (heads, neurons), which `sites.py` knows.

Together with `sites.py` this file stands alone (torch and transformers only): copies of both travel with every checkpoint
whose hidden width was cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy.sites import (
    RECORD_VERSION,
    Change,
    Family,
    Site,
    StructureError,
    find_stacks,
    recorded_hidden,
    sites_of,
)

# Widths of their own that are meant to follow the hidden width where they equal it.
_FOLLOWING_KEYS = ("pooler_hidden_size", "pooler_output_size")
# Widths that take a projection to the hidden width where they differ from it; with an unequal width they are not the stream.
_EMBEDDING_KEYS = ("embedding_size", "word_embed_proj_dim")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class StreamDim:
    """One dimension of a parameter (or buffer) that carries the features of the stream.

    Attributes:
        name: Path of the parameter in the model.
        dim: The dimension.
        copies: How many times the stream lies in it, one after the other (2 where a head reads two tokens side by side).
        role: "reads" (input features of a linear layer), "writes" (output features, biases, embeddings) or "scales" (norms
            and other vectors multiplied in).
    """

    name: str
    dim: int
    copies: int
    role: str


@dataclass(frozen=True)
class Stream:
    """Where the hidden features of a model are.

    Attributes:
        width: Features there are now.
        before: Features that the config builds.
        dims: Every dimension that carries them; tied parameters are listed under each of their names.
        attributes: (module path, attribute) of integers, or tuples of one, that hold the width beside the parameters.
    """

    width: int
    before: int
    dims: tuple[StreamDim, ...]
    attributes: tuple[tuple[str, str], ...]


def stream_of(model: nn.Module, family: Family) -> Stream:
    """Find the stream of a model.

    Raises:
        StructureError: The model has no single hidden width, is not built as its config says, or mixes features in a way
            that cannot be cut.
    """
    before, dims, attributes = _discover(model, family)
    shapes = {name: tensor.shape for name, tensor in _tensors(model)}
    widths = {shapes[entry.name][entry.dim] / entry.copies for entry in dims}
    if len(widths) != 1:
        found = ", ".join(f"{width:g}" for width in sorted(widths))
        raise StructureError(f"{type(model).__name__} has hidden widths {found}: it was not cut everywhere alike")
    return Stream(int(widths.pop()), before, dims, attributes)


def cut_stream(model: nn.Module, stream: Stream, index: torch.Tensor) -> list[Change]:
    """Keep only some features of the stream, in place, everywhere at once.

    Args:
        model: The model the stream was found in.
        stream: Its stream.
        index: The features that stay, int64, ascending, at least one.

    Returns:
        The parameters that were replaced, in order: one with two dimensions in the stream is replaced twice.

    Raises:
        StructureError: The index does not fit, or a layer is quantized.
    """
    check_index(stream, index)
    if index.numel() == stream.width:
        return []
    for name, tensor in _tensors(model):
        if not tensor.is_floating_point() and any(name == entry.name for entry in stream.dims):
            raise StructureError(f"{name}: {tensor.dtype} cannot be cut: prune first, quantize after that")
    return _cut(model, stream.dims, stream.attributes, index, stream.width)


def check_index(stream: Stream, index: torch.Tensor) -> None:
    """Check which features are to stay.

    Raises:
        StructureError: There are none, they are not ascending, or out of range.
    """
    if not index.numel() or index[0] < 0 or index[-1] >= stream.width or bool((index[1:] <= index[:-1]).any()):
        raise StructureError(
            f"hidden features to keep must be ascending, between 0 and {stream.width - 1}, and at least one"
        )


def apply_hidden(model: nn.Module, family: Family, record: Any) -> None:
    """Give a freshly built model the hidden width that its record says, in place; doing it twice changes nothing.

    Values are not chosen: the first features stay. Meant for models whose weights are loaded afterwards.

    Raises:
        StructureError: The record is not valid, or does not fit the model.
    """
    hidden = recorded_hidden(record)
    if hidden is None or hidden[0] == hidden[1] or find_stacks(model, family) is None:
        return
    left, before = hidden
    built, dims, attributes = _discover(model, family)
    if built != before:
        raise StructureError(f"config.hfcompress.hidden says {before} features before, the config builds {built}")
    # An outer model is built around an inner one that was cut already.
    shapes = {name: tensor.shape for name, tensor in _tensors(model)}
    todo = [entry for entry in dims if shapes[entry.name][entry.dim] == before * entry.copies]
    _cut(model, todo, attributes, torch.arange(left, device="cpu"), before)


def built_model(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class from a config, without memory and without what its record says."""
    if getattr(config, "hfcompress", None) is not None:
        config.hfcompress = {"version": RECORD_VERSION}
    if getattr(config, "is_heterogeneous", False):
        config.per_layer_config = None
    with torch.device("meta"):
        return type(model)(config)


def widen(config: Any, width: int) -> None:
    """Set the hidden width of a config, in place, and the widths that follow it."""
    for key in _FOLLOWING_KEYS:
        if getattr(config, key, None) == config.hidden_size:
            setattr(config, key, width)
    config.hidden_size = width


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _discover(model: nn.Module, family: Family) -> tuple[int, tuple[StreamDim, ...], tuple[tuple[str, str], ...]]:
    """The hidden width that the config builds, the dimensions and the attributes that hold it."""
    config = model.config
    before = getattr(config, "hidden_size", None)
    if type(before) is not int:
        raise StructureError(
            f"{type(model).__name__} has no single hidden width in its config, so its hidden features cannot be cut"
        )
    if find_stacks(model, family) is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    small = built_model(model, copy.deepcopy(config))
    sites = sites_of(small, family)
    large = _build_larger(model, family, sites, small)
    units = _unit_dims(small, sites) | _fixed_dims(small, family)
    blocks = tuple(f"{path}." for site in sites if site.kind == "heads" for path in site.blocks)
    layers = tuple(f"{path}." for _, path, _ in find_stacks(small, family) or ())
    live, wide = {name for name, _ in _tensors(model)}, dict(_tensors(large))
    built = dict(_tensors(small))
    _refuse_foreign(model, built)
    dims = []
    for name, tensor in built.items():
        module = small.get_submodule(name.rpartition(".")[0])
        is_buffer = not isinstance(tensor, nn.Parameter)
        for dim, (size, other) in enumerate(zip(tensor.shape, wide[name].shape, strict=True)):
            if size == other or (name, dim) in units or name not in live:
                continue
            if size % before or other != 2 * size:
                if is_buffer or name.startswith(blocks):
                    continue  # it belongs to the features of a head, whose width came from the hidden width
                raise StructureError(
                    f"{name}: {size} features follow the hidden width of {before} but are not the stream"
                )
            _refuse_mixing(module, name)
            copies = size // before
            role = _role(module, name.rpartition(".")[2], dim)
            if copies > 1 and (role != "reads" or name.startswith(layers)):
                raise StructureError(f"{name}: {size} features are {copies} times the stream in an unknown order")
            dims.append(StreamDim(name, dim, copies, role))
    if not dims:
        raise StructureError(f"{type(model).__name__} has no features that follow the hidden width in its config")
    return before, tuple(dims), _attributes(model, small, large, dims, before)


def _build_larger(model: nn.Module, family: Family, sites: Sequence[Site], small: nn.Module) -> nn.Module:
    """The model with twice the hidden width."""
    before = model.config.hidden_size
    head_dims = {site.width // site.query_heads for site in sites if site.kind == "heads"}
    for keys in ((), _EMBEDDING_KEYS):
        config = copy.deepcopy(model.config)
        for key in keys:
            if getattr(config, key, None) == before:
                setattr(config, key, 2 * before)
        if family.head_dim_key is not None and len(head_dims) == 1:
            setattr(config, family.head_dim_key, *head_dims)
        widen(config, 2 * before)
        try:
            large = built_model(model, config)
        except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise StructureError(
                f"{type(model).__name__} cannot be built with another hidden width, so its stream is unknown: {reason[0]}"
            ) from None
        names = [name for name, _ in _tensors(large)]
        if names == [name for name, _ in _tensors(small)] and all(
            len(one.shape) == len(other.shape)
            for (_, one), (_, other) in zip(_tensors(large), _tensors(small), strict=True)
        ):
            return large
    raise StructureError(
        f"{type(model).__name__} has other parameters with another hidden width, so its stream is unknown"
    )


def _unit_dims(model: nn.Module, sites: Sequence[Site]) -> set[tuple[str, int]]:
    """(parameter, dimension) of everything that belongs to units."""
    found = set()
    for site in sites:
        for path in site.readers:
            found.add((f"{path}.weight", 0 if isinstance(model.get_submodule(path), Conv1D) else 1))
        for path in (writer.module for writer in site.writers):
            found.add((f"{path}.weight", 1 if isinstance(model.get_submodule(path), Conv1D) else 0))
            found.add((f"{path}.bias", 0))
        found |= {(path, 1) for path in site.tables}
    return found


def _fixed_dims(model: nn.Module, family: Family) -> set[tuple[str, int]]:
    """(parameter, dimension) of everything that belongs to heads that cannot be cut."""
    found = set()
    for stack, path, layers in find_stacks(model, family) or ():
        if not stack.attentions and not stack.fixed:
            raise StructureError(f"{stack.name}: where the features of its heads are is not known")
        names = [(name, True) for entry in stack.fixed for name in (entry.query, entry.key, entry.value) if name]
        for name, is_output in names + [(entry.output, False) for entry in stack.fixed]:
            for number, layer in enumerate(layers):
                dim = int(is_output == isinstance(layer.get_submodule(name), Conv1D))
                found |= {(f"{path}.{number}.{name}.weight", dim)}
                found |= {(f"{path}.{number}.{name}.bias", 0)} if is_output else set()
    return found


def _refuse_foreign(model: nn.Module, built: dict[str, torch.Tensor]) -> None:
    foreign = next((name for name, _ in model.named_parameters() if name not in built), None)
    if foreign is not None:
        raise StructureError(
            f"{foreign} is not a parameter of {type(model).__name__} as its config builds it (an adapter?): merge it first"
        )


def _refuse_mixing(module: nn.Module, name: str) -> None:
    grouped = isinstance(module, _CONVOLUTIONS) and module.groups != 1
    if grouped or isinstance(module, nn.GroupNorm | nn.MultiheadAttention):
        raise StructureError(f"{name}: {type(module).__name__} works on groups of hidden features, which cannot be cut")


def _role(module: nn.Module, name: str, dim: int) -> str:
    if isinstance(module, Conv1D):
        return "reads" if name == "weight" and dim == 0 else "writes"
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "reads" if name == "weight" and dim == 1 else "writes"
    is_norm = "norm" in type(module).__name__.lower() or name.startswith("lambda")
    return "scales" if is_norm else "writes"


def _attributes(
    model: nn.Module, small: nn.Module, large: nn.Module, dims: Sequence[StreamDim], before: int
) -> tuple[tuple[str, str], ...]:
    """Integers that follow the stream, in modules that own parts of it and in norms without weights.

    Those of other modules stay as they are: no architecture reads them as shapes, but some compute constants from them (T5
    scales by its width), which have to stay as they were.
    """
    owners = {entry.name.rpartition(".")[0] for entry in dims}
    wide = dict(large.named_modules(remove_duplicate=False))
    live = {path for path, _ in model.named_modules(remove_duplicate=False)}
    found = []
    for path, module in small.named_modules(remove_duplicate=False):
        if path not in live or isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue  # these have two widths and are updated dimension by dimension
        for attribute, value in vars(module).items():
            if path not in owners and attribute != "normalized_shape":
                continue
            pair = value, vars(wide[path]).get(attribute)
            if pair in ((before, 2 * before), ((before,), (2 * before,))):
                found.append((path, attribute))
    return tuple(found)


def _cut(
    model: nn.Module,
    dims: Sequence[StreamDim],
    attributes: Sequence[tuple[str, str]],
    index: torch.Tensor,
    width: int,
) -> list[Change]:
    changes: list[Change] = []
    wanted: dict[str, list[StreamDim]] = {}
    for entry in dims:
        wanted.setdefault(entry.name, []).append(entry)
    replaced: dict[int, torch.Tensor] = {}
    held = []  # as long as these live, no new tensor gets the id of an old one
    for name, entries in wanted.items():
        path, _, short = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, short)
        if any(old is new for new in replaced.values()):
            continue  # a module that the model has under two names
        if id(old) not in replaced:
            held.append(old)
            new = old
            for entry in entries:
                chosen = torch.cat([index + copy_ * width for copy_ in range(entry.copies)])
                new, before = _selected(new, entry.dim, chosen), new
                if isinstance(new, nn.Parameter):
                    changes.append(Change(before, new, entry.dim, chosen))  # type: ignore[arg-type]
            replaced[id(old)] = new
        setattr(module, short, replaced[id(old)])
        for entry in entries:
            _set_features(module, short, entry.dim, entry.copies * index.numel())
    for path, attribute in attributes:
        module = model.get_submodule(path)
        is_tuple = isinstance(getattr(module, attribute), tuple)
        setattr(module, attribute, (index.numel(),) if is_tuple else index.numel())
    return changes


def _selected(old: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    new = old.detach().index_select(dim, index.to(old.device))
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _set_features(module: nn.Module, name: str, dim: int, size: int) -> None:
    if name != "weight":
        return
    if isinstance(module, Conv1D):
        setattr(module, ("nx", "nf")[dim], size)
    elif isinstance(module, nn.Linear):
        setattr(module, ("out_features", "in_features")[dim], size)
    elif isinstance(module, _CONVOLUTIONS):
        setattr(module, ("out_channels", "in_channels")[dim], size)
