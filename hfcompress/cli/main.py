"""The command `hfcompress`. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import hfcompress
from hfcompress.cli import (
    cache_teacher,
    check,
    compare,
    export,
    inspect,
    measure,
    prune,
    push,
    quantize,
    report,
    run,
    sensitivity,
    student,
    verify,
    vocabulary,
    write_targets,
)
from hfcompress.cli.arguments import Parser

_COMMANDS = (
    run,
    prune,
    student,
    sensitivity,
    measure,
    inspect,
    report,
    compare,
    check,
    quantize,
    export,
    vocabulary,
    cache_teacher,
    write_targets,
    push,
    verify,
)

_EPILOG = """\
examples:
  hfcompress run configs/bert_sst2.yaml              train, prune, distil, quantize, measure, card
  hfcompress prune ./bert-sst2 --data train.csv --speedup 1.5 --output ./fast
  hfcompress student ./bert-sst2 ./three-layers --layers 3
  hfcompress inspect ./runs/bert-sst2/student        what is left in each layer
  hfcompress measure ./runs/bert-sst2/student        size and latency
  hfcompress report ./runs/bert-sst2                 all of it on one page
  hfcompress compare ./runs/bert-sst2 ./runs/other
  hfcompress check ./runs/bert-sst2/student --max-drop 1.0 --min-speedup 1.8
  hfcompress quantize ./runs/bert-sst2/student --preset nf4
  hfcompress export ./runs/bert-sst2/student --format openvino-int8 --data train.csv --measure
  hfcompress vocabulary ./runs/bert-sst2/student --data train.csv --output ./smaller
  hfcompress cache-teacher ./bert-sst2 --data train.csv --output ./cache
  hfcompress write-targets ./smollm-instruct --data chats.jsonl --output answers.jsonl
  hfcompress push ./runs/bert-sst2/student me/bert-sst2-small --private

Each command explains itself: hfcompress COMMAND --help. HFCOMPRESS_DEBUG=1 shows tracebacks.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(
        prog="hfcompress",
        description="Compress Hugging Face transformers: distil, prune, quantize, measure, push.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hfcompress {hfcompress.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for module in _COMMANDS:
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is one line on stderr and a non-zero exit status."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "overrides") and not any(part.startswith("-") for part in rest):
        options.overrides += rest  # argparse takes no KEY=VALUE behind an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _quiet()
    try:
        return int(options.function(options))
    except KeyboardInterrupt as error:
        sys.stderr.write(f"hfcompress: {str(error) or 'stopped'}\n")
        return 130
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if os.environ.get("HFCOMPRESS_DEBUG"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(f"hfcompress: {lines[0]}\n")
        return 2


def _quiet() -> None:
    """What libraries say while loading is not the user's business; our own notes and warnings are."""
    import logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hfcompress").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if "RANK" not in os.environ or os.environ["RANK"] == "0":
        return
    logging.getLogger("hfcompress").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
