"""Pictures of what is left in each layer: for the terminal and for the card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

Units = Mapping[str, tuple[int, int]]

_BAR = 24


def draw_layers(units: Units, *, layers: Units | None = None) -> str:
    """What is left of each site as a bar of text.

    Args:
        units: Site name to (units left, units before), in the order of the layers.
        layers: Stack name to (layers left, layers before). Those that are gone are drawn empty after those that are left: which ones
            they were is not known any more.

    Example:
        >>> print(draw_layers({"encoder.0.heads": (6, 12), "encoder.0.neurons": (384, 1536)}))
        layer      heads                              neurons
        encoder.0  ############............    6/12   ######..................   384/1536
    """
    units = with_gone(units, layers or {})
    names, roles = layers_and_roles(units)
    width = max([len("layer"), *(len(layer) for layer in names)])
    cells = {name: f"{_bar(*pair)}  {pair[0]:>{_digits(units, name)}}/{pair[1]}" for name, pair in units.items()}
    columns = {role: max(len(cells.get(f"{layer}.{role}", "")) for layer in names) for role in roles}
    lines = ["layer".ljust(width) + "  " + "   ".join(role.ljust(columns[role]) for role in roles)]
    for layer in names:
        row = "   ".join(cells.get(f"{layer}.{role}", "").ljust(columns[role]) for role in roles)
        lines.append(f"{layer.ljust(width)}  {row}")
    return "\n".join(line.rstrip() for line in lines)


def with_gone(units: Units, layers: Units) -> Units:
    """The units, and after those of each stack empty entries for the layers that are gone, as large as the largest left."""
    drawn: dict[str, tuple[int, int]] = {}
    waiting = dict(layers)
    entries = list(units.items())
    for place, (name, pair) in enumerate(entries):
        drawn[name] = pair
        stack = _stack(name)
        if stack not in waiting or any(_stack(later) == stack for later, _ in entries[place + 1 :]):
            continue
        left, before = waiting.pop(stack)
        mine = [(other.rpartition(".")[2], most) for other, (_, most) in entries if _stack(other) == stack]
        for number in range(before - left):
            for role in dict.fromkeys(role for role, _ in mine):
                drawn[f"{stack}.gone {number + 1}.{role}"] = (0, max(most for r, most in mine if r == role))
    return drawn


def _stack(site: str) -> str:
    """The stack of a site that belongs to one layer: "encoder" of "encoder.3.heads"."""
    return site.rpartition(".")[0].rpartition(".")[0]


def _digits(units: Units, name: str) -> int:
    role = name.rpartition(".")[2]
    return max(len(str(pair[1])) for other, pair in units.items() if other.endswith(f".{role}")) + 1


def _bar(left: int, before: int) -> str:
    filled = round(_BAR * left / before) if before else 0
    if left and not filled:
        filled = 1
    return "#" * filled + "." * (_BAR - filled)


def layers_and_roles(units: Units) -> tuple[list[str], list[str]]:
    """The layers that have sites, and the kinds of units, each in the order in which they come."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in units))
    roles = list(dict.fromkeys(name.rpartition(".")[2] for name in units))
    return layers, roles


