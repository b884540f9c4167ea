"""Fitting grids: what is covered, that less error is less, and k-means against a slow one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hfcompress.checkpoints.grids import Scheme
from hfcompress.quantization.fitting import fit_grid, k_means

GRIDS = [
    *("int2", "int3", "int4", "int8", "int4-channel", "int3-g7", "int2-asym", "int4-g32-asym", "int8-channel-asym"),
    *("nf4", "fp4", "ternary", "ternary-tensor", "binary", "binary-channel"),
]
FIXED = ["fixed2", "fixed4", "fixed8", "fixed4-channel", "fixed3-g32"]


def weights(kind="normal", shape=(24, 40), *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "skewed":
        return 0.3 * normal + 0.5
    if kind == "heavy":
        return normal * normal.abs() ** 2
    if kind == "pruned":
        return normal * (torch.rand(shape, generator=generator) > 0.8)
    return normal


KINDS = ("normal", "skewed", "heavy", "pruned")


def errors(weight, name, fit, importance=None, **kwargs):
    """Squared errors of all weights, each times what its input counts, in float64."""
    grid = fit_grid(weight, Scheme.parse(name), fit=fit, importance=importance, **kwargs)
    error = (grid.decode(grid.encode(weight)) - weight).double().square()
    return error if importance is None else error * importance


def in_blocks(weight, size):
    """Absolute values, block by block, the last one shorter."""
    flat = weight.flatten().abs()
    return [flat[start : start + size] for start in range(0, len(flat), size)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRIDS)
def test_min_max_covers(name, kind):
    weight, scheme = weights(kind), Scheme.parse(name)
    grid = fit_grid(weight, scheme, fit="min-max")
    error = (grid.decode(grid.encode(weight)) - weight).abs()
    blocks, largest = in_blocks(error, grid.block_size), in_blocks(weight, grid.block_size)
    assert len(blocks) == len(grid.scale) == math.ceil(weight.numel() / grid.block_size)
    for block, values, scale in zip(blocks, largest, grid.scale.abs(), strict=True):
        assert block[values.argmax()] <= 1e-5 * values.max()  # the largest is on the grid
        if scheme.affine:
            assert block.max() <= 0.5001 * scale  # and nothing is cut off
        elif scheme.kind == "int":
            assert block.max() <= 1.0001 * scale  # but for one step on the shorter side
        else:
            widest = grid.levels.diff().max()
            assert block.max() <= 0.5001 * float(widest) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRIDS)
def test_mse_is_never_worse_than_min_max_in_any_block(name, kind):
    weight = weights(kind)
    size = fit_grid(weight, Scheme.parse(name)).block_size
    least, covering = (in_blocks(errors(weight, name, fit), size) for fit in ("mse", "min-max"))
    assert all(
        float(one.sum()) <= float(other.sum()) * (1 + 1e-5) + 1e-12 for one, other in zip(least, covering, strict=True)
    )
    if name in ("int3", "nf4", "ternary") and kind == "heavy":
        assert sum(float(b.sum()) for b in least) < 0.97 * sum(float(b.sum()) for b in covering)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FIXED)
def test_fixed_scales_are_powers_of_two(name, kind):
    weight = weights(kind)
    totals = {}
    for fit in ("min-max", "percentile", "mse"):
        for dtype in (torch.float32, torch.float16):
            grid = fit_grid(weight, Scheme.parse(name), fit=fit, scale_dtype=dtype)
            exponents = torch.log2(grid.scale.abs().double())
            assert torch.equal(exponents, exponents.round()) and grid.offset is None
        totals[fit] = float(errors(weight, name, fit).sum())
        # The best of all powers of two for the whole matrix, one by one.
        if grid.block_size == weight.numel():
            levels = Scheme.parse(name).levels()
            tried = [(sign * 2.0**e * levels, e) for e in range(-12, 9) for sign in (-1, 1)]
            best = min(
                float((numbers[(weight[..., None] - numbers).abs().argmin(-1)] - weight).square().sum())
                for numbers, _ in tried
            )
            assert best <= totals[fit] * (1 + 1e-5)
            if fit == "mse":
                assert totals[fit] <= 1.05 * best
    assert totals["mse"] <= totals["min-max"] * (1 + 1e-5)


@pytest.mark.parametrize("name", [*GRIDS, "codebook2", "codebook3", "codebook4"])
def test_importance(name):
    generator = torch.Generator().manual_seed(3)
    weight, importance = weights("heavy"), torch.rand(40, generator=generator) ** 6 * 100
    weighted = float(errors(weight, name, "mse", importance).sum())
    plain = float((errors(weight, name, "mse") * importance).sum())
    assert weighted <= plain * (1 + 1e-5)
    if name in ("int3", "nf4", "codebook3", "ternary"):
        assert weighted < 0.95 * plain
    covering = fit_grid(weight, Scheme.parse(name), fit="min-max")
    if not name.startswith("codebook"):
        assert weighted <= float(((covering.decode(covering.encode(weight)) - weight).square() * importance).sum()) * (
            1 + 1e-5
        )
    zero = fit_grid(weight, Scheme.parse(name), importance=torch.zeros(40))
    assert torch.isfinite(zero.decode(zero.encode(weight))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*GRIDS, *FIXED, "codebook3"])
def test_scales_survive_their_type(name, dtype):
    for fit in ("min-max", "mse"):
        grid = fit_grid(weights("skewed"), Scheme.parse(name), fit=fit, scale_dtype=dtype)
        for values in (grid.scale, grid.offset, grid.levels):
            if values is not None and (values is not grid.levels or name == "codebook3"):
                assert values.dtype == torch.float32 and torch.equal(values.to(dtype).float(), values)


def test_percentile_leaves_out_what_lies_far():
    weight = torch.linspace(-1, 1, 4001)[None].clone()
    weight[0, 0], weight[0, -1] = -1000, 500
    grid = fit_grid(weight, Scheme.parse("int8-channel-asym"), fit="percentile")
    # Of 4001 sorted numbers the 4th from either end.
    low, high = float(weight[0, 4]), float(weight[0, -5])
    assert grid.offset.item() == pytest.approx(low) and grid.scale.item() == pytest.approx((high - low) / 255)
    symmetric = fit_grid(weight, Scheme.parse("int8-channel"), fit="percentile")
    assert symmetric.scale.item() == pytest.approx(max(-low, high) / 127)
    covering = fit_grid(weight, Scheme.parse("int8-channel"), fit="min-max")
    assert covering.scale.item() == pytest.approx(1000 / 127)


def test_percentile_of_a_large_matrix():
    """torch.quantile reads no more than 2^24 numbers at once."""
    weight = torch.zeros(2049, 8192)
    weight[0] = torch.linspace(0, 1, 8192)
    grid = fit_grid(weight, Scheme.parse("int8-tensor"), fit="percentile")
    assert torch.isfinite(grid.scale).all()


# ---- what is odd ----


@pytest.mark.parametrize("fit", ["min-max", "percentile", "mse"])
@pytest.mark.parametrize("name", [*GRIDS, *FIXED, "codebook1", "codebook4"])
def test_odd_blocks(name, fit):
    scheme = Scheme.parse(name)
    zeros = torch.zeros(3, 70)
    grid = fit_grid(zeros, scheme, fit=fit, scale_dtype=torch.float16)
    assert float(grid.decode(grid.encode(zeros)).abs().max()) < 1e-6
    for value in (0.75, -0.75):
        constant = torch.full((3, 70), value)
        grid = fit_grid(constant, scheme, fit=fit)
        limit = 0.3 if name.startswith("fixed") else 1e-5  # not all numbers are near a power of two
        assert float((grid.decode(grid.encode(constant)) - value).abs().max()) <= limit
    outlier = torch.full((3, 70), 1e-3)
    outlier[1, 5] = -50.0
    grid = fit_grid(outlier, scheme, fit=fit)
    decoded = grid.decode(grid.encode(outlier))
    assert torch.isfinite(decoded).all()
    if fit != "percentile" and not name.startswith("fixed"):
        assert decoded[1, 5] == pytest.approx(-50.0, rel=1e-3 if not name.startswith("binary") else 1)
    tiny = 1e-9 * weights()  # scales that float16 cannot hold: all that is left is near 0
    grid = fit_grid(tiny, scheme, fit=fit, scale_dtype=torch.float16)
    assert float(grid.decode(grid.encode(tiny)).abs().max()) < 2e-5


def test_pruned_weights_stay_zero():
    weight, looked_at = weights("pruned"), 0
    for name in [*GRIDS, *FIXED, "codebook2", "codebook4"]:
        if name.startswith("binary") or "asym" in name:
            continue
        grid = fit_grid(weight, Scheme.parse(name), scale_dtype=torch.float16)
        assert (grid.decode(grid.encode(weight))[weight == 0] == 0).all(), name
        looked_at += 1
    assert looked_at == 17


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int4", "nf4", "codebook4", "ternary"])
def test_what_is_not_finite_is_refused(name, bad):
    weight = weights()
    weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"^a weight is NaN or infinite; the model is broken$"):
        fit_grid(weight, Scheme.parse(name))


def test_a_sum_that_overflows_is_no_weight_that_does():
    grid = fit_grid(torch.full((100, 100), 100.0, dtype=torch.float16), Scheme.parse("int4"))
    assert grid.scale.unique().numel() == 1


# ---- k-means ----


def slow_k_means(values, counts, centres, *, pinned, rounds):
    """Lloyd's algorithm with every distance."""
    centres = np.array(centres)
    for _ in range(rounds):
        if pinned:
            centres[np.abs(centres).argmin()] = 0
        nearest = np.abs(values[:, None] - centres).argmin(1)
        for number in range(len(centres)):
            members = nearest == number
            if members.any():
                centres[number] = np.average(values[members], weights=counts[members])
        centres.sort()
    if pinned:
        centres[np.abs(centres).argmin()] = 0
    return centres


