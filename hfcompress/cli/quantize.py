"""`hfcompress quantize`: fewer bits for the weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.cli.arguments import (
    add_command,
    column_arguments,
    data_sections,
    options_named,
    positive,
    require_empty,
)

if TYPE_CHECKING:
    from hfcompress.config import Recipe
    from hfcompress.hub.verify import RouteCheck


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "quantize",
        run,
        "Quantize a model and save it.",
        """\
Classification, QA and LM heads and poolers stay as they are. The result is measured beside the original, in a fresh process on this
machine: all forms are smaller, but those of bitsandbytes and the packed ones are not faster (on a CPU: hfcompress export).

bitsandbytes, loads like the original where bitsandbytes is installed:
  int8, nf4, nf4-dq, fp4, fp4-dq        dq: scales quantized as well
torchao, loads like the original where torchao is installed, and is faster once it is compiled (model.compile()):
  int8-dynamic                          multiplies in int8, on GPUs and CPUs
  fp8-dynamic                           multiplies in fp8, on GPUs of compute capability 8.9 or more
packed by hfcompress, loads like the original once hfcompress is imported:
  int2 ... int8, ternary, binary        then maybe -g32 (weights that share a scale), -channel or -tensor; for int also -asym
  fixed2 ... fixed8                     scales are powers of two
  codebook1 ... codebook8               numbers found by k-means

With --data the weights are rounded layer by layer on examples (no labels needed), so that the outputs change least: the same bytes, and less
than half of the loss. Worth it below 8 bits. torchao's forms are not rounded so.

The score is that of --eval, or of a tenth of --data, which is held out; where there are no labels, how often the result says what the
original says.

examples:
  hfcompress quantize ./student --preset nf4-dq
  hfcompress quantize ./student --preset int8-dynamic --eval dev.csv --device cuda
  hfcompress quantize ./student --preset nf4-dq --data train.csv
  hfcompress quantize ./student --preset int3-g64-asym --data train.csv --samples 2048
  hfcompress sensitivity ./student --data train.csv --bits 8 4 3 --max-mb 12 --save bits.json
  hfcompress quantize ./student --layers bits.json --data train.csv
