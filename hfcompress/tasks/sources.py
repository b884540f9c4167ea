"""Reading a data set: from the Hub, from files, from a folder of images or sounds or one written by `save_to_disk`."""

from __future__ import annotations

import csv
import glob
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Kind, is_string
from hfcompress.tasks.errors import DataError, first_line, unknown_name

logger = logging.getLogger(__name__)

TRAIN_SPLITS = ("train", "training")
# In this order: the labels of a test split are often kept secret, so a validation split goes first.
EVAL_SPLITS = (
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "evaluation",
    "validation_matched",
    "test",
    "testing",
)
FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".au"))


@dataclass(frozen=True)
class Source:
    """One split as it was read.

    Attributes:
        rows: The examples with all their columns.
        name: What to call it in a message.
        folder: Where relative file names in a column start from, or None.
        is_lines: Whether the rows are the lines of text files.
    """

    rows: datasets.Dataset
    name: str
    folder: Path | None = None
    is_lines: bool = False


def with_absolute_paths(rows: datasets.Dataset, column: str, *, folder: Path | None) -> datasets.Dataset:
    """Make file names absolute, if that is what a column holds: in a table they are relative to the table's folder."""
    if not is_string(rows.features[column]):
        return rows
    return rows.map(_absolute, fn_kwargs={"column": column, "folder": str(folder or "")})


def _absolute(example: dict[str, Any], *, column: str, folder: str) -> dict[str, Any]:
    name = example[column]
    remote = name is None or "://" in name
    return {column: name if remote else str(Path(folder, name).absolute())}


def read_sources(config: DataConfig, *, kind: Kind) -> tuple[Source, Source | None]:
    """Read the training data, and the evaluation data if there are any.

    Args:
        config: The `data` section of a recipe.
        kind: Whether the inputs are texts, images or sounds.

    Returns:
        Training data, and evaluation data or None.

    Raises:
        DataError: Something cannot be found or read, or has no rows.
    """
    if config.name is None:
        splits = _read_path(str(config.train), kind=kind, key="data.train")
    elif Path(config.name).expanduser().is_dir():
        splits = _read_path(config.name, kind=kind, key="data.name")
    else:
        splits = _read_hub(config)
    train_name = _choose(splits, None if config.name is None else config.train, TRAIN_SPLITS, "data.train")
    eval_source = _evaluation(config, splits, train_name, kind)
    for source in (splits[train_name], eval_source):
        if source is not None and len(source.rows) == 0:
            raise DataError(f"data: {source.name} has no rows")
    return splits[train_name], eval_source


def read_rows(pattern: str, *, key: str) -> list[Source]:
    """Read everything in files or in a folder, whatever split it belongs to; each line of a .txt file is a row.

    Args:
        pattern: A file, a folder, or a pattern such as data/train-*.parquet.
        key: What error messages call it.

    Returns:
        The splits there are, each with at least one row.

    Raises:
        DataError: There is no such file, it cannot be read, or it has no rows.
    """
    sources = list(_read_path(pattern, kind="text", key=key).values())
    for source in sources:
        if len(source.rows) == 0:
            raise DataError(f"{key}: {source.name} has no rows")
    return sources


def _evaluation(config: DataConfig, splits: Mapping[str, Source], train_name: str, kind: Kind) -> Source | None:
    """The evaluation data as named, or the customary split beside the training data, or None."""
    if config.eval is None:
        names = [name for name in EVAL_SPLITS if name in splits and name != train_name]
        return splits[names[0]] if names else None
    if config.eval == (config.train if config.name is None else train_name):
        logger.warning("data.eval is the training data: the score says nothing about new examples")
    if config.eval in splits:
        return splits[config.eval]
    if config.name is not None and not _matches(config.eval):
        raise unknown_name("data.eval", "split", config.eval, splits)
    found = _read_path(config.eval, kind=kind, key="data.eval")
    return found[_choose(found, None, (*EVAL_SPLITS, *TRAIN_SPLITS), "data.eval")]


def _choose(splits: Mapping[str, Source], asked: str | None, customary: Sequence[str], key: str) -> str:
    """Name of the split asked for, else of the only one, else of the first customary one."""
    if asked is not None:
        if asked not in splits:
            raise unknown_name(key, "split", asked, splits)
        return asked
    if len(splits) == 1:
        return next(iter(splits))
    for name in customary:
        if name in splits:
            return name
    raise DataError(f"{key}: cannot tell which split to use; there are: {', '.join(splits)}")


