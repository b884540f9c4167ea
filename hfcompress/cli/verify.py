"""`hfcompress verify`: does a folder load as its card says?"""

from __future__ import annotations

import argparse
from typing import Any

from hfcompress.cli.arguments import add_command


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "verify",
        run,
        "Check that a folder loads by every way its card names, with the same outputs.",
        "example:\n  hfcompress verify ./student\n",
    )
    parser.add_argument("folder", help="the folder to check")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.hub import verify_folder
    from hfcompress.hub.verify import ROUTES

    checks = verify_folder(options.folder)
    for check in checks:
        outcome = f"ok, difference {check.difference:.2g}" if check.ok else f"FAILED: {check.error}"
        print(f"{ROUTES[check.route]}: {outcome}")
    return 0 if all(check.ok for check in checks) else 1
