"""Second-order rounding: each column of a matrix is rounded, and the columns after it make up for the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfcompress.checkpoints.grids import Grid, nearest

_BLOCK = 128  # columns whose updates are applied together
_DAMPING = 0.01  # share of the mean of the diagonal that is added to it


def inverse_factor(second_moment: torch.Tensor, *, damping: float = _DAMPING) -> torch.Tensor:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1, float32; row i says how later inputs make up for input i.

    Source: GPTQ (Frantar et al. 2023), section 3.3, "Cholesky reformulation".

    Args:
        second_moment: H, the mean of x x^T over tokens, shape (inputs, inputs); computed in float64.
        damping: At least 0; raised by itself, tenfold at a time, where H is singular.

    Raises:
        ValueError: The second moment is not finite.

    Example:
        >>> inverse_factor(torch.diag(torch.tensor([4.0, 1.0])), damping=0.0).abs().tolist()
        [[0.5, 0.0], [0.0, 1.0]]
    """
    mean = second_moment.double().diagonal().mean()
    if not torch.isfinite(second_moment.sum()):
        raise ValueError(
            "what enters a layer is NaN or infinite on the calibration data; check the model, or run it in float32"
        )
    mean = torch.where(mean == 0, 1.0, mean)
    added, extra = damping, 1e-6
    while True:
        # One matrix at a time: of wide layers these are the largest things in memory.
        matrix = second_moment.to(torch.float64, copy=True)
        matrix.diagonal().add_(added * mean)
        matrix, info = torch.linalg.cholesky_ex(matrix)
        if info == 0:
            matrix = torch.cholesky_inverse(matrix)
            matrix, info = torch.linalg.cholesky_ex(matrix, upper=True)
            if info == 0:
                return matrix.float()
        added += extra
        extra *= 10


@dataclass(frozen=True)
class Sweep:
    """In which order the inputs of a layer are rounded, and how those that follow make up for an error.

    Attributes:
        order: Numbers of the inputs, shape (inputs,).
        factor: See `inverse_factor`, for inputs in this order.
    """

    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, second_moment: torch.Tensor, *, damping: float = _DAMPING, by_activation: bool = True) -> Sweep:
        """The sweep for layers that read these inputs.

        Args:
            second_moment: Mean of x x^T over tokens, shape (inputs, inputs).
            damping: See `inverse_factor`.
            by_activation: Round the inputs with the largest second moment first ("activation order"); otherwise as they stand.
        """
        inputs = len(second_moment)
        order = torch.arange(inputs, device=second_moment.device)
        if by_activation:
            order = second_moment.diagonal().argsort(descending=True)
        return cls(order, inverse_factor(second_moment[order][:, order], damping=damping))


def round_columns(weight: torch.Tensor, grid: Grid, sweep: Sweep) -> torch.Tensor:
    """Codes of a matrix on a grid such that the error of the layer's output is small, and not that of its weights.

    Source: GPTQ (Frantar et al. 2023), algorithm 1. The grid's scales stay as they are given.

    Args:
        weight: Shape (outputs, inputs), float.
        grid: For this matrix.
        sweep: For what enters the layer.

    Returns:
        Codes, uint8, shape (outputs, inputs); `grid.decode` gives the weights.

    Example:
        >>> from hfcompress.checkpoints.grids import Scheme
        >>> from hfcompress.quantization.fitting import fit_grid
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs = torch.randn(500, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
        >>> weight = torch.randn(16, 32, generator=generator)
        >>> moment, grid = inputs.T @ inputs / 500, fit_grid(weight, Scheme.parse("int3-g32"))
        >>> error = lambda codes: float((inputs @ (grid.decode(codes) - weight).T).square().mean())
        >>> error(round_columns(weight, grid, Sweep.of(moment))) < 0.7 * error(grid.encode(weight))
        True
    """
    columns, order, factor = weight.shape[1], sweep.order, sweep.factor
    left = weight.detach().float()[:, order].T.contiguous()  # what was a column is contiguous now
    scale = grid.spread(grid.scale)[:, order].T.contiguous()
    offset = None if grid.offset is None else grid.spread(grid.offset)[:, order].T.contiguous()
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty_like(left[start:end])
        for column in range(start, end):
            shift = None if offset is None else offset[column]
            code = nearest(left[column], grid.levels, scale[column], shift, uniform=grid.uniform)
            value = grid.levels[code.int()] * scale[column]
            if shift is not None:
                value += shift
            codes[column] = code
            error = (left[column] - value) / factor[column, column]
            errors[column - start] = error
            left[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()
