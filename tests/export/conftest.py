"""Tiny uneven models on disk, exported once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from hfcompress.anatomy import find_sites
from hfcompress.pruning import Plan, cut
from tests.families import choose_units, make_model
from tests.tasks.conftest import save_tokenizer

for package in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
    pytest.importorskip(package)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{number}" for number in range(96))]
LABELS = {0: "poor", 1: "fine", 2: "splendid"}


def calibration(rows: int, length: int, *, seed: int) -> dict[str, torch.Tensor]:
    """A batch as a collator gives it: labels in it, and a column that no row uses."""
    ids = torch.randint(4, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    segments = torch.zeros_like(ids)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": segments, "labels": torch.zeros(rows)}


BATCHES = [calibration(4, 12, seed=0), calibration(3, 20, seed=1), calibration(1, 7, seed=2)]


def save_uneven(folder: Path, name: str, auto: str, pattern: str, **changes) -> torch.nn.Module:
    """A model cut differently in each layer, with its tokenizer or image processor."""
    model = make_model(name, auto, num_labels=3, id2label=LABELS, label2id={v: k for k, v in LABELS.items()}, **changes)
    cut(model, Plan(choose_units(find_sites(model), pattern)))
    model.save_pretrained(folder)
    if model.main_input_name == "input_ids":
        names = ["input_ids", "token_type_ids", "attention_mask"]
        save_tokenizer(folder, words=WORDS, model_input_names=names, model_max_length=40)
    return model.eval()


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> SimpleNamespace:
    """An uneven BERT with sublayers that have nothing in them, in all formats."""
    from hfcompress.export import FORMATS, export_formats

    folder = tmp_path_factory.mktemp("bert")
    model = save_uneven(folder / "model", "bert", "AutoModelForSequenceClassification", "empty")
    folders = {name: folder / "exports" / name for name in FORMATS}
    said: list[str] = []
    done = export_formats(folder / "model", folders, batches=BATCHES, say=said.append)
    return SimpleNamespace(model=model, source=folder / "model", folder=folder, done=done, said=said)


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> SimpleNamespace:
    """An uneven ViT for OpenVINO."""
    from hfcompress.export import export_model

    folder = tmp_path_factory.mktemp("vit")
    model = save_uneven(folder / "model", "vit", "AutoModelForImageClassification", "both", num_hidden_layers=2)
    transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder / "model")
    done = export_model(folder / "model", folder / "export", format="openvino")
    return SimpleNamespace(model=model, source=folder / "model", done=done)
