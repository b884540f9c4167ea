"""Under which licence a model or its data are, as far as that is said beside them; nothing is guessed and nothing fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")
# Identifiers of SPDX, as the Hub writes them, by how a licence's text begins.
_TEXTS = (
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"mit license", "mit"),
    (r"permission is hereby granted, free of charge", "mit"),
    (r"bsd 3-clause", "bsd-3-clause"),
    (r"bsd 2-clause", "bsd-2-clause"),
    (r"gnu affero general public license\s+version 3", "agpl-3.0"),
    (r"gnu lesser general public license\s+version 3", "lgpl-3.0"),
    (r"gnu general public license\s+version 3", "gpl-3.0"),
    (r"gnu general public license\s+version 2", "gpl-2.0"),
    (r"creative commons (legal code\s+)?cc0", "cc0-1.0"),
    (r"(creative commons )?attribution-sharealike 4\.0", "cc-by-sa-4.0"),
    (r"(creative commons )?attribution-noncommercial 4\.0", "cc-by-nc-4.0"),
    (r"(creative commons )?attribution 4\.0", "cc-by-4.0"),
    (r"mozilla public license,? version 2\.0", "mpl-2.0"),
)


def licence_of(source: str | Path, *, kind: Literal["model", "dataset"] = "model") -> tuple[str, str] | None:
    r"""The licence of a folder, a file (what is said in its folder), or a repository whose card is in the Hub's cache.

    Args:
        source: Folder, file or repository.
        kind: Of the repository.

    Returns:
        Its identifier, and what says so ("its card", "its LICENSE file"); None where nothing says it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Films")
        ...     licence_of(folder)
        ('cc-by-4.0', 'its card')
    """
    path = Path(source)
    if str(source) and path.exists():
        folder = path if path.is_dir() else path.parent
        return _of_card(folder / "README.md") or _of_files(folder)
    try:
        cached = try_to_load_from_cache(str(source), "README.md", repo_type=kind)
    except ValueError:  # not the name of a repository
        return None
    return _of_card(Path(cached)) if isinstance(cached, str) else None


def _of_card(card: Path) -> tuple[str, str] | None:
    """The field `license` of a card's metadata."""
    text = _read(card)
    head = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if head is None:
        return None
    try:
        metadata: Any = yaml.safe_load(head[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    said = metadata.get("license") if isinstance(metadata, dict) else None
    if said == "other":
        said = metadata.get("license_name") or said
    names = [each for each in (said if isinstance(said, list) else [said]) if isinstance(each, str) and each.strip()]
    return (", ".join(name.strip()[:80] for name in names), "its card") if names else None


def _of_files(folder: Path) -> tuple[str, str] | None:
    """What the text of a licence beside it begins with."""
    for name in _FILES:
        text = " ".join(_read(folder / name)[:2000].lower().split())
        found = [(match.start(), known) for words, known in _TEXTS if (match := re.search(words, text))]
        if found:
            return min(found)[1], f"its {name} file"
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:200_000] if file.is_file() else ""
    except OSError:
        return ""


def describe_source(
    name: str, source: str | Path | None, *, kind: Literal["model", "dataset"] = "model"
) -> dict[str, Any]:
    """An entry of `lineage` in `results.json`: what it is called, its licence or None, and what says so."""
    found = licence_of(source, kind=kind) if source is not None else None
    licence, said_by = found or (None, None)
    return {"name": name, "licence": licence, "said_by": said_by}
