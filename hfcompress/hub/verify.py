"""Does a saved folder load, by every way its card promises, in a fresh process, with the same outputs?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from hfcompress.checkpoints.adapters import ADAPTER_FILE, base_of, read_config
from hfcompress.checkpoints.io import load
from hfcompress.checkpoints.record import needs_building
from hfcompress.measurement import example_inputs

PROBE_FILE = "hfcompress_probe.safetensors"
_CHILD = Path(__file__).with_name("_load_by_route.py")

ROUTES = {
    "load": "hfcompress.load",
    "auto": "import hfcompress, then the Auto class",
    "remote": "the Auto class with trust_remote_code=True, without hfcompress",
    "plain": "the Auto class alone, without hfcompress",
    "peft": "import hfcompress, then peft's PeftModel on the model that the adapter belongs to",
}


class VerificationError(ValueError):
    """A saved folder does not load as it should."""


@dataclass(frozen=True)
class RouteCheck:
    """What came out of loading by one route.

    Attributes:
        route: A key of `ROUTES`.
        ok: Whether it loaded and its outputs were close enough.
        difference: Largest absolute difference to the outputs when it was saved; None if it did not load.
        tolerance: What is close enough.
        error: Last line of what went wrong.
    """

    route: str
    ok: bool
    difference: float | None
    tolerance: float
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def save_probe(model: nn.Module, folder: str | Path) -> None:
    """Run a model on two small made-up examples and keep inputs and outputs in its folder, for `verify_folder`.

    Args:
        model: The model as it was saved; its mode is restored.
        folder: Where it was saved.
    """
    was_training = model.training
    model.eval()
    inputs = _probe_inputs(model)
    with torch.no_grad():
        outputs = probe_outputs(model(**inputs))
    model.train(was_training)
    tensors = {f"input.{name}": value.cpu().contiguous() for name, value in inputs.items()}
    tensors["output"] = outputs.float().cpu().contiguous()
    metadata = {"device": next(model.parameters()).device.type}
    safetensors.torch.save_file(tensors, Path(folder) / PROBE_FILE, metadata=metadata)


def _probe_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    config: Any = model.config
    kind = getattr(model, "main_input_name", "input_ids")
    if kind in ("pixel_values", "input_values"):
        return example_inputs(model, batch=2)
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None) or 24
    inputs = example_inputs(model, batch=2, length=min(12, positions // 2))
    if "decoder_input_ids" in inputs:  # a few words to begin with
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :4].contiguous()
    return inputs


PREDICTIONS = ("logits", "start_logits", "logits_per_image", "last_hidden_state")


def probe_outputs(outputs: Any) -> torch.Tensor:
    """What is compared: logits (of language models only the last position), or the last hidden state."""
    values = next(outputs[name] for name in PREDICTIONS if name in outputs)
    return values[:, -1] if values.dim() == 3 and values.shape[-1] > 1000 else values


def routes_of(folder: str | Path) -> list[str]:
    """The routes by which a folder should load, from what its config says."""
    config = read_config(folder)
    if _is_adapter(Path(folder)):
        return ["load", "auto", *([] if is_4bit(config) or needs_building(config) else ["plain"]), "peft"]
    if not needs_building(config):
        # Without our guard bitsandbytes reads 4-bit weights of some widths wrong on CPUs, so that is not promised.
        return ["load", "auto"] if is_4bit(config) or is_packed(config) else ["load", "auto", "plain"]
    return ["load", "auto"] if is_packed(config) else ["load", "auto", "remote"]


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file()


def is_4bit(config: Any) -> bool:
    """Whether a config says that its weights are stored in 4 bits by bitsandbytes."""
    return bool(_quantization(config, "load_in_4bit"))


def is_packed(config: Any) -> bool:
    """Whether a config says that hfcompress packed its weights: without hfcompress nothing reads them."""
    return bool(_quantization(config, "quant_method") == "hfcompress")


def is_torchao(config: Any) -> bool:
    """Whether a config says that its weights are torchao's."""
    return bool(_quantization(config, "quant_method") == "torchao")


