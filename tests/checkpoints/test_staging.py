"""Outputs are whole or not there: commands that fail in the middle, that are stopped, or that have nowhere to write."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from matplotlib.figure import Figure
from transformers import PreTrainedModel

import hfcompress
from hfcompress.checkpoints.staging import OutputError, is_empty, staged_file, staged_folder
from hfcompress.cli.main import main
from hfcompress.hub import verify
from tests.hub.folders import all_fine, row
from tests.vocabulary.models import make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path_factory.mktemp("tables")))
    monkeypatch.setattr(verify, "_run_child", all_fine)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    model, tokenizer = make("bert classifier")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [("a good film", 1), ("not very bad", 1), ("a bad film", 0), ("very bad", 0)] * 4
    (folder / "films.csv").write_text("sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return folder


# Every command that writes a model folder; "OUT" is where.
COMMANDS: dict[str, list[str]] = {
    "prune": [
        *(
            "prune",
            "model",
            "--data",
            "films.csv",
            "--parameters",
            "0.95",
            "--samples",
            "8",
            "--length",
            "8",
            "--batch",
            "2",
        ),
        *("--device", "cpu", "--output", "OUT"),
    ],
    "quantize": ["quantize", "model", "--preset", "int8", "--output", "OUT", "--no-measure"],
    "quantize on data": [
        *(
            "quantize",
            "model",
            "--preset",
            "int4",
            "--data",
            "films.csv",
            "--samples",
            "8",
            "--length",
            "8",
            "--output",
            "OUT",
            "--no-measure",
        ),
    ],
    "student": ["student", "model", "OUT", "--neurons", "4"],
    "vocabulary": ["vocabulary", "model", "--data", "films.csv", "--coverage", "1", "--output", "OUT"],
    "export": ["export", "model", "--format", "onnx", "--output", "OUT"],
}


def line_of(command: str, material: Path, output: Path | str) -> list[str]:
    there = {"model": str(material / "model"), "films.csv": str(material / "films.csv"), "OUT": str(output)}
    return [there.get(word, word) for word in COMMANDS[command]]


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that has to fail."""
    capsys.readouterr()
    status = main(arguments)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hfcompress")]
    assert status in (2, 130) and len(said) == 1, said
    return said[0]


@contextlib.contextmanager
def small_files(most_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export"])
def test_a_full_disk_leaves_nothing(
    command: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config, of less than a thousand bytes or so, can still be written; the weights cannot."""
    written: list[Path] = []

    def limited(self: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        written.append(Path(folder))
        with small_files(4096):
            return save(self, folder, *args, **kwargs)

    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", limited)
    said = fail(line_of(command, material, tmp_path / "home" / "out"), capsys)
    assert f"{tmp_path}/home/out could not be written: File too large" in said and "nothing of it is left" in said
    assert written and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_stopping_leaves_nothing(
    command: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[Path] = []

    def stop(folder: Any, *_: Any, **__: Any) -> None:
        assert (Path(folder) / "config.json").is_file(), "in the middle of it"
        stopped.append(Path(folder))
        raise KeyboardInterrupt

    for module in ("cli.quantize", "cli.student", "runs.post_training", "runs.quantizing", "runs.vocabulary"):
        with contextlib.suppress(AttributeError):
            monkeypatch.setattr(f"hfcompress.{module}.save_probe", lambda _model, folder: stop(folder))
    monkeypatch.setattr("hfcompress.hub.save_probe", lambda _model, folder: stop(folder))
    monkeypatch.setattr("hfcompress.export.exporting.write_example", stop)
    (tmp_path / "out").mkdir()  # one that is there and empty stays so
    assert fail(line_of(command, material, tmp_path / "out"), capsys) == "hfcompress: stopped"
    assert stopped and list(tmp_path.rglob("*")) == [tmp_path / "out"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["file/out", "/proc/out", "full"])
def test_where_nothing_can_be_written(
    command: str, place: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    said = fail(line_of(command, material, tmp_path / place), capsys)
    assert "is not empty" in said if place == "full" else "cannot be written" in said
    assert sorted(tmp_path.rglob("*")) == before


def in_small_files(write: Any) -> Any:
    def limited(*args: Any, **kwargs: Any) -> Any:
        with small_files(100):
            return write(*args, **kwargs)

    return limited


FILES = {
    "report": ["report", "run", "--output", "OUT.html"],
    "compare": ["compare", "run", "run", "--html", "OUT.html"],
    "inspect": ["inspect", "model", "--picture", "OUT.png"],
    "sensitivity": ["sensitivity", "model", "--data", "films.csv", "--samples", "4", "--picture", "OUT.png"],
    "sensitivity --save": [
        *(
            "sensitivity",
            "model",
            "--data",
            "films.csv",
            "--samples",
            "4",
            "--bits",
            "8",
            "4",
            "--max-loss",
            "9",
            "--save",
            "OUT.json",
        ),
    ],
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_whole_or_as_before(
    name: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    rows = [row("teacher", "teacher", 0.9), row("pruned", ".", 0.8, speedup={"median": 2.0})]
    (tmp_path / "run" / "results.json").write_text(json.dumps({"rows": rows}))
    there = {"model": material / "model", "films.csv": material / "films.csv", "run": tmp_path / "run"}
    suffix = Path(FILES[name][-1]).suffix
    old = tmp_path / f"old{suffix}"
    old.write_text("as before")

    def words(target: Path) -> list[str]:
        return [str(target if word.startswith("OUT.") else there.get(word, word)) for word in FILES[name]]

    with monkeypatch.context() as patch:
        for owner, method in ((Path, "write_text"), (Figure, "savefig")):
            patch.setattr(owner, method, in_small_files(getattr(owner, method)))
        assert "could not be written: File too large" in fail(words(old), capsys)
    assert old.read_text() == "as before"
    assert "cannot be written" in fail(words(Path(f"/proc/out{suffix}")), capsys)
    assert "cannot be written" in fail(words(old / f"below{suffix}"), capsys)
    (tmp_path / f"folder{suffix}").mkdir()
    assert "it is a folder" in fail(words(tmp_path / f"folder{suffix}"), capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"run", old.name, f"folder{suffix}"}
    assert main(words(old)) == 0 and old.stat().st_size > 100


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path, material: Path) -> None:
    (tmp_path / "out" / ".out.part" / "out").mkdir(parents=True)
    (tmp_path / "out" / ".out.part" / "out" / "model.safetensors").write_text("half")
    assert is_empty(tmp_path / "out") and not is_empty(tmp_path)
    assert main(line_of("student", material, tmp_path / "out")) == 0
    assert not (tmp_path / "out" / ".out.part").exists()
    hfcompress.load(tmp_path / "out")


def test_the_folder_one_stands_in(tmp_path: Path, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not replaced by another one of the same name: a shell would go on standing in the old one."""
    monkeypatch.chdir(tmp_path)
    before = os.stat(".").st_ino
    assert main(line_of("student", material, ".")) == 0
    assert os.stat(".").st_ino == before and os.stat(tmp_path).st_ino == before
    hfcompress.load(tmp_path)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    for staged in (staged_folder, staged_file):
        with pytest.raises(ZeroDivisionError), staged(tmp_path / "out") as place:
            assert place.name == "out"
            raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(OutputError, match="is not empty"), staged_folder(tmp_path.parent):
        pass
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
    with staged_file(tmp_path / "a" / "b.txt") as file:
        file.write_text("whole")
    assert (tmp_path / "a" / "b.txt").read_text() == "whole" and [p.name for p in tmp_path.rglob("*")] == ["a", "b.txt"]
