"""What every loss promises, for all of them: against numpy in float64, and on masks, parts, precision and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfcompress.distillation import (
    ATTENTION_LOSSES,
    EMBEDDING_LOSSES,
    HIDDEN_LOSSES,
    LOGIT_LOSSES,
    kl_divergence,
    losses,
    mean_by_item,
    mean_over_items,
    total_variation,
)
from tests.distillation.cases import CASES, Case

BY_ITEM = [name for name, case in CASES.items() if case.by_item]
every_loss = pytest.mark.parametrize("name", CASES)


def underlying(case: Case) -> object:
    return getattr(case.loss, "func", case.loss)


def value_and_gradient(
    case: Case, student: torch.Tensor, teacher: torch.Tensor, **options
) -> tuple[float, torch.Tensor]:
    variable = student.detach().requires_grad_()
    loss = case.loss(variable, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, variable)
    return loss.item(), gradient


def test_every_loss_of_the_tables_is_tried() -> None:
    tried = {underlying(case) for case in CASES.values()}
    tables = [entry.function for entry in LOGIT_LOSSES.values()]
    for table in (HIDDEN_LOSSES, EMBEDDING_LOSSES, ATTENTION_LOSSES):
        tables += table.values()
    assert len(tables) == 9 + 3 + 4 + 2 and set(tables) <= tried
    for entry in LOGIT_LOSSES.values():
        (case,) = (case for case in CASES.values() if underlying(case) is entry.function)
        assert case.itemwise == entry.itemwise
        # Those with a temperature (and labels) take it by name, and it changes something.
        student, teacher = case.tensors()
        if entry.temperature:
            assert entry.function(student, teacher, temperature=3.0) != entry.function(student, teacher)
        if entry.labels:
            labels = torch.zeros(student.shape[:-1], dtype=torch.long)
            assert entry.function(student, teacher, labels=labels) != entry.function(student, teacher)


@pytest.mark.parametrize("masked", [False, True])
@every_loss
def test_equal_to_numpy(name: str, masked: bool) -> None:
    case = CASES[name]
    mask = case.mask() if masked else torch.ones_like(case.mask())
    assert int(mask.sum()) > 0 and (int(mask.sum()) < mask.numel()) == masked
    for seed in range(3):
        student, teacher = case.tensors(seed=seed)
        expected = case.expected_mean(student, teacher, mask)
        loss = case.loss(student, teacher, mask=mask if masked else None)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert loss.item() == pytest.approx(expected, rel=2e-5)
        student, teacher = case.tensors(seed=seed, dtype=torch.float64)
        loss = case.loss(student, teacher, mask=mask if masked else None)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(case.expected_mean(student, teacher, mask), rel=1e-10)


@every_loss
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    case = CASES[name]
    student, teacher = case.tensors(dtype=torch.float64)
    mask = case.mask()
    assert torch.autograd.gradcheck(
        lambda variable: case.loss(variable, teacher, mask=mask), student.requires_grad_(), eps=1e-6, atol=1e-7
    )


@every_loss
def test_equality(name: str) -> None:
    case = CASES[name]
    for seed in range(5):
        student, teacher = case.tensors(seed=seed)
        value, gradient = value_and_gradient(case, teacher, teacher)
        assert value < case.loss(student, teacher).item() - 1e-4
        if case.at_equality is not None:
            assert value == pytest.approx(case.at_equality, abs=1e-6)
            if name != "attention_kl":  # a least value only among maps whose rows add up to 1
                assert gradient.abs().max().item() < 1e-6


@every_loss
def test_only_the_student_gets_a_gradient(name: str) -> None:
    student, teacher = (x.requires_grad_() for x in CASES[name].tensors())
    CASES[name].loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum().item() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_loss
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    student, teacher = case.tensors(dtype=dtype)
    value, gradient = value_and_gradient(case, student, teacher, mask=case.mask())
    expected, in_full = value_and_gradient(case, student.float(), teacher.float(), mask=case.mask())
    assert value == pytest.approx(expected, rel=1e-6)
    assert case.loss(student, teacher).dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(gradient.float(), in_full, rtol=1e-2, atol=1e-6)


@every_loss
def test_autocast_changes_nothing(name: str) -> None:
    case = CASES[name]
    student, teacher = case.tensors()
    expected = value_and_gradient(case, student, teacher)
    variable = student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(variable, teacher)
    loss.backward()
    assert loss.item() == expected[0] and torch.equal(variable.grad, expected[1])


@every_loss
def test_what_does_not_count_has_no_influence_and_no_gradient(name: str) -> None:
    case = CASES[name]
    mask = case.mask()
    student, teacher = case.tensors()
    clean, expected = value_and_gradient(case, student, teacher, mask=mask)
    spoilt = case.spoil(student, mask), case.spoil(teacher, mask)
    assert not torch.equal(spoilt[0], student)
    value, gradient = value_and_gradient(case, *spoilt, mask=mask)
    assert value == pytest.approx(clean, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    outside = case.spoil(torch.zeros_like(student), mask) != 0
    assert bool((gradient[outside] == 0).all()) and bool((gradient[~outside] != 0).any())


@pytest.mark.parametrize("as_tensor", [True, False])
@every_loss
def test_the_parts_add_up_to_the_whole(name: str, as_tensor: bool) -> None:
    case = CASES[name]
    student, teacher = case.tensors()
    mask = case.mask()
    total = int(mask.sum())
    count = torch.tensor(total) if as_tensor else float(total)
    parts = [slice(0, 2), slice(2, 4), slice(4, len(student))]
    numbers = [int(mask[part].sum()) for part in parts]
    assert case.items == 1 or numbers[-1] == 0, "one part has nothing at all"
    sums = sum(case.loss(student[p], teacher[p], mask=mask[p], count=count).item() for p in parts)
    means = [case.loss(student[p], teacher[p], mask=mask[p]).item() for p in parts]
    if case.itemwise:
        assert sums == pytest.approx(case.loss(student, teacher, mask=mask).item(), rel=1e-6)
    else:
        assert sums != pytest.approx(case.loss(student, teacher, mask=mask).item(), rel=1e-3)
    # Each part, also of losses within a batch, weighs as much as it has of the items.
    assert sums == pytest.approx(sum(n / total * mean for n, mean in zip(numbers, means, strict=True)), rel=1e-6)
    assert sums != pytest.approx(np.mean(means), rel=1e-3), "the parts are too alike to show anything"


@every_loss
def test_a_count_divides_without_a_mask_too(name: str) -> None:
    case = CASES[name]
    student, teacher = case.tensors()
    whole = case.loss(student, teacher).item()
    assert case.loss(student, teacher, count=10 * case.mask().numel()).item() == pytest.approx(whole / 10, rel=1e-6)


@every_loss
def test_nothing_to_count_is_zero(name: str) -> None:
    case = CASES[name]
    value, gradient = value_and_gradient(case, *case.tensors(), mask=torch.zeros_like(case.mask()))
    assert value == 0.0 and gradient.abs().max().item() == 0.0


@pytest.mark.parametrize("size", [1e-20, 1e4])
@every_loss
def test_extreme_values_stay_finite(name: str, size: float) -> None:
    case = CASES[name]
    for seed in range(5):
        student, teacher = case.tensors(seed=seed)
        if case.maps:  # nothing but 0 and 1
            student, teacher = (
                torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).float() for x in (student, teacher)
            )
        else:
            student, teacher = student.sign() * size, teacher.sign() * size
            student[..., 0] = 0.0
        for ours, theirs in ((student, teacher), (teacher, teacher), (torch.zeros_like(student), teacher)):
            value, gradient = value_and_gradient(case, ours, theirs)
            assert math.isfinite(value) and value > -1e-6
            assert bool(torch.isfinite(gradient).all())


# ---- block by block ----


@pytest.mark.parametrize("layout", ["contiguous", "slice", "permuted"])
@pytest.mark.parametrize("block_size", [1, 12, 50])
@pytest.mark.parametrize("name", BY_ITEM)
def test_blocks_are_the_whole(name: str, block_size: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    student, teacher = case.tensors()
    mask = case.mask()
    if layout == "slice":  # as of logits that predict the next token: no matrix of evenly spaced rows
        student, teacher, mask = student.flip(0)[:, :-1], teacher.flip(0)[:, :-1], mask.flip(0)[:, :-1]
    elif layout == "permuted":
        student, teacher = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (student, teacher))
    assert student.is_contiguous() == (layout == "contiguous")
    expected = value_and_gradient(case, student.contiguous(), teacher.contiguous(), mask=mask)
    monkeypatch.setattr(losses, "_BLOCK_SIZE", block_size)
    value, gradient = value_and_gradient(case, student, teacher, mask=mask)
    assert value == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-8)


class Sizes(TorchDispatchMode):
    """The numbers of elements of all new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("loss", [kl_divergence, total_variation])
