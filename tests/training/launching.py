"""Starts jobs of `tests.training.scenarios` on several processes as users start scripts: with the files of configs/accelerate."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    # Accelerate ignores FSDP without a GPU: see `tests.training.scenarios.arguments`.
    "HFCOMPRESS_FSDP_ON_CPU": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    folder: Path, jobs: Mapping[str, dict[str, Any]], *, config: str = "ddp", processes: int = 2, gpu: bool = False
) -> None:
    """Run jobs one after the other in one process group.

    Args:
        folder: New; each job gets a folder in it.
        jobs: Name to options.
        config: A file of configs/accelerate, without its ending.
        processes: How many.
        gpu: On as many GPUs (nccl); else on the CPU (gloo).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if gpu:
        jobs = {name: {**job, "use_cpu": False} for name, job in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{config}.yaml"), "--mixed_precision", "no"]
    command += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    command += ["-m", "tests.training.scenarios", str(folder), str(folder / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **({} if gpu else CPU)}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout=400)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code != 0:
        # What torch's launcher says at the end is not what went wrong.
        said = (folder / "output.txt").read_text().partition("ChildFailedError")[0]
        raise RuntimeError(said[-8000:])


def launched(
    tmp_path_factory: pytest.TempPathFactory, name: str, jobs: Mapping[str, dict[str, Any]], **settings: Any
) -> Path:
    """The folder of all jobs, run once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not folder.exists():
            launch(folder, jobs, **settings)
        if not (folder / list(jobs)[-1]).exists():
            pytest.fail(f"the run of {name} failed: its output is in the first failure")
    return folder


def read_facts(folder: Path, job: str) -> dict[str, Any]:
    found = json.loads((folder / job / "facts.json").read_text())
    if "skip" in found:
        pytest.skip(found["skip"])
    return found
