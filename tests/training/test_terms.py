"""Each term of a distillation against the definition, written out on what the models return when asked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfcompress.config import Recipe
from hfcompress.distillation import AdapterTeacher, AverageTeacher, Ensemble, Teacher
from hfcompress.training import DistillationTrainer
from hfcompress.training.distilling import AVERAGE_FILE
from tests.families import make_model
from tests.training.scenarios import Examples, Gradients, build, make_trainer, vector

OFF = {"task": {"weight": 0.0}, "logits": {"weight": 0.0}, "hidden": {"weight": 0.0}}


def distil(folder: Path, **options: Any) -> DistillationTrainer:
    return make_trainer(folder, trainer=options.pop("trainer", DistillationTrainer), **options)


def asked(trainer: DistillationTrainer, batch: dict[str, torch.Tensor], **flags: bool) -> list[Any]:
    """What student and teacher return with eager attention."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found = []
    for model in (trainer.model, trainer.teacher.model):
        eager = copy.deepcopy(model).eval()
        eager.set_attn_implementation("eager")
        found.append(eager(**inputs, **flags))
    return found


def loss_of(trainer: DistillationTrainer, batch: dict[str, torch.Tensor]) -> float:
    return trainer.compute_loss(trainer.model.train(), batch).item()


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_attention_maps(tmp_path: Path, family: str) -> None:
    task = {"bert": "sequence", "llama": "causal", "vit": "image"}[family]
    section = {**OFF, "attentions": {"weight": 2.0, "layers": [[0, 2], [2, 1]]}}
    trainer = distil(tmp_path, family=family, task=task, distill=section)
    batch = trainer.train_dataset.batch(0, 1, 2)
    ours, theirs = (out.attentions for out in asked(trainer, batch, output_attentions=True))
    mask = batch.get("attention_mask", torch.ones(ours[0].shape[0], ours[0].shape[-1])).bool()
    total, rows = 0.0, 0
    for row in range(3):
        real = mask[row].nonzero().flatten()
        for mine, target in ((ours[0], theirs[2]), (ours[2], theirs[1])):
            difference = (mine - target)[row][:, real][:, :, real]
            total += difference.double().square().mean((0, 2)).sum().item() / 2
        rows += len(real)
    assert total > 1e-4
    assert loss_of(trainer, batch) == pytest.approx(2.0 * total / rows, rel=1e-4)


def test_attention_maps_of_other_heads(tmp_path: Path) -> None:
    student = build("bert", "sequence", seed=0, num_attention_heads=2)
    section = {**OFF, "attentions": {"weight": 1.0, "layers": "last"}}
    trainer = distil(tmp_path, model=student, distill=section)
    batch = trainer.train_dataset.batch(0, 1)
    with pytest.raises(ValueError, match=r"has 2 heads and layer 2 of the teacher 4; set distill\.attentions"):
        loss_of(trainer, batch)
    section["attentions"] |= {"heads": "mean"}
    trainer = distil(tmp_path, model=student, distill=section)
    ours, theirs = (out.attentions[2].mean(1) for out in asked(trainer, batch, output_attentions=True))
    rows = [int(n) for n in batch["attention_mask"].sum(-1)]
    parts = [(ours - theirs)[i, :n, :n].double().square().mean(1).sum() for i, n in enumerate(rows)]
    assert loss_of(trainer, batch) == pytest.approx(sum(parts).item() / sum(rows), rel=1e-4)


def test_relations_of_a_wider_teacher(tmp_path: Path) -> None:
    teacher = build("bert", "sequence", seed=7, hidden_size=48, num_attention_heads=6)
    section = {**OFF, "relations": {"weight": 1.0, "layers": [[1, 2]], "of": ["queries", "values"], "heads": 4}}
    trainer = distil(tmp_path, teacher=teacher, distill=section)
    batch = trainer.train_dataset.batch(0, 1, 2)
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def projected(model: Any, layer: int, name: str) -> torch.Tensor:
        states = model.eval()(**inputs, output_hidden_states=True).hidden_states[layer]
        return getattr(model.bert.encoder.layer[layer].attention.self, name)(states)

    total, count = 0.0, int(batch["attention_mask"].sum())
    for name in ("query", "value"):
        mine, target = projected(trainer.model, 1, name), projected(teacher, 2, name)
        for row in range(3):
            n = int(batch["attention_mask"][row].sum())
            for head in range(4):
                scores = []
                for x in (mine, target):
                    part = x[row, :n].view(n, 4, -1)[:, head].double()
                    scores.append((part @ part.T / part.shape[1] ** 0.5).softmax(-1))
                total += (scores[1] * (scores[1] / scores[0]).log()).sum().item() / 4
    assert loss_of(trainer, batch) == pytest.approx(total / count / 2, rel=1e-4)


