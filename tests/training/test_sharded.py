"""FSDP 2 and DeepSpeed, two processes on the CPU: weights really are in shards, and the end is what one process comes to."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.checkpoints.packed import PackedLinear
from hfcompress.distillation import CacheContents, Teacher, write_cache
from hfcompress.training import sharded
from tests.training.launching import launched, read_facts
from tests.training.scenarios import Examples, build, compress, everything, vector
from tests.training.test_distributed import DESCENT, HALF, QAT

STRATEGIES = {"fsdp2": "fsdp", "deepspeed_zero2": "zero2", "deepspeed_zero3": "zero3"}
BERT = {"family": "bert", "task": "sequence"}
DISTIL = {"trainer": "DistillationTrainer"}
SAVING = {
    "dropout": 0.1,
    "teacher_width": 64,
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "save_steps": 2,
    "cut": "end",
}
INSIDE = {
    "hidden": {"weight": 1.0, "layers": "dynamic"},
    "attentions": {"weight": 1.0},
    "relations": {"weight": 1.0},
    "embeddings": {"weight": 1.0},
}
ROUNDED = {**QAT, "parts": ["distill"]}
COMPARED: dict[str, dict[str, Any]] = {
    "live": {**BERT, **DISTIL, **DESCENT},
    "cached": {**BERT, **DISTIL, **DESCENT, "distill": {"hidden": {"weight": 0.0}}},
    "wide": {**BERT, **DISTIL, **DESCENT, "teacher_width": 64},
    "inside": {**BERT, **DISTIL, **DESCENT, "distill": INSIDE},
    "causal": {"family": "llama", "task": "causal", **DISTIL, **DESCENT},
    "average": {**BERT, **DISTIL, **DESCENT, "average": 0.9},
    "clipped": {**BERT, **DISTIL, **DESCENT, "max_grad_norm": 0.5},
    "teacher-in-shards": {**BERT, **DISTIL, **DESCENT, "free_bytes": 0},
    "gates": {**BERT, **DESCENT, "cut": "end", "teacher_width": 64},
    "gates-accumulated": {
        **{"family": "gpt2", "task": "causal", **DESCENT, "cut": "end"},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    },
    "gates-movement": {"family": "vit", "task": "image", **DESCENT, "cut": "end", "criterion": "movement"},
    # Last: it leaves arguments behind under which DeepSpeed takes every model apart as it is made.
    "from-disk": {**BERT, **DISTIL, **DESCENT, "from_disk": True},
}
JOBS: dict[str, dict[str, Any]] = {
    "refused": {
        "do": "refuse",
        "cases": {
            "gradual": {},
            "obs": {"cut": "end", "criterion": "obs"},
            "learned": {"cut": "end", "criterion": "learned"},
            "at once": {"cut": "end", "prune": {"schedule": {"name": "constant", "start": 0.0}}},
            "both": {"cut": "end", "qat": QAT["qat"]},
            "on-policy": {**DISTIL, "family": "llama", "task": "causal", "prompt": 3, "distill": {"on_policy": {}}},
        },
    },
    "saved": {**BERT, **SAVING},
    "resumed": {**BERT, **SAVING, "resume_job": "saved/checkpoint-2"},
    "resumed-late": {**BERT, **SAVING, "resume_job": "saved/checkpoint-4"},
    "best": {
        **BERT,
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "prune": {"schedule": {"name": "constant", "start": 0.2}},
    },
    "qat": ROUNDED,
    "bf16": {**COMPARED["live"], "bf16": True},
    **COMPARED,
}


def jobs_of(strategy: str, cache: Path) -> dict[str, dict[str, Any]]:
    jobs = {name: dict(job) for name, job in JOBS.items() if name not in LEFT_OUT[strategy]}
    jobs["cached"]["cached"] = str(cache)
    return jobs


# What is refused there, without meaning, or (to save time) done under FSDP alone.
LEFT_OUT = {
    "fsdp2": set(),
    "deepspeed_zero2": {"teacher-in-shards", "causal", "inside", "gates-movement"},
    "deepspeed_zero3": {"average", "causal", "inside", "gates-movement"},
}


def make_cache(folder: Path) -> Path:
    data = Examples("bert", "sequence", 16)
    if not folder.exists():
        teacher = Teacher(build("bert", "sequence", seed=7))
        collate = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
        write_cache(teacher, data, collate, folder, CacheContents("all"), progress=False)
    return folder


@pytest.fixture(scope="session", params=STRATEGIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all jobs under one strategy, named like its file in configs/accelerate."""
    if request.param.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    cache = make_cache(tmp_path_factory.mktemp("cache") / "cache")
    return launched(tmp_path_factory, request.param, jobs_of(request.param, cache), config=request.param)


