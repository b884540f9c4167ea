"""Texts that a teacher writes, in a file that training reads as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from datasets import List, Translation, Value
from transformers import AutoTokenizer

import hfcompress
from hfcompress.cli.main import main
from hfcompress.config import DataConfig, Recipe
from hfcompress.distillation import generations
from hfcompress.runs import writing_targets as module
from hfcompress.runs.writing_targets import encode_examples, end_tokens, find_source, shard_size, task_of
from hfcompress.tasks import DataError, prepare
from tests.tasks.conftest import save_bert, save_model

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*"abcdefgh", *"ijk", "user", "assistant", "sum", *(f"w{number}" for number in range(82))]  # 100 tokens in all
PAD, UNK, CLS, SEP = range(4)
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
TEXTS = ["a b c", "d", "e f g h a", "b b", "c d e f", "h g", "a", "f e d c b a", "g h", "c c c", "e a"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save_teacher(folder, name, auto):
    """A teacher that writes different texts, of which it ends some."""
    save_model(folder, name, auto, words=WORDS, eos_token="[SEP]")
    model = hfcompress.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # else it repeats one word
    model.generation_config.eos_token_id = None
    closing = [SEP] if model.config.is_encoder_decoder else []
    texts = [by_hand(model, [CLS, *ids_of(text), *closing], 6) for text in TEXTS]
    later = Counter(token for ids in texts for token in {*ids[2:]} - {*ids[:2]} if token >= len(MARKS))
    model.generation_config.eos_token_id = later.most_common(1)[0][0]
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = save_teacher(tmp_path_factory.mktemp("llama"), "llama", "AutoModelForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["t5", "bart"])
def encoder_decoder(request, tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp(request.param), request.param, "AutoModelForSeq2SeqLM")


def ids_of(text):
    return [len(MARKS) + WORDS.index(word) for word in text.split()]


def words_of(ids, *, end):
    """What is written, as a reader sees it: up to the teacher's own end, or the tokenizer's, and without marks."""
    ids = ids[: end_of(ids, end)]
    return " ".join(WORDS[number - len(MARKS)] for number in ids if number >= len(MARKS))


def by_hand(model, ids, count, **settings):
    inputs = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": count, **settings}
    out = model.eval().generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings)[0].tolist()
    return out[1 if model.config.is_encoder_decoder else len(ids) :]


def end_of(ids, end):
    return next((number for number, token in enumerate(ids) if token in (end, SEP)), len(ids))


def save_rows(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def read_back(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def run(*arguments):
    try:
        return main(["write-targets", *map(str, arguments)])
    except SystemExit as end:  # from the parser
        return end.code


QUICK = ("--new-tokens", "6", "--batch", "1", "--device", "cpu")


# ---- what is written, and how training reads it ----


def test_prompts(decoder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join([*TEXTS[:4], "", *TEXTS[4:]]))
    file = tmp_path / "new" / "written.jsonl"
    assert run(decoder, "--data", tmp_path / "prompts.txt", *QUICK, "--output", file) == 0
    seen = capsys.readouterr()
    model = hfcompress.load(decoder)
    end = model.generation_config.eos_token_id
    whole = [by_hand(model, [CLS, *ids_of(text)], 6) for text in TEXTS]
    expected = [{"prompt": text, "completion": words_of(ids, end=end)} for text, ids in zip(TEXTS, whole, strict=True)]
    kept = [(row, ids) for row, ids in zip(expected, whole, strict=True) if row["completion"]]
    expected = [row for row, _ in kept]
    assert len(expected) >= 9 and read_back(file) == expected
    assert {path.name for path in file.parent.iterdir()} == {"written.jsonl"}, "parts are left"
    stops = [end_of(ids, end) for _, ids in kept]
    unfinished, tokens = sum(stop == 6 for stop in stops), sum(min(stop + 1, 6) for stop in stops)
    assert 0 < unfinished < len(kept), "the case is too easy"
    longest = max(1 + len(row["prompt"].split()) + len(row["completion"].split()) + 1 for row in expected)
    first, *_, second, third = seen.out.splitlines()
    assert first.startswith(f"{file}: {len(kept)} rows of prompt and completion, {tokens} tokens written, ")
    assert second.startswith(f"{unfinished} texts were cut after 6 tokens (--new-tokens)")
    assert third == f"to train on it: task=text-generation data.train={file} data.max_length={longest}"
    assert "teacher's targets" in seen.err
    # Training learns these words and the end, of whole prompts, with exactly that length.
    data = DataConfig(train=str(file), eval=str(file), max_length=longest)
    task = prepare(data, task="text-generation", model_name=decoder)
    for row, text in zip(task.train_dataset, expected, strict=True):
        learned = [token for token in row["labels"] if token != -100]
        assert row["input_ids"] == [CLS, *ids_of(text["prompt"]), *learned]
        assert learned == [*ids_of(text["completion"]), SEP]
    shorter = prepare(data.model_copy(update={"max_length": longest - 1}), task="text-generation", model_name=decoder)
    assert shorter.train_dataset["input_ids"] != task.train_dataset["input_ids"]


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_with_a_prefix(encoder_decoder, tmp_path, capsys, beams):
    rows = [{"id": f"n{number}", "article": text, "summary": "not looked at"} for number, text in enumerate(TEXTS)]
    options = ["--data", save_rows(tmp_path / "data.jsonl", rows), "--prefix", "sum ", "--beams", beams]
    file = tmp_path / "written.jsonl"
    assert run(encoder_decoder, *options, *QUICK, "--output", file) == 0
    model = hfcompress.load(encoder_decoder)
    end, expected, seen = model.generation_config.eos_token_id, [], []
    for text in TEXTS:
        seen.append([CLS, *ids_of(f"sum {text}"), SEP])
        words = words_of(by_hand(model, seen[-1], 6, num_beams=beams), end=end)
        expected.append({"source": text, "target": words})
    assert read_back(file) == [row for row in expected if row["target"]] and len(read_back(file)) > 5
    out = capsys.readouterr().out.splitlines()
    blank = sum(not row["target"] for row in expected)
    assert (f"{blank} examples are left out: the teacher wrote nothing to them" in out) == bool(blank)
    *settings, prefix = out[-1].removeprefix("to train on it: ").split(" ", 4)
    assert prefix == "'data.prefix=\"sum \"'" and settings[:2] == ["task=text2text-generation", f"data.train={file}"]
    # The overrides as they are printed: the model reads what the teacher read, and learns what it wrote.
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml", overrides=[*settings, prefix.strip("'"), f"data.eval={file}"])
    task = prepare(recipe.data, task=recipe.task, model_name=encoder_decoder)
    kept = [number for number, row in enumerate(expected) if row["target"]]
    assert len(task.train_dataset) == len(kept) > 5
    for row, number in zip(task.train_dataset, kept, strict=True):
        assert row["input_ids"] == seen[number]
        assert row["labels"] == [CLS, *ids_of(expected[number]["target"]), SEP]
    lengths = (recipe.data.max_length, recipe.data.max_target_length)
    assert lengths == tuple(max(map(len, task.train_dataset[name])) for name in ("input_ids", "labels"))


def test_chats(decoder, tmp_path, capsys):
    asked = [
        [{"role": "user", "content": "a b"}],
        [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}, {"role": "user", "content": "g"}],
    ]
    rows = [{"chat": asked[0], "id": 1}, {"chat": asked[1], "id": 2}]
    rows.append({"chat": [*asked[1], {"role": "assistant", "content": "h h h"}], "id": 3})
    file = tmp_path / "written.jsonl"
    assert run(decoder, "--data", save_rows(tmp_path / "c.jsonl", rows), *QUICK, "--output", file) == 0
    model = hfcompress.load(decoder)
    prompts = [
        [*ids_of("user a b"), SEP, *ids_of("assistant")],
        [*ids_of("user c"), SEP, *ids_of("assistant d"), SEP, *ids_of("user g"), SEP, *ids_of("assistant")],
    ]
    end = model.generation_config.eos_token_id
    answers = [words_of(by_hand(model, ids, 6), end=end) for ids in prompts]
    both = [[*chat, {"role": "assistant", "content": words}] for chat, words in zip(asked, answers, strict=True)]
    assert all(answers) and [row["messages"] for row in read_back(file)] == [*both, both[1]]
    assert "3 rows of messages" in capsys.readouterr().out
    task = prepare(DataConfig(train=str(file), eval=str(file)), task="text-generation", model_name=decoder)
    learned = [[token for token in row["labels"] if token != -100] for row in task.train_dataset]
    assert learned == [[*ids_of(answers[number]), SEP] for number in (0, 1, 1)]


def test_messages_that_say_more(decoder, tmp_path):
    """Rows whose messages have different keys could not be read back as chats."""
    rows = [{"messages": [{"role": "user", "name": "Ann", "content": text}]} for text in TEXTS]
    file = tmp_path / "written.jsonl"
    assert run(decoder, "--data", save_rows(tmp_path / "c.jsonl", rows), *QUICK, "--output", file) == 0
    task = prepare(DataConfig(train=str(file), eval=str(file)), task="text-generation", model_name=decoder)
    written = read_back(file)
    assert len(task.train_dataset) == len(written) > 5
    for row, (question, answer) in zip(task.train_dataset, (row["messages"] for row in written), strict=True):
        assert question in [row["messages"][0] for row in rows] and (answer["role"], answer["name"]) == (
            "assistant",
            None,
        )
        assert [token for token in row["labels"] if token != -100] == [*ids_of(answer["content"]), SEP]


def test_samples_follow_the_seed(decoder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    found = {}
    for name, options in {
        "one": ["--seed", "1"],
        "again": ["--seed", "1"],
        "two": ["--seed", "2"],
        "cold": ["--seed", "1", "--temperature", "1e-4"],
        "greedy": None,
    }.items():
        drawn = [] if options is None else ["--sample", *options]
        output = tmp_path / f"{name}.jsonl"
        assert run(decoder, "--data", tmp_path / "prompts.txt", *QUICK, *drawn, "--output", output) == 0
        found[name] = read_back(output)
    assert found["one"] == found["again"] != found["two"] and found["cold"] == found["greedy"] != found["one"]


def test_some_of_the_examples(decoder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    chosen = []
    for seed in (1, 2):
        output = tmp_path / f"{seed}.jsonl"
        options = ["--data", tmp_path / "prompts.txt", "--max-examples", "4", "--seed", seed]
        assert run(decoder, *options, *QUICK, "--output", output) == 0
        chosen.append([row["prompt"] for row in read_back(output)])
    assert [len(texts) for texts in chosen] == [4, 4] and chosen[0] != chosen[1]
    assert all(text in TEXTS for texts in chosen for text in texts)


def test_where_the_teacher_writes_nothing_there_is_no_row(decoder, tmp_path, capsys):
    model = hfcompress.load(decoder)
    firsts = [by_hand(model, [CLS, *ids_of(text)], 1)[0] for text in TEXTS]
    assert SEP not in firsts and len(set(firsts)) > 1
    model.generation_config.eos_token_id = firsts[0]
    model.save_pretrained(tmp_path / "silent")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "silent")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    silent = [text for text, first in zip(TEXTS, firsts, strict=True) if first == firsts[0]]
    assert run(tmp_path / "silent", "--data", tmp_path / "prompts.txt", *QUICK, "--output", tmp_path / "w.jsonl") == 0
    assert [row["prompt"] for row in read_back(tmp_path / "w.jsonl")] == [text for text in TEXTS if text not in silent]
    assert f"{len(silent)} examples are left out" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text(TEXTS[0])
    assert run(tmp_path / "silent", "--data", tmp_path / "prompts.txt", *QUICK, "--output", tmp_path / "n.jsonl") == 2
    assert "the teacher wrote nothing to any of the examples" in capsys.readouterr().err
    assert not (tmp_path / "n.jsonl").exists()


# ---- stopped, and in several processes ----


def test_a_stopped_run_goes_on_to_the_same_file(decoder, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    options = [decoder, "--data", tmp_path / "prompts.txt", *QUICK, "--sample"]
    assert run(*options, "--output", tmp_path / "whole.jsonl") == 0
    calls, original = [], generations._generate_batch

    def stop_in_the_second_part(*given):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(generations, "_generate_batch", stop_in_the_second_part)
    file, parts = tmp_path / "stopped.jsonl", tmp_path / "stopped.jsonl.parts"
    assert run(*options, "--output", file) == 130
    assert not file.exists() and {path.name for path in parts.iterdir()} == {"settings.json", "targets-00000.arrow"}
    calls.clear()
    monkeypatch.setattr(generations, "_generate_batch", lambda *given: calls.append(1) or original(*given))
    capsys.readouterr()
    assert run(*options, "--seed", "1", "--output", file) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("seed was 42 and is 1; give another folder, or remove it") and str(parts) in said
    assert calls == [] and run(*options, "--output", file) == 0
    assert len(calls) == 7  # of 11 batches of one, four were done
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not parts.exists()
    assert run(*options, "--output", file) == 2
    assert "is there already; give another file, or remove it" in capsys.readouterr().err
    (tmp_path / "mine.jsonl.parts").mkdir()
    (tmp_path / "mine.jsonl.parts" / "letters.txt").write_text("dear")
    assert run(*options, "--output", tmp_path / "mine.jsonl") == 2
    assert "mine.jsonl.parts is in the way" in capsys.readouterr().err
    assert (tmp_path / "mine.jsonl.parts" / "letters.txt").read_text() == "dear"


def test_each_process_does_its_parts(decoder, tmp_path, capsys, monkeypatch):
    """One after the other, the first last, as if all had met."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    options = [decoder, "--data", tmp_path / "prompts.txt", *QUICK, "--sample"]
    assert run(*options, "--output", tmp_path / "one.jsonl") == 0
    met = []

    @contextmanager
    def meeting(size):
        yield lambda: met.append(size)

    monkeypatch.setattr(module, "_meeting", meeting)
    monkeypatch.setenv("WORLD_SIZE", "2")
    file, parts = tmp_path / "two.jsonl", tmp_path / "two.jsonl.parts"
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert run(*options, "--output", file) == 0
    assert capsys.readouterr().out == "" and not file.exists()
    assert {path.name for path in parts.iterdir()} == {"settings.json", "targets-00001.arrow"}
    monkeypatch.setenv("RANK", "0")
    assert run(*options, "--output", file) == 0
    assert "rows of prompt" in capsys.readouterr().out and met == [2, 2]
    assert file.read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not parts.exists()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(decoder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    options = [decoder, "--data", str(tmp_path / "prompts.txt"), *QUICK, "--output"]
    assert run(*options, tmp_path / "one.jsonl") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "hfcompress.cli.main", "write-targets", *options, str(tmp_path / "two.jsonl")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("rows of prompt and completion") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "one.jsonl", "two.jsonl"}


