"""Files and folders that are whole or not there: they are written aside and get their place at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# How torch and the libraries in Rust, which know no classes of errors, say that writing failed.
_OS_ERROR = re.compile(r"([\w ]+) \(os error \d+\)")
_TORCH = ("PytorchStreamWriter", "unexpected pos")


class OutputError(OSError):
    """What was to be written cannot be, and nothing of it is there; the message is one line."""


@contextlib.contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """A folder to write into, of the same name, that becomes `target` when the block ends; if it fails, nothing is left.

    It lies beside where the target will be, or in the target if that is there and empty, so that no other disk is needed. That the place
    can be written to is seen at the beginning, before any work.

    Args:
        target: A folder that is not there, or empty.

    Raises:
        OutputError: The target cannot be written to, holds something, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     with staged_folder(f"{home}/model") as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...         before = (Path(home) / "model").exists()
        ...     before, [path.name for path in Path(home).rglob("*")], folder.name
        (False, ['model', 'config.json'], 'model')
    """
    final = Path(target).absolute()
    if not is_empty(final):
        raise OutputError(f"{target} is not empty; give another folder")
    with _staged(target, final) as stage:
        stage.mkdir()
        yield stage
        if not final.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            stage.replace(final)
            return
        # It may be where another disk is mounted. What makes it a model comes last.
        for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == "config.json"):
            entry.replace(final / entry.name)


@contextlib.contextmanager
def staged_file(target: str | Path) -> Iterator[Path]:
    """A file to write, of the same name, that takes the place of `target` when the block ends; if it fails, that stays as it was.

    Args:
        target: A file that is there or not.

    Raises:
        OutputError: The target cannot be written to, is a folder, or the disk is full.
    """
    final = Path(target).absolute()
    if final.is_dir():
        raise OutputError(f"{target} cannot be written: it is a folder; name a file")
    with _staged(target, final) as stage:
        yield stage
        final.parent.mkdir(parents=True, exist_ok=True)
        stage.replace(final)


def require_writable(target: str | Path) -> None:
    """See at the beginning of long work that its result can be written.

    Raises:
        OutputError: It cannot.
    """
    with _staged(target, Path(target).absolute()):
        pass


def is_empty(target: Path) -> bool:
    """Whether nothing is there, or a folder that holds nothing but what a process left that was killed."""
    if not os.path.lexists(target):
        return True
    return target.is_dir() and all(entry.name == _aside(target) for entry in target.iterdir())


def _aside(final: Path) -> str:
    return f".{final.absolute().name}.part"


@contextlib.contextmanager
def _staged(target: str | Path, final: Path) -> Iterator[Path]:
    """A place beside the target for what will be moved there; it is gone afterwards."""
    try:
        place = final if final.is_dir() else next(parent for parent in final.parents if parent.exists())
        aside = place / _aside(final)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}; give another place") from None
    try:
        yield aside / final.name
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        free = shutil.disk_usage(place).free / 1e6
        raise OutputError(
            f"{target} could not be written: {reason} ({free:,.0f} MB are free there); nothing of it is left, make room and start again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def disk_reason(error: Exception) -> str | None:
    """Why the disk did not take something; None if the error is of another kind.

    Example:
        >>> disk_reason(OSError(errno.ENOSPC, "here")), disk_reason(ValueError("no"))
        ('No space left on device', None)
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _DISK else None
    found = _OS_ERROR.search(str(error))
    if found:
        return found[1].strip()
    return "torch could not write a file" if any(word in str(error) for word in _TORCH) else None
