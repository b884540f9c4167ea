"""Which column of a data set holds what: as told, or by type and customary name, or an error when in doubt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets

from hfcompress.config import DataConfig
from hfcompress.tasks.errors import DataError, unknown_name

Kind = Literal["text", "image", "audio"]

# What most data sets on the Hub call these things; compared without regard to case.
LABEL_NAMES = frozenset(
    ("label", "labels", "target", "targets", "class", "classes", "category", "intent", "sentiment", "emotion")
) | {"topic", "score", "rating", "stars"}
TEXT_NAMES = frozenset(
    ("sentence", "content", "review", "question", "utterance", "query", "comment", "tweet", "document")
) | {"message", "phrase", "body"}
IMAGE_NAMES = frozenset(("image", "img", "picture", "photo"))
AUDIO_NAMES = ("audio", "sound", "speech", "recording", "wav", "file", "file_name", "path")
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
        label: Column of what is to be predicted; None where that follows from the inputs.
        inputs: Columns of the inputs, in the order the task reads them.
        choices: Columns of choices: one of lists, or one per choice.

    Example:
        >>> Columns("y", ("a", "b")).all
        ('a', 'b', 'y')
    """

    label: str | None
    inputs: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every column named, inputs first."""
        return (*self.inputs, *self.choices, *((self.label,) if self.label is not None else ()))


def detect_columns(features: Mapping[str, Any], config: DataConfig, kind: Kind) -> Columns:
    """Find the columns of the inputs and of the label of a classification.

    Names given in `config` are checked. The others are found by type and by customary name.

    Args:
        features: Column names and types, as in `Dataset.features`.
        config: The `data` section of a recipe.
        kind: Whether the inputs are texts, images or sounds.

    Returns:
        The columns.

    Raises:
        DataError: A column is not there, has the wrong type, or cannot be told from others.

    Example:
        >>> string, number = datasets.Value("string"), datasets.Value("int64")
        >>> features = {"idx": number, "utterance": string, "intent": string}
        >>> detect_columns(features, DataConfig(train="a.csv"), "text")
        Columns(label='intent', inputs=('utterance',), choices=())
    """
    inputs = told_inputs(config, kind)
    for key, names in ((f"data.{kind}", inputs), ("data.label", told(config.label))):
        for name in names:
            if name not in features:
                raise unknown_name(key, "column", name, features)
    label = config.label or _label_by_name({n: f for n, f in features.items() if n not in inputs})
    inputs = inputs or _find_inputs({name: feature for name, feature in features.items() if name != label}, kind)
    require_distinct(*inputs, label)
    for name in inputs:
        _check_input(name, features[name], kind)
    if label is None:
        label = _label_by_elimination(features, inputs)
    elif not _can_be_label(features[label]):
        raise DataError(
            f"data.label: column {label!r} holds {_type_name(features[label])};"
            " labels are strings, whole numbers, booleans, decimals (regression) or lists (several labels)"
        )
    return Columns(label, inputs)


def told(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names as a recipe gives them, one or several or none.

    Example:
        >>> told("a"), told(["a", "b"]), told(None)
        (('a',), ('a', 'b'), ())
    """
    return (names,) if isinstance(names, str) else tuple(names or ())


def told_inputs(config: DataConfig, kind: Kind) -> tuple[str, ...]:
    """The columns of inputs that a recipe names."""
    return told({"text": config.text, "image": config.image, "audio": config.audio}[kind])


def require_distinct(*names: str | None) -> None:
    """Refuse the same column in two places.

    Raises:
        DataError: A column is named twice.
    """
    given = [name for name in names if name is not None]
    if len(set(given)) != len(given):
        raise DataError(f"data: a column is named twice among inputs and label: {', '.join(given)}")


def choose_column(
    key: str,
    what: str,
    features: Mapping[str, Any],
    *,
    name: str | None,
    customary: Sequence[str],
    fits: Callable[[Any], bool],
    wanted: str,
) -> str:
    """One column: as told, else by the first customary name that is there, else the only one of the right type.

    Args:
        key: Key of the recipe that names it.
        what: What it holds, for a message.
        features: Column names and types to choose from.
        name: Its name, or None.
        customary: Names in the order of preference, compared without regard to case.
        fits: Whether a type is right.
        wanted: The right type in words.

    Returns:
        The name.

    Raises:
        DataError: The column is not there, has the wrong type, or cannot be told from others.

    Example:
        >>> features = {"Summary": datasets.Value("string"), "article": datasets.Value("string")}
        >>> options = {"name": None, "customary": ("target", "summary"), "fits": is_string, "wanted": "text"}
        >>> choose_column("data.label", "texts to write", features, **options)
        'Summary'
    """
    if name is not None:
        if name not in features:
            raise unknown_name(key, "column", name, features)
        if not fits(features[name]):
            raise DataError(f"{key}: column {name!r} holds {_type_name(features[name])}, not {wanted}")
        return name
    usable = {other: feature for other, feature in features.items() if fits(feature) and not _counts_rows(other)}
    folded = {other.casefold(): other for other in reversed(usable)}
    found = next((folded[other] for other in customary if other in folded), None)
    if found is None and len(usable) != 1:
        raise _doubt(key, what, features, f"set {key} to its name")
    return found or next(iter(usable))


