"""Started in a fresh process by a run: loads what was saved, scores and times it, and writes `results.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers


def main() -> None:
    """Arguments: the folder of the run, then NAME=FOLDER for each model, the baseline first."""
    from hfcompress.config import Recipe
    from hfcompress.hub.card import RESULTS_FILE
    from hfcompress.runs.evaluation import measure_folders, rate_on
    from hfcompress.runs.pipeline import RECIPE_FILE, results_of
    from hfcompress.tasks import prepare

    transformers.utils.logging.disable_progress_bar()
    output, folders = Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:])
    recipe = Recipe.from_yaml(output / RECIPE_FILE)
    assert recipe.data is not None and recipe.task is not None
    baseline = next(iter(folders.values()))
    processor = next((f for f in reversed(folders.values()) if _has_processor(Path(f))), baseline)
    names = transformers.AutoConfig.from_pretrained(baseline).id2label
    task = prepare(
        recipe.data,
        task=recipe.task,
        model_name=processor,
        seed=recipe.seed,
        label_names=[names[number] for number in sorted(names)],
    )
    rows = measure_folders({name: Path(folder) for name, folder in folders.items()}, rate_on(task), recipe.measure)
    for row in rows:
        row["folder"] = Path(row["folder"]).name  # no paths of this machine
    results = results_of(recipe, task, rows)
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _has_processor(folder: Path) -> bool:
    processor = any((folder / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    return processor and (folder / "config.json").is_file()  # beside an adapter there is none


if __name__ == "__main__":
    main()