# ---- the parts ----

STRING = Value("string")
CHAT = List({"role": STRING, "content": STRING})
COLUMNS = [
    (True, {"prompt": STRING, "completion": STRING}, None, "prompt"),
    (True, {"text": STRING}, None, "text"),
    (True, {"id": STRING, "instruction": STRING, "output": STRING}, None, "instruction"),
    (True, {"anything": STRING, "response": STRING, "label": Value("int64")}, None, "anything"),
    (True, {"prompt": STRING, "chat": CHAT}, None, "chat"),
    (True, {"prompt": STRING, "chat": CHAT}, "prompt", "prompt"),
    (True, {"prompt": STRING, "completion": STRING}, "completion", "completion"),
    (False, {"article": STRING, "highlights": STRING, "id": STRING}, None, "article"),
    (False, {"body": STRING, "summary": STRING}, None, "body"),
    (False, {"summary": STRING}, None, "summary"),
    (False, {"id": STRING, "translation": Translation(["de", "en"])}, "en", "translation.en"),
]


@pytest.mark.parametrize(("is_causal", "features", "name", "expected"), COLUMNS)
def test_columns(is_causal, features, name, expected):
    assert find_source(features, DataConfig(train="x", text=name), is_causal=is_causal) == expected


def test_columns_that_cannot_be():
    for is_causal, features, text, message in (
        (True, {"x": STRING, "y": STRING}, None, "data.text: cannot tell which column holds the prompts"),
        (False, {"de": STRING, "en": STRING}, None, "data.text: cannot tell which column holds the texts"),
        (True, {"x": STRING}, "y", "column 'y' is not in the data"),
        (True, {"x": Value("int64")}, "x", "column 'x' holds int64, not text"),
        (False, {"chat": CHAT}, None, "cannot tell which column holds the texts"),
        (True, {"x": STRING, "y": STRING}, ["x", "y"], "data.text: name one column"),
    ):
        with pytest.raises(DataError, match=message):
            find_source(features, DataConfig(train="x", text=text), is_causal=is_causal)


