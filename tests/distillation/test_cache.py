"""A teacher's outputs on disk: found by content, the same as from the live teacher, and never half there."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForQuestionAnswering, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from hfcompress.anatomy import find_layers
from hfcompress.distillation import (
    CacheContents,
    CacheError,
    CachingCollator,
    Ensemble,
    Teacher,
    TeacherCache,
    capture_outputs,
    estimate_size,
    write_cache,
)
from hfcompress.distillation import cache_writing as writing
from hfcompress.distillation.cache_format import ArraySpec, pack_indices, unpack_indices
from hfcompress.distillation.cache_keys import example_keys
from tests.families import make_model

LOGITS, BERT = CacheContents("all"), "AutoModelForSequenceClassification"
N = 23


def texts(n: int = N, *, seed: int = 0, vocabulary: int = 100) -> list[dict[str, Any]]:
    """Token ids of different lengths; the last two examples are the same."""
    rng = np.random.default_rng(seed)
    found = [{"input_ids": rng.integers(3, vocabulary, size=rng.integers(2, 9)).tolist()} for _ in range(n - 1)]
    return [*found, found[-1]]


class Pad:
    """Pads to the longest text of a batch."""

    def __init__(self, side: str = "right", *, multiple: int = 1, types: bool = False, dtype=torch.long) -> None:
        self.side, self.multiple, self.types, self.dtype = side, multiple, types, dtype

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        ids = torch.zeros(len(rows), longest, dtype=self.dtype)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(rows):
            length = len(example["input_ids"])
            here = slice(longest - length, None) if self.side == "left" else slice(length)
            ids[row, here], mask[row, here] = torch.tensor(example["input_ids"], dtype=self.dtype), 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows))}
        return batch | ({"token_type_ids": torch.zeros_like(ids)} if self.types else {})


def write(teacher: Any, folder: Path, contents: CacheContents = LOGITS, **changes: Any) -> Any:
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
    arguments: dict[str, Any] = {"dataset": texts(), "collate": Pad(), "batch_size": 4, "shard_examples": 6}
    return write_cache(teacher, folder=folder, contents=contents, progress=False, **{**arguments, **changes})


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return make_model("bert", BERT)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make_model("llama", "AutoModelForCausalLM")


def shuffled_batches(dataset: Any, collate: Callable[[Any], Any], size: int) -> list[Any]:
    order = np.random.default_rng(9).permutation(len(dataset)).tolist()
    return [collate([dataset[i] for i in order[start : start + size]]) for start in range(0, len(order), size)]


def the_same_as_live(model: nn.Module, folder: Path, batches: list[Any], layers: tuple[int, ...] = ()) -> int:
    """Compare logits and hidden states of every batch where it is no padding; how many batches."""
    cache = TeacherCache.open(folder)
    every = find_layers(model) if layers else []
    for batch in batches:
        found = cache.targets(batch)
        given = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), capture_outputs({number: every[number] for number in layers}) as hidden:
            outputs = model(**given)
        expected = {"teacher_logits": outputs.logits} | {f"teacher_hidden_{i}": states for i, states in hidden.items()}
        assert found.keys() == expected.keys()
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        for name, values in expected.items():
            assert found[name].shape == values.shape
            if values.dim() == 3 and mask is not None:
                assert not found[name][~mask].any()
                torch.testing.assert_close(
                    found[name][mask].float(), values[mask], atol=2e-5 if "logits" in name else 0.02, rtol=0.01
                )
            else:
                torch.testing.assert_close(
                    found[name].float(), values, atol=2e-5 if "logits" in name else 0.02, rtol=0.01
                )
    return len(batches)


# ---- keys ----


def test_a_key_is_the_example_and_not_its_batch():
    examples = texts(5)[:4]
    alone = np.concatenate([example_keys(Pad()([example])) for example in examples])
    looked_at = 0
    for collate in (
        Pad("right"),
        Pad("left"),
        Pad(multiple=16),
        Pad("left", types=True),
        Pad(dtype=torch.int32),
    ):
        batch = collate(examples)
        np.testing.assert_array_equal(example_keys(batch), alone)
        np.testing.assert_array_equal(example_keys(collate(examples[::-1])), alone[::-1])
        looked_at += 1
    without_mask = {"input_ids": torch.tensor([examples[0]["input_ids"]])}
    assert example_keys(without_mask)[0] == alone[0] and looked_at == 5
    assert len(set(alone.tolist())) == 4


def test_what_changes_a_key():
    base = Pad(types=True)(texts(3)[:1])
    key = example_keys(base)[0]
    ids, mask = base["input_ids"], base["attention_mask"]
    gap = mask.clone()
    gap[0, 0 if mask.shape[1] < 3 else 1] = 0
    changed = {
        "token": base | {"input_ids": ids + 1},
        "order": base | {"input_ids": ids.flip(1)},
        "types": base | {"token_type_ids": torch.ones_like(ids)},
        "shorter": {name: value[:, :-1] for name, value in base.items() if name != "labels"},
        "gap": base | {"attention_mask": gap},
        "packed": base | {"attention_mask": mask * 2},
        "more": base | {"bbox": torch.zeros(1, ids.shape[1], 4, dtype=torch.long)},
    }
    keys = {name: example_keys(batch)[0] for name, batch in changed.items()}
    assert len({key, *keys.values()}) == len(changed) + 1 == 8
    same = [{**base, "labels": torch.ones(1)}, {**base, "start_positions": torch.ones(1)}, {**base, "note": "text"}]
    assert [example_keys(batch)[0] for batch in same] == [key] * 3
    assert example_keys(changed["more"], ignored=["bbox"])[0] == key


def test_gaps_in_a_mask_count_by_their_place():
    ids = torch.tensor([[5, 6, 7, 8]])
    masks = [[1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1]]
    rows = [torch.tensor([[5, 1, 6, 7]]), torch.tensor([[5, 6, 1, 7]]), torch.tensor([[5, 2, 6, 7]])]
    keys = [
        example_keys({"input_ids": row, "attention_mask": torch.tensor([mask])})[0]
        for row, mask in zip(rows, masks, strict=True)
    ]
    assert keys[0] == keys[2] != keys[1] and example_keys({"input_ids": ids})[0] not in keys


def test_images_count_whole_and_choices_each_without_its_padding():
    pixels = torch.randn(2, 3, 4, 4)
    keys = example_keys({"pixel_values": pixels})
    assert len(set(keys.tolist())) == 2
    assert (example_keys({"pixel_values": pixels.double()}) == keys).all()
    changed = pixels.clone()
    changed[1, 2, 3, 3] += 1e-3
    assert (example_keys({"pixel_values": changed}) == keys).tolist() == [True, False]
    short = {"input_ids": torch.tensor([[[5, 6], [7, 0]]]), "attention_mask": torch.tensor([[[1, 1], [1, 0]]])}
    wide = {name: nn.functional.pad(value, (0, 2)) for name, value in short.items()}
    other = {**short, "input_ids": torch.tensor([[[5, 6], [8, 0]]])}
    assert example_keys(short) == example_keys(wide) != example_keys(other)


def test_labels_count_where_a_decoder_reads_them():
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, 8, -100]])}
    longer = {**batch, "labels": torch.tensor([[7, 8, -100, -100]])}
    other = {**batch, "labels": torch.tensor([[7, 9, -100]])}
    read = {"reads_labels": True}
    assert example_keys(batch, **read) == example_keys(longer, **read) != example_keys(other, **read)
    assert example_keys(batch) == example_keys(other) != example_keys(batch, **read)


def test_tensors_of_other_lengths_are_refused():
    with pytest.raises(CacheError, match=r"tensors of 1 and 2 examples \(input_ids, lengths\)"):
        example_keys({"input_ids": torch.ones(1, 2), "lengths": torch.ones(2)})


# ---- the same as the live teacher, whatever the batch ----


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 5, 23])
def test_language_models_on_either_side(llama, tmp_path, side, size):
    layers = (0, 2)
    manifest = write(llama, tmp_path / "c", CacheContents("all", hidden_layers=layers))
    assert (manifest.examples, manifest.shards, manifest.complete) == (N - 1, 4, True)
    assert manifest.tokens == sum(len(example["input_ids"]) for example in texts()[:-1])
    batches = shuffled_batches(texts(), Pad(side, multiple=3), size)
    # Positions are counted from the mask only while generating: give those that the padding shifts.
    for batch in batches:
        places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch["labels"] = None
        with_places = batch | {"position_ids": places}
        given = {name: value for name, value in with_places.items() if value is not None}
        cache = TeacherCache.open(tmp_path / "c")
        found = cache.targets({name: value for name, value in given.items() if name != "position_ids"})
        with torch.no_grad():
            expected = llama(**given).logits
        mask = given["attention_mask"].bool()
        torch.testing.assert_close(found["teacher_logits"][mask], expected[mask], atol=2e-5, rtol=1e-3)
        assert not found["teacher_logits"][~mask].any() and found["teacher_hidden_2"].dtype == torch.bfloat16
    assert len(batches) == -(-N // size)


def test_layers_that_nobody_wants_are_not_read(bert, tmp_path):
    write(bert, tmp_path / "c", CacheContents("all", hidden_layers=(0, 2)))
    cache, batch = TeacherCache.open(tmp_path / "c"), Pad()(texts()[:4])
    whole = cache.targets(batch)
    assert whole.keys() == {"teacher_logits", "teacher_hidden_0", "teacher_hidden_2"}
    for wanted in ((), (2,), (0, 2)):
        found = CachingCollator(Pad(), cache, frozenset(wanted))(texts()[:4])
        assert found.keys() == {*batch, "teacher_logits", *(f"teacher_hidden_{layer}" for layer in wanted)}
        assert all(torch.equal(found[name], values) for name, values in whole.items() if name in found)


@pytest.mark.parametrize("size", [1, 7])
def test_classifiers(bert, tmp_path, size):
    write(bert, tmp_path / "c", CacheContents("all", hidden_layers=(1, 2)))
    batches = shuffled_batches(texts(), Pad(types=True), size)
    assert the_same_as_live(bert, tmp_path / "c", batches, (1, 2)) == -(-N // size)


def test_a_class_for_each_token(tmp_path):
    model = make_model("bert", "AutoModelForTokenClassification")
    write(model, tmp_path / "c")
    assert the_same_as_live(model, tmp_path / "c", shuffled_batches(texts(), Pad(), 6)) == 4


def test_images(tmp_path):
    model = make_model("vit", "AutoModelForImageClassification")
    images = [{"pixel_values": torch.randn(3, 16, 16)} for _ in range(7)]

    def collate(rows):
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}

    contents = CacheContents("all", hidden_layers=(0, 2))
    manifest = write(model, tmp_path / "c", contents, dataset=images, collate=collate, shard_examples=None)
    assert (manifest.tokens, manifest.shards, manifest.layers, manifest.width) == (0, 1, (3,), 32)
    assert manifest.arrays["hidden_2"] == ArraySpec("bfloat16", (5, 32), "examples")
    assert the_same_as_live(model, tmp_path / "c", shuffled_batches(images, collate, 3), (0, 2)) == 3


def test_question_answering(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForQuestionAnswering(BertConfig(vocab_size=100, **sizes)).eval()
    write(model, tmp_path / "c")
    [batch] = shuffled_batches(texts(), Pad(), N)
    found = TeacherCache.open(tmp_path / "c").targets(batch)
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"].bool()
    assert found.keys() == {"teacher_start_logits", "teacher_end_logits"}
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[f"teacher_{name}"][mask], expected[name].detach()[mask], atol=1e-5, rtol=1e-4)
        assert found[f"teacher_{name}"].shape == mask.shape


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_with_a_decoder(family, tmp_path):
    model = make_model(family, "AutoModelForSeq2SeqLM")
    rng = np.random.default_rng(3)
    pairs = [{**row, "labels": rng.integers(3, 100, size=rng.integers(1, 6)).tolist()} for row in texts(9)]

    def collate(rows):
        longest = max(len(row["labels"]) for row in rows)
        labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
        return {**Pad()(rows), "labels": torch.tensor(labels)}

    layers = (1, len(find_layers(model)) - 1)  # of the encoder and of the decoder
    write(model, tmp_path / "c", CacheContents("all", hidden_layers=layers), dataset=pairs, collate=collate)
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.manifest.reads_labels and cache.manifest.arrays["logits"].layout == "labels"
    batches = shuffled_batches(pairs, collate, 4)
    for batch in batches:
        found, every = cache.targets(batch), find_layers(model)
        with torch.no_grad(), capture_outputs({number: every[number] for number in layers}) as hidden:
            logits = model(**batch).logits
        tokens, answers = batch["attention_mask"].bool(), batch["labels"] != -100
        torch.testing.assert_close(found["teacher_logits"][answers], logits[answers], atol=1e-4, rtol=1e-3)
        for number, mask in zip(layers, (tokens, answers), strict=True):
            mine = found[f"teacher_hidden_{number}"]
            torch.testing.assert_close(mine[mask].float(), hidden[number][mask], atol=0.02, rtol=0.01)
            assert not mine[~mask].any()
    assert len(batches) == 3
    with pytest.raises(CacheError, match="2 of 2 examples are not in the teacher cache"):
        cache.targets({**collate(pairs[:2]), "labels": torch.tensor([[50], [51]])})


def test_a_teacher_with_inputs_of_its_own(bert, tmp_path):
    def collate(rows):
        own = {f"teacher_{name}": value for name, value in Pad()(rows).items() if name != "labels"}
        return {"input_ids": torch.full((len(rows), 3), 7), **own}

    write(bert, tmp_path / "c", collate=collate)
    batch = collate(texts()[:3])
    found = TeacherCache.open(tmp_path / "c").targets(batch)
    torch.testing.assert_close(found["teacher_logits"], Teacher(bert)(batch).outputs["logits"], atol=1e-5, rtol=1e-4)


def test_several_teachers(bert, tmp_path):
    both = Ensemble([Teacher(bert), Teacher(make_model("bert", BERT, seed=5))])
    manifest = write(both, tmp_path / "c")
    assert manifest.teacher.count(" + ") == 1
    batch = Pad()(texts()[:3])
    found = TeacherCache.open(tmp_path / "c").targets(batch)
    torch.testing.assert_close(found["teacher_logits"], both(batch).outputs["logits"], atol=1e-5, rtol=1e-4)
    with pytest.raises(CacheError, match="several teachers have no hidden states in common"):
        write(both, tmp_path / "d", CacheContents("all", hidden_layers=(0,)))


# ---- what is kept of many classes ----


@pytest.mark.parametrize("vocabulary", [100, 70_000])
def test_the_likeliest_classes(tmp_path, vocabulary):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    examples = texts(5, vocabulary=vocabulary)
    manifest = write(model, tmp_path / "c", CacheContents("top_k", count=7), dataset=examples)
    assert ("top_indices_high" in manifest.arrays) == (vocabulary > 65536)
    batch = Pad("left")(examples[:4])
    found = TeacherCache.open(tmp_path / "c").targets(batch)
    looked_at = 0
    for row, example in enumerate(examples[:4]):
        ids = example["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0].detach().double().numpy()
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        best = np.argsort(-log_probs, axis=-1)[:, :7]
        here = slice(-len(ids), None)
        indices = found["teacher_top_indices"][row, here]
        assert indices.dtype == torch.int32
        np.testing.assert_array_equal(np.sort(indices.numpy(), -1), np.sort(best, -1))
        expected = np.take_along_axis(log_probs, indices.long().numpy(), -1)
        np.testing.assert_allclose(found["teacher_top_log_probs"][row, here].numpy(), expected, rtol=2e-3, atol=2e-3)
        rest = np.log1p(-np.exp(np.take_along_axis(log_probs, best, -1)).sum(-1))
        np.testing.assert_allclose(found["teacher_tail_log_mass"][row, here].numpy(), rest, rtol=1e-3, atol=1e-4)
        others = np.exp(log_probs)
        np.put_along_axis(others, best, 0.0, -1)
        mean = (others * log_probs).sum(-1) / others.sum(-1)
        np.testing.assert_allclose(found["teacher_tail_mean_log_prob"][row, here].numpy(), mean, rtol=2e-3)
        drawn = found["teacher_tail_indices"][row, here]
        assert drawn.shape == (len(ids), 1) and drawn.dtype == torch.int32
        assert not (drawn.numpy() == best).any()
        looked_at += len(ids)
    assert looked_at == int(batch["attention_mask"].sum()) and (found["teacher_top_indices"].max() > 65535) == (
        vocabulary > 65536
    )


@pytest.mark.parametrize("k", [1, 4, 7])
def test_numbers_of_classes_in_few_bytes(k):
    indices = torch.randint(0, 1 << 20, (5, 3, k), generator=torch.Generator().manual_seed(0))
    packed = pack_indices(indices, classes=1 << 20, name="i")
    assert torch.equal(unpack_indices(packed, "i").long(), indices)
    assert sum(part[0, 0].numel() * part.element_size() for part in packed.values()) == 2 * k + -(-k // 2)
    small = indices % 65536
    packed = pack_indices(small, classes=65536, name="i")
    assert list(packed) == ["i"] and torch.equal(unpack_indices(packed, "i").long(), small)
    with pytest.raises(CacheError, match="1,048,577 classes are too many"):
        pack_indices(indices, classes=(1 << 20) + 1, name="i")


@pytest.mark.parametrize(("vocabulary", "most"), [(5_000, 300), (70_000, 340)])
def test_what_sixty_four_take_a_token(tmp_path, vocabulary, most):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
    manifest = write(model, tmp_path, CacheContents("top_k", count=64), dataset=texts(3))
    # Ten tokens an example, keys and offsets included.
    assert most - 10 < estimate_size(manifest.arrays, {"examples": 100, "tokens": 1000}) / 1000 <= most


def test_the_others_are_drawn_as_the_teacher_has_them(llama, tmp_path):
    """Many draws of few classes: shares within five standard errors; none where the likeliest are all there are."""
    examples = [{"input_ids": [5, 6, 7]}]
    drawn = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        write(llama, folder, CacheContents("top_k", count=90), dataset=examples, seed=seed)
        drawn.append(TeacherCache.open(folder).targets(Pad()(examples))["teacher_tail_indices"])
        assert drawn[-1].shape == (1, 3, 22)
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(CacheError, match=r"draws of another seed \(0; not 1\)"):
        write(llama, tmp_path / "0", CacheContents("top_k", count=90), dataset=examples, seed=1)
    probabilities = llama(torch.tensor([[5, 6, 7]])).logits.detach().softmax(-1)[0]
    others = probabilities.scatter(-1, probabilities.topk(90).indices, 0.0)
    shares, draws = others / others.sum(-1, keepdim=True), torch.cat(drawn, dim=-1)[0]
    for place in range(3):
        share = torch.bincount(draws[place].long(), minlength=100) / 66
        assert ((share - shares[place]).abs() < 5 * (shares[place] * (1 - shares[place]) / 66).sqrt() + 1e-6).all()
    write(llama, tmp_path / "all", CacheContents("top_k", count=100), dataset=examples)
    found = TeacherCache.open(tmp_path / "all").targets(Pad()(examples))
    assert (found["teacher_tail_log_mass"] == -torch.inf).all() and (found["teacher_tail_mean_log_prob"] == 0).all()


def test_samples_follow_the_teacher(llama, tmp_path):
    example = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    write(llama, tmp_path / "c", CacheContents("samples", count=20_000), dataset=example)
    found = TeacherCache.open(tmp_path / "c").targets(Pad()(example[:1]))
    drawn = found["teacher_sample_indices"]
    assert drawn.shape == (1, 3, 20_000) and drawn.dtype == torch.int32
    probabilities = llama(torch.tensor([[5, 6, 7]])).logits.detach().softmax(-1)[0]
    for place in range(3):
        share = torch.bincount(drawn[0, place].long(), minlength=100) / 20_000
        spread = (probabilities[place] * (1 - probabilities[place]) / 20_000).sqrt()
        assert ((share - probabilities[place]).abs() < 5 * spread + 1e-4).all()
    assert not torch.equal(drawn[0, 0], drawn[0, 1])
    write(llama, tmp_path / "again", CacheContents("samples", count=20_000), dataset=example)
    assert contents_of(tmp_path / "again") == contents_of(tmp_path / "c")
    write(llama, tmp_path / "other", CacheContents("samples", count=20_000), dataset=example, seed=1)
    files = [contents_of(tmp_path / name)["shard-00000.safetensors"] for name in ("other", "c")]
    assert files[0] != files[1]
    with pytest.raises(CacheError, match=r"draws of another seed \(0; not 1\)"):
        write(llama, tmp_path / "c", CacheContents("samples", count=20_000), dataset=example, seed=1)


def test_last_hidden_states_and_the_head_give_the_logits(llama, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hfcompress"):
        manifest = write(llama, tmp_path / "c", CacheContents("last_hidden"))
    said_kb = float(re.search(r"about ([\d.]+) kB", caplog.text)[1])
    assert 0.8 * manifest.size_bytes < said_kb * 1e3 <= manifest.size_bytes  # the head is counted
    cache = pickle.loads(pickle.dumps(TeacherCache.open(tmp_path / "c")))
    batch = Pad()(texts()[:4])
    found = cache.targets(batch)
    head = cache.load_head()
    mine = head(found["teacher_last_hidden"].float()).log_softmax(-1)
    mask = batch["attention_mask"].bool()
    whole = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    torch.testing.assert_close(mine[mask], whole[mask].detach(), atol=0.05, rtol=0)
    assert torch.equal(head.weight, llama.lm_head.weight) and not head.weight.requires_grad
    with pytest.raises(CacheError, match="so it has no head"):
        write(llama, tmp_path / "d")
        TeacherCache.open(tmp_path / "d").load_head()


def test_last_hidden_states_that_do_not_give_the_logits_are_refused(bert, tmp_path):
    capped = make_model("gemma2", "AutoModelForCausalLM", final_logit_softcapping=0.5)
    with pytest.raises(CacheError, match="changes its logits after the head"):
        write(capped, tmp_path / "c", CacheContents("last_hidden"))
    with pytest.raises(CacheError, match="has no linear head over a vocabulary"):
        write(bert, tmp_path / "c", CacheContents("last_hidden"))
    assert not (tmp_path / "c").exists()


# ---- killed, and several processes ----


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_process(function: Callable[[], Any]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


@pytest.mark.parametrize("moment", ["asking", "writing"])
def test_killed_and_started_again_it_is_the_cache_it_would_have_been(llama, tmp_path, moment):
    contents = CacheContents("samples", count=3, hidden_layers=(1,))
    write(llama, tmp_path / "whole", contents)

    def die():
        done = {"shards": 0, "batches": 0}
        save, pad = writing.save_file, Pad()

        def save_half(tensors, path):
            done["shards"] += 1
            save(tensors, path)
            if moment == "writing" and done["shards"] == 3:
                path.write_bytes(path.read_bytes()[:200])
                os.kill(os.getpid(), signal.SIGKILL)

        def collate(rows):
            done["batches"] += 1
            if moment == "asking" and done["shards"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return pad(rows)

        writing.save_file = save_half
        write(llama, tmp_path / "killed", contents, collate=collate)

    process = in_process(die)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    shards = sorted(path.name for path in (tmp_path / "killed").glob("shard-*"))
    assert shards == ["shard-00000.safetensors", "shard-00001.safetensors"]
    with pytest.raises(CacheError, match=r"is not complete: 2 of 4 shards are there; run what made it again"):
        TeacherCache.open(tmp_path / "killed")
    before = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in shards}
    assert write(llama, tmp_path / "killed", contents).complete
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in shards} == before
    assert contents_of(tmp_path / "killed") == contents_of(tmp_path / "whole")
    assert len(TeacherCache.open(tmp_path / "killed")) == N - 1


def test_two_processes_write_shards_of_their_own(llama, tmp_path):
    contents = CacheContents("top_k", count=5)
    write(llama, tmp_path / "one", contents)
    both = [
        in_process(lambda rank=rank: write(llama, tmp_path / "two", contents, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert contents_of(tmp_path / "two") == contents_of(tmp_path / "one")
    # One after the other: the first leaves what is not its own, and the last says that it is complete.
    first = write(llama, tmp_path / "three", contents, rank=1, world_size=3)
    assert not first.complete and [path.name for path in (tmp_path / "three").glob("shard-*")] == [
        "shard-00001.safetensors"
    ]
    assert not write(llama, tmp_path / "three", contents, rank=2, world_size=3).complete
    assert write(llama, tmp_path / "three", contents, rank=0, world_size=3).complete
    assert contents_of(tmp_path / "three") == contents_of(tmp_path / "one")
    with pytest.raises(CacheError, match="rank 2 is not one of 2 processes"):
        write(llama, tmp_path / "four", contents, rank=2, world_size=2)


def test_complete_it_is_left_alone(bert, tmp_path):
    first = write(bert, tmp_path / "c")
    before = contents_of(tmp_path / "c")
    again = write(bert, tmp_path / "c", batch_size=9, shard_examples=None)
    assert again == first and contents_of(tmp_path / "c") == before


# ---- refused ----


def test_another_plan_for_the_same_folder_is_refused(bert, tmp_path):
    write(bert, tmp_path / "c")
    before = contents_of(tmp_path / "c")
    other = make_model("bert", BERT, seed=1)
    cases: list[tuple[str, Callable[[], Any]]] = [
        (r"of another teacher \(.*, float32, sha256 \w{8}; not .*\)", lambda: write(other, tmp_path / "c")),
        (
            r"of other contents \(logits in float32; not logits in float16\)",
            lambda: write(bert, tmp_path / "c", CacheContents(dtype="float16")),
        ),
        (
            r"of other contents \(.*; not logits in float32 and hidden states of layers 1\)",
            lambda: write(bert, tmp_path / "c", CacheContents(hidden_layers=(1,))),
        ),
        (r"other data, .* \(22 examples; not 21\)", lambda: write(bert, tmp_path / "c", dataset=texts()[1:])),
        (r"other data, .*", lambda: write(bert, tmp_path / "c", dataset=texts()[::-1])),
        (r"shards of 6 examples, not 5", lambda: write(bert, tmp_path / "c", shard_examples=5)),
    ]
    for message, attempt in cases:
        with pytest.raises(CacheError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert len(cases) == 6 and contents_of(tmp_path / "c") == before


def test_a_folder_with_something_else_is_refused(bert, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(CacheError, match="is not empty and holds no teacher cache"):
            write(bert, folder)
    with pytest.raises(CacheError, match=r"holds no teacher cache \(manifest.json is missing\)"):
        TeacherCache.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_collator_that_changes_inputs_is_refused(bert, tmp_path):
    def mask_at_random(rows):
        batch = Pad()(rows)
        return {**batch, "input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 4, batch["input_ids"])}

    torch.manual_seed(0)
    with pytest.raises(CacheError, match=r"of 4 examples changed since they were read before: .* at random"):
        write(bert, tmp_path / "c", collate=mask_at_random)
    write(bert, tmp_path / "d")
    collate = CachingCollator(mask_at_random, TeacherCache.open(tmp_path / "d"))
    with pytest.raises(
        CacheError, match=r"of 8 examples are not in the teacher cache .*/d: .* changes inputs at random"
    ):
        collate(texts()[:8])


def test_what_is_missing_is_said_with_a_cause(bert, tmp_path):
    write(bert, tmp_path / "c")
    cache = TeacherCache.open(tmp_path / "c")
    batch = Pad()(texts()[:3])
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(
        CacheError, match=r"the batch has input_ids, token_type_ids, and the cache was made from input_ids$"
    ):
        cache.targets(batch)
    with pytest.raises(
        CacheError, match=r"^1 of 2 examples are not in .*: they are other data, or of another tokenizer"
    ):
        cache.targets(Pad()([texts()[0], {"input_ids": [99, 98, 97]}]))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"hidden_layers": (0, 3)}, "hidden_layers has 3, but the teacher's layers are 0 to 2"),
        ({"logits": "top_k", "count": 3}, "there are no top 3 of 2 classes"),
        ({"dtype": "float16"}, "the teacher's logits are not finite in float16"),
    ],
)
def test_what_the_teacher_does_not_give(tmp_path, contents, message):
    model = make_model("bert", BERT)
    if "dtype" in contents:
        nn.init.constant_(model.classifier.bias, 1e5)
    with pytest.raises(CacheError, match=message):
        write(model, tmp_path / "c", CacheContents(**contents))
    assert not (tmp_path / "c").exists()


def test_a_model_without_logits(tmp_path):
    model = make_model("bert")
    with pytest.raises(CacheError, match="gives no logits, only last_hidden_state"):
        write(model, tmp_path / "c")
    write(model, tmp_path / "c", CacheContents(None, hidden_layers=(2,)))
    batch = Pad()(texts()[:4])
    found = TeacherCache.open(tmp_path / "c").targets(batch)
    mask = batch["attention_mask"].bool()
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(found["teacher_hidden_2"][mask].float(), expected[mask].detach(), atol=0.03, rtol=0.01)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"logits": "some"}, "logits is 'some', but must be all, top_k"),
        ({"count": 0}, "count is 0, but must be at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8', but must be float32"),
        ({"hidden_layers": (-1,)}, "hidden_layers has -1"),
        ({"logits": None}, "nothing is to be kept"),
    ],
)
def test_contents_that_are_not_allowed(contents, message):
    with pytest.raises(CacheError, match=message):
        CacheContents(**contents)


def test_data_that_cannot_be_cached(bert, tmp_path):
    with pytest.raises(CacheError, match="the data set has no length or is empty"):
        write(bert, tmp_path / "c", dataset=[])
    with pytest.raises(CacheError, match="the data set has no length or is empty"):
        write(bert, tmp_path / "c", dataset=iter(texts()))
    with pytest.raises(CacheError, match="the collator made 1 rows of 4 examples"):
        write(bert, tmp_path / "c", collate=lambda rows: Pad()(rows[:1]))


# ---- files ----


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut off":
        path.write_bytes(data[:-10])
    elif how == "header":
        path.write_bytes(b"\xff" * 8 + data[8:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(data + b"0" * 8)
    elif how == "missing":
        path.unlink()
    elif how == "other arrays":
        save_file({"keys": torch.zeros(6, 16, dtype=torch.uint8)}, path)
    elif how == "offsets":
        tensors = load_file(path)
        tensors["tokens_offsets"] = tensors["tokens_offsets"].flip(0)
        save_file(tensors, path)
    else:
        tensors = load_file(path)
        save_file({**tensors, "logits": tensors["logits"][:, :-1].contiguous()}, path)


DAMAGE = ["cut off", "header", "empty", "longer", "missing", "other arrays", "offsets", "shape"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_noticed_when_opened_and_written_again(llama, tmp_path, how, caplog):
    write(llama, tmp_path / "c")
    before = contents_of(tmp_path / "c")
    damage(tmp_path / "c" / "shard-00002.safetensors", how)
    with pytest.raises(CacheError, match=r"shard-00002.safetensors is (damaged|missing)") as caught:
        TeacherCache.open(tmp_path / "c")
    assert "\n" not in str(caught.value)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        write(llama, tmp_path / "c")
    assert contents_of(tmp_path / "c") == before
    assert ["is damaged" in record.message for record in caplog.records] == ([] if how == "missing" else [True])


@pytest.mark.parametrize(
    "change", [("\n}", ""), ('"version": 2', '"version": 1'), ('"teacher"', '"surprise"'), ("all", "al")]
)
def test_a_damaged_manifest(bert, tmp_path, change):
    write(bert, tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(
        CacheError, match=r"manifest.json is damaged or of another version: .*; make it again"
    ) as caught:
        TeacherCache.open(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_the_manifest_says_what_is_there(bert, tmp_path):
    (tmp_path / "private").mkdir()
    bert.save_pretrained(tmp_path / "private" / "bert-films")
    named = type(bert).from_pretrained(tmp_path / "private" / "bert-films")
    write(named, tmp_path / "c", CacheContents("all", hidden_layers=(1,)))
    text = (tmp_path / "c" / "manifest.json").read_text()
    said = json.loads(text)
    assert said["teacher"] == "bert-films" and "private" not in text
    assert (said["teacher_dtype"], said["examples"], said["layers"], said["width"]) == ("float32", N - 1, [3], 32)
    files = [path for path in (tmp_path / "c").iterdir() if path.suffix == ".safetensors"]
    assert said["size_bytes"] == sum(path.stat().st_size for path in files) and len(files) == 4
    assert said["versions"]["torch"] == torch.__version__
    # The name says nothing of the weights: the same ones under another name are the same teacher.
    assert write(bert, tmp_path / "c", CacheContents("all", hidden_layers=(1,))).complete


def test_the_size_is_said_before_and_nothing_is_written_where_there_is_no_room(llama, tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="hfcompress"):
        manifest = write(llama, tmp_path / "c")
    [line] = [record.message for record in caplog.records]
    tokens = manifest.tokens
    estimated = tokens * 100 * 4 + 22 * (16 + 8)
    assert line.startswith(f"22 examples, {tokens:,} tokens: about {estimated / 1e3:.1f} kB in {tmp_path / 'c'}; ")
    assert line.endswith("GB free")
    assert estimated < manifest.size_bytes < estimated + 4 * 600
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
    with pytest.raises(CacheError, match=r"takes about \d+\.\d kB, but only 10.0 kB are free in .*; keep less"):
        write(llama, tmp_path / "d")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["manifest.json"]
    assert write(llama, tmp_path / "c").complete  # nothing is to be written


class Wide(nn.Module):
    """A teacher with as many classes as one likes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(classes).float())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return SequenceClassifierOutput(logits=input_ids[:, :1] + self.bias)


