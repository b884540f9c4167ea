"""Pruning without training: on a classifier of texts, one of images, a decoder and a masked language model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hfcompress
from hfcompress.checkpoints.record import read_steps
from hfcompress.config import DataConfig, MeasureConfig, PruneConfig
from hfcompress.hub import verify
from hfcompress.measurement import Metric, count_parameters
from hfcompress.pruning import BudgetError, rank_units
from hfcompress.quantization import quantize
from hfcompress.runs import post_training
from hfcompress.runs.examples import Examples, drop, perplexity, read_examples
from hfcompress.runs.post_training import prune_folder, prune_once, prune_within, sensitivity_of
from hfcompress.tasks.errors import DataError
from tests.hub.folders import all_fine, none_fine
from tests.tasks.conftest import WORDS, save_tokenizer

MEASURE = MeasureConfig(batch=2, length=8, rounds=3, warmup=0, threads=1, device="cpu")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 64, "initializer_range": 0.3}
FILMS = [("a good film", "fine"), ("not very bad", "fine"), ("a bad film", "poor"), ("very bad", "poor")] * 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path_factory.mktemp("tables")))
    monkeypatch.setattr(verify, "_run_child", all_fine)


def configure(**changes: Any) -> PruneConfig:
    base = {
        "target": {"parameters": 0.7, "scope": "layers"},
        "criterion": {"name": "obs", "samples": 24},
        "multiple_of": {"neurons": 1},
        "at_least": {"neurons": 1},
    }
    return PruneConfig.model_validate({**base, **changes})


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Models that know their data, and the data."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    names = {"id2label": {0: "fine", 1: "poor"}, "label2id": {"fine": 0, "poor": 1}}
    models = {
        "bert": BertForSequenceClassification(BertConfig(**TEXT, **names)),
        "masked": BertForMaskedLM(BertConfig(**TEXT)),
        "llama": LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0, dtype="bfloat16")),
        "t5": T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        "vit": ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, **names)),
    }
    models["llama"].to(torch.bfloat16)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        if name == "vit":
            ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / name)
        else:
            save_tokenizer(folder / name, model_input_names=["input_ids", "attention_mask"])
    learn(folder / "bert")
    (folder / "films.csv").write_text("said,verdict\n" + "".join(f"{text},{label}\n" for text, label in FILMS))
    (folder / "unlabelled.csv").write_text("idx,text\n" + "".join(f"{n},{text}\n" for n, (text, _) in enumerate(FILMS)))
    generator = np.random.default_rng(0)
    (folder / "book.txt").write_text("\n\n".join(" ".join(generator.choice(WORDS[4:], 12)) for _ in range(60)))
    for label, shade in (("fine", 220), ("poor", 30)):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(12):
            pixels = generator.normal(shade, 20, (16, 16, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / "images" / label / f"{number}.png")
            (folder / "loose").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / "loose" / f"{label}-{number}.png")
    return folder


def learn(folder: Path) -> None:
    """Fine-tune the classifier on four sentences."""
    model = BertForSequenceClassification.from_pretrained(folder)
    words = {word: number for number, word in enumerate(WORDS)}
    ids = [[2, *(words[word] for word in text.split()), 3] for text, _ in FILMS[:4]]
    length = max(len(row) for row in ids)
    batch = {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([0, 0, 1, 1])).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(**batch).logits.argmax(-1).tolist() == [0, 0, 1, 1]
    model.save_pretrained(folder)


FILMS_DATA = {"label": "verdict", "max_length": 16}


def inside(model: Any) -> int:
    """Parameters of the layers."""
    layers = [module for name, module in model.named_modules() if name.endswith(("encoder.layer", "layers"))]
    return sum(p.numel() for p in (layers[0] if layers else model.vit.encoder).parameters())


# ---- folders ----

FOLDERS = {
    # model, data, metric, number scored on
    "bert": ("films.csv", FILMS_DATA, "accuracy", 4),
    "llama": ("book.txt", {"max_length": 8}, "perplexity", None),
    "vit": ("images", {}, "accuracy", 2),
    "masked": ("book.txt", {"max_length": 8}, None, None),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_from_beginning_to_end(name, material, tmp_path):
    file, more, metric, n = FOLDERS[name]
    said: list[str] = []
    output = tmp_path / "small"
    data = DataConfig(train=str(material / file), **more)
    rows = prune_folder(
        str(material / name),
        output,
        configure(),
        data,
        measure=MEASURE,
        seed=1,
        command="hfcompress prune x",
        say=said.append,
    )
    dense, pruned = hfcompress.load(material / name), hfcompress.load(output)
    assert [row["name"] for row in rows] == ["dense", "pruned"] and [row["folder"] for row in rows] == [name, "."]
    assert [row["parameters"] for row in rows] == [count_parameters(dense), count_parameters(pruned)]
    assert 0.5 * inside(dense) < inside(pruned) <= 0.7 * inside(dense)
    assert pruned.dtype == dense.dtype == (torch.bfloat16 if name == "llama" else torch.float32)
    for row in rows:
        if metric is None:
            assert "metric" not in row
            continue
        found = row["metric"]
        assert found["name"] == metric and (n is None or found["n"] == n)
        assert found["low"] <= found["value"] <= found["high"]
    results = json.loads((output / "results.json").read_text())
    assert results["rows"] == rows and results["data"]["name"] == file and results["name"] == "small"
    assert results["data"]["calibration_n"] == (22 if name == "vit" else 24)
    assert results["base_model"] is None and results["seed"] == 1 and ("eval_n" in results["data"]) == (n is not None)
    [step] = read_steps(pruned.config)
    assert step["step"] == "prune" and step["settings"]["schedule"] is None and step["settings"]["repair"] is True
    assert step["optimizer_steps"] == 0 and step["sparsity"] > 0
    card = ModelCard.load(output / "README.md")
    assert "Pruned heads, neurons without training by the criterion obs to a sparsity of" in card.text
    assert "```bash\nhfcompress prune x\n```" in card.text and str(material) not in card.content
    assert bool(card.data.eval_results) == (metric is not None)
    processor = "preprocessor_config.json" if name == "vit" else "tokenizer.json"
    assert (output / processor).is_file() and (output / "hfcompress_probe.safetensors").is_file()
    assert said[0].startswith("Calibrating on 2") and len(said) == 3
    if name == "bert":
        assert rows[0]["metric"]["value"] == 1.0 and rows[1]["metric"]["value"] >= 0.5


def test_a_target_that_is_out_of_reach_writes_nothing(material, tmp_path):
    data = DataConfig(train=str(material / "films.csv"), **FILMS_DATA)
    given = {"measure": MEASURE, "seed": 1, "command": "x", "say": lambda text: None}
    for changes, error, match in (
        ({"target": {"parameters": 0.01}}, BudgetError, "target parameters 0.01 is out of reach"),
        ({"target": {"sparsity": [0.1, 0.2]}}, ValueError, "has one target, not 2; give a single number"),
        ({"criterion": "movement"}, ValueError, "criterion movement needs training .* without it use obs"),
        ({"criterion": "learned"}, ValueError, "criterion learned needs training .* without it use obs"),
    ):
        with pytest.raises(error, match=match) as caught:
            prune_folder(str(material / "bert"), tmp_path / "small", configure(**changes), data, **given)
        assert "\n" not in str(caught.value) and not (tmp_path / "small").exists()
    quantize(material / "bert", "int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="is quantized, so nothing can be cut from it; prune first and quantize after"):
        prune_folder(str(tmp_path / "int8"), tmp_path / "small", configure(), data, **given)
    assert not (tmp_path / "small").exists()


def test_what_does_not_load_again_is_an_error(material, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", none_fine)
    data = DataConfig(train=str(material / "films.csv"), **FILMS_DATA)
    with pytest.raises(verify.VerificationError, match="small does not load through load: outputs differ"):
        prune_folder(
            str(material / "bert"),
            tmp_path / "small",
            configure(),
            data,
            measure=MEASURE,
            seed=1,
            command="x",
            say=print,
        )


# ---- one target, and a bound ----


def test_once(material):
    model = hfcompress.load(material / "bert")
    examples = read_examples(
        model, str(material / "bert"), DataConfig(train=str(material / "films.csv"), **FILMS_DATA), samples=24, seed=1
    )
    before = inside(model)
    for cut in ("gradual", "end"):
        copied = copy.deepcopy(model)
        done = prune_once(copied, configure(cut=cut), examples.batches, measure=MEASURE)
        assert done.model is copied and inside(copied) <= 0.7 * before and not done.reached
        assert done.target == {"parameters": 0.7, "device": "auto", "scope": "layers"} and done.metric is None
    raw = copy.deepcopy(model)
    prune_once(raw, configure(repair=False), examples.batches, measure=MEASURE)
    assert read_steps(raw.config)[0]["settings"]["repair"] is False
    ranked = copy.deepcopy(model)  # what was ranked before comes out the same
    curves = rank_units(model, "obs", examples.batches, seed=0)
    prune_once(ranked, configure(), examples.batches, measure=MEASURE, curves=curves)
    assert all(torch.equal(a, b) for a, b in zip(ranked.parameters(), copied.parameters(), strict=True))
    repaired, kept = (m.bert.encoder.layer[1].output.dense.weight for m in (copied, raw))
    assert repaired.shape == kept.shape and not torch.equal(repaired, kept)


class Scale:
    """Stands in for clock and score: speed by parameters, and what is lost by a straight line of the speed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, points_per_speed: float) -> None:
        self.tried: list[float] = []
        self.points = points_per_speed

        self.ranked: list[dict[str, Any]] = []

        def rank(*_: Any, **__: Any) -> dict[str, Any]:
            self.ranked.append({})
            return self.ranked[-1]

        def once(
            model: Any,
            config: PruneConfig,
            batches: Any,
            *,
            measure: Any,
            seed: int = 0,
            curves: Any = None,
            widths: Any = None,
        ) -> Any:
            assert len(self.ranked) == 1 and curves is self.ranked[0], "one ranking serves every trial"
            wanted = config.target.goals[0]
            assert (
                config.target.quantity == "speedup"
                and config.target.max_drop is None
                and config.target.scope == "layers"
            )
            if wanted > 5:
                raise BudgetError("out of reach")
            self.tried.append(wanted)
            model.speed = wanted
            return post_training.Pruned(model, {"speedup": wanted}, [])

        monkeypatch.setattr(post_training, "prune_once", once)
        monkeypatch.setattr(post_training, "rank_units", rank)

    def rate(self, model: Any) -> tuple[Metric, None]:
        value = 0.9 - self.points * (getattr(model, "speed", 1.0) - 1) / 100
        return Metric("accuracy", value, n=100, low=value, high=value), None


