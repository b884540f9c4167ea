"""Started in a fresh process by a run: loads what was saved, scores and times it, and writes `results.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

if TYPE_CHECKING:
    from hfcompress.config import Recipe
    from hfcompress.tasks import PreparedTask


def main() -> None:
    """Arguments: the folder of the run, then NAME=FOLDER for each model, the baseline first."""
    from hfcompress.config import Recipe
    from hfcompress.hub.predictions import save_answers
    from hfcompress.hub.results import RESULTS_FILE
    from hfcompress.runs.evaluation import measure_and_keep, rate_on
    from hfcompress.runs.pipeline import RECIPE_FILE, origins_of, results_of

    transformers.utils.logging.disable_progress_bar()
    output, folders = Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:])
    recipe = Recipe.from_yaml(output / RECIPE_FILE)
    paths = {name: Path(folder) for name, folder in folders.items()}
    task = prepare_for(recipe, list(paths.values()))
    found = measure_and_keep(
        paths, rate_on(task), recipe.measure, origins=origins_of(list(paths)), class_names=task.label_names
    )
    for row in found.rows:
        row["folder"] = Path(row["folder"]).name  # no paths of this machine
    results = results_of(recipe, task, found.rows, output)
    save_answers(found.answers, output, fingerprint=task.fingerprint)
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def prepare_for(recipe: Recipe, folders: Sequence[Path]) -> PreparedTask:
    """The task of a recipe, for saved models of which the first is the baseline, whose classes count."""
    from hfcompress.tasks import prepare

    assert recipe.data is not None and recipe.task is not None
    names = transformers.AutoConfig.from_pretrained(folders[0]).id2label
    return prepare(
        recipe.data,
        task=recipe.task,
        model_name=str(next((folder for folder in reversed(folders) if _has_processor(folder)), folders[0])),
        seed=recipe.seed,
        label_names=[names[number] for number in sorted(names)],
    )


def _has_processor(folder: Path) -> bool:
    processor = any((folder / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    return processor and (folder / "config.json").is_file()  # beside an adapter there is none


if __name__ == "__main__":
    main()
