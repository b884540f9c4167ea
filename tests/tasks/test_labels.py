from __future__ import annotations

import re

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hfcompress.tasks import DataError
from hfcompress.tasks.labels import (
    Head,
    LabelColumn,
    Labels,
    encode_split,
    find_classes,
    follow_head,
    read_head,
    read_labels,
)

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


def classes(*names: str, problem_type=SINGLE) -> Labels:
    return Labels(problem_type, names, names)


def column(values, feature=None) -> LabelColumn:
    features = Features({"y": feature}) if feature is not None else None
    return read_labels(Dataset.from_dict({"y": values}, features=features), "y", where="train.csv")


KINDS = [
    (["neg", "pos", "neg"], None, ("neg", "pos"), [0, 1, 0]),
    ([7, 3, 10], None, ("3", "7", "10"), [1, 0, 2]),
    (["10", "9", "-2"], None, ("-2", "9", "10"), [2, 1, 0]),
    ([True, False], None, ("False", "True"), [1, 0]),
    ([2, 0], ClassLabel(names=["z", "y", "x"]), ("z", "y", "x"), [2, 0]),
]


@pytest.mark.parametrize(("values", "feature", "names", "ids"), KINDS)
def test_single_labels_of_every_type(values, feature, names, ids):
    read = column(values, feature)
    labels = find_classes(read)
    assert (labels.problem_type, labels.names) == (SINGLE, names)
    assert encode_split(read, labels) == ids


LISTS = [
    ([["b"], ["a", "b"], []], None, ("a", "b"), [[0, 1], [1, 1], [0, 0]]),
    ([[4, 9], [9]], None, ("4", "9"), [[1, 1], [0, 1]]),
    ([[1, 0, 0], [0, 1, 1]], None, ("0", "1", "2"), [[1, 0, 0], [0, 1, 1]]),
    ([[1.0, 0.0], [0.0, 1.0]], None, ("0", "1"), [[1, 0], [0, 1]]),
    ([[1], [0, 1]], List(ClassLabel(names=["joy", "fear", "awe"])), ("joy", "fear", "awe"), [[0, 1, 0], [1, 1, 0]]),
]


@pytest.mark.parametrize(("values", "feature", "names", "rows"), LISTS)
def test_lists_are_several_labels(values, feature, names, rows):
    read = column(values, feature)
    labels = find_classes(read)
    assert (labels.problem_type, labels.names) == (SEVERAL, names)
    encoded = encode_split(read, labels)
    assert encoded == rows
    assert {type(item) for row in encoded for item in row} == {float}


def test_decimals_are_a_quantity_and_whole_ones_are_doubted(caplog):
    read = column([0.5, 3.0])
    labels = find_classes(read, quantity="similarity")
    assert (labels.problem_type, labels.names, encode_split(read, labels)) == (
        "regression",
        ("similarity",),
        [0.5, 3.0],
    )
    assert not caplog.text
    column([1.0, 0.0])
    assert "whole numbers stored as decimals" in caplog.text


WRONG = [
    (["a", None, "b", None], None, "train.csv: no label in 2 rows, the first of them row 1 (counted from 0)"),
    (["a", " "], None, "no label in row 1 (counted from 0)"),
    ([1.5, float("nan")], None, "no label in row 1"),
    (
        [0, -1, -1],
        None,
        "train.csv: the label is -1, which means that it is not known, in 2 rows, the first of them row 1",
    ),
    ([0, -1], ClassLabel(names=["a", "b"]), "the label is "),
    ([["a"], None], None, "no label in row 1"),
    ([["a"], ["b", None]], None, "train.csv, row 1: no label in row 1"),
    ([[0.5, 1.0]], None, "lists of decimals as labels must hold one 0 or 1 per class"),
]


@pytest.mark.parametrize(("values", "feature", "message"), WRONG)
def test_missing_and_wrong_labels(values, feature, message):
    with pytest.raises(DataError, match=re.escape(message)):
        column(values, feature)


def test_one_class_is_not_enough():
    with pytest.raises(DataError, match=r"train.csv: there is only the label 'a' in all 3 rows"):
        find_classes(column(["a", "a", "a"]))
    with pytest.raises(DataError, match="only the label 'z'"):
        find_classes(column([0, 0], ClassLabel(names=["z", "y"])))
    with pytest.raises(DataError, match="there is no label in all 2 rows"):
        find_classes(column([[], []], List(Value("string"))))


