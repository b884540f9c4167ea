"""What every kind of input can do: one small class per kind, all with these methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import datasets

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, Kind
from hfcompress.tasks.sources import Source


class Inputs(Protocol):
    """From raw columns to what a model's forward takes."""

    kind: Kind

    def load_processor(self, model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
        """Load the tokenizer or image processor of a model.

        Raises:
            DataError: The model has none.
        """

    def open(self, source: Source, columns: Columns) -> datasets.Dataset:
        """Check every row's input; the input columns alone, in a form the other methods take.

        Raises:
            DataError: An input is missing or broken; the message names the first such row.
        """

    def encode(
        self,
        rows: datasets.Dataset,
        *,
        columns: Columns,
        processor: Any,
        config: DataConfig,
        model_config: Any,
        where: str,
    ) -> datasets.Dataset:
        """Turn opened rows, which also have a column "labels", into what the model's forward takes."""

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """What makes a batch of encoded examples."""

    def contents(self, rows: datasets.Dataset, columns: Columns) -> Iterator[bytes]:
        """The input of each row as bytes, the same on every machine."""

    def model_kwargs(self, processor: Any, model_config: Any) -> dict[str, Any]:
        """What `from_pretrained` of the model must be told because of the processor."""
