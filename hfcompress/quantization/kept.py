"""What was rounded already, kept in a folder: a long run that is stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hfcompress.calibration import Batch
from hfcompress.checkpoints.grids import Grid
from hfcompress.quantization.formats import NestedGrid, Rounded, format_of

_PLAN_FILE = "plan.json"


class KeptLayers:
    """Rounded layers in a folder, one file for each transformer layer.

    Args:
        folder: Where; it is made if it is not there.
        weights: Of the model that is rounded, by name, in the order of the names.
        batches: What it is rounded on.
        settings: Everything else that the result follows from.

    Raises:
        ValueError: The folder holds another run's layers, or something else.
    """

    def __init__(
        self,
        folder: str | Path,
        weights: Iterable[tuple[str, torch.Tensor]],
        batches: Sequence[Batch],
        settings: Mapping[str, Any],
    ) -> None:
        self.folder = Path(folder)
        plan = {
            "model": _digest(weights),
            "batches": _digest(*(sorted(batch.items()) for batch in batches)),
            **settings,
        }
        path = self.folder / _PLAN_FILE
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(plan)):
                raise ValueError(
                    f"{folder} holds layers of another model, data or format; give another folder, or empty it"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{folder} is not empty; give another folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, lambda at: at.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8"))

    def read(self, step: int, device: torch.device) -> dict[str, Rounded] | None:
        """The layers of a step, or None if they were not written (or not to the end)."""
        found: dict[str, Rounded] = {}
        try:
            with safe_open(self._path(step), framework="pt") as file:  # type: ignore[no-untyped-call]
                facts = json.loads(file.metadata()["layers"])
                for name, fact in facts.items():
                    parts = {key: file.get_tensor(f"{name}.{key}").to(device) for key in fact["tensors"]}
                    form = format_of(fact["format"])
                    codes = parts.pop("codes")
                    found[name] = Rounded.of(form, form.as_read(_grid(parts, fact)), codes)
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return found

    def write(self, step: int, rounded: Mapping[str, Rounded]) -> None:
        """Keep the layers of a step."""
        tensors: dict[str, torch.Tensor] = {}
        facts = {}
        for name, layer in rounded.items():
            grid = layer.grid
            scale = grid.whole_scale if isinstance(grid, NestedGrid) else grid.scale
            parts = {"codes": layer.codes, "levels": grid.levels, "scale": scale}
            if grid.offset is not None:
                parts["offset"] = grid.offset
            tensors |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in parts.items()}
            facts[name] = {
                "format": layer.format.name,
                "tensors": sorted(parts),
                "grid": {"block_size": grid.block_size, "shape": list(grid.shape), "uniform": grid.uniform},
            }
        metadata = {"layers": json.dumps(facts)}
        _write(self._path(step), lambda at: save_file(tensors, at, metadata=metadata))

    def _path(self, step: int) -> Path:
        return self.folder / f"layer-{step:04d}.safetensors"


def _grid(parts: Mapping[str, torch.Tensor], fact: Mapping[str, Any]) -> Grid:
    outputs, inputs = fact["grid"]["shape"]
    return Grid(
        parts["levels"],
        parts["scale"],
        parts.get("offset"),
        fact["grid"]["block_size"],
        (outputs, inputs),
        fact["grid"]["uniform"],
    )


def _write(path: Path, write: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    write(part)
    os.replace(part, path)


def _digest(*groups: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        for name, value in group:
            if isinstance(value, torch.Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