@pytest.mark.parametrize("count", [2, 3, 8, 16])
@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy", "pruned"])
def test_k_means_is_lloyds(kind, count):
    generator = torch.Generator().manual_seed(5)
    weight, importance = weights(kind), torch.rand(40, generator=generator) + 0.1
    values = weight.double().numpy().ravel()
    pinned = kind == "pruned"
    for given in (None, importance):
        counts = np.ones_like(values) if given is None else np.tile(given.double().numpy(), 24)
        # The start: the middle of equal shares of the weights that are not pruned.
        order = np.argsort(values, kind="stable")
        order = order[values[order] != 0]
        shares = np.cumsum(counts[order])
        start = values[order][[np.searchsorted(shares, (n + 0.5) / count * shares[-1]) for n in range(count)]]
        expected = slow_k_means(values, counts, start, pinned=pinned, rounds=25)
        found = k_means(weight, count, importance=given)
        assert len(found) == count and (found.diff() >= 0).all()
        np.testing.assert_allclose(found.double().numpy(), expected, atol=2e-3)
        assert (0.0 in found.tolist()) is pinned


def test_k_means_spends_its_numbers_on_weights_that_are_not_pruned():
    """Nine in ten are 0, as after pruning: one number serves them all."""
    weight = weights(shape=(40, 100)) * (torch.rand(40, 100, generator=torch.Generator().manual_seed(1)) > 0.9)
    found = k_means(weight, 16)
    assert found.unique().numel() == 16 and found.tolist().count(0.0) == 1
    left = weight[weight != 0]
    error = (left[:, None] - found).abs().min(1).values.square().mean() / left.square().mean()
    assert error < 0.02  # 16 numbers for a normal distribution lose 1 % (Max 1960)


def test_fewer_weights_than_numbers():
    found = k_means(torch.tensor([[1.0, -2.0]]), 8)
    assert found.unique().tolist() == [-2.0, 1.0]
    assert k_means(torch.zeros(2, 2), 4).tolist() == [0.0] * 4
