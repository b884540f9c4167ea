"""What `import hfcompress` changes in other libraries, the moment they are imported; nothing is imported here.

* transformers: models whose config holds a record are built with the recorded shapes, so that plain
  `from_pretrained`, `pipeline` and `Trainer` load them, and `save_pretrained` writes folders that also load where
  hfcompress is not installed.
* transformers: models whose config says that hfcompress packed their weights (`quant_method: hfcompress`) are loaded with
  plain `from_pretrained`.
* bitsandbytes: on CPUs with AVX512-BF16, version 0.50 repacks 4-bit weights in place in the first forward pass in eval
  mode. That corrupts what is saved afterwards, breaks adapters, and fails for widths that are no multiple of 32 (output)
  or 64 (input), which pruned layers have. The repacking is switched off.
* bitsandbytes: on CPUs with AVX512, version 0.50 reads 4-bit weights wrong, without an error, where the input width is a
  multiple of 16 and none of the block size (64), such as 96, which pruned layers have. They are read as one long row
  instead, which is right.
* torchao, as transformers 5.23 calls it: models without one table of input embeddings (CLIP, Wav2Vec2) cannot be quantized, and what is
  saved of a model that has a parameter of its own, outside of its modules (BART, CLIP), does not load again. The first is passed over, the
  second left out of the list of what is quantized, where it does not belong.
* bitsandbytes and torchao, as transformers 5.23 calls them: what was loaded cannot be saved again. The step of loading that cannot be turned
  round is forgotten; nothing has to be turned round.
"""

from __future__ import annotations

import functools
import json
import logging
from types import ModuleType
from typing import Any

import wrapt

# Steps of loading quantized weights that transformers cannot turn round.
_ONE_WAY = ("Bnb4bitDeserialize", "Bnb8bitDeserialize", "TorchAoDeserialize")


