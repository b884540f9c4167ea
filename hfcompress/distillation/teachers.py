"""The teacher: a frozen model that gives targets for a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Teacher:
    """A live model that is only read: in eval mode, without gradients, never an optimizer's or a wrapper's business.

    Args:
        model: A transformers model, of any precision and on any device.
        label_names: Inputs that are not given to it.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> teacher = Teacher(BertForSequenceClassification(config))
        >>> teacher({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([0])}).logits.shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module, *, label_names: Sequence[str] = ("labels",)) -> None:
        self.model = model.eval().requires_grad_(False)
        parameters = inspect.signature(model.forward).parameters
        self._accepted = None if _takes_anything(parameters) else set(parameters)
        self._withheld = {*label_names, "labels", "num_items_in_batch"}

    @property
    def device(self) -> torch.device:
        """Where its inputs have to be."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move it, in place, unless it is quantized or already spread over devices by a device map."""
        placed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "quantization_method", None)
        if not placed:
            self.model.to(device)  # type: ignore[call-overload]

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Its output for a batch; labels are withheld, and so is what its forward does not take. Inputs stay as they are."""
        given = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
            if name not in self._withheld and (self._accepted is None or name in self._accepted)
        }
        self.model.eval()
        with torch.no_grad():
            return self.model(**given)


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether unknown inputs are passed on; a model that takes keyword arguments still names its real inputs."""
    kinds = {parameter.kind for parameter in parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds and len(parameters) <= 2


@contextmanager
def capture_outputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the outputs of chosen layers while a model runs, without asking the model for all its hidden states.

    Args:
        modules: Number to layer.

    Yields:
        Number to the layer's hidden states, shape (batch, length, hidden), filled by the forward pass.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with capture_outputs({7: layer}) as captured:
        ...     _ = layer(torch.zeros(1, 4, 2))
        >>> captured[7].shape
        torch.Size([1, 4, 3])
    """
    captured: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            captured[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
