"""Energy: counted by a tree of files like Linux's, and by nothing where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from hfcompress.config import MeasureConfig
from hfcompress.measurement.energy import energy_of, find_counter
from hfcompress.runs import evaluation
from tests.families import make_config

ZONES = {
    "intel-rapl:0": ("package-0", 5_000_000, 10_000_000),
    "intel-rapl:0:0": ("core", 1_000_000, 10_000_000),
    "intel-rapl:0:1": ("dram", 9_500_000, 10_000_000),
    "intel-rapl:1": ("package-1", 0, 10_000_000),
    "intel-rapl:2": ("psys", 0, 10_000_000),
}


@pytest.fixture
def powercap(tmp_path):
    for zone, (name, energy_uj, range_uj) in ZONES.items():
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return tmp_path


def set_energy(powercap: Path, zone: str, energy_uj: int) -> None:
    (powercap / zone / "energy_uj").write_text(f"{energy_uj}\n")


def test_packages_and_memory_are_summed(powercap):
    counter = find_counter("cpu", powercap=powercap)
    with energy_of(counter) as energy:
        set_energy(powercap, "intel-rapl:0", 7_500_000)  # 2.5 J
        set_energy(powercap, "intel-rapl:0:0", 9_000_000)  # a core: part of its package
        set_energy(powercap, "intel-rapl:1", 250_000)  # 0.25 J
        set_energy(powercap, "intel-rapl:2", 9_000_000)  # the whole system: has the packages in it
        assert energy.joules is None
    assert (energy.joules, energy.source) == (2.75, "RAPL, processor packages and memory")


def test_a_counter_that_begins_anew(powercap):
    counter = find_counter("cpu", powercap=powercap)
    with energy_of(counter) as first:
        set_energy(powercap, "intel-rapl:0:1", 200_000)  # from 9.5 over 10 to 0.2
    with energy_of(counter) as second:
        set_energy(powercap, "intel-rapl:0:1", 900_000)
    assert (first.joules, second.joules) == (pytest.approx(0.7), pytest.approx(0.7))


def test_without_a_counter_nothing_is_said(tmp_path, powercap, monkeypatch):
    assert find_counter("cpu", powercap=tmp_path / "nothing") is None
    assert find_counter("meta", powercap=powercap) is None
    with energy_of(None) as energy:
        pass
    assert (energy.joules, energy.source) == (None, None)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("")  # as if it could not be read
    assert find_counter("cpu", powercap=powercap) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").chmod(0)
    assert find_counter("cpu", powercap=powercap) is None


def test_rows_say_joules_per_input(tmp_path, monkeypatch):
    """A counter that adds 3 joules each time it is read: of the 4 rounds of 2 inputs that are counted each takes 3 / 8."""

    class Steady:
        source = "a made-up counter"
        joules = 0.0

        def read_j(self) -> float:
            self.joules += 3
            return self.joules

    for name in ("first", "second"):
        transformers.BertForSequenceClassification(make_config("bert")).save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in ("first", "second")}
    config = MeasureConfig(batch=2, length=8, rounds=4, warmup=0, threads=1, device="cpu")
    monkeypatch.setattr(evaluation, "find_counter", lambda device: Steady())
    rows = evaluation.measure_folders(folders, None, config)
    assert [row["energy"] for row in rows] == [{"joules_per_input": 3 / 8, "source": "a made-up counter"}] * 2
    monkeypatch.setattr(evaluation, "find_counter", lambda device: None)
    assert not any("energy" in row for row in evaluation.measure_folders(folders, None, config))
    assert torch.is_grad_enabled()
