"""`hfcompress vocabulary`: fewer tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import add_command, positive, require_empty, share


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "vocabulary",
        run,
        "Remove the tokens that your texts do not use from tokenizer and embeddings.",
        """\
The tokens of the texts are counted and the frequent ones stay, with special tokens and all characters or bytes, so that any
other text can still be encoded, in more pieces. Texts whose tokens all stay are encoded as before and give the same outputs.
The result loads like the original. Give texts like those that the model is for, the more the better.

examples:
  hfcompress vocabulary ./student --data train.parquet --output ./student-small-vocabulary
  hfcompress vocabulary ./student --data train.csv more.txt --text sentence --coverage 1 --output ./smaller
  hfcompress vocabulary user/model --data reviews.jsonl --size 16000 --output ./smaller
""",
    )
    parser.add_argument("model", help="folder or Hub repository")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="csv, tsv, json, jsonl, parquet, or txt (a text a line)",
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="COLUMN", help="columns of text (default: found)")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument("--size", type=positive, default=None, help="number of tokens that stay")
    how_many.add_argument(
        "--coverage",
        type=share,
        default=None,
        help="share of the tokens in the texts that stay, above 0 and at most 1 (default 0.999)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.checkpoints.staging import staged_folder
    from hfcompress.runs.vocabulary import cut_folder
    from hfcompress.tasks.corpus import read_corpus
    from hfcompress.tasks.errors import DataError

    target = Path(options.output)
    require_empty(target)
    try:
        texts = read_corpus(options.data, text=options.text, key="--data")
    except DataError as error:
        raise ValueError(str(error).replace("data.text", "--text")) from None
    coverage = 0.999 if options.size is None and options.coverage is None else options.coverage
    with staged_folder(target) as folder:
        done = cut_folder(options.model, texts, folder, size=options.size, coverage=coverage)
    print(f"{'':<12}{'before':>14}{'after':>14}")
    for name, pair in (("tokens", done.tokens), ("parameters", done.parameters)):
        print(f"{name:<12}{pair[0]:>14,}{pair[1]:>14,}{pair[1] / pair[0]:>7.0%}")
    before, after = done.size_bytes
    print(f"{'MB':<12}{before / 1e6:>14,.1f}{after / 1e6:>14,.1f}{after / before:>7.0%}")
    print(f"tokens of the data that stay: {done.tokens_share:.2%}; texts encoded as before: {done.texts_share:.2%}")
    print(f"{target}: loads again")
    return 0
