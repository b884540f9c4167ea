"""A saved model measured beside the one that it was made from, in a fresh process; the results go into its folder and its card."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from hfcompress.checkpoints.io import model_class
from hfcompress.config import Recipe
from hfcompress.hub import write_card
from hfcompress.hub.predictions import save_answers
from hfcompress.hub.results import RESULTS_FILE, read_results
from hfcompress.hub.verify import RouteCheck
from hfcompress.measurement import provenance
from hfcompress.measurement.latency import usable_positions
from hfcompress.runs.evaluation import measure_and_keep
from hfcompress.runs.examples import Examples, read_examples
from hfcompress.runs.fresh import run_fresh
from hfcompress.runs.likeness import MADE_UP, rate_beside_first
from hfcompress.runs.post_training import lineage_of_folder, local_folder, short_name
from hfcompress.tasks.sources import read_sources

COMPARED = 256  # at most, of examples without labels


def measure_beside(
    source: str,
    output: Path,
    recipe: Recipe,
    *,
    name: str,
    command: str = "",
    checks: list[RouteCheck] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure a folder beside the model that it was made from, and complete its `results.json` and its card.

    Both are loaded in a fresh process and timed in turns. They are scored as the data allow: by labels, by perplexity, else the new
    one by how often it says what the old one says, on examples without labels or on made-up ones.

    Args:
        source: Folder or Hub repository of the model that it was made from.
        output: Folder of the new model.
        recipe: Its sections `data`, which may be missing, and `measure`, and its seed.
        name: What the new model is called in the table.
        command: What was typed, for the card.
        checks: How the folder was found to load, for the card.
        say: Told what is being done.

    Returns:
        The rows of the table: the old and the new model.

    Raises:
        RuntimeError: It could not be measured; what the other process has to say is on the terminal.
    """
    say("Measuring it beside the original in a fresh process")
    before = {
        "name": output.resolve().name,
        "command": command,
        "lineage": lineage_of_folder(source, recipe.data),
        **provenance(seed=recipe.seed),
    }
    (output / RESULTS_FILE).write_text(json.dumps(before | read_results(output), indent=2) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        if not run_fresh("hfcompress.runs.beside", str(path), source, str(output), name):
            raise RuntimeError(
                f"{output} is written and loads, but could not be measured (see above); leave that out with --no-measure"
            )
    write_card(output, base_model=None if Path(source).is_dir() else source, checks=checks)
    return read_results(output)["rows"]


def examples_beside(source: str, recipe: Recipe) -> Examples | None:
    """What both models are scored on; None without data.

    Raises:
        DataError: The data cannot be read, or do not fit the model.
    """
    if recipe.data is None:
        return None
    model = _blank(source)
    with _nothing_trained():
        examples = read_examples(model, source, recipe.data, samples=1, seed=recipe.seed)
    if examples.rate is not None:
        return examples
    # Other examples, as far as there are any, than those that the weights were rounded on.
    return read_examples(model, source, recipe.data, samples=COMPARED, seed=recipe.seed + 1)


@contextmanager
def _nothing_trained() -> Iterator[None]:
    """Nobody has to be told that examples to be scored on are the training data where there is no training."""
    sources = logging.getLogger(read_sources.__module__)
    before, sources.disabled = sources.disabled, True
    try:
        yield
    finally:
        sources.disabled = before


def _blank(source: str) -> Any:
    """The model without its weights."""
    cls, config = model_class(source)
    with torch.device("meta"):
        return cls._from_config(config)


def main() -> None:
    """Arguments: a recipe, the old model, the folder of the new one, and its name."""
    transformers.utils.logging.disable_progress_bar()
    recipe, source, output, name = Recipe.from_yaml(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    length = min(recipe.measure.length, usable_positions(_blank(source)))
    measure = recipe.measure.model_copy(update={"length": length})
    examples = examples_beside(source, recipe) or Examples([], MADE_UP, None)
    task = examples.task
    found = measure_and_keep(
        {"original": local_folder(source), name: output},
        examples.rate or rate_beside_first(examples.batches, measure=measure),
        measure,
        class_names=task.label_names if task is not None else (),
    )
    for row in found.rows:
        row["folder"] = "." if row["name"] == name else short_name(source)
    results = read_results(output)
    data = dict(results.get("data") or {"name": _name_of_data(recipe)})
    if task is not None:
        data |= {"eval_n": len(task.eval_dataset), "fingerprint": task.fingerprint}
    elif examples.rate is None:
        data |= {"eval_n": examples.n, "labels": False}
    save_answers(found.answers, output, fingerprint=data.get("fingerprint"))
    results |= {"rows": found.rows, "data": data}
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _name_of_data(recipe: Recipe) -> str:
    data = recipe.data
    return "made-up inputs" if data is None else data.title or data.name or Path(str(data.train)).name


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("HFCOMPRESS_DEBUG"):
            raise
        sys.exit(f"hfcompress: {str(error).splitlines()[0]}")
