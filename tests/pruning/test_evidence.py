"""Evidence against single examples one by one, whole Hessians, and numpy."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hfcompress.anatomy import find_sites
from hfcompress.pruning import Gates
from hfcompress.pruning.evidence import (
    ZERO,
    collect_activations,
    collect_curvature,
    collect_examples,
)
from tests.families import make_inputs, make_model, run_model

CLASSIFIER = "AutoModelForSequenceClassification"
# Readers of one layer, of several layers (t5, beit:shared), that run several times (albert), whose rows are windows (swin),
# whose units are groups of heads (llama), without a batch dimension (opt).
CASES = {
    "bert": CLASSIFIER,
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "falcon": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "albert": CLASSIFIER,
    "mpnet": CLASSIFIER,
    "swin": "AutoModelForImageClassification",
    "beit:shared": "AutoModelForImageClassification",
}


def make_case(name, *, batch=3, seed=1):
    """A model and a batch with labels, none of it padded, so that a mean over tokens is a mean over examples."""
    model = make_model(name, CASES[name])
    inputs = make_inputs(name, CASES[name], batch=batch, seed=seed)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    if CASES[name] == "AutoModelForCausalLM":
        inputs["labels"] = inputs["input_ids"]
    elif CASES[name] == "AutoModelForSeq2SeqLM":
        inputs["labels"] = inputs.pop("decoder_input_ids")
    else:
        inputs["labels"] = torch.arange(batch) % 2
    return model, inputs


def single(inputs, number):
    return {key: value[number : number + 1] for key, value in inputs.items()}


def gradients_one_by_one(model, inputs):
    """Site name to the gradients of gates for each example alone, by a backward pass through gates."""
    gates = Gates(model, find_sites(model))
    gates.require_grad()
    rows = {name: [] for name in gates.values}
    for number in range(len(inputs["labels"])):
        model(**single(inputs, number)).loss.backward()
        for name, gradient in gates.take_gradients().items():
            rows[name].append(gradient.numpy())
    gates.remove()
    model.zero_grad()
    return {name: np.stack(values).astype(np.float64) for name, values in rows.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_examples_equal_those_of_each_alone(name):
    model, inputs = make_case(name)
    rows = gradients_one_by_one(model, inputs)
    seen = collect_examples(model, find_sites(model), [inputs], loss="labels", block=True)
    assert seen.keys() == rows.keys() and len(seen) >= 2
    for site, g in rows.items():
        largest = np.abs(g).max()
        assert largest > 1e-4
        np.testing.assert_allclose(seen[site].absolute, np.abs(g).mean(0), atol=1e-4 * largest)
        np.testing.assert_allclose(seen[site].squares, np.square(g).mean(0), atol=1e-4 * largest**2)
        np.testing.assert_allclose(seen[site].products, g.T @ g / len(g), atol=1e-4 * largest**2)
        np.testing.assert_allclose(seen[site].batches.sums, g.mean(0), atol=1e-4 * largest)
        np.testing.assert_allclose(seen[site].batches.squares, np.square(g.mean(0)), atol=1e-4 * largest**2)


def test_batches_add_up():
    model, inputs = make_case("bert", batch=5)
    sites = find_sites(model)
    parts = [{key: value[a:b] for key, value in inputs.items()} for a, b in ((0, 3), (3, 5))]
    whole = collect_examples(model, sites, [inputs], loss="labels", block=True)
    split = collect_examples(model, sites, parts, loss="labels", block=True)
    rows = gradients_one_by_one(model, inputs)
    for name, g in rows.items():
        assert torch.allclose(whole[name].absolute, split[name].absolute, rtol=1e-3, atol=1e-6)
        assert torch.allclose(whole[name].products, split[name].products, rtol=1e-3, atol=1e-6)
        means = np.stack([g[:3].mean(0), g[3:].mean(0)])  # each batch is a step
        np.testing.assert_allclose(split[name].batches.squares, np.square(means).mean(0), rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(split[name].batches.sums, means.mean(0), rtol=1e-3, atol=1e-6)


def test_own_predictions_give_the_exact_fisher_information_of_the_gates():
    """J^T (diag p - p p^T) J, J being the derivative of the logits with respect to the gates, of one example."""
    model = make_model("bert", CLASSIFIER, num_labels=3, num_hidden_layers=1, intermediate_size=6)
    one = single(make_inputs("bert"), 0)
    gates = Gates(model, find_sites(model))
    jacobian = {}
    for name in list(gates.values):

        def logits(values, name=name):
            gates.values[name] = values
            return model(**one).logits[0]

        jacobian[name] = torch.autograd.functional.jacobian(logits, torch.ones_like(gates.values[name])).detach()
        gates.values[name] = torch.ones(len(gates.values[name]))
    p = model(**one).logits[0].softmax(0).detach()
    gates.remove()
    assert float(p.max()) < 0.98
    many = {key: value.expand(500, -1) for key, value in one.items()}
    seen = collect_examples(model, find_sites(model), [many] * 6, block=True)
    assert len(jacobian) == 2
    for name, j in jacobian.items():
        exact = j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
        assert torch.allclose(seen[name].products, exact, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("name", ["bert", "t5", "swin"])
def test_what_batch_an_example_is_in_does_not_matter_and_padding_neither(name):
    model = make_model(name, CASES[name])
    inputs = make_inputs(name, CASES[name], batch=3)
    other = dict(inputs)
    if "attention_mask" in inputs:
        other["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 42)
        assert not torch.equal(other["input_ids"], inputs["input_ids"])
    one = collect_examples(model, find_sites(model), [inputs], seed=5)
    two = collect_examples(model, find_sites(model), [other], seed=5)
    different = collect_examples(model, find_sites(model), [inputs], seed=6)
    for site in one:
        assert torch.allclose(one[site].squares, two[site].squares, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(one[site].squares, different[site].squares) for site in one)


# ---- curvature ----


def loss_of_gates(model, inputs):
    """The loss as a function of all gates in one vector, and how the vector is split."""
    gates = Gates(model, find_sites(model))
    sizes = {name: len(value) for name, value in gates.values.items()}

    def loss(vector):
        gates.values = dict(zip(sizes, vector.split(list(sizes.values())), strict=True))
        return model(**inputs).loss

    return gates, sizes, loss


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_curvature_is_an_estimate_of_the_diagonal_of_the_hessian(attention):
    name = "bert"
    model, inputs = make_case(name)
    model = make_model(name, CLASSIFIER, num_hidden_layers=1, intermediate_size=6, attention="eager")
    gates, sizes, loss = loss_of_gates(model, inputs)
    hessian = torch.autograd.functional.hessian(loss, torch.ones(sum(sizes.values()))).double()
    gates.remove()
    assert sizes == {"encoder.0.heads": 4, "encoder.0.neurons": 6} and float(hessian.abs().max()) > 1e-2
    model = make_model(name, CLASSIFIER, num_hidden_layers=1, intermediate_size=6, attention=attention)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # The same signs: z * (H z), with nothing left to chance.
    found = collect_curvature(model, find_sites(model), [inputs], loss="labels", seed=3, probes=2)
    signs, expected = torch.Generator().manual_seed(4), torch.zeros(10, dtype=torch.float64)
    for _ in range(2):
        z = torch.cat([torch.randint(2, (size,), generator=signs) * 2 - 1 for size in sizes.values()]).double()
        expected += z * (hessian @ z) / 2
    largest = float(hessian.abs().max())
    np.testing.assert_allclose(torch.cat(list(found.values())), expected, atol=1e-3 * largest)
    # And many signs come to the diagonal.
    found = collect_curvature(model, find_sites(model), [inputs], loss="labels", probes=600)
    off = (hessian - torch.diag(hessian.diagonal())).square().sum(1).sqrt()  # standard deviation of one probe
    error = (torch.cat(list(found.values())) - hessian.diagonal()).abs()
    assert bool((error <= 4 * off / 600**0.5 + 1e-3 * largest).all())


def test_curvature_of_examples_is_a_mean():
    model, inputs = make_case("llama", batch=4)
    twice = {key: value.repeat(2, 1) for key, value in inputs.items()}
    sites = find_sites(model)
    one = collect_curvature(model, sites, [inputs], loss="labels", probes=1)
    two = collect_curvature(model, sites, [twice], loss="labels", probes=1)
    assert len(one) == 6
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-2, atol=1e-3 * float(value.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "t5", "albert", "swin"])
def test_curvature_can_be_had_everywhere(name):
    model, inputs = make_case(name)
    found = collect_curvature(model, find_sites(model), [inputs])
    assert len(found) == len(find_sites(model)) >= 2
    assert all(bool(value.isfinite().all()) and float(value.abs().max()) > 0 for value in found.values())


# ---- activations ----


@pytest.mark.parametrize("name", ["bert", "llama", "opt", "t5", "albert", "swin"])
def test_activations_equal_numpys(name):
    model = make_model(name)
    batches = [make_inputs(name, seed=seed, batch=3) for seed in range(2)]
    sites = find_sites(model)
    rows = {path: [] for site in sites for path in site.readers}
    handles, batch = [], {}
    for path in rows:

        def hook(_module, args, path=path):
            x = args[0].detach().double().numpy()
            decodes = "decoder_input_ids" in batch and "decoder" in path
            mask = None if decodes else batch.get("attention_mask")
            if mask is not None:
                x = x[mask.numpy().astype(bool).reshape(x.shape[:-1])]
            rows[path].append(x.reshape(-1, x.shape[-1]))

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    for each in batches:
        batch.clear()
        batch.update(each)
        run_model(model, each)
    for handle in handles:
        handle.remove()
    seen = collect_activations(model, sites, batches)
    assert len(seen) == len(sites) >= 2
    for site in sites:
        expected = np.zeros((3, site.units))
        for path in site.readers:
            x = np.concatenate(rows[path])
            small = np.abs(x) <= ZERO * np.sqrt(np.square(x).mean(1, keepdims=True))
            for line, value in enumerate((np.abs(x).mean(0), x.var(0), small.mean(0))):
                expected[line] += value.reshape(site.units, site.width).sum(1)
        found = seen[site.name]
        np.testing.assert_allclose(found.absolute, expected[0], rtol=1e-4)
        np.testing.assert_allclose(found.variance, expected[1], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.zeros, expected[2], atol=2e-2)
    # OPT has a ReLU: about half of what its neurons say is 0.
    if name == "opt":
        assert 0.3 < float(seen["decoder.0.neurons"].zeros.mean()) < 0.7


# ---- all of them ----

COLLECTORS = {
    "examples": lambda model, batches, **k: collect_examples(model, find_sites(model), batches, loss="labels", **k),
    "curvature": lambda model, batches, **k: collect_curvature(model, find_sites(model), batches, loss="labels", **k),
    "activations": lambda model, batches, **k: collect_activations(model, find_sites(model), batches, **k),
}


@pytest.mark.parametrize("what", COLLECTORS)
def test_the_model_is_left_as_it_was(what):
    model, inputs = make_case("bert")
    model.train()
    model.bert.encoder.layer[1].eval()
    model.classifier.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    one, two = (COLLECTORS[what](model, [inputs]) for _ in range(2))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained and False in trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert str(one) == str(two)  # no dropout in it, and the same draws


@pytest.mark.parametrize("what", COLLECTORS)
def test_hooks_go_also_after_an_error(what):
    model, _ = make_case("bert")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        COLLECTORS[what](model, [{"nonsense": torch.ones(2, 3)}])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="no calibration data"):
        COLLECTORS[what](model, [])


def in_processes(function, batches):
    """Results of a function in as many threads as there are batches, whose `reduce` is the mean over all of them."""
    count = len(batches)
    barrier, shared, results = threading.Barrier(count, timeout=60), [None] * count, [None] * count

    def run(rank):
        def reduce(tensor):
            shared[rank] = tensor.clone()
            barrier.wait()
            mean = torch.stack(shared).mean(0)
            barrier.wait()
            tensor.copy_(mean)

        try:
            results[rank] = function(rank, reduce)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results)
    return results


@pytest.mark.parametrize("what", ["examples", "activations"])
def test_processes_find_what_one_finds(what):
    """Also where they have different numbers of examples."""
    _, inputs = make_case("bert", batch=5)
    parts = [{key: value[a:b] for key, value in inputs.items()} for a, b in ((0, 2), (2, 5))]
    models = [make_model("bert", CLASSIFIER) for _ in parts]
    both = in_processes(lambda rank, reduce: COLLECTORS[what](models[rank], [parts[rank]], reduce=reduce), parts)
    whole = COLLECTORS[what](models[0], [inputs])
    field = "squares" if what == "examples" else "variance"
    for name, value in whole.items():
        assert torch.equal(getattr(both[0][name], field), getattr(both[1][name], field))
        assert torch.allclose(getattr(both[0][name], field), getattr(value, field), rtol=1e-3, atol=1e-6)
    assert len(whole) == 6
