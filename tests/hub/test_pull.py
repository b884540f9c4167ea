"""What is downloaded is compared with what was pushed; what one may not see is said."""

from __future__ import annotations

import hashlib
import json
import logging
import re

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import hfcompress
from hfcompress.checkpoints.hashes import TamperedError, read_hashes, sha256_of, verified_commit, with_hashes
from hfcompress.config import Recipe
from hfcompress.hub import push_folder, verify
from hfcompress.hub.push import send_folder
from hfcompress.runs import run_recipe
from tests.families import make_inputs, make_model, run_model
from tests.hub.folders import all_fine, save_pruned, write_results
from tests.hub_fixtures import connect
from tests.local_hub import LocalHub

REPO = "tester/small"


@pytest.fixture
def pushed(tmp_path, monkeypatch, local_hub):
    """A pruned model on the Hub, as it is in memory."""
    monkeypatch.setattr(verify, "_run_child", all_fine)
    model = save_pruned(tmp_path)
    write_results(tmp_path)
    push_folder(tmp_path, REPO)
    return model


def logits(model):
    return run_model(model, make_inputs("bert"))["logits"]


def test_the_card_knows_each_file(pushed, local_hub):
    files = local_hub.files(REPO)
    data = ModelCard(files["README.md"].decode()).data
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert data.to_dict()["hfcompress"]["sha256"] == {
        name: digest for name, digest in found.items() if name not in ("README.md", ".gitattributes")
    }
    assert len(found) >= 7
    # What the Hub itself reads of a card is as it was.
    assert data.eval_results[0].metric_value == 0.9051 and data.pipeline_tag == "text-classification"


def test_what_was_pushed_is_loaded_from_the_commit_that_was_looked_at(pushed, local_hub, caplog):
    with caplog.at_level(logging.DEBUG, logger="hfcompress"):
        again = hfcompress.load(REPO)
    assert torch.equal(logits(again), logits(pushed))
    head = local_hub.commits(REPO)[0].oid
    assert f"{REPO} at {head[:8]}: " in caplog.text and "files are as they were pushed" in caplog.text
    # A second time, and then without the Hub, from the cache.
    assert torch.equal(logits(hfcompress.load(REPO)), logits(pushed))
    local_hub.inject("*", ".", drop=True, times=10**6)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="hfcompress"):
        assert torch.equal(logits(hfcompress.load(REPO, local_files_only=True)), logits(pushed))
    assert "files are as they were pushed" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file_is_named_with_both_digests(name, pushed, local_hub):
    before = local_hub.files(REPO)[name]
    good = local_hub.commits(REPO)[0].oid
    changed = before[:-1] + bytes([before[-1] ^ 1])
    local_hub.overwrite(REPO, name, changed)
    said, found = (hashlib.sha256(content).hexdigest()[:12] for content in (before, changed))
    with pytest.raises(TamperedError) as caught:
        hfcompress.load(REPO)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.startswith(
        f"{REPO} at {local_hub.commits(REPO)[0].oid[:8]}: {name} "
    )
    assert f"SHA-256 {found}, the card says {said}" in message
    assert torch.equal(logits(hfcompress.load(REPO, revision=good)), logits(pushed))
    local_hub.overwrite(REPO, name, before)
    assert torch.equal(logits(hfcompress.load(REPO)), logits(pushed))


def test_the_auto_classes_compare_nothing(pushed, local_hub):
    before = local_hub.files(REPO)["model.safetensors"]
    local_hub.overwrite(REPO, "model.safetensors", before[:-1] + bytes([before[-1] ^ 1]))
    transformers.AutoModelForSequenceClassification.from_pretrained(REPO)


