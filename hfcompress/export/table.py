"""What exports are like beside the model they came from, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfcompress.export.exporting import Export
from hfcompress.measurement import Latency, Metric, speedup
from hfcompress.measurement.metrics import PERCENTAGES

BASELINE = "torch float32"


@dataclass(frozen=True)
class Row:
    """One form of a model.

    Attributes:
        name: Of the form.
        size_bytes: Of its weights and graph.
        cosine: To the outputs of torch.
        agreement: Share of the same classes; None without classes.
        metric: Its score, where there are data.
        latency: Where time was measured.
    """

    name: str
    size_bytes: int
    cosine: float = 1.0
    agreement: float | None = None
    metric: Metric | None = None
    latency: Latency | None = None


def rows_of(
    size_bytes: int, exports: Mapping[str, Export], *, metrics: Mapping[str, Metric], latency: Mapping[str, Latency]
) -> list[Row]:
    """The model in torch, and each export.

    Args:
        size_bytes: Of the model's weights in 32 bits.
        exports: By format.
        metrics: Scores by format, and of `BASELINE`; may be empty.
        latency: Times likewise.
    """
    first = Row(BASELINE, size_bytes, metric=metrics.get(BASELINE), latency=latency.get(BASELINE))
    others = [
        Row(name, one.size_bytes, one.check.cosine, one.check.agreement, metrics.get(name), latency.get(name))
        for name, one in exports.items()
    ]
    return [first, *others]


def format_exports(rows: Sequence[Row]) -> str:
    """Rows as an aligned table; the first is what the others are compared with.

    Below it stands which forms save memory and no time, as measured here.

    Example:
        >>> where = dict(batch=8, length=64, device="cpu", threads=1, dtype="float32", scope="model", rounds=1, warmup=0)
        >>> times = {name: Latency(ms, ms, ms, samples_ms=(ms,), **where) for name, ms in (("a", 60.0), ("b", 10.0), ("c", 63.0))}
        >>> rows = [
        ...     Row("torch float32", 91_000_000, latency=times["a"]),
        ...     Row("openvino-int8", 23_000_000, 0.9991, 0.99, latency=times["b"]),
        ...     Row("openvino-int8-weights", 23_000_000, 0.9999, 1.0, latency=times["c"]),
        ... ]
        >>> print(format_exports(rows))
        form                      MB   cosine   same class   latency ms (p10-p90)   speedup
        torch float32           91.0                             60.0 (60.0-60.0)     1.00x
        openvino-int8           23.0   0.9991       99.0 %       10.0 (10.0-10.0)     6.00x
        openvino-int8-weights   23.0   0.9999      100.0 %       63.0 (63.0-63.0)     0.95x
        openvino-int8-weights saves memory, not time: a quarter of the size, 0.95x the speed
    """
    first = rows[0]
    scored, timed = first.metric is not None, first.latency is not None
    header = ["form", "MB", "cosine", "same class"]
    header += [f"{first.metric.name} (n={first.metric.n:,})"] if first.metric else []
    header += ["latency ms (p10-p90)", "speedup"] if timed else []
    lines = [header, *(_cells(row, first, scored=scored) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "   ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([*text, *(_no_faster(row, first) for row in rows[1:] if _no_faster(row, first))])


def _cells(row: Row, first: Row, *, scored: bool) -> list[str]:
    cells = [row.name, f"{row.size_bytes / 1e6:.1f}", "" if row is first else f"{row.cosine:.4f}"]
    cells.append("" if row.agreement is None else f"{100 * row.agreement:.1f} %")
    if scored and row.metric:
        percent = row.metric.name in PERCENTAGES
        cells.append(f"{100 * row.metric.value:.2f}" if percent else f"{row.metric.value:.4f}")
    if row.latency and first.latency:
        times = row.latency
        cells.append(f"{times.median_ms:.1f} ({times.p10_ms:.1f}-{times.p90_ms:.1f})")
        cells.append(f"{speedup(first.latency, times).median:.2f}x")
    return cells


def _no_faster(row: Row, first: Row) -> str:
    """A line about a smaller form that is no faster; empty if it is, or was not timed."""
    if row.latency is None or first.latency is None or row.size_bytes > 0.75 * first.size_bytes:
        return ""
    times = speedup(first.latency, row.latency).median
    if times > 1.05:
        return ""
    share = row.size_bytes / first.size_bytes
    size = "a quarter" if abs(share - 0.25) < 0.03 else f"{share:.0%}"
    return f"{row.name} saves memory, not time: {size} of the size, {times:.2f}x the speed"
