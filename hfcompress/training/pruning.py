"""Gradual pruning inside a Trainer: when importance is collected, units are cut, and what a checkpoint has to keep."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import TrainerCallback

from hfcompress.checkpoints.record import add_step, read_units
from hfcompress.config import PruneConfig, Recipe
from hfcompress.pruning import Pruner
from hfcompress.training.exact import ExactTrainerMixin
from hfcompress.training.optimizers import rebuild_reducer, replace_parameters

logger = logging.getLogger(__name__)

STATE_FILE = "hfcompress_pruner.json"
TENSORS_FILE = "hfcompress_pruner.safetensors"


class PruningMixin(ExactTrainerMixin):
    """Adds gradual structured pruning to a Trainer.

    * `training_step`: reads the importance of units off the gradients once those of the whole optimizer step are there.
    * a callback after each optimizer step (before logging, evaluation and saving): closes and cuts units, and keeps
      optimizer and DistributedDataParallel consistent.
    * `_determine_best_metric`: only models that have reached the target can be the best.
    * `_save_optimizer_and_scheduler`, `_load_from_checkpoint`: keep and restore the state of the pruner.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        recipe = recipe if recipe is not None else Recipe(prune=PruneConfig())
        self.recipe = recipe
        self.prune: PruneConfig | None = recipe.prune
        self.pruner: Pruner | None = None
        self._pruner_state: Path | None = None
        super().__init__(model, *args, recipe=recipe, **kwargs)
        if self.prune is not None:
            self.add_callback(_PruningCallback(self))

    def _start_pruning(self) -> None:
        """Make the pruner for the run that begins, or the one that goes on."""
        assert self.prune is not None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "gradual pruning changes the shapes of parameters, which FSDP and DeepSpeed hold in shards; "
                "use plain data parallelism (configs/accelerate/ddp.yaml), or distil and quantize only"
            )
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "a model with adapters cannot be pruned: their shapes follow the frozen model's; "
                "prune first and add adapters afterwards, or merge them before (merge_and_unload)"
            )
        distributed = self.args.world_size > 1
        self.pruner = Pruner(
            model,
            self.prune,
            total_steps=max(self.state.max_steps, 1),
            seed=self.args.seed,
            agree=_broadcast if distributed else None,
        )
        if self._pruner_state is not None:
            facts = json.loads((self._pruner_state / STATE_FILE).read_text(encoding="utf-8"))
            self.pruner.load_state(facts, safetensors.torch.load_file(self._pruner_state / TENSORS_FILE))
            self._pruner_state = None
        else:
            self._prune_if_due(0)

    def _prune_if_due(self, step: int) -> None:
        if self.pruner is None or self.pruner.done:
            return
        changes = self.pruner.step(step)
        if changes:
            optimizer = self.optimizer
            replace_parameters(getattr(optimizer, "optimizer", optimizer), changes)
            rebuild_reducer(self.model_wrapped)

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward as in Trainer; after the last one of an optimizer step importance is collected."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.pruner is not None and not self.pruner.done and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.pruner.collect(scale=scaler.get_scale() if scaler is not None else 1.0)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the sparsity reached."""
        if "loss" in logs and self.pruner is not None:
            logs = {**logs, "sparsity": round(self.pruner.sparsity(), 4)}
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.pruner is not None and not self.pruner.done:
            return False
        return super()._determine_best_metric(metrics, trial)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.pruner is not None and self.pruner.gates is not None:
            self.pruner.gates.write_into_weights()
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.pruner is not None and self.args.should_save:
            facts, tensors = self.pruner.state()
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            safetensors.torch.save_file({n: t.cpu() for n, t in tensors.items()}, Path(output_dir) / TENSORS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.prune is None:
            return
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise ValueError(
                f"{folder} was not written by a run that prunes ({STATE_FILE} is missing); start from it as a model instead"
            )
        self._pruner_state = folder

    def _finish_pruning(self) -> None:
        if self.pruner is None:
            return
        reached, wanted = self.pruner.sparsity(), self.pruner.config.target.sparsity
        if not self.pruner.done:
            logger.warning("training stopped before the schedule's end: sparsity is %.3f of %.3f", reached, wanted)
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
            units={name: list(pair) for name, pair in read_units(model.config).items()},
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

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer._finish_pruning()


def _broadcast(tensor: torch.Tensor) -> None:
    """Give all processes the first one's tensor, in place."""
    torch.distributed.broadcast(tensor, src=0)
