"""Training with rounded weights: what is written computes what was trained, whatever happens on the way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

import hfcompress
from hfcompress.checkpoints.packed import PackedLinear
from hfcompress.checkpoints.record import read_steps
from hfcompress.config import Recipe, RecipeError
from hfcompress.quantization.aware import AwareLinear, InputRange, input_ranges, make_aware, round_aware
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize
from hfcompress.training import CompressionTrainer, DistillationTrainer
from tests.training.scenarios import Examples, Gradients, arguments, build

FORMATS = [
    "int8-channel",
    "int4-g32-asym",
    "int2-g16-asym",
    "ternary-g16",
    "binary-channel",
    "nf4-dq",
    "int8",
    "fixed4",
]
TASKS = {"bert": "sequence", "vit": "image", "gpt2": "causal", "llama": "causal"}


def train(folder: Path, family: str = "bert", *, qat: dict[str, Any], **options: Any) -> CompressionTrainer:
    sections: dict[str, Any] = {"qat": qat, **options.pop("sections", {})}
    model = options.pop("model", None) or build(family, TASKS[family], seed=1)
    given = options.pop("given", {})
    resume = options.pop("resume", None)
    trainer = CompressionTrainer(
        model=model,
        recipe=Recipe.from_dict(sections),
        args=arguments(folder, **options),
        train_dataset=Examples(family, TASKS[family]),
        **given,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(model: nn.Module, family: str) -> torch.Tensor:
    batch = Examples(family, TASKS[family]).batch(0, 1, 2, 5)
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("written", FORMATS)
def test_what_is_written_is_what_was_trained(tmp_path: Path, written: str) -> None:
    model = build("bert", "sequence", seed=1)
    names = layers_to_quantize(model)
    assert len(names) == 18
    make_aware(model, dict.fromkeys(names, written))
    before, whole = logits(model, "bert"), logits(build("bert", "sequence", seed=1), "bert")
    assert not torch.equal(before, whole)
    rounded = round_aware(model)
    assert rounded.keys() == set(names) and not any(isinstance(m, AwareLinear) for m in model.modules())
    torch.testing.assert_close(logits(model, "bert"), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", TASKS)
def test_trained_saved_and_loaded(tmp_path: Path, family: str) -> None:
    start = build(family, TASKS[family], seed=1).state_dict()
    sections = {"qat": {"format": "int3-g16-asym"}}
    trainer = CompressionTrainer(
        model=build(family, TASKS[family], seed=1),
        recipe=Recipe.from_dict(sections),
        args=arguments(tmp_path),
        train_dataset=Examples(family, TASKS[family]),
    )
    trainer.train()
    after = logits(trainer.model, family)
    packed = [module for module in trainer.model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == {"bert": 18, "vit": 18, "gpt2": 12, "llama": 21}[family]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hfcompress.load(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded, family), after, rtol=0, atol=0)
    weights = loaded.dequantize().state_dict()
    assert weights.keys() == start.keys(), "whole again it is the plain model"
    assert not any(
        torch.equal(weights[f"{name}.weight"], start[f"{name}.weight"]) for name in layers_to_quantize(loaded)
    )
    (step,) = read_steps(loaded.config)
    assert step["step"] == "quantize" and step["layers"] == {"int3-g16-asym": len(packed)}
    metrics = trainer.evaluate(Examples(family, TASKS[family]))
    assert metrics["eval_loss"] > 0


def test_the_gradient_is_that_of_the_rounded_weight() -> None:
    """Straight through: the whole weight gets what the rounded one would get."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 4))
    plain = copy.deepcopy(model)
    make_aware(model, {"0": "int2-g16-asym"})
    form, x = format_of("int2-g16-asym"), torch.randn(5, 32)
    weight = plain[0].weight.detach()
    plain[0].weight.data = form.fit(weight, fit="normal").snap(weight)
    for each in (model, plain):
        F.mse_loss(each(x), torch.ones(5, 4)).backward()
    assert not torch.allclose(model[0].weight, plain[0].weight)
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)


def test_it_learns_what_plain_rounding_loses(tmp_path: Path) -> None:
    teacher = build("bert", "sequence", seed=7)
    sections = {"distill": {"task": {"weight": 0.0}, "logits": {"weight": 1.0}}}
    losses = []
    for rate in (1e-12, 3e-3):
        model = copy.deepcopy(teacher)
        trainer = train(
            tmp_path,
            qat={"format": "ternary-g16"},
            sections=sections,
            model=model,
            given={"teacher": copy.deepcopy(teacher)},
            max_steps=60,
            learning_rate=rate,
        )
        ours, theirs = logits(trainer.model, "bert"), logits(teacher, "bert")
        losses.append(F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean").item())
    assert losses[1] < 0.3 * losses[0]


def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    qat = {"format": "int2-asym", "first": ["int8-channel", "int4"], "start": 0.1, "end": 0.6}
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path / "a", qat=qat, **settings)
    for at in (3, 6):
        again = train(tmp_path / "b", qat=qat, resume=str(tmp_path / "a" / f"checkpoint-{at}"), **settings)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[name]), name
    config = json.loads((tmp_path / "a" / "checkpoint-6" / "config.json").read_text())
    assert "quantization_config" not in config, "checkpoints are those of the plain model"


