"""From a recipe to what teaches: precision, several, average, cache, assistants, and a student with less in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfcompress.config import DistillConfig, Recipe, RecipeError
from hfcompress.distillation import AverageTeacher, CachedTeacher, Ensemble, Teacher
from hfcompress.hub import verify
from hfcompress.runs.pipeline import run_recipe
from hfcompress.runs.teaching import contents_for, open_teachers
from tests.families import make_model
from tests.hub.folders import all_fine
from tests.tasks.conftest import save_bert
from tests.training.scenarios import arguments, vector

TASK = SimpleNamespace(max_length=12, label_columns=("labels",))  # all that is asked of a task where nothing is cached
WORDS = ("good", "fine", "nice", "bad", "poor", "dull")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return Path(save_bert(tmp_path_factory.mktemp("teacher"), names=["neg", "pos"]))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    lines = [f"a {WORDS[n % 6]} film {n % 5},{'pos' if n % 6 < 3 else 'neg'}" for n in range(24)]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return {"train": str(tmp_path / "films.csv"), "eval": str(tmp_path / "films.csv"), "max_length": 12}


def recipe_of(taught: Path, data: dict[str, Any], output: Path, **sections: Any) -> Recipe:
    base = {
        "task": "text-classification",
        "teacher": {"name": str(taught)},
        "data": data,
        "distill": {},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": [],
        },
        "measure": {"batch": 2, "length": 8, "rounds": 3, "warmup": 0, "threads": 1, "device": "cpu"},
        "output": str(output),
    }
    return Recipe.from_dict({**base, **sections})


def test_precisions(teacher: Path, data: dict[str, Any], tmp_path: Path) -> None:
    student, kinds = AutoModelForSequenceClassification.from_pretrained(teacher), []
    for precision in ("auto", "float32", "bfloat16", "int8"):
        recipe = recipe_of(teacher, data, tmp_path, teacher={"name": str(teacher), "precision": precision})
        found = open_teachers(recipe, teacher, student, arguments(tmp_path), TASK, tmp_path)
        assert type(found) is Teacher and not found.model.training
        kinds.append((found.model.dtype, getattr(found.model, "quantization_method", None)))
    assert [str(kind[1]) for kind in kinds][:3] == ["None"] * 3 and kinds[3][1].value == "bitsandbytes"
    assert [kind[0] for kind in kinds][:3] == [torch.float32, torch.float32, torch.bfloat16]


def test_an_average_and_several(teacher: Path, data: dict[str, Any], tmp_path: Path) -> None:
    student = AutoModelForSequenceClassification.from_pretrained(teacher)
    recipe = recipe_of(teacher, data, tmp_path, model={"name": str(teacher)}, teacher={"average": 0.9})
    assert isinstance(open_teachers(recipe, teacher, student, arguments(tmp_path), TASK, tmp_path), AverageTeacher)
    both = {"name": [str(teacher)] * 2, "weights": [3, 1], "combine": "logits"}
    recipe = recipe_of(teacher, data, tmp_path, teacher=both)
    found = open_teachers(recipe, teacher, student, arguments(tmp_path), TASK, tmp_path)
    assert isinstance(found, Ensemble) and found.weights == [0.75, 0.25] and found.combine == "logits"
    cases = [
        ({"name": [str(teacher)]}, "fewer than two"),
        ({"name": [str(teacher)] * 2, "weights": [1]}, "one number for each"),
        ({"average": 0.9, "cache": True}, "leave out name, cache and assistants"),
        ({"name": [str(teacher)] * 2, "assistants": [{"layers": 1}]}, "learn from one teacher"),
    ]
    for section, match in cases:
        with pytest.raises(RecipeError, match=match):
            recipe_of(teacher, data, tmp_path, teacher=section)


def test_what_a_cache_has_to_keep() -> None:
    bert = make_model("bert", "AutoModelForSequenceClassification")
    llama = make_model("llama", "AutoModelForCausalLM")

    def of(model: Any, **terms: Any) -> str:
        return str(contents_for(DistillConfig.model_validate(terms), model, Teacher(model)))

    assert of(bert) == of(bert, logits={"weight": 1.0, "loss": "mse"}) == "logits in float32"
    assert of(bert, hidden={"weight": 1.0, "layers": "last"}) == "logits in float32 and hidden states of layers 2"
    assert of(llama, logits={"weight": 1.0, "temperature": 1.0}) == "top 64"
    assert (
        of(llama) == of(llama, logits={"weight": 1.0, "loss": "reverse_kl", "temperature": 1.0}) == "last hidden states"
    )
    assert of(bert, logits={"weight": 0.0}, embeddings={"weight": 1.0}) == "hidden states of layers 2"
    for term in ("attentions", "relations"):
        with pytest.raises(RecipeError, match=f"keeps no attention, so distill.{term}"):
            of(bert, **{term: {"weight": 1.0}})
    with pytest.raises(RecipeError, match="has not seen what the student will write"):
        of(llama, on_policy={})


def test_a_cached_run_is_a_run_with_the_teacher_itself(
    teacher: Path, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_run_child", all_fine)
    ends = []
    for cache in (False, True):
        output = tmp_path / f"run-{cache}"
        section = {"name": str(teacher), "cache": cache}
        run_recipe(recipe_of(teacher, data, output, teacher=section), command="test")
        ends.append(vector(AutoModelForSequenceClassification.from_pretrained(output / "student")))
        assert (output / "teacher-cache" / "manifest.json").is_file() == cache
    start = vector(AutoModelForSequenceClassification.from_pretrained(teacher))
    assert not torch.equal(ends[0], start)
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=0)


def test_a_chain_with_an_assistant_and_a_small_student(
    teacher: Path, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_run_child", all_fine)
    vocabulary = json.loads((teacher / "config.json").read_text())["vocab_size"]
    deep = make_model("bert", "AutoModelForSequenceClassification", num_hidden_layers=3, vocab_size=vocabulary)
    deep.config.id2label, deep.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    deep.save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "deep")
    teacher = tmp_path / "deep"
    section = {"name": str(teacher), "assistants": [{"layers": 2, "train": {"max_steps": 2}}]}
    output = tmp_path / "run"
    recipe = recipe_of(teacher, data, output, teacher=section, student={"layers": 1, "neurons": 16})
    rows = run_recipe(recipe, command="test")
    assert rows is not None and [row["name"] for row in rows] == ["teacher", "distilled"]
    depths = [
        json.loads((output / name / "config.json").read_text())["num_hidden_layers"]
        for name in ("assistant-1", "student")
    ]
    assert depths == [2, 1]
    record = json.loads((output / "student" / "config.json").read_text())["hfcompress"]
    taught = [step["teacher"] for step in record["steps"] if step["step"] == "distill"]
    assert taught == ["assistant-1"]
    marks = {path.name for path in output.glob(".*.done.json")}
    assert marks == {".assistant-1.done.json", ".student.done.json"}


def test_a_cache_is_opened_by_its_folder(
    teacher: Path, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfcompress.training import DistillationTrainer

    monkeypatch.setattr(verify, "_run_child", all_fine)
    run_recipe(
        recipe_of(teacher, data, tmp_path / "run", teacher={"name": str(teacher), "cache": True}), command="test"
    )
    student = AutoModelForSequenceClassification.from_pretrained(teacher)
    trainer = DistillationTrainer(model=student, teacher=tmp_path / "run" / "teacher-cache", args=arguments(tmp_path))
    assert isinstance(trainer.teacher, CachedTeacher) and len(trainer.teacher.cache) >= 2
