"""The table of a run, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
    header += ["latency ms (p10-p90)", "speedup", "of the layers"]
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
        scale, digits = (100, 2) if metric["name"] in ("accuracy", "macro_f1") else (1, 4)
        cells.append(f"{scale * metric['value']:.{digits}f}")
        cells.append(f"{scale * metric['low']:.{digits}f} to {scale * metric['high']:.{digits}f}")
    latency = row["latency"]
    cells.append(f"{row['parameters'] / 1e6:.2f} M")
    cells.append(f"{row['disk_bytes'] / 1e6:.1f}")
    if not scored:
        cells += [f"{row['memory_bytes'] / 1e6:.1f}", f"{row['flops_per_input'] / 1e9:.2f}"]
    cells.append(f"{latency['median_ms']:.1f} ({latency['p10_ms']:.1f}-{latency['p90_ms']:.1f})")
    cells.append(f"{row['speedup']['median']:.2f}x" if "speedup" in row else "1.00x")
    cells.append(f"{row['layers_speedup']['median']:.2f}x" if "layers_speedup" in row else "1.00x")
    return cells
