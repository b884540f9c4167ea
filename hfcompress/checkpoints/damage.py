"""Folders that are damaged or made to do harm: what transformers would trip over, or take gigabytes for, is said in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from hfcompress.anatomy import StructureError

# transformers looks at few of the values in config.json before it computes with them.
_TRIPS = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, NotImplementedError, RecursionError)

_MOST_LAYERS = 1_000


@contextlib.contextmanager
def damage_named(source: str | Path) -> Iterator[None]:
    """Errors about the contents of a folder or repository as one line that names it.

    Raises:
        StructureError: transformers or safetensors could not make sense of what is there.

    Example:
        >>> with damage_named("./student"):
        ...     [][3]
        Traceback (most recent call last):
        ...
        hfcompress.anatomy.sites.StructureError: ./student: config.json or another of its files says something impossible (IndexError: list index out of range); save the model again
    """
    try:
        yield
    except SafetensorError as error:
        raise StructureError(
            f"{source}: its weights are damaged ({_first_line(error)}); fetch or save the model again"
        ) from error
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise StructureError(f"{source}: config.json is not valid: {said[:300]}; save the model again") from error
    except _TRIPS as error:
        raise StructureError(
            f"{source}: config.json or another of its files says something impossible ({type(error).__name__}: {_first_line(error)}); "
            "save the model again"
        ) from error
    except (ValueError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise StructureError(
                f"{source}: its weights do not have the shapes that its config.json says; save the model again"
            ) from error
        if len(str(error).strip().splitlines()) > 1:
            raise StructureError(f"{source} cannot be read: {_first_line(error)}") from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def require_few_layers(source: str | Path, values: Mapping[str, Any]) -> None:
    """Refuse a config with more layers than any model has: transformers makes lists of them as soon as it reads it.

    Args:
        source: Where it is.
        values: The content of config.json.

    Raises:
        StructureError: There are too many.
    """
    for part in (values, *(inner for inner in values.values() if isinstance(inner, Mapping))):
        for name, value in part.items():
            if "layer" in str(name) and isinstance(value, int | float) and value > _MOST_LAYERS:
                raise StructureError(
                    f"{source}: {name} in config.json is {value:,}; at most {_MOST_LAYERS:,} are read; save the model again"
                )


def require_room(folder: Path, cls: Any, config: Any) -> None:
    """Refuse a config that asks for much more than the weights in its folder can fill, before any memory is taken for it.

    Args:
        folder: Of a model; one without weights in safetensors is passed over.
        cls: The class that is going to be loaded.
        config: Its config.

    Raises:
        StructureError: There are more layers than tensors, or more parameters than bytes (bits, where weights are quantized).
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return
    tensors = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors += len(opened.keys())
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise StructureError(f"{folder}: config.json says {layers:,} layers, but there are only {tensors:,} tensors")
    with torch.device("meta"):
        model = cls._from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size_bytes = sum(file.stat().st_size for file in files)
    most = size_bytes * (8 if getattr(config, "quantization_config", None) is not None else 1)
    if parameters > most:
        raise StructureError(
            f"{folder}: config.json says {parameters:,} parameters, but the weights are {size_bytes:,} bytes; save the model again"
        )


def require_complete(source: str | Path, missing: list[str] | set[str]) -> None:
    """Refuse a model some of whose weights were not in its files: transformers fills them in at random.

    Raises:
        StructureError: There are such.
    """
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise StructureError(f"{source}: the weights {names[0]}{more} are missing in its files; save the model again")
