"""`hfcompress compare`: several runs side by side."""

from __future__ import annotations

import argparse
from typing import Any

from hfcompress.cli.arguments import add_command


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "compare",
        run,
        "Put several runs or models side by side, with paired tests.",
        """\
Of a run all new models take part, of a model's folder that model; the first is what the others are held against. Where two answered
the same examples the test is paired, else their intervals are compared and that is said. Nothing is measured anew.

examples:
  hfcompress compare ./runs/bert-2x ./runs/bert-3x
  hfcompress compare ./fast ./faster ./fastest --html comparison.html
  hfcompress compare ./runs/bert-2x --json
""",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of runs or models with results.json")
    parser.add_argument("--html", default=None, metavar="FILE", help="also write a page like that of hfcompress report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from hfcompress.checkpoints.staging import staged_file
    from hfcompress.hub.comparison import compare_folders, format_comparison, render_comparison

    found = compare_folders(options.folders)
    if options.html is not None:
        with staged_file(options.html) as file:
            file.write_text(render_comparison(found), encoding="utf-8")
    print(json.dumps(found.to_dict(), indent=2) if options.json else format_comparison(found))
    if options.html is not None and not options.json:
        print(f"\nwritten to {options.html}")
    return 0
