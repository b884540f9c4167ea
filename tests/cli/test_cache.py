"""`hfcompress cache-teacher`: what it writes, what it says, and that training finds all of it."""

from __future__ import annotations

import json
import logging
import re

import datasets
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification, ViTImageProcessor

import hfcompress
from hfcompress.cli.main import main
from hfcompress.config import DataConfig
from hfcompress.distillation import CachingCollator, Teacher, TeacherCache
from hfcompress.tasks import prepare
from tests.tasks.conftest import save_bert, save_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_bert(folder / "bert", names=["fine", "poor"])
    texts = ["a good film", "not very bad", "a bad film", "very bad", "very very bad film", "a not good film"]
    rows = [(text, "poor" if "bad" in text else "fine") for text in texts] * 4
    (folder / "data.csv").write_text("sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    (folder / "texts.txt").write_text("\n".join([text for text, _ in rows] * 5))
    return folder


def run(*arguments):
    try:
        return main(["cache-teacher", *map(str, arguments)])
    except SystemExit as end:  # from the parser
        return end.code


def test_a_classifier(material, tmp_path, capsys, caplog):
    options = [material / "bert", "--data", material / "data.csv", "--output", tmp_path / "c", "--batch", "4"]
    with caplog.at_level(logging.INFO, logger="hfcompress"):
        assert run(*options, "--hidden-layers", "0") == 0
    seen = capsys.readouterr()
    said = r"6 examples, (\d+) tokens: about [\d.]+ kB in \S+/c; [\d.]+ GB free"  # of 24, which are not all different
    assert re.search(said, caplog.text) and "asking the teacher" in seen.err
    last = seen.out.splitlines()[-1]
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    tokens, size = manifest["tokens"], manifest["size_bytes"]
    assert last == (
        f"{tmp_path / 'c'}: logits in float32 and hidden states of layers 0 of bert for 6 examples, {tokens} tokens; "
        f"{size / 1e3:.1f} kB ({size / tokens:,.0f} bytes per token)"
    )
    assert str(material) not in json.dumps(manifest)
    # With any seed, what is trained on is there, and right.
    cache, teacher, batches = TeacherCache.open(tmp_path / "c"), Teacher(hfcompress.load(material / "bert")), 0
    data = DataConfig(train=str(material / "data.csv"))
    for seed in (0, 1, 2):
        task = prepare(data, task="text-classification", model_name=str(material / "bert"), seed=seed, must_match=True)
        rows = [task.train_dataset[i] for i in range(len(task.train_dataset))]
        batch = CachingCollator(task.data_collator, cache)(rows)
        inputs = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
        expected = teacher(inputs).outputs["logits"]
        torch.testing.assert_close(batch["teacher_logits"], expected, atol=1e-5, rtol=1e-4)
        batches += 1
    assert batches == 3 and batch["teacher_hidden_0"].shape[:2] == batch["input_ids"].shape
    # Started again there is nothing to do.
    before = (tmp_path / "c" / "shard-00000.safetensors").stat().st_mtime_ns
    assert run(*options, "--hidden-layers", "0") == 0
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (tmp_path / "c" / "shard-00000.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("option", "names"),
    [
        (["--top-k", "4"], {"top_indices", "top_log_probs", "tail_log_mass", "tail_indices", "tail_mean_log_prob"}),
        (["--samples", "9"], {"sample_indices"}),
        (["--last-hidden"], {"last_hidden"}),
        (["--logits", "--dtype", "float16"], {"logits"}),
    ],
)
def test_a_language_model(material, tmp_path, capsys, option, names):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    options = ["--data", material / "texts.txt", "--length", "8", "--output", tmp_path / "c"]
    assert run(tmp_path / "llama", *options, *option) == 0
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.manifest.arrays.keys() == names and cache.manifest.tokens == 8 * len(cache)
    assert "bytes per token" in capsys.readouterr().out


def test_images(tmp_path, capsys):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for number in range(8):
        name = config.id2label[number % 2]
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 0, 200)).save(tmp_path / "images" / name / f"{number}.png")
    assert run(tmp_path / "vit", "--data", tmp_path / "images", "--output", tmp_path / "c") == 0
    assert re.search(
        r"logits in float32 of vit for 8 examples; [\d.]+ kB \(\d+ bytes per example\)$", capsys.readouterr().out
    )


def test_teacher_and_data_of_a_recipe(material, tmp_path, capsys):
    text = (
        f"task: text-classification\nteacher: {{name: {material / 'bert'}}}\ndata: {{train: {material / 'data.csv'}}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(f"{text}distill: {{}}\noutput: {tmp_path / 'run'}\n")
    assert run(tmp_path / "recipe.yaml", "--output", tmp_path / "c", "--device", "cpu") == 0
    assert len(TeacherCache.open(tmp_path / "c")) == 6 and "of bert for 6 examples" in capsys.readouterr().out
    assert run(tmp_path / "recipe.yaml", "--data", material / "data.csv", "--output", tmp_path / "d") == 2
    assert "a recipe says which data; leave out --data" in capsys.readouterr().err
    (tmp_path / "none.yaml").write_text(text.replace("teacher", "model"))
    assert run(tmp_path / "none.yaml", "--output", tmp_path / "d") == 2
    assert "the recipe names no teacher, or several; set teacher.name to one" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_what_a_launcher_started_shares_the_work(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [material / "bert", "--data", material / "data.csv", "--output", tmp_path / "c"]
    for rank, last in (("1", "this process is done; others are still writing"), ("0", "for 6 examples")):
        monkeypatch.setenv("RANK", rank)
        assert run(*options) == 0
        assert last in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data, or a recipe"),
        (["--data", "no.csv"], "--data: 'no.csv' is neither a file nor a folder"),
        (["--data", "data.csv", "--top-k", "3"], "there are no top 3 of 2 classes; keep all logits"),
        (["--data", "data.csv", "--hidden-layers", "4"], "hidden_layers has 4, but the teacher's layers are 0 to 0"),
        (["--data", "data.csv", "--hidden-layers", "first"], "'first' is not allowed: must be layers counted from 0"),
        (["--data", "data.csv", "--top-k", "3", "--logits"], "argument --logits: not allowed with argument --top-k"),
        (["--data", "data.csv", "--task", "reading"], "task"),
        (["--data", "data.csv", "--text", "sayd"], "--text: column 'sayd' is not in the data"),
    ],
)
def test_errors_are_one_line_and_write_nothing(material, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(material)
    assert run(material / "bert", *arguments, "--output", tmp_path / "c") == 2
    seen = capsys.readouterr()
    lines = [line for line in seen.err.splitlines() if line.startswith("hfcompress")]
    assert len(lines) == 1 and message in lines[0] and seen.out == ""
    assert not (tmp_path / "c").exists()
