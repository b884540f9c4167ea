from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
import torch
from datasets import Translation, Value
from transformers import AutoModelForSeq2SeqLM, EvalPrediction

from hfcompress.config import DataConfig
from hfcompress.tasks import Columns, DataError, prepare
from hfcompress.tasks.writing import WritingInputs, WritingScores, rouge_l

from .conftest import save_model, write

STRING = Value("string")
WORDS = ["sum", ":", "a", "b", "c", "d", "eins", "zwei"]
ROWS = [{"article": "a b c d", "highlights": "a d"}, {"article": "d c b", "highlights": "b"}] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("t5"), "t5", words=WORDS, eos_token="[SEP]")


def ready(train, *, model, **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(DataConfig(train=train, **told), task="text2text-generation", model_name=model, **options)


def test_source_and_target_are_tokenized(tmp_path, model):
    file = write(tmp_path / "s.jsonl", ROWS)
    prepared = ready(file, eval=file, model=model, prefix="sum: ", max_target_length=3)
    decode = prepared.processing_class.decode
    row = prepared.train_dataset[0]
    assert decode(row["input_ids"]) == "[CLS] sum : a b c d [SEP]"
    assert len(row["labels"]) == 3 and decode(row["labels"]) == "[CLS] a [SEP]"
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(2)])
    assert batch["labels"].shape == (2, 8) and (batch["labels"] == -100).sum() == 10
    network = AutoModelForSeq2SeqLM.from_pretrained(model, **prepared.model_kwargs)
    outputs = network(**batch)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    assert torch.allclose(outputs.loss, expected)
    assert prepared.generates and prepared.metric_name == "rougeL" and prepared.compute_metrics.longest == 4
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    written = prepared.compute_metrics.run(network.eval(), inputs, batch["labels"])
    assert written.shape[0] == 2 and written.shape[1] <= 4


def test_what_is_written_is_compared_with_the_labels(tmp_path, model):
    prepared = ready(write(tmp_path / "s.jsonl", ROWS), model=model)
    tokenizer, scores = prepared.processing_class, prepared.compute_metrics
    assert isinstance(scores, WritingScores)
    written = tokenizer(["a b", "c", "d"], padding=True, return_tensors="np")["input_ids"]
    written[1:, -1] = -100
    truth = tokenizer(["a d", "c", "a"], padding=True, return_tensors="np")["input_ids"]
    truth[truth == 0] = -100
    assert scores(EvalPrediction(written, truth)) == pytest.approx({"rougeL": (0.5 + 1 + 0) / 3})
    metric, answers = scores.measure(written, truth)
    assert (metric.value, metric.n, answers.tops.tolist()) == (pytest.approx(0.5), 3, pytest.approx([0.5, 1, 0]))


def longest_common(first: list[str], second: list[str]) -> int:
    """By trying all subsequences."""
    return max(
        size
        for size in range(len(first) + 1)
        for chosen in itertools.combinations(first, size)
        if (rest := iter(second)) is not None and all(word in rest for word in chosen)
    )


def test_rouge_l_against_all_subsequences():
    draw = random.Random(0)
    for _ in range(300):
        first, second = ([draw.choice("abcd") for _ in range(draw.randint(1, 7))] for _ in range(2))
        common = longest_common(first, second)
        precision, recall = common / len(first), common / len(second)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)
    assert rouge_l("Der Zug, 3-mal!", "der zug 3 MAL") == 1.0
    assert rouge_l("Ünï", "ünï") == 1.0


PAIR = Translation(["de", "en"])
COLUMNS = [
    ({"article": STRING, "highlights": STRING, "id": STRING}, {}, Columns("highlights", ("article",))),
    ({"dialogue": STRING, "summary": STRING, "id": STRING}, {}, Columns("summary", ("dialogue",))),
    ({"en": STRING, "fr": STRING}, {"text": "en", "label": "fr"}, Columns("fr", ("en",))),
    (
        {"id": STRING, "translation": PAIR},
        {"text": "en", "label": "de"},
        Columns("translation.de", ("translation.en",)),
    ),
    ({"translation": PAIR}, {"text": "translation.de", "label": "en"}, Columns("translation.en", ("translation.de",))),
    ({"source": STRING, "out": STRING}, {"label": "out"}, Columns("out", ("source",))),
]


@pytest.mark.parametrize(("features", "told", "expected"), COLUMNS)
def test_columns(features, told, expected):
    assert WritingInputs().find_columns(features, DataConfig(train="x", **told)) == expected


def test_a_column_of_translations(tmp_path, model):
    file = write(tmp_path / "t.jsonl", [{"translation": {"en": "a b", "de": "eins zwei"}}] * 4)
    prepared = ready(file, model=model, text="en", label="de")
    decode = prepared.processing_class.decode
    assert decode(prepared.train_dataset[0]["labels"]) == "[CLS] eins zwei [SEP]"
    assert decode(prepared.train_dataset[0]["input_ids"]) == "[CLS] a b [SEP]"
    with pytest.raises(DataError, match=r"data.label: cannot tell .* translation.en \(string\)"):
        ready(file, model=model)


@pytest.mark.parametrize(
    ("row", "told", "message"),
    [
        ({"article": "a", "highlights": " "}, {}, "no text in column highlights"),
        ({"article": None, "highlights": "a"}, {"text": "article"}, "data.text: column 'article' holds null, not text"),
        ({"article": "a", "highlights": "b"}, {"label": "highlight"}, "did you mean 'highlights'?"),
        ({"article": "a", "highlights": "b"}, {"text": ["article", "highlights"]}, "name one column"),
        ({"article": "a", "highlights": "b"}, {"text": "article", "label": "article"}, "named twice"),
    ],
)
def test_errors_are_one_line(tmp_path, model, row, told, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        ready(write(tmp_path / "x.jsonl", [row] * 4), model=model, **told)
    assert "\n" not in str(error.value)


def test_fingerprints_tell_prefix_and_target(tmp_path, model):
    file = write(tmp_path / "s.jsonl", ROWS)
    other = write(tmp_path / "o.jsonl", [{**ROWS[0], "highlights": "c"}, *ROWS[1:]])
    found = {
        ready(file, eval=each, model=model, prefix=prefix).fingerprint
        for each in (file, other)
        for prefix in ("", "sum")
    }
    assert len(found) == 4
    assert np.unique([len(print_) for print_ in found]).tolist() == [16]
