"""The one error of this package: data that cannot be used as asked, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """The data, or what was said about it, cannot be used; one line says what is wrong and what to do."""


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
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
