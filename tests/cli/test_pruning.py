"""`hfcompress prune` and `hfcompress sensitivity` on a tiny classifier."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
import torch
from PIL import Image

import hfcompress
from hfcompress.checkpoints.record import read_steps
from hfcompress.cli.main import main
from hfcompress.hub import verify
from hfcompress.pruning import Plan, cut
from tests.families import make_model
from tests.hub.folders import all_fine
from tests.tasks.conftest import save_bert

TIMING = ["--batch", "2", "--length", "8", "--threads", "1", "--device", "cpu", "--samples", "16"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path_factory.mktemp("tables")))
    monkeypatch.setattr(verify, "_run_child", all_fine)


@pytest.fixture
def fail(capsys):
    """Runs a command that has to fail, and gives the last line on stderr, after what was being done."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        seen = capsys.readouterr()
        assert seen.out == "" and "Traceback" not in seen.err
        lines = [line for line in seen.err.splitlines() if line.startswith("hfcompress: ")]
        assert len(lines) == 1 and seen.err.endswith(f"{lines[0]}\n"), seen.err
        return lines[0]

    return run


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_bert(folder / "bert", names=["fine", "poor"])
    rows = [("a good film", "fine"), ("not very bad", "fine"), ("a bad film", "poor"), ("very bad", "poor")] * 10
    (folder / "data.csv").write_text("said,verdict\n" + "".join(f"{text},{label}\n" for text, label in rows))
    (folder / "texts.txt").write_text("\n".join(text for text, _ in rows))
    return folder


def test_prune(material, tmp_path, capsys):
    output = tmp_path / "small"
    options = ["--data", str(material / "data.csv"), "--label", "verdict", "--output", str(output), *TIMING]
    assert main(["prune", str(material / "bert"), *options, "--sparsity", "0.4", "--units", "heads", "sublayers"]) == 0
    seen = capsys.readouterr()
    assert "== Calibrating on 16 examples\n" in seen.err
    lines = seen.out.splitlines()
    assert lines[0].split() == ["layer", "heads", "neurons"] and lines[1].startswith("encoder.0 ")
    assert "accuracy (n=4)" in lines[3] and lines[4].startswith("dense ") and lines[5].startswith("pruned ")
    assert lines[-1] == f"{output}: loads again by every way its card names (hfcompress push {output} user/name)"
    [step] = read_steps(hfcompress.load(output).config)
    settings = step["settings"]
    assert settings["units"] == ["heads", "sublayers"] and settings["target"]["sparsity"] == 0.4
    assert settings["criterion"]["samples"] == 16 and step["sparsity"] >= 0.4
    results = json.loads((output / "results.json").read_text())
    latency = results["rows"][0]["latency"]
    assert (latency["batch"], latency["length"], latency["threads"]) == (2, 8, 1)
    assert (output / "README.md").is_file()


def test_prune_by_time_without_labels_and_without_repair(material, tmp_path, capsys):
    output = tmp_path / "small"
    options = ["--data", str(material / "texts.txt"), "--output", str(output), *TIMING]
    options += ["--speedup", "1.1", "--no-repair", "--criterion", "fisher", "--scope", "layers"]
    assert main(["prune", str(material / "bert"), *options]) == 0
    assert "accuracy" not in capsys.readouterr().out
    [step] = read_steps(hfcompress.load(output).config)
    assert step["settings"]["repair"] is False and step["settings"]["criterion"]["name"] == "fisher"
    assert step["reached"][0]["wanted"] == pytest.approx(1.1) and step["settings"]["target"]["scope"] == "layers"


