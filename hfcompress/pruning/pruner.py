"""Gradual pruning of one model: collect importance, renew the plan when it is due, close gates, cut, repair."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from hfcompress.anatomy import (
    Change,
    Site,
    StructureError,
    drop_layers,
    family_of,
    find_sites,
    find_stream,
    uniform_config,
)
from hfcompress.anatomy.depth import droppable_layers
from hfcompress.anatomy.sites import recorded_layers
from hfcompress.calibration import Batch
from hfcompress.checkpoints.portable import bare_class, plain_config
from hfcompress.checkpoints.record import read_hidden, read_vocabulary
from hfcompress.config import MeasureConfig, MultipleOf, PruneConfig
from hfcompress.measurement.costs import Costs
from hfcompress.measurement.latency_table import fast_multiple
from hfcompress.pruning.allocation import BudgetError, alike, allocate, counts_allowed
from hfcompress.pruning.budgets import (
    Budget,
    Stopwatch,
    costs_of,
    dense_parameters,
    kept_units,
    make_budget,
    rename_sites,
)
from hfcompress.pruning.criteria import CRITERIA
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.gates import Gates, gate_gradients
from hfcompress.pruning.learned import LearnedGates
from hfcompress.pruning.plan import Plan, cut, original_units
from hfcompress.pruning.ranking import rank_units
from hfcompress.pruning.repair import repair
from hfcompress.pruning.schedules import make_schedule, update_steps
from hfcompress.pruning.stream_repair import repair_stream
from hfcompress.pruning.widths import Widths, narrower_widths

logger = logging.getLogger(__name__)

# After each update the importance collected so far counts half: the average spans about two intervals of the schedule.
_MEMORY = 0.5
# What norms and residuals of all layers may take of the budget of a model that is going to be trained.
_FIXED_SHARE = 0.15
# What a measured time may differ from its target.
_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Due:
    """An update of the plan.

    Attributes:
        step: Optimizer step after which it is made.
        goal: Number of the goal on the way to which it is.
        share: Share of that way.
    """

    step: int
    goal: int
    share: float


def due_updates(config: PruneConfig, total_steps: int) -> list[Due]:
    """All updates of a run: each goal has an equal part of it, with the schedule inside; only the first waits for the start.

    Example:
        >>> config = PruneConfig(target={"speedup": [2, 4]}, schedule={"name": "linear", "start": 0.2, "end": 0.6, "updates": 2})
        >>> [(due.step, due.goal, round(due.share, 2)) for due in due_updates(config, 100)]
        [(20, 0, 0.5), (30, 0, 1.0), (65, 1, 0.5), (80, 1, 1.0)]
    """
    if config.criterion.name == "learned":
        return _learning_updates(config, total_steps)
    goals = max(1, len(config.target.goals))
    if goals > max(total_steps, 1):
        raise ValueError(
            f"{goals} targets cannot be reached in {total_steps} optimizer steps; train longer, or give fewer targets"
        )
    found = []
    for goal in range(goals):
        schedule = config.schedule
        if goal and schedule.name != "constant":
            schedule = schedule.model_copy(update={"start": 0.0})
        first, last = (round(total_steps * number / goals) for number in (goal, goal + 1))
        length = max(1, last - first)
        steps, share = update_steps(schedule, length), make_schedule(schedule)
        # At the last update rounding to whole steps must not leave the target a little short.
        found += [Due(first + step, goal, 1.0 if step == steps[-1] else share(step / length)) for step in steps]
    return found


def _learning_updates(config: PruneConfig, total_steps: int) -> list[Due]:
    """Where learned gates begin to learn, and where the plan is made of them."""
    schedule = config.schedule
    first, last = (int(share * total_steps + 1e-9) for share in (schedule.start, schedule.end))
    if last == first:
        raise ValueError(
            f"criterion: learned has no optimizer step between start ({schedule.start}) and end ({schedule.end}) of {total_steps}; "
            "train longer, or use first_order"
        )
    return [Due(first, 0, 0.0), Due(last, 0, 1.0)]


class Pruner:
    """Prunes a model while somebody else trains it.

    The owner calls `collect` after each backward pass and `step` after each optimizer step. What is closed stays closed.

    Args:
        model: The model, not wrapped.
        config: What to remove, how much, when.
        total_steps: Optimizer steps of the run, at least 1.
        seed: Of everything random.
        once: Runs a function on the first process and gives its result to all; None for one process.
        mean: Takes the mean of a tensor over all processes, in place; None for one process.
        batches: Gives calibration batches (of this process), where the criterion or repair needs them.
        budget: What the target means for the model, if it is known already (it may have to be measured).
        measure: What the target does not say about how time is measured.
        curves: What `rank_units` gave for the model as it is, if it was ranked before; the first update uses them.
        widths: Narrower copies of the model as it is, if they were made before; the first update uses them.
        live: The model that is trained, if its parameters are in shards; `model` is then a plain one of its shapes, weights aside. The
            live one gets gates, whose gradients are the importance, and keeps them: see `carry_out`.

    Attributes:
        features: The hidden features that are left, counted in the model as it was at the start; None while all are.
        narrowed: Of the last step: the hidden features that it left, counted in the model as it was before; None if it left all.
        hidden_before: Hidden features at the start; None where there is no single width.

    Raises:
        BudgetError: The target cannot be reached under the recipe's constraints.
        StructureError: Only layers may go, and the architecture can do without none.
        ValueError: There is no calibration data where it is needed, or there are more targets than optimizer steps.

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
        once: Callable[[Callable[[], Any]], Any] | None = None,
        mean: Callable[[torch.Tensor], None] | None = None,
        batches: Callable[[], Sequence[Batch]] | None = None,
        budget: Budget | None = None,
        measure: MeasureConfig | None = None,
        curves: dict[str, Curve] | None = None,
        widths: Widths | None = None,
        live: nn.Module | None = None,
    ) -> None:
        if not config.target.goals:
            raise ValueError(
                "target.max_drop needs a model's score at several speeds; use `hfcompress prune --max-drop`, or give a list of speedups"
            )
        self.model = model
        self._live = live
        self._given = config
        self.config = fit_to_device(config, live or model)
        self.total_steps = total_steps
        self.seed = seed
        self.original = original_units(model)
        self.sites = find_sites(model)
        self.gates: Gates | None = None
        self.learned: LearnedGates | None = None
        self.reached: list[dict[str, Any]] = []
        self._once = once or (lambda function: function())
        self._mean, self._batches, self._ranked, self._widths = mean, batches, curves, widths
        self._measure = measure or MeasureConfig()
        self._learns = config.criterion.name == "learned"
        self._needs = None if self._learns else CRITERIA[config.criterion.name].needs
        looks = self._needs not in (None, "steps") and config.cut == "gradual"
        self._repairs = looks if config.repair is None else config.repair
        self.features: tuple[int, ...] | None = None
        self.narrowed: tuple[int, ...] | None = None
        self.hidden_before = hidden_width(model)
        self._narrows = "hidden" in config.units
        self._widened = 0  # goals for which the width was decided
        needy = [
            f"the criterion {config.criterion.name}" if self._needs not in (None, "steps") else None,
            "repair" if self._repairs else None,
            "units: hidden" if self._narrows else None,
        ]
        if batches is None and any(needy):
            raise ValueError(
                f"{' and '.join(filter(None, needy))} need examples to look at; "
                "give calibration batches, or choose first_order or magnitude without repair"
            )
        if self._narrows:
            self._require_stream(model)
        if "vocabulary" in config.units and read_vocabulary(model.config) is None:
            raise ValueError(
                "units: vocabulary goes before texts are encoded, which a trainer is too late for; use hfcompress run or hfcompress prune, or cut "
                "the model with hfcompress vocabulary first"
            )
        self.budget: Budget = budget or self._once(lambda: make_budget(model, config.target, measure=self._measure))
        self._stopwatch = self._make_stopwatch()
        self._due = due_updates(config, total_steps)
        self._importance: dict[str, dict[str, torch.Tensor]] = {}
        self._collected = 0.0
        self._last_step = -1
        self._floor: tuple[int, float] | None = None  # a goal, and what no update on the way to it goes below
        self._fixed = False  # whether the plan of learned gates was carried out
        self._dense = dense_parameters(model)
        self._timed = {layer: layer for layer in self.budget.costs.fixed}  # present names to those of the stopwatch
        self._droppable = self._find_droppable(after_a_cut=budget is not None)
        self._permitted = self._uniform_counts() if config.uniform else None
        self._require_reachable()
        if live is not None:
            self.gates = Gates(live, self.sites)
            self.gates.require_grad()

    def _require_reachable(self) -> None:
        """Say now what cannot be reached, not after most of the training.

        Raises:
            BudgetError: The last target is out of reach, with the narrowest hidden width, too.
        """
        target, goal = self.config.target, self.budget.goals[-1]
        try:
            try:
                self._reach(goal, self.budget.costs)
            except BudgetError:
                narrower = self._narrower_widths()
                if not narrower:
                    raise
                narrow = copy.deepcopy(self.model)
                cut(narrow, Plan({}, hidden=tuple(range(narrower[-1]))))
                self._reach(goal, self._costs_of(narrow))
        except BudgetError as error:
            raise BudgetError(f"target {target.quantity} {target.goals[-1]:g} is out of reach: {error}") from None

    def _reach(self, goal: float, costs: Costs) -> None:
        """Find a plan for a budget, whatever it loses.

        Raises:
            BudgetError: There is none.
        """
        flat = {site.name: Curve.from_scores(torch.zeros(site.units)) for site in self.sites}
        losses = dict.fromkeys(costs.fixed, 0.0) if "layers" in self.config.units else None
        self._allocate(flat, goal, losses, costs=costs)

    @staticmethod
    def _require_stream(model: nn.Module) -> None:
        """Refuse models whose hidden width cannot be cut, or is what they are asked for.

        Raises:
            StructureError: The architecture has no single hidden width.
            ValueError: The model has no head.
        """
        find_stream(model)
        if type(model).__name__ == bare_class(model):
            raise ValueError(
                f"units: hidden would change what {type(model).__name__} gives, which are its hidden features; prune a model with a head, "
                "or leave out hidden"
            )

    def _narrower_widths(self) -> list[int]:
        """The hidden widths below the present one that may be chosen, the widest first."""
        if not self._narrows:
            return []
        stream = find_stream(self.model)
        found = narrower_widths(stream.width, stream.before, self.config)
        if not self.config.uniform:
            return found
        said = [width for width in found if self._says_width(width)]
        if not said:
            message = f"uniform: the plain config of {self.model.config.model_type} cannot say that hidden features are missing"  # type: ignore[union-attr]
            if not set(self.config.units) - {"hidden", "vocabulary"}:
                raise BudgetError(f"{message}; prune something else, or leave out uniform")
            logger.info("%s, so these stay", message)
        return said

    def _says_width(self, width: int) -> bool:
        narrow = copy.deepcopy(self.model)
        cut(narrow, Plan({}, hidden=tuple(range(width))))
        return plain_config(narrow) is not None

    def _costs_of(self, model: nn.Module) -> Costs:
        """The costs of another model than the one at hand."""
        return self._once(lambda: costs_of(model, self.config.target, measure=self._measure))

    def _make_stopwatch(self) -> Stopwatch | None:
        """What measures a plan before it is carried out, where time is the target; on the first process only."""
        if self.budget.costs.quantity != "latency_ms":
            return None
        return self._once(lambda: _Unshared(Stopwatch(self.model, self.config.target, measure=self._measure))).value

    def _find_droppable(self, *, after_a_cut: bool = False) -> set[str]:
        """The layers that may go, as the model is now.

        Raises:
            StructureError: There are none from the beginning, and nothing else may go.
        """
        if "layers" not in self.config.units:
            return set()
        try:
            return droppable_layers(self.model)
        except StructureError as error:
            if self.config.units == ["layers"] and not after_a_cut:
                raise
            logger.info("no layer can be dropped: %s", error)
            return set()

    def _uniform_counts(self) -> dict[str, set[int]]:
        """The counts per site that the plain config of the architecture can say.

        Raises:
            BudgetError: There are none but the full count for any of the kinds asked for.
        """
        config, family = self.model.config, family_of(self.model)
        counts: dict[str, set[int]] = {}
        free = set()
        for group in alike(self.sites, self.original):
            first = group[0]
            multiple_of = getattr(self.config.multiple_of, first.kind)
            said = {
                count
                for count in counts_allowed(first.units, multiple_of=multiple_of, at_least=1)
                if uniform_config(config, family, self.sites, units={site.name: count for site in group}) is not None
            }
            counts |= {site.name: said for site in group}
            free |= {first.kind} if len(said) > 1 else set()
        asked = [kind for kind in self.config.units if kind not in ("hidden", "vocabulary")]
        stuck = [kind for kind in asked if kind not in free]
        if stuck:
            message = (
                f"uniform: the plain config of {config.model_type} cannot say that {' or '.join(stuck)} are missing"
            )
            if len(stuck) == len(asked) and not self._narrows:
                raise BudgetError(f"{message}; prune something else, or leave out uniform")
            logger.info("%s, so these stay", message)
        return counts

    @staticmethod
    def _parameters(sites: list[Site], units: dict[str, int]) -> int:
        return sum(site.parameters_per_unit * units[site.name] for site in sites)

    @property
    def done(self) -> bool:
        """Whether the last update was made and everything closed was cut."""
        if self._learns:
            return self._fixed
        return self._last_step >= self._due[-1].step and (self.gates is None or self._live is not None)

    def sparsity(self) -> float:
        """Share of the prunable parameters of the dense model that is closed or gone, in [0, 1)."""
        sites = find_sites(self.model)
        return 1.0 - self._parameters(sites, self._open_units(sites)) / self._dense

    def cost(self) -> float:
        """What the model costs now, in the quantity of the target, by the table of costs."""
        return self.budget.costs.total(self._open_units(find_sites(self.model)))

    def _open_units(self, sites: Sequence[Site]) -> dict[str, int]:
        units = {site.name: site.units for site in sites}
        if self.gates is not None:
            units |= {name: len(self.gates.open_units(name)) for name in self.gates.values}
        if self.learned is not None:
            units |= {name: len(self.learned.open_units(name)) for name in self.learned.sites}
        return units

    # ---- what training shows ----

    def collect(self, *, scale: float = 1.0) -> None:
        """Add the importance that the gradients of this optimizer step show, if the criterion looks at that.

        Args:
            scale: What the loss was multiplied by for mixed precision; a step whose gradients overflowed is left out.
        """
        if self.learned is not None:
            self.learned.take_gradients(scale=scale, mean=self._mean)
        if self.done or self._needs != "steps":
            return
        if self._live is not None:
            gradients = self._live_gradients()
        else:
            gradients = gate_gradients(self.model, [site for site in self.sites if site.units])
        finite = torch.stack([g.sum() for g in gradients.values()]).isfinite().all()
        for name, gradient in gradients.items():
            step = torch.where(finite, gradient / scale, torch.zeros_like(gradient))
            for key, value in (("squares", step.square()), ("sums", step)):
                seen = self._importance.setdefault(name, {})
                seen[key] = value if key not in seen else seen[key] + value
        self._collected = self._collected + finite.float()

    def _live_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the gates of a model in shards, the mean over processes; those of closed gates count for nothing."""
        assert self.gates is not None
        values = self.gates.values
        taken = {name: gradient * values[name].detach() for name, gradient in self.gates.take_gradients().items()}
        together = torch.cat(list(taken.values()))
        if self._mean is not None:
            self._mean(together)
        parts = together.split([len(gradient) for gradient in taken.values()])
        return dict(zip(taken, parts, strict=True))

    def _collected_evidence(self) -> dict[str, dict[str, torch.Tensor]] | None:
        """Means over the optimizer steps since the last updates, by site."""
        if not self._importance:
            return None
        count = max(float(self._collected), 1.0)
        return {name: {key: v / count for key, v in seen.items()} for name, seen in self._importance.items()}

    def _forget_half(self) -> None:
        self._importance = {
            name: {key: value * _MEMORY for key, value in seen.items()} for name, seen in self._importance.items()
        }
        self._collected = self._collected * _MEMORY

    # ---- updates ----

    def step(self, step: int) -> list[Change]:
        """Do what is due after an optimizer step.

        Args:
            step: Optimizer steps done; 0 is before the first.

        Returns:
            Parameters that were replaced by a cut, for the optimizer; usually none.

        Raises:
            BudgetError: What is due cannot be reached.
        """
        if self._learns:
            return self._learn(step)
        due = [update for update in self._due if self._last_step < update.step <= step]
        self._last_step = step
        self.narrowed = None
        if not due:
            return []
        update = due[-1]
        batches = self._calibration()
        narrowed = self._narrow(update.goal, batches)
        curves = self._rank(batches)
        losses = self._layer_losses(curves) if self._droppable else None
        self._forget_half()
        last = update.share >= 1
        budget = self.budget.at(update.goal, update.share)
        if last:
            plan = self._verified(curves, update.goal, losses)
        else:
            plan = self._allocate(curves, max(budget, self._least(curves, update.goal, losses)), losses)
        if self.config.cut == "end":
            return self._close(plan, last=last)
        return narrowed + self._cut(plan, batches)

    # ---- hidden width ----

    def _narrow(self, goal: int, batches: Sequence[Batch] | None) -> list[Change]:
        """Before the first plan on the way to a goal, decide how many hidden features it is reached with, and cut the others."""
        if not self._narrows or goal < self._widened:
            return []
        assert batches is not None
        self._widened = goal + 1
        modes = self.model.training
        self.model.eval()
        widths, self._widths = self._widths, None
        if widths is None:
            widths = Widths(
                self.model,
                self.config,
                batches,
                repairs=self._repairs,
                seed=self.seed,
                reduce=self._mean,
                once=self._once,
                collected=self._collected_evidence(),
            )
        width = self._choose_width(widths, self.budget.goals[goal])
        changes: list[Change] = []
        if width < widths.width:
            features = widths.features(width)
            costs = widths.costs.get(width)
            dense = copy.deepcopy(self.model) if self._repairs else None
            changes = cut(self.model, Plan({}, hidden=features))
            if dense is not None:
                repair_stream(self.model, dense, torch.tensor(features), batches, reduce=self._mean)
            before = self.features or tuple(range(widths.width))
            self.features, self.narrowed = tuple(before[place] for place in features), features
            self._ranked = None
            self._follow_width(costs)
        self.model.train(modes)
        return changes

    def _choose_width(self, widths: Widths, budget: float) -> int:
        """The width with which a budget costs least: whole plans are tried, on data they were not fitted to.

        What a width loses with all its units grows as it falls, so that once this alone is more than the best plan loses, no
        narrower one is looked at. Where nothing else may go the widest that meets the budget is the best.
        """
        choices = [widths.width, *self._narrower_widths()]
        if not set(self.config.units) - {"hidden", "vocabulary"}:
            return self._widest(widths, choices, budget)
        best, chosen = float("inf"), widths.width
        for width in choices:
            try:
                if best == float("inf"):  # what is too wide needs no repair
                    self._reach(budget, self._costs_at(widths, width))
            except BudgetError:
                continue
            narrow = widths.at(width)
            if narrow.loss >= best:
                break
            curves = self._ranked if width == widths.width and self._ranked is not None else widths.curves(width)
            losses = self._layer_losses(curves) if self._droppable else None
            try:
                plan = self._allocate(curves, budget, losses, costs=self._costs_at(widths, width))
            except BudgetError:
                continue
            loss = widths.loss_of(width, plan)
            logger.info(
                "%d hidden features: %.4g nats per example are lost, %.4g without the rest of the plan",
                width,
                loss,
                narrow.loss,
            )
            if loss < best:
                best, chosen = loss, width
        return chosen

    def _widest(self, widths: Widths, choices: Sequence[int], budget: float) -> int:
        low, high = 0, len(choices) - 1
        while low < high:
            middle = (low + high) // 2
            if self._costs_at(widths, choices[middle]).total({}) <= budget * (1 + 1e-9):
                high = middle
            else:
                low = middle + 1
        return choices[low]

    def _costs_at(self, widths: Widths, width: int) -> Costs:
        if width == widths.width:
            return self.budget.costs
        if width not in widths.costs:
            narrow = copy.deepcopy(widths.model)
            cut(narrow, Plan({}, hidden=widths.features(width)))
            widths.costs[width] = self._costs_of(narrow)
        return widths.costs[width]

    def _follow_width(self, costs: Costs | None) -> None:
        """After hidden features went: what the model costs now, and what time is measured on."""
        self.sites = find_sites(self.model)
        self.budget = dataclasses.replace(self.budget, costs=costs or self._costs_of(self.model))
        self._stopwatch = self._make_stopwatch()
        self._timed = {layer: layer for layer in self.budget.costs.fixed}
        if self.config.uniform:
            self._permitted = self._uniform_counts()

    # ---- learned gates ----

    def _learning_target(self, step: int) -> float:
        """What the model is expected to cost after so many optimizer steps."""
        return self.budget.at(0, make_schedule(self.config.schedule)(step / self.total_steps))

    def learning(self) -> dict[str, float] | None:
        """While gates learn: the penalty of the optimizer step at hand, the expected cost, and what it is to be; else None."""
        if self.learned is None:
            return None
        target = self._learning_target(self._last_step + 1)
        with torch.no_grad():
            penalty, cost = self.learned.penalty(target), self.learned.expected_cost()
        return {"penalty": float(penalty), "expected_cost": float(cost), "target_cost": target}

    def _make_learned(self) -> LearnedGates:
        return LearnedGates(self.model, self.sites, self.budget.costs, self.config, seed=self.seed)

    def _learn(self, step: int) -> list[Change]:
        """Start, train or end the gates; a run that was resumed at another pace may find itself anywhere."""
        self._last_step = step
        first, last = (update.step for update in self._due)
        if self._fixed or step < first:
            return []
        if self.learned is None:
            self.learned = self._make_learned()
            logger.info("step %d: gates begin to learn", step)
        else:
            self.learned.update(self._learning_target(step))
        self.learned.sample(step)
        return self._cut_learned() if step >= last else []

    def _cut_learned(self) -> list[Change]:
        """Fix the plan, write the gates into the weights, and cut what they closed."""
        assert self.learned is not None
        curves = self._once(self.learned.curves)
        plan = self._verified(curves, 0, None)
        self.learned.fold()
        self.learned = None
        self._fixed = True
        return self._cut(plan, self._calibration())

    def goal_at(self, step: int) -> int | None:
        """The goal whose part of the run ends with this optimizer step, counted from 0; None between ends."""
        goals = len(self.budget.goals)
        ends = {round(self.total_steps * (number + 1) / goals): number for number in range(goals)}
        return ends.get(step)

    def _calibration(self) -> Sequence[Batch] | None:
        wanted = (
            self._repairs
            or self._narrows
            or self._needs not in (None, "steps")
            or (self._needs == "steps" and not self._importance)
        )
        return self._batches() if wanted and self._batches is not None else None

    def _rank(self, batches: Sequence[Batch] | None) -> dict[str, Curve]:
        """The curve of every site with units, the same on all processes."""
        curves, self._ranked = self._ranked, None
        if curves is None:
            curves = rank_units(
                self.model,
                self.config.criterion.name,
                batches,
                seed=self.seed,
                collected=self._collected_evidence(),
                reduce=self._mean,
            )
        curves = self._once(lambda: curves)
        if self.gates is not None:
            curves = {name: self._closed_first(name, curve) for name, curve in curves.items()}
        return curves

    def _closed_first(self, name: str, curve: Curve) -> Curve:
        """What is closed goes first and costs nothing any more."""
        assert self.gates is not None
        closed = set(range(len(curve.order))) - set(self.gates.open_units(name).tolist())
        steps = curve.loss.diff()
        order = curve.order.tolist()
        ranked = sorted(range(len(order)), key=lambda place: order[place] not in closed)
        steps = torch.stack([steps[p] * (order[p] not in closed) for p in ranked]) if ranked else steps
        return Curve(
            torch.tensor([order[place] for place in ranked], dtype=torch.long),
            torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)]),
        )

    @staticmethod
    def _layer_losses(curves: dict[str, Curve]) -> dict[str, float]:
        """What dropping each layer costs: as much as emptying it, so that a layer never stays for its norms alone.

        Measured without repair, as `layer_losses` does, it would look worse than curves that count on repair.
        """
        losses: dict[str, float] = {}
        for name, curve in curves.items():
            layer = name.rpartition(".")[0]
            losses[layer] = losses.get(layer, 0.0) + float(curve.loss[-1])
        return losses

    def _with_room(self, losses: dict[str, float], budget: float, costs: Costs) -> dict[str, float]:
        """Where training follows, the layers that stay must have room: the least important go until a small share of the budget is
        enough for what layers cost apart from their units.

        Without training, a layer with hardly any units loses least. With it, few wide layers learn what many empty ones cannot.
        """
        if self.total_steps <= 1:
            return losses
        must_go = -(1.0 + sum(losses.values()))
        left = dict(costs.fixed)
        for layer in sorted(losses, key=lambda name: losses[name]):
            if sum(left.values()) <= _FIXED_SHARE * (budget - costs.rest) or len(left) <= 1:
                break
            if layer in self._droppable:
                del left[layer]
        return {layer: loss if layer in left else must_go for layer, loss in losses.items()}

    def _allocate(
        self,
        curves: dict[str, Curve],
        budget: float,
        losses: dict[str, float] | None,
        *,
        costs: Costs | None = None,
    ) -> Plan:
        """The plan for a budget, by the costs of the model at hand, or of a narrower one."""
        costs = costs or self.budget.costs
        if losses is not None:
            losses = self._with_room(losses, budget, costs)
        return allocate(
            self.sites,
            curves,
            costs,
            budget,
            self.config,
            original=self.original,
            permitted=self._permitted,
            layer_losses={layer: loss for layer, loss in (losses or {}).items() if layer in self._droppable},
        )

    def _verified(self, curves: dict[str, Curve], goal: int, losses: dict[str, float] | None) -> Plan:
        """The plan of a goal; where time is the target it is measured, and if the table was wrong the budget is corrected."""
        wanted = self.budget.goals[goal]
        plan, allowance, best = self._allocate(curves, wanted, losses), wanted, None
        for _ in range(4):
            found = self._once(functools.partial(self._time, plan))
            if found is None:
                return plan
            latency_ms, ratio = found
            reached = self._reached(goal, latency_ms, ratio)
            miss = abs(reached - 1)
            if best is None or miss < best[0]:
                best = (miss, plan, latency_ms, ratio, reached)
            if miss <= _TOLERANCE / 2:
                break
            allowance *= reached
            try:
                plan = self._allocate(curves, allowance, losses)
            except BudgetError:
                break
        assert best is not None
        miss, plan, latency_ms, ratio, reached = best
        self.reached.append({"goal": goal, "speedup": ratio, "latency_ms": latency_ms, "wanted": ratio / reached})
        say = logger.info if miss <= _TOLERANCE else logger.warning
        say(
            "measured before the cut: %.2fx of the dense model's speed, wanted %.2fx (%+.0f %%)%s",
            ratio,
            ratio / reached,
            100 * (reached - 1),
            ""
            if miss <= _TOLERANCE
            else "; counts come in steps that are too coarse, or the machine is busy with something else",
        )
        return plan

    def _least(self, curves: dict[str, Curve], goal: int, losses: dict[str, float] | None) -> float:
        """What no update on the way to a goal goes below; where time is the target, by the goal's plan as measured.

        What is cut is gone: with a table that thinks too little of a plan, more would go than the goal asks for.
        """
        wanted = self.budget.goals[goal]
        if self._floor is None or self._floor[0] != goal:
            found = None
            with suppress(BudgetError):
                found = self._once(functools.partial(self._time, self._allocate(curves, wanted, losses)))
            reached = 1.0 if found is None else self._reached(goal, *found)
            if reached > 1 + _TOLERANCE:
                logger.info("the table has the plan %.0f %% too slow; less goes on the way", 100 * (reached - 1))
            self._floor = (goal, wanted * max(1.0, reached))
        return self._floor[1]

    def _reached(self, goal: int, latency_ms: float, ratio: float) -> float:
        """How fast a plan is as a multiple of what a goal asks for."""
        wanted = self.budget.goals[goal]
        if self.config.target.quantity == "latency_ms":
            return wanted / latency_ms
        return ratio * wanted / self.budget.dense  # interleaved rounds say more than milliseconds of different minutes

    def _time(self, plan: Plan) -> tuple[float, float] | None:
        if self._stopwatch is None:
            return None
        units = {}
        for name, count in kept_units(plan).items():
            layer, _, role = name.rpartition(".")
            units[f"{self._timed.get(layer, layer)}.{role}"] = count
        gone = {
            layer
            for layer in self._timed
            if plan.layers and int(layer.rpartition(".")[2]) not in plan.layers[layer.rpartition(".")[0]]
        }
        return self._stopwatch.time(units, layers={self._timed[layer] for layer in self._timed if layer not in gone})

    def _cut(self, plan: Plan, batches: Sequence[Batch] | None) -> list[Change]:
        before = {site.name: site.units for site in self.sites}
        if not plan.layers and all(len(units) == before[name] for name, units in plan.keep.items()):
            self._report("nothing more to cut, gone are")
            return []
        dense = copy.deepcopy(self.model) if self._repairs else None
        changes = cut(self.model, plan)
        if dense is not None:
            assert batches is not None
            self._repair(dense, batches, plan)
        for name, units in plan.keep.items():
            if name in self._importance and len(units) < before[name]:
                index = torch.tensor(units, dtype=torch.long)
                self._importance[name] = {
                    key: value[index.to(value.device)] for key, value in self._importance[name].items()
                }
        self._rename_layers(plan)
        self.sites = find_sites(self.model)
        self._importance = {
            site.name: self._importance[site.name]
            for site in self.sites
            if site.units and site.name in self._importance
        }
        self._report("cut")
        return changes

    def _repair(self, dense: nn.Module, batches: Sequence[Batch], plan: Plan) -> None:
        modes = self.model.training
        for model in (self.model, dense):
            model.eval()
        if plan.layers:
            drop_layers(dense, plan.layers)
        repair(self.model, dense, batches, reduce=self._mean)
        self.model.train(modes)

    def _rename_layers(self, plan: Plan) -> None:
        """Follow the layers to their new numbers."""
        if not plan.layers:
            return
        names: dict[str, str | None] = dict.fromkeys(self.budget.costs.fixed)
        for stack, kept in plan.layers.items():
            names |= {f"{stack}.{old}": f"{stack}.{new}" for new, old in enumerate(kept)}
        self.budget = self.budget.without_layers(names)
        fresh = {names[layer]: timed for layer, timed in self._timed.items()}
        self._timed = {layer: timed for layer, timed in fresh.items() if layer is not None}
        self._droppable = self._find_droppable(after_a_cut=True)
        self.original = rename_sites(self.original, names)
        self._importance = rename_sites(self._importance, names)

    def _close(self, plan: Plan, *, last: bool) -> list[Change]:
        if self.gates is None:
            self.gates = Gates(self.model, self.sites)
        for name, units in plan.keep.items():
            if name in self.gates.values:
                self.gates.close({name: set(range(len(self.gates.values[name]))) - set(units)})
        if self._live is not None:
            self.gates.require_grad(not last)
        if not last or self._live is not None:
            self._report("closed")
            return []
        keep = {name: tuple(self.gates.open_units(name).tolist()) for name in self.gates.values}
        self.gates.remove()
        self.gates = None
        return self._cut(Plan(keep), None)

    def _report(self, what: str) -> None:
        sites = find_sites(self.model)
        units = self._open_units(sites)
        counts = []
        for kind in ("heads", "neurons"):
            left = sum(units[site.name] for site in sites if site.kind == kind)
            total = sum(self.original[site.name] for site in sites if site.kind == kind)
            counts.append(f"{total - left:,} of {total:,} {kind}")
        costs = self.budget.costs
        state = f"sparsity {self.sparsity():.3f}"
        if costs.quantity != "parameters":
            state += (
                f", {self.budget.dense / self.cost():.2f}x by {'FLOPs' if costs.quantity == 'flops' else 'the table'}"
            )
        stacks = recorded_layers(getattr(self.model.config, "hfcompress", None) or {})
        gone = sum(before - left for left, before in stacks.values())
        layers = f" and {gone} of {len(costs.fixed) + gone} layers" if gone else ""
        hidden = read_hidden(self.model.config)
        wide = f", {hidden[0]} of {hidden[1]} hidden features left" if hidden is not None else ""
        logger.info("step %d: %s %s%s; %s%s", self._last_step, what, " and ".join(counts), layers, state, wide)

    def units(self) -> dict[str, list[int]]:
        """Site name to the units that are left and those there were, where these differ."""
        units = self._open_units(find_sites(self.model))
        return {name: [left, self.original[name]] for name, left in units.items() if left != self.original[name]}

    def totals(self) -> dict[str, int]:
        """How many heads and neurons are left in all, by the role of their sites: {"heads": 31, "neurons": 9216}.

        Where hidden features may go, how many are left, too.
        """
        found: dict[str, int] = {}
        for name, left in self._open_units(find_sites(self.model)).items():
            role = name.rpartition(".")[2]
            found[role] = found.get(role, 0) + left
        width = hidden_width(self.model)
        return found | ({"hidden": width} if self._narrows and width is not None else {})

    def carry_out(self, model: nn.Module) -> None:
        """Do to a whole copy of a model in shards, in place, what gates do to the live one: cut, or before the last update close."""
        assert self.gates is not None
        if self.done:
            cut(model, Plan({name: tuple(self.gates.open_units(name).tolist()) for name in self.gates.values}))
            return
        gates = Gates(model, self.sites)
        gates.take_over(self.gates)
        gates.write_into_weights()
        gates.remove()

    def finish(self) -> None:
        """Take gates off that a run which stopped early left; the weights keep computing what the gates did."""
        if self._live is not None:
            return
        if self.gates is not None:
            self.gates.write_into_weights()
            self.gates.remove()
            self.gates = None
        if self.learned is not None:
            self.learned.fold()
            self.learned = None

    def forget(self) -> None:
        """Take all gates off a model whose run was interrupted, and leave the weights as they are."""
        for gates in (self.gates, self.learned):
            if gates is not None:
                gates.remove()
        self.gates = self.learned = None

    # ---- checkpoints ----

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What a run needs to go on exactly: JSON-able facts and tensors."""
        facts = {
            "last_step": self._last_step,
            "collected": float(self._collected),
            "original": self.original,
            "dense": self._dense,
            "budget": self.budget.to_dict(),
            "reached": self.reached,
            "floor": self._floor,
            "total_steps": self.total_steps,
            "multiple_of": self.config.multiple_of.model_dump(),
            "closing": self.gates is not None and not self.done,
            "learning": self.learned is not None,
            "fixed": self._fixed,
            "features": self.features,
            "hidden_before": self.hidden_before,
            "widened": self._widened,
        }
        tensors = {
            f"importance.{key}.{name}": value.contiguous()
            for name, seen in self._importance.items()
            for key, value in seen.items()
        }
        if self.gates is not None:
            tensors |= {f"gate.{name}": value.detach().contiguous() for name, value in self.gates.values.items()}
        if self.learned is not None:
            tensors |= {f"learned.{name}": value for name, value in self.learned.state().items()}
        return facts, tensors

    def load_state(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` returned under the same recipe, on a model of the shapes it had then."""
        if facts["total_steps"] != self.total_steps:
            logger.warning(
                "the checkpoint belongs to a run of %d steps, this one has %d: the schedule goes on at the new pace",
                facts["total_steps"],
                self.total_steps,
            )
        self.original = {name: int(units) for name, units in facts["original"].items()}
        self._dense = int(facts["dense"])
        # "auto" stays what it was where the run began, whatever machine it goes on with.
        self.config = self.config.model_copy(update={"multiple_of": MultipleOf(**facts["multiple_of"])})
        self._permitted = self._uniform_counts() if self.config.uniform else None
        self.budget = Budget.from_dict(facts["budget"])
        self.reached = list(facts["reached"])
        floor = facts.get("floor")
        self._floor = None if floor is None else (int(floor[0]), float(floor[1]))
        self._last_step = int(facts["last_step"])
        self._collected = float(facts["collected"])
        for site in self.sites:
            device = (self._live or self.model).get_submodule(site.readers[0]).weight.device
            for key in ("squares", "sums"):
                if f"importance.{key}.{site.name}" in tensors:
                    value = tensors[f"importance.{key}.{site.name}"].to(device)  # type: ignore[arg-type]
                    self._importance.setdefault(site.name, {})[key] = value
        if facts["closing"] and self._live is None:
            self.gates = Gates(self.model, self.sites)
        if self.gates is not None:
            for name in self.gates.values:
                self.gates.close({name: (tensors[f"gate.{name}"] == 0).nonzero().flatten()})
            if self._live is not None:
                self.gates.require_grad(not self.done)
        self._fixed = bool(facts["fixed"])
        self.features = None if facts.get("features") is None else tuple(facts["features"])
        self.hidden_before = facts.get("hidden_before")
        self._widened = int(facts.get("widened", 0))
        if facts["learning"]:
            kept = {
                name.removeprefix("learned."): value for name, value in tensors.items() if name.startswith("learned.")
            }
            self.learned = self._make_learned()
            self.learned.load_state(kept, step=self._last_step)


def hidden_width(model: nn.Module) -> int | None:
    """Hidden features that are left, from the config alone; None where it names no single width."""
    hidden = read_hidden(model.config)
    return getattr(model.config, "hidden_size", None) if hidden is None else hidden[0]


class _Unshared:
    """Something that stays on the process that made it: pickled, it is empty."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None}


def fit_to_device(config: PruneConfig, model: nn.Module) -> PruneConfig:
    """The recipe with "auto" multiples put in numbers."""
    given = config.multiple_of
    fast = fast_multiple(next(model.parameters()).device)
    numbers = {name: fast for name in ("neurons", "hidden") if getattr(given, name) == "auto"}
    return config.model_copy(update={"multiple_of": given.model_copy(update=numbers)}) if numbers else config
