"""A run from beginning to end on a tiny model, what it leaves, and how it goes on."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import ModelCard

import hfcompress
from hfcompress.checkpoints.record import read_steps, read_units
from hfcompress.cli.main import main
from hfcompress.config import Recipe, RecipeError
from hfcompress.hub import verify
from hfcompress.hub.predictions import read_answers
from hfcompress.hub.report import write_report
from hfcompress.hub.results import read_results
from hfcompress.hub.verify import VerificationError
from hfcompress.measurement import compare_answers
from hfcompress.quantization import quantize
from hfcompress.runs import Run, format_rows, pipeline, run_recipe
from hfcompress.runs.pipeline import _thinned
from tests.hub.folders import all_fine, change, none_fine, row, speedup
from tests.tasks.conftest import save_bert

BASE = {
    "task": "text-classification",
    "distill": {"hidden": {"weight": 0.5}},
    "prune": {
        "target": {"sparsity": 0.5},
        "schedule": {"start": 0.1, "end": 0.6, "updates": 2},
        "multiple_of": {"neurons": 1},
        "at_least": {"neurons": 1},
    },
    "quantize": {"presets": ["int8"]},
    "train": {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
    },
    "measure": {"batch": 2, "length": 8, "rounds": 3, "warmup": 0, "threads": 1, "device": "cpu"},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # for the process that measures


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A pretrained model and a file of examples that anyone could learn."""
    folder = tmp_path_factory.mktemp("material")
    model = save_bert(folder / "model", base=True)
    rows = [("a good film", "fine"), ("not very bad", "fine"), ("a bad film", "poor"), ("very bad", "poor")] * 10
    (folder / "films.csv").write_text("said,verdict\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return {
        "model": {"name": model, "base_model": "somebody/base"},
        "data": {"train": str(folder / "films.csv"), "label": "verdict"},
    }


def recipe_for(material, output, **changes):
    sections = {**BASE, **material, "output": str(output), **changes}
    return Recipe.from_dict({name: section for name, section in sections.items() if section is not None})


def no_training(*_, **__):
    raise AssertionError("it trained again")


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A whole run, measured in a fresh process; loading by every way is taken for granted."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_run_child", all_fine)
        rows = run_recipe(recipe_for(material, output), command="hfcompress run tiny.yaml")
    return output, rows


def test_a_whole_run(finished):
    output, rows = finished
    assert [row["name"] for row in rows] == ["teacher", "pruned", "pruned + int8"]
    assert [row["folder"] for row in rows] == ["teacher", "student", "student-int8"]
    assert rows[2]["parameters"] == rows[1]["parameters"] < rows[0]["parameters"]
    for entry in rows:
        metric = entry["metric"]
        assert metric["n"] == 4 and 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
        assert entry["latency"]["median_ms"] > 0 and entry["disk_bytes"] > 0
    assert "speedup" not in rows[0] and "speedup" in rows[1] and "layers_speedup" in rows[2]
    results = json.loads((output / "results.json").read_text())
    assert results["rows"] == rows
    assert results["data"]["name"] == "films.csv" and (results["data"]["train_n"], results["data"]["eval_n"]) == (36, 4)
    table = format_rows(rows).splitlines()
    assert len(table) == 4 and "accuracy (n=4)" in table[0] and table[3].startswith("pruned + int8")


def test_what_the_results_hold(finished):
    output, rows = finished
    results = read_results(output)
    assert (results["name"], results["command"]) == ("tiny", "hfcompress run tiny.yaml")
    assert results["recipe"]["data"]["train"] == "path/to/films.csv" and results["recipe"]["train"]["max_steps"] == 6
    assert results["lineage"]["base"] == {"name": "somebody/base", "licence": None, "said_by": None}
    assert list(results["history"]) == ["student", "teacher"]
    assert results["history"]["student"][-1]["train_runtime"] > 0
    teacher, student, small = rows
    assert "change" not in teacher and (student["origin"], small["origin"]) == ("teacher", "pruned")
    answers, fingerprint = read_answers(output)
    assert list(answers) == [row["name"] for row in rows] and fingerprint == results["data"]["fingerprint"]
    for entry in rows:
        assert answers[entry["name"]].score() == entry["metric"]["value"]
        assert [each["name"] for each in entry["classes"]] == ["fine", "poor"]
        found = [int(np.sum(answers[entry["name"]].right & (answers[entry["name"]].labels == k))) for k in (0, 1)]
        assert [each["right"] for each in entry["classes"]] == found
    for entry in (student, small):
        expected = compare_answers(answers["teacher"], answers[entry["name"]])
        assert entry["change"] == asdict(expected)
    assert small["step"]["change"] == asdict(compare_answers(answers["pruned"], answers["pruned + int8"]))
    assert (output / "student" / "predictions.npz").read_bytes() == (output / "predictions.npz").read_bytes()
    assert "verdict" not in student