def test_files_are_mapped_and_not_read(tmp_path):
    examples = [{"input_ids": [i]} for i in range(1000)]
    manifest = write(Wide(10_000), tmp_path / "c", dataset=examples, batch_size=100, shard_examples=None)
    assert manifest.shards == 1 and manifest.size_bytes > 40_000_000
    cache = TeacherCache.open(tmp_path / "c")
    found = cache.targets(Pad()([examples[700], examples[3]]))["teacher_logits"]
    assert found[:, :2].tolist() == [[700, 701], [3, 4]]
    path = str(tmp_path / "c" / "shard-00000.safetensors")
    mapped = [block for block in Path("/proc/self/smaps").read_text().split("VmFlags") if path in block]
    resident_kb = sum(int(block.split("Rss:")[1].split()[0]) for block in mapped)
    assert mapped and resident_kb < 8_000


def test_shards_are_small_enough_and_ordered_by_length_for_speed(tmp_path):
    examples = [{"input_ids": [i % 90 + 3] * (1 + i % 7) + [i]} for i in range(200)]
    widths = []

    class Watched(Pad):
        def __call__(self, rows):
            batch = super().__call__(rows)
            widths.append((len(rows), batch["input_ids"].shape[1], int(batch["attention_mask"].sum())))
            return batch

    write(Wide(3), tmp_path / "c", dataset=examples, collate=Watched(), batch_size=20, shard_examples=None)
    asked = widths[-10:]
    assert sum(rows for rows, _, _ in asked) == 200
    padding = 1 - sum(tokens for *_, tokens in asked) / sum(rows * width for rows, width, _ in asked)
    assert padding < 0.1  # in the order of the data a quarter or more


