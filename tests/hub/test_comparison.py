"""Runs side by side: paired where they can be, and said where not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hfcompress.hub.comparison import compare_folders, format_comparison, render_comparison
from hfcompress.hub.predictions import PREDICTIONS_FILE, save_answers
from hfcompress.hub.results import RESULTS_FILE
from hfcompress.measurement import Answers, compare_answers
from tests.hub.folders import row, write_results
from tests.hub.test_report import NASTY, Page

LABELS = np.ones(500, dtype=int)
RIGHT = {"one": 450, "other": 430}


def answers_of(name: str) -> Answers:
    """So many right, not the same ones."""
    predicted = np.zeros(500, dtype=int)
    predicted[:: -1 if name == "other" else 1][: RIGHT[name]] = 1
    return Answers.of_classes(predicted, LABELS)


@pytest.fixture
def two(tmp_path):
    """Folders of two models of different runs, which answered the same examples."""
    for name in RIGHT:
        (tmp_path / name).mkdir()
        rows = [row("teacher", "teacher", 0.91), row("pruned", ".", RIGHT[name] / 500, speedup={"median": 2.0})]
        recipe = {"seed": 7, "prune": {"target": {"speedup": 2.0 if name == "one" else 3.0}}, "output": name}
        write_results(tmp_path / name, rows=rows, recipe=recipe)
        save_answers({"pruned": answers_of(name)}, tmp_path / name, fingerprint="0123456789abcdef")
    return [tmp_path / name for name in RIGHT]


def change_results(folder, **changes) -> None:
    results = json.loads((folder / RESULTS_FILE).read_text())
    (folder / RESULTS_FILE).write_text(json.dumps({**results, **changes}))


def test_the_same_examples_are_paired(two):
    found = compare_folders(two)
    assert [entry.name for entry in found.entries] == ["one", "other"]
    (change,) = found.changes
    expected = compare_answers(answers_of("one"), answers_of("other"))
    assert (
        (change["drop"], change["p_value"])
        == (expected.drop, expected.p_value)
        == (pytest.approx(4.0), expected.p_value)
    )
    assert change["test"] == "McNemar, exact"
    assert found.settings == {"prune.target.speedup": [2.0, 3.0]}, "the same seed is not listed, nor is the output"
    text = format_comparison(found)
    assert "4.00 [" in text and "prune.target.speedup   2.0   3.0" in text and "unpaired" not in text
    assert json.loads(json.dumps(found.to_dict()))["against_first"]["other"]["drop"] == pytest.approx(4.0)


@pytest.mark.parametrize("spoil", ["fingerprint", "no fingerprint", "no file", "fewer"])
def test_other_examples_are_not_paired_and_that_is_said(spoil, two):
    _, other = two
    if spoil == "no file":
        (other / PREDICTIONS_FILE).unlink()
    elif spoil == "fewer":
        few = Answers.of_classes(LABELS[:300], LABELS[:300])
        save_answers({"pruned": few}, other, fingerprint="0123456789abcdef")
    else:
        for folder in two if spoil == "no fingerprint" else [other]:
            fingerprint = None if spoil == "no fingerprint" else "another"
            save_answers({"pruned": answers_of(folder.name)}, folder, fingerprint=fingerprint)
    found = compare_folders(two)
    (change,) = found.changes
    assert change["p_value"] is None and change["drop"] == pytest.approx(4.0)
    half = np.hypot(0.021, 0.019) * 100  # of the rows' own intervals
    assert (change["low"], change["high"]) == pytest.approx((4 - half, 4 + half))
    assert "one and other did not answer the same examples, so their scores are compared unpaired" in found.warnings


@pytest.mark.parametrize(("key", "value"), [("device", "another CPU"), ("threads", 8), ("batch", 1), ("length", 128)])
def test_latencies_under_other_conditions_are_not_comparable(key, value, two):
    rows = json.loads((two[1] / RESULTS_FILE).read_text())["rows"]
    rows[1]["latency"][key] = value
    change_results(two[1], rows=rows)
    (warning,) = compare_folders(two).warnings
    assert warning.startswith("latencies of one and other are not comparable: ") and str(value) in warning
    page = Page(render_comparison(compare_folders(two)))
    assert "Latencies of one and other are not comparable" in page.text


def test_latencies_of_other_measurements_are_taken_with_care(two):
    (warning,) = compare_folders(two).warnings
    assert warning.startswith("the latency of one was not measured together with that of other; speedups")


def test_a_section_that_one_recipe_lacks_is_one_line(two):
    change_results(two[0], recipe={"seed": 7, "prune": {"a": 1}, "train": {"a": 1, "b": 2}})
    change_results(two[1], recipe={"seed": 8, "prune": {"a": 1}})
    found = compare_folders(two)
    assert found.settings == {"seed": [7, 8], "train": ["set", None]}
    assert found.to_dict()["settings"] == {"one": {"seed": 7, "train": "set"}, "other": {"seed": 8, "train": None}}
    assert "train     set   not set" in format_comparison(found)
    change_results(two[1], recipe=None)
    assert compare_folders(two).settings == {}, "one has not kept its recipe"


def test_other_metrics_are_not_compared(two):
    rows = json.loads((two[1] / RESULTS_FILE).read_text())["rows"]
    rows[1]["metric"]["name"] = "f1"
    change_results(two[1], rows=rows)
    found = compare_folders(two)
    assert found.changes == [None] and "not the same metric" in " ".join(found.warnings)
    assert "<svg" not in render_comparison(found)


def test_the_models_of_one_run(tmp_path):
    rows = [row("teacher", "teacher", 0.91), row("pruned", "student", 0.9), row("pruned + int8", "student-int8", 0.86)]
    write_results(tmp_path, rows=rows)
    answers = {"pruned": answers_of("one"), "pruned + int8": answers_of("other")}
    save_answers(answers, tmp_path, fingerprint="0123456789abcdef")
    found = compare_folders([tmp_path])
    assert [entry.name for entry in found.entries] == ["pruned", "pruned + int8"]
    assert found.changes[0]["p_value"] is not None and found.warnings == []


def test_the_page(two):
    page = Page(render_comparison(compare_folders(two)))
    for words in (
        "2 models side by side",
        "Each is held against one.",
        "Settings that differ",
        "prune.target.speedup 2.0 3.0",
    ):
        assert words in page.text
    assert "script" not in {tag for tag, _ in page.tags} and [tag for tag, _ in page.tags].count("svg") == 1


def test_hostile_names_stay_words(two):
    change_results(two[0], recipe={NASTY: NASTY}, data={"name": NASTY})
    page = Page(render_comparison(compare_folders(two)))
    assert not {"script", "img"} & {tag for tag, _ in page.tags} and "<script>alert(1)" in page.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one"], "there is only one model to compare"),
        (["one", "nothing"], "holds no results.json; give folders of runs"),
        (["one", "empty"], "has no rows: nothing was measured there"),
        (["one", "broken"], "is not valid JSON; measure the model again"),
    ],
)
def test_what_cannot_be_compared_is_one_line(names, message, two):
    root = two[0].parent
    for name in ("empty", "broken"):
        (root / name).mkdir()
    write_results(root / "empty", rows=[])
    (root / "broken" / RESULTS_FILE).write_text("{")
    with pytest.raises(ValueError) as caught:
        compare_folders([root / name for name in names])
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
