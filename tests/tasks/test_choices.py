from __future__ import annotations

import re

import pytest
import torch
from datasets import ClassLabel, List, Value
from transformers import AutoModelForMultipleChoice, EvalPrediction

from hfcompress.config import DataConfig
from hfcompress.tasks import Columns, DataError, prepare
from hfcompress.tasks.choices import ChoiceInputs, number_choices

from .conftest import save_model, write

STRING, WHOLE, TEXTS = Value("string"), Value("int64"), List(Value("string"))
VOCABULARY = ["the", "sky", "is", "grass", "blue", "green", "red", "very"]
ROWS = [
    {"sent1": "the sky", "sent2": "is", "ending0": "blue", "ending1": "green", "ending2": "very red", "label": 0},
    {"sent1": "the grass", "sent2": "is", "ending0": "red", "ending1": "green", "ending2": "blue", "label": 1},
] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"), words=VOCABULARY)


def ready(train, *, model, **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(DataConfig(train=train, **told), task="multiple-choice", model_name=model, **options)


def test_every_choice_is_a_row_of_the_batch(tmp_path, model):
    file = write(tmp_path / "c.jsonl", ROWS)
    prepared = ready(file, eval=file, model=model)
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(2)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 3, 8)
    assert batch["labels"].tolist() == [0, 1]
    texts = [prepared.processing_class.decode(ids[ids != 0]) for ids in batch["input_ids"].flatten(0, 1)]
    assert texts[2] == "[CLS] the sky [SEP] is very red [SEP]"
    assert texts[3] == "[CLS] the grass [SEP] is red [SEP]"
    network = AutoModelForMultipleChoice.from_pretrained(model, **prepared.model_kwargs)
    outputs = network(**batch)
    assert outputs.logits.shape == (2, 3)
    assert torch.allclose(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, batch["labels"]))
    assert (prepared.metric_name, prepared.problem_type) == ("accuracy", "single_label_classification")
    scores = prepared.compute_metrics(EvalPrediction(outputs.logits.detach().numpy(), batch["labels"].numpy()))
    assert scores["accuracy"] == (outputs.logits.argmax(1) == batch["labels"]).float().mean()
    assert prepared.label_names == [] and prepared.model_kwargs == {}


# As the data sets of these names have their columns.
FOUND = [
    (
        "swag",
        {**dict.fromkeys(("video-id", "startphrase", "sent1", "sent2", "gold-source"), STRING)}
        | {**dict.fromkeys((f"ending{i}" for i in range(4)), STRING), "label": ClassLabel(names=list("0123"))},
        Columns("label", ("sent1", "sent2"), ("ending0", "ending1", "ending2", "ending3")),
    ),
    (
        "hellaswag",
        {"ind": WHOLE, "activity_label": STRING, "ctx_a": STRING, "ctx_b": STRING, "ctx": STRING, "endings": TEXTS}
        | {"source_id": STRING, "split": STRING, "label": STRING},
        Columns("label", ("ctx_a", "ctx_b"), ("endings",)),
    ),
    (
        "race",
        {"example_id": STRING, "article": STRING, "answer": STRING, "question": STRING, "options": TEXTS},
        Columns("answer", ("article", "question"), ("options",)),
    ),
    (
        "commonsense_qa",
        {"id": STRING, "question": STRING, "question_concept": STRING, "answerKey": STRING}
        | {"choices": {"label": TEXTS, "text": TEXTS}},
        Columns("answerKey", ("question",), ("choices",)),
    ),
    (
        "copa",
        {"premise": STRING, "choice1": STRING, "choice2": STRING, "question": STRING, "idx": WHOLE, "label": WHOLE},
        Columns("label", ("premise", "question"), ("choice1", "choice2")),
    ),
    (
        "winogrande",
        {"sentence": STRING, "option1": STRING, "option2": STRING, "answer": STRING},
        Columns("answer", ("sentence",), ("option1", "option2")),
    ),
    (
        "social_i_qa",
        {
            "context": STRING,
            "question": STRING,
            "answerA": STRING,
            "answerB": STRING,
            "answerC": STRING,
            "label": STRING,
        },
        Columns("label", ("context", "question"), ("answerA", "answerB", "answerC")),
    ),
]


