"""`hfcompress measure`: size, FLOPs and latency."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import add_command, positive


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "measure",
        run,
        "Measure size, FLOPs and latency of a model, or compare several.",
        """\
Latency is the median of interleaved rounds after a warm-up, with the 10th and 90th percentile. With several models the speedup
is over the first. Accuracy needs data: use `hfcompress run`, or read results.json in the folder of a run.

examples:
  hfcompress measure ./teacher ./student --batch 32 --length 64 --threads 1
  hfcompress measure user/model --json
""",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folders or Hub repositories; the first is the baseline"
    )
    parser.add_argument("--batch", type=positive, default=32, help="examples in a batch (default 32)")
    parser.add_argument(
        "--length", type=positive, default=64, help="tokens per example (default 64; images: as the model)"
    )
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default: as torch)")
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds, 3 or more (default 15)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--compile", action="store_true", help="all go through torch.compile, which torchao's need")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from hfcompress.config import Recipe
    from hfcompress.runs import format_rows
    from hfcompress.runs.evaluation import measure_folders

    names = ("batch", "length", "threads", "rounds", "device", "compile")
    settings = {name: getattr(options, name) for name in names}
    config = Recipe.from_dict({"measure": settings}, source="hfcompress measure").measure
    folders = {}
    for model in options.models:
        try:
            folders[model] = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
        except (HfHubHTTPError, HFValidationError):
            raise ValueError(f"{model} is neither a folder nor a repository on the Hub that you may see") from None
    rows = measure_folders(folders, None, config)
    print(json.dumps(rows, indent=2) if options.json else format_rows(rows))
    return 0
