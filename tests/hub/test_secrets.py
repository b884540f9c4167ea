"""No token stands in logs, cards, records, files or errors: looked for in all of them, whatever happens."""

from __future__ import annotations

import json
import logging
import os
import traceback

import httpx2
import pytest

import hfcompress
from hfcompress.cli.main import main
from hfcompress.config import Recipe, RecipeError
from hfcompress.hub import PushError, push_folder, verify
from hfcompress.hub.push import send_folder
from hfcompress.measurement.provenance import command_line, hide_secrets
from tests.hub.folders import all_fine, save_pruned, write_results
from tests.local_hub import SIGNATURE, TOKEN
from tests.training.scenarios import make_trainer

REAL = "hf_" + "AbCdEfGhIj" * 3 + "KlMn"  # as the Hub makes them


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    save_pruned(tmp_path / "model")
    write_results(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def everything_said(caplog):
    """All that any library logs, from the finest level on."""
    names = ("", "hfcompress", "huggingface_hub", "transformers", "httpx2", "httpcore2")
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).propagate = True
    caplog.handler.setLevel(logging.DEBUG)
    yield lambda: caplog.text
    for name, (level, propagate) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = propagate


def every_file(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def require_none(folder, local_hub, said, *tokens):
    """No token in what was logged, in the folder, or at the Hub."""
    contents = [path.read_bytes() for path in every_file(folder)]
    for repo in local_hub.repo_ids():
        for name in local_hub.heads(repo):
            for commit in local_hub.commits(repo, name):
                contents += [commit.title.encode(), *(file.content for file in commit.files.values())]
    assert len(contents) >= 5 and len(said) > 1000
    for token in tokens:
        assert token not in said and not any(token.encode() in content for content in contents)


def test_a_push_and_a_pull_say_nothing(pruned, local_hub, everything_said):
    local_hub.add_user("other", token=REAL)
    push_folder(pruned, "tester/small")
    push_folder(pruned, "other/small", token=REAL, private=True)
    push_folder(pruned, "tester/small", token=REAL, create_pr=True)
    hfcompress.load("tester/small")
    hfcompress.load("other/small", token=REAL)
    assert "Request " in everything_said()  # the client's own words are among them
    require_none(pruned, local_hub, everything_said(), TOKEN, REAL)


@pytest.mark.parametrize("fault", [{"status": s} for s in (401, 403, 404, 409, 429, 503)] + [{"drop": True}])
def test_a_push_that_fails_says_nothing(fault, pruned, local_hub, everything_said, backoff_waits, capfd):
    local_hub.add_user("other", token=REAL)
    paths = (
        "/api/models/",
        "/api/repos/create",
        "/preupload/",
        "/objects/batch",
        "/storage/",
        "/objects/verify",
        "/commit/",
    )
    for number, path in enumerate(paths):
        local_hub.inject("*", path, times=100, **fault)
        with pytest.raises(PushError) as caught:
            send_folder(pruned, f"other/small-{number}", token=REAL)
        local_hub.heal()
        trace = "".join(traceback.format_exception(caught.value))
        assert REAL not in trace and TOKEN not in trace and len(str(caught.value).splitlines()) == 1
    heard = capfd.readouterr()
    assert REAL not in heard.out + heard.err and TOKEN not in heard.out + heard.err
    require_none(pruned, local_hub, everything_said(), TOKEN, REAL)


@pytest.mark.parametrize("status", [400, 401, 403, 503])
def test_a_hub_that_repeats_the_token_is_not_quoted(status, pruned, local_hub, caplog, backoff_waits):
    local_hub.add_user("other", token=REAL)
    local_hub.inject("*", ".", times=100, status=status, headers={"X-Error-Message": f"no use in {REAL} and {TOKEN}"})
    with caplog.at_level(logging.DEBUG), pytest.raises(PushError) as caught:
        send_folder(pruned, "other/small", token=REAL)
    said = [record.getMessage() for record in caplog.records if not record.name.startswith("httpcore")]
    assert said and not any(secret in text for text in [*said, str(caught.value)] for secret in (REAL, TOKEN))


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 418}, {"status": 400}, {"drop": True}])
def test_signed_addresses_are_not_logged(fault, pruned, local_hub, caplog, capfd, backoff_waits):
    """Who has one can write to storage; the client alone would log it at each try."""
    local_hub.inject("PUT", "/storage/", times=100, **fault)
    with pytest.raises(PushError) as caught:
        send_folder(pruned, "tester/small")
    heard = capfd.readouterr()
    assert SIGNATURE not in caplog.text + heard.out + heard.err + str(caught.value)
    assert ("/storage/models/tester/small/" in caplog.text) == (fault != {"status": 418} and fault != {"status": 400})


