"""Looking at a model without touching it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without trained parameters; afterwards every module and parameter is as it was.

    Gradients of activations need no gradients of weights, which would cost as much time again.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval())
        >>> with frozen(model):
        ...     model.training, model[0].weight.requires_grad
        (False, False)
        >>> model.training, model[1].training, model[0].weight.requires_grad
        (True, False, True)
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
