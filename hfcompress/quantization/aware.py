"""Training with the weights that will be written: rounded in each forward pass, whole underneath."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration import linear_weight, set_linear_weight
from hfcompress.checkpoints.inputs import LEVELS, input_grid, snap_inputs
from hfcompress.quantization.fitting import Fit
from hfcompress.quantization.formats import Format, Rounded, format_of

_FOLLOWING = 0.01  # of the way to the extremes of a step
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


class InputRange:
    """The range of what enters a layer, to be rounded to 8 bits; it is beside the model and no part of it.

    Args:
        device: Where the layer is.

    Attributes:
        low: Scalar parameter in float32: the least number that is told apart.
        high: The greatest.
        observing: Nothing is rounded yet, only looked at.
        follows: Extremes are looked at in training, for `follow`.
    """

    def __init__(self, device: torch.device, *, follows: bool = False) -> None:
        self.low, self.high = (nn.Parameter(torch.zeros((), device=device)) for _ in range(2))
        self.observing, self.follows = True, follows
        self._seen: list[torch.Tensor] = []

    def __call__(self, inputs: torch.Tensor, *, training: bool) -> torch.Tensor:
        """The inputs of a layer, rounded to what the range tells apart."""
        if inputs.numel() == 0:
            return inputs
        if self.observing or (training and self.follows):
            self._seen.append(torch.stack(torch.aminmax(inputs.detach().float())))
        if self.observing:
            return inputs
        # Esser et al. 2020, section 2.2: by the number of features, so that steps suit the size of the range.
        scale = (inputs.shape[-1] * LEVELS) ** -0.5
        low, high = (value.detach() + (value - value.detach()) * scale for value in (self.low, self.high))
        return snap_inputs(inputs, *input_grid(low, high))

    def start(self) -> None:
        """Take the mean of the extremes of the batches that were looked at as the range, and round from now on."""
        seen, self._seen, self.observing = self._seen, [], False
        if seen:
            self.put(torch.stack(seen).mean(0))

    def extremes(self) -> torch.Tensor | None:
        """Least and greatest input since the last call, shape (2,), which are forgotten; None if there was none."""
        seen, self._seen = self._seen, []
        return torch.stack([torch.stack(seen)[:, 0].amin(), torch.stack(seen)[:, 1].amax()]) if seen else None

    def follow(self, extremes: torch.Tensor) -> None:
        """Move the range by a hundredth towards the extremes of a step (Jacob et al. 2018, section 3.1)."""
        self.put(torch.stack((self.low, self.high)).detach().lerp(extremes, _FOLLOWING))

    def put(self, ends: torch.Tensor) -> None:
        """Set both ends, shape (2,)."""
        with torch.no_grad():
            self.low.copy_(ends[0])
            self.high.copy_(ends[1])

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and zero point that will be written."""
        with torch.no_grad():
            return input_grid(self.low, self.high)


class AwareLinear(nn.Linear):
    """A linear layer that multiplies with its rounded weights.

    It has no state of its own, and its parameters are those of the plain layer: a checkpoint is that of the plain model.
    """

    form: Format | None  # how the weight will be written; None leaves it whole
    inputs: InputRange | None = None  # how what enters is rounded

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs, rounded if they are to be, times the rounded weights, plus bias."""
        if self.inputs is not None:
            inputs = self.inputs(inputs, training=self.training)
        return F.linear(inputs, _rounded(self.weight, self.form), self.bias)


class AwareConv1D(Conv1D):
    """The same for transformers' Conv1D."""

    form: Format | None  # how the weight will be written; None leaves it whole
    inputs: InputRange | None = None  # how what enters is rounded

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs, rounded if they are to be, times the rounded weights, plus bias."""
        if self.inputs is not None:
            inputs = self.inputs(inputs, training=self.training)
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


def aware_layers(model: nn.Module) -> dict[str, AwareLinear | AwareConv1D]:
    """The layers of a model that `make_aware` changed, by their present names: those of layers that followed a dropped one change."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AwareLinear | AwareConv1D)}


def input_ranges(model: nn.Module) -> dict[str, InputRange]:
    """The ranges of the aware layers that have one, by name of the layer."""
    return {name: layer.inputs for name, layer in aware_layers(model).items() if layer.inputs is not None}


def round_aware(model: nn.Module) -> dict[str, Rounded]:
    """What the aware layers of a model multiply with, by name; they become plain layers with these weights, in place."""
    plain = {aware: kind for kind, aware in _AWARE.items()}
    rounded = {}
    for name, module in aware_layers(model).items():
        form = module.form
        del module.form
        module.__dict__.pop("inputs", None)
        module.__class__ = plain[type(module)]
        if form is None or module.weight.numel() == 0:
            continue
        weight = linear_weight(module).float()
        grid = form.fit(weight, fit=training_fit(form))
        rounded[name] = Rounded.of(form, grid, grid.encode(weight))
        set_linear_weight(module, rounded[name].weight())
    return rounded
