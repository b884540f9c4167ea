"""Pushing a verified folder to the Hub in one commit."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

from hfcompress.checkpoints.adapters import ADAPTER_FILE, base_of
from hfcompress.hub.card import write_card
from hfcompress.hub.verify import require_loadable

logger = logging.getLogger(__name__)

# Pickles, training state and what starts with an underscore stay here.
IGNORED = ["_*", "checkpoint-*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "runs/**", "*.log", ".*"]


class PushError(RuntimeError):
    """The Hub did not take the folder; the message is one line and holds no token."""


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload a model compressed with hfcompress",
) -> CommitInfo:
    """Verify a folder in fresh processes, write its card, and push it in one commit.

    An adapter whose model is a folder of this machine takes it along: into the repository of the same name without "-adapter", or
    with "-base" if it has no such ending.

    Args:
        folder: A folder that `save_pretrained` wrote, of a model or of an adapter.
        repo: "user/name", or "name" for your own.
        private: Make the repository private if it is created now.
        revision: Branch to commit to; created if it is not there.
        token: Instead of the one you logged in with.
        message: Of the commit.

    Returns:
        The commit.

    Raises:
        VerificationError: The folder does not load as its card would promise; nothing was pushed.
        PushError: The Hub refused, or cannot be reached.
        ValueError: `results.json` in the folder is not what a run writes; nothing was pushed.
        FileNotFoundError: There is no such folder.
    """
    folder = Path(folder)
    checks = require_loadable(folder)
    base = base_of(folder)
    about: dict[str, Any] = {}
    if base is not None and Path(base).is_dir():
        below = repo.removesuffix("-adapter") if repo.endswith("-adapter") else f"{repo}-base"
        base = push_folder(
            base, below, private=private, revision=revision, token=token, message=message
        ).repo_url.repo_id
    if base is not None:
        about = {"base_model": base, "base_model_relation": "adapter", "library_name": "peft"}
    # What cannot be carded must not leave an empty repository behind.
    write_card(folder, repo_id=repo, checks=checks, **about)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if repo_id != repo:
            write_card(folder, repo_id=repo_id, checks=checks, **about)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder if base is None else _naming(folder, base, Path(scratch) / "adapter"),
                revision=revision,
                commit_message=message,
                ignore_patterns=list(IGNORED),  # the client adds its own to the list
            )
    except HFValidationError as error:
        raise PushError(f"{repo!r} is not a name the Hub takes: {_first_line(error)}; give user/name") from None
    except HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", 0))
        reason = _REASONS.get(status, f"it answered {status}: {_first_line(error)}")
        raise PushError(f"{repo} was not pushed: {reason}") from None
    except (HTTPError, ConnectionError) as error:  # HTTPError: of the HTTP library that this release of the client uses
        raise PushError(f"{repo} was not pushed: the Hub cannot be reached: {_first_line(error)}") from None


def _naming(folder: Path, base: str, copy: Path) -> Path:
    """A copy of an adapter's folder that names its model by the repository; here it goes on naming the folder."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    config = json.loads((copy / ADAPTER_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    (copy / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return copy


_REASONS = {
    401: "the Hub does not know you; log in with: hf auth login (a token with write access)",
    403: "you may not write there; check the name of the user or organization, and that the token may write",
    404: "there is no such user or organization, or you may not see it",
}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
