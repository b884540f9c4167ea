"""What the labels of a data set mean: classes and their numbers, several classes at once, or a quantity."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets

from hfcompress.tasks.columns import is_list
from hfcompress.tasks.errors import DataError

logger = logging.getLogger(__name__)

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
LabelKind = Literal["single_label_classification", "multi_label_classification", "regression", "class_per_word"]


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split, brought to one form: the name of the class, a list of names, or a number.

    Attributes:
        values: One label per row.
        problem_type: What kind of labels they are: as in the model's configuration, or "class_per_word".
        declared: Names of all classes in their order where the column declares them, else None.
        where: What to call the split in a message.
    """

    values: Sequence[Any]
    problem_type: LabelKind
    declared: tuple[str, ...] | None
    where: str


@dataclass(frozen=True)
class Labels:
    """The classes of a task in the order of the model's outputs.

    Attributes:
        problem_type: As in the model's configuration, or "class_per_word".
        names: Name of each class as people are to read it; for regression the name of the quantity.
        keys: Name of each class as it stands in the data.

    Example:
        >>> Labels("single_label_classification", ("neg", "pos"), ("0", "1")).encode(["1", "0"])
        [1, 0]
        >>> Labels("multi_label_classification", ("red", "round"), ("red", "round")).encode([["round"], []])
        [[0.0, 1.0], [0.0, 0.0]]
        >>> Labels("class_per_word", ("O", "B-PER"), ("O", "B-PER")).encode([["B-PER", "O"]])
        [[1, 0]]
    """

    problem_type: LabelKind
    names: tuple[str, ...]
    keys: tuple[str, ...]

    def encode(self, values: Iterable[Any], *, where: str = "data") -> list[Any]:
        """Turn labels in the form of `LabelColumn.values` into what the loss takes.

        Args:
            values: Labels.
            where: What to call them in a message.

        Returns:
            Class numbers; or a float per row (regression); or per row a list of 0.0 and 1.0, one per class; or per row the class
            number of each word.

        Raises:
            DataError: A label is not among the classes.
        """
        if self.problem_type == "regression":
            return [float(value) for value in values]
        single = self.problem_type == "single_label_classification"
        ids = {key: i for i, key in enumerate(self.keys)}
        encoded: list[Any] = []
        unseen: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            for key in [value] if single else value:
                if key not in ids:
                    unseen.setdefault(key, []).append(row)
            if self.problem_type == "class_per_word":
                encoded.append([ids.get(key) for key in value])
            else:
                encoded.append(ids.get(value) if single else [float(key in value) for key in self.keys])
        if unseen:
            key, rows = next(iter(unseen.items()))
            more = f" (and {len(unseen) - 1} other such labels)" if len(unseen) > 1 else ""
            raise DataError(
                f"{where}: label {key!r}{more} is not among those of the training data ({listing(self.keys)});"
                f" it stands in {row_count(rows)}"
            )
        return encoded

    def name(self, label: Any) -> str:
        """A label as `encode` gives it in the words of the data: the same whatever order the classes have.

        Example:
            >>> Labels("single_label_classification", ("neg", "pos"), ("0", "1")).name(1)
            '1'
        """
        if self.problem_type == "regression":
            return repr(float(label))
        if self.problem_type == "single_label_classification":
            return self.keys[label]
        if self.problem_type == "class_per_word":
            return "\x1f".join(self.keys[number] for number in label)
        return "\x1f".join(sorted(key for key, flag in zip(self.keys, label, strict=True) if flag))


def read_labels(rows: datasets.Dataset, column: str, *, where: str, by_word: bool = False) -> LabelColumn:
    """Read a label column and find out what kind of labels it holds.

    Strings, whole numbers, booleans and ClassLabel are classes; decimals are a quantity (regression); lists of
    classes, or of as many zeros and ones per row as there are classes, are several labels at once.

    Args:
        rows: A split.
        column: Its label column.
        where: What to call the split in a message.
        by_word: Whether lists hold a class for each word.

    Returns:
        The labels.

    Raises:
        DataError: A label is missing: empty, or -1, which on the Hub stands for a label kept secret.

    Example:
        >>> column = read_labels(datasets.Dataset.from_dict({"y": [3, 1]}), "y", where="train")
        >>> column.values, column.problem_type
        (['3', '1'], 'single_label_classification')
    """
    feature = rows.features[column]
    values = _plain(rows, column)
    if is_list(feature):
        return _read_lists(feature.feature, values, where, by_word)
    _require_present(values, feature, where)
    if _is_float(feature):
        if all(float(value).is_integer() for value in values):
            logger.warning(
                "%s: the labels are whole numbers stored as decimals and are taken for a quantity (regression);"
                " store them as whole numbers or strings if they are classes",
                where,
            )
        return LabelColumn([float(value) for value in values], "regression", None, where)
    declared = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    names = [_name(value, feature) for value in values]
    return LabelColumn(names, "single_label_classification", declared, where)


def _plain(rows: datasets.Dataset, column: str) -> list[Any]:
    return list(rows.with_format(None).select_columns([column])[:][column])


