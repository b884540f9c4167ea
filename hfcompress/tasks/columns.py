"""Which column of a data set holds what: as told, or by type and customary name, or an error when in doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets

from hfcompress.config import DataConfig
from hfcompress.tasks.errors import DataError, unknown_name

Kind = Literal["text", "image"]

# What most data sets on the Hub call these things; compared without regard to case.
LABEL_NAMES = frozenset(
    ("label", "labels", "target", "targets", "class", "classes", "category", "intent", "sentiment", "emotion")
) | {"topic", "score", "rating", "stars"}
TEXT_NAMES = frozenset(
    ("sentence", "content", "review", "question", "utterance", "query", "comment", "tweet", "document")
) | {"message", "phrase", "body"}
IMAGE_NAMES = frozenset(("image", "img", "picture", "photo"))
PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
ROW_NUMBERS = frozenset(("id", "idx", "index", "guid", "uid", "uuid"))


@dataclass(frozen=True)
class Columns:
    """The columns a task reads.

    Attributes:
        label: Column of labels.
        text: One column of text or two (a pair of sentences), or None.
        image: Column of images, or None.
    """

    label: str
    text: tuple[str, ...] | None = None
    image: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every column named, inputs first.

        Example:
            >>> Columns(label="y", text=("a", "b")).all
            ('a', 'b', 'y')
        """
        return (*(self.text or ()), *((self.image,) if self.image else ()), self.label)


def detect_columns(features: Mapping[str, Any], config: DataConfig, kind: Kind) -> Columns:
    """Find the columns of the inputs and of the label.

    Names given in `config` are checked. The others are found by type and by customary name.

    Args:
        features: Column names and types, as in `Dataset.features`.
        config: The `data` section of a recipe.
        kind: Whether the inputs are texts or images.

    Returns:
        The columns.

    Raises:
        DataError: A column is not there, has the wrong type, or cannot be told from others.

    Example:
        >>> string, number = datasets.Value("string"), datasets.Value("int64")
        >>> features = {"idx": number, "utterance": string, "intent": string}
        >>> detect_columns(features, DataConfig(train="a.csv"), "text")
        Columns(label='intent', text=('utterance',), image=None)
    """
    text = (config.text,) if isinstance(config.text, str) else tuple(config.text or ())
    told = {"data.text": text, "data.image": (config.image,), "data.label": (config.label,)}
    for key, names in told.items():
        for name in names:
            if name is not None and name not in features:
                raise unknown_name(key, "column", name, features)
    inputs = text if kind == "text" else ((config.image,) if config.image else ())
    label = config.label or _label_by_name({n: f for n, f in features.items() if n not in inputs})
    free = {name: feature for name, feature in features.items() if name != label}
    if not inputs:
        inputs = _find_text(free) if kind == "text" else _find_image(free)
    if len({*inputs, label}) != len(inputs) + 1:
        raise DataError(
            f"data: a column is named twice among text, image and label: {', '.join([*inputs, str(label)])}"
        )
    for name in inputs:
        _check_input(name, features[name], kind)
    if label is None:
        label = _label_by_elimination(features, inputs)
    elif not _can_be_label(features[label]):
        raise DataError(
            f"data.label: column {label!r} holds {_type_name(features[label])};"
            " labels are strings, whole numbers, booleans, decimals (regression) or lists (several labels)"
        )
    return Columns(label, text=inputs) if kind == "text" else Columns(label, image=inputs[0])


def may_hold_labels(features: Mapping[str, Any], config: DataConfig, kind: Kind) -> bool:
    """Whether a data set has a column beside its inputs that could hold labels.

    Args:
        features: Column names and types, as in `Dataset.features`.
        config: The `data` section of a recipe.
        kind: Whether the inputs are texts or images.

    Raises:
        DataError: An input is not there, or cannot be told from others.

    Example:
        >>> string, number = datasets.Value("string"), datasets.Value("int64")
        >>> told = DataConfig(train="a.csv")
        >>> may_hold_labels({"idx": number, "text": string}, told, "text"), may_hold_labels({"y": number, "text": string}, told, "text")
        (False, True)
    """
    if config.label is not None:
        return True
    given = (config.text,) if isinstance(config.text, str) else tuple(config.text or ())
    inputs = given if kind == "text" else ((config.image,) if config.image else ())
    inputs = inputs or (_find_text(features) if kind == "text" else _find_image(features))
    rest = {name: feature for name, feature in features.items() if name not in inputs and not _counts_rows(name)}
    return any(_can_be_label(feature) for feature in rest.values())


