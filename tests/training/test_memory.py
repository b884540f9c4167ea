"""Running out of memory, for real: one line that says what to change, with the numbers at hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size

from hfcompress.config import Recipe
from hfcompress.measurement.memory import OutOfMemoryError, memory_named
from hfcompress.runs import teaching
from tests.families import make_model
from tests.training.scenarios import arguments, build, make_trainer

ROOT = Path(__file__).parents[2]
# One of the two models is wide: 64 examples of 12 tokens by 400,000 neurons are 1.2 GB, and 400 MB are left to be had.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from hfcompress.training import DistillationTrainer
from tests.training.scenarios import build, make_trainer

torch.set_num_threads(1)
wide = {"intermediate_size": 400_000, "num_hidden_layers": 1}
student, teacher = (build("bert", "sequence", seed=0, **(wide if sys.argv[1] == who else {})) for who in ("student", "teacher"))
options = {"n": 64, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
trainer = make_trainer(sys.argv[2], trainer=DistillationTrainer, model=student, teacher=teacher, **options)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400_000_000,) * 2)
try:
    trainer.train()
except RuntimeError as error:
    sys.stderr.write(f"{type(error).__name__}: {error}\\n")
    sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize(
    ("who", "said"),
    [
        (
            "teacher",
            r"step 1: the teacher \(.*, 10\d\.\d MB of weights on cpu\) ran out of memory\. Use a smaller per_device_train_batch_size .*"
            r"\(now 64 and 2; try 32 and 4\); or load the teacher in fewer bits .*bfloat16, int8 or nf4.*hfcompress cache-teacher\)",
        ),
        (
            "student",
            r"step 1: the model that is trained ran out of memory\. .*\(now 64 and 2; try 32 and 4\); or train with gradient_checkpointing",
        ),
    ],
)
def test_the_line_names_what_to_change(tmp_path: Path, who: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, who, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 3 and re.fullmatch(f"OutOfMemoryError: {said}.*", line), done.stderr[-2000:]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 1 bytes"
        ),
    ],
)
def test_each_way_of_saying_it(error: Exception, tmp_path: Path) -> None:
    teacher = build("bert", "sequence", seed=1)

    def fails(**_: object) -> None:
        raise error

    trainer = make_trainer(tmp_path, trainer="DistillationTrainer", teacher=teacher)
    assert trainer.teacher is not None
    trainer.teacher.model.forward = fails
    with pytest.raises(OutOfMemoryError, match="step 1: the teacher") as caught:
        trainer.train()
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error
    assert should_reduce_batch_size(caught.value), "auto_find_batch_size goes on with a smaller batch"


def test_other_errors_stay_as_they_are() -> None:
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, memory_named(lambda: "not this"):
        raise other
    assert caught.value is other


def test_a_teacher_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("bert", "AutoModelForSequenceClassification").save_pretrained(tmp_path / "teacher")

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(teaching, "load", fails)
    recipe = Recipe.from_dict({"teacher": {"name": str(tmp_path / "teacher"), "precision": "bfloat16"}, "distill": {}})
    task = SimpleNamespace(max_length=12, label_columns=("labels",))
    with pytest.raises(OutOfMemoryError) as caught:
        student = build("bert", "sequence", seed=0)
        teaching.open_teachers(recipe, tmp_path / "teacher", student, arguments(tmp_path), task, tmp_path)
    said = (
        r"the teacher \S*teacher, loaded in bfloat16 on cpu, ran out of memory\. Of that [\d.]+ [GM]B were free on cpu; in float32 it takes "
        r"[\d.]+ kB\. Load the teacher in fewer bits"
    )
    assert re.match(said, str(caught.value)), str(caught.value)
