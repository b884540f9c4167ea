"""Data with faults of every kind: a sensible result, or one line that says where and what to do."""

from __future__ import annotations

import io
import json
import logging
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor

from hfcompress.cli.main import main
from hfcompress.config import DataConfig
from hfcompress.tasks import prepare
from hfcompress.tasks.errors import DataError
from tests.families import make_config
from tests.tasks.conftest import save_bert

GOOD = "text,label\n" + "good film,1\nbad film,0\n" * 4
FLOATS = "text,label\n" + "good,1.5\nbad,0.25\nfilm,0.5\n" * 20


def parquet(names: list[str], *columns: list[Any], types: list[Any] | None = None) -> bytes:
    file = io.BytesIO()
    arrays = [pa.array(c, type=t) for c, t in zip(columns, types or [None] * len(columns), strict=True)]
    pq.write_table(pa.table(arrays, names=names), file)
    return file.getvalue()


def lines(*rows: dict[str, Any], times: int = 3) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows) * times


# Name: (file, its content, what else `data` says, the error or None where the data can be used)
TEXTS: dict[str, tuple[str, str | bytes, dict[str, Any], str | None]] = {
    "an empty text": ("t.csv", GOOD + ",1\n", {}, "no text in column text in row 8"),
    "a blank text": ("t.csv", GOOD + "   ,1\n", {}, "no text in column text in row 8"),
    "an empty row": ("t.csv", GOOD + ",\n", {}, "no label in row 8"),
    "empty lines": ("t.csv", GOOD + "\n\n\n", {}, None),
    "no text": (
        "t.jsonl",
        lines({"text": None, "label": 1}, {"text": "a", "label": 0}),
        {},
        "no text in column text in 3 rows, the first of them row 0",
    ),
    "no label": ("t.csv", GOOD + "film,\n", {}, "no label in row 8"),
    "a null label": ("t.parquet", parquet(["text", "label"], ["a", "b", "c"], [1, None, 0]), {}, "no label in row 1"),
    "a long text": ("t.csv", GOOD + "good " * 500 + ",1\n", {"max_length": 512}, None),
    "one class": ("t.csv", "text,label\n" + "good,1\n" * 6, {}, "only the label '1' in all 6 rows; two or more"),
    "decimals": ("t.csv", FLOATS, {}, None),
    "decimals in few rows": ("t.csv", "text,label\ngood,1.5\nbad,0.25\n" * 1, {}, "a correlation needs 4 or more"),
    "an infinite number": ("t.csv", FLOATS + "good,inf\n", {}, "no label in row 60"),
    "a number that is none": (
        "t.jsonl",
        '{"text": "a", "label": NaN}\n' + lines({"text": "b", "label": 0.5}),
        {},
        "no label in row 0",
    ),
    "numbers and words": (
        "t.jsonl",
        lines({"text": "a", "label": 1}, {"text": "b", "label": "x"}),
        {"label": "label"},
        "column 'label' holds",
    ),
    "texts and numbers": (
        "t.jsonl",
        lines({"text": 1, "label": 1}, {"text": "b", "label": 0}),
        {"text": "text"},
        "column 'text' holds .*, not text",
    ),
    "texts in lists": ("t.jsonl", lines({"text": ["a"], "label": 1}), {}, "cannot tell which column holds the text"),
    "labels in mappings": (
        "t.jsonl",
        lines({"text": "a", "label": {"a": 1}}),
        {"label": "label"},
        "column 'label' holds dict",
    ),
    "no column of labels": ("t.csv", "text\ngood\nbad\n", {}, "cannot tell which column holds the labels"),
    "another column of labels": ("t.csv", GOOD, {"label": "labl"}, "did you mean 'label'"),
    "two columns of one name": ("t.csv", "text,text,label\n" + "a,b,1\nc,d,0\n" * 3, {}, "two columns named 'text'"),
    "the same in json": ("t.jsonl", '{"text": "a", "label": 1, "label": 0}\n' * 4, {}, "specified twice"),
    "the same in parquet": ("t.parquet", parquet(["text", "text", "label"], ["a"], ["b"], [1]), {}, "Multiple matches"),
    "no rows": ("t.csv", "text,label\n", {}, "t.csv has no rows"),
    "no rows in parquet": (
        "t.parquet",
        parquet(["text", "label"], [], [], types=[pa.string(), pa.int64()]),
        {},
        "t.parquet has no rows",
    ),
    "one row": ("t.csv", "text,label\ngood,1\n", {}, "only the label '1'"),
    "two rows": ("t.csv", "text,label\ngood,1\nbad,0\n", {}, "every class has a single row"),
    "nothing in csv": ("t.csv", "", {}, "t.csv has no rows"),
    "nothing in json": ("t.json", "", {}, "t.json has no rows"),
    "nothing in parquet": ("t.parquet", b"", {}, "t.parquet has no rows"),
    "half a json": ("t.json", '{"text": ', {}, "t.json cannot be read"),
    "a json of one number": ("t.json", "5", {}, "t.json cannot be read"),
    "half a parquet": (
        "t.parquet",
        parquet(["text", "label"], ["a"] * 99, [0] * 99)[:300],
        {},
        "t.parquet cannot be read",
    ),
    "another encoding": ("t.csv", b"text,label\n\xff\xfe,1\nab,0\n", {}, "not in UTF-8"),
    "a row of four": ("t.csv", GOOD + "a,b,c,d\n", {}, "Expected 2 fields in line 10, saw 4"),
    "an open quotation": ("t.csv", GOOD + '"a,1\nb,0\n', {}, "EOF inside string starting at row 9"),
    "labels of -1": ("t.csv", "text,label\n" + "good,-1\nbad,0\n" * 3, {}, "the label is -1, .* in 3 rows"),
    "half a surrogate": ("t.jsonl", '{"text": "\\ud800", "label": 1}\n' * 3, {}, "cannot be read"),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"), base=True)


def write(file: Path, content: str | bytes) -> str:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def batches(task: Any) -> list[dict[str, torch.Tensor]]:
    """All of it in two batches, with nothing in it that is no number."""
    found = [
        task.data_collator([rows[number] for number in range(len(rows))])
        for rows in (task.train_dataset, task.eval_dataset)
    ]
    assert all(torch.isfinite(tensor.float()).all() for batch in found for tensor in batch.values())
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, tmp_path: Path, bert: str, capfd: pytest.CaptureFixture[str]) -> None:
    file, content, said, error = TEXTS[name]
    config = DataConfig(train=write(tmp_path / file, content), **said)
    if error is None:
        task = prepare(config, task="text-classification", model_name=bert)
        train, _ = batches(task)
        assert train["input_ids"].shape[1] <= 64, "the model has no room for more"
        return
    with pytest.raises(DataError, match=error) as caught:
        prepare(config, task="text-classification", model_name=bert)
    assert "\n" not in str(caught.value)
    assert "Failed to" not in capfd.readouterr().err, "datasets said it once more"