def _read_lists(element: Any, values: Sequence[Any], where: str, by_word: bool) -> LabelColumn:
    kind: LabelKind = "class_per_word" if by_word else "multi_label_classification"
    _require_present(values, None, where)
    if not by_word and not isinstance(element, datasets.ClassLabel):
        sizes = {len(value) for value in values}
        size = sizes.pop()
        if not sizes and size > 1 and all(item in (0, 1) for value in values for item in value):
            names = [[str(i) for i, flag in enumerate(value) if flag] for value in values]
            return LabelColumn(names, kind, tuple(str(i) for i in range(size)), where)
        if _is_float(element):
            raise DataError(f"{where}: lists of decimals as labels must hold one 0 or 1 per class, as many in each row")
    for row, value in enumerate(values):
        _require_present(value, element, f"{where}, row {row}")
    declared = tuple(element.names) if isinstance(element, datasets.ClassLabel) else None
    return LabelColumn([[_name(item, element) for item in value] for value in values], kind, declared, where)


def _require_present(values: Sequence[Any], feature: Any, where: str) -> None:
    whole = isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.startswith("int")
    )
    missing = [
        row
        for row, value in enumerate(values)
        if value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and not math.isfinite(value))
    ]
    secret = [row for row, value in enumerate(values) if whole and value == -1]
    if missing:
        raise DataError(f"{where}: no label in {row_count(missing)}; drop the rows or fill in the labels")
    if secret:
        raise DataError(
            f"{where}: the label is -1, which means that it is not known, in {row_count(secret)};"
            " evaluate on another split (set data.eval), or write the labels as words if -1 is a class"
        )


def row_count(rows: Sequence[int]) -> str:
    """How many rows and which is the first, for a message.

    Example:
        >>> row_count([4, 9])
        '2 rows, the first of them row 4 (counted from 0)'
    """
    number = f"{len(rows):,} rows, the first of them row {rows[0]:,}" if len(rows) > 1 else f"row {rows[0]:,}"
    return f"{number} (counted from 0)"


def _is_float(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith("float")


def _name(value: Any, feature: Any) -> str:
    return str(feature.int2str(value)) if isinstance(feature, datasets.ClassLabel) else str(value)


def find_classes(train: LabelColumn, *, quantity: str = "score") -> Labels:
    """The classes of the training labels: declared order, else numbers by size and words by alphabet.

    Args:
        train: Labels to learn from.
        quantity: What regression predicts.

    Returns:
        The classes.

    Raises:
        DataError: There is only one class.

    Example:
        >>> find_classes(LabelColumn(["10", "9"], "single_label_classification", None, "train")).names
        ('9', '10')
    """
    if train.problem_type == "regression":
        return Labels("regression", (quantity,), (quantity,))
    several = train.problem_type in ("multi_label_classification", "class_per_word")
    counts = Counter(name for value in train.values for name in (value if several else [value]))
    if len(counts) < 2:
        only = f"only the label {next(iter(counts))!r}" if counts else "no label"
        raise DataError(f"{train.where}: there is {only} in all {len(train.values):,} rows; two or more are needed")
    names = train.declared or tuple(sorted(counts, key=int) if are_numbers(counts) else sorted(counts))
    if not several and len(names) > max(20, len(train.values) / 2):
        logger.warning(
            "%s: %d classes in %d rows; is data.label the right column?", train.where, len(names), len(train.values)
        )
    spelled: dict[str, str] = {}
    for name in names:
        other = spelled.setdefault(name.strip().casefold(), name)
        if other != name:
            logger.warning("%s: labels %r and %r are taken for two classes", train.where, other, name)
    return Labels(train.problem_type, names, names)


def warn_of_one_class(column: LabelColumn) -> None:
    """Say so where all examples that a model is scored on are of one class: always giving that would be right."""
    if column.problem_type == "single_label_classification" and len(set(column.values)) == 1:
        logger.warning(
            "%s: all %s rows have the label %r, so the score says little; evaluate on rows of every class",
            column.where,
            f"{len(column.values):,}",
            column.values[0],
        )


def are_numbers(names: Iterable[str]) -> bool:
    """Whether class names are mere whole numbers, such as 0 and 1, that do not say what they stand for.

    Example:
        >>> are_numbers(["0", "-3"]), are_numbers(["1 star", "2 stars"])
        (True, False)
    """
    return all(name.removeprefix("-").isdecimal() for name in names)


def encode_split(column: LabelColumn, labels: Labels) -> list[Any]:
    """Encode a split's labels by the classes found in the training data.

    Args:
        column: The split's labels.
        labels: The classes.

    Returns:
        As `Labels.encode`.

    Raises:
        DataError: A label was never seen in the training data, or the kinds of labels differ.

    Example:
        >>> column = LabelColumn(["b"], "single_label_classification", None, "eval")
        >>> encode_split(column, Labels("single_label_classification", ("a", "b"), ("a", "b")))
        [1]
    """
    values = column.values
    if column.problem_type != labels.problem_type:
        # A file of scores that all happen to be whole is read as whole numbers.
        if labels.problem_type == "regression" and are_numbers(map(str, values)):
            return [float(value) for value in values]
        raise DataError(
            f"{column.where}: its labels make a {column.problem_type} but those of the training data a"
            f" {labels.problem_type}; store both with the same type"
        )
    return labels.encode(values, where=column.where)


@dataclass(frozen=True)
class Head:
    """What the output layer of an existing model says about its classes.

    Attributes:
        model: Name of the model.
        size: Number of outputs, or None if the model is not fine-tuned on this kind of task.
        names: What the outputs stand for, or None if the configuration only has LABEL_0, LABEL_1, ...
    """

    model: str
    size: int | None
    names: tuple[str, ...] | None


def read_head(config: Any, *, model: str, endings: Sequence[str]) -> Head:
    """Read the output layer's classes from a model's configuration.

    Args:
        config: A `PretrainedConfig`.
        model: Name of the model.
        endings: What class names of fine-tuned models contain, such as "ForSequenceClassification".

    Returns:
        The head.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(architectures=["BertModel"], id2label={0: "LABEL_0", 1: "LABEL_1"})
        >>> read_head(config, model="m", endings=["ForSequenceClassification"])
        Head(model='m', size=None, names=None)
    """
    id2label: Mapping[Any, str] = getattr(config, "id2label", None) or {}
    listed = tuple(str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0])))
    architectures = getattr(config, "architectures", None) or []
    if not any(ending in name for ending in endings for name in architectures):
        return Head(model, None, None)
    named = any(name != f"LABEL_{i}" for i, name in enumerate(listed))
    return Head(model, len(listed), listed if named else None)


