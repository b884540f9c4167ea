"""Scripts on two processes (gloo, CPU): same plan and weights on both, and checkpoints that load."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

import hfcompress
from hfcompress.anatomy import find_sites
from tests.scripts.material import (
    AUTO_CLASSES,
    image_classification,
    seq2seq,
    text_classification,
    token_classification,
)

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [
    "train={num_train_epochs: 2, per_device_train_batch_size: 4, learning_rate: 1e-3, use_cpu: true, disable_tqdm: true}",
    "distill={hidden: {weight: 0.5}}",
    "prune={target: {sparsity: 0.5}, schedule: {start: 0.1, end: 0.7, updates: 3},"
    " multiple_of: {neurons: 4}, at_least: {neurons: 4}}",
    "measure={batch: 2, length: 8, rounds: 3, warmup: 0, threads: 1}",
]
# Several scripts one after the other, which saves starting anew. Loading by every way is looked at with the first of them.
DRIVER = """
import json, runpy, sys
from hfcompress.hub import verify
from tests.hub.folders import all_fine
for script, arguments in json.load(open(sys.argv[1])):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
    verify._run_child = all_fine
"""


def launch(folder: Path, runs: list[Callable[[Path], list[str]]]) -> subprocess.CompletedProcess[str]:
    """Start scripts, each with its data in a folder of its own, on two processes."""
    calls = []
    for make in runs:
        own = folder / make.__name__
        own.mkdir()
        (own / "recipe.yaml").write_text("seed: 3\n")
        given = [f"model={{name: {own / 'model'}}}", *make(own), f"output={own / 'run'}", *TRAIN]
        calls.append((str(ROOT / "scripts" / f"{make.__name__}.py"), ["--config", str(own / "recipe.yaml"), *given]))
    (folder / "calls.json").write_text(json.dumps(calls))
    (folder / "driver.py").write_text(DRIVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = ["--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml")]
    processes = ["--num_processes", "2", "--main_process_port", port]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *config,
            *processes,
            str(folder / "driver.py"),
            str(folder / "calls.json"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs",
    [
        [text_classification, image_classification],
        [token_classification, seq2seq],
    ],
    ids=["text-and-image", "words-and-seq2seq"],
)
def test_scripts_on_two_processes(runs, tmp_path: Path) -> None:
    done = launch(tmp_path, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    # Once for the teacher and once for the student; a run of one process says nothing of the kind.
    assert done.stderr.count("2 processes hold the same plan and weights") == 2 * len(runs)
    assert done.stdout.count("95 % interval") == len(runs)
    for make in runs:
        student = tmp_path / make.__name__ / "run" / "student"
        record = json.loads((student / "config.json").read_text())["hfcompress"]
        assert [step["step"] for step in record["steps"]] == ["prune", "distill"]
        loaded = hfcompress.load(student)
        left = {site.name: site.units for site in find_sites(loaded)}
        assert {name: pair[0] for name, pair in record["units"].items()}.items() <= left.items()
        assert type(getattr(transformers, AUTO_CLASSES[make]).from_pretrained(student)) is type(loaded)
        rows = json.loads((student.parent / "results.json").read_text())["rows"]
        assert [row["name"] for row in rows] == ["teacher", "pruned"]
        assert rows[1]["parameters"] < rows[0]["parameters"]
