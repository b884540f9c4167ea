"""Losses of a model's own predictions against what is known of their distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from hfcompress.calibration import batch_loss, divergence, self_loss
from tests.families import make_inputs, make_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(values, name="logits", problem_type=None, mask=None):
    """Gradient of the loss at each row."""
    values = values.clone().requires_grad_()
    loss = self_loss({name: values}, mask=mask, problem_type=problem_type, generator=generator())
    return torch.autograd.grad(loss, values)[0]


ROWS = 20_000  # standard errors below 0.004


@pytest.mark.parametrize(
    ("problem_type", "fisher"),
    [
        (None, lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0))),
        ("multi_label_classification", lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid()))),
        ("regression", lambda z: torch.eye(3)),
    ],
)
def test_the_mean_outer_product_of_gradients_is_the_fisher_information(problem_type, fisher):
    z = torch.tensor([1.0, -0.5, 0.3])
    g = gradients(z.expand(ROWS, 3), problem_type=problem_type)
    np.testing.assert_allclose(g.mean(0), np.zeros(3), atol=0.025)
    np.testing.assert_allclose((g.T @ g / ROWS).numpy(), fisher(z).numpy(), atol=0.03)


def test_one_logit_is_a_quantity():
    g = gradients(torch.zeros(ROWS, 1))
    assert float(g.square().mean()) == pytest.approx(1.0, abs=0.03)


def test_hidden_states_have_normal_noise_and_its_curvature():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def loss(values):
        return self_loss({"last_hidden_state": values}, mask=mask, problem_type=None, generator=generator())

    hessian = torch.autograd.functional.hessian(loss, hidden).view(24, 24)
    expected = torch.diag(mask.unsqueeze(-1).expand(2, 3, 4).flatten().float())
    assert torch.allclose(hessian, expected, atol=1e-5)


def test_padding_is_never_the_answer():
    g = gradients(torch.zeros(500, 3, 7), mask=torch.tensor([[True, True, False]]).expand(500, 3))
    assert float(g[:, 2].abs().max()) == 0 and float(g[:, 1].abs().max()) > 0
    # An answer that is a span starts and ends at a real token.
    g = gradients(torch.zeros(500, 3), name="start_logits", mask=torch.tensor([[True, True, False]]).expand(500, 3))
    assert float(g[:, 2].abs().max()) == 0 and torch.allclose(g[:, :2].abs(), torch.tensor(0.5))


def test_drawn_again_with_the_same_seed():
    z = torch.randn(50, 4)
    assert torch.equal(gradients(z), gradients(z))


def test_divergence_is_that_of_the_distributions():
    p, q = torch.randn(5, 4), torch.randn(5, 4)
    cases = {
        None: kl_divergence(Categorical(logits=p), Categorical(logits=q)).sum(),
        "multi_label_classification": kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)).sum(),
        "regression": kl_divergence(Normal(p, 1.0), Normal(q, 1.0)).sum(),
    }
    for problem_type, expected in cases.items():
        value = divergence({"logits": p}, {"logits": q}, mask=None, problem_type=problem_type)
        assert float(value) == pytest.approx(float(expected), rel=1e-4) and float(value) > 0
        assert float(divergence({"logits": p}, {"logits": p}, mask=None, problem_type=problem_type)) == pytest.approx(
            0, abs=1e-5
        )
    assert len(cases) == 3


def test_divergence_leaves_padding_out():
    p, q = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    value = divergence({"logits": p}, {"logits": q}, mask=mask, problem_type=None)
    expected = kl_divergence(Categorical(logits=p[mask]), Categorical(logits=q[mask])).sum()
    assert float(value) == pytest.approx(float(expected), rel=1e-4)


def test_half_the_squared_gradient_estimates_the_divergence():
    """Second order: KL(p || p moved by d) = 1/2 d^T F d, F from `self_loss`."""
    z, d = torch.tensor([0.8, -0.2, 0.1]), torch.tensor([0.05, -0.03, 0.02])
    exact = divergence({"logits": z[None]}, {"logits": (z + d)[None]}, mask=None, problem_type=None)
    g = gradients(z.expand(ROWS, 3)) @ d
    assert 0.5 * float(g.square().mean()) == pytest.approx(float(exact), rel=0.05)


def test_the_models_own_loss():
    model = make_model("bert", "AutoModelForSequenceClassification", num_labels=3)
    batch = {**make_inputs("bert", batch=4), "labels": torch.tensor([0, 1, 2, 0])}
    loss, examples = batch_loss(model, batch, loss="labels", generator=generator())
    one_by_one = [model(**{key: value[n : n + 1] for key, value in batch.items()}).loss.item() for n in range(4)]
    assert examples == 4 and loss.item() == pytest.approx(sum(one_by_one), rel=1e-4)


def test_a_loss_has_to_be_there():
    model, batch = make_model("bert", "AutoModelForSequenceClassification"), make_inputs("bert")
    with pytest.raises(ValueError, match=r"gave no loss: the batches hold no labels .* use the loss 'self'"):
        batch_loss(model, batch, loss="labels", generator=generator())
    with pytest.raises(ValueError, match="no loss 'cross'; allowed are 'self' and 'labels'"):
        batch_loss(model, batch, loss="cross", generator=generator())
