"""`hfcompress report`: a run on one page."""

from __future__ import annotations

import argparse
from typing import Any

from hfcompress.cli.arguments import add_command


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "report",
        run,
        "Write what a run measured as one self-contained HTML page.",
        """\
Table with intervals and paired tests, score against latency, what each step did, what is left in each layer, curves of the training,
changes by class, lineage and licences, how to load and to reproduce it. The page needs no network and no scripts.

examples:
  hfcompress report ./runs/bert-sst2
  hfcompress report ./fast --output fast.html
""",
    )
    parser.add_argument("folder", help="folder of a run, or of a model that hfcompress pruned or quantized")
    parser.add_argument(
        "--output", default=None, metavar="FILE.html", help="file to write (default FOLDER/report.html)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.hub.report import write_report

    print(write_report(options.folder, options.output))
    return 0
