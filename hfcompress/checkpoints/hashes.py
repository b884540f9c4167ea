"""What was pushed is what is loaded: the SHA-256 of each file stands in the metadata of a model's card.

They tell files that were damaged or changed by hand from those that were pushed. They are no signature: who may change a file may change the
card too. To load what you once looked at, pin the commit with `revision`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.repocard import metadata_load

from hfcompress.checkpoints.adapters import ADAPTER_FILE, base_of

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# What `from_pretrained` reads if it is there: a file of these names that was not pushed would be loaded unseen.
_LOADED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    ADAPTER_FILE,
    "adapter_model.safetensors",
)
_DIGEST = re.compile(r"[0-9a-f]{64}")


class TamperedError(ValueError):
    """A file on the Hub is not the one that was pushed."""


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     sha256_of(file.name)[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def with_hashes(card: str, hashes: Mapping[str, str]) -> str:
    r"""A card with the SHA-256 of each file in its metadata, in place of those it had.

    Example:
        >>> print(with_hashes("---\nlicense: mit\n---\n# Small", {"config.json": "ab"}))
        ---
        license: mit
        hfcompress:
          sha256:
            config.json: ab
        ---
        # Small
    """
    parsed = ModelCard(card, ignore_metadata_errors=True)
    parsed.data["hfcompress"] = {"sha256": dict(sorted(hashes.items()))}
    return str(parsed)


def read_hashes(card: str | Path) -> dict[str, str]:
    """The SHA-256 of each file that a card names; empty if it names none.

    Args:
        card: Path of the card.

    Raises:
        TamperedError: What stands there is not one hexadecimal SHA-256 a file.
    """
    try:
        ours = (metadata_load(card) or {}).get("hfcompress")
    except (yaml.YAMLError, ValueError, UnicodeDecodeError):
        return {}  # somebody else's card
    hashes = ours.get("sha256", {}) if isinstance(ours, dict) else {}
    if not isinstance(hashes, dict) or not all(_DIGEST.fullmatch(str(digest)) for digest in hashes.values()):
        raise TamperedError("the hashes in its card are not one SHA-256 in hexadecimal for each file; push it again")
    return {str(name): str(digest) for name, digest in hashes.items()}


def verified_commit(repo: str, *, revision: str | None = None, **where: Any) -> str | None:
    """Download what `load` reads of a repository, and compare it with the hashes in its card.

    The base that an adapter belongs to is looked at as well.

    Args:
        repo: A repository on the Hub.
        revision: Branch, tag or commit.
        **where: token, cache_dir, local_files_only, force_download, as for `hf_hub_download`.

    Returns:
        The commit that was looked at; None where there is nothing to compare with: no such repository, or a card without hashes.

    Raises:
        TamperedError: A file is not the one that was pushed, or one was added that would be loaded.
    """
    try:
        card = hf_hub_download(repo, CARD_FILE, revision=revision, **where)
    except LocalEntryNotFoundError:
        logger.warning("%s: its card cannot be had now, so its files are not compared with what was pushed", repo)
        return None
    except (EntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
        # What is wrong with the repository as a whole is said when its config is read.
        logger.debug("%s: no card to compare its files with (%s)", repo, type(error).__name__)
        return None
    commit = Path(card).parent.name
    try:
        hashes = read_hashes(card)
    except TamperedError as error:
        raise TamperedError(f"{repo}: {error}") from None
    if not hashes:
        logger.debug("%s: its card has no hashes; its files are loaded as they are", repo)
        return None
    read = [name for name in hashes if "/" not in name and name.endswith((".json", ".safetensors"))]
    try:
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=[*read, *_LOADED], **where))
    except LocalEntryNotFoundError:
        folder = Path(card).parent  # offline: what is in the cache is all that can be loaded
    for name in read:
        if (folder / name).is_file():
            _compare(repo, commit, name, found=sha256_of(folder / name), said=hashes[name])
    for name in _LOADED:
        if name not in hashes and (folder / name).is_file():
            raise TamperedError(
                f"{repo} at {commit[:8]}: {name} was added after the model was pushed; push it again, or load an earlier revision"
            )
    logger.debug("%s at %s: %d files are as they were pushed", repo, commit[:8], len(read))
    base = base_of(folder) if ADAPTER_FILE in hashes else None
    if base is not None and not Path(base).exists():
        verified_commit(base, **where)
    return commit


def _compare(repo: str, commit: str, name: str, *, found: str, said: str) -> None:
    if found != said:
        raise TamperedError(
            f"{repo} at {commit[:8]}: {name} is not the file that was pushed (SHA-256 {found[:12]}, the card says {said[:12]}); push it "
            "again, load an earlier revision, or load it with an Auto class, which compares nothing"
        )
