"""What `hfcompress quantize` leaves is measured beside what it was made from: scores, times, sizes, in its results and on its card."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hfcompress
from hfcompress.cli.main import main
from hfcompress.config import MeasureConfig
from hfcompress.hub import verify
from hfcompress.hub.predictions import read_answers
from hfcompress.hub.report import render_report
from hfcompress.hub.results import read_results, words_of_no_gain
from hfcompress.runs import beside
from hfcompress.runs.likeness import MADE_UP, rate_beside_first
from tests.hub.folders import all_fine
from tests.tasks.conftest import WORDS, save_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 24, "initializer_range": 0.3}
FILMS = [("a good film", "fine"), ("not very bad", "fine"), ("a bad film", "poor"), ("very bad", "poor")] * 10
NAMES = {"id2label": {0: "fine", 1: "poor"}, "label2id": {"fine": 0, "poor": 1}}
SHORT = ("--length", "6", "--batch", "2", "--threads", "1", "--device", "cpu")


def make(name):
    torch.manual_seed(0)
    if name == "classifier":
        return BertForSequenceClassification(BertConfig(**TEXT, **NAMES))
    if name == "quantity":
        return BertForSequenceClassification(BertConfig(**TEXT, num_labels=1))
    if name == "bare":
        return BertModel(BertConfig(**TEXT))
    if name == "masked":
        return BertForMaskedLM(BertConfig(**TEXT))
    if name == "decoder":
        return LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1, pad_token_id=0))
    if name == "seq2seq":
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
        return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))
    assert name == "images"
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, **NAMES))


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    """In one process, in a folder of its own; loading by every way is taken for granted."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(verify, "_run_child", all_fine)
    monkeypatch.chdir(tmp_path)

    def run_here(module, *arguments):
        assert module == beside.__name__
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module, *arguments])
            beside.main()
        return True

    monkeypatch.setattr(beside, "run_fresh", run_here)
    settings = {"rounds": 3, "warmup": 0}
    real = beside.measure_and_keep
    monkeypatch.setattr(beside, "measure_and_keep", lambda f, r, c, **k: real(f, r, c.model_copy(update=settings), **k))
    (tmp_path / "films.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in FILMS))
    (tmp_path / "said.csv").write_text("text\n" + "".join(f"{text}\n" for text, _ in FILMS))


def save(folder, name):
    make(name).save_pretrained(folder / name)
    save_tokenizer(folder / name, model_input_names=["input_ids", "attention_mask"])


def run(name, *arguments, preset="int3-g8"):
    return main(["quantize", name, "--preset", preset, "--output", "small", *SHORT, *arguments])


def accuracy_by_hand(folder, count):
    """Of the first so many films, one by one."""
    model = hfcompress.load(folder)
    right = 0
    for text, label in FILMS[:count]:
        ids = torch.tensor([[WORDS.index("[CLS]"), *map(WORDS.index, text.split()), WORDS.index("[SEP]")]])
        with torch.no_grad():
            right += model.config.id2label[int(model(input_ids=ids).logits.argmax())] == label
    return right / count


def test_with_labels_it_is_scored(tmp_path, capsys):
    save(tmp_path, "classifier")
    assert run("classifier", "--eval", "films.csv") == 0
    rows = read_results(tmp_path / "small")["rows"]
    assert [(row["name"], row["folder"]) for row in rows] == [("original", "classifier"), ("int3-g8", ".")]
    for row, folder in zip(rows, ("classifier", "small"), strict=True):
        metric = row["metric"]
        assert (metric["name"], metric["n"]) == ("accuracy", 40)
        assert metric["value"] == accuracy_by_hand(tmp_path / folder, 40)
        latency = row["latency"]
        assert (latency["batch"], latency["length"], latency["rounds"], latency["compiled"]) == (2, 6, 3, False)
    assert rows[1]["speedup"]["median"] > 0 and rows[1]["disk_bytes"] < rows[0]["disk_bytes"]
    said = capsys.readouterr()
    table = said.out[said.out.index("model ") :].splitlines()
    assert table[1].startswith("original ") and table[2].startswith("int3-g8 ") and "accuracy (n=40)" in table[0]
    assert "training data" not in said.err
    results = read_results(tmp_path / "small")
    assert results["command"].startswith("hfcompress") and results["lineage"]["base"]["name"] == "classifier"
    assert results["data"] == {"name": "films.csv", "eval_n": 40, "fingerprint": results["data"]["fingerprint"]}
    answers, fingerprint = read_answers(tmp_path / "small")
    assert list(answers) == ["original", "int3-g8"] and fingerprint == results["data"]["fingerprint"]


def test_what_is_held_out_was_not_rounded_on(tmp_path):
    save(tmp_path, "classifier")
    assert run("classifier", "--data", "films.csv", "--samples", "64") == 0
    results = read_results(tmp_path / "small")
    assert results["data"]["calibration_n"] == 36 and results["data"]["eval_n"] == 4
    assert [row["metric"]["n"] for row in results["rows"]] == [4, 4]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Each of these ways was tried in a fresh process" in card and "rounded on 36 examples" in card


def test_the_card_and_the_report_show_it(tmp_path):
    save(tmp_path, "classifier")
    assert run("classifier", "--eval", "films.csv", preset="nf4") == 0
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert "Nothing was measured" not in card.text and "| nf4 |" in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_name) == ("accuracy", "films.csv")
    page = render_report(tmp_path / "small")
    assert "nf4" in page and "accuracy, n = 40" in page


