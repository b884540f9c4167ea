"""Benchmark: recipes, records, files and command lines that are wrong in every way. Each ends in success or in one clear line.

    python scripts/bench/fuzz.py --cases 5000

Valid ones are changed in one to three places, so that they come past the first check: values of another type, infinite, huge, negative,
empty, deep or in another script, keys that are missing, files that are cut off or overwritten. Command lines are put together from the
parser, with all its commands and options. Everything is called in this process on tiny models; what would take minutes is left out
or cut off: training begins with nothing but its preparation, and fresh processes that load a folder are taken for granted.

What is a fault: an error that is not one line, a traceback, a file that is left after an error, a file outside of the output, an output that
does not load, and a case that takes more than a minute or a gigabyte. Writes scripts/bench/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import logging
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import peft
import torch
import transformers
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import hfcompress
from hfcompress.checkpoints.adapters import RECORD_FILE
from hfcompress.checkpoints.record import add_step
from hfcompress.cli.main import build_parser, main
from hfcompress.config import Recipe
from hfcompress.distillation import CacheContents, Teacher, TeacherCache, write_cache
from hfcompress.hub import save_probe, verify, write_card
from hfcompress.hub.verify import RouteCheck
from hfcompress.measurement import device_name, provenance
from hfcompress.runs import Run
from hfcompress.runs.quantizing import quantize_folder

RESULTS = Path(__file__).resolve().parent / "results" / "fuzz.json"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "very", "not"]
RECIPE: dict[str, Any] = {
    "task": "text-classification",
    "model": {"name": "model"},
    "teacher": {"name": "model", "train": {"learning_rate": 1e-4}, "precision": "auto", "assistants": [{"layers": 1}]},
    "student": {"layers": [0], "neurons": 8},
    "data": {"train": "films.csv", "eval": "films.csv", "text": "said", "label": "verdict", "max_length": 8},
    "distill": {"hidden": {"weight": 0.5, "layers": [[0, 0]]}, "logits": {"weight": {"first": 1.0, "last": 0.5}}},
    "prune": {"target": {"sparsity": [0.3, 0.5]}, "schedule": {"updates": 2}, "criterion": {"name": "obs"}},
    "quantize": {"presets": ["int8", "nf4"]},
    "train": {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": []},
    "measure": {"batch": 2, "length": 8, "rounds": 3, "threads": 1, "device": "cpu"},
    "contract": {"max_drop": 1.0, "min_speedup": 1.5},
    "push": {"repo": "somebody/model"},
    "output": "run",
    "seed": 7,
}
RESULTS_OF_A_RUN: dict[str, Any] = {
    "rows": [
        {
            "name": name,
            "folder": folder,
            "metric": {"name": "accuracy", "value": value, "low": value - 0.02, "high": value + 0.02, "n": 1500},
            "parameters": 22_713_216,
            "disk_bytes": 90_871_000,
            "latency": {
                **{"median_ms": 12.3, "p10_ms": 11.9, "p90_ms": 14.0, "rounds": 15, "batch": 32, "length": 64},
                **{"device": "cpu", "threads": 2, "dtype": "float32"},
            },
            "classes": [{"name": "fine", "n": 700, "right": 600}],
            **more,
        }
        for name, folder, value, more in (
            ("teacher", "teacher", 0.91, {}),
            (
                "pruned",
                ".",
                0.90,
                {
                    "speedup": {"median": 1.9, "low": 1.8, "high": 2.0},
                    "layers_speedup": {"median": 2.1},
                    "energy": {"joules_per_input": 0.1, "source": "RAPL"},
                    "change": {
                        **{"drop": 1.0, "low": 0.1, "high": 1.9, "unit": "points", "p_value": 0.04},
                        **{"test": "McNemar", "n": 1500},
                    },
                },
            ),
        )
    ],
    "name": "films",
    "task": "text-classification",
    "data": {"name": "films.csv", "train_n": 100, "eval_n": 1500, "fingerprint": "0123"},
    "command": "hfcompress run recipe.yaml",
    "base_model": "somebody/base",
    "versions": {"torch": "2.13"},
    "lineage": {"base": {"name": "base", "licence": "mit", "said_by": "its card"}},
    "history": {"student": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "sparsity": 0.2}]},
    "recipe": {"seed": 7},
    "contract": {"max_drop": 1.0, "min_speedup": 1.5},
    "seed": 7,
    "date": "2026-01-01",
    "commit": "abc",
}
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES = st.one_of(
    st.sampled_from(
        [
            *(
                None,
                True,
                False,
                0,
                1,
                -1,
                2,
                3,
                1.5,
                -0.0,
                float("nan"),
                float("inf"),
                -float("inf"),
                1e308,
                2**31,
                2**63,
            ),
            *(
                10**30,
                "",
                " ",
                "\n",
                "a\nb",
                "\0",
                "é☃𝄞",
                "\u202e",
                "../../../etc/passwd",
                "/etc/passwd",
                "a" * 5000,
                "1e-5",
            ),
            *(
                "nan",
                "null",
                "true",
                "[1",
                "{{7*7}}",
                "<script>",
                "%s%n",
                "-1",
                [],
                {},
                [[]],
                [None],
                {"": {}},
                {"a": [1, {"b": 2}]},
            ),
            *([1] * 50, DEEP, [0, 0], [1, 2, 3]),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
YAML_TEXTS = [
    "!!python/object/apply:os.system ['touch broken-into']",
    "!!python/name:os.system",
    "seed: !!python/object/new:os.system ['touch broken-into']",
    "a: &a [1, 2]\nb: *a",
    "seed: &a [*a]",
    "train: &a {x: *a}",
    "x0: &x0 [y, y, y, y, y, y, y, y, y]\n"
    + "".join(f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]\n" for i in range(12)),
    "train: &x0 [y, y]\n" + "".join(f"x{i + 1}: &x{i + 1} [*x{i or 0}, *x{i or 0}]\n" for i in range(0)),
    "base: &b {max_steps: 1}\ntrain:\n  <<: *b\n  <<: [*b, *b]",
    "seed: 1\nseed: 2",
    "prune: {target: {sparsity: 0.5}}\nprune: {}",
    "\t- a",
    "---\nseed: 1\n---\nseed: 2",
    "? [a, b]\n: 1",
    "{1: 2, null: 3, true: 4}",
    "2001-12-14t21:59:43.10-05:00: 1",
    "seed: 2001-99-99",
    "seed: 0x" + "f" * 5000,
    "seed: " + "9" * 5000,
    "seed: 1_000",
    "seed: 12:30:45",
    "[" * 5000,
    "{a: " * 2000,
    "- " * 2000,
    "\ufeffseed: 1",
    "seed: \x07",
    "%YAML 9.9\n---\nseed: 1",
    "&" + "a" * 3000 + " 1",
    "seed: !!binary x",
    "!!set {a, b}",
    "- a\n- b",
    "just a sentence",
    "",
]


# ---- changes ----


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys and numbers that lead to every part of plain data."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        if len(path) < 12:
            yield from places(part, (*path, key))


def related(value: Any) -> list[Any]:
    """What a value may become without looking like something else altogether."""
    if isinstance(value, bool) or value is None:
        return [not value, str(value), int(bool(value))]
    if isinstance(value, int | float):
        return [-value, value + 1, value - 1, value * 10**9, value * 1e-9, str(value), [value], float(value), 0]
    if isinstance(value, str):
        return [value + " ", value.upper(), value[:-1], value * 2, [value], {value: value}, value.encode().hex()]
    if isinstance(value, list):
        return [value[:-1], value + value, value[::-1], {"0": value}, [value], None, *value[:1]]
    return [
        [list(pair) for pair in value.items()],
        list(value),
        None,
        {**value, "unknown": 1},
        {str(key).upper(): v for key, v in value.items()},
    ]


@st.composite
def changed(draw: Any, valid: Any) -> Any:
    """Plain data in which one to three places are others."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        old = inner[path[-1]] if path else value
        how = draw(st.sampled_from(["value", "related", "gone"]))
        new = copy.deepcopy(draw(VALUES) if how == "value" else draw(st.sampled_from(related(old))))
        if not path:
            value = new
        elif how == "gone":
            del inner[path[-1]]
        else:
            inner[path[-1]] = new
    return value


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """A file that is cut off, overwritten in places, empty, or something else."""
    how = draw(st.sampled_from(["cut", "flip", "flip", "empty", "other", "longer", "middle"]))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:at]
    if how == "flip":
        other = draw(st.binary(min_size=1, max_size=16))[: len(content) - at]
        return content[:at] + other + content[at + len(other) :]
    if how == "longer":
        return content + content[at:]
    if how == "middle":
        return content[:at] + content[at + 40 :]
    return b"" if how == "empty" else draw(st.binary(max_size=200))


