"""Targets that a teacher writes: row by row the same, whole after an interruption, and disjoint between processes."""

from __future__ import annotations

import json

import datasets
import pytest
import torch

from hfcompress.distillation import generate_targets, load_targets
from hfcompress.distillation import generations as module
from tests.families import DECODERS, make_model, task_class

LENGTHS = (3, 9, 1, 6, 4, 12, 2, 7, 5, 8, 10)


def prompts_of(lengths=LENGTHS, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 99, (n,), generator=generator).tolist()} for n in lengths]


def teacher_of(name):
    """A model whose end token comes early for some prompts and not for others."""
    model = make_model(name, task_class(name))
    settings = model.generation_config
    settings.pad_token_id = settings.pad_token_id if settings.pad_token_id is not None else 0
    settings.forced_eos_token_id = None
    settings.eos_token_id = None
    seen = [alone(model, row["input_ids"], 6) for row in prompts_of()]
    settings.eos_token_id = seen[0][2]
    return model


def alone(model, ids, count, **settings):
    """What `generate` writes to one prompt without padding."""
    ids = torch.tensor([ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **{"do_sample": False, **settings}
    )[0]
    return out[1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()


def settings_of(**changes):
    return {"max_new_tokens": 6, "batch_size": 3, "shard_size": 5, "progress": False, **changes}


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "bloom", "qwen2", "falcon", "mbart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_are_what_the_teacher_writes_alone(name, beams, tmp_path):
    teacher, prompts = teacher_of(name), prompts_of()
    teacher.train()
    rows = generate_targets(teacher, prompts, tmp_path, num_beams=beams, **settings_of())
    assert teacher.training
    teacher.eval()
    lengths = set()
    assert len(rows) == len(prompts) == 11
    for prompt, row in zip(prompts, rows, strict=True):
        written = alone(teacher, prompt["input_ids"], 6, num_beams=beams)
        ends = [n for n, token in enumerate(written) if token == teacher.generation_config.eos_token_id]
        written = written[: ends[0] + 1] if ends else written
        lengths.add(len(written))
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        if name in ("t5", "bart", "mbart"):
            assert row["input_ids"] == prompt["input_ids"] and row["labels"] == written
        else:
            assert row["input_ids"] == prompt["input_ids"] + written
            assert row["labels"] == [-100] * len(prompt["input_ids"]) + written
    assert len(lengths) > 1 or beams > 1, "no sequence ended early: that could not have gone wrong"


@pytest.mark.parametrize("name", [*DECODERS, "t5", "t5:gated", "bart"])
def test_the_teacher_itself_predicts_the_labels(name, tmp_path):
    """Greedy targets are the likeliest tokens when they are given back as labels, the way a trainer does it."""
    teacher = teacher_of(name)
    rows = generate_targets(teacher, prompts_of((3, 8, 5)), tmp_path, **settings_of())
    compared = 0
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        if teacher.config.is_encoder_decoder:
            with torch.no_grad():
                found = teacher(input_ids=ids, labels=labels).logits.argmax(-1)
        else:
            with torch.no_grad():
                found = teacher(input_ids=ids).logits[:, :-1].argmax(-1)
            labels = labels[:, 1:]
        written = labels != -100
        assert torch.equal(found[written], labels[written])
        compared += int(written.sum())
    assert compared >= 3


def test_padded_examples_and_other_columns_do_not_matter(tmp_path):
    teacher, plain = teacher_of("gpt2"), prompts_of()
    padded = [
        {
            "input_ids": [0] * (12 - len(row["input_ids"])) + row["input_ids"],
            "attention_mask": [0] * (12 - len(row["input_ids"])) + [1] * len(row["input_ids"]),
            "labels": [7],
            "text": "what it was",
        }
        for row in plain
    ]
    one = generate_targets(teacher, plain, tmp_path / "plain", **settings_of())
    other = generate_targets(teacher, datasets.Dataset.from_list(padded), tmp_path / "padded", **settings_of())
    assert one[:] == other[:] and one.column_names == ["input_ids", "attention_mask", "labels"]


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_stopped_run_goes_on_to_the_same_end(do_sample, tmp_path, monkeypatch):
    teacher, prompts = teacher_of("llama"), prompts_of()
    settings = settings_of(do_sample=do_sample, temperature=1.3, seed=4)
    whole = generate_targets(teacher, prompts, tmp_path / "whole", **settings)
    calls, original = [], module._generate_batch

    def stop_in_the_second_shard(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(module, "_generate_batch", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        generate_targets(teacher, prompts, tmp_path / "stopped", **settings)
    files = sorted(file.name for file in (tmp_path / "stopped").iterdir())
    assert files == ["settings.json", "targets-00000.arrow"]
    with pytest.raises(ValueError, match=r"2 of 3 files are missing \(targets-00001.arrow"):
        load_targets(tmp_path / "stopped")
    (tmp_path / "stopped" / ".targets-00001.arrow.0").write_bytes(b"half a file")  # killed while it wrote
    calls.clear()
    monkeypatch.setattr(module, "_generate_batch", lambda *given: calls.append(1) or original(*given))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    resumed = generate_targets(teacher, prompts, tmp_path / "stopped", **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == 3  # two batches of the second shard, one of the last
    assert resumed[:] == whole[:] == load_targets(tmp_path / "stopped")[:]
    names = [sorted(file.name for file in (tmp_path / run).iterdir()) for run in ("whole", "stopped")]
    assert names[0] == names[1]
    calls.clear()
    assert generate_targets(teacher, prompts, tmp_path / "stopped", **settings)[:] == whole[:] and calls == []


def test_samples_follow_the_seed(tmp_path):
    teacher, prompts = teacher_of("gpt2"), prompts_of()
    runs = {
        seed: generate_targets(teacher, prompts, tmp_path / str(n), do_sample=True, seed=seed, **settings_of())[:]
        for n, seed in enumerate((0, 1))
    }
    again = generate_targets(teacher, prompts, tmp_path / "again", do_sample=True, seed=1, **settings_of())[:]
    assert runs[0] != runs[1] == again
    cold = generate_targets(
        teacher, prompts, tmp_path / "cold", do_sample=True, temperature=1e-4, seed=1, **settings_of()
    )
    greedy = generate_targets(teacher, prompts, tmp_path / "greedy", **settings_of())
    assert cold[:] == greedy[:]
    # Shards draw on their own: the same prompt in two of them has two continuations.
    same = [{"input_ids": [5, 6, 7]}] * 4
    rows = generate_targets(teacher, same, tmp_path / "same", do_sample=True, **settings_of(shard_size=2, batch_size=2))
    assert rows[0]["labels"] != rows[2]["labels"] or rows[1]["labels"] != rows[3]["labels"]


def test_processes_share_the_shards(tmp_path):
    teacher, prompts = teacher_of("t5"), prompts_of()
    whole = generate_targets(teacher, prompts, tmp_path / "one", **settings_of(shard_size=2))
    parts = [
        generate_targets(teacher, prompts, tmp_path / "three", rank=rank, world_size=3, **settings_of(shard_size=2))
        for rank in range(3)
    ]
    assert [len(part) for part in parts] == [4, 4, 3]
    assert parts[1][:]["labels"] == [whole[n]["labels"] for n in (2, 3, 8, 9)]
    assert load_targets(tmp_path / "three")[:] == whole[:]
    more = generate_targets(teacher, prompts, tmp_path / "three", rank=7, world_size=8, **settings_of(shard_size=2))
    assert len(more) == 0 and more.column_names == whole.column_names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 7}, "max_new_tokens was 6 and is 7; give another folder"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"num_beams": 2}, "num_beams was 1 and is 2"),
        ({"prompts": (2, 3)}, "examples was 11 and is 2"),
        ({"prompt_seed": 1}, "the examples was "),
        ({"teacher_seed": 1}, "the teacher was "),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not allowed: must be 1 or more"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not allowed: must be from 0 to 1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 is not allowed: must be above 0"),
    ],
)
def test_what_is_refused(changes, message, tmp_path):
    teacher = make_model("gpt2", "AutoModelForCausalLM")
    generate_targets(teacher, prompts_of(), tmp_path, **settings_of())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    prompts = prompts_of(changes.pop("prompts", LENGTHS), seed=changes.pop("prompt_seed", 0))
    other = make_model("gpt2", "AutoModelForCausalLM", seed=changes.pop("teacher_seed", 0))
    with pytest.raises(ValueError, match=message) as caught:
        generate_targets(other, prompts, tmp_path, **settings_of(**changes))
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_examples_and_folders_that_cannot_be(tmp_path):
    teacher = make_model("gpt2", "AutoModelForCausalLM")
    with pytest.raises(ValueError, match="example 1 has no input_ids, it has text; tokenize it first"):
        generate_targets(teacher, [{"input_ids": [1]}, {"text": "x"}], tmp_path, **settings_of())
    with pytest.raises(ValueError, match="example 0 is empty"):
        generate_targets(teacher, [{"input_ids": [1], "attention_mask": [0]}], tmp_path, **settings_of())
    with pytest.raises(ValueError, match="holds no targets"):
        load_targets(tmp_path / "nothing")
    teacher.generation_config.pad_token_id = teacher.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="names no padding token and no end token; give pad_token_id"):
        generate_targets(teacher, prompts_of(), tmp_path, **settings_of())
    assert not list(tmp_path.iterdir())


def test_the_settings_are_written_down(tmp_path):
    teacher = make_model("bart", "AutoModelForSeq2SeqLM")
    generate_targets(teacher, prompts_of(), tmp_path, **settings_of(num_beams=2))
    written = json.loads((tmp_path / "settings.json").read_text())
    assert (written["num_beams"], written["examples"], written["pad_token_id"]) == (2, 11, 1)