""",
    )
    parser.add_argument("model", help="folder or Hub repository")
    written = parser.add_mutually_exclusive_group(required=True)
    written.add_argument("--preset", metavar="FORMAT", help="one of the above, for all layers")
    written.add_argument("--layers", metavar="FILE.json", help="a format for each layer")
    parser.add_argument(
        "--data", default=None, metavar="FILE", help="examples to round on: csv, json, parquet, txt, images"
    )
    parser.add_argument(
        "--eval", default=None, metavar="FILE", help="examples to score on (default: a tenth of --data)"
    )
    column_arguments(parser)
    parser.add_argument("--samples", type=positive, default=1024, help="examples to round on (default 1024)")
    parser.add_argument("--max-eval", type=positive, default=None, help="score on at most so many examples")
    parser.add_argument("--length", type=positive, default=64, help="tokens per example, also when timed (default 64)")
    parser.add_argument("--batch", type=positive, default=32, help="examples in a batch when timed (default 32)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads when timed (default: as torch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 when timed (default auto)")
    parser.add_argument("--no-measure", action="store_true", help="neither time nor score the result")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of examples (default 42)")
    parser.add_argument(
        "--keep",
        default=None,
        metavar="FOLDER",
        help="keep what is rounded there; if stopped, the same command goes on",
    )
    parser.add_argument("--output", default=None, help="folder to write (default: MODEL-PRESET)")
    parser.add_argument("--skip", nargs="*", default=[], metavar="MODULE", help="further modules to leave alone")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of everything that is not quantized (default: as saved)",
    )
    floats = ["float32", "bfloat16", "float16"]
    parser.add_argument(
        "--compute-dtype",
        default="auto",
        choices=["auto", *floats],
        help="what 4-bit weights are multiplied in (default: --dtype)",
    )
    parser.add_argument(
        "--storage", default=None, choices=floats, help="hold 4-bit weights so that FSDP can shard them; as --dtype"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=None,
        help="of int8: inputs of this size are multiplied in float (default: 6)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.checkpoints.staging import staged_folder
    from hfcompress.config import check_variant
    from hfcompress.measurement import disk_bytes
    from hfcompress.measurement.provenance import command_line
    from hfcompress.quantization import DYNAMIC, PRESETS
    from hfcompress.runs.beside import examples_beside, measure_beside

    name = Path(options.layers).stem if options.preset is None else check_variant(options.preset)
    base = options.model.rstrip("/") if Path(options.model).is_dir() else Path(options.model).name
    target = Path(options.output or f"{base}-{name}")
    require_empty(target)
    recipe = _recipe(options)
    if options.eval is not None and options.no_measure:
        raise ValueError("--eval is what is scored on; leave out it or --no-measure")
    while_loading = options.preset in DYNAMIC or (options.preset in PRESETS and options.data is None)
    command = command_line(["hfcompress", *sys.argv[1:]])
    with options_named(train="--data" if options.data is not None else "--eval"), staged_folder(target) as folder:
        if not options.no_measure and (while_loading or options.data is None):
            examples_beside(options.model, recipe)  # what cannot be used is seen before the work
        checks = None
        if while_loading:
            _quantize_while_loading(options, folder)
        else:
            checks = _quantize_by_rounding(options, recipe, folder, command)
    if not options.no_measure:
        rows = measure_beside(options.model, target, recipe, name=name, command=command, checks=checks, say=print)
        print("\n" + _format(rows, options) + "\n")
    before = f" (before: {disk_bytes(options.model) / 1e6:.1f} MB)" if Path(options.model).is_dir() else ""
    print(f"{target}: {disk_bytes(target) / 1e6:.1f} MB{before}; loads again")
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    """The sections `data` and `measure`, and the seed."""
    from hfcompress.config import Recipe
    from hfcompress.quantization import DYNAMIC

    values = data_sections(options)
    if options.data is None and options.eval is None:
        if any((options.text, options.image, options.label)):
            raise ValueError("--text, --image and --label are columns of --data and --eval; give one of these as well")
        del values["data"]
    else:
        values["data"]["train"] = options.data or options.eval
    values["measure"]["compile"] = options.preset in DYNAMIC
    return Recipe.from_dict(values, source="hfcompress quantize")


def _quantize_while_loading(options: argparse.Namespace, folder: Path) -> None:
    from hfcompress.checkpoints.io import load
    from hfcompress.hub import save_probe, write_card
    from hfcompress.quantization import quantize
    from hfcompress.runs.processors import copy_processor

    if options.keep is not None:
        raise ValueError("--keep is for --data: rounding without data is done at once")
    settings = {key: getattr(options, key) for key in ("skip", "dtype", "compute_dtype", "storage", "threshold")}
    model = quantize(options.model, options.preset, **settings)
    model.save_pretrained(folder)  # type: ignore[operator]
    save_probe(model, folder)
    copy_processor(options.model, folder)
    write_card(folder)
    load(folder)


def _quantize_by_rounding(options: argparse.Namespace, recipe: Recipe, folder: Path, command: str) -> list[RouteCheck]:
    import torch

    from hfcompress.runs.quantizing import quantize_folder, read_layers

    for option in ("compute_dtype", "storage", "threshold"):
        if getattr(options, option) not in (None, "auto"):
            raise ValueError(f"--{option.replace('_', '-')} is for a preset of bitsandbytes without --data")
    if options.layers is not None and options.skip:
        raise ValueError("--layers says which layers are left alone; leave out --skip")
    return quantize_folder(
        options.model,
        folder,
        options.preset if options.layers is None else read_layers(options.layers),
        data=None if options.data is None else recipe.data,
        samples=options.samples,
        skip=tuple(options.skip),
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        keep=None if options.keep is None else Path(options.keep),
        seed=options.seed,
        command=command,
        say=print,
    )


def _format(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The table, and what to do where the result is smaller and not faster."""
    from hfcompress.hub.results import words_of_no_gain
    from hfcompress.quantization import DYNAMIC
    from hfcompress.runs import format_rows
    from hfcompress.runs.evaluation import device_of

    advice = "for speed on a CPU: hfcompress export"
    if device_of(options.device).type != "cpu":
        advice = "" if options.preset in DYNAMIC else "for speed on a GPU: --preset int8-dynamic"
    lines = [f"{line.removesuffix('.')}{advice and '; '}{advice}" for line in words_of_no_gain(rows)]
    before, after = (row["disk_bytes"] for row in rows)
    if options.dtype == "auto" and after >= before and before < 3 * rows[0]["parameters"]:
        lines.append(
            "what is not rounded is written in 32 bits, as the config says, where the original's file has 16: --dtype float16"
        )
    return "\n".join([format_rows(rows), *lines])
