"""A small run in a process of its own that something happens to: `python -m tests.training.faults FOLDER FAULT STEP [resume]`."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from hfcompress.training import CompressionTrainer
from tests.training.scenarios import compress, everything

OPTIONS: dict[str, Any] = {
    "dropout": 0.1,
    "max_steps": 8,
    "n": 14,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "teacher_width": 64,
}


class Fault(TrainerCallback):
    """Makes something happen after a step."""

    def __init__(self, fault: str, step: int) -> None:
        self.fault, self.step = fault, step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != self.step:
            return
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "dead-rank" and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if self.fault == "interrupt-one" and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if self.fault == "file-size":  # no file may grow beyond a few kB any more: as on a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


class KilledWhileSaving(CompressionTrainer):
    """Dies in the middle of writing a checkpoint: the model is there, the optimizer is not."""

    dies_at = 0

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def main() -> int:
    folder, fault, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    transformers.logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = dict(OPTIONS)
    if fault == "kill-saving":
        KilledWhileSaving.dies_at = step
        options["trainer"] = KilledWhileSaving
    given = {"callbacks": [Fault(fault, step)]}
    resume = True if "resume" in sys.argv[4:] else None
    try:
        trainer, model = compress(folder, resume=resume, given=given, **options)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"stopped: {error}\n")
        return 130
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if trainer.is_world_process_zero():
        torch.save(everything(model), folder / "weights.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
