"""Adapters trained against the model in full precision: checkpoints, the best, two processes, a whole run, the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

import hfcompress
from hfcompress.checkpoints.adapters import RECORD_FILE, base_of
from hfcompress.checkpoints.record import read_steps
from hfcompress.config import QuantizeConfig, Recipe, RecipeError
from hfcompress.hub import push_folder, verify
from hfcompress.quantization import merge_adapter
from hfcompress.runs import run_recipe
from tests.families import predictions, run_model
from tests.hub.folders import all_fine
from tests.quantization.recovering import SHARED, adapters_of, make_trainer, student
from tests.quantization.test_quantize import quantized_modules, relative
from tests.runs.test_pipeline import material, own_cache  # noqa: F401
from tests.training.scenarios import Examples, build

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).parents[2]
BATCH = Examples("bert", "sequence", 16).batch(*range(16))


@pytest.fixture
def folder(tmp_path):
    """A saved model with widths that bitsandbytes would repack, and without dropout."""
    build("bert", "sequence", seed=7, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "full")
    return tmp_path


def logits(model):
    return predictions(run_model(model.eval(), {name: value for name, value in BATCH.items() if name != "labels"}))


def divergence(model, full):
    one, other = logits(full).log_softmax(-1), logits(model).log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("preset", ["nf4-dq", "int8"])
def test_training_brings_the_teacher_nearer_and_checkpoints_go_on_exactly(preset, folder):
    full, saving = hfcompress.load(folder / "full"), {"save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(folder, preset, folder / "run", max_steps=12, **saving)
    small = hfcompress.load(folder / preset)
    frozen = {name: value.clone() for name, value in small.state_dict().items()}
    before = divergence(trainer.model, full)
    trainer.train()
    plain = divergence(small, full)
    # Where nearly nothing was lost there is nearly nothing to win.
    assert divergence(trainer.model, full) < (0.1 if preset == "nf4-dq" else 0.9) * before and before < plain
    base = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(base.get(name, base.get(_inside(name))), value) for name, value in frozen.items())
    got = logits(trainer.model)

    last = folder / "run" / "checkpoint-12"
    files = {path.name for path in last.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files and "model.safetensors" not in files
    assert base_of(last) == str(folder / preset)
    assert torch.equal(logits(hfcompress.load(last)), got)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(hfcompress.load(folder / preset), last)), got)
    resumed = make_trainer(folder, preset, folder / "again", max_steps=12, **saving)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-6"))
    assert torch.equal(adapters_of(resumed.model), adapters_of(trainer.model))

    trainer.save_model(str(folder / "adapter"))
    record = json.loads((folder / "adapter" / RECORD_FILE).read_text())
    assert [step["step"] for step in record["steps"]] == ["quantize", "adapt", "distill"]
    merged = merge_adapter(folder / "adapter")
    assert relative(logits(merged), got) < (1e-5 if preset == "nf4-dq" else 0.1)
    assert [step["step"] for step in read_steps(merged.config)] == ["quantize", "adapt", "distill", "merge"]


def _inside(name):
    """Where a tensor of a layer is once it has an adapter."""
    for part in (".weight.", ".bias", ".weight", ".SCB"):
        at = name.rfind(part)
        if at > 0:
            return f"{name[:at]}.base_layer{name[at:]}"
    return name


@pytest.mark.parametrize("preset", ["nf4", "int8"])
def test_the_best_adapters_are_loaded(preset, folder):
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    scores = [0.1, 0.9, 0.2]
    trainer = make_trainer(folder, preset, folder / "run", **settings)
    trainer.compute_metrics = lambda _: {"score": scores.pop(0)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(folder / "run" / "checkpoint-4")
    best, last = (hfcompress.load(folder / "run" / f"checkpoint-{step}") for step in (4, 6))
    assert torch.equal(logits(trainer.model), logits(best)) and not torch.equal(logits(best), logits(last))


@pytest.mark.parametrize("preset", ["nf4-dq"])
def test_two_processes_each_with_a_quantized_model_of_its_own(preset, folder):
    student(folder, preset)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "tests.quantization.recovering", str(folder), preset),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((folder / f"facts-{preset}.json").read_text())
    assert facts == {"world": 2, "same": True, "devices": ["cpu"]}
    alone = make_trainer(folder, preset, folder / "one", per_device_train_batch_size=8, **SHARED)
    start = adapters_of(alone.model).clone()
    alone.train()
    theirs = safetensors.torch.load_file(folder / f"weights-{preset}.safetensors")["adapters"]
    moved = adapters_of(alone.model) - start
    assert float(moved.norm()) > 1e-3
    assert float((theirs - start - moved).norm() / moved.norm()) < 1e-3
    saved = hfcompress.load(folder / f"adapter-{preset}")
    assert relative(logits(saved), logits(alone.model)) < 1e-4 and quantized_modules(saved)


# ---- the recipe ----


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"init": "lora", "iterations": 3}, "iterations are those of init: loftq; leave them out"),
        ({"targets": []}, "targets names no layer; give all-linear or names"),
        ({"train": {"seed": 3}}, "train.seed is the recipe's own to set; leave it out"),
    ],
)
def test_settings_that_do_not_go_together(section, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"quantize": {"recover": section}})
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_settings_go_to_the_presets_they_are_of():
    config = QuantizeConfig(threshold=2.0, storage="bfloat16", compute_dtype="float16", dtype="bfloat16")
    assert config.settings_of("int8") == {"skip": [], "dtype": "bfloat16", "threshold": 2.0}
    four = {"skip": [], "dtype": "bfloat16", "compute_dtype": "float16", "storage": "bfloat16"}
    assert config.settings_of("nf4-dq") == config.settings_of("fp4") == four
    assert QuantizeConfig().settings_of("int8") == {"skip": [], "dtype": "auto"}
    assert QuantizeConfig().settings_of("nf4")["storage"] is None


@pytest.fixture
def finished(material, tmp_path, monkeypatch):  # noqa: F811
    """A run that quantizes, and recovers with adapters of both kinds of base."""
    monkeypatch.setattr(verify, "_run_child", all_fine)
    sections = {
        **material,
        "task": "text-classification",
        "quantize": {"presets": ["nf4-dq"], "recover": {"rank": 2, "iterations": 2, "train": {"max_steps": 2}}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 8},
        "measure": {"batch": 2, "length": 8, "rounds": 3, "warmup": 0, "threads": 1, "device": "cpu"},
        "output": str(tmp_path / "tiny"),
    }
    return tmp_path / "tiny", run_recipe(Recipe.from_dict(sections), command="hfcompress run tiny.yaml")


def test_a_run_recovers_and_its_adapter_goes_to_the_hub_with_its_base(finished, local_hub):
    output, rows = finished
    names = ["teacher", "teacher + nf4-dq", "teacher + nf4-dq + adapter"]
    assert [row["name"] for row in rows] == names
    assert [row["folder"] for row in rows] == ["teacher", "student-nf4-dq", "student-nf4-dq-adapter"]
    assert rows[2]["disk_bytes"] > rows[1]["disk_bytes"] and rows[2]["parameters"] > rows[1]["parameters"]
    adapter = output / "student-nf4-dq-adapter"
    files = {path.name for path in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", RECORD_FILE, "results.json"} <= files
    assert "config.json" not in files and "model.safetensors" not in files
    assert base_of(adapter) == str(output / "student-nf4-dq-base")  # of several iterations the base is one of its own
    card = ModelCard.load(adapter / "README.md")
    assert "Put adapters of rank 2 on 6 layers, starting from what quantization took away." in card.text
    assert "With transformers and peft" in card.text and "| teacher + nf4-dq + adapter |" in card.text

    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = run_model(hfcompress.load(adapter), inputs)["logits"]
    push_folder(adapter, "tester/small-adapter")
    assert sorted(local_hub.repo_ids()) == ["tester/small", "tester/small-adapter"]
    theirs = json.loads(local_hub.files("tester/small-adapter")["adapter_config.json"])
    assert theirs["base_model_name_or_path"] == "tester/small"
    assert base_of(adapter) == str(output / "student-nf4-dq-base")  # here it goes on naming the folder
    pushed = local_hub.files("tester/small-adapter")
    assert not [name for name, content in pushed.items() if str(output).encode() in content]
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("tester/small", "adapter")
    again = hfcompress.load("tester/small-adapter")
    assert torch.equal(run_model(again, inputs)["logits"], expected) and quantized_modules(again)
    assert torch.equal(
        run_model(merge_adapter("tester/small-adapter"), inputs)["logits"].round(decimals=4), expected.round(decimals=4)
    )
