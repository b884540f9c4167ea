"""What every kind of input can do: one small class per kind, all with these methods."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, Kind, detect_columns
from hfcompress.tasks.sources import Source


class Inputs(ABC):
    """From raw columns to what a model's forward takes.

    Attributes:
        kind: What files they are read from.
    """

    kind: Kind = "text"

    @abstractmethod
    def load_processor(self, model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
        """Load the tokenizer, image processor or feature extractor of a model.

        Raises:
            DataError: The model has none, or none that can do what is needed.
        """

    def find_columns(self, features: Mapping[str, Any], config: DataConfig) -> Columns:
        """The columns to read, as told or found by type and customary name.

        Raises:
            DataError: A column is not there, has the wrong type, or cannot be told from others.
        """
        return detect_columns(features, config, self.kind)

    @abstractmethod
    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check every row; the inputs alone, in a form the other methods take, and what follows from no list of classes.

        Raises:
            DataError: Something is missing or broken; the message names the first such row.
        """

    def is_one_text(self, rows: datasets.Dataset) -> bool:
        """Whether opened rows make one long text: its end is held out, and limits count the examples it is cut into."""
        del rows
        return False

    @abstractmethod
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
        """Turn opened rows, with a column "labels" where there are classes, into what the model's forward takes.

        Args:
            rows: What `open` gave.
            processor: What `load_processor` gave.
            config: The `data` section of a recipe.
            model_config: Configuration of the model.
            where: The split; "eval" is encoded the same every time.
            seed: Of what is random in that.
        """

    @abstractmethod
    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """What makes a batch of encoded examples."""

    def contents(self, rows: datasets.Dataset) -> Iterator[bytes]:
        """Each opened row as bytes, the same on every machine."""
        for row in rows:
            yield json.dumps(row, sort_keys=True).encode()

    def longest(self, processor: Any, *, config: DataConfig, model_config: Any) -> int | None:
        """Tokens or samples of the longest example there can be; None where all are of one size."""
        del processor, config, model_config
        return None

    def model_kwargs(self, processor: Any, model_config: Any) -> dict[str, Any]:
        """What `from_pretrained` of the model must be told because of the processor."""
        del processor, model_config
        return {}