def save_layers_picture(
    units: Units, path: str | Path, *, layers: Units | None = None, title: str = "What is left in each layer"
) -> None:
    """The same as a PNG: one panel per kind of unit, one bar per layer, what was there before in grey behind it.

    Args:
        units: Site name to (units left, units before).
        path: File to write.
        layers: Stack name to (layers left, layers before); see `draw_layers`.
        title: Above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units = with_gone(units, layers or {})
    names, roles = layers_and_roles(units)
    figure = Figure(figsize=(4.2 * len(roles), 0.32 * len(names) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    rows = range(len(names))
    several = len({layer.partition(".")[0] for layer in names}) > 1
    labels = [layer if several else layer.rpartition(".")[2] for layer in names]
    for axes, role in zip(figure.subplots(1, len(roles), squeeze=False)[0], roles, strict=True):
        pairs = [units.get(f"{layer}.{role}", (0, 0)) for layer in names]
        axes.barh(rows, [before for _, before in pairs], color="#d9dde3", height=0.75)
        axes.barh(rows, [left for left, _ in pairs], color="#2b6cb0", height=0.75)
        for row, (left, before) in zip(rows, pairs, strict=True):
            if f"{names[row]}.{role}" not in units:
                continue
            axes.text(before * 1.02, row, f"{left}/{before}", va="center", fontsize=8, color="#333333")
        axes.set_yticks(rows, labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, max(before for _, before in pairs) * 1.3 or 1)
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= max(before for _, before in pairs)])
        axes.set_xlabel(role)
        axes.set_ylabel("layer")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def save_tradeoff_picture(
    points: Sequence[tuple[str, float, float, float, float]], path: str | Path, *, metric: str
) -> None:
    """Score against latency as a PNG, one labelled point per model, the first (the baseline) as a line across.

    Args:
        points: Name, milliseconds, score, and lower and upper end of the score's interval, of each model.
        path: File to write.
        metric: Name of the score, with its unit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(points[0][2], color="#9aa3ad", linewidth=1, linestyle="--")
    for _, x, _, low, high in points:
        axes.plot([x, x], [low, high], color="#bcd0e5", linewidth=2)
    ordered = sorted(points, key=lambda point: point[1])
    axes.plot([p[1] for p in ordered], [p[2] for p in ordered], color="#2b6cb0", marker="o", markersize=5)
    middle = (ordered[0][1] + ordered[-1][1]) / 2
    for name, x, y, _, _ in points:
        right = x > middle  # its name goes to the left, so that none leaves the picture
        place: dict[str, Any] = {"xytext": (-6 if right else 6, 6), "ha": "right" if right else "left"}
        axes.annotate(name, (x, y), textcoords="offset points", fontsize=8, color="#333333", **place)
    axes.set_xlabel("latency of a batch in ms, measured")
    axes.set_ylabel(metric)
    axes.margins(x=0.12, y=0.18)
    axes.grid(color="#eceff2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


Curve = list[tuple[float, float]]


def curves_of(history: Sequence[Mapping[str, float]]) -> dict[str, Curve]:
    """The lines to draw of a training's log: name to (step, value), those of the loss, its terms, and sparsity.

    Example:
        >>> curves_of([{"step": 10, "loss": 0.7, "sparsity": 0.1, "epoch": 0.5}, {"step": 20, "eval_loss": 0.6}])
        {'loss': [(10, 0.7)], 'sparsity': [(10, 0.1)], 'eval_loss': [(20, 0.6)]}
    """
    curves: dict[str, Curve] = {}
    for entry in history:
        for name, value in entry.items():
            drawn = name in ("loss", "eval_loss", "sparsity") or name.startswith("loss_")
            if drawn and "step" in entry and math.isfinite(value) and math.isfinite(entry["step"]):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def save_curves_picture(history: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> bool:
    """Loss of each training as a PNG, a panel each, and the sparsity on an axis of its own.

    Args:
        history: Name of each training to its log.
        path: File to write.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = {name: curves for name, log in history.items() if (curves := curves_of(log))}
    if not stages:
        return False
    figure = Figure(figsize=(5.2 * len(stages), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, curves) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        for name, colour in (("loss", "#2b6cb0"), ("eval_loss", "#c05621")):
            if name in curves:
                axes.plot(*zip(*curves[name], strict=True), color=colour, label=name.replace("_", " "))
        if "sparsity" in curves:
            right = axes.twinx()
            right.fill_between(*zip(*curves["sparsity"], strict=True), color="#9aa3ad", alpha=0.25, step="post")
            right.set_ylim(0, 1)
            right.set_ylabel("sparsity", color="#5a6570")
            right.spines["top"].set_visible(False)
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.spines["top"].set_visible(False)
        if "eval_loss" in curves:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def save_sensitivity_picture(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str = "What each layer's units are worth",
) -> None:
    """Loss against the share of units left as a PNG: one panel per kind of unit, one line per layer.

    Args:
        lines: Site name to points (share of units left, loss), from many units to few.
        path: File to write.
        title: Above the panels.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, roles = layers_and_roles({name: (0, 0) for name in lines})
    figure = Figure(figsize=(5.4 * len(roles), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    colours = colormaps["viridis"]
    floor = min((loss for points in lines.values() for _, loss in points if loss > 0), default=1e-6)
    for axes, role in zip(figure.subplots(1, len(roles), squeeze=False, sharey=True)[0], roles, strict=True):
        for number, layer in enumerate(layers):
            points = lines.get(f"{layer}.{role}")
            if points:
                colour = colours(number / max(1, len(layers) - 1) * 0.92)
                values = [max(loss, floor) for _, loss in points]
                axes.plot([share for share, _ in points], values, color=colour, marker="o", markersize=3, label=layer)
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set_xlabel(f"share of {role} left")
        axes.grid(color="#eceff2")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("divergence from the whole model, nats per example")
    figure.axes[-1].legend(fontsize=7, frameon=False, ncols=1 + len(layers) // 16)
    figure.savefig(path, dpi=150)


def save_bits_picture(
    losses: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    chosen: Mapping[str, str] | None = None,
    title: str = "What each layer loses in each format",
) -> None:
    """Loss of each layer in each format as a PNG: a heat map of layers and formats, what was chosen with a frame.

    Args:
        losses: Name of each layer to name of each format to loss, all with the same formats.
        path: File to write.
        chosen: Name of each layer to the format it gets.
        title: Above the map.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names, formats = list(losses), list(dict.fromkeys(form for layer in losses.values() for form in layer))
    seen = [loss for layer in losses.values() for loss in layer.values() if loss > 0] or [1e-6]
    values = [[max(losses[name][form], min(seen)) for form in formats] for name in names]
    figure = Figure(figsize=(3.6 + 0.75 * len(formats), 1.6 + 0.17 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    norm = LogNorm(min(seen), max(max(seen), 1.001 * min(seen)))
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    for row, name in enumerate(names):
        if chosen is not None:
            column = formats.index(chosen[name])
            axes.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, fill=False, edgecolor="#ff4d4d", lw=1.5))
    parts = list(zip(*(name.split(".")[:-1] for name in names), strict=False))
    prefix = ".".join(part[0] for part in takewhile(lambda part: len({*part}) == 1, parts))
    axes.set_yticks(range(len(names)), [name.removeprefix(f"{prefix}.") for name in names], fontsize=6)
    axes.set_xticks(range(len(formats)), formats, fontsize=7, rotation=30)
    axes.set_ylabel(f"layers of {prefix}" if prefix else "layer", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 30 / len(names) + 0.2))
    bar.set_label("divergence from the whole model, nats per example", fontsize=8)
    figure.savefig(path, dpi=150)
