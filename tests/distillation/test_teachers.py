from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hfcompress.anatomy import find_layers
from hfcompress.distillation import Teacher, capture_outputs
from tests.families import CONFIGS, SEQ2SEQ, TWO_TOWERS, make_inputs, make_model


class Recorder(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)
        self.given: dict[str, Any] = {}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        self.given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        return self.dropout(input_ids.float()) * self.weight.sum()


class Anything(Recorder):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:  # type: ignore[override]
        self.given = kwargs
        return (torch.zeros(1, 2),)


def test_frozen_and_without_dropout_even_when_somebody_switches_it_to_training() -> None:
    model = make_model("bert", "AutoModelForSequenceClassification", hidden_dropout_prob=0.5).train()
    teacher, inputs = Teacher(model), make_inputs("bert")
    assert not model.training
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 0
    first = teacher(inputs).outputs["logits"]
    model.train()
    second = teacher(inputs).outputs["logits"]
    assert torch.equal(first, second) and not first.requires_grad and first.grad_fn is None
    expected = model.eval()(**inputs).logits
    assert torch.equal(first, expected)


def test_labels_and_unknown_inputs_are_withheld_and_the_batch_stays_as_it_is() -> None:
    model = Recorder()
    teacher = Teacher(model, label_names=["start_positions"])
    ids = torch.ones(1, 2, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "labels": torch.zeros(1),
        "start_positions": torch.zeros(1),
        "token_type_ids": torch.zeros(1),
        "num_items_in_batch": 3,
        "flag": "text",
    }
    before = dict(batch)
    teacher(batch)
    assert set(model.given) == {"input_ids", "attention_mask"} and model.given["attention_mask"] is None
    assert batch.keys() == before.keys() and all(batch[name] is before[name] for name in batch)


def test_a_wrapper_that_takes_anything_gets_all_but_the_labels() -> None:
    model = Anything()
    found = Teacher(model)({"input_ids": torch.ones(1, 1), "labels": torch.ones(1), "extra": 5})
    assert found.outputs["logits"].shape == (1, 2)
    assert set(model.given) == {"input_ids", "extra"} and model.given["extra"] == 5


def test_inputs_a_teacher_of_another_family_does_not_take() -> None:
    teacher = Teacher(make_model("distilbert", "AutoModelForSequenceClassification"))
    inputs = make_inputs("bert") | {"token_type_ids": torch.zeros(2, 9, dtype=torch.long), "labels": torch.zeros(2)}
    assert teacher(inputs).outputs["logits"].shape == (2, 2)


def test_moving_leaves_placed_and_quantized_teachers_alone() -> None:
    moved = Teacher(Recorder())
    moved.to(torch.device("meta"))
    assert moved.device.type == "meta"
    for attribute, value in (("hf_device_map", {"": "cpu"}), ("quantization_method", "bitsandbytes")):
        model = Recorder()
        setattr(model, attribute, value)
        placed = Teacher(model)
        placed.to(torch.device("meta"))
        assert placed.device.type == "cpu"


# One stack of three layers, each run once and reported without more.
_OTHERS = ("albert", "swin", "clip_vision_model", "siglip_vision_model", *TWO_TOWERS, *SEQ2SEQ)
FAMILIES = [name for name in CONFIGS if ":" not in name and name not in _OTHERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_layers_are_the_hidden_states_the_model_reports(family: str) -> None:
    model, inputs = make_model(family), make_inputs(family)
    layers = find_layers(model)
    with torch.no_grad(), capture_outputs(dict(enumerate(layers))) as captured:
        outputs = model(**inputs, output_hidden_states=True)
    hidden = outputs.hidden_states
    assert len(layers) == 3 and set(captured) == {0, 1, 2}
    # The last entry that the model reports may be normalized already; what went into each next layer is certain.
    for number in range(2):
        torch.testing.assert_close(captured[number], hidden[number + 1], rtol=0, atol=0)
    assert captured[2].shape == hidden[-1].shape and captured[2].ndim == 3


def test_all_families_were_looked_at() -> None:
    assert len(FAMILIES) == 31


def test_capturing_ends_with_the_context_and_keeps_the_graph() -> None:
    layer = nn.Linear(2, 3)
    with capture_outputs({4: layer}) as captured:
        layer(torch.ones(1, 2))
    assert captured[4].requires_grad and captured[4].grad_fn is not None
    first = captured[4]
    layer(torch.zeros(1, 2))
    assert captured[4] is first and len(layer._forward_hooks) == 0


def test_hooks_are_removed_when_the_model_fails() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(RuntimeError), capture_outputs({0: layer}):
        layer(torch.ones(1, 5))
    assert len(layer._forward_hooks) == 0


def test_a_teacher_is_not_changed_by_being_asked() -> None:
    model = make_model("gpt2", "AutoModelForCausalLM")
    before = copy.deepcopy(model.state_dict())
    teacher = Teacher(model)
    for seed in range(3):
        teacher(make_inputs("gpt2", seed=seed))
    after = model.state_dict()
    assert len(after) > 10 and all(torch.equal(before[name], after[name]) for name in after)
