"""Pushing a verified folder to the Hub in one commit."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects  # type: ignore[attr-defined]

from hfcompress.checkpoints.adapters import ADAPTER_FILE, base_of
from hfcompress.checkpoints.hashes import CARD_FILE, with_hashes
from hfcompress.hub.card import write_card
from hfcompress.hub.commit import PushError, full_name, refuse_both, require_access, send_commit
from hfcompress.hub.contract import require_contract
from hfcompress.hub.verify import require_loadable, require_saved

__all__ = ["PushError", "push_folder", "send_folder"]

logger = logging.getLogger(__name__)

# Pickles, training state and what starts with an underscore stay here.
IGNORED = ["_*", "checkpoint-*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "runs/**", "*.log", ".*"]
# Left from an earlier push, these would be loaded in place of what is pushed now, or beside it.
_STALE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_\w+\.\w+|hfcompress_\w+\.\w+"
)
# In a checkpoint beside the model; pickles are left out anyway.
_TRAINING_STATE = re.compile(r"trainer_state\.json|hfcompress_(?!record)\w+\.\w+")
_MESSAGE = "Upload a model compressed with hfcompress"


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = _MESSAGE,
) -> CommitInfo:
    """Verify a folder in fresh processes, write its card, and push it in one commit.

    If it fails, the branch is as it was, and the error says so; pushed again, large files that arrived are not sent a second time. The card
    takes the SHA-256 of each file along, with which `hfcompress.load` compares what it downloads.

    An adapter whose model is a folder of this machine takes it along: into the repository of the same name without "-adapter", or
    with "-base" if it has no such ending.

    Args:
        folder: A folder that `save_pretrained` wrote, of a model or of an adapter.
        repo: "user/name", or "name" for your own.
        private: Make the repository private if it is created now.
        revision: Branch to commit to; created if it is not there.
        create_pr: Open a pull request instead of committing; the repository must be there.
        token: Instead of the one you logged in with.
        message: Of the commit.

    Returns:
        The commit, with `pr_url` of a pull request.

    Raises:
        ContractError: What was measured fails the contract of the recipe; nothing was pushed.
        VerificationError: The folder does not load as its card would promise; nothing was pushed.
        PushError: The Hub refused, or cannot be reached.
        ValueError: `results.json` in the folder is not what a run writes, a file holds a token, or `create_pr` does not go with the rest;
            nothing was pushed.
        FileNotFoundError: There is no such folder.
    """
    refuse_both(revision, create_pr)
    require_saved(folder)
    folder, repo = Path(folder), full_name(repo, token)
    require_contract(folder)
    require_access(repo, create_pr=create_pr, token=token)
    logger.info("loading %s in fresh processes, by each way that its card will name", folder)
    checks = require_loadable(folder)
    where: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    base = push_base(folder, repo, message=message, **where)
    write_card(folder, repo_id=repo, checks=checks, **adapter_fields(base))
    return send_folder(folder, repo, base=base, message=message, **where)


def push_base(folder: Path, repo: str, *, create_pr: bool = False, **where: Any) -> str | None:
    """The repository of the model that an adapter belongs to, pushed first if it is a folder; None of a folder without adapter.

    Raises:
        ValueError: It would have to be pushed for a pull request, which is of one repository.
    """
    base = base_of(folder)
    if base is None or not Path(base).is_dir():
        return base
    if create_pr:
        raise ValueError(
            f"the adapter's model is the folder {base}, which is not on the Hub; push without a pull request, or name its repository in "
            f"{folder / ADAPTER_FILE}"
        )
    below = repo.removesuffix("-adapter") if repo.endswith("-adapter") else f"{repo}-base"
    return str(push_folder(base, below, **where).repo_url.repo_id)


def adapter_fields(base: str | None) -> dict[str, Any]:
    """What the card of an adapter says in its metadata; nothing of a model."""
    if base is None:
        return {}
    return {"base_model": base, "base_model_relation": "adapter", "library_name": "peft"}


def send_folder(
    folder: Path, repo: str, *, base: str | None = None, message: str = _MESSAGE, **where: Any
) -> CommitInfo:
    """Push a folder as it stands, with the hashes of its files in its card. Whether it loads is for the caller to find out first.

    Args:
        folder: Of a model or of an adapter, with its card.
        repo: "user/name".
        base: Repository of the model that the adapter belongs to; in the folder it goes on naming what it names.
        message: Of the commit.
        **where: private, revision, create_pr, token, as for `push_folder`.

    Returns:
        The commit.

    Raises:
        PushError: The Hub refused, or cannot be reached.
        ValueError: A file holds a token.
    """
    files = {name: folder / name for name in _listed(folder)}
    changed: dict[str, bytes] = {}
    if base is not None:
        config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        changed[ADAPTER_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    card = (folder / CARD_FILE).read_text(encoding="utf-8") if (folder / CARD_FILE).is_file() else ""
    additions = _additions({**files, **changed}, card)
    return send_commit(additions, repo, message=message, stale=lambda path: bool(_STALE.fullmatch(path)), **where)


def send_progress(
    folder: Path,
    repo: str,
    *,
    step: int,
    checkpoint: tuple[str, Path] | None = None,
    message: str,
    **where: Any,
) -> CommitInfo:
    """Push the state of a run in training in one commit. Nothing is promised of it: its card says that it is not the result.

    Args:
        folder: Of the model.
        repo: "user/name".
        step: Optimizer steps so far.
        checkpoint: A folder in the repository, and the one here, whole, from which training goes on.
        message: Of the commit.
        **where: revision, token, as for `push_folder`.

    Returns:
        The commit.

    Raises:
        PushError: The Hub refused, or cannot be reached.
        ValueError: A file holds a token.
    """
    card = _PROGRESS_CARD.format(name=repo.rpartition("/")[2], step=step)
    names = [name for name in _listed(folder) if not _TRAINING_STATE.fullmatch(name)]
    additions = _additions({name: folder / name for name in names}, card)
    prefix = None
    if checkpoint is not None:
        prefix, source = f"{checkpoint[0]}/", checkpoint[1]
        additions += [
            CommitOperationAdd(prefix + name, source / name)
            for name in filter_repo_objects(_files_of(source), ignore_patterns=DEFAULT_IGNORE_PATTERNS)
        ]
    return send_commit(
        additions,
        repo,
        message=message,
        stale=lambda path: bool(_STALE.fullmatch(path)) or (prefix is not None and path.startswith(prefix)),
        **where,
    )


_PROGRESS_CARD = """\
---
library_name: transformers
tags:
- hfcompress
---

# {name}

**In training: the state after {step:,} steps.** It was saved to go on from, is not the result, and was neither measured nor verified. The last
push of the run replaces it.
"""


def _files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _listed(folder: Path) -> list[str]:
    """What of a folder goes to the Hub, but the card, which is written anew."""
    names = filter_repo_objects(_files_of(folder), ignore_patterns=[*IGNORED, *DEFAULT_IGNORE_PATTERNS])
    return [name for name in names if name != CARD_FILE]


def _additions(files: dict[str, Any], card: str) -> list[CommitOperationAdd]:
    """The files, and the card with their hashes."""
    additions = [CommitOperationAdd(name, file) for name, file in files.items()]
    hashes = {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions}
    return [*additions, CommitOperationAdd(CARD_FILE, with_hashes(card, hashes).encode())]
