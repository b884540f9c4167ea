"""The table of a run, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.measurement.metrics import PERCENTAGES
from hfcompress.pruning import LayerSensitivity, Sensitivity
from hfcompress.quantization.bits import Costs, total_cost


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `measure_folders` as an aligned table; rows without a score show memory and FLOPs instead.

    Example:
        >>> latency = {"median_ms": 20.0, "p10_ms": 19.0, "p90_ms": 22.0}
        >>> size = {"parameters": 22_700_000, "disk_bytes": 90_900_000, "memory_bytes": 90_900_000, "flops_per_input": 2e9}
        >>> print(format_rows([{"name": "teacher", **size, "latency": latency}]))
        model     parameters   MB disk   MB memory   GFLOP   latency ms (p10-p90)   speedup   of the layers
        teacher      22.70 M      90.9        90.9    2.00       20.0 (19.0-22.0)     1.00x           1.00x
    """
    scored = [row["metric"] for row in rows if "metric" in row]
    header = ["model"]
    if scored:
        header += [f"{scored[0]['name']} (n={scored[0]['n']})", "95 % interval"]
    header += ["parameters", "MB disk"] + ([] if scored else ["MB memory", "GFLOP"])
    header += ["latency ms (p10-p90)", "speedup"]
    header += [] if rows[0]["latency"].get("compiled") else ["of the layers"]
    lines = [header, *(_cells(row, scored=bool(scored)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "   ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in lines)
    )


def _cells(row: dict[str, Any], *, scored: bool) -> list[str]:
    cells = [row["name"]]
    if scored:
        metric = row["metric"]
        scale, digits = (100, 2) if metric["name"] in PERCENTAGES else (1, 4)
        cells.append(f"{scale * metric['value']:.{digits}f}")
        cells.append(f"{scale * metric['low']:.{digits}f} to {scale * metric['high']:.{digits}f}")
    latency = row["latency"]
    cells.append(f"{row['parameters'] / 1e6:.2f} M")
    cells.append(f"{row['disk_bytes'] / 1e6:.1f}")
    if not scored:
        cells += [f"{row['memory_bytes'] / 1e6:.1f}", f"{row['flops_per_input'] / 1e9:.2f}"]
    cells.append(f"{latency['median_ms']:.1f} ({latency['p10_ms']:.1f}-{latency['p90_ms']:.1f})")
    cells.append(f"{row['speedup']['median']:.2f}x" if "speedup" in row else "1.00x")
    if not latency.get("compiled"):
        cells.append(f"{row['layers_speedup']['median']:.2f}x" if "layers_speedup" in row else "1.00x")
    return cells


def format_layers(found: Sequence[LayerSensitivity]) -> str:
    """What each layer is worth, as an aligned table.

    Example:
        >>> print(format_layers([LayerSensitivity("encoder.0", 0.25, 0.1)]))
        without the layer   nats per example   block influence
        encoder.0                     0.2500             0.100
    """
    lines = [f"{'without the layer':<17}   {'nats per example':>16}   {'block influence':>15}"]
    for entry in found:
        lines.append(f"{entry.layer:<17}   {entry.divergence:>16.4f}   {entry.influence:>15.3f}")
    return "\n".join(lines)


def format_sensitivities(found: Sequence[Sensitivity]) -> str:
    """What each site costs with fewer units, as an aligned table: one column per share of units left.

    Example:
        >>> entry = Sensitivity("encoder.0.heads", 12, (9, 6), (0.001, 0.25), (0.0, 0.0))
        >>> print(format_sensitivities([entry]))
        nats per example with      75 %      50 %   of the units left
        encoder.0.heads (12)     0.0010    0.2500
    """
    shares = sorted({left / entry.units for entry in found for left in entry.left}, reverse=True)
    columns = [share for number, share in enumerate(shares) if number == 0 or shares[number - 1] - share > 0.05]
    labels = [f"{entry.site} ({entry.units})" for entry in found]
    width = max([len("nats per example with"), *(len(label) for label in labels)])
    head = "".join(f"{f'{share:.0%}'.replace('%', ' %'):>10}" for share in columns)
    lines = [f"{'nats per example with':<{width}}{head}   of the units left"]
    for label, entry in zip(labels, found, strict=True):
        values = {left / entry.units: loss for left, loss in zip(entry.left, entry.divergence, strict=True)}
        cells = [next((v for share, v in values.items() if abs(share - column) <= 0.05), None) for column in columns]
        lines.append(f"{label:<{width}}" + "".join(f"{'' if v is None else f'{v:.4f}':>10}" for v in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_bits(costs: Costs, chosen: Mapping[str, str] | None, *, rest_bytes: int) -> str:
    """What each layer loses and takes in each format, and all of them together, as an aligned table.

    Args:
        costs: From `bit_costs`.
        chosen: Name of each layer to its format, also of those that are not quantized, which is marked; None if none was chosen.
        rest_bytes: Of what is not quantized.

    Example:
        >>> from hfcompress.quantization.bits import BitCost
        >>> costs = {"key": {"float16": BitCost(0.0, 200_000), "int8": BitCost(0.125, 110_000)}}
        >>> print(format_bits(costs, {"key": "int8"}, rest_bytes=1_000_000))
        nats per example, kB      float16              int8
        key                           0    200.0    1.25e-01    110.0*
        <BLANKLINE>
        together                 nats expected   MB of the model
        all float16                          0              1.20
        all int8                      1.25e-01              1.11
        as marked                     1.25e-01              1.11
    """
    formats = list(next(iter(costs.values())))
    totals = [(f"all {form}", total_cost(costs, form)) for form in formats]
    if chosen is not None:
        totals.append(("as marked", total_cost(costs, chosen)))
    width = max([len("nats per example, kB"), *map(len, costs), *(len(label) for label, _ in totals)])
    lines = [f"{'nats per example, kB':<{width}}" + "".join(f"   {'':<3}{form:<15}" for form in formats)]
    for name, layer in costs.items():
        cells = [
            f"   {_loss(cost.loss):>8} {cost.size_bytes / 1e3:>8.1f}"
            f"{'*' if chosen is not None and chosen[name] == form else ' '}"
            for form, cost in layer.items()
        ]
        lines.append(f"{name:<{width}}" + "".join(cells))
    lines += ["", f"{'together':<{width}}   {'nats expected':>15}   {'MB of the model':>15}"]
    for label, total in totals:
        lines.append(f"{label:<{width}}   {_loss(total.loss):>15}   {(total.size_bytes + rest_bytes) / 1e6:>15.2f}")
    return "\n".join(line.rstrip() for line in lines)


def _loss(loss: float) -> str:
    return f"{loss:.2e}" if loss else "0"
