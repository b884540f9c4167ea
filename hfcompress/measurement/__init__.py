"""What a model costs and how well it does: size, FLOPs, latency, and task metrics with their intervals."""

from hfcompress.measurement.flops import count_flops
from hfcompress.measurement.latency import (
    Latency,
    Speedup,
    compare_latency,
    device_name,
    example_inputs,
    measure_latency,
    speedup,
)
from hfcompress.measurement.metrics import Metric, accuracy, macro_f1, mcnemar, mean_interval, pearson
from hfcompress.measurement.provenance import provenance
from hfcompress.measurement.size import count_parameters, disk_bytes, memory_bytes

__all__ = [
    "Latency",
    "Metric",
    "Speedup",
    "accuracy",
    "compare_latency",
    "count_flops",
    "count_parameters",
    "device_name",
    "disk_bytes",
    "example_inputs",
    "macro_f1",
    "mcnemar",
    "mean_interval",
    "measure_latency",
    "memory_bytes",
    "pearson",
    "provenance",
    "speedup",
]
