"""Every file under configs/ is read by what will read it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hfcompress.config import Recipe, Task
from hfcompress.runs.arguments import training_arguments
from hfcompress.tasks import TASKS

ROOT = Path(__file__).parents[1] / "configs"
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
ACCELERATE = [path for path in FILES if path.parts[0] == "accelerate"]
RECIPES = [path for path in FILES if path.parts[0] != "accelerate"]

SCRIPTS = {
    "text_classification": "bert_sst2",
    "image_classification": "vit_images",
    "audio_classification": "wav2vec2_sounds",
    "token_classification": "bert_conll2003",
    "question_answering": "bert_squad",
    "multiple_choice": "bert_swag",
    "masked_lm": "bert_wikitext",
    "causal_lm": "smollm_wikitext",
    "seq2seq": "t5_xsum",
    "sentence_embeddings": "minilm_sentences",
}
PROCESSES = {
    "cpu": ("NO", 1),
    "ddp": ("MULTI_GPU", 2),
    "fsdp2": ("FSDP", 2),
    "deepspeed_zero2": ("DEEPSPEED", 2),
    "deepspeed_zero3": ("DEEPSPEED", 2),
}


def test_how_many_there_are():
    demos = {"demo_text", "demo_vision"}
    assert {path.stem for path in RECIPES} == demos | set(SCRIPTS.values())
    assert {path.stem for path in ACCELERATE} == set(PROCESSES)
    assert len(FILES) == 17 and {path.suffix for path in FILES} == {".yaml"}
    tasks = {Recipe.from_yaml(ROOT / f"{stem}.yaml").task for stem in SCRIPTS.values()}
    assert tasks == set(TASKS) == set(get_args(Task))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_its_recipe(script):
    """Each names the other, and both the same task."""
    recipe = Recipe.from_yaml(ROOT / f"{SCRIPTS[script]}.yaml")
    code = (ROOT.parent / "scripts" / f"{script}.py").read_text()
    assert f'run_task("{recipe.task}", ' in code and f"configs/{SCRIPTS[script]}.yaml" in code
    assert (
        f"scripts/{script}.py --config configs/{SCRIPTS[script]}.yaml" in (ROOT / f"{SCRIPTS[script]}.yaml").read_text()
    )


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe(path, tmp_path):
    recipe = Recipe.from_yaml(ROOT / path)
    assert None not in (
        recipe.task,
        recipe.model,
        recipe.data,
        recipe.output,
        recipe.prune,
        recipe.distill,
        recipe.quantize,
    )
    teacher = recipe.teacher.train if recipe.teacher is not None else {}
    for settings in (recipe.train, {**recipe.train, **teacher}):
        arguments = training_arguments(tmp_path, settings, seed=recipe.seed)
        for key, value in settings.items():
            assert getattr(arguments, key) == value
    assert recipe.train and arguments.num_train_epochs > 0 and arguments.learning_rate > 0
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    # The comment on top says what it is, and how to run it names this very file.
    text = (ROOT / path).read_text()
    assert text.startswith("# ") and (f"hfcompress run configs/{path}" in text or "scripts/demo_" in text)


@pytest.mark.parametrize("path", ACCELERATE, ids=str)
def test_an_accelerate_config(path):
    config = load_config_from_file(str(ROOT / path))
    kind, processes = PROCESSES[path.stem]
    assert str(config.distributed_type).rpartition(".")[2] == kind
    assert (config.num_processes, config.num_machines) == (processes, 1)
    assert config.use_cpu is (path.stem == "cpu")
    assert bool(config.fsdp_config) is (kind == "FSDP") and bool(config.deepspeed_config) is (kind == "DEEPSPEED")
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_the_recipes_in_the_readme_are_recipes():
    text = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    sections = [set(Recipe.from_dict(yaml.safe_load(block)).model_fields_set) for block in blocks]
    assert sections == [{"distill", "prune"}, {"contract"}, {"distill", "student", "teacher"}, {"qat"}]
