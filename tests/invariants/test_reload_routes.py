"""A pruned model, however uneven, is saved once and loaded by every route; each computes what was saved.

(a) `hfcompress.load`; (b) plain `from_pretrained` after `import hfcompress`, also in pipelines, with a device map and in
Trainer; (c) without hfcompress, with `trust_remote_code=True`; (d) where the plain config can say the shapes, with
transformers and nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import hfcompress
from hfcompress.anatomy import find_sites
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.checkpoints.record import add_step, read_steps, read_units
from hfcompress.pruning import Gates, Plan, cut
from tests.families import (
    CONFIGS,
    DECODERS,
    HEADS,
    auto_class,
    choose_units,
    largest_difference,
    make_inputs,
    make_model,
    others,
    predictions,
    run_model,
    task_class,
)

PATTERNS = ("both", "empty", "even")
SAVED = [(name, pattern) for name in CONFIGS for pattern in PATTERNS]
# A plain config can say fewer heads only where it has a field for the head dimension.
SAYS_HEADS = (
    *(
        "vit",
        "deit",
        "dinov2",
        "dinov2:swiglu",
        "beit",
        "beit:shared",
        "llama",
        "llama:mha",
        "mistral",
        "qwen2",
        "qwen3",
    ),
    *("gemma", "gemma2", "gemma3_text", "phi", "phi3", "t5", "t5:gated"),
)
# Half the neurons of DINOv2's gated feed-forward are no multiple of the hidden size, the only thing its config counts in;
# Bloom's config has no word for them at all, and SigLIP's speaks of those of its pooling head, too, which stay.
NOT_NATIVE = ("dinov2:swiglu", "bloom", "siglip", "siglip_vision_model")
TOLERANCE = 1e-5

transformers.utils.logging.disable_progress_bar()


def plan_for(model, name, pattern):
    """Units to keep; "even" only takes what the plain config can say."""
    keep = choose_units(find_sites(model), pattern)
    if pattern == "even" and name not in SAYS_HEADS:
        keep |= {site.name: tuple(range(site.units)) for site in find_sites(model, kinds=["heads"])}
    return keep


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function that gives the folder of a cut model with its inputs and outputs; each is made once, when it is asked for."""
    root = tmp_path_factory.mktemp("saved")

    @functools.cache
    def get(name, pattern):
        model, inputs = make_model(name, task_class(name)), make_inputs(name, task_class(name))
        keep = plan_for(model, name, pattern)
        sites = find_sites(model)
        gates = Gates(model, sites)
        gates.close({site.name: others(site, keep[site.name]) for site in sites})
        gated = predictions(run_model(model, inputs))  # from the dense model: the reloaded one has to compute the same
        gates.remove()
        cut(model, Plan(keep))
        add_step(model.config, "prune", pattern=pattern)
        folder = root / f"{name.replace(':', '_')}-{pattern}"
        model.save_pretrained(folder)
        assert float((predictions(run_model(model, inputs)) - gated).abs().max()) <= TOLERANCE
        return folder, inputs, gated.contiguous()

    return get


def is_native(name, pattern):
    return pattern == "even" and name not in NOT_NATIVE


def check(model, inputs, expected):
    assert not model.training
    assert float((predictions(run_model(model, inputs)) - expected).abs().max()) <= TOLERANCE


def test_how_much_is_looked_at():
    assert len(CONFIGS) == 48 and len(SAVED) == 144
    assert sum(is_native(name, pattern) for name, pattern in SAVED) == 44


# ---- (a) and (b) ----


@pytest.mark.parametrize(("name", "pattern"), SAVED)
def test_load_and_plain_from_pretrained(name, pattern, saved):
    folder, inputs, expected = saved(name, pattern)
    stock = json.loads((folder / "config.json").read_text())["architectures"][0]
    loaded = hfcompress.load(folder)
    assert type(loaded) is getattr(transformers, stock)
    check(loaded, inputs, expected)
    for kwargs in ({}, {"trust_remote_code": False}) if pattern == "both" else ({},):
        plain = auto_class(name, task_class(name)).from_pretrained(folder, **kwargs)
        assert type(plain) is type(loaded) and find_sites(plain) == find_sites(loaded)
        check(plain, inputs, expected)
    assert read_steps(loaded.config)[0] == {"step": "prune", "pattern": pattern}
    assert bool(read_units(loaded.config)) is not is_native(name, pattern)
    assert (folder / MODELING_FILE).exists() is not is_native(name, pattern)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bare_model_of_a_folder(name, saved):
    folder, inputs, _ = saved(name, "both")
    whole = hfcompress.load(folder)
    bare = auto_class(name, "AutoModel").from_pretrained(folder)
    assert float((last_hidden(bare, inputs) - last_hidden(whole.base_model, inputs)).abs().max()) <= TOLERANCE


