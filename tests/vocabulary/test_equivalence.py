"""With texts whose tokens stay, tokenizer and model say the same before and after, in memory and in a fresh process."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from hfcompress import Plan, cut, find_sites
from hfcompress.checkpoints.record import read_steps, read_units
from hfcompress.vocabulary import choose_tokens, count_tokens, cut_tokenizer, cut_vocabulary, named_ids
from tests.families import choose_units, largest_difference, run_model
from tests.vocabulary.models import DECODERS, MODELS, SEQ2SEQ, make
from tests.vocabulary.tokenizers import STRANGE, sentences

TEXTS = list(sentences(0)[:6])


def encode(tokenizer, texts=TEXTS, **kwargs):
    return tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt", **kwargs)


def inputs_for(name, tokenizer, texts=TEXTS):
    inputs = dict(encode(tokenizer, texts))
    if name in SEQ2SEQ:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    return inputs


def choose(model, tokenizer, *, coverage=1.0, also=()):
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    keep = [tokens[i] for i in {*named_ids(model), *also} if i in tokens]
    return choose_tokens(tokenizer, count_tokens(tokenizer, sentences(0)), coverage=coverage, keep=keep)


def over_kept(outputs, kept, rows):
    """The entries of outputs over the vocabulary that belong to tokens that stay."""
    return {n: value[..., kept] if value.shape[-1] == rows else value for n, value in outputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_are_those_of_before(name):
    model, tokenizer = make(name)
    rows = model.config.vocab_size
    kept = choose(model, tokenizer)
    assert len(kept) < len(tokenizer) < rows
    inputs = inputs_for(name, tokenizer)
    before = run_model(model, inputs)
    smaller = cut_tokenizer(tokenizer, kept)
    cut_vocabulary(model, kept)
    new_inputs = inputs_for(name, smaller)
    assert not torch.equal(inputs["input_ids"], new_inputs["input_ids"])
    after = run_model(model, new_inputs)
    assert largest_difference(over_kept(before, kept, rows), after) < 1e-6
    if "classifier" not in name:
        assert after["logits"].shape[-1] == len(kept) == len(smaller) == model.config.vocab_size


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "t5", "bart"])
def test_the_loss_on_labels_and_gradients(name):
    model, tokenizer = make(name)
    kept = choose(model, tokenizer)
    inputs, new_inputs = dict(encode(tokenizer)), dict(encode(cut_tokenizer(tokenizer, kept)))
    if name in SEQ2SEQ:
        inputs["decoder_input_ids"], new_inputs["decoder_input_ids"] = inputs["input_ids"], new_inputs["input_ids"]
    old = copy.deepcopy(model)
    cut_vocabulary(model, kept)
    new_ids = new_inputs["input_ids"]
    loss = model(**new_inputs, labels=new_ids).loss
    logits = old(**inputs).logits[..., kept]
    if name == "gpt2":
        logits, new_ids = logits[:, :-1], new_ids[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), new_ids.flatten())
    assert abs(float(loss.detach()) - float(expected.detach())) < 1e-5
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generation_gives_the_same_text(name):
    model, tokenizer = make(name)
    settings = {"max_new_tokens": 8, "do_sample": False}
    texts = TEXTS[:1] if name in DECODERS else TEXTS
    with torch.no_grad():
        old = model.generate(**encode(tokenizer, texts, return_token_type_ids=False), **settings)
    produced = set(old.flatten().tolist())
    if max(produced) >= len(tokenizer):
        # Random weights may name a row that has no token; forbid those as a trained model would.
        model.generation_config.suppress_tokens = list(range(len(tokenizer), model.config.vocab_size))
        with torch.no_grad():
            old = model.generate(**encode(tokenizer, texts, return_token_type_ids=False), **settings)
        produced = set(old.flatten().tolist())
    kept = choose(model, tokenizer, also=produced)
    smaller = cut_tokenizer(tokenizer, kept)
    cut_vocabulary(model, kept)
    with torch.no_grad():
        new = model.generate(**encode(smaller, texts, return_token_type_ids=False), **settings)
    assert kept[new.numpy()].tolist() == old.tolist()
    assert smaller.batch_decode(new) == tokenizer.batch_decode(old)
    assert old.shape[1] > 5 and len(kept) < len(tokenizer)


@pytest.mark.parametrize("name", ["bert classifier", "gpt2", "t5", "bart"])
def test_other_text_runs(name):
    model, tokenizer = make(name)
    kept = choose(model, tokenizer, coverage=0.5)
    smaller = cut_tokenizer(tokenizer, kept)
    cut_vocabulary(model, kept)
    outputs = run_model(model, inputs_for(name, smaller, [STRANGE, *sentences(2)[:3]]))
    assert all(bool(torch.isfinite(value).all()) for value in outputs.values()) and outputs


def test_a_pruned_model_keeps_its_record(tmp_path):
    model, tokenizer = make("bert")
    cut(model, Plan(choose_units(find_sites(model), "both")))
    units = read_units(model.config)
    rows, kept = model.config.vocab_size, choose(model, tokenizer)
    before = run_model(model, inputs_for("bert", tokenizer))
    cut_vocabulary(model, kept)
    smaller = cut_tokenizer(tokenizer, kept)
    after = run_model(model, inputs_for("bert", smaller))
    assert largest_difference(over_kept(before, kept, rows), after) < 1e-6
    assert read_units(model.config) == units and len(units) == 6
    assert read_steps(model.config) == [{"step": "vocabulary", "left": len(kept), "before": rows}]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert largest_difference(after, run_model(again, inputs_for("bert", smaller))) == 0
    # ... and once more, from what was loaded.
    fewer = choose(again, smaller, coverage=0.8)
    cut_vocabulary(again, fewer)
    assert [step["before"] for step in read_steps(again.config)] == [rows, len(kept)]
    assert read_units(again.config) == units


_FRESH = """
import json, sys
import safetensors.torch, torch, transformers
found = {}
for name, (auto, texts) in json.loads(sys.argv[2]).items():
    folder = f"{sys.argv[1]}/{name}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    inputs = dict(tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        found[name] = model(**inputs).logits.contiguous()
    found[name + " ids"] = inputs["input_ids"].contiguous()
safetensors.torch.save_file(found, sys.argv[1] + "/found.safetensors")
assert "hfcompress" not in sys.modules
"""


def test_a_fresh_process_without_hfcompress_loads_the_same(tmp_path):
    expected, asked = {}, {}
    for name in ("bert", "gpt2", "llama", "t5", "mt5 untied", "bart"):
        model, tokenizer = make(name)
        kept = choose(model, tokenizer)
        smaller = cut_tokenizer(tokenizer, kept)
        cut_vocabulary(model, kept)
        model.save_pretrained(tmp_path / name)
        smaller.save_pretrained(tmp_path / name)
        texts = [*TEXTS, STRANGE.partition(" ")[0]]
        inputs = inputs_for(name, smaller, texts)
        expected |= {name: run_model(model, inputs)["logits"], f"{name} ids": inputs["input_ids"]}
        asked[name] = (MODELS[name][1], texts)
    subprocess.run(
        [sys.executable, "-c", _FRESH, str(tmp_path), json.dumps(asked)], check=True, capture_output=True, timeout=120
    )
    found = safetensors.torch.load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys() and len(found) == 12
    for name, value in expected.items():
        assert np.allclose(found[name], value, atol=1e-6, rtol=0), name