def test_bits_by_schedule(tmp_path: Path) -> None:
    trainer = train(
        tmp_path,
        qat={"format": "ternary", "first": ["int8-channel", "int4"], "start": 0.25, "end": 0.75},
        max_steps=8,
        logging_strategy="steps",
        logging_steps=1,
    )
    bits = [entry.get("bits") for entry in trainer.state.log_history if "loss" in entry]
    # Logged after the step, when the layers are set for the next.
    assert bits == [None, 8, 8, 4, 4, 1.6, 1.6, 1.6]


def test_pruning_and_rounding_at_once(tmp_path: Path) -> None:
    prune = {
        "target": {"sparsity": 0.5},
        "criterion": "first_order",
        "multiple_of": {"neurons": 4},
        "schedule": {"start": 0.1, "end": 0.6},
    }
    trainer = train(tmp_path, qat={"format": "int4-g16"}, sections={"prune": prune}, max_steps=10)
    after = logits(trainer.model, "bert")
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hfcompress.load(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded, "bert"), after, rtol=0, atol=0)
    assert sum(p.numel() for p in loaded.dequantize().parameters()) < sum(
        p.numel() for p in build("bert", "sequence", seed=1).parameters()
    )
    assert [step["step"] for step in read_steps(loaded.config)] == ["prune", "quantize"]


def test_layers_are_dropped_while_bits_go_down(tmp_path: Path) -> None:
    """Those behind a dropped layer have other names when the bits change next, and in a run that goes on."""
    prune = {
        "target": {"parameters": 0.5},
        "units": ["layers"],
        "criterion": "first_order",
        "schedule": {"start": 0.1, "end": 0.4, "updates": 1},
    }
    qat = {"format": "int2-asym", "first": ["int8-channel", "int4"], "start": 0.1, "end": 0.8}
    settings = {"sections": {"prune": prune}, "max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    make = lambda: build("bert", "sequence", seed=1, num_hidden_layers=4)  # noqa: E731
    whole = train(tmp_path / "a", qat=qat, model=make(), **settings)
    trained = logits(whole.model, "bert")
    assert whole.model.config.num_hidden_layers < 4
    whole.save_model(str(tmp_path / "saved"))
    loaded = hfcompress.load(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded, "bert"), trained, rtol=0, atol=0)
    again = train(tmp_path / "b", qat=qat, model=make(), resume=str(tmp_path / "a" / "checkpoint-5"), **settings)
    torch.testing.assert_close(logits(again.model, "bert"), trained, rtol=0, atol=0)


