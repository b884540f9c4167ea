"""What a model costs for every number of units in every site: parameters and floating-point operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hfcompress.anatomy import Site, find_layers, find_sites
from hfcompress.measurement.copies import Layer, cut_copy, find_layer_sites
from hfcompress.measurement.flops import count_flops
from hfcompress.measurement.latency import Scope
from hfcompress.measurement.size import count_parameters

Quantity = Literal["parameters", "flops", "latency_ms"]
ParameterScope = Literal["sites", "layers", "model"]


@dataclass(frozen=True)
class Costs:
    """What a model costs for each number of units in each site: rest + sum over layers of (fixed + its sites).

    Attributes:
        quantity: What is counted.
        rest: What no cut of units or layers changes, such as embeddings and head; 0 where they do not count.
        fixed: Layer name, such as "encoder.3", to what the layer costs when all its sites are empty: norms, residual
            sums, biases.
        sites: Site name to the cost with 0 ... all units, float64, shape (units + 1,); 0 with none, and never falling.
            A site that all layers of a stack share, such as "encoder.heads", costs what it does in all of them.

    Example:
        >>> heads, neurons = np.array([0.0, 5.0, 9.0]), np.array([0.0, 1.0, 2.0, 3.0])
        >>> costs = Costs("latency_ms", 10.0, {"encoder.0": 2.0}, {"encoder.0.heads": heads, "encoder.0.neurons": neurons})
        >>> costs.total({}), costs.total({"encoder.0.heads": 1}), costs.total({}, layers=[])
        (24.0, 20.0, 10.0)
    """

    quantity: Quantity
    rest: float
    fixed: Mapping[str, float]
    sites: Mapping[str, NDArray[np.float64]]

    def total(self, units: Mapping[str, int], *, layers: Collection[str] | None = None) -> float:
        """Cost of the model with other units and layers.

        Args:
            units: Site name to the number of units that stay; sites not named keep all.
            layers: Names of the layers that stay; None means all. Sites that all layers of a stack share then cost the
                share of the layers that are left.

        Returns:
            The cost, in the unit of `quantity`.

        Raises:
            ValueError: There is no such site or layer, or it does not have so many units.
        """
        unknown = sorted((set(units) - set(self.sites)) | (set(layers or ()) - set(self.fixed)))
        if unknown:
            raise ValueError(f"no site or layer {unknown[0]!r}; there are {', '.join((*self.sites, *self.fixed))}")
        kept = list(self.fixed) if layers is None else [name for name in self.fixed if name in set(layers)]
        total = self.rest + sum(self.fixed[name] for name in kept)
        for name, cost in self.sites.items():
            count = units.get(name, len(cost) - 1)
            if not 0 <= count < len(cost):
                raise ValueError(f"{name} has 0 to {len(cost) - 1} units, not {count}")
            total += float(cost[count]) * self._share(name, kept)
        return float(total)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        sites = {name: cost.tolist() for name, cost in self.sites.items()}
        return {"quantity": self.quantity, "rest": self.rest, "fixed": dict(self.fixed), "sites": sites}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Costs:
        """What `to_dict` wrote."""
        sites = {name: np.asarray(cost, dtype=np.float64) for name, cost in values["sites"].items()}
        return cls(values["quantity"], float(values["rest"]), dict(values["fixed"]), sites)

    def _share(self, site: str, kept: Sequence[str]) -> float:
        """How much of a site is left with some of the layers."""
        owner = site.rpartition(".")[0]
        if owner in self.fixed:
            return float(owner in kept)
        stack = [name for name in self.fixed if name.rpartition(".")[0] == owner]
        return sum(name in kept for name in stack) / len(stack)


def parameter_costs(model: nn.Module, *, scope: ParameterScope = "sites") -> Costs:
    """How many parameters go with each number of units.

    Args:
        model: A transformers model of a known architecture; it is not changed.
        scope: "sites": only the weights and biases of the units, what sparsity is counted in; "layers": all of the
            transformer layers, also norms and the biases of last projections; "model": everything, so that the total is
            that of `count_parameters` of the model that is really cut.

    Returns:
        The costs, with whole numbers.

    Raises:
        StructureError: The architecture is not known; or, unless the scope is "sites", a layer is quantized.
        ValueError: The scope is not known.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = BertModel(config)
        >>> parameter_costs(model).sites["encoder.0.heads"]
        array([  0., 140., 280.])
        >>> parameter_costs(model, scope="model").total({}) == count_parameters(model)
        True
    """
    if scope not in get_args(ParameterScope):
        raise ValueError(
            f"scope={scope!r} is not known; choose one of {', '.join(map(repr, get_args(ParameterScope)))}"
        )
    layers, sites = find_layer_sites(model), find_sites(model)
    if scope == "sites":
        lines = {site.name: _line(site.units, site.parameters_per_unit, site.parameters_per_unit) for site in sites}
        return Costs("parameters", 0.0, {layer.name: 0.0 for layer in layers}, lines)
    empty = cut_copy(model, [(layer, _none(layer)) for layer in layers])
    fixed = {
        layer.name: float(count_parameters(module)) for layer, module in zip(layers, find_layers(empty), strict=True)
    }
    first = _first_units(model, layers, sites, empty)
    lines = {site.name: _line(site.units, first[site.name], site.parameters_per_unit) for site in sites}
    rest = count_parameters(empty) - sum(fixed.values()) if scope == "model" else 0.0
    return Costs("parameters", rest, fixed, lines)


def flops_costs(model: nn.Module, inputs: Mapping[str, Any], *, scope: Scope = "layers") -> Costs:
    """How many floating-point operations of one forward pass go with each number of units.

    Counted as by `count_flops`, on copies with no, one and all units: what lies between is a straight line, because
    projections and attention do the same for each head, and for each neuron.

    Args:
        model: A transformers model of a known architecture, not quantized; it is not changed.
        inputs: Keyword arguments of its forward, such as those of `example_inputs`: they set batch and length.
        scope: "model", or "layers": without what is not in a transformer layer.

    Returns:
        The costs, with whole numbers.

    Raises:
        StructureError: The architecture is not known, or a layer is quantized.
        ValueError: The scope is not known.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.measurement import example_inputs
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
        >>> inputs = example_inputs(model, batch=1, length=4)
        >>> flops_costs(model, inputs).sites["encoder.0.neurons"][:3] == [0, 2 * 4 * 8 * 2, 2 * 2 * 4 * 8 * 2]
        array([ True,  True,  True])
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is not known; choose one of {', '.join(map(repr, get_args(Scope)))}")
    layers = find_layer_sites(model)
    firsts = first_of_shape(layers)
    base = [(layer, _none(layer)) for layer in firsts.values()]
    count_base = count_flops(cut_copy(model, base), inputs)
    fixed: dict[str, float] = {}
    lines: dict[str, NDArray[np.float64]] = {}
    for shape, members in by_shape(layers).items():

        def count_more(layer: Layer, units: Mapping[str, int]) -> int:
            """What one more such layer adds, which is the same in all layers of this stack that share a site."""
            shared = {role: units[role] for role, site in layer.sites.items() if site.layer is None}
            known = [(one, {**none, **(shared if one.stack == layer.stack else {})}) for one, none in base]
            before = count_flops(cut_copy(model, known), inputs) if any(shared.values()) else count_base
            return count_flops(cut_copy(model, [*known, (layer, units)]), inputs) - before

        empty = count_more(firsts[shape], _none(firsts[shape]))
        fixed.update({layer.name: float(empty) for layer in members})
        for role in firsts[shape].sites:
            largest = max(members, key=lambda layer: layer.sites[role].units)
            units = largest.sites[role].units
            counts = {count: count_more(largest, {**_none(largest), role: count}) - empty for count in {1, units} - {0}}
            one = counts.get(1, 0) if units else 0
            each = (counts[units] - one) / (units - 1) if units > 1 else 0
            for layer in members:
                site = layer.sites[role]
                line = _line(site.units, one, each)
                lines[site.name] = lines[site.name] + line if site.name in lines else line
    lines = {site.name: lines[site.name] for site in find_sites(model)}
    rest = count_flops(model, inputs) - Costs("flops", 0.0, fixed, lines).total({}) if scope == "model" else 0.0
    return Costs("flops", float(rest), {layer.name: fixed[layer.name] for layer in layers}, lines)