@pytest.mark.parametrize(
    ("name", "data", "metric", "n"),
    [
        ("classifier", "said.csv", "agreement", 40),
        ("classifier", None, "agreement", MADE_UP),
        ("quantity", None, "pearson", MADE_UP),
        ("bare", "said.csv", "cosine_similarity", 40),
        ("bare", None, "cosine_similarity", MADE_UP),
        ("masked", None, "agreement", MADE_UP * 6),
        ("masked", "said.csv", "agreement", sum(len(text.split()) + 2 for text, _ in FILMS)),
        ("decoder", None, "agreement", MADE_UP * 6),
        ("decoder", "said.csv", "perplexity", None),
        ("seq2seq", None, "agreement", MADE_UP * 6),
        ("images", None, "agreement", MADE_UP),
    ],
)
def test_without_labels_it_is_compared(name, data, metric, n, tmp_path):
    save(tmp_path, name)
    given = ["--data", data, "--samples", "8"] if data else []
    assert run(name, *given) == 0
    results = read_results(tmp_path / "small")
    first, second = (row["metric"] for row in results["rows"])
    assert first["name"] == second["name"] == metric and n in (None, first["n"])
    if metric == "perplexity":
        assert first["value"] != second["value"]
    else:
        assert abs(first["value"] - 1) < 1e-6 and second["value"] <= 1
        assert results["data"]["name"] == (data or "made-up inputs") and results["data"]["labels"] is False
        card = ModelCard.load(tmp_path / "small" / "README.md")
        assert not card.data.eval_results, "this is no score of a benchmark"
        assert ("predictions that are those of original" in card.text) is (metric == "agreement")


def test_images_in_folders(tmp_path):
    make("images").save_pretrained(tmp_path / "images")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "images")
    random = np.random.default_rng(0)
    for label in ("fine", "poor"):
        (tmp_path / "seen" / label).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "seen" / label / f"{number}.png")
    assert run("images", "--eval", "seen", preset="nf4") == 0
    rows = read_results(tmp_path / "small")["rows"]
    assert [(row["metric"]["name"], row["metric"]["n"]) for row in rows] == [("accuracy", 20)] * 2
    assert rows[0]["latency"]["length"] is None


def test_a_model_that_takes_short_texts_only(tmp_path):
    save(tmp_path, "classifier")
    assert main(["quantize", "classifier", "--preset", "int3-g8", "--output", "small", "--device", "cpu"]) == 0
    assert [row["latency"]["length"] for row in read_results(tmp_path / "small")["rows"]] == [24, 24]


