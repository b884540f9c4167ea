"""What happens to a run and to its checkpoints when something goes wrong: it goes on to the same bits, or it says what is the matter."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import hfcompress
from hfcompress.training import CompressionTrainer, DistillationTrainer, PlainTrainer
from hfcompress.training.checkpoints import SEAL_FILE, STAGING_FOLDER, CheckpointError, last_checkpoint, read_seal
from hfcompress.training.exact import NotFiniteError
from tests.training.faults import OPTIONS
from tests.training.launching import free_port
from tests.training.scenarios import build, compress, everything, make_trainer

ROOT = Path(__file__).parents[2]


def start(folder: Path, fault: str, step: int, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.training.faults", str(folder), fault, str(step), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def run(folder: Path, fault: str, step: int, *more: str) -> tuple[int, str]:
    process = start(folder, fault, step, *more)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@functools.cache
def uninterrupted(root: Path) -> torch.Tensor:
    _, model = compress(root / "uninterrupted", **OPTIONS)
    return everything(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return uninterrupted(tmp_path_factory.mktemp("whole"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# ---- killed ----


@pytest.mark.parametrize(
    ("fault", "step", "left"), [("kill", 5, ["checkpoint-2", "checkpoint-4"]), ("kill-saving", 4, ["checkpoint-2"])]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, whole: torch.Tensor, fault: str, step: int, left: list[str]
) -> None:
    status, _ = run(tmp_path, fault, step)
    assert status == -signal.SIGKILL and not (tmp_path / "weights.pt").exists()
    assert checkpoints(tmp_path) == left
    staged = tmp_path / STAGING_FOLDER
    assert staged.exists() == (fault == "kill-saving"), "what was being written stays aside"
    _, model = compress(tmp_path, resume=True, **OPTIONS)
    assert torch.equal(everything(model), whole)
    assert not staged.exists() and checkpoints(tmp_path)[-1] == "checkpoint-8"


def test_a_checkpoint_that_is_written_again_replaces_the_old_one(tmp_path: Path, whole: torch.Tensor) -> None:
    compress(tmp_path, **OPTIONS)
    before = read_seal(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "left-over").write_text("of a run before")
    _, model = compress(tmp_path, resume=tmp_path / "checkpoint-4", **OPTIONS)
    assert torch.equal(everything(model), whole)
    assert not (tmp_path / "checkpoint-6" / "left-over").exists()
    same = ("model.safetensors", "hfcompress_pruner.safetensors", "scheduler.pt")
    after = read_seal(tmp_path / "checkpoint-6")
    assert {name: after["files"][name] for name in same} == {name: before["files"][name] for name in same}


# ---- damaged ----


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "truncated weights": ("model.safetensors", truncate, "model.safetensors is not as it was written"),
    "one bit of the optimizer": ("optimizer.pt", flip, "optimizer.pt is not as it was written"),
    "no pruner": ("hfcompress_pruner.json", Path.unlink, "hfcompress_pruner.json is missing"),
    "no seal": (SEAL_FILE, Path.unlink, "it was not written to its end"),
    "half a seal": (SEAL_FILE, truncate, f"{SEAL_FILE} is damaged"),
    "a seal of something else": (SEAL_FILE, lambda path: path.write_text("[1, 2]"), f"{SEAL_FILE} is damaged"),
    "a deep seal": (SEAL_FILE, lambda path: path.write_text("[" * 100_000), f"{SEAL_FILE} is damaged"),
    "a seal that points elsewhere": (
        SEAL_FILE,
        lambda path: path.write_text('{"format": 1, "files": {"../../x": {"size_bytes": 1, "crc32": "0"}}}'),
        "x is missing",
    ),
    "another format": (
        SEAL_FILE,
        lambda path: path.write_text('{"format": 9, "files": {}}'),
        "has format 9 of another version",
    ),
}


@pytest.fixture(scope="module")
def run_with_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    compress(folder, **OPTIONS)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    tmp_path: Path, run_with_checkpoints: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, apply, message = DAMAGES[damage]
    shutil.copytree(run_with_checkpoints, tmp_path / "run")
    apply(tmp_path / "run" / "checkpoint-8" / name)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-6"
    assert message in caplog.text and "looking for an earlier one" in caplog.text
    trainer = make_trainer(tmp_path / "run", **OPTIONS)
    with pytest.raises(CheckpointError, match="checkpoint-8") as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_there_may_be_no_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **OPTIONS)
    with pytest.raises(CheckpointError, match="holds no checkpoint that is whole; leave out resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="nowhere is not there"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


# ---- of another run ----


def test_checkpoints_of_other_runs_are_refused(
    tmp_path: Path, run_with_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(run_with_checkpoints / "checkpoint-4")

    def refused(match: str, **options: Any) -> None:
        trainer = make_trainer(tmp_path, **{**OPTIONS, **options})
        before = everything(trainer.model).clone()
        with pytest.raises(CheckpointError, match=match) as caught:
            trainer.train(resume_from_checkpoint=checkpoint)
        assert "\n" not in str(caught.value)
        assert torch.equal(everything(trainer.model), before)

    refused("another recipe: distill.logits.temperature was 2.0 and is 3.0", distill={"logits": {"temperature": 3.0}})
    refused("another recipe: prune.target.sparsity was 0.5 and is 0.4", sparsity=0.4)
    refused("another recipe: distill was .* and is not there", trainer="PruningTrainer")
    refused("another model: class was BertForSeq.* and is Roberta", family="roberta")
    refused("another teacher: teacher was [0-9a-f]{8} and is [0-9a-f]{8}", teacher_width=48)
    monkeypatch.setattr(hfcompress, "__version__", "0.0.9")
    refused(r"another version of hfcompress: version was \d.* and is 0.0.9")


def test_other_settings_are_said(tmp_path: Path, run_with_checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        changes = {"learning_rate": 5e-4, "n": 16}
        compress(tmp_path, resume=run_with_checkpoints / "checkpoint-4", **{**OPTIONS, **changes})
    assert (
        "other settings: learning_rate was 0.001 and is 0.0005; number of training examples was 14 and is 16"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        compress(tmp_path, resume=run_with_checkpoints / "checkpoint-4", **OPTIONS)
    assert "other settings" not in caplog.text


# ---- the disk ----


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, whole: torch.Tensor) -> None:
    status, errors = run(tmp_path, "file-size", 5)
    assert status == 2, errors
    line = errors.strip().splitlines()[-1]
    assert "checkpoint-6 could not be written to" in line and "the last good checkpoint is checkpoint-4" in line
    assert "MB are free there" in line and "make room and start again" in line
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"] and not (tmp_path / STAGING_FOLDER).exists()
    _, model = compress(tmp_path, resume=True, **OPTIONS)
    assert torch.equal(everything(model), whole)


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 could not be written to .*; there is no earlier checkpoint"
    ) as caught:
        trainer = make_trainer(tmp_path / "run", **OPTIONS)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").write_text("in the way")
        trainer.train()
    assert "\n" not in str(caught.value)


# ---- numbers that are none ----


class Breaks(TrainerCallback):
    """Makes a weight of a model infinite at the beginning of a step, or after the optimizer's."""

    def __init__(self, model: Any, step: int, *, when: str) -> None:
        self.model, self.step, self.when = model, step, when

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.when == "before" and state.global_step + 1 == self.step:
            self._break()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.when == "after" and state.global_step + 1 == self.step:
            self._break()

    def _break(self) -> None:
        with torch.no_grad():
            next(p for n, p in self.model.named_parameters() if n == "classifier.weight")[0, 0] = float("nan")