def test_of_a_long_prompt_the_end_is_read(decoder):
    tokenizer, config = AutoTokenizer.from_pretrained(decoder), hfcompress.load(decoder).config
    rows = datasets.Dataset.from_dict({"prompt": ["a b c d e f g", "h"]})

    def encoded(length, new_tokens):
        data = DataConfig(train="x", max_length=length)
        return encode_examples(rows, tokenizer=tokenizer, data=data, model_config=config, new_tokens=new_tokens)

    assert encoded(4, 9)["input_ids"] == [[CLS, *ids_of("e f g")], [CLS, *ids_of("h")]]
    assert encoded(9, 9)["input_ids"] == [[CLS, *ids_of("a b c d e f g")], [CLS, *ids_of("h")]]
    # The teacher has 64 positions.
    assert encoded(9, 60)["input_ids"] == [[CLS, *ids_of("e f g")], [CLS, *ids_of("h")]]
    with pytest.raises(ValueError, match=r"new_tokens=63 is not allowed: the teacher has room for 64 tokens"):
        encoded(9, 63)


def test_what_ends_a_text(decoder):
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    assert end_tokens(None, tokenizer, is_chat=False) == [SEP]
    assert end_tokens(7, tokenizer, is_chat=True) == [7, SEP]
    assert end_tokens([SEP, 9], tokenizer, is_chat=True) == [SEP, 9]
    # A template that ends an answer otherwise than a text.
    tokenizer.chat_template = TEMPLATE.replace("[SEP]", "[CLS]")
    assert end_tokens(7, tokenizer, is_chat=True) == [7, CLS, SEP] and end_tokens(7, tokenizer, is_chat=False) == [
        7,
        SEP,
    ]
    tokenizer.chat_template = TEMPLATE.replace("[SEP]", "w5")  # a word like others does not end anything
    assert end_tokens(7, tokenizer, is_chat=True) == [7, SEP]


