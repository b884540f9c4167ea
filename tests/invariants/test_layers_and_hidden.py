"""Layers and hidden features that are gone may not show, alone or together with units, before or after a reload."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

import hfcompress
from hfcompress.anatomy import StructureError, find_sites, find_stream
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.checkpoints.record import read_hidden, read_layers
from hfcompress.pruning import Gates, Plan, cut
from tests.families import (
    CONFIGS,
    DECODERS,
    HEADS,
    auto_class,
    choose_units,
    largest_difference,
    make_inputs,
    make_model,
    others,
    predictions,
    run_model,
    task_class,
)
from tests.references import at, gate_hidden, skip_layers, stack_lengths

TOLERANCE = 3e-5  # of float32: sums in another order, which hangs on the CPU
ONE_SHARED_LAYER = ("albert", "albert:groups")
# Two towers, stages, grouped convolutions, and an attention of torch's own that fixes its width.
NO_STREAM = ("clip", "siglip", "swin", "wav2vec2", "hubert", "siglip_vision_model")
WITH_LAYERS = [name for name in CONFIGS if name not in ONE_SHARED_LAYER]
WITH_STREAM = [name for name in CONFIGS if name not in NO_STREAM]
# Heads for tokens and answers are one linear layer on all architectures: a few will do.
FEW = {"AutoModelForTokenClassification": 3, "AutoModelForQuestionAnswering": 3}
HEADS_WITH_STREAM = [
    (name, auto)
    for auto, names in HEADS.items()
    for name in [name for name in names if name not in NO_STREAM][: FEW.get(auto)]
]
# The plain config can say a hidden width if it has a field for the head dimension and no constant follows the width.
# (DINOv2 does, but counts its neurons in multiples of the hidden width, and there are none of 20.)
SAYS_HIDDEN = ("vit", "deit", "beit", "beit:shared", "llama", "llama:mha", "mistral", "qwen2", "qwen3", "phi", "phi3")
HIDDEN = 20


def layers_for(model):
    """Layers to keep: the first and the last of three, the first of two."""
    return {name: (0, 2) if count == 3 else (0,) for name, count in stack_lengths(model).items()}


def features_for(model, count=HIDDEN, *, seed=3):
    """Features to keep, chosen at random."""
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(width, generator=generator)[: min(count, width - 4)].sort().values.tolist())


def plan_for(model, name, pattern):
    """What is to stay: "layers", "hidden", or "all", which is both and units, too."""
    keep = choose_units(find_sites(model), "both") if pattern == "all" else {}
    layers = layers_for(model) if pattern in ("layers", "all") and name in WITH_LAYERS else {}
    hidden = features_for(model) if pattern in ("hidden", "all") and name in WITH_STREAM else None
    return Plan(keep, layers, hidden)


def closed(model, plan):
    """The whole model with everything closed that a plan drops."""
    whole = copy.deepcopy(model)
    sites = [site for site in find_sites(whole) if site.name in plan.keep]
    Gates(whole, sites).close({site.name: others(site, plan.keep[site.name]) for site in sites})
    if plan.hidden is not None:
        gate_hidden(whole, plan.hidden)
    skip_layers(whole, plan.layers)
    return whole


def check(name, auto, plan_of):
    model, inputs = make_model(name, auto), make_inputs(name, auto)
    plan = plan_of(model)
    dense, gated = run_model(model, inputs), run_model(closed(model, plan), inputs)
    cut(model, plan)
    outputs = run_model(model, inputs)
    if plan.hidden is not None:
        gated, dense = at(gated, plan.hidden, outputs), {key: dense[key] for key in outputs if key in dense}
        dense = {key: v for key, v in dense.items() if v.shape == outputs[key].shape} or {"none": torch.ones(1)}
    assert largest_difference(gated, outputs) <= TOLERANCE
    if "none" not in dense:
        same = {key: gated[key] for key in dense}
        assert largest_difference(same, dense) > 1e-3, "nothing was closed: the comparison could not have failed"
    return model


def test_the_tables_cover_everything():
    assert set(NO_STREAM) | set(WITH_STREAM) == set(CONFIGS) and len(WITH_STREAM) >= 41
    assert set(SAYS_HIDDEN) <= set(WITH_STREAM)
    assert len(WITH_LAYERS) == len(CONFIGS) - 2 and {name for name, _ in HEADS_WITH_STREAM} <= set(WITH_STREAM)
    assert len(HEADS_WITH_STREAM) >= 60


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_passed_over(name):
    if name in ONE_SHARED_LAYER:
        model = make_model(name)
        with pytest.raises(StructureError, match="they are shared"):
            cut(model, Plan({}, {next(iter(stack_lengths(model))): (0, 1)}))
        return
    for auto in ("AutoModel", task_class(name)):
        model = check(name, auto, lambda model: Plan({}, layers_for(model)))
        record = read_layers(model.config)
        assert {stack: left for stack, (left, _) in record.items()} == stack_lengths(model) or "swin" in name
        assert all(left < before for left, before in record.values())


@pytest.mark.parametrize(("name", "auto"), [(name, "AutoModel") for name in CONFIGS] + HEADS_WITH_STREAM)
def test_hidden_features_are_closed(name, auto):
    if name in NO_STREAM:
        with pytest.raises(StructureError, match=r"hidden"):
            find_stream(make_model(name))
        return
    model = check(name, auto, lambda model: Plan({}, hidden=features_for(model)))
    assert read_hidden(model.config) == (len(features_for(model)), model.config.hidden_size)
    assert find_stream(model).width == len(features_for(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_at_once(name):
    check(name, task_class(name), lambda model: plan_for(model, name, "all"))


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "vit", "t5"])
def test_sublayers_without_units_in_a_narrow_model(name):
    def empty(model):
        return Plan(choose_units(find_sites(model), "empty"), layers_for(model), features_for(model))

    check(name, task_class(name), empty)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "deberta-v2", "dinov2"])
def test_cutting_twice_equals_cutting_once(name):
    model, inputs = make_model(name, task_class(name)), make_inputs(name, task_class(name))
    once, final = copy.deepcopy(model), features_for(model)
    step = tuple(sorted({*final, *range(0, 32, 2)}))
    stack = next(iter(stack_lengths(model)))
    cut(once, Plan({}, {stack: (2,)}, final))
    cut(model, Plan({}, {stack: (0, 2)}, step))
    cut(model, Plan({}, {stack: (1,)}, tuple(step.index(feature) for feature in final)))
    assert largest_difference(run_model(once, inputs), run_model(model, inputs)) <= TOLERANCE
    assert once.config.hfcompress == model.config.hfcompress
    assert once.config.to_dict() == model.config.to_dict()
    # Units of the layer that is 0 by now are counted where they were.
    site = find_sites(model)[-1]
    cut(model, Plan({site.name: (0, 1, 5)}))
    assert model.config.hfcompress["units"] == {f"{stack}.0.neurons": [3, site.units]}


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_every_cache(name):
    model = make_model(name, "AutoModelForCausalLM")
    inputs = {key: value.flip(1) for key, value in make_inputs(name, "AutoModelForCausalLM").items()}
    plan = plan_for(model, name, "all")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = closed(model, plan).generate(**inputs, **settings, use_cache=False)
    cut(model, plan)
    for kind in ("dynamic", "static"):
        assert torch.equal(model.generate(**inputs, **settings, cache_implementation=kind), expected), kind


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5", "deberta-v2"])
def test_a_cut_model_trains(name):
    """Every parameter that is left gets the gradient that it gets in the whole model with everything else closed."""
    model, inputs = make_model(name, task_class(name)), make_inputs(name, task_class(name))
    plan = plan_for(model, name, "all")
    gated = closed(model, plan)
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    kept_alive = list(model.parameters())
    changes = cut(model, plan)
    steps = {id(change.new): change for change in changes if change.new is not None}
    for one in (model, gated):
        one(**inputs).logits.square().mean().backward()
    gradients = {path: parameter.grad for path, parameter in gated.named_parameters()}
    compared = 0
    for parameter in model.parameters():
        chain, first = [], parameter
        while id(first) in steps:
            chain.append(steps[id(first)])
            first = steps[id(first)].old
        expected = gradients[paths[id(first)]]
        if expected is None:
            assert parameter.grad is None or float(parameter.grad.abs().max()) == 0
            continue
        for change in reversed(chain):
            expected = expected.index_select(change.dim, change.index)
        # A table is multiplied by the mask in the reference, so its gradient is of the closed rows, too; here it is cut.
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)
        compared += 1
    assert compared > 20 and len(kept_alive) > compared


# ---- reload ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the folder of a cut model with its inputs and outputs; each is made once."""
    root = tmp_path_factory.mktemp("saved")

    @functools.cache
    def get(name, pattern):
        auto = task_class(name)
        model, inputs = make_model(name, auto), make_inputs(name, auto)
        plan = plan_for(model, name, pattern)
        gated = run_model(closed(model, plan), inputs)
        cut(model, plan)
        outputs = run_model(model, inputs)
        expected = predictions(at(gated, plan.hidden or (), outputs) if plan.hidden else gated)
        folder = root / f"{name.replace(':', '_')}-{pattern}"
        model.save_pretrained(folder)
        return folder, inputs, expected, model

    return get