def last_hidden(model, inputs):
    """What goes into a head; two towers end in their predictions."""
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    if "decoder_hidden_states" in outputs:
        return outputs["decoder_hidden_states"][-1]
    return predictions(outputs)


def test_every_head_class(tmp_path):
    looked_at = 0
    for auto in HEADS:
        name = next(name for name in HEADS[auto] if auto != "AutoModelForTokenClassification" or name == "distilbert")
        model, inputs = make_model(name, auto), make_inputs(name, auto)
        cut(model, Plan(choose_units(find_sites(model), "both")))
        model.save_pretrained(tmp_path / auto)
        expected = run_model(model, inputs)
        for again in (hfcompress.load(tmp_path / auto), getattr(transformers, auto).from_pretrained(tmp_path / auto)):
            assert type(again) is type(model)
            assert largest_difference(run_model(again, inputs), expected) <= TOLERANCE
            looked_at += 1
    assert looked_at == 22


PARTS = [
    ("bart", "AutoModelForCausalLM"),
    ("whisper", "AutoModelForCausalLM"),
    ("whisper", "AutoModelForAudioClassification"),
    ("t5", "AutoModelForTokenClassification"),
    ("clip", "AutoModelForImageClassification"),
    ("siglip", "AutoModelForImageClassification"),
]


@pytest.mark.parametrize(("name", "auto"), PARTS)
def test_heads_on_a_part_of_the_model(name, auto, tmp_path):
    """Only the encoder, the decoder or one tower: alone, and out of a folder of the whole."""
    model, inputs = make_model(name, auto), make_inputs(name, auto)
    cut(model, Plan(choose_units(find_sites(model), "both")))
    model.save_pretrained(tmp_path / "part")
    expected = run_model(model, inputs)
    for again in (hfcompress.load(tmp_path / "part"), getattr(transformers, auto).from_pretrained(tmp_path / "part")):
        assert largest_difference(run_model(again, inputs), expected) <= TOLERANCE
    whole = make_model(name, task_class(name))
    cut(whole, Plan(choose_units(find_sites(whole), "both", seed=7)))
    whole.save_pretrained(tmp_path / "whole")
    part = getattr(transformers, auto).from_pretrained(tmp_path / "whole")
    units = {site.name: site.units for site in find_sites(whole)}
    of_part = {site.name: site.units for site in find_sites(part)}
    assert of_part.items() < units.items()
    for site in find_sites(part):
        path = next(s.readers[0] for s in find_sites(whole) if s.name == site.name)
        assert part.get_submodule(site.readers[0]).weight.shape == whole.get_submodule(path).weight.shape
    if auto == "AutoModelForCausalLM" or name in ("clip", "siglip"):
        # Elsewhere transformers looks for the weights of the part under other names.
        theirs = dict(whole.named_parameters())
        same = [torch.equal(parameter, theirs[path]) for path, parameter in part.named_parameters() if path in theirs]
        assert len(same) > 20 and all(same)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "distilbert"])
def test_under_a_device_map(name, device_map, saved):
    for pattern in ("both", "empty"):
        folder, inputs, expected = saved(name, pattern)
        check(hfcompress.load(folder, device_map=device_map), inputs, expected)
        check(getattr(transformers, task_class(name)).from_pretrained(folder, device_map=device_map), inputs, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_again_from_the_reloaded_model(name, saved, tmp_path):
    folder, inputs, expected = saved(name, "both")
    hfcompress.load(folder).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(folder))
    assert config_of(tmp_path) == config_of(folder)
    check(hfcompress.load(tmp_path), inputs, expected)


