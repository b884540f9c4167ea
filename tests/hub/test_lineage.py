"""Licences: what is said beside a model or its data, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfcompress.hub.lineage import describe_source, licence_of

APACHE = Path(__file__).parents[2] / "LICENSE"
CARDS = {
    "---\nlicense: apache-2.0\n---\n# A": "apache-2.0",
    "---\r\nlicense: mit\r\ntags: [a]\r\n---\r\n": "mit",
    "---\nlicense: [mit, cc-by-4.0]\n---\n": "mit, cc-by-4.0",
    "---\nlicense: other\nlicense_name: llama3\n---\n": "llama3",
    "---\nlicense: other\n---\n": "other",
    "---\ntags: [a]\n---\n": None,
    "---\nlicense: 3\n---\n": None,
    "---\nlicense: ''\n---\n": None,
    "---\n: : [\n---\n": None,
    "---\n- license\n---\n": None,
    "# No metadata\nlicense: mit\n": None,
    "": None,
}


@pytest.mark.parametrize("text", CARDS, ids=range(len(CARDS)))
def test_what_a_card_says(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode())
    expected = CARDS[text]
    assert licence_of(tmp_path) == (None if expected is None else (expected, "its card"))


TEXTS = {
    "MIT License\n\nCopyright (c) 2020 Somebody\n\nPermission is hereby granted, free of charge, to": "mit",
    "Copyright 2020\n\nPermission is hereby granted, free of charge, to any person": "mit",
    "                    GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007": "gpl-3.0",
    "GNU LESSER GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n... the GNU General Public License": "lgpl-3.0",
    "Creative Commons Attribution 4.0 International Public License": "cc-by-4.0",
    "Attribution-ShareAlike 4.0 International": "cc-by-sa-4.0",
    "BSD 3-Clause License": "bsd-3-clause",
    "All rights reserved.": None,
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_a_licence_file_begins_with(text, tmp_path):
    (tmp_path / "LICENSE").write_text(text)
    expected = TEXTS[text]
    assert licence_of(tmp_path) == (None if expected is None else (expected, "its LICENSE file"))


def test_our_own_and_a_card_goes_before_a_file(tmp_path):
    (tmp_path / "LICENSE").write_text(APACHE.read_text())
    assert licence_of(tmp_path) == ("apache-2.0", "its LICENSE file")
    (tmp_path / "README.md").write_text("---\nlicense: openrail\n---\n")
    assert licence_of(tmp_path) == ("openrail", "its card")


def test_of_a_file_what_stands_in_its_folder(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n")
    assert licence_of(tmp_path / "train.csv", kind="dataset") is None
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    assert licence_of(tmp_path / "train.csv", kind="dataset") == ("cc0-1.0", "its card")


def test_nothing_is_fetched_and_nothing_guessed():
    for name in ("google-bert/bert-base-uncased-of-nobody", "no/such/place", "a b", ""):
        assert licence_of(name) is None
    assert describe_source("films", None) == {"name": "films", "licence": None, "said_by": None}
