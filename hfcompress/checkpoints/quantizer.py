"""What transformers needs to load packed weights, and several ways of writing weights in one model.

transformers asks a quantizer named in config.json to prepare the model before its weights are loaded. This one puts packed layers and
those of bitsandbytes where the config says, each layer with a scheme of its own; `import hfcompress` registers it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.checkpoints.grids import Scheme
from hfcompress.checkpoints.packed import PackedLinear, as_source, put_packed, unpacked

METHOD = "hfcompress"
VERSION = 1

# LLM.int8 (Dettmers et al. 2022) with its outlier threshold; NF4, FP4 and double quantization (Dettmers et al. 2023).
PRESETS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}
# Of torchao, to what both sides of a weight have to be a multiple of: the kernels of GPUs take nothing else.
DYNAMIC = {"int8-dynamic": 8, "fp8-dynamic": 16}


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which layers are written how.

    Args:
        modules: Name of a linear layer to "int8", "nf4", "nf4-dq", "fp4", "fp4-dq" (bitsandbytes) or the name of a `Scheme`.
        scale_dtype: Of scales and offsets of packed layers.
        compute_dtype: What 4-bit weights of bitsandbytes are multiplied in.
        int8_inputs: Packed layers that round what enters them to 8 bits.
        version: Of this format.
        **kwargs: What transformers adds.

    Raises:
        ValueError: A scheme or the version is not known.
    """

    def __init__(
        self,
        modules: Mapping[str, str] | None = None,
        scale_dtype: str = "float16",
        compute_dtype: str = "float32",
        int8_inputs: Sequence[str] = (),
        version: int = VERSION,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        if version != VERSION:
            raise ValueError(f"the weights were packed in format {version}; this hfcompress reads {VERSION}: update it")
        self.quant_method = METHOD
        self.version = version
        self.modules = dict(modules or {})
        for scheme in {*map(str, self.modules.values())} - PRESETS.keys():
            Scheme.parse(scheme)
        for name in (scale_dtype, compute_dtype):
            if name not in ("float16", "bfloat16", "float32"):
                raise ValueError(f"a type of scales and products is float16, bfloat16 or float32, not {name!r}")
        self.scale_dtype, self.compute_dtype = scale_dtype, compute_dtype
        self.int8_inputs = list(int8_inputs)
        for name in self.int8_inputs:
            if self.modules.get(name) in (None, *PRESETS):
                raise ValueError(f"the inputs of {name} cannot be rounded: it is not packed")
        self.llm_int8_enable_fp32_cpu_offload = False  # the parent of the quantizer asks

    def bitsandbytes(self, preset: str) -> BitsAndBytesConfig:
        """The settings of bitsandbytes for some layers."""
        return BitsAndBytesConfig(**PRESETS[preset], bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype))

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        names = ("quant_method", "version", "modules", "scale_dtype", "compute_dtype", "int8_inputs")
        return {name: getattr(self, name) for name in names if name != "int8_inputs" or self.int8_inputs}


class _Deserialize(ConversionOps):  # type: ignore[misc]
    """Weights of bitsandbytes in the form of their own layer."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = (
            hf_quantizer  # transformers looks for this name: tensors that it reads are not converted before
        )

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

        kind = Bnb8bitDeserialize if "SCB" in input_dict else Bnb4bitDeserialize
        return kind(self.hf_quantizer).convert(input_dict, **kwargs)  # type: ignore[no-any-return]


@register_quantizer(METHOD)
class PackedQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Puts packed layers and layers of bitsandbytes into a model before its weights are loaded."""

    requires_calibration = True  # it reads what was packed; it packs nothing itself
    serialized_names = {
        "weight": [*dict.fromkeys([*Bnb4BitHfQuantizer.serialized_names["weight"], "SCB", "weight_format"])]
    }

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Where a layer of bitsandbytes is, it has to be installed."""
        if PRESETS.keys() & {*self.quantization_config.modules.values()}:
            super().validate_environment(*args, **kwargs)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Nothing is quantized while it is loaded, but layers of bitsandbytes take their tensors in their own form."""
        module, name = get_module_from_name(model, param_name)
        return type(module).__module__.startswith("bitsandbytes") and name != "bias"

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        config: PackedConfig = self.quantization_config
        modules = _named(model, config.modules)
        # See `get_state_dict_and_metadata`.
        model._keys_to_ignore_on_load_unexpected = {
            *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
            *(rf"(^|\.){re.escape(name)}\.weight$" for name in modules if modules[name] not in PRESETS),
        }
        packed = {name: scheme for name, scheme in modules.items() if scheme not in PRESETS}
        dtype = getattr(model, "dtype", torch.float32)
        rounding = (
            _named(model, {name: config.modules[name] for name in config.int8_inputs}) if config.int8_inputs else {}
        )
        put_packed(model, packed, dtype=dtype, scale_dtype=getattr(torch, config.scale_dtype), rounds_inputs=rounding)
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        for preset in sorted(PRESETS.keys() & {*modules.values()}):
            others = [f"^{re.escape(name)}$" for name in linears if modules.get(name) != preset]
            replace_with_bnb_linear(
                model,
                modules_to_not_convert=others,
                quantization_config=config.bitsandbytes(preset),
                pre_quantized=self.pre_quantized,
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # What is saved has the names and forms that the layers have now; transformers cannot turn this step round.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(isinstance(operation, _Deserialize) for operation in getattr(conversion, "operations", ()))
        ]
        written = PRESETS.keys() & {*self.quantization_config.modules.values()}
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = bool(written - {"int8"}), "int8" in written  # type: ignore[assignment]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """What is written to disk: each packed layer also has a `weight`, of one byte.

        Without hfcompress transformers knows no codes and would fill in weights at random with no more than a warning; so it stops
        with an error at the shape of this one.
        """
        state = model.state_dict()
        packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
        return state | {f"{name}.weight": torch.zeros(1, dtype=torch.uint8) for name in packed}, {}

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        from transformers.integrations import dequantize_and_replace

        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as the config has it once it was saved
        for name in unpacked(model):
            model.get_submodule(name).to(dtype=dtype)
        for preset, kind in (("int8", "Linear8bitLt"), ("nf4", "Linear4bit")):
            sources = {n: m.source_cls for n, m in model.named_modules() if type(m).__name__ == kind}
            if sources:
                settings = self.quantization_config.bitsandbytes(preset)
                model = dequantize_and_replace(model, quantization_config=settings, dtype=dtype)
            for name, source in sources.items():
                model.set_submodule(name, as_source(model.get_submodule(name), source))  # type: ignore[arg-type]
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # type: ignore[assignment]
        return model

    def get_load_operations(self) -> dict[str, Any]:
        """How layers of bitsandbytes read their tensors."""
        return {"deserialize": _Deserialize}


def _named(model: Any, modules: Mapping[str, str]) -> dict[str, str]:
    """The same layers as this model calls them: a model without a head may be loaded from one with a head, and the reverse.

    Raises:
        ValueError: The model is what was saved and has no such layer, or it is another and has none of them.
    """
    prefix = f"{model.base_model_prefix}."
    there = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    found, missing = {}, []
    for name, scheme in modules.items():
        here = next((other for other in (name, name.removeprefix(prefix), prefix + name) if other in there), None)
        if here is None:
            missing.append(name)
        else:
            found[here] = scheme
    same = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    if missing and (same or not found):
        raise ValueError(
            f"config.json says that {missing[0]} is quantized, but {type(model).__name__} has no linear layer of that name; load the "
            "folder as it was saved"
        )
    return found
