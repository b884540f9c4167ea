"""Activations in 8 bits: what enters a linear layer is rounded to one of 256 numbers, zero among them."""

from __future__ import annotations

import torch

LEVELS = 255  # steps from the least number to the greatest
_LEAST_SCALE = 2.0**-24


def input_grid(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero point of the grid that covers a range, as in ONNX's QuantizeLinear (Jacob et al. 2018, section 3).

    Args:
        low: The least number that is told apart, scalar; taken as 0 where it is above.
        high: The greatest, scalar; taken as 0 where it is below.

    Returns:
        Step and zero point, scalars in float32; the zero point is a whole number in [0, 255]. Rounding it does not stop gradients.

    Example:
        >>> step, zero = input_grid(torch.tensor(-1.0), torch.tensor(4.1))
        >>> round(float(step), 4), float(zero)
        (0.02, 50.0)
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    step = ((high - low) / LEVELS).clamp(min=_LEAST_SCALE)
    return step, round_through(-low / step)


def snap_inputs(inputs: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Round activations to the nearest number of a grid; what is outside of its range gets its end.

    Args:
        inputs: Any shape, float.
        step: Distance of neighbours, scalar in float32.
        zero: Number of the neighbours below 0, scalar, whole.

    Returns:
        The same shape and type. The gradient is passed on inside of the range (straight-through: Bengio et al. 2013) and, where
        step and zero have one, reaches them as in learned step size quantization (Esser et al. 2020, equation 3).

    Example:
        >>> snap_inputs(torch.tensor([-3.0, 0.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(2.0)).tolist()
        [-1.0, 0.0, 0.5, 9.0]
    """
    number = (round_through(inputs.float() / step) + zero).clamp(0, LEVELS)
    return ((number - zero) * step).to(inputs.dtype)


def round_through(values: torch.Tensor) -> torch.Tensor:
    """Round to whole numbers; the gradient does not notice."""
    rounded = values.detach().round()
    return rounded + (values - values.detach())  # exactly what was rounded: what is added is 0
