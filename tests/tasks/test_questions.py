from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForQuestionAnswering, EvalPrediction

from hfcompress.config import DataConfig
from hfcompress.tasks import DataError, prepare
from hfcompress.tasks.questions import QuestionInputs, best_span, exact_match, normalize_answer, overlap_f1
from hfcompress.tasks.text import TokenizedInputs

from .conftest import save_model, write

NAMES = ["anna", "bob", "cleo", "dora", "emil", "fritz"]
CITIES = ["paris", "oslo", "rome", "lima", "york", "bonn"]
VOCABULARY = ["where", "does", "live", "lives", "in", "new", ".", "?", *NAMES, *CITIES]
CONTEXT = " ".join(f"{name} lives in {city} ." for name, city in zip(NAMES, CITIES, strict=True))


def question(name: str, city: str, **changes) -> dict:
    start = CONTEXT.index(city)
    row = {"question": f"  where does {name} live ?", "context": CONTEXT}
    return row | {"answers": {"text": [city], "answer_start": [start]}} | changes


ROWS = [question(name, city) for name, city in zip(NAMES, CITIES, strict=True)]
NO_ANSWER = question("anna", "paris", answers={"text": [], "answer_start": []})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"), words=VOCABULARY)


def ready(train, *, model, **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(DataConfig(train=train, **told), task="question-answering", model_name=model, **options)


def test_long_contexts_are_read_in_windows_that_hold_each_answer(tmp_path, model):
    file = write(tmp_path / "q.jsonl", ROWS)
    prepared = ready(file, eval=file, model=model, max_length=24)
    decode = prepared.processing_class.decode
    # 30 tokens of context, 16 in a window beside 8 of the question and 3 marks ... so several windows, overlapping by 6.
    assert len(prepared.eval_dataset) > 2 * len(ROWS)
    notes, found = prepared.compute_metrics.windows, {}
    for window, note in zip(prepared.eval_dataset, notes, strict=True):
        assert len(window["input_ids"]) <= 24
        first, last = window["start_positions"], window["end_positions"]
        if first:
            found.setdefault(note["row"], set()).add(decode(window["input_ids"][first : last + 1]))
        else:
            assert (first, last) == (0, 0)  # [CLS]
            assert decode(window["input_ids"]).count(CITIES[note["row"]]) == 0
    assert found == {row: {city} for row, city in enumerate(CITIES)}
    assert set(prepared.train_dataset.column_names) == {
        "input_ids",
        "attention_mask",
        "start_positions",
        "end_positions",
    }
    assert prepared.label_columns == ("start_positions", "end_positions")
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(3)])
    network = AutoModelForQuestionAnswering.from_pretrained(model)
    outputs = network(**batch)
    losses = [
        torch.nn.functional.cross_entropy(outputs[f"{end}_logits"], batch[f"{end}_positions"])
        for end in ("start", "end")
    ]
    assert torch.allclose(outputs.loss, sum(losses) / 2)


def perfect(prepared, *, noise: float = 0.0):
    """Logits that point to the answer, of all windows padded to the same length."""
    starts = np.full((len(prepared.eval_dataset), 32), -9.0)
    ends = starts.copy()
    for row, window in enumerate(prepared.eval_dataset):
        starts[row, window["start_positions"]] = ends[row, window["end_positions"]] = 9.0 - (
            5.0 if window["start_positions"] == 0 else 0.0
        )
    labels = tuple(np.array(prepared.eval_dataset[name]) for name in prepared.label_columns)
    return EvalPrediction((starts + noise, ends), labels)


def test_answers_are_put_together_from_windows(tmp_path, model):
    file = write(tmp_path / "q.jsonl", ROWS)
    prepared = ready(file, eval=file, model=model, max_length=24)
    scores, prediction = prepared.compute_metrics, perfect(prepared)
    assert scores.find_answers(*prediction.predictions) == CITIES
    assert scores(prediction) == {"f1": 1.0, "exact_match": 1.0}
    metric, answers = scores.measure(prediction.predictions, prediction.label_ids)
    assert (metric.name, metric.value, metric.n, answers.tops.tolist()) == ("f1", 1.0, 6, [1.0] * 6)
    starts, ends = prediction.predictions
    wrong = EvalPrediction((np.roll(starts, 1, axis=0), np.roll(ends, 1, axis=0)), prediction.label_ids)
    assert scores(wrong)["exact_match"] < 1
    shuffled = EvalPrediction(prediction.predictions, tuple(column[::-1] for column in prediction.label_ids))
    with pytest.raises(DataError, match=r"another order .* leave out train_sampling_strategy: group_by_length"):
        scores(shuffled)


def test_none_is_an_answer_where_some_question_has_none(tmp_path, model):
    file = write(tmp_path / "q.jsonl", [*ROWS[:2], NO_ANSWER])
    prepared = ready(file, eval=file, model=model, max_length=24)
    scores, prediction = prepared.compute_metrics, perfect(prepared)
    assert scores.find_answers(*prediction.predictions) == [*CITIES[:2], ""]
    assert scores(prediction)["exact_match"] == 1.0
    # Where all windows prefer none by far, everything is "none".
    starts, ends = (side.copy() for side in prediction.predictions)
    starts[:, 0] = ends[:, 0] = 99.0
    assert scores.find_answers(starts, ends) == [""] * 3
    # Without such questions in the data none is never the answer.
    always = ready(write(tmp_path / "a.jsonl", ROWS), eval=str(tmp_path / "a.jsonl"), model=model, max_length=24)
    starts, ends = (side.copy() for side in perfect(always).predictions)
    starts[:, 0] = ends[:, 0] = 99.0
    assert always.compute_metrics.find_answers(starts, ends) == CITIES


