"""A student learns without dropout, and keeps it."""

from __future__ import annotations

import pytest
import torch

from hfcompress.training import DistillationTrainer
from hfcompress.training.dropout import dropout_off
from tests.families import CONFIGS, TWO_TOWERS, largest_difference, make_config, make_inputs, make_model, task_class
from tests.training.scenarios import build, make_trainer, vector


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in TWO_TOWERS])
def test_nothing_is_left_out_at_random(name):
    """In training mode, what a model gives is what it gives in evaluation; then its rates are back, in it and in its config."""
    rates = {
        key: 0.4
        for key, value in vars(make_config(name)).items()
        if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
    model, inputs = make_model(name, task_class(name), **rates), make_inputs(name, task_class(name))

    def give():
        with torch.no_grad():
            return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}

    expected, config = give(), model.config.to_dict()
    model.train()
    with dropout_off(model):
        assert largest_difference(give(), expected) < 1e-5
    assert model.config.to_dict() == config
    assert largest_difference(give(), give()) > 0.1


def test_rates_come_back_after_an_error():
    model = make_model("bert", "AutoModelForSequenceClassification").train()
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    with pytest.raises(KeyError), dropout_off(model):
        raise KeyError
    assert rates == [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] and max(rates) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_student_learns_without_unless_asked(tmp_path, checkpointing):
    """As one whose config says 0, bit for bit, and it is saved with what its config says."""

    def learn(rate, asked):
        options = {"trainer": DistillationTrainer, "distill": {"dropout": asked}, "dropout": rate, "max_steps": 3}
        folder = tmp_path / f"{rate}-{asked}"
        trainer = make_trainer(folder, **options, gradient_checkpointing=checkpointing)
        trainer.train()
        trainer.save_model(str(folder / "model"))
        return vector(trainer.model), type(trainer.model).from_pretrained(folder / "model").config

    off, config = learn(0.3, False)
    none, _ = learn(0.0, True)
    on, _ = learn(0.3, True)
    assert torch.equal(off, none) and not torch.equal(off, on)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.3


def test_adapters_keep_theirs():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build("bert", "sequence", seed=0, dropout=0.3), peft.LoraConfig(lora_dropout=0.2))
    with dropout_off(adapted.get_base_model()):
        rates = {module.p for module in adapted.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.0, 0.2}
