"""`hfcompress prune`: pruning without training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import (
    add_command,
    data_arguments,
    data_sections,
    number,
    options_named,
    require_empty,
    share,
)
from hfcompress.cli.inspect import what_is_left


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "prune",
        run,
        "Prune a model without training: rank, cut and repair it, in minutes.",
        """\
Units are removed where they cost least for the speed that is asked for, as measured on this machine, and what stays is refitted so that
every layer gives what it gave before. Labels are not needed for that, only examples; with labels the result is scored. Beyond
about twice the speed, train the result: `hfcompress run` with a recipe prunes while it fine-tunes and distils.

examples:
  hfcompress prune ./bert-sst2 --data train.csv --eval dev.csv --speedup 1.5 --output ./bert-sst2-fast
  hfcompress prune user/model --data train.parquet --max-drop 1.0 --output ./small
  hfcompress prune ./smollm --data wiki.txt --parameters 0.8 --length 512 --samples 128 --output ./smaller
  hfcompress prune ./vit --data images/ --flops 0.6 --units heads neurons sublayers --output ./vit-60
  hfcompress prune ./bert-sst2 --data train.csv --parameters 0.4 --units heads neurons hidden vocabulary --output ./tiny

With hidden, models of several hidden widths are cut and compared, which takes several times as long. With vocabulary, tokens that
--data hardly uses go from tokenizer and embeddings first; alone, it keeps as many as --parameters leaves room for.
""",
    )
    data_arguments(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--speedup", type=number, help="times faster than before anything was pruned, measured")
    goal.add_argument("--latency-ms", type=number, help="milliseconds of a forward pass, measured")
    goal.add_argument("--sparsity", type=number, help="share of the parameters of all heads and neurons to remove")
    goal.add_argument("--parameters", type=number, help="parameters left: their number, or up to 1 their share")
    goal.add_argument("--flops", type=number, help="operations left per example: their number, or up to 1 their share")
    goal.add_argument("--max-drop", type=number, help="find the fastest model that loses no more points than this")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--units",
        nargs="+",
        default=["heads", "neurons", "sublayers"],
        choices=["heads", "neurons", "sublayers", "layers", "hidden", "vocabulary"],
        help="what may go (default: heads neurons sublayers)",
    )
    parser.add_argument(
        "--coverage",
        type=share,
        default=0.999,
        help="of the vocabulary: share of the tokens in --data that stay (default 0.999)",
    )
    parser.add_argument("--criterion", default="obs", help="how units are ranked (default obs)")
    parser.add_argument("--no-repair", action="store_true", help="leave the weights that stay as they are")
    parser.add_argument("--scope", default="model", choices=["model", "layers"], help="what is timed (default model)")
    parser.add_argument(
        "--uniform", action="store_true", help="make all layers alike, so that plain transformers loads it"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.checkpoints.staging import staged_folder
    from hfcompress.config import Recipe
    from hfcompress.hub.picture import draw_layers
    from hfcompress.measurement.provenance import command_line
    from hfcompress.runs import format_rows
    from hfcompress.runs.post_training import prune_folder

    goals = ("speedup", "latency_ms", "sparsity", "parameters", "flops", "max_drop")
    goal = next(name for name in goals if getattr(options, name) is not None)
    section = {
        "target": {goal: getattr(options, goal), "scope": options.scope},
        "units": options.units,
        "criterion": {"name": options.criterion, "samples": options.samples},
        "repair": not options.no_repair,
        "uniform": options.uniform,
        "coverage": options.coverage,
    }
    recipe = Recipe.from_dict({"prune": section, **data_sections(options)}, source="hfcompress prune")
    assert recipe.prune is not None and recipe.data is not None
    target = Path(options.output)
    require_empty(target)
    with options_named(), staged_folder(target) as folder:
        rows = prune_folder(
            options.model,
            folder,
            recipe.prune,
            recipe.data,
            measure=recipe.measure,
            seed=recipe.seed,
            command=command_line(["hfcompress", *sys.argv[1:]]),
            say=lambda text: print(f"== {text}", file=sys.stderr),
        )
    units, layers, *_ = what_is_left(str(target))
    print(draw_layers(units, layers=layers), end="\n\n")
    print(format_rows(rows))
    print(f"\n{target}: loads again by every way its card names (hfcompress push {target} user/name)")
    return 0
