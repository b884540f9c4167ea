"""Benchmark: a run that prunes and distils is killed at a random moment and goes on; and what its checkpoints cost beside Trainer's own.

    python scripts/bench/survival.py --model PATH --train sst2_train.parquet --kills 20 --kills-ddp 5

Each of the killed runs is a process of its own (or a group of two, gloo): SIGKILL reaches it at a moment drawn evenly between its first step and
its end, saving included, and again with probability one half when it goes on. In the end its weights are compared bit by bit with those of a
run that nobody disturbed. Writes scripts/bench/results/survival.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from facts import run_facts

from hfcompress import CompressionTrainer, Recipe
from hfcompress.runs.arguments import training_arguments
from hfcompress.tasks import prepare
from hfcompress.training.checkpoints import STAGING_FOLDER, last_checkpoint

RESULTS = Path(__file__).resolve().parent / "results" / "survival.json"
STEPS = 20
RECIPE = {
    "distill": {"task": {"weight": 0.5}, "logits": {"weight": 0.5}, "hidden": {"weight": 1.0}},
    "prune": {
        "target": {"sparsity": 0.5},
        "criterion": "first_order",
        "repair": True,
        "schedule": {"start": 0.1, "end": 0.7, "updates": 3},
    },
}
TRAIN = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-4,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "use_cpu": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the fine-tuned model, also the teacher")
    parser.add_argument("--train", required=True, help="parquet file with sentence and label")
    parser.add_argument("--kills", type=int, default=20, help="runs of one process that are killed")
    parser.add_argument("--kills-ddp", type=int, default=5, help="runs of two processes that are killed")
    parser.add_argument("--saves", type=int, default=7, help="checkpoints of each kind that are timed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", default=str(RESULTS), help="file to write")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.child:
        train(options, Path(options.child))
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = cost_of_saving(options, Path(folder))
        for processes, kills in ((1, options.kills), (2, options.kills_ddp)):
            if kills:
                figures |= survived(options, Path(folder), processes=processes, kills=kills)
    result = {
        **run_facts(seed=options.seed),
        "data": {"name": Path(options.train).name, "n": STEPS * TRAIN["per_device_train_batch_size"]},
        "recipe": RECIPE,
        "figures": figures,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def make_trainer(options: argparse.Namespace, folder: Path, cls: type, **changes: Any) -> Any:
    """A trainer on the benchmark's model and data; of plain `Trainer` without teacher and recipe."""
    recipe = Recipe.from_dict(
        {
            **RECIPE,
            "data": {
                "train": f"{options.train}",
                "text": "sentence",
                "label": "label",
                "max_length": 32,
                "max_train": 400,
            },
        }
    )
    assert recipe.data is not None
    task = prepare(recipe.data, task="text-classification", model_name=options.model, seed=0)

    def load() -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(options.model, dtype=torch.float32)

    own = {} if cls is transformers.Trainer else {"teacher": load(), "recipe": recipe}
    return cls(
        model=load(),
        args=training_arguments(folder, {**TRAIN, "max_steps": STEPS, **changes}, seed=0),
        train_dataset=task.train_dataset,
        data_collator=task.data_collator,
        **own,
    )


# ---- killed ----


def train(options: argparse.Namespace, folder: Path) -> None:
    """One run, or what is left of it, to its end; says when it begins and what it ended with."""
    trainer = make_trainer(options, folder, CompressionTrainer)
    print("begins", flush=True)
    trainer.train(resume_from_checkpoint=True if last_checkpoint(folder) else None)
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    if trainer.is_world_process_zero():
        (folder / "digest").write_text(digest.hexdigest(), encoding="utf-8")


def launch(options: argparse.Namespace, folder: Path, processes: int) -> subprocess.Popen[str]:
    own = [str(Path(__file__).resolve()), "--model", options.model, "--train", options.train, "--child", str(folder)]
    group = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    command = [sys.executable, *([] if processes == 1 else [*group, "--master-port", str(free_port())]), *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def go(options: argparse.Namespace, folder: Path, processes: int, kill_after_s: float | None) -> tuple[bool, float]:
    """Start the run; whether it was killed before its end, and how long it trained."""
    process = launch(options, folder, processes)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "begins":
            break
    begun = time.perf_counter()
    try:
        process.wait(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True, time.perf_counter() - begun
    if process.returncode != 0:
        raise RuntimeError(f"the run in {folder} ended with {process.returncode}")
    return False, time.perf_counter() - begun


def survived(options: argparse.Namespace, folder: Path, *, processes: int, kills: int) -> dict[str, Any]:
    """How many killed runs end with the weights of one that was not."""
    _, length_s = go(options, folder / "whole", processes, None)
    expected = (folder / "whole" / "digest").read_text(encoding="utf-8")
    generator = random.Random(options.seed + processes)
    same = cut_short = saving = 0
    for number in range(kills):
        place = folder / f"killed-{processes}-{number}"
        times = 0
        while True:
            again = times == 0 or generator.random() < 0.5
            killed, trained_s = go(
                options, place, processes, generator.uniform(0.0, length_s) if again and times < 4 else None
            )
            if not killed and times:
                break
            if not killed:  # it was over before its moment came
                shutil.rmtree(place)
                continue
            times += 1
            saving += (place / STAGING_FOLDER).is_dir()
            print(
                f"{processes} processes, run {number + 1}: killed after {trained_s:.1f} s of {length_s:.1f}", flush=True
            )
        cut_short += times
        same += (place / "digest").read_text(encoding="utf-8") == expected
        shutil.rmtree(place)
    shutil.rmtree(folder / "whole")
    return {
        f"survived_{processes}_processes" if processes > 1 else "survived_1_process": {
            "value": same / kills,
            "unit": f"of {kills} runs, killed {cut_short} times in all ({saving} of them while a checkpoint was written), end with the same bits",
            "spread": None,
            "goal": "1.0",
            "met": same == kills,
        }
    }


# ---- what it costs ----


def cost_of_saving(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint of ours in the middle of a run over those of one of Trainer's, in turns."""
    trainers = {
        "ours": make_trainer(options, folder / "ours", CompressionTrainer, max_steps=3, save_strategy="no"),
        "plain": make_trainer(options, folder / "plain", transformers.Trainer, max_steps=3, save_strategy="no"),
    }
    for trainer in trainers.values():
        trainer.args.save_total_limit = None
        trainer.train()
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    size = {}
    for number in range(options.saves):
        for name, trainer in list(trainers.items())[:: 1 if number % 2 else -1]:
            os.sync()  # what was written before is no business of this one
            begun = time.perf_counter()
            trainer._save_checkpoint(trainer.model, None)
            took = time.perf_counter() - begun
            if name == "ours":
                trainer._finish_checksums()  # which training goes on beside
            written = folder / name / f"checkpoint-{trainer.state.global_step}"
            parameters = sum(p.numel() for p in trainer.model.parameters())  # ours is being pruned
            seconds[name].append(took / parameters)
            size[name] = sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) / parameters
            shutil.rmtree(written)
    ratios = [ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "checkpoint_seconds_over_plain": {
            "value": statistics.median(ratios),
            "unit": "s per parameter over s per parameter, median of pairs",
            "spread": [min(ratios), max(ratios)],
            "goal": "<= 1.05",
            "met": statistics.median(ratios) <= 1.05,
        },
        "checkpoint_bytes_over_plain": {
            "value": size["ours"] / size["plain"],
            "unit": "bytes per parameter over bytes per parameter",
            "spread": None,
            "goal": "<= 1.05",
            "met": size["ours"] / size["plain"] <= 1.05,
        },
    }


if __name__ == "__main__":
    main()
