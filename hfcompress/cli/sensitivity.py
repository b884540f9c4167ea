"""`hfcompress sensitivity`: what units and bits are worth."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hfcompress.cli.arguments import (
    add_command,
    data_arguments,
    data_sections,
    number,
    options_named,
    picture,
    written,
)


def add(commands: Any) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "sensitivity",
        run,
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
    data_arguments(parser, samples=256)
    parser.add_argument("--criterion", default="obs", help="in which order units go (default obs)")
    parser.add_argument("--picture", type=picture, default=None, metavar="FILE.png", help="also draw it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--bits", nargs="+", default=None, metavar="BITS", help="numbers of bits, or names of formats, to choose from"
    )
    parser.add_argument(
        "--by",
        default="fisher",
        choices=["fisher", "divergence"],
        help="how the loss of bits is found (default fisher)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--max-mb", type=number, metavar="MB", help="the model takes at most so many million bytes")
    budget.add_argument("--max-loss", type=number, metavar="NATS", help="it loses at most so much, nats per example")
    parser.add_argument("--save", default=None, metavar="FILE.json", help="keep costs and choice of bits")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    for name in ("max_mb", "max_loss", "save"):
        if options.bits is None and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is about bits; say which with --bits, e.g. --bits 16 8 4")
    with written(options.picture) as drawing, written(options.save) as saving:
        if options.bits is None:
            _units(options, drawing)
        else:
            _bits(options, drawing, saving)
    if options.picture and not options.json:
        print(f"\ndrawn in {options.picture}")
    if options.save and not options.json:
        print(f"\nsaved in {options.save}: hfcompress quantize {options.model} --layers {options.save}")
    return 0


def _units(options: argparse.Namespace, drawing: Path | None) -> None:
    import json

    from hfcompress.config import Recipe
    from hfcompress.hub.picture import save_sensitivity_picture
    from hfcompress.runs.post_training import sensitivity_of
    from hfcompress.runs.table import format_layers, format_sensitivities

    criterion = {"name": options.criterion, "samples": options.samples}
    recipe = Recipe.from_dict(
        {"prune": {"criterion": criterion}, **data_sections(options)}, source="hfcompress sensitivity"
    )
    assert recipe.prune is not None and recipe.data is not None
    with options_named():
        found, layers = sensitivity_of(
            options.model, recipe.prune.criterion, recipe.data, measure=recipe.measure, seed=recipe.seed
        )
    if options.json:
        both = {"sites": [entry.to_dict() for entry in found], "layers": [entry.to_dict() for entry in layers]}
        print(json.dumps(both, indent=2))
    else:
        print(format_sensitivities(found))
        if layers:
            print("\n" + format_layers(layers))
    if drawing:
        lines = {
            entry.site: [(left / entry.units, loss) for left, loss in zip(entry.left, entry.divergence, strict=True)]
            for entry in found
        }
        save_sensitivity_picture(lines, drawing)


def _bits(options: argparse.Namespace, drawing: Path | None, saving: Path | None) -> None:
    import json

    from hfcompress.config import Recipe
    from hfcompress.hub.picture import save_bits_picture
    from hfcompress.quantization.bits import FLOATS, assign_bits, format_for, total_cost
    from hfcompress.runs.post_training import bit_costs_of
    from hfcompress.runs.table import format_bits

    bounded = options.max_mb is not None or options.max_loss is not None
    if options.save and not bounded:
        raise ValueError("--save keeps a choice of bits; give it a budget, --max-mb or --max-loss")
    for bits in options.bits:
        format_for(bits, kept="float32")  # what is not known is said before anything is loaded
    recipe = Recipe.from_dict(data_sections(options), source="hfcompress sensitivity")
    assert recipe.data is not None
    settings: dict[str, Any] = {"by": options.by, "samples": options.samples}
    with options_named():
        costs, rest_bytes = bit_costs_of(
            options.model, options.bits, recipe.data, measure=recipe.measure, seed=recipe.seed, **settings
        )
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
    if drawing:
        losses = {name: {form: cost.loss for form, cost in layer.items()} for name, layer in costs.items()}
        save_bits_picture(losses, drawing, chosen=chosen)
    if saving:
        saving.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
