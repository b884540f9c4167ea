"""Training whose parameters, gradients or optimizer states are held in shards (FSDP, DeepSpeed), and what is different there.

Parameters in shards cannot change their shape while an optimizer and a wrapper hold them. So nothing is cut or replaced in the model that
is trained: a whole copy is made of what is saved, and that is finished.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import deepspeed as hf_deepspeed

from hfcompress.anatomy import StructureError, find_layers
from hfcompress.distillation.placement import WHOLE_SHARE, Sharding, available_bytes, weight_bytes
from hfcompress.distillation.teachers import without_adapters
from hfcompress.training.checkpointing import CheckpointingMixin

logger = logging.getLogger(__name__)

_NAMES = {"fsdp": "FSDP", "zero2": "DeepSpeed", "zero3": "DeepSpeed ZeRO-3"}
APART_FILE = "hfcompress_optimizer.pt"
PLAIN = "plain data parallelism (configs/accelerate/ddp.yaml)"


class ShardedMixin(CheckpointingMixin):
    """Overrides of `Trainer` for FSDP and DeepSpeed, and warnings where the launcher does not do what was asked.

    * `_save`: saves a whole copy of a model that is held in shards, finished as a model would be that is not.
    * `save_model`: with FSDP also where checkpoints are kept in shards; Trainer would write nothing.
    * a callback after each optimizer step, `_save_optimizer_and_scheduler`, `_load_optimizer_and_scheduler`: an optimizer of their own for
      parameters beside a model in shards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._apart: torch.optim.Optimizer | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_ApartCallback(self))
        self._warn_about_launch()
        if self.is_fsdp_enabled:
            self._prepare_fsdp()

    def _warn_about_launch(self) -> None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            logger.warning(
                "FSDP was asked for, but Accelerate ignores it on this device: plain data parallelism is used"
            )
        warn_if_alone()

    def _prepare_fsdp(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP version 1 flattens parameters, so nothing here can be said of single layers; set fsdp_version: 2 "
                "(configs/accelerate/fsdp2.yaml)"
            )
        if plugin.transformer_cls_names_to_wrap is None:
            # What transformers names may hold the embeddings too, which Accelerate 1.15 wraps once more, and fails.
            with contextlib.suppress(StructureError):
                layers = find_layers(without_adapters(self.model))
                plugin.transformer_cls_names_to_wrap = sorted({class_of(layer).__name__ for layer in layers})

    @property
    def sharding(self) -> Sharding:
        """What is held in shards: "none", "zero2" gradients and optimizer states, "zero3" and "fsdp" parameters, too."""
        if self.is_deepspeed_enabled:
            return "zero3" if self.accelerator.state.deepspeed_plugin.zero_stage == 3 else "zero2"
        if self.is_fsdp_enabled or (self.model is not None and is_sharded(self.model)):
            return "fsdp"
        return "none"

    def _refuse(self, what: str, instead: str = PLAIN) -> None:
        """Say that something cannot be done with parts of it in shards, and where it can."""
        raise ValueError(f"{what} cannot be done under {_NAMES[self.sharding]}; use {instead}")

    def _require_saving_whole(self) -> None:
        """Refuse a model whose weights never come together before they are written."""
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "the model was loaded in shards (distributed_config), so what is saved cannot be cut or rounded; load it whole and "
                "use configs/accelerate/fsdp2.yaml"
            )

    def _loss_scale(self) -> float:
        """What the loss is multiplied by for mixed precision."""
        if self.is_deepspeed_enabled:
            return float(getattr(self.model_wrapped.optimizer, "loss_scale", 1.0))
        return float(self.accelerator.scaler.get_scale()) if self.accelerator.scaler is not None else 1.0

    # ---- saving ----

    def _finish_whole(self, model: PreTrainedModel) -> None:
        """Do to a whole copy, in place, what cannot be done to the model in shards; the mixins each do theirs."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        live: Any = self.model  # type: ignore[has-type]
        trained = self.accelerator.unwrap_model(live)
        plain = isinstance(trained, PreTrainedModel) and not getattr(trained, "_hf_peft_config_loaded", False)
        if not state_dict or self.sharding == "none" or not plain or getattr(trained, "is_quantized", False):
            super()._save(output_dir, state_dict)
            return
        with loading_whole():  # this process alone builds models here
            model = whole_copy(trained, state_dict)
            self._finish_whole(model)
            self.model = model
            try:
                super()._save(output_dir)
            finally:
                self.model = live

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does, and where it would write nothing, too."""
        if self.is_fsdp_enabled and not _internal_call:
            state: Any = self.accelerator.state.fsdp_plugin.state_dict_type
            if "FULL_STATE_DICT" not in str(state):
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
                return
        super().save_model(output_dir, _internal_call)

    # ---- what is trained beside the model ----

    def _optimize_apart(self, parameters: list[nn.Parameter]) -> None:
        """Give parameters an optimizer of their own: FSDP and DeepSpeed take those of the model and no others."""
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
        self._apart = kind([{"params": parameters, "weight_decay": 0.0}], **settings)

    def _step_apart(self) -> None:
        """Their step, after the model's and at the same rate; one whose gradients overflowed is left out."""
        if self._apart is None:
            return
        group, scale = self._apart.param_groups[0], self._loss_scale()
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            for gradient in gradients:
                gradient /= scale
            group["lr"] = self._get_learning_rate()
            self._apart.step()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._apart is not None and self.args.should_save:
            torch.save(self._apart.state_dict(), Path(output_dir) / APART_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            # DeepSpeed loads weights itself and never calls what others load theirs with.
            self._note_resumed(checkpoint)
            if self._apart is not None:
                self._apart.load_state_dict(torch.load(Path(checkpoint) / APART_FILE, weights_only=True))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _note_resumed(self, folder: str) -> None:
        """Remember the checkpoint that a run goes on from; the mixins take up theirs before the first step."""


class _ApartCallback(TrainerCallback):
    """Steps the optimizer of what is beside a model in shards."""

    def __init__(self, trainer: ShardedMixin) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer._step_apart()


# ---- models in shards ----


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are held in shards, by FSDP or by DeepSpeed."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def class_of(model: nn.Module) -> Any:
    """The class that a model was made from; FSDP puts one of its own in its place.

    Example:
        >>> class_of(nn.Linear(2, 2)).__name__
        'Linear'
    """
    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)