def follow_head(labels: Labels, head: Head, *, must_match: bool) -> Labels:
    """Bring the classes into the order of a model that already knows them.

    A teacher whose outputs stand in another order than the student's would teach nonsense without any error.

    Args:
        labels: Classes of the data.
        head: Classes of the model.
        must_match: The outputs are going to be used as they are (teacher), so they must fit the data. Otherwise
            a model with other classes is to get a new output layer.

    Returns:
        The classes in the model's order and spelling where both name the same ones without regard to case, or
        where the data have as many numbers instead of names; else as they were.

    Raises:
        DataError: `must_match` and the model does not know these classes.

    Example:
        >>> labels = Labels("single_label_classification", ("neg", "pos"), ("neg", "pos"))
        >>> follow_head(labels, Head("m", 2, ("POS", "NEG")), must_match=True).keys
        ('pos', 'neg')
    """
    if must_match and head.size is None:
        raise DataError(f"{head.model}: is not fine-tuned on such a task (it has no output layer); fine-tune it first")
    if head.names is not None and labels.problem_type != "regression":
        by_fold = {key.casefold(): key for key in labels.keys}
        known = [name.casefold() for name in head.names]
        if len(by_fold) == len(labels.keys) == len(known) and set(by_fold) == set(known):
            return replace(labels, names=head.names, keys=tuple(by_fold[name] for name in known))
        if are_numbers(labels.keys) and not are_numbers(head.names) and len(labels.keys) == len(known):
            pairs = (f"{key} = {name}" for key, name in zip(labels.keys, head.names, strict=True))
            logger.info("labels named as the outputs of %s: %s", head.model, listing(pairs))
            return replace(labels, names=head.names)
    if must_match:
        _require_same_size(labels, head)
        _warn_or_refuse_order(labels, head)
    return labels


def _require_same_size(labels: Labels, head: Head) -> None:
    if head.size == len(labels.names):
        return
    knows = f"{head.size} ({listing(head.names)})" if head.names else str(head.size)
    raise DataError(
        f"{head.model}: has {knows} outputs but the data have {len(labels.names)}"
        f" ({listing(labels.names)}, {labels.problem_type}); use a model fine-tuned on these labels"
    )


def _warn_or_refuse_order(labels: Labels, head: Head) -> None:
    """Equal numbers of classes under other names: refuse where the order is surely wrong, else say what is assumed."""
    if labels.problem_type == "regression" or are_numbers(labels.names):
        return
    if head.names is None:
        logger.warning(
            "%s does not name its outputs; they are taken to be, in this order: %s", head.model, listing(labels.names)
        )
        return
    pairs = list(zip(labels.names, head.names, strict=True))
    known = {name.casefold() for name in head.names}
    wrong = [name for name, other in pairs if name.casefold() in known and name.casefold() != other.casefold()]
    order = listing(f"{name} = {other}" for name, other in pairs)
    if wrong:
        raise DataError(
            f"{head.model}: names its outputs otherwise than the data, and {wrong[0]!r} is at another place"
            f" ({order}); rename the labels of the data to those of the model"
        )
    logger.warning("%s names its outputs otherwise than the data; they are taken by position: %s", head.model, order)


def listing(names: Iterable[str], most: int = 12) -> str:
    """Names in one line, cut where there are many.

    Example:
        >>> listing("abcd", most=2)
        'a, b, ... 2 more'
    """
    every = list(names)
    return ", ".join(every[:most]) + (f", ... {len(every) - most} more" if len(every) > most else "")