@pytest.mark.parametrize(("points", "fastest"), [(1.0, 2.5), (0.5, 4.0), (6.0, 1.25)])
def test_the_fastest_within_a_bound_is_looked_for(points, fastest, monkeypatch):
    """Each unit of speed costs so many points, 1.5 are allowed: the answer is known."""
    scale, said = Scale(monkeypatch, points_per_speed=points), []
    config = configure(target={"sparsity": 0.3, "max_drop": 1.5, "scope": "layers"})
    model = torch.nn.Linear(2, 2)
    found = prune_within(model, config, Examples([], 0, scale.rate), measure=MEASURE, say=said.append, trials=9)
    assert not hasattr(model, "speed"), "the model that was given is left alone"
    speed = found.model.speed
    assert speed <= fastest + 1e-9 and speed == pytest.approx(fastest, rel=0.06)
    assert found.metric.value >= 0.9 - 0.015 - 1e-9 and found.target == {"speedup": speed}
    assert len(scale.tried) <= 9 and scale.tried[0] == 2.0
    assert said[0] == "dense: accuracy 0.9 (n=100)" and said[1].startswith("2.00x: accuracy ")
    assert any("out of reach" in line for line in said) == (points < 6)


def test_no_model_is_within_the_bound(monkeypatch):
    scale = Scale(monkeypatch, points_per_speed=1000.0)
    config = configure(target={"max_drop": 1.5, "scope": "layers"})
    with pytest.raises(BudgetError, match=r"no speedup that was tried \(down to 1.0\dx\) stays within a drop of 1.5"):
        prune_within(torch.nn.Linear(2, 2), config, Examples([], 0, scale.rate), measure=MEASURE)
    with pytest.raises(ValueError, match="max_drop needs data to score on: give labelled examples"):
        prune_within(torch.nn.Linear(2, 2), config, Examples([], 0, None), measure=MEASURE)


