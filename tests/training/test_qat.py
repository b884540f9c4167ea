"""Training with rounded weights: what is written computes what was trained, whatever happens on the way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hfcompress
from hfcompress.checkpoints.packed import PackedLinear
from hfcompress.checkpoints.record import read_steps
from hfcompress.config import Recipe, RecipeError
from hfcompress.quantization.aware import AwareLinear, make_aware, round_aware
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
        ({"format": "int9"}, "no quantization scheme 'int9'"),
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
