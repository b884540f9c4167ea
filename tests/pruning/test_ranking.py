"""Ranking: every criterion on real models, what each needs, and whole layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hfcompress.anatomy import find_sites
from hfcompress.calibration import divergence
from hfcompress.pruning import CRITERIA, Curve, Evidence, Plan, cut, repair
from hfcompress.pruning.criteria import magnitude
from hfcompress.pruning.evidence import collect_activations, collect_examples
from hfcompress.pruning.ranking import block_influence, layer_losses, rank_units, surgeon_curves
from tests.families import CONFIGS, make_inputs, make_model, run_model, task_class
from tests.pruning.test_evidence import in_processes

CLASSIFIER = "AutoModelForSequenceClassification"


def make_case(name="bert", batches=2):
    auto = task_class(name)
    return make_model(name, auto), [make_inputs(name, auto, seed=seed, batch=3) for seed in range(batches)]


def make_steps(model, seed=0):
    """What training gathers, at random."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model)
    return {
        site.name: {
            "squares": torch.rand(site.units, generator=generator),
            "sums": torch.randn(site.units, generator=generator),
        }
        for site in sites
    }


def assert_curves(curves, model):
    sites = {site.name: site for site in find_sites(model)}
    assert curves.keys() == sites.keys()
    for name, curve in curves.items():
        assert sorted(curve.order.tolist()) == list(range(sites[name].units))
        assert curve.loss.shape == (sites[name].units + 1,) and curve.loss.dtype == torch.float64
        assert float(curve.loss[0]) == 0 and bool((curve.loss.diff() >= 0).all()) and bool(curve.loss.isfinite().all())
        assert curve.loss.device.type == curve.order.device.type == "cpu"


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "swin", "albert"])
def test_every_criterion(name, criterion):
    model, batches = make_case(name)
    model.train()
    collected = make_steps(model) if criterion == "movement" else None
    state = {key: value.clone() for key, value in model.state_dict().items()}
    one, two = (rank_units(model, criterion, batches, seed=3, collected=collected) for _ in range(2))
    assert_curves(one, model)
    assert all(torch.equal(one[site].order, two[site].order) for site in one)
    assert all(torch.equal(one[site].loss, two[site].loss) for site in one)
    assert any(float(curve.loss[-1]) > 0 for curve in one.values())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_surgeon_on_every_architecture(name):
    model, batches = make_case(name, batches=1)
    assert_curves(surgeon_curves(model, batches), model)


def test_scores_become_curves_in_their_order():
    model, batches = make_case()
    curves = rank_units(model, "activation_variance", batches)
    seen = collect_activations(model, find_sites(model), batches)
    for name, curve in curves.items():
        scores = seen[name].variance.double().numpy()
        np.testing.assert_array_equal(curve.order, np.argsort(scores, kind="stable"))
        np.testing.assert_allclose(curve.loss.diff(), np.sort(scores), rtol=1e-6)
    assert len(curves) == 6
    fisher = rank_units(model, "fisher", batches, seed=2, loss="self")
    squares = collect_examples(model, find_sites(model), batches, seed=2)
    assert all(float(c.loss[-1]) == pytest.approx(float(squares[n].squares.sum()) / 2) for n, c in fisher.items())


def test_labels_are_read_when_asked_for():
    model, batches = make_case()
    batches = [{**batch, "labels": torch.tensor([0, 1, 0])} for batch in batches]
    own = rank_units(model, "fisher", batches)
    labels = rank_units(model, "fisher", batches, loss="labels")
    assert any(not torch.equal(own[name].loss, labels[name].loss) for name in own)
    with pytest.raises(ValueError, match="gave no loss"):
        rank_units(model, "fisher", make_case()[1], loss="labels")


# ---- what is needed ----


