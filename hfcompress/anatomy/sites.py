"""What a transformer is made of: the places where whole units can be removed, and their removal.

A *site* is one place where units can be cut: a reader, the linear layer whose input features are the units, and
its writers, the linear layers whose output features feed it. A head and a neuron are the same thing: for heads the
reader is the attention output projection and the writers are query, key and value; for neurons the reader is the
down projection and the writers are up (and gate). With grouped-query attention the unit is one key-value group.

This file stands alone (torch and transformers only): a copy of it travels with every pruned checkpoint, so that
the checkpoint loads where hfcompress is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

RECORD_VERSION = 1
_HEAD_DIM_NAMES = ("head_dim", "attention_head_size", "head_size")


class StructureError(ValueError):
    """A model, a record and what is asked of them do not fit together."""


@dataclass(frozen=True)
class Attention:
    """Where the parts of an attention sublayer are; paths are relative to the transformer layer.

    Attributes:
        module: The module that splits features into heads.
        query: Its query projection; with `fused`, the projection that holds query, key and value as three bands.
        key: Its key projection; empty with `fused`.
        value: Its value projection; empty with `fused`.
        output: The output projection, which reads the heads.
        fused: Whether query, key and value are one projection.
        extra: Further projections with one block of rows per head; those a model does not have are passed over.
        counts: Integer attributes of `module` that hold the number of query heads.
        widths: Integer attributes of `module` that hold heads times head dimension.
        role: Last part of the site's name.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    fused: bool = False
    extra: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    role: str = "heads"


@dataclass(frozen=True)
class FeedForward:
    """Where the parts of a feed-forward sublayer are; paths are relative to the transformer layer.

    Attributes:
        up: Alternatives, each a tuple of projections whose output features are the neurons (up, or gate and up); the
            first alternative that the layer has is taken.
        down: For each alternative the projection that reads the neurons.
    """

    up: tuple[tuple[str, ...], ...]
    down: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """A list of transformer layers; `layers` is its path in the base model."""

    name: str
    layers: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward


@dataclass(frozen=True)
class Family:
    """Where sites and config fields of one architecture are: the only place in which module names stand.

    Attributes:
        model_types: `config.model_type` of the architectures.
        stacks: The layers.
        heads_key: Config field with the number of heads.
        kv_heads_key: Config field with the number of key-value heads, or None.
        head_dim_key: Config field that keeps the head dimension when heads are fewer, or None if there is none: then a
            plain config cannot say that heads are missing.
        width_key: Config field with the number of neurons, or None.
        width_per_hidden: Whether `width_key` counts in multiples of the hidden size.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = None
    head_dim_key: str | None = None
    width_key: str | None = "intermediate_size"
    width_per_hidden: bool = False


@dataclass(frozen=True)
class Writer:
    """A linear layer that feeds a site.

    Attributes:
        module: Its path in the model.
        bands: (first row, rows per unit) of each block of its output features that belongs to the units.
    """

    module: str
    bands: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Site:
    """One place where units can be cut.

    Attributes:
        name: Stack, layer and role, e.g. "encoder.3.heads"; never a module name.
        kind: "heads" or "neurons".
        layer: Index of the layer in its stack, from 0.
        block: Path of the module that owns the units.
        reader: Path of the linear layer whose input features are the units.
        writers: The linear layers whose output features feed the reader.
        units: Units there are now.
        width: Input features of the reader per unit.
        query_heads: Query heads per unit (1 but for grouped-query attention; 0 for neurons).
        parameters_per_unit: Weights and biases that go with one unit.
        attention: The entry of the family table for heads, None for neurons.
    """

    name: str
    kind: str
    layer: int
    block: str
    reader: str
    writers: tuple[Writer, ...]
    units: int
    width: int
    query_heads: int
    parameters_per_unit: int
    attention: Attention | None = None


@dataclass(frozen=True)
class Change:
    """A parameter that was replaced.

    Attributes:
        old: The parameter before.
        new: The parameter after, or None if it is gone.
        dim: Dimension along which entries were selected.
        index: Entries of that dimension that were kept, int64.
    """

    old: nn.Parameter
    new: nn.Parameter | None
    dim: int
    index: torch.Tensor


class SkippedAttention(nn.Module):
    """Stands in for an attention sublayer none of whose heads are left: its output is the bias of the reader.

    A cache still gets one entry per token (one head of width 1), because decoders read the number of past tokens from
    the cache of their first layer.
    """

    def __init__(self, module: nn.Module, reader_name: str | None, site: Site) -> None:
        super().__init__()
        self.reader_name = reader_name
        self.unit_width = site.width
        self.query_heads = site.query_heads
        self.parameters_per_unit = site.parameters_per_unit
        self.layer_idx = getattr(module, "layer_idx", None)
        if reader_name is not None:
            self.add_module(reader_name, module.get_submodule(reader_name))

    def forward(
        self, hidden_states: torch.Tensor, *_args: Any, past_key_values: Any = None, **_kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """The reader's bias at each position, shape (batch, length, hidden), and no attention weights."""
        if past_key_values is not None:
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            entry = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(entry, entry, self.layer_idx)
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.reader_name is None:
            return nothing, None
        return self.get_submodule(self.reader_name)(nothing), None


