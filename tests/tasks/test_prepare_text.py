from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, ByT5Tokenizer, GPT2Config, Trainer, TrainingArguments

from hfcompress.config import DataConfig
from hfcompress.tasks import DataError, prepare
from hfcompress.tasks import text as text_module

from .conftest import WORDS, save_bert, save_tokenizer

CLS, SEP, GOOD, BAD, FILM = (WORDS.index(word) for word in ("[CLS]", "[SEP]", "good", "bad", "film"))


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def films(tmp_path):
    """Files to train and to evaluate on, with odd column names."""
    rows = [
        {"nr": i, "Was gesagt wurde": "good film" if i % 2 else "bad", "Urteil": "JA" if i % 2 else "nein"}
        for i in range(20)
    ]
    return write(tmp_path / "t.jsonl", rows), write(tmp_path / "e.jsonl", rows[:6])


def ready(train, evaluation=None, *, model, **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(
        DataConfig(train=train, eval=evaluation, **told), task="text-classification", model_name=model, **options
    )


def test_everything_a_trainer_needs(films, bert, tmp_path):
    prepared = ready(*films, model=bert, label="Urteil")
    assert prepared.label_names == ["JA", "nein"]
    assert prepared.train_dataset.column_names == ["labels", "input_ids", "token_type_ids", "attention_mask"]
    # Even rows are "bad" and "nein".
    assert [prepared.train_dataset[i]["labels"] for i in range(4)] == [1, 0, 1, 0]
    assert prepared.train_dataset[0]["input_ids"] == [CLS, BAD, SEP]
    assert prepared.train_dataset[1]["input_ids"] == [CLS, GOOD, FILM, SEP]
    assert prepared.model_kwargs == {
        "num_labels": 2,
        "id2label": {0: "JA", 1: "nein"},
        "label2id": {"JA": 0, "nein": 1},
        "problem_type": "single_label_classification",
    }
    assert (prepared.id2label, prepared.label2id) == (
        prepared.model_kwargs["id2label"],
        prepared.model_kwargs["label2id"],
    )
    assert (prepared.metric_name, prepared.auto_class) == ("accuracy", "AutoModelForSequenceClassification")
    model = AutoModelForSequenceClassification.from_pretrained(bert, **prepared.model_kwargs)
    assert model.config.label2id == {"JA": 0, "nein": 1}
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=60,
        learning_rate=3e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=prepared.data_collator,
        train_dataset=prepared.train_dataset,
        eval_dataset=prepared.eval_dataset,
        processing_class=prepared.processing_class,
        compute_metrics=prepared.compute_metrics,
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_batches_are_padded_to_a_multiple_of_eight(films, bert):
    prepared = ready(*films, model=bert, label="Urteil")
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(2)])
    assert batch["input_ids"].tolist() == [[CLS, BAD, SEP, 0, 0, 0, 0, 0], [CLS, GOOD, FILM, SEP, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4]
    assert batch["labels"].dtype == torch.int64


def test_padding_stays_within_the_positions_of_the_model(films, tmp_path):
    model = save_bert(tmp_path / "short", base=True, positions=4)
    prepared = ready(*films, model=model, label="Urteil", max_length=100)
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(2)])
    assert batch["input_ids"].shape == (2, 4)


def test_pairs_and_regression(tmp_path, bert):
    rows = [{"sentence1": "good", "sentence2": "film" if i else "", "how_like": i / 4} for i in range(8)]
    file = write(tmp_path / "p.jsonl", rows)
    prepared = ready(file, file, model=bert)
    first, second = prepared.train_dataset[0], prepared.train_dataset[1]
    assert (first["input_ids"], second["input_ids"]) == ([CLS, GOOD, SEP, SEP], [CLS, GOOD, SEP, FILM, SEP])
    assert second["token_type_ids"] == [0, 0, 0, 1, 1]
    assert (prepared.problem_type, prepared.metric_name, prepared.label_names) == (
        "regression",
        "pearson",
        ["how_like"],
    )
    batch = prepared.data_collator([first, second])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.0, 0.25]
    model = AutoModelForSequenceClassification.from_pretrained(bert, **prepared.model_kwargs)
    outputs = model(**batch)
    assert outputs.logits.shape == (2, 1)
    expected = ((outputs.logits[:, 0] - torch.tensor([0.0, 0.25])) ** 2).mean()
    assert torch.allclose(outputs.loss, expected)
    with pytest.raises(DataError, match="a correlation needs 4 or more different evaluation labels, got 3 rows"):
        ready(file, file, model=bert, max_eval=3)


