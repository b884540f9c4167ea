"""What a transformer is made of: the places where whole units can be removed, and their removal.

A *site* is one place where units can be cut: a reader, the linear layer whose input features are the units, and
its writers, the linear layers whose output features feed it. A head and a neuron are the same thing: for heads the
reader is the attention output projection and the writers are query, key and value; for neurons the reader is the
down projection and the writers are up (and gate). With grouped-query attention the unit is one key-value group. Where
layers share something that has one entry per head (a position bias), the decision is shared too: one site, one reader
in each layer.

This file stands alone (torch and transformers only): a copy of it travels with every pruned checkpoint, so that
the checkpoint loads where hfcompress is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

RECORD_VERSION = 1
_HEAD_DIM_NAMES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


class StructureError(ValueError):
    """A model, a record and what is asked of them do not fit together."""


@dataclass(frozen=True)
class Attention:
    """Where the parts of an attention sublayer are; paths are relative to the transformer layer.

    Attributes:
        module: The module that splits features into heads.
        query: Its query projection; with `fused`, the projection that holds query, key and value.
        key: Its key projection; empty with `fused`.
        value: Its value projection; empty with `fused`.
        output: The output projection, which reads the heads.
        fused: How one projection holds query, key and value: "bands" one after the other, or "interleaved", where each
            unit has its queries, key and value together; empty if they are three projections.
        extra: Further projections with one block of rows per head; those a model does not have are passed over.
        tables: Parameters with one column per head; those a layer does not have are passed over.
        common: The same, for all layers at once; paths in the base model. Where there is one, all layers of the stack
            keep the same heads.
        shared: Whether all layers of the stack keep the same heads in any case.
        counts: Integer attributes of `module` that hold the number of query heads.
        kv_counts: Integer attributes of `module` that hold the number of key-value heads.
        widths: Integer attributes of `module` that hold heads times head dimension.
        counts_in_config: Whether `module` reads the numbers of heads from its config when it runs.
        after: Children of `module` through which the output goes: dropout.
        norm: Child of `module` that normalises the sum of its input and its output; empty where the layer does that.
        returns: How many values `module` returns.
        role: Last part of the site's name.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    fused: str = ""
    extra: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    shared: bool = False
    counts: tuple[str, ...] = ()
    kv_counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    counts_in_config: bool = False
    after: tuple[str, ...] = ()
    norm: str = ""
    returns: int = 2
    role: str = "heads"


@dataclass(frozen=True)
class FeedForward:
    """Where the parts of a feed-forward sublayer are; paths are relative to the transformer layer.

    Attributes:
        up: Alternatives, each a tuple of projections whose output features are the neurons (up, or gate and up); the
            first alternative that the layer has is taken.
        down: For each alternative the projection that reads the neurons.
        fused: Whether the one projection in `up` holds gate and up, one after the other.
    """

    up: tuple[tuple[str, ...], ...]
    down: tuple[str, ...]
    fused: bool = False


@dataclass(frozen=True)
class Stack:
    """A list of transformer layers.

    Attributes:
        name: First part of the names of its sites.
        layers: Path of the list in the base model. A "*" in it stands for each entry of another list (stages, groups):
            there is then one stack for each, and its number follows the name unless there is only one.
        attentions: The attention sublayers; none if heads cannot be cut exactly.
        feed_forward: The feed-forward sublayer.
        config: Field of the model's config that holds the config of this stack; empty if it is the model's own.
        heads_key: Config field with the number of heads; None is what the family says.
        width_key: Config field with the number of neurons; None is what the family says.
        fixed: Attention sublayers whose heads cannot be cut; only their projections are looked at, to tell their features
            from hidden features.
        layers_key: Config field with the number of layers, or with a list of them, one for each of several stacks.
        after_first: Path in the base model of a module that runs after the first layer, which has to stay where there is
            one; empty if the architecture has none.
    """

    name: str
    layers: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward
    config: str = ""
    heads_key: str | None = None
    width_key: str | None = None
    fixed: tuple[Attention, ...] = ()
    layers_key: str = "num_hidden_layers"
    after_first: str = ""