def test_embeddings_of_a_model_without_a_head(tmp_path: Path) -> None:
    """Sentence embeddings: base models, no labels, nothing but one vector per text."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = (make_model("bert", "AutoModel", seed=seed, **still) for seed in (0, 7))
    data = Examples("bert", "sequence", 16, labelled=False)
    section = {**OFF, "embeddings": {"weight": 1.0}}
    trainer = distil(
        tmp_path, model=student, teacher=teacher, data=data, distill=section, max_steps=40, learning_rate=3e-3
    )
    batch = data.batch(*range(16))
    pooled = []
    for model in (student, teacher):
        states, mask = model.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
        pooled.append((states * mask).sum(1) / mask.sum(1))
    expected = (1 - F.cosine_similarity(*pooled)).mean().item()
    before = loss_of(trainer, batch)
    assert before == pytest.approx(expected, rel=1e-4)
    trainer.train()
    assert loss_of(trainer, batch) < before / 2
    section["logits"] = {"weight": 1.0}
    headless = distil(tmp_path, model=student, teacher=teacher, data=data, distill=section)
    with pytest.raises(ValueError, match="the student predicts nothing"):
        headless.compute_loss(student.train(), batch)


@pytest.mark.parametrize(
    "loss",
    ["kl", "reverse_kl", "jensen_shannon", "total_variation", "mse", "cosine", "hard_label", "decoupled", "dist"],
)
@pytest.mark.parametrize("task", ["sequence", "causal"])
def test_every_loss_on_logits_teaches(tmp_path: Path, loss: str, task: str) -> None:
    family = "llama" if task == "causal" else "bert"
    section = {**OFF, "logits": {"weight": 1.0, "loss": loss}}
    settings = {"max_steps": 30, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    trainer = distil(tmp_path, family=family, task=task, distill=section, **settings)
    batch = trainer.train_dataset.batch(*range(16))
    before = loss_of(trainer, batch)
    trainer.train()
    assert loss_of(trainer, batch) < 0.8 * before


@pytest.mark.parametrize(
    "section",
    [
        {"attentions": {"weight": 1.0}},
        {"relations": {"weight": 1.0}},
        {"hidden": {"weight": 1.0, "loss": "cosine"}},
        {"hidden": {"weight": 1.0, "loss": "patient", "layers": "skip"}},
        {"hidden": {"weight": 1.0, "layers": "dynamic"}},
        {"embeddings": {"weight": 1.0, "loss": "mse", "pooling": "cls"}},
        {"logits": {"weight": 1.0, "loss": "decoupled", "standardize": True}},
    ],
    ids=lambda section: "-".join([*section, *[str(v) for v in next(iter(section.values())).values()][1:]]),
)
def test_two_parts_are_the_whole(tmp_path: Path, section: dict[str, Any]) -> None:
    """One batch of eight, and four of two: the same gradient in the first step, and the same model after six."""
    steps, models = [], []
    for size in (8, 2):
        captured = Gradients()
        trainer = distil(
            tmp_path,
            distill={**OFF, **section},
            given={"callbacks": [captured]},
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        trainer.train()
        assert len(captured.steps) == 6
        steps.append(torch.cat([gradient.flatten() for gradient in captured.steps[0].values()]))
        models.append(vector(trainer.model))
    assert steps[0].norm() > 1e-3
    assert ((steps[1] - steps[0]).norm() / steps[0].norm()).item() < 1e-5
    assert ((models[1] - models[0]).norm() / models[0].norm()).item() < 2e-3


def test_a_map_that_is_found_anew(tmp_path: Path) -> None:
    """The student's layers stand in another order than the teacher's: the right ones are found after one step."""
    teacher = build("bert", "sequence", seed=7, num_hidden_layers=6)
    student = copy.deepcopy(teacher)
    del student.bert.encoder.layer[3:5]  # layers 0, 1, 2 and 5 are left: the teacher's 2 and 5 are 2 and 3 here
    student.config.num_hidden_layers = 4
    section = {**OFF, "hidden": {"weight": 1.0, "layers": "dynamic"}}
    trainer = distil(tmp_path, model=student, teacher=teacher, distill=section, max_steps=1, learning_rate=1e-9)
    assert trainer.comparison.hidden == ((1, 2), (3, 5)), "at the same relative depth before anything is known"
    trainer.train()
    assert trainer.comparison.hidden == ((2, 2), (3, 5))
    assert trainer.comparison.distances is None


def test_a_map_that_is_found_anew_for_one_layer(tmp_path: Path) -> None:
    teacher = build("bert", "sequence", seed=7, num_hidden_layers=6)
    student = build("bert", "sequence", seed=8, num_hidden_layers=1)
    section = {**OFF, "hidden": {"weight": 1.0, "layers": "dynamic"}}
    trainer = distil(tmp_path, model=student, teacher=teacher, distill=section)
    trainer.train()
    assert {student for student, _ in trainer.comparison.hidden} == {0}


def test_classes_that_do_not_exclude_each_other_are_known_by_their_labels(tmp_path: Path) -> None:
    """Nobody said what kind of problem it is: transformers sees it by the labels' dtype, in the first forward pass."""
    trainer = distil(tmp_path, distill={**OFF, "logits": {"weight": 1.0, "temperature": 2.0}})
    assert trainer.model.config.problem_type is None
    batch = trainer.train_dataset.batch(0, 1, 2)
    batch["labels"] = F.one_hot(batch["labels"], 3).float()
    ours, theirs = (out.logits / 2.0 for out in asked(trainer, batch))
    p, q = ours.sigmoid(), theirs.sigmoid()
    expected = 4.0 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean(-1).mean()
    assert expected > 1e-5
    assert loss_of(trainer, batch) == pytest.approx(expected.item(), rel=1e-4)


