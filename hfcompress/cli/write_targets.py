"""`hfcompress write-targets`: a text by the teacher for each example, in a file to train on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import add_command, number, options_named, positive


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "write-targets",
        run,
        "Let a teacher write a text to each example, for a student to learn as if people had written it.",
        """\
Sequence-level distillation (Kim and Rush 2016): of the teacher that writes summaries, translations or answers the student learns these texts.
The file is one that recipes and scripts read as it is, whatever tokenizer the student has. What is read, and what is written:

  encoder-decoders   a column of texts                 {"source": ..., "target": ...}            task: text2text-generation
  causal models      a column of prompts, or a .txt    {"prompt": ..., "completion": ...}        task: text-generation
  chat models        a column of messages              {"messages": [..., the answer]}           task: text-generation

Labels are not needed and not kept; of a chat whose last message is the assistant's, that one is written anew. A --prefix (T5's "summarize: ")
is what the teacher reads and not part of the file: a recipe says it again as data.prefix. Texts end where the teacher ends them, or after
--new-tokens; how many did so is said at the end, together with the lengths that a recipe must allow so that nothing is cut.

What is done is kept in FILE.parts until FILE is whole: stopped, even by force, the same command goes on where it was.

examples:
  hfcompress write-targets ./t5-summaries --data articles.csv --prefix "summarize: " --beams 5 --output written.jsonl
  hfcompress write-targets ./smollm-instruct --data chats.jsonl --new-tokens 256 --output answers.jsonl
  hfcompress write-targets ./smollm --data prompts.txt --sample --temperature 0.7 --output stories.jsonl
  hfcompress run recipe.yaml task=text-generation data.train=answers.jsonl data.max_length=400
  torchrun --nproc_per_node 4 -m hfcompress.cli.main write-targets ./smollm --data prompts.txt --output stories.jsonl
""",
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder or Hub repository")
    parser.add_argument("--data", required=True, metavar="FILE", help="examples: csv, json, parquet, txt")
    parser.add_argument(
        "--text", default=None, metavar="COLUMN", help="column of texts, prompts or messages (default: found)"
    )
    parser.add_argument("--prefix", default="", help="put before each text that an encoder-decoder reads")
    parser.add_argument(
        "--max-examples", type=positive, default=None, metavar="N", help="at most so many, chosen by --seed"
    )
    parser.add_argument("--length", type=positive, default=512, help="tokens read of an example (default 512)")
    parser.add_argument(
        "--new-tokens", type=positive, default=128, metavar="N", help="tokens written at most (default 128)"
    )
    parser.add_argument(
        "--beams", type=positive, default=1, metavar="N", help="beams that are kept (default 1: greedy)"
    )
    parser.add_argument("--sample", action="store_true", help="draw from the teacher's distribution")
    parser.add_argument("--temperature", type=number, default=None, metavar="T", help="of --sample (default 1)")
    parser.add_argument("--batch", type=positive, default=8, help="examples at once (default 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--seed", type=int, default=42, help="of what is chosen and drawn (default 42)")
    parser.add_argument("--output", required=True, type=_json_lines, metavar="FILE.jsonl", help="file to write")


def _json_lines(text: str) -> str:
    """The name of a file of JSON lines: recipes tell by it how to read it."""
    if Path(text).suffix != ".jsonl":
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must end in .jsonl")
    return text


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.config import Recipe
    from hfcompress.distillation.cache_writing import in_bytes
    from hfcompress.runs.writing_targets import write_targets

    if options.temperature is not None and not options.sample:
        raise ValueError("--temperature is for --sample; without it the likeliest text is written")
    drawn = 1.0 if options.temperature is None else options.temperature
    data = {"train": options.data, "text": options.text, "max_length": options.length}
    data |= {"prefix": options.prefix, "max_train": options.max_examples}
    recipe = Recipe.from_dict({"data": data, "seed": options.seed}, source="hfcompress write-targets")
    assert recipe.data is not None
    with options_named():
        written = write_targets(
            options.teacher,
            recipe.data,
            options.output,
            new_tokens=options.new_tokens,
            beams=options.beams,
            temperature=drawn if options.sample else None,
            batch=options.batch,
            device=options.device,
            seed=recipe.seed,
        )
    if written is None:
        return 0
    size = in_bytes(written.file.stat().st_size)
    print(
        f"{written.file}: {written.rows:,} rows of {' and '.join(written.columns)}, {written.tokens:,} tokens written, {size}"
    )
    if written.blank:
        print(f"{written.blank:,} examples are left out: the teacher wrote nothing to them")
    if written.unfinished:
        print(
            f"{written.unfinished:,} texts were cut after {options.new_tokens} tokens (--new-tokens), and a student learns to stop there"
        )
    print(f"to train on it: {' '.join(_overrides(written, options.prefix))}")
    return 0


def _overrides(written: Any, prefix: str) -> list[str]:
    """What to write behind `hfcompress run recipe.yaml`."""
    import json
    import shlex

    values = {"train": str(written.file), **written.lengths} | ({"prefix": json.dumps(prefix)} if prefix else {})
    return [f"task={written.task}", *(shlex.quote(f"data.{key}={value}") for key, value in values.items())]