def test_several_labels(tmp_path, bert):
    rows = [{"text": "good", "tags": ["b", "a"]}, {"text": "bad", "tags": []}, {"text": "film", "tags": ["c"]}]
    file = write(tmp_path / "m.jsonl", rows)
    prepared = ready(file, file, model=bert)
    assert (prepared.problem_type, prepared.metric_name) == ("multi_label_classification", "macro_f1")
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(3)])
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    model = AutoModelForSequenceClassification.from_pretrained(bert, **prepared.model_kwargs)
    outputs = model(**batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, batch["labels"])
    assert torch.allclose(outputs.loss, expected)


def test_truncation_is_counted_and_said(tmp_path, bert, caplog):
    caplog.set_level(logging.INFO, "hfcompress")
    rows = [{"text": "good " * n, "label": n % 2} for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    file = write(tmp_path / "l.jsonl", rows)
    prepared = ready(file, file, model=bert, max_length=6)
    assert max(len(row["input_ids"]) for row in prepared.train_dataset) == 6
    # Two special tokens: four words fit, so 5, 6, 7 and 8 do not.
    assert [line for line in caplog.messages if "train: 4 of 8 texts (50.0 %) are longer than 6 tokens" in line] != []


def test_truncation_is_counted_with_a_tokenizer_written_in_python(tmp_path):
    save_bert(tmp_path / "m", base=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path / "m")
    # One byte is one token, and </s> comes last.
    batch = {"text": ["abc", "abcd", "abcde"]}
    encoded = text_module.tokenize(batch, names=["text"], tokenizer=tokenizer, limit=5, version=1)
    assert encoded["truncated"] == [False, False, True]
    assert [len(ids) for ids in encoded["input_ids"]] == [4, 5, 5]


def test_a_decoder_without_a_padding_token(films, tmp_path):
    folder = tmp_path / "gpt"
    GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2).save_pretrained(folder)
    save_tokenizer(folder, pad=False, eos_token="[SEP]")
    prepared = ready(*films, model=str(folder), label="Urteil")
    assert prepared.processing_class.pad_token == "[SEP]"
    assert prepared.model_kwargs["pad_token_id"] == SEP
    save_tokenizer(folder, pad=False)
    with pytest.raises(DataError, match="neither a padding nor an end-of-text token"):
        ready(*films, model=str(folder), label="Urteil")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["good", None, "bad", None], "no text in column text in 2 rows, the first of them row 1 (counted from 0)"),
        (["good", "bad", " \t", "film"], "no text in column text in row 2 (counted from 0)"),
    ],
)
def test_rows_without_text(tmp_path, bert, texts, message):
    file = write(tmp_path / "x.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    with pytest.raises(DataError, match=re.escape(f"x.jsonl: {message}")):
        ready(file, file, model=bert)


def test_unseen_and_missing_labels_of_the_evaluation_data(tmp_path, bert):
    train = write(tmp_path / "t.jsonl", [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}])
    unseen = write(tmp_path / "e.jsonl", [{"text": "good", "label": "a"}, {"text": "bad", "label": "c"}])
    with pytest.raises(DataError, match=r"e.jsonl: label 'c' is not among those of the training data \(a, b\)"):
        ready(train, unseen, model=bert)
    other = write(tmp_path / "o.jsonl", [{"text": "good", "kind": "a"}])
    with pytest.raises(DataError, match=r"o.jsonl: has no column 'label', which t.jsonl has; there are: text, kind"):
        ready(train, other, model=bert)
    secret = write(tmp_path / "s.jsonl", [{"text": "good", "label": -1}])
    numbered = write(tmp_path / "n.jsonl", [{"text": "good", "label": 0}, {"text": "bad", "label": 1}])
    with pytest.raises(DataError, match=r"s.jsonl: the label is -1"):
        ready(numbered, secret, model=bert)


def test_classes_do_not_depend_on_how_many_rows_are_taken(tmp_path, bert):
    file = write(tmp_path / "c.jsonl", [{"text": "good", "label": f"c{i % 10}"} for i in range(40)])
    prepared = ready(file, model=bert, max_train=3, max_eval=2)
    assert len(prepared.train_dataset) == 3
    assert prepared.label_names == [f"c{i}" for i in range(10)]


def test_the_order_of_a_fine_tuned_model_is_kept(films, tmp_path):
    model = save_bert(tmp_path / "tuned", names=["Nein", "ja"])
    prepared = ready(*films, model=model, label="Urteil", must_match=True)
    assert prepared.label_names == ["Nein", "ja"]
    assert [prepared.train_dataset[i]["labels"] for i in range(4)] == [0, 1, 0, 1]
    assert "ignore_mismatched_sizes" not in prepared.model_kwargs


