"""Copies of a model with fewer units and layers, which share its weights: what costs are counted and timed on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from hfcompress.anatomy import Site, StructureError, family_of, find_sites, keep_units
from hfcompress.anatomy.sites import find_stacks

_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Layer:
    """A transformer layer and its sites.

    Attributes:
        name: Stack and index, such as "encoder.3": the names of its own sites without their last part.
        stack: Name of its stack, such as "encoder".
        number: Index in its stack, from 0.
        sites: Its sites by role, the last part of their names; also what all layers of the stack decide together.
        shape: What it is built like whatever number of units it has: layers with the same shape cost the same.
    """

    name: str
    stack: str
    number: int
    sites: Mapping[str, Site]
    shape: str


def find_layer_sites(model: nn.Module) -> list[Layer]:
    """The transformer layers of a model with their sites, in forward order.

    Args:
        model: A transformers model of a known architecture.

    Returns:
        The layers of all stacks.

    Raises:
        StructureError: The architecture is not known, or is not built as its family says.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
        >>> layers = find_layer_sites(model)
        >>> [(layer.name, list(layer.sites)) for layer in layers], layers[0].shape == layers[1].shape
        ([('encoder.0', ['heads', 'neurons']), ('encoder.1', ['heads', 'neurons'])], True)
    """
    sites = find_sites(model)
    layers = []
    for stack, _, modules in _stacks(model):
        for number, module in enumerate(modules):
            own = {_role(site): site for site in sites if site.stack == stack and site.layer in (number, None)}
            layers.append(Layer(f"{stack}.{number}", stack, number, own, _shape(stack, module, own)))
    return layers


def cut_copy(model: nn.Module, layers: Sequence[tuple[Layer, Mapping[str, int]]]) -> nn.Module:
    """A copy of a model that has only some layers, with fewer units, and takes no memory for weights.

    Weights that are not cut are the model's own. One that is cut is a view of the first numbers of the original,
    contiguous and in the shape that it would have: its values are out of place, so the copy computes nothing of use,
    but it takes as long and has as many parameters as a model that is really cut.

    Args:
        model: A transformers model, not quantized; neither it nor its weights are changed, but writing to the copy's
            weights would change them.
        layers: The layers of the copy (from `find_layer_sites` of this model), by stack in their order there, each
            with the units it is to have by role; roles not named stay as they are. A layer may be there twice. A stack
            whose layers decide something together needs its first layer, which makes the position bias of all.

    Returns:
        The copy, in evaluation mode, without hooks; its weights need no gradients.

    Raises:
        StructureError: There are fewer units than asked for, or a layer is quantized.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
        >>> first, _ = find_layer_sites(model)
        >>> small = cut_copy(model, [(first, {"neurons": 4}), (first, {"heads": 0})])
        >>> [(site.name, site.units) for site in find_sites(small)][1:3]
        [('encoder.0.neurons', 4), ('encoder.1.heads', 0)]
    """
    origin: dict[int, nn.Parameter] = {}  # by the id of the shape that stands for it
    shapes: list[nn.Parameter] = []  # kept, so that no id is used twice
    memo = _memo(model, origin, shapes)
    stacks = _stacks(model)
    for _, _, modules in stacks:
        memo.update({id(module): nn.Identity() for module in modules})
    duplicate = copy.deepcopy(model, memo)
    for stack, path, modules in stacks:
        numbers = [layer.number for layer, _ in layers if layer.stack == stack]
        chosen = [_copy_layer(modules[index], memo) for index in numbers]  # they share one copy of the config
        parent, _, child = path.rpartition(".")
        setattr(duplicate.get_submodule(parent), child, nn.ModuleList(chosen))
        _renumber(duplicate, chosen, numbers, before=len(modules))
    remove_hook_from_module(duplicate, recurse=True)  # of a device map: it would move tensors to other devices
    names = [stack for stack, _, _ in stacks]
    ordered = sorted(layers, key=lambda pair: names.index(pair[0].stack))
    keep = {}
    for present, (layer, units) in zip(find_layer_sites(duplicate), ordered, strict=True):
        for role, count in units.items():
            if not 0 <= count <= layer.sites[role].units:
                raise StructureError(f"{layer.sites[role].name} has {layer.sites[role].units} units, not {count}")
            keep[present.sites[role].name] = torch.arange(count)
    for change in keep_units(duplicate, find_sites(duplicate), keep):
        if change.new is not None:
            origin[id(change.new)] = origin[id(change.old)]
            shapes.append(change.new)
    _share(duplicate, origin)
    return duplicate.eval()


def _stacks(model: nn.Module) -> list[tuple[str, str, nn.ModuleList]]:
    """Name, path and layers of each stack."""
    stacks = find_stacks(model, family_of(model))
    if stacks is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    return [(stack.name, path, modules) for stack, path, modules in stacks]


def _role(site: Site) -> str:
    return site.name.rpartition(".")[2]


def _shape(stack: str, module: nn.Module, sites: Mapping[str, Site]) -> str:
    parts = [f"{stack} {type(module).__name__}"]
    # Layers of one class may see different positions, and cost differently.
    parts += [str(kind) for kind in (getattr(module, "attention_type", None), _window(module)) if kind is not None]
    for role, site in sites.items():
        size = f"{site.hidden} x {site.width}" if site.layer is None else f"{site.parameters_per_unit} parameters"
        parts.append(f"{role} of {size}, {site.query_heads} queries")
    return "; ".join(parts)


def _window(module: nn.Module) -> object:
    return getattr(getattr(module, "self_attn", None), "sliding_window", None)


def _memo(model: nn.Module, origin: dict[int, nn.Parameter], shapes: list[nn.Parameter]) -> dict[int, Any]:
    """What `copy.deepcopy` is to take instead of copying: no weights, tensors as they are, no hooks."""
    memo = _no_hooks(model)
    for module in model.modules():
        for value in vars(module).values():
            if torch.is_tensor(value):
                memo[id(value)] = value
        memo.update({id(buffer): buffer for buffer in module.buffers(recurse=False)})
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in memo:
                shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                memo[id(parameter)] = nn.Parameter(shape, requires_grad=False)
                shapes.append(memo[id(parameter)])
                origin[id(memo[id(parameter)])] = parameter
    return memo


def _no_hooks(module: nn.Module) -> dict[int, Any]:
    """They belong to who set them, and may hold tensors or a whole trainer."""
    attributes = [pair for part in module.modules() for pair in vars(part).items()]
    return {id(value): type(value)() for name, value in attributes if name.endswith("_hooks")}


def _copy_layer(layer: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """One more copy, with hooks of its own."""
    own = {**memo, **_no_hooks(layer)}
    del own[id(layer)]
    return copy.deepcopy(layer, own)


def _renumber(model: nn.Module, layers: Sequence[nn.Module], numbers: Sequence[int], *, before: int) -> None:
    """Caches have as many places as there are layers, and masks are looked up by the place of a layer."""
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place
    config: Any = model.config
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == before:
        config.layer_types = [kinds[number] for number in numbers]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for name in _COUNTS:  # some run, or cache, no more layers than so many
            if getattr(config, name, None) == before < len(layers):
                setattr(config, name, len(layers))


def _share(model: nn.Module, origin: Mapping[int, nn.Parameter]) -> None:
    """Put the original's numbers where the shapes stand."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, shape in list(module.named_parameters(recurse=False)):
            if id(shape) not in filled:
                values = origin[id(shape)].detach()
                if values.shape != shape.shape:
                    values = values.reshape(-1)[: shape.numel()].view(shape.shape)
                filled[id(shape)] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, filled[id(shape)])
