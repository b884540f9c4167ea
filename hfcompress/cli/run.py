"""`hfcompress run`: a recipe from beginning to end."""

from __future__ import annotations

import argparse
import atexit
from typing import Any

from hfcompress.cli.arguments import add_command
from hfcompress.cli.inspect import what_is_left


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "run",
        run,
        "Run a recipe from beginning to end.",
        """\
A recipe is one YAML file: model, data, how to prune and distil, what to quantize. The run fine-tunes a teacher if the recipe
names none, compresses, loads everything again in a fresh process, and prints one table. Started again, it goes on where it was.
With a section `contract` the exit status is 0 where a model keeps it, 1 where all fail, and 3 where that cannot be decided.

examples:
  hfcompress run recipe.yaml
  hfcompress run recipe.yaml prune.target.sparsity=0.7 train.num_train_epochs=1 output=runs/smaller
  torchrun --nproc_per_node 4 -m hfcompress.cli.main run recipe.yaml
""",
    )
    parser.add_argument("recipe", help="the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an earlier run left in the output folder"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.config import Recipe
    from hfcompress.hub.contract import EXIT_STATUS
    from hfcompress.hub.picture import draw_layers
    from hfcompress.measurement.provenance import command_line
    from hfcompress.runs import Run, format_rows

    recipe = Recipe.from_yaml(options.recipe, overrides=options.overrides)
    command = command_line(["hfcompress", "run", options.recipe, *options.overrides])
    run = Run(recipe, command=command, restart=options.restart)
    # At the end of the process, not of the run: a process may have more than one.
    atexit.register(run.state.destroy_process_group)
    rows = run.run()
    if rows is None:
        return 0
    student = run.output / "student"
    print()
    if student.is_dir():
        units, layers, *_ = what_is_left(str(student))
        if any(left != before for left, before in (*units.values(), *layers.values())):
            print(draw_layers(units, layers=layers), end="\n\n")
    print(format_rows(rows))
    print(f"\nReady to push: {student if student.is_dir() else run.output} (hfcompress push FOLDER user/name)")
    if recipe.contract is not None:
        print(f"Contract: {run.verdict}")
    print(f"On one page: hfcompress report {run.output}")
    return EXIT_STATUS[run.verdict]
