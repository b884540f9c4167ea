"""Quantization-aware training: the layers multiply with rounded weights, and in the end these are what is saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hfcompress.config import QATConfig, Recipe
from hfcompress.distillation.teachers import student_inputs
from hfcompress.quantization.aware import InputRange, aware_layers, input_ranges, make_aware, round_aware
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, note_step, put_rounded
from hfcompress.training.exact import ExactTrainerMixin
from hfcompress.training.sharded import PLAIN

logger = logging.getLogger(__name__)

RANGES_FILE = "hfcompress_ranges.safetensors"


class QATMixin(ExactTrainerMixin):
    """Adds quantization-aware training to a Trainer.

    * a callback at the start and after each optimizer step: lets the layers round their weights as the recipe says for this share of
      the run. What is trained are the whole weights underneath; rounding follows from them, so checkpoints are those of the plain
      model and a run goes on to the bit.
    * ranges of activations are beside the model: in the optimizer if they are learned, and in a file of their own in checkpoints.
    * `_determine_best_metric`: only models in the last format can be the best.
    * `train`: puts the layers that hold the rounded weights in the place of those that were trained; where the model is in shards, that is
      done in what is saved afterwards.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        self.qat: QATConfig | None = None if recipe is None else recipe.qat
        self._layers: list[str] = []
        self._format: str | None = None
        self._trained = False
        self.recipe = recipe if recipe is not None else Recipe()
        self._ranges_from: Path | None = None
        if self.qat is not None:
            for name in (*self.qat.first, self.qat.format):
                format_of(name)
        super().__init__(model, *args, recipe=recipe, **kwargs)
        if self.qat is not None:
            self.add_callback(_QATCallback(self))

    def _refuse_in_shards_to_round(self) -> None:
        assert self.qat is not None
        self._require_saving_whole()
        if self.recipe.prune is not None:
            # The cut comes last there, and would change the blocks that share a scale after all training.
            self._refuse("pruning and quantization-aware training in one run", f"{PLAIN}, or do one after the other")
        if self.qat.activations is not None:
            self._refuse("qat.activations")

    def _make_layers_aware(self) -> None:
        assert self.qat is not None
        if self.sharding != "none":
            self._refuse_in_shards_to_round()
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model, "is_quantized", False):
            raise ValueError("the model is quantized already; train the model it was made from")
        self._layers = layers_to_quantize(model, skip=tuple(self.qat.skip))
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no linear layers to quantize that are not skipped")
        make_aware(model, dict.fromkeys(self._layers))

    def _make_beside(self) -> list[nn.Parameter]:
        """The ranges of activations that are learned."""
        beside = super()._make_beside()
        if self.qat is None or self.qat.activations is None:
            return beside
        self._make_layers_aware()
        model = self.accelerator.unwrap_model(self.model)
        learned = self.qat.activations.ranges == "learned"
        for name in self._layers:
            layer: Any = model.get_submodule(name)
            if layer.inputs is None:
                layer.inputs = InputRange(layer.weight.device, follows=not learned)
        if not learned:
            return beside
        return [*beside, *(p for one in input_ranges(model).values() for p in (one.low, one.high))]

    def _start_rounding(self) -> None:
        self._make_layers_aware()
        self._format, self._trained = None, False
        model = self.accelerator.unwrap_model(self.model)
        folder, self._ranges_from = self._ranges_from, None
        if folder is not None and (folder / RANGES_FILE).is_file():
            kept = safetensors.torch.load_file(folder / RANGES_FILE)
            for name, one in input_ranges(model).items():
                one.observing = False
                one.put(kept[name].to(one.low.device))
        self._round_as_due(self.state.global_step)

    def _calibrate_inputs(self) -> None:
        """Find the first ranges on training examples, the same ones on all processes."""
        assert self.qat is not None and self.qat.activations is not None
        batches = self._example_batches(
            self.qat.activations.samples, own_part=False, what="qat.activations", instead="use whole activations"
        )
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        for batch in batches:
            inputs = student_inputs(self._prepare_inputs(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                model(**inputs)
        model.train(was_training)
        for one in input_ranges(model).values():
            one.start()

    def _round_as_due(self, step: int) -> None:
        assert self.qat is not None
        due = self.qat.format_at(step / max(self.state.max_steps, 1))
        if due != self._format:
            model = self.accelerator.unwrap_model(self.model)
            if any(one.observing for one in input_ranges(model).values()):
                self._calibrate_inputs()
            left = aware_layers(model)
            make_aware(model, dict.fromkeys(left, due))
            logger.info("step %d: %d linear layers multiply with weights in %s", step, len(left), due)
            self._format = due

    def _end_rounded_step(self) -> None:
        """After an optimizer step: moving ranges follow what was seen, on all processes alike; gradients beside the model go."""
        for one in input_ranges(self.accelerator.unwrap_model(self.model)).values():
            one.low.grad = one.high.grad = None
            extremes = one.extremes() if one.follows else None
            if extremes is not None:
                if self.args.world_size > 1:
                    signs = torch.tensor([-1.0, 1.0], device=extremes.device)
                    extremes *= signs
                    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
                    extremes *= signs
                one.follow(extremes)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.qat is not None and self._format != self.qat.format:
            return False
        return super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the bits per weight that the layers multiply with."""
        if "loss" in logs and self._format is not None:
            logs = {**logs, "bits": format_of(self._format).scheme.bits}
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, then replace the layers by ones that hold their rounded weights."""
        output = super().train(*args, **kwargs)
        if self.qat is not None:
            if self._format != self.qat.format:
                logger.warning(
                    "training stopped before the weights were in %s: they are in %s", self.qat.format, self._format
                )
            self._trained = True
            if self.sharding == "none":
                self._put_rounded(self.accelerator.unwrap_model(self.model))
        return output

    def _put_rounded(self, model: PreTrainedModel) -> None:
        assert self.qat is not None
        inputs = {name: one.grid() for name, one in input_ranges(model).items() if not one.observing}
        rounded = round_aware(model)
        if rounded:
            inputs = {name: grid for name, grid in inputs.items() if name in rounded}
            put_rounded(model, rounded, inputs=inputs)
            note_step(model, rounded, settings=self.qat.model_dump(), optimizer_steps=self.state.global_step)

    def _finish_whole(self, model: PreTrainedModel) -> None:
        super()._finish_whole(model)
        if self.qat is not None and self._trained:
            make_aware(model, dict.fromkeys(self._layers, self._format))
            self._put_rounded(model)

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        ranges = input_ranges(self.accelerator.unwrap_model(self.model))
        ends = {
            name: torch.stack((one.low, one.high)).detach().cpu() for name, one in ranges.items() if not one.observing
        }
        if ends and self.args.should_save:
            safetensors.torch.save_file(ends, Path(output_dir) / RANGES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._ranges_from = Path(resume_from_checkpoint)


class _QATCallback(TrainerCallback):
    """Tells the trainer when to start and to look at the schedule."""

    def __init__(self, trainer: QATMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._start_rounding()

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.trainer._end_rounded_step()
        self.trainer._round_as_due(state.global_step)