def test_within_a_bound_on_a_real_clock(material, tmp_path):
    said: list[str] = []
    rows = prune_folder(
        str(material / "bert"),
        tmp_path / "small",
        configure(
            target={"max_drop": 100.0},
            units=["heads", "neurons", "sublayers", "layers", "hidden"],
            multiple_of={"neurons": 1, "hidden": 4},
        ),
        DataConfig(train=str(material / "films.csv"), **FILMS_DATA),
        measure=MEASURE,
        seed=1,
        command="x",
        say=said.append,
    )
    assert said[1] == "dense: accuracy 1 (n=4)" and said[2].startswith("2.00x: ")
    [step] = read_steps(hfcompress.load(tmp_path / "small").config)
    [reached] = step["reached"]
    assert reached["speedup"] > 0 and rows[1]["parameters"] < rows[0]["parameters"]
    assert step["settings"]["target"]["speedup"] == pytest.approx(reached["wanted"])


def test_what_is_lost():
    def metric(name: str, value: float) -> Metric:
        return Metric(name, value, n=10, low=value, high=value, higher_is_better=name != "perplexity")

    assert drop(metric("accuracy", 0.9), metric("accuracy", 0.92)) == -2.0
    assert drop(metric("perplexity", 8.0), metric("perplexity", 9.0)) == 12.5