def text_columns(features: Mapping[str, Any], text: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of text, where no labels are asked for: as told, or found by type and customary name.

    Args:
        features: Column names and types, as in `Dataset.features`.
        text: Their names, any number; without them one column or a pair is found.

    Returns:
        The names.

    Raises:
        DataError: A column is not there, holds something else, or cannot be told from others.

    Example:
        >>> string, number = datasets.Value("string"), datasets.Value("int64")
        >>> text_columns({"idx": number, "utterance": string, "intent": string})
        ('utterance',)
        >>> text_columns({"a": string, "b": string, "c": string}, ["b", "c"])
        ('b', 'c')
    """
    for name in text:
        if name not in features:
            raise unknown_name("data.text", "column", name, features)
        _check_input(name, features[name], "text")
    return tuple(text) or _find_text(features)


def _named(names: frozenset[str], features: Mapping[str, Any]) -> list[str]:
    return [name for name in features if name.casefold() in names]


def _doubt(key: str, what: str, features: Mapping[str, Any], remedy: str) -> DataError:
    there = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    return DataError(f"{key}: cannot tell which column holds the {what}; there are: {there}; {remedy}")


def _label_by_name(features: Mapping[str, Any]) -> str | None:
    """The label column where its name or type leaves no doubt; None where nothing points to one."""
    usable = {name: feature for name, feature in features.items() if _can_be_label(feature)}
    for names in (_named(frozenset({"label"}), usable), _named(frozenset({"labels"}), usable)):
        if len(names) == 1:
            return names[0]
    typed = [name for name, feature in usable.items() if isinstance(feature, datasets.ClassLabel)]
    for names in (typed, _named(LABEL_NAMES, usable)):
        if len(names) == 1:
            return names[0]
        if names:
            raise _doubt("data.label", "labels", features, f"set data.label to one of {', '.join(names)}")
    return None


def _label_by_elimination(features: Mapping[str, Any], inputs: tuple[str, ...]) -> str:
    """The only column left that can hold labels."""
    left = [
        name
        for name, feature in features.items()
        if name not in inputs and _can_be_label(feature) and not _counts_rows(name)
    ]
    if len(left) != 1:
        raise _doubt("data.label", "labels", features, "set data.label to its name")
    return left[0]


def _find_text(features: Mapping[str, Any]) -> tuple[str, ...]:
    strings = {n: f for n, f in features.items() if _is_string(f) and not _counts_rows(n)}
    strings = {n: f for n, f in strings.items() if n.casefold() not in LABEL_NAMES} or strings
    if len(strings) == 1:
        return tuple(strings)
    if text := _named(frozenset({"text"}), strings):
        return (text[0],)
    by_fold = {name.casefold(): name for name in strings}
    pairs = [(by_fold[a], by_fold[b]) for a, b in PAIRS if a in by_fold and b in by_fold]
    single = _named(TEXT_NAMES, strings)
    if len(pairs) == 1 and set(single) <= set(pairs[0]):
        return pairs[0]
    if len(single) == 1 and not pairs:
        return (single[0],)
    raise _doubt("data.text", "text", features, "set data.text to its name, or to two names for a pair of sentences")


def _find_image(features: Mapping[str, Any]) -> tuple[str, ...]:
    images = {name: feature for name, feature in features.items() if _is_image(feature)}
    named = _named(IMAGE_NAMES, images)
    if len(images) == 1 or len(named) == 1:
        return ((named or list(images))[:1][0],)
    raise _doubt("data.image", "images", features, "set data.image to its name")


def _check_input(name: str, feature: Any, kind: Kind) -> None:
    if kind == "text" and not _is_string(feature):
        raise DataError(f"data.text: column {name!r} holds {_type_name(feature)}, not text")
    if kind == "image" and not (_is_image(feature) or _is_string(feature)):
        raise DataError(f"data.image: column {name!r} holds {_type_name(feature)}, not images or file names")


def _counts_rows(name: str) -> bool:
    """Whether a column by its name only numbers the rows (as pandas and many exports add one)."""
    folded = name.casefold()
    return folded in ROW_NUMBERS or folded.startswith(("unnamed:", "__index_level_")) or not folded.strip()


def _is_string(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")


def _is_image(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def is_list(feature: Any) -> bool:
    """Whether a column holds a list in each row.

    Example:
        >>> is_list(datasets.List(datasets.Value("string"))), is_list(datasets.Value("string"))
        (True, False)
    """
    return isinstance(feature, (datasets.List, datasets.LargeList))


def _can_be_label(feature: Any) -> bool:
    if is_list(feature):
        return _can_be_label(feature.feature) and not is_list(feature.feature)
    if isinstance(feature, datasets.ClassLabel) or _is_string(feature):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float", "bool"))


def _type_name(feature: Any) -> str:
    if is_list(feature):
        return f"list of {_type_name(feature.feature)}"
    if isinstance(feature, datasets.Value):
        return str(feature.dtype)
    return type(feature).__name__