class EmptyConv1D(Conv1D):
    """transformers' Conv1D with no input features left: its output is its bias (the original cannot reshape nothing)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The bias at each position, shape (..., nf)."""
        return self.bias.expand(*x.shape[:-1], self.nf)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, also of transformers' Conv1D and of quantized layers."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def find_stacks(model: nn.Module, family: Family) -> list[tuple[Stack, str, nn.ModuleList]] | None:
    """The stacks of a model with the path and the list of their layers; None if the model is only a part of one.

    A part is, for instance, the decoder inside an OPT model, which transformers builds as a model of its own.
    """
    base = getattr(model, "base_model", model)
    prefix = "" if base is model else f"{model.base_model_prefix}."  # type: ignore[attr-defined]
    found = []
    for stack in family.stacks:
        try:
            layers = base.get_submodule(stack.layers)
        except AttributeError:
            return None
        found.append((stack, prefix + stack.layers, layers))
    return found


def sites_of(model: nn.Module, family: Family) -> list[Site]:
    """All sites of a model, layer by layer, heads before neurons.

    Raises:
        StructureError: The modules are not where the family says.
    """
    stacks = find_stacks(model, family)
    if stacks is None:
        raise StructureError(
            f"{type(model).__name__} has no {family.stacks[0].layers!r}: pass the whole model, or its base model"
        )
    sites = []
    for stack, path, layers in stacks:
        for number, layer in enumerate(layers):
            where, name = f"{path}.{number}", f"{stack.name}.{number}"
            try:
                sites += [_attention_site(layer, where, name, number, entry) for entry in stack.attentions]
                sites.append(_neuron_site(layer, where, name, number, stack.feed_forward))
            except AttributeError as error:
                raise StructureError(
                    f"{where}: {type(layer).__name__} is not built as its family says in this release of transformers: {error}"
                ) from None
    return sites


def _attention_site(layer: nn.Module, where: str, name: str, number: int, entry: Attention) -> Site:
    module, reader = layer.get_submodule(entry.module), layer.get_submodule(entry.output)
    common = {
        "name": f"{name}.{entry.role}",
        "kind": "heads",
        "layer": number,
        "block": f"{where}.{entry.module}",
        "reader": f"{where}.{entry.output}",
        "attention": entry,
    }
    if isinstance(module, SkippedAttention):
        return Site(
            **common,  # type: ignore[arg-type]
            writers=(),
            units=0,
            width=module.unit_width,
            query_heads=module.query_heads,
            parameters_per_unit=module.parameters_per_unit,
        )
    head_dim = next((int(getattr(module, n)) for n in _HEAD_DIM_NAMES if hasattr(module, n)), 0)
    inner, hidden = linear_features(reader)
    projection = layer.get_submodule(entry.query)
    rows = (
        (linear_features(projection)[1] - inner) // 2
        if entry.fused
        else linear_features(layer.get_submodule(entry.key))[1]
    )
    if head_dim <= 0 or rows % head_dim or inner % rows:
        raise StructureError(
            f"{where}: {inner} query and {rows} key features do not divide into heads of {head_dim}: "
            f"{type(module).__name__} is not built as its family says, so nothing can be cut safely"
        )
    units = rows // head_dim
    width = inner // units
    if entry.fused:
        writers = [Writer(f"{where}.{entry.query}", ((0, width), (inner, head_dim), (inner + rows, head_dim)))]
    else:
        writers = [Writer(f"{where}.{entry.query}", ((0, width),))]
        writers += [Writer(f"{where}.{path}", ((0, head_dim),)) for path in (entry.key, entry.value)]
        extra = [path for path in entry.extra if _has(layer, path)]
        writers += [Writer(f"{where}.{path}", ((0, width),)) for path in extra]
    return Site(
        **common,  # type: ignore[arg-type]
        writers=tuple(writers),
        units=units,
        width=width,
        query_heads=width // head_dim,
        parameters_per_unit=width * hidden + _written(layer, where, writers),
    )


