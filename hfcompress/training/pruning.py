"""Gradual pruning inside a Trainer: when importance is collected, units are cut, and what a checkpoint has to keep."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hfcompress.checkpoints.record import add_step
from hfcompress.config import PruneConfig, Recipe
from hfcompress.pruning import Budget, Pruner
from hfcompress.pruning.pruner import due_updates
from hfcompress.training.exact import ExactTrainerMixin
from hfcompress.training.optimizers import rebuild_reducer, replace_parameters
from hfcompress.training.sharded import PLAIN, outline

logger = logging.getLogger(__name__)

STATE_FILE = "hfcompress_pruner.json"
TENSORS_FILE = "hfcompress_pruner.safetensors"
# Criteria that need nothing but the gradients of gates, which are there whatever is held in shards.
GATED = ("first_order", "movement")


class PruningMixin(ExactTrainerMixin):
    """Adds gradual structured pruning to a Trainer.

    * `training_step`: reads the importance of units off the gradients once those of the whole optimizer step are there. With the
      criterion "learned", adds the penalty on the expected cost to the loss that is reported: its gradient reaches the gates only, which
      take their own step after the optimizer's, so that neither clipping nor the scale of mixed precision touches it.
    * a callback after each optimizer step (before logging, evaluation and saving): closes and cuts units, and keeps
      optimizer and DistributedDataParallel consistent.
    * `_determine_best_metric`: only models that have reached the target can be the best.
    * `_save`: where the model is in shards (FSDP, DeepSpeed) nothing is cut before: gates stay closed, and what is saved is cut.
    * `_save_optimizer_and_scheduler`, `_load_from_checkpoint`: keep and restore the state of the pruner.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        recipe = recipe if recipe is not None else Recipe(prune=PruneConfig())
        self.recipe = recipe
        self.prune: PruneConfig | None = recipe.prune
        self.pruner: Pruner | None = None
        self.goal_folders: dict[float, Path] = {}
        self._pruner_state: Path | None = None
        super().__init__(model, *args, recipe=recipe, **kwargs)
        if self.prune is not None:
            self.add_callback(_PruningCallback(self))

    def _start_pruning(self) -> None:
        """Make the pruner for the run that begins, or the one that goes on."""
        assert self.prune is not None
        model = self.accelerator.unwrap_model(self.model)
        sharded = self.sharding != "none"
        if sharded:
            self._refuse_to_cut_shards()
        if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "a model with adapters cannot be pruned: their shapes follow the frozen model's; "
                "prune first and add adapters afterwards, or merge them before (merge_and_unload)"
            )
        if self.pruner is not None:
            self.pruner.forget()  # gates of a run that was interrupted
        before = None if self.pruner is None else (self.pruner.features, self.pruner.hidden_before)
        facts, tensors = self._resumed_state()
        distributed = self.args.world_size > 1
        self.pruner = Pruner(
            self._outline(model) if sharded else model,
            self.prune,
            live=model if sharded else None,
            total_steps=max(self.state.max_steps, 1),
            seed=self.args.seed,
            once=_once if distributed else None,
            mean=_mean if distributed else None,
            batches=None if sharded or self.train_dataset is None else self._calibration_batches,
            budget=None if facts is None else Budget.from_dict(facts["budget"]),
            measure=self.recipe.measure,
        )
        self.goal_folders = {}
        if before is not None and before[0] is not None:
            self.pruner.features, self.pruner.hidden_before = before
        if facts is not None:
            self.pruner.load_state(facts, tensors)
            self._find_goals()
        else:
            self._prune_if_due(0)

    def _refuse_to_cut_shards(self) -> None:
        assert self.prune is not None
        self._require_saving_whole()
        criterion = self.prune.criterion.name
        instead = f"cut: end with criterion {' or '.join(GATED)}, or {PLAIN}"
        if self.prune.cut != "end":
            self._refuse("prune.cut: gradual, which changes the shapes of parameters in mid-training,", instead)
        if criterion not in GATED:
            self._refuse(f"prune.criterion: {criterion}, which looks at more than the gradients of gates,", instead)
        if due_updates(self.prune, max(self.state.max_steps, 1))[0].step == 0:
            self._refuse("pruning before the first step (prune.schedule.start: 0)", "a later start")
        if self.pruner is not None and self.pruner.done:
            raise ValueError(
                "this trainer has pruned, and the cut is in what it saved; load that into another trainer to go on"
            )

    def _outline(self, model: nn.Module) -> nn.Module:
        """What a plan is made on where the model is in shards: its shapes, and memory only on the first process and to be timed."""
        assert self.prune is not None
        shapes = outline(model)
        if self.prune.target.quantity in ("speedup", "latency_ms") and self.is_world_process_zero():
            shapes = shapes.to_empty(device=self.args.device)
            with torch.no_grad():
                for tensor in (*shapes.parameters(), *shapes.buffers()):
                    tensor.zero_()  # time does not depend on the numbers, but on their being some
        return shapes

    def _resumed_state(self) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
        """What the checkpoint that is resumed from says about the pruner; None at the start of a run."""
        folder, self._pruner_state = self._pruner_state, None
        if folder is None:
            return None, {}
        facts = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return facts, safetensors.torch.load_file(folder / TENSORS_FILE)

    def _kept_features(self) -> tuple[tuple[int, ...], int] | None:
        if self._pruner_state is not None:
            facts = json.loads((self._pruner_state / STATE_FILE).read_text(encoding="utf-8"))
            features, before = facts.get("features"), facts.get("hidden_before")
        else:
            features, before = (None, 0) if self.pruner is None else (self.pruner.features, self.pruner.hidden_before)
        return None if features is None else (tuple(features), int(before))

    def _calibration_batches(self) -> list[Any]:
        """The training examples that criteria and repair look at: this process's part of them."""
        assert self.prune is not None
        criterion = self.prune.criterion
        return self._example_batches(
            criterion.samples,
            own_part=True,
            what=f"the criterion {criterion.name}",
            instead="use first_order with repair: false",
        )

    def _prune_if_due(self, step: int) -> None:
        if self.pruner is None or self.pruner.done:
            return
        changes = self.pruner.step(step)
        if self.pruner.narrowed is not None:
            changes += self._follow_narrowing(self.pruner.narrowed)
        if changes:
            optimizer = self.optimizer
            replace_parameters(getattr(optimizer, "optimizer", optimizer), changes)
            rebuild_reducer(self.model_wrapped)

    def _leave_goal(self, step: int) -> None:
        """Where a run has several targets, save the model that has reached one of them and goes on to the next."""
        goals = self.prune.target.goals if self.prune is not None else []
        number = self.pruner.goal_at(step) if self.pruner is not None else None
        if number is None or number == len(goals) - 1:
            return
        folder = Path(self.args.output_dir) / goal_folder(self.prune.target.quantity, goals[number])  # type: ignore[union-attr]
        model = self.accelerator.unwrap_model(self.model)
        before = copy.deepcopy(getattr(model.config, "hfcompress", None))
        self._record_steps()
        self.save_model(str(folder), _internal_call=True)
        if before is None:
            del model.config.hfcompress
        else:
            model.config.hfcompress = before
        self.goal_folders[goals[number]] = folder
        logger.info("step %d: the model for %s %s is in %s", step, self.prune.target.quantity, goals[number], folder)  # type: ignore[union-attr]

    def _find_goals(self) -> None:
        """The models that a run which goes on has left already."""
        assert self.pruner is not None and self.prune is not None
        for step in range(1, self.state.global_step + 1):
            number = self.pruner.goal_at(step)
            if number is not None:
                goal = self.prune.target.goals[number]
                folder = Path(self.args.output_dir) / goal_folder(self.prune.target.quantity, goal)
                if folder.is_dir():
                    self.goal_folders[goal] = folder

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward as in Trainer; after the last one of an optimizer step importance is collected."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.pruner is not None and not self.pruner.done and self.accelerator.sync_gradients:
            self.pruner.collect(scale=self._loss_scale())
            if (learning := self.pruner.learning()) is not None:
                penalty = loss.new_tensor(learning["penalty"])
                self._add_up({"gates": penalty})
                loss = loss + penalty
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with sparsity and what is left; while gates learn, with the cost they promise and what it is to be."""
        if "loss" in logs and self.pruner is not None:
            logs = {**logs, "sparsity": round(self.pruner.sparsity(), 4)}
            logs |= {f"{role}_left": count for role, count in self.pruner.totals().items()}
            learning = self.pruner.learning() or {}
            logs |= {name: value for name, value in learning.items() if name != "penalty"}
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.pruner is not None and not self.pruner.done:
            return False
        return super()._determine_best_metric(metrics, trial)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.pruner is not None and self.pruner.gates is not None and self.sharding == "none":
            self.pruner.gates.write_into_weights()
        super()._save(output_dir, state_dict)

    def _finish_whole(self, model: PreTrainedModel) -> None:
        super()._finish_whole(model)
        if self.pruner is not None:
            self.pruner.carry_out(model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.pruner is not None and self.args.should_save:
            facts, tensors = self.pruner.state()
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
            safetensors.torch.save_file({n: t.cpu() for n, t in tensors.items()}, Path(output_dir) / TENSORS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._note_resumed(resume_from_checkpoint)

    def _note_resumed(self, folder: str) -> None:
        super()._note_resumed(folder)
        if self.prune is None:
            return
        if not (Path(folder) / STATE_FILE).is_file():
            raise ValueError(
                f"{folder} was not written by a run that prunes ({STATE_FILE} is missing); start from it as a model instead"
            )
        self._pruner_state = Path(folder)

    def _finish_pruning(self) -> None:
        if self.pruner is None:
            return
        if not self.pruner.done:
            logger.warning(
                "training stopped before the schedule's end: sparsity is %.3f, the last target was not reached",
                self.pruner.sparsity(),
            )
        self.pruner.finish()

    def _record_steps(self) -> None:
        super()._record_steps()
        if self.pruner is None or self.prune is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        add_step(
            model.config,
            "prune",
            settings=self.prune.model_dump(),
            sparsity=round(self.pruner.sparsity(), 6),
            reached=self.pruner.reached,
            units=self.pruner.units(),
            optimizer_steps=self.state.global_step,
        )


class _PruningCallback(TrainerCallback):
    """Tells the trainer when to start, step and finish."""

    def __init__(self, trainer: PruningMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._start_pruning()

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.trainer._prune_if_due(state.global_step)
        self.trainer._leave_goal(state.global_step)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer._finish_pruning()


def goal_folder(quantity: str, goal: float) -> str:
    """Name of the folder of the model that has reached a target.

    Example:
        >>> goal_folder("latency_ms", 12.5), goal_folder("speedup", 2.0)
        ('latency-ms-12.5', 'speedup-2')
    """
    return f"{quantity.replace('_', '-')}-{goal:g}"


def _once(function: Callable[[], Any]) -> Any:
    """Run a function on the first process and give its result to all."""
    result = [function() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(result, src=0)
    return result[0]


def _mean(tensor: torch.Tensor) -> None:
    """Take the mean over all processes, in place."""
    torch.distributed.all_reduce(tensor)
    tensor /= torch.distributed.get_world_size()