def test_parts():
    for examples, batch in ((1, 1), (100, 8), (10_000, 8), (3_000_000, 64)):
        size = shard_size(examples, batch)
        assert size % batch == 0 and size >= 4 * batch and -(-examples // size) <= 256
    with pytest.raises(ValueError, match="BertForSequenceClassification writes no texts"):
        task_of("BertForSequenceClassification", is_encoder_decoder=False)


# ---- errors ----


@pytest.fixture(scope="module")
def material(tmp_path_factory, decoder):
    folder = tmp_path_factory.mktemp("material")
    save_bert(folder / "bert", names=["fine", "poor"])
    plain = AutoTokenizer.from_pretrained(decoder)
    plain.chat_template = None
    hfcompress.load(decoder).save_pretrained(folder / "plain")
    plain.save_pretrained(folder / "plain")
    (folder / "good.txt").write_text("a b\nc\n")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "holes.csv").write_text("n,prompt\n1,a b\n2,\n3,c\n")
    (folder / "numbers.csv").write_text("x,y\n1,2\n")
    question, answer = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    save_rows(folder / "chats.jsonl", [{"messages": [question]}])
    save_rows(folder / "answers.jsonl", [{"messages": [question]}, {"messages": [answer]}])
    return folder


@pytest.mark.parametrize(
    ("teacher", "arguments", "message"),
    [
        ("bert", ["good.txt"], "BertForSequenceClassification writes no texts; give a causal language model or an"),
        ("nowhere", ["good.txt"], "nowhere"),
        ("plain", ["no.txt"], "--data: 'no.txt' is neither a file nor a folder"),
        ("plain", ["blank.txt"], "blank.txt: holds no text"),
        ("plain", ["holes.csv"], "holes.csv: no text in column prompt in row 1 (counted from 0)"),
        ("plain", ["numbers.csv"], "--text: cannot tell which column holds the prompts"),
        ("plain", ["good.txt", "--text", "txt"], "--text: column 'txt' is not in the data; there are: text"),
        ("plain", ["good.txt", "--prefix", "sum "], "a prefix is for encoder-decoders"),
        ("plain", ["good.txt", "--temperature", "2"], "--temperature is for --sample"),
        ("plain", ["good.txt", "--sample", "--temperature", "0"], "temperature=0.0 is not allowed: must be above 0"),
        ("plain", ["good.txt", "--new-tokens", "0"], "'0' is not allowed: must be a whole number of 1 or more"),
        ("plain", ["good.txt", "--new-tokens", "64"], "new_tokens=64 is not allowed: the teacher has room for 64"),
        ("plain", ["good.txt", "--output", "w.csv"], "'w.csv' is not allowed: must end in .jsonl"),
        ("plain", ["chats.jsonl"], "--text: the tokenizer has no chat template to write messages with"),
        ("plain", ["answers.jsonl"], "answers.jsonl: no message to answer in row 1"),
    ],
)
def test_errors_are_one_line_and_write_nothing(material, tmp_path, capsys, monkeypatch, teacher, arguments, message):
    monkeypatch.chdir(material)
    output = tmp_path / "w.jsonl"
    assert run(f"./{teacher}", *QUICK, "--output", output, "--data", *arguments) == 2
    seen = capsys.readouterr()
    lines = [line for line in seen.err.splitlines() if line.startswith("hfcompress")]
    assert len(lines) == 1 and message in lines[0] and seen.out == ""
    assert list(tmp_path.iterdir()) == [] and not (material / "w.csv").exists()


def test_a_template_that_refuses(decoder, tmp_path, capsys):
    model, tokenizer = hfcompress.load(decoder), AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = save_rows(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    assert run(tmp_path / "model", "--data", file, *QUICK, "--output", tmp_path / "w.jsonl") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "hfcompress: --text: the chat template refuses messages: roles must alternate"
