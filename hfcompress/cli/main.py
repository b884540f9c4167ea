"""The command `hfcompress`. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hfcompress

_EPILOG = """\
examples:
  hfcompress run configs/bert_sst2.yaml              train, prune, distil, quantize, measure, card
  hfcompress prune ./bert-sst2 --data train.csv --speedup 1.5 --output ./fast
  hfcompress student ./bert-sst2 ./three-layers --layers 3
  hfcompress inspect ./runs/bert-sst2/student        what is left in each layer
  hfcompress measure ./runs/bert-sst2/student        size and latency
  hfcompress quantize ./runs/bert-sst2/student --preset nf4
  hfcompress export ./runs/bert-sst2/student --format openvino-int8 --data train.csv --measure
  hfcompress vocabulary ./runs/bert-sst2/student --data train.csv --output ./smaller
  hfcompress cache-teacher ./bert-sst2 --data train.csv --output ./cache
  hfcompress push ./runs/bert-sst2/student me/bert-sst2-small --private

Each command explains itself: hfcompress COMMAND --help. HFCOMPRESS_DEBUG=1 shows tracebacks.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; how to do it right is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(
        prog="hfcompress",
        description="Compress Hugging Face transformers: distil, prune, quantize, measure, push.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hfcompress {hfcompress.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = _add(
        commands,
        "run",
        _run,
        "Run a recipe from beginning to end.",
        """\
A recipe is one YAML file: model, data, how to prune and distil, what to quantize. The run fine-tunes a teacher if the recipe
names none, compresses, loads everything again in a fresh process, and prints one table. Started again, it goes on where it was.

examples:
  hfcompress run recipe.yaml
  hfcompress run recipe.yaml prune.target.sparsity=0.7 train.num_train_epochs=1 output=runs/smaller
  torchrun --nproc_per_node 4 -m hfcompress.cli.main run recipe.yaml
""",
    )
    run.add_argument("recipe", help="the YAML file")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the recipe")
    run.add_argument("--restart", action="store_true", help="throw away what an earlier run left in the output folder")

    prune = _add(
        commands,
        "prune",
        _prune,
        "Prune a model without training: rank, cut and repair it, in minutes.",
        """\
Units are removed where they cost least for the speed that is asked for, as measured on this machine, and what stays is refitted so that
every layer gives what it gave before. Labels are not needed for that, only examples; with labels the result is scored. Beyond
about twice the speed, train the result: `hfcompress run` with a recipe prunes while it fine-tunes and distils.

examples:
  hfcompress prune ./bert-sst2 --data train.csv --eval dev.csv --speedup 1.5 --output ./bert-sst2-fast
  hfcompress prune user/model --data train.parquet --max-drop 1.0 --output ./small
  hfcompress prune ./smollm --data wiki.txt --parameters 0.8 --length 512 --samples 128 --output ./smaller
  hfcompress prune ./vit --data images/ --flops 0.6 --units heads neurons sublayers --output ./vit-60
""",
    )
    _data_arguments(prune)
    goal = prune.add_mutually_exclusive_group(required=True)
    goal.add_argument("--speedup", type=_number, help="times faster than before anything was pruned, measured")
    goal.add_argument("--latency-ms", type=_number, help="milliseconds of a forward pass, measured")
    goal.add_argument("--sparsity", type=_number, help="share of the parameters of all heads and neurons to remove")
    goal.add_argument("--parameters", type=_number, help="parameters left: their number, or up to 1 their share")
    goal.add_argument("--flops", type=_number, help="operations left per example: their number, or up to 1 their share")
    goal.add_argument("--max-drop", type=_number, help="find the fastest model that loses no more points than this")
    prune.add_argument("--output", required=True, help="folder to write")
    prune.add_argument(
        "--units",
        nargs="+",
        default=["heads", "neurons", "sublayers"],
        choices=["heads", "neurons", "sublayers", "layers"],
        help="what may go (default: heads neurons sublayers)",
    )
    prune.add_argument("--criterion", default="obs", help="how units are ranked (default obs)")
    prune.add_argument("--no-repair", action="store_true", help="leave the weights that stay as they are")
    prune.add_argument("--scope", default="model", choices=["model", "layers"], help="what is timed (default model)")
    prune.add_argument(
        "--uniform", action="store_true", help="make all layers alike, so that plain transformers loads it"
    )

    student = _add(
        commands,
        "student",
        _student,
        "Make a smaller model from a teacher, with its weights, to be distilled.",
        """\
Layers are chosen first, then heads and neurons, then hidden features (those with the largest weights stay); last, fields of the
config are changed, and whatever still fits is copied. It scores little before it is trained: `hfcompress run` distils it.

examples:
  hfcompress student ./bert-sst2 ./three-layers --layers 3
  hfcompress student ./bert-sst2 ./narrow --layers 0,2,4 --hidden 256 --heads 8 --neurons 768
  hfcompress student user/t5 ./small-t5 --layers encoder=6 decoder=2
  hfcompress student ./bert-sst2 ./fresh --config num_hidden_layers=2 intermediate_size=512 --random
""",
    )
    student.add_argument("teacher", help="folder or Hub repository")
    student.add_argument("output", help="folder to write")
    student.add_argument(
        "--layers",
        nargs="+",
        type=_layers,
        metavar="N",
        help="how many stay, spread evenly with the last among them; or their numbers, 0,2,4; or those of each stack, encoder=6",
    )
    student.add_argument("--hidden", type=_positive, help="features of the hidden states that stay")
    student.add_argument("--heads", type=_positive, help="heads that stay in each layer")
    student.add_argument("--neurons", type=_positive, help="neurons that stay in each layer")
    student.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="fields of the config to change")
    student.add_argument("--random", action="store_true", help="copy no weights, draw all anew")
    student.add_argument("--seed", type=int, default=42, help="of weights that are drawn anew (default 42)")

    sensitivity = _add(
        commands,
        "sensitivity",
        _sensitivity,
        "Show what the units of each layer are worth, or the bits of its weights, before hours are spent.",
        """\
One place at a time is left with three quarters, half, a quarter and none of its units, the least important going first, and the change
of the predictions is measured (divergence in nats per example, without repair); then each whole layer is left out, and how much it turns the
hidden states is shown beside (block influence). Labels are not needed.

With --bits the table says what each linear layer of the transformer layers costs in loss and in bytes with so many bits, all others being
whole. With a budget the best number of bits for each layer is chosen: the least expected loss within --max-mb, or the smallest model within
--max-loss. --save keeps it for `hfcompress quantize --layers`. If what is chosen is one format of bitsandbytes for some layers and none for
the others, transformers and bitsandbytes alone load the result; else `import hfcompress` is needed.

  16          the layer stays as it is, in the type that the model is saved in (of a float32 model it has 32 bits)
  8, 4        int8 and nf4-dq of bitsandbytes
  7 6 5 3 2   integers with one scale for 64 weights, the same as int6-g64
  a name      int8, nf4, nf4-dq, fp4, fp4-dq, or a scheme: int4-g32-asym, codebook4, ternary, ...

--by fisher expects the loss of all of them from one pass forwards and one backwards; --by divergence really rounds one layer after the other
and runs the model each time, which is exact and slow. Losses of layers are added up, so the total is an estimate.

examples:
  hfcompress sensitivity ./bert-sst2 --data train.csv
  hfcompress sensitivity ./vit --data images/ --samples 128 --picture worth.png --json
  hfcompress sensitivity ./bert-sst2 --data train.csv --bits 16 8 4 --max-mb 60 --save bits.json --picture bits.png
  hfcompress sensitivity ./gpt2 --data texts.txt --bits 8 6 5 4 3 --max-loss 0.5
""",
    )
    _data_arguments(sensitivity, samples=256)
    sensitivity.add_argument("--criterion", default="obs", help="in which order units go (default obs)")
    sensitivity.add_argument("--picture", default=None, metavar="FILE.png", help="also draw it")
    sensitivity.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sensitivity.add_argument(
        "--bits", nargs="+", default=None, metavar="BITS", help="numbers of bits, or names of formats, to choose from"
    )
    sensitivity.add_argument(
        "--by",
        default="fisher",
        choices=["fisher", "divergence"],
        help="how the loss of bits is found (default fisher)",
    )
    budget = sensitivity.add_mutually_exclusive_group()
    budget.add_argument("--max-mb", type=_number, metavar="MB", help="the model takes at most so many million bytes")
    budget.add_argument("--max-loss", type=_number, metavar="NATS", help="it loses at most so much, nats per example")
    sensitivity.add_argument("--save", default=None, metavar="FILE.json", help="keep costs and choice of bits")

    measure = _add(
        commands,
        "measure",
        _measure,
        "Measure size, FLOPs and latency of a model, or compare several.",
        """\
Latency is the median of interleaved rounds after a warm-up, with the 10th and 90th percentile. With several models the speedup
is over the first. Accuracy needs data: use `hfcompress run`, or read results.json in the folder of a run.

examples:
  hfcompress measure ./teacher ./student --batch 32 --length 64 --threads 1
  hfcompress measure user/model --json
""",
    )
    measure.add_argument(
        "models", nargs="+", metavar="MODEL", help="folders or Hub repositories; the first is the baseline"
    )
    measure.add_argument("--batch", type=_positive, default=32, help="examples in a batch (default 32)")
    measure.add_argument(
        "--length", type=_positive, default=64, help="tokens per example (default 64; images: as the model)"
    )
    measure.add_argument("--threads", type=_positive, default=None, help="CPU threads (default: as torch)")
    measure.add_argument("--rounds", type=_positive, default=15, help="timed rounds, 3 or more (default 15)")
    measure.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    measure.add_argument("--json", action="store_true", help="print JSON instead of a table")

    inspect = _add(
        commands,
        "inspect",
        _inspect,
        "Show where a model can be cut, and what is left in each layer.",
        """\
Nothing but the config is read, so it is quick for any size.

examples:
  hfcompress inspect ./student
  hfcompress inspect user/model --picture layers.png
""",
    )
    inspect.add_argument("model", help="folder or Hub repository")
    inspect.add_argument("--revision", default=None, help="branch, tag or commit of a repository")
    inspect.add_argument("--picture", default=None, metavar="FILE.png", help="also draw it")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of text")

    quantize = _add(
        commands,
        "quantize",
        _quantize,
        "Quantize a model and save it.",
        """\
Classification, QA and LM heads and poolers stay as they are. The result is smaller, not faster (faster on a CPU: hfcompress export).

bitsandbytes, loads like the original where bitsandbytes is installed:
  int8, nf4, nf4-dq, fp4, fp4-dq        dq: scales quantized as well
packed by hfcompress, loads like the original once hfcompress is imported:
  int2 ... int8, ternary, binary        then maybe -g32 (weights that share a scale), -channel or -tensor; for int also -asym
  fixed2 ... fixed8                     scales are powers of two
  codebook1 ... codebook8               numbers found by k-means

With --data the weights are rounded layer by layer on examples (no labels needed), so that the outputs change least: the same bytes, and less
than half of the loss. Worth it below 8 bits.

examples:
  hfcompress quantize ./student --preset nf4-dq
  hfcompress quantize ./student --preset nf4-dq --data train.csv
  hfcompress quantize ./student --preset int3-g64-asym --data train.csv --samples 2048
  hfcompress sensitivity ./student --data train.csv --bits 8 4 3 --max-mb 12 --save bits.json
  hfcompress quantize ./student --layers bits.json --data train.csv
""",
    )
    quantize.add_argument("model", help="folder or Hub repository")
    written = quantize.add_mutually_exclusive_group(required=True)
    written.add_argument("--preset", metavar="FORMAT", help="one of the above, for all layers")
    written.add_argument("--layers", metavar="FILE.json", help="a format for each layer")
    quantize.add_argument(
        "--data", default=None, metavar="FILE", help="examples to round on: csv, json, parquet, txt, images"
    )
    _column_arguments(quantize)
    quantize.add_argument("--samples", type=_positive, default=1024, help="examples to round on (default 1024)")
    quantize.add_argument("--length", type=_positive, default=64, help="tokens per example (default 64)")
    quantize.add_argument("--seed", type=int, default=42, help="of the choice of examples (default 42)")
    quantize.add_argument(
        "--keep",
        default=None,
        metavar="FOLDER",
        help="keep what is rounded there; if stopped, the same command goes on",
    )
    quantize.add_argument("--output", default=None, help="folder to write (default: MODEL-PRESET)")
    quantize.add_argument("--skip", nargs="*", default=[], metavar="MODULE", help="further modules to leave alone")
    quantize.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of everything that is not quantized (default: as saved)",
    )
    floats = ["float32", "bfloat16", "float16"]
    quantize.add_argument(
        "--compute-dtype",
        default="auto",
        choices=["auto", *floats],
        help="what 4-bit weights are multiplied in (default: --dtype)",
    )
    quantize.add_argument(
        "--storage", default=None, choices=floats, help="hold 4-bit weights so that FSDP can shard them; as --dtype"
    )
    quantize.add_argument(
        "--threshold",
        type=float,
        default=None,
        help="of int8: inputs of this size are multiplied in float (default: 6)",
    )

    export = _add(
        commands,
        "export",
        _export,
        "Export an encoder of texts or images to ONNX or OpenVINO, in float or int8, to run fast on a CPU without torch.",
        """\
The folder holds the graph, the tokenizer or image processor and a short example; it is written once its outputs, in its own runtime, were found to
be those of torch. Pruned models, unevenly cut ones too, are exported like any other, and both speedups multiply.

  onnx, openvino          float32
  onnx-int8               weights in int8; activations are measured as they come
  onnx-int8-static        weights and activations in int8; needs --data to calibrate
  openvino-int8-weights   weights in int8, arithmetic in float: saves memory
  openvino-int8           weights and activations in int8; needs --data to calibrate; the fastest as a rule

examples:
  hfcompress export ./student --format openvino-int8 --data train.csv --measure
  hfcompress export ./student --format all --data train.csv --eval dev.csv --output ./exports --measure --batch 8 --length 128
  hfcompress export user/vit --format onnx-int8
""",
    )
    export.add_argument("model", help="folder or Hub repository")
    export.add_argument(
        "--format", nargs="+", required=True, metavar="FORMAT", help="one or several of the above, or all"
    )
    export.add_argument(
        "--output", default=None, metavar="DIR", help="folder to write; of several formats the folder above"
    )
    export.add_argument("--data", default=None, metavar="FILE", help="examples to calibrate on; labels are not needed")
    export.add_argument("--eval", default=None, metavar="FILE", help="labelled examples to score all forms on")
    _column_arguments(export)
    export.add_argument("--samples", type=_positive, default=300, help="examples to calibrate on (default 300)")
    export.add_argument("--max-eval", type=_positive, default=None, help="score on at most so many examples")
    export.add_argument("--measure", action="store_true", help="time all forms beside torch in 32 bits, in turns")
    export.add_argument("--batch", type=_positive, default=8, help="examples in a batch when timed (default 8)")
    export.add_argument("--length", type=_positive, default=64, help="tokens per example, also when timed (default 64)")
    export.add_argument("--threads", type=_positive, default=1, help="CPU threads when timed (default 1)")
    export.add_argument("--rounds", type=_positive, default=21, help="timed rounds (default 21)")
    export.add_argument("--seed", type=int, default=42, help="of the choice of examples (default 42)")
    export.set_defaults(device="cpu")

    vocabulary = _add(
        commands,
        "vocabulary",
        _vocabulary,
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
    vocabulary.add_argument("model", help="folder or Hub repository")
    vocabulary.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="csv, tsv, json, jsonl, parquet, or txt (a text a line)",
    )
    vocabulary.add_argument("--text", nargs="+", default=[], metavar="COLUMN", help="columns of text (default: found)")
    how_many = vocabulary.add_mutually_exclusive_group()
    how_many.add_argument("--size", type=_positive, default=None, help="number of tokens that stay")
    how_many.add_argument(
        "--coverage",
        type=_share,
        default=None,
        help="share of the tokens in the texts that stay, above 0 and at most 1 (default 0.999)",
    )
    vocabulary.add_argument("--output", required=True, metavar="DIR", help="folder to write")

    caching = _add(
        commands,
        "cache-teacher",
        _cache_teacher,
        "Let a teacher run once over the data and keep what it says, for distillation.",
        """\
Distillation asks the teacher about the same examples in every epoch, for every seed and setting. Here it is asked once; training then reads
files: DistillationTrainer(teacher="./cache", ...). An example is found by its content, so order, batches, padding and processes may
differ, but not tokenizer and --length, and nothing may be masked or augmented at random. The size is said before anything is
written. Stopped, even by force, it goes on where it was when started again.

What is kept of each example, or of each token where the teacher predicts one:
  --logits        all logits (default): a few bytes for a classifier, 200 kB a token for a language model
  --top-k K       the K likeliest classes, and how likely all others are together: at most 300 bytes a token with K = 64
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
    caching.add_argument("teacher", metavar="TEACHER", help="folder, Hub repository, or a recipe (.yaml)")
    caching.add_argument("--data", default=None, metavar="FILE", help="examples: csv, json, parquet, txt, images")
    caching.add_argument("--eval", default=None, metavar="FILE", help="what no part of --data is held out for")
    _column_arguments(caching)
    caching.add_argument("--task", default=None, help="what the teacher was made for (default: by its class)")
    caching.add_argument("--length", type=_positive, default=128, help="tokens per example (default 128, as recipes)")
    caching.add_argument("--output", required=True, metavar="DIR", help="folder to write, or to go on in")
    kept = caching.add_mutually_exclusive_group()
    kept.add_argument("--logits", action="store_true", help="keep all logits (the default)")
    kept.add_argument("--top-k", type=_positive, default=None, metavar="K", help="keep the K likeliest classes")
    kept.add_argument("--samples", type=_positive, default=None, metavar="N", help="keep N drawn classes")
    kept.add_argument("--last-hidden", action="store_true", help="keep the last hidden states, and the head")
    caching.add_argument(
        "--hidden-layers", type=_numbers, default=(), metavar="1,3", help="keep the outputs of these layers too"
    )
    caching.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of --logits (default float32)",
    )
    caching.add_argument("--batch", type=_positive, default=32, help="examples asked about at once (default 32)")
    caching.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    caching.add_argument("--seed", type=int, default=42, help="of samples (default 42)")

    push = _add(
        commands,
        "push",
        _push,
        "Verify a folder in fresh processes and push it to the Hub in one commit.",
        """\
What does not load by every way its card names, with the same outputs, is not pushed. Log in first: hf auth login.

examples:
  hfcompress push ./student me/bert-sst2-small
  hfcompress push ./student my-org/bert-sst2-small --private --revision v1
""",
    )
    push.add_argument("folder", help="the folder to push")
    push.add_argument("repo", help="user/name")
    push.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    push.add_argument("--revision", default=None, help="branch to commit to")

    verify = _add(
        commands,
        "verify",
        _verify,
        "Check that a folder loads by every way its card names, with the same outputs.",
        "example:\n  hfcompress verify ./student\n",
    )
    verify.add_argument("folder", help="the folder to check")
    return parser


def _data_arguments(parser: argparse.ArgumentParser, *, samples: int = 2048) -> None:
    """What commands share that look at a model on examples."""
    parser.add_argument("model", help="folder or Hub repository")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="examples to look at: csv, json, parquet, txt, images"
    )
    parser.add_argument(
        "--eval", default=None, metavar="FILE", help="examples to score on (default: a tenth of --data)"
    )
    _column_arguments(parser)
    parser.add_argument("--samples", type=_positive, default=samples, help=f"examples to look at (default {samples})")
    parser.add_argument("--max-eval", type=_positive, default=None, help="score on at most so many examples")
    parser.add_argument("--length", type=_positive, default=64, help="tokens per example, also when timed (default 64)")
    parser.add_argument("--batch", type=_positive, default=32, help="examples in a batch when timed (default 32)")
    parser.add_argument("--threads", type=_positive, default=None, help="CPU threads when timed (default: as torch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of examples (default 42)")


def _column_arguments(parser: argparse.ArgumentParser) -> None:
    """Which columns of the data hold what."""
    parser.add_argument("--text", nargs="+", default=None, metavar="COLUMN", help="columns of text (default: found)")
    parser.add_argument("--image", default=None, metavar="COLUMN", help="column of images (default: found)")
    parser.add_argument("--label", default=None, metavar="COLUMN", help="column of labels (default: found)")


def _add(commands: Any, name: str, function: Callable[..., int], text: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(function=function)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be a whole number of 1 or more")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be layers counted from 0, such as 1,3")
    return tuple(sorted({int(part) for part in parts}))


def _layers(text: str) -> tuple[str | None, int | tuple[int, ...]]:
    """A stack, or None for all, and how many of its layers, or which."""
    stack, equals, choice = text.rpartition("=")
    numbers = [part for part in choice.split(",") if part]
    if not numbers or not all(part.isdecimal() for part in numbers) or (equals and not stack):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: must be a number, numbers as in 0,2,4, or encoder=6"
        )
    found = tuple(map(int, numbers))
    return stack or None, found if "," in choice else found[0]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be a number") from None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: must be a number above 0 and at most 1")
    return share


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is one line on stderr and a non-zero exit status."""
    options = build_parser().parse_args(arguments)
    _quiet()
    try:
        return int(options.function(options))
    except KeyboardInterrupt:
        sys.stderr.write("hfcompress: stopped\n")
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("HFCOMPRESS_DEBUG"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(f"hfcompress: {lines[0]}\n")
        return 2


def _quiet() -> None:
    """What libraries say while loading is not the user's business; our own notes and warnings are."""
    import logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hfcompress").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if "RANK" not in os.environ or os.environ["RANK"] == "0":
        return
    logging.getLogger("hfcompress").setLevel(logging.ERROR)


def _run(options: argparse.Namespace) -> int:
    from hfcompress.config import Recipe
    from hfcompress.hub.picture import draw_layers
    from hfcompress.runs import Run, format_rows

    recipe = Recipe.from_yaml(options.recipe, overrides=options.overrides)
    command = shlex.join(["hfcompress", "run", options.recipe, *options.overrides])
    run = Run(recipe, command=command, restart=options.restart)
    rows = run.run()
    if rows is None:
        return 0
    student = run.output / "student"
    print()
    if student.is_dir():
        units, layers, _ = _what_is_left(str(student))
        if any(left != before for left, before in (*units.values(), *layers.values())):
            print(draw_layers(units, layers=layers), end="\n\n")
    print(format_rows(rows))
    print(f"\nReady to push: {student if student.is_dir() else run.output} (hfcompress push FOLDER user/name)")
    return 0


def _data(options: argparse.Namespace) -> dict[str, Any]:
    """The sections `data` and `measure` of a recipe, from the command line."""
    text = options.text[0] if options.text and len(options.text) == 1 else options.text
    return {
        "data": {
            "train": options.data,
            "eval": options.eval,
            "text": text,
            "image": options.image,
            "label": options.label,
            "max_length": options.length,
            "max_eval": options.max_eval,
        },
        "measure": {name: getattr(options, name) for name in ("batch", "length", "threads", "device")},
        "seed": options.seed,
    }


_OPTIONS = {"train": "--data", "max_length": "--length", "max_eval": "--max-eval"}


def _as_options(message: str) -> str:
    """A message that names keys of a recipe's section `data`, with this command's options in their place."""
    keys = r"(?<![\w./'\"-])data\.(train|eval|text|image|label|max_length|max_eval)(?![\w.]*\w)"
    return re.sub(keys, lambda found: _OPTIONS.get(found[1], f"--{found[1]}"), message)


def _prune(options: argparse.Namespace) -> int:
    from hfcompress.config import Recipe
    from hfcompress.hub.picture import draw_layers
    from hfcompress.runs import format_rows
    from hfcompress.runs.post_training import prune_folder
    from hfcompress.tasks.errors import DataError

    goals = ("speedup", "latency_ms", "sparsity", "parameters", "flops", "max_drop")
    goal = next(name for name in goals if getattr(options, name) is not None)
    section = {
        "target": {goal: getattr(options, goal), "scope": options.scope},
        "units": options.units,
        "criterion": {"name": options.criterion, "samples": options.samples},
        "repair": not options.no_repair,
        "uniform": options.uniform,
    }
    recipe = Recipe.from_dict({"prune": section, **_data(options)}, source="hfcompress prune")
    assert recipe.prune is not None and recipe.data is not None
    target = Path(options.output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty; give another --output")
    try:
        rows = prune_folder(
            options.model,
            target,
            recipe.prune,
            recipe.data,
            measure=recipe.measure,
            seed=recipe.seed,
            command=shlex.join(["hfcompress", *sys.argv[1:]]),
            say=lambda text: print(f"== {text}", file=sys.stderr),
        )
    except DataError as error:
        raise ValueError(_as_options(str(error))) from None
    units, layers, _ = _what_is_left(str(target))
    print(draw_layers(units, layers=layers), end="\n\n")
    print(format_rows(rows))
    print(f"\n{target}: loads again by every way its card names (hfcompress push {target} user/name)")
    return 0


def _student(options: argparse.Namespace) -> int:
    import torch
    import yaml

    from hfcompress.checkpoints.io import load
    from hfcompress.checkpoints.portable import MODELING_FILE
    from hfcompress.checkpoints.record import add_step
    from hfcompress.distillation import derive_student
    from hfcompress.hub import save_probe, write_card
    from hfcompress.runs.processors import copy_processor

    target = Path(options.output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty; give another folder")
    given = [text for text in options.config if not re.fullmatch(r"\w+=.*", text)]
    if given:
        raise ValueError(f"--config: {given[0]!r} is not KEY=VALUE")
    named = dict(options.layers or [])
    if None in named and len(options.layers) > 1:
        raise ValueError("--layers: give one choice for all stacks, or STACK=CHOICE for each")
    choices: dict[str, Any] = {name: getattr(options, name) for name in ("hidden", "heads", "neurons")}
    choices |= {"layers": named.get(None, named) or None}
    choices |= {"config": {key: yaml.safe_load(value) for key, _, value in (t.partition("=") for t in options.config)}}
    choices = {name: value for name, value in choices.items() if value}
    if not choices and not options.random:
        raise ValueError("nothing to change: give --layers, --hidden, --heads, --neurons, --config or --random")
    torch.manual_seed(options.seed)
    teacher: Any = load(options.teacher)
    start = "random" if options.random else "teacher"
    student, copied = derive_student(teacher, **choices, initialize=start)  # type: ignore[arg-type]
    origin = Path(options.teacher).name if Path(options.teacher).exists() else options.teacher
    add_step(student.config, "student", teacher=origin, initialize=start, choices=choices)
    student.save_pretrained(target)
    save_probe(student, target)
    copy_processor(options.teacher, target)
    write_card(target)
    load(target)
    before, after = _sizes_of(teacher), _sizes_of(student)
    print(f"{'':<24}{'before':>14}{'after':>14}")
    for name, count in before.items():
        print(f"{name:<24}{count:>14,}{after.get(name, 0):>14,}{after.get(name, 0) / count:>7.0%}")
    print(copied)
    plainly = "" if (target / MODELING_FILE).exists() else " with transformers alone"
    print(f"{target}: loads again{plainly}")
    return 0


def _sizes_of(model: Any) -> dict[str, int]:
    """Layers, units and parameters of a model, by name."""
    from hfcompress.anatomy import StructureError, family_of, find_sites, find_stream
    from hfcompress.anatomy.sites import find_stacks
    from hfcompress.measurement import count_parameters

    sizes = {
        f"layers of the {stack.name}": len(layers) for stack, _, layers in find_stacks(model, family_of(model)) or ()
    }
    with contextlib.suppress(StructureError):  # two towers, or stages: there is no single width
        sizes["hidden features"] = find_stream(model).width
    sites = find_sites(model)
    sizes["heads"] = sum(site.units * site.query_heads for site in sites)
    sizes["neurons"] = sum(site.units for site in sites if site.kind == "neurons")
    return {name: count for name, count in (sizes | {"parameters": count_parameters(model)}).items() if count}


def _sensitivity(options: argparse.Namespace) -> int:
    if options.bits is not None:
        return _bits(options)
    for name in ("max_mb", "max_loss", "save"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is about bits; say which with --bits, e.g. --bits 16 8 4")
    import json

    from hfcompress.config import Recipe
    from hfcompress.hub.picture import save_sensitivity_picture
    from hfcompress.runs.post_training import sensitivity_of
    from hfcompress.runs.table import format_layers, format_sensitivities
    from hfcompress.tasks.errors import DataError

    criterion = {"name": options.criterion, "samples": options.samples}
    recipe = Recipe.from_dict({"prune": {"criterion": criterion}, **_data(options)}, source="hfcompress sensitivity")
    assert recipe.prune is not None and recipe.data is not None
    try:
        found, layers = sensitivity_of(
            options.model, recipe.prune.criterion, recipe.data, measure=recipe.measure, seed=recipe.seed
        )
    except DataError as error:
        raise ValueError(_as_options(str(error))) from None
    if options.json:
        both = {"sites": [entry.to_dict() for entry in found], "layers": [entry.to_dict() for entry in layers]}
        print(json.dumps(both, indent=2))
    else:
        print(format_sensitivities(found))
        if layers:
            print("\n" + format_layers(layers))
    if options.picture:
        lines = {
            entry.site: [(left / entry.units, loss) for left, loss in zip(entry.left, entry.divergence, strict=True)]
            for entry in found
        }
        save_sensitivity_picture(lines, options.picture)
        if not options.json:
            print(f"\ndrawn in {options.picture}")
    return 0


def _bits(options: argparse.Namespace) -> int:
    import json

    from hfcompress.config import Recipe
    from hfcompress.hub.picture import save_bits_picture
    from hfcompress.quantization.bits import FLOATS, assign_bits, format_for, total_cost
    from hfcompress.runs.post_training import bit_costs_of
    from hfcompress.runs.table import format_bits
    from hfcompress.tasks.errors import DataError

    bounded = options.max_mb is not None or options.max_loss is not None
    if options.save and not bounded:
        raise ValueError("--save keeps a choice of bits; give it a budget, --max-mb or --max-loss")
    for bits in options.bits:
        format_for(bits, kept="float32")  # what is not known is said before anything is loaded
    recipe = Recipe.from_dict(_data(options), source="hfcompress sensitivity")
    assert recipe.data is not None
    settings: dict[str, Any] = {"by": options.by, "samples": options.samples}
    try:
        costs, rest_bytes = bit_costs_of(
            options.model, options.bits, recipe.data, measure=recipe.measure, seed=recipe.seed, **settings
        )
    except DataError as error:
        raise ValueError(_as_options(str(error))) from None
    layers = None
    if options.max_mb is not None:
        least = rest_bytes + sum(min(cost.size_bytes for cost in layer.values()) for layer in costs.values())
        if least > options.max_mb * 1e6:
            raise ValueError(
                f"--max-mb {options.max_mb:g} is too little: with these bits the model takes {least / 1e6:.2f} MB, of which "
                f"{rest_bytes / 1e6:.2f} are not quantized; allow more, or fewer bits"
            )
        layers = assign_bits(costs, max_bytes=options.max_mb * 1e6 - rest_bytes)
    elif options.max_loss is not None:
        layers = assign_bits(costs, max_loss=options.max_loss)
    found: dict[str, Any] = {
        "by": options.by,
        "rest_bytes": rest_bytes,
        "costs": {name: {form: cost.to_dict() for form, cost in layer.items()} for name, layer in costs.items()},
    }
    chosen = None
    if layers is not None:
        found |= {"layers": layers, "total": total_cost(costs, layers).to_dict()}
        kept = next((form for form in next(iter(costs.values())) if form in FLOATS), "")
        chosen = {name: layers.get(name, kept) for name in costs}
    print(json.dumps(found, indent=2) if options.json else format_bits(costs, chosen, rest_bytes=rest_bytes))
    if options.picture:
        losses = {name: {form: cost.loss for form, cost in layer.items()} for name, layer in costs.items()}
        save_bits_picture(losses, options.picture, chosen=chosen)
    if options.save:
        Path(options.save).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not options.json:
        if options.picture:
            print(f"\ndrawn in {options.picture}")
        if options.save:
            print(f"\nsaved in {options.save}: hfcompress quantize {options.model} --layers {options.save}")
    return 0


def _measure(options: argparse.Namespace) -> int:
    import json

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from hfcompress.config import Recipe
    from hfcompress.runs import format_rows
    from hfcompress.runs.evaluation import measure_folders

    names = ("batch", "length", "threads", "rounds", "device")
    settings = {name: getattr(options, name) for name in names}
    config = Recipe.from_dict({"measure": settings}, source="hfcompress measure").measure
    folders = {}
    for model in options.models:
        try:
            folders[model] = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
        except (HfHubHTTPError, HFValidationError):
            raise ValueError(f"{model} is neither a folder nor a repository on the Hub that you may see") from None
    rows = measure_folders(folders, None, config)
    print(json.dumps(rows, indent=2) if options.json else format_rows(rows))
    return 0


_Pairs = dict[str, tuple[int, int]]


def _what_is_left(model: str, revision: str | None = None) -> tuple[_Pairs, _Pairs, tuple[int, int] | None]:
    """Of units by site, of layers by stack, and of hidden features (left, before), from the config alone."""
    import torch

    from hfcompress.anatomy import find_sites
    from hfcompress.checkpoints.io import model_class
    from hfcompress.checkpoints.record import read_hidden, read_layers, read_steps, read_units

    cls, config = model_class(model, revision=revision)
    with torch.device("meta"):
        sites = find_sites(cls._from_config(config))
    before = {name: pair[1] for name, pair in read_units(config).items()}
    for step in read_steps(config):
        # A model whose plain config says its shapes keeps what it had before in the step that pruned it.
        before = {name: int(pair[1]) for name, pair in step.get("units", {}).items()} | before
    units = {site.name: (site.units, before.get(site.name, site.units)) for site in sites}
    return units, read_layers(config), read_hidden(config)


def _inspect(options: argparse.Namespace) -> int:
    import json

    from hfcompress.hub.picture import draw_layers, save_layers_picture

    units, layers, hidden = _what_is_left(options.model, options.revision)
    if options.json:

        def said(pairs: _Pairs) -> dict[str, Any]:
            return {name: {"left": left, "before": before} for name, (left, before) in pairs.items()}

        found = said(units) | ({"layers": said(layers)} if layers else {})
        print(json.dumps(found | (said({"hidden": hidden}) if hidden else {}), indent=2))
    else:
        print(draw_layers(units, layers=layers))
        for kind in ("heads", "neurons"):
            pairs = [pair for name, pair in units.items() if name.endswith(kind)]
            left, before = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
            print(f"{kind}: {left:,} of {before:,} ({left / max(before, 1):.0%})")
        for stack, (left, before) in layers.items():
            print(f"layers of the {stack}: {left:,} of {before:,} ({left / before:.0%})")
        if hidden:
            print(f"hidden features: {hidden[0]:,} of {hidden[1]:,} ({hidden[0] / hidden[1]:.0%})")
    if options.picture:
        save_layers_picture(units, options.picture, layers=layers)
        if not options.json:
            print(f"drawn in {options.picture}")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from hfcompress.checkpoints.io import load
    from hfcompress.hub import save_probe, write_card
    from hfcompress.measurement import disk_bytes
    from hfcompress.quantization import PRESETS, quantize
    from hfcompress.runs.processors import copy_processor

    name = options.preset or Path(options.layers).stem
    base = options.model.rstrip("/") if Path(options.model).is_dir() else Path(options.model).name
    target = Path(options.output or f"{base}-{name}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty; give another --output")
    settings = {key: getattr(options, key) for key in ("skip", "dtype", "compute_dtype", "storage", "threshold")}
    if options.preset in PRESETS and options.data is None:
        if options.keep is not None:
            raise ValueError("--keep is for --data: rounding without data is done at once")
        model = quantize(options.model, options.preset, **settings)
        model.save_pretrained(target)  # type: ignore[operator]
        save_probe(model, target)
        copy_processor(options.model, target)
        write_card(target)
        load(target)
    else:
        _quantize_by_rounding(options, target)
    before = f" (before: {disk_bytes(options.model) / 1e6:.1f} MB)" if Path(options.model).is_dir() else ""
    print(f"{target}: {disk_bytes(target) / 1e6:.1f} MB{before}; loads again")
    return 0


def _quantize_by_rounding(options: argparse.Namespace, target: Path) -> None:
    import torch

    from hfcompress.config import Recipe
    from hfcompress.runs.quantizing import quantize_folder, read_layers
    from hfcompress.tasks.errors import DataError

    for option in ("compute_dtype", "storage", "threshold"):
        if getattr(options, option) not in (None, "auto"):
            raise ValueError(f"--{option.replace('_', '-')} is for a preset of bitsandbytes without --data")
    if options.layers is not None and options.skip:
        raise ValueError("--layers says which layers are left alone; leave out --skip")
    data = None
    if options.data is not None:
        text = options.text[0] if options.text and len(options.text) == 1 else options.text
        section = {"train": options.data, "text": text, "image": options.image, "label": options.label}
        data = Recipe.from_dict({"data": {**section, "max_length": options.length}}, source="hfcompress quantize").data
    try:
        quantize_folder(
            options.model,
            target,
            options.preset if options.layers is None else read_layers(options.layers),
            data=data,
            samples=options.samples,
            skip=tuple(options.skip),
            dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
            keep=None if options.keep is None else Path(options.keep),
            seed=options.seed,
            command=shlex.join(["hfcompress", *sys.argv[1:]]),
            say=print,
        )
    except DataError as error:
        raise ValueError(_as_options(str(error))) from None


def _export(options: argparse.Namespace) -> int:
    from hfcompress.checkpoints.io import load
    from hfcompress.config import Recipe
    from hfcompress.export import FORMATS, ExportedModel, export_formats
    from hfcompress.export.families import check_exportable
    from hfcompress.export.formats import find_format, require_packages
    from hfcompress.export.table import BASELINE, format_exports, rows_of
    from hfcompress.measurement import compare_latency, example_inputs, memory_bytes
    from hfcompress.runs.examples import read_examples
    from hfcompress.tasks.errors import DataError

    # What needs neither model nor data to be seen comes first.
    names = list(FORMATS) if "all" in options.format else list(dict.fromkeys(options.format))
    forms = [find_format(name) for name in names]
    for form in forms:
        require_packages(form.packages)
        if form.calibrated and options.data is None:
            raise ValueError(f"{form.name} fixes the ranges of activations by examples; give --data")
    if options.eval and options.data is None:
        raise ValueError("--eval needs --data as well, of the same columns")
    base = options.model.rstrip("/") if Path(options.model).is_dir() else Path(options.model).name
    if len(names) == 1:
        folders = {names[0]: Path(options.output or f"{base}-{names[0]}")}
    else:
        folders = {name: Path(options.output or f"{base}-export") / name for name in names}
    for folder in folders.values():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; give another --output")
    model: Any = load(options.model).float().eval()  # type: ignore[call-overload]
    check_exportable(model)
    examples = None
    if options.data is not None:
        recipe = Recipe.from_dict(_data(options), source="hfcompress export")
        assert recipe.data is not None
        try:
            examples = read_examples(
                model, options.model, recipe.data, samples=options.samples, seed=options.seed, batch=8
            )
        except DataError as error:
            raise ValueError(_as_options(str(error))) from None
    done = export_formats(
        options.model,
        folders,
        batches=examples.batches if examples else None,
        model=model,
        say=lambda text: print(f"== {text}", file=sys.stderr),
    )
    metrics, latency = {}, {}
    runnable = {name: ExportedModel(one.folder, threads=options.threads) for name, one in done.items()}
    every = {BASELINE: model, **runnable}
    if options.eval and examples is not None and examples.rate is not None:
        print("== Scoring", file=sys.stderr)
        metrics = {name: examples.rate(one)[0] for name, one in every.items()}
    if options.measure:
        print("== Timing", file=sys.stderr)
        inputs = example_inputs(model, batch=options.batch, length=options.length)
        latency = compare_latency(every, inputs, rounds=options.rounds, threads=options.threads)
    print(format_exports(rows_of(memory_bytes(model), done, metrics=metrics, latency=latency)))
    for name, one in done.items():
        print(f"{one.folder}: {name}, needs {one.format.runtime} and no torch (see README.md there)")
    return 0


def _vocabulary(options: argparse.Namespace) -> int:
    from hfcompress.runs.vocabulary import cut_folder
    from hfcompress.tasks.corpus import read_corpus
    from hfcompress.tasks.errors import DataError

    target = Path(options.output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):  # before the data are read
        raise ValueError(f"{target} is not empty; give another --output")
    try:
        texts = read_corpus(options.data, text=options.text, key="--data")
    except DataError as error:
        raise ValueError(str(error).replace("data.text", "--text")) from None
    coverage = 0.999 if options.size is None and options.coverage is None else options.coverage
    done = cut_folder(options.model, texts, target, size=options.size, coverage=coverage)
    print(f"{'':<12}{'before':>14}{'after':>14}")
    for name, pair in (("tokens", done.tokens), ("parameters", done.parameters)):
        print(f"{name:<12}{pair[0]:>14,}{pair[1]:>14,}{pair[1] / pair[0]:>7.0%}")
    before, after = done.size_bytes
    print(f"{'MB':<12}{before / 1e6:>14,.1f}{after / 1e6:>14,.1f}{after / before:>7.0%}")
    print(f"tokens of the data that stay: {done.tokens_share:.2%}; texts encoded as before: {done.texts_share:.2%}")
    print(f"{target}: loads again")
    return 0


def _cache_teacher(options: argparse.Namespace) -> int:
    from hfcompress.config import Recipe
    from hfcompress.distillation import CacheContents
    from hfcompress.distillation.cache_format import LogitsKind
    from hfcompress.distillation.cache_writing import in_bytes
    from hfcompress.runs.caching import cache_recipe, cache_teacher
    from hfcompress.tasks.errors import DataError

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
        text = options.text[0] if options.text and len(options.text) == 1 else options.text
        data = {name: getattr(options, name) for name in ("eval", "image", "label")}
        data |= {"train": options.data, "text": text, "max_length": options.length}
        recipe = Recipe.from_dict(
            {"data": data, "seed": options.seed} | ({"task": options.task} if options.task else {}),
            source="hfcompress cache-teacher",
        )
        assert recipe.data is not None
        settings |= {"task": recipe.task, "seed": recipe.seed}
        try:
            made = cache_teacher(options.teacher, recipe.data, options.output, contents, **settings)
        except DataError as error:
            raise ValueError(_as_options(str(error))) from None
    if not made.complete:
        print(f"{options.output}: this process is done; others are still writing")
        return 0
    each = (made.tokens, "token") if made.tokens else (made.examples, "example")
    size = f"{in_bytes(made.size_bytes)} ({made.size_bytes / max(each[0], 1):,.0f} bytes per {each[1]})"
    tokens = f", {made.tokens:,} tokens" if made.tokens else ""
    print(f"{options.output}: {made.contents} of {made.teacher} for {made.examples:,} examples{tokens}; {size}")
    return 0


def _push(options: argparse.Namespace) -> int:
    from hfcompress.hub import push_folder

    commit = push_folder(options.folder, options.repo, private=options.private, revision=options.revision)
    print(f"pushed: {commit.repo_url}, commit {commit.oid}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from hfcompress.hub import verify_folder
    from hfcompress.hub.verify import ROUTES

    checks = verify_folder(options.folder)
    for check in checks:
        outcome = f"ok, difference {check.difference:.2g}" if check.ok else f"FAILED: {check.error}"
        print(f"{ROUTES[check.route]}: {outcome}")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
