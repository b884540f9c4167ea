"""`hfcompress inspect`: what is left in each layer."""

from __future__ import annotations

import argparse
from typing import Any

from hfcompress.cli.arguments import add_command, picture


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "inspect",
        run,
        "Show where a model can be cut, and what is left in each layer.",
        """\
Nothing but the config is read, so it is quick for any size.

examples:
  hfcompress inspect ./student
  hfcompress inspect user/model --picture layers.png
""",
    )
    parser.add_argument("model", help="folder or Hub repository")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a repository")
    parser.add_argument("--picture", type=picture, default=None, metavar="FILE.png", help="also draw it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


Pairs = dict[str, tuple[int, int]]


def what_is_left(
    model: str, revision: str | None = None
) -> tuple[Pairs, Pairs, tuple[int, int] | None, tuple[int, int] | None]:
    """Of units by site, of layers by stack, of hidden features, and of tokens (left, before), from the config alone."""
    from hfcompress.checkpoints.damage import damage_named
    from hfcompress.checkpoints.io import model_class, units_left
    from hfcompress.checkpoints.record import read_hidden, read_layers, read_vocabulary

    _, config = model_class(model, revision=revision)
    with damage_named(model):
        units = units_left(config)
    return units, read_layers(config), read_hidden(config), read_vocabulary(config)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from hfcompress.checkpoints.staging import staged_file
    from hfcompress.hub.picture import draw_layers, save_layers_picture

    units, layers, hidden, tokens = what_is_left(options.model, options.revision)
    if options.json:

        def said(pairs: Pairs) -> dict[str, Any]:
            return {name: {"left": left, "before": before} for name, (left, before) in pairs.items()}

        found = said(units) | ({"layers": said(layers)} if layers else {})
        others = {name: pair for name, pair in (("hidden", hidden), ("vocabulary", tokens)) if pair}
        print(json.dumps(found | said(others), indent=2))
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
        if tokens:
            print(f"tokens: {tokens[0]:,} of {tokens[1]:,} ({tokens[0] / tokens[1]:.0%})")
    if options.picture:
        with staged_file(options.picture) as file:
            save_layers_picture(units, file, layers=layers)
        if not options.json:
            print(f"drawn in {options.picture}")
    return 0