@dataclass(frozen=True)
class Family:
    """Where sites and config fields of one architecture are: the only place in which module names stand.

    Attributes:
        model_types: `config.model_type` of the architectures.
        stacks: The layers. A model may lack some of them (only the decoder, only the vision tower).
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
        name: Stack, layer and role, e.g. "encoder.3.heads", or without a layer if all layers decide together, e.g.
            "encoder.heads"; never a module name.
        kind: "heads" or "neurons".
        stack: Name of the stack, e.g. "encoder".
        layer: Index of the layer in its stack, from 0; None if all layers decide together.
        blocks: Paths of the modules that own the units: one, or one per layer.
        readers: Paths of the linear layers whose input features are the units: one for each block.
        writers: The linear layers whose output features feed the readers.
        tables: Paths of parameters with one column per query head.
        units: Units there are now.
        width: Input features of a reader per unit.
        hidden: Output features of a reader.
        query_heads: Query heads per unit (1 but for grouped-query attention; 0 for neurons).
        parameters_per_unit: Weights and biases that go with one unit.
        attention: The entry of the family table for heads, None for neurons.
    """

    name: str
    kind: str
    stack: str
    layer: int | None
    blocks: tuple[str, ...]
    readers: tuple[str, ...]
    writers: tuple[Writer, ...]
    units: int
    width: int
    hidden: int
    query_heads: int
    parameters_per_unit: int
    tables: tuple[str, ...] = ()
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
    the cache of their first layer, and speech models read the cache of every layer when they are done.
    """

    def __init__(self, module: nn.Module, reader_name: str | None, site: Site) -> None:
        super().__init__()
        assert site.attention is not None
        self.reader_name = reader_name
        self.unit_width = site.width
        self.query_heads = site.query_heads
        self.parameters_per_unit = site.parameters_per_unit
        self.layer_idx = getattr(module, "layer_idx", None)
        self.returns = site.attention.returns
        self.after = site.attention.after
        self.norm = site.attention.norm
        self.shared = site.layer is None
        for name in (reader_name, *self.after, self.norm):
            if name:
                self.add_module(name, module.get_submodule(name))

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_args: Any,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """The reader's bias at each position, shape (batch, length, hidden), and None for whatever else is returned."""
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            self._fill(cache, hidden_states, key_value_states)
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.reader_name is not None:
            output = self.get_submodule(self.reader_name)(output)
        for name in self.after:
            output = self.get_submodule(name)(output)
        if self.norm:
            output = self.get_submodule(self.norm)(hidden_states + output)
        return output, *(None,) * (self.returns - 1)

    def _fill(self, cache: Any, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None) -> None:
        """Give the cache an entry for each token, or once for each position of the other sequence."""
        read = hidden_states if key_value_states is None else key_value_states
        entry = read.new_zeros(read.shape[0], 1, read.shape[1], 1)
        if key_value_states is None:
            getattr(cache, "self_attention_cache", cache).update(entry, entry, self.layer_idx)
        elif hasattr(cache, "is_updated") and not cache.is_updated.get(self.layer_idx):
            cache.cross_attention_cache.update(entry, entry, self.layer_idx)
            cache.is_updated[self.layer_idx] = True