def test_a_trainer_keeps_its_token_to_itself(tmp_path, local_hub, everything_said, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    local_hub.add_user("other", token=REAL)
    options = {"push_to_hub": True, "hub_token": REAL, "hub_model_id": "other/run", "hub_strategy": "all_checkpoints"}
    trainer = make_trainer(
        tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2, hub_always_push=True, **options
    )
    trainer.train()
    trainer.push_to_hub()
    assert len(local_hub.commits("other/run")) == 4
    pushed = json.loads(local_hub.files("other/run")["training_args.json"])
    assert pushed["hub_token"] == "<HUB_TOKEN>"
    require_none(tmp_path, local_hub, everything_said(), TOKEN, REAL)


def test_the_command_line_says_nothing(pruned, local_hub, everything_said, capfd, monkeypatch, backoff_waits):
    monkeypatch.setenv("HF_TOKEN", REAL)
    assert main(["push", str(pruned), "tester/small"]) == 2  # nobody has that token
    heard = capfd.readouterr()
    assert (
        heard.err.strip()
        .splitlines()[-1]
        .startswith("hfcompress: tester/small was not pushed: the Hub does not know you")
    )
    assert REAL not in heard.out + heard.err
    require_none(pruned, local_hub, everything_said() + "-" * 1000, REAL)


def test_a_token_in_the_address_of_the_hub(pruned, monkeypatch, backoff_waits, caplog):
    def refuse(request):
        raise httpx2.ConnectError(f"no route to {request.url}")

    address = f"http://me:{REAL}@127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.utils._http._GLOBAL_CLIENT", httpx2.Client(transport=httpx2.MockTransport(refuse))
    )
    with caplog.at_level(logging.DEBUG, logger="hfcompress"), pytest.raises(PushError) as caught:
        push_folder(pruned, "tester/small")
    assert "the Hub cannot be reached (no route to http://***@127.0.0.1:9/api/models/tester/small" in str(caught.value)
    assert REAL not in caplog.text and caplog.text.count("trying again") == 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", json.dumps({"command": f"hfcompress run r.yaml train.hub_token={REAL}"})),
        ("config.json", json.dumps({"token": TOKEN})),
        ("notes.md", f"Use {REAL}."),
        ("data.yaml", "train: https://me:secret@example.com/train.csv"),
    ],
)
def test_a_file_that_holds_a_secret_is_not_pushed(name, text, tmp_path, local_hub):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        send_folder(tmp_path, "tester/small")
    assert str(caught.value).startswith(f"{name} holds an access token or a password; take it out")
    assert not any(secret in str(caught.value) for secret in (REAL, TOKEN, "secret@"))
    assert local_hub.requests == []


def test_vocabularies_may_hold_anything(tmp_path, local_hub):
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"://":1, "me:you@":2}}')
    (tmp_path / "vocab.txt").write_text("://a:b@c")
    send_folder(tmp_path, "tester/words")
    assert {"tokenizer.json", "vocab.txt"} <= set(local_hub.files("tester/words"))


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"hub_token": REAL}},
        {"teacher": {"train": {"hub_token": REAL}}},
        {"quantize": {"presets": ["int8"], "recover": {"train": {"hub_token": REAL}}}},
    ],
)
def test_recipes_take_no_token(sections):
    with pytest.raises(
        RecipeError, match=r"train\.hub_token would be written down with the recipe; leave it out, and log"
    ) as caught:
        Recipe.from_dict(sections)
    assert REAL not in str(caught.value)


def test_what_was_typed_is_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-kind")
    words = [
        "hfcompress",
        "run",
        f"train.x={REAL}",
        "data.train=https://me:pass@host/a.csv",
        "y=a-token-of-another-kind",
    ]
    shown = command_line(words)
    assert shown == "hfcompress run 'train.x=***' 'data.train=https://***@host/a.csv' 'y=***'"
    signed = "PUT https://s3.example.com/a?X-Amz-Signature=0123&X-Amz-Security-Token=45&part=1"
    assert hide_secrets(signed) == "PUT https://s3.example.com/a?***&***&part=1"
    harmless = ["hf_transfer", "https://huggingface.co/a/b", "a@b.c", "x: y@z", "hf_datasets_of_mine.csv"]
    assert [hide_secrets(text) for text in harmless] == harmless
    assert os.environ["HF_TOKEN"] not in shown
