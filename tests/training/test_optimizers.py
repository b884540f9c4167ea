"""A cut in the middle of training: the optimizer goes on as if the closed units had never been there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.optimization import Adafactor

from hfcompress.anatomy import Change, find_sites
from hfcompress.pruning import Gates, Plan, cut
from hfcompress.training.optimizers import rebuild_reducer, replace_parameters
from tests.families import make_inputs, make_model
from tests.references import gate_hidden

KEEP = {
    "bert": {"encoder.0.heads": (1, 3), "encoder.1.neurons": tuple(range(5, 30)), "encoder.2.heads": (0,)},
    "gpt2": {"decoder.0.heads": (1, 3), "decoder.1.neurons": tuple(range(5, 30)), "decoder.2.heads": (0,)},
    "llama": {"decoder.0.heads": (1,), "decoder.1.neurons": tuple(range(5, 30))},
    "qwen3": {"decoder.0.heads": (), "decoder.1.neurons": ()},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).last_hidden_state[:, :4].square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as Trainer makes them."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() > 1]}, {"params": [p for p in parameters if p.dim() <= 1]}]


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_training_goes_on_as_behind_closed_gates(family: str, optimizer_name: str) -> None:
    # The other road: nothing is cut; the gates are closed and the same optimizer goes on.
    plan, inputs = Plan(KEEP[family]), make_inputs(family)
    # In float64, for Adam makes noise as large as what it divides by: the gradient of a key's bias is zero but for rounding.
    small, large = make_model(family).double(), make_model(family).double()
    optimizers = [OPTIMIZERS[optimizer_name](groups_of(model)) for model in (small, large)]
    for model, optimizer in zip((small, large), optimizers, strict=True):
        train(model, optimizer, inputs, 2)
    replace_parameters(optimizers[0], cut(small, plan))
    sites = find_sites(large)
    gates = Gates(large, sites)
    gates.close({s.name: set(range(s.units)) - set(plan.keep[s.name]) for s in sites if s.name in plan.keep})
    train(small, optimizers[0], inputs, 3)
    train(large, optimizers[1], inputs, 3)
    gates.remove()
    cut(large, plan)
    theirs = dict(large.named_parameters())
    seen = 0
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=2e-8, msg=lambda m, n=name: f"{n}: {m}")
        seen += 1
    assert seen > 25
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()} and len(held) == seen
    assert set(optimizers[0].state) <= set(held), "state of parameters that are gone was kept"
    trained = [p for p in held if p.grad is not None]
    assert len(trained) > 25
    if optimizer_name != "sgd":
        assert all(optimizers[0].state[p] for p in trained), "state was lost"


def test_sublayers_that_are_gone_leave_the_optimizer() -> None:
    model, inputs = make_model("qwen3"), make_inputs("qwen3")
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    train(model, optimizer, inputs, 2)
    before = sum(len(group["params"]) for group in optimizer.param_groups)
    changes = cut(model, Plan(KEEP["qwen3"]))
    replace_parameters(optimizer, changes)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    left = list(model.parameters())
    assert {id(p) for p in held} == {id(p) for p in left} and len(held) == len(left) < before
    assert set(optimizer.state) <= set(held)
    train(model, optimizer, inputs, 2)


def test_order_and_settings_of_groups_stay() -> None:
    model = make_model("bert")
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())], lr=0.5
    )
    names = [name for name, _ in model.named_parameters()]
    replace_parameters(optimizer, cut(model, Plan(KEEP["bert"])))
    assert len(optimizer.param_groups) == len(names) > 40
    for number, (group, (name, parameter)) in enumerate(
        zip(optimizer.param_groups, model.named_parameters(), strict=True)
    ):
        assert name == names[number] and group["params"][0] is parameter
        assert group["lr"] == pytest.approx(0.1 * (number + 1))


def test_moments_are_selected_and_step_counts_stay() -> None:
    old = nn.Parameter(torch.arange(12.0).view(3, 4))
    optimizer = torch.optim.AdamW([old], lr=0.1)
    for _ in range(3):
        old.grad = torch.arange(12.0).view(3, 4)
        optimizer.step()
    state = dict(optimizer.state[old])
    index = torch.tensor([0, 3])
    new = nn.Parameter(old.detach()[:, index])
    replace_parameters(optimizer, [Change(old, new, 1, index)])
    assert list(optimizer.state) == [new]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[new][name], state[name][:, [0, 3]])
    assert optimizer.state[new]["step"].item() == 3


def test_state_that_cannot_be_cut_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = make_model("bert"), make_inputs("bert")
    optimizer = Adafactor(model.parameters(), lr=0.01, relative_step=False, scale_parameter=False)
    train(model, optimizer, inputs, 2)
    with caplog.at_level(logging.WARNING, logger="hfcompress.training.optimizers"):
        replace_parameters(optimizer, cut(model, Plan(KEEP["bert"])))
    assert any("cannot be cut; it starts anew" in message for message in caplog.messages)
    before = loss_of(model, inputs).item()
    train(model, optimizer, inputs, 5)
    assert loss_of(model, inputs).item() < before


def test_nothing_changes_without_changes() -> None:
    model = make_model("bert")
    optimizer = torch.optim.AdamW(model.parameters())
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    replace_parameters(optimizer, [])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before


@pytest.fixture
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_an_unwrapped_model_needs_no_reducer() -> None:
    model = make_model("bert")
    before = dict(model.__dict__)
    rebuild_reducer(model)
    assert model.__dict__ == before


def test_the_rebuilt_reducer_sees_the_new_parameters(one_process_group: None) -> None:
    model, inputs = make_model("bert", "AutoModelForSequenceClassification"), make_inputs("bert")
    options: dict[str, Any] = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(model, **options, bucket_cap_mb=3)
    wrapped.broadcast_buffers = options["broadcast_buffers"] = False
    options["bucket_bytes_cap"] = 3 * 2**20
    reducer = wrapped.reducer
    cut(model, Plan(KEEP["bert"]))
    rebuild_reducer(wrapped)
    assert wrapped.module is model and wrapped.reducer is not reducer
    assert {name: getattr(wrapped, name) for name in options} == options
    reduced = {id(p) for p in wrapped._module_parameters}
    assert reduced == {id(p) for p in model.parameters()} and len(reduced) > 40
    wrapped(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert len(gradients) == len(reduced)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_what_is_replaced_several_times_keeps_its_moments(family: str) -> None:
    """Units, layers and hidden features in one plan: a weight may be cut along both dimensions, or cut and then gone."""
    model, inputs = make_model(family), make_inputs(family)
    stack = "encoder" if family == "bert" else "decoder"
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    train(model, optimizer, inputs, 2)
    names = {id(p): name for name, p in model.named_parameters()}
    before = {names[id(p)]: {key: value.clone() for key, value in s.items()} for p, s in optimizer.state.items()}
    hidden = (0, 2, 3, 5, 8, 13, 21, 30)
    plan = Plan({f"{stack}.0.neurons": (1, 4, 7), f"{stack}.1.heads": (1,)}, {stack: (0, 2)}, hidden)
    changes = cut(model, plan)
    olds = {id(change.old) for change in changes}
    assert any(id(change.new) in olds for change in changes), "nothing was replaced twice"
    replace_parameters(optimizer, changes)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(list(model.parameters()))
    assert set(optimizer.state) <= set(held) and len(optimizer.state) > 20
    index = {"hidden": torch.tensor(hidden), "neurons": torch.tensor([1, 4, 7])}
    where = {
        "bert": ("encoder.layer.0.output.dense.weight", "encoder.layer.{}.output.LayerNorm.bias"),
        "gpt2": ("h.0.mlp.c_proj.weight", "h.{}.ln_2.bias"),
        "qwen3": ("layers.0.mlp.down_proj.weight", "layers.{}.input_layernorm.weight"),
    }[family]
    down = optimizer.state[model.get_parameter(where[0])]
    rows, columns = (index["neurons"], index["hidden"]) if family == "gpt2" else (index["hidden"], index["neurons"])
    norm = optimizer.state[model.get_parameter(where[1].format(1))]  # layer 2 until then
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(down[key], before[where[0]][key][rows][:, columns])
        assert torch.equal(norm[key], before[where[1].format(2)][key][index["hidden"]])
    assert down["step"].item() == 2
    train(model, optimizer, inputs, 2)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_goes_on_as_with_closed_features(family: str) -> None:
    hidden, inputs = tuple(range(3, 23)), make_inputs(family)
    small, large = make_model(family).double(), make_model(family).double()
    gate_hidden(large, hidden)
    cut(small, Plan({}, {}, hidden))
    optimizers = [torch.optim.SGD(groups_of(model), lr=0.05) for model in (small, large)]
    for model, optimizer in zip((small, large), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            run = model(**inputs).last_hidden_state[:, :4]
            (run if model is small else run[..., 3:23]).square().mean().backward()
            optimizer.step()
    # Norms of LLaMA compute in float32 whatever they are given, hence the tolerance.
    for module in large.modules():  # undo what the reference did, and cut it as well
        module._forward_hooks.clear()
        module.__dict__.pop("forward", None)
    cut(large, Plan({}, {}, hidden))
    theirs, start, moved = dict(large.named_parameters()), dict(make_model(family).double().named_parameters()), 0
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        before = start[name]
        for dim, size in enumerate(parameter.shape):
            before = before if size == before.shape[dim] else before.narrow(dim, 3, 20)
        moved += not torch.equal(parameter, before)
    assert moved > 20
