"""Models measured anew and held against a contract: what is compared with what, on which examples, and what comes out."""

from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import transformers

from hfcompress.cli.main import main
from hfcompress.config import ContractConfig, DataConfig, RecipeError
from hfcompress.runs import checking
from hfcompress.runs.checking import check_folder
from hfcompress.runs.evaluation import measure_and_keep
from tests.hub.folders import row, write_results
from tests.scripts import material

TIMING = {"batch": 2, "length": 8, "rounds": 6, "warmup": 0, "threads": 1, "device": "cpu"}
LOOSE = ContractConfig(max_drop=200.0, min_speedup=0.01, max_mb=100.0, max_latency_ms=60_000.0)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A run as it lies on disk: a teacher that says "down" to everything, a student that says "up", and their data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        folder = tmp_path_factory.mktemp("origin")
        material.text_classification(folder)
        run = folder / "run"
        names = {"id2label": {0: "down", 1: "up"}, "label2id": {"down": 0, "up": 1}, "num_labels": 2}
        for name, says in (("teacher", 0), ("student", 1), ("student-copy", 0)):
            torch.manual_seed(0)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", **names)
            with torch.no_grad():
                model.classifier.weight.zero_()
                model.classifier.bias.copy_(torch.eye(2)[says])
            model.save_pretrained(run / name)
            transformers.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(run / name)
        rows = [row(name, name, 0.5) for name in ("teacher", "student", "student-copy")]
        write_results(run, rows=rows)
        yield folder


@pytest.fixture
def run(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "run"
    shutil.copytree(origin / "run", folder)
    data = {
        "train": str(origin / "train.jsonl"),
        "eval": str(origin / "eval.jsonl"),
        "text": "what was said",
        "label": "mood",
    }
    recipe = {"task": "text-classification", "data": data, "measure": TIMING, "seed": 1, "distill": {}}
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "output": str(folder)}))
    return folder


def test_a_student_against_the_teacher_beside_it(run):
    """Of the 8 examples every other is "up": both are right on 4, never on the same."""
    found = check_folder(run / "student", LOOSE)
    assert [row["name"] for row in found.rows] == ["baseline", "student"]
    assert [row["metric"]["value"] for row in found.rows] == [0.5, 0.5] and found.rows[0]["metric"]["n"] == 8
    change = found.rows[1]["change"]
    assert change["drop"] == 0.0 and change["low"] < -50 < 50 < change["high"], "they never agree"
    assert [entry["right"] for entry in found.rows[0]["classes"]] == [4, 0]
    assert [entry["right"] for entry in found.rows[1]["classes"]] == [0, 4]
    assert [clause.status for clause in found.clauses["student"]] == ["met"] * 4 and found.verdict == "met"
    latency = found.rows[1]["latency"]
    assert (latency["batch"], latency["length"], latency["rounds"]) == (2, 8, 6) and latency["low"] <= latency[
        "median_ms"
    ]


def test_failed_and_undecided(run):
    assert check_folder(run / "student", ContractConfig(min_speedup=50.0)).verdict == "failed"
    assert check_folder(run / "student", ContractConfig(max_mb=0.01)).verdict == "failed"
    found = check_folder(run / "student", ContractConfig(max_drop=1.0))
    assert found.verdict == "undecided" and "examples would decide it" in found.clauses["student"][0].note
    few = check_folder(run / "student", ContractConfig(min_speedup=0.01), measure={"rounds": 3})
    assert few.verdict == "undecided"


def test_all_models_of_a_run_one_is_enough(run, capsys):
    found = check_folder(run, ContractConfig(max_drop=50.0))
    assert list(found.clauses) == ["student", "student-copy"]
    assert [clauses[0].status for clauses in found.clauses.values()] == ["undecided", "met"] and found.verdict == "met"
    assert found.rows[2]["origin"] == "student" and found.rows[2]["change"]["drop"] == 0


def test_without_scores_no_data_are_needed(run, monkeypatch):
    monkeypatch.setattr(checking, "prepare_for", lambda *_: pytest.fail("data were read"))
    found = check_folder(run / "student", ContractConfig(max_mb=100.0))
    assert found.verdict == "met" and "metric" not in found.rows[0]


