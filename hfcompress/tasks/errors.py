"""The one error of this package: data that cannot be used as asked, said in one line."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

from huggingface_hub.errors import GatedRepoError, StrictDataclassError


class DataError(ValueError):
    """The data, or what was said about it, cannot be used; one line says what is wrong and what to do."""


# What transformers raises over files that are not what they should be: it looks at few of the values in them.
_UNREADABLE = (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, StrictDataclassError)


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Errors over a model's tokenizer, image processor or configuration as one line.

    Args:
        what: What is loaded, and of which model.

    Raises:
        DataError: It is not there, or damaged.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _UNREADABLE) and type(error) is not Exception:  # tokenizers, in Rust, has no class
            raise
        raise DataError(f"{what} cannot be loaded: {first_line(error)}") from error


def unknown_name(key: str, kind: str, name: str, allowed: Iterable[str]) -> DataError:
    """The error for a name that is not there, with the nearest one that is.

    Args:
        key: Key of the recipe that holds the name.
        kind: What is named.
        name: The wrong name.
        allowed: The names there are.

    Returns:
        The error, to be raised.

    Example:
        >>> str(unknown_name("data.text", "column", "txt", ["text", "label"]))
        "data.text: column 'txt' is not in the data; there are: text, label; did you mean 'text'?"
    """
    names = list(allowed)
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
    return DataError(f"{key}: {kind} {name!r} is not in the data; there are: {', '.join(names)}{hint}")


def first_line(error: BaseException) -> str:
    r"""The first line of an error's innermost cause, for a message that must fit in one line.

    Example:
        >>> first_line(ValueError("no such split\nmore about it"))
        'no such split'
    """
    while error.__cause__ is not None:
        error = error.__cause__
        if isinstance(error, GatedRepoError):
            return "it is gated; ask for access on its page, and log in with: hf auth login"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
