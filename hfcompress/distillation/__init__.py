"""Distillation: losses, layer maps, teachers."""

from hfcompress.distillation.layer_maps import make_map, uniform_map
from hfcompress.distillation.losses import binary_kl_divergence, kl_divergence, mean_over_items, mean_squared_error
from hfcompress.distillation.teachers import Teacher, capture_outputs

__all__ = [
    "Teacher",
    "binary_kl_divergence",
    "capture_outputs",
    "kl_divergence",
    "make_map",
    "mean_over_items",
    "mean_squared_error",
    "uniform_map",
]