def test_steps_of_training_are_used_where_there_are_some():
    model, batches = make_case()
    steps = make_steps(model)
    for given in (None, batches):
        curves = rank_units(model, "first_order", given, collected=steps)
        for name, curve in curves.items():
            np.testing.assert_allclose(curve.loss.diff(), steps[name]["squares"].double().sort().values, rtol=1e-6)
    # Without any, each batch is a step.
    curves = rank_units(model, "first_order", batches, seed=1)
    seen = collect_examples(model, find_sites(model), batches, seed=1)
    for name, curve in curves.items():
        assert float(curve.loss[-1]) == pytest.approx(float(seen[name].batches.squares.sum()), rel=1e-5)
    with pytest.raises(ValueError, match="first_order looks at examples, and no optimizer step was made yet"):
        rank_units(model, "first_order", None)


def test_movement_can_be_negative_and_still_goes_by_score_per_parameter():
    model, _ = make_case()
    steps = make_steps(model)
    curves = rank_units(model, "movement", collected=steps)
    assert_curves(curves, model)
    expected, found = [], []
    for site in find_sites(model):
        density = -steps[site.name]["sums"].double() / site.parameters_per_unit
        expected += [(float(value), site.name, unit) for unit, value in enumerate(density)]
        added = curves[site.name].loss.diff() / site.parameters_per_unit
        found += [(float(v), site.name, int(u)) for v, u in zip(added, curves[site.name].order, strict=True)]
    assert min(found)[0] == pytest.approx(0, abs=1e-9) and len(found) == len(expected) == 156
    assert [entry[1:] for entry in sorted(expected)] == [entry[1:] for entry in sorted(found)]
    # All are raised by the same.
    low, high = sorted(expected)[0][0], sorted(expected)[-1][0]
    assert max(found)[0] == pytest.approx(high - low, rel=1e-6)
    with pytest.raises(ValueError, match="movement adds up gradients of many optimizer steps, and none were made yet"):
        rank_units(model, "movement", make_case()[1])


@pytest.mark.parametrize("name", [name for name, c in CRITERIA.items() if c.needs not in (None, "steps")])
def test_data_has_to_be_there(name):
    for batches in (None, []):
        with pytest.raises(
            ValueError, match=f"the criterion {name} looks at examples, and there is no calibration data"
        ):
            rank_units(make_case()[0], name, batches)


def test_weights_need_no_data():
    model, _ = make_case()
    site = find_sites(model)[1]
    curve = rank_units(model, "magnitude")[site.name]
    assert float(curve.loss[-1]) == pytest.approx(float(magnitude(site, Evidence(model)).sum()), rel=1e-5)


def test_unknown_criteria_get_the_nearest_name():
    with pytest.raises(ValueError, match=r"no criterion 'fischer' \(did you mean fisher\?\); there are obs, "):
        rank_units(make_case()[0], "fischer")


@pytest.mark.parametrize("name", ["fisher", "magnitude", "obs", "fisher_block", "first_order"])
def test_what_is_not_finite_is_refused(name):
    model, batches = make_case()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        rank_units(model, name, batches)


def test_sites_without_units_have_no_curve():
    model, batches = make_case()
    cut(model, Plan({"encoder.0.heads": (), "encoder.1.neurons": ()}))
    for name in ("obs", "fisher", "activation_mean", "hessian", "random"):
        curves = rank_units(model, name, batches)
        assert len(curves) == 4 and not {"encoder.0.heads", "encoder.1.neurons"} & curves.keys()


@pytest.mark.parametrize("name", ["magnitude", "activation_mean", "fisher", "fisher_block", "obs", "random"])
def test_all_processes_get_the_same(name):
    model, batches = make_case()
    models = [make_model("bert", task_class("bert")) for _ in batches]

    def rank(number, reduce):
        return rank_units(models[number], name, [batches[number]], reduce=reduce)

    one, two = in_processes(rank, batches)
    assert len(one) == 6
    for site, curve in one.items():
        assert isinstance(curve, Curve)
        assert torch.equal(curve.order, two[site].order) and torch.equal(curve.loss, two[site].loss)
    if name in ("activation_mean", "magnitude"):  # nothing is drawn
        whole = rank_units(model, name, batches)
        assert all(torch.allclose(whole[site].loss, one[site].loss, rtol=1e-4) for site in one)


# ---- the surgeon's estimate ----


