"""Tokenizers, image processors and feature extractors travel with the model."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def copy_processor(source: str | Path, target: str | Path) -> None:
    """Put the tokenizer, image processor or feature extractor of a folder or repository into another folder; there may be none.

    Args:
        source: A folder, or a repository on the Hub.
        target: A folder.
    """
    if Path(source).is_dir():
        for name in _FILES:
            if (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, Path(target) / name)
        return
    for kind in (AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor):
        try:
            kind.from_pretrained(source).save_pretrained(target)
        except (OSError, ValueError, KeyError, ImportError):
            continue  # a text model has no image processor, and so on
