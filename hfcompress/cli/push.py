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
What does not load by every way its card names, with the same outputs, is not pushed. Log in first: hf auth login. A busy or unreachable
Hub is asked again; if a push fails, the branch is as it was, and the next one sends no large file that arrived.

examples:
  hfcompress push ./student me/bert-sst2-small
  hfcompress push ./student my-org/bert-sst2-small --private --revision v1
  hfcompress push ./student somebody/bert-sst2-small --pr
""",
    )
    parser.add_argument("folder", help="the folder to push")
    parser.add_argument("repo", help="user/name")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    parser.add_argument("--revision", default=None, help="branch to commit to; made if it is not there")
    parser.add_argument("--pr", action="store_true", help="open a pull request instead of committing")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from huggingface_hub import logging

    from hfcompress.hub import push_folder

    logging.disable_propagation()  # it prints its warnings itself
    commit = push_folder(
        options.folder, options.repo, private=options.private, revision=options.revision, create_pr=options.pr
    )
    if options.pr:
        print(f"pull request: {commit.pr_url}" if commit.pr_url else f"nothing to change: {commit.repo_url} has it all")
    else:
        print(f"pushed: {commit.repo_url}, commit {commit.oid}")
    return 0
