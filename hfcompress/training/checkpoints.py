"""Checkpoints that are whole or not there: sealed with a list of their files, and of which run they are."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SEAL_FILE = "hfcompress_checkpoint.json"
# Where checkpoints are written before they get their place; what begins with an underscore is never pushed.
STAGING_FOLDER = "_writing"
FORMAT = 1
_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or belongs to another run; the message is one line."""


def seal(folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Write down which files a checkpoint holds and of which run it is; the last thing that is written into it.

    Args:
        folder: The checkpoint.
        facts: JSON-able; what must be the same for a run that goes on from it.
    """
    folder = Path(folder)
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): {"size_bytes": path.stat().st_size} for path in found}
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2) + "\n"
    (folder / SEAL_FILE).write_text(text, encoding="utf-8")


def add_checksums(folder: str | Path, scratch: str | Path) -> None:
    """Read a sealed checkpoint and add to its seal what its files hold; takes about as long as a quarter of writing it.

    Args:
        folder: The checkpoint; if it is removed meanwhile, nothing happens.
        scratch: A file on the same disk, for a moment.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        ...     _ = (Path(folder) / "weights").write_bytes(b"123456789")
        ...     seal(folder, {"step": 3})
        ...     add_checksums(folder, f"{scratch}/seal")
        ...     read_seal(folder)["files"]
        {'weights': {'size_bytes': 9, 'crc32': 'cbf43926'}}
    """
    folder, scratch = Path(folder), Path(scratch)
    try:
        facts = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        for name, file in facts["files"].items():
            file["crc32"] = _crc32(folder / name)
        scratch.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        scratch.replace(folder / SEAL_FILE)
    except OSError:
        scratch.unlink(missing_ok=True)


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def read_seal(folder: str | Path, *, contents: bool = True) -> dict[str, Any]:
    """What `seal` wrote, once every file was found to be as it was then.

    Args:
        folder: The checkpoint.
        contents: Also read all files that have a checksum; False looks at their sizes only.

    Raises:
        CheckpointError: There is no such checkpoint, it was not written to its end, or a file is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; give a checkpoint folder of this run")
    try:
        facts = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        files = {str(name): (int(file["size_bytes"]), file.get("crc32")) for name, file in facts["files"].items()}
        written = int(facts["format"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {SEAL_FILE}: it was not written to its end, or not by hfcompress's trainers; resume from another "
            "checkpoint, or start from this one as a model"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder / SEAL_FILE} is damaged; resume from another checkpoint") from None
    if written != FORMAT:
        raise CheckpointError(
            f"{folder} has format {written} of another version of hfcompress, this one reads {FORMAT}; go on with that version, or "
            "start from it as a model"
        )
    for name, (size_bytes, crc32) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing; resume from another checkpoint")
        if path.stat().st_size != size_bytes or (contents and crc32 not in (None, _crc32(path))):
            raise CheckpointError(
                f"{folder} is damaged: {name} is not as it was written ({path.stat().st_size:,} bytes, then {size_bytes:,}); "
                "resume from another checkpoint"
            )
    return dict(facts)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the highest step that is whole, or None; damaged ones are passed over with a warning.

    Args:
        folder: Where a run left its checkpoints (`output_dir` of the training arguments).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (9, 10, 11):
        ...         (Path(folder) / f"checkpoint-{step}").mkdir()
        ...         if step < 11:
        ...             seal(Path(folder) / f"checkpoint-{step}", {})
        ...     last_checkpoint(folder).name
        'checkpoint-10'
    """
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    found = sorted((int(match[1]), path) for path, match in steps.items() if match and path.is_dir())
    for _, path in reversed(found):
        try:
            read_seal(path)
        except CheckpointError as error:
            logger.warning("%s; looking for an earlier one", str(error).partition("; resume from")[0])
            continue
        return path
    return None


def require_same_run(folder: str | Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run, with the first difference named.

    Args:
        folder: The checkpoint, for the message.
        theirs: What its seal says.
        ours: What the present run would write.

    Raises:
        CheckpointError: They differ in what cannot differ: version, model or recipe.

    Example:
        >>> require_same_run("checkpoint-5", {"recipe": {"distill": {"logits": 1.0}}}, {"recipe": {"distill": {"logits": 2.0}}})
        Traceback (most recent call last):
        ...
        hfcompress.training.checkpoints.CheckpointError: checkpoint-5 belongs to a run of another recipe: distill.logits was 1.0 and \
is 2.0; use the same, or start from it as a model
    """
    for key, kind in _KINDS.items():
        found = _difference(theirs.get(key), ours.get(key))
        if found is None or (key == "teacher" and None in found[1:]):  # live then and cached now
            continue
        place, was, is_now = found
        raise CheckpointError(
            f"{folder} belongs to a run of another {kind}: {place or key} was {_said(was)} and is {_said(is_now)}; use the same, or start "
            "from it as a model"
        )


_KINDS = {"version": "version of hfcompress", "model": "model", "recipe": "recipe", "teacher": "teacher"}


def _difference(was: Any, is_now: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two trees of plain data differ, with both values."""
    if isinstance(was, Mapping) and isinstance(is_now, Mapping):
        for key in sorted({*was, *is_now}):
            found = _difference(was.get(key), is_now.get(key), f"{place}.{key}" if place else str(key))
            if found is not None:
                return found
        return None
    return None if was == is_now else (place, was, is_now)


def _said(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
