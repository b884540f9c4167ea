"""The vocabulary as a unit of recipes and of `hfcompress prune`: alone and with everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

import hfcompress
from hfcompress.anatomy import find_stream
from hfcompress.checkpoints.record import read_steps
from hfcompress.config import ContractConfig, DataConfig, MeasureConfig, PruneConfig, Recipe, RecipeError
from hfcompress.hub import verify
from hfcompress.measurement import count_parameters
from hfcompress.pruning import make_budget
from hfcompress.pruning.budgets import unpruned
from hfcompress.runs import Run, run_recipe
from hfcompress.runs.checking import check_folder
from hfcompress.runs.post_training import prune_folder
from hfcompress.runs.vocabulary import counts_in
from hfcompress.vocabulary import VocabularyError, count_tokens, cut_vocabulary, named_ids
from tests.families import largest_difference, run_model
from tests.hub.folders import all_fine
from tests.vocabulary.models import make
from tests.vocabulary.tokenizers import STRANGE, sentences

MEASURE = {"batch": 2, "length": 8, "rounds": 3, "warmup": 0, "threads": 1, "device": "cpu"}
KINDS = {"bert": "bert classifier", "masked": "bert", "llama": "llama"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(verify, "_run_child", all_fine)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Models with tokenizers that know more than the data say, and the data."""
    folder = tmp_path_factory.mktemp("material")
    for name, kind in KINDS.items():
        model, tokenizer = make(kind)
        if name == "bert":
            model.config.id2label, model.config.label2id = {0: "fine", 1: "poor"}, {"fine": 0, "poor": 1}
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = list(sentences(0))[:40]
    rows = [{"said": text, "verdict": "fine" if number % 2 else "poor"} for number, text in enumerate(texts)]
    (folder / "films.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "book.txt").write_text("\n".join(texts))
    return folder


def configure(**changes: Any) -> PruneConfig:
    base = {
        "target": {"parameters": 0.6},
        "criterion": {"name": "obs", "samples": 24},
        "multiple_of": {"neurons": 1, "hidden": 4},
        "at_least": {"neurons": 1},
    }
    return PruneConfig.model_validate({**base, **changes})


def prune(material: Path, name: str, output: Path, **changes: Any) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    file, more = ("films.jsonl", {"label": "verdict", "text": "said"}) if name == "bert" else ("book.txt", {})
    rows = prune_folder(
        str(material / name),
        output,
        configure(**changes),
        DataConfig(train=str(material / file), max_length=8, **more),
        measure=MeasureConfig(**MEASURE),
        seed=1,
        command="hfcompress prune x",
        say=said.append,
    )
    return rows, said


def test_tokens_are_counted_in_encoded_examples():
    _, tokenizer = make("bert classifier")
    texts = list(sentences(0))[:20]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": [[-100, 3]] * 20})
    expected = count_tokens(tokenizer, texts)
    np.testing.assert_array_equal(counts_in(rows, len(expected)), expected)
    both = counts_in(rows, len(expected), columns=["input_ids", "labels"])
    assert both[3] == expected[3] + 20 and both.sum() == expected.sum() + 20
    nested = datasets.Dataset.from_dict({"input_ids": [[[1, 2], [2]], [[4]]]})
    assert counts_in(nested, 6).tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("name", KINDS)
def test_alone_as_many_tokens_stay_as_there_is_room_for(name, material, tmp_path):
    dense = hfcompress.load(material / name)
    rows, said = prune(material, name, tmp_path / "small", units=["vocabulary"], target={"parameters": 0.85})
    pruned = hfcompress.load(tmp_path / "small")
    before, after = count_parameters(dense), count_parameters(pruned)
    each = sum(p.numel() // dense.config.vocab_size for p in dense.parameters() if len(p) == dense.config.vocab_size)
    assert 0.85 * before - 8 * each < after <= 0.85 * before
    assert [row["parameters"] for row in rows] == [before, after], "the row of the dense model is that of the whole"
    assert said[0].startswith(
        f"The vocabulary keeps {pruned.config.vocab_size:,} of {dense.config.vocab_size:,} tokens"
    )
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (material / name, tmp_path / "small"))
    assert len(new) == pruned.config.vocab_size and new.tokenize(STRANGE)
    text = next(t for t in sentences(0) if old.tokenize(t) == new.tokenize(t))
    inputs = [dict(tokenizer([text], return_tensors="pt")) for tokenizer in (old, new)]
    ours, theirs = run_model(pruned, inputs[1]), run_model(dense, inputs[0])
    if name == "bert":
        assert largest_difference(ours, theirs) < 1e-5
    else:
        kept = [old.convert_tokens_to_ids(token) for token in new.convert_ids_to_tokens(range(len(new)))]
        assert float((ours["logits"] - theirs["logits"][..., kept]).abs().max()) < 1e-5
    assert [step["step"] for step in read_steps(pruned.config)] == ["vocabulary", "prune"]
    assert str(material) not in (tmp_path / "small" / "config.json").read_text()


# Shares of the parameters that no plan of full width reaches: which width loses least is a matter of the last bits here.
@pytest.mark.parametrize(("name", "share"), [("bert", 0.15), ("masked", 0.15), ("llama", 0.25)])
def test_all_units_together(name, share, material, tmp_path):
    units = ["heads", "neurons", "sublayers", "layers", "hidden", "vocabulary"]
    tight = {"at_least": {"heads": 3, "neurons": 44}, "coverage": 0.9, "target": {"parameters": share}}
    rows, said = prune(material, name, tmp_path / "small", units=units, **tight)
    pruned = hfcompress.load(tmp_path / "small")
    assert rows[1]["parameters"] == count_parameters(pruned) <= share * rows[0]["parameters"]
    assert rows[0]["parameters"] == count_parameters(hfcompress.load(material / name))
    steps = {step["step"]: step for step in read_steps(pruned.config)}
    assert steps["vocabulary"]["left"] == pruned.config.vocab_size < steps["vocabulary"]["before"]
    assert find_stream(pruned).width < 32 and len(said) == 4
    assert ("metric" in rows[0]) == ("metric" in rows[1]) == (name != "masked")


def test_a_share_is_one_of_the_whole_model(material, tmp_path):
    """Tokens that went before count: at 0.9 of all parameters, the smaller vocabulary may already be enough."""
    rows, _ = prune(
        material, "bert", tmp_path / "small", units=["neurons", "vocabulary"], coverage=0.5, target={"parameters": 0.9}
    )
    pruned = hfcompress.load(tmp_path / "small")
    assert "units" not in (pruned.config.hfcompress or {})
    assert rows[1]["parameters"] <= 0.9 * rows[0]["parameters"]


def test_what_it_cannot_do_is_one_line(material, tmp_path):
    with pytest.raises(VocabularyError, match=r"target parameters 0.2: size .* is too small: .* or prune more units"):
        prune(material, "bert", tmp_path / "small", units=["vocabulary"], target={"parameters": 0.2})
    assert not (tmp_path / "small").exists()


# ---- recipes ----


def recipe_for(material: Path, output: Path, **changes: Any) -> Recipe:
    sections = {
        "task": "text-classification",
        "teacher": {"name": str(material / "bert")},
        "data": {"train": str(material / "films.jsonl"), "label": "verdict", "text": "said", "max_length": 16},
        "distill": {"hidden": {"weight": 0.5}},
        "prune": {
            "target": {"parameters": 0.5},
            "units": ["heads", "neurons", "hidden", "vocabulary"],
            "coverage": 0.9,
            "schedule": {"start": 0.1, "end": 0.6, "updates": 2},
            "multiple_of": {"neurons": 1, "hidden": 4},
            "at_least": {"neurons": 44, "heads": 3},
        },
        "train": {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"},
        "measure": MEASURE,
        "output": str(output),
        **changes,
    }
    return Recipe.from_dict({name: section for name, section in sections.items() if section is not None})


@pytest.mark.parametrize("task", ["text-classification", "fill-mask"])
def test_a_run_whose_student_has_fewer_tokens(task, material, tmp_path, monkeypatch):
    changes: dict[str, Any] = {}
    if task == "fill-mask":
        changes = {
            "task": task,
            "teacher": {"name": str(material / "masked")},
            "data": {"train": str(material / "book.txt"), "max_length": 16},
        }
    output = tmp_path / "run"
    rows = run_recipe(recipe_for(material, output, **changes), command="hfcompress run x")
    assert [row["name"] for row in rows] == ["teacher", "pruned"]
    teacher = hfcompress.load(changes.get("teacher", {"name": material / "bert"})["name"])
    student, smaller = (hfcompress.load(output / name) for name in ("student", "teacher-vocabulary"))
    assert rows[0]["parameters"] == count_parameters(teacher), "what it is measured against has its own tokens"
    assert rows[1]["parameters"] == count_parameters(student) <= 0.5 * count_parameters(teacher)
    assert student.config.vocab_size == smaller.config.vocab_size < teacher.config.vocab_size
    assert len(AutoTokenizer.from_pretrained(output / "student")) == student.config.vocab_size
    assert find_stream(student).width < 32
    assert [step["step"] for step in read_steps(student.config)] == ["vocabulary", "prune", "distill"]
    assert rows[0]["metric"]["name"] == rows[1]["metric"]["name"] and rows[0]["metric"]["n"] > 0
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    # Checked later, both are scored as they were.
    contract, model = ContractConfig(max_drop=99.0), str(changes.get("teacher", {"name": material / "bert"})["name"])
    checked = check_folder(output, contract)
    assert [row["metric"] for row in checked.rows] == [row["metric"] for row in rows]
    if task == "fill-mask":
        shutil.copytree(output / "student", tmp_path / "alone")
        data = DataConfig(train=str(material / "book.txt"), max_length=16)
        with pytest.raises(ValueError, match=r"^alone has fewer tokens than baseline, so scores over tokens cannot"):
            check_folder(tmp_path / "alone", contract, baseline=model, data=data)
    # Started again, the vocabulary is not cut again.
    monkeypatch.setattr("hfcompress.runs.pipeline.cut_for", None)
    run = Run(recipe_for(material, output, **changes), command="hfcompress run x")
    task, model = run.cut_vocabulary(run.prepare())
    assert model.config.vocab_size == len(task.processing_class) == student.config.vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "image-classification"}, "vocabulary is for texts, and image-classification has none; leave it out"),
        ({"task": "feature-extraction"}, "vocabulary and feature-extraction do not go together yet"),
        ({"model": {"name": "other"}}, "name either model or one teacher, or cut each with hfcompress vocabulary"),
        ({"teacher": {"name": ["a", "b"]}}, "cuts the one teacher, whose copy the student is"),
    ],
)
def test_runs_that_cannot_be(changes, message, material, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        Run(recipe_for(material, tmp_path / "run", **changes), command="x")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_tokens_that_went_count_as_pruned(material):
    model = hfcompress.load(material / "bert")
    before = count_parameters(model)
    cut_vocabulary(model, sorted({*range(100), *named_ids(model)}))
    whole = unpruned(model)
    assert count_parameters(whole) == before > count_parameters(model)
    budget = make_budget(model, PruneConfig(target={"parameters": 0.5}).target, measure=MeasureConfig(**MEASURE))
    assert (budget.dense, budget.goals) == (before, (before / 2,))
