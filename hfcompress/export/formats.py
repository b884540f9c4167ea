"""The forms a model can be exported to, and what each needs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Literal

Runtime = Literal["onnxruntime", "openvino"]


@dataclass(frozen=True)
class Format:
    """One form of an exported model.

    Attributes:
        name: What it is called.
        runtime: The package that runs it.
        packages: What has to be installed to make it.
        int8: Whether weights are stored in 8 bits.
        calibrated: Whether it needs examples, because the ranges of activations are fixed beforehand.
        saves_time: Whether 8-bit arithmetic is used, so that int8 is faster; otherwise it saves memory.
        summary: In a few words.
    """

    name: str
    runtime: Runtime
    packages: tuple[str, ...]
    int8: bool
    calibrated: bool
    saves_time: bool
    summary: str

    @property
    def model_file(self) -> str:
        """The file that the runtime opens."""
        return "model.onnx" if self.runtime == "onnxruntime" else "openvino_model.xml"


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("onnx", "onnxruntime", _ONNX, False, False, False, "float32"),
        Format("onnx-int8", "onnxruntime", _ONNX, True, False, True, "int8, activations measured as they come"),
        Format("onnx-int8-static", "onnxruntime", _ONNX, True, True, True, "int8, activations calibrated"),
        Format("openvino", "openvino", ("openvino",), False, False, False, "float32"),
        Format("openvino-int8-weights", "openvino", ("openvino", "nncf"), True, False, False, "int8 weights alone"),
        Format("openvino-int8", "openvino", ("openvino", "nncf"), True, True, True, "int8, activations calibrated"),
    )
}


class ExportError(ValueError):
    """A model cannot be exported, or what came out is not what it should be."""


def find_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ExportError: There is none of this name.

    Example:
        >>> find_format("openvino-int8").calibrated
        True
    """
    if name not in FORMATS:
        raise ExportError(f"no format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def require_packages(names: tuple[str, ...]) -> None:
    """Refuse to begin without what is needed; see that nothing reports home.

    Raises:
        ImportError: A package is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export needs {', '.join(missing)}, not installed here: pip install 'hfcompress[export]'")
    # OpenVINO and NNCF report each use over the network through this package, and do without it where it is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
