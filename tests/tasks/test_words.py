from __future__ import annotations

import random
import re

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForTokenClassification, EvalPrediction

from hfcompress.config import DataConfig
from hfcompress.tasks import DataError, prepare
from hfcompress.tasks.words import TagScores, WordInputs, find_entities

from .conftest import save_model, save_tokenizer, write

VOCABULARY = ["an", "##na", "lives", "in", "os", "##lo", "bob"]
ROWS = [
    {"tokens": ["anna", "lives", "in", "oslo"], "ner_tags": ["B-PER", "O", "O", "B-LOC"]},
    {"tokens": ["bob", "anna"], "ner_tags": ["B-PER", "I-PER"]},
] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"), words=VOCABULARY)


def ready(train, *, model, **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(DataConfig(train=train, **told), task="token-classification", model_name=model, **options)


def test_tags_go_to_the_first_piece_of_each_word(tmp_path, model):
    file = write(tmp_path / "t.jsonl", ROWS)
    prepared = ready(file, eval=file, model=model)
    assert prepared.label_names == ["B-LOC", "B-PER", "I-PER", "O"]
    # [CLS] an ##na lives in os ##lo [SEP]
    assert prepared.train_dataset[0]["labels"] == [-100, 1, -100, 3, 3, 0, -100, -100]
    assert prepared.train_dataset[1]["labels"] == [-100, 1, 2, -100, -100]
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(2)])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8)
    assert batch["labels"][1].tolist() == [-100, 1, 2, -100, -100, -100, -100, -100]
    assert "problem_type" not in prepared.model_kwargs and prepared.model_kwargs["num_labels"] == 4
    assert (prepared.metric_name, prepared.problem_type) == ("f1", None)
    network = AutoModelForTokenClassification.from_pretrained(model, **prepared.model_kwargs)
    assert network(**batch).logits.shape == (2, 8, 4)


def test_the_order_of_a_fine_tuned_model_is_kept_and_the_fingerprint_does_not_depend_on_it(tmp_path, model):
    file = write(tmp_path / "t.jsonl", ROWS)
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    tuned = AutoModelForTokenClassification.from_pretrained(model, id2label=dict(enumerate(names)))
    tuned.save_pretrained(tmp_path / "tuned")
    save_tokenizer(tmp_path / "tuned", words=["[PAD]", "[UNK]", "[CLS]", "[SEP]", *VOCABULARY])
    prepared = ready(file, eval=file, model=str(tmp_path / "tuned"), must_match=True)
    assert prepared.label_names == names
    assert prepared.fingerprint == ready(file, eval=file, model=model).fingerprint
    changed = write(tmp_path / "c.jsonl", [{**ROWS[0], "ner_tags": ["O", "O", "O", "B-LOC"]}, *ROWS[1:]])
    assert prepared.fingerprint != ready(file, eval=changed, model=model).fingerprint
    with pytest.raises(DataError, match="is not fine-tuned on such a task"):
        ready(file, model=model, must_match=True)


