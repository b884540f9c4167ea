"""Encoder-decoders pruned while they learn with `Seq2SeqTrainer`: saved, reloaded by every way, and generating."""

from __future__ import annotations

import pytest
import torch
import transformers

import hfcompress
from hfcompress import Recipe, Seq2SeqPruningTrainer
from hfcompress.anatomy import find_sites
from hfcompress.checkpoints.record import read_steps, read_units
from tests.families import make_model

AUTO = "AutoModelForSeq2SeqLM"


def examples(count):
    """Copy the first tokens: something that can be learned in a few steps."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 15, (count, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:4].clone()} for row in rows]


def train(name, folder, *, sparsity=0.5, cut="gradual"):
    prune = {
        "target": {"sparsity": sparsity},
        "cut": cut,
        "criterion": "first_order",
        "repair": False,
        "multiple_of": {"neurons": 1},
        "at_least": {"heads": 1, "neurons": 4},
        "schedule": {"name": "polynomial", "start": 0.1, "end": 0.8, "updates": 4},
    }
    model = make_model(name, AUTO)
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=0.01,
        predict_with_generate=True,
        generation_max_length=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=5,
        save_strategy="steps",
        save_steps=10,
    )
    trainer = Seq2SeqPruningTrainer(
        model=model,
        recipe=Recipe.from_dict({"prune": prune}),
        args=arguments,
        train_dataset=examples(16),
        eval_dataset=examples(4),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("name", "cut"), [("bart", "gradual"), ("bart", "end"), ("t5", "gradual")])
def test_gradual_pruning_save_reload_generate(name, cut, tmp_path):
    dense = {site.name: site for site in find_sites(make_model(name, AUTO))}
    trainer = train(name, tmp_path / "run", cut=cut)
    model = trainer.model
    left = {site.name: site.units for site in find_sites(model)}
    total = sum(site.parameters_per_unit * site.units for site in dense.values())
    kept = sum(dense[site].parameters_per_unit * units for site, units in left.items())
    assert 0.5 <= 1 - kept / total < 0.7
    smaller = {site.rpartition(".")[2] for site, units in left.items() if units < dense[site].units}
    stacks = {dense[site].stack for site, units in left.items() if units < dense[site].units}
    assert "neurons" in smaller and stacks == {"encoder", "decoder"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]

    # Evaluation generates with the pruned model.
    predicted = trainer.predict(examples(4))
    assert predicted.predictions.shape[0] == 4 and predicted.predictions.shape[1] > 1

    trainer.save_model(str(tmp_path / "final"))
    assert read_steps(model.config)[-1]["step"] == "prune"
    inputs = {key: torch.stack([row[key] for row in examples(4)]) for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.eval().generate(**inputs, **settings, use_cache=False)
    reloaded = 0
    for again in (
        hfcompress.load(tmp_path / "final"),
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "final"),
    ):
        assert {site.name: site.units for site in find_sites(again)} == left
        assert read_units(again.config) == read_units(model.config) or not read_units(again.config)
        for beams in (1, 2):
            tokens = again.generate(**inputs, **settings, num_beams=beams)
            assert torch.equal(tokens, model.generate(**inputs, **settings, num_beams=beams))
            assert beams > 1 or torch.equal(tokens, expected)
        reloaded += 1
    assert reloaded == 2


def test_going_on_from_a_checkpoint_that_was_cut(tmp_path):
    trainer = train("bart", tmp_path / "run")
    first = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    again = train("bart", tmp_path / "again")
    assert all(torch.equal(value, first[key]) for key, value in again.model.state_dict().items()), "training repeats"
    resumed = Seq2SeqPruningTrainer(
        model=make_model("bart", AUTO),
        recipe=trainer.recipe,
        args=trainer.args,
        train_dataset=examples(16),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert resumed.state.global_step == 20
    for key, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, first[key], atol=1e-6, rtol=1e-5)
