"""A saved model to a folder that runs without torch."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

from hfcompress.checkpoints.io import load
from hfcompress.checkpoints.record import read_steps
from hfcompress.checkpoints.staging import is_empty, require_writable, staged_folder
from hfcompress.export.checking import Check, check_inputs, check_outputs, require_equal
from hfcompress.export.example import write_example, write_readme
from hfcompress.export.families import check_exportable, outside_weights, reads_text
from hfcompress.export.formats import ExportError, Format, find_format, require_packages
from hfcompress.export.graphs import only_errors, write_graph
from hfcompress.export.int8 import calibration_arrays, quantize_graph
from hfcompress.export.running import EXPORT_FILE, ExportedModel

logger = logging.getLogger(__name__)
_CHECKED_BATCHES = 16


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: Where.
        format: In which form.
        check: How near its outputs are to torch's.
        size_bytes: Of the graph with its weights.
        calibration_n: Examples that the ranges of activations were taken from; 0 where none are.
    """

    folder: Path
    format: Format
    check: Check
    size_bytes: int
    calibration_n: int


def export_model(
    path_or_repo: str | Path, folder: str | Path, *, format: str, batches: Sequence[Mapping[str, Any]] | None = None
) -> Export:
    """Export a saved encoder, pruned or not, to a folder that runs without torch and transformers.

    In the folder: the graph, `config.json`, the tokenizer or image processor, `example.py`, `README.md` and `export.json`. It is there only
    once its outputs, computed by its own runtime, were found to be those of torch.

    Args:
        path_or_repo: A folder that `save_pretrained` wrote, or a repository on the Hub.
        folder: Folder to write; it must be empty or not exist.
        format: "onnx", "onnx-int8", "onnx-int8-static", "openvino", "openvino-int8-weights" or "openvino-int8".
        batches: Inputs for calibration, needed by "onnx-int8-static" and "openvino-int8": a few hundred examples like those that the model is
            for, labels or not; exactly these are used, without padding columns. Other formats are compared with torch on them.

    Returns:
        What was written.

    Raises:
        ExportError: The model is no encoder of texts or images, calibration data are missing, the outputs differ, or the folder is not empty.
        ImportError: A package is missing.
        OSError: There is no such model.
    """
    return export_formats(path_or_repo, {format: folder}, batches=batches)[format]


def export_formats(
    path_or_repo: str | Path,
    folders: Mapping[str, str | Path],
    *,
    batches: Sequence[Mapping[str, Any]] | None = None,
    model: nn.Module | None = None,
    say: Callable[[str], None] = logger.info,
) -> dict[str, Export]:
    """Like `export_model`, for several formats; what they share is traced once.

    Args:
        path_or_repo: As for `export_model`.
        folders: Folders by format.
        batches: As for `export_model`.
        model: The model, if it was loaded before.
        say: Told what is being done.

    Returns:
        What was written, by format. What was finished before an error stays.

    Raises:
        ExportError: As for `export_model`.
    """
    forms = [find_format(name) for name in folders]
    for form in forms:
        require_packages(form.packages)
        if form.calibrated and not batches:
            raise ExportError(f"{form.name} fixes the ranges of activations by examples; give calibration data")
    for folder in map(Path, folders.values()):
        if not is_empty(folder):
            raise ExportError(f"{folder} is not empty; give another folder")
        require_writable(folder)
    loaded: Any = load(path_or_repo) if model is None else model
    check_exportable(loaded)
    loaded = loaded.float().cpu().eval()
    done: dict[str, Export] = {}
    with tempfile.TemporaryDirectory() as scratch:
        graphs: dict[str, Path] = {}
        for form in forms:
            if form.runtime not in graphs:
                say(f"Tracing for {form.runtime}")
                (Path(scratch) / form.runtime).mkdir()
                graphs[form.runtime] = write_graph(loaded, form.runtime, Path(scratch) / form.runtime)
            say(f"Writing and checking {form.name}")
            graph, target = graphs[form.runtime], Path(folders[form.name]).absolute()
            done[form.name] = _export(loaded, path_or_repo, graph, target, form, list(batches or ()))
    return done


def _export(
    model: Any, source: str | Path, graph: Path, target: Path, form: Format, batches: list[Mapping[str, Any]]
) -> Export:
    with staged_folder(target) as folder:
        inputs = check_inputs(model, batches[:: -(-len(batches) // _CHECKED_BATCHES) or 1])
        calibration = calibration_arrays(batches, list(inputs[-1])) if form.calibrated else []
        if form.int8:
            quantize_graph(graph, folder / form.model_file, form, stays=outside_weights(model), calibration=calibration)
        else:
            for file in graph.parent.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        calibration_n = sum(len(next(iter(arrays.values()))) for arrays in calibration)
        facts: dict[str, Any] = {
            "format": form.name,
            "runtime": form.runtime,
            "inputs": list(inputs[-1]),
            "source": Path(source).resolve().name if Path(source).is_dir() else str(source),
            "steps": [step.get("step") for step in read_steps(model.config)],
            "calibration_n": calibration_n,
            "size_bytes": size_bytes,
            "versions": {
                name: importlib.metadata.version(name)
                for name in (*form.packages, "torch", "transformers", "hfcompress")
            },
        }
        if form.runtime == "onnxruntime":
            facts["opset"] = _opset(folder / form.model_file)
        _write_json(folder / EXPORT_FILE, facts)
        model.config.save_pretrained(folder)
        exported = ExportedModel(folder, threads=1)
        check = check_outputs(model, exported, inputs)
        require_equal(check, exported)
        _write_json(folder / EXPORT_FILE, facts | {"check": check.to_dict()})
        processor = _save_processor(model, source, folder)
        example = write_example(folder, form, model, processor)
        write_readme(folder, facts, check, example=example)
        del exported  # Windows does not move what is open
    return Export(target, form, check, size_bytes, calibration_n)


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _opset(path: Path) -> int:
    import onnx

    return next(entry.version for entry in onnx.load(path).opset_import if entry.domain in ("", "ai.onnx"))


def _save_processor(model: nn.Module, source: str | Path, folder: Path) -> Any:
    """Put the tokenizer or image processor into the folder; None if there is none."""
    kind = AutoTokenizer if reads_text(model) else AutoImageProcessor
    try:
        with only_errors():
            processor = kind.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    processor.save_pretrained(folder)
    return processor