FORMS = [
    {"text": ["oslo"], "answer_start": [CONTEXT.index("oslo")]},
    [{"text": "oslo", "answer_start": CONTEXT.index("oslo")}],
    {"text": "oslo", "answer_start": CONTEXT.index("oslo")},
]


@pytest.mark.parametrize("answers", FORMS)
def test_forms_of_answers(tmp_path, model, answers):
    file = write(tmp_path / "q.jsonl", [question("bob", "oslo", answers=answers)] * 2)
    prepared = ready(file, eval=file, model=model, max_length=60)
    window = prepared.eval_dataset[0]
    span = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
    assert prepared.processing_class.decode(span) == "oslo"


def test_the_fingerprint_is_of_questions_contexts_and_answers(tmp_path, model):
    prints = set()
    for i, changes in enumerate(({}, {"question": "where ?"}, {"answers": FORMS[0]}, {"context": CONTEXT + " oslo"})):
        file = write(tmp_path / f"{i}.jsonl", [question("anna", "paris", **changes), ROWS[1]])
        prints.add(ready(file, eval=file, model=model).fingerprint)
    assert len(prints) == 4
    again = write(tmp_path / "b.jsonl", [ROWS[0], ROWS[1]])
    assert ready(again, eval=again, model=model, max_length=30).fingerprint in prints


@pytest.mark.parametrize(
    ("rows", "told", "message"),
    [
        ([question("a", "oslo", question=" ")], {}, "no text in column question in 2 rows"),
        (
            [question("a", "oslo", answers={"text": ["oslo"], "answer_start": [0]})],
            {},
            "no answer stands in its context",
        ),
        (
            [{"question": "a", "context": "b", "answers": ["c"]}],
            {},
            "data.label: cannot tell which column holds the answers",
        ),
        (ROWS, {"text": "question"}, "name two columns, the question's and the context's"),
        (ROWS, {"text": ["question", "contex"]}, "did you mean 'context'?"),
        (ROWS, {"max_length": 20}, "20 tokens are too few"),
    ],
)
def test_errors_are_one_line(tmp_path, model, rows, told, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        ready(write(tmp_path / "x.jsonl", rows * 2), model=model, **told)
    assert "\n" not in str(error.value)


def test_an_answer_at_a_wrong_place_is_said(tmp_path, model, caplog):
    caplog.set_level(logging.WARNING, "hfcompress")
    file = write(tmp_path / "q.jsonl", [*ROWS, question("a", "oslo", answers={"text": ["oslo"], "answer_start": [1]})])
    ready(file, model=model)
    assert "the answer is not at its place in the context in row 6 (counted from 0)" in caplog.text


def test_a_slow_tokenizer_is_refused(monkeypatch, model):
    class Slow:
        is_fast = False

    monkeypatch.setattr("hfcompress.tasks.text._load_tokenizer", lambda name, **options: Slow())
    with pytest.raises(DataError, match="use a fast one"):
        QuestionInputs().load_processor("m", revision=None, trust_remote_code=False)
    assert TokenizedInputs.needs_words is False


def test_columns_are_found_by_name_and_type():
    text, whole = Value("string"), Value("int32")
    answers = {"text": List(text), "answer_start": List(whole)}
    features = Features({"id": text, "Query": text, "passage": text, "title": text, "gold": answers, "topic": text})
    found = QuestionInputs().find_columns(features, DataConfig(train="x"))
    assert (found.inputs, found.label) == (("Query", "passage"), "gold")


def test_a_saved_data_set_with_nested_answers(tmp_path, model):
    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    features = Features({"question": Value("string"), "context": Value("string"), "answers": answers})
    Dataset.from_list(ROWS, features=features).save_to_disk(tmp_path / "saved")
    prepared = ready(str(tmp_path / "saved"), model=model, holdout=0.5)
    assert len(prepared.compute_metrics.rows) == 3


# ---- scores, by hand from the rules of SQuAD's evaluation script ----

ANSWERS = [
    ("The  U.S. Army!", ["us army"], 1.0, 1.0),
    ("a cat", ["the cat."], 1.0, 1.0),
    ("cat sat", ["cat sat on mat"], 0.0, 2 * 1.0 * 0.5 / 1.5),
    ("dog", ["cat", "dog house"], 0.0, 2 * 1.0 * 0.5 / 1.5),
    ("to be to", ["to be or not to be"], 0.0, 2 * (3 / 3) * (3 / 6) / (3 / 3 + 3 / 6)),
    ("", [], 1.0, 1.0),
    ("cat", [], 0.0, 0.0),
    ("", ["cat"], 0.0, 0.0),
    ("the", ["an"], 1.0, 1.0),  # nothing is left of either
]


@pytest.mark.parametrize(("answer", "truths", "exact", "f1"), ANSWERS)
def test_exact_match_and_f1(answer, truths, exact, f1):
    assert exact_match(answer, truths) == exact
    assert overlap_f1(answer, truths) == pytest.approx(f1)


def test_articles_are_words_of_their_own():
    assert normalize_answer("Anna and Theo (a theory)") == "anna and theo theory"


def test_the_best_span_is_found():
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, end, allowed = rng.normal(size=15), rng.normal(size=15), rng.random(15) < 0.7
        spans = [(start[i] + end[j], i, j) for i in range(15) for j in range(i, 15) if allowed[i] and allowed[j]]
        assert best_span(start, end, allowed=allowed) == pytest.approx(max(spans))
    assert best_span(np.zeros(3), np.zeros(3), allowed=np.zeros(3, bool))[0] == -np.inf
    far = np.zeros(60)
    far[0], other = 9.0, np.zeros(60)
    other[59] = 9.0  # 60 tokens are no answer
    assert best_span(far, other, allowed=np.ones(60, bool))[0] == 9.0
