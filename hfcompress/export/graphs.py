"""From a torch model to a float graph of ONNX or OpenVINO.

transformers' exporters trace and convert. Their quantizers are not used: the versions before 5.20 have none, and which nodes stay in float
is known only once the graph is there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfcompress.export.families import padded_inputs, reads_text
from hfcompress.export.formats import ExportError, Runtime


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """Without progress bars, notes and warnings of the exporting libraries; errors are raised and logged as ever."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnlyBias(nn.Module):
    """What a linear layer without inputs computes: its bias, for every row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.features, self.bias = linear.out_features, linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Of the inputs, shape (..., 0), only the shape is looked at."""
        bias = states.new_zeros(self.features) if self.bias is None else self.bias
        return bias.expand(*states.shape[:-1], self.features)


@contextlib.contextmanager
def without_empty_layers(model: nn.Module) -> Iterator[None]:
    """No tensors without elements while a model is traced: OpenVINO takes their length for the number of rows.

    Where a sublayer was pruned away altogether, what led into it is then not part of the graph.
    """
    empty = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear) and not one.in_features]
    try:
        for name, linear in empty:
            model.set_submodule(name, OnlyBias(linear))
        yield
    finally:
        for name, linear in empty:
            model.set_submodule(name, linear)


def write_graph(model: nn.Module, runtime: Runtime, folder: Path) -> Path:
    """Trace a model with free numbers of rows and tokens, and write its graph in 32 bits.

    Args:
        model: In evaluation mode, in 32 bits, on the CPU.
        runtime: What shall run it.
        folder: Where to put `model.onnx`, or `openvino_model.xml` and `.bin`.

    Returns:
        The file to open.

    Raises:
        ExportError: The graph is too large for one ONNX file.
    """
    inputs = padded_inputs(model, batch=2, length=16)
    free = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    if reads_text(model):
        free = {name: {**axes, 1: torch.export.Dim.AUTO} for name, axes in free.items()}
    write = _write_onnx if runtime == "onnxruntime" else _write_openvino
    with only_errors(), torch.no_grad(), without_empty_layers(model):
        return write(model, inputs, free, folder)


def _write_onnx(model: Any, inputs: dict[str, torch.Tensor], free: dict[str, Any], folder: Path) -> Path:
    import onnx
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, dynamic_shapes=free))
    program = getattr(exported, "program", exported)  # transformers before 5.20 returns the program itself
    proto = onnx_ir.to_proto(getattr(program, "model", program))
    if proto.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise ExportError(f"{type(model).__name__} has more than the 2 GB of one ONNX file; use an openvino format")
    # The optimizer turns weights around and leaves their old shapes behind, which shape inference then stumbles over.
    weights = {weight.name for weight in proto.graph.initializer}
    known = [info for info in proto.graph.value_info if info.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(known)
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def _write_openvino(model: Any, inputs: dict[str, torch.Tensor], free: dict[str, Any], folder: Path) -> Path:
    import openvino
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    exported = OpenVINOExporter().export(model, inputs, config=OpenVINOConfig(dynamic=True, dynamic_shapes=free))
    path = folder / "openvino_model.xml"
    openvino.save_model(getattr(exported, "program", exported), path, compress_to_fp16=False)
    return path