def test_uniform_models_need_nothing_of_ours(material, tmp_path, capsys):
    wide = make_model("bert", "AutoModelForSequenceClassification", intermediate_size=64)
    wide.save_pretrained(tmp_path / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(material / "bert" / name, tmp_path / "wide")
    output = tmp_path / "small"
    options = ["--data", str(material / "texts.txt"), "--output", str(output), *TIMING]
    assert (
        main(["prune", str(tmp_path / "wide"), *options, "--uniform", "--units", "neurons", "--sparsity", "0.2"]) == 0
    )
    assert not (output / "modeling_hfcompress.py").exists()
    assert json.loads((output / "config.json").read_text())["intermediate_size"] in (16, 32)
    assert "neurons" in capsys.readouterr().out


def test_what_cannot_be_done_is_one_line_and_writes_nothing(material, tmp_path, fail, monkeypatch):
    monkeypatch.chdir(material)
    bert, output = material / "bert", tmp_path / "small"
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    (tmp_path / "broken.csv").write_bytes(b"\xff\xfe\x00\x01" * 10)

    def prune(data, *more, to=output):
        return fail("prune", bert, "--data", data, "--output", to, *TIMING, *(more or ("--sparsity", "0.3")))

    assert prune("no.csv") == "hfcompress: --data: 'no.csv' is neither a file nor a folder"
    assert prune("data.csv", "--sparsity", "0.3", "--text", "sayd") == (
        "hfcompress: --text: column 'sayd' is not in the data; there are: said, verdict; did you mean 'said'?"
    )
    assert "--label: column 'verdikt' is not in the data; there are: said, verdict; did you mean 'verdict'?" in prune(
        "data.csv", "--sparsity", "0.3", "--label", "verdikt"
    )
    assert "--data: broken.csv" in prune(tmp_path / "broken.csv")
    said = prune("texts.txt", "--parameters", "0.01")
    assert said.startswith("hfcompress: target parameters 0.01 is out of reach: ") and "at least" in said
    assert "max_drop needs data to score on" in prune("texts.txt", "--max-drop", "1")
    assert "the criterion learned needs training" in prune("texts.txt", "--sparsity", "0.3", "--criterion", "learned")
    assert "is not empty; give another --output" in prune("texts.txt", to=full)
    assert "is not empty; give another --output" in prune("texts.txt", to=full / "thesis.tex")
    assert not output.exists() and [path.name for path in full.iterdir()] == ["thesis.tex"]
    sensitivity = fail("sensitivity", bert, "--data", "no.csv", "--picture", tmp_path / "a.png")
    assert sensitivity == "hfcompress: --data: 'no.csv' is neither a file nor a folder"
    assert "learned gates need a training run to learn in" in fail(
        "sensitivity", bert, "--data", "texts.txt", "--criterion", "learned"
    )
    assert not (tmp_path / "a.png").exists()


def test_sensitivity(material, tmp_path, capsys):
    options = ["--data", str(material / "texts.txt"), "--length", "8", "--samples", "8", "--device", "cpu"]
    picture = tmp_path / "worth.png"
    assert main(["sensitivity", str(material / "bert"), *options, "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("nats per example with") and lines[0].endswith("of the units left")
    assert [line.split()[0] for line in lines[1:3]] == ["encoder.0.heads", "encoder.0.neurons"]
    ends = [lines[0].index(f"{share} %") + len(f"{share} %") for share in (75, 50, 25)]
    assert all(lines[2][end - 1].isdigit() and lines[2][end : end + 1] in ("", " ") for end in ends), "aligned"
    assert lines[-1] == f"drawn in {picture}"
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    assert main(["sensitivity", str(material / "bert"), *options, "--json", "--criterion", "magnitude"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == [], "the only layer cannot go"
    found = found["sites"]
    assert [entry["site"] for entry in found] == ["encoder.0.heads", "encoder.0.neurons"]
    assert found[1]["left"] == [6, 4, 2, 0] and len(found[1]["divergence"]) == len(found[1]["expected"]) == 4


def test_inspect_says_what_is_left_of_layers_and_features(tmp_path, capsys):
    model = make_model("bert", "AutoModelForSequenceClassification")
    plan = Plan({"encoder.2.heads": (0,)}, {"encoder": (0, 2)}, tuple(range(24)))
    cut(model, plan)
    model.save_pretrained(tmp_path / "small")
    assert main(["inspect", str(tmp_path / "small"), "--picture", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["layer", "encoder.0", "encoder.1", "encoder.gone 1"]
    assert lines[2].split()[2] == "1/4" and lines[3].split()[3::2] == ["0/4", "0/48"]
    assert lines[-3:-1] == ["layers of the encoder: 2 of 3 (67%)", "hidden features: 24 of 32 (75%)"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[1] == pytest.approx(150 * (0.32 * 3 + 1.5), abs=1)
    assert main(["inspect", str(tmp_path / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("layers") == {"encoder": {"left": 2, "before": 3}} and len(found) == 5
    assert found["hidden"] == {"left": 24, "before": 32} and found["encoder.1.heads"] == {"left": 1, "before": 4}


def test_messages_name_options_and_leave_file_names_alone(tmp_path, fail, monkeypatch):
    from hfcompress.cli.arguments import _OPTIONS, _as_options

    said = {
        "data.train: 'data.train.csv' is gone": "--data: 'data.train.csv' is gone",
        "set data.label to one of a, b; see ./data.csv": "set --label to one of a, b; see ./data.csv",
        "data.max_length and data.max_eval": "--length and --max-eval",
        "/tmp/data.text/x and my-data.text": "/tmp/data.text/x and my-data.text",
        "data: a column is named twice": "data: a column is named twice",
    }
    assert {text: _as_options(text, _OPTIONS) for text in said} == said


def test_a_pruned_model_keeps_its_type(material, tmp_path, capsys):
    model = hfcompress.load(material / "bert").to(torch.bfloat16)
    (tmp_path / "half").mkdir()
    model.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(material / "bert" / name, tmp_path / "half")
    options = ["--data", str(material / "texts.txt"), "--output", str(tmp_path / "small"), *TIMING]
    assert main(["prune", str(tmp_path / "half"), *options, "--flops", "0.9"]) == 0
    assert hfcompress.load(tmp_path / "small").dtype == torch.bfloat16
    capsys.readouterr()