def test_a_file_that_would_be_loaded_in_its_place(pushed, local_hub):
    """Weights in parts were pushed; somebody adds a file that is preferred to them."""
    files = local_hub.files(REPO)
    local_hub.overwrite(REPO, "adapter_config.json", b'{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(TamperedError, match=r"adapter_config\.json was added after the model was pushed"):
        hfcompress.load(REPO)
    local_hub.overwrite(REPO, "adapter_config.json", None)
    # What no loader reads may be added and changed.
    local_hub.overwrite(REPO, "notes.txt", b"mine")
    local_hub.overwrite(REPO, "layers.png", b"no picture")
    local_hub.overwrite(REPO, "README.md", files["README.md"] + b"\nWritten by hand.\n")
    assert torch.equal(logits(hfcompress.load(REPO)), logits(pushed))


def test_damage_in_the_cache_is_found(pushed, local_hub):
    hfcompress.load(REPO)
    cached = next(local_hub.client_home.glob("hub/models--*/snapshots/*/model.safetensors"))
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.resolve().write_bytes(bytes(content))
    with pytest.raises(TamperedError, match=r"model\.safetensors is not the file that was pushed"):
        hfcompress.load(REPO)
    assert torch.equal(logits(hfcompress.load(REPO, force_download=True)), logits(pushed))


@pytest.mark.parametrize(
    "card",
    [
        None,
        b"# By hand\n",
        b"---\nlicense: mit\n---\n# By hand\n",
        b"---\n[: no yaml\n---\n",
        b"---\nhfcompress: 3\n---\n",
    ],
)
def test_without_hashes_a_repository_loads_as_it_is(card, pushed, local_hub, caplog):
    local_hub.overwrite(REPO, "README.md", card)
    with caplog.at_level(logging.DEBUG, logger="hfcompress"):
        assert torch.equal(logits(hfcompress.load(REPO)), logits(pushed))
    assert re.search("no card to compare|its card has no hashes", caplog.text)


def test_hashes_that_are_none(pushed, local_hub):
    local_hub.overwrite(REPO, "README.md", b"---\nhfcompress:\n  sha256:\n    config.json: 12\n---\n")
    with pytest.raises(TamperedError, match=f"{REPO}: the hashes in its card are not one SHA-256 in hexadecimal"):
        hfcompress.load(REPO)


def test_a_branch_has_its_own_hashes(pushed, tmp_path, local_hub):
    with torch.no_grad():
        pushed.classifier.bias += 1
    pushed.save_pretrained(tmp_path)
    push_folder(tmp_path, REPO, revision="v2")
    assert torch.equal(logits(hfcompress.load(REPO, revision="v2")), logits(pushed))
    assert float((logits(hfcompress.load(REPO)) + 1 - logits(pushed)).abs().max()) <= 1e-6
    assert verified_commit(REPO, revision="v2") == local_hub.heads(REPO)["v2"] != verified_commit(REPO)


def test_weights_in_parts_replace_whole_ones_and_the_reverse(tmp_path, local_hub):
    """What is left of an earlier push must not be loaded in place of the new weights."""
    one, two = (make_model("bert", "AutoModelForSequenceClassification", seed=seed).eval() for seed in (1, 2))
    for number, (model, shard) in enumerate([(one, "5GB"), (two, "20KB"), (one, "5GB"), (two, "20KB")]):
        folder = tmp_path / str(number)
        model.save_pretrained(folder, max_shard_size=shard)
        assert (folder / "model.safetensors.index.json").is_file() == (shard == "20KB")
        send_folder(folder, "tester/parts")
        for load in (hfcompress.load, transformers.AutoModelForSequenceClassification.from_pretrained):
            assert torch.equal(logits(load("tester/parts").eval()), logits(model))


def test_an_adapter_and_its_base_are_both_compared(tmp_path, local_hub, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(verify, "_run_child", all_fine)
    base = save_pruned(tmp_path / "base")
    adapted = peft.get_peft_model(
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(target_modules=["query"], r=2),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    push_folder(tmp_path / "adapter", "tester/tuned-adapter")
    assert torch.equal(logits(hfcompress.load("tester/tuned-adapter").eval()), logits(base))
    first = local_hub.commits("tester/tuned-adapter")[0].oid
    assert torch.equal(logits(hfcompress.load("tester/tuned-adapter", revision=first).eval()), logits(base))
    before = local_hub.files("tester/tuned")["model.safetensors"]
    local_hub.overwrite("tester/tuned", "model.safetensors", before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(TamperedError, match=r"^tester/tuned at \w{8}: model\.safetensors is not the file"):
        hfcompress.load("tester/tuned-adapter")


def test_hashes_are_those_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # the first example of FIPS 180-2
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    digest = sha256_of(tmp_path / "file")
    (tmp_path / "README.md").write_text(
        with_hashes("---\nlicense: mit\nhfcompress: {sha256: {old: x}}\n---\n# A\n", {"b": digest})
    )
    assert read_hashes(tmp_path / "README.md") == {"b": digest}
    assert (tmp_path / "README.md").read_text().endswith("---\n# A\n")


# ---- what one may not see ----


@pytest.fixture
def gated(tmp_path, local_hub: LocalHub):
    """A model for whose files one has to ask; it is somebody else's."""
    folder = tmp_path / "gated"
    make_model("bert", "AutoModelForSequenceClassification").save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    local_hub.add_user("meta")
    local_hub.create_repo("meta/gated", gated=True, files=files)
    return "meta/gated"


@pytest.mark.parametrize("token", ["tester", None])
def test_a_gated_model_says_what_to_do(token, gated, local_hub):
    with pytest.MonkeyPatch.context() as patch:
        if token is None:
            connect(local_hub, patch, token=None)
        with pytest.raises(OSError) as caught:
            hfcompress.load(gated)
    assert str(caught.value) == (
        "meta/gated is no folder, and could not be had from the Hub: it is gated; ask for access on its page, and log in with: hf auth login"
    )
    local_hub.consent(gated, "tester")
    assert hfcompress.load(gated).config.model_type == "bert"


def test_a_private_model_looks_as_if_it_were_not_there(local_hub):
    local_hub.add_user("other")
    local_hub.create_repo("other/secret", private=True, files={"config.json": b"{}"})
    with pytest.raises(
        OSError, match="there is no such repository, or it is private; log in with: hf auth login"
    ) as caught:
        hfcompress.load("other/secret")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("section", ["model", "teacher"])
def test_a_run_on_a_gated_base_stops_with_one_line(section, gated, tmp_path, local_hub):
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"word {number},{number % 2}\n" for number in range(12)))
    recipe = {
        "task": "text-classification",
        section: {"name": gated},
        "data": {"train": str(data), "holdout": 0.5},
        "quantize": {"presets": ["int8"]},
        "output": str(tmp_path / "run"),
    }
    with pytest.raises((ValueError, OSError)) as caught:
        run_recipe(Recipe.from_dict(recipe), command="x")
    message = str(caught.value)
    assert (
        len(message.splitlines()) == 1
        and message.startswith(gated)
        and "it is gated; ask for access on its page" in message
    )


def test_a_gated_repository_of_ones_own_is_pushed_to(tmp_path, local_hub, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    save_pruned(tmp_path)
    local_hub.create_repo("tester/gated", gated=True)
    push_folder(tmp_path, "tester/gated")
    assert json.loads(local_hub.files("tester/gated")["config.json"])["model_type"] == "bert"
