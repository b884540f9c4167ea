"""Images: checked, and turned into pixels only when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, DefaultDataCollator

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, Kind
from hfcompress.tasks.errors import DataError, first_line, loading
from hfcompress.tasks.inputs import Inputs
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.sources import Source, with_absolute_paths

# What Pillow raises for files that are not images, are cut off, or would not fit into memory.
BROKEN = (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError)
# The name forward() knows: a Trainer drops columns with other names before anything can read them.
PIXELS = "pixel_values"


class ImageInputs(Inputs):
    """Images for a model that takes `pixel_values`."""

    kind: Kind = "image"

    def load_processor(self, model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
        """Load the image processor; without torchvision it is the one that works with Pillow."""
        with loading(f"{model_name}: its image processor"):
            return AutoImageProcessor.from_pretrained(
                model_name, revision=revision, trust_remote_code=trust_remote_code
            )

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check that each row has an image that can be opened (its header only: pixels are read in training)."""
        del config
        column = columns.inputs[0]
        rows = source.rows.with_format(None).select_columns([column])
        rows = with_absolute_paths(rows, column, folder=source.folder)
        rows = rows.cast_column(column, datasets.Image(decode=False))
        missing: list[int] = []
        for row, example in enumerate(tqdm(rows, desc=f"checking {source.name}", leave=False, delay=2)):
            record = example[column]
            if record is None or not (record["bytes"] or record["path"]):
                missing.append(row)
                continue
            try:
                stored = _stored(record)
                if stored is not None:
                    with PIL.Image.open(stored):
                        pass
            except BROKEN as error:
                raise _broken(record, error, f"{source.name}, row {row:,}") from error
        if missing:
            raise DataError(f"{source.name}: no image in column {column} in {row_count(missing)}; drop the rows")
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
        """Let each image be read, converted and processed when it is asked for."""
        del config, where, seed
        mode = "L" if getattr(model_config, "num_channels", 3) == 1 else "RGB"
        return rows.rename_column(rows.column_names[0], PIXELS).with_transform(Pixels(processor, mode))

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Stack pixels and labels."""
        del processor, config, model_config
        return DefaultDataCollator()

    def contents(self, rows: datasets.Dataset) -> Iterator[bytes]:
        """The image files as they are stored; for one that is neither here nor in the table, its address."""
        column = rows.column_names[0]
        for example in rows.select_columns([column]):
            record = example[column]
            stored = _stored(record)
            if isinstance(stored, Path):
                yield stored.read_bytes()
            else:
                yield record["bytes"] if stored is not None else record["path"].encode()


@dataclass(frozen=True)
class Pixels:
    """Transform of a data set: images as stored in, what the model takes out.

    Attributes:
        processor: A Hugging Face image processor.
        mode: "RGB", or "L" for models with one channel.
    """

    processor: Any
    mode: str = "RGB"

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Process the images of a batch, if it has any, and leave the other columns as they are.

        Raises:
            DataError: An image is broken; the message names the file.
        """
        if PIXELS not in batch:
            return dict(batch)
        images = [open_image(record, mode=self.mode) for record in batch[PIXELS]]
        return {**batch, PIXELS: self.processor(images, return_tensors="pt")[PIXELS]}


def open_image(record: Mapping[str, Any], *, mode: str = "RGB") -> PIL.Image.Image:
    """Decode an image, upright as its EXIF data say.

    Args:
        record: "bytes" of the file or None, and its "path" or None.
        mode: Pillow mode to convert to. Sixteen-bit grey is scaled to eight bits; Pillow alone would clip it to white.

    Returns:
        The image.

    Raises:
        DataError: The file is broken; the message names it.

    Example:
        >>> file = io.BytesIO()
        >>> PIL.Image.new("L", (3, 2), 7).save(file, "png")
        >>> image = open_image({"bytes": file.getvalue(), "path": None})
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (3, 2), (7, 7, 7))
    """
    try:
        image = datasets.Image().decode_example(dict(record))
        if image.mode.startswith("I;16"):
            image = PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        return image.convert(mode)
    except BROKEN as error:
        raise _broken(record, error, "data") from error


def _stored(record: Mapping[str, Any]) -> Path | io.BytesIO | None:
    """Where an image's bytes are: in the table, in a file, or None where datasets must fetch them."""
    if record["bytes"] is not None:
        return io.BytesIO(record["bytes"])
    return None if "://" in record["path"] else Path(record["path"])


def _broken(record: Mapping[str, Any], error: BaseException, where: str) -> DataError:
    name = record["path"] or "an image stored in the table"
    return DataError(f"{where}: {str(name)!r} cannot be read as an image: {first_line(error)}; replace or remove it")
