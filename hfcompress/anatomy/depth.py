"""Dropping whole layers, in a way the plain config of the architecture can say."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy.families import family_of
from hfcompress.anatomy.native import forget_per_layer
from hfcompress.anatomy.sites import (
    RECORD_VERSION,
    Change,
    Stack,
    StructureError,
    check_record,
    find_stacks,
    recorded_layers,
)
from hfcompress.anatomy.stream import built_model

_Chosen = list[tuple[Stack, str, nn.ModuleList, tuple[int, ...]]]


def drop_layers(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> list[Change]:
    """Remove layers, in place, and say so in the config: the result computes what it computed with the others skipped.

    Unless units or hidden features are missing as well, plain transformers loads what is saved then: config fields with one
    entry per layer are cut along, and what is computed per layer (cache indices, kinds of attention) stays with its layer.
    `config.hfcompress` tells the numbers of layers, and its units are renamed to the new numbers of their layers.

    Args:
        model: A transformers model, not wrapped.
        keep: Stack name to the layers that stay, ascending, counted in the model as it is, at least one. Stacks not named
            stay as they are.

    Returns:
        The parameters that are gone.

    Raises:
        StructureError: There is no such stack or layer, or the architecture cannot do without a layer.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64))
        >>> changes = drop_layers(model, {"encoder": (0, 3)})
        >>> model.config.num_hidden_layers, model.config.hfcompress["layers"], len(changes)
        (2, {'encoder': [2, 4]}, 32)
    """
    chosen = check_layers(model, keep)
    if not chosen:
        return []
    record = getattr(model.config, "hfcompress", None) or {}
    before = {name: pair[1] for name, pair in record.get("layers", {}).items()}
    lengths = {stack.name: len(layers) for stack, _, layers, _ in chosen}
    owned = _own_configs(model, chosen)
    gone = [
        p
        for _, _, layers, index in chosen
        for n, layer in enumerate(layers)
        if n not in index
        for p in layer.parameters()
    ]
    for stack, _, layers, index in chosen:
        _shorten(_part(model.config, stack), stack, len(layers), index)
        for config in owned[stack.name]:
            _shorten(config, stack, len(layers), index, is_own=True)
    for _, _, layers, index in chosen:
        for number, layer in enumerate([layers[n] for n in index]):
            layers[number] = layer
            _renumber(layer, number)
        del layers[len(index) :]
    counts = dict(record.get("layers", {}))
    counts |= {s.name: [len(index), before.get(s.name, lengths[s.name])] for s, _, _, index in chosen}
    model.config.hfcompress = {"version": RECORD_VERSION, **record, "layers": counts}
    if "units" in record:
        model.config.hfcompress["units"] = _renamed(record["units"], chosen)
    stay = {id(parameter) for parameter in model.parameters()}
    distinct = {id(p): p for p in gone if id(p) not in stay}
    return [Change(p, None, 0, torch.arange(0)) for p in distinct.values()]


def check_layers(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> _Chosen:
    """Check whether layers can be dropped.

    Args:
        model: The model, left as it is.
        keep: As in `drop_layers`.

    Returns:
        Of each stack that loses layers: its entry, path, layers, and the indices of those that stay.

    Raises:
        StructureError: They cannot.
    """
    if not keep:
        return []
    check_record(getattr(model.config, "hfcompress", None) or {"version": RECORD_VERSION})
    stacks = find_stacks(model, family_of(model))
    if stacks is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    by_name = {stack.name: (stack, path, layers) for stack, path, layers in stacks}
    chosen = []
    for name, given in keep.items():
        if name not in by_name:
            raise StructureError(f"no such stack: {name}; the model has {', '.join(by_name)}")
        stack, path, layers = by_name[name]
        index = tuple(int(number) for number in given)
        if index == tuple(range(len(layers))):
            continue
        _refuse_shared(model, stack, layers)
        if not index or list(index) != sorted(set(index)) or index[0] < 0 or index[-1] >= len(layers):
            raise StructureError(
                f"{name}: layers to keep must be ascending, between 0 and {len(layers) - 1}, and at least one"
            )
        _refuse_early(model, stack, index)
        chosen.append((stack, path, layers, index))
    if chosen:
        _compare(model, chosen)
    return chosen


def droppable_layers(model: nn.Module) -> set[str]:
    """Names ("encoder.3") of the layers that could be dropped from a model as it is, each alone.

    Raises:
        StructureError: None of them, with the reason of the last.

    Example:
        >>> from transformers import T5Config, T5EncoderModel
        >>> sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 3, "vocab_size": 9}
        >>> sorted(droppable_layers(T5EncoderModel(T5Config(**sizes))))  # the first layer has the position bias of all
        ['encoder.1', 'encoder.2']
    """
    found: set[str] = set()
    reason: StructureError | None = None

    def can_go(stack: str, layers: int, gone: Sequence[int]) -> bool:
        nonlocal reason
        try:
            check_layers(model, {stack: [n for n in range(layers) if n not in gone]})
        except StructureError as error:
            reason = error
            return False
        return True

    for stack, _, layers in find_stacks(model, family_of(model)) or ():
        count = len(layers)
        if count < 2:
            continue
        others = range(1, count, 2)
        # Where every second layer can go all at once, none depends on its number: that saves looking at each.
        alike = can_go(stack.name, count, others) and (count < 3 or can_go(stack.name, count, range(2, count, 2)))
        found |= {f"{stack.name}.{n}" for n in range(1, count) if alike or can_go(stack.name, count, [n])}
        found |= {f"{stack.name}.0"} if can_go(stack.name, count, [0]) else set()
    if not found:
        raise reason or StructureError(f"{type(model).__name__} has no layer that it could do without")
    return found


def full_depth(model: nn.Module) -> Any:
    """A copy of a model's config with as many layers as there were before any were dropped.

    Which layers went is not known: fields with one entry per layer take the entries of those that are left, spread evenly.

    Raises:
        StructureError: The record in the model's config is not valid.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64))
        >>> changes = drop_layers(model, {"encoder": (0, 3)})
        >>> full_depth(model).num_hidden_layers
        4
    """
    config = copy.deepcopy(model.config)
    record = getattr(config, "hfcompress", None) or {}
    counts = recorded_layers(record)
    for stack, _, layers in find_stacks(model, family_of(model)) or ():
        before = counts.get(stack.name, (0, 0))[1]
        if before > len(layers):
            index = tuple(number * len(layers) // before for number in range(before))
            _shorten(_part(config, stack), stack, len(layers), index)
    return config


def _part(config: Any, stack: Stack) -> Any:
    """The config that a stack is built from."""
    return getattr(config, stack.config) if stack.config else config


def _refuse_shared(model: nn.Module, stack: Stack, layers: nn.ModuleList) -> None:
    said = _said(_part(model.config, stack), stack)
    if said != len(layers):
        raise StructureError(
            f"{stack.name}: the config of {type(model).__name__} says {stack.layers_key}={said} and there are {len(layers)} "
            "layers: they are shared, and cannot be dropped"
        )


def _said(config: Any, stack: Stack) -> Any:
    """The number of layers that a config says."""
    said = getattr(config, stack.layers_key, None)
    return said[_stage(stack)] if isinstance(said, list | tuple) else said


def _stage(stack: Stack) -> int:
    """The number of a stack that is one of several."""
    number = stack.name.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def _refuse_early(model: nn.Module, stack: Stack, index: tuple[int, ...]) -> None:
    base = getattr(model, "base_model", model)
    outer, _, name = stack.after_first.rpartition(".")
    if stack.after_first and getattr(base.get_submodule(outer), name, None) is not None and index[0] != 0:
        raise StructureError(f"{stack.name}: layer 0 must stay, because {stack.after_first} runs after it")


def _compare(model: nn.Module, chosen: _Chosen) -> None:
    """Build the model as it is and as it will be, without memory, and see whether every layer would be built alike.

    Raises:
        StructureError: A layer would be built otherwise at its new place (it holds something for all, or depends on its
            number), or something outside depends on the number of layers.
    """
    shorter = copy.deepcopy(model.config)
    for stack, _, layers, index in chosen:
        if sum(other.config == stack.config for other, _, _ in find_stacks(model, family_of(model)) or ()) > 1:
            _refuse_lists(_part(shorter, stack), stack, len(layers))
        _shorten(_part(shorter, stack), stack, len(layers), index)
    try:
        now, then = built_model(model, copy.deepcopy(model.config)), built_model(model, shorter)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StructureError(f"{type(model).__name__} cannot be built with fewer layers: {reason}") from None
    paths = {path: index for _, path, _, index in chosen}
    for path, index in paths.items():
        if len(then.get_submodule(path)) != len(index):  # type: ignore[arg-type]
            raise StructureError(f"{path}: the number of layers in the config does not decide how many there are")
        for new, old in enumerate(index):
            one, other = _built(now.get_submodule(f"{path}.{old}")), _built(then.get_submodule(f"{path}.{new}"))
            odd = next((key for key in [*one, *other] if one.get(key) != other.get(key)), None)
            if odd is not None:
                raise StructureError(
                    f"{path}.{old}: {odd.lstrip('.')} would be {other.get(odd, 'absent')} instead of {one.get(odd, 'absent')} "
                    f"in layer {new}: {type(model).__name__} builds this layer by its number, so keep layer {new} in place"
                )
    outside = [
        {n: p.shape for n, p in built.named_parameters() if not n.startswith(tuple(f"{path}." for path in paths))}
        for built in (now, then)
    ]
    odd = next((name for name in [*outside[0], *outside[1]] if outside[0].get(name) != outside[1].get(name)), None)
    if odd is not None:
        raise StructureError(f"{odd} depends on the number of layers, so none can be dropped")


def _built(layer: nn.Module) -> dict[str, Any]:
    """Everything about a layer that its construction decides: types, shapes, and plain values but for its number."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        if "droppath" in type(module).__name__.lower() or path.rpartition(".")[2] == "drop_path":
            continue  # its rate may grow from layer to layer, which matters in training only, and stays with the layer
        found[f"{path}."] = type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name in ("layer_idx", "training"):
                continue
            if value is None or isinstance(value, bool | int | float | str):
                found[f"{path}.{name}"] = value
    return found | {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def _own_configs(model: nn.Module, chosen: _Chosen) -> dict[str, list[Any]]:
    """Copies of the config that the modules around a stack hold (T5's encoder and decoder each have one)."""
    found: dict[str, list[Any]] = {}
    for stack, path, _, _ in chosen:
        parts = path.split(".")[:-1]
        around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
        configs = {id(module.config): module.config for module in around if getattr(module, "config", None) is not None}
        shared = {id(model.config), id(_part(model.config, stack))}
        found[stack.name] = [config for key, config in configs.items() if key not in shared]
    return found


def _shorten(config: Any, stack: Stack, layers: int, index: tuple[int, ...], *, is_own: bool = False) -> None:
    """Say in a config, in place, that a stack has only some of its layers, or some of them several times.

    A stack's own config calls their number `num_hidden_layers`, too.
    """
    forget_per_layer(config)
    for name in layer_lists(config, layers):
        values = getattr(config, name)
        setattr(config, name, type(values)(values[n] for n in index))
    _shorten_stages(config, layers, len(index))
    for key in dict.fromkeys((stack.layers_key, "num_hidden_layers") if is_own else (stack.layers_key,)):
        said = getattr(config, key, None)
        if isinstance(said, list | tuple):
            counts = list(said)
            counts[_stage(stack)] = len(index)
            setattr(config, key, type(said)(counts))
        elif said == layers:
            setattr(config, key, len(index))


def layer_lists(config: Any, layers: int) -> list[str]:
    """Names of the fields of a config with one entry per layer, for a number of layers."""
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == layers and "layer" in name
    ]


