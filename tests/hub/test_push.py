"""Pushing with the real client to a local stand-in for the Hub."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import hfcompress
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.cli.main import main
from hfcompress.hub import PushError, VerificationError, push, push_folder, verify
from hfcompress.hub.card import PICTURE_FILE, RESULTS_FILE
from hfcompress.hub.verify import PROBE_FILE
from tests.families import make_inputs, run_model
from tests.hub.folders import all_fine, none_fine, save_pruned, write_results
from tests.hub_fixtures import connect
from tests.local_hub import TOKEN
from tests.training.scenarios import Examples, make_trainer

FILES = {"config.json", "model.safetensors", "README.md", MODELING_FILE, PROBE_FILE, PICTURE_FILE, ".gitattributes"}
PRIVATE_STUFF = (
    "checkpoint-5/model.safetensors",
    "checkpoint-5/optimizer.pt",
    "training_args.bin",
    "pytorch_model.bin",
    "state.pkl",
    "state.pickle",
    "old.ckpt",
    "rng.pth",
    "_note.txt",
    ".cache/secret",
    "runs/events.1",
    "train.log",
)


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """A saved folder with its model; loading in fresh processes is taken for granted."""
    monkeypatch.setattr(verify, "_run_child", all_fine)
    return tmp_path, save_pruned(tmp_path)


def one_line(error):
    message = str(error)
    assert len(message.splitlines()) == 1 and TOKEN not in message and len(message) < 400
    return message


def nothing_sent(hub):
    return all(request.method == "GET" for request in hub.requests)


def test_a_push_is_one_commit_and_loads_again(pruned, local_hub):
    folder, model = pruned
    write_results(folder)
    for name in PRIVATE_STUFF:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("private")
    commit = push_folder(folder, "tester/small", private=True)
    before, after = reversed(local_hub.commits("tester/small"))
    assert (before.parent, after.parent, after.oid) == (None, before.oid, commit.oid)
    assert after.title == "Upload a model compressed with hfcompress"
    assert local_hub.is_private("tester/small")
    files = local_hub.files("tester/small")
    assert {PICTURE_FILE, *files} == FILES | {RESULTS_FILE, *(name for name in files if name.endswith(".png"))}
    assert not [name for name, content in files.items() if TOKEN.encode() in content or content == b"private"]
    assert not [name for name, content in files.items() if str(folder).encode() in content]

    card = ModelCard(files["README.md"].decode())
    assert 'hfcompress.load("tester/small")' in card.text
    assert "load 2e-07, auto 2e-07, remote 2e-07" in card.text  # as all_fine said
    assert card.data.eval_results[0].metric_value == 0.9051

    inputs = make_inputs("bert")
    expected = run_model(model, inputs)["logits"]
    for again in (
        hfcompress.load("tester/small"),
        transformers.AutoModelForSequenceClassification.from_pretrained("tester/small"),
    ):
        assert float((run_model(again, inputs)["logits"] - expected).abs().max()) <= 1e-6


def test_a_name_without_a_user_and_a_branch(pruned, local_hub):
    folder, _ = pruned
    push_folder(folder, "mine", revision="v1", message="First")
    assert local_hub.repo_ids() == ["tester/mine"] and not local_hub.is_private("tester/mine")
    assert len(local_hub.commits("tester/mine")) == 1
    assert local_hub.commits("tester/mine", "v1")[0].title == "First"
    assert len(local_hub.commits("tester/mine", "v1")) == 2
    assert b'hfcompress.load("tester/mine")' in local_hub.files("tester/mine", "v1")["README.md"]
    assert hfcompress.load("tester/mine", revision="v1").config.hfcompress["version"] == 1


def test_pushing_again_adds_one_commit(pruned, local_hub):
    folder, model = pruned
    push_folder(folder, "tester/small")
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(folder)
    push_folder(folder, "tester/small")
    assert len(local_hub.commits("tester/small")) == 3


def test_what_does_not_reload_does_not_reach_the_hub(pruned, local_hub, monkeypatch):
    folder, _ = pruned
    monkeypatch.setattr(verify, "_run_child", none_fine)
    with pytest.raises(VerificationError, match="nothing was pushed"):
        push_folder(folder, "tester/small")
    assert local_hub.repo_ids() == [] and nothing_sent(local_hub)


def test_broken_results_leave_nothing_behind(pruned, local_hub):
    folder, _ = pruned
    (folder / RESULTS_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        push_folder(folder, "tester/small")
    assert local_hub.repo_ids() == [] and nothing_sent(local_hub)


def test_a_folder_that_is_not_there(tmp_path, local_hub):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        push_folder(tmp_path / "nowhere", "tester/small")
    assert nothing_sent(local_hub)


def test_refusals_are_one_line(pruned, local_hub, monkeypatch):
    folder, _ = pruned
    with pytest.raises(PushError) as caught:
        push_folder(folder, "somebody-else/small")
    assert "somebody-else/small was not pushed: you may not write there" in one_line(caught.value)
    with pytest.raises(PushError) as caught:
        push_folder(folder, "tester/small", token="hf_wrong_token_of_nobody")
    assert "the Hub does not know you; log in with: hf auth login" in one_line(caught.value)
    assert "hf_wrong" not in str(caught.value)
    with pytest.raises(PushError) as caught:
        push_folder(folder, "no good/name--")
    assert "is not a name the Hub takes" in one_line(caught.value)
    assert local_hub.repo_ids() == []
    with pytest.MonkeyPatch.context() as other:
        connect(local_hub, other, token=None)
        with pytest.raises(PushError) as caught:
            push_folder(folder, "tester/small")
    assert "log in with" in one_line(caught.value) or "you may not" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "there is no such user, organization, repository or branch"),
        (403, "you may not write"),
        (400, "it answered 400"),
    ],
)
def test_refusals_while_uploading(status, said, pruned, local_hub):
    folder, _ = pruned
    local_hub.inject("POST", r"/api/models/.*/commit/.*", status=status, times=5)
    with pytest.raises(PushError) as caught:
        push_folder(folder, "tester/small")
    assert said in one_line(caught.value)
    assert len(local_hub.commits("tester/small")) == 1


def test_a_hub_that_cannot_be_reached(pruned, local_hub, backoff_waits):
    folder, _ = pruned
    local_hub.stop()
    with pytest.raises(PushError) as caught:
        push_folder(folder, "tester/small")
    assert "tester/small was not pushed: the Hub cannot be reached" in one_line(caught.value)
    local_hub.start()


def test_who_is_not_known_learns_it_before_the_folder_is_loaded(pruned, local_hub, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", none_fine)
    for token, repo in (("hf_wrong", "tester/small"), (TOKEN, "tester/small")):
        with pytest.raises((PushError, VerificationError)) as caught:
            push_folder(pruned[0], repo, token=token)
        assert isinstance(caught.value, PushError) == (token == "hf_wrong")
    with pytest.raises(PushError, match="there is no such user, organization, repository or branch"):
        push_folder(pruned[0], "tester/small", create_pr=True)
    assert nothing_sent(local_hub)


def test_a_pull_request_to_somebody_elses_model(pruned, local_hub):
    folder, model = pruned
    local_hub.add_user("friend")
    local_hub.create_repo("friend/small", files={"config.json": b"{}", "notes.txt": b"theirs"})
    commit = push_folder(folder, "friend/small", create_pr=True, message="Smaller")
    assert commit.pr_url == f"{local_hub.url}/friend/small/discussions/1" and commit.pr_num == 1
    assert set(local_hub.files("friend/small")) == {".gitattributes", "config.json", "notes.txt"}
    assert [c.title for c in local_hub.commits("friend/small", "refs/pr/1")] == ["Smaller", "initial commit"]
    inputs = make_inputs("bert")
    again = hfcompress.load("friend/small", revision="refs/pr/1")
    assert torch.equal(run_model(again, inputs)["logits"], run_model(model, inputs)["logits"])
    with pytest.raises(ValueError, match="a pull request is always onto main; leave out the revision v1"):
        push_folder(folder, "friend/small", create_pr=True, revision="v1")


def test_the_command_opens_pull_requests(pruned, local_hub, capsys):
    folder, _ = pruned
    assert main(["push", str(folder), "tester/small"]) == 0
    assert main(["push", str(folder), "tester/small", "--pr"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f"nothing to change: {local_hub.url}/tester/small has it all"
    local_hub.overwrite("tester/small", "config.json", b"{}")
    assert main(["push", str(folder), "tester/small", "--pr"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"pull request: {local_hub.url}/tester/small/discussions/1"]
    assert main(["push", str(folder), "tester/small", "--pr", "--revision", "v1"]) == 2
    assert capsys.readouterr().err.endswith("leave out the revision v1, or the pull request\n")


def test_private_is_for_new_repositories(pruned, local_hub, caplog):
    local_hub.create_repo("tester/open")
    push_folder(pruned[0], "tester/open", private=True)
    assert "tester/open was there before and is public; only a new repository is made private" in caplog.text
    assert not local_hub.is_private("tester/open")


def test_an_adapter_of_a_folder_is_no_pull_request(tmp_path, local_hub, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    monkeypatch.setattr(push, "require_loadable", lambda folder: [])
    save_pruned(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    local_hub.create_repo("tester/small-adapter")
    with pytest.raises(
        ValueError, match="which is not on the Hub; push without a pull request, or name its repository in"
    ):
        push_folder(tmp_path / "adapter", "tester/small-adapter", create_pr=True)
    assert local_hub.repo_ids() == ["tester/small-adapter"]


def test_a_trainer_pushes_what_it_verified(tmp_path, local_hub):
    """The only one here with real fresh processes."""
    trainer = make_trainer(
        tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2, hub_model_id="tester/trained"
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    commits = local_hub.commits("tester/trained")
    assert len(commits) == 2 and commits[-1].parent is None
    files = local_hub.files("tester/trained")
    assert {"config.json", "model.safetensors", "README.md", MODELING_FILE, PROBE_FILE} <= set(files)
    assert not [
        name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl")) or name.startswith("checkpoint")
    ]
    text = files["README.md"].decode()
    assert "Last evaluation in training: eval_loss" in text and 'hfcompress.load("tester/trained")' in text
    assert "Each of these ways was tried in a fresh process" in text and str(tmp_path) not in text
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    batch = Examples("bert", "sequence").batch(0, 1, 2)
    expected = run_model(model, batch)["logits"]
    again = hfcompress.load("tester/trained")
    assert float((run_model(again, batch)["logits"] - expected).abs().max()) <= 1e-6
    steps = [step["step"] for step in json.loads(files["config.json"])["hfcompress"]["steps"]]
    assert sorted(steps) == ["distill", "prune"]


def test_a_trainer_does_not_push_what_does_not_reload(tmp_path, local_hub, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", none_fine)
    trainer = make_trainer(tmp_path / "run", max_steps=4, hub_model_id="tester/trained")
    trainer.train()
    with pytest.raises(VerificationError, match="nothing was pushed"):
        trainer.push_to_hub()
    assert [len(local_hub.commits(repo)) for repo in local_hub.repo_ids()] in ([], [1])