# Of the evaluation data alone; the training data are fine.
EVALUATIONS: dict[str, tuple[str, str | None]] = {
    "unseen label": (
        GOOD + "film,7\n",
        r"label '7' is not among those of the training data \(0, 1\); it stands in row 8",
    ),
    "no labels": ("text\ngood\n", "has no column 'label'"),
    "no rows": ("text,label\n", "has no rows"),
    "decimals": ("text,label\ngood,1.0\nbad,0.5\n", "make a regression but those of the training data"),
    "one class": ("text,label\n" + "good,1\n" * 6, None),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation(name: str, tmp_path: Path, bert: str, caplog: pytest.LogCaptureFixture) -> None:
    content, error = EVALUATIONS[name]
    config = DataConfig(train=write(tmp_path / "t.csv", GOOD), eval=write(tmp_path / "e.csv", content))
    if error is None:
        with caplog.at_level(logging.WARNING):
            batches(prepare(config, task="text-classification", model_name=bert))
        assert "e.csv: all 6 rows have the label '1', so the score says little" in caplog.text
        return
    with pytest.raises(DataError, match=error) as caught:
        prepare(config, task="text-classification", model_name=bert)
    assert "\n" not in str(caught.value)


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


IMAGES: dict[str, tuple[bytes, str | None]] = {
    "one pixel": (png((1, 1)), None),
    "cut off": (png()[:300], "0.png' cannot be read as an image"),
    "cut off in its header": (png()[:20], "row 0: .*0.png' cannot be read as an image"),
    "empty": (b"", "row 0: .*0.png' cannot be read as an image"),
    "none": (b"no image", "row 0: .*0.png' cannot be read as an image"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, tmp_path: Path, vit: str) -> None:
    content, error = IMAGES[name]
    _in_folders(tmp_path, "png", lambda: png(), content)
    _ends(tmp_path, "image-classification", vit, error)


def wav(samples: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16000)
        writer.writeframes((1000 * np.sin(np.arange(samples))).astype("<i2").tobytes())
    return file.getvalue()


SOUNDS: dict[str, tuple[bytes, str | None]] = {
    "short": (wav(300), None),
    "cut off": (wav(4000)[:1000], None),  # as long as it is
    "of no length": (wav(0), "0.wav' has no samples, it is 0 seconds long"),
    "cut off in its header": (wav(4000)[:20], "0.wav' cannot be read as a"),
    "empty": (b"", "0.wav' cannot be read as a"),
    "none": (b"no sound", "0.wav' cannot be read as a"),
}


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("wav2vec2")
    transformers.AutoModelForAudioClassification.from_config(make_config("wav2vec2")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds(name: str, tmp_path: Path, wav2vec2: str) -> None:
    content, error = SOUNDS[name]
    _in_folders(tmp_path, "wav", lambda: wav(4000), content)
    _ends(tmp_path, "audio-classification", wav2vec2, error)


def _in_folders(root: Path, suffix: str, fine: Callable[[], bytes], first: bytes) -> None:
    for name in ("a", "b"):
        (root / name).mkdir()
        for number in range(4):
            (root / name / f"{number}.{suffix}").write_bytes(fine())
    (root / "a" / f"0.{suffix}").write_bytes(first)


def _ends(folder: Path, task: str, model: str, error: str | None) -> None:
    config = DataConfig(train=str(folder))
    if error is None:
        train, evaluation = batches(prepare(config, task=task, model_name=model))
        assert len(train["labels"]) + len(evaluation["labels"]) == 8
        return
    with pytest.raises(DataError, match=error) as caught:  # at once, or when it is read in training
        batches(prepare(config, task=task, model_name=model))
    assert "\n" not in str(caught.value)


def test_a_run_says_it_in_one_line(tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same through the command: nothing is trained, and the run can be started again with other data."""
    cases = 0
    for name in ("an empty row", "one class", "two columns of one name", "half a parquet", "labels of -1"):
        file, content, said, error = TEXTS[name]
        folder = tmp_path / str(cases)
        folder.mkdir()
        recipe = {
            "task": "text-classification",
            "model": {"name": bert},
            "data": {"train": write(folder / file, content), **said},
            "distill": {},
            "output": str(folder / "run"),
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        capsys.readouterr()
        assert main(["run", str(folder / "recipe.yaml")]) == 2
        seen = capsys.readouterr().err
        (line,) = [said for said in seen.splitlines() if said and "examples/s" not in said]  # bars of progress
        assert line.startswith("hfcompress: ") and (error or "").partition(", .*")[0] in line
        assert [path.name for path in (folder / "run").iterdir()] == ["recipe.yaml"]
        cases += 1
    assert cases == 5


def test_a_run_of_a_damaged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(save_bert(tmp_path / "model", names=["0", "1"]))
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    recipe: dict[str, Any] = {
        "task": "text-classification",
        "data": {"train": write(tmp_path / "t.csv", GOOD)},
        "distill": {},
    }
    for number, named in enumerate(({"model": {"name": str(model)}}, {"teacher": {"name": str(model)}})):
        file = tmp_path / f"{number}.yaml"
        file.write_text(json.dumps({**recipe, **named, "output": str(tmp_path / f"run-{number}")}))
        capsys.readouterr()
        assert main(["run", str(file)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert (
            line.startswith(f"hfcompress: {model}: its weights are damaged") and "fetch or save the model again" in line
        )
        assert [path.name for path in (tmp_path / f"run-{number}").iterdir()] == ["recipe.yaml"]