def _read_hub(config: DataConfig) -> dict[str, Source]:
    """All splits of a data set on the Hub, and those parts of splits (such as train[:90%]) that are asked for."""
    name = str(config.name)
    parts = [s for s in (config.train, config.eval) if s and re.search(r"[\[+]", s) and not _matches(s)]
    try:
        found: dict[str, Any] = dict(datasets.load_dataset(name, config.config))
        found |= {part: datasets.load_dataset(name, config.config, split=part) for part in parts}
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"data.name: {name!r} cannot be loaded: {first_line(error)};"
            " check the name and the network, or give local files in data.train"
        ) from error
    return {split: Source(rows, f"{name} ({split})") for split, rows in found.items()}


def _matches(pattern: str) -> list[Path]:
    """The files or folders a path or a pattern such as data/train-*.parquet stands for, sorted."""
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    return sorted(Path(found) for found in glob.glob(str(path), recursive=True))


def _read_path(pattern: str, *, kind: Kind, key: str) -> dict[str, Source]:
    """Read files or a folder; the splits found, which is one named train for plain files."""
    paths = _matches(pattern)
    if not paths:
        raise DataError(f"{key}: {pattern!r} is neither a file nor a folder")
    if len(paths) == 1 and paths[0].is_dir():
        return _read_folder(paths[0], kind, key)
    return {"train": _read_files(paths, Path(pattern).name, key)}


def _read_folder(folder: Path, kind: Kind, key: str) -> dict[str, Source]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder, key)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
    described = [path for path in files if path.stem == "metadata" and path.suffix in (".csv", ".jsonl", ".parquet")]
    readable = [path for path in files if path.suffix.lower() in FORMATS and not path.name.startswith("dataset_info")]
    # Beside tables, text files are notes.
    tables = [path for path in readable if path.suffix.lower() != ".txt"] or (readable if kind == "text" else [])
    suffixes = {"text": frozenset(), "image": _image_suffixes(), "audio": AUDIO_SUFFIXES}[kind]
    media = [path for path in files if path.suffix.lower() in suffixes]
    if kind == "image" and described:
        loaded = _load("imagefolder", folder.name, key, data_dir=str(folder))
        return {split: Source(rows, f"{folder.name}/{split}") for split, rows in loaded.items()}
    if media and not (kind == "audio" and tables):  # a table beside sounds says what is in them
        return _read_media(folder, media, kind, key)
    if not tables:
        wanted = "" if kind == "text" else f"{_MEDIA[kind]} in one folder per class, "
        raise DataError(f"{key}: {str(folder)!r} holds no {wanted}{', '.join(FORMATS)} files, nor a saved data set")
    groups: dict[str | None, list[Path]] = {}
    for path in tables:
        groups.setdefault(_split_of(path, folder), []).append(path)
    if set(groups) == {None}:
        return {"train": _read_files(tables, folder.name, key)}
    if None in groups:
        raise DataError(
            f"{key}: cannot tell which split {groups[None][0].name} in {folder.name} belongs to, while other files"
            " there are named after one; give files in data.train and data.eval"
        )
    return {str(split): _read_files(paths, f"{folder.name} ({split})", key) for split, paths in groups.items()}


def _read_saved(folder: Path, key: str) -> dict[str, Source]:
    """What `save_to_disk` wrote."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{key}: {str(folder)!r} cannot be read: {first_line(error)}") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": Source(loaded, folder.name, folder)}
    return {str(split): Source(rows, f"{folder.name} ({split})", folder) for split, rows in loaded.items()}


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)


def _image_suffixes() -> set[str]:
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _split_of(path: Path, root: Path) -> str | None:
    """The split a file belongs to by a folder's name or a word in its own (sst2_dev, train-00000-of-00002)."""
    words = [*path.relative_to(root).parts[:-1], *re.split(r"[^a-zA-Z]+", path.stem)]
    return next((word.lower() for word in words if word.lower() in (*TRAIN_SPLITS, *EVAL_SPLITS)), None)


_MEDIA = {"image": "images", "audio": "sounds"}


