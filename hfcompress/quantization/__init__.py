"""Quantization with bitsandbytes."""

from hfcompress.quantization.adapters import add_adapters, loftq, merge_adapter, refit_weights, without_dropout
from hfcompress.quantization.cpu_inference import pack_for_cpu, unpack_for_cpu
from hfcompress.quantization.presets import PRESETS, make_config, modules_to_skip
from hfcompress.quantization.quantizing import own_device_map, quantize

__all__ = [
    "PRESETS",
    "add_adapters",
    "loftq",
    "make_config",
    "merge_adapter",
    "modules_to_skip",
    "own_device_map",
    "pack_for_cpu",
    "quantize",
    "refit_weights",
    "unpack_for_cpu",
    "without_dropout",
]