def test_accumulated_parts_are_the_whole(tmp_path: Path) -> None:
    steps = []
    for size in (8, 2):
        captured = Gradients()
        train(
            tmp_path,
            qat={"format": "int3-g16"},
            given={"callbacks": [captured]},
            max_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        steps.append(torch.cat([gradient.flatten() for gradient in captured.steps[0].values()]))
    assert ((steps[1] - steps[0]).norm() / steps[0].norm()).item() < 1e-5


@pytest.mark.parametrize(
    "qat, match",
    [
        ({"format": "int9"}, "'int9' is not allowed; did you mean int8"),
        ({"format": "codebook4"}, "found once, after training"),
        ({"format": "int4", "skip": ["nothing.here"]}, "not a module"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, qat: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        train(tmp_path, qat=qat)


def test_what_a_recipe_cannot_say() -> None:
    with pytest.raises(RecipeError, match="must come after start"):
        Recipe.from_dict({"qat": {"format": "int4", "first": ["int8"], "start": 0.3, "end": 0.2}})
    with pytest.raises(RecipeError, match="qat leaves a model that is quantized"):
        Recipe.from_dict({"qat": {"format": "int4"}, "quantize": {}})
    with pytest.raises(ValueError, match="use CompressionTrainer"):
        DistillationTrainer(
            model=build("bert", "sequence", seed=1), recipe=Recipe.from_dict({"distill": {}, "qat": {"format": "int4"}})
        )


# ---- activations ----


def by_hand(
    x: np.ndarray, low: float, high: float, upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Rounded inputs, and the gradients of inputs, low and high (Esser et al. 2020, with a zero point)."""
    step = (high - low) / 255
    zero = np.round(-low / step)
    number = np.round(x / step) + zero
    inside, above, below = (number >= 0) & (number <= 255), number > 255, number < 0
    snapped = (np.clip(number, 0, 255) - zero) * step
    of_step = np.where(inside, np.round(x / step) - x / step, np.where(above, 255 - zero, -zero))
    # The zero point moves with -low / step where the number stands at an end of the grid.
    ends = above | below
    zero_by_low, zero_by_step = -1 / step, low / step**2
    by_low = of_step * (-1 / 255) + np.where(ends, -step * (zero_by_low + zero_by_step * (-1 / 255)), 0)
    by_high = of_step * (1 / 255) + np.where(ends, -step * zero_by_step / 255, 0)
    scale = (x.shape[-1] * 255) ** -0.5
    return (
        snapped,
        upstream * inside,
        scale * float((upstream * by_low).sum()),
        scale * float((upstream * by_high).sum()),
    )


def test_rounded_inputs_and_their_gradients_are_those_by_hand() -> None:
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(0, 1.3, (7, 11)), rng.normal(size=(7, 11))
    one = InputRange(torch.device("cpu"))
    one.observing = False
    one.put(torch.tensor([-1.25, 2.5]))
    inputs = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    out = one(inputs, training=True)
    (out * torch.tensor(upstream)).sum().backward()
    snapped, by_x, by_low, by_high = by_hand(x, -1.25, 2.5, upstream)
    assert (snapped != x).all() and (np.abs(by_x) == 0).any()
    np.testing.assert_allclose(out.detach().numpy(), snapped, atol=1e-6)
    np.testing.assert_allclose(inputs.grad.numpy(), by_x, atol=1e-6)
    np.testing.assert_allclose([one.low.grad.item(), one.high.grad.item()], [by_low, by_high], rtol=1e-4)


@pytest.mark.parametrize("ranges", ["learned", "moving-average"])
@pytest.mark.parametrize("family", TASKS)
def test_activations_are_saved_and_computed_as_they_were_trained(tmp_path: Path, family: str, ranges: str) -> None:
    qat = {"format": "int4-g16-asym", "activations": {"ranges": ranges, "samples": 12}, "start": 0.3}
    seen: dict[str, Any] = {}

    class Looks(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen["logits"] = logits(model, family)
            seen["ranges"] = {name: (one.low.item(), one.high.item()) for name, one in input_ranges(model).items()}

    trainer = train(tmp_path, family, qat=qat, given={"callbacks": [Looks()]}, learning_rate=1e-2)
    assert torch.equal(logits(trainer.model, family), seen["logits"])
    packed = {name: m for name, m in trainer.model.named_modules() if isinstance(m, PackedLinear)}
    assert packed.keys() == seen["ranges"].keys() and len(packed) >= 12
    assert all(high > 0 > low for low, high in seen["ranges"].values() if low != 0)
    assert len({layer.input_step.item() for layer in packed.values()}) > 3
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hfcompress.load(tmp_path / "saved")
    assert torch.equal(logits(loaded, family), seen["logits"])
    # Without the rounding of activations it is another model.
    for layer in loaded.modules():
        if isinstance(layer, PackedLinear):
            layer.input_step = layer.input_zero = None
    assert not torch.equal(logits(loaded, family), seen["logits"])


@pytest.mark.parametrize("ranges", ["learned", "moving-average"])
def test_a_run_with_ranges_goes_on_to_the_bit(tmp_path: Path, ranges: str) -> None:
    qat = {"format": "int4-g16-asym", "activations": {"ranges": ranges, "samples": 12}, "start": 0.2}
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = train(tmp_path / "whole", qat=qat, **options)
    for step in (2, 4):
        again = train(tmp_path / "again", qat=qat, resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **options)
        ours, theirs = again.model.state_dict(), whole.model.state_dict()
        assert sum("input_step" in name for name in ours) == 18
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("ranges", ["learned", "moving-average"])
def test_ranges_do_not_depend_on_how_a_batch_is_split(tmp_path: Path, ranges: str) -> None:
    qat = {"format": "int8-channel", "activations": {"ranges": ranges, "samples": 8}}
    descent = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "per_device_eval_batch_size": 4}
    found: dict[int, dict[str, torch.Tensor]] = {}

    class Looks(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            ranges = input_ranges(model).items()
            found[args.gradient_accumulation_steps] = {
                name: torch.stack((one.low, one.high)).detach() for name, one in ranges
            }

    for batch, steps in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        train(tmp_path, qat=qat, given={"callbacks": [Looks()]}, **sizes, **descent)
    assert len(found[1]) == 18
    for name, ends in found[1].items():
        torch.testing.assert_close(found[4][name], ends, rtol=1e-4, atol=1e-5)


def test_ranges_move_as_they_should(tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            for name, one in input_ranges(model).items():
                found.setdefault(name, []).append(one.high.item())

    for ranges in ("learned", "moving-average"):
        found.clear()
        qat = {"format": "int8-channel", "activations": {"ranges": ranges, "samples": 12}}
        train(tmp_path, qat=qat, given={"callbacks": [Looks()]}, learning_rate=1e-2)
        assert len(found) == 18 and all(len(set(values)) > 2 for values in found.values()), ranges
    with pytest.raises(RecipeError, match="activations cannot be rounded beside nf4"):
        Recipe.from_dict({"qat": {"format": "nf4", "activations": {}}})
