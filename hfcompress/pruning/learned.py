"""Gates that are learned: each unit, and each sublayer, is open with a probability that training finds out.

Hard-concrete gates (Louizos et al. 2018) on heads, neurons and sublayers at once (CoFi: Xia et al. 2022, section 3), held at a
target cost by an augmented Lagrangian (Wang et al. 2020, section 3). The cost is that of the budget, whatever it is counted in: it is
read off the same table that decides in the end what stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from hfcompress.anatomy import Site
from hfcompress.config import PruneConfig
from hfcompress.measurement.costs import Costs
from hfcompress.pruning.allocation import counts_allowed
from hfcompress.pruning.curves import Curve

# Temperature, and the interval that the concrete distribution is stretched to (Louizos et al. 2018, section 4.1).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
# All gates start with P(open) = 0.99, and four of five samples are 1: the model is nearly the one that was trained so far.
_START = 3.0
# Of gates that are fully open, or fully closed, those that are so with a higher probability are kept.
_TIE = 1e-3
# The multipliers go slower than the gates, which lag behind them, and without momentum, so that they turn as soon as the cost passes
# the target: otherwise they close more than was asked for before they are back.
_MULTIPLIER_PACE, _MULTIPLIER_BETAS = 0.3, (0.0, 0.999)
# Keeps noise away from 0 and 1, where its logarithm is infinite.
_EDGE = 1e-6


def hard_concrete_sample(log_alpha: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gates drawn from the hard-concrete distribution (Louizos et al. 2018, equations 10 and 11).

    Args:
        log_alpha: Where the distribution lies, any float; 0 is as often above 1/2 as below.
        noise: Uniform in (0, 1), of the same shape.

    Returns:
        Gates in [0, 1], with a gradient to `log_alpha` where they are strictly between.

    Example:
        >>> gates = hard_concrete_sample(torch.tensor([0.0, 3.0, -3.0]), torch.full((3,), 0.5))
        >>> [round(gate, 4) for gate in gates.tolist()]  # 1.2 * sigmoid(3 / (2/3)) - 0.1 is above 1
        [0.5, 1.0, 0.0]
    """
    concrete = torch.sigmoid((torch.log(noise) - torch.log1p(-noise) + log_alpha) / BETA)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def hard_concrete_mean(log_alpha: torch.Tensor) -> torch.Tensor:
    """The gates of evaluation, without noise (Louizos et al. 2018, equation 13).

    Example:
        >>> [round(gate, 4) for gate in hard_concrete_mean(torch.tensor([-2.5, 0.0, 1.0, 2.5])).tolist()]
        [0.0, 0.5, 0.7773, 1.0]
    """
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(log_alpha: torch.Tensor) -> torch.Tensor:
    """Probability that a drawn gate is not 0 (Louizos et al. 2018, equation 12).

    Example:
        >>> round(probability_open(torch.tensor(0.0)).item(), 4)  # 1 / (1 + 11^(-2/3))
        0.8318
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


class LearnedGates:
    """Learned gates on the sites of a model.

    In training mode a gate multiplies what its unit feeds into the reader by a sample, in eval mode by the gate without noise. A sample
    is drawn once per optimizer step, from the seed and the number of the step: so it is the same for all accumulated batches
    and on all processes (whose gradients with respect to it can then be averaged, as those of weights are), it leaves torch's own
    random numbers alone, and a run that is resumed draws it again.

    The gates are no parameters of the model: optimizers, DistributedDataParallel and checkpoints do not see them. They have an
    optimizer of their own, which descends on the gates and ascends on the multipliers. They live on the CPU, for they are few.

    Args:
        model: The model, not wrapped.
        sites: Its sites.
        costs: What each site costs with each number of units.
        config: Which units may go, the counts that may be left (no "auto" among them), and the learning rate of the gates.
        seed: Of the noise.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> from hfcompress.measurement.costs import parameter_costs
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
        >>> config = PruneConfig(criterion="learned", multiple_of={"neurons": 4}, at_least={"neurons": 4})
        >>> gates = LearnedGates(model, find_sites(model), parameter_costs(model), config)
        >>> [round(units, 2) for units in gates.expected_units().values()]  # of 2 heads and 16 neurons
        [1.98, 15.84]
        >>> for step in range(200):
        ...     gates.update(target=gates.dense / 2)
        ...     gates.sample(step + 1)
        >>> bool(abs(gates.expected_cost() / gates.dense - 0.5) < 0.1)
        True
        >>> gates.remove()
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], costs: Costs, config: PruneConfig, *, seed: int = 0
    ) -> None:
        self.sites = {site.name: site for site in sites if site.units}
        self.costs = costs
        self.dense = costs.total({site.name: site.units for site in sites})
        self.log_alpha = {
            name: nn.Parameter(torch.full((site.units,), _START))
            for name, site in self.sites.items()
            if site.kind in config.units
        }
        whole = "sublayers" in config.units
        self.sublayer_log_alpha = {name: nn.Parameter(torch.tensor(_START)) for name in self.sites if whole}
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.values: dict[str, torch.Tensor] = {}
        self._prunable = sum(float(costs.sites[name][site.units]) for name, site in self.sites.items()) or 1.0
        self._lines = {name: self._line(site, config) for name, site in self.sites.items()}
        self._seed = seed
        self._noise: dict[str, torch.Tensor] = {}
        self._means: dict[str, torch.Tensor] = {}
        self._gradient: torch.Tensor | None = None
        # The smallest gradients belong to gates that are almost surely open; epsilon must not hold these back.
        rate = config.criterion.gate_learning_rate
        ascent = {
            "params": [self.multipliers],
            "lr": rate * _MULTIPLIER_PACE,
            "betas": _MULTIPLIER_BETAS,
            "maximize": True,
        }
        self.optimizer = torch.optim.AdamW(
            [{"params": self._gate_parameters()}, ascent], lr=rate, weight_decay=0.0, eps=1e-12
        )
        self._readers = {
            name: list(dict.fromkeys(model.get_submodule(path) for path in site.readers))
            for name, site in self.sites.items()
        }
        self._handles = [
            reader.register_forward_pre_hook(self._hook(name, self.sites[name].width))
            for name, readers in self._readers.items()
            for reader in readers
        ]
        self.sample(0)

    def _gate_parameters(self) -> list[nn.Parameter]:
        return [*self.log_alpha.values(), *self.sublayer_log_alpha.values()]

    def _hook(self, name: str, width: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def multiply(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            features, *rest = args
            gate = (self.values if module.training else self._means)[name].to(features.device)
            gate = gate[:, None].expand(-1, width).reshape(-1)
            # In float32, because the gradient of a gate is a sum over all tokens.
            return ((features * gate).to(features.dtype), *rest)

        return multiply

    # ---- gates ----

    def sample(self, step: int) -> None:
        """Draw the gates for the next optimizer step.

        Args:
            step: Optimizer steps done so far; the same step gives the same noise.
        """
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) % 2**63)
        self._noise = {
            name: torch.rand(site.units + 1, generator=generator).clamp(_EDGE, 1 - _EDGE)
            for name, site in self.sites.items()
        }
        self._gradient = None
        with torch.no_grad():
            for name in self.sites:
                device = self._device(name)
                # A leaf, whose gradients of all accumulated batches add up; the same tensor at every step.
                value, mean = self._sampled(name).to(device), self.mean(name).to(device)
                self.values.setdefault(name, value.clone().requires_grad_()).copy_(value)
                self._means.setdefault(name, mean).copy_(mean)
                self.values[name].grad = None

    def _device(self, name: str) -> torch.device:
        return self._readers[name][0].weight.device  # type: ignore[return-value, union-attr]

    def _sampled(self, name: str) -> torch.Tensor:
        """The drawn gates of a site, float32, shape (units,), with a gradient to what is learned."""
        noise = self._noise[name]
        gates = torch.ones(self.sites[name].units)
        if name in self.log_alpha:
            gates = gates * hard_concrete_sample(self.log_alpha[name], noise[:-1])
        if name in self.sublayer_log_alpha:
            gates = gates * hard_concrete_sample(self.sublayer_log_alpha[name], noise[-1])
        return gates

    def mean(self, name: str) -> torch.Tensor:
        """The gates of a site in evaluation, float32, shape (units,), on the CPU; the sublayer's is multiplied in."""
        gates = torch.ones(self.sites[name].units)
        if name in self.log_alpha:
            gates = gates * hard_concrete_mean(self.log_alpha[name].detach())
        if name in self.sublayer_log_alpha:
            gates = gates * hard_concrete_mean(self.sublayer_log_alpha[name].detach())
        return gates

    def open_units(self, name: str) -> torch.Tensor:
        """Indices of the units that are open in evaluation, int64, ascending, on the CPU."""
        return (self.mean(name) != 0).nonzero().flatten()

    # ---- cost ----

    def _line(self, site: Site, config: PruneConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts that a site may be left with, ascending, and what it costs with them; without units there is nothing to choose."""
        counts = [site.units]
        if site.kind in config.units:
            multiple_of, at_least = getattr(config.multiple_of, site.kind), getattr(config.at_least, site.kind)
            counts = counts_allowed(site.units, multiple_of=multiple_of, at_least=at_least)[::-1]
        cost = np.asarray(self.costs.sites[site.name], dtype=np.float64)[counts]
        return torch.tensor(counts, dtype=torch.float64), torch.from_numpy(cost)

    def expected_units(self) -> dict[str, float]:
        """Site name to the expected number of open units."""
        found = {}
        for name in self.sites:
            whole = self._probability(self.sublayer_log_alpha.get(name))
            found[name] = float(self._units(name).detach() * whole.detach())
        return found

    def _units(self, name: str) -> torch.Tensor:
        """Expected number of open units of a site whose sublayer is there, float64."""
        if name not in self.log_alpha:
            return torch.tensor(float(self.sites[name].units), dtype=torch.float64)
        return probability_open(self.log_alpha[name].double()).sum()

    @staticmethod
    def _probability(log_alpha: torch.Tensor | None) -> torch.Tensor:
        return torch.ones((), dtype=torch.float64) if log_alpha is None else probability_open(log_alpha.double())

    def expected_cost(self) -> torch.Tensor:
        """What the model is expected to cost, in the unit of the costs: a scalar, float64, with a gradient to what is learned.

        Of each site: the cost of the expected number of open units, a straight line between the counts that may be left (and no less
        than with the fewest of them), times the probability that the sublayer is there.
        """
        total = torch.tensor(self.costs.rest + sum(self.costs.fixed.values()), dtype=torch.float64)
        for name, (counts, costs) in self._lines.items():
            total = total + self._probability(self.sublayer_log_alpha.get(name)) * _interpolate(
                self._units(name), counts, costs
            )
        return total

    def penalty(self, target: float) -> torch.Tensor:
        """lambda1 (c - t) + lambda2 (c - t)^2 (Wang et al. 2020, equation 6), with c - t as a share of what all sites cost.

        For each site whose units are expected to be fewer than have to stay, the share that is lacking is added: there the
        cost is flat, and what has to stay anyway should be open.

        Args:
            target: What the model is to cost.

        Returns:
            A scalar, float64; training descends on it with the gates and ascends with the two multipliers.
        """
        over = (self.expected_cost() - target) / self._prunable
        short = torch.zeros((), dtype=torch.float64)
        for name in self.log_alpha:
            least = self._lines[name][0][0]
            if least > 0:
                short = short + torch.relu(1 - self._units(name) / least)
        return self.multipliers[0] * over + self.multipliers[1] * over.square() + short

    # ---- learning ----

    def take_gradients(self, *, scale: float = 1.0, mean: Callable[[torch.Tensor], None] | None = None) -> None:
        """Take what the backward passes of an optimizer step left on the gates.

        Args:
            scale: What the loss was multiplied by for mixed precision.
            mean: Takes the mean of a tensor over all processes, in place; None for one process.
        """
        device = self._device(next(iter(self.sites)))
        parts = []
        for value in self.values.values():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            parts.append(gradient.detach().to(device))
            value.grad = None
        gradient = torch.cat(parts)
        if mean is not None:
            mean(gradient)
        self._gradient = gradient.cpu() / scale

    def update(self, target: float) -> None:
        """One step of the gates and the multipliers, with the gradients taken since the last sample and those of the penalty.

        A step whose gradients overflowed is left out.

        Args:
            target: What the model is to cost.
        """
        loss = self.penalty(target)
        if self._gradient is not None:
            if not bool(self._gradient.isfinite().all()):
                return
            sampled = torch.cat([self._sampled(name) for name in self.sites])
            loss = loss + (self._gradient * sampled).sum()  # the chain rule, from the drawn gates on
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    # ---- the end ----

    def curves(self) -> dict[str, Curve]:
        """The curve of every site: a unit is worth its cost (in the mean of its site) times how far it is open."""
        curves = {}
        for name, site in self.sites.items():
            probability = torch.ones(site.units, dtype=torch.float64)
            if name in self.log_alpha:
                probability = probability_open(self.log_alpha[name].detach().double())
            probability = probability * self._probability(self.sublayer_log_alpha.get(name)).detach()
            cost = float(self.costs.sites[name][site.units]) / site.units
            curves[name] = Curve.from_scores((self.mean(name).double() + _TIE * probability) * cost)
        return curves

    def fold(self) -> None:
        """Multiply the readers' weights by the gates of evaluation, in place, and take the gates off: a cut may follow."""
        self.remove()
        for name, site in self.sites.items():
            gate = self.mean(name).repeat_interleave(site.width)
            for reader in self._readers[name]:
                weight: nn.Parameter = reader.weight  # type: ignore[assignment]
                # A linear layer keeps input features in columns, transformers' Conv1D in rows.
                shaped = gate if isinstance(reader, nn.Linear) else gate[:, None]
                with torch.no_grad():
                    weight.mul_(shaped.to(weight.device))

    def remove(self) -> None:
        """Take the gates off the model; what they closed counts again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- checkpoints ----

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a run needs to go on exactly, the noise aside, which follows from seed and step."""
        tensors = {f"log_alpha.{name}": value for name, value in self.log_alpha.items()}
        tensors |= {f"sublayer.{name}": value for name, value in self.sublayer_log_alpha.items()}
        tensors["multipliers"] = self.multipliers
        for number, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in kept.items()}
        return {name: value.detach().clone() for name, value in tensors.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor], *, step: int) -> None:
        """Go on from what `state` returned, with the sample that follows after so many optimizer steps."""
        named = {f"log_alpha.{name}": value for name, value in self.log_alpha.items()}
        named |= {f"sublayer.{name}": value for name, value in self.sublayer_log_alpha.items()}
        named["multipliers"] = self.multipliers
        kept: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for name, value in named.items():
                value.copy_(tensors[name])
        for name, value in tensors.items():
            first, _, rest = name.partition(".")
            if first == "optimizer":
                number, _, key = rest.partition(".")
                kept.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})
        self.sample(step)


def _interpolate(x: torch.Tensor, knots: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The value at x of the straight lines between knots, which ascend; beyond the ends that of the end."""
    x = torch.minimum(torch.maximum(x, knots[0]), knots[-1])
    if len(knots) == 1:
        return values[0]
    place = int(torch.searchsorted(knots, x.detach(), right=True).clamp(1, len(knots) - 1))
    slope = (values[place] - values[place - 1]) / (knots[place] - knots[place - 1])
    return values[place - 1] + (x - knots[place - 1]) * slope