@functools.cache
def alone(job: str) -> tuple[torch.Tensor, Any, list[dict[str, float]], float]:
    """What one process comes to with the batch of both: weights, units, log, loss."""
    options = {key: value for key, value in COMPARED[job].items() if key not in ("free_bytes", "from_disk")}
    options |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2 * HALF}
    with tempfile.TemporaryDirectory() as scratch:
        if job == "cached":
            options["cached"] = str(make_cache(Path(scratch) / "cache"))
        trainer, model = compress(Path(scratch) / "run", **options)
        units = (getattr(model.config, "hfcompress", None) or {}).get("units")
        return vector(model), units, trainer.state.log_history, trainer.evaluate()["eval_loss"]


def check_against_one(folder: Path, job: str, *, tolerance: float = 1e-5) -> None:
    found, (weights, units, log, loss) = read_facts(folder, job), alone(job)
    model = hfcompress.load(folder / job / "final")
    assert found["world"] == 2 and found["same_digests"] and found["units"] == units
    torch.testing.assert_close(vector(model).cpu(), weights, rtol=0, atol=tolerance)
    logs = [[entry for entry in one if "loss" in entry] for one in (found["log"], log)]
    assert len(logs[0]) == len(logs[1]) == 6
    for ours, theirs in zip(*logs, strict=True):
        names = {name for name in theirs if "loss" in name or name == "sparsity"}
        assert names <= ours.keys() and len(names) > 1
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-4, abs=tolerance)
    assert found["eval"] == pytest.approx(loss, rel=1e-4)
    if units is not None:
        left = {site.name: site.units for site in find_sites(model)}
        assert len(units) > 2 and {name: pair[0] for name, pair in units.items()}.items() <= left.items()


@pytest.mark.parametrize("job", COMPARED)
def test_the_plan_and_the_weights_are_those_of_one_process(folder: Path, job: str) -> None:
    if job in LEFT_OUT[folder.name]:
        pytest.skip("left out under this strategy")
    check_against_one(folder, job)


def test_how_much_each_process_holds(folder: Path) -> None:
    sharding, seen = STRATEGIES[folder.name], 0
    for job in jobs_of(folder.name, Path()):
        if job == "refused":
            continue
        found = read_facts(folder, job)
        assert found["sharding"] == sharding and found["wrapper"] != "DistributedDataParallel"
        assert found["share_held"] == (1 if sharding == "zero2" else pytest.approx(0.5, abs=0.1))
        if "teacher" in found:
            of_teacher = found["teacher"]["share_held"]
            in_shards = job == "teacher-in-shards" or (sharding, job) == ("zero3", "from-disk")
            assert of_teacher == (pytest.approx(0.5, abs=0.1) if in_shards else 1)
            assert found["same_teacher"] and not found["teacher"]["training"]
        seen += 1
    assert seen == len(JOBS) - 1 - len(LEFT_OUT[folder.name]) >= 13


def test_what_cannot_be_done_is_said_before_the_first_step(folder: Path) -> None:
    name = {"fsdp": "FSDP", "zero2": "DeepSpeed", "zero3": "DeepSpeed ZeRO-3"}[STRATEGIES[folder.name]]
    said = read_facts(folder, "refused")
    assert f"cannot be done under {name}; use cut: end with criterion first_order or movement, or" in said["gradual"]
    assert "prune.criterion: obs" in said["obs"] and "configs/accelerate/ddp.yaml" in said["obs"]
    assert "prune.criterion: learned" in said["learned"]
    assert "a later start" in said["at once"]
    assert "do one after the other" in said["both"]
    assert ("on-policy" in said) is (STRATEGIES[folder.name] != "zero2")
    assert len(said) == 5 + ("on-policy" in said)


def test_resuming_is_exact(folder: Path) -> None:
    whole = hfcompress.load(folder / "saved" / "final")
    assert whole.config.hfcompress["units"] == read_facts(folder, "saved")["units"] or not sharded.is_sharded(whole)
    projections = []
    for job in ("saved", "resumed", "resumed-late"):
        again = hfcompress.load(folder / job / "final")
        assert again.config.hfcompress["units"] == whole.config.hfcompress["units"]
        assert torch.equal(vector(again), vector(whole))
        projections.append(safetensors.torch.load_file(folder / job / "projections.safetensors"))
    assert len(projections[0]) == 3
    assert all(torch.equal(one[name], projections[0][name]) for one in projections[1:] for name in one)
    # Before the last update a checkpoint holds all units, those that are closed with zeros; after it, it is cut.
    before, after = (hfcompress.load(folder / "saved" / f"checkpoint-{step}") for step in (2, 6))
    assert all(site.units == other.units for site, other in zip(find_sites(before), sites_of_dense(), strict=True))
    assert torch.equal(vector(after), vector(whole))
    closed = [site for site in find_sites(before) if not column_sums(before, site).all()]
    assert len(closed) > 1