def _read_media(folder: Path, files: Sequence[Path], kind: Kind, key: str) -> dict[str, Source]:
    """A folder with one folder of images or sounds per class, or with one such folder per split.

    Read here and not by datasets' "imagefolder", which takes a class folder named test_tube for a test split.
    """
    tops = sorted({path.relative_to(folder).parts[0] for path in files})
    if {top.lower() for top in tops} <= {*TRAIN_SPLITS, *EVAL_SPLITS}:
        return {top.lower(): _class_folders(folder / top, files, f"{folder.name}/{top}", kind, key) for top in tops}
    return {"train": _class_folders(folder, files, folder.name, kind, key)}


def _class_folders(root: Path, files: Sequence[Path], name: str, kind: Kind, key: str) -> Source:
    inside = [path for path in files if path.is_relative_to(root)]
    loose = [path for path in inside if path.parent == root]
    if loose:
        raise DataError(
            f"{key}: {str(loose[0])!r} lies in no class folder ({len(loose)} such);"
            f" {_MEDIA[kind]} are expected in one folder per class, named as the class"
        )
    classes = sorted({path.relative_to(root).parts[0] for path in inside})
    ids = {cls: i for i, cls in enumerate(classes)}
    # datasets needs torchcodec to make a column of sounds, even of files' names.
    column = datasets.Image() if kind == "image" else datasets.Value("string")
    features = datasets.Features({kind: column, "label": datasets.ClassLabel(names=classes)})
    columns = {
        kind: [str(path.absolute()) for path in inside],
        "label": [ids[path.relative_to(root).parts[0]] for path in inside],
    }
    return Source(datasets.Dataset.from_dict(columns, features=features), name, root)


def _read_files(paths: Sequence[Path], name: str, key: str) -> Source:
    """Tables of one format, put one below the other."""
    suffixes = sorted({path.suffix.lower() for path in paths})
    formats = {FORMATS.get(suffix) for suffix in suffixes}
    if None in formats or len(formats) > 1:
        raise DataError(f"{key}: {name}: files end in {', '.join(suffixes)}; give one kind of {', '.join(FORMATS)}")
    builder = str(formats.pop())
    paths = [path for path in paths if path.stat().st_size]
    if not paths:
        raise DataError(f"{key}: {name} has no rows")
    options: dict[str, Any] = {}
    if builder == "csv":
        # pandas would read the words "NA", "None" and "null" as missing values; here only an empty cell is one.
        options = {"sep": _separator(paths[0], key), "keep_default_na": False, "na_values": [""]}
        if any(_has_literal_quotes(path) for path in paths if path.suffix.lower() == ".tsv"):
            options["quoting"] = csv.QUOTE_NONE
    files = [glob.escape(str(path.absolute())) for path in paths]
    rows = _load(builder, name, key, data_files={"train": files}, **options)["train"]
    return Source(rows, name, paths[0].parent, is_lines=builder == "text")


def _load(builder: str, name: str, key: str, **options: Any) -> Any:
    loud = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would say the error once more, in its own words
    try:
        return datasets.load_dataset(builder, **options)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        said = first_line(error)
        empty = "corresponds to no data" in str(error) or "BatchSize must be greater than 0" in said
        raise DataError(f"{key}: {name} {'has no rows' if empty else f'cannot be read: {said}'}") from error
    finally:
        datasets.logging.set_verbosity(loud)


def _separator(path: Path, key: str) -> str:
    """What separates the columns of a csv file, by its first line: comma, semicolon or tab."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path.name} is not in UTF-8; save it in that encoding") from error
    except OSError as error:
        raise DataError(f"{key}: {path.name} cannot be read: {error.strerror or error}") from error
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    twice = next((column for number, column in enumerate(names) if column in names[:number]), None)
    if twice:  # pandas would give the second one another name
        raise DataError(f"{key}: {path.name} has two columns named {twice!r}; give each a name of its own")
    return separator


def _has_literal_quotes(path: Path) -> bool:
    """Whether some cell opens a quotation and does not close it, as in GLUE's files.

    There a quotation mark is a character like any other; read as quoting, it would swallow the rows up to the next.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        cells = (cell for line in file for cell in line.rstrip("\r\n").split("\t"))
        return any(cell.startswith('"') and (len(cell) == 1 or not cell.endswith('"')) for cell in cells)
