"""What bits cost in loss and bytes, and which are chosen: against measuring, brute force, and the files that come out."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForSequenceClassification

from hfcompress.cli.main import main
from hfcompress.quantization import bits
from hfcompress.quantization.bits import BitCost, assign_bits, bit_costs, format_for, total_cost
from hfcompress.quantization.calibrated import round_at_once
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize, put_rounded
from tests.families import make_inputs, make_model, task_class
from tests.tasks.conftest import save_bert


def batches(name: str, count: int, *, batch: int = 16) -> list[dict[str, torch.Tensor]]:
    return [make_inputs(name, task_class(name), batch=batch, seed=seed) for seed in range(count)]


def rounded_by_hand(model, layer: str, form: str) -> None:
    """Rounds one layer, by a loop over its own grid."""
    weight = model.get_submodule(layer).weight
    grid = format_of(form).fit(weight.detach(), fit="mse")
    levels = grid.levels * grid.spread(grid.scale)[..., None]
    nearest = (levels - weight.detach()[..., None]).abs().argmin(-1, keepdim=True)
    with torch.no_grad():
        weight.copy_(levels.gather(-1, nearest)[..., 0])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_divergence_is_that_of_a_model_with_one_rounded_layer(name):
    model, data = make_model(name, task_class(name)), batches(name, 2, batch=3)
    layers = [layers_to_quantize(model)[place] for place in (0, 5, -1)]
    costs = bit_costs(model, data, ["int2", "float16", "int4-channel"], names=layers, by="divergence")
    assert list(costs) == layers
    looked_at = 0
    for layer, form in itertools.product(layers, ["int2-g64", "int4-channel"]):
        other = make_model(name, task_class(name))
        rounded_by_hand(other, layer, form)
        total = examples = 0
        for inputs in data:
            with torch.no_grad():
                before, after = (log_softmax(each(**inputs).logits.double(), -1) for each in (model, other))
            each = kl_div(after, before, reduction="none", log_target=True).sum(-1)
            total += float((each * inputs["attention_mask"] if each.dim() == 2 else each).sum())
            examples += len(each)
        assert costs[layer][form].loss == pytest.approx(total / examples, rel=2e-3, abs=1e-7) and total > 1e-6
        assert costs[layer]["float16"] == BitCost(0.0, 2 * model.get_submodule(layer).weight.numel())
        looked_at += 1
    assert looked_at == 6


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_fisher_expects_what_is_measured(name, monkeypatch):
    """Of one layer it is a guess; over all of them the factor is 1, and the order is kept, in each format alone as well."""
    model, data = make_model(name, task_class(name)), batches(name, 8)
    formats = ["int3-g64", "int5-g64"]
    expected = bit_costs(model, data, formats)
    found = bit_costs(model, data[:3], formats, by="divergence")
    logs = torch.tensor(
        [[[costs[layer][form].loss for layer in found] for form in formats] for costs in (expected, found)]
    ).log()
    assert logs.shape == (2, 2, len(layers_to_quantize(model))) and logs.shape[2] >= 12
    assert abs(float((logs[0] - logs[1]).mean())) < math.log(1.5)
    assert float(torch.corrcoef(logs.flatten(1))[0, 1]) > 0.85
    assert float(torch.corrcoef(logs[:, 1])[0, 1]) > 0.7
    # In as many groups as there are layers it is the same.
    monkeypatch.setattr(bits, "_SECOND_MOMENTS_BYTES", 1)
    again = bit_costs(model, data[:1], ["int3"], names=list(found)[:4])
    monkeypatch.undo()
    together = bit_costs(model, data[:1], ["int3"], names=list(found)[:4])
    for layer, costs in again.items():
        assert costs["int3-g64"].loss == pytest.approx(together[layer]["int3-g64"].loss, rel=1e-4)


@pytest.mark.parametrize("by", ["fisher", "divergence"])
def test_the_model_is_left_as_it_was(by):
    model = make_model("bert", task_class("bert"))
    model.train()
    model.bert.embeddings.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    costs = bit_costs(model, batches("bert", 1), ["int2"], by=by)
    assert len(costs) == 18 and all(cost["int2-g64"].loss > 0 for cost in costs.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and len(state) > 50
    assert model.training and not model.bert.embeddings.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_what_nobody_reads_costs_nothing_and_bytes_are_those_of_the_format():
    model = make_model("bert", task_class("bert"))
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.zero_()
    names = [f"bert.encoder.layer.1.{part}.dense" for part in ("intermediate", "output")]
    for by in ("fisher", "divergence"):
        costs = bit_costs(model, batches("bert", 1), ["float32", "int8", "nf4", "int3-g32"], names=names, by=by)
        first = costs[names[0]]
        assert max(cost.loss for cost in first.values()) < 1e-9
        # 48 x 32 weights: 4 bytes each; 1, and 4 for each output; half, and what bitsandbytes adds; 3/8 and 2 for 32.
        sizes = {form: cost.size_bytes for form, cost in first.items()}
        assert sizes["nf4"] == format_of("nf4").size_bytes(48, 32)
        assert sizes == {"float32": 6144, "int8": 1536 + 192, "nf4": sizes["nf4"], "int3-g32": 576 + 96}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0), count=st.integers(1, 5))
def test_the_assignment_is_the_best_there_is(seed, share, count):
    generator = torch.Generator().manual_seed(seed)
    forms = ["float16", "int8", "nf4-dq", "int3-g64"]
    drawn = torch.rand(count, len(forms), 2, generator=generator)
    costs = {
        f"layer{row}": {
            form: BitCost(0.0 if form == "float16" else float(loss), int(1000 * size) + 1)
            for form, (loss, size) in zip(forms, layer, strict=True)
        }
        for row, layer in enumerate(drawn.tolist())
    }
    every = [dict(zip(costs, choice, strict=True)) for choice in itertools.product(forms, repeat=count)]
    totals = [total_cost(costs, choice) for choice in every]
    sizes, losses = [total.size_bytes for total in totals], [total.loss for total in totals]
    for bound, values, goals in (
        (min(sizes) + share * (max(sizes) - min(sizes)), sizes, losses),
        (share * max(losses), losses, sizes),
    ):
        by_bytes = values is sizes
        best = min(goal for value, goal in zip(values, goals, strict=True) if value <= bound * (1 + 1e-12))
        layers = assign_bits(costs, **{"max_bytes" if by_bytes else "max_loss": bound})
        assert "float16" not in layers.values() and layers.keys() <= costs.keys()
        total = total_cost(costs, layers)
        spent, goal = (total.size_bytes, total.loss) if by_bytes else (total.loss, total.size_bytes)
        assert spent <= bound * (1 + 1e-9) and goal == pytest.approx(best, abs=1e-9)


def test_what_does_not_fit_is_said_in_one_line():
    model, data = make_model("bert", task_class("bert")), batches("bert", 1, batch=2)
    costs = {"a": {"int8": BitCost(0.5, 100)}, "b": {"int8": BitCost(0.25, 10)}}
    cases = {
        "110": lambda: assign_bits(costs, max_bytes=109),
        "these formats lose at least 0.75": lambda: assign_bits(costs, max_loss=0.7),
        "only one of them": lambda: assign_bits(costs),
        "and only one": lambda: assign_bits(costs, max_bytes=200, max_loss=1),
        "there is no calibration data": lambda: bit_costs(model, [], ["int8"]),
        "at least one format": lambda: bit_costs(model, data, []),
        "are all of one type": lambda: bit_costs(model, data, ["float16", "float32"]),
        "not by 'guess'": lambda: bit_costs(model, data, ["int8"], by="guess"),
        "no quantization scheme 'int9'": lambda: bit_costs(model, data, ["int9"]),
        "there are 2 to 8, and 16": lambda: format_for("9", kept="float32"),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert [format_for(each, kept="bfloat16") for each in ("32", "5", "fp4", "float16")] == [
        "bfloat16", "int5-g64", "fp4", "float16",
    ]  # fmt: skip


FRESH = """
import sys, torch, transformers
folder, inputs = sys.argv[1], torch.load(sys.argv[2])
def same(name):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(f"{folder}/{name}").eval()
    with torch.no_grad():
        found = model(**inputs).logits
    print(name, type(model.hf_quantizer).__name__, torch.equal(found, torch.load(f"{folder}/{name}.pt")))
