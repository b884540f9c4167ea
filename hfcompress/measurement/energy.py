"""Joules of the processor or GPU while something runs, where the machine counts them and lets us read."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """Counts joules since some time in the past.

    Attributes:
        source: What counts, in words.
    """

    source: str

    def read_j(self) -> float:
        """Joules so far."""


@dataclass
class Energy:
    """What a block took.

    Attributes:
        joules: Of the whole chip, idle power included; None where nothing counts.
        source: What counted, in words; None where nothing does.
    """

    joules: float | None = None
    source: str | None = None


@contextmanager
def energy_of(counter: Counter | None) -> Iterator[Energy]:
    """Count the joules of a block; they are there once it is left.

    Args:
        counter: From `find_counter`; None counts nothing.

    Example:
        >>> class Fixed:
        ...     source, joules = "a made-up counter", iter((10.0, 12.5))
        ...     def read_j(self):
        ...         return next(self.joules)
        >>> with energy_of(Fixed()) as energy:
        ...     pass
        >>> energy
        Energy(joules=2.5, source='a made-up counter')
    """
    energy = Energy(source=None if counter is None else counter.source)
    start_j = math.nan if counter is None else counter.read_j()
    yield energy
    if counter is not None:
        energy.joules = counter.read_j() - start_j


def find_counter(device: torch.device | str, *, powercap: Path = POWERCAP) -> Counter | None:
    """What counts the energy of a device: RAPL for processors, NVML for NVIDIA's GPUs; None where that cannot be read.

    Args:
        device: For example "cpu" or "cuda:0".
        powercap: Where Linux shows RAPL's counters. Since 2020 most systems let only root read them.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _find_nvml(device)
    return _find_rapl(powercap) if device.type == "cpu" else None


class Rapl:
    """The processor's own counters (running average power limit) of its packages and memory."""

    source = "RAPL, processor packages and memory"

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = [(zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in zones]
        self._last_uj = [_number(file) for file, _ in self._zones]
        self._total_uj = 0

    def read_j(self) -> float:
        """Joules since this object was made; each counter may have begun anew once between two calls."""
        for place, (file, range_uj) in enumerate(self._zones):
            now_uj = _number(file)
            passed_uj = now_uj - self._last_uj[place]
            self._total_uj += passed_uj if passed_uj >= 0 else passed_uj + range_uj
            self._last_uj[place] = now_uj
        return self._total_uj / 1e6


def _find_rapl(powercap: Path) -> Rapl | None:
    """Packages, and memory below them; cores are part of their package."""
    zones = []
    for zone in sorted(powercap.glob("*rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if name.startswith("package") or name == "dram":
            zones.append(zone)
    try:
        return Rapl(zones) if zones else None
    except (OSError, ValueError):
        return None


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


class Nvml:
    """The GPU's own counter, read through the driver's library."""

    source = "NVML, the whole GPU"

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    def read_j(self) -> float:
        """Joules since the driver was loaded, once the GPU has done what it was given."""
        torch.cuda.synchronize()
        millijoules = ctypes.c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        if status:
            raise OSError(f"NVML gives no energy: status {status}")
        return millijoules.value / 1e3


def _find_nvml(device: torch.device) -> Nvml | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    # By its name: NVML does not know CUDA_VISIBLE_DEVICES.
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None
    counter = Nvml(library, handle)
    try:
        counter.read_j()
    except OSError:
        return None
    return counter
