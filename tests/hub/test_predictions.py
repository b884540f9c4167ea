"""Predictions kept beside the results: as they were, in a small file, or a line that says what is wrong with it."""

from __future__ import annotations

import numpy as np
import pytest

from hfcompress.hub.predictions import PREDICTIONS_FILE, read_answers, save_answers
from hfcompress.measurement import Answers

DRAW = np.random.default_rng(0)
KINDS = {
    "classes": Answers.of_classes(DRAW.integers(0, 77, 3000), DRAW.integers(0, 77, 3000)),
    "ignored": Answers.of_classes([-100, 2, 300], [-100, 2, 2]),
    "several": Answers("share", (DRAW.random(50) < 0.5).astype(float), np.ones(50)),
    "entities": Answers("ratio", DRAW.integers(0, 4, 50).astype(float), DRAW.integers(1, 9, 50).astype(float)),
    "tokens": Answers("perplexity", DRAW.random(50), DRAW.integers(1, 9, 50).astype(float)),
    "numbers": Answers("correlation", *DRAW.normal(size=(2, 50))),
}


def test_they_come_back_as_they_were(tmp_path):
    save_answers(KINDS, tmp_path, fingerprint="0123")
    found, fingerprint = read_answers(tmp_path)
    assert fingerprint == "0123" and list(found) == list(KINDS)
    for name, answers in KINDS.items():
        assert found[name].kind == answers.kind
        for column in ("tops", "bottoms", "predicted", "labels"):
            before, after = (getattr(side, column) for side in (answers, found[name]))
            assert (before is None and after is None) or (np.array_equal(before, after) and before.dtype == after.dtype)


def test_the_file_is_small(tmp_path):
    path = save_answers({"a": KINDS["classes"]}, tmp_path, fingerprint=None)
    assert path.name == PREDICTIONS_FILE and path.stat().st_size < 3000 * 2 + 1500
    assert read_answers(tmp_path)[1] is None


def test_without_a_file_there_are_none(tmp_path):
    assert read_answers(tmp_path) == ({}, None)


def broken(path):
    np.savez(path, about=np.array('{"fingerprint": null, "models": [["a", "ratio"]]}'))


def pickled(path):
    np.savez(path, about=np.array([{"models": []}], dtype=object))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 not a zip"),
        lambda path: path.write_text("{}"),
        broken,
        pickled,
        lambda path: np.savez(path, other=np.zeros(3)),
        lambda path: np.savez(path, about=np.array("[]")),
    ],
)
def test_a_broken_file_is_one_line(write, tmp_path):
    write(tmp_path / PREDICTIONS_FILE)
    with pytest.raises(ValueError) as caught:
        read_answers(tmp_path)
    assert str(caught.value).endswith("measure the model again") and len(str(caught.value).splitlines()) == 1