@pytest.mark.parametrize(("features", "expected"), [case[1:] for case in FOUND], ids=[case[0] for case in FOUND])
def test_columns_are_found(features, expected):
    assert ChoiceInputs().find_columns(features, DataConfig(train="x")) == expected


def test_columns_that_are_told():
    features = dict.fromkeys("abcde", STRING)
    told = DataConfig(train="x", text="a", choices=["c", "b"], label="e")
    assert ChoiceInputs().find_columns(features, told) == Columns("e", ("a",), ("c", "b"))
    for changes, message in (
        ({"choices": ["c", "f"]}, "column 'f' is not in the data"),
        ({"choices": ["c", "e"]}, "data.label: column 'e' is not in the data"),
        ({"choices": "c"}, "column 'c' does not hold lists of texts"),
        ({"text": "x"}, "column 'x' is not in the data"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            ChoiceInputs().find_columns(features, told.model_copy(update=changes))


NUMBERED = [
    ([0, 2, 1], None, 3, [0, 2, 1]),
    ([1, 1, 1], [["1", "2"]] * 3, 2, [1, 1, 1]),  # COPA counts from 0 whatever its columns are called
    (["1", "2"], [["1", "2"]] * 2, 2, [0, 1]),
    (["1", "3"], [["A", "B", "C"]] * 2, 3, [0, 2]),
    (["3", "0"], None, 4, [3, 0]),
    (["B", "C"], [["A", "B", "C"]] * 2, 3, [1, 2]),
    (["D", "A"], None, 4, [3, 0]),
    (["2", "B"], [["1", "2"], ["A", "B"]], 2, [1, 1]),
]


@pytest.mark.parametrize(("labels", "names", "size", "expected"), NUMBERED)
def test_numbers_of_choices(labels, names, size, expected):
    assert number_choices(labels, names, size=size, where="x") == expected


def test_choices_with_names_are_read(tmp_path, model):
    rows = [
        {"question": "the sky", "choices": {"label": ["A", "B"], "text": ["blue", "red"]}, "answerKey": key}
        for key in "AB"
    ]
    file = write(tmp_path / "q.jsonl", rows)
    prepared = ready(file, eval=file, model=model)
    assert [row["labels"] for row in prepared.eval_dataset] == [0, 1]
    assert len(prepared.eval_dataset[0]["input_ids"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 7}, "label '7' names none of the 3 choices in row 1"),
        ({"label": -1}, "which choice is right is not said in row 1"),
        ({"ending1": None}, "3 choices in row 1 (counted from 0), 3 in the first"),
        ({"sent1": None}, "no text in column sent1 or sent2 in row 1"),
    ],
)
def test_errors_are_one_line(tmp_path, model, changes, message):
    file = write(tmp_path / "x.jsonl", [ROWS[0], {**ROWS[1], **changes}])
    with pytest.raises(DataError, match=re.escape(message)) as error:
        ready(file, eval=file, model=model)
    assert "\n" not in str(error.value)


def test_rows_with_other_numbers_of_choices(tmp_path, model):
    rows = [{"question": "the sky", "choices": ["blue", "red", "green"][: 2 + i], "label": 0} for i in range(2)]
    with pytest.raises(DataError, match="3 choices in row 1"):
        ready(write(tmp_path / "x.jsonl", rows), model=model)


def test_long_texts_are_cut_and_counted(tmp_path, model, caplog):
    caplog.set_level("INFO", "hfcompress")
    file = write(tmp_path / "x.jsonl", [{**ROWS[0], "sent1": "very " * 20}, ROWS[1]])
    prepared = ready(file, eval=file, model=model, max_length=8)
    assert {len(ids) for row in prepared.eval_dataset for ids in row["input_ids"]} == {7, 8}
    assert "eval: 1 of 2 texts (50.0 %) are longer than 8 tokens" in caplog.text
