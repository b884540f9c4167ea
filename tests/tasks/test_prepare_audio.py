from __future__ import annotations

import builtins
import io
import json
import re
import wave

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import ASTFeatureExtractor, AutoModelForAudioClassification, Wav2Vec2FeatureExtractor

from hfcompress.config import DataConfig
from hfcompress.tasks import Columns, DataError, prepare
from hfcompress.tasks.audio import AudioInputs, SoundCollator, read_sound, resample
from tests.families import make_config

RATE = 4000


def wav(samples: np.ndarray, *, width: int = 2, rate: int = RATE) -> bytes:
    """A WAV file of samples in [-1, 1), shape (samples,) or (samples, channels)."""
    whole = np.round(samples * 2 ** (8 * width - 1)).astype(np.int64)
    if width == 1:
        data = (whole + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(value).to_bytes(width, "little", signed=True) for value in whole.ravel())
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        writer.setsampwidth(width)
        writer.setframerate(rate)
        writer.writeframes(data)
    return file.getvalue()


def tone(hertz: float, *, seconds: float = 0.1, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("wav2vec2")
    AutoModelForAudioClassification.from_config(make_config("wav2vec2")).base_model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sounds(tmp_path):
    """Class folders with files of two lengths."""
    root = tmp_path / "sounds"
    for cls, hertz in (("high", 900), ("low", 100)):
        (root / cls).mkdir(parents=True)
        for i in range(4):
            (root / cls / f"{i}.wav").write_bytes(wav(tone(hertz, seconds=0.1 + 0.05 * (i % 2))))
    return root


def ready(train, *, model, **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(DataConfig(train=str(train), **told), task="audio-classification", model_name=model, **options)


def test_everything_a_trainer_needs(sounds, model):
    prepared = ready(sounds, model=model, holdout=0.25)
    assert prepared.label_names == ["high", "low"]
    assert prepared.train_dataset.column_names == ["input_values", "labels"]
    assert (len(prepared.train_dataset), len(prepared.eval_dataset)) == (6, 2)
    rows = [prepared.train_dataset[i] for i in range(6)]
    assert sorted({len(row["input_values"]) for row in rows}) == [400, 600]
    batch = prepared.data_collator(rows)
    assert batch["input_values"].shape == (6, 600) and batch["labels"].tolist() == [row["labels"] for row in rows]
    high = next(row for row in rows if row["labels"] == 0)
    expected = tone(900, seconds=len(high["input_values"]) / RATE)
    assert np.allclose(high["input_values"], expected, atol=2**-15)
    network = AutoModelForAudioClassification.from_pretrained(model, **prepared.model_kwargs)
    assert network(**batch).logits.shape == (6, 2)
    assert prepared.problem_type == "single_label_classification" and prepared.metric_name == "accuracy"


def test_long_sounds_are_cut(sounds, model):
    prepared = ready(sounds, model=model, max_seconds=0.05)
    assert len(prepared.train_dataset[0]["input_values"]) == 200


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_of_all_widths(tmp_path, width, channels):
    left, right = tone(100), tone(300)
    samples = left if channels == 1 else np.stack([left, right], axis=1)
    (tmp_path / "x.wav").write_bytes(wav(samples, width=width, rate=8000))
    expected = left if channels == 1 else (left + right) / 2
    for value in (
        {"path": str(tmp_path / "x.wav"), "bytes": None},
        {"path": "x", "bytes": wav(samples, width=width, rate=8000)},
    ):
        found, rate = read_sound(value)
        assert rate == 8000 and found.dtype == np.float32
        assert np.abs(found - expected).max() <= max(2.0 ** -(8 * width - 1), 2.0**-24)


STRING = Value("string")
CLASS = ClassLabel(names=["high", "low"])
SAMPLES = List(Value("float32"))


def tables() -> dict[str, tuple[dict, Features | None]]:
    notes = [tone(900), tone(100)] * 4
    labels = [0, 1] * 4
    files = [{"bytes": wav(note), "path": None} for note in notes]
    arrays = [{"array": note.tolist(), "sampling_rate": RATE} for note in notes]
    array = {"array": SAMPLES, "sampling_rate": Value("int64")}
    return {
        "arrays": ({"audio": arrays, "label": labels}, Features({"audio": array, "label": CLASS})),
        "files": (
            {"audio": files, "label": labels},
            Features({"audio": {"bytes": Value("binary"), "path": STRING}, "label": CLASS}),
        ),
        "samples": (
            {"sound": [note.tolist() for note in notes], "label": labels},
            Features({"sound": SAMPLES, "label": CLASS}),
        ),
    }


@pytest.mark.parametrize("name", ["arrays", "files", "samples"])
def test_sounds_in_tables(tmp_path, model, name):
    columns, features = tables()[name]
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "t.parquet")
    prepared = ready(tmp_path / "t.parquet", model=model, eval=str(tmp_path / "t.parquet"))
    assert np.allclose(prepared.train_dataset[0]["input_values"], tone(900), atol=2**-15)
    assert prepared.train_dataset[1]["labels"] == 1
    assert len(prepared.fingerprint) == 16


def test_a_column_of_the_audio_type_is_read_without_torchcodec(tmp_path, model):
    columns, _ = tables()["files"]
    features = Features({"audio": {"bytes": Value("binary"), "path": STRING}, "label": CLASS})
    rows = Dataset.from_dict(columns, features=features).cast_column("audio", datasets.Audio())
    rows.save_to_disk(tmp_path / "saved")
    prepared = ready(tmp_path / "saved", model=model, holdout=0.5)
    assert len(prepared.train_dataset[0]["input_values"]) == 400


def test_file_names_are_relative_to_the_table(tmp_path, model, sounds):
    rows = [{"file": f"sounds/{cls}/{i}.wav", "kind": cls} for cls in ("high", "low") for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepared = ready(tmp_path / "t.jsonl", model=model, eval=str(tmp_path / "t.jsonl"))
    assert prepared.label_names == ["high", "low"] and len(prepared.train_dataset[0]["input_values"]) == 400
    rows[3]["file"] = "sounds/nowhere.wav"
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=re.escape("b.jsonl: no sound in column file in row 3")):
        ready(tmp_path / "b.jsonl", model=model)


def test_other_rates_are_brought_to_that_of_the_model(tmp_path, model, sounds, monkeypatch):
    for path in sounds.rglob("*.wav"):
        path.write_bytes(wav(tone(100, rate=2 * RATE, seconds=0.1), rate=2 * RATE))
    prepared = ready(sounds, model=model)
    found = np.asarray(prepared.train_dataset[0]["input_values"])
    assert len(found) == 400
    assert np.abs(found - tone(100))[20:-20].max() < 0.01
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy.signal"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(
        DataError, match=r"a sound has 8,000 samples per second, the model takes 4,000; .* pip install scipy"
    ):
        ready(sounds, model=model)
    same = np.ones(3, np.float32)
    assert resample(same, RATE, wanted=RATE) is same


