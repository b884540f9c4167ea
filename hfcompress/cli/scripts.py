"""What the scripts under `scripts/` share: a recipe, changes to it, and one task."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from hfcompress.cli.main import main
from hfcompress.config import Recipe, RecipeError


def run_task(task: str, *, description: str | None) -> NoReturn:
    """Run a recipe for one task and exit with the status of the run.

    Args:
        task: The task; the recipe may leave it out, but not name another.
        description: Shown by --help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an earlier run left in the output folder"
    )
    options = parser.parse_args()
    try:
        named = Recipe.from_yaml(options.config, overrides=options.overrides).task
    except RecipeError as error:
        sys.exit(f"hfcompress: {error}")
    if named not in (None, task):
        sys.exit(
            f"hfcompress: {options.config}: task is {named}, and this script is for {task}; use the script of that task"
        )
    arguments = ["run", options.config, *options.overrides, f"task={task}"]
    sys.exit(main(arguments + (["--restart"] if options.restart else [])))
