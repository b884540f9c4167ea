"""Cards: rendered from the record and the measured numbers, and from nothing else."""

from __future__ import annotations

import json
import re

import pytest
import transformers
from huggingface_hub import ModelCard
from PIL import Image

import hfcompress
from hfcompress.anatomy import drop_layers
from hfcompress.checkpoints.record import add_step
from hfcompress.config import PruneConfig
from hfcompress.hub import RouteCheck, write_card
from hfcompress.hub.card import CURVES_FILE, PICTURE_FILE, RESULTS_FILE, TRADEOFF_FILE
from hfcompress.pruning import Plan, cut
from tests.families import make_model
from tests.hub.folders import row, save_pruned, save_run, write_results

CHECKS = [RouteCheck("load", True, 1.2e-7, 1e-5), RouteCheck("remote", True, 0.0, 1e-5)]


@pytest.fixture
def pruned(tmp_path):
    save_pruned(tmp_path)
    return tmp_path


def read(path):
    return ModelCard.load(path)


def test_a_card_with_everything(pruned):
    write_results(pruned)
    path = write_card(pruned, repo_id="me/small", checks=CHECKS, license="apache-2.0", language="en", tags="mine")
    assert path == pruned / "README.md"
    card, text = read(path), path.read_text()
    assert "# small\n" in text and "A bert model, distilled and pruned with hfcompress." in text
    # heads: 2, 1, 3 of 4; neurons: 43, 14, 28 of 48
    assert "6 of 12 heads" in text and "85 of 144 neurons" in text
    # the table
    assert "| | accuracy, n = 1,500 | parameters | MB on disk | latency, ms (batch 32 x 64 tokens) |" in text
    assert "| teacher | 91.23 [89.13, 93.13] | 22.71 M | 90.9 | 12.3 (12.0 to 14.0) | 1 | 1 |" in text
    assert "| pruned | 90.51 [88.41, 92.41] | 22.71 M | 90.9 | 12.3 (12.0 to 14.0) | 2.11x | 2.30x |" in text
    assert "95 % interval" in text and "10th to 90th percentile) of 15 rounds" in text
    # the steps
    assert (
        "1. Distilled from somebody/teacher for 1,234 steps: task (weight 0.5), logits (weight 0.5), hidden (weight 0.25); "
        "temperature 2.0.\n"
    ) in text
    assert (
        "2. Pruned heads, neurons gradually (polynomial schedule from 10% to 60% of 1,234 steps) by the criterion obs "
        "to a sparsity of 0.432 of the layers' prunable parameters, and cut.\n"
    ) in text
    # every way to load it
    assert len(re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)) == 3
    assert 'import hfcompress\nmodel = hfcompress.load("me/small")' in text
    auto = "from transformers import AutoModelForSequenceClassification\nmodel = AutoModelForSequenceClassification"
    assert f'import hfcompress\n{auto}.from_pretrained("me/small")\n' in text
    assert f'{auto}.from_pretrained("me/small", trust_remote_code=True)\n' in text
    assert "load 1e-07, remote 0" in text
    # how and from what
    assert "* Base model: google-bert/bert-base-uncased\n* Teacher: somebody/teacher\n" in text
    assert "* Data: nyu-mll/glue, 67,349 examples for training and 1,500 for evaluation" in text
    assert (
        "On cpu, 2 threads, batch 32 x 64 tokens, float32; hfcompress 0.1.0, torch 2.13.0; seed 7; 2026-01-02; commit abcdef0."
        in text
    )
    assert "```bash\nhfcompress run recipe.yaml seed=7\n```" in text
    # the picture
    assert f"]({PICTURE_FILE})" in text and "encoder.0" in text
    with Image.open(pruned / PICTURE_FILE) as picture:
        assert picture.format == "PNG" and 200 < picture.size[0] < 3000 and 100 < picture.size[1] < 3000
    # metadata
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert data["tags"] == ["hfcompress", "distilled", "pruned", "mine"]
    assert (data["base_model"], data["base_model_relation"]) == ("google-bert/bert-base-uncased", "finetune")
    assert (data["license"], data["language"]) == ("apache-2.0", "en")
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "text-classification",
        "nyu-mll/glue",
        "nyu-mll/glue",
    )
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9051)
    assert card.data.model_name == "small"
    assert "{{" not in text and "{%" not in text and "None" not in text


def test_no_path_of_this_machine_and_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    home = tmp_path / "home-of-somebody"
    folder = home / "student"
    save_pruned(folder, teacher=str(home / "teacher"))
    (home / "teacher").mkdir()
    write_results(
        folder,
        command=f"hfcompress run {home}/recipe.yaml data.train={home}/films.csv seed=7",
        base_model=str(home / "teacher"),
        data={"name": "films.csv", "train_n": 10, "eval_n": 5},
    )
    text = write_card(folder).read_text()
    assert str(home) not in text and "home-of-somebody" not in text and str(tmp_path) not in text
    assert "hf_secret" not in text
    assert "hfcompress run path/to/recipe.yaml data.train=path/to/films.csv seed=7" in text
    assert (
        "Distilled from teacher for" in text and "* Teacher: teacher\n" in text and "* Base model: not said\n" in text
    )
    data = read(folder / "README.md").data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()
    assert data.eval_results[0].dataset_type == "films.csv"


