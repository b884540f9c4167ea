"""Where numbers come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any


def provenance(*, seed: int) -> dict[str, Any]:
    """Date, seed, commit of the source tree if there is one, and versions of what took part.

    Example:
        >>> provenance(seed=3)["seed"]
        3
    """
    names = ("hfcompress", "torch", "transformers", "accelerate", "bitsandbytes")
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
