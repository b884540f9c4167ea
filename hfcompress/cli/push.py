"""`hfcompress push`: a folder to the Hub."""

from __future__ import annotations

import argparse
from typing import Any

from hfcompress.cli.arguments import add_command


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "push",
        run,
        "Verify a folder in fresh processes and push it to the Hub in one commit.",
        """\
What does not load by every way its card names, with the same outputs, is not pushed. Log in first: hf auth login.

examples:
  hfcompress push ./student me/bert-sst2-small
  hfcompress push ./student my-org/bert-sst2-small --private --revision v1
""",
    )
    parser.add_argument("folder", help="the folder to push")
    parser.add_argument("repo", help="user/name")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    parser.add_argument("--revision", default=None, help="branch to commit to")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.hub import push_folder

    commit = push_folder(options.folder, options.repo, private=options.private, revision=options.revision)
    print(f"pushed: {commit.repo_url}, commit {commit.oid}")
    return 0
