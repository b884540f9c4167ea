"""An exported folder, run by its own runtime with a fixed number of threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import ModelOutput

from hfcompress.export.formats import ExportError, find_format, require_packages
from hfcompress.export.graphs import only_errors

EXPORT_FILE = "export.json"


class ExportedModel(nn.Module):
    """A folder that `export_model` wrote, called like the model it came from.

    It is a module without weights, so that what scores and times models, such as `measurement.compare_latency`, takes it as it is.

    Args:
        folder: The folder.
        threads: CPU threads of the runtime; None leaves that to it. It cannot be changed later.

    Attributes:
        config: The model's config.
        format: The `Format`.
        input_names: What the graph takes.
        output_names: What it gives.

    Raises:
        ExportError: The folder holds no export.
        ImportError: Its runtime is not installed.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        super().__init__()
        folder = Path(folder)
        if not (folder / EXPORT_FILE).is_file():
            raise ExportError(f"{folder} holds no {EXPORT_FILE}; give a folder that hfcompress export wrote")
        facts = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
        self.format = find_format(facts["format"])
        self.config = AutoConfig.from_pretrained(folder)
        self.main_input_name = facts["inputs"][0]
        # Where callers look for the device; nothing is computed with it.
        self._place = nn.Parameter(torch.empty(0), requires_grad=False)
        require_packages((self.format.runtime,))
        self._run: _Session = (_Onnx if self.format.runtime == "onnxruntime" else _OpenVINO)(
            folder / self.format.model_file, threads
        )
        self.input_names, self.output_names = self._run.inputs, self._run.outputs
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of pixels and outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def forward(self, **inputs: Any) -> ModelOutput:
        """Run it.

        Args:
            **inputs: Tensors or arrays by name, as for the original model. Without `attention_mask` nothing is padding, without
                `token_type_ids` all is the first segment; what the graph does not take is left out.

        Returns:
            Tensors by name, as from the original model.

        Raises:
            ExportError: An input is missing.
        """
        arrays = {name: np.asarray(inputs[name]) for name in self.input_names if inputs.get(name) is not None}
        for name, fill in (("attention_mask", np.ones_like), ("token_type_ids", np.zeros_like)):
            if name in self.input_names and name not in arrays and "input_ids" in arrays:
                arrays[name] = fill(arrays["input_ids"])
        missing = [name for name in self.input_names if name not in arrays]
        if missing:
            raise ExportError(f"the exported model needs {', '.join(missing)}; it takes {', '.join(self.input_names)}")
        found = self._run(arrays)
        return ModelOutput({name: torch.from_numpy(found[name]) for name in self.output_names})


class _Session:
    """A graph in a runtime."""

    inputs: list[str]
    outputs: list[str]

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise NotImplementedError


class _Onnx(_Session):
    def __init__(self, path: Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [port.name for port in self.session.get_inputs()]
        self.outputs = [port.name for port in self.session.get_outputs()]

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.session.run(None, arrays), strict=True))


class _OpenVINO(_Session):
    def __init__(self, path: Path, threads: int | None) -> None:
        with only_errors():
            import openvino

        # By default floats are computed in bfloat16 where the CPU has it, which is not what was exported.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self.compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.inputs = [port.get_any_name() for port in self.compiled.inputs]
        self.outputs = [port.get_any_name() for port in self.compiled.outputs]

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The arrays of a request are overwritten by the next one.
        found = self.request.infer(arrays, share_inputs=True, share_outputs=False)
        return {name: found[position] for position, name in enumerate(self.outputs)}
