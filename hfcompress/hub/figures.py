"""Pictures of the report as SVG in the page: they take their colours from its style, so that they follow light and dark.

Classes that the style knows: `ink`, `faint`, `grid` and `axis` for text and lines; `mark-0`, `mark-1`, ... for what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from hfcompress.hub.picture import Curve, Units, layers_and_roles, with_gone

WIDTH = 360
MARKS = 6  # colours that the style knows


@dataclass(frozen=True)
class Point:
    """A model in the picture of score against latency.

    Attributes:
        name: What it is called.
        x: Milliseconds: 10th percentile, median, 90th percentile.
        y: Score: lower end, value, upper end.
    """

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


@dataclass(frozen=True)
class _Scale:
    """From values to places in a picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def draw_points(points: Sequence[Point], *, x_label: str, y_label: str, percent: bool = False) -> Markup:
    """Score against latency: a numbered mark for each model with the spread of both, the first with a line across.

    Args:
        points: The baseline first.
        x_label: Under the picture.
        y_label: Above it.
        percent: Whether scores are shares to be written in per cent.

    Example:
        >>> svg = draw_points([Point("a <b>", (9.0, 10.0, 11.0), (0.8, 0.9, 1.0))], x_label="ms", y_label="accuracy")
        >>> "a &lt;b&gt;" in svg, "<b>" in svg
        (True, False)
    """
    left, right, top, bottom = 44, WIDTH - 14, 30, 214
    across = _Scale(*_widened([x for p in points for x in p.x]), left, right)
    up = _Scale(*_widened([y for p in points for y in p.y]), bottom, top)
    parts = [*_axes(across, up, x_label, y_label, percent=percent)]
    first = points[0].y[1]
    parts.append(f'<line class="base" x1="{left}" x2="{right}" y1="{up(first)}" y2="{up(first)}"/>')
    for number, point in enumerate(points):
        mark = f"mark-{number % MARKS}"
        (x0, x, x1), (y0, y, y1) = (across(v) for v in point.x), (up(v) for v in point.y)
        parts.append(f'<path class="whisker {mark}" d="M{x0} {y}H{x1}M{x} {y0}V{y1}"/>')
    for number, point in enumerate(points):
        x, y = across(point.x[1]), up(point.y[1])
        parts.append(
            f'<g class="mark-{number % MARKS}"><title>{escape(point.name)}: {point.x[1]:.1f} ms, '
            f'{_number(point.y[1], percent)}</title><circle class="dot" cx="{x}" cy="{y}" r="9"/>'
            f'<text class="dot-number" x="{x}" y="{y + 3.6}">{number + 1}</text></g>'
        )
    return _svg(parts, 250, f"{y_label} against {x_label}")


def draw_curves(curves: Mapping[str, Curve]) -> Markup:
    """Losses over the steps of a training, and the sparsity behind them on a scale of its own.

    Args:
        curves: As `hfcompress.hub.picture.curves_of` gives them.

    Example:
        >>> "polyline" in draw_curves({"loss": [(1, 0.5), (2, 0.25)]})
        True
    """
    lines = {name: points for name, points in curves.items() if name != "sparsity"}
    sparsity = curves.get("sparsity", [])
    left, right, top, bottom = 44, WIDTH - (42 if sparsity else 14), 52, 226
    steps = [step for points in curves.values() for step, _ in points]
    across = _Scale(min(steps), max(steps), left, right)
    highest = max((value for points in lines.values() for _, value in points), default=1.0)
    up = _Scale(0.0, _ticks(0.0, highest or 1.0)[-1], bottom, top)
    parts = []
    if sparsity:
        share = _Scale(0.0, 1.0, bottom, top)
        path = "".join(f"H{across(step)}V{share(value)}" for step, value in sparsity)
        parts.append(f'<path class="area" d="M{across(sparsity[0][0])} {bottom}{path}V{bottom}Z"/>')
        for value in (0.0, 0.5, 1.0):
            parts.append(f'<text class="faint" x="{right + 5}" y="{share(value) + 3.5}">{100 * value:.0f} %</text>')
        last = sparsity[-1]
        label = f"sparsity {100 * last[1]:.0f} %"
        parts.append(
            f'<text class="faint" text-anchor="end" x="{right - 4}" y="{max(share(last[1]) - 5, top + 8)}">{label}</text>'
        )
    parts += _axes(across, up, "step", "", percent=False)
    x, row = float(left), 6
    for number, (name, points) in enumerate(lines.items()):
        mark = f"mark-{(number + 1) % MARKS}"
        if len(points) == 1:
            parts.append(f'<circle class="line-end {mark}" cx="{across(points[0][0])}" cy="{up(points[0][1])}" r="3"/>')
        else:
            path = " ".join(f"{across(step)},{up(value)}" for step, value in points)
            parts.append(f'<polyline class="line {mark}" points="{path}"/>')
        words = name.replace("_", " ")
        if x + 14 + 6.2 * len(words) > WIDTH:
            x, row = left, row + 16
        parts.append(f'<rect class="swatch {mark}" x="{x:.1f}" y="{row}" width="10" height="10" rx="2"/>')
        parts.append(f'<text class="ink" x="{x + 14:.1f}" y="{row + 9}">{escape(words)}</text>')
        x += 28 + 6.2 * len(words)
    return _svg(parts, 262, "loss against step")


