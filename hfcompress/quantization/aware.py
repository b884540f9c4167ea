"""Training with the weights that will be written: rounded in each forward pass, whole underneath."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration import linear_weight, set_linear_weight
from hfcompress.quantization.fitting import Fit
from hfcompress.quantization.formats import Format, Rounded, format_of

_COARSE = 4  # bits; below, a range that reaches to the largest weight loses more than one that does not


def training_fit(form: Format) -> Fit:
    """How grids are fitted in each step of training.

    Example:
        >>> training_fit(format_of("int2-asym")), training_fit(format_of("nf4"))
        ('normal', 'min-max')
    """
    coarse = form.scheme.uniform or form.scheme.kind == "binary"
    return "normal" if coarse and form.scheme.bits < _COARSE else "min-max"


class _StraightThrough(torch.autograd.Function):
    """Rounds; the gradient does not notice."""

    @staticmethod
    def forward(_ctx: Any, weight: torch.Tensor, form: Format) -> torch.Tensor:
        whole = weight.float()
        return form.fit(whole, fit=training_fit(form)).snap(whole).to(weight.dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _rounded(weight: torch.Tensor, form: Format | None) -> torch.Tensor:
    """A weight, shape (outputs, inputs), rounded; its gradient is passed on as it is (straight-through: Bengio et al. 2013)."""
    if form is None or weight.numel() == 0:
        return weight
    rounded: torch.Tensor = _StraightThrough.apply(weight, form)
    return rounded


class AwareLinear(nn.Linear):
    """A linear layer that multiplies with its rounded weights.

    It has no state of its own, and its parameters are those of the plain layer: a checkpoint is that of the plain model.
    """

    form: Format | None  # how the weight will be written; None leaves it whole

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs times the rounded weights, plus bias."""
        return F.linear(inputs, _rounded(self.weight, self.form), self.bias)


class AwareConv1D(Conv1D):
    """The same for transformers' Conv1D."""

    form: Format | None  # how the weight will be written; None leaves it whole

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs times the rounded weights, plus bias."""
        return F.linear(inputs, _rounded(self.weight.T, self.form), self.bias)


_AWARE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AwareLinear, Conv1D: AwareConv1D}


def make_aware(model: nn.Module, formats: Mapping[str, str | None]) -> None:
    """Let linear layers of a model multiply with rounded weights from now on, in place.

    Parameters, their names and what is saved stay as they are. Called again, it changes the formats.

    Args:
        model: The model.
        formats: Name of a linear layer to how it will be written (see `format_of`); None for not yet.

    Raises:
        ValueError: A layer is not a plain linear layer, or the format has no numbers before the weights are known (codebooks).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> make_aware(model, {"0": "ternary"})
        >>> x = torch.randn(2, 8)
        >>> len({round(abs(float(w)), 4) for w in (model(torch.eye(8)) - model[0].bias).flatten()}) <= 2
        True
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias']
    """
    for name, written in formats.items():
        module = model.get_submodule(name)
        form = None if written is None else format_of(written)
        if form is not None and form.scheme.kind == "codebook":
            raise ValueError(
                "a codebook is found once, after training; train with an int scheme of as many bits, or none"
            )
        if not isinstance(module, AwareLinear | AwareConv1D):
            if type(module) not in _AWARE:
                raise ValueError(f"{name} is a {type(module).__name__}, not a plain linear layer")
            module.__class__ = _AWARE[type(module)]
        module.form = form


def round_aware(model: nn.Module) -> dict[str, Rounded]:
    """What the aware layers of a model multiply with, by name; they become plain layers with these weights, in place."""
    plain = {aware: kind for kind, aware in _AWARE.items()}
    rounded = {}
    for name, module in model.named_modules():
        if isinstance(module, AwareLinear | AwareConv1D):
            form = module.form
            del module.form
            module.__class__ = plain[type(module)]
            if form is None or module.weight.numel() == 0:
                continue
            weight = linear_weight(module).float()
            grid = form.fit(weight, fit=training_fit(form))
            rounded[name] = Rounded(form, grid, grid.encode(weight))
            set_linear_weight(module, rounded[name].weight())
    return rounded