def by_shape(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The layers that are built alike, by their shape."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.shape, []).append(layer)
    return groups


def first_of_shape(layers: Sequence[Layer]) -> dict[str, Layer]:
    """The first layer of each shape; the first layers of all stacks are among them."""
    return {shape: members[0] for shape, members in by_shape(layers).items()}


def _none(layer: Layer) -> dict[str, int]:
    return dict.fromkeys(layer.sites, 0)


def _line(units: int, first: float, each: float) -> NDArray[np.float64]:
    """Cost of 0 ... `units` units: nothing, the first one, and each of the others."""
    return np.concatenate([[0.0], first + each * np.arange(units)])


def _first_units(
    model: nn.Module, layers: Sequence[Layer], sites: Sequence[Site], empty: nn.Module
) -> dict[str, float]:
    """Parameters that the first unit of each site brings: those of a unit, and what a sublayer has that is not empty."""
    before = [count_parameters(module) for module in find_layers(empty)]
    first = dict.fromkeys((site.name for site in sites), 0.0)
    for role in dict.fromkeys(role for layer in layers for role in layer.sites):
        own = [
            layer.sites[role].layer is not None and layer.sites[role].units > 0 if role in layer.sites else False
            for layer in layers
        ]
        if any(own):
            units = [_none(layer) | ({role: 1} if has else {}) for layer, has in zip(layers, own, strict=True)]
            one = cut_copy(model, list(zip(layers, units, strict=True)))
            after = [count_parameters(module) for module in find_layers(one)]
            for layer, has, more, less in zip(layers, own, after, before, strict=True):
                if has:
                    first[layer.sites[role].name] = float(more - less)
    for site in sites:
        if site.layer is None and site.units:
            units = [
                _none(layer) | {role: 1 for role, own_site in layer.sites.items() if own_site.name == site.name}
                for layer in layers
            ]
            one = cut_copy(model, list(zip(layers, units, strict=True)))
            first[site.name] = float(count_parameters(one) - count_parameters(empty))
    return first