@st.composite
def damaged_weights(draw: Any, content: bytes) -> bytes:
    """A safetensors file whose header says something else than what is there."""
    if draw(st.booleans()):
        return draw(damaged(content))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    other = json.dumps(draw(changed(header))).encode()
    said = draw(st.sampled_from([len(other), 0, 2**63, 2**40, len(other) - 1, len(other) + 1]))
    return struct.pack("<Q", said) + other + content[8 + length :]


# ---- what is changed ----


class Material:
    """Valid folders and files of every kind, and an empty place for each case."""

    def __init__(self, home: Path) -> None:
        self.home, self.scratch = home / "material", home / "scratch"
        self.home.mkdir()
        self._make_models()
        (self.home / "films.csv").write_text(
            "said,verdict\n" + "a good film,fine\nvery bad,poor\na film,fine\nnot good,poor\n" * 4
        )
        (self.home / "films.jsonl").write_text('{"said": "good", "verdict": 1}\n{"said": "bad", "verdict": 0}\n' * 4)
        (self.home / "texts.txt").write_text("a good film\nvery very bad\n" * 20)
        (self.home / "noise.csv").write_bytes(bytes(range(256)) * 4)
        (self.home / "broken.csv").write_text('said,verdict\n"a,b\nc,d,e,f\n,,\n')
        (self.home / "empty").write_text("")
        (self.home / "bits.json").write_text(json.dumps({"layers": {"bert.encoder.layer.0.output.dense": "int4"}}))
        (self.home / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        for name in ("pruned", "run"):
            (self.home / name).mkdir(exist_ok=True)
            (self.home / name / "results.json").write_text(json.dumps(RESULTS_OF_A_RUN))
        self.names = sorted(os.listdir(self.home))

    def _make_models(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        names: dict[str, Any] = {"id2label": {0: "fine", 1: "poor"}, "label2id": {"fine": 0, "poor": 1}}
        config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, **sizes, **names)
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        model: Any = BertForSequenceClassification(config).eval()
        examples = [{"input_ids": [4, 5, 6]}, {"input_ids": [7, 8, 9]}]

        def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

        model.save_pretrained(self.home / "model")
        tokenizer.save_pretrained(self.home / "model")
        write_cache(Teacher(model), examples, collate, self.home / "cache", CacheContents("all"), progress=False)
        hfcompress.cut(model, hfcompress.Plan({"encoder.0.heads": (1,), "encoder.1.neurons": tuple(range(8))}))
        units = {name: list(pair) for name, pair in model.config.hfcompress["units"].items()}
        add_step(model.config, "prune", settings={"units": ["heads"]}, sparsity=0.4, units=units, optimizer_steps=3)
        model.save_pretrained(self.home / "pruned")
        tokenizer.save_pretrained(self.home / "pruned")
        save_probe(model, self.home / "pruned")
        quantize_folder(str(self.home / "pruned"), self.home / "packed", "int4")
        adapted: Any = hfcompress.load(self.home / "pruned")
        adapted.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
        adapted.save_pretrained(self.home / "adapter")

    def place(self) -> Path:
        """An empty folder for the next case; what the last one wrote beside the material is gone."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for name in {*os.listdir(self.home)} - {*self.names}:
            path = self.home / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.scratch.mkdir()
        return self.scratch

    def copy(self, name: str) -> Path:
        """A copy of one of the folders, to be changed."""
        return Path(shutil.copytree(self.home / name, self.place() / name))


SUCCEEDED = [0]  # calls and commands, since this was set


@dataclass(frozen=True)
class Found:
    """What came of cases of one kind.

    Attributes:
        n: How many there were.
        succeeded: Calls and commands that ended well; all others were refused.
        faults: What was wrong, and how often.
        longest_s: Of a case.
    """

    n: int
    succeeded: int
    faults: dict[str, int]
    longest_s: float


def one_line(error: BaseException) -> str | None:
    """What is wrong with an error that the library raised; None if it is as it should be."""
    if not isinstance(error, ValueError | OSError | RuntimeError | ImportError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(last.filename).name} {last.lineno}: {str(error)[:200]}"
    lines = str(error).strip().splitlines()
    return None if len(lines) == 1 else f"{type(error).__name__} of {len(lines)} lines: {str(error)[:200]}"


def call(function: Callable[[], Any]) -> str | None:
    """Call the library; what is wrong with how it ended, or None."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            function()
        except Exception as error:  # noqa: BLE001  what may come is what is looked for
            return one_line(error)
    SUCCEEDED[0] += 1
    return None


def command(material: Material, *arguments: str, output: str | None = None) -> str | None:
    """Run a command; what is wrong with how it ended and what it left, or None."""
    before, out, err = files_in(material), io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: Any = main(list(arguments))
    except SystemExit as end:
        status = end.code
    except Exception as error:  # noqa: BLE001
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__} in {Path(last.filename).name} {last.lineno}: {str(error)[:200]}"
    said = [line for line in err.getvalue().splitlines() if line.startswith("hfcompress")]
    new = {name for name, size in files_in(material).items() if before.get(name) != size}
    if status == 0:
        SUCCEEDED[0] += 1
        inside = (output or "").rstrip("/") + "/"
        strange = {name for name in new if not ((name + "/").startswith(inside) or inside.startswith(name + "/"))}
        return f"written elsewhere: {sorted(strange)[:3]}" if strange else unloadable(output)
    if "Traceback" in err.getvalue() or (status == 2 and len(said) != 1):
        return f"status {status} and {len(said)} lines: {err.getvalue()[-300:]}"
    if status == 2 and not said[0].partition(": ")[2].strip():
        return "an empty line"
    return f"left behind: {sorted(new)[:3]}" if status == 2 and new else None


