"""Where numbers come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # tokens of the Hub
    r"|(?<=://)[^\s/@]+:[^\s/@]+(?=@)"  # name and password in an address
    r"|(?<=[?&])(?:X-Amz-[\w-]+|Signature|Policy|Key-Pair-Id|\w*token)=[^\s&'\"]+",  # signed addresses of storage
    re.IGNORECASE,
)


def hide_secrets(text: str, *known: str | None) -> str:
    """A text without access tokens and passwords: `known` ones, and what looks like one.

    Example:
        >>> hide_secrets("GET https://me:pass@example.com with hf_abcdefghijklmnopqrstuvwx and 1234", "1234")
        'GET https://***@example.com with *** and ***'
    """
    for secret in filter(None, known):
        text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)


def command_line(words: Sequence[str]) -> str:
    """What was typed, for results and cards: one line that a shell takes, without secrets.

    Example:
        >>> command_line(["hfcompress", "run", "my recipe.yaml", "data.train=https://me:pass@example.com/a.csv"])
        "hfcompress run 'my recipe.yaml' 'data.train=https://***@example.com/a.csv'"
    """
    return shlex.join(hide_secrets(word, get_token()) for word in words)


def provenance(*, seed: int) -> dict[str, Any]:
    """Date, seed, commit of the source tree if there is one, and versions of what took part.

    Example:
        >>> provenance(seed=3)["seed"]
        3
    """
    names = ("hfcompress", "torch", "transformers", "accelerate", "bitsandbytes", "torchao")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "seed": seed,
        "commit": commit,
        "dirty": dirty,
        "versions": versions,
    }


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the source tree this package stands in, and whether the tree has changes; None where there is no git."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None, None
    try:
        run = [
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None, None
    return run[0].strip() or None, bool(run[1].strip())
