"""Dropout of a student: off while it learns what a teacher says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Everything that a model leaves out at random, it leaves in: hidden states, attention, whole layers and paths; adapters keep theirs.

    The rates are 0 inside and what they were after, so that nothing that is saved outside has changed. Unlike `model.eval()`, all
    else that hangs on the mode of training stays: gradient checkpointing, batch norms, routers.

    Args:
        model: A transformers model. Its rates are found in its dropout layers, in numbers of its modules whose names have "drop" in
            them, and, as some models look there in every forward pass, in those of its configs.

    Example:
        >>> import torch
        >>> layer = nn.Sequential(nn.Dropout(0.5)).train()
        >>> with dropout_off(layer):
        ...     layer(torch.ones(3))
        tensor([1., 1., 1.])
        >>> layer[0].p
        0.5
    """
    rates: list[tuple[object, str, float]] = []
    configs: dict[int, object] = {}
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            continue
        if isinstance(module, _DropoutNd):
            rates.append((module, "p", module.p))
        rates += _rates_of(module)
        if (config := getattr(module, "config", None)) is not None:
            configs[id(config)] = config
    for config in configs.values():
        rates += _rates_of(config)
    try:
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def _rates_of(owner: object) -> list[tuple[object, str, float]]:
    """The numbers above 0 among what an object has, whose names have "drop" in them."""
    found = vars(owner).items() if hasattr(owner, "__dict__") else ()
    return [(owner, name, value) for name, value in found if "drop" in name and isinstance(value, float) and value > 0]