def test_the_surgeons_loss_is_near_the_real_divergence():
    """One site, most of it repaired: the quadratic estimate in nats against what the predictions do."""
    model = make_model("bert", CLASSIFIER, num_hidden_layers=1)
    with torch.no_grad():
        model.classifier.weight.mul_(0.3)
    batches = [make_inputs("bert", seed=seed, batch=32) for seed in range(8)]
    curve = surgeon_curves(model, batches)["encoder.0.neurons"]
    compared = 0
    for left in (40, 28, 12):
        smaller = copy.deepcopy(model)
        cut(smaller, Plan({"encoder.0.neurons": curve.kept(left)}))
        repair(smaller, model, batches)
        total = sum(
            float(divergence(run_model(model, b), run_model(smaller, b), mask=None, problem_type=None)) for b in batches
        )
        estimate, real = float(curve.loss[48 - left]), total / 256
        assert real / 8 < estimate < 8 * real
        compared += 1
    assert compared == 3


# ---- layers ----


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_block_influence_by_numpy(name):
    model = make_model(name)
    batches = [make_inputs(name, seed=seed, batch=3) for seed in range(2)]
    found = block_influence(model, batches)
    layers = model.encoder.layer if name == "bert" else model.layers
    assert len(found) == len(layers) == 3
    for layer, value in zip(layers, found.values(), strict=True):
        cosines = []
        for batch in batches:
            states = []
            handle = layer.register_forward_hook(lambda _m, args, out, states=states: states.extend((args[0], out)))
            run_model(model, batch)
            handle.remove()
            mask = batch.get("attention_mask", torch.ones(states[0].shape[:2])).numpy().astype(bool)
            a, b = (state.numpy()[mask] for state in states)
            cosines += list((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
        assert value == pytest.approx(1 - np.mean(cosines), abs=1e-5) and value > 1e-3


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "swin"])
def test_layer_losses_by_numpy(name):
    """The divergence of predictions of models that really have no such layer, where the layers can go."""
    model, batches = make_case(name)
    found = layer_losses(model, batches)
    layers = {
        "bert": lambda: model.bert.encoder.layer,
        "gpt2": lambda: model.transformer.h,
        "vit": lambda: model.vit.layers,
        "swin": lambda: [block for stage in model.swin.encoder.layers for block in stage.blocks],
    }[name]()
    assert len(layers) == len(found) == 3
    for layer, value in zip(layers, found.values(), strict=True):
        total, examples = 0.0, 0
        for batch in batches:
            p = run_model(model, batch)["logits"].double()
            handle = layer.register_forward_hook(
                lambda _m, args, kwargs, output: args[0] if torch.is_tensor(output) else (args[0], *output[1:]),
                with_kwargs=True,
            )
            q = run_model(model, batch)["logits"].double()
            handle.remove()
            p, q = (x.softmax(-1).numpy() for x in (p, q))
            kl = (p * np.log(p / q)).sum(-1)
            if name == "gpt2":
                kl = (kl * batch["attention_mask"].numpy()).sum(1)
            total += kl.sum()
            examples += len(kl)
        assert value == pytest.approx(total / examples, rel=1e-3) and value > 1e-4


def test_layer_losses_of_hidden_states_are_half_squared_distances():
    model, batches = make_model("bert"), [make_inputs("bert", batch=4)]
    found = layer_losses(model, batches)
    mask = batches[0]["attention_mask"].bool()
    whole = run_model(model, batches[0])["last_hidden_state"]
    layer = model.encoder.layer[2]
    before = []
    handle = layer.register_forward_pre_hook(lambda _m, args: before.append(args[0]))
    run_model(model, batches[0])
    handle.remove()
    expected = 0.5 * float((whole - before[0])[mask].double().square().sum()) / 4
    assert found["encoder.2"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_every_architecture(name):
    model, batches = make_case(name, batches=1)
    model.train()
    losses, influence = layer_losses(model, batches), block_influence(model, batches)
    assert list(losses) == list(influence) and len(losses) >= 1
    assert all(value > 0 for value in losses.values()) and all(0 < value < 2 for value in influence.values())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_need_data():
    for function in (layer_losses, block_influence):
        with pytest.raises(ValueError, match="no calibration data"):
            function(make_case()[0], [])