def test_the_report_of_a_run(finished):
    output, _ = finished
    page = write_report(output).read_text()
    for words in ("pruned + int8", "Training: student", "hfcompress run tiny.yaml", "fine", "path/to/films.csv"):
        assert words in page
    assert str(output.parent) not in page


def test_a_run_is_held_against_its_contract(finished, material, tmp_path, monkeypatch, capsys, local_hub):
    """The variant fails, the student keeps it: the run is fine, and the variant is not pushed."""
    done, _ = finished
    output = tmp_path / "tiny"
    shutil.copytree(done, output)
    recipe = recipe_for(material, output, push={"repo": "tester/tiny"}, contract={"max_drop": 1.0, "min_speedup": 1.5})
    (output / "recipe.yaml").write_text(recipe.to_yaml())
    (output / "results.json").unlink()
    monkeypatch.setattr(verify, "_run_child", all_fine)
    rows = [row("teacher", "teacher", 0.9)]
    for name, folder, median in (("pruned", "student", 2.0), ("pruned + int8", "student-int8", 1.1)):
        rows.append(row(name, folder, 0.9, change=change(0.0, 0.5), speedup=speedup(median)))

    def measure(self, models):
        contract = self.recipe.contract.model_dump(exclude_none=True)
        (self.output / "results.json").write_text(json.dumps({"rows": rows, "data": {}, "contract": contract}))
        return rows

    monkeypatch.setattr(Run, "measure", measure)
    run = Run(recipe, command="x")
    run.run()
    said = capsys.readouterr().err
    assert run.verdict == "met" and "Contract of pruned: met" in said and "Contract of pruned + int8: failed" in said
    assert "at least 1.5x as fast: 1.10x [1.00, 1.20]: failed" in said
    assert f"Not pushed: {output / 'student-int8'} fails the contract" in said
    assert list(local_hub.repo_ids()) == ["tester/tiny"]
    kept = read_results(output / "student-int8")
    mine = next(entry for entry in kept["rows"] if entry["folder"] == ".")
    assert mine["verdict"]["status"] == "failed" and mine["verdict"]["clauses"][1]["status"] == "failed"
    assert "**The contract of its recipe: met.**" in (output / "student" / "README.md").read_text()
    # The exit status says it, and here nothing is met any more.
    rows[1]["speedup"] = speedup(1.5)
    (output / "r.yaml").write_text(recipe.model_copy(update={"push": None}).to_yaml())
    (output / "recipe.yaml").write_text(recipe.model_copy(update={"push": None}).to_yaml())
    assert main(["run", str(output / "r.yaml")]) == 3
    rows[1]["speedup"] = speedup(1.2)
    assert main(["run", str(output / "r.yaml")]) == 1
    assert "Contract: failed" in capsys.readouterr().out


def test_a_log_is_thinned_evenly():
    log = [{"step": step, "loss": 1.0, "note": "words"} for step in range(1000)] + [{"step": 1000, "eval_loss": 0.5}]
    thin = _thinned(log)
    steps = [entry["step"] for entry in thin]
    assert len(thin) == 201 and steps[0] == 0 and steps[-2:] == [999, 1000] and steps == sorted(steps)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 6 and "note" not in thin[0]


