"""`hfcompress quantize`: fewer bits for the weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import (
    add_command,
    column_arguments,
    options_named,
    positive,
    require_empty,
    text_columns,
)


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "quantize",
        run,
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
    parser.add_argument("model", help="folder or Hub repository")
    written = parser.add_mutually_exclusive_group(required=True)
    written.add_argument("--preset", metavar="FORMAT", help="one of the above, for all layers")
    written.add_argument("--layers", metavar="FILE.json", help="a format for each layer")
    parser.add_argument(
        "--data", default=None, metavar="FILE", help="examples to round on: csv, json, parquet, txt, images"
    )
    column_arguments(parser)
    parser.add_argument("--samples", type=positive, default=1024, help="examples to round on (default 1024)")
    parser.add_argument("--length", type=positive, default=64, help="tokens per example (default 64)")
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
    from hfcompress.checkpoints.io import load
    from hfcompress.checkpoints.staging import staged_folder
    from hfcompress.hub import save_probe, write_card
    from hfcompress.measurement import disk_bytes
    from hfcompress.quantization import PRESETS, quantize
    from hfcompress.runs.processors import copy_processor

    name = options.preset or Path(options.layers).stem
    base = options.model.rstrip("/") if Path(options.model).is_dir() else Path(options.model).name
    target = Path(options.output or f"{base}-{name}")
    require_empty(target)
    settings = {key: getattr(options, key) for key in ("skip", "dtype", "compute_dtype", "storage", "threshold")}
    if options.preset in PRESETS and options.data is None:
        if options.keep is not None:
            raise ValueError("--keep is for --data: rounding without data is done at once")
        with staged_folder(target) as folder:
            model = quantize(options.model, options.preset, **settings)
            model.save_pretrained(folder)  # type: ignore[operator]
            save_probe(model, folder)
            copy_processor(options.model, folder)
            write_card(folder)
            load(folder)
    else:
        with staged_folder(target) as folder:
            _quantize_by_rounding(options, folder)
    before = f" (before: {disk_bytes(options.model) / 1e6:.1f} MB)" if Path(options.model).is_dir() else ""
    print(f"{target}: {disk_bytes(target) / 1e6:.1f} MB{before}; loads again")
    return 0


def _quantize_by_rounding(options: argparse.Namespace, target: Path) -> None:
    import torch

    from hfcompress.config import Recipe
    from hfcompress.measurement.provenance import command_line
    from hfcompress.runs.quantizing import quantize_folder, read_layers

    for option in ("compute_dtype", "storage", "threshold"):
        if getattr(options, option) not in (None, "auto"):
            raise ValueError(f"--{option.replace('_', '-')} is for a preset of bitsandbytes without --data")
    if options.layers is not None and options.skip:
        raise ValueError("--layers says which layers are left alone; leave out --skip")
    data = None
    if options.data is not None:
        section = {"train": options.data, "text": text_columns(options), "image": options.image, "label": options.label}
        data = Recipe.from_dict({"data": {**section, "max_length": options.length}}, source="hfcompress quantize").data
    with options_named():
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
            command=command_line(["hfcompress", *sys.argv[1:]]),
            say=print,
        )