def _neuron_site(layer: nn.Module, where: str, name: str, number: int, entry: FeedForward) -> Site:
    for up, down in zip(entry.up, entry.down, strict=True):
        if all(_has(layer, path) for path in (*up, down)):
            break
    else:
        raise StructureError(
            f"{where}: no feed-forward layers named {' or '.join('+'.join(u) for u in entry.up)}: "
            f"{type(layer).__name__} is not built as its family says (experts?), so nothing can be cut safely"
        )
    units, hidden = linear_features(layer.get_submodule(down))
    writers = [Writer(f"{where}.{path}", ((0, 1),)) for path in up]
    for path in up:
        if linear_features(layer.get_submodule(path))[1] != units:
            raise StructureError(f"{where}.{path}: its output does not match the input of {down}")
    return Site(
        name=f"{name}.neurons",
        kind="neurons",
        layer=number,
        block=f"{where}.{down}".rpartition(".")[0],
        reader=f"{where}.{down}",
        writers=tuple(writers),
        units=units,
        width=1,
        query_heads=0,
        parameters_per_unit=hidden + _written(layer, where, writers),
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _written(layer: nn.Module, where: str, writers: Sequence[Writer]) -> int:
    """Weights and biases of the writers' rows that belong to one unit."""
    total = 0
    for writer in writers:
        module = layer.get_submodule(writer.module[len(where) + 1 :])
        per_row = linear_features(module)[0] + (getattr(module, "bias", None) is not None)
        total += per_row * sum(width for _, width in writer.bands)
    return total


def keep_units(model: nn.Module, sites: Sequence[Site], keep: Mapping[str, torch.Tensor]) -> list[Change]:
    """Remove from the weights, in place, every unit that is not kept.

    Args:
        model: The model the sites were found in.
        sites: Its sites.
        keep: Site name to the indices of the units that stay, int64, ascending. Sites not named stay as they are.

    Returns:
        The parameters that were replaced; the old ones are untouched.

    Raises:
        StructureError: An index is out of range or not ascending, a name is unknown, or a layer is quantized.
    """
    by_name = {site.name: site for site in sites}
    unknown = sorted(set(keep) - set(by_name))
    if unknown:
        raise StructureError(f"no such site: {unknown[0]}; the model has {', '.join(by_name)}")
    for name, index in keep.items():
        site = by_name[name]
        if index.numel() and (index[0] < 0 or index[-1] >= site.units or bool((index[1:] <= index[:-1]).any())):
            raise StructureError(f"{name}: units to keep must be ascending, between 0 and {site.units - 1}")
    chosen = [(by_name[name], index) for name, index in keep.items() if index.numel() < by_name[name].units]
    for site, _ in chosen:  # all of them before the first is touched
        for path in (site.reader, *(writer.module for writer in site.writers)):
            _refuse_quantized(model.get_submodule(path), path)
    return [change for site, index in chosen for change in _keep_in_site(model, site, index)]


def _refuse_quantized(module: nn.Module, path: str) -> None:
    if not isinstance(module, nn.Linear | Conv1D) or not module.weight.is_floating_point():
        raise StructureError(f"{path}: {type(module).__name__} cannot be cut: prune first, quantize after that")


def _keep_in_site(model: nn.Module, site: Site, index: torch.Tensor) -> list[Change]:
    changes = []
    for writer in site.writers:
        rows = torch.cat([start + _expand(index, width) for start, width in writer.bands])
        changes += _select(model.get_submodule(writer.module), rows, output=True)
    changes += _select(model.get_submodule(site.reader), _expand(index, site.width), output=False)
    if site.attention is None:
        return changes
    block = model.get_submodule(site.block)
    if index.numel() == 0:
        return _skip(model, site, block, changes)
    for attribute in site.attention.counts:
        setattr(block, attribute, index.numel() * site.query_heads)
    for attribute in site.attention.widths:
        setattr(block, attribute, index.numel() * site.width)
    return changes


def _skip(model: nn.Module, site: Site, block: nn.Module, changes: list[Change]) -> list[Change]:
    """Replace an attention module without heads; its projections are gone, the reader stays."""
    inside = site.reader.startswith(f"{site.block}.")
    reader_name = site.reader[len(site.block) + 1 :] if inside else None
    parent, _, child = site.block.rpartition(".")
    stub = SkippedAttention(block, reader_name, site)
    setattr(model.get_submodule(parent), child, stub.train(block.training))
    reader = model.get_submodule(site.reader)
    stays = {id(parameter) for parameter in reader.parameters()}
    cut_before = {id(change.new) for change in changes}
    gone = [c if id(c.new) in stays else Change(c.old, None, c.dim, c.index) for c in changes]
    # What else was in the block (the norms of queries and keys) goes with it.
    others = [p for p in block.parameters() if id(p) not in stays | cut_before]
    return gone + [Change(p, None, 0, torch.arange(0)) for p in others]


def _expand(index: torch.Tensor, width: int) -> torch.Tensor:
    """Feature indices of units: each index u becomes u * width ... u * width + width - 1."""
    offsets = torch.arange(width, device=index.device)
    return (index[:, None] * width + offsets).reshape(-1)


def _select(module: nn.Module, index: torch.Tensor, *, output: bool) -> list[Change]:
    """Keep only some output (or input) features of a linear layer, in place."""
    dim = int(output) if isinstance(module, Conv1D) else int(not output)
    names = [("weight", dim)] + ([("bias", 0)] if output and module.bias is not None else [])
    changes = []
    for name, along in names:
        old = getattr(module, name)
        chosen = index.to(old.device)
        new = nn.Parameter(old.detach().index_select(along, chosen), requires_grad=old.requires_grad)
        setattr(module, name, new)
        changes.append(Change(old, new, along, index))
    attribute = {
        (True, True): "nf",
        (True, False): "nx",
        (False, True): "out_features",
        (False, False): "in_features",
    }
    setattr(module, attribute[isinstance(module, Conv1D), output], index.numel())
    if isinstance(module, Conv1D) and module.nx == 0:
        module.__class__ = EmptyConv1D
    return changes


def check_record(record: Any) -> dict[str, tuple[int, int]]:
    """Check the structure written in a config before anything is built from it.

    Args:
        record: The value of `config.hfcompress`: {"version": 1, "units": {site name: [units left, units before]}}. Other
            keys (the steps that were done) are not looked at; without "units" nothing was pruned.

    Returns:
        Site name to (units left, units before).

    Raises:
        StructureError: Unknown version, wrong types, or numbers out of range.
    """
    if not isinstance(record, Mapping):
        raise StructureError(f"config.hfcompress must be a mapping, got {type(record).__name__}")
    version = record.get("version")
    if type(version) is not int or version != RECORD_VERSION:
        raise StructureError(
            f"config.hfcompress has version {str(version)[:20]!r}, this hfcompress reads {RECORD_VERSION}; update hfcompress"
        )
    units = record.get("units", {})
    if not isinstance(units, Mapping):
        raise StructureError("config.hfcompress.units must map site names to [units left, units before]")
    checked = {}
    for name, pair in units.items():
        good = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(count) is int for count in pair)
        if not isinstance(name, str) or not good or not 0 <= pair[0] <= pair[1]:
            raise StructureError(
                f"config.hfcompress.units[{str(name)[:60]!r}] is {repr(pair)[:60]}, "
                "must be [units left, units before] with 0 <= left <= before"
            )
        checked[name] = (pair[0], pair[1])
    return checked


def apply_record(model: nn.Module, family: Family, record: Any) -> None:
    """Give a freshly built model the shapes that its record says, in place; doing it twice changes nothing.

    Values are not chosen: the first units of each site stay. Meant for models whose weights are loaded afterwards.

    Raises:
        StructureError: The record is not valid, or names what the architecture does not have.
    """
    units = check_record(record)
    if find_stacks(model, family) is None:
        return
    sites = {site.name: site for site in sites_of(model, family)}
    keep = {}
    for name, (left, before) in units.items():
        if name not in sites:
            raise StructureError(
                f"config.hfcompress.units names {name[:60]!r}, which {type(model).__name__} does not have"
            )
        if sites[name].units not in (left, before):
            raise StructureError(
                f"config.hfcompress.units[{name!r}] says {before} units before pruning, the config builds {sites[name].units}"
            )
        if sites[name].units != left:
            device = model.get_submodule(sites[name].reader).weight.device
            keep[name] = torch.arange(left, device="cpu" if device.type == "meta" else device)
    keep_units(model, list(sites.values()), keep)