def test_how_like_outputs_are_by_hand():
    one, other = make("masked").eval(), make("masked").eval()
    with torch.no_grad():
        other.cls.predictions.decoder.bias[: len(WORDS) // 2] += 0.5
    ids = torch.randint(len(WORDS), (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    rate = rate_beside_first([{"input_ids": ids, "attention_mask": mask}], measure=MeasureConfig())
    assert rate(one)[0].value == 1.0
    metric, answers = rate(other)
    with torch.no_grad():
        said = [model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist() for model in (one, other)]
    same = [said[0][r][t] == said[1][r][t] for r in range(3) for t in range(7) if mask[r, t]]
    assert metric.n == len(same) == 18 and 0 < metric.value < 1 and metric.value == sum(same) / 18
    assert answers.tops.tolist() == [float(each) for each in same]


def test_smaller_and_not_faster_is_said(tmp_path, capsys, monkeypatch):
    save(tmp_path, "classifier")
    slow = {"median": 0.8, "p10": 0.7, "p90": 0.9}
    real = beside.measure_and_keep

    def slower(*args, **kwargs):
        found = real(*args, **kwargs)
        found.rows[1] |= {"speedup": slow, "disk_bytes": found.rows[0]["disk_bytes"] // 2}
        return replace(found)

    monkeypatch.setattr(beside, "measure_and_keep", slower)
    assert run("classifier") == 0
    said = "int3-g8 is smaller, not faster: 50 % of the size of original, 0.80x its speed"
    assert f"\n{said}; for speed on a CPU: hfcompress export\n" in capsys.readouterr().out
    assert f"{said}." in (tmp_path / "small" / "README.md").read_text()
    assert f"{said}." in render_report(tmp_path / "small")


@pytest.mark.parametrize(
    ("speed", "size", "said"),
    [
        (1.04, 0.5, "smaller, not faster"),
        (1.06, 0.5, None),
        (0.5, 1.0, "neither smaller nor faster"),
        (1.06, 1.2, "faster, not smaller"),
        (0.5, 0.99, "smaller, not faster"),
    ],
)
def test_what_is_no_gain(speed, size, said):
    rows = [
        {"name": "teacher", "disk_bytes": 2000},
        {"name": "pruned", "disk_bytes": 1000, "speedup": {"median": 2.0}},
        {
            "name": "pruned + x",
            "disk_bytes": int(1000 * size),
            "speedup": {"median": 2 * speed},
            "origin": "pruned",
            "step": {"speedup": {"median": speed}},
        },
    ]
    found = words_of_no_gain(rows)
    assert [line.partition(":")[0] for line in found] == ([] if said is None else [f"pruned + x is {said}"])


def test_what_torchao_made_is_compiled(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or real(model, backend="eager"))
    save(tmp_path, "classifier")
    assert run("classifier", "--eval", "films.csv", preset="int8-dynamic") == 0
    assert len(compiled) == 2
    rows = read_results(tmp_path / "small")["rows"]
    assert [row["latency"]["compiled"] for row in rows] == [True, True]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "All went through torch.compile." in card and ", compiled; hfcompress" in card


def test_a_file_of_16_bits_whose_config_says_32_would_grow(tmp_path, capsys):
    save(tmp_path, "classifier")
    folder = tmp_path / "classifier"
    config = (folder / "config.json").read_text()
    hfcompress.load(folder).half().save_pretrained(folder)
    (folder / "config.json").write_text(config)
    assert run("classifier", preset="int8-channel") == 0
    said = capsys.readouterr().out
    rows = read_results(tmp_path / "small")["rows"]
    assert rows[0]["parameters"] == rows[1]["parameters"] and rows[1]["disk_bytes"] > rows[0]["disk_bytes"]
    assert "int8-channel is neither smaller nor faster: " in said or "int8-channel is faster, not smaller: " in said
    assert "where the original's file has 16: --dtype float16\n" in said


def test_without_measuring(tmp_path, monkeypatch, capsys):
    save(tmp_path, "classifier")
    monkeypatch.setattr(beside, "run_fresh", None)
    assert run("classifier", "--no-measure") == 0
    assert not read_results(tmp_path / "small").get("rows")
    assert "Nothing was measured" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eval", "nothing.csv"), "--eval: 'nothing.csv' is neither a file nor a folder"),
        (("--eval", "films.csv", "--label", "mood"), "--label"),
        (("--eval", "films.csv", "--no-measure"), "--eval is what is scored on; leave out it or --no-measure"),
    ],
)
def test_what_cannot_be_scored_on_is_seen_before(arguments, message, tmp_path, capsys):
    save(tmp_path, "classifier")
    assert run("classifier", *arguments, preset="nf4") == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "small").exists()


def test_what_cannot_be_measured_is_there_all_the_same(tmp_path, monkeypatch, capsys):
    save(tmp_path, "classifier")
    monkeypatch.setattr(beside, "run_fresh", lambda *_: False)
    assert run("classifier", preset="nf4") == 2
    assert "small is written and loads, but could not be measured" in capsys.readouterr().err
    assert type(hfcompress.load(tmp_path / "small")) is BertForSequenceClassification
    assert json.loads((tmp_path / "small" / "results.json").read_text())["name"] == "small"


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path, monkeypatch, capfd):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save(tmp_path, "classifier")
    assert run("classifier", "--eval", "films.csv", preset="nf4") == 0
    rows = read_results(tmp_path / "small")["rows"]
    assert rows[1]["metric"]["value"] == accuracy_by_hand(tmp_path / "small", 40) and rows[1]["latency"]["rounds"] == 15
    (tmp_path / "small" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(RuntimeError, match="could not be measured"):
        beside.measure_beside("classifier", tmp_path / "small", hfcompress.Recipe(), name="nf4")
    said = capfd.readouterr().err
    assert "hfcompress: " in said and "Traceback" not in said
