"""Quantization: with bitsandbytes or torchao, in packed forms of our own, rounded at once, on data or in training, with adapters that recover."""

from hfcompress.checkpoints.quantizer import DYNAMIC, PRESETS
from hfcompress.quantization.adapters import add_adapters, loftq, merge_adapter, refit_weights, without_dropout
from hfcompress.quantization.aware import make_aware, round_aware
from hfcompress.quantization.bits import assign_bits, bit_costs
from hfcompress.quantization.calibrated import round_at_once, round_on_data
from hfcompress.quantization.cpu_inference import pack_for_cpu, unpack_for_cpu
from hfcompress.quantization.dynamic import require_dynamic
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, put_rounded
from hfcompress.quantization.presets import make_config, modules_to_skip
from hfcompress.quantization.quantizing import own_device_map, quantize

__all__ = [
    "DYNAMIC",
    "PRESETS",
    "add_adapters",
    "assign_bits",
    "bit_costs",
    "format_of",
    "layers_to_quantize",
    "loftq",
    "make_aware",
    "make_config",
    "merge_adapter",
    "modules_to_skip",
    "own_device_map",
    "pack_for_cpu",
    "put_rounded",
    "quantize",
    "refit_weights",
    "require_dynamic",
    "round_at_once",
    "round_aware",
    "round_on_data",
    "unpack_for_cpu",
    "without_dropout",
]
