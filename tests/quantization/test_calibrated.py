"""Rounding a model on data: less error than to the nearest, the algorithm layer by layer, and bitsandbytes' own checkpoints."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.calibration import LayerWalk
from hfcompress.pruning import Plan, cut
from hfcompress.quantization import quantize
from hfcompress.quantization.calibrated import _inside, _look, round_at_once, round_on_data
from hfcompress.quantization.fitting import fit_grid
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, put_rounded
from tests.families import choose_units, make_inputs, make_model, predictions, run_model, task_class
from tests.quantization.test_rounding import slow_gptq

pytest.importorskip("bitsandbytes")

CASES = ["bert", "llama", "vit", "bart", "albert", "gpt2", "bert:uneven", "llama:uneven"]
BNB = ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq")


def make(case, **changes):
    name, _, pattern = case.partition(":")
    model = make_model(name, task_class(name), **changes)
    if pattern:
        cut(model, Plan(choose_units(find_sites(model), "both")))
    rows = 48 if name == "vit" else 12  # its images are five tokens
    batches = [make_inputs(name, task_class(name), batch=rows, length=14, seed=seed) for seed in (1, 2)]
    return model, batches


def formats_of(model, name):
    return dict.fromkeys(layers_to_quantize(model), name)


def outputs_of(model, batches):
    """Logits; of ViT what its head reads, of all tokens: the head reads one that is the same in all images at first."""
    seen = model.base_model if isinstance(model, transformers.ViTForImageClassification) else model
    return [predictions(run_model(seen, batch)) for batch in batches]


def output_error(model, expected, batches):
    pairs = zip(outputs_of(model, batches), expected, strict=True)
    return sum(float((one - other).square().sum()) for one, other in pairs)


@pytest.mark.parametrize("case", CASES)
def test_less_error_than_to_the_nearest(case):
    model, batches = make(case)
    expected = outputs_of(model, batches)
    before, formats, errors = copy.deepcopy(model.state_dict()), formats_of(model, "int3"), {}
    for way in ("nearest", "data"):
        trial = copy.deepcopy(model)
        if way == "nearest":
            rounded = round_at_once(trial, formats, fit="mse")
        else:
            rounded = round_on_data(trial, batches, formats)
        assert rounded.keys() == formats.keys() and len(formats) >= 5
        errors[way] = output_error(trial, expected, batches)
        state = trial.state_dict()
        for name, layer in rounded.items():
            weight = trial.get_submodule(name).weight
            assert torch.equal(weight.T if case == "gpt2" else weight, layer.weight())
        untouched = [key for key in before if key.removesuffix(".weight") not in rounded]
        assert len(untouched) >= 9 and all(torch.equal(state[key], before[key]) for key in untouched)
        assert not any(module._forward_pre_hooks for module in trial.modules())
    assert 0 < errors["data"] < 0.85 * errors["nearest"], errors


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (
            "bert",
            [
                [f"attention.self.{n}" for n in ("query", "key", "value")],
                ["attention.output.dense"],
                ["intermediate.dense"],
                ["output.dense"],
            ],
        ),
        (
            "llama",
            [
                [f"self_attn.{n}_proj" for n in "qkv"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        ),
    ],
)
def test_layers_that_read_the_same_share_a_second_moment(name, groups):
    model, batches = make(name)
    walk = LayerWalk(model, batches)
    walk.enter(0)
    layer = walk.steps[0][1]
    inside = _inside(model, layer, formats_of(model, "int3"))
    found = _look(walk, 0, inside)
    assert len(found) == len(groups)
    for (names, _), ends in zip(found, groups, strict=True):
        assert sorted(names) == sorted(n for n in inside if n.partition(".0.")[2] in ends)
    # By hooks of our own, without what is padding.
    seen = []
    handle = model.get_submodule(found[-1][0][0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        run_model(model, batch)
    handle.remove()
    real = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)]).double()
    torch.testing.assert_close(found[-1][1].second_moment(), real.T @ real / len(real), rtol=1e-4, atol=1e-5)
    assert len(real) == 2 * (11 * 14 + 11)


def test_cross_attention_is_not_mixed_with_the_decoders_own():
    model, batches = make("bart")
    walk = LayerWalk(model, batches)
    step = next(number for number, (name, _) in enumerate(walk.steps) if name.startswith("decoder."))
    walk.enter(step)
    found = _look(walk, step, _inside(model, walk.steps[step][1], formats_of(model, "int3")))
    names = [sorted(name.split(".", 4)[-1] for name in names) for names, _ in found]
    assert ["encoder_attn.k_proj", "encoder_attn.v_proj"] in names and ["encoder_attn.q_proj"] in names
    assert ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"] in names and len(names) == 7


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_does_not_count(name):
    model, _ = make(name)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 99, (length,), generator=generator) for length in (5, 9, 14, 7, 12, 14)]
    alone = [{"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows]
    padded = {"input_ids": torch.full((6, 14), 0), "attention_mask": torch.zeros(6, 14, dtype=torch.long)}
    for number, row in enumerate(rows):
        padded["input_ids"][number, : len(row)] = row
        padded["attention_mask"][number, : len(row)] = 1
    formats = formats_of(model, "int3")
    one, other = (round_on_data(copy.deepcopy(model), batches, formats) for batches in (alone, [padded]))
    same = [float((one[layer].codes == other[layer].codes).float().mean()) for layer in formats]
    assert len(same) >= 18 and np.mean(same) > 0.99, same  # sums in another order turn a few over


@pytest.mark.parametrize("by_activation", [True, False])
def test_one_layer_by_hand(by_activation):
    model, batches = make("bert", num_hidden_layers=1)
    formats = formats_of(model, "int4-channel-asym")
    seen, handles = {name: [] for name in formats}, []
    for name in formats:
        hook = functools.partial(lambda name, _, args: seen[name].append(args[0]), name)
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    for batch in batches:
        run_model(model, batch)
    for handle in handles:
        handle.remove()
    mask = torch.cat([batch["attention_mask"].bool() for batch in batches])
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in formats}
    rounded = round_on_data(model, batches, formats, by_activation=by_activation)
    assert len(rounded) == 6
    for name, layer in rounded.items():
        real = torch.cat(seen[name])[mask].double()
        moment = real.T @ real / len(real)
        grid = fit_grid(
            weights[name], layer.format.scheme, importance=moment.diagonal().float(), scale_dtype=torch.float16
        )
        torch.testing.assert_close(layer.grid.scale, grid.scale, rtol=2e-3, atol=0)
        order = np.argsort(-moment.diagonal().numpy(), kind="stable") if by_activation else range(len(moment))
        expected = slow_gptq(weights[name], layer.grid, moment, order)
        assert (layer.codes.numpy() == expected).all(1).mean() > 0.9, name


def test_twice_the_same():
    model, batches = make("llama")
    formats = formats_of(model, "int3")
    one, other = (round_on_data(copy.deepcopy(model), batches, formats) for _ in range(2))
    assert len(one) == 21 and all(torch.equal(one[name].codes, other[name].codes) for name in one)


def test_layers_that_no_batch_reaches_are_rounded_too():
    model, batches = make("bert")
    formats = formats_of(model, "int3") | {"classifier": "int4"}
    head = model.classifier.weight.detach().clone()
    rounded = round_on_data(model, batches, formats)
    grid = format_of("int4").fit(head, fit="mse")
    assert rounded.keys() == formats.keys() and torch.equal(rounded["classifier"].codes, grid.encode(head))


# ---- layers and checkpoints of bitsandbytes ----


def ours(name, preset, *, data=False, pattern="", **changes):
    model, batches = make(name + pattern, **changes)
    formats = formats_of(model, preset)
    rounded = round_on_data(model, batches, formats) if data else round_at_once(model, formats)
    put_rounded(model, rounded)
    return model, batches


@pytest.mark.parametrize("pattern", ["", ":uneven"])
@pytest.mark.parametrize("preset", BNB)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_checkpoint_is_one_of_bitsandbytes(name, preset, pattern, tmp_path):
    whole, _ = make(name + pattern)
    whole.save_pretrained(tmp_path / "whole")
    theirs = quantize(tmp_path / "whole", preset)
    model, batches = ours(name, preset, pattern=pattern)
    mine, reference = model.state_dict(), theirs.state_dict()
    assert mine.keys() == reference.keys() and len(mine) > 40
    for key, value in reference.items():
        assert mine[key].dtype == value.dtype and mine[key].shape == value.shape, key
    codes = [key for key in mine if mine[key].dim() == 2 and mine[key].dtype in (torch.uint8, torch.int8)]
    assert len(codes) == len(layers_to_quantize(whole))
    # Plain rounding is what bitsandbytes does, to the bit for nf4. It puts FP4's bounds elsewhere by a little, reads weights for int8 in
    # float16, and with double quantization rounds scales after the weights and not before.
    least = 1.0 if preset == "nf4" else 0.95
    assert all(float((mine[key] == reference[key]).float().mean()) >= least for key in codes)
    one, other = (predictions(run_model(m, batches[0])) for m in (model, theirs))
    assert float((one - other).norm() / other.norm()) < 0.1
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    sizes = [(tmp_path / which / "model.safetensors").stat().st_size for which in ("ours", "theirs")]
    assert abs(sizes[0] - sizes[1]) <= 64
    configs = [
        json.loads((tmp_path / which / "config.json").read_text())["quantization_config"]
        for which in ("ours", "theirs")
    ]
    skipped = [sorted(config.pop("llm_int8_skip_modules")) for config in configs]
    assert configs[0] == configs[1] and skipped[0] == skipped[1]
    again = hfcompress.load(tmp_path / "ours")
    assert torch.equal(predictions(run_model(again, batches[0])), one)


@pytest.mark.parametrize("preset", BNB)
def test_size_of_a_layer_of_bitsandbytes(preset):
    form, looked_at = format_of(preset), 0
    for outputs, inputs in ((64, 64), (37, 100), (512, 640)):
        linear = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        grid = form.fit(linear.weight, fit="min-max")
        state = form.layer(linear, grid, grid.encode(linear.weight)).state_dict()
        real = sum(tensor.numel() * tensor.element_size() for key, tensor in state.items() if key != "bias")
        assert abs(form.size_bytes(outputs, inputs) - real) <= 200
        looked_at += 1
    assert looked_at == 3


@pytest.mark.parametrize("preset", ["nf4-dq", "fp4-dq"])
def test_a_block_of_zeros_under_double_quantization(preset):
    """Its scale, in 8 bits, may be 0 or below."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    form = format_of(preset)
    grid = form.fit(weight, fit="mse")
    decoded = grid.decode(grid.encode(weight))
    assert torch.isfinite(decoded).all() and float(decoded[2].abs().max()) < 1e-3