def test_weights_and_temperature_change_with_the_run(tmp_path: Path) -> None:
    section = {
        "task": {"weight": 0.0},
        "logits": {"weight": {"first": 1.0, "last": 0.0, "end": 0.5}, "temperature": {"first": 4.0, "last": 1.0}},
        "hidden": {"weight": {"first": 0.0, "last": 1.0, "start": 0.5}},
    }
    trainer = distil(tmp_path, distill=section, max_steps=8, learning_rate=1e-9)
    batch, seen = trainer.train_dataset.batch(0, 1, 2, 3), []
    trainer.state.max_steps = 8
    for step in (0, 2, 4, 6, 8):
        trainer.state.global_step = step
        seen.append(
            {
                n: t.item()
                for n, t in trainer._loss_terms(trainer.model.train(), batch, counts(trainer, batch))[1].items()
            }
        )
    assert [one["logits"] > 0 for one in seen] == [True, True, False, False, False]
    assert [one["hidden"] > 0 for one in seen] == [False, False, False, True, True]
    assert seen[3]["hidden"] == pytest.approx(seen[4]["hidden"] / 2, rel=1e-5)
    ours, theirs = (out.logits for out in asked(trainer, batch))
    for place, temperature, weight in ((0, 4.0, 1.0), (1, 3.25, 0.5)):
        p, q = ((x / temperature).softmax(-1) for x in (theirs, ours))
        expected = weight * temperature**2 * (p * (p / q).log()).sum(-1).mean().item()
        assert seen[place]["logits"] == pytest.approx(expected, rel=1e-4)


def counts(trainer: DistillationTrainer, batch: dict[str, torch.Tensor]) -> Any:
    from hfcompress.training.items import ItemCounts, count_items

    return ItemCounts.from_tensor(count_items([batch], shifted=False))


# ---- kinds of teachers ----


def test_an_average_of_the_student_itself(tmp_path: Path) -> None:
    steps: list[torch.Tensor] = []

    class Follow(Gradients):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            steps.append(vector(model).clone())

    student = build("bert", "sequence", seed=0)
    begun = vector(student).clone()
    trainer = distil(tmp_path, model=student, teacher=AverageTeacher(decay=0.9), given={"callbacks": [Follow()]})
    trainer.train()
    expected = begun
    for number, weights in enumerate(steps, start=1):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weights
    assert len(steps) == 6 and not torch.equal(steps[0], steps[-1])
    torch.testing.assert_close(vector(trainer.teacher.model), expected, atol=1e-6, rtol=0)


