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
from hfcompress.measurement.paired import Answers, Change, compare_answers, compare_metrics, median_interval
from hfcompress.measurement.provenance import provenance
from hfcompress.measurement.size import count_parameters, disk_bytes, memory_bytes

__all__ = [
    "Answers",
    "Change",
    "Latency",
    "Metric",
    "Speedup",
    "accuracy",
    "compare_answers",
    "compare_latency",
    "compare_metrics",
    "count_flops",
    "count_parameters",
    "device_name",
    "disk_bytes",
    "example_inputs",
    "macro_f1",
    "mcnemar",
    "mean_interval",
    "measure_latency",
    "median_interval",
    "memory_bytes",
    "pearson",
    "provenance",
    "speedup",
]