def may_hold_labels(features: Mapping[str, Any], config: DataConfig, kind: Kind) -> bool:
    """Whether a data set has a column beside its inputs that could hold labels.

    Args:
        features: Column names and types, as in `Dataset.features`.
        config: The `data` section of a recipe.
        kind: Whether the inputs are texts, images or sounds.

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
    inputs = told_inputs(config, kind) or _find_inputs(features, kind)
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
    strings = {n: f for n, f in features.items() if is_string(f) and not _counts_rows(n)}
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


def _find_inputs(features: Mapping[str, Any], kind: Kind) -> tuple[str, ...]:
    if kind == "text":
        return _find_text(features)
    if kind == "image":
        return _find_image(features)
    sounds = {name: feature for name, feature in features.items() if is_sound(feature)}
    options: dict[str, Any] = {"name": None, "customary": AUDIO_NAMES, "wanted": "sounds"}
    if sounds or not any(name in AUDIO_NAMES for name in map(str.casefold, features)):
        return (choose_column("data.audio", "sounds", features, fits=is_sound, **options),)
    return (choose_column("data.audio", "sounds", features, fits=is_string, **options),)  # names of files


def _find_image(features: Mapping[str, Any]) -> tuple[str, ...]:
    images = {name: feature for name, feature in features.items() if _is_image(feature)}
    named = _named(IMAGE_NAMES, images)
    if len(images) == 1 or len(named) == 1:
        return ((named or list(images))[:1][0],)
    raise _doubt("data.image", "images", features, "set data.image to its name")


def _check_input(name: str, feature: Any, kind: Kind) -> None:
    if kind == "text" and not is_string(feature):
        raise DataError(f"data.text: column {name!r} holds {_type_name(feature)}, not text")
    if kind == "image" and not (_is_image(feature) or is_string(feature)):
        raise DataError(f"data.image: column {name!r} holds {_type_name(feature)}, not images or file names")
    if kind == "audio" and not (is_sound(feature) or is_string(feature)):
        raise DataError(
            f"data.audio: column {name!r} holds {_type_name(feature)}, not sounds, lists of samples or file names"
        )


def _counts_rows(name: str) -> bool:
    """Whether a column by its name only numbers the rows (as pandas and many exports add one)."""
    folded = name.casefold()
    return folded in ROW_NUMBERS or folded.startswith(("unnamed:", "__index_level_")) or not folded.strip()


def is_string(feature: Any) -> bool:
    """Whether a column holds text."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")


def _is_image(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def with_parts(features: Mapping[str, Any]) -> dict[str, Any]:
    """Column names and types, with those of the parts of columns that have several, such as translations.

    Example:
        >>> list(with_parts({"id": datasets.Value("string"), "translation": datasets.Translation(["de", "en"])}))
        ['id', 'translation', 'translation.de', 'translation.en']
    """
    found: dict[str, Any] = {}
    for name, feature in features.items():
        found[name] = feature
        parts = feature.flatten() if isinstance(feature, datasets.Translation) else feature
        if isinstance(parts, dict):
            found |= {f"{name}.{part}": inner for part, inner in parts.items()}
    return found


def is_sound(feature: Any) -> bool:
    """Whether a column holds sounds: files, samples with their rate, or lists of samples.

    Example:
        >>> is_sound(datasets.Audio()), is_sound(datasets.List(datasets.Value("float32"))), is_sound(datasets.Value("string"))
        (True, True, False)
    """
    if isinstance(feature, dict):
        return set(feature) >= {"array", "sampling_rate"} or set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Audio) or (is_list(feature) and _is_number(feature.feature))


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
    return holds_classes(feature) or _is_number(feature)


def holds_classes(feature: Any) -> bool:
    """Whether a column holds one class in each row: a declared one, a word or a whole number.

    Example:
        >>> holds_classes(datasets.Value("int8")), holds_classes(datasets.Value("float32"))
        (True, False)
    """
    whole = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "bool"))
    return isinstance(feature, datasets.ClassLabel) or is_string(feature) or whole


def _is_number(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float", "bool"))


def _type_name(feature: Any) -> str:
    if is_list(feature):
        return f"list of {_type_name(feature.feature)}"
    if isinstance(feature, datasets.Value):
        return str(feature.dtype)
    return type(feature).__name__
