"""Modules of this package, run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def run_fresh(module: str, *arguments: str) -> bool:
    """Run a module in a fresh process, which neither what this one did to torch nor its group of processes reaches.

    Args:
        module: Its full name.
        *arguments: What it finds in `sys.argv`.

    Returns:
        Whether it came to its end; what it said is on the terminal.

    Example:
        >>> run_fresh("hfcompress.runs.fresh")
        True
    """
    environment = {key: value for key, value in os.environ.items() if key not in _GROUP}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode == 0
