"""`hfcompress cache-teacher`: what a teacher says, on disk."""

from __future__ import annotations

import argparse
from typing import Any

from hfcompress.cli.arguments import add_command, column_arguments, numbers, options_named, positive, text_columns


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "cache-teacher",
        run,
        "Let a teacher run once over the data and keep what it says, for distillation.",
        """\
Distillation asks the teacher about the same examples in every epoch, for every seed and setting. Here it is asked once; training then reads
files: DistillationTrainer(teacher="./cache", ...). An example is found by its content, so order, batches, padding and processes may
differ, but not tokenizer and --length, and nothing may be masked or augmented at random. The size is said before anything is
written. Stopped, even by force, it goes on where it was when started again.

What is kept of each example, or of each token where the teacher predicts one:
  --logits        all logits (default): a few bytes for a classifier, 200 kB a token for a language model
  --top-k K       the K likeliest classes, and K/4 of the others drawn by the teacher: 294 bytes a token with K = 64
  --samples N     N classes drawn by the teacher: right on average, 2 bytes each
  --last-hidden   what enters the head of a language model, and the head once: exact, 2 bytes a feature

examples:
  hfcompress cache-teacher ./bert-sst2 --data train.csv --output ./cache
  hfcompress cache-teacher ./smollm --data wiki.txt --length 512 --top-k 64 --output ./cache
  hfcompress cache-teacher ./vit --data images/ --hidden-layers 3,7,11 --dtype float16 --output ./cache
  hfcompress cache-teacher recipe.yaml --output ./cache       teacher and data of a recipe
  torchrun --nproc_per_node 4 -m hfcompress.cli.main cache-teacher ./bert-sst2 --data train.csv --output ./cache
""",
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder, Hub repository, or a recipe (.yaml)")
    parser.add_argument("--data", default=None, metavar="FILE", help="examples: csv, json, parquet, txt, images")
    parser.add_argument("--eval", default=None, metavar="FILE", help="what no part of --data is held out for")
    column_arguments(parser)
    parser.add_argument("--task", default=None, help="what the teacher was made for (default: by its class)")
    parser.add_argument("--length", type=positive, default=128, help="tokens per example (default 128, as recipes)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write, or to go on in")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--logits", action="store_true", help="keep all logits (the default)")
    kept.add_argument("--top-k", type=positive, default=None, metavar="K", help="keep the K likeliest classes")
    kept.add_argument("--samples", type=positive, default=None, metavar="N", help="keep N drawn classes")
    kept.add_argument("--last-hidden", action="store_true", help="keep the last hidden states, and the head")
    parser.add_argument(
        "--hidden-layers", type=numbers, default=(), metavar="1,3", help="keep the outputs of these layers too"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of --logits (default float32)",
    )
    parser.add_argument("--batch", type=positive, default=32, help="examples asked about at once (default 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default 42)")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.config import Recipe
    from hfcompress.distillation import CacheContents
    from hfcompress.distillation.cache_format import LogitsKind
    from hfcompress.distillation.cache_writing import in_bytes
    from hfcompress.runs.caching import cache_recipe, cache_teacher

    from_recipe = options.teacher.lower().endswith((".yaml", ".yml"))
    if from_recipe == (options.data is not None):
        raise ValueError("a recipe says which data; leave out --data" if from_recipe else "give --data, or a recipe")
    kept: dict[LogitsKind, Any] = {
        "top_k": options.top_k,
        "samples": options.samples,
        "last_hidden": options.last_hidden,
    }
    kind: LogitsKind = next((kind for kind, value in kept.items() if value), "all")
    count = int(options.top_k or options.samples or 1)
    contents = CacheContents(kind, count=count, hidden_layers=options.hidden_layers, dtype=options.dtype)
    settings: dict[str, Any] = {"device": options.device, "batch": options.batch}
    if from_recipe:
        made = cache_recipe(Recipe.from_yaml(options.teacher), options.output, contents, **settings)
    else:
        data = {name: getattr(options, name) for name in ("eval", "image", "label")}
        data |= {"train": options.data, "text": text_columns(options), "max_length": options.length}
        recipe = Recipe.from_dict(
            {"data": data, "seed": options.seed} | ({"task": options.task} if options.task else {}),
            source="hfcompress cache-teacher",
        )
        assert recipe.data is not None
        settings |= {"task": recipe.task, "seed": recipe.seed}
        with options_named():
            made = cache_teacher(options.teacher, recipe.data, options.output, contents, **settings)
    if not made.complete:
        print(f"{options.output}: this process is done; others are still writing")
        return 0
    each = (made.tokens, "token") if made.tokens else (made.examples, "example")
    size = f"{in_bytes(made.size_bytes)} ({made.size_bytes / max(each[0], 1):,.0f} bytes per {each[1]})"
    tokens = f", {made.tokens:,} tokens" if made.tokens else ""
    print(f"{options.output}: {made.contents} of {made.teacher} for {made.examples:,} examples{tokens}; {size}")
    return 0