class OwnCounts:
    """A config seen by one module: everything as in the model's config, but for the numbers given here."""

    def __init__(self, config: Any, **numbers: int) -> None:
        self._config = config
        self.__dict__.update(numbers)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._config, name)


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

    A part is, for instance, the decoder inside an OPT model, which transformers builds as a model of its own. A model may
    have some of the stacks only, such as the vision tower of CLIP with a classifier.
    """
    base = getattr(model, "base_model", model)
    prefix = "" if base is model else f"{model.base_model_prefix}."  # type: ignore[attr-defined]
    found = []
    for stack in family.stacks:
        paths = _expand_path(base, stack.layers)
        for number, path in enumerate(paths):
            named = stack if len(paths) == 1 else replace(stack, name=f"{stack.name}.{number}")
            found.append((named, prefix + path, base.get_submodule(path)))
    return found or None  # type: ignore[return-value]


def _expand_path(base: nn.Module, path: str) -> list[str]:
    """The paths that there are for one in which "*" stands for each entry of a list."""
    outer, star, inner = path.partition("*")
    if not star:
        return [path] if _has(base, path) else []
    entries = base.get_submodule(outer.rstrip(".")) if _has(base, outer.rstrip(".")) else ()
    return [outer + str(number) + inner for number in range(len(entries))]  # type: ignore[arg-type]


def sites_of(model: nn.Module, family: Family) -> list[Site]:
    """All sites of a model, layer by layer, heads before neurons; of a stack, first what its layers decide together.

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
        together = [entry for entry in stack.attentions if len(layers) and _is_shared(model, layers[0], entry)]
        for entry in together:
            parts = [_attention_site(layer, path, stack, number, entry) for number, layer in enumerate(layers)]
            sites.append(_merge(parts, model, _common_tables(model, entry)))
        for number, layer in enumerate(layers):
            apart = [entry for entry in stack.attentions if entry not in together]
            sites += [_attention_site(layer, path, stack, number, entry) for entry in apart]
            sites.append(_neuron_site(layer, path, stack, number))
    return sites


def _is_shared(model: nn.Module, layer: nn.Module, entry: Attention) -> bool:
    """Whether all layers of a stack keep the same heads."""
    block = layer.get_submodule(entry.module) if _has(layer, entry.module) else None
    # Where no heads are left, what was common may be gone with them.
    return entry.shared or bool(_common_tables(model, entry)) or getattr(block, "shared", False)


def _common_tables(model: nn.Module, entry: Attention) -> tuple[str, ...]:
    """Paths of the parameters with one column per head that all layers read."""
    base = getattr(model, "base_model", model)
    prefix = "" if base is model else f"{model.base_model_prefix}."  # type: ignore[attr-defined]
    return tuple(prefix + path for path in entry.common if _has_parameter(base, path))


def _merge(parts: list[Site], model: nn.Module, common: tuple[str, ...]) -> Site:
    """One site for a decision that all layers of a stack make together.

    Raises:
        StructureError: The layers have different numbers of heads.
    """
    first = parts[0]
    if len({(part.units, part.width) for part in parts}) > 1:
        raise StructureError(
            f"{first.stack}: its layers have {sorted({part.units for part in parts})} heads, but share a position bias that "
            "needs the same in all: the model is not built as its family says"
        )
    rows = sum(model.get_parameter(path).shape[0] for path in common) if first.units else 0
    return replace(
        first,
        name=f"{first.stack}.{first.name.rpartition('.')[2]}",
        layer=None,
        blocks=tuple(path for part in parts for path in part.blocks),
        readers=tuple(path for part in parts for path in part.readers),
        writers=tuple(writer for part in parts for writer in part.writers),
        tables=common + tuple(path for part in parts for path in part.tables),
        # A stand-in for a skipped sublayer already remembers the cost of all layers.
        parameters_per_unit=sum(part.parameters_per_unit for part in parts) + rows * first.query_heads
        if first.units
        else first.parameters_per_unit,
    )