def test_what_it_leaves_loads(finished):
    output, _ = finished
    student, small = hfcompress.load(output / "student"), hfcompress.load(output / "student-int8")
    assert [step["step"] for step in read_steps(student.config)] == ["distill", "prune"] or (
        [step["step"] for step in read_steps(student.config)] == ["prune", "distill"]
    )
    assert read_units(student.config) and read_units(small.config) == read_units(student.config)
    assert read_steps(small.config)[-1]["preset"] == "int8"
    assert student.config.id2label == {0: "fine", 1: "poor"}
    for name in ("teacher", "student", "student-int8"):
        assert len(transformers.AutoTokenizer.from_pretrained(output / name)("a good film").input_ids) == 5
    assert not [path for path in output.glob("student*/*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("name", ["student", "student-int8"])
def test_the_cards(name, finished):
    output, rows = finished
    card = ModelCard.load(output / name / "README.md")
    own = next(entry for entry in rows if entry["folder"] == name)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("films.csv", round(own["metric"]["value"], 6))
    assert card.data.model_name == f"tiny-{name}" and card.data.base_model == "somebody/base"
    assert all(f"| {entry['name']} |" in card.text for entry in rows)
    assert "```bash\nhfcompress run tiny.yaml\n```" in card.text
    assert str(output.parent) not in card.content
    assert not (output / "teacher" / "README.md").exists()


def test_started_again_it_does_not_train_again(finished, material, monkeypatch):
    output, rows = finished
    measured = []
    monkeypatch.setattr(verify, "_run_child", all_fine)
    for target in ("hfcompress.runs.pipeline.PlainTrainer", "hfcompress.runs.pipeline.CompressionTrainer"):
        monkeypatch.setattr(target, no_training)
    monkeypatch.setattr(pipeline, "quantize", no_training)
    monkeypatch.setattr(Run, "measure", lambda self, models: measured.append(models) or rows)
    assert run_recipe(recipe_for(material, output), command="hfcompress run tiny.yaml") == rows
    assert measured == [
        {"teacher": output / "teacher", "pruned": output / "student", "pruned + int8": output / "student-int8"}
    ]


def test_without_a_mark_a_stage_is_done_again_from_its_checkpoint(finished, material, tmp_path, monkeypatch, capsys):
    """As if the run had been killed after the student's last checkpoint."""
    done, rows = finished
    output = tmp_path / "tiny"
    shutil.copytree(done, output)
    recipe = recipe_for(material, output)
    (output / "recipe.yaml").write_text(recipe.to_yaml())
    (output / ".student.done.json").unlink()
    shutil.rmtree(output / "student")
    monkeypatch.setattr(verify, "_run_child", all_fine)
    monkeypatch.setattr("hfcompress.runs.pipeline.PlainTrainer", no_training)
    monkeypatch.setattr(Run, "measure", lambda self, models: rows)
    run_recipe(recipe, command="x")
    assert f"Going on from {output / 'student-checkpoints' / 'checkpoint-6'}" in capsys.readouterr().err
    first, second = (hfcompress.load(folder / "student").state_dict() for folder in (done, output))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_a_folder_that_does_not_reload_ends_the_run(finished, material, monkeypatch):
    output, rows = finished
    monkeypatch.setattr(verify, "_run_child", none_fine)
    monkeypatch.setattr(Run, "measure", lambda self, models: rows)
    with pytest.raises(VerificationError, match="does not load through load: outputs differ"):
        run_recipe(recipe_for(material, output), command="x")


def test_a_run_pushes_each_variant(finished, material, tmp_path, monkeypatch, local_hub):
    done, rows = finished
    output = tmp_path / "tiny"
    shutil.copytree(done, output)
    recipe = recipe_for(material, output, push={"repo": "tester/tiny", "private": True})
    (output / "recipe.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(verify, "_run_child", all_fine)
    monkeypatch.setattr(Run, "measure", lambda self, models: rows)
    run_recipe(recipe, command="x")
    assert sorted(local_hub.repo_ids()) == ["tester/tiny", "tester/tiny-int8"]
    for repo in local_hub.repo_ids():
        assert local_hub.is_private(repo) and len(local_hub.commits(repo)) == 2
        assert f'hfcompress.load("{repo}")' in local_hub.files(repo)["README.md"].decode()


# ---- the folder ----


def test_a_folder_with_another_recipe(finished, material):
    output, _ = finished
    with pytest.raises(RecipeError, match=r"holds a run of another recipe .*; give another output, or .* --restart$"):
        Run(recipe_for(material, output, seed=1), command="x")


def test_a_folder_that_holds_something_else(material, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(RecipeError, match="is not empty and holds no run; give another output"):
            Run(recipe_for(material, tmp_path), command="x", restart=restart)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_cannot_be_written(material, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written: "):
        Run(recipe_for(material, tmp_path / "file" / "run"), command="x")


def test_restarting_removes_the_run_and_nothing_else(finished, material, tmp_path):
    done, _ = finished
    output = tmp_path / "tiny"
    shutil.copytree(done, output)
    (output / "notes.txt").write_text("mine")
    (output / "teacher-of-mine").mkdir()
    recipe = recipe_for(material, output, seed=1)
    Run(recipe, command="x", restart=True)
    assert {path.name for path in output.iterdir()} == {"notes.txt", "teacher-of-mine", "recipe.yaml"}
    assert Recipe.from_yaml(output / "recipe.yaml") == recipe
    Run(recipe, command="x")  # the same recipe is welcome


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "the recipe needs task to be run"),
        ({"data": None}, "the recipe needs data to be run"),
        (
            {"model": None},
            "the recipe needs model.name (to fine-tune and compress) or teacher.name (already fine-tuned)",
        ),
        ({"model": None, "teacher": {"train": {}}}, "the recipe needs model.name"),
        (
            {"distill": None, "prune": None, "quantize": None},
            "the recipe asks for nothing: add distill, prune, qat or quantize",
        ),
    ],
)
def test_recipes_that_cannot_be_run(changes, message, material, tmp_path):
    with pytest.raises(RecipeError) as caught:
        Run(recipe_for(material, tmp_path / "run", **changes), command="x")
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_training_argument_that_does_not_exist(material, tmp_path):
    run = Run(recipe_for(material, tmp_path / "run", train={"learnin_rate": 1}), command="x")
    with pytest.raises(
        RecipeError, match=r"^teacher.train.learnin_rate is not a training argument; did you mean learning_rate"
    ):
        run.run()


# ---- parts of a run ----


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"prune": None}, "distilled"),
        ({"distill": None}, "pruned"),
        ({"distill": None, "prune": None, "qat": {"format": "int4-g8"}}, "trained in int4-g8"),
    ],
)
def test_any_of_the_sections_makes_a_student(changes, name, finished, material, tmp_path, monkeypatch):
    """The teacher is named: nothing is fine-tuned, and the student starts as its copy."""
    done, _ = finished
    teacher = {"name": str(done / "teacher")}
    recipe = recipe_for(material, tmp_path / "run", model=None, teacher=teacher, quantize=None, **changes)
    made, measured = [], []
    cls = pipeline.CompressionTrainer

    def make(*args, **kwargs):
        made.append(cls(*args, **kwargs))
        return made[-1]

    for trainer in ("PlainTrainer", "CompressionTrainer", "DistillationTrainer"):
        monkeypatch.setattr(pipeline, trainer, make if trainer == "CompressionTrainer" else no_training)
    monkeypatch.setattr(verify, "_run_child", all_fine)
    rows = [row("teacher", "teacher", 0.5), row("student", "student", 0.5)]

    def measure(self, models):
        measured.append(models)
        (self.output / "results.json").write_text(json.dumps({"rows": rows, "data": {}}))
        return rows

    monkeypatch.setattr(Run, "measure", measure)
    assert run_recipe(recipe, command="x") == rows
    assert len(made) == 1 and made[0].state.global_step == 6
    assert measured == [{"teacher": done / "teacher", name: tmp_path / "run" / "student"}]
    assert not (tmp_path / "run" / "teacher").exists()
    student = hfcompress.load(tmp_path / "run" / "student")
    assert bool(read_units(student.config)) is (name == "pruned")
    assert (getattr(student, "quantization_method", None) == "hfcompress") is ("qat" in changes)


