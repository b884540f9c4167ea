"""Quantization-aware training: the layers multiply with rounded weights, and in the end these are what is saved."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hfcompress.config import QATConfig, Recipe
from hfcompress.quantization.aware import make_aware, round_aware
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, note_step, put_rounded
from hfcompress.training.exact import ExactTrainerMixin

logger = logging.getLogger(__name__)


class QATMixin(ExactTrainerMixin):
    """Adds quantization-aware training to a Trainer.

    * a callback at the start and after each optimizer step: lets the layers round their weights as the recipe says for this share of
      the run. What is trained are the whole weights underneath; rounding follows from them, so checkpoints are those of the plain
      model and a run goes on to the bit.
    * `_determine_best_metric`: only models in the last format can be the best.
    * `train`: puts the layers that hold the rounded weights in the place of those that were trained.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        self.qat: QATConfig | None = None if recipe is None else recipe.qat
        self._layers: list[str] = []
        self._format: str | None = None
        if self.qat is not None:
            for name in (*self.qat.first, self.qat.format):
                format_of(name)
        super().__init__(model, *args, recipe=recipe, **kwargs)
        if self.qat is not None:
            self.add_callback(_QATCallback(self))

    def _start_rounding(self) -> None:
        assert self.qat is not None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "quantization-aware training looks at whole blocks of weights, which FSDP and DeepSpeed hold in shards; use plain "
                "data parallelism (configs/accelerate/ddp.yaml)"
            )
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model, "is_quantized", False):
            raise ValueError("the model is quantized already; train the model it was made from")
        self._layers = layers_to_quantize(model, skip=tuple(self.qat.skip))
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no linear layers to quantize that are not skipped")
        self._format = None
        make_aware(model, dict.fromkeys(self._layers))
        self._round_as_due(self.state.global_step)

    def _round_as_due(self, step: int) -> None:
        assert self.qat is not None
        due = self.qat.format_at(step / max(self.state.max_steps, 1))
        if due != self._format:
            make_aware(self.accelerator.unwrap_model(self.model), dict.fromkeys(self._layers, due))
            logger.info("step %d: %d linear layers multiply with weights in %s", step, len(self._layers), due)
            self._format = due

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
            model = self.accelerator.unwrap_model(self.model)
            if self._format != self.qat.format:
                logger.warning(
                    "training stopped before the weights were in %s: they are in %s", self.qat.format, self._format
                )
            rounded = round_aware(model)
            if rounded:
                put_rounded(model, rounded)
                note_step(model, rounded, settings=self.qat.model_dump(), optimizer_steps=self.state.global_step)
        return output


class _QATCallback(TrainerCallback):
    """Tells the trainer when to start and to look at the schedule."""

    def __init__(self, trainer: QATMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._start_rounding()

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.trainer._round_as_due(state.global_step)
