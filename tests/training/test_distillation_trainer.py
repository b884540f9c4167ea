"""The teacher stays out of everything, and what is learnt from it is what the definitions say, for every kind of task."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, TrainerCallback

from hfcompress.config import Recipe
from hfcompress.distillation import make_map
from hfcompress.training import (
    CompressionTrainer,
    DistillationTrainer,
    PruningTrainer,
    Seq2SeqDistillationTrainer,
)
from hfcompress.training.distilling import PROJECTIONS_FILE
from tests.families import make_model
from tests.training.scenarios import (
    Examples,
    Gradients,
    arguments,
    build,
    checkpointing,
    compress,
    make_trainer,
    vector,
)


def distil(folder: Path, **options: Any) -> DistillationTrainer:
    return make_trainer(folder, trainer=options.pop("trainer", DistillationTrainer), **options)


def only(**weights: float) -> dict[str, Any]:
    """A distill section with one term: the weights not given are 0, the temperature is 1."""
    return {
        "task": {"weight": weights.get("task", 0.0)},
        "logits": {"weight": weights.get("logits", 0.0), "temperature": weights.get("temperature", 1.0)},
        "hidden": {"weight": weights.get("hidden", 0.0)},
    }


# ---- the teacher stays out of it ----


def test_the_teacher_is_only_read(tmp_path: Path) -> None:
    teacher = build("bert", "sequence", seed=7, dropout=0.3).train()
    teacher.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    modes: list[tuple[bool, bool]] = []

    class Modes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            modes.append((teacher.training, model.training))

    trainer = distil(
        tmp_path,
        teacher=teacher,
        given={"callbacks": [Modes()]},
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert trainer.teacher is not None and trainer.teacher.model is teacher
    assert modes == [(False, True)] * 6
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    student = build("bert", "sequence", seed=0)
    files = sorted(path.name for path in (tmp_path / "final").iterdir())
    assert files == ["config.json", "model.safetensors", "training_args.json"]
    for folder in (tmp_path / "final", tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"):
        assert list(folder.glob("*.safetensors")) == [folder / "model.safetensors"]
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in student.state_dict().items()}


def test_what_is_saved_loads_and_says_who_taught(tmp_path: Path) -> None:
    trainer = distil(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "final")
    assert torch.equal(vector(again), vector(trainer.model))
    [step] = again.config.hfcompress["steps"]
    assert step["step"] == "distill" and step["teacher"] == "BertForSequenceClassification"
    assert step["optimizer_steps"] == 6 and step["settings"] == json.loads(json.dumps(trainer.distill.model_dump()))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_teacher_by_path(tmp_path: Path, kind: type) -> None:
    live = build("bert", "sequence", seed=7)
    live.save_pretrained(tmp_path / "teacher")
    trainer = distil(tmp_path / "run", teacher=kind(tmp_path / "teacher"))
    assert type(trainer.teacher.model) is type(live) and not trainer.teacher.model.training
    trainer.train()
    other = distil(tmp_path / "run", teacher=live)
    other.train()
    assert torch.equal(vector(trainer.model), vector(other.model))
    assert trainer.model.config.hfcompress["steps"][0]["teacher"] == "teacher"  # not where it is


def test_the_student_becomes_like_the_teacher(tmp_path: Path) -> None:
    trainer = distil(tmp_path, distill=only(logits=1.0), max_steps=80, learning_rate=3e-3, lr_scheduler_type="constant")
    batch = trainer.train_dataset.batch(*range(16))
    before = trainer.compute_loss(trainer.model.train(), batch).item()
    trainer.train()
    after = trainer.compute_loss(trainer.model.train(), batch).item()
    assert before > 0.1 and after < before / 10


def test_a_teacher_of_another_family_and_precision(tmp_path: Path) -> None:
    teacher = build("distilbert", "sequence", seed=7).to(torch.bfloat16)
    trainer = distil(tmp_path, teacher=teacher, distill=only(logits=1.0))
    batch = trainer.train_dataset.batch(0, 1)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    ours = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    theirs = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    expected = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert trainer.state.global_step == 6


# ---- what is refused, in one line ----


def refused(match: str, call: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_student_itself_is_no_teacher(tmp_path: Path) -> None:
    student = build("bert", "sequence", seed=0)
    refused("same object; pass a copy", lambda: distil(tmp_path, model=student, teacher=student))
    half = build("bert", "sequence", seed=7)
    half.bert.embeddings = student.bert.embeddings
    refused("share .*embeddings.* pass a copy", lambda: distil(tmp_path, model=student, teacher=half))
    assert all(p.requires_grad for p in student.parameters()), "a refused teacher must leave the student as it was"
    trainer = distil(tmp_path, model=student, teacher=copy.deepcopy(student), distill=only(logits=1.0))
    batch = trainer.train_dataset.batch(0, 1)
    assert trainer.compute_loss(student.train(), batch).item() == pytest.approx(0.0, abs=1e-6)


def test_other_numbers_of_labels(tmp_path: Path) -> None:
    teacher = build("bert", "sequence", seed=7, num_labels=5)
    refused("the student has 3 labels and the teacher 5", lambda: distil(tmp_path, teacher=teacher))


def named(names: list[str], *, seed: int, keys: list[int] | None = None) -> Any:
    labels = {i: names[i] for i in (keys or range(len(names)))}
    return build(
        "bert",
        "sequence",
        seed=seed,
        id2label=labels,
        label2id={n: i for i, n in labels.items()},
        num_labels=len(names),
    )


def test_the_order_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = named(["negative", "neutral", "positive"], seed=0)
    turned = named(["positive", "neutral", "negative"], seed=7)
    refused("same labels in another order", lambda: distil(tmp_path, model=ours, teacher=turned))
    with caplog.at_level(logging.WARNING, logger="hfcompress.training.distilling"):
        distil(tmp_path, model=ours, teacher=named(["negative", "neutral", "positive"], seed=7))
        distil(tmp_path, model=ours, teacher=build("bert", "sequence", seed=7))  # has no names: nothing to compare
        assert not caplog.messages
        distil(tmp_path, model=ours, teacher=named(["bad", "so so", "good"], seed=7))
    assert "name their labels differently" in caplog.text


def test_labels_are_compared_by_number_not_by_their_place_in_the_file(tmp_path: Path) -> None:
    # Many configs on the Hub list their labels as strings sort: 0, 1, 10, 11, 2, ...
    names = [f"class {i}" for i in range(12)]
    as_text = sorted(range(12), key=str)
    assert as_text[:4] == [0, 1, 10, 11]
    trainer = distil(tmp_path, model=named(names, seed=0), teacher=named(names, seed=7, keys=as_text))
    assert trainer.teacher is not None


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    student, other = build("bert", "sequence", seed=0), build("bert", "sequence", seed=7)
    args = arguments(tmp_path)
    prune, distill = Recipe.from_dict({"prune": {}}), Recipe.from_dict({"distill": {}})
    refused("no teacher was given", lambda: DistillationTrainer(model=student, args=args))
    refused("no teacher was given", lambda: CompressionTrainer(model=student, args=args))
    refused(
        "DistillationTrainer does not do what the recipe's section 'prune' asks for",
        lambda: DistillationTrainer(model=student, teacher=other, recipe=prune, args=args),
    )
    refused(
        "PruningTrainer does not do what the recipe's section 'distill' asks for",
        lambda: PruningTrainer(model=student, recipe=distill, args=args),
    )
    refused(
        "a teacher was given, but the recipe has no distill section",
        lambda: CompressionTrainer(model=student, teacher=other, recipe=prune, args=args),
    )
    refused(
        "the recipe has none of the sections CompressionTrainer serves",
        lambda: CompressionTrainer(model=student, recipe=Recipe(), args=args),
    )


def test_teachers_whose_predictions_cannot_be_compared(tmp_path: Path) -> None:
    teacher = build("gpt2", "causal", seed=7, vocab_size=701)
    refused("distill.logits.loss: uld", lambda: distil(tmp_path, family="gpt2", task="causal", teacher=teacher))
    bare = make_model("bert", "AutoModel")
    trainer = distil(tmp_path, teacher=bare, hidden=0.0)
    refused("the teacher gives no logits .*; it needs the same kind of head as the student", trainer.train)


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    section = {"hidden": {"weight": 1.0, "layers": [[0, 0], [2, 3]]}}
    refused(r"distill.hidden.layers has \[2, 3\]", lambda: distil(tmp_path, distill=section))


# ---- kinds of tasks, by hand, and the same in two parts ----


class Rows(list):
    def batch(self, *indices: int) -> dict[str, torch.Tensor]:
        return {name: torch.stack([self[i][name] for i in indices]) for name in self[0]}


def texts(n: int = 8, **labels: Any) -> Rows:
    """Padded texts with labels made by functions of the row's generator."""
    rows = Rows()
    for number, row in enumerate(Examples("bert", "sequence", n, labelled=False).rows):
        generator = torch.Generator().manual_seed(100 + number)
        rows.append({**row, **{name: make(generator) for name, make in labels.items()}})
    return rows