def config_of(folder):
    """What config.json holds; transformers adds the type to the configs of towers when it loads them, of any model."""
    config = json.loads((Path(folder) / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config.get(tower, {}).pop("dtype", None)
    return config


@pytest.mark.parametrize("name", DECODERS)
def test_generation_after_a_reload(name, saved):
    folder, inputs, _ = saved(name, "empty")
    model = hfcompress.load(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**ids, **settings, use_cache=False)
    assert expected.shape[1] == ids["input_ids"].shape[1] + 4
    for cache in ("dynamic", "static"):
        assert torch.equal(plain.generate(**ids, **settings, cache_implementation=cache), expected)


def test_half_precision_on_load(saved):
    folder, inputs, expected = saved("bert", "both")
    half = hfcompress.load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits.
    assert (
        0
        < float((run_model(half, inputs)["logits"].float() - expected).abs().max())
        < 0.1 * float(expected.abs().max())
    )


# ---- (b) pipelines ----

WORDS = ["good", "bad", "film", "a", "very", "not", "[UNK]", "[PAD]", "[CLS]", "[SEP]"]


def make_tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_a_text_classification_pipeline(name, tmp_path):
    model = make_model(name, "AutoModelForSequenceClassification", num_labels=3)
    cut(model, Plan(choose_units(find_sites(model), "both")))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu")
    texts = ["a very good film", "not good"]
    answers = pipe(texts, top_k=None)
    compared = 0
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(-1)[0]
        for entry in answer:
            assert entry["score"] == pytest.approx(float(expected[model.config.label2id[entry["label"]]]), abs=1e-5)
            compared += 1
    assert compared == 6


@pytest.mark.parametrize("name", HEADS["AutoModelForImageClassification"])
def test_an_image_classification_pipeline(name, tmp_path):
    model = make_model(name, "AutoModelForImageClassification", num_labels=3)
    cut(model, Plan(choose_units(find_sites(model), "both")))
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, do_resize=False)
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pipe = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")
    answers = pipe(Image.fromarray(pixels), top_k=3)
    # The processor's arithmetic by hand: to [0, 1], then mean 0.5 and deviation 0.5.
    values = torch.tensor((pixels / 255.0 - 0.5) / 0.5, dtype=torch.float32).permute(2, 0, 1)[None]
    expected = run_model(model, {"pixel_values": values})["logits"].softmax(-1)[0]
    assert len(answers) == 3
    for entry in answers:
        assert entry["score"] == pytest.approx(float(expected[model.config.label2id[entry["label"]]]), abs=1e-5)


# ---- (b) Trainer ----


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_in_trainer_again(name, saved, tmp_path):
    folder, inputs, _ = saved(name, "empty")
    model = getattr(transformers, task_class(name)).from_pretrained(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = [{key: value[row] for key, value in inputs.items()} for row in (0, 1)]
    for row in rows:
        row["labels"] = row["input_ids"] if name == "llama" else torch.tensor(1)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) > 10
    trainer.save_model(str(tmp_path / "final"))
    expected = run_model(model.eval(), inputs)["logits"]
    for where in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
        check(hfcompress.load(where), inputs, expected)
        assert (where / MODELING_FILE).exists()
    assert read_units(hfcompress.load(tmp_path / "final").config) == read_units(model.config)


# ---- (c) remote code, with hfcompress present ----


@pytest.fixture
def own_modules_cache(tmp_path, monkeypatch):
    """Remote code is copied to a folder of this test, and forgotten afterwards."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = {name for name in sys.modules if name.startswith("transformers_modules")}
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        if name not in known:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "vit", "llama", "deberta-v2"])
def test_remote_code_and_hooks_together(name, saved, tmp_path, own_modules_cache):
    """Loaded by the file in the folder, cut on, saved, and loaded again by each route."""
    folder, inputs, expected = saved(name, "both")
    auto = getattr(transformers, task_class(name))
    remote = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules.")
    check(remote, inputs, expected)
    remote.save_pretrained(tmp_path / "same")
    for kwargs in ({}, {"trust_remote_code": True}):
        check(auto.from_pretrained(tmp_path / "same", **kwargs), inputs, expected)
    check(hfcompress.load(tmp_path / "same"), inputs, expected)
    site = find_sites(remote)[-1]
    cut(remote, Plan({site.name: (0, 3)}))
    remote.save_pretrained(tmp_path / "smaller")
    expected = run_model(remote, inputs)["logits"]
    for kwargs in ({}, {"trust_remote_code": True}):
        again = auto.from_pretrained(tmp_path / "smaller", **kwargs)
        check(again, inputs, expected)
        assert read_units(again.config)[site.name] == (2, read_units(remote.config)[site.name][1])
    units = json.loads((tmp_path / "smaller" / "config.json").read_text())["hfcompress"]["units"]
    assert units[site.name][0] == 2


# ---- (c) and (d): a process that cannot import hfcompress ----

WITHOUT_HFCOMPRESS = '''
import importlib.abc, json, sys
from pathlib import Path


class Refuse(importlib.abc.MetaPathFinder):
    """hfcompress may be installed here; this process cannot import it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfcompress":
            raise ImportError("hfcompress is not to be imported in this process")


sys.meta_path.insert(0, Refuse())
import torch
import transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
results = {}


def difference(model, tensors, expected="expected"):
    inputs = {key[6:]: value for key, value in tensors.items() if key.startswith("input.")}
    with torch.no_grad():
        outputs = model.eval()(**inputs)
        name = next(name for name in ("logits", "logits_per_image", "last_hidden_state") if name in outputs)
        return float((outputs[name] - tensors[expected]).abs().max())


for job in json.loads(Path(sys.argv[1]).read_text()):
    folder, tensors, result = job["folder"], load_file(job["tensors"]), {}
    auto = getattr(transformers, job["auto"])
    if job["native"]:
        model = auto.from_pretrained(folder)
    else:
        result["refusals"] = []
        for kwargs in ({}, {"trust_remote_code": False}) if job["again"] else ({},):
            try:
                auto.from_pretrained(folder, **kwargs)
                result["refusals"].append("loaded")
            except Exception as error:
                result["refusals"].append(type(error).__name__)
        model = auto.from_pretrained(folder, trust_remote_code=True)
        if job["again"]:
            bare = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
            result["bare"] = type(bare).__name__
            result["bare difference"] = difference(bare, tensors, "expected of bare")
            model.save_pretrained(job["again"])
            again = auto.from_pretrained(job["again"], trust_remote_code=True)
            result["again"] = difference(again, tensors)
    result["module"], result["name"] = type(model).__module__, type(model).__name__
    result["difference"] = difference(model, tensors)
    results[folder] = result
assert not [name for name in sys.modules if name.partition(".")[0] == "hfcompress"]
Path(sys.argv[2]).write_text(json.dumps(results))
'''


@pytest.fixture(scope="session")
def without_hfcompress(saved, tmp_path_factory):
    """Results of one fresh process over all saved folders, by (family, pattern), with the folder it saved again."""
    root = tmp_path_factory.mktemp("fresh")
    jobs, places = [], {}
    for name, pattern in SAVED:
        folder, inputs, expected = saved(name, pattern)
        tensors = root / f"{folder.name}.safetensors"
        saving = {f"input.{key}": value for key, value in inputs.items()} | {"expected": expected}
        if pattern == "both":
            bare = auto_class(name, "AutoModel").from_pretrained(folder)
            saving["expected of bare"] = predictions(run_model(bare, inputs)).contiguous()
        save_file(saving, tensors)
        again = root / "again" / folder.name if pattern == "both" else None
        jobs.append(
            {
                "folder": str(folder),
                "tensors": str(tensors),
                "auto": auto_class(name, task_class(name)).__name__ if is_native(name, pattern) else task_class(name),
                "native": is_native(name, pattern),
                "again": again and str(again),
            }
        )
        places[name, pattern] = (str(folder), again)
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "run.py").write_text(WITHOUT_HFCOMPRESS)
    environment = {
        **os.environ,
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "run.py", "jobs.json", "results.json"],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((root / "results.json").read_text())
    assert len(results) == 144
    return {key: (results[folder], again) for key, (folder, again) in places.items()}


@pytest.mark.parametrize(("name", "pattern"), SAVED)
def test_without_hfcompress(name, pattern, saved, without_hfcompress):
    result, again = without_hfcompress[name, pattern]
    folder, inputs, expected = saved(name, pattern)
    stock = json.loads((folder / "config.json").read_text())["architectures"][0]
    assert result["name"] == stock, "pipelines look at the name of the class"
    assert result["difference"] <= TOLERANCE
    if is_native(name, pattern):
        assert result["module"].startswith("transformers.models.")
        assert "refusals" not in result
        return
    assert result["module"].startswith("transformers_modules.")
    # Without leave to run the code of the folder nothing is loaded, and that is said aloud.
    if name != "siglip_text_model":  # which no Auto class covers before remote code has told it to
        assert result["refusals"] == ["RuntimeError"] * (1 if again is None else 2)
    if again is not None:
        assert result["bare difference"] <= TOLERANCE
        assert result["again"] <= TOLERANCE
        assert result["bare"] == type(auto_class(name, "AutoModel").from_pretrained(folder)).__name__
        check(hfcompress.load(again), inputs, expected)
        written = json.loads((Path(again) / "config.json").read_text())
        assert written["hfcompress"] == json.loads((folder / "config.json").read_text())["hfcompress"]