def test_unseen_labels_are_named():
    labels = find_classes(column(["a", "b"]))
    with pytest.raises(
        DataError,
        match=r"train.csv: label 'c' \(and 1 other such labels\) is not among .* \(a, b\).* 2 rows, the first of them row 1",
    ):
        encode_split(column(["a", "c", "d", "c"]), labels)
    several = find_classes(column([["a"], ["b"]]))
    with pytest.raises(DataError, match="label 'x' is not among"):
        encode_split(column([["a", "x"]]), several)


def test_the_two_splits_must_hold_the_same_kind():
    quantity = find_classes(column([0.5, 1.0]), quantity="q")
    assert encode_split(column([1, 3]), quantity) == [1.0, 3.0]
    with pytest.raises(DataError, match="its labels make a regression but those of the training data a single_label"):
        encode_split(column([0.5]), find_classes(column([1, 2])))


def test_classes_are_matched_by_name_where_the_declared_order_differs():
    train = column([0, 1, 2], ClassLabel(names=["car", "cat", "dog"]))
    held = column([0, 1], ClassLabel(names=["cat", "dog"]))
    assert encode_split(held, find_classes(train)) == [1, 2]


def test_suspicious_classes_are_said(caplog):
    find_classes(column(["Pos", "pos ", "neg"]))
    assert "labels 'Pos' and 'pos ' are taken for two classes" in caplog.text
    find_classes(column([f"text {i}" for i in range(40)]))
    assert "40 classes in 40 rows; is data.label the right column?" in caplog.text


def head(*names: str) -> Head:
    return Head("teacher", len(names), names)


@pytest.mark.parametrize("must_match", [False, True])
def test_the_model_gives_the_order(must_match):
    followed = follow_head(classes("neg", "neu", "pos"), head("POS", "neu", "Neg"), must_match=must_match)
    assert followed == Labels(SINGLE, ("POS", "neu", "Neg"), ("pos", "neu", "neg"))
    assert followed.encode(["neg", "pos"]) == [2, 0]
    numbers = follow_head(classes("0", "1"), head("negative", "positive"), must_match=must_match)
    assert (numbers.names, numbers.encode(["1", "0"])) == (("negative", "positive"), [1, 0])
    stars = follow_head(classes("1", "2", "5"), head("bad", "fair", "good"), must_match=must_match)
    assert stars.encode(["5", "1"]) == [2, 0]
    flipped = follow_head(classes("0", "1"), head("1", "0"), must_match=must_match)
    assert flipped.encode(["0", "1"]) == [1, 0]


def test_a_model_with_other_classes_gets_a_new_head_unless_it_must_match():
    ours = classes("cat", "dog")
    assert follow_head(ours, head("a", "b", "c"), must_match=False) == ours
    assert follow_head(ours, Head("m", None, None), must_match=False) == ours
    with pytest.raises(DataError, match=r"teacher: has 3 \(a, b, c\) outputs but the data have 2 \(cat, dog, single"):
        follow_head(ours, head("a", "b", "c"), must_match=True)
    with pytest.raises(DataError, match="m: has 3 outputs but the data have 2"):
        follow_head(ours, Head("m", 3, None), must_match=True)
    with pytest.raises(DataError, match="m: is not fine-tuned on such a task"):
        follow_head(ours, Head("m", None, None), must_match=True)
    quantity = Labels("regression", ("q",), ("q",))
    assert follow_head(quantity, Head("m", 1, None), must_match=True) == quantity
    with pytest.raises(DataError, match=r"m: has 2 outputs but the data have 1 \(q, regression\)"):
        follow_head(quantity, Head("m", 2, None), must_match=True)


def test_names_that_cannot_be_matched(caplog):
    assert follow_head(classes("neg", "pos"), head("negative", "positive"), must_match=True).names == ("neg", "pos")
    assert "taken by position: neg = negative, pos = positive" in caplog.text
    follow_head(classes("neg", "pos"), Head("m", 2, None), must_match=True)
    assert "m does not name its outputs; they are taken to be, in this order: neg, pos" in caplog.text
    with pytest.raises(DataError, match="'neg' is at another place"):
        follow_head(classes("neg", "pos"), head("positive", "neg"), must_match=True)


def test_head_of_a_configuration():
    from transformers import BertConfig

    def read(**options):
        return read_head(BertConfig(**options), model="m", endings=["ForSequenceClassification"])

    fine_tuned = {"architectures": ["BertForSequenceClassification"]}
    assert read() == Head("m", None, None)
    assert read(architectures=["BertForMaskedLM"], id2label={0: "x", 1: "y"}) == Head("m", None, None)
    assert read(**fine_tuned, num_labels=3) == Head("m", 3, None)
    assert read(**fine_tuned, id2label={"1": "y", "0": "x"}) == Head("m", 2, ("x", "y"))