def outline(model: nn.Module) -> nn.Module:
    """A model of the same class and shapes without memory (on the meta device), whatever the parameters of this one are like.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> shapes = [tuple(p.shape) for p in outline(model).parameters()]
        >>> shapes == [tuple(p.shape) for p in model.parameters()]
        True
    """
    with torch.device("meta"):
        return class_of(model)(copy.deepcopy(model.config))


def in_full_view(model: nn.Module) -> nn.Module:
    """A model whose shapes can be read: itself, or its outline where DeepSpeed has emptied its parameters."""
    return outline(model) if any(hasattr(p, "ds_id") for p in model.parameters()) else model


def whole_copy(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A plain model with the given weights, which are used as they are, not copied.

    Args:
        model: The model in shards; it gives class, config and mode.
        state_dict: All its weights, whole.
    """
    fresh: PreTrainedModel = outline(model)  # type: ignore[assignment]
    fresh.load_state_dict(dict(state_dict), assign=True)
    fresh.tie_weights()
    fresh.generation_config = getattr(model, "generation_config", None)
    return fresh.eval()


@contextmanager
def loading_whole() -> Iterator[None]:
    """Inside, `from_pretrained` gives every process all weights, whatever is trained in shards around it."""
    name, before = "FSDP_CPU_RAM_EFFICIENT_LOADING", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    os.environ[name] = "false"
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def digest(model: nn.Module, facts: Any = None) -> str:
    """Tells models apart: names, shapes, and the numbers of every tensor that each process holds whole.

    Args:
        model: The model, not wrapped.
        facts: JSON-able; what else has to be the same.

    Example:
        >>> digest(nn.Linear(2, 2)) == digest(nn.Linear(2, 2))
        False
    """
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(getattr(tensor, 'ds_shape', tensor.shape))}".encode())
        if not isinstance(tensor, DTensor) and tensor.numel():
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---- teachers ----


def place_teacher(models: Sequence[nn.Module], trainer: ShardedMixin) -> list[nn.Module]:
    """Put teachers where a strategy that shards parameters wants them: in shards too, unless they take little of the memory.

    They are on every process what they are on the first: with FSDP, only that one may have read the file.

    Args:
        models: Teachers, frozen, in eval mode; changed in place.
        trainer: Its strategy is "fsdp" or "zero3".

    Returns:
        Those that were sharded; the others are whole, once per process.
    """
    device, sharded = trainer.args.device, []
    for model in models:
        if trainer.sharding == "fsdp":
            _same_as_first(model, device)
            if _is_large(model, device):
                _shard(model, trainer)
                sharded.append(model)
        elif is_sharded(model) or _is_large(model, device):
            _partition(model, trainer)
            sharded.append(model)
    if models:
        how = "in shards" if sharded else "whole on each process"
        logger.info("the teacher is kept %s (%s)", how, device)
    return sharded


def _is_large(model: nn.Module, device: torch.device) -> bool:
    """Whether a teacher takes more of the free memory than it should; the first process decides."""
    if getattr(model, "quantization_method", None) is not None:
        return False  # packed weights have no shards
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = available_bytes(device, local_world_size=local)
    decision = [weight_bytes(without_adapters(model)) > WHOLE_SHARE * room]
    torch.distributed.broadcast_object_list(decision, src=0)
    return decision[0]


def _same_as_first(model: nn.Module, device: torch.device) -> None:
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
            moved = tensor.detach().to(device)
            torch.distributed.broadcast(moved, src=0)
            tensor.copy_(moved)


def _shard(model: nn.Module, trainer: ShardedMixin) -> None:
    """Shard a teacher, layer by layer, over the processes that the student is sharded over, in place."""
    mesh = getattr(trainer.accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(trainer.accelerator.parallelism_config.fsdp_dim_names)]
    for layer in find_layers(without_adapters(model)):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _partition(model: nn.Module, trainer: ShardedMixin) -> None:
    """Hand a teacher to DeepSpeed, which gathers each layer's weights when it is run, in place."""
    import deepspeed

    given = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    config = {name: given[name] for name in ("bf16", "fp16") if name in given}
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.initialize(model=model, config=config)
    model.eval()


# ---- the launch ----


def processes_asked_for(command: Sequence[str]) -> int:
    """How many processes a command line of `accelerate launch` asks for; 1 if it is none, or does not say.

    Example:
        >>> processes_asked_for(["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "train.py"])
        2
        >>> processes_asked_for(["bash", "train.sh"])
        1
    """
    words = [Path(word).name for word in command[:4]]
    start = next(
        (n for n, word in enumerate(words) if word in ("launch", "accelerate-launch", "accelerate.commands.launch")),
        None,
    )
    if start is None:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        asked, _ = launch_command_parser().parse_known_args(list(command[start + 1 :]))
    except SystemExit:  # another version's command line
        return 1
    if asked.num_processes is None and (asked.config_file or Path(default_config_file).is_file()):
        asked.num_processes = load_config_from_file(asked.config_file).num_processes
    return asked.num_processes or 1


@functools.cache
def warn_if_alone() -> None:
    """Warn if the launcher was asked for several processes and silently started one, as Accelerate does with --cpu."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    try:
        parent = psutil.Process().parent()
        asked = 1 if parent is None else processes_asked_for(parent.cmdline())
    except (psutil.Error, OSError, ValueError):
        return
    if asked > 1:
        logger.warning(
            "accelerate launch was asked for %d processes and started one: with --cpu (or use_cpu, MULTI_CPU) it always does; start CPU "
            "processes with --config_file configs/accelerate/ddp.yaml --num_processes %d, or with torchrun",
            asked,
            asked,
        )
