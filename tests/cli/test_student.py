"""The command that makes a student: what it writes, what it says, and its errors in one line."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfcompress
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.checkpoints.record import read_steps
from hfcompress.cli.main import main
from hfcompress.distillation import make_student
from tests.families import make_inputs, make_model, run_model
from tests.vocabulary.models import make


@pytest.fixture
def saved(tmp_path):
    """A folder with model and tokenizer."""
    model, tokenizer = make("bert classifier")
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path


def run(folder, output, *arguments):
    try:
        return main(["student", str(folder / "teacher"), str(output), *map(str, arguments)])
    except SystemExit as end:  # from the parser
        return end.code


def rows_of(printed):
    """The table, by the names of its rows."""
    rows = (line.rsplit(None, 3) for line in printed.splitlines() if line.endswith("%"))
    return {
        name.strip(): (int(before.replace(",", "")), int(after.replace(",", ""))) for name, before, after, _ in rows
    }


def test_it_writes_a_folder_that_loads(saved, capsys):
    target = saved / "student"
    assert run(saved, target, "--layers", "1", "--neurons", "8") == 0
    printed = capsys.readouterr()
    teacher = hfcompress.load(saved / "teacher")
    student = AutoModelForSequenceClassification.from_pretrained(target)
    expected = make_student(teacher, layers=1, neurons=8)
    inputs = AutoTokenizer.from_pretrained(target)(["a b c", "d"], padding=True, return_tensors="pt")
    assert torch.equal(run_model(student, inputs)["logits"], run_model(expected, inputs)["logits"])
    counts = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    layers = teacher.config.num_hidden_layers
    table = rows_of(printed.out)
    assert table["layers of the encoder"] == (layers, 1)
    assert table["neurons"] == (layers * teacher.config.intermediate_size, 8)
    assert table["parameters"] == tuple(counts)
    assert printed.out.splitlines()[-2] == f"{counts[1]:,} parameters copied, 0 fresh"
    assert printed.out.splitlines()[-1] == f"{target}: loads again with transformers alone"
    assert read_steps(student.config) == [
        {"step": "student", "teacher": "teacher", "initialize": "teacher", "choices": {"layers": 1, "neurons": 8}}
    ]
    assert {file.name for file in target.iterdir()} >= {"README.md", "tokenizer.json", "model.safetensors"}
    # A second time there is something in the way.
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    assert run(saved, target, "--layers", "1") == 2
    assert capsys.readouterr().err == f"hfcompress: {target} is not empty; give another folder\n"
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_numbers_of_layers_and_heads_without_a_plain_config(saved, capsys):
    make_model("bert", "AutoModelForSequenceClassification").save_pretrained(saved / "teacher")
    target = saved / "student"
    assert run(saved, target, "--layers", "0,2", "--heads", "3") == 0
    assert (target / MODELING_FILE).exists() and capsys.readouterr().out.endswith(f"{target}: loads again\n")
    teacher, student = (hfcompress.load(folder) for folder in (saved / "teacher", target))
    expected, inputs = make_student(teacher, layers=[0, 2], heads=3), make_inputs("bert")
    assert torch.equal(run_model(student, inputs)["logits"], run_model(expected, inputs)["logits"])


def test_stacks_have_choices_of_their_own(saved, capsys):
    make_model("t5", "AutoModelForSeq2SeqLM").save_pretrained(saved / "teacher")
    assert run(saved, saved / "student", "--layers", "encoder=2", "decoder=0,") == 0
    table = rows_of(capsys.readouterr().out)
    assert (table["layers of the encoder"], table["layers of the decoder"]) == ((3, 2), (2, 1))


def test_fields_of_the_config_and_random_weights(saved, capsys):
    def weights(folder):
        return hfcompress.load(folder).state_dict()

    settings = ("--config", "intermediate_size=8", "hidden_dropout_prob=0.3")
    assert run(saved, saved / "changed", *settings) == 0
    assert "fresh in " in capsys.readouterr().out.splitlines()[-2]
    student = hfcompress.load(saved / "changed")
    assert (student.config.intermediate_size, student.config.hidden_dropout_prob) == (8, 0.3)
    name = "bert.embeddings.word_embeddings.weight"
    teacher = weights(saved / "teacher")
    assert torch.equal(weights(saved / "changed")[name], teacher[name])
    for folder, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert run(saved, saved / folder, "--random", "--seed", seed) == 0
    assert capsys.readouterr().out.count("\n0 parameters copied, ") == 3
    one, again, two = (weights(saved / folder)[name] for folder in ("one", "again", "two"))
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(one, teacher[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to change: give --layers, --hidden, --heads, --neurons, --config or --random"),
        (["--layers", "9"], "encoder: layers=9 is not allowed: the teacher has"),
        (
            ["--layers", "x"],
            "argument --layers: 'x' is not allowed: must be a number, numbers as in 0,2,4, or encoder=6",
        ),
        (["--layers", "1", "encoder=1"], "--layers: give one choice for all stacks, or STACK=CHOICE for each"),
        (["--layers", "decoder=1"], "no such stack: decoder; the model has encoder"),
        (["--config", "intermediate_size"], "--config: 'intermediate_size' is not KEY=VALUE"),
        (["--config", "intermediat_size=8"], "has no field 'intermediat_size' (did you mean intermediate_size?)"),
        (["--hidden", "0"], "argument --hidden: '0' is not allowed: must be a whole number of 1 or more"),
    ],
)
def test_errors_are_one_line(saved, capfd, arguments, message):
    assert run(saved, saved / "student", *arguments) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("hfcompress") and message in line
    assert not (saved / "student").exists()
