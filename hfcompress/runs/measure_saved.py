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
    from hfcompress.runs.evaluation import Rate
    from hfcompress.tasks import PreparedTask


def main() -> None:
    """Arguments: the folder of the run, then NAME=FOLDER for each model, the baseline first."""
    from hfcompress.config import Recipe
    from hfcompress.hub.predictions import save_answers
    from hfcompress.hub.results import RESULTS_FILE
    from hfcompress.runs.evaluation import measure_and_keep
    from hfcompress.runs.pipeline import RECIPE_FILE, origins_of, results_of

    transformers.utils.logging.disable_progress_bar()
    output, folders = Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:])
    recipe = Recipe.from_yaml(output / RECIPE_FILE)
    paths = {name: Path(folder) for name, folder in folders.items()}
    task = prepare_for(recipe, list(paths.values()))
    found = measure_and_keep(
        paths,
        rates_for(recipe, paths, task, output),
        recipe.measure,
        origins=origins_of(list(paths)),
        class_names=task.label_names,
    )
    for row in found.rows:
        row["folder"] = Path(row["folder"]).name  # no paths of this machine
    results = results_of(recipe, task, found.rows, output)
    save_answers(found.answers, output, fingerprint=task.fingerprint)
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def rates_for(recipe: Recipe, folders: dict[str, Path], task: PreparedTask, run: Path | None) -> Rate | dict[str, Rate]:
    """What scores each model: the baseline reads texts in its own tokens, if the others have fewer.

    Where tokens are what is predicted, scores can only be compared over the same ones: there the baseline is scored with all else as it
    was and the smaller vocabulary, which a run keeps.

    Args:
        recipe: What was asked for; its data count.
        folders: Name to folder, the baseline first.
        task: As the others read it.
        run: Folder of the run, if there was one.

    Raises:
        ValueError: Tokens are what is predicted, and there is no baseline with the smaller vocabulary.
    """
    from hfcompress.checkpoints.adapters import read_config
    from hfcompress.checkpoints.io import load
    from hfcompress.checkpoints.record import read_vocabulary
    from hfcompress.runs.evaluation import rate_on
    from hfcompress.runs.pipeline import SMALLER

    rate = rate_on(task)
    baseline, *_, last = folders
    before, after = (read_vocabulary(read_config(folders[name])) for name in (baseline, last))
    if before == after:
        return rate
    if recipe.task not in ("fill-mask", "text-generation"):
        return dict.fromkeys(folders, rate) | {baseline: rate_on(prepare_for(recipe, [folders[baseline]]))}
    smaller = None if run is None else run / SMALLER
    if smaller is None or not smaller.is_dir():
        raise ValueError(
            f"{last} has fewer tokens than {baseline}, so scores over tokens cannot be compared; leave out --max-drop, or compare with a "
            "model that hfcompress vocabulary made"
        )
    return dict.fromkeys(folders, rate) | {
        baseline: lambda model: rate(load(smaller).to(next(model.parameters()).device).eval())
    }


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
