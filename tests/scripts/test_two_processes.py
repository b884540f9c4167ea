"""Each script on two processes (gloo, CPU): same plan and weights on both, and checkpoints that load."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import hfcompress
from hfcompress.anatomy import find_sites
from tests.families import make_config

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["good", "bad", "fine", "dull", "great", "poor", "film", "plot", "the", "a"]
TRAIN = [
    "train={num_train_epochs: 2, per_device_train_batch_size: 4, learning_rate: 1e-3, use_cpu: true, disable_tqdm: true}",
    "distill={hidden: {weight: 0.5}}",
    "prune={target: {sparsity: 0.5}, schedule: {start: 0.1, end: 0.7, updates: 3},"
    " multiple_of: {neurons: 4}, at_least: {neurons: 4}}",
    "measure={batch: 2, length: 8, rounds: 3, warmup: 0, threads: 1}",
]


def text_arguments(folder: Path) -> list[str]:
    """A tiny BERT with a tokenizer, and csv files with column names of their own."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder / "model")
    transformers.BertForSequenceClassification(make_config("bert")).save_pretrained(folder / "model")
    rows = [(f"{WORDS[i % 6]} {WORDS[6 + i % 4]} number {i}", "up" if i % 2 else "down") for i in range(40)]
    for name, part in (("train", rows[:32]), ("eval", rows[32:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("what was said", "mood"), *part])
    names = ["data.text=what was said", "data.label=mood", f"data.eval={folder / 'eval.csv'}"]
    return [f"data.train={folder / 'train.csv'}", *names]


def image_arguments(folder: Path) -> list[str]:
    """A tiny ViT with its image processor, and an image folder."""
    transformers.ViTForImageClassification(make_config("vit")).save_pretrained(folder / "model")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for number in range(40):
        path = folder / "images" / f"kind{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(127 * (number % 2))
        Image.fromarray(pixels).save(path)
    return [f"data.train={folder / 'images'}", "data.holdout=0.2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "auto"),
    [
        ("text_classification.py", text_arguments, transformers.AutoModelForSequenceClassification),
        ("image_classification.py", image_arguments, transformers.AutoModelForImageClassification),
    ],
)
def test_script_on_two_processes(script: str, arguments, auto, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    given = [f"model={{name: {tmp_path / 'model'}}}", *arguments(tmp_path), f"output={tmp_path / 'run'}", *TRAIN]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml")]
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            "--num_processes",
            "2",
            "--main_process_port",
            port,
            str(ROOT / "scripts" / script),
            "--config",
            str(tmp_path / "recipe.yaml"),
            *given,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Once for the teacher and once for the student; a run of one process says nothing of the kind.
    assert done.stderr.count("2 processes hold the same plan and weights") == 2
    assert done.stdout.count("95 % interval") == 1
    student = tmp_path / "run" / "student"
    record = json.loads((student / "config.json").read_text())["hfcompress"]
    assert [step["step"] for step in record["steps"]] == ["prune", "distill"]
    loaded = hfcompress.load(student)
    left = {site.name: site.units for site in find_sites(loaded)}
    assert {name: pair[0] for name, pair in record["units"].items()}.items() <= left.items()
    assert type(auto.from_pretrained(student)) is type(loaded)
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "pruned"]
    assert rows[1]["parameters"] < rows[0]["parameters"]