_PLAIN = """
import json, sys
import torch, transformers
torch.set_num_threads(1)
found = []
for folder in sys.argv[1:]:
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        logits = getattr(transformers, expected["auto"]).from_pretrained(folder).train("int8" not in folder)(**expected["inputs"]).logits
    found.append(float((logits - expected["logits"]).abs().max()))
assert "hfcompress" not in sys.modules
print(json.dumps([found, float(expected["logits"].abs().max())]))
"""


def test_plain_transformers_loads_it(tmp_path):
    """Nothing of hfcompress is needed; widths and mode are such that bitsandbytes 0.50 reads 4-bit weights right by itself."""
    folders, changes = [], {"hidden_size": 64, "intermediate_size": 128}
    changes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for preset in BNB:
        model, batches = ours("bert", preset, data=True, **changes)
        folder = tmp_path / preset
        model.save_pretrained(folder)
        assert len(load_file(folder / "model.safetensors")) == len(model.state_dict())
        logits = run_model(model, batches[0])["logits"]
        torch.save({"inputs": dict(batches[0]), "logits": logits, "auto": task_class("bert")}, folder / "expected.pt")
        folders.append(str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PLAIN, *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, largest = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 5 and max(found) <= 1e-4 * largest


def test_nothing_rounded():
    with pytest.raises(ValueError, match=r"^no layer was rounded$"):
        put_rounded(make("bert")[0], {})
