"""Second-order rounding against GPTQ written out as in the paper, in numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfcompress.checkpoints.grids import Scheme
from hfcompress.quantization.fitting import fit_grid
from hfcompress.quantization.rounding import Sweep, inverse_factor, round_columns

SCHEMES = [
    *("int2", "int3", "int4-channel", "int8", "int3-g32-asym", "int4-g7", "fixed4", "fixed3-channel", "codebook3"),
    *("nf4", "fp4", "ternary", "ternary-channel", "binary"),
]


def inputs_of(columns, *, tokens=600, seed=0):
    """Correlated inputs of different sizes, as behind a layer norm with a few large features."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed / columns**0.5 * torch.rand(columns, generator=generator).add(0.1)


def moment_of(inputs):
    return inputs.double().T @ inputs.double() / len(inputs)


def slow_gptq(weight, grid, moment, order, *, damping=0.01):
    """One weight matrix, column by column: Frantar et al. 2023, section 3, equations (2) and (3), in their simplest form.

    After each column the others move by the optimal update, and the inverse loses the column's row and column (Gaussian elimination).
    """
    weight = weight.double().numpy().copy()
    hessian = moment.double().numpy() + damping * float(moment.diagonal().mean()) * np.eye(len(moment))
    inverse = np.linalg.inv(hessian)
    levels, codes = grid.levels.double().numpy(), np.zeros(weight.shape, dtype=int)
    scale = np.broadcast_to(grid.spread(grid.scale).double().numpy(), weight.shape)
    offset = np.zeros(weight.shape) if grid.offset is None else grid.spread(grid.offset).double().numpy()
    for column in order:
        numbers = levels * scale[:, column, None] + offset[:, column, None]
        codes[:, column] = np.abs(numbers - weight[:, column, None]).argmin(1)
        rounded = np.take_along_axis(numbers, codes[:, column, None], 1)[:, 0]
        error = (weight[:, column] - rounded) / inverse[column, column]
        weight -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


def output_error(codes, weight, grid, inputs):
    return float((inputs @ (grid.decode(codes) - weight).T).square().mean())


# ---- the factor ----


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("columns", [1, 5, 40])
def test_the_factor_is_that_of_the_inverse(columns, damping):
    moment = moment_of(inputs_of(columns))
    factor = inverse_factor(moment, damping=damping)
    assert factor.dtype == torch.float32 and torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all())
    damped = moment.numpy() + damping * np.trace(moment.numpy()) / columns * np.eye(columns)
    expected = np.linalg.inv(damped)
    found = factor.double().numpy()
    np.testing.assert_allclose(found.T @ found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def singular():
    few = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    unseen = inputs_of(20)
    unseen[:, [0, 7]] = 0
    return {"few tokens": moment_of(few), "inputs that are always 0": moment_of(unseen), "nothing": torch.zeros(20, 20)}


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("case", singular())
def test_singular_second_moments(case, damping):
    moment = singular()[case]
    sweep = Sweep.of(moment, damping=damping)
    assert torch.isfinite(sweep.factor).all()
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    grid = fit_grid(weight, Scheme.parse("int4"))
    decoded = grid.decode(round_columns(weight, grid, sweep))
    assert torch.isfinite(decoded).all()
    if case == "nothing":
        assert torch.equal(decoded, grid.decode(grid.encode(weight)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad):
    moment = moment_of(inputs_of(8))
    moment[2, 2] = bad
    with pytest.raises(
        ValueError, match=r"^what enters a layer is NaN or infinite on the calibration data; "
    ) as caught:
        Sweep.of(moment)
    assert len(str(caught.value).splitlines()) == 1


def test_order():
    moment = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
    assert Sweep.of(moment).order.tolist() == [1, 2, 0] and Sweep.of(moment, by_activation=False).order.tolist() == [
        0,
        1,
        2,
    ]


# ---- the columns ----


@pytest.mark.parametrize("by_activation", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_codes_are_those_of_gptq(name, by_activation):
    columns = 150  # more than are updated at once
    inputs = inputs_of(columns)
    moment = moment_of(inputs)
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(2)) / 4
    grid = fit_grid(weight, Scheme.parse(name), importance=moment.diagonal().float())
    sweep = Sweep.of(moment, by_activation=by_activation)
    codes = round_columns(weight, grid, sweep)
    order = np.argsort(-moment.diagonal().numpy(), kind="stable") if by_activation else range(columns)
    assert sweep.order.tolist() == list(order)
    expected = slow_gptq(weight, grid, moment, order)
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape
    # In float32 a number between two levels may fall to either; all that follow in its row then differ.
    same = (codes.numpy() == expected).all(1)
    assert same.mean() >= (0.75 if name == "int8" else 0.9)
    theirs = output_error(torch.from_numpy(expected), weight, grid, inputs)
    assert output_error(codes, weight, grid, inputs) == pytest.approx(theirs, rel=0.02)
    nearest = output_error(grid.encode(weight), weight, grid, inputs)
    assert theirs < (0.95 if name == "binary" else 0.8) * nearest


@pytest.mark.parametrize("name", SCHEMES)
def test_without_correlations_it_is_plain_rounding(name):
    weight = torch.randn(9, 140, generator=torch.Generator().manual_seed(4))
    grid = fit_grid(weight, Scheme.parse(name))
    for moment in (torch.eye(140), torch.diag(torch.linspace(0.1, 5, 140))):
        for by_activation in (True, False):
            codes = round_columns(weight, grid, Sweep.of(moment, by_activation=by_activation))
            assert torch.equal(codes, grid.encode(weight))


def test_weights_on_the_grid_stay_there():
    weight = torch.randn(8, 30, generator=torch.Generator().manual_seed(4))
    grid = fit_grid(weight, Scheme.parse("int3-g10"))
    codes = grid.encode(weight)
    assert torch.equal(round_columns(grid.decode(codes), grid, Sweep.of(moment_of(inputs_of(30)))), codes)