def pair(auto: str, family: str = "bert", **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    student, teacher = (make_model(family, auto, seed=seed, **quiet, **changes) for seed in (0, 7))
    return student, teacher  # type: ignore[return-value]


def mean_kl(ours: torch.Tensor, theirs: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean over rows of the divergence, from probabilities; zero probabilities add nothing."""
    p, q = (x.detach().double().div(temperature).softmax(-1) for x in (theirs, ours))
    return temperature**2 * torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1).mean()


def span_loss(student: Any, teacher: Any, rows: Rows) -> torch.Tensor:
    """Row by row, over the tokens that are there."""
    total = []
    for row in rows:
        n = int(row["attention_mask"].sum())
        inputs = {"input_ids": row["input_ids"][None], "attention_mask": row["attention_mask"][None]}
        ours, theirs = student(**inputs), teacher(**inputs)
        total += [mean_kl(getattr(ours, k)[:, :n], getattr(theirs, k)[:, :n]) for k in ("start_logits", "end_logits")]
    return torch.stack(total).mean()


def regression_loss(student: Any, teacher: Any, rows: Rows) -> torch.Tensor:
    batch = rows.batch(*range(len(rows)))
    batch.pop("labels")
    return (student(**batch).logits - teacher(**batch).logits).double().square().mean()


def binary_loss(student: Any, teacher: Any, rows: Rows) -> torch.Tensor:
    batch = rows.batch(*range(len(rows)))
    batch.pop("labels")
    p, q = (model(**batch).logits.double().sigmoid() for model in (teacher, student))
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def unlabelled_loss(student: Any, teacher: Any, rows: Rows) -> torch.Tensor:
    """Every token that is there, row by row; a causal model predicts all of them but the first."""
    ours, theirs, shifted = [], [], "CausalLM" in type(student).__name__ or "LMHead" in type(student).__name__
    for row in rows:
        real = row["attention_mask"].nonzero().flatten()
        inputs = {"input_ids": row["input_ids"][None], "attention_mask": row["attention_mask"][None]}
        chosen = real[:-1] if shifted else real
        ours.append(student(**inputs).logits[0, chosen])
        theirs.append(teacher(**inputs).logits[0, chosen])
    return mean_kl(torch.cat(ours), torch.cat(theirs))


def left_padded(rows: Rows) -> Rows:
    return Rows(
        {name: value.roll(int((row["attention_mask"] == 0).sum())) for name, value in row.items()} for row in rows
    )


def scalar(generator: torch.Generator) -> torch.Tensor:
    return torch.randn((), generator=generator)


def yes_or_no(generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(3, generator=generator) < 0.5).float()


def place(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 4, (), generator=generator)


CASES: dict[str, tuple[Any, Rows, Any]] = {
    "question answering": (
        lambda: pair("AutoModelForQuestionAnswering"),
        texts(start_positions=place, end_positions=place),
        span_loss,
    ),
    "regression": (
        lambda: pair("AutoModelForSequenceClassification", num_labels=1),
        texts(labels=scalar),
        regression_loss,
    ),
    "regression on three values": (
        lambda: pair("AutoModelForSequenceClassification", num_labels=3, problem_type="regression"),
        texts(labels=lambda g: torch.randn(3, generator=g)),
        regression_loss,
    ),
    "several labels": (
        lambda: pair("AutoModelForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        texts(labels=yes_or_no),
        binary_loss,
    ),
    "unlabelled tokens": (lambda: pair("AutoModelForTokenClassification", num_labels=3), texts(), unlabelled_loss),
    "unlabelled language": (lambda: pair("AutoModelForCausalLM", "llama"), texts(), unlabelled_loss),
    "unlabelled language, padded on the left": (
        lambda: pair("AutoModelForCausalLM", "llama"),
        left_padded(texts()),
        unlabelled_loss,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds_of_tasks(tmp_path: Path, case: str) -> None:
    make, rows, expected = CASES[case]
    student, teacher = make()
    lengths = [int(row["attention_mask"].sum()) for row in rows]
    assert len(rows) == 8 and sum(lengths[:4]) != sum(lengths[4:])
    with torch.no_grad():
        by_hand = expected(student, teacher, rows).item()
    assert by_hand > 0.05
    trainer = distil(tmp_path, model=student, teacher=teacher, data=rows, distill=only(logits=1.0))
    assert trainer.compute_loss(student.train(), rows.batch(*range(8))).item() == pytest.approx(by_hand, rel=2e-5)
    steps = []
    for size in (8, 4):
        captured, logged = Gradients(), make()[0]
        run = distil(
            tmp_path,
            model=logged,
            teacher=teacher,
            data=rows,
            given={"callbacks": [captured]},
            distill=only(logits=0.5, task=0.5 if case.startswith(("q", "r", "s")) else 0.0),
            max_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        run.train()
        steps.append(torch.cat([gradient.flatten() for gradient in captured.steps[0].values()]))
    assert steps[0].norm() > 1e-2
    assert ((steps[1] - steps[0]).norm() / steps[0].norm()).item() < 1e-6


def test_without_labels_it_trains_and_predicts(tmp_path: Path) -> None:
    data = Examples("bert", "sequence", 16, labelled=False)
    trainer = distil(tmp_path, data=data, max_steps=30, learning_rate=3e-3)
    batch = data.batch(*range(16))
    before = trainer.compute_loss(trainer.model.train(), batch).item()
    trainer.train()
    assert trainer.compute_loss(trainer.model.train(), batch).item() < before / 2
    assert trainer.predict(data).predictions.shape == (16, 3)
    assert "eval_loss" not in trainer.evaluate()


def test_a_weight_of_zero_leaves_the_labels_out(tmp_path: Path) -> None:
    runs = []
    for shift in (0, 1):
        data = Examples("bert", "sequence", 8)
        for row in data.rows:
            row["labels"] = (row["labels"] + shift) % 3
        runs.append(compress(tmp_path, trainer=DistillationTrainer, data=data, distill=only(logits=1.0))[1])
    assert torch.equal(vector(runs[0]), vector(runs[1]))


# ---- hidden states, and projections between unequal widths ----


def test_hidden_states_by_hand(tmp_path: Path) -> None:
    section = {**only(), "hidden": {"weight": 1.0, "layers": [[0, 1], [2, 2]]}}
    trainer = distil(tmp_path, distill=section)
    batch = trainer.train_dataset.batch(0, 1, 2)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours, theirs = (
        m(**inputs, output_hidden_states=True).hidden_states for m in (trainer.model, trainer.teacher.model)
    )
    real = batch["attention_mask"].bool()
    expected = (F.mse_loss(ours[1][real], theirs[2][real]) + F.mse_loss(ours[3][real], theirs[3][real])) / 2
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_shallower_and_narrower_student(tmp_path: Path) -> None:
    student = build("bert", "sequence", seed=0, num_hidden_layers=2)
    teacher = build("bert", "sequence", seed=7, num_hidden_layers=6, hidden_size=64)
    trainer = distil(tmp_path, model=student, teacher=teacher, hidden=1.0)
    assert trainer.comparison.hidden == make_map("all", student_layers=2, teacher_layers=6) == ((0, 2), (1, 5))
    trainer.train()
    shapes = {name: tuple(p.shape) for name, p in trainer._projections.named_parameters()}
    assert shapes == {"0_2.weight": (64, 32), "1_5.weight": (64, 32)}


@pytest.mark.parametrize("kind", [DistillationTrainer, CompressionTrainer])
def test_projections_are_trained_saved_and_restored(tmp_path: Path, kind: type) -> None:
    options = {"trainer": kind, "teacher_width": 64, "dropout": 0.1, "max_steps": 6}
    whole, model = compress(tmp_path / "whole", save_strategy="steps", save_steps=1, **options)
    files = [tmp_path / "whole" / f"checkpoint-{step}" / PROJECTIONS_FILE for step in range(1, 7)]
    history = [safetensors.torch.load_file(file) for file in files]
    assert all(set(state) == {"0_0.weight", "1_1.weight", "2_2.weight"} for state in history)
    for earlier, later in itertools.pairwise(history):
        assert all(not torch.equal(earlier[name], later[name]) for name in earlier), "a projection was not trained"
    live = whole._projections.state_dict()
    assert all(torch.equal(history[-1][name], live[name]) for name in live)
    extra = {id(p) for p in whole._projections.parameters()}
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == extra | {id(p) for p in model.parameters()}
    again, resumed = compress(tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-2", **options)
    assert torch.equal(vector(resumed), vector(model))
    assert torch.equal(vector(again._projections), vector(whole._projections))
    whole.save_model(str(tmp_path / "final"))
    assert not list((tmp_path / "final").glob("hfcompress*"))
    saved = safetensors.torch.load_file(tmp_path / "final" / "model.safetensors")
    assert set(saved) == set(build("bert", "sequence", seed=0).state_dict())


@pytest.mark.parametrize("size", [8, 4])
def test_a_step_of_the_projections_by_hand(tmp_path: Path, size: int) -> None:
    class Begins(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            begun.update({name: p.detach().clone() for name, p in trainer._projections.named_parameters()})

    begun: dict[str, torch.Tensor] = {}
    section = {**only(), "hidden": {"weight": 1.0, "layers": [[0, 2], [2, 1]]}}
    trainer = distil(
        tmp_path,
        distill=section,
        teacher_width=64,
        given={"callbacks": [Begins()]},
        optim="sgd",
        learning_rate=0.5,
        max_steps=1,
        max_grad_norm=0.0,
        weight_decay=0.1,  # not for projections
        train_sampling_strategy="sequential",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
    )
    batch = trainer.train_dataset.batch(*range(8))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    real = batch["attention_mask"].bool()
    ours, theirs = (
        [state.detach() for state in m(**inputs, output_hidden_states=True).hidden_states[1:]]
        for m in (trainer.model, trainer.teacher.model)
    )
    trainer.train()
    after = dict(trainer._projections.named_parameters())
    assert set(after) == set(begun) == {"0_2.weight", "2_1.weight"}
    for student, teacher in ((0, 2), (2, 1)):
        weight = begun[f"{student}_{teacher}.weight"]
        x, y = ours[student][real], theirs[teacher][real]
        # d/dW of the mean over items and features of (W x - y)^2, and the mean over two pairs of layers
        gradient = 2 * (x @ weight.T - y).T @ x / y.numel() / 2
        assert gradient.abs().max() > 1e-2
        torch.testing.assert_close(after[f"{student}_{teacher}.weight"], weight - 0.5 * gradient, rtol=1e-4, atol=1e-5)


def test_a_second_run_in_one_trainer_resumes_projections_too(tmp_path: Path) -> None:
    options = {"teacher_width": 64, "save_strategy": "steps", "save_steps": 3}
    trainer, model = compress(tmp_path, trainer=DistillationTrainer, **options)
    expected = vector(model), vector(trainer._projections)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert torch.equal(vector(trainer.model), expected[0])
    assert torch.equal(vector(trainer._projections), expected[1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hidden_states_under_gradient_checkpointing(tmp_path: Path, family: str, reentrant: bool) -> None:
    task = "sequence" if family == "bert" else "causal"
    found = []
    for options in ({}, checkpointing(use_reentrant=reentrant)):
        captured = Gradients()
        trainer = distil(
            tmp_path,
            family=family,
            task=task,
            distill=only(hidden=1.0),
            given={"callbacks": [captured]},
            max_steps=1,
            max_grad_norm=0.0,
            **options,
        )
        trainer.train()
        found.append(captured.steps[0])
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


# ---- sequence to sequence ----

SEQ2SEQ: dict[str, Any] = {
    "bart": transformers.BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    ),
    "t5": transformers.T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
    ),
}


def seq2seq(kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForSeq2SeqLM.from_config(copy.deepcopy(SEQ2SEQ[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else None
    return model.eval()


def translations(n: int = 8) -> Rows:
    """Sentences and targets of unequal length, padded to the longest; padding of the targets is ignored."""
    rows = Rows()
    for number in range(n):
        generator = torch.Generator().manual_seed(number)
        ids, labels = (torch.randint(5, 59, (9,), generator=generator) for _ in range(2))
        mask = (torch.arange(9) < 4 + number % 5).long()
        labels[3 + number // 4 * 4 :] = -100
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return rows


def seq2seq_arguments(folder: Path, **changes: Any) -> Seq2SeqTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "predict_with_generate": True,
        "generation_max_length": 7,
        "dataloader_pin_memory": False,
    }
    return Seq2SeqTrainingArguments(**{**settings, **changes})


@pytest.mark.parametrize("prepared", [False, True], ids=["labels only", "with decoder inputs"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_sequence_to_sequence_by_hand(tmp_path: Path, kind: str, prepared: bool) -> None:
    student, teacher, rows = seq2seq(kind, 0), seq2seq(kind, 7), translations()
    if prepared:  # as transformers' collator does when it is given the model
        rows = Rows(
            {**row, "decoder_input_ids": student.prepare_decoder_input_ids_from_labels(row["labels"][None])[0]}
            for row in rows
        )
    batch = rows.batch(*range(8))
    kept = batch["labels"] != -100
    with torch.no_grad():
        ours, theirs = (model(**batch).logits[kept] for model in (student, teacher))
    expected = mean_kl(ours, theirs, 2.0).item()
    assert expected > 0.05
    recipe = Recipe.from_dict({"distill": only(logits=1.0, temperature=2.0)})
    trainer = Seq2SeqDistillationTrainer(
        model=student, teacher=teacher, recipe=recipe, args=seq2seq_arguments(tmp_path), train_dataset=rows
    )
    assert trainer.compute_loss(student.train(), batch).item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_sequence_to_sequence_trains_and_generates(tmp_path: Path, kind: str) -> None:
    found = []
    for size in (8, 4):
        student, captured, rows = seq2seq(kind, 0), Gradients(), translations()
        trainer = Seq2SeqDistillationTrainer(
            model=student,
            teacher=seq2seq(kind, 7),
            args=seq2seq_arguments(
                tmp_path,
                max_grad_norm=0.0,
                train_sampling_strategy="sequential",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[captured],
        )
        trainer.train()
        found.append(torch.cat([gradient.flatten() for gradient in captured.steps[0].values()]))
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() < 1e-6
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == 8
    assert (predicted.predictions[:, 7:] == student.config.pad_token_id).all(), "longer than was asked for"
    batch = rows.batch(0)
    alone = student.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=7)
    assert predicted.predictions[0][: alone.shape[1]].tolist() == alone[0].tolist()
    with torch.no_grad():
        loss = student(**rows.batch(*range(8))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.save_model(str(tmp_path / "final"))
    again = type(student).from_pretrained(tmp_path / "final")
    assert torch.equal(vector(again), vector(student))


def test_sequence_to_sequence_needs_labels(tmp_path: Path) -> None:
    rows = Rows({name: value for name, value in row.items() if name != "labels"} for row in translations())
    for kind in SEQ2SEQ:
        trainer = Seq2SeqDistillationTrainer(
            model=seq2seq(kind, 0), teacher=seq2seq(kind, 7), args=seq2seq_arguments(tmp_path), train_dataset=rows
        )
        refused("sequence-to-sequence model needs labels", trainer.train)
