"""Gradual pruning of one model: collect importance, renew the plan when it is due, close gates, cut."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy import Change, Site, family_of, find_sites, uniform_config
from hfcompress.config import PruneConfig
from hfcompress.pruning.allocation import BudgetError, allocate, counts_allowed
from hfcompress.pruning.criteria import CRITERIA, Evidence
from hfcompress.pruning.gates import Gates, gate_gradients
from hfcompress.pruning.plan import Plan, cut, original_units
from hfcompress.pruning.schedules import make_schedule, update_steps

logger = logging.getLogger(__name__)

# After each update the importance collected so far counts half: the average spans about two intervals of the schedule.
_MEMORY = 0.5


class Pruner:
    """Prunes a model while somebody else trains it.

    The owner calls `collect` after each backward pass and `step` after each optimizer step. What is closed stays closed.

    Args:
        model: The model, not wrapped.
        config: What to remove, how much, when.
        total_steps: Optimizer steps of the run, at least 1.
        seed: For the criterion "random".
        agree: Makes a tensor the same on all processes, in place (broadcast from the first); None for one process.

    Raises:
        BudgetError: The target cannot be reached under the recipe's constraints.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
        >>> config = PruneConfig(criterion="magnitude", target={"sparsity": 0.5}, schedule={"name": "constant", "start": 0.0})
        >>> pruner = Pruner(model, config, total_steps=10)
        >>> changes = pruner.step(0)
        >>> pruner.done, 0.5 <= pruner.sparsity() < 0.6
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        *,
        total_steps: int,
        seed: int = 0,
        agree: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        self.original = original_units(model)
        self.sites = find_sites(model)
        self.gates: Gates | None = None
        self._agree = agree
        self._schedule = make_schedule(config.schedule)
        self._due = update_steps(config.schedule, total_steps)
        self._importance: dict[str, torch.Tensor] = {}
        self._collected = 0.0
        self._last_step = -1
        self._dense = self._parameters(self.sites, self.original)
        self._permitted = self._uniform_counts() if config.uniform else None
        # What cannot be reached is said now, not after most of the training.
        self._allocate({site.name: torch.zeros(site.units) for site in self.sites}, config.target.sparsity)

    def _uniform_counts(self) -> dict[str, set[int]]:
        """The counts per kind that the plain config of the architecture can say.

        Raises:
            BudgetError: There are none but the full count for any of the kinds asked for.
        """
        heads = next(site for site in self.sites if site.kind == "heads")
        neurons = next(site for site in self.sites if site.kind == "neurons")
        config, family = self.model.config, family_of(self.model)
        counts: dict[str, set[int]] = {"heads": set(), "neurons": set()}
        for site, pair in ((heads, lambda n: (n, neurons.units)), (neurons, lambda n: (heads.units, n))):
            for count in counts_allowed(
                site.units, multiple_of=getattr(self.config.multiple_of, site.kind), at_least=1
            ):
                if uniform_config(config, family, heads=heads, neurons=neurons, units=pair(count)) is not None:
                    counts[site.kind].add(count)
        stuck = [kind for kind in self.config.units if len(counts[kind]) < 2]
        if stuck:
            message = (
                f"uniform: the plain config of {config.model_type} cannot say that {' or '.join(stuck)} are missing"
            )
            if len(stuck) == len(self.config.units):
                raise BudgetError(f"{message}; prune something else, or leave out uniform")
            logger.info("%s, so these stay", message)
        return counts

    @staticmethod
    def _parameters(sites: list[Site], units: dict[str, int]) -> int:
        return sum(site.parameters_per_unit * units[site.name] for site in sites)

    @property
    def done(self) -> bool:
        """Whether the last update was made and everything closed was cut."""
        return self._last_step >= self._due[-1] and self.gates is None

    def sparsity(self) -> float:
        """Share of the prunable parameters of the dense model that is closed or gone, in [0, 1)."""
        sites = find_sites(self.model)
        return 1.0 - self._parameters(sites, self._open_units(sites)) / self._dense

    def _open_units(self, sites: list[Site]) -> dict[str, int]:
        units = {site.name: site.units for site in sites}
        if self.gates is not None:
            units |= {name: len(self.gates.open_units(name)) for name in self.gates.values}
        return units

    def collect(self, *, scale: float = 1.0) -> None:
        """Add the importance that the gradients of this optimizer step show.

        Args:
            scale: What the loss was multiplied by for mixed precision; a step whose gradients overflowed is left out.
        """
        if self.done or self.config.criterion != "first_order":
            return
        gradients = {
            name: (g / scale).square()
            for name, g in gate_gradients(self.model, [site for site in self.sites if site.units]).items()
        }
        finite = torch.stack([g.sum() for g in gradients.values()]).isfinite().all()
        for name, gradient in gradients.items():
            gradient = torch.where(finite, gradient, torch.zeros_like(gradient))
            previous = self._importance.get(name)
            self._importance[name] = gradient if previous is None else previous + gradient
        self._collected = self._collected + finite.float()

    def step(self, step: int) -> list[Change]:
        """Do what is due after an optimizer step.

        Args:
            step: Optimizer steps done; 0 is before the first.

        Returns:
            Parameters that were replaced by a cut, for the optimizer; usually none.

        Raises:
            BudgetError: The sparsity that is due cannot be reached.
        """
        due = [number for number in self._due if self._last_step < number <= step]
        self._last_step = step
        if not due:
            return []
        share = self._schedule(due[-1] / self.total_steps)
        # At the last update rounding to whole steps must not leave the target a little short.
        plan = self._plan(self.config.target.sparsity * (1.0 if due[-1] == self._due[-1] else share))
        if self.config.cut == "end":
            return self._close(plan, last=due[-1] == self._due[-1])
        return self._cut(plan)

    def _plan(self, sparsity: float) -> Plan:
        scores = {}
        generator = torch.Generator().manual_seed(self.seed)
        for site in (site for site in self.sites if site.units):
            gradients = self._importance.get(site.name)
            evidence = Evidence(
                self.model, None if gradients is None else gradients / max(float(self._collected), 1.0), generator
            )
            score = CRITERIA[self.config.criterion](site, evidence).float()
            if self._agree is not None:
                score = score.to(self._device(site)).contiguous()
                self._agree(score)
            score = score.cpu()
            if self.gates is not None:
                closed = self.gates.values[site.name].detach().cpu() == 0
                # Below every open unit, also those whose importance is exactly 0: what is closed is what goes first.
                score = score.masked_fill(closed, min(0.0, float(score.min())) - 1.0)
            scores[site.name] = score
        self._importance = {name: value * _MEMORY for name, value in self._importance.items()}
        self._collected = self._collected * _MEMORY
        return self._allocate(scores, sparsity)

    def _allocate(self, scores: dict[str, torch.Tensor], sparsity: float) -> Plan:
        return allocate(self.sites, scores, self.original, self.config, sparsity=sparsity, permitted=self._permitted)

    def _device(self, site: Site) -> torch.device:
        return self.model.get_submodule(site.reader).weight.device  # type: ignore[return-value]

    def _cut(self, plan: Plan) -> list[Change]:
        before = {site.name: site.units for site in self.sites}
        changes = cut(self.model, plan)
        self.sites = find_sites(self.model)
        for name, units in plan.keep.items():
            if name in self._importance and len(units) < before[name]:
                index = torch.tensor(units, dtype=torch.long, device=self._importance[name].device)
                self._importance[name] = self._importance[name][index]
        self._importance = {
            site.name: self._importance[site.name] for site in self.sites if site.name in self._importance
        }
        self._report("cut")
        return changes

    def _close(self, plan: Plan, *, last: bool) -> list[Change]:
        if self.gates is None:
            self.gates = Gates(self.model, self.sites)
        for name, units in plan.keep.items():
            if name in self.gates.values:
                self.gates.close({name: set(range(len(self.gates.values[name]))) - set(units)})
        if not last:
            self._report("closed")
            return []
        keep = {name: tuple(self.gates.open_units(name).tolist()) for name in self.gates.values}
        self.gates.remove()
        self.gates = None
        return self._cut(Plan(keep))

    def _report(self, what: str) -> None:
        sites = find_sites(self.model)
        units = self._open_units(sites)
        counts = []
        for kind in ("heads", "neurons"):
            names = [site.name for site in sites if site.kind == kind]
            total = sum(self.original[name] for name in names)
            counts.append(f"{total - sum(units[name] for name in names):,} of {total:,} {kind}")
        logger.info("step %d: %s %s; sparsity %.3f", self._last_step, what, " and ".join(counts), self.sparsity())

    def finish(self) -> None:
        """Take gates off that a run which stopped early left; the weights keep computing what the gates did."""
        if self.gates is not None:
            self.gates.write_into_weights()
            self.gates.remove()
            self.gates = None

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What a run needs to go on exactly: JSON-able facts and tensors."""
        facts = {
            "last_step": self._last_step,
            "collected": float(self._collected),
            "original": self.original,
            "total_steps": self.total_steps,
            "config": self.config.model_dump(),
            "closing": self.gates is not None,
        }
        tensors = {f"importance.{name}": value.contiguous() for name, value in self._importance.items()}
        if self.gates is not None:
            tensors |= {f"gate.{name}": value.detach().contiguous() for name, value in self.gates.values.items()}
        return facts, tensors

    def load_state(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` returned, on a model of the shapes it had then.

        Raises:
            ValueError: The state was written under another recipe.
        """
        mine = self.config.model_dump()
        differing = sorted(key for key in mine if facts.get("config", {}).get(key) != mine[key])
        if differing:
            raise ValueError(
                f"the checkpoint was pruned with another recipe: prune.{differing[0]} was "
                f"{facts.get('config', {}).get(differing[0])!r} and is {mine[differing[0]]!r}; use the same recipe, or start anew"
            )
        if facts["total_steps"] != self.total_steps:
            logger.warning(
                "the checkpoint belongs to a run of %d steps, this one has %d: the schedule goes on at the new pace",
                facts["total_steps"],
                self.total_steps,
            )
        self.original = {name: int(units) for name, units in facts["original"].items()}
        self._dense = self._parameters(find_sites(self.model), self.original)
        self._last_step = int(facts["last_step"])
        self._collected = float(facts["collected"])
        for site in self.sites:
            if f"importance.{site.name}" in tensors:
                self._importance[site.name] = tensors[f"importance.{site.name}"].to(self._device(site))
        if facts["closing"]:
            self.gates = Gates(self.model, self.sites)
            for name, value in self.gates.values.items():
                value.copy_(tensors[f"gate.{name}"])
