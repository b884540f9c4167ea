"""The command that cuts the vocabulary: what it writes, what it says, and its errors in one line."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoTokenizer

import hfcompress
from hfcompress.checkpoints.record import read_steps
from hfcompress.cli.main import main
from tests.families import largest_difference, run_model
from tests.vocabulary.models import make
from tests.vocabulary.tokenizers import STRANGE, sentences


@pytest.fixture
def saved(tmp_path):
    """A folder with model and tokenizer, and a file of texts."""
    model, tokenizer = make("bert classifier")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(sentences(0)))
    return tmp_path


def run(folder, *arguments):
    try:
        return main(["vocabulary", str(folder / "model"), *map(str, arguments)])
    except SystemExit as end:  # from the parser
        return end.code


def test_it_writes_a_folder_that_says_the_same(saved, capsys):
    target = saved / "smaller"
    assert run(saved, "--data", saved / "texts.txt", "--coverage", "1", "--output", target) == 0
    lines = capsys.readouterr().out.splitlines()
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (saved / "model", target))
    models = [hfcompress.load(folder) for folder in (saved / "model", target)]
    inputs = [dict(t(list(sentences(0)[:5]), padding=True, return_tensors="pt")) for t in (old, new)]
    assert not torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    assert largest_difference(run_model(models[0], inputs[0]), run_model(models[1], inputs[1])) < 1e-6
    tokens = len(new)
    assert tokens % 8 == 0 and tokens < 405
    parameters = [sum(p.numel() for p in model.parameters()) for model in models]
    assert lines[0].split() == ["before", "after"]
    assert lines[1].split() == ["tokens", "405", str(tokens), f"{tokens / 405:.0%}"]
    assert lines[2].split()[:3] == ["parameters", *(f"{n:,}" for n in parameters)]
    assert lines[3].split()[:1] == ["MB"]
    assert lines[4] == "tokens of the data that stay: 100.00%; texts encoded as before: 100.00%"
    assert lines[5] == f"{target}: loads again"
    assert read_steps(models[1].config) == [{"step": "vocabulary", "left": tokens, "before": 405}]
    assert {file.name for file in target.iterdir()} >= {"README.md", "tokenizer.json", "model.safetensors"}
    assert new.tokenize(STRANGE) == old.tokenize(STRANGE)
    # A second time there is something in the way.
    assert run(saved, "--data", saved / "texts.txt", "--output", target) == 2
    assert capsys.readouterr().err == f"hfcompress: {target} is not empty; give another --output\n"


def test_a_number_of_tokens(saved, capsys):
    target = saved / "smaller"
    assert run(saved, "--data", saved / "texts.txt", "--size", "120", "--output", target) == 0
    out = capsys.readouterr().out
    assert "texts encoded as before: 100.00%" not in out and len(AutoTokenizer.from_pretrained(target)) == 120
    (saved / "model").rename(saved / "first")
    target.rename(saved / "model")
    assert run(saved, "--data", saved / "texts.txt", "--size", "4000", "--output", target) == 2
    message = "nothing to remove: all 120 tokens would stay; give a smaller size or coverage"
    assert capsys.readouterr().err.splitlines()[-1] == f"hfcompress: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "3"], r"size 3 is too small: \d+ tokens have to stay"),
        (["--size", "40", "--coverage", "0.9"], "argument --coverage: not allowed with argument --size"),
        (["--coverage", "1.5"], "argument --coverage: '1.5' is not allowed: must be a number above 0 and at most 1"),
        (["--text", "body"], "--text: column 'body' is not in the data; there are: text"),
    ],
)
def test_errors_are_one_line(saved, capfd, arguments, message):
    assert run(saved, "--data", saved / "texts.txt", *arguments, "--output", saved / "smaller") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("hfcompress")
    assert re.search(message, line), line
    assert not (saved / "smaller").exists()


def test_a_file_that_is_not_there(saved, capsys):
    assert run(saved, "--data", saved / "no.csv", "--output", saved / "smaller") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"hfcompress: --data: '{saved / 'no.csv'}' is neither a file nor a folder"