def install() -> None:
    """Register the changes; each is made when its library is imported, or now if it already is. Doing it twice is safe."""
    wrapt.register_post_import_hook(patch_transformers, "transformers.modeling_utils")
    wrapt.register_post_import_hook(register_quantizer, "transformers.quantizers.auto")
    wrapt.register_post_import_hook(patch_bitsandbytes, "bitsandbytes.nn.modules")
    wrapt.register_post_import_hook(patch_torchao_quantizer, "transformers.quantizers.quantizer_torchao")
    for bits in (4, 8):
        wrapt.register_post_import_hook(
            patch_bitsandbytes_quantizer, f"transformers.quantizers.quantizer_bnb_{bits}bit"
        )
    wrapt.register_post_import_hook(patch_torchao_loading, "transformers.integrations.torchao")
    # One line per int8 product in float32, and one at import for a kernel package that is optional: neither helps.
    _silence("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast")
    _silence("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
    # Kernels for other devices than this one's, and what torch has to say to torchao.
    _silence("torchao", "Failed to load ")
    _silence("torchao.kernel.intmm", "Warning: Detected no triton")
    _silence("torch.utils._pytree", "%s is an Enum subclass")
    # Our configs repeat their shapes in `per_layer_config` for other tools; the stock classes read the global values,
    # and the record then sets the right ones, so the warning about that reading would mislead.
    _silence(
        "transformers.integrations.heterogeneity.configuration_utils",
        "Reading global config value for per-layer attribute",
    )


def _silence(logger: str, start: str) -> None:
    """Drop messages of a logger that begin with some words."""
    logging.getLogger(logger).addFilter(lambda message: not str(message.msg).startswith(start))


def patch_transformers(module: ModuleType) -> None:
    """Make `PreTrainedModel` build and save what a record says, in place."""
    cls = module.PreTrainedModel
    if getattr(cls.post_init, "hfcompress", False):
        return
    cls.post_init = _build_as_recorded(cls.post_init)
    cls.save_pretrained = _save_with_record(cls.save_pretrained)


def register_quantizer(module: ModuleType) -> None:  # noqa: ARG001
    """Teach transformers to load weights that hfcompress has packed."""
    import hfcompress.checkpoints.quantizer  # noqa: F401


def _build_as_recorded(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(self: Any) -> None:
        record = getattr(self.config, "hfcompress", None)
        if record is not None:
            from hfcompress.anatomy import apply_hidden, apply_record, check_record, family_of
            from hfcompress.anatomy.sites import recorded_hidden

            if check_record(record) or recorded_hidden(record):
                apply_record(self, family_of(self), record)
                apply_hidden(self, family_of(self), record)
        original(self)

    post_init.hfcompress = True  # type: ignore[attr-defined]
    return post_init


def _save_with_record(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        if not is_main_process or getattr(self.config, "hfcompress", None) is None:
            return original(self, save_directory, is_main_process, *args, **kwargs)
        from hfcompress.checkpoints.portable import MODELING_FILE, portable_config, write_modeling_file

        live, timestamps = self.config, self._get_files_timestamps
        config = portable_config(self)
        write_modeling_file(self, config, save_directory)
        self.config = config
        # With push_to_hub=True only files are uploaded that are newer than these; ours was written just now.
        self._get_files_timestamps = lambda folder: {k: v for k, v in timestamps(folder).items() if k != MODELING_FILE}
        try:
            return original(self, save_directory, is_main_process, *args, **kwargs)
        finally:
            self.config = live
            del self._get_files_timestamps

    return save_pretrained


def patch_torchao_quantizer(module: ModuleType) -> None:
    """Make what is saved of any model load again, and what was loaded save again, in place.

    Args:
        module: `transformers.quantizers.quantizer_torchao`.
    """
    cls = module.TorchAoHfQuantizer
    save = cls.get_state_dict_and_metadata
    if getattr(save, "hfcompress", False):
        return

    @functools.wraps(save)
    def get_state_dict_and_metadata(self: Any, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        tensors, metadata = save(self, model)
        plain = [name for name in tensors if name in metadata]  # the others were taken apart
        names = [name for name in json.loads(metadata["tensor_names"]) if name not in plain]
        kept = {name: value for name, value in metadata.items() if name not in plain}
        return tensors, kept | {"tensor_names": json.dumps(names)}

    get_state_dict_and_metadata.hfcompress = True  # type: ignore[attr-defined]
    cls.get_state_dict_and_metadata = get_state_dict_and_metadata
    _forget_one_way_steps(cls)


def patch_bitsandbytes_quantizer(module: ModuleType) -> None:
    """Let models that were loaded with bitsandbytes be saved again, in place.

    Args:
        module: `transformers.quantizers.quantizer_bnb_4bit` or `transformers.quantizers.quantizer_bnb_8bit`.
    """
    for name in ("Bnb4BitHfQuantizer", "Bnb8BitHfQuantizer"):
        if hasattr(module, name):
            _forget_one_way_steps(getattr(module, name))


def _forget_one_way_steps(cls: Any) -> None:
    """After loading, leave no step of it to be turned round when the model is saved which cannot be: what it made saves itself."""
    finish = cls._process_model_after_weight_loading
    if getattr(finish, "hfcompress", False):
        return

    @functools.wraps(finish)
    def process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(type(step).__name__ in _ONE_WAY for step in getattr(conversion, "operations", ()))
        ]
        return finish(self, model, **kwargs)

    process_model_after_weight_loading.hfcompress = True  # type: ignore[attr-defined]
    cls._process_model_after_weight_loading = process_model_after_weight_loading


def patch_torchao_loading(module: ModuleType) -> None:
    """Let models without one table of input embeddings be quantized, in place.

    Args:
        module: `transformers.integrations.torchao`.
    """
    cls = module.TorchAoQuantize
    convert = cls.convert
    if getattr(convert, "hfcompress", False):
        return

    @functools.wraps(convert)
    def convert_any(self: Any, input_dict: Any, model: Any = None, **kwargs: Any) -> Any:
        try:
            model.get_input_embeddings()
        except NotImplementedError:
            model.get_input_embeddings = lambda: None
            try:
                return convert(self, input_dict, model=model, **kwargs)
            finally:
                del model.get_input_embeddings
        return convert(self, input_dict, model=model, **kwargs)

    convert_any.hfcompress = True  # type: ignore[attr-defined]
    cls.convert = convert_any


def patch_bitsandbytes(module: ModuleType) -> None:
    """Switch the repacking of 4-bit weights off and read weights of any width right, in place; a no-op where not needed.

    The source of this function travels with 4-bit checkpoints, so it uses nothing from outside.

    Args:
        module: `bitsandbytes.nn.modules`.
    """
    import copy
    import functools
    import sys

    import bitsandbytes.autograd._functions as autograd
    from bitsandbytes import functional

    if hasattr(module, "has_avx512bf16"):
        setattr(module, "has_avx512bf16", lambda: False)  # noqa: B010
    read, multiply = functional.dequantize_4bit, autograd.matmul_4bit
    if getattr(read, "hfcompress", False):
        return

    def is_misread(tensor, state):  # type: ignore[no-untyped-def]
        # Blocks run on from row to row; the CPU kernel starts a new one in each.
        return tensor.device.type == "cpu" and len(state.shape) == 2 and state.shape[1] % state.blocksize != 0

    @functools.wraps(read)
    def dequantize_4bit(A, quant_state=None, absmax=None, out=None, **kwargs):  # type: ignore[no-untyped-def]
        if quant_state is None or out is not None or not is_misread(A, quant_state):
            return read(A, quant_state, absmax, out, **kwargs)
        flat = copy.copy(quant_state)
        flat.shape = type(quant_state.shape)([quant_state.shape.numel()])  # one long row
        weight = read(A.reshape(-1, 1), flat, **kwargs).reshape(quant_state.shape)
        return weight.t() if A.shape[0] == 1 else weight

    @functools.wraps(multiply)
    def matmul_4bit(A, B, quant_state, out=None, bias=None):  # type: ignore[no-untyped-def]
        packed = getattr(quant_state, "packing_format_for_cpu", False)
        if packed or not is_misread(A, quant_state) or A.shape[-1] != quant_state.shape[1]:
            return multiply(A, B, quant_state, out=out, bias=bias)
        weight = dequantize_4bit(B.detach().reshape(-1, 1), quant_state).to(A.dtype)
        product = A @ weight.t() if bias is None else A @ weight.t() + bias
        return product if out is None else out.copy_(product)

    dequantize_4bit.hfcompress = True  # type: ignore[attr-defined]
    functional.dequantize_4bit, autograd.matmul_4bit = dequantize_4bit, matmul_4bit
    if hasattr(sys.modules["bitsandbytes"], "matmul_4bit"):
        sys.modules["bitsandbytes"].matmul_4bit = matmul_4bit  # type: ignore[attr-defined]