SAVED = [(name, "all") for name in CONFIGS]
SAVED += [(name, "hidden") for name in (*SAYS_HIDDEN, "gemma", "gemma3_text", "t5:gated", "bart", "bert", "dinov2")]
SAVED += [(name, "layers") for name in WITH_LAYERS]


def is_native(name, pattern):
    return pattern == "layers" or (pattern == "hidden" and name in SAYS_HIDDEN)


@pytest.mark.parametrize(("name", "pattern"), SAVED)
def test_load_and_plain_from_pretrained(name, pattern, saved):
    folder, inputs, expected, model = saved(name, pattern)
    assert (folder / MODELING_FILE).exists() is not is_native(name, pattern)
    for again in (hfcompress.load(folder), auto_class(name, task_class(name)).from_pretrained(folder)):
        assert type(again) is type(model)
        assert float((predictions(run_model(again, inputs)) - expected).abs().max()) <= TOLERANCE
        assert [(s.name, s.units) for s in find_sites(again)] == [(s.name, s.units) for s in find_sites(model)]
    written = json.loads((folder / "config.json").read_text())
    assert ("hidden" in written.get("hfcompress", {})) is (
        pattern != "layers" and not is_native(name, pattern) and name in WITH_STREAM
    )
    if pattern != "layers" and name in WITH_STREAM:
        width = again.config.hidden_size
        assert width == (find_stream(again).width if is_native(name, pattern) else model.config.hidden_size)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "electra"])