def files_in(material: Material) -> dict[str, int]:
    """Every file and folder there is, with its size."""
    found = {}
    for place in (material.home, material.scratch):
        for folder, names, files in os.walk(place):
            found |= {os.path.join(folder, name): -1 for name in names}
            found |= {
                path: os.path.getsize(path) for name in files if os.path.exists(path := os.path.join(folder, name))
            }
    return {name: size for name, size in found.items() if "/.cache" not in name}


def unloadable(output: str | None) -> str | None:
    """Why what a command wrote is not what it should be; None if it is."""
    if (
        output is None
        or not os.path.isfile(os.path.join(output, "config.json"))
        or os.path.isfile(os.path.join(output, "export.json"))
    ):
        return None
    problem = None
    try:
        hfcompress.load(output)
    except Exception as error:  # noqa: BLE001
        problem = f"{output} does not load: {error}"
    return problem


# ---- the kinds of cases ----


def recipe_as_data(draw: Any, _material: Material) -> str | None:
    values = draw(changed(RECIPE))

    def read() -> None:
        recipe = Recipe.from_dict(values)
        assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml()) or {}) == recipe or "nan" in recipe.to_yaml().lower()

    return call(read)


def recipe_as_text(draw: Any, material: Material) -> str | None:
    file = material.place() / "recipe.yaml"
    how = draw(st.sampled_from(["data", "text", "text", "bytes"]))
    if how == "data":
        text = yaml.safe_dump(draw(changed(RECIPE)), allow_unicode=True).encode("utf-8", "surrogatepass")
    elif how == "bytes":
        text = draw(damaged(yaml.safe_dump(RECIPE).encode()))
    else:
        known = yaml.safe_dump({key: RECIPE[key] for key in draw(st.sets(st.sampled_from(list(RECIPE))))})
        text = "\n".join(draw(st.permutations([known, draw(st.sampled_from(YAML_TEXTS))]))).encode()
    file.write_bytes(text)
    keys = st.sampled_from(
        ["seed", "prune.target.sparsity", "train.x", "data", "a..b", "", ".", "prune.target", "é", "model.name.x"]
    )
    values = st.one_of(VALUES.map(str), st.sampled_from(YAML_TEXTS))
    overrides = draw(st.lists(st.tuples(keys, values).map("=".join) | st.text(max_size=8), max_size=2))
    problem = call(lambda: Recipe.from_yaml(file, overrides=overrides))
    return "the recipe ran code" if os.path.exists("broken-into") else problem


