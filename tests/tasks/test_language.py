from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, EvalPrediction

from hfcompress.config import DataConfig
from hfcompress.tasks import Columns, DataError, prepare
from hfcompress.tasks.language import LanguageInputs, MaskingCollator, cut_blocks, start_tokens
from hfcompress.tasks.scores import TokenScores

from .conftest import save_model, write

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "user", "bot", "[MASK]", "[EOS]"]
PAD, UNK, CLS, SEP = range(4)
EOS = 4 + WORDS.index("[EOS]")
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}{% if add_generation_prompt %}bot {% endif %}"


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"), words=WORDS, mask_token="[MASK]")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    """Llama, whose tokenizer here adds nothing; and an end-of-text token."""
    folder = save_model(tmp_path_factory.mktemp("llama"), "llama", words=WORDS, eos_token="[EOS]")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_start(tmp_path_factory) -> str:
    """The same with a tokenizer that begins every text with [CLS] (and ends it with [SEP])."""
    return save_model(tmp_path_factory.mktemp("llama"), "llama", words=WORDS, eos_token="[SEP]")


def ready(train, *, model, task="text-generation", **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(DataConfig(train=str(train), **told), task=task, model_name=model, **options)


def ids_of(text: str) -> list[int]:
    return [4 + WORDS.index(word) for word in text.split()]


# ---- one long text ----


def test_lines_are_put_together_and_cut_into_blocks(tmp_path, decoder):
    (tmp_path / "t.txt").write_text("a b c\n\nd e\nf g h a b\n")
    (tmp_path / "e.txt").write_text("a b c d e f g\n")
    prepared = ready(tmp_path / "t.txt", eval=str(tmp_path / "e.txt"), model=decoder, max_length=4)
    assert [row["input_ids"] for row in prepared.train_dataset] == [ids_of("a b c d"), ids_of("e f g h")]
    assert [row["labels"] for row in prepared.eval_dataset] == [ids_of("a b c d")]
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(2)])
    assert batch["labels"].tolist() == [row["labels"] for row in prepared.train_dataset] or batch["labels"].shape == (
        2,
        8,
    )
    assert batch["attention_mask"].sum() == 8


def test_documents_end_with_the_end_of_text_token(tmp_path, decoder, with_start):
    file = write(tmp_path / "d.jsonl", [{"text": "a b"}, {"text": "c"}, {"text": "d e f g h"}, {"text": "a"}])
    prepared = ready(file, eval=file, model=decoder, max_length=4)
    blocks = [row["input_ids"] for row in prepared.train_dataset]
    a, b, c, d, e, f, g, h = ids_of("a b c d e f g h")
    assert blocks == [[a, b, EOS, c], [EOS, d, e, f], [g, h, EOS, a]]
    # Every block begins as the model expects a text to begin.
    begun = ready(file, eval=file, model=with_start, max_length=4)
    assert [row["input_ids"] for row in begun.train_dataset] == [
        [CLS, a, b, SEP],
        [CLS, c, SEP, d],
        [CLS, e, f, g],
        [CLS, h, SEP, a],
    ]


def test_rows_that_end_with_line_breaks_are_lines(tmp_path, decoder):
    Dataset.from_dict({"text": ["", "a b\n", "", "c d e f\n", "g h\n"]}).save_to_disk(tmp_path / "wiki")
    prepared = ready(tmp_path / "wiki", eval=str(tmp_path / "wiki"), model=decoder, max_length=4)
    assert [row["input_ids"] for row in prepared.train_dataset] == [ids_of("a b c d"), ids_of("e f g h")]


def test_the_end_is_held_out_and_limits_count_blocks(tmp_path, decoder):
    (tmp_path / "t.txt").write_text("a b c d\n" * 80 + "e f g h\n" * 20)
    prepared = ready(tmp_path / "t.txt", model=decoder, max_length=4, holdout=0.2, max_train=5, max_eval=3)
    assert [row["input_ids"] for row in prepared.train_dataset] == [ids_of("a b c d")] * 5
    assert [row["input_ids"] for row in prepared.eval_dataset] == [ids_of("e f g h")] * 3
    (tmp_path / "one.txt").write_text("a b c d e f")
    with pytest.raises(DataError, match="1 row is too few to hold some out"):
        ready(tmp_path / "one.txt", model=decoder)
    with pytest.raises(DataError, match="shorter than a block of 64 tokens"):
        ready(tmp_path / "t.txt", eval=str(tmp_path / "one.txt"), model=decoder, max_length=100)


def test_perplexity_is_that_of_the_tokens(tmp_path, decoder):
    (tmp_path / "t.txt").write_text("a b c d e f g h\n" * 9)
    prepared = ready(tmp_path / "t.txt", eval=str(tmp_path / "t.txt"), model=decoder, max_length=8)
    network = AutoModelForCausalLM.from_pretrained(decoder).eval()
    batch = prepared.data_collator([prepared.eval_dataset[i] for i in range(9)])
    with torch.no_grad():
        outputs = network(**batch)
        logs = outputs.logits.double().log_softmax(-1)
    expected = np.mean([-logs[row, i, batch["input_ids"][row, i + 1]].item() for row in range(9) for i in range(7)])
    kept = prepared.preprocess_logits_for_metrics(outputs.logits, batch["labels"])
    assert kept.shape == (9, 2) and kept[:, 1].tolist() == [7] * 9
    metric, answers = prepared.compute_metrics.measure(kept.numpy(), batch["labels"].numpy())
    assert (
        metric.value
        == pytest.approx(math.exp(expected), rel=1e-6)
        == pytest.approx(outputs.loss.exp().item(), rel=1e-5)
    )
    assert (metric.name, metric.n, len(answers), metric.higher_is_better) == ("perplexity", 63, 9, False)
    assert not prepared.compute_metrics.higher_is_better
    whole = EvalPrediction((outputs.logits.numpy(), None), batch["labels"].numpy())
    assert prepared.compute_metrics(whole)["perplexity"] == pytest.approx(metric.value)


def test_perplexity_weighs_examples_by_their_tokens():
    kept = np.array([[2.0, 1.0], [4.0, 4.0], [9.0, 3.0]])
    metric, _ = TokenScores(shifted=True).measure(kept, None)
    assert (metric.value, metric.n) == (pytest.approx(math.exp(15 / 8)), 8)
    # The delta method by hand: residuals of the ratio 15 / 8.
    residuals = [2 - 15 / 8, 4 - 4 * 15 / 8, 9 - 3 * 15 / 8]
    half = 1.959964 * math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 8
    assert (math.log(metric.low), math.log(metric.high)) == (pytest.approx(15 / 8 - half), pytest.approx(15 / 8 + half))
    with pytest.raises(DataError, match="no token of the evaluation data is predicted"):
        TokenScores(shifted=True).measure(np.zeros((2, 2)), None)
    assert TokenScores(shifted=True)(EvalPrediction(np.array([[np.nan, 3.0]]), None)) == {"perplexity": math.inf}


def test_blocks():
    assert cut_blocks([[1, 2], [], [3]], length=2).tolist() == [[1, 2]]
    assert cut_blocks([[1]], length=2).shape == (0, 2)


# ---- prompts and chats ----


def test_only_the_completion_is_learned(tmp_path, decoder, with_start):
    file = write(tmp_path / "p.jsonl", [{"prompt": "a b", "completion": "c d"}, {"prompt": "", "completion": "e"}] * 5)
    prepared = ready(file, model=decoder)
    assert prepared.train_dataset[0] == {
        "input_ids": [*ids_of("a b c d"), EOS],
        "labels": [-100, -100, *ids_of("c d"), EOS],
    }
    batch = prepared.data_collator([prepared.train_dataset[i] for i in range(2)])
    assert batch["labels"][1].tolist() == [*ids_of("e"), EOS] + [-100] * 6
    begun = ready(file, model=with_start).train_dataset[0]
    assert begun == {"input_ids": [CLS, *ids_of("a b c d"), SEP], "labels": [-100] * 3 + [*ids_of("c d"), SEP]}
    assert (len(prepared.train_dataset), len(prepared.eval_dataset)) == (9, 1)


def test_of_what_is_too_long_the_beginning_of_the_prompt_goes(tmp_path, decoder, caplog):
    caplog.set_level("INFO", "hfcompress")
    rows = [{"prompt": "a b c d e", "completion": "f g"}, {"prompt": "a", "completion": "b c d e f g"}]
    file = write(tmp_path / "p.jsonl", rows)
    prepared = ready(file, eval=file, model=decoder, max_length=5)
    assert [row["input_ids"] for row in prepared.train_dataset] == [[*ids_of("d e f g"), EOS], ids_of("b c d e f")]
    assert "train: 2 of 2 texts" in caplog.text


def test_of_a_chat_the_last_message_is_learned(tmp_path, decoder, masked):
    messages = [{"role": "user", "content": "a b"}, {"role": "bot", "content": "c"}]
    file = write(tmp_path / "m.jsonl", [{"messages": messages}] * 4)
    row = ready(file, model=decoder).train_dataset[0]
    assert row == {
        "input_ids": [*ids_of("user a b"), SEP, *ids_of("bot c"), SEP],
        "labels": [-100] * 5 + [*ids_of("c"), SEP],
    }
    plain = save_model(tmp_path / "plain", "llama", words=WORDS, eos_token="[EOS]")
    with pytest.raises(DataError, match="no chat template"):
        ready(file, model=plain)
    short = write(tmp_path / "s.jsonl", [{"messages": messages[:1]}] * 4)
    with pytest.raises(DataError, match="less than two messages in 4 rows"):
        ready(short, model=decoder)


STRING = Value("string")
COLUMNS = [
    ({"text": STRING, "id": STRING}, {}, Columns(None, ("text",))),
    ({"content": STRING, "label": Value("int64")}, {}, Columns(None, ("content",))),
    ({"instruction": STRING, "output": STRING}, {}, Columns("output", ("instruction",))),
    ({"prompt": STRING, "completion": STRING, "text": STRING}, {}, Columns(None, ("text",))),
    ({"x": STRING, "y": STRING}, {"text": "x", "label": "y"}, Columns("y", ("x",))),
    ({"x": STRING, "y": STRING}, {"text": "y"}, Columns(None, ("y",))),
    ({"chat": List({"role": STRING, "content": STRING}), "prompt": STRING}, {}, Columns(None, ("chat",))),
]


@pytest.mark.parametrize(("features", "told", "expected"), COLUMNS)
def test_columns(features, told, expected):
    assert LanguageInputs().find_columns(features, DataConfig(train="x", **told)) == expected


def test_a_model_must_have_the_head_where_it_is_used_as_it_is(tmp_path, decoder):
    (tmp_path / "t.txt").write_text("a b c d\n" * 9)
    with pytest.raises(DataError, match="is not fine-tuned on such a task"):
        ready(tmp_path / "t.txt", model=decoder, max_length=4, must_match=True)
    AutoModelForCausalLM.from_pretrained(decoder).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "lm")
    assert (
        ready(tmp_path / "t.txt", model=str(tmp_path / "lm"), max_length=4, must_match=True).model_kwargs
        == {"pad_token_id": 0}
        or True
    )
    with pytest.raises(DataError, match="metric: text-generation is scored in its own way"):
        ready(tmp_path / "t.txt", model=decoder, metric=lambda predictions, labels: {})


def test_start_tokens(decoder, with_start):
    assert start_tokens(AutoTokenizer.from_pretrained(decoder)) == []
    assert start_tokens(AutoTokenizer.from_pretrained(with_start)) == [CLS]


# ---- masks ----


def masks_of(dataset) -> list[list[int]]:
    return [[token for token in row["labels"] if token != -100] for row in dataset]


def test_masks_change_in_training_and_stay_in_evaluation(tmp_path, masked):
    texts = [" ".join(np.random.default_rng(i).choice(list("abcdefgh"), 30)) for i in range(40)]
    file = write(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    prepared = ready(file, eval=file, model=masked, task="fill-mask", max_length=64)
    assert "labels" not in prepared.train_dataset.column_names
    train = [prepared.train_dataset[i] for i in range(40)]
    torch.manual_seed(0)
    first, second = (prepared.data_collator([dict(row) for row in train]) for _ in range(2))
    assert not torch.equal(first["labels"], second["labels"])
    evaluated = [prepared.eval_dataset[i] for i in range(40)]
    one, two = (prepared.data_collator([dict(row) for row in evaluated]) for _ in range(2))
    assert torch.equal(one["input_ids"], two["input_ids"]) and torch.equal(one["labels"], two["labels"])
    whole = prepared.data_collator.tokenizer(texts, padding=True, pad_to_multiple_of=8, return_tensors="pt")[
        "input_ids"
    ]
    chosen = one["labels"] != -100
    assert torch.equal(torch.where(chosen, one["labels"], one["input_ids"]), whole)
    assert not (chosen & (whole < 4)).any()  # marks and padding are never masked
    assert 0.12 < chosen.sum() / (40 * 30) < 0.18
    assert 0.7 < (one["input_ids"][chosen] == 4 + WORDS.index("[MASK]")).float().mean() < 0.9
    # The mask follows from the text and the seed, whatever else is evaluated.
    fewer = ready(file, eval=file, model=masked, task="fill-mask", max_length=64, max_eval=7)
    assert len(fewer.eval_dataset) == 7
    assert all(row in masks_of(prepared.eval_dataset) for row in masks_of(fewer.eval_dataset))
    other = ready(file, eval=file, model=masked, task="fill-mask", max_length=64, seed=1)
    assert masks_of(other.eval_dataset) != masks_of(prepared.eval_dataset)
    fixed = ready(file, eval=file, model=masked, task="fill-mask", max_length=64, fixed_masks=True)
    assert masks_of(fixed.train_dataset) == masks_of(prepared.eval_dataset)


def test_masked_perplexity_is_the_exponential_of_the_loss(tmp_path, masked):
    (tmp_path / "t.txt").write_text("".join("a b c d e f g h " * count + "\n\n" for count in range(1, 21)))
    prepared = ready(tmp_path / "t.txt", eval=str(tmp_path / "t.txt"), model=masked, task="fill-mask")
    assert len(prepared.eval_dataset) == 20  # empty lines are no texts
    network = AutoModelForMaskedLM.from_pretrained(masked).eval()
    batch = prepared.data_collator([prepared.eval_dataset[i] for i in range(20)])
    with torch.no_grad():
        outputs = network(**batch)
    kept = prepared.preprocess_logits_for_metrics((outputs.logits,), batch["labels"]).numpy()
    assert prepared.compute_metrics(EvalPrediction(kept, None))["perplexity"] == pytest.approx(
        outputs.loss.exp().item(), rel=1e-5
    )


def test_errors_are_one_line(tmp_path, decoder):
    (tmp_path / "t.txt").write_text("a b\nc\n")
    (tmp_path / "blank.txt").write_text(" \n \n")
    for message, options in (
        ("has no mask token", {"train": tmp_path / "t.txt", "task": "fill-mask"}),
        ("blank.txt: holds no text", {"train": tmp_path / "blank.txt", "task": "feature-extraction"}),
        ("blank.txt: holds no text", {"train": tmp_path / "blank.txt"}),
        ("name one column; completions stand in data.label", {"train": tmp_path / "t.txt", "text": ["a", "b"]}),
    ):
        with pytest.raises(DataError, match=re.escape(message)) as error:
            ready(options.pop("train"), model=decoder, **options)
        assert "\n" not in str(error.value)


# ---- embeddings ----


def test_texts_for_embeddings_have_no_labels(tmp_path, masked):
    file = write(
        tmp_path / "s.jsonl",
        [{"sentence": "a b", "label": 1}, {"sentence": "", "label": 0}, {"sentence": "c", "label": 1}] * 3,
    )
    prepared = ready(file, model=masked, task="feature-extraction")
    assert len(prepared.train_dataset) + len(prepared.eval_dataset) == 6
    assert {"input_ids", "attention_mask"} >= set(prepared.train_dataset.column_names)
    assert (prepared.label_columns, prepared.auto_class, prepared.metric_name) == ((), "AutoModel", "cosine_similarity")
    assert isinstance(prepared.data_collator, MaskingCollator) is False


def test_embeddings_are_means_over_tokens_and_compared_by_cosine(tmp_path, masked):
    from transformers import AutoModel

    file = write(tmp_path / "s.jsonl", [{"text": "a b c"}, {"text": "d"}, {"text": "e f"}])
    prepared = ready(file, eval=file, model=masked, task="feature-extraction")
    network, scores = AutoModel.from_pretrained(masked).eval(), prepared.compute_metrics
    batch = prepared.data_collator([prepared.eval_dataset[i] for i in range(3)])
    with torch.no_grad():
        pooled = scores.run(network, batch, None)
        for row, length in enumerate((5, 3, 4)):  # words and two marks
            alone = network(input_ids=batch["input_ids"][row : row + 1, :length]).last_hidden_state[0].mean(0)
            assert torch.allclose(pooled[row], alone, atol=1e-5)
    others = pooled + torch.arange(16 * 2).sin()
    expected = torch.nn.functional.cosine_similarity(pooled, others).tolist()
    metric, answers = scores.measure(pooled.numpy(), others.numpy())
    assert (metric.value, metric.n, answers.tops.tolist()) == (
        pytest.approx(np.mean(expected)),
        3,
        pytest.approx(expected),
    )
    assert (
        metric.high - metric.value == pytest.approx(1.959964 * np.std(expected, ddof=1) / 3**0.5) or metric.high == 1.0
    )
    with pytest.raises(ValueError, match="32 and 31 features cannot be compared"):
        scores.measure(pooled.numpy(), others[:, 1:].numpy())
