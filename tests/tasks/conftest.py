"""Tiny models on disk and a cache that belongs to the test."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.families import make_config

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "very", "not"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save_tokenizer(folder: Path, *, pad: bool = True, words: list[str] = WORDS, **options) -> None:
    """A tokenizer that knows some words; pieces of words begin with ##. The first four words are those of WORDS."""
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | ({"pad_token": "[PAD]"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options).save_pretrained(folder)


def save_bert(folder: Path, *, names: list[str] | None = None, base: bool = False, positions: int = 64) -> str:
    """A BERT of one layer with its tokenizer; `names` makes it fine-tuned on these classes."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=positions,
        **labels,
    )
    torch.manual_seed(0)
    (BertModel(config) if base else BertForSequenceClassification(config)).save_pretrained(folder)
    save_tokenizer(folder, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    return str(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    """A pretrained model that is not fine-tuned on anything."""
    return save_bert(tmp_path_factory.mktemp("bert"), base=True)


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict]) -> str:
    """A file of JSON lines."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def save_model(folder: Path, name: str = "bert", auto: str = "AutoModel", *, words: list[str], **options) -> str:
    """A tiny model of a family with a tokenizer that knows some words."""
    torch.manual_seed(0)
    getattr(transformers, auto).from_config(make_config(name)).save_pretrained(folder)
    save_tokenizer(folder, words=["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words], **options)
    return str(folder)