def test_a_model_of_other_classes(films, bert, tmp_path):
    model = save_bert(tmp_path / "tuned", names=["x", "y", "z"])
    prepared = ready(*films, model=model, label="Urteil")
    assert prepared.model_kwargs["ignore_mismatched_sizes"] is True
    loaded = AutoModelForSequenceClassification.from_pretrained(model, **prepared.model_kwargs)
    assert loaded.classifier.out_features == 2
    with pytest.raises(DataError, match=r"tuned: has 3 \(x, y, z\) outputs but the data have 2"):
        ready(*films, model=model, label="Urteil", must_match=True)
    with pytest.raises(DataError, match=r"bert.*: is not fine-tuned"):
        ready(*films, model=bert, label="Urteil", must_match=True)


def test_the_order_of_a_teacher_can_be_given(films, bert):
    prepared = ready(*films, model=bert, label="Urteil", label_names=["nein", "ja"])
    assert prepared.label_names == ["nein", "ja"]
    assert prepared.train_dataset[0]["labels"] == 0
    with pytest.raises(DataError, match=r"label_names: has 3 \(a, b, c\) outputs"):
        ready(*films, model=bert, label="Urteil", label_names=["a", "b", "c"])


def test_the_fingerprint_is_of_the_evaluation_data_alone(films, bert, tmp_path):
    train, evaluation = films
    one = ready(train, evaluation, model=bert, label="Urteil").fingerprint
    tuned = save_bert(tmp_path / "tuned", names=["nein", "JA"])
    assert ready(evaluation, evaluation, model=tuned, label="Urteil", max_length=3).fingerprint == one
    rows = Dataset.from_json(evaluation)
    digest = hashlib.sha256()
    for text, label in zip(rows["Was gesagt wurde"], rows["Urteil"], strict=True):
        inner = len(text).to_bytes(8, "little") + text.encode()
        digest.update(len(inner).to_bytes(8, "little") + inner)
        digest.update(len(label).to_bytes(8, "little") + label.encode())
    assert one == digest.hexdigest()[:16]
    assert ready(train, evaluation, model=bert, label="Urteil", max_eval=5).fingerprint != one


def test_the_main_process_goes_first_and_its_work_is_found_again(films, bert, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def main_first():
        entered.append("in")
        yield
        entered.append("out")

    first = ready(*films, model=bert, label="Urteil", main_first=main_first)
    assert entered == ["in", "out"]
    written = [file["filename"] for file in first.train_dataset.cache_files]
    second = ready(*films, model=bert, label="Urteil")
    assert len(written) == 1
    assert [file["filename"] for file in second.train_dataset.cache_files] == written
    monkeypatch.setattr(text_module, "TOKENIZE_VERSION", 2)
    third = ready(*films, model=bert, label="Urteil")
    assert [file["filename"] for file in third.train_dataset.cache_files] != written


def test_several_workers_give_the_same(films, bert):
    one = ready(*films, model=bert, label="Urteil")
    two = ready(*films, model=bert, label="Urteil", workers=2)
    assert one.train_dataset.to_dict() == two.train_dataset.to_dict()


def test_a_saved_data_set_in_a_read_only_folder(tmp_path, bert, monkeypatch):
    Dataset.from_dict({"text": ["good", "bad"] * 5, "label": [0, 1] * 5}).save_to_disk(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    monkeypatch.setattr(text_module.os, "access", lambda path, mode: "saved" not in str(path))
    prepared = ready(str(tmp_path / "saved"), model=bert)
    assert (len(prepared.train_dataset), len(prepared.eval_dataset)) == (9, 1)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_own_metric(films, bert):
    def errors(predictions, labels):
        return {"errors": float((predictions != labels).sum())}

    prepared = ready(*films, model=bert, label="Urteil", metric=errors)
    assert prepared.metric_name == "errors"
    with pytest.raises(DataError, match=r"metric 'no.py' cannot be loaded"):
        ready(*films, model=bert, label="Urteil", metric="no.py")


def test_models_that_cannot_be_loaded(films, bert, tmp_path):
    with pytest.raises(DataError, match="its configuration cannot be loaded") as error:
        ready(*films, model=str(tmp_path / "no model"), label="Urteil")
    assert "\n" not in str(error.value)
    GPT2Config().save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="bare: has no tokenizer") as error:
        ready(*films, model=str(tmp_path / "bare"), label="Urteil")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"task 'chat' .* there are: text-classification, image-classification"):
        prepare(DataConfig(train=films[0]), task="chat", model_name=bert)