def test_lookup_of_any_keys(bert, tmp_path):
    """Keys with zeros at the end, which numpy's strings do not show, and keys that are nearly there."""
    write(bert, tmp_path / "c", shard_examples=None)
    cache = TeacherCache.open(tmp_path / "c")
    rng = np.random.default_rng(0)
    keys = np.frombuffer(rng.integers(0, 3, (500, 16), dtype=np.uint8).tobytes(), dtype="S16")
    keys = np.unique(keys)[rng.permutation(len(np.unique(keys)))]
    inside, outside = keys[:300], keys[300:]
    cache._order = np.argsort(inside)
    cache._keys = inside[cache._order]
    np.testing.assert_array_equal(cache.lookup(inside), np.arange(300))
    assert (cache.lookup(outside) == -1).all() and len(outside) >= 100


def test_a_collator_for_data_loaders_of_several_processes(bert, tmp_path):
    write(bert, tmp_path / "c")
    collate = CachingCollator(Pad(), TeacherCache.open(tmp_path / "c"))
    again = pickle.loads(pickle.dumps(collate))
    os.environ["OMP_NUM_THREADS"] = "1"
    teacher, batches = Teacher(bert), 0
    for batch in DataLoader(texts(), batch_size=6, collate_fn=again, num_workers=2, shuffle=True):
        expected = teacher({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
        torch.testing.assert_close(batch["teacher_logits"], expected.outputs["logits"], atol=1e-5, rtol=1e-4)
        assert "labels" in batch
        batches += 1
    assert batches == 4


def test_reading_is_cheap(bert, tmp_path):
    """A batch of 32 is to take about 1 % of a training step of 300 ms; here there is room for a busy machine."""
    examples = [{"input_ids": np.random.default_rng(i).integers(3, 99, 30).tolist()} for i in range(64)]
    write(bert, tmp_path / "c", dataset=examples, shard_examples=None)
    cache, batch, times_ms = TeacherCache.open(tmp_path / "c"), Pad()(examples[:32]), []
    for _ in range(20):
        start = time.perf_counter()
        cache.targets(batch)
        times_ms.append(1e3 * (time.perf_counter() - start))
    assert min(times_ms) < 3