def test_quantized(pruned, tmp_path):
    model = hfcompress.quantize(pruned, "nf4-dq")
    folder = tmp_path / "small"
    model.save_pretrained(folder)
    text = write_card(folder, base_model="google-bert/bert-base-uncased").read_text()
    assert (
        "3. Quantized 18 linear layers with bitsandbytes (nf4-dq); left as they are: bert.pooler.dense, classifier; "
        "everything else in float32.\n"
    ) in text
    data = read(folder / "README.md").data.to_dict()
    assert data["base_model_relation"] == "quantized" and "quantized" in data["tags"]


def test_without_results(pruned):
    text = write_card(pruned).read_text()
    assert "Nothing was measured for this model yet: `hfcompress measure` does." in text and "| teacher" not in text
    assert "How it was measured" not in text and "Reproduce" not in text
    assert f'hfcompress.load("path/to/{pruned.name}")' in text
    text = write_card(pruned, scores={"eval_loss": 0.123456, "eval_accuracy": 0.9}).read_text()
    assert "Last evaluation in training: eval_loss 0.1235, eval_accuracy 0.9." in text


def test_a_uniform_model_needs_transformers_alone(tmp_path):
    save_pruned(tmp_path, pattern="even")
    text = write_card(tmp_path, repo_id="me/even").read_text()
    code = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code == [
        "from transformers import AutoModelForSequenceClassification\n"
        'model = AutoModelForSequenceClassification.from_pretrained("me/even")'
    ]
    assert "72 of 144 neurons" in text and (tmp_path / PICTURE_FILE).is_file()


@pytest.mark.parametrize(
    ("name", "auto", "tag"),
    [
        ("vit", "AutoModelForImageClassification", "image-classification"),
        ("gpt2", "AutoModelForCausalLM", "text-generation"),
        ("llama", "AutoModelForCausalLM", "text-generation"),
        ("bert", "AutoModelForQuestionAnswering", "question-answering"),
        ("bert", "AutoModelForTokenClassification", "token-classification"),
        ("bert", "AutoModelForMaskedLM", "fill-mask"),
        ("bert", "AutoModel", "feature-extraction"),
        ("bert", "AutoModelForMultipleChoice", "multiple-choice"),
        ("t5", "AutoModelForSeq2SeqLM", "text2text-generation"),
        ("wav2vec2", "AutoModelForAudioClassification", "audio-classification"),
        ("vit", "AutoModel", None),
    ],
)
def test_a_model_to_which_nothing_was_done(name, auto, tag, tmp_path):
    make_model(name, auto).save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert "1. Nothing yet." in text and f"{auto}.from_pretrained(" in text and hasattr(transformers, auto)
    assert not (tmp_path / PICTURE_FILE).exists()
    data = read(tmp_path / "README.md").data
    assert data.pipeline_tag == tag and data.tags == ["hfcompress"]


def test_steps_of_others_stand_as_they_are(tmp_path):
    model = make_model("bert")
    add_step(model.config, "merge", method="mean", parts=2)
    add_step(model.config, "prune", by="hand")
    add_step(model.config, "distill")
    model.config.hfcompress["steps"].append({"note": "no step"})
    model.save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert '1. merge: {"method": "mean", "parts": 2}\n2. prune: {"by": "hand"}\n3. distill: {}\n' in text
    assert "* Teacher: not said" in text


