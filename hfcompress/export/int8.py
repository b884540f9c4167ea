"""Float graphs to int8, by the libraries that run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hfcompress.export.formats import Format
from hfcompress.export.graphs import only_errors

Arrays = dict[str, np.ndarray]


def calibration_arrays(batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Arrays]:
    """What a graph reads of each batch, in the batches' order; without padding columns that no row of a batch uses.

    Example:
        >>> batch = {"input_ids": [[5, 6, 0]], "attention_mask": [[1, 1, 0]], "labels": [1]}
        >>> calibration_arrays([batch], ["input_ids", "attention_mask"])[0]["input_ids"].tolist()
        [[5, 6]]
    """
    found = []
    for batch in batches:
        arrays = {name: np.asarray(batch[name]) for name in names if name in batch}
        if "token_type_ids" in names and "token_type_ids" not in arrays:
            arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
        mask = arrays.get("attention_mask")
        if mask is not None:
            used = np.flatnonzero(mask.any(axis=0))
            arrays = {name: array[:, used[0] : used[-1] + 1] for name, array in arrays.items()}
        found.append(arrays)
    return found


def quantize_graph(
    source: Path, target: Path, form: Format, *, stays: Sequence[nn.Parameter], calibration: Sequence[Arrays]
) -> None:
    """Write an int8 version of a float graph.

    Args:
        source: The float graph, `.onnx` or `.xml`.
        target: The file to write.
        form: An int8 format of the same runtime.
        stays: Weights that stay in float.
        calibration: Batches; used where the format is calibrated, each of them once.
    """
    quantize = _quantize_onnx if form.runtime == "onnxruntime" else _quantize_openvino
    with only_errors():
        quantize(source, target, form, [weight.detach().numpy() for weight in stays], list(calibration))


def _same(constant: np.ndarray, weights: Sequence[np.ndarray]) -> bool:
    """Whether a constant of a graph is one of some weights, perhaps turned around."""
    turned = [constant, constant.T] if constant.ndim == 2 else [constant]
    return any(one.shape == weight.shape and np.array_equal(one, weight) for one in turned for weight in weights)


def _quantize_onnx(
    source: Path, target: Path, form: Format, stays: list[np.ndarray], calibration: list[Arrays]
) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    graph = onnx.load(source).graph
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer if len(weight.dims) > 1}
    kept = {name for name, array in weights.items() if _same(array, stays)}
    # Dynamic quantization makes MatMuls of Gemms before it looks at names.
    left = [name for node in graph.node if kept & set(node.input) for name in (node.name, f"{node.name}_MatMul")]
    settings: dict[str, Any] = {
        # One scale per tensor turns the logits of MiniLM by 20 degrees.
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        # Tables of embeddings, and products with weights. Products of two activations (attention) and what lies between the layers stay
        # in float: with them in int8 MiniLM loses 13 points.
        "op_types_to_quantize": ["MatMul", "Gemm", "Gather"],
        "nodes_to_exclude": left,
    }
    only_weights = {"MatMulConstBOnly": True}
    if form.calibrated:
        quantize_static(
            source,
            target,
            _Reader(calibration),
            activation_type=QuantType.QUInt8,
            extra_options=only_weights,
            **settings,
        )
    else:
        quantize_dynamic(source, target, extra_options=only_weights, **settings)


class _Reader:
    """What ONNX Runtime takes calibration batches from."""

    def __init__(self, batches: Sequence[Arrays]) -> None:
        self._batches: Iterator[Arrays] = iter(batches)

    def get_next(self) -> Arrays | None:
        """The next batch; None after the last."""
        return next(self._batches, None)


def _quantize_openvino(
    source: Path, target: Path, form: Format, stays: list[np.ndarray], calibration: list[Arrays]
) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    ignored = nncf.IgnoredScope(names=_reading(model, stays), validate=False)
    if form.calibrated:
        model = nncf.quantize(
            model,
            nncf.Dataset(calibration),
            # Attention-aware: what it must not quantize, smooth quantization, symmetric weights per channel. Its defaults were best of eight
            # settings on MiniLM; slower bias correction, other smoothing or none changed nothing that can be told from chance.
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
            ignored_scope=ignored,
        )
    else:
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
    openvino.save_model(model, target, compress_to_fp16=False)


def _reading(model: Any, weights: list[np.ndarray]) -> list[str]:
    """The nodes of an OpenVINO graph that multiply by some weights."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("MatMul", "Convolution"):
            sources = [port.get_source_output().get_node() for port in node.inputs()]
            if any(one.get_type_name() == "Constant" and _same(one.data, weights) for one in sources):
                found.append(node.get_friendly_name())
    return found
