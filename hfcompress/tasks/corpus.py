"""Texts alone, without labels, from files of any of the formats that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets

from hfcompress.tasks.columns import text_columns
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.sources import read_rows

_BATCH = 1000  # rows


@dataclass(frozen=True)
class Corpus:
    """Texts that can be read more than once, from disk, some at a time.

    Attributes:
        columns: Data sets, each with nothing but columns of text.
    """

    columns: tuple[datasets.Dataset, ...]

    def __len__(self) -> int:
        """Number of texts; two columns in a row are two."""
        return sum(len(rows) * len(rows.column_names) for rows in self.columns)

    def __iter__(self) -> Iterator[str | None]:
        """The texts; None where a cell is empty."""
        for rows in self.columns:
            for batch in rows.iter(batch_size=_BATCH):
                for name in rows.column_names:
                    yield from batch[name]


def read_corpus(files: Sequence[str], *, text: Sequence[str] = (), key: str = "data.train") -> Corpus:
    """Read the texts of files: csv, tsv, json, jsonl, parquet, or txt with a text in each line.

    Args:
        files: Files, folders, or patterns such as data/train-*.parquet.
        text: Columns of text; without them they are found by type and customary name in each file.
        key: What error messages call the files.

    Returns:
        The texts of all of them.

    Raises:
        DataError: A file cannot be read or has no rows, or its columns of text cannot be told.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "reviews.csv")
        ...     rows = ("sentence,label", "so good,1", "so bad,0")
        ...     _ = file.write_text(chr(10).join(rows))
        ...     list(read_corpus([str(file)]))
        ['so good', 'so bad']
    """
    if not files:
        raise DataError(f"{key}: no files are given")
    found = []
    for file in files:
        for source in read_rows(file, key=key):
            names = text_columns(source.rows.features, text)
            found.append(source.rows.select_columns(list(names)))
    return Corpus(tuple(found))