# ---- examples ----


def opened(material: Path, name: str) -> Any:
    return hfcompress.load(material / name).float()


def test_labelled_texts_are_scored(material):
    data = DataConfig(train=str(material / "films.csv"), **FILMS_DATA)
    found = read_examples(opened(material, "bert"), str(material / "bert"), data, samples=20, seed=3, batch=8)
    assert found.n == 20 and [len(batch["labels"]) for batch in found.batches] == [8, 8, 4]
    lengths = [int(batch["attention_mask"].sum(1).max()) for batch in found.batches]
    assert lengths == sorted(lengths), "long texts with long ones"
    metric, answers = found.rate(opened(material, "bert"))
    assert metric.value == 1.0 and metric.n == len(answers.right) == 4
    other = read_examples(opened(material, "bert"), str(material / "bert"), data, samples=20, seed=4, batch=8)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(found.batches, other.batches, strict=True))


@pytest.mark.parametrize("file", ["unlabelled.csv", "book.txt"])
@pytest.mark.parametrize("name", ["bert", "masked"])
def test_texts_without_labels_are_enough_to_calibrate_on(name, file, material):
    data = DataConfig(train=str(material / file), max_length=6)
    found = read_examples(opened(material, name), str(material / name), data, samples=10, seed=3, batch=4)
    assert found.rate is None and found.task is None and found.n == 10
    assert [len(batch["input_ids"]) for batch in found.batches] == [4, 4, 2]
    for batch in found.batches:
        assert "labels" not in batch and int(batch["attention_mask"].sum(1).max()) <= 6
        opened(material, name)(**batch)
    everything = read_examples(opened(material, name), str(material / name), data, samples=1000, seed=3)
    assert everything.n == (40 if file == "unlabelled.csv" else 60), "empty lines are no examples"


def test_images_with_and_without_labels(material):
    for folder, scored in (("images", True), ("loose", False)):
        data = DataConfig(train=str(material / folder))
        found = read_examples(opened(material, "vit"), str(material / "vit"), data, samples=10, seed=3, batch=4)
        assert [batch["pixel_values"].shape for batch in found.batches] == [(n, 3, 16, 16) for n in (4, 4, 2)]
        assert (found.rate is not None) == scored and found.n == 10
        assert all(("labels" in batch) == scored for batch in found.batches)