def record(draw: Any, material: Material) -> str | None:
    folder = material.copy(draw(st.sampled_from(["pruned", "pruned", "packed"])))
    config = json.loads((folder / "config.json").read_text())
    part = draw(st.sampled_from([None, "hfcompress", "hfcompress", "quantization_config"]))
    if part in config:
        config[part] = draw(changed(config[part]))
    else:
        config = draw(changed(config))
    (folder / "config.json").write_text(json.dumps(config))
    how = draw(st.sampled_from(["load", "load", "load", "inspect", "quantize", "student"]))
    output = str(material.scratch / "out")
    if how == "inspect":
        return command(material, "inspect", str(folder), "--json")
    if how == "quantize":
        line = ["quantize", str(folder), "--preset", "int8", "--output", output, "--no-measure"]
        return command(material, *line, output=output)
    if how == "student":
        return command(material, "student", str(folder), output, "--neurons", "4", output=output)
    return call(lambda: hfcompress.load(folder)) or call(lambda: write_card(folder))


def weights(draw: Any, material: Material) -> str | None:
    folder = material.copy(draw(st.sampled_from(["pruned", "packed"])))
    file = folder / draw(st.sampled_from(["model.safetensors", "model.safetensors", "config.json", "tokenizer.json"]))
    content = file.read_bytes()
    file.write_bytes(draw(damaged_weights(content) if file.suffix == ".safetensors" else damaged(content)))
    if file.name == "tokenizer.json":
        where = ["--data", str(material.home / "texts.txt"), "--output", str(material.scratch / "out")]
        return command(material, "vocabulary", str(folder), *where, "--size", "8", output=where[-1])
    return call(lambda: hfcompress.load(folder))