def test_a_student_is_stored_in_the_bits_of_its_teacher(finished, material, tmp_path, monkeypatch):
    """Trained in float32; in its folder are the same numbers in 16 bits, half the bytes."""
    done, _ = finished
    narrow = tmp_path / "narrow"
    shutil.copytree(done / "teacher", narrow)
    hfcompress.load(narrow, dtype=torch.bfloat16).save_pretrained(narrow)
    trained, cls = [], pipeline.CompressionTrainer
    monkeypatch.setattr(pipeline, "CompressionTrainer", lambda *a, **k: trained.append(cls(*a, **k)) or trained[-1])
    monkeypatch.setattr(verify, "_run_child", all_fine)
    target = {"sparsity": [0.3, 0.5]}
    recipe = recipe_for(
        material,
        tmp_path / "run",
        model=None,
        teacher={"name": str(narrow)},
        quantize=None,
        prune={**BASE["prune"], "target": target},
    )
    run = Run(recipe, command="x")
    model = run.make_student(run.prepare(), run.make_teacher(run.prepare()))
    assert {p.dtype for p in trained[0].model.parameters()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    expected = {name: p.to(torch.bfloat16) for name, p in trained[0].model.state_dict().items()}
    saved = safetensors.torch.load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert len(saved) > 20 and all(torch.equal(saved[name], expected[name]) for name in saved)
    assert {folder.name for folder in (tmp_path / "run").glob("student-sparsity*")} == {"student-sparsity-0.3"}
    assert hfcompress.load(tmp_path / "run" / "student-sparsity-0.3").dtype == torch.bfloat16


def test_a_teacher_on_the_hub_is_quantized_with_its_tokenizer(finished, material, tmp_path, local_hub, monkeypatch):
    done, _ = finished
    files = {path.name: path.read_bytes() for path in (done / "teacher").iterdir() if path.is_file()}
    local_hub.create_repo("tester/teacher", files=files)
    changes = {"model": None, "distill": None, "prune": None, "teacher": {"name": "tester/teacher"}}
    recipe = recipe_for(material, tmp_path / "run", **changes)
    quantized = []
    monkeypatch.setattr(
        pipeline, "quantize", lambda *args, **kwargs: quantized.append(args) or quantize(*args, **kwargs)
    )
    monkeypatch.setattr(verify, "_run_child", all_fine)
    monkeypatch.setattr(Run, "measure", lambda self, models: [])
    monkeypatch.setattr(Run, "write_cards", lambda self, models, rows: None)
    run_recipe(recipe, command="x")
    assert quantized == [(tmp_path / "run" / "teacher", "int8")]
    for name in ("teacher", "student-int8"):
        assert (Path(tmp_path) / "run" / name / "tokenizer.json").is_file()


# ---- several targets in one run ----

GOALS = {
    "target": {"flops": [0.96, 0.93, 0.9], "length": 8, "max_drop": 3.0},
    "units": ["neurons"],
    "schedule": {"start": 0.0, "end": 1.0, "updates": 1},
    "criterion": {"name": "obs", "samples": 16},
    "multiple_of": {"neurons": 1},
    "at_least": {"neurons": 1},
}


def measured(scores):
    """Stands in for the process that measures: scores and speeds by name."""

    def measure(self, models):
        rows = []
        for (name, folder), (value, speed) in zip(models.items(), scores, strict=True):
            more = {} if not rows else {"speedup": {"median": speed}, "layers_speedup": {"median": speed}}
            rows.append(row(name, folder.name, value, **more))
        (self.output / "results.json").write_text(json.dumps({"rows": rows, "data": {"name": "films.csv"}}))
        return rows

    return measure


def test_a_run_with_several_targets_leaves_a_model_at_each(finished, material, tmp_path, monkeypatch, capsys):
    done, _ = finished
    recipe = recipe_for(
        material,
        tmp_path / "run",
        model=None,
        teacher={"name": str(done / "teacher")},
        quantize={"presets": ["int8"]},
        distill=None,
        prune=GOALS,
    )
    monkeypatch.setattr(verify, "_run_child", all_fine)
    scores = [(0.90, 1.0), (0.91, 1.2), (0.88, 1.6), (0.85, 2.0), (0.89, 0.5)]
    monkeypatch.setattr(Run, "measure", measured(scores))
    rows = run_recipe(recipe, command="x")
    output = tmp_path / "run"
    names = ["teacher", "pruned flops 0.96", "pruned flops 0.93", "pruned", "pruned + int8"]
    assert [entry["name"] for entry in rows] == names
    folders = ["student-flops-0.96", "student-flops-0.93", "student", "student-int8"]
    assert [entry["folder"] for entry in rows[1:]] == folders
    sizes = []
    for number, name in enumerate(folders[:3]):
        model = hfcompress.load(output / name)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        [step] = read_steps(model.config)
        assert step["optimizer_steps"] == 2 * (number + 1)
        assert ModelCard.load(output / name / "README.md").data.model_name == f"run-{name}"
        assert {"tokenizer.json", "hfcompress_probe.safetensors"} <= {path.name for path in (output / name).iterdir()}
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert (output / "tradeoff.png").stat().st_size > 5000
    said = capsys.readouterr().err
    # Of those that lose no more than 3 points the second is fastest; the third is faster and loses 5.
    assert f"The fastest that loses at most 3.0: {output / 'student-flops-0.93'} (1.60x, 2.00 lost)" in said
    # Started again, nothing is trained; with --restart all of it goes.
    monkeypatch.setattr("hfcompress.runs.pipeline.CompressionTrainer", no_training)
    assert run_recipe(recipe, command="x") == rows
    other = recipe_for(material, output, prune={**GOALS, "target": {"sparsity": 0.5}})
    Run(other, command="x", restart=True)
    assert {path.name for path in output.iterdir()} == {"recipe.yaml"}


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.90, 0.80, 0.86], "No model loses 3.0 points or less; the least is lost by pruned"),
        ([0.90, 0.88, 0.95], "The fastest that loses at most 3.0: small (2.50x, -5.00 lost)"),
    ],
)
def test_which_model_is_chosen(scores, said, material, tmp_path, capsys):
    target = {"speedup": 2.0, "max_drop": 3.0}
    run = Run(recipe_for(material, tmp_path / "run", prune={"target": target}), command="x")
    rows = [row("teacher", "teacher", scores[0])]
    rows += [
        row(name, name, value, speedup={"median": speed})
        for name, value, speed in zip(("middle", "pruned"), scores[1:], (1.5, 2.5), strict=True)
    ]
    run._choose(rows, {"middle": Path("large"), "pruned": Path("small")})
    assert said in capsys.readouterr().err
    plain = Run(recipe_for(material, tmp_path / "other"), command="x")
    plain._choose(rows, {})
    assert capsys.readouterr().err == ""