def test_declared_tags_keep_their_order_and_long_sentences_are_cut(tmp_path, model, caplog):
    caplog.set_level("INFO", "hfcompress")
    tag = ClassLabel(names=["O", "X", "B-PER"])
    features = Features({"words": List(Value("string")), "ner_tags": List(tag), "pos_tags": List(tag)})
    rows = {"words": [["bob"] * 9, ["bob"]] * 2, "ner_tags": [[2] * 9, [0]] * 2, "pos_tags": [[0] * 9, [0]] * 2}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    prepared = ready(str(tmp_path / "saved"), model=model, max_length=6, holdout=0.5)
    assert prepared.label_names == ["O", "X", "B-PER"]
    assert sorted(len(row["labels"]) for row in [*prepared.train_dataset, *prepared.eval_dataset]) == [3, 3, 6, 6]
    assert len(re.findall(r"\(\d+\.0 %\) are longer than 6 tokens", caplog.text)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"tokens": ["bob"], "tags": ["O", "O"]}, {"tokens": ["bob"], "tags": ["B-X"]}],
            "not as many tags as words in row 0",
        ),
        (
            [{"tokens": ["bob"] * 2, "tags": ["O", "B-X"]}, {"tokens": [], "tags": []}],
            "no words in column tokens in row 1",
        ),
        ([{"tokens": ["bob"], "note": "x"}], "data.label: cannot tell which column holds the tags"),
        (
            [{"text": "bob", "tags": ["O"]}],
            "data.text: cannot tell which column holds the words; there are: text (string)",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, model, rows, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        ready(write(tmp_path / "x.jsonl", rows), model=model)
    assert "\n" not in str(error.value)


def test_columns_that_are_told():
    words, tags = List(Value("string")), List(ClassLabel(names=["O"]))
    features = {"a": words, "b": words, "c": tags}
    found = WordInputs().find_columns(features, DataConfig(train="x", text="a", label="b"))
    assert (found.inputs, found.label) == (("a",), "b")
    with pytest.raises(DataError, match="named twice"):
        WordInputs().find_columns(features, DataConfig(train="x", text="a", label="a"))


def conll_entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """As conlleval.pl decides, tag by tag, with its two tables of what ends and what starts an entity."""
    ends = {("B", "B"), ("B", "O"), ("B", "S"), ("I", "B"), ("I", "O"), ("I", "S")}
    starts = {("O", "I"), ("O", "E"), ("E", "I"), ("E", "E"), ("S", "I"), ("S", "E")}
    found, begin = set(), None
    previous = ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        now = (tag[0], tag[2:])
        pair = (previous[0], now[0])
        other = previous[1] != now[1]
        if begin is not None and (pair in ends or previous[0] in "ES" or (previous[0] != "O" and other)):
            found.add((previous[1], begin, i))
            begin = None
        if now[0] in "BS" or pair in starts or (now[0] != "O" and other):
            begin = i
        previous = now
    return found


def test_entities_against_the_tables_of_conlleval():
    draw = random.Random(0)
    counted = 0
    for _ in range(3000):
        tags = [draw.choice(["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in "XY")]) for _ in range(7)]
        expected = conll_entities(tags)
        assert find_entities(tags) == expected, tags
        counted += len(expected)
    assert counted > 9000
    assert find_entities(["B-X", "L-X", "U-Y"]) == {("X", 0, 2), ("Y", 2, 3)}


def test_scores_by_hand():
    names = ("O", "B-X", "I-X", "B-Y")
    # Sentence 1: true X(0,2), Y(2,3); predicted X(0,2), X(3,4). Sentence 2: true X(0,1); predicted X(0,2).
    truth = np.array([[1, 2, 3, 0, -100], [1, 0, -100, -100, -100]])
    predicted = np.array([[1, 2, 0, 1, 3], [1, 2, 1, 1, -100]])
    scores = TagScores(names)
    assert scores(EvalPrediction(predicted, truth)) == pytest.approx(
        {"f1": 2 * 1 / (3 + 3), "precision": 1 / 3, "recall": 1 / 3, "accuracy": 3 / 6}
    )
    logits = np.eye(4)[predicted.clip(0)]
    assert scores(EvalPrediction((logits, None), truth)) == scores(EvalPrediction(predicted, truth))
    metric, answers = scores.measure(predicted, truth)
    assert (metric.name, metric.value, metric.n) == ("f1", pytest.approx(1 / 3), 2)
    assert (answers.kind, answers.tops.tolist(), answers.bottoms.tolist()) == ("ratio", [2, 0], [4, 2])
    assert 0 <= metric.low < metric.value < metric.high <= 1 and metric.higher_is_better
    nothing = scores(EvalPrediction(np.zeros((1, 2), int), np.zeros((1, 2), int)))
    assert nothing == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 1}


def test_tags_without_entities_are_scored_by_accuracy():
    scores = TagScores(("NOUN", "VERB"))
    assert scores(EvalPrediction(np.array([[0, 1, 1]]), np.array([[0, 1, -100]]))) == {"accuracy": 1.0}
    assert scores.metric_name == "accuracy"