def draw_bars(units: Units, *, layers: Units | None = None) -> Markup:
    """What is left of each site: a bar in each layer and for each kind of unit.

    Args:
        units: Site name to (units left, units before), in the order of the layers.
        layers: Stack name to (layers left, layers before).

    Example:
        >>> draw_bars({"encoder.0.heads": (6, 12)}).count('class="track"')
        1
    """
    units = with_gone(units, layers or {})
    names, roles = layers_and_roles(units)
    roles = sorted(roles, key=lambda role: role == "neurons")  # as they come in a layer
    kinds = {(name.rpartition(".")[0].rpartition(".")[0], name.rpartition(".")[2]) for name in units}
    short = (
        names if len({name.partition(".")[0] for name in names}) > 1 else [name.rpartition(".")[2] for name in names]
    )
    left = 8 + 6.2 * max(len(name) for name in short)
    room = (WIDTH - left) / len(roles)
    parts = []
    for column, role in enumerate(roles):
        x = left + column * room
        parts.append(f'<text class="ink strong" x="{x:.1f}" y="14">{escape(role)}</text>')
    for row, (name, label) in enumerate(zip(names, short, strict=True)):
        y = 26 + 19 * row
        parts.append(f'<text class="faint" x="0" y="{y + 9.5}">{escape(label)}</text>')
        for column, role in enumerate(roles):
            if f"{name}.{role}" not in units:
                if (name.rpartition(".")[0], role) in kinds:
                    parts.append(f'<text class="faint" x="{left + column * room:.1f}" y="{y + 9.5}">whole</text>')
                continue
            now, before = units[f"{name}.{role}"]
            x, wide = left + column * room, room - 66
            filled = wide * now / before if before else 0.0
            parts.append(f'<rect class="track" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="11" rx="3"/>')
            parts.append(f'<rect class="bar" x="{x:.1f}" y="{y}" width="{filled:.1f}" height="11" rx="3"/>')
            parts.append(f'<text class="faint" x="{x + wide + 5:.1f}" y="{y + 9.5}">{now}/{before}</text>')
    return _svg(parts, 34 + 19 * len(names), "what is left in each layer")


def _svg(parts: Sequence[str], height: int, label: str) -> Markup:
    inner = "".join(parts)
    return Markup(  # every text in it was escaped where it was put in
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inner}</svg>'
    )


def _axes(across: _Scale, up: _Scale, x_label: str, y_label: str, *, percent: bool) -> list[str]:
    parts = []
    for value in _ticks(up.low, up.high):
        y = up(value)
        parts.append(f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{y}" y2="{y}"/>')
        number = _number(value, percent, places=_places(up.high - up.low, percent))
        parts.append(f'<text class="faint" text-anchor="end" x="{across.start - 5}" y="{y + 3.5}">{number}</text>')
    for value in _ticks(across.low, across.high):
        anchor = "end" if across(value) > across.end - 8 else "middle"
        parts.append(
            f'<text class="faint" text-anchor="{anchor}" x="{across(value)}" y="{up.start + 15}">{value:,g}</text>'
        )
    parts.append(f'<line class="axis" x1="{across.start}" x2="{across.end}" y1="{up.start}" y2="{up.start}"/>')
    middle = (across.start + across.end) / 2
    parts.append(f'<text class="ink" text-anchor="middle" x="{middle}" y="{up.start + 31}">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text class="ink" x="0" y="14">{escape(y_label)}</text>')
    return parts


def _places(span: float, percent: bool) -> int:
    """Decimals that tell ticks apart."""
    span *= 100 if percent else 1
    return max(0, min(6, 1 - math.floor(math.log10(span)))) if 0 < span < 10 else 0


def _number(value: float, percent: bool, *, places: int = 2) -> str:
    return f"{100 * value if percent else value:,.{places}f}" + (" %" if percent else "")


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with some room on both sides."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers in a range; the last may lie beyond a range that begins at 0.

    Example:
        >>> _ticks(0.0, 0.93)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    span = (high - low) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= span / 4.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if low == 0:
        last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
