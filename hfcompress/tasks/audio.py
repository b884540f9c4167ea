"""Sounds: checked, and turned into what a model takes only when they are asked for."""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, Kind, is_string
from hfcompress.tasks.errors import DataError, first_line, loading
from hfcompress.tasks.inputs import Inputs
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.sources import Source, with_absolute_paths

SOUND = "sound"


class AudioInputs(Inputs):
    """Sounds for a model that takes samples or spectrograms."""

    kind: Kind = "audio"

    def load_processor(self, model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
        """Load the feature extractor."""
        with loading(f"{model_name}: its feature extractor"):
            return AutoFeatureExtractor.from_pretrained(
                model_name, revision=revision, trust_remote_code=trust_remote_code
            )

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check that each row has a sound, and each file is there (what is in it is read in training)."""
        del config
        column = columns.inputs[0]
        rows = source.rows.with_format(None).select_columns([column])
        feature = rows.features[column]
        if is_string(feature) or isinstance(feature, datasets.Audio):
            rows = with_absolute_paths(rows, column, folder=source.folder)
            rows = rows.cast_column(column, datasets.Audio(decode=False))
        rows = rows if column == SOUND else rows.rename_column(column, SOUND)
        missing = []
        for row, example in enumerate(tqdm(rows, desc=f"checking {source.name}", leave=False, delay=2)):
            stored = _stored(example[SOUND])
            if stored is None or (isinstance(stored, Path) and not stored.is_file()):
                missing.append(row)
        if missing:
            raise DataError(f"{source.name}: no sound in column {column} in {row_count(missing)}; drop the rows")
        return rows

    def encode(
        self,
        rows: datasets.Dataset,
        *,
        processor: Any,
        config: DataConfig,
        model_config: Any,
        where: str,
        seed: int = 0,
    ) -> datasets.Dataset:
        """Let each sound be read, brought to the model's rate, cut and processed when it is asked for.

        Raises:
            DataError: Sounds have another sampling rate, and scipy is not there to change it.
        """
        del model_config, where, seed
        transform = Samples(processor, config.max_seconds)
        transform({SOUND: [rows[0][SOUND]]})  # what cannot be processed is an error now, and not in training
        # The name forward() knows: a Trainer drops columns with other names before anything can read them.
        return rows.rename_column(SOUND, processor.model_input_names[0]).with_transform(transform)

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Pad each batch to its longest sound."""
        del config, model_config
        return SoundCollator(processor)

    def longest(self, processor: Any, *, config: DataConfig, model_config: Any) -> int | None:
        """The longest sound in samples, where the model reads samples."""
        del model_config
        reads_samples = processor.model_input_names[0] == "input_values" and processor.feature_size == 1
        return int(config.max_seconds * processor.sampling_rate) if reads_samples else None

    def contents(self, rows: datasets.Dataset) -> Iterator[bytes]:
        """The files as they are stored; of sounds that are stored as numbers the samples in 32 bits."""
        for example in rows.select_columns([SOUND]):
            stored = _stored(example[SOUND])
            if isinstance(stored, Path):
                yield stored.read_bytes()
            elif isinstance(stored, io.BytesIO):
                yield stored.getvalue()
            else:
                yield np.asarray(stored, dtype="<f4").tobytes()


@dataclass(frozen=True)
class Samples:
    """Transform of a data set: sounds as stored in, what the model takes out.

    Attributes:
        extractor: A Hugging Face feature extractor.
        max_seconds: The longest sound; the rest is cut off.
    """

    extractor: Any
    max_seconds: float

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Process the sounds of a batch, if it has any, and leave the other columns as they are."""
        name = SOUND if SOUND in batch else self.extractor.model_input_names[0]
        if name not in batch:
            return dict(batch)
        rate = self.extractor.sampling_rate
        sounds = [resample(*read_sound(value), wanted=rate)[: int(self.max_seconds * rate)] for value in batch[name]]
        for value, sound in zip(batch[name], sounds, strict=True):
            if not len(sound):
                file = value.get("path") if isinstance(value, Mapping) else None
                raise DataError(f"{file or 'a sound'!r} has no samples, it is 0 seconds long; remove it")
        return {**batch, **dict(self.extractor(sounds, sampling_rate=rate))}


@dataclass(frozen=True)
class SoundCollator:
    """Pads what a feature extractor gave, and puts labels beside it.

    Attributes:
        extractor: A Hugging Face feature extractor.
    """

    extractor: Any

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of tensors."""
        import torch

        sounds = [{name: value for name, value in row.items() if name != "labels"} for row in features]
        batch = dict(self.extractor.pad(sounds, padding=True, return_tensors="pt"))
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in features])
        return batch


