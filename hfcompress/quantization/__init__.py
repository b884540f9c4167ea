"""Quantization with bitsandbytes."""

from hfcompress.quantization.presets import PRESETS, make_config, modules_to_skip
from hfcompress.quantization.quantizing import own_device_map, quantize

__all__ = ["PRESETS", "make_config", "modules_to_skip", "own_device_map", "quantize"]
