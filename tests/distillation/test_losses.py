"""Losses against numpy in float64, against a second torch implementation, and on what they promise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from hfcompress.distillation import binary_kl_divergence, kl_divergence, mean_over_items, mean_squared_error

Loss = Callable[..., torch.Tensor]
LOSSES: dict[str, Loss] = {
    "kl": kl_divergence,
    "binary": binary_kl_divergence,
    "mse": mean_squared_error,
}
with_temperature = ("kl", "binary")


def numpy_items(name: str, student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """One value per item, in float64, from the definitions: probabilities and logarithms written out."""
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    if name == "mse":
        return ((student - teacher) ** 2).mean(-1)
    if name == "kl":
        p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (teacher, student))
        return temperature**2 * (p * np.log(p / q)).sum(-1)
    p, q = (1 / (1 + np.exp(-x / temperature)) for x in (teacher, student))
    return temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(-1)


def torch_mean(name: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean over all items by other functions of torch: cross entropies less the teacher's entropy."""
    if name == "mse":
        return nn.MSELoss()(student, teacher)
    if name == "kl":
        p = (teacher / temperature).softmax(-1)
        flat = (student / temperature).flatten(0, -2), p.flatten(0, -2)
        entropy = torch.distributions.Categorical(probs=p).entropy().mean()
        return temperature**2 * (nn.CrossEntropyLoss()(*flat) - entropy)
    p = (teacher / temperature).sigmoid()
    cross = nn.BCEWithLogitsLoss()(student / temperature, p)
    return temperature**2 * (cross - torch.distributions.Bernoulli(probs=p).entropy().mean())