def read_sound(value: Any) -> tuple[NDArray[np.float32], int | None]:
    """The samples of a sound.

    Args:
        value: "bytes" of a file or its "path"; or "array", a list of samples or one for each channel, and "sampling_rate"; or a list of
            samples.

    Returns:
        One channel, the mean of several, shape (samples,), whole numbers scaled to [-1, 1]; and the samples per second, None where that
        is not said. No samples where there is no sound.

    Raises:
        DataError: It cannot be read.

    Example:
        >>> samples, rate = read_sound({"array": [[0.0, 1.0], [0.5, 0.0]], "sampling_rate": 8000})
        >>> samples.tolist(), rate
        ([0.25, 0.5], 8000)
    """
    stored = _stored(value)
    if stored is None:
        return np.zeros(0, np.float32), None
    if isinstance(stored, (Path, io.BytesIO)):
        return _read_file(stored, value["path"] or "a sound")
    return _one_channel(np.asarray(stored, dtype=np.float32).T), value["sampling_rate"] if isinstance(
        value, Mapping
    ) else None


def _stored(value: Any) -> Path | io.BytesIO | list[Any] | None:
    """Where a sound is: in a file, in the table as a file, or there as samples; None where there is none."""
    if isinstance(value, Mapping) and "array" not in value:
        if value["bytes"] is not None:
            return io.BytesIO(value["bytes"])
        return Path(value["path"]) if value["path"] else None
    return (value["array"] if isinstance(value, Mapping) else value) or None


def _one_channel(samples: NDArray[Any]) -> NDArray[np.float32]:
    """The mean over channels of an array of shape (samples,) or (samples, channels)."""
    return (samples if samples.ndim == 1 else samples.mean(axis=1)).astype(np.float32)


def _read_file(stored: Any, name: str) -> tuple[NDArray[np.float32], int]:
    """A file by soundfile, which reads many formats, or else a WAV file with whole numbers."""
    try:
        import soundfile
    except ImportError:
        return _read_wave(stored, name)
    try:
        samples, rate = soundfile.read(stored, dtype="float32")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name!r} cannot be read as a sound: {first_line(error)}; replace or remove it") from error
    return _one_channel(samples), rate


def _read_wave(stored: Any, name: str) -> tuple[NDArray[np.float32], int]:
    try:
        with wave.open(str(stored) if isinstance(stored, Path) else stored, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"{name!r} cannot be read as a WAV file: {first_line(error)}; other formats need: pip install soundfile"
        ) from error
    if width == 1:  # unsigned, silence is 128
        samples = (data.astype(np.float32) - 128) / 128
    else:  # little-endian; the missing low bytes are 0
        padded = np.zeros((len(data) // width, 4), dtype=np.uint8)
        padded[:, 4 - width :] = data.reshape(-1, width)
        samples = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    return _one_channel(samples.reshape(-1, channels)), rate


def resample(samples: NDArray[np.float32], rate: int | None, *, wanted: int) -> NDArray[np.float32]:
    """Bring a sound to another number of samples per second.

    Args:
        samples: Shape (samples,).
        rate: Samples per second; None means that it is as wanted.
        wanted: What is wanted.

    Returns:
        The sound; its own samples where the rate is right.

    Raises:
        DataError: The rate is another, and scipy is not there.

    Example:
        >>> resample(np.zeros(800, np.float32), 8000, wanted=16000).shape
        (1600,)
    """
    if rate is None or rate == wanted:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise DataError(
            f"a sound has {rate:,} samples per second, the model takes {wanted:,}; bring the files to that, or: pip install scipy"
        ) from error
    common = math.gcd(int(rate), wanted)
    return resample_poly(samples, wanted // common, int(rate) // common).astype(np.float32)