def test_saved_again_from_the_reloaded_model(name, saved, tmp_path):
    folder, inputs, expected, _ = saved(name, "all")
    hfcompress.load(folder).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(folder))
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
    again = hfcompress.load(tmp_path)
    assert float((predictions(run_model(again, inputs)) - expected).abs().max()) <= TOLERANCE


def test_the_bare_model_of_a_folder(saved):
    for name in ("bert", "gpt2", "vit"):
        folder, inputs, _, model = saved(name, "all")
        bare = transformers.AutoModel.from_pretrained(folder)
        inside = run_model(model.base_model, inputs)["last_hidden_state"]
        assert float((run_model(bare, inputs)["last_hidden_state"] - inside).abs().max()) <= TOLERANCE


def test_building_twice_draws_no_random_numbers(saved):
    folder, _, _, model = saved("bert", "all")
    state = torch.get_rng_state()
    find_stream(model)
    hfcompress.load(folder)
    assert torch.equal(torch.get_rng_state(), state)


WITHOUT_HFCOMPRESS = '''
import importlib.abc, json, sys
from pathlib import Path


class Refuse(importlib.abc.MetaPathFinder):
    """hfcompress may be installed here; this process cannot import it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfcompress":
            raise ImportError("hfcompress is not to be imported in this process")


sys.meta_path.insert(0, Refuse())
import torch
import transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
results = {}
for job in json.loads(Path(sys.argv[1]).read_text()):
    folder, tensors = job["folder"], load_file(job["tensors"])
    auto = getattr(transformers, job["auto"])
    refused = ""
    if not job["native"]:
        try:
            auto.from_pretrained(folder)
        except Exception as error:
            refused = type(error).__name__
    model = auto.from_pretrained(folder, **({} if job["native"] else {"trust_remote_code": True})).eval()
    inputs = {key[6:]: value for key, value in tensors.items() if key.startswith("input.")}
    with torch.no_grad():
        outputs = model(**inputs)
    given = outputs[job["output"]]
    results[folder] = {
        "difference": float((given - tensors["expected"]).abs().max()),
        "refused": refused,
        "name": type(model).__name__,
        "module": type(model).__module__,
    }
assert not [name for name in sys.modules if name.partition(".")[0] == "hfcompress"]
Path(sys.argv[2]).write_text(json.dumps(results))
'''
# Classes that no Auto class covers are loaded by their own name and cannot come from a folder.
FRESH = [(name, "all") for name in CONFIGS if name != "siglip_text_model"]
FRESH += [(name, "hidden") for name in ("vit", "mistral", "phi3", "gemma")]
FRESH += [(name, "layers") for name in ("bert", "qwen2", "t5", "bart", "modernbert", "dinov2", "swin", "clip")]


@pytest.fixture(scope="module")
def without_hfcompress(saved, tmp_path_factory):
    """Results of one fresh process over all saved folders, by folder."""
    root = tmp_path_factory.mktemp("fresh")
    jobs = []
    for name, pattern in FRESH:
        folder, inputs, expected, model = saved(name, pattern)
        tensors = root / f"{folder.name}.safetensors"
        contents = {f"input.{key}": value.contiguous() for key, value in inputs.items()}
        save_file(contents | {"expected": expected.contiguous()}, tensors)
        outputs = run_model(model, inputs)
        jobs.append(
            {
                "folder": str(folder),
                "tensors": str(tensors),
                "auto": auto_class(name, task_class(name)).__name__,
                "native": is_native(name, pattern),
                "output": next(key for key, value in outputs.items() if value is predictions(outputs)),
            }
        )
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "run.py").write_text(WITHOUT_HFCOMPRESS)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "HF_MODULES_CACHE"},
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    command = [sys.executable, "run.py", "jobs.json", "results.json"]
    done = subprocess.run(
        command, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((root / "results.json").read_text())
    assert len(results) == len(FRESH) >= 55
    return results


@pytest.mark.parametrize(("name", "pattern"), FRESH)
def test_without_hfcompress(name, pattern, saved, without_hfcompress):
    folder = saved(name, pattern)[0]
    result = without_hfcompress[str(folder)]
    assert result["difference"] <= TOLERANCE
    assert result["name"] == json.loads((folder / "config.json").read_text())["architectures"][0]
    if is_native(name, pattern):
        assert result["module"].startswith("transformers.models.") and result["refused"] == ""
    else:
        assert result["module"].startswith("transformers_modules.") and result["refused"] == "RuntimeError"