@pytest.mark.parametrize("kind", [CompressionTrainer, DistillationTrainer])
def test_a_broken_teacher_stops_the_run_and_is_named(tmp_path: Path, kind: type) -> None:
    teacher = build("bert", "sequence", seed=7)
    given = {"callbacks": [Breaks(teacher, 5, when="before")]}
    with pytest.raises(NotFiniteError, match="step 5: the loss term logits is not finite") as caught:
        compress(tmp_path, trainer=kind, teacher=teacher, given=given, **{**OPTIONS, "teacher_width": None})
    assert "\n" not in str(caught.value)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_broken_weights_are_not_saved(tmp_path: Path) -> None:
    model = build("bert", "sequence", seed=0)
    given = {"callbacks": [Breaks(model, 4, when="after")]}
    with pytest.raises(
        CheckpointError, match=r"step 4: the weights classifier.weight are not finite, so no checkpoint"
    ):
        compress(tmp_path, trainer=PlainTrainer, model=model, given=given, **{**OPTIONS, "teacher_width": None})
    assert checkpoints(tmp_path) == ["checkpoint-2"]


# ---- Ctrl-C ----


def test_ctrl_c_saves_and_stops(tmp_path: Path, whole: torch.Tensor) -> None:
    status, errors = run(tmp_path, "interrupt", 3)
    assert status == 130, errors
    assert "stopping: a checkpoint is written after this step" in errors
    assert f"stopped: stopped after step 3; checkpoint-3 is in {tmp_path}" in errors
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    _, model = compress(tmp_path, resume=True, **OPTIONS)
    assert torch.equal(everything(model), whole)


# ---- two processes ----


def launch(folder: Path, fault: str, step: int, *more: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "tests.training.faults", str(folder), fault, str(step), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def test_a_rank_dies_and_one_is_interrupted_and_the_end_is_the_same(tmp_path: Path) -> None:
    status, errors = launch(tmp_path / "whole", "none", 0)
    assert status == 0, errors
    begun = time.monotonic()
    status, errors = launch(tmp_path / "run", "dead-rank", 5)
    assert status not in (0, -signal.SIGKILL) and time.monotonic() - begun < 120
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    assert read_seal(tmp_path / "run" / "checkpoint-4")["ran_on"]["number of processes"] == 2
    # Only one of them hears of it; both save, one step later, and stop.
    status, errors = launch(tmp_path / "run", "interrupt-one", 6, "resume")
    assert status not in (0, -signal.SIGKILL), errors
    assert "stopped after step 7" in errors
    assert checkpoints(tmp_path / "run")[-1] == "checkpoint-7"
    status, errors = launch(tmp_path / "run", "none", 0, "resume")
    assert status == 0, errors
    ends = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "run")]
    assert torch.equal(*ends)


def test_what_a_seal_says(run_with_checkpoints: Path) -> None:
    facts = read_seal(run_with_checkpoints / "checkpoint-4")
    assert facts["step"] == 4 and facts["version"] == hfcompress.__version__
    on_disk = {path.name for path in (run_with_checkpoints / "checkpoint-4").iterdir()}
    assert set(facts["files"]) == on_disk - {SEAL_FILE} and len(on_disk) > 8
    assert facts["ran_on"]["number of processes"] == 1
    json.dumps(facts)
