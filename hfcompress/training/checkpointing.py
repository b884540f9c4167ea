"""What makes a run survive: checkpoints that are whole or not there, of this run or refused, and a Ctrl-C that saves first."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

import hfcompress
from hfcompress.checkpoints.adapters import save_record
from hfcompress.checkpoints.staging import disk_reason
from hfcompress.distillation.teachers import without_adapters
from hfcompress.training.checkpoints import (
    SEAL_FILE,
    STAGING_FOLDER,
    CheckpointError,
    add_checksums,
    last_checkpoint,
    read_seal,
    require_same_run,
    seal,
)
from hfcompress.training.loading import load_weights
from hfcompress.training.optimizers import rebuild_reducer, replace_parameters

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object  # mixed into Trainer and Seq2SeqTrainer alike

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS_FILE = "training_args.json"
_TRAINER_STATE_FILE = "trainer_state.json"
# Settings that a run should end with as it began; Trainer goes on with a mixture of both values.
_STEADY = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "seed",
    "data_seed",
    "label_smoothing_factor",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "fp16",
    "bf16",
]
# A terminal and the launcher both tell a process of one Ctrl-C.
_SAME_SIGNAL_S = 1.0


class CheckpointingMixin(_TrainerBase):
    """Overrides of `Trainer` about checkpoints.

    * `train`: finds the last checkpoint that is whole, and refuses damaged ones and those of other runs. Ctrl-C saves a checkpoint first.
    * `_save_checkpoint`, `_get_output_dir`: write a checkpoint into a folder aside, seal it, and move it to its place.
    * `_push_from_checkpoint`: waits until then.
    * `_load_from_checkpoint`, `_load_best_model`: load through `from_pretrained`, which knows names and shapes on disk.
    * `_save`: writes the training arguments as JSON instead of a pickle.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._staging = False
        self._found: str | None = None  # the checkpoint that was found, and read, last
        self._checksums: threading.Thread | None = None
        self._interrupt = Interrupt()
        super().__init__(*args, **kwargs)
        self.add_callback(_InterruptCallback(self._interrupt))

    def _run_facts(self) -> dict[str, Any]:
        """What must be the same for a run that goes on from a checkpoint; the mixins each add theirs."""
        model = without_adapters(self.accelerator.unwrap_model(self.model))
        config = getattr(model, "config", None)
        return {
            "version": hfcompress.__version__,
            "model": {
                "class": type(model).__name__.removeprefix("FSDP"),
                "model_type": getattr(config, "model_type", None),
            },
        }

    def _require_finite(self) -> None:
        """Raise if the run is broken, so that nothing is saved over a good checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        for name, parameter in model.named_parameters():
            # A sum is as good as a look at each, and reads the weights only once.
            if parameter.is_floating_point() and not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
                raise CheckpointError(
                    f"step {self.state.global_step}: the weights {name} are not finite, so no checkpoint is written; "
                    "lower learning_rate or max_grad_norm, and go on from the last checkpoint"
                )

    # ---- going on ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, going on from a checkpoint only if it is whole and of this run.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last one in `output_dir` that is whole.
            *args: As of Trainer.
            **kwargs: As of Trainer.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to another run, or there is none.
            KeyboardInterrupt: After Ctrl-C, once a checkpoint was written.
        """
        resume: str | bool | None = resume_from_checkpoint
        if resume is True:
            resume = self.find_checkpoint()
            if resume is None:
                raise CheckpointError(
                    f"{self.args.output_dir} holds no checkpoint that is whole; leave out resume_from_checkpoint to begin anew"
                )
        if resume:
            unread = resume != self._found and self.args.local_process_index == 0
            facts = read_seal(resume, contents=unread)
            require_same_run(Path(resume).name, facts, self._run_facts())
            self._say_what_changed(Path(resume), facts)
        if self.args.should_save:
            shutil.rmtree(Path(str(self.args.output_dir)) / STAGING_FOLDER, ignore_errors=True)
        with self._interrupt.heard():
            try:
                return super().train(resume, *args, **kwargs)
            finally:
                self._finish_checksums()

    def find_checkpoint(self) -> str | None:
        """The last checkpoint in `output_dir` that is whole, the same on all processes; None if there is none."""
        found: list[str | None] = [None]
        if self.args.process_index == 0:
            last = last_checkpoint(str(self.args.output_dir))
            found = [None if last is None else str(last)]
        self._found = broadcast_object_list(found)[0]
        return self._found

    def _say_what_changed(self, folder: Path, facts: dict[str, Any]) -> None:
        """Warn about what makes the rest of the run another one than it would have been."""
        path = folder / TRAINING_ARGUMENTS_FILE
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        now = json.loads(self.args.to_json_string())
        changed = [f"{n} was {before[n]} and is {now[n]}" for n in _STEADY if n in before and before[n] != now.get(n)]
        for name, value in self._surroundings().items():
            if facts.get("ran_on", {}).get(name) != value:
                changed.append(f"{name} was {facts.get('ran_on', {}).get(name)} and is {value}")
        if changed:
            logger.warning("going on from %s with other settings: %s", folder.name, "; ".join(changed))

    def _surroundings(self) -> dict[str, Any]:
        """What may change, but then the result is not the same to the bit."""
        dataset: Any = self.train_dataset
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "number of processes": self.args.world_size,
            "number of training examples": len(dataset) if hasattr(dataset, "__len__") else None,
        }

    # ---- writing ----

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING_FOLDER) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._require_finite()
        self._finish_checksums()
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        try:
            self._staging = True
            super()._save_checkpoint(model, trial)
            self._staging = False
            self._note_best(run)
            self._put_in_place(run / STAGING_FOLDER / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = disk_reason(error) or (error.strerror if isinstance(error, OSError) else None)
            if reason is None:
                raise
            raise CheckpointError(_cannot_write(run, name, reason)) from error
        finally:
            self._staging = False
            if self.args.should_save:
                shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _note_best(self, run: Path) -> None:
        """Name the best checkpoint by the place that it will have."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")
            if self.args.should_save:
                staged = run / STAGING_FOLDER / f"checkpoint-{self.state.global_step}"
                self.state.save_to_json(str(staged / _TRAINER_STATE_FILE))

    def _put_in_place(self, staged: Path, final: Path) -> None:
        """Seal what all processes have written and move it to where checkpoints are looked for."""
        self.accelerator.wait_for_everyone()
        # Without a common disk the first process of each machine finds what its own machine wrote.
        for movers in (self.args.should_save, self.args.local_process_index == 0):
            if movers and staged.is_dir():
                seal(staged, {**self._run_facts(), "step": self.state.global_step, "ran_on": self._surroundings()})
                if final.exists():  # of an earlier run, or of the same one before it went on from further back
                    shutil.rmtree(final)
                staged.rename(final)
                # Training goes on meanwhile; where the run is killed before, sizes are what is checked.
                self._checksums = threading.Thread(target=add_checksums, args=(final, final.parent / f"_{SEAL_FILE}"))
                self._checksums.start()
            self.accelerator.wait_for_everyone()

    def _finish_checksums(self) -> None:
        if self._checksums is not None:
            self._checksums.join()
        self._checksums = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            (folder / "training_args.bin").unlink(missing_ok=True)
            arguments = json.loads(self.args.to_json_string())
            for private in ("output_dir", "logging_dir"):  # paths of this machine
                arguments.pop(private, None)
            (folder / TRAINING_ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
            model = self.accelerator.unwrap_model(self.model)
            if without_adapters(model) is not model:
                save_record(model.config, folder)

    # ---- reading ----

    def _loads_plainly(self, model: nn.Module) -> bool:
        """Whether a checkpoint of this model is a folder that `from_pretrained` of its class reads."""
        return (
            isinstance(model, PreTrainedModel)
            and getattr(model, "quantization_method", None) is None
            and not getattr(model, "_hf_peft_config_loaded", False)
            and not self.is_deepspeed_enabled
            and not self.is_fsdp_enabled
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self._loads_plainly(target):
            changes = load_weights(target, resume_from_checkpoint)
            if changes and self.optimizer is not None:  # the user's own, or that of an earlier run
                replace_parameters(getattr(self.optimizer, "optimizer", self.optimizer), changes)
                rebuild_reducer(self.model_wrapped)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not self._loads_plainly(self.model):
            super()._load_best_model()
            return
        logger.info("loading the best model from %s (score %s)", best, self.state.best_metric)
        load_weights(self.model, best)


def _cannot_write(run: Path, name: str, reason: str) -> str:
    place = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e6
    left = last_checkpoint(run)
    kept = f"the last good checkpoint is {left.name}" if left is not None else "there is no earlier checkpoint"
    return f"{name} could not be written to {run}: {reason}, {free:,.0f} MB are free there; {kept}; make room and start again to go on from it"


class Interrupt:
    """Ctrl-C in training: the first one asks for a checkpoint after the step at hand, the second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._at = 0.0
        self._answer: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen for it; only the main thread of a process can."""
        self.asked, self._answer = False, None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler:  # somebody else listens
            yield
            return
        signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, _number: int, _frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._at = True, now
            logger.warning("stopping: a checkpoint is written after this step (Ctrl-C again stops at once)")
        elif now - self._at > _SAME_SIGNAL_S:
            raise KeyboardInterrupt

    def agreed(self, device: torch.device, *, alone: bool) -> bool:
        """Whether to stop after this step, the same on all processes: they hear of it one step later, so that none waits."""
        if alone:
            return self.asked
        stop = False
        if self._answer is not None:
            flag, work = self._answer
            work.wait()
            stop = bool(flag.item() > 0)
        flag = torch.tensor([float(self.asked)], device=device)
        self._answer = (flag, torch.distributed.all_reduce(flag, async_op=True))
        return stop


class _InterruptCallback(TrainerCallback):
    """Asks for the checkpoint, and stops once it is there."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self._stopping = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._stopping = False

    def on_step_end(self, args: Any, _state: Any, control: Any, **_: Any) -> None:
        if self.interrupt.agreed(args.device, alone=args.world_size == 1):
            self._stopping = control.should_save = True

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if self._stopping:
            raise KeyboardInterrupt(
                f"stopped after step {state.global_step}; checkpoint-{state.global_step} is in {args.output_dir}"
            )
