"""What each model answered to each example, in one small file beside `results.json`: for paired tests between runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfcompress.measurement import Answers

PREDICTIONS_FILE = "predictions.npz"
_COLUMNS = ("tops", "bottoms", "predicted", "labels")


def save_answers(answers: Mapping[str, Answers], folder: str | Path, *, fingerprint: str | None) -> Path:
    """Write what models answered to the same examples.

    Args:
        answers: By the name of the row in `results.json`.
        folder: Where to.
        fingerprint: Of the evaluation data; None where it is not known, and then nothing is ever paired.

    Returns:
        The file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_answers({"pruned": Answers.of_classes([0, 1], [0, 0])}, folder, fingerprint="0123")
        ...     found, fingerprint = read_answers(folder)
        >>> found["pruned"].right.tolist(), fingerprint
        ([True, False], '0123')
    """
    arrays: dict[str, Any] = {}
    for number, one in enumerate(answers.values()):
        for name in _COLUMNS:
            column = getattr(one, name)
            if (
                column is None
                or (name == "tops" and one.predicted is not None)
                or (name, one.kind) == ("bottoms", "share")
            ):
                continue
            arrays[f"{number}.{name}"] = column.astype(np.float64 if column.dtype.kind == "f" else _smallest(column))
    about = {"fingerprint": fingerprint, "models": [[name, one.kind] for name, one in answers.items()]}
    path = Path(folder) / PREDICTIONS_FILE
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    return path


def read_answers(folder: str | Path) -> tuple[dict[str, Answers], str | None]:
    """What `save_answers` wrote, and the fingerprint of the data; empty if there is no file.

    Raises:
        ValueError: The file is not one of ours.
    """
    path = Path(folder) / PREDICTIONS_FILE
    if not path.is_file():
        return {}, None
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            columns = dict(file)
        found = {
            name: _answers(kind, {c: columns.get(f"{number}.{c}") for c in _COLUMNS})
            for number, (name, kind) in enumerate(about["models"])
        }
        return found, about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} does not hold predictions ({reason}); measure the model again") from None


def _answers(kind: Any, columns: dict[str, Any]) -> Answers:
    if columns["predicted"] is not None:
        return Answers.of_classes(columns["predicted"], columns["labels"])
    bottoms = np.ones(len(columns["tops"])) if kind == "share" else columns["bottoms"]
    return Answers(kind, columns["tops"].astype(np.float64), bottoms.astype(np.float64))


def _smallest(column: Any) -> Any:
    """The smallest type of integers that holds a column."""
    return np.promote_types(np.min_scalar_type(int(column.min())), np.min_scalar_type(int(column.max())))
