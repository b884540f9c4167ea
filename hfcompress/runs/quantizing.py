"""Quantizing a saved model on sample data: rounded layer by layer, saved, loaded again by every way, with a card."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hfcompress.calibration import stream_layers
from hfcompress.checkpoints.io import load
from hfcompress.config import DataConfig
from hfcompress.hub import save_probe, verify_folder, write_card
from hfcompress.hub.results import RESULTS_FILE
from hfcompress.hub.verify import RouteCheck, VerificationError
from hfcompress.measurement import provenance
from hfcompress.quantization.bits import FLOATS
from hfcompress.quantization.calibrated import round_at_once, round_on_data
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, note_step, put_rounded
from hfcompress.runs.examples import Examples, read_examples
from hfcompress.runs.post_training import lineage_of_folder
from hfcompress.runs.processors import copy_processor

logger = logging.getLogger(__name__)


def quantize_folder(
    source: str,
    output: Path,
    written: str | Mapping[str, str],
    *,
    data: DataConfig | None = None,
    samples: int = 1024,
    skip: tuple[str, ...] = (),
    dtype: Any = None,
    keep: Path | None = None,
    seed: int = 0,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> list[RouteCheck]:
    """Round a saved model's linear layers and save it. Its layers are in memory one at a time, see `stream_layers`.

    Args:
        source: Folder or Hub repository of the model.
        output: Folder to write; it must be empty or not exist.
        written: How the layers are written, see `hfcompress.quantization.formats.format_of`: one format for all, or one for each by
            name; those that are not named, and those in a float type, stay as they are.
        data: Examples to round on; None rounds each weight to the nearest number.
        samples: How many examples.
        skip: Further modules to leave alone, where one format is for all.
        dtype: torch dtype of everything that is not quantized; None is that of the saved model.
        keep: Folder for the layers that are done, so that a run that was stopped goes on; None keeps none.
        seed: Of the choice of examples.
        command: What was typed, for the card.
        say: Told what is being done.

    Returns:
        How it loads by every way.

    Raises:
        ValueError: Something does not fit; nothing was written.
        VerificationError: What was written does not load.
    """
    started = time.perf_counter()
    model: Any = load(source)
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(f"{source} is quantized already; quantize the model it was made from")
    rest = dtype or model.dtype
    formats = _formats(model, written, skip)
    examples: Examples | None = None
    if data is not None:
        examples = read_examples(model, source, data, samples=samples, seed=seed)
        say(f"Rounding {len(formats)} linear layers on {examples.n:,} examples")
    with stream_layers(model.eval()) as streamed:
        if examples is None:
            rounded = round_at_once(model, formats, fit="mse", streamed=streamed)
        else:
            rounded = round_on_data(model, examples.batches, formats, keep=keep, streamed=streamed)
        model.to(rest)
        put_rounded(model, rounded)
    facts = {} if examples is None else {"calibration_n": examples.n}
    note_step(model, rounded, method="nearest" if examples is None else "second order", **facts)
    say(f"Rounded in {time.perf_counter() - started:.0f} s; saving and loading again by every way")
    model.save_pretrained(output)
    save_probe(model, output)
    copy_processor(source, output)
    checks = verify_folder(output)
    failed = [check for check in checks if not check.ok]
    if failed:
        raise VerificationError(f"{output} does not load through {failed[0].route}: {failed[0].error}")
    results: dict[str, Any] = {"rows": [], "name": output.resolve().name, "command": command}
    results["lineage"] = lineage_of_folder(source, data)
    results |= {"wall_s": round(time.perf_counter() - started, 1), **provenance(seed=seed)}
    if data is not None:
        results["data"] = {"name": data.title or data.name or Path(str(data.train)).name, **facts}
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_card(output, base_model=None if Path(source).is_dir() else source, checks=checks)
    return checks


def _formats(model: Any, written: str | Mapping[str, str], skip: tuple[str, ...]) -> dict[str, str]:
    """How each layer that is quantized is written."""
    if isinstance(written, str):
        format_of(written)
        formats = dict.fromkeys(layers_to_quantize(model, skip=skip), written)
    else:
        allowed = set(layers_to_quantize(model))
        formats = {name: form for name, form in written.items() if form not in FLOATS}
        for name, form in formats.items():
            if name not in allowed:
                raise ValueError(f"{name} is no linear layer of {type(model).__name__} that can be quantized")
            format_of(form)
    if not formats:
        raise ValueError("there is no linear layer to quantize")
    return formats


def read_layers(file: str | Path) -> dict[str, str]:
    """The format of each layer, from a file that `hfcompress sensitivity --bits --save` wrote.

    Raises:
        ValueError: It is not such a file.
        OSError: It cannot be read.
    """
    try:
        layers = json.loads(Path(file).read_text(encoding="utf-8"))["layers"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        layers = None
    if not isinstance(layers, dict) or not all(isinstance(value, str) for value in layers.values()):
        raise ValueError(f'{file} does not say how layers are written: {{"layers": {{name: format}}}}')
    return layers
