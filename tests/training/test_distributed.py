"""Two processes on the CPU: the same plan and weights on both, equal to what one process does with the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import hfcompress
from hfcompress.anatomy import find_sites, find_stream
from hfcompress.checkpoints.packed import PackedLinear
from tests.training.launching import launched, read_facts
from tests.training.scenarios import (
    GRADIENT_CASES,
    GRADIENT_TRAINERS,
    Examples,
    build,
    compress,
    gradients,
    make_trainer,
    vector,
)
from tests.training.test_exact_loss import difference

HALF = 4  # examples a process and step
DESCENT = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "logging_strategy": "steps", "logging_steps": 1}
SAVING = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
WIDE = {"family": "bert", "task": "sequence", "teacher_width": 64}
VIT = {"family": "vit", "task": "image"}
LEARNED = {"criterion": {"name": "learned", "gate_learning_rate": 0.5}}
EXAMPLES = {"criterion": {"name": "obs", "samples": 16}}
LAYERED = {
    **EXAMPLES,
    "prune": {
        "target": {"parameters": [0.8, 0.4], "scope": "layers"},
        "units": ["layers", "neurons"],
        "at_least": {"neurons": 40},
    },
}
# So few neurons may go that hidden features have to.
NARROWER = {
    **EXAMPLES,
    "prune": {
        "target": {"parameters": 0.6, "scope": "layers"},
        "units": ["neurons", "hidden"],
        "multiple_of": {"neurons": 4, "hidden": 4},
        "at_least": {"neurons": 40},
    },
}
QAT = {
    "family": "bert",
    "task": "sequence",
    "qat": {"format": "int3-g16-asym", "first": ["int8-channel"], "end": 0.3},
    **DESCENT,
}

ROUNDED = {
    "qat": QAT,
    **{
        f"qat-{ranges}": {**QAT, "qat": {"format": "int8-channel", "activations": {"ranges": ranges, "samples": 8}}}
        for ranges in ("learned", "moving-average")
    },
}

# What two processes do with 4 examples each is compared with one process and 8: no dropout there, for it is drawn per process.
COMPARED: dict[str, dict[str, Any]] = {
    "bert": {**WIDE, **DESCENT},
    "bert-end": {**WIDE, **DESCENT, "cut": "end"},
    "bert-accumulated": {**WIDE, **DESCENT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "bert-token": {"family": "bert", "task": "token", **DESCENT},
    "vit": {**VIT, **DESCENT},
    "vit-end": {**VIT, **DESCENT, "cut": "end"},
    "llama": {"family": "llama", "task": "causal", **DESCENT},
    "bert-learned": {"family": "bert", "task": "sequence", **LEARNED, **DESCENT},
    "inside": {
        "trainer": "DistillationTrainer",
        "distill": {
            "hidden": {"weight": 1.0, "layers": "dynamic"},
            "attentions": {"weight": 1.0},
            "relations": {"weight": 1.0},
            "embeddings": {"weight": 1.0},
        },
        **DESCENT,
    },
    "average": {"trainer": "DistillationTrainer", "average": 0.9, **DESCENT},
    "plain": {"trainer": "PlainTrainer", **DESCENT},
}
JOBS: dict[str, dict[str, Any]] = {
    **COMPARED,
    "bert-saved": {**WIDE, **SAVING},
    "bert-resumed": {**WIDE, **SAVING, "resume_job": "bert-saved/checkpoint-2"},
    "vit-saved": {**VIT, **SAVING, "cut": "end"},
    "vit-resumed": {**VIT, **SAVING, "cut": "end", "resume_job": "vit-saved/checkpoint-2"},
    # Which answers are drawn depends on how the examples are shared out, so this is not what one process does.
    "bert-obs": {**WIDE, **DESCENT, **EXAMPLES},
    "layers-saved": {**VIT, **SAVING, **LAYERED},
    "layers-resumed": {**VIT, **SAVING, **LAYERED, "resume_job": "layers-saved/checkpoint-4"},
    "narrow-saved": {"family": "bert", "task": "sequence", **SAVING, **NARROWER},
    "narrow-resumed": {
        "family": "bert",
        "task": "sequence",
        **SAVING,
        **NARROWER,
        "resume_job": "narrow-saved/checkpoint-4",
    },
    "learned-saved": {**VIT, **SAVING, **LEARNED},
    "learned-resumed": {**VIT, **SAVING, **LEARNED, "resume_job": "learned-saved/checkpoint-2"},
    "best": {
        **WIDE,
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "prune": {"schedule": {"name": "constant", "start": 0.2}},
    },
    "hidden-only": {
        "trainer": "DistillationTrainer",
        "distill": {"task": {"weight": 0.0}, "logits": {"weight": 0.0}, "hidden": {"weight": 1.0, "layers": "last"}},
        "teacher_width": 64,
    },
    # What is written is drawn anew on each process.
    "on-policy": {
        "trainer": "DistillationTrainer",
        "family": "llama",
        "task": "causal",
        "prompt": 3,
        "distill": {"on_policy": {"share": 0.5, "max_new_tokens": 4}, "hidden": {"weight": 0.0}},
        **DESCENT,
    },
    **ROUNDED,
    "stale-reducer": {**WIDE, "keep_reducer": True},
    "own-means": {
        "do": "gradients",
        "case": "bert-token",
        "trainer": "PlainTrainer",
        "batch": HALF,
        "average_tokens_across_devices": False,
    },
    **{
        f"gradients-{case}-{trainer}-{silent}": {
            "do": "gradients",
            "case": case,
            "trainer": trainer,
            "silent": silent,
            "batch": HALF,
        }
        for case in GRADIENT_CASES
        for trainer in GRADIENT_TRAINERS
        for silent in (False, True)
    },
}


# Examples that three processes share evenly; their criteria see different numbers of examples.
THREE = {
    "bert": {**WIDE, **DESCENT, "n": 24},
    "vit-end": {**VIT, **DESCENT, "cut": "end", "n": 24},
    "obs": {**WIDE, **DESCENT, **EXAMPLES, "n": 24},
    "qat": {**QAT, "n": 24},
}


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all jobs, run in one process group."""
    return launched(tmp_path_factory, "two processes", JOBS)


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three processes."""
    return launched(tmp_path_factory, "three processes", THREE, processes=3)


def facts(two: Path, job: str) -> dict[str, Any]:
    return read_facts(two, job)


def weights(two: Path, job: str) -> torch.Tensor:
    return safetensors.torch.load_file(two / job / "weights.safetensors")["weights"]


PROJECTIONS = {
    "hidden-only": 1,
    **{name: 3 for name, job in JOBS.items() if "family" in job and "teacher_width" in job},
}
TRAINED = [name for name, job in JOBS.items() if not job.keys() & {"do", "keep_reducer", "qat"}]


@pytest.mark.parametrize("job", TRAINED)
def test_both_processes_end_with_the_same_model(two: Path, job: str) -> None:
    found = facts(two, job)
    assert found["world"] == 2 and found["wrapper"] == "DistributedDataParallel"
    assert found["same_weights"]
    model = hfcompress.load(two / job / "final")
    assert torch.equal(vector(model), weights(two, job))
    count = len(list(model.parameters())) + found.get("projections", 0)
    assert found["in_optimizer"] == count, "the optimizer must hold the model's parameters, and the projections"
    if "projections" in found:
        assert found["same_projections"] and found["projections"] == PROJECTIONS.get(job, 0)
        assert found["same_teacher"] and not found["teacher"]["training"]
        assert found["teacher"]["type"].endswith(("Classification", "CausalLM")), "the teacher is wrapped"
    if JOBS[job].get("trainer") is None:
        assert model.config.hfcompress.get("units") in (found["units"], None)  # None if the plain config says it
        left = {site.name: site.units for site in find_sites(model)}
        assert {name: pair[0] for name, pair in (found["units"] or {}).items()}.items() <= left.items()
        assert job.startswith(("layers", "narrow")) or len(found["units"]) > 2
        if job.startswith("narrow"):
            assert find_stream(model).width < 32


def test_the_jobs_cover_what_they_should() -> None:
    assert len(TRAINED) == 25 and len(JOBS) == 30 + 7 * 3 * 2


@pytest.mark.parametrize("job", ROUNDED)
def test_rounded_layers_are_those_of_one_process(two: Path, tmp_path: Path, job: str) -> None:
    found = facts(two, job)
    assert found["world"] == 2 and found["same_weights"]
    _, model = compress(tmp_path, **{**ROUNDED[job], "per_device_train_batch_size": 2 * HALF})
    theirs = hfcompress.load(two / job / "final")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 18
    for name, module in packed.items():
        # A number between two of the grid may fall to either side by the last bit of its gradient.
        same = (module.weight - theirs.get_submodule(name).weight).abs() < 1e-5
        assert same.float().mean() > 0.99
        if job != "qat":
            torch.testing.assert_close(theirs.get_submodule(name).input_step, module.input_step, rtol=1e-4, atol=0)


def test_without_a_new_reducer_the_processes_drift_apart(two: Path) -> None:
    found = facts(two, "stale-reducer")
    assert found["world"] == 2 and len(found["units"]) > 2
    assert not found["same_weights"], "this run has to fail: otherwise the check of the others shows nothing"


# ---- the same as one process with the same batch ----


@pytest.mark.parametrize("job", COMPARED)
def test_the_plan_and_the_weights_are_those_of_one_process(two: Path, job: str, tmp_path: Path) -> None:
    options = {**COMPARED[job], "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2 * HALF}
    trainer, model = compress(tmp_path, **options)
    found = facts(two, job)
    if "trainer" not in COMPARED[job]:
        assert found["units"] == model.config.hfcompress["units"]
    torch.testing.assert_close(weights(two, job), vector(model), rtol=1e-4, atol=1e-5)
    logs = [[entry for entry in log if "loss" in entry] for log in (found["log"], trainer.state.log_history)]
    assert len(logs[0]) == len(logs[1]) == 6
    names = {"loss"} if job == "plain" else {"loss", "loss_task", "loss_logits", "loss_hidden"}
    names |= {"sparsity"} if "trainer" not in COMPARED[job] else set()
    names |= {"loss_attentions", "loss_relations", "loss_embeddings"} if job == "inside" else set()
    for ours, theirs in zip(*logs, strict=True):
        assert names <= ours.keys() == theirs.keys()
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3)
    assert found["eval"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("silent", [False, True], ids=["labels", "one process without labels"])
@pytest.mark.parametrize("trainer", GRADIENT_TRAINERS)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_one_batch_of_eight_is_two_processes_with_four(
    two: Path, tmp_path: Path, case: str, trainer: str, silent: bool
) -> None:
    found = safetensors.torch.load_file(two / f"gradients-{case}-{trainer}-{silent}" / "gradients.safetensors")
    whole = gradients(tmp_path, case=case, trainer=trainer, silent=silent)
    assert len(found) > 20
    assert difference(found, whole) < 1e-6


def test_each_process_with_its_own_mean_if_that_is_asked_for(two: Path) -> None:
    found = safetensors.torch.load_file(two / "own-means" / "gradients.safetensors")
    data, parts = Examples("bert", "token", 8), []
    for rows in (range(4), range(4, 8)):
        model = build("bert", "token", seed=0)
        model(**data.batch(*rows)).loss.backward()
        parts.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert difference(found, mean) < 1e-6
    together = gradients(two / "x", case="bert-token", trainer="PlainTrainer")
    assert difference(found, together) > 1e-3


@pytest.mark.parametrize("job", THREE)
def test_three_processes(three: Path, job: str, tmp_path: Path) -> None:
    found = facts(three, job)
    assert found["world"] == 3 and found["wrapper"] == "DistributedDataParallel"
    assert found["same_weights"] and found["same_digests"]
    if job == "obs":  # which answers are drawn depends on how the examples are shared out
        assert len(found["units"]) > 2
        return
    _, model = compress(tmp_path, **{**THREE[job], "per_device_train_batch_size": 3 * HALF})
    assert found["units"] == model.config.hfcompress["units"]
    if job != "qat":
        torch.testing.assert_close(weights(three, job), vector(model), rtol=1e-4, atol=1e-5)


# ---- checkpoints ----


def test_layers_that_go_are_the_same_on_both_and_every_goal_is_left(two: Path) -> None:
    final = hfcompress.load(two / "layers-saved" / "final")
    assert final.config.hfcompress["layers"] == {"encoder": [1, 3]}
    goal = hfcompress.load(two / "layers-saved" / "parameters-0.8")
    assert goal.config.hfcompress["layers"] == {"encoder": [2, 3]}
    assert [step["step"] for step in goal.config.hfcompress["steps"]] == ["prune", "distill"]
    assert goal.config.hfcompress["steps"][0]["optimizer_steps"] == 3


@pytest.mark.parametrize("kind", ["bert", "vit", "learned", "layers", "narrow"])
def test_resuming_on_two_processes_is_exact_to_the_bit(two: Path, kind: str) -> None:
    assert facts(two, f"{kind}-resumed")["same_weights"]
    assert torch.equal(weights(two, f"{kind}-resumed"), weights(two, f"{kind}-saved"))
    both = [
        safetensors.torch.load_file(two / f"{kind}-{run}" / "projections.safetensors") for run in ("saved", "resumed")
    ]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert len(both[0]) == len(both[1]) == (3 if kind == "bert" else 0)
    middle, end = (hfcompress.load(two / f"{kind}-saved" / f"checkpoint-{step}") for step in (2, 6))
    assert not torch.equal(vector(middle)[:100], vector(end)[:100])
    states = {path.name for path in (two / f"{kind}-saved" / "checkpoint-2").glob("rng_state_*.pth")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}


def test_one_process_goes_on_from_two(two: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **WIDE, **SAVING, per_device_train_batch_size=2 * HALF)
    trainer.train(resume_from_checkpoint=str(two / "bert-saved" / "checkpoint-2"))
    assert trainer.state.global_step == 6 and 0.5 <= trainer.pruner.sparsity() < 0.6


def test_the_best_model_is_on_both(two: Path) -> None:
    losses = {entry["step"]: entry["eval_loss"] for entry in facts(two, "best")["log"] if "eval_loss" in entry}
    assert set(losses) == {2, 4, 6}
    best = hfcompress.load(two / "best" / f"checkpoint-{min(losses, key=losses.__getitem__)}")
    assert torch.equal(vector(best), weights(two, "best"))
