"""What is pushed while training goes on, as `hub_strategy` says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import CommitInfo, ModelCard, snapshot_download

import hfcompress
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.hub import PushError, verify
from hfcompress.training import DistillationTrainer
from hfcompress.training.exact import PUSHING_FOLDER
from tests.families import run_model
from tests.hub.folders import all_fine
from tests.local_hub import TOKEN
from tests.training.scenarios import Examples, compress, make_trainer, vector

REPO = "tester/run"
ROOT = {".gitattributes", "README.md", "config.json", "model.safetensors", "training_args.json"}
TRAINING_STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "hfcompress_checkpoint.json"}


@pytest.fixture(autouse=True)
def _without_fresh_processes(monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)


def train(folder, strategy, **options):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "push_to_hub": True, "hub_model_id": REPO}
    settings |= {"hub_strategy": strategy, "hub_always_push": True, **options}
    trainer = make_trainer(folder, **settings)
    trainer.train()
    return trainer


def outputs(model):
    return run_model(model, Examples("bert", "sequence").batch(0, 1, 2))["logits"]


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", ()),
        ("every_save", ([], [])),
        ("checkpoint", (["last-checkpoint"], ["last-checkpoint"])),
        ("all_checkpoints", (["checkpoint-2"], ["checkpoint-2", "checkpoint-4"])),
    ],
)
def test_each_save_is_one_commit_that_loads(strategy, folders, tmp_path, local_hub):
    trainer = train(tmp_path / "run", strategy)
    commits = local_hub.commits(REPO)[::-1]
    titles = ["initial commit", "Training in progress, step 2", "Training in progress, step 4"]
    assert [commit.title for commit in commits] == titles[: 1 + len(folders)]
    for commit, places, step in zip(commits[1:], folders, (2, 4)[: len(folders)], strict=True):
        files = {name: file.content for name, file in commit.files.items()}
        root = {name for name in files if "/" not in name}
        assert root - {MODELING_FILE} == ROOT
        assert {name.partition("/")[0] for name in files if "/" in name} == set(places)
        for place in places:
            assert {name.removeprefix(f"{place}/") for name in files if name.startswith(place)} >= TRAINING_STATE | {
                "model.safetensors"
            }
        last = tmp_path / "run" / f"checkpoint-{step}"
        assert files["model.safetensors"] == (last / "model.safetensors").read_bytes()
        expected = outputs(hfcompress.load(last))
        for cls in (hfcompress.load, transformers.AutoModelForSequenceClassification.from_pretrained):
            assert torch.equal(outputs(cls(REPO, revision=commit.oid)), expected)
        card = files["README.md"].decode()
        assert f"In training: the state after {step} steps" in card and "neither measured nor verified" in card
        assert not any(word in card for word in ("from_pretrained", "hfcompress.load", "fresh process"))
    assert not list((tmp_path / "run" / PUSHING_FOLDER).glob("*"))
    # The last push takes the place of all that.
    trainer.push_to_hub()
    files = local_hub.files(REPO)
    assert len(local_hub.commits(REPO)) == len(commits) + 1
    assert 'hfcompress.load("tester/run")' in files["README.md"].decode() and verify.PROBE_FILE in files
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert float((outputs(hfcompress.load(REPO)) - outputs(model)).abs().max()) <= 1e-6


def test_a_run_goes_on_from_the_hub(tmp_path, local_hub):
    """A machine is lost after step 2; what the Hub has leads to the same weights."""
    whole = train(tmp_path / "whole", "checkpoint")
    revision = local_hub.commits(REPO)[1].oid
    assert local_hub.commits(REPO)[1].title.endswith("step 2")
    snapshot = snapshot_download(REPO, revision=revision, local_dir=tmp_path / "fetched")
    trainer, _ = compress(tmp_path / "on", max_steps=4, resume=Path(snapshot) / "last-checkpoint")
    assert torch.equal(vector(trainer.model), vector(whole.model))


@pytest.mark.parametrize("options", [{"cut": "end"}, {"trainer": DistillationTrainer}, {"family": "gpt2"}])
def test_other_runs_are_pushed_too(options, tmp_path, local_hub):
    family = options.get("family", "bert")
    trainer = train(tmp_path / "run", "every_save", **options)
    loaded = 0
    for commit in local_hub.commits(REPO)[:-1]:
        step = int(commit.title.rpartition(" ")[2])
        files = {name: file.content for name, file in commit.files.items()}
        assert files["model.safetensors"] == (tmp_path / "run" / f"checkpoint-{step}/model.safetensors").read_bytes()
        batch = Examples(family, "sequence").batch(0, 1, 2)
        again = run_model(hfcompress.load(REPO, revision=commit.oid), batch)["logits"]
        assert torch.equal(again, run_model(hfcompress.load(tmp_path / "run" / f"checkpoint-{step}"), batch)["logits"])
        loaded += 1
    assert loaded == 2 and trainer.hub_model_id == REPO


def test_training_goes_on_when_a_push_fails(tmp_path, local_hub, backoff_waits, caplog):
    local_hub.inject("POST", "/commit/", status=403, times=1)
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        trainer = train(tmp_path / "run", "every_save")
    assert trainer.state.global_step == 4 and backoff_waits == []
    told = [record.getMessage() for record in caplog.records if "state of step 2 is not on the Hub" in record.message]
    assert len(told) == 1 and "you may not write there" in told[0] and TOKEN not in told[0]
    assert [commit.title for commit in local_hub.commits(REPO)[:-1]] == ["Training in progress, step 4"]
    assert not list((tmp_path / "run" / PUSHING_FOLDER).glob("*"))


def test_a_repository_that_may_not_be_made_stops_before_training(tmp_path, local_hub):
    with pytest.raises(PushError, match="somebody/run was not pushed: you may not write there") as caught:
        train(tmp_path / "run", "end", hub_model_id="somebody/run")
    assert len(str(caught.value).splitlines()) == 1
    assert local_hub.repo_ids() == []


def test_a_busy_hub_does_not_stop_training_before_it_began(tmp_path, local_hub, backoff_waits):
    local_hub.inject("POST", "/api/repos/create", status=503, times=2)
    assert train(tmp_path / "run", "end", max_steps=1).hub_model_id == REPO
    assert len(backoff_waits) == 2


def test_what_a_killed_run_left_is_removed(tmp_path, local_hub):
    left = tmp_path / "run" / PUSHING_FOLDER / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    train(tmp_path / "run", "end")
    assert not left.exists()


def test_a_trainer_pushes_as_it_is_told(tmp_path, local_hub):
    trainer = make_trainer(tmp_path / "run", max_steps=2, hub_private_repo=True, hub_revision="v1", hub_model_id="own")
    trainer.train()
    commit = trainer.push_to_hub("Here it is", license="mit", tags="small")
    assert isinstance(commit, CommitInfo) and commit.oid == local_hub.heads("tester/own")["v1"]
    assert trainer.hub_model_id == "tester/own" and local_hub.is_private("tester/own")
    assert local_hub.commits("tester/own", "v1")[0].title == "Here it is"
    card = ModelCard(local_hub.files("tester/own", "v1")["README.md"].decode())
    assert card.data.license == "mit" and "small" in card.data.tags
    later = trainer.push_to_hub(blocking=False, revision="v2", private=False)
    assert later.result(timeout=30).oid == local_hub.heads("tester/own")["v2"]
    proposed = trainer.push_to_hub(create_pr=True)
    assert proposed.pr_url.endswith("tester/own/discussions/1")
    assert set(local_hub.heads("tester/own")) == {"main", "v1", "v2", "refs/pr/1"}
    assert set(local_hub.files("tester/own")) == {".gitattributes"}
    with pytest.raises(ValueError, match="a pull request is always onto main; leave out the revision v1"):
        trainer.push_to_hub(create_pr=True, revision="v1")


def test_one_push_at_a_time_unless_told_otherwise(tmp_path, local_hub):
    """While a push is under way the next is left out, as Trainer does."""
    local_hub.inject("POST", "/preupload/", drop=True, carry_out=True, hang_s=1.5, times=1)
    train(tmp_path / "run", "every_save", hub_always_push=False)
    assert len(local_hub.commits(REPO)) in (2, 3)
    assert local_hub.commits(REPO)[-2].title == "Training in progress, step 2"


def test_weights_in_the_checkpoint_are_what_was_hashed(tmp_path, local_hub):
    train(tmp_path / "run", "every_save")
    files = local_hub.files(REPO)
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert set(data["hfcompress"]["sha256"]) == set(files) - {"README.md", ".gitattributes"}
    assert safetensors.torch.load(files["model.safetensors"]) and json.loads(files["config.json"])