def _quantization(config: Any, name: str) -> Any:
    settings = getattr(config, "quantization_config", None)
    return settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)


def require_saved(folder: str | Path) -> None:
    """Refuse a folder that holds neither a model nor an adapter, without loading anything.

    Raises:
        FileNotFoundError: It does not.
    """
    if not (Path(folder) / "config.json").is_file() and not _is_adapter(Path(folder)):
        raise FileNotFoundError(f"{folder} holds no config.json; give a folder that save_pretrained wrote")


def verify_folder(
    folder: str | Path, *, routes: Sequence[str] | None = None, timeout_s: float = 900
) -> list[RouteCheck]:
    """Load a folder in fresh processes, with and without hfcompress, and compare outputs with those kept at saving.

    Args:
        folder: A folder that `save_pretrained` wrote, of a model or of an adapter. Without a probe in it, one is made by loading it here first.
        routes: Which ones; None means all that should work.
        timeout_s: Longest time for a process.

    Returns:
        One check per route.

    Raises:
        OSError: There is no such folder, or nothing in it can be loaded.
    """
    folder = Path(folder).resolve()
    require_saved(folder)
    if not (folder / PROBE_FILE).is_file():
        save_probe(load(folder), folder)
    routes = routes_of(folder) if routes is None else routes
    without = ("remote", "plain")
    groups = [[r for r in routes if r not in without], [r for r in routes if r in without]]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda group: _run_child(folder, group, timeout_s), [group for group in groups if group])
        checks = [check for group in found for check in group]
    return sorted(checks, key=lambda check: list(ROUTES).index(check.route))


def _run_child(folder: Path, routes: list[str], timeout_s: float) -> list[RouteCheck]:
    tolerance = _tolerance(folder)
    with tempfile.TemporaryDirectory() as scratch:
        # Started by path and from an empty folder, so that nothing but what is installed can be imported.
        code = f"import runpy; runpy.run_path({str(_CHILD)!r}, run_name='__main__')"
        settings = {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        arguments = [sys.executable, "-c", code, str(folder), json.dumps(routes), f"{scratch}/out.json"]
        environment = {k: v for k, v in os.environ.items() if k not in _PER_PROCESS} | settings
        try:
            done = subprocess.run(
                arguments, cwd=scratch, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            reason = f"took longer than {timeout_s:g} s"
            return [RouteCheck(route, False, None, tolerance, reason) for route in routes]
        path = Path(scratch) / "out.json"
        if not path.is_file():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return [RouteCheck(route, False, None, tolerance, last) for route in routes]
        found = json.loads(path.read_text(encoding="utf-8"))
    return [_judge(route, found[route], tolerance) for route in routes]


# A child of a process started by torchrun must not believe that it belongs to the group.
_PER_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def _judge(route: str, found: dict[str, Any], tolerance: float) -> RouteCheck:
    if found.get("error"):
        return RouteCheck(route, False, None, tolerance, found["error"])
    difference = float(found["difference"])
    good = difference <= tolerance
    return RouteCheck(route, good, difference, tolerance, None if good else "outputs differ from those at saving")


def _tolerance(folder: Path) -> float:
    """1e-5 in float32; coarser where kernels of other batch shapes or devices round differently."""
    base = Path(base_of(folder) or folder) if _is_adapter(folder) else folder
    if not (base / "config.json").is_file():
        return 1e-2  # on the Hub
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    plain = config.get("dtype", "float32") == "float32" and not config.get("quantization_config")
    return 1e-5 if plain else 1e-2


def require_loadable(folder: str | Path) -> list[RouteCheck]:
    """`verify_folder`, and an error if any route fails.

    Raises:
        VerificationError: One line that names route and reason.
    """
    checks = verify_folder(folder)
    for check in checks:
        if not check.ok:
            raise VerificationError(
                f"{folder} does not load through {ROUTES[check.route]}: {check.error} (difference {check.difference}, "
                f"allowed {check.tolerance}); nothing was pushed"
            )
    return checks
