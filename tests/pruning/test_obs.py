"""The surgeon's curve against least squares for every set of units."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hfcompress.pruning.obs import ReaderMoments, surgeon_curve

DAMPING = 1e-2


def make_reader(outputs, inputs, *, seed, weighed=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, inputs)) @ rng.normal(size=(inputs, inputs))
    g = rng.normal(size=(100, outputs)) @ rng.normal(size=(outputs, outputs))
    moments = torch.tensor(x.T @ x / 200), torch.tensor(g.T @ g / 100) if weighed else None
    return ReaderMoments(torch.tensor(rng.normal(size=(outputs, inputs)), dtype=torch.float32), *moments)


def damped(moment, share):
    moment = moment.numpy()
    return moment + share * np.diag(moment).mean() * np.eye(len(moment))


def least_loss(readers, units, width, damping=DAMPING):
    """1/2 trace(G E C E^T), E being what is left of the error when the other inputs fit W x as well as they can."""
    total = 0.0
    for reader in readers:
        weight, second = reader.weight.double().numpy(), damped(reader.inputs, damping)
        gone = np.array([u * width + k for u in units for k in range(width)], dtype=int)
        rest = np.setdiff1d(np.arange(weight.shape[1]), gone)
        root = np.linalg.cholesky(second).T  # |root (w - v)|^2 is the mean square of (w - v)^T x
        fitted = np.zeros_like(weight)
        if len(rest):
            fitted[:, rest] = np.linalg.lstsq(root[:, rest], root @ weight.T, rcond=None)[0].T
        error = weight - fitted
        gradients = np.eye(len(weight)) if reader.gradients is None else damped(reader.gradients, 0.1 * damping)
        total += 0.5 * np.trace(gradients @ error @ second @ error.T)
    return total


def brute_force_order(readers, units, width):
    """Greedy removal with every next unit tried out."""
    order = []
    while len(order) < units:
        rest = [u for u in range(units) if u not in order]
        order.append(min(rest, key=lambda u: least_loss(readers, [*order, u], width)))
    return order


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize(("width", "readers"), [(1, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_four_units_by_brute_force(width, readers, weighed, seed):
    parts = [make_reader(5, 4 * width, seed=10 * seed + number, weighed=weighed) for number in range(readers)]
    curve = surgeon_curve(parts, width=width, damping=DAMPING)
    order = curve.order.tolist()
    assert order == brute_force_order(parts, 4, width)
    for gone in range(5):
        assert float(curve.loss[gone]) == pytest.approx(least_loss(parts, order[:gone], width), rel=1e-4, abs=1e-9)
    # No order is cheaper at its first unit, and all end at the same total.
    every = list(itertools.permutations(range(4)))
    assert len(every) == 24
    assert float(curve.loss[1]) == pytest.approx(min(least_loss(parts, o[:1], width) for o in every), rel=1e-4)
    total = 0.0
    for part in parts:
        w, c = part.weight.double().numpy(), damped(part.inputs, DAMPING)
        g = damped(part.gradients, 0.1 * DAMPING) if weighed else np.eye(5)
        total += 0.5 * np.trace(g @ w @ c @ w.T)
    assert float(curve.loss[-1]) == pytest.approx(total, rel=1e-4)


def test_many_units_go_in_rounds():
    """What a round costs is the least loss of all that are gone by then."""
    reader = make_reader(8, 40, seed=3)
    curve = surgeon_curve([reader], width=1, damping=DAMPING, steps=8)
    assert sorted(curve.order.tolist()) == list(range(40))
    assert bool((curve.loss.diff() >= 0).all()) and curve.loss.dtype == torch.float64 and float(curve.loss[0]) == 0
    for gone in range(0, 41, 5):
        expected = least_loss([reader], curve.order[:gone].tolist(), 1)
        assert float(curve.loss[gone]) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    slow = surgeon_curve([reader], width=1, damping=DAMPING, steps=40)
    assert float(curve.loss[20]) <= 2 * float(slow.loss[20])


@pytest.mark.parametrize(("units", "width"), [(100, 1), (12, 4)])
def test_one_at_a_time_is_the_textbook_recursion(units, width):
    """Hassibi and Stork, in float64, with nothing squeezed."""
    reader = make_reader(6, units * width, seed=5)
    h = np.linalg.inv(damped(reader.inputs, DAMPING))
    w = np.linalg.cholesky(damped(reader.gradients, 0.1 * DAMPING)).T @ reader.weight.double().numpy()
    left, order, losses = list(range(units)), [], [0.0]
    while left:
        costs = {}
        for u in left:
            f = slice(u * width, (u + 1) * width)
            costs[u] = 0.5 * np.trace(w[:, f] @ np.linalg.inv(h[f, f]) @ w[:, f].T)
        u = min(left, key=costs.get)
        f = slice(u * width, (u + 1) * width)
        inverse = np.linalg.inv(h[f, f])
        w, h = w - w[:, f] @ inverse @ h[f], h - h[:, f] @ inverse @ h[f]
        left.remove(u)
        order.append(u)
        losses.append(losses[-1] + costs[u])
    curve = surgeon_curve([reader], width=width, damping=DAMPING, steps=10_000)
    assert curve.order.tolist() == order and len(order) == units
    np.testing.assert_allclose(curve.loss, losses, rtol=2e-3)


def test_units_that_do_nothing_go_first_and_for_nothing():
    reader = make_reader(5, 6, seed=7)
    reader.weight[:, [1, 4]] = 0.0
    inputs = torch.eye(6, dtype=torch.float64)  # nothing can make up for anything
    curve = surgeon_curve([ReaderMoments(reader.weight, inputs)], width=1)
    assert set(curve.order[:2].tolist()) == {1, 4} and float(curve.loss[2]) == pytest.approx(0, abs=1e-9)
    assert float(curve.loss[3]) > 1e-3


def test_twins_make_up_for_each_other():
    """Of two units that always say the same, one goes for next to nothing, then the other one counts for both."""
    c = torch.eye(4, dtype=torch.float64)
    c[0, 1] = c[1, 0] = 1.0
    w = torch.tensor([[5.0, 5.0, 1.0, 1.5]])
    curve = surgeon_curve([ReaderMoments(w, c)], width=1, damping=1e-4)
    assert curve.order[0].item() in (0, 1) and float(curve.loss[1]) < 1e-2
    assert float(curve.loss[-1]) == pytest.approx(0.5 * (100 + 1 + 2.25), rel=1e-3)


@pytest.mark.parametrize("where", ["inputs", "gradients", "weight"])
def test_what_is_not_finite_is_refused(where):
    reader = make_reader(3, 4, seed=1)
    getattr(reader, where)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity, or the damping is too small"):
        surgeon_curve([reader], width=1)


def test_no_units_no_curve():
    curve = surgeon_curve([ReaderMoments(torch.zeros(3, 0), torch.zeros(0, 0))], width=1)
    assert curve.order.shape == (0,) and curve.loss.tolist() == [0.0]


def test_moments_are_not_changed():
    reader = make_reader(3, 6, seed=2)
    before = reader.weight.clone(), reader.inputs.clone(), reader.gradients.clone()
    surgeon_curve([reader], width=2)
    assert all(torch.equal(a, b) for a, b in zip(before, (reader.weight, reader.inputs, reader.gradients), strict=True))
