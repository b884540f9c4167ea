"""`hfcompress check`: does a model keep its contract?"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hfcompress.cli.arguments import add_command, column_arguments, number, options_named, positive

_BOUNDS = ("max_drop", "min_speedup", "max_mb", "max_latency_ms")
_TIMING = ("batch", "length", "threads", "rounds", "device")


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "check",
        run,
        "Measure a model beside its baseline and say whether it keeps a contract.",
        """\
Everything is measured anew, both models in turn in one process. A clause is met, or failed, where its whole 95 % interval lies on one
side of the bound; where the bound lies inside, this many examples (or rounds) cannot decide, and the answer says about how many could.
Without bounds those of the run's recipe count. Of a run's folder all models are measured, and it is enough that one keeps the contract.

exit status: 0 met, 1 failed, 3 undecided, 2 for anything that kept it from being measured

examples:
  hfcompress check ./runs/bert-sst2/student --max-drop 1.0 --min-speedup 1.8 --max-mb 60
  hfcompress check ./fast --baseline ./bert-sst2 --data dev.csv --max-drop 1.0 --json
  hfcompress check ./runs/bert-sst2                  the contract in its recipe
""",
    )
    parser.add_argument("folder", help="folder of a model or of a run")
    parser.add_argument(
        "--baseline", default=None, metavar="DIR", help="model to compare with (default: the run's teacher)"
    )
    parser.add_argument("--data", default=None, metavar="FILE", help="examples to score on (default: those of the run)")
    column_arguments(parser)
    parser.add_argument("--max-drop", type=number, help="points it may lose (per cent of a perplexity)")
    parser.add_argument("--min-speedup", type=number, help="times as fast it has to be")
    parser.add_argument("--max-mb", type=number, help="million bytes it may take on disk")
    parser.add_argument("--max-latency-ms", type=number, help="milliseconds a batch may take")
    parser.add_argument(
        "--batch", type=positive, default=None, help="examples in a batch when timed (default: as the run, or 32)"
    )
    parser.add_argument(
        "--length", type=positive, default=None, help="tokens per example when timed (default: as the run, or 64)"
    )
    parser.add_argument(
        "--threads", type=positive, default=None, help="CPU threads when timed (default: as the run, or torch)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=None, help="timed rounds, 6 or more (default: as the run, or 15)"
    )
    parser.add_argument("--device", default=None, help="auto, cpu, cuda, cuda:1 (default: as the run, or auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from hfcompress.config import Recipe
    from hfcompress.hub.contract import EXIT_STATUS, describe, verdict
    from hfcompress.runs import format_rows
    from hfcompress.runs.checking import check_folder

    bounds = {name: value for name in _BOUNDS if (value := getattr(options, name)) is not None}
    timing = {name: value for name in _TIMING if (value := getattr(options, name)) is not None}
    columns = {"text": options.text, "image": options.image, "label": options.label}
    if options.data is None and any(columns.values()):
        raise ValueError("--text, --image and --label are columns of --data; give that as well")
    values: dict[str, Any] = {"measure": timing}
    if bounds:
        values["contract"] = bounds
    if options.data is not None:
        text = columns["text"][0] if columns["text"] and len(columns["text"]) == 1 else columns["text"]
        lengths = {} if options.length is None else {"max_length": options.length}
        both = {"train": options.data, "eval": options.data}  # nothing is trained, and all of it is scored on
        values["data"] = {**both, **columns, "text": text, **lengths}
    recipe = Recipe.from_dict(values, source="hfcompress check")
    with options_named():
        found = check_folder(
            options.folder,
            recipe.contract,
            baseline=options.baseline,
            data=recipe.data,
            measure=timing,
            say=lambda text: print(f"== {text}", file=sys.stderr),
        )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return EXIT_STATUS[found.verdict]
    print(format_rows(found.rows))
    for name, clauses in found.clauses.items():
        print(f"\n{name}: {verdict(clauses)}")
        for clause in clauses:
            print(f"  {describe(clause)}")
    if len(found.clauses) > 1:
        print(f"\nof {len(found.clauses)} models one that keeps it is enough: {found.verdict}")
    return EXIT_STATUS[found.verdict]
