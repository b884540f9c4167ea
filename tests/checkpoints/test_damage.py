"""Folders that are damaged or made to do harm: one line each, no gigabytes, and nothing of another place is read."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import hfcompress
from hfcompress.anatomy import StructureError
from hfcompress.cli.main import main
from tests.hub.folders import row, save_pruned


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    save_pruned(tmp_path / "pruned")
    return tmp_path / "pruned"


def edited(**changes: Any) -> Callable[[Path], None]:
    """Fields of config.json."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def recorded(**changes: Any) -> Callable[[Path], None]:
    """Parts of the record."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["hfcompress"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def without(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def headed(size: int, header: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header)  # type: ignore[return-value]


def cut_off(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut off": (cut_off("model.safetensors"), "its weights are damaged"),
    "a header of terabytes": (headed(2**42, b"{}"), r"its weights are damaged \(.*header"),
    "a header that lies": (
        headed(70, b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}       '),
        "its weights are damaged",
    ),
    "a weight is missing": (without("classifier.weight"), "the weights classifier.weight are missing"),
    "config cut off": (cut_off("config.json"), "is not a valid JSON file"),
    "a million layers": (
        edited(num_hidden_layers=10**6),
        "num_hidden_layers in config.json is 1,000,000; at most 1,000 are read",
    ),
    "thousands of layers": (edited(num_hidden_layers=900), "says 900 layers, but there are only"),
    "a vocabulary of billions": (
        edited(vocab_size=10**10),
        r"says [\d,]+ parameters, but the weights are [\d,]+ bytes",
    ),
    "neurons of another number": (recorded(units={"encoder.0.neurons": [10**9, 10**9]}), "encoder.0.neurons"),
    "another width": (edited(hidden_size=64), "do not have the shapes that its config.json says"),
    "no heads": (edited(num_attention_heads=0), "says something impossible .*ZeroDivisionError"),
    "a width in words": (edited(hidden_size="wide"), "hidden_size.*expected int, got str"),
    "layers in a list": (edited(architectures=5), "architectures in config.json is 5, must be a list of names"),
    "a class of another kind": (edited(architectures=["Trainer"]), "which is not one class of transformers"),
    "a record of another version": (recorded(version=9), "has version '9', this hfcompress reads 1"),
    "more left than there were": (recorded(units={"encoder.0.heads": [5, 4]}), "must be .units left, units before."),
    "fewer than none": (recorded(units={"encoder.0.heads": [-1, 4]}), "must be .units left, units before."),
    "a place that is not there": (
        recorded(units={"../../etc/passwd": [1, 4]}),
        r"which Bert\w+ does not have",
    ),
    "units in words": (recorded(units="all"), "must map site names"),
    "steps that are no steps": (recorded(steps=[1]), "must be a list of at most"),
    "units of a step": (
        recorded(steps=[{"step": "prune", "units": {"encoder.0.heads": [1]}}]),
        "must be .units left, units before.",
    ),
    "too many steps": (recorded(steps=[{}] * 2000), "must be a list of at most 1000"),
    "hidden features of nobody": (recorded(hidden=[10**9, 10**9 + 1]), "hidden"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_in_one_line(name: str, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, said = DAMAGES[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edit(pruned)
    with pytest.raises((StructureError, OSError), match=said) as caught:
        hfcompress.load(pruned)
    assert len(str(caught.value).splitlines()) == 1
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown_bytes < 300e6
    capsys.readouterr()
    assert main(["quantize", str(pruned), "--preset", "int8", "--output", str(pruned.parent / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hfcompress: ") and not (pruned.parent / "out").exists()


RESULTS: dict[str, tuple[Any, str]] = {
    "cut off": ('{"rows": [', "is not valid JSON"),
    "deep": ("[" * 100_000, "is not valid JSON"),
    "a list": ([], "must hold an object with a list of rows"),
    "rows in words": ({"rows": "all"}, "must hold an object with a list of rows"),
    "a row without latency": ({"rows": [{"name": "a", "parameters": 1, "disk_bytes": 1}]}, "no 'latency'"),
    "a score in words": (
        {"rows": [{**row("a", ".", 0.9), "metric": {"name": "x", "value": "high", "low": 0, "high": 1, "n": 1}}]},
        "value",
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_that_are_none(name: str, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, said = RESULTS[name]
    (pruned / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for command in (["report", str(pruned)], ["compare", str(pruned)], ["check", str(pruned), "--min-speedup", "1"]):
        capsys.readouterr()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("hfcompress: ") and said in line, command
    assert not (pruned / "report.html").exists()


ADAPTERS: dict[str, tuple[str, str]] = {
    "no object": ("[1]", "does not say base_model_name_or_path"),
    "no base": ("{}", "does not say base_model_name_or_path"),
    "half": ('{"base', "is not valid JSON"),
    "a base elsewhere": ('{"base_model_name_or_path": "../../nowhere/at/all", "peft_type": "LORA"}', "nowhere"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_none(name: str, tmp_path: Path) -> None:
    content, said = ADAPTERS[name]
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=said) as caught:
        hfcompress.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
