"""Models for CPUs: ONNX and OpenVINO graphs, in float and in int8, that run without torch."""

from hfcompress.export.exporting import Export, export_formats, export_model
from hfcompress.export.formats import FORMATS, ExportError, Format
from hfcompress.export.running import ExportedModel

__all__ = ["FORMATS", "Export", "ExportError", "ExportedModel", "Format", "export_formats", "export_model"]
