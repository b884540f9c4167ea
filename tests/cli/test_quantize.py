"""The command that quantizes: on data and without, packed and with bitsandbytes, and its errors in one line."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import hfcompress
from hfcompress.checkpoints.packed import PackedLinear
from hfcompress.checkpoints.record import read_steps
from hfcompress.cli.main import main
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize
from tests.families import run_model
from tests.vocabulary.models import make

WORDS = ("a b c", "d e", "c c a", "b", "e d c b a", "a", "d d", "b e")


@pytest.fixture
def saved(tmp_path):
    model, tokenizer = make("bert classifier")
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    lines = [f"{WORDS[n % 8]},{n % 2}" for n in range(24)]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return tmp_path, tokenizer


def run(folder, *arguments, measure=False):
    arguments = [*map(str, arguments), *([] if measure else ["--no-measure"])]
    try:
        return main(["quantize", str(folder / "teacher"), *arguments])
    except SystemExit as end:
        return end.code


def bnb_or_packed(model):
    return [
        module
        for module in model.modules()
        if isinstance(module, PackedLinear) or type(module).__module__.startswith("bitsandbytes")
    ]


@pytest.mark.parametrize("written", ["int4-g8-asym", "nf4-dq", "ternary-channel", "codebook3"])
def test_on_data(saved, capsys, written):
    folder, tokenizer = saved
    target = folder / "out"
    given = ("--preset", written, "--data", folder / "films.csv", "--samples", 8, "--length", 8, "--output", target)
    assert run(folder, *given, "--keep", folder / "kept") == 0
    printed = capsys.readouterr().out
    assert "on 8 examples" in printed and printed.splitlines()[-1].endswith("; loads again")
    whole, model = hfcompress.load(folder / "teacher"), hfcompress.load(target)
    assert len(bnb_or_packed(model)) == len(layers_to_quantize(whole)) >= 6
    inputs = tokenizer(["a b c", "d"], padding=True, return_tensors="pt")
    ours, theirs = run_model(model, inputs)["logits"], run_model(whole, inputs)["logits"]
    assert not torch.equal(ours, theirs)
    (step,) = read_steps(model.config)
    assert step["layers"] == {format_of(written).name: len(bnb_or_packed(model))}
    assert (step["method"], step["calibration_n"]) == ("second order", 8)
    card = (target / "README.md").read_text()
    assert "rounded on 8 examples" in card and format_of(written).name in card
    assert "kept" not in {path.name for path in target.iterdir()} and (folder / "kept" / "plan.json").is_file()


def test_without_data(saved, capsys):
    folder, _ = saved
    assert run(folder, "--preset", "int3-g8", "--output", folder / "out", "--dtype", "bfloat16") == 0
    model = hfcompress.load(folder / "out")
    assert model.dtype == torch.bfloat16 and model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    packed = bnb_or_packed(model)
    assert {module.scale.dtype for module in packed} == {torch.float16}
    assert "each weight to the nearest number" in (folder / "out" / "README.md").read_text()


def test_a_format_for_each_layer(saved, capsys):
    folder, _ = saved
    names = layers_to_quantize(hfcompress.load(folder / "teacher"))
    layers = {name: ("int8-channel", "int3-g8", "nf4", "float32")[n % 4] for n, name in enumerate(names)}
    (folder / "bits.json").write_text(json.dumps({"layers": layers}))
    assert run(folder, "--layers", folder / "bits.json", "--output", folder / "out") == 0
    model = hfcompress.load(folder / "out")
    for name, written in layers.items():
        module = model.get_submodule(name)
        kind = {"nf4": "Linear4bit", "float32": "Linear"}.get(written, "PackedLinear")
        assert type(module).__name__ == kind
        assert kind != "PackedLinear" or module.scheme.name == written


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "int9"], "'int9' is not allowed; did you mean int8?"),
        (["--preset", "int8-dynamc"], "'int8-dynamc' is not allowed; did you mean int8-dynamic?"),
        (["--preset", "int3", "--data", "nothing.csv"], "nothing.csv"),
        (["--preset", "int3", "--storage", "bfloat16"], "--storage is for a preset of bitsandbytes without --data"),
        (["--preset", "nf4", "--keep", "kept"], "--keep is for --data"),
        (["--preset", "int8-dynamic", "--keep", "kept", "--data", "films.csv"], "--keep is for --data"),
        (["--preset", "nf4", "--eval", "films.csv"], "--eval is what is scored on; leave out it or --no-measure"),
        (
            ["--preset", "nf4", "--label", "label"],
            "--text, --image and --label are columns of --data and --eval; give one",
        ),
        (["--layers", "films.csv"], "does not say how layers are written"),
        (["--preset", "int3", "--skip", "no.such"], "not a module"),
        (["--preset", "int3", "--output", "teacher"], "is not empty; give another --output"),
        ([], "one of the arguments --preset --layers is required"),
    ],
)
def test_errors_in_one_line(saved, capsys, monkeypatch, arguments, message):
    folder, _ = saved
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert run(folder, *arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and "Traceback" not in "".join(said)
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing was written"


def test_a_quantized_model_is_not_quantized_again(saved, capsys, caplog):
    folder, _ = saved
    caplog.set_level(logging.ERROR)
    assert run(folder, "--preset", "int3-g8", "--output", folder / "out") == 0
    assert (
        main(["quantize", str(folder / "out"), "--preset", "int2", "--output", str(folder / "again"), "--no-measure"])
        == 2
    )
    assert "is quantized already" in capsys.readouterr().err
    assert not (folder / "again").exists()