def results(draw: Any, material: Material) -> str | None:
    folder = material.copy("pruned")
    text = json.dumps(draw(changed(RESULTS_OF_A_RUN))).encode("utf-8", "surrogatepass")
    (folder / "results.json").write_bytes(draw(st.sampled_from([text, text, text, draw(damaged(text))])))
    how = draw(st.sampled_from(["report", "report", "compare", "card", "check"]))
    if how == "card":
        return call(lambda: write_card(folder))
    if how == "compare":
        return command(material, "compare", str(folder), str(material.home / "run"), "--json")
    if how == "check":
        return command(material, "check", str(folder))
    return command(material, "report", str(folder), output=str(folder / "report.html"))


def cache(draw: Any, material: Material) -> str | None:
    folder = material.copy("cache")
    file = draw(st.sampled_from(sorted(folder.iterdir())))
    content = file.read_bytes()
    if file.suffix == ".json":
        other = json.dumps(draw(changed(json.loads(content)))).encode("utf-8", "surrogatepass")
        file.write_bytes(draw(st.sampled_from([other, other, draw(damaged(content))])))
    else:
        file.write_bytes(draw(damaged_weights(content)))

    def ask() -> None:
        opened = TeacherCache.open(folder)
        opened.targets({"input_ids": torch.tensor([[4, 5, 6], [7, 8, 9]])})

    return call(ask)


