"""Repair: readers against numpy's least squares, and whole models against what they gave before."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hfcompress.anatomy import find_sites
from hfcompress.calibration import linear_weight
from hfcompress.pruning import Plan, cut, repair
from hfcompress.pruning.repair import solve_towards
from tests.families import CONFIGS, choose_units, make_inputs, make_model, predictions, run_model, task_class


def make_batches(name, auto, count=5):
    return [make_inputs(name, auto, seed=seed, batch=6) for seed in range(count)]


def outputs(model, batches):
    return torch.cat([predictions(run_model(model, batch)).flatten() for batch in batches])


@pytest.mark.parametrize("name", CONFIGS)
def test_an_uncut_model_stays_as_it_is(name):
    auto = task_class(name)
    dense, batches = make_model(name, auto), make_batches(name, auto, 2)
    model = copy.deepcopy(dense)
    repair(model, dense, batches)
    assert float((outputs(model, batches) - outputs(dense, batches)).abs().max()) <= 2e-4
    assert not any(module._forward_hooks or module._forward_pre_hooks for m in (model, dense) for module in m.modules())


FAMILIES = (
    "bert",
    "deberta-v2",
    "gpt2",
    "llama",
    "falcon",
    "bart",
    "t5",
    "vit",
    "swin",
    "albert",
    "wav2vec2",
    "clip",
    "modernbert",
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pattern", ["neurons", "both", "empty"])
def test_a_cut_model_comes_nearer_to_what_it_was(name, pattern):
    auto = task_class(name)
    dense, batches = make_model(name, auto), make_batches(name, auto)
    before = copy.deepcopy(dense.state_dict())
    wanted = outputs(dense, batches)
    model = copy.deepcopy(dense)
    cut(model, Plan(choose_units(find_sites(dense), pattern)))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    untouched = {f"{path}.{part}" for site in find_sites(dense) for path in site.readers for part in ("weight", "bias")}
    others = {key: value.clone() for key, value in model.state_dict().items() if key not in untouched}
    error = float((outputs(model, batches) - wanted).square().mean())
    repair(model, dense, batches)
    assert float((outputs(model, batches) - wanted).square().mean()) < 0.95 * error and error > 1e-4
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items()) and len(others) >= 8


def record(model, path, batches):
    """Rows that enter and leave a module at real positions."""
    entered, left = [], []

    def hook(_module, args, output):
        entered.append(args[0].detach().numpy())
        left.append(output.detach().numpy().copy())

    handle = model.get_submodule(path).register_forward_hook(hook)
    masks = []
    for batch in batches:
        run_model(model, batch)
        masks.append(batch["attention_mask"].numpy().astype(bool))
    handle.remove()
    return tuple(
        np.concatenate([v[m] for v, m in zip(x, masks, strict=True)]).astype(np.float64) for x in (entered, left)
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_each_reader_is_a_least_squares_solution(name):
    """Given the readers before it: what enters a reader does not depend on its own weights."""
    dense, batches = make_model(name), make_batches(name, "AutoModel", 8)
    model = copy.deepcopy(dense)
    keep = choose_units(find_sites(dense), "both")
    cut(model, Plan(keep))
    repair(model, dense, batches, damping=0.0)
    compared = 0
    for site in find_sites(model):
        (path,) = site.readers
        x, _ = record(model, path, batches)
        _, y = record(dense, path, batches)
        reader = model.get_submodule(path)
        has_bias = getattr(reader, "bias", None) is not None
        columns = np.concatenate([x, np.ones((len(x), 1))], 1) if has_bias else x
        assert len(x) > 2 * columns.shape[1]
        solution = np.linalg.lstsq(columns, y, rcond=None)[0]
        residual = np.square(columns @ solution - y).mean()
        found = linear_weight(reader).double().numpy().T
        found = np.concatenate([found, reader.bias.detach().double().numpy()[None]]) if has_bias else found
        assert np.square(columns @ found - y).mean() <= 1.001 * residual + 1e-8
        compared += 1
    assert compared == 6


def test_padding_does_not_matter():
    dense, batches = make_model("bert"), make_batches("bert", "AutoModel")
    other = [{**b, "input_ids": torch.where(b["attention_mask"] == 1, b["input_ids"], 42)} for b in batches]
    found = []
    for each in (batches, other):
        model = copy.deepcopy(dense)
        cut(model, Plan(choose_units(find_sites(dense), "both")))
        repair(model, dense, each)
        found.append(outputs(model, batches))
    assert torch.allclose(found[0], found[1], atol=1e-3)


def test_a_reader_without_inputs_gives_the_mean():
    dense, batches = make_model("bert"), make_batches("bert", "AutoModel")
    model = copy.deepcopy(dense)
    cut(model, Plan({"encoder.0.neurons": ()}))
    repair(model, dense, batches)
    _, y = record(dense, "encoder.layer.0.output.dense", batches)
    np.testing.assert_allclose(model.encoder.layer[0].output.dense.bias.detach(), y.mean(0), atol=1e-4)


def test_processes_that_share_their_sums_find_what_one_finds():
    """The sums over the data of both, seen from each: their mean gives the same as all data at once."""
    dense, batches = make_model("bert"), make_batches("bert", "AutoModel", 4)
    start = copy.deepcopy(dense)
    cut(start, Plan({"encoder.0.neurons": tuple(range(20))}))
    whole = copy.deepcopy(start)
    repair(whole, dense, batches)
    halved = copy.deepcopy(start)
    repair(halved, dense, batches, reduce=lambda tensor: tensor.mul_(0.5))
    assert torch.allclose(outputs(whole, batches), outputs(halved, batches), atol=1e-4)


def test_models_with_other_layers_are_refused():
    dense = make_model("bert")
    with pytest.raises(ValueError, match="the two models differ in layers"):
        repair(make_model("bert", num_hidden_layers=2), dense, [make_inputs("bert")])
    with pytest.raises(ValueError, match="no calibration data"):
        repair(copy.deepcopy(dense), dense, [])


def test_activations_that_are_not_finite_are_refused():
    dense = make_model("bert")
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight[0] = float("nan")
    with pytest.raises(ValueError, match="activations are not finite"):
        repair(model, dense, [make_inputs("bert")])


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solve_towards_is_ridge_regression_around_what_there_was(damping):
    rng = np.random.default_rng(0)
    x, y, present = rng.normal(size=(50, 5)), rng.normal(size=(50, 3)), rng.normal(size=(6, 3))
    ones = np.concatenate([x, np.ones((50, 1))], 1)
    pull = np.sqrt(damping * np.square(x).sum(0).mean())
    rows = np.concatenate([ones, pull * np.eye(6)[:5]])
    targets = np.concatenate([y, pull * present[:5]])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0]
    arguments = [torch.tensor(value) for value in (ones.T @ ones, ones.T @ y, present)]
    np.testing.assert_allclose(solve_towards(*arguments, inputs=5, damping=damping), expected, atol=1e-6)
