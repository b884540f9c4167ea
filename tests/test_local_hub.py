"""The local Hub, asked by the real `huggingface_hub` client and by transformers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import transformers
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
    hf_api,
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash
from safetensors.torch import load
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.hub_fixtures import connect, hub_env
from tests.local_hub import TOKEN, USER, LocalHub

WORDS = ["[PAD]", "[UNK]", "a", "fine", "dull", "film"]


@pytest.fixture
def api(local_hub: LocalHub) -> HfApi:
    return HfApi(endpoint=local_hub.url, token=TOKEN)


@pytest.fixture(scope="module")
def classifier() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=len(WORDS)
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "upload"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "notes.txt").write_text("notes")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: LocalHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """What a test pushed: all but the file that every new repository has."""
    return {path: data for path, data in hub.files(repo_id, revision).items() if path != ".gitattributes"}


# ---------------------------------------------------------------------------------------- users and rights


def test_the_token_names_the_user(local_hub: LocalHub, api: HfApi) -> None:
    other = local_hub.add_user("other", role="read", organizations=["acme"])

    assert api.whoami()["name"] == USER
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert hf_api.whoami()["name"] == USER  # from the environment, at the endpoint of the environment
    assert api.whoami(token=other)["name"] == "other"
    assert [organization["name"] for organization in api.whoami(token=other)["orgs"]] == ["acme"]


def test_a_missing_or_wrong_token_is_401(local_hub: LocalHub, api: HfApi) -> None:
    assert httpx2.get(f"{local_hub.url}/api/whoami-v2", trust_env=False).status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        api.whoami(token="hf_nobody")
    assert caught.value.response.status_code == 401

    local_hub.create_repo("tester/open")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api.model_info("tester/open", token="hf_nobody")
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_create_repo(local_hub: LocalHub, api: HfApi) -> None:
    url = api.create_repo("mine", private=True)
    assert (url.repo_id, str(url)) == ("tester/mine", f"{local_hub.url}/tester/mine")
    assert local_hub.is_private("tester/mine") and api.model_info("tester/mine").private

    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("tester/mine")
    assert caught.value.response.status_code == 409
    assert api.create_repo("tester/mine", exist_ok=True) == url
    assert local_hub.is_private("tester/mine")

    assert api.create_repo("mine", repo_type="dataset").repo_type == "dataset"
    assert local_hub.repo_ids() == ["tester/mine"]
    assert local_hub.repo_ids(repo_type="dataset") == ["tester/mine"]
    assert [commit.title for commit in local_hub.commits("tester/mine")] == ["initial commit"]


def test_a_repo_is_created_only_in_a_namespace_of_ones_own(local_hub: LocalHub, api: HfApi) -> None:
    member = local_hub.add_user("member", organizations=["acme"])
    reader = local_hub.add_user("reader", role="read")
    assert api.create_repo("acme/theirs", token=member).repo_id == "acme/theirs"

    refused = [("acme/mine", TOKEN), ("other/mine", TOKEN), ("reader/mine", reader)]
    for repo_id, token in refused:
        with pytest.raises(HfHubHTTPError, match="rights to create") as caught:
            api.create_repo(repo_id, token=token)
        assert caught.value.response.status_code == 403
    assert local_hub.repo_ids() == ["acme/theirs"]


@pytest.mark.parametrize(
    ("who", "private", "deed", "status"),
    [
        ("owner", False, "read", 200),
        ("owner", True, "read", 200),
        ("owner", False, "write", 200),
        ("owner", True, "write", 200),
        ("stranger", False, "read", 200),
        ("stranger", True, "read", 404),
        ("stranger", False, "write", 403),
        ("stranger", True, "write", 404),
        ("nobody", False, "read", 200),
        ("nobody", True, "read", 401),
        ("nobody", False, "write", 401),
        ("nobody", True, "write", 401),
        ("owner with a read token", True, "read", 200),
        ("owner with a read token", True, "write", 403),
    ],
)
def test_who_may_do_what(local_hub: LocalHub, who: str, private: bool, deed: str, status: int) -> None:
    tokens: dict[str, Any] = {
        "owner": TOKEN,
        "owner with a read token": local_hub.add_user(USER, token="hf_read", role="read"),
        "stranger": local_hub.add_user("stranger"),
        "nobody": False,
    }
    local_hub.create_repo("tester/repo", private=private, files={"a.txt": b"a"})
    api = HfApi(endpoint=local_hub.url, token=tokens[who])

    def attempt() -> None:
        if deed == "read":
            assert Path(api.hf_hub_download("tester/repo", "a.txt")).read_bytes() == b"a"
        else:
            api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="tester/repo")

    if status == 200:
        attempt()
    else:
        with pytest.raises(HfHubHTTPError) as caught:
            attempt()
        assert caught.value.response.status_code == status
        assert isinstance(caught.value, RepositoryNotFoundError) == (status != 403)
    assert len(local_hub.commits("tester/repo")) == (2 if (deed, status) == ("write", 200) else 1)


def test_visibility_can_be_changed(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo", private=True)
    stranger = local_hub.add_user("stranger")
    assert not api.repo_exists("tester/repo", token=stranger)
    api.update_repo_settings("tester/repo", private=False)
    assert api.repo_exists("tester/repo", token=stranger)
    api.update_repo_settings("tester/repo", visibility="private")
    assert local_hub.is_private("tester/repo")
    with pytest.raises(RepositoryNotFoundError):
        api.update_repo_settings("tester/repo", private=False, token=stranger)


def test_auth_check(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo")
    api.auth_check("tester/repo", write=True)
    api.auth_check("tester/repo", token=local_hub.add_user("stranger"))
    with pytest.raises(HfHubHTTPError, match="403"):
        api.auth_check("tester/repo", token="hf_token_of_stranger", write=True)


# -------------------------------------------------------------------------------------------- transformers


def test_push_and_load_a_model(
    local_hub: LocalHub, classifier: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    classifier.push_to_hub("tiny", tags=["hfcompress"], private=True)
    tokenizer.push_to_hub("tiny")

    titles = [commit.title for commit in local_hub.commits("tester/tiny")]
    assert titles == ["Upload tokenizer", "Upload BertForSequenceClassification", "initial commit"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(local_hub.files("tester/tiny"))
    assert local_hub.is_private("tester/tiny")

    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("tester/tiny")
    expected = classifier.state_dict()
    assert len(expected) == 41 and loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    on_hub = load(local_hub.files("tester/tiny")["model.safetensors"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in on_hub.items())

    classify = transformers.pipeline("text-classification", model="tester/tiny", device="cpu")
    with torch.no_grad():
        logits = classifier(torch.tensor([[2, 3, 5]])).logits  # "a fine film" in WORDS
    assert classify("a fine film")[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-6)


def test_the_token_goes_to_the_hub_but_never_to_storage(
    local_hub: LocalHub, classifier: transformers.PreTrainedModel
) -> None:
    classifier.push_to_hub("tiny", private=True)
    transformers.AutoModel.from_pretrained("tester/tiny")

    storage = local_hub.requests_to("*", "^/storage/")
    assert [request.method for request in storage] == ["PUT", "GET"]
    assert not any(request.authorized for request in storage)
    assert all(request.authorized for request in local_hub.requests_to("*", "tiny") if request not in storage)
    assert TOKEN not in repr(local_hub.requests)


def test_trainer_pushes(
    local_hub: LocalHub,
    classifier: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    rows = [{"input_ids": [2, 3 + label, 5], "labels": label} for label in (0, 1)] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="tester/run",
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        hub_private_repo=True,
    )
    trainer = transformers.Trainer(
        model=transformers.BertForSequenceClassification(classifier.config),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    info = trainer.push_to_hub(commit_message="Done", tags=["hfcompress"])

    assert info.repo_url.repo_id == "tester/run" and local_hub.is_private("tester/run")
    titles = [commit.title for commit in local_hub.commits("tester/run")]
    assert titles[0] == "Done" and titles[-1] == "initial commit"
    assert {f"Training in progress, step {step}, checkpoint" for step in (1, 2)} <= set(titles)
    files = local_hub.files("tester/run")
    assert {"checkpoint-1/model.safetensors", "checkpoint-2/optimizer.pt", "training_args.bin"} <= set(files)
    assert b"hfcompress" in files["README.md"]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("tester/run")
    trained = trainer.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.state_dict().items())


def test_cards(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/tiny")
    data = ModelCardData(library_name="hfcompress", pipeline_tag="text-classification", tags=["pruned"])
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Tiny\n")
    card.push_to_hub("tester/tiny")

    assert local_hub.files("tester/tiny")["README.md"].decode() == str(card)
    assert ModelCard.load("tester/tiny").data.to_dict() == data.to_dict()
    info = api.model_info("tester/tiny")
    assert [vars(info)[name] for name in ("library_name", "pipeline_tag")] == ["hfcompress", "text-classification"]

    with pytest.raises(ValueError, match="not closed"):
        api.upload_file(path_or_fileobj=b"---\ntags: x\n", path_in_repo="README.md", repo_id="tester/tiny")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Bare\n", path_in_repo="README.md", repo_id="tester/tiny")


# ------------------------------------------------------------------------------------------------- uploads


def test_upload_folder_is_one_commit_and_the_second_time_none(local_hub: LocalHub, api: HfApi, folder: Path) -> None:
    api.create_repo("repo")
    first = api.upload_folder(repo_id="tester/repo", folder_path=folder, commit_message="All of it")
    assert pushed(local_hub, "tester/repo") == content_of(folder)
    assert [commit.oid for commit in local_hub.commits("tester/repo")][:-1] == [first.oid]
    assert local_hub.commits("tester/repo")[0].author == USER
    assert len(local_hub.requests_to("PUT", "^/storage/")) == 1

    again = api.upload_folder(repo_id="tester/repo", folder_path=folder)
    assert again.oid == first.oid and len(local_hub.commits("tester/repo")) == 2
    assert len(local_hub.requests_to("PUT", "^/storage/")) == 1
    assert len(local_hub.requests_to("POST", "/commit/main$")) == 1

    (folder / "config.json").write_text('{"a": 1}')
    api.upload_folder(repo_id="tester/repo", folder_path=folder)
    assert pushed(local_hub, "tester/repo") == content_of(folder)
    assert len(local_hub.requests_to("PUT", "^/storage/")) == 1


def test_upload_to_a_branch(local_hub: LocalHub, api: HfApi, folder: Path) -> None:
    local_hub.create_repo("tester/repo", files={"old.txt": b"old"})
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id="tester/repo", folder_path=folder, revision="feature/x")
    api.create_branch("tester/repo", branch="feature/x")
    assert local_hub.commits("tester/repo", "feature/x") == local_hub.commits("tester/repo")
    api.create_branch("tester/repo", branch="feature/x", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch("tester/repo", branch="feature/x")
    assert caught.value.response.status_code == 409
    api.upload_folder(repo_id="tester/repo", folder_path=folder, revision="feature/x")

    assert pushed(local_hub, "tester/repo", "feature/x") == {"old.txt": b"old", **content_of(folder)}
    assert pushed(local_hub, "tester/repo") == {"old.txt": b"old"}
    assert sorted(branch.name for branch in api.list_repo_refs("tester/repo").branches) == ["feature/x", "main"]
    notes = hf_hub_download("tester/repo", "sub/notes.txt", revision="feature/x")
    assert Path(notes).read_text() == "notes"

    api.create_branch("tester/repo", branch="later", revision="feature/x")
    assert local_hub.files("tester/repo", "later") == local_hub.files("tester/repo", "feature/x")
    api.delete_branch("tester/repo", branch="feature/x")
    assert not api.revision_exists("tester/repo", "feature/x")


def test_a_stale_parent_is_refused(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo")
    base = local_hub.commits("tester/repo")[0].oid
    upload: dict[str, Any] = {"path_in_repo": "a.txt", "repo_id": "tester/repo", "parent_commit": base}
    api.upload_file(path_or_fileobj=b"one", **upload)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.upload_file(path_or_fileobj=b"two", **upload)
    assert caught.value.response.status_code == 412
    assert pushed(local_hub, "tester/repo") == {"a.txt": b"one"}


def test_a_commit_is_applied_whole_or_not_at_all(local_hub: LocalHub, api: HfApi, folder: Path) -> None:
    local_hub.create_repo("tester/repo", files=content_of(folder))
    with pytest.raises(EntryNotFoundError):
        api.create_commit(
            "tester/repo",
            [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("gone.txt")],
            commit_message="Half",
        )
    assert pushed(local_hub, "tester/repo") == content_of(folder)

    api.create_commit(
        "tester/repo",
        [CommitOperationAdd("new.txt", b"new"), CommitOperationCopy("model.safetensors", "copy.safetensors")],
        commit_message="Whole",
    )
    copied = {**content_of(folder), "new.txt": b"new"}
    copied["copy.safetensors"] = copied["model.safetensors"]
    assert pushed(local_hub, "tester/repo") == copied

    api.delete_folder("sub", "tester/repo")
    api.delete_file("new.txt", "tester/repo")
    assert pushed(local_hub, "tester/repo") == {
        path: data for path, data in copied.items() if path not in {"new.txt", "sub/notes.txt"}
    }


def test_pull_requests_leave_main_alone(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo", files={"a.txt": b"old"})
    stranger = local_hub.add_user("stranger")
    upload: dict[str, Any] = {"path_in_repo": "a.txt", "repo_id": "tester/repo", "token": stranger}
    first = api.upload_file(path_or_fileobj=b"new", create_pr=True, **upload)
    second = api.upload_file(path_or_fileobj=b"newer", create_pr=True, **upload)

    assert (first.pr_num, first.pr_revision, second.pr_num) == (1, "refs/pr/1", 2)
    assert pushed(local_hub, "tester/repo") == {"a.txt": b"old"}
    assert pushed(local_hub, "tester/repo", "refs/pr/1") == {"a.txt": b"new"}
    assert Path(api.hf_hub_download("tester/repo", "a.txt", revision="refs/pr/2")).read_bytes() == b"newer"
    refs = api.list_repo_refs("tester/repo", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1", "refs/pr/2"]
    assert [ref.name for ref in refs.branches] == ["main"]


def test_concurrent_commits_lose_nothing(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo")
    jobs = [
        api.upload_file(
            path_or_fileobj=bytes([number]) * 9,
            path_in_repo=f"{number}.bin",
            repo_id="tester/repo",
            run_as_future=True,
        )
        for number in range(8)
    ]
    other = HfApi(endpoint=local_hub.url, token=TOKEN)
    upload: dict[str, Any] = {"path_in_repo": "other.bin", "repo_id": "tester/repo"}
    thread = threading.Thread(target=lambda: other.upload_file(path_or_fileobj=b"other", **upload))
    thread.start()
    assert len({job.result(timeout=20).oid for job in jobs}) == 8
    thread.join(timeout=20)
    expected = {**{f"{number}.bin": bytes([number]) * 9 for number in range(8)}, "other.bin": b"other"}
    assert pushed(local_hub, "tester/repo") == expected
    assert len(local_hub.commits("tester/repo")) == 10


# --------------------------------------------------------------------------------- listings and downloads


def test_listings_agree_with_the_files(local_hub: LocalHub, api: HfApi, folder: Path) -> None:
    api.create_repo("repo")
    api.upload_folder(repo_id="tester/repo", folder_path=folder, commit_message="Files")
    files = local_hub.files("tester/repo")

    tree = list(api.list_repo_tree("tester/repo", recursive=True))
    listed = {entry.path: entry for entry in tree if isinstance(entry, hf_api.RepoFile)}
    assert {path: entry.size for path, entry in listed.items()} == {path: len(data) for path, data in files.items()}
    assert [entry.path for entry in tree if entry not in listed.values()] == ["sub"]
    assert listed["config.json"].blob_id == git_hash(files["config.json"]) and listed["config.json"].lfs is None
    weights = listed["model.safetensors"].lfs
    assert weights is not None
    assert weights.sha256 == hashlib.sha256(files["model.safetensors"]).hexdigest()

    top = [entry.path for entry in api.list_repo_tree("tester/repo")]
    assert top == [".gitattributes", "config.json", "model.safetensors", "sub"]
    assert [entry.path for entry in api.list_repo_tree("tester/repo", "sub")] == ["sub/notes.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("tester/repo", "nowhere"))
    assert api.list_repo_files("tester/repo") == sorted(files)
    assert [entry.path for entry in api.get_paths_info("tester/repo", ["sub", "config.json", "none"])] == [
        "sub",
        "config.json",
    ]
    siblings = api.model_info("tester/repo", files_metadata=True).siblings or []
    assert {sibling.rfilename: sibling.size for sibling in siblings} == {p: len(d) for p, d in files.items()}

    commits = api.list_repo_commits("tester/repo")
    assert [(commit.commit_id, commit.title) for commit in commits] == [
        (commit.oid, commit.title) for commit in local_hub.commits("tester/repo")
    ]
    assert commits[0].authors == [USER] and commits[0].created_at >= commits[1].created_at


def test_tags_name_a_commit(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo", files={"a.txt": b"1"})
    api.create_tag("tester/repo", tag="v1")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="tester/repo")
    assert Path(api.hf_hub_download("tester/repo", "a.txt", revision="v1")).read_bytes() == b"1"
    assert [tag.name for tag in api.list_repo_refs("tester/repo").tags] == ["v1"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_tag("tester/repo", tag="v1")
    assert caught.value.response.status_code == 409
    api.delete_tag("tester/repo", tag="v1")
    assert not api.revision_exists("tester/repo", "v1")


def test_snapshot_download(local_hub: LocalHub, folder: Path) -> None:
    local_hub.create_repo("tester/repo", files=content_of(folder))
    snapshot = Path(snapshot_download("tester/repo"))
    assert content_of(snapshot) == local_hub.files("tester/repo")
    assert local_hub.client_home in snapshot.parents

    downloads = len(local_hub.requests_to("GET", "/resolve/|^/storage/"))
    assert downloads >= 4
    assert snapshot_download("tester/repo") == str(snapshot)
    assert {repo.repo_id for repo in scan_cache_dir().repos} == {"tester/repo"}
    assert len(local_hub.requests_to("GET", "/resolve/|^/storage/")) == downloads


def test_what_is_missing_has_its_own_error(local_hub: LocalHub) -> None:
    local_hub.create_repo("tester/repo")
    with pytest.raises(EntryNotFoundError, match="Entry Not Found") as entry:
        hf_hub_download("tester/repo", "none.json")
    with pytest.raises(RevisionNotFoundError) as revision:
        hf_hub_download("tester/repo", ".gitattributes", revision="none")
    with pytest.raises(RepositoryNotFoundError) as repository:
        hf_hub_download("tester/none", "config.json")
    assert isinstance(entry.value, RemoteEntryNotFoundError)
    statuses = [error.response.status_code for error in (entry.value, revision.value, repository.value)]
    assert statuses == [404, 404, 404]
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("canonical-name", "config.json")
    with pytest.raises(OSError, match="is not a valid model identifier"):
        transformers.AutoConfig.from_pretrained("tester/none")


def test_a_deleted_repo_is_gone(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_repo("tester/repo", token=local_hub.add_user("stranger"))
    api.delete_repo("tester/repo")
    assert local_hub.repo_ids() == [] and not api.repo_exists("tester/repo")
    api.delete_repo("tester/repo", missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("tester/repo")


@pytest.mark.parametrize("filename", ["small.txt", "large.safetensors"])
def test_ranges(local_hub: LocalHub, filename: str) -> None:
    content = bytes(range(200))
    local_hub.create_repo("tester/repo", files={filename: content})
    url = f"{local_hub.url}/tester/repo/resolve/main/{filename}"
    cases = [
        ("bytes=0-3", 206, content[:4], "bytes 0-3/200"),
        ("bytes=150-", 206, content[150:], "bytes 150-199/200"),
        ("bytes=-7", 206, content[193:], "bytes 193-199/200"),
        ("bytes=190-900", 206, content[190:], "bytes 190-199/200"),
        ("bytes=-900", 206, content, "bytes 0-199/200"),
        ("bytes=200-", 416, b"", "bytes */200"),
        ("bytes=-", 200, content, None),
        ("lines=0-3", 200, content, None),
    ]
    with httpx2.Client(follow_redirects=True, trust_env=False) as client:
        for wanted, status, expected, covered in cases:
            answer = client.get(url, headers={"Range": wanted})
            assert (answer.status_code, answer.content) == (status, expected), wanted
            assert answer.headers.get("Content-Range") == covered, wanted


def test_the_client_reads_only_the_header_of_safetensors(
    local_hub: LocalHub, classifier: transformers.PreTrainedModel, api: HfApi
) -> None:
    classifier.push_to_hub("tiny")
    metadata = api.get_safetensors_metadata("tester/tiny")
    assert metadata.parameter_count == {"F32": classifier.num_parameters()}
    assert [request.status for request in local_hub.requests_to("GET", "^/storage/")] == [206]


# -------------------------------------------------------------------------------------------------- faults


def test_the_client_retries_a_503_before_the_commit(
    local_hub: LocalHub, api: HfApi, folder: Path, backoff_waits: list[float]
) -> None:
    local_hub.create_repo("tester/repo")
    local_hub.inject("POST", "/preupload/")
    fault = local_hub.inject("PUT", "^/storage/", status=500, times=1)
    api.upload_folder(repo_id="tester/repo", folder_path=folder)

    assert pushed(local_hub, "tester/repo") == content_of(folder)
    assert [request.status for request in local_hub.requests_to("POST", "/preupload/")] == [503, 503, 200]
    assert [request.status for request in local_hub.requests_to("PUT", "^/storage/")] == [500, 200]
    assert fault.remaining == 0 and backoff_waits == [1, 2, 1]


def test_the_client_does_not_retry_a_commit(local_hub: LocalHub, api: HfApi, backoff_waits: list[float]) -> None:
    local_hub.create_repo("tester/repo")
    local_hub.inject("POST", "/commit/main", status=503, times=1)
    upload: dict[str, Any] = {"path_or_fileobj": b"a", "path_in_repo": "a.txt", "repo_id": "tester/repo"}
    with pytest.raises(HfHubHTTPError, match="Service Unavailable") as caught:
        api.upload_file(**upload)
    assert caught.value.response.status_code == 503 and caught.value.request_id
    assert backoff_waits == [] and pushed(local_hub, "tester/repo") == {}
    api.upload_file(**upload)
    assert pushed(local_hub, "tester/repo") == {"a.txt": b"a"}


def test_a_dropped_connection(local_hub: LocalHub, api: HfApi, backoff_waits: list[float]) -> None:
    local_hub.create_repo("tester/repo", files={"a.txt": b"a"})
    local_hub.inject("GET", "/tree/main", drop=True, times=2)
    assert api.list_repo_files("tester/repo") == [".gitattributes", "a.txt"]
    local_hub.inject("GET", "/resolve/main/a.txt", drop=True, times=1)
    assert Path(api.hf_hub_download("tester/repo", "a.txt")).read_bytes() == b"a"
    assert [request.status for request in local_hub.requests_to("GET", "/resolve/")] == [None, 200]
    assert backoff_waits == [1, 2, 1]

    local_hub.inject("HEAD", "/resolve/main/a.txt", drop=True, times=1)
    with pytest.raises(httpx2.RemoteProtocolError):  # the client of 2.4 does not try this again
        api.hf_hub_download("tester/repo", "a.txt")


def test_a_commit_whose_answer_is_lost_has_happened(local_hub: LocalHub, api: HfApi) -> None:
    local_hub.create_repo("tester/repo")
    head = local_hub.commits("tester/repo")[0].oid
    local_hub.inject("POST", "/commit/main", drop=True, carry_out=True, times=1)
    upload: dict[str, Any] = {"path_in_repo": "a.txt", "repo_id": "tester/repo", "parent_commit": head}
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_file(path_or_fileobj=b"a", **upload)
    assert pushed(local_hub, "tester/repo") == {"a.txt": b"a"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"b", **upload)


def test_retry_after_is_heeded(local_hub: LocalHub, api: HfApi, backoff_waits: list[float]) -> None:
    local_hub.create_repo("tester/repo")
    local_hub.inject("GET", "/tree/", status=429, times=1, headers={"Retry-After": "7"})
    api.list_repo_files("tester/repo")
    assert backoff_waits == [8]  # the client adds a second


def test_faults_out_of_range_are_refused() -> None:
    hub = LocalHub()
    for status, times in [(302, 1), (600, 1), (503, 0)]:
        with pytest.raises(ValueError, match=r"status must be in \[400, 599\]"):
            hub.inject("GET", "/", status=status, times=times)


def test_a_stopped_hub_does_not_answer(
    local_hub: LocalHub, api: HfApi, backoff_waits: list[float], tmp_path: Path
) -> None:
    local_hub.create_repo("tester/repo", files={"a.txt": b"a"})
    assert Path(api.hf_hub_download("tester/repo", "a.txt", cache_dir=tmp_path)).read_bytes() == b"a"
    local_hub.stop()
    with pytest.raises((httpx2.ConnectError, httpx2.RemoteProtocolError, httpx2.ReadError)):
        api.model_info("tester/repo")
    assert Path(api.hf_hub_download("tester/repo", "a.txt", cache_dir=tmp_path)).read_bytes() == b"a"
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download("tester/repo", "b.txt", cache_dir=tmp_path)
    assert pushed(local_hub, "tester/repo") == {"a.txt": b"a"}


def test_a_request_without_a_route_is_named(local_hub: LocalHub, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="LocalHub has no route for GET /api/spaces/tester/x/secrets"):
        api.get_space_secrets("tester/x")


# ---------------------------------------------------------------------------------------------- the fixtures


def test_a_subprocess_finds_the_hub_by_its_environment(local_hub: LocalHub) -> None:
    local_hub.create_repo("tester/repo", private=True, files={"a.bin": b"a"})
    program = (
        "from huggingface_hub import hf_hub_download, whoami\n"
        "print(whoami()['name'], open(hf_hub_download('tester/repo', 'a.bin')).read())"
    )
    environment = {**os.environ, **hub_env(local_hub)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, [USER, "a"]), done.stderr


def test_the_client_is_put_back_afterwards() -> None:
    before = {name: value for name, value in vars(constants).items() if name.isupper()}
    shared_endpoint, environment = hf_api.api.endpoint, dict(os.environ)
    with LocalHub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        connect(hub, monkeypatch, token=None)
        assert constants.HUGGINGFACE_CO_URL_TEMPLATE.startswith(f"{hub.url}/{{repo_id}}")
        assert Path(constants.HF_HUB_CACHE) == hub.client_home / "hub"
        assert constants.HF_HUB_DISABLE_XET and not constants.is_offline_mode()
        assert hf_api.api.endpoint == hub.url and get_token() is None
        home = hub.client_home
    assert {name: value for name, value in vars(constants).items() if name.isupper()} == before
    assert (hf_api.api.endpoint, dict(os.environ)) == (shared_endpoint, environment)
    assert not home.exists()


def test_hubs_are_strangers_to_each_other(local_hub: LocalHub, api: HfApi) -> None:
    with LocalHub({"hf_b": "b"}) as second:
        assert second.url != local_hub.url
        local_hub.create_repo("tester/repo")
        assert second.repo_ids() == []
        assert HfApi(endpoint=second.url, token="hf_b").whoami()["name"] == "b"
        assert [request.status for request in second.requests_to("*", "/whoami-v2")] == [200]
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token="hf_b")
    assert second.crashes == []


def test_misuse_is_named(local_hub: LocalHub) -> None:
    with pytest.raises(RuntimeError, match="already served"):
        local_hub.start()
    with pytest.raises(RuntimeError, match="not being served"):
        _ = LocalHub().client_home
    with pytest.raises(KeyError, match="no model tester/none; there are"):
        local_hub.files("tester/none")
    local_hub.create_repo("tester/repo")
    with pytest.raises(ValueError, match="there is a model tester/repo already"):
        local_hub.create_repo("tester/repo")