def test_blocks_of_text_for_a_decoder(material):
    data = DataConfig(train=str(material / "book.txt"), max_length=8, holdout=0.25)
    model = opened(material, "llama")
    found = read_examples(model, str(material / "llama"), data, samples=1000, seed=3)
    blocks = torch.cat([batch["input_ids"] for batch in found.batches])
    words = (material / "book.txt").read_text().split()
    total = len(words) // 8
    held_out = int(total * 0.25)
    assert blocks.shape == (total - held_out, 8) and found.n == total - held_out
    ids = torch.tensor([WORDS.index(word) for word in words[: 8 * total]]).view(total, 8)
    assert sorted(blocks.tolist()) == sorted(ids[:-held_out].tolist()), "every word once, in blocks"
    metric, answers = found.rate(model)
    assert len(answers) == held_out and metric.name == "perplexity" and metric.n == 7 * held_out
    losses = []
    with torch.no_grad():
        for row in ids[-held_out:]:
            chances = model(input_ids=row[None]).logits[0].double().softmax(-1)
            losses.append(-sum(math.log(chances[i, row[i + 1]]) for i in range(7)) / 7)
    assert metric.value == pytest.approx(math.exp(np.mean(losses)), rel=2e-5)
    margin = 1.96 * np.std(losses, ddof=1) / len(losses) ** 0.5
    assert metric.high == pytest.approx(math.exp(np.mean(losses) + margin), rel=2e-5)
    same = DataConfig(train=str(material / "book.txt"), eval=str(material / "book.txt"), max_length=8, max_eval=5)
    metric, _ = read_examples(model, str(material / "llama"), same, samples=3, seed=3).rate(model)
    assert metric.n == 35 and metric.value == perplexity(model, ids[:5]).value


def test_examples_that_cannot_be_read(material, tmp_path):
    (tmp_path / "short.txt").write_text("a good film")
    (tmp_path / "blank.csv").write_text('idx,text\n1," "\n2," "\n')
    films, book = str(material / "films.csv"), str(material / "book.txt")
    cases = [
        ("bert", {"train": str(tmp_path / "no.csv")}, "no.csv' is neither a file nor a folder"),
        ("bert", {"train": films, "label": "verdikt"}, "data.label: column 'verdikt' is not in the data; .* 'verdict'"),
        ("bert", {"train": str(tmp_path / "blank.csv")}, "data.train: blank.csv has no text"),
        ("bert", {"train": book, "text": "txt"}, "data.text: column 'txt' is not in the data"),
        (
            "llama",
            {"train": str(tmp_path / "short.txt")},
            "shorter than two blocks of 128 tokens; give more text or a smaller",
        ),
        ("llama", {"train": str(tmp_path / "no.txt")}, "no.txt' is neither a file nor a folder"),
        ("llama", {"name": "somebody/book"}, "data.train: give a file of texts"),
        ("masked", {"name": "somebody/book"}, "data.train: give a file or a folder of examples"),
        ("t5", {"train": book}, "T5ForConditionalGeneration reads two texts; prune it while it trains"),
        ("vit", {"train": films}, "data.label|data.image"),
    ]
    for name, data, match in cases:
        with pytest.raises(DataError, match=match) as caught:
            read_examples(opened(material, name), str(material / name), DataConfig(**data), samples=4, seed=0)
        assert "\n" not in str(caught.value), name
    assert len(cases) == 10
    wrong = (
        (material / "films.csv").read_text().replace("poor", "dull").replace("not very bad,fine", "not very bad,so so")
    )
    (tmp_path / "wrong.csv").write_text(wrong)
    with pytest.raises(DataError, match=rf"{material / 'bert'}: has 2 \(fine, poor\) outputs but the data have 3"):
        data = DataConfig(train=str(tmp_path / "wrong.csv"), **FILMS_DATA)
        read_examples(opened(material, "bert"), str(material / "bert"), data, samples=4, seed=0)


def test_sensitivity_of_a_folder(material):
    for name, file, more in (("bert", "unlabelled.csv", {}), ("llama", "book.txt", {"max_length": 8})):
        config = configure(criterion={"name": "obs", "samples": 8})
        data = DataConfig(train=str(material / file), **more)
        found, layers = sensitivity_of(str(material / name), config.criterion, data, measure=MEASURE, seed=0)
        assert [entry.layer.rpartition(".")[2] for entry in layers] == ["0", "1"]
        assert all(entry.divergence > 0 and 0 < entry.influence <= 2 for entry in layers)
        assert len(found) == 4 and all(entry.divergence[-1] > 0 for entry in found)
        assert [entry.left for entry in found] == [(1, 0), (18, 12, 6, 0)] * 2