def test_large_logits_are_never_copied(loss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_BLOCK_SIZE", 640)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, 101, 64, generator=generator).bfloat16() for _ in range(2)]
    student, teacher = logits[0].requires_grad_(), logits[1]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), Sizes() as forward:
        value = loss(student[:, :-1], teacher[:, :-1])
    assert {x.untyped_storage().data_ptr() for x in kept if x.numel() > 1000} == {
        x.data_ptr() for x in (student, teacher)
    }
    assert len(forward.made) > 100 and max(forward.made) == 640
    with Sizes() as backward:
        value.backward()
    large = [size for size in backward.made if size > 640]
    # The gradient of the slice, and autograd's own of the whole that it is a slice of.
    assert large[0] == 3 * 100 * 64 and len(large) == 2 and student.grad.dtype == torch.bfloat16


def test_the_graph_can_be_gone_through_twice() -> None:
    student, teacher = CASES["kl"].tensors()
    student.requires_grad_()
    loss = kl_divergence(student, teacher)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max().item() > 0


def test_one_item_without_leading_dimensions_and_none_at_all() -> None:
    student, teacher = torch.zeros(2), torch.tensor([0.0, math.log(3)])
    assert kl_divergence(student, teacher).item() == pytest.approx(0.75 * math.log(3) - math.log(2), rel=3e-6)
    for shape in ((0, 5), (0, 4, 5), (2, 0, 5)):
        nothing = torch.zeros(shape, requires_grad=True)
        loss = kl_divergence(nothing, torch.zeros(shape))
        loss.backward()
        assert loss.item() == 0.0 and nothing.grad.shape == shape


def test_a_function_by_item_with_something_given() -> None:
    student = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    factors = torch.tensor([[1, 2, 3], [4, 5, 6]])
    loss = mean_by_item(lambda ours, theirs, f: (ours * theirs).sum(-1) * f, student, torch.ones(2, 3, 2), factors)
    loss.backward()
    pairs = np.arange(12.0).reshape(2, 3, 2).sum(-1)
    assert loss.item() == pytest.approx((pairs * factors.numpy()).mean())
    torch.testing.assert_close(student.grad, (factors / 6).unsqueeze(-1).expand(2, 3, 2))


def test_mean_over_items() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, float("nan")]])
    mask = torch.tensor([[True, True], [True, False]])
    assert mean_over_items(values, mask=mask).item() == pytest.approx(7 / 3)
    assert mean_over_items(values, mask=mask, count=10).item() == pytest.approx(0.7)
    assert mean_over_items(values, mask=mask, count=torch.tensor(10)).item() == pytest.approx(0.7)
    assert mean_over_items(values[0]).item() == pytest.approx(1.5)
    assert mean_over_items(values.bfloat16(), mask=mask).dtype == torch.bfloat16
