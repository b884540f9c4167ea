"""Each script in this process: from raw data to a measured, smaller model that its Auto class loads."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import transformers

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.hub import verify
from hfcompress.runs import measure_saved, pipeline
from hfcompress.tasks import TASKS
from tests.hub.folders import all_fine
from tests.scripts.material import AUTO_CLASSES

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "train={max_steps: 4, per_device_train_batch_size: 8, learning_rate: 1e-3, disable_tqdm: true, eval_strategy: steps,"
    " eval_steps: 2, save_strategy: 'no'}",
    "distill={}",
    "prune={target: {sparsity: 0.4}, criterion: first_order, schedule: {start: 0.1, end: 0.7, updates: 2},"
    " multiple_of: {neurons: 4}, at_least: {neurons: 4}}",
    "measure={batch: 2, length: 8, rounds: 3, warmup: 0, threads: 1, device: cpu}",
]
METRICS = {
    "token_classification": "f1",
    "question_answering": "f1",
    "masked_lm": "perplexity",
    "causal_lm": "perplexity",
    "seq2seq": "rougeL",
    "sentence_embeddings": "cosine_similarity",
}


@pytest.fixture(autouse=True)
def in_this_process(tmp_path_factory, monkeypatch):
    """Measures here and takes loading for granted: both are tested in processes of their own elsewhere."""

    def measure(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        measure_saved.main()
        return True

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(pipeline, "run_fresh", measure)
    monkeypatch.setattr(verify, "_run_child", all_fine)


def test_there_is_a_script_for_each_task():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py") if not path.stem.startswith("demo_")}
    assert scripts == {make.__name__ for make in AUTO_CLASSES}
    assert sorted(AUTO_CLASSES.values()) == sorted(spec.auto_class for spec in TASKS.values())


@pytest.mark.parametrize("make", AUTO_CLASSES, ids=lambda make: make.__name__)
def test_a_script(make, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    given = [
        *SETTINGS,
        f"model={{name: {tmp_path / 'model'}}}",
        *make(tmp_path),
        f"output={tmp_path / 'run'}",
    ]
    monkeypatch.setattr(sys, "argv", ["script", "--config", str(tmp_path / "recipe.yaml"), *given])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "scripts" / f"{make.__name__}.py"), run_name="__main__")
    output = capsys.readouterr()
    assert done.value.code == 0, output.err[-2000:]
    student = tmp_path / "run" / "student"
    loaded = hfcompress.load(student)
    record = loaded.config.hfcompress
    assert sorted(step["step"] for step in record["steps"]) == ["distill", "prune"]
    left = {site.name: site.units for site in find_sites(loaded)}
    assert {name: pair[0] for name, pair in record["units"].items()}.items() <= left.items()
    assert type(getattr(transformers, AUTO_CLASSES[make]).from_pretrained(student)) is type(loaded)
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "pruned"] and rows[1]["parameters"] < rows[0]["parameters"]
    name = METRICS.get(make.__name__, "accuracy")
    for metric in (row["metric"] for row in rows):
        assert metric["name"] == name and metric["low"] <= metric["value"] <= metric["high"] < math.inf
        assert metric["higher_is_better"] is (name != "perplexity")
    if make.__name__ == "sentence_embeddings":
        first, second = (row["metric"]["value"] for row in rows)
        assert first == pytest.approx(1.0, abs=1e-6) and second < 1 - 1e-6
    assert name in output.out and "pruned" in output.out