def _attention_site(layer: nn.Module, path: str, stack: Stack, number: int, entry: Attention) -> Site:
    where = f"{path}.{number}"
    try:
        module, reader = layer.get_submodule(entry.module), layer.get_submodule(entry.output)
    except AttributeError as error:
        raise _not_built(where, layer, error) from None
    inner, hidden = linear_features(reader)
    common = {
        "name": f"{stack.name}.{number}.{entry.role}",
        "kind": "heads",
        "stack": stack.name,
        "layer": number,
        "blocks": (f"{where}.{entry.module}",),
        "readers": (f"{where}.{entry.output}",),
        "hidden": hidden,
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
    try:
        projection = layer.get_submodule(entry.query)
        rows = (
            (linear_features(projection)[1] - inner) // 2
            if entry.fused
            else linear_features(layer.get_submodule(entry.key))[1]
        )
        writers = _attention_writers(layer, where, entry, inner=inner, rows=rows, head_dim=head_dim)
    except AttributeError as error:
        raise _not_built(where, layer, error) from None
    if not writers:
        raise StructureError(
            f"{where}: {inner} query and {rows} key features do not divide into heads of {head_dim}: "
            f"{type(module).__name__} is not built as its family says, so nothing can be cut safely"
        )
    units = rows // head_dim
    width = inner // units
    tables = [name for name in entry.tables if _has_parameter(layer, name)]
    per_head = sum(layer.get_parameter(name).shape[0] for name in tables)
    return Site(
        **common,  # type: ignore[arg-type]
        writers=tuple(writers),
        units=units,
        width=width,
        query_heads=width // head_dim,
        parameters_per_unit=width * hidden + _written(layer, where, writers) + per_head * (width // head_dim),
        tables=tuple(f"{where}.{name}" for name in tables),
    )


def _attention_writers(
    layer: nn.Module, where: str, entry: Attention, *, inner: int, rows: int, head_dim: int
) -> list[Writer]:
    """What feeds `inner` features of heads, with `rows` features of keys; nothing if they do not divide into heads."""
    if head_dim <= 0 or rows <= 0 or rows % head_dim or inner % rows:
        return []
    width = inner // (rows // head_dim)
    if entry.fused == "interleaved":
        writers = [Writer(f"{where}.{entry.query}", ((0, width + 2 * head_dim),))]
    elif entry.fused:
        writers = [Writer(f"{where}.{entry.query}", ((0, width), (inner, head_dim), (inner + rows, head_dim)))]
    else:
        writers = [Writer(f"{where}.{entry.query}", ((0, width),))]
        writers += [Writer(f"{where}.{path}", ((0, head_dim),)) for path in (entry.key, entry.value)]
    extra = [path for path in entry.extra if _has(layer, path)]
    return writers + [Writer(f"{where}.{path}", ((0, width),)) for path in extra]


def _not_built(where: str, layer: nn.Module, error: AttributeError) -> StructureError:
    return StructureError(
        f"{where}: {type(layer).__name__} is not built as its family says in this release of transformers: {error}"
    )


def _neuron_site(layer: nn.Module, path: str, stack: Stack, number: int) -> Site:
    where, entry = f"{path}.{number}", stack.feed_forward
    for up, down in zip(entry.up, entry.down, strict=True):
        if all(_has(layer, name) for name in (*up, down)):
            break
    else:
        raise StructureError(
            f"{where}: no feed-forward layers named {' or '.join('+'.join(u) for u in entry.up)}: "
            f"{type(layer).__name__} is not built as its family says (experts?), so nothing can be cut safely"
        )
    units, hidden = linear_features(layer.get_submodule(down))
    bands = ((0, 1), (units, 1)) if entry.fused else ((0, 1),)
    writers = [Writer(f"{where}.{name}", bands) for name in up]
    for name in up:
        if linear_features(layer.get_submodule(name))[1] != units * len(bands):
            raise StructureError(f"{where}.{name}: its output does not match the input of {down}")
    return Site(
        name=f"{stack.name}.{number}.neurons",
        kind="neurons",
        stack=stack.name,
        layer=number,
        blocks=(f"{where}.{down}".rpartition(".")[0],),
        readers=(f"{where}.{down}",),
        writers=tuple(writers),
        units=units,
        width=1,
        hidden=hidden,
        query_heads=0,
        parameters_per_unit=hidden + _written(layer, where, writers),
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _has_parameter(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return _has(module, owner) and isinstance(getattr(module.get_submodule(owner), name, None), nn.Parameter)


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
        for path in (*site.readers, *(writer.module for writer in site.writers)):
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
    for reader in site.readers:
        changes += _select(model.get_submodule(reader), _expand(index, site.width), output=False)
    if site.attention is None:
        return changes
    for table in site.tables:
        changes.append(_select_columns(model, table, _expand(index, site.query_heads)))
    if index.numel() == 0:
        return _skip(model, site, changes)
    groups, heads = index.numel(), index.numel() * site.query_heads
    for path in site.blocks:
        block, entry = model.get_submodule(path), site.attention
        numbers = {name: heads for name in entry.counts} | {name: groups for name in entry.kv_counts}
        numbers |= {name: groups * site.width for name in entry.widths}
        for name, number in numbers.items():
            setattr(block, name, number)
        if entry.counts_in_config:
            shared = getattr(block.config, "_config", block.config)
            block.config = OwnCounts(shared, num_attention_heads=heads, num_key_value_heads=groups)  # type: ignore[assignment]
    return changes


def _skip(model: nn.Module, site: Site, changes: list[Change]) -> list[Change]:
    """Replace attention modules without heads; their projections are gone, the readers stay."""
    owned = [parameter for path in site.blocks for parameter in model.get_submodule(path).parameters()]
    for path, reader in zip(site.blocks, site.readers, strict=True):
        block = model.get_submodule(path)
        inside = reader.startswith(f"{path}.")
        stub = SkippedAttention(block, reader[len(path) + 1 :] if inside else None, site)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, stub.train(block.training))
    stays = {id(parameter) for parameter in model.parameters()}
    gone = [c if id(c.new) in stays else Change(c.old, None, c.dim, c.index) for c in changes]
    # What else was in the block (the norms of queries and keys) goes with it.
    cut_before = {id(change.new) for change in changes}
    return gone + [Change(p, None, 0, torch.arange(0)) for p in owned if id(p) not in stays | cut_before]


def _select_columns(model: nn.Module, path: str, index: torch.Tensor) -> Change:
    """Keep only some columns of a table with one column per head, in place."""
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    old: nn.Parameter = getattr(owner, name)
    new = nn.Parameter(old.detach().index_select(1, index.to(old.device)), requires_grad=old.requires_grad)
    setattr(owner, name, new)
    if isinstance(owner, nn.Embedding):
        owner.embedding_dim = index.numel()
    elif index.numel() == 0:
        # A bias of no heads cannot be interpolated; layers do without the module that makes it.
        parent, _, child = owner_path.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    return Change(old, new, 1, index)


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
        record: The value of `config.hfcompress`: {"version": 1, "units": {site name: [units left, units before]}}, and
            with "hidden" and "layers" the same of these. Other keys (the steps that were done) are not looked at; without
            "units" no units were pruned.

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
    recorded_layers(record)
    recorded_hidden(record)
    return checked


def recorded_layers(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Stack name to (layers left, layers before), for information: the plain config says how many there are.

    Raises:
        StructureError: It is not valid.
    """
    layers = record.get("layers", {})
    if not isinstance(layers, Mapping):
        raise StructureError("config.hfcompress.layers must map stack names to [layers left, layers before]")
    return {str(name): _pair_of(f"layers[{str(name)[:60]!r}]", pair) for name, pair in layers.items()}


def recorded_hidden(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Hidden features (left, before); None if none were cut, or if the plain config says it.

    Raises:
        StructureError: It is not valid.
    """
    pair = record.get("hidden")
    return None if pair is None else _pair_of("hidden", pair)


def _pair_of(what: str, pair: Any) -> tuple[int, int]:
    good = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(count) is int for count in pair)
    if not good or not 1 <= pair[0] <= pair[1]:
        raise StructureError(
            f"config.hfcompress.{what} is {repr(pair)[:60]}, must be [left, before] with 1 <= left <= before"
        )
    return pair[0], pair[1]


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
    absent = {stack.name for stack in family.stacks} - {site.stack.partition(".")[0] for site in sites.values()}
    keep = {}
    for name, (left, before) in units.items():
        if name.partition(".")[0] in absent:
            continue  # of a folder with two towers, one was asked for
        if name not in sites:
            raise StructureError(
                f"config.hfcompress.units names {name[:60]!r}, which {type(model).__name__} does not have"
            )
        if sites[name].units not in (left, before):
            raise StructureError(
                f"config.hfcompress.units[{name!r}] says {before} units before pruning, the config builds {sites[name].units}"
            )
        if sites[name].units != left:
            device = model.get_submodule(sites[name].readers[0]).weight.device
            keep[name] = torch.arange(left, device="cpu" if device.type == "meta" else device)
    keep_units(model, list(sites.values()), keep)
