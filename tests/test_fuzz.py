"""Recipes, records, files and command lines that are wrong in some way: a few hundred of the cases of scripts/bench/fuzz.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.bench import fuzz

CASES = {
    "recipe_as_data": 120,
    "recipe_as_text": 60,
    "record": 25,
    "weights": 60,
    "results": 20,
    "cache": 100,
    "adapters": 30,
    "layers_file": 20,
    "command_line": 30,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Material]:
    home = tmp_path_factory.mktemp("fuzz").resolve()
    with fuzz.quiet_and_offline(home):
        yield fuzz.Material(home)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_each_case_ends_well_or_in_one_line(kind: str, material: fuzz.Material) -> None:
    found = fuzz.search(kind, material, cases=CASES[kind], random_seed=1)
    assert found.faults == {} and found.n >= CASES[kind] // 2
    assert found.succeeded > 0, "all are refused: the cases are worth little"


def test_it_finds_what_is_wrong(material: fuzz.Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fuzzer that sees nothing would pass as well."""

    def refuse() -> None:
        raise ValueError("one\ntwo")

    def trip() -> None:
        raise KeyError("layers")

    assert "ValueError of 2 lines" in (fuzz.call(refuse) or "")
    assert "KeyError in test_fuzz.py" in (fuzz.call(trip) or "")
    place = material.place()

    def leave(*_: object, **__: object) -> int:
        (place / "half").write_text("half")
        raise ValueError("no")

    monkeypatch.setattr("hfcompress.cli.inspect.what_is_left", leave)
    found = fuzz.command(material, "inspect", str(material.home / "model"))
    assert found is not None and found.startswith("left behind") and "half" in found
    monkeypatch.setattr("hfcompress.cli.inspect.what_is_left", lambda *_: trip())
    assert "traceback: KeyError" in (fuzz.command(material, "inspect", str(material.home / "model")) or "")
    Path(place / "half").unlink()
    assert fuzz.command(material, "inspect") is None, "the parser's own line"