def test_a_bound_alone_is_looked_for_among_customary_speeds(material, tmp_path):
    run = Run(recipe_for(material, tmp_path / "run", prune={"target": {"max_drop": 1.0}}), command="x")
    target = run.recipe.prune.target
    assert (target.goals, target.max_drop, target.quantity) == ([1.5, 2.0, 3.0, 4.0], 1.0, "speedup")
    again = Run(recipe_for(material, tmp_path / "run", prune={"target": {"max_drop": 1.0}}), command="x")
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml") == again.recipe, "the same recipe is welcome"
    assert list(run._goal_folders()) == ["pruned 1.5x", "pruned 2x", "pruned 3x"]
    with pytest.raises(RecipeError, match="cut: end"):
        Run(recipe_for(material, tmp_path / "x", prune={"target": {"max_drop": 1.0}, "cut": "end"}), command="x")


def test_variants_in_schemes_of_our_own_rounded_on_data(finished, material, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    monkeypatch.setattr(Run, "measure", measured([(0.9, 1.0), (0.9, 1.0), (0.9, 1.0)]))
    recipe = recipe_for(
        material,
        tmp_path / "run",
        model=None,
        teacher={"name": str(finished[0] / "teacher")},
        quantize={"presets": ["int3-g16-asym", "nf4"], "samples": 16},
        distill=None,
        prune=None,
    )
    rows = run_recipe(recipe, command="the test")
    assert [entry["name"] for entry in rows] == ["teacher", "teacher + int3-g16-asym", "teacher + nf4"]
    for name in ("int3-g16-asym", "nf4"):
        folder = tmp_path / "run" / f"student-{name}"
        (step,) = [step for step in read_steps(hfcompress.load(folder).config) if step["step"] == "quantize"]
        assert step["method"] == "second order" and step["calibration_n"] == 16 and step["layers"].keys() == {name}
    assert not list((tmp_path / "run").glob(".*-layers"))


def test_a_variant_of_torchao(finished, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(verify, "_run_child", all_fine)
    recipe = recipe_for(
        {"data": {"train": str(tmp_path / "films.csv"), "label": "verdict"}},
        tmp_path / "run",
        model=None,
        teacher={"name": str(finished[0] / "teacher")},
        quantize={"presets": ["int8-dynamic"]},
        distill=None,
        prune=None,
    )
    rows = [("a good film", "fine"), ("a bad film", "poor")] * 10
    (tmp_path / "films.csv").write_text("said,verdict\n" + "".join(f"{text},{label}\n" for text, label in rows))
    rows = run_recipe(recipe, command="the test")
    assert [entry["name"] for entry in rows] == ["teacher", "teacher + int8-dynamic"]
    folder = tmp_path / "run" / "student-int8-dynamic"
    (step,) = [step for step in read_steps(hfcompress.load(folder).config) if step["step"] == "quantize"]
    assert (step["preset"], step["layers"]) == ("int8-dynamic", 6)
    assert "6 linear layers with torchao (int8-dynamic)" in (folder / "README.md").read_text()
    assert "torchao" in read_results(folder)["versions"]
