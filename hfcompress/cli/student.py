"""`hfcompress student`: a smaller model to be distilled."""

from __future__ import annotations

import argparse
import contextlib
import re
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import add_command, layer_choice, positive, require_empty


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "student",
        run,
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
    parser.add_argument("teacher", help="folder or Hub repository")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=layer_choice,
        metavar="N",
        help="how many stay, spread evenly with the last among them; or their numbers, 0,2,4; or those of each stack, encoder=6",
    )
    parser.add_argument("--hidden", type=positive, help="features of the hidden states that stay")
    parser.add_argument("--heads", type=positive, help="heads that stay in each layer")
    parser.add_argument("--neurons", type=positive, help="neurons that stay in each layer")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="fields of the config to change")
    parser.add_argument("--random", action="store_true", help="copy no weights, draw all anew")
    parser.add_argument("--seed", type=int, default=42, help="of weights that are drawn anew (default 42)")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import torch
    import yaml

    from hfcompress.checkpoints.io import load
    from hfcompress.checkpoints.portable import MODELING_FILE
    from hfcompress.checkpoints.record import add_step
    from hfcompress.checkpoints.staging import staged_folder
    from hfcompress.distillation import derive_student
    from hfcompress.hub import save_probe, write_card
    from hfcompress.runs.processors import copy_processor

    target = Path(options.output)
    require_empty(target, "folder")
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
    start = "random" if options.random else "teacher"
    with staged_folder(target) as folder:
        teacher: Any = load(options.teacher)
        student, copied = derive_student(teacher, **choices, initialize=start)  # type: ignore[arg-type]
        origin = Path(options.teacher).name if Path(options.teacher).exists() else options.teacher
        add_step(student.config, "student", teacher=origin, initialize=start, choices=choices)
        student.save_pretrained(folder)
        save_probe(student, folder)
        copy_processor(options.teacher, folder)
        write_card(folder)
        load(folder)
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