def test_the_contract_of_the_recipe_or_of_the_folder(run):
    with pytest.raises(ValueError, match="there is nothing to check: give --max-drop"):
        check_folder(run / "student", None)
    recipe = json.loads((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(json.dumps({**recipe, "contract": {"max_mb": 0.01}}))
    assert check_folder(run / "student", None).verdict == "failed"
    alone = run.parent / "alone"
    shutil.copytree(run / "student", alone)
    write_results(alone, rows=[], contract={"max_mb": 100.0})
    assert check_folder(alone, None, baseline=run / "teacher", measure=TIMING).verdict == "met"


def test_a_folder_alone_with_a_baseline_and_data(run, origin):
    alone = run.parent / "alone"
    shutil.copytree(run / "student", alone)
    contract = ContractConfig(max_drop=200.0)
    with pytest.raises(ValueError, match=r"the baseline of .*alone is not beside it; .* as --baseline"):
        check_folder(alone, contract)
    with pytest.raises(ValueError, match="there is no run beside it that says what to score on; give --data"):
        check_folder(alone, contract, baseline=run / "teacher", measure=TIMING)
    file = str(origin / "eval.jsonl")
    data = DataConfig(train=file, eval=file, text="what was said", label="mood")
    found = check_folder(alone, contract, baseline=run / "teacher", data=data, measure=TIMING)
    assert found.rows[1]["metric"]["n"] == 8 and found.verdict == "met"
    # The folder that results.json names, if it is beside.
    write_results(alone, rows=[row("dense", "teacher-copy", 0.5), row("alone", ".", 0.5)])
    shutil.copytree(run / "teacher", run.parent / "teacher-copy")
    assert check_folder(alone, contract, data=data, measure=TIMING).rows[0]["folder"].endswith("teacher-copy")


@pytest.mark.parametrize("name", ["nothing", "empty", "unfinished"])
def test_folders_that_hold_no_model(name, tmp_path):
    for folder in ("empty", "unfinished"):
        (tmp_path / folder).mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("seed: 1")
    with pytest.raises(ValueError) as caught:
        check_folder(tmp_path / name, LOOSE)
    assert len(str(caught.value).splitlines()) == 1


# ---- the command ----


@pytest.mark.parametrize(
    ("bounds", "status"), [(["--max-mb", "100"], 0), (["--max-mb", "0.01"], 1), (["--max-drop", "1"], 3)]
)
def test_exit_statuses(bounds, status, run, capsys):
    assert main(["check", str(run / "student"), *bounds]) == status
    out = capsys.readouterr().out
    word = {0: "met", 1: "failed", 3: "undecided"}[status]
    assert f"\nstudent: {word}\n" in out and f": {word}" in out.splitlines()[-1]


def test_as_json(run, capsys):
    assert main(["check", str(run), "--max-drop", "50", "--json", "--rounds", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "met" and found["rows"][0]["latency"]["rounds"] == 7
    clause = found["models"]["student"]["clauses"][0]
    assert (clause["name"], clause["bound"], clause["status"]) == ("max_drop", 50.0, "undecided")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-mb", "0"], "contract.max_mb: 0.0 is not allowed"),
        (["--label", "mood", "--max-mb", "1"], "are columns of --data; give that as well"),
        (["--max-drop", "1", "--data", "nothing.csv"], "nothing.csv"),
        (["--max-drop", "1", "--baseline", "nothing"], "nothing holds no model"),
        ([], "there is nothing to check"),
    ],
)
def test_arguments_that_are_wrong_are_no_verdict(arguments, message, run, capsys):
    assert main(["check", str(run / "student"), *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.splitlines()) == 1 and said.out == ""


def test_recipes_are_checked_too(run):
    (run / "recipe.yaml").write_text("sed: 1")
    with pytest.raises(RecipeError, match="did you mean seed"):
        check_folder(run / "student", LOOSE)


# ---- steps ----


def test_each_step_is_compared_with_what_it_was_made_from(run):
    """The copy answers like the teacher: against the first nothing changed, against the student everything did."""
    folders = {name: run / name for name in ("teacher", "student", "student-copy")}
    config = checking.MeasureConfig(**TIMING)
    truth = np.array([0, 1] * 4)
    from hfcompress.measurement import Answers, accuracy

    def rate(model):
        says = np.full(8, int(model.classifier.bias.argmax()))
        return accuracy(says, truth), Answers.of_classes(says, truth)

    found = measure_and_keep(folders, rate, config, origins={"student-copy": "student"}, class_names=["down", "up"])
    first, student, copy = found.rows
    assert "origin" not in first and "change" not in first and student["origin"] == "teacher" and "step" not in student
    assert copy["origin"] == "student" and copy["step"]["change"]["drop"] == 0 == copy["change"]["drop"]
    assert copy["change"]["high"] < 50 < copy["step"]["change"]["high"]
    assert copy["step"]["speedup"]["median"] > 0 and list(found.answers) == list(folders)
    assert copy["classes"] == [{"name": "down", "n": 4, "right": 4}, {"name": "up", "n": 4, "right": 0}]
