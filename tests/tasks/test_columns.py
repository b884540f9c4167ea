from __future__ import annotations

import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Image, List, Value

from hfcompress.config import DataConfig
from hfcompress.tasks import Columns, DataError, find_columns
from hfcompress.tasks.columns import detect_columns

STRING, WHOLE, DECIMAL = Value("string"), Value("int64"), Value("float64")
CLASS = ClassLabel(names=["no", "yes"])

FOUND = [
    ({"sentence": STRING, "label": CLASS, "idx": WHOLE}, {}, Columns("label", ("sentence",))),
    ({"label": WHOLE, "sentence": STRING, "intent": STRING}, {}, Columns("label", ("sentence",))),
    ({"Unnamed: 0": WHOLE, "Äußerung": STRING, "klasse": WHOLE}, {}, Columns("klasse", ("Äußerung",))),
    ({"utterance": Value("large_string"), "verdict": STRING}, {}, Columns("verdict", ("utterance",))),
    ({"text": STRING, "title": STRING, "label": WHOLE}, {}, Columns("label", ("text",))),
    ({"Text": STRING, "LABEL": STRING}, {}, Columns("LABEL", ("Text",))),
    ({"premise": STRING, "hypothesis": STRING, "label": CLASS}, {}, Columns("label", ("premise", "hypothesis"))),
    ({"question": STRING, "sentence": STRING, "label": CLASS}, {}, Columns("label", ("question", "sentence"))),
    ({"sentence1": STRING, "sentence2": STRING, "score": DECIMAL}, {}, Columns("score", ("sentence1", "sentence2"))),
    ({"text": STRING, "labels": List(CLASS), "id": STRING}, {}, Columns("labels", ("text",))),
    ({"a": STRING, "b": STRING, "c": STRING}, {"text": "b", "label": "a"}, Columns("a", ("b",))),
    ({"a": STRING, "b": STRING, "c": STRING}, {"text": ["c", "a"]}, Columns("b", ("c", "a"))),
    ({"topic": STRING, "label": CLASS}, {}, Columns("label", ("topic",))),
    ({"text": STRING, "topic": CLASS, "score": DECIMAL}, {}, Columns("topic", ("text",))),
    ({"content": STRING, "is_spam": Value("bool")}, {}, Columns("is_spam", ("content",))),
]


@pytest.mark.parametrize(("features", "told", "expected"), FOUND)
def test_text_columns_are_found(features, told, expected):
    assert detect_columns(features, DataConfig(train="x.csv", **told), "text") == expected


IMAGES = [
    ({"image": Image(), "label": CLASS}, {}, Columns("label", ("image",))),
    ({"scan": Image(), "diagnosis": STRING}, {}, Columns("diagnosis", ("scan",))),
    ({"img": Image(), "mask": Image(), "label": WHOLE}, {}, Columns("label", ("img",))),
    ({"photo": {"bytes": Value("binary"), "path": STRING}, "label": WHOLE}, {}, Columns("label", ("photo",))),
    ({"file": STRING, "label": WHOLE}, {"image": "file"}, Columns("label", ("file",))),
    (
        {"img": Image(), "fine_label": CLASS, "coarse_label": CLASS},
        {"label": "fine_label"},
        Columns("fine_label", ("img",)),
    ),
]


@pytest.mark.parametrize(("features", "told", "expected"), IMAGES)
def test_image_columns_are_found(features, told, expected):
    assert detect_columns(features, DataConfig(train="x", **told), "image") == expected


DOUBT = [
    (
        {"a": STRING, "b": STRING},
        {},
        "text",
        "data.text: cannot tell which column holds the text; there are: a (string), b (string)",
    ),
    ({"a": STRING, "b": WHOLE, "c": WHOLE}, {}, "text", "data.label: cannot tell which column holds the labels"),
    ({"text": STRING, "topic": STRING, "intent": STRING}, {}, "text", "set data.label to one of topic, intent"),
    (
        {"text": STRING, "label": STRING},
        {"text": "txt"},
        "text",
        "column 'txt' is not in the data; there are: text, label; did you mean 'text'?",
    ),
    ({"text": STRING, "label": STRING}, {"label": "Labels"}, "text", "did you mean 'label'?"),
    ({"text": STRING, "label": STRING}, {"text": "label", "label": "label"}, "text", "a column is named twice"),
    ({"text": WHOLE, "label": STRING}, {"text": "text"}, "text", "column 'text' holds int64, not text"),
    ({"text": STRING, "x": {"y": STRING}}, {"label": "x"}, "text", "data.label: column 'x' holds dict"),
    ({"img": Image(), "fine_label": CLASS, "coarse_label": CLASS}, {}, "image", "data.label"),
    ({"a": Image(), "b": Image(), "label": CLASS}, {}, "image", "cannot tell which column holds the images"),
    ({"x": WHOLE, "label": CLASS}, {"image": "x"}, "image", "column 'x' holds int64, not images or file names"),
    ({"text": STRING}, {}, "text", "cannot tell which column holds the labels; there are: text (string)"),
]


@pytest.mark.parametrize(("features", "told", "kind", "message"), DOUBT)
def test_doubt_is_an_error_that_lists_the_columns(features, told, kind, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        detect_columns(features, DataConfig(train="x.csv", **told), kind)
    assert "\n" not in str(error.value)


def test_find_columns_takes_one_split_or_several():
    rows = Dataset.from_dict({"review": ["a"], "stars": [1]})
    config = DataConfig(train="x.csv")
    expected = Columns("stars", ("review",))
    assert find_columns(rows, config, "text-classification") == expected
    assert find_columns(DatasetDict({"train": rows}), config, "text-classification") == expected
    with pytest.raises(DataError, match=r"task 'text-clasification' .* did you mean 'text-classification'"):
        find_columns(rows, config, "text-clasification")
