"""How wide the residual stream is to be: narrower copies of a model are made, and plans are tried on them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy import drop_layers, find_stream
from hfcompress.calibration import Batch, count_examples, divergence, prediction_mask, to_device
from hfcompress.config import PruneConfig
from hfcompress.measurement.costs import Costs
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.evidence import Reduce
from hfcompress.pruning.plan import Plan, cut
from hfcompress.pruning.ranking import rank_units
from hfcompress.pruning.repair import repair
from hfcompress.pruning.stream import stream_magnitude, stream_surgeon
from hfcompress.pruning.stream_repair import repair_stream

logger = logging.getLogger(__name__)

# What is tried beside the width there is: shares of the width before anything was pruned.
_SHARES = (0.875, 0.75, 0.625, 0.5)
# Of the calibration batches each so many-th is kept to compare predictions on; the others are fitted to.
_EVERY = 4
# Of these no more examples than so many (of each process), for all is done once for each width; what is chosen is fitted to all.
_EXAMPLES = 512


def rank_features(
    model: nn.Module, criterion: str, batches: Sequence[Batch], *, seed: int = 0, reduce: Reduce | None = None
) -> Curve:
    """The order in which hidden features go: by their weights, at random, or as `stream_surgeon` says.

    The criteria that look at weights (and "random") rank features as they rank units. All others look at examples or gradients, and for
    them there is one ranking: by what the layers that read a feature lose without it, once they are refitted.

    Args:
        model: The model; it is left as it was.
        criterion: A key of `CRITERIA`.
        batches: Calibration inputs; not looked at by the criteria that look at weights.
        seed: Of everything random.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> len(rank_features(model, "magnitude", []).kept(6))
        6
    """
    if criterion == "random":
        return Curve.from_scores(torch.rand(find_stream(model).width, generator=torch.Generator().manual_seed(seed)))
    if criterion.startswith("magnitude"):
        return Curve.from_scores(stream_magnitude(model))
    return stream_surgeon(model, batches, seed=seed, reduce=reduce)


def narrower_widths(width: int, before: int, config: PruneConfig) -> list[int]:
    """The widths below the present one that are tried, the widest first.

    Together with other units, shares of the width before anything was pruned; alone, every multiple, for then the width has to
    meet the target itself.

    Args:
        width: Features there are now.
        before: Features there were before anything was pruned.
        config: With multiples as numbers.

    Example:
        >>> config = PruneConfig(units=["heads", "hidden"], multiple_of={"neurons": 16, "hidden": 16})
        >>> narrower_widths(384, 384, config), narrower_widths(300, 384, config)
        ([336, 288, 240, 192], [288, 240, 192])
        >>> narrower_widths(64, 64, config.model_copy(update={"units": ["hidden"]}))
        [48, 32]
    """
    multiple = config.multiple_of.hidden
    assert multiple != "auto"
    least = config.at_least.hidden if config.at_least.hidden is not None else -(-before // 2)
    every = set(range(multiple, width, multiple))
    if set(config.units) - {"hidden", "vocabulary"}:
        every = {max(multiple, round(share * before / multiple) * multiple) for share in _SHARES}
    return sorted((count for count in every if least <= count < width), reverse=True)


@dataclass
class Narrowed:
    """A copy of a model with fewer hidden features.

    Attributes:
        features: Those that stay, ascending, counted in the model it is a copy of.
        model: The copy, repaired if that is asked for.
        loss: How far its predictions are from those of the original, on data that it was not fitted to, in nats per example.
    """

    features: tuple[int, ...]
    model: nn.Module
    loss: float


class Widths:
    """Narrower copies of one model, each made once.

    Args:
        model: The model, in evaluation mode; it is not changed, and may not be changed elsewhere.
        config: What is pruned, with multiples as numbers.
        batches: Calibration inputs.
        repairs: Whether what stays is refitted.
        seed: Of everything random.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process.
        once: Runs a function on the first process and gives its result to all; None for one process.
        collected: What training gathered; see `rank_units`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = BertForSequenceClassification(config).eval()
        >>> batches = [{"input_ids": torch.randint(5, 99, (4, 9))} for _ in range(4)]
        >>> config = PruneConfig(units=["neurons", "hidden"], multiple_of={"neurons": 1, "hidden": 2})
        >>> widths = Widths(model, config, batches, repairs=True)
        >>> widths.at(8).loss > widths.at(16).loss == 0.0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        batches: Sequence[Batch],
        *,
        repairs: bool,
        seed: int = 0,
        reduce: Reduce | None = None,
        once: Callable[[Callable[[], Any]], Any] | None = None,
        collected: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.seed = seed
        self.width = find_stream(model).width
        self.costs: dict[int, Costs] = {}
        self._repairs, self._reduce, self._collected = repairs, reduce, collected
        self._once = once or (lambda function: function())
        # What predictions are compared on must not be what they were fitted to, as far as there is enough.
        self._held = batches[_EVERY - 1 :: _EVERY] or batches
        others = [batch for n, batch in enumerate(batches) if n % _EVERY != _EVERY - 1]
        count = sum(count_examples(to_device(batch, model)) for batch in others)
        self._fitted = others[:: -(-count // _EXAMPLES)]
        self._batches = batches
        self._made: dict[int, Narrowed] = {}
        self._curves: dict[int, dict[str, Curve]] = {}
        self._ranking: Curve | None = None

    def features(self, width: int) -> tuple[int, ...]:
        """The features that stay if so many do."""
        if self._ranking is None:
            ranking = rank_features(
                self.model, self.config.criterion.name, self._batches, seed=self.seed, reduce=self._reduce
            )
            self._ranking = self._once(lambda: ranking)
        assert self._ranking is not None
        return self._ranking.kept(width)

    def at(self, width: int) -> Narrowed:
        """The copy of a width; of the full width the model itself."""
        if width not in self._made:
            if width == self.width:
                self._made[width] = Narrowed(tuple(range(width)), self.model, 0.0)
            else:
                features = self.features(width)
                model = copy.deepcopy(self.model)
                cut(model, Plan({}, hidden=features))
                if self._repairs:
                    repair_stream(model, self.model, torch.tensor(features), self._fitted, reduce=self._reduce)
                self._made[width] = Narrowed(features, model, self._loss(model))
        return self._made[width]

    def curves(self, width: int) -> dict[str, Curve]:
        """The curves of the units in the copy of a width."""
        if width not in self._curves:
            curves = rank_units(
                self.at(width).model,
                self.config.criterion.name,
                self._fitted,
                seed=self.seed,
                collected=self._collected,
                reduce=self._reduce,
            )
            self._curves[width] = self._once(lambda: curves)
        return self._curves[width]

    def loss_of(self, width: int, plan: Plan) -> float:
        """How far predictions are from the original's, in nats per example, with a plan carried out in the copy of a width."""
        before = self.at(width).model
        model = copy.deepcopy(before)
        cut(model, plan)
        if self._repairs:
            dense = copy.deepcopy(before) if plan.layers else before
            if plan.layers:
                drop_layers(dense, plan.layers)
            repair(model, dense, self._fitted, reduce=self._reduce)
        return self._loss(model)

    def _loss(self, model: nn.Module) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
        with torch.no_grad():
            for batch in self._held:
                inputs = to_device(batch, model)
                whole = self.model(**inputs)
                lost = divergence(
                    whole,
                    model(**inputs),
                    mask=prediction_mask(whole, inputs),
                    problem_type=getattr(model.config, "problem_type", None),
                )
                sums += torch.stack([lost.double(), torch.tensor(count_examples(inputs), device=lost.device)])
        if self._reduce is not None:
            self._reduce(sums)
        return max(float(sums[0] / sums[1]), 0.0)