def sites_of_dense() -> list[Any]:
    return find_sites(build("bert", "sequence", seed=0))


def column_sums(model: Any, site: Any) -> torch.Tensor:
    return model.get_submodule(site.readers[0]).weight.abs().sum(0)


def test_the_best_model_is_what_is_saved(folder: Path) -> None:
    losses = {entry["step"]: entry["eval_loss"] for entry in read_facts(folder, "best")["log"] if "eval_loss" in entry}
    assert set(losses) == {2, 4, 6}
    best = hfcompress.load(folder / "best" / f"checkpoint-{min(losses, key=losses.__getitem__)}")
    assert torch.equal(vector(best), vector(hfcompress.load(folder / "best" / "final")))


def test_rounded_weights_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    _, model = compress(tmp_path, **{**ROUNDED, "per_device_train_batch_size": 2 * HALF})
    theirs = hfcompress.load(folder / "qat" / "final")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) > 10 and theirs.config.hfcompress["steps"][-1]["step"] == "quantize"
    for name, module in packed.items():
        # A number between two of the grid may fall to either side by the last bit of its gradient.
        same = (module.weight - theirs.get_submodule(name).weight).abs() < 1e-5
        assert same.float().mean() > 0.99
    assert everything(theirs).isfinite().all()


def test_computing_in_bf16_comes_near(folder: Path) -> None:
    found, exact = (read_facts(folder, job) for job in ("bf16", "live"))
    assert found["same_digests"]
    losses = [[entry["loss"] for entry in one["log"] if "loss" in entry] for one in (found, exact)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert found["eval"] == pytest.approx(exact["eval"], rel=0.05)
    # DeepSpeed keeps the 32 bits with the optimizer and saves what it computes in, with a plain Trainer too.
    saved = torch.float32 if "fsdp2" in folder.name else torch.bfloat16
    assert {p.dtype for p in hfcompress.load(folder / "bf16" / "final").parameters()} == {saved}


# ---- without processes ----


def test_a_launch_that_starts_one_process_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "distributed_type: MULTI_CPU\nnum_processes: 3\nnum_machines: 1\nmachine_rank: 0\nuse_cpu: true\n"
    )
    launch = ["python", "/bin/accelerate", "launch"]
    asked = {
        (*launch, "--cpu", "--num_processes", "2", "train.py", "--num_processes", "7"): 2,
        (*launch, "--config_file", str(config), "-m", "train"): 3,
        ("python", "-m", "accelerate.commands.launch", "--num-processes=4", "train.py"): 4,
        ("/bin/accelerate-launch", "--num_processes", "5", "train.py"): 5,
        ("torchrun", "--nproc_per_node", "2", "train.py"): 1,
        ("make", "launch"): 1,
    }
    for command, processes in asked.items():
        parent = type("Parent", (), {"cmdline": lambda _, command=command: list(command)})()
        monkeypatch.setattr(sharded.psutil.Process, "parent", lambda _, parent=parent: parent)
        for started, said in ((None, processes > 1), ("2", False)):
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
            monkeypatch.delenv("WORLD_SIZE", raising=False)
            if started is not None:
                monkeypatch.setenv("WORLD_SIZE", started)
            caplog.clear()
            sharded.warn_if_alone.cache_clear()
            sharded.warn_if_alone()
            assert (f"asked for {processes} processes and started one" in caplog.text) is said
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    sharded.warn_if_alone.cache_clear()
    assert sharded.warn_if_alone() is None and len(asked) == 6


def test_digests_tell_models_apart() -> None:
    models = [build("bert", "sequence", seed=seed) for seed in (0, 0, 1)]
    digests = [sharded.digest(model) for model in models]
    assert digests[0] == digests[1] != digests[2]
    assert sharded.digest(models[0], {"units": 3}) != digests[0]


def test_a_whole_copy_is_the_model() -> None:
    model = build("gpt2", "causal", seed=0).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    copy = sharded.whole_copy(model, state)
    ids = torch.randint(3, 90, (2, 5))
    assert copy.lm_head.weight is copy.transformer.wte.weight
    assert copy.transformer.h[0].mlp.c_fc.weight.data_ptr() == state["transformer.h.0.mlp.c_fc.weight"].data_ptr()
    torch.testing.assert_close(copy(ids).logits, model(ids).logits, rtol=0, atol=0)