def adapters(draw: Any, material: Material) -> str | None:
    folder = material.copy("adapter")
    file = folder / draw(st.sampled_from(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"]))
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        file.write_bytes(draw(damaged_weights(content)))
    else:
        file.write_text(json.dumps(draw(changed(json.loads(content)))))
    if draw(st.booleans()):
        (folder / RECORD_FILE).write_text(json.dumps(draw(changed({"version": 1, "units": {}, "steps": []}))))
    return call(lambda: hfcompress.load(folder))


def layers_file(draw: Any, material: Material) -> str | None:
    file = material.place() / "bits.json"
    valid = {"layers": {f"bert.encoder.layer.{i}.output.dense": "int4-g32" for i in range(2)}}
    file.write_text(json.dumps(draw(changed(valid))))
    output = str(material.scratch / "out")
    line = ["quantize", str(material.home / "model"), "--layers", str(file), "--output", output, "--no-measure"]
    return command(material, *line, output=output)


def command_line(draw: Any, material: Material) -> str | None:
    line, output = draw(lines(material))
    return command(material, *line, output=output)


# Commands that trace graphs or time models take seconds; they come less often.
_SLOW = {"export", "prune", "quantize", "sensitivity", "measure", "check", "push", "cache-teacher", "run"}
_QUICK = {"samples": "4", "length": "8", "batch": "2", "threads": "1", "rounds": "3", "max_eval": "4", "device": "cpu"}


@st.composite
def lines(draw: Any, material: Material) -> tuple[list[str], str | None]:
    """A command line with options of the parser, and the folder or file that it may write."""
    scratch = material.place()
    (scratch / "full").mkdir()
    (scratch / "full" / "something").write_text("x")
    (scratch / "void").mkdir()
    parsers = next(
        action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    quick = [name for name in parsers if name not in _SLOW]
    name = draw(st.sampled_from(quick) if draw(st.integers(0, 3)) else st.sampled_from(sorted(_SLOW)))
    words, output = [name], None
    clean = draw(st.integers(0, 2)) == 0  # mostly valid values
    for action in parsers[name]._actions:
        if action.dest == "help":
            continue
        needed = not action.option_strings or action.required or action.dest in _QUICK
        if not needed and draw(st.integers(0, 3)):
            continue
        values = draw(values_of(action, material, clean=clean and draw(st.integers(0, 12)) != 0))
        if action.dest in ("output", "html", "picture", "save") and values:
            output = values[0] if output is None else output
        words += [*([draw(st.sampled_from(action.option_strings))] if action.option_strings else []), *values]
    if draw(st.integers(0, 15)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(["--nope", "-x", "", "--", "é", "nope"])))
    if output is None:
        output = _default_output(words, material)
    return words, output


def _default_output(words: list[str], material: Material) -> str | None:
    """Where commands write without --output: beside the model, which may be in the working folder."""
    if words[0] in ("quantize", "export", "report", "verify", "push", "cache-teacher"):  # a probe, for the last
        return str(material.scratch.parent)
    return None


@st.composite
def values_of(draw: Any, action: argparse.Action, material: Material, *, clean: bool) -> list[str]:
    if action.nargs == 0:
        return []
    here, scratch = material.home, material.scratch
    folders = [str(here / name) for name in ("model", "pruned")]
    files = [str(here / name) for name in ("films.csv", "films.jsonl", "texts.txt")]
    outputs = [str(scratch / "out"), str(scratch / "out.jsonl"), str(scratch / "a" / "b" / "out")]
    names = {
        **dict.fromkeys(("model", "models", "teacher", "folder", "folders", "baseline"), folders),
        **dict.fromkeys(("data", "eval"), files),
        **dict.fromkeys(("output", "keep"), outputs),
        **{"html": [str(scratch / "x.html")], "picture": [str(scratch / "x.png")], "save": [str(scratch / "x.json")]},
        **{
            "text": ["said"],
            "label": ["verdict"],
            "preset": ["int8", "nf4-dq", "int4-g32-asym", "ternary"],
            "format": ["onnx"],
        },
        **{
            "recipe": [str(here / "recipe.yaml")],
            "overrides": ["seed=3"],
            "repo": ["somebody/model"],
            "bits": ["16", "8", "4"],
        },
        **{
            "config": ["num_hidden_layers=1"],
            "layers": [str(here / "bits.json")] if action.metavar == "FILE.json" else ["1"],
        },
        **{
            "hidden_layers": ["0", "0,1"],
            "criterion": ["obs", "magnitude"],
            "size": ["9"],
            "coverage": ["1", "0.9"],
            "task": ["fill-mask"],
        },
        **{
            "skip": ["classifier"],
            "speedup": ["1.01"],
            "sparsity": ["0.2"],
            "hidden": ["8"],
            "heads": ["1"],
            "neurons": ["8"],
        },
    }
    good = (
        [_QUICK[action.dest]]
        if action.dest in _QUICK
        else names.get(action.dest) or list(action.choices or ["1", "0.5"])
    )
    bad = [
        *(
            "",
            " ",
            "-",
            "x",
            "0",
            "-1",
            "3",
            "nan",
            "inf",
            "1e3",
            "½",
            "99999999999999999999",
            "9223372036854775807",
            "../x",
            "/",
            "/proc/x/y",
        ),
        *(
            "é☃",
            "a b",
            "None",
            "0,1",
            "encoder=1",
            "a=b",
            "=",
            "/dev/null",
            "meta",
            "cuda:7",
            "somebody/nothing",
            "a" * 300,
        ),
        *(str(here / name) for name in material.names),
        *(str(scratch / name) for name in ("full", "void", "full/something", "full/something/below")),
    ]
    if action.dest in _QUICK:  # a large number there is a long time
        bad = [word for word in bad if not word.isdecimal() or int(word) < 100 or int(word) > 10**15]
    several = draw(st.integers(1, 2)) if action.nargs in ("+", "*") else 1
    return [draw(st.sampled_from(good if clean or draw(st.integers(0, 2)) else bad)) for _ in range(several)]


_LONGEST_S = 60.0
KINDS: dict[str, tuple[Callable[[Any, Material], str | None], float]] = {
    "recipe_as_data": (recipe_as_data, 0.2),
    "recipe_as_text": (recipe_as_text, 0.2),
    "record": (record, 0.16),
    "weights": (weights, 0.08),
    "results": (results, 0.1),
    "cache": (cache, 0.06),
    "adapters": (adapters, 0.04),
    "layers_file": (layers_file, 0.02),
    "command_line": (command_line, 0.14),
}


@contextlib.contextmanager
def quiet_and_offline(home: Path) -> Iterator[None]:
    """No network, no fresh processes and no training; everything that libraries keep goes to a folder of its own."""

    def all_fine(_folder: Path, routes: list[str], _timeout_s: float) -> list[RouteCheck]:
        return [RouteCheck(route, True, 0.0, 1e-5) for route in routes]

    before, level = os.getcwd(), logging.getLogger("hfcompress").level
    (home / "cwd").mkdir()
    environment = {"HFCOMPRESS_CACHE": str(home / ".cache"), "HF_HUB_OFFLINE": "1", "HOME": str(home / "cwd")}
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for patch in (
            unittest.mock.patch.dict(os.environ, environment),
            unittest.mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
            unittest.mock.patch.object(datasets.config, "HF_DATASETS_CACHE", home / ".cache" / "datasets"),
            unittest.mock.patch.object(verify, "_run_child", all_fine),
            unittest.mock.patch.object(Run, "run", prepared_only),
        ):
            stack.enter_context(patch)
        logging.disable(logging.CRITICAL)
        os.chdir(home / "cwd")
        try:
            yield
        finally:
            os.chdir(before)
            logging.disable(logging.NOTSET)
            logging.getLogger("hfcompress").setLevel(level)


def prepared_only(run: Run) -> None:
    """Stands in for a whole run: the data are read and encoded, and nothing is trained."""
    try:
        run.prepare()
    finally:
        shutil.rmtree(run.output, ignore_errors=True)  # a run's folder may be half full: it goes on from there


def search(kind: str, material: Material, *, cases: int, random_seed: int) -> Found:
    """Cases of one kind."""
    function = KINDS[kind][0]
    problems: collections.Counter[str] = collections.Counter()
    count, longest, SUCCEEDED[0] = 0, 0.0, 0

    @seed(random_seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def case(data: Any) -> None:
        nonlocal count, longest
        started = time.perf_counter()
        problem = function(data.draw, material)
        took = time.perf_counter() - started
        if took > _LONGEST_S:
            problem = f"it took {took:.0f} s"
        count, longest = count + 1, max(longest, took)
        if problem is not None:
            problems[problem] += 1

    case()
    return Found(count, SUCCEEDED[0], dict(problems), round(longest, 2))


def fuzz(*, cases: int, random_seed: int, kinds: list[str] | None = None) -> dict[str, Found]:
    """Cases of all kinds, in their shares."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name).resolve()
        with quiet_and_offline(home):
            material = Material(home)
            for kind in kinds or KINDS:
                part = max(1, round(cases * KINDS[kind][1]))
                found[kind] = one = search(kind, material, cases=part, random_seed=random_seed)
                said = f"{kind}: {one.n} cases, {one.succeeded} calls succeeded, {sum(one.faults.values())} faults"
                print(f"{said}, at most {one.longest_s:.1f} s", flush=True)
                for fault, times in one.faults.items():
                    print(f"  {times} x {fault}", flush=True)
    return found


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    found = fuzz(cases=options.cases, random_seed=options.seed, kinds=options.kinds)
    faults = sum(sum(one.faults.values()) for one in found.values())
    total = sum(one.n for one in found.values())
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "cases": {"value": total, "unit": "cases", "goal": ">= 5000", "met": total >= 5000, "spread": None},
        "faults": {"value": faults, "unit": "cases", "goal": "= 0", "met": faults == 0, "spread": None},
    }
    result = {
        "command": " ".join(["python", "scripts/bench/fuzz.py", *sys.argv[1:]]),
        **provenance(seed=options.seed),
        "device": {"cpu": device_name("cpu"), "threads": torch.get_num_threads(), "gpu": None},
        "kinds": {kind: asdict(one) for kind, one in found.items()},
        "figures": figures,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_bytes,
    }
    if options.kinds is None:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    return 0 if faults == 0 else 1


if __name__ == "__main__":
    sys.exit(run())
