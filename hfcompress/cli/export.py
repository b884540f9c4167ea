"""`hfcompress export`: ONNX and OpenVINO."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import (
    add_command,
    column_arguments,
    data_sections,
    options_named,
    positive,
    require_empty,
)


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "export",
        run,
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
    parser.add_argument("model", help="folder or Hub repository")
    parser.add_argument(
        "--format", nargs="+", required=True, metavar="FORMAT", help="one or several of the above, or all"
    )
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="folder to write; of several formats the folder above"
    )
    parser.add_argument("--data", default=None, metavar="FILE", help="examples to calibrate on; labels are not needed")
    parser.add_argument("--eval", default=None, metavar="FILE", help="labelled examples to score all forms on")
    column_arguments(parser)
    parser.add_argument("--samples", type=positive, default=300, help="examples to calibrate on (default 300)")
    parser.add_argument("--max-eval", type=positive, default=None, help="score on at most so many examples")
    parser.add_argument("--measure", action="store_true", help="time all forms beside torch in 32 bits, in turns")
    parser.add_argument("--batch", type=positive, default=8, help="examples in a batch when timed (default 8)")
    parser.add_argument("--length", type=positive, default=64, help="tokens per example, also when timed (default 64)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads when timed (default 1)")
    parser.add_argument("--rounds", type=positive, default=21, help="timed rounds (default 21)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of examples (default 42)")
    parser.set_defaults(device="cpu")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from hfcompress.checkpoints.staging import staged_folder
    from hfcompress.export import FORMATS
    from hfcompress.export.formats import find_format, require_packages

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
        require_empty(folder)
    with contextlib.ExitStack() as stack:
        stages = {name: stack.enter_context(staged_folder(folder)) for name, folder in folders.items()}
        print(_export(options, stages))
    for name, folder in folders.items():
        print(f"{folder}: {name}, needs {find_format(name).runtime} and no torch (see README.md there)")
    return 0


def _export(options: argparse.Namespace, folders: dict[str, Path]) -> str:
    """Write all forms, and measure them; the table."""
    from hfcompress.checkpoints.io import load
    from hfcompress.config import Recipe
    from hfcompress.export import ExportedModel, export_formats
    from hfcompress.export.families import check_exportable
    from hfcompress.export.table import BASELINE, format_exports, rows_of
    from hfcompress.measurement import compare_latency, example_inputs, memory_bytes
    from hfcompress.runs.examples import read_examples

    model: Any = load(options.model).float().eval()  # type: ignore[call-overload]
    check_exportable(model)
    examples = None
    if options.data is not None:
        recipe = Recipe.from_dict(data_sections(options), source="hfcompress export")
        assert recipe.data is not None
        with options_named():
            examples = read_examples(
                model, options.model, recipe.data, samples=options.samples, seed=options.seed, batch=8
            )
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
    return format_exports(rows_of(memory_bytes(model), done, metrics=metrics, latency=latency))