def test_an_average_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None = None) -> DistillationTrainer:
        trainer = distil(folder, teacher=AverageTeacher(decay=0.9), save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-3" / AVERAGE_FILE).is_file()
    again = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(vector(again.teacher.model), vector(whole.teacher.model))
    assert torch.equal(vector(again.model), vector(whole.model))


def test_an_average_cannot_follow_a_student_that_shrinks(tmp_path: Path) -> None:
    from hfcompress.training import CompressionTrainer

    with pytest.raises(ValueError, match="cannot follow a student that is pruned"):
        make_trainer(tmp_path, trainer=CompressionTrainer, teacher=AverageTeacher())


def test_the_base_under_adapters_teaches(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = build("bert", "sequence", seed=0, dropout=0.1)
    reference = copy.deepcopy(base)
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = distil(
        tmp_path,
        model=model,
        teacher=AdapterTeacher(model),
        distill={**OFF, "logits": {"weight": 1.0, "temperature": 1.0}},
        max_steps=60,
        learning_rate=2e-2,
    )
    batch = trainer.train_dataset.batch(*range(8))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = trainer.teacher(batch).outputs["logits"]
    # The head is trained along with the adapters (modules_to_save): without them it is the original.
    torch.testing.assert_close(targets, reference.eval()(**inputs).logits)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.eval()
    apart = (model(**inputs).logits - targets).abs().max().item()
    trainer.train()
    model.eval()
    assert (model(**inputs).logits - targets).abs().max().item() < 0.7 * apart
    torch.testing.assert_close(trainer.teacher(batch).outputs["logits"], targets)
    with pytest.raises(ValueError, match="has no adapters"):
        AdapterTeacher(reference)


def test_another_adapter_teaches(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = build("bert", "sequence", seed=0)
    lora = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**lora))
    model.add_adapter("expert", peft.LoraConfig(**lora))
    batch = Examples("bert", "sequence").batch(0, 1)
    model.set_adapter("expert")
    model.eval()
    expected = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    model.set_adapter("default")
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    teacher = AdapterTeacher(model, adapter="expert")
    torch.testing.assert_close(teacher(batch).outputs["logits"], expected)
    assert model.active_adapter == "default" and all(m.training for m in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with pytest.raises(ValueError, match="there is no adapter 'other'; the model has default, expert"):
        AdapterTeacher(model, adapter="other")


def test_several_teachers(tmp_path: Path) -> None:
    models = [build("bert", "sequence", seed=seed) for seed in (5, 6, 7)]
    batch = Examples("bert", "sequence").batch(*range(8))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    probabilities = torch.stack([model.eval()(**inputs).logits.double().softmax(-1) for model in models])
    logits = torch.stack([model(**inputs).logits.double() for model in models])

    def said(**settings: Any) -> torch.Tensor:
        return Ensemble([Teacher(model) for model in models], **settings)(batch).outputs["logits"].double()

    weights = torch.tensor([1.0, 2.0, 1.0]).double() / 4
    mixed = said(weights=[1, 2, 1]).softmax(-1)
    torch.testing.assert_close(mixed, torch.einsum("t,tbc->bc", weights, probabilities), atol=1e-6, rtol=0)
    torch.testing.assert_close(said(combine="logits"), logits.mean(0), atol=1e-6, rtol=0)
    confident, correct = said(combine="confident"), said(combine="correct")
    chosen = []
    for row in range(8):
        surest = max(range(3), key=lambda t: probabilities[t, row].max())
        rightest = max(range(3), key=lambda t: probabilities[t, row, batch["labels"][row]])
        torch.testing.assert_close(confident[row], logits[surest, row], atol=1e-6, rtol=0)
        torch.testing.assert_close(correct[row], logits[rightest, row], atol=1e-6, rtol=0)
        chosen.append((surest, rightest))
    assert len({a for a, _ in chosen}) > 1 and any(a != b for a, b in chosen)
    trainer = distil(tmp_path, teacher=models, hidden=0.0)
    trainer.train()
    assert (
        isinstance(trainer.teacher, Ensemble) and trainer.model.config.hfcompress["steps"][0]["teacher"].count(",") == 2
    )
    with pytest.raises(ValueError, match="by their predictions only"):
        distil(tmp_path, teacher=models, hidden=1.0)
    with pytest.raises(ValueError, match="3 teachers need as many weights"):
        said(weights=[1, 2])


def test_a_teacher_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """Its inputs stand beside the student's; predictions over other vocabularies are compared by their sorted probabilities."""
    student = build("llama", "causal", seed=0)
    teacher = build("llama", "causal", seed=7, vocab_size=160)
    data = Examples("llama", "causal", 8)
    for number, row in enumerate(data.rows):
        generator = torch.Generator().manual_seed(50 + number)
        ids = torch.randint(3, 159, (9,), generator=generator)
        row |= {"teacher_input_ids": ids, "teacher_attention_mask": torch.ones_like(ids), "teacher_labels": ids}
    section = {**OFF, "logits": {"weight": 1.0, "loss": "uld"}}
    trainer = distil(
        tmp_path, model=student, teacher=teacher, data=data, distill=section, max_steps=20, learning_rate=3e-3
    )
    batch = data.batch(*range(4))
    theirs = teacher(input_ids=batch["teacher_input_ids"]).logits.softmax(-1)[:, :-1].sort(descending=True).values
    ours = student.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)[
        :, :-1
    ]
    ours = F.pad(ours.sort(descending=True).values, (0, 60))
    places = []
    for row in range(4):
        n = min(int(batch["attention_mask"][row].sum()) - 1, 8)
        places.append((ours[row, :n] - theirs[row, :n]).abs().sum(-1))
    before = loss_of(trainer, batch)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    assert before == pytest.approx(torch.cat(places).sum().item() / tokens, rel=1e-4)
    trainer.train()
    assert loss_of(trainer, batch) < before


# ---- the self-test ----


def test_a_loss_that_forgets_the_count_is_stopped(tmp_path: Path) -> None:
    def forgetful(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs["logits"], labels)

    def careful(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    trainer = distil(tmp_path, given={"compute_loss_func": forgetful})
    with pytest.raises(ValueError, match=r"is not that of their parts together .* num_items_in_batch") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    distil(tmp_path, given={"compute_loss_func": careful}).train()
    section = {"self_test": False}
    trainer = distil(tmp_path, given={"compute_loss_func": forgetful}, distill=section)
    trainer.train()
    assert trainer.state.global_step == 6


def test_the_self_test_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for tested in (True, False):
        trainer = distil(tmp_path, dropout=0.2, distill={"self_test": tested}, hidden=0.5)
        trainer.train()
        assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
        ends.append(vector(trainer.model))
    assert torch.equal(*ends)


# ---- on policy ----


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_the_student_writes_and_the_teacher_judges(tmp_path: Path, family: str) -> None:
    seen: list[dict[str, Any]] = []

    class Watch(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                seen.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    auto = "AutoModelForCausalLM" if family == "llama" else "AutoModelForSeq2SeqLM"
    student, teacher = (make_model(family, auto, seed=seed) for seed in (0, 7))
    data = Examples("llama", "causal", 8, prompt=3)
    section = {
        "task": {"weight": 0.5},
        "logits": {"weight": 0.5, "loss": "jensen_shannon"},
        "on_policy": {"share": 0.5, "max_new_tokens": 5},
    }

    def run() -> Any:
        seen.clear()
        trainer = Watch(
            model=copy.deepcopy(student),
            teacher=teacher,
            recipe=Recipe.from_dict({"distill": section}),
            args=make_trainer(tmp_path, trainer=DistillationTrainer, max_steps=8).args,
            train_dataset=data,
        )
        trainer.train()
        return trainer

    trainer = run()
    own = [batch for batch in seen if batch.get("on_policy")]
    assert len(seen) == 8 and 2 <= len(own) <= 7
    for batch in own:
        labels = batch["labels"]
        assert 1 <= int((labels != -100).sum(-1).max()) <= 5
        if family == "llama":
            rows = {tuple(row["input_ids"][:n].tolist()) for row in data.rows for n in (3,)}
            for row in range(len(labels)):
                start = int((labels[row] != -100).nonzero()[0])
                assert tuple(batch["input_ids"][row, :start].tolist()) in rows
                answer = labels[row] != -100
                assert torch.equal(labels[row][answer], batch["input_ids"][row][answer])
    first = vector(trainer.model)
    assert torch.equal(vector(run().model), first), "what is drawn follows from the seed"


def test_prompts_are_needed(tmp_path: Path) -> None:
    section = {"on_policy": {"share": 1.0, "max_new_tokens": 2}}
    trainer = distil(tmp_path, family="llama", task="causal", distill=section)
    with pytest.raises(ValueError, match="needs prompts to answer, and an example has none"):
        trainer.train()
    with pytest.raises(ValueError, match="for models that write"):
        distil(tmp_path, distill=section)


def test_the_record_says_what_was_compared(tmp_path: Path) -> None:
    trainer = distil(tmp_path, distill={"relations": {"weight": 0.5}})
    trainer.train()
    [step] = trainer.model.config.hfcompress["steps"]
    assert step["settings"]["relations"]["of"] == ["queries", "keys", "values"]
    assert json.loads(json.dumps(step)) == step