def tensors(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2, torch.randn(*shape, generator=generator) * 2


def call(
    name: str, student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 1.0, **options
) -> torch.Tensor:
    if name in with_temperature:
        options["temperature"] = temperature
    return LOSSES[name](student, teacher, **options)


def test_kl_by_hand() -> None:
    # teacher (0, T ln 3) softens to (1/4, 3/4), student (0, 0) to (1/2, 1/2):
    # KL = 1/4 ln 1/2 + 3/4 ln 3/2 = 3/4 ln 3 - ln 2, and with T = 2 it is multiplied by 4.
    expected = 0.75 * np.log(3) - np.log(2)
    for temperature in (1.0, 2.0):
        teacher = torch.tensor([[0.0, temperature * np.log(3)]])
        loss = kl_divergence(torch.zeros(1, 2), teacher, temperature=temperature)
        assert loss.item() == pytest.approx(temperature**2 * expected, rel=1e-6)


def test_binary_by_hand() -> None:
    # sigmoid(ln 3) = 3/4 against 1/2 for the first label, equal for the second; mean over the two labels.
    loss = binary_kl_divergence(torch.zeros(1, 2), torch.tensor([[np.log(3), 0.0]]))
    assert loss.item() == pytest.approx((0.75 * np.log(3) - np.log(2)) / 2, rel=1e-6)


def test_squared_error_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert mean_squared_error(student, teacher).item() == pytest.approx((2.5 + 5.0) / 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 7)])
@pytest.mark.parametrize("name", LOSSES)
def test_equal_to_numpy_and_to_torch(name: str, shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = tensors(*shape)
    loss = call(name, student, teacher, temperature=temperature)
    expected = numpy_items(name, student.numpy(), teacher.numpy(), temperature).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(torch_mean(name, student, teacher, temperature).item(), rel=1e-5)
    assert loss.dtype == torch.float32 and loss.shape == ()


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_another_implementation(name: str) -> None:
    student, teacher = tensors(3, 4, 5)
    gradients = []
    for function in (call, torch_mean):
        variable = student.clone().requires_grad_()
        function(name, variable, teacher, temperature=2.0).backward()  # type: ignore[operator]
        gradients.append(variable.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_the_factor_keeps_the_gradient_independent_of_the_temperature() -> None:
    # Hinton et al. 2015, equation 4: for a high temperature the gradient tends to (student - teacher) / classes.
    student, teacher = tensors(1, 5)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    variable = student.clone().requires_grad_()
    kl_divergence(variable, teacher, temperature=1000.0).backward()
    torch.testing.assert_close(variable.grad, (student - teacher) / 5, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_items_do_not_count(name: str) -> None:
    student, teacher = tensors(4, 6, 5)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    values = numpy_items(name, student.numpy(), teacher.numpy(), 2.0)
    assert 0 < int(mask.sum()) < mask.numel()
    student[~mask] = 1e30  # whatever stands there
    variable = student.clone().requires_grad_()
    loss = call(name, variable, teacher, temperature=2.0, mask=mask)
    assert loss.item() == pytest.approx(values[mask.numpy()].mean(), rel=1e-5)
    loss.backward()
    assert bool((variable.grad[~mask] == 0).all()) and bool((variable.grad[mask] != 0).any())


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_parts_add_up_to_the_whole(name: str, masked: bool, as_tensor: bool) -> None:
    student, teacher = tensors(7, 3, 5)
    mask = torch.ones(7, 3, dtype=torch.bool)
    if masked:
        mask = torch.arange(21).view(7, 3) % 4 == 1
        mask[5:] = False  # one part has nothing at all
    count = mask.sum() if as_tensor else float(mask.sum())
    whole = call(name, student, teacher, mask=mask)
    parts = [slice(0, 1), slice(1, 5), slice(5, 7)]
    total = sum(call(name, student[p], teacher[p], mask=mask[p], count=count).item() for p in parts)
    assert total == pytest.approx(whole.item(), rel=1e-6)
    assert whole.item() > 0.1
    plain_mean = np.mean([call(name, student[p], teacher[p], mask=mask[p]).item() for p in parts])
    assert plain_mean != pytest.approx(whole.item(), rel=1e-3), "the parts are too alike to show anything"


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_count_is_zero(name: str) -> None:
    student, teacher = tensors(2, 3)
    student.requires_grad_()
    loss = call(name, student, teacher, mask=torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_equality_and_positive_elsewhere(name: str) -> None:
    for seed in range(20):
        student, teacher = tensors(4, 5, seed=seed)
        same = student.clone().requires_grad_()
        loss = call(name, same, student, temperature=2.0)
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-6)
        assert same.grad.abs().max().item() < 1e-6
        assert call(name, student, teacher, temperature=2.0).item() > 1e-3


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    student, teacher = tensors(4, 5)
    assert kl_divergence(student + 3.0, teacher - 2.0).item() == pytest.approx(
        kl_divergence(student, teacher).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_student_gets_a_gradient(name: str) -> None:
    student, teacher = (x.requires_grad_() for x in tensors(4, 5))
    call(name, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum().item() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in tensors(64, 5))
    loss = call(name, student, teacher, temperature=2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == call(name, student.float(), teacher.float(), temperature=2.0).item()
    variable = student.clone().requires_grad_()
    call(name, variable, teacher).backward()
    assert variable.grad.dtype == dtype


@pytest.mark.parametrize("size", [1e4, 1e18])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_values_stay_finite(name: str, size: float) -> None:
    student = torch.tensor([[size, -size, 0.0], [-size, size, size]], requires_grad=True)
    teacher = torch.tensor([[-size, size, 0.0], [size, -size, -size]])
    loss = call(name, student, teacher, temperature=2.0)
    loss.backward()
    assert bool(torch.isfinite(loss)) and loss.item() > 0
    assert bool(torch.isfinite(student.grad).all())


def test_extreme_logits_have_the_right_value() -> None:
    # The teacher is sure of class 1, the student of class 0 by a margin of 2e4: KL = 2e4 at T = 1.
    loss = kl_divergence(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]))
    assert loss.item() == pytest.approx(2e4)
    assert binary_kl_divergence(torch.tensor([[-1e4]]), torch.tensor([[1e4]])).item() == pytest.approx(1e4)


def test_mean_over_items() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, float("nan")]])
    mask = torch.tensor([[True, True], [True, False]])
    assert mean_over_items(values, mask=mask).item() == pytest.approx(7 / 3)
    assert mean_over_items(values, mask=mask, count=10).item() == pytest.approx(0.7)
    assert mean_over_items(values, mask=mask, count=torch.tensor(10)).item() == pytest.approx(0.7)
    assert mean_over_items(values[0]).item() == pytest.approx(1.5)
    assert mean_over_items(values.bfloat16(), mask=mask).dtype == torch.bfloat16
