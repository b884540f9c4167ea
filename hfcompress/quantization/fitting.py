"""Which grid fits a matrix: the range of each block, or the numbers of a codebook."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from hfcompress.checkpoints.grids import Grid, Scheme, nearest

Fit = Literal["min-max", "percentile", "mse", "normal"]

_SHRINKS = 10  # shrunken ranges tried for each block,
_SHRINK = 0.06  # each by so much of the whole
_ROUNDS = 3  # of fitting the scale to the codes and the codes to the scale
_PERCENTILE = 0.999
_CHUNK = 2**22  # weights searched at once
_LEAST_SCALE = 2.0**-24  # the least above 0 that float16 has; of blocks with nothing in them
# Distance of so many equidistant levels that loses least of a normal distribution, in standard deviations (Max 1960, table II).
_NORMAL_STEPS = {2: 1.596, 3: 1.224, 4: 0.9957, 8: 0.586, 16: 0.3352, 32: 0.1881, 64: 0.1041, 128: 0.0569}


def fit_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    fit: Fit = "mse",
    importance: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Grid:
    """The grid of a scheme that fits a matrix.

    Args:
        weight: Shape (outputs, inputs), float.
        scheme: Which numbers there are.
        fit: "min-max" reaches to the largest weight of a block; "percentile" to the 99.9th; "mse" shrinks the range by as much as
            makes the squared error least, then fits scale (and offset) and codes to one another in turn (for integers this is
            OMSE: Choukroun et al. 2019, section 3.1); "normal" takes the weights of a block to be normally distributed, which
            costs next to nothing: for training, where it is done in each step (levels that are 1 apart only).
        importance: What the squared error of each input counts, shape (inputs,), at least 0; None counts all alike. The diagonal of
            the second moment of the inputs makes it the error of the layer's output, as far as inputs are uncorrelated.
        scale_dtype: Scales and offsets are numbers of this type.

    Returns:
        The grid; scales in float32, of which nothing is lost in `scale_dtype`.

    Raises:
        ValueError: A weight is not finite.

    Example:
        >>> grid = fit_grid(torch.tensor([[0.0, 1.0, 2.0, 7.5]]), Scheme.parse("int4-channel-asym"), fit="min-max")
        >>> grid.decode(grid.encode(torch.tensor([[0.0, 1.0, 2.0, 7.5]]))).tolist()
        [[0.0, 1.0, 2.0, 7.5]]
    """
    weight = weight.detach().float()
    if not torch.isfinite(weight.sum()):
        raise ValueError("a weight is NaN or infinite; the model is broken")
    shape = (weight.shape[0], weight.shape[1])
    if scheme.kind == "codebook":
        levels = k_means(weight, 2 ** int(scheme.bits), importance=importance)
        one = torch.ones(1, device=weight.device)
        return Grid(levels.to(scale_dtype).float(), one, None, weight.numel(), shape)
    size = min(scheme.block_size(shape), weight.numel())
    levels = scheme.levels().to(weight.device)
    scales, offsets = [], []
    counted = fit == "mse" or scheme.kind == "fixed"
    for values, counts in _in_blocks(weight, _counts(weight, importance) if counted else weight, size):
        blocks = _Blocks(values, counts, levels, scheme)
        scale, offset = first = blocks.normal() if fit == "normal" else blocks.reach(fit)
        if fit == "mse":
            scale, offset = blocks.least_error(scale, offset)
        if scheme.kind == "fixed":
            scale = blocks.power_of_two(first[0], scale)
        scale = scale.to(scale_dtype).float()
        scales.append(torch.where(scale == 0, _LEAST_SCALE, scale))
        if offset is not None:
            offsets.append(offset.to(scale_dtype).float())
    return Grid(levels, torch.cat(scales), torch.cat(offsets) if offsets else None, size, shape, scheme.uniform)


def _counts(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """What the error of each weight counts."""
    counts = torch.ones_like(weight) if importance is None else importance.to(weight).expand_as(weight)
    # Of inputs that are never seen some error must count, or their blocks have no scale.
    return counts + 1e-6 * counts.mean() + torch.finfo(weight.dtype).tiny


def _in_blocks(weight: torch.Tensor, counts: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some blocks at a time, each with what its weights count; a last block that is short is filled with zeros that count nothing."""
    missing = -weight.numel() % size
    flat = [torch.nn.functional.pad(each.reshape(-1), (0, missing)).view(-1, size) for each in (weight, counts)]
    step = max(1, _CHUNK // size)
    for start in range(0, len(flat[0]), step):
        yield flat[0][start : start + step], flat[1][start : start + step]


@dataclass(frozen=True)
class _Blocks:
    """Some blocks, one a row, what each of their weights counts, and the levels they are laid onto."""

    values: torch.Tensor
    counts: torch.Tensor
    levels: torch.Tensor
    scheme: Scheme

    def reach(self, fit: Fit) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and offset with which the grid just covers the weights (or nearly all of them)."""
        if fit == "percentile":
            # Not torch.quantile, which reads 16 million numbers at most.
            last = self.values.shape[1] - 1
            low, high = (
                self.values.kthvalue(1 + round(share * last), dim=1).values for share in (1 - _PERCENTILE, _PERCENTILE)
            )
        else:
            low, high = self.values.amin(1), self.values.amax(1)  # what fills a short block is 0
        if self.scheme.affine:
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # pruned weights are 0 and stay near it
            return (high - low) / self.levels[-1], low
        if self.levels[0] == -self.levels[-1]:
            return torch.maximum(-low, high) / self.levels[-1], None
        # There is one more number below 0 than above: the longer side gets it.
        return torch.where(-low > high, low, high) / self.levels[0], None

    def normal(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and offset that lose least of a normal distribution with the mean absolute deviation of the weights."""
        levels = len(self.levels)
        if self.scheme.kind == "binary":
            return self.values.abs().mean(1), None
        if not self.scheme.uniform or levels not in _NORMAL_STEPS:
            raise ValueError(
                f'fit "normal" is for int2 to int7, fixed2 to fixed7, ternary and binary, not for {self.scheme.name}; use min-max'
            )
        if not self.scheme.affine:
            return self.values.abs().mean(1) * (_NORMAL_STEPS[levels] * math.sqrt(math.pi / 2)), None
        mean = self.values.mean(1, keepdim=True)
        scale = (self.values - mean).abs().mean(1) * (_NORMAL_STEPS[levels] * math.sqrt(math.pi / 2))
        return scale, mean[:, 0] - scale * (levels - 1) / 2

    def least_error(self, scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and offset of the least squared error, from those that cover the weights."""
        best, found = torch.full_like(scale, torch.inf), (scale, offset)
        for number in range(_SHRINKS + _ROUNDS):
            if number < _SHRINKS:
                shrink = 1 - number * _SHRINK
                tried = (scale * shrink, None if offset is None else offset * shrink)
            else:
                tried = self._refit(*found)
            error = self._error(*tried)
            better = error < best
            best = torch.where(better, error, best)
            found = tuple(  # type: ignore[assignment]
                None if new is None or old is None else torch.where(better, new, old)
                for new, old in zip(tried, found, strict=True)
            )
        return found

    def power_of_two(self, *scales: torch.Tensor) -> torch.Tensor:
        """Of the two powers of two around each of some scales (with its sign) the one with least error, for each block."""
        best, found = torch.full_like(scales[0], torch.inf), scales[0]
        for scale in scales:
            exponent = torch.log2(scale.abs().clamp(min=torch.finfo(scale.dtype).tiny)).floor()
            for more in (0, 1):
                tried = torch.where(scale < 0, -1.0, 1.0) * torch.exp2(exponent + more)
                error = self._error(tried, None)
                best, found = torch.minimum(error, best), torch.where(error < best, tried, found)
        return found

    def _chosen(self, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """The level of each weight."""
        shift = None if offset is None else offset[:, None]
        codes = nearest(self.values, self.levels, scale[:, None], shift, uniform=self.scheme.uniform)
        return codes.float().add_(self.levels[0]) if self.scheme.uniform else self.levels[codes.int()]

    def _error(self, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        values = self._chosen(scale, offset).mul_(scale[:, None])
        if offset is not None:
            values += offset[:, None]
        return values.sub_(self.values).square_().mul_(self.counts).sum(1)

    def _refit(self, scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weighted least squares of each row on the levels its weights have."""
        chosen = self._chosen(scale, offset)
        weighted = self.counts * chosen
        square, product = (weighted * chosen).sum(1), (weighted * self.values).sum(1)
        if offset is None:
            usable = square > 0
            return torch.where(usable, product / torch.where(usable, square, torch.ones_like(square)), scale), None
        total, first, of_values = self.counts.sum(1), weighted.sum(1), (self.counts * self.values).sum(1)
        determinant = square * total - first * first
        usable = determinant > 1e-6 * square * total
        determinant = torch.where(usable, determinant, torch.ones_like(determinant))
        slope = torch.where(usable, (product * total - first * of_values) / determinant, scale)
        return slope, torch.where(usable, (square * of_values - first * product) / determinant, offset)


def k_means(
    weight: torch.Tensor, count: int, *, importance: torch.Tensor | None = None, rounds: int = 25
) -> torch.Tensor:
    """Numbers such that each weight is near one of them (Lloyd's algorithm), 0 among them if a weight is 0.

    Source: Deep Compression (Han et al. 2016), section 3, with a start at equal shares of the weights that are not 0 instead of equal
    distances.

    Args:
        weight: Shape (outputs, inputs), float.
        count: How many numbers, at least 2.
        importance: As in `fit_grid`.
        rounds: At most so many.

    Returns:
        Ascending, shape (count,), float32. Where weights are pruned (0) one of the numbers is exactly 0, so they stay so.

    Example:
        >>> k_means(torch.tensor([[1.0, 1.2, -3.0, -3.2, 5.0, 5.0]]), 3).tolist()
        [-3.0999999046325684, 1.100000023841858, 5.0]
    """
    values = weight.detach().float().reshape(-1)
    counts = torch.ones_like(values) if importance is None else importance.to(values).expand_as(weight).reshape(-1)
    counts = counts + torch.finfo(values.dtype).tiny
    pinned = bool((values == 0).any())
    values, order = values.sort()
    counts = counts[order].double()
    sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    products = torch.cat([counts.new_zeros(1), (counts * values).cumsum(0)])
    # Pruned weights need one number and no more: with a share of their own they would get most.
    present = (counts * (values != 0)).cumsum(0)
    shares = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count * present[-1]
    centres = values[torch.searchsorted(present, shares).clamp(max=len(values) - 1)].double()
    for _ in range(rounds):
        if pinned:
            centres[centres.abs().argmin()] = 0.0
        edges = torch.searchsorted(values.double(), (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(values)])])
        weights = sums[edges[1:]] - sums[edges[:-1]]
        means = (products[edges[1:]] - products[edges[:-1]]) / weights.clamp(min=1e-300)
        moved = torch.where(weights > 0, means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved.sort().values
    if pinned:
        centres[centres.abs().argmin()] = 0.0
    return centres.float().sort().values