BROKEN = {
    "{": "is not valid JSON",
    "[]": "must hold an object with a list of rows",
    '{"rows": {}}': "must hold an object with a list of rows",
    '{"rows": [1]}': "lacks numbers",
    '{"rows": [{"name": "x"}]}': "lacks numbers that the card shows (no 'latency')",
    json.dumps({"rows": [{**row("x", ".", 0.5), "latency": {"median_ms": 1.0}}]}): "lacks numbers",
    json.dumps({"rows": [{**row("x", ".", 0.5), "parameters": "many"}]}): "lacks numbers",
    "[" * 100_000: "is not valid JSON",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_broken_results(text, pruned):
    (pruned / RESULTS_FILE).write_text(text)
    with pytest.raises(ValueError) as caught:
        write_card(pruned)
    message = str(caught.value)
    assert BROKEN[text] in message and message.endswith("; measure the model again")
    assert len(message.splitlines()) == 1 and len(message) < 400
    assert not (pruned / "README.md").exists()


def test_images_have_no_length_and_other_metrics_no_percent(pruned):
    picture_row = row("x", ".", 0.5)
    picture_row["latency"].pop("length")
    picture_row["metric"]["name"] = "pearson"
    write_results(pruned, rows=[picture_row])
    text = write_card(pruned).read_text()
    assert "latency, ms (batch 32)" in text and "| x | 0.5000 [0.4790, 0.5190] |" in text


def test_layers_and_features_that_are_left(tmp_path):
    model = make_model("bert", "AutoModelForSequenceClassification")
    cut(model, Plan({"encoder.2.heads": (0,)}, {"encoder": (0, 2)}, tuple(range(24))))
    add_step(model.config, "prune", **PRUNED)
    model.save_pretrained(tmp_path)
    text = ModelCard.load(write_card(tmp_path)).text
    assert "5 of 8 heads are left in the layers that stayed. 2 of 3 layers are left. The hidden states have" in text
    assert "have 24 of 32 features left." in text
    assert re.search(r"encoder\.0 +#{24} +4/4 +#{24} +48/48\n", text)  # nothing was cut there
    assert "encoder.gone 1" in text and "1.52x measured for 1.50x, and cut." in text
    both = make_model("bart", "AutoModelForSeq2SeqLM")
    drop_layers(both, {"encoder": (0, 2), "decoder": (1,)})
    both.save_pretrained(tmp_path / "both")
    text = ModelCard.load(write_card(tmp_path / "both")).text
    assert "1 of 2 layers in decoder and 2 of 3 layers in encoder are left." in text and "features left" not in text


def test_everything_that_a_run_measures_now(pruned):
    """Changes with their tests, steps, classes, licences, energy, pictures, and the score in the metadata with its interval."""
    save_run(
        pruned, data={"name": "Films", "repository": "me/films", "config": "short", "split": "test", "eval_n": 1500}
    )
    card = read(write_card(pruned))
    text = card.text
    assert "| | accuracy, n = 1,500 | lost, points | parameters | MB on disk |" in text
    assert (
        "| 0.021 |" in text and "| joules per input |" in text and "Energy: RAPL, processor packages and memory" in text
    )
    assert "| pruned | 90.51 [88.41, 92.41] | 0.72 [0.22, 1.22], p = 0.046 | 22.71 M |" in text
    assert "2.11x [2.01, 2.21]" in text and "test: McNemar, exact." in text
    assert "| pruned → pruned + int8 | 0.40 [0.10, 0.70], p = 0.046 | 0.57x [0.47, 0.67] | -67 % |" in text
    assert "| class 1 | 100 | 80.0 | 60.0 | 20.0 |\n| class 0 | 100 | 90.0 | 89.0 | 1.0 |" in text
    assert "* Base model: google-bert/bert-base-uncased (licence apache-2.0, as its card says)" in text
    assert "* Data: Films, 1,500 examples for evaluation (licence not known)" in text
    for name in (PICTURE_FILE, TRADEOFF_FILE, CURVES_FILE):
        assert f"]({name})" in text
        with Image.open(pruned / name) as picture:
            assert picture.format == "PNG"
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables[:5]}) == 1, "head, rule and rows have as many cells"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("me/films", "Films")
    assert (result.dataset_config, result.dataset_split) == ("short", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9051)
    assert result.metric_name == "accuracy, n = 1,500: 90.51 [88.41, 92.41]"


@pytest.mark.parametrize(
    ("ours", "theirs"), [("pearson", "pearsonr"), ("rougeL", "rouge"), ("macro_f1", "f1"), ("perplexity", "perplexity")]
)
def test_metrics_have_the_names_of_the_hub(ours, theirs, pruned):
    rows = [row("teacher", "teacher", 0.9), row("pruned", ".", 0.8)]
    for entry in rows:
        entry["metric"]["name"] = ours
    write_results(pruned, rows=rows)
    assert read(write_card(pruned)).data.eval_results[0].metric_type == theirs


def test_names_stay_in_their_cells(pruned):
    save_run(pruned, label="a|b <img src=x>\n`c`")
    text = read(write_card(pruned)).text
    assert "| a\\|b &lt;img src=x&gt; 'c' |" in text and "<img" not in text


def test_many_classes_show_the_worst(pruned):
    counts = [{"name": f"c{number}", "n": 10, "right": 10} for number in range(40)]
    after = [{**each, "right": 10 - number % 7} for number, each in enumerate(counts)]
    write_results(pruned, rows=[row("teacher", "teacher", 0.9, classes=counts), row("pruned", ".", 0.8, classes=after)])
    text = write_card(pruned).read_text()
    assert "The 10 of 40 classes that lost most." in text
    shown = [line for line in text.splitlines() if line.startswith("| c")][1:]
    assert len(shown) == 10 and all(line.endswith("| 60.0 |") for line in shown[:5])


PRUNED = {
    "settings": {**PruneConfig(target={"speedup": 1.5}).model_dump(), "schedule": None},
    "sparsity": 0.4321,
    "reached": [{"goal": 0, "speedup": 1.52, "latency_ms": 3.0, "wanted": 1.5}],
    "units": {"encoder.1.heads": [1, 4]},
    "optimizer_steps": 0,
}
