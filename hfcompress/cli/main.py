"""The command `hfcompress`. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hfcompress

_EPILOG = """\
examples:
  hfcompress run configs/bert_sst2.yaml              train, prune, distil, quantize, measure, card
  hfcompress inspect ./runs/bert-sst2/student        what is left in each layer
  hfcompress measure ./runs/bert-sst2/student        size and latency
  hfcompress quantize ./runs/bert-sst2/student --preset nf4
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
        "Quantize a model with bitsandbytes and save it.",
        """\
Classification, QA and LM heads and poolers stay as they are. The result loads like the original. It is smaller, not faster:
bitsandbytes saves memory. Presets: int8, nf4, nf4-dq, fp4, fp4-dq (dq: scales quantized as well).

examples:
  hfcompress quantize ./student --preset nf4-dq
  hfcompress quantize ./student --preset int8 --dtype bfloat16 --output ./student-int8
""",
    )
    quantize.add_argument("model", help="folder or Hub repository")
    quantize.add_argument("--preset", required=True, choices=["int8", "nf4", "nf4-dq", "fp4", "fp4-dq"])
    quantize.add_argument("--output", default=None, help="folder to write (default: MODEL-PRESET)")
    quantize.add_argument("--skip", nargs="*", default=[], metavar="MODULE", help="further modules to leave alone")
    quantize.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of everything that is not quantized (default: as saved)",
    )

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
    units = _units(str(student)) if student.is_dir() else {}
    print()
    if any(left != before for left, before in units.values()):
        print(draw_layers(units), end="\n\n")
    print(format_rows(rows))
    print(f"\nReady to push: {student if student.is_dir() else run.output} (hfcompress push FOLDER user/name)")
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


def _units(model: str, revision: str | None = None) -> dict[str, tuple[int, int]]:
    """Site name to (units left, units before), from the config alone."""
    import torch

    from hfcompress.anatomy import find_sites
    from hfcompress.checkpoints.io import model_class
    from hfcompress.checkpoints.record import read_steps, read_units

    cls, config = model_class(model, revision=revision)
    with torch.device("meta"):
        sites = find_sites(cls._from_config(config))
    before = {name: pair[1] for name, pair in read_units(config).items()}
    for step in read_steps(config):
        # A model whose plain config says its shapes keeps what it had before in the step that pruned it.
        before = {name: int(pair[1]) for name, pair in step.get("units", {}).items()} | before
    return {site.name: (site.units, before.get(site.name, site.units)) for site in sites}


def _inspect(options: argparse.Namespace) -> int:
    import json

    from hfcompress.hub.picture import draw_layers, save_layers_picture

    units = _units(options.model, options.revision)
    if options.json:
        print(json.dumps({name: {"left": left, "before": before} for name, (left, before) in units.items()}, indent=2))
    else:
        print(draw_layers(units))
        for kind in ("heads", "neurons"):
            pairs = [pair for name, pair in units.items() if name.endswith(kind)]
            left, before = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
            print(f"{kind}: {left:,} of {before:,} ({left / max(before, 1):.0%})")
    if options.picture:
        save_layers_picture(units, options.picture)
        if not options.json:
            print(f"drawn in {options.picture}")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from hfcompress.checkpoints.io import load
    from hfcompress.hub import save_probe, write_card
    from hfcompress.measurement import disk_bytes
    from hfcompress.quantization import quantize
    from hfcompress.runs.processors import copy_processor

    target = Path(options.output or f"{Path(options.model).name}-{options.preset}")
    if options.output is None and Path(options.model).is_dir():
        target = Path(f"{options.model.rstrip('/')}-{options.preset}")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; give another --output")
    model = quantize(options.model, options.preset, skip=options.skip, dtype=options.dtype)
    model.save_pretrained(target)  # type: ignore[operator]
    save_probe(model, target)
    copy_processor(options.model, target)
    write_card(target)
    load(target)
    before = f" (before: {disk_bytes(options.model) / 1e6:.1f} MB)" if Path(options.model).is_dir() else ""
    print(f"{target}: {disk_bytes(target) / 1e6:.1f} MB{before}; loads again")
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