same("plain")
assert "hfcompress" not in sys.modules
import hfcompress
same("mixed")
"""


def test_what_is_chosen_loads_in_a_fresh_process(tmp_path):
    """One preset of bitsandbytes and layers in float: bitsandbytes alone. Several formats: with hfcompress."""
    data = batches("bert", 1)
    torch.save(data[0], tmp_path / "inputs.pt")
    for name, formats, share in (
        ("plain", ["float32", "int8"], 0.3),
        ("mixed", ["float32", "int8", "nf4", "int3"], 0.1),
    ):
        model = make_model("bert", task_class("bert"))
        costs = bit_costs(model, data, formats)
        most, least = (total_cost(costs, form).size_bytes for form in ("float32", format_of(formats[-1]).name))
        layers = assign_bits(costs, max_bytes=share * most + (1 - share) * least)
        assert {*layers.values()} == ({"int8"} if name == "plain" else {"int8", "nf4", "int3-g64"})
        if name == "plain":
            assert 0 < len(layers) < 18, "some layers stay in float"
        put_rounded(model, round_at_once(model, layers, fit="mse"))
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.save(model(**data[0]).logits, tmp_path / f"{name}.pt")
        saved = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert saved["quant_method"] == ("bitsandbytes" if name == "plain" else "hfcompress")
        if name == "mixed":
            assert saved["modules"] == layers
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), str(tmp_path / "inputs.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["plain Bnb8BitHfQuantizer True", "mixed PackedQuantizer True"]


# ---- the command ----


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_bert(tmp_path / "bert", names=["fine", "poor"])
    (tmp_path / "texts.txt").write_text("\n".join(["a good film", "not very bad", "a bad film"] * 5))

    def run(*options: str) -> tuple[int, str, str]:
        data = ["--data", str(tmp_path / "texts.txt"), "--length", "8", "--samples", "8", "--device", "cpu"]
        status = main(["sensitivity", str(tmp_path / "bert"), *data, *map(str, options)])
        seen = capsys.readouterr()
        return status, seen.out, seen.err

    return run


def test_the_command_shows_saves_and_draws(command, tmp_path):
    files = {"--save": tmp_path / "bits.json", "--picture": tmp_path / "bits.png"}
    arguments = [part for pair in files.items() for part in pair]
    status, out, _ = command("--bits", "16", "8", "6", "int3-g32", "--max-loss", "1e-9", *arguments)
    lines = out.splitlines()
    assert status == 0 and lines[0].split()[-4:] == ["float32", "int8", "int6-g64", "int3-g32"]
    rows = {line.split()[0]: line for line in lines[1:7]}
    assert len(rows) == 6 and all(line.count("*") == 1 for line in rows.values())
    saved = json.loads(files["--save"].read_text())
    assert rows.keys() == saved["costs"].keys() and saved["layers"].keys() <= rows.keys()
    for name, row in rows.items():
        chosen = saved["costs"][name][saved["layers"].get(name, "float32")]
        assert f"{chosen['size_bytes'] / 1e3:.1f}*" in row
    taken = [saved["costs"][name][saved["layers"].get(name, "float32")] for name in rows]
    assert (
        saved["total"]["loss"] == pytest.approx(sum(cost["loss"] for cost in taken)) and saved["total"]["loss"] <= 1e-9
    )
    uniform = [line for line in lines if line.startswith(("all ", "as marked"))]
    assert [line.split()[1] for line in uniform] == ["float32", "int8", "int6-g64", "int3-g32", "marked"]
    assert lines[-1].endswith(f"--layers {files['--save']}") and f"drawn in {files['--picture']}" in lines
    with Image.open(files["--picture"]) as drawn:
        assert drawn.format == "PNG" and drawn.height > 200
    every = sum(
        each.numel() for each in AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").parameters()
    )
    assert saved["rest_bytes"] + sum(cost["float32"]["size_bytes"] for cost in saved["costs"].values()) == 4 * every

    status, out, _ = command("--bits", "8", "4", "2", "--by", "divergence", "--json")
    found = json.loads(out)
    assert status == 0 and found.keys() == {"by", "rest_bytes", "costs"} and found["by"] == "divergence"
    assert list(next(iter(found["costs"].values()))) == ["int8", "nf4-dq", "int2-g64"]


def test_the_command_refuses_in_one_line(command, tmp_path):
    cases = {
        ("--bits", "9"): "9 bits: there are 2 to 8, and 16 for a layer that is left as it is",
        ("--bits", "int9"): "no quantization scheme 'int9'",
        ("--bits", "8", "--save", "a.json"): "--save keeps a choice of bits; give it a budget, --max-mb or --max-loss",
        ("--max-mb", "3"): "--max-mb is about bits; say which with --bits, e.g. --bits 16 8 4",
        ("--bits", "8", "4", "--max-mb", "0.001"): "--max-mb 0.001 is too little: with these bits the model takes 0.0",
        ("--bits", "8", "--max-loss", "0"): "0 nats are too few: these formats lose at least",
    }
    for options, message in cases.items():
        status, out, err = command(*options)
        (line,) = [line for line in err.splitlines() if line.startswith("hfcompress: ")]
        assert status == 2 and out == "" and line.startswith(f"hfcompress: {message}"), (options, err)
    with pytest.raises(SystemExit):
        command("--bits", "8", "--max-loss", "0", "--max-mb", "1")
