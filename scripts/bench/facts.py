"""What every result says of the run that made it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from hfcompress.measurement import device_name, provenance


def run_facts(*, seed: int, threads: int = 1) -> dict[str, Any]:
    """Command without the paths of this machine, date, seed, commit, versions and device."""
    return {
        "command": "python " + shlex.join([Path(sys.argv[0]).name, *(Path(part).name for part in sys.argv[1:])]),
        **provenance(seed=seed),
        "device": {"cpu": device_name("cpu"), "cores": os.cpu_count(), "threads": threads, "gpu": None},
    }
