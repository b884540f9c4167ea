"""What each site costs when it has fewer units, measured one site at a time before anything is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hfcompress.anatomy import StructureError, find_sites
from hfcompress.anatomy.depth import droppable_layers
from hfcompress.calibration import Batch, count_examples, divergence, frozen, prediction_mask, to_device
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.gates import Gates
from hfcompress.pruning.ranking import block_influence, layer_losses

SHARES = (0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Sensitivity:
    """What a site costs with fewer units, all others being whole.

    Attributes:
        site: Its name.
        units: Units there are.
        left: Units left at each point, falling.
        divergence: Mean Kullback-Leibler divergence from the model as it is, in nats per example, at each point, without
            repair. For a model without a head: half the mean squared distance of the hidden states per example.
        expected: What the criterion's curve expects there (with repair, for obs), in its own unit.
    """

    site: str
    units: int
    left: tuple[int, ...]
    divergence: tuple[float, ...]
    expected: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


@dataclass(frozen=True)
class LayerSensitivity:
    """What a whole layer is worth, all others being there.

    Attributes:
        layer: Its name.
        divergence: Of the predictions without it, as in `Sensitivity`.
        influence: How much it turns the hidden states; see `block_influence`.
    """

    layer: str
    divergence: float
    influence: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return dict(vars(self))


def measure_layers(model: nn.Module, batches: Sequence[Batch]) -> list[LayerSensitivity]:
    """Leave out one layer at a time and see what that does to the predictions.

    Args:
        model: The model; it is left as it was.
        batches: Calibration inputs.

    Returns:
        One entry per layer that could be dropped, in forward order.

    Raises:
        ValueError: There is no data.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> [entry.layer for entry in measure_layers(model, [{"input_ids": torch.randint(30, (4, 6))}])]
        ['encoder.0', 'encoder.1']
    """
    try:
        can_go = droppable_layers(model)
    except StructureError:
        return []
    if not can_go:
        return []
    losses, influence = layer_losses(model, batches), block_influence(model, batches)
    return [LayerSensitivity(name, loss, influence.get(name, 0.0)) for name, loss in losses.items() if name in can_go]


def measure_sensitivity(
    model: nn.Module, batches: Sequence[Batch], curves: Mapping[str, Curve], *, shares: Sequence[float] = SHARES
) -> list[Sensitivity]:
    """Close the least important units of one site at a time and see what that does to the predictions.

    Args:
        model: The model; it is left as it was.
        batches: Calibration inputs.
        curves: In which order the units of each site go, from `rank_units`.
        shares: Of the units that are left, each in [0, 1); counts are rounded down.

    Returns:
        One entry per site with units, in the order of the layers.

    Raises:
        ValueError: There is no data.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> curves = {site.name: Curve.from_scores(torch.rand(site.units)) for site in find_sites(model)}
        >>> found = measure_sensitivity(model, [{"input_ids": torch.randint(30, (4, 6))}], curves, shares=(0.5, 0.0))
        >>> [(entry.site, entry.left) for entry in found]
        [('encoder.0.heads', (1, 0)), ('encoder.0.neurons', (4, 0))]
    """
    if not batches:
        raise ValueError("there is no calibration data; pass at least one batch")
    sites = [site for site in find_sites(model) if site.units]
    points = {
        site.name: tuple(dict.fromkeys(math.floor(share * site.units + 1e-9) for share in shares)) for site in sites
    }
    found: dict[str, list[float]] = {site.name: [0.0] * len(points[site.name]) for site in sites}
    examples, problem_type = 0, getattr(model.config, "problem_type", None)
    rounds = sum(len(p) for p in points.values()) * len(batches)
    with frozen(model), torch.no_grad(), tqdm(total=rounds, desc="sensitivity", leave=False, delay=2) as bar:
        for batch in batches:
            inputs = to_device(batch, model)
            examples += count_examples(inputs)
            before = model(**inputs)
            mask = prediction_mask(before, inputs)
            for site in sites:
                for place, left in enumerate(points[site.name]):
                    gates = Gates(model, [site])
                    gates.close({site.name: curves[site.name].order[: site.units - left].tolist()})
                    after = model(**inputs)
                    gates.remove()
                    lost = divergence(before, after, mask=mask, problem_type=problem_type)
                    found[site.name][place] += max(0.0, float(lost))
                    bar.update()
    return [
        Sensitivity(
            site.name,
            site.units,
            points[site.name],
            tuple(value / examples for value in found[site.name]),
            tuple(float(curves[site.name].loss[site.units - left]) for left in points[site.name]),
        )
        for site in sites
    ]