def _refuse_lists(config: Any, stack: Stack, layers: int) -> None:
    for name in layer_lists(config, layers):
        raise StructureError(
            f"{stack.name}: config.{name} has one entry per layer of an unknown stack; nothing was dropped"
        )


def _shorten_stages(config: Any, layers: int, left: int) -> None:
    """Name the layers anew in the configs of vision backbones, and take features from the last one if that was so."""
    names = getattr(config, "stage_names", None)
    if not isinstance(names, list | tuple) or len(names) != layers + 1:
        return
    if list(config.out_features) != [names[-1]]:
        raise StructureError(
            "config.out_features names layers inside the model; layers cannot be dropped from a backbone"
        )
    config.stage_names = [names[0], *(f"stage{number + 1}" for number in range(left))]
    config._out_features, config._out_indices = [names[left]], [left]


def _renumber(layer: nn.Module, number: int) -> None:
    """Give modules that write into a cache the number of their layer; stand-ins for skipped attention do, too."""
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = number  # type: ignore[assignment]


def _renamed(units: Mapping[str, Any], chosen: _Chosen) -> dict[str, Any]:
    """Units by the new numbers of their layers; decisions that all layers make together have no number."""
    renamed = {}
    for name, pair in units.items():
        for stack, _, _, index in chosen:
            number, dot, role = name.removeprefix(f"{stack.name}.").partition(".")
            if name.startswith(f"{stack.name}.") and dot and number.isdecimal():
                if int(number) in index:
                    renamed[f"{stack.name}.{index.index(int(number))}.{role}"] = pair
                break
        else:
            renamed[name] = pair
    return renamed