def test_files_that_are_no_sounds(tmp_path, model, sounds):
    (sounds / "high" / "0.wav").write_bytes(b"no sound at all")
    with pytest.raises(DataError, match=r"0.wav' cannot be read as a") as error:
        ready(sounds, model=model, eval=str(sounds), holdout=0.5)
    assert "\n" not in str(error.value)
    make_config("wav2vec2").save_pretrained(tmp_path / "bare")
    (sounds / "high" / "0.wav").unlink()
    with pytest.raises(DataError, match="its feature extractor cannot be loaded"):
        ready(sounds, model=str(tmp_path / "bare"))
    (sounds / "loose.wav").write_bytes(b"")
    with pytest.raises(DataError, match="sounds are expected in one folder per class"):
        ready(sounds, model=model)


def test_spectrograms_are_batched():
    extractor = ASTFeatureExtractor(sampling_rate=16000, num_mel_bins=8, max_length=20)
    features = [{**extractor(tone(400, rate=16000).astype(np.float32), sampling_rate=16000)} for _ in range(2)]
    rows = [{"input_values": each["input_values"][0], "labels": i} for i, each in enumerate(features)]
    batch = SoundCollator(extractor)(rows)
    assert batch["input_values"].shape == (2, 20, 8) and torch.equal(batch["labels"], torch.tensor([0, 1]))


FOUND = [
    ({"audio": datasets.Audio(), "label": CLASS, "path": STRING}, {}, Columns("label", ("audio",))),
    ({"file": STRING, "command": STRING, "label": CLASS}, {}, Columns("label", ("file",))),
    ({"x": {"array": SAMPLES, "sampling_rate": Value("int64")}, "label": CLASS}, {}, Columns("label", ("x",))),
    ({"a": STRING, "b": CLASS}, {"audio": "a"}, Columns("b", ("a",))),
]


@pytest.mark.parametrize(("features", "told", "expected"), FOUND)
def test_columns(features, told, expected):
    assert AudioInputs().find_columns(features, DataConfig(train="x", **told)) == expected


def test_doubt_about_columns():
    with pytest.raises(DataError, match=r"data.audio: cannot tell which column holds the sounds"):
        AudioInputs().find_columns({"a": STRING, "b": STRING, "label": CLASS}, DataConfig(train="x"))
    with pytest.raises(DataError, match=r"data.audio: column 'label' holds ClassLabel, not sounds"):
        AudioInputs().find_columns({"y": STRING, "label": CLASS}, DataConfig(train="x", audio="label", label="y"))
