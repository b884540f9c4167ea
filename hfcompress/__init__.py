"""hfcompress: compress Hugging Face transformers inside Trainer.

Importing it costs next to nothing (neither torch nor transformers is imported) and teaches transformers to load
pruned models with plain `from_pretrained`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hfcompress.checkpoints.hooks import install as _install

if TYPE_CHECKING:
    from hfcompress.anatomy import find_sites as find_sites
    from hfcompress.checkpoints.io import load as load
    from hfcompress.config import Recipe as Recipe
    from hfcompress.hub import push_folder as push_folder
    from hfcompress.hub import verify_folder as verify_folder
    from hfcompress.pruning import Plan as Plan
    from hfcompress.pruning import cut as cut
    from hfcompress.quantization import quantize as quantize
    from hfcompress.training import CompressionTrainer as CompressionTrainer
    from hfcompress.training import DistillationTrainer as DistillationTrainer
    from hfcompress.training import PlainTrainer as PlainTrainer
    from hfcompress.training import PruningTrainer as PruningTrainer
    from hfcompress.training import Seq2SeqCompressionTrainer as Seq2SeqCompressionTrainer
    from hfcompress.training import Seq2SeqDistillationTrainer as Seq2SeqDistillationTrainer
    from hfcompress.training import Seq2SeqPruningTrainer as Seq2SeqPruningTrainer

__version__ = "0.1.0"

_PUBLIC = {
    "CompressionTrainer": "hfcompress.training",
    "DistillationTrainer": "hfcompress.training",
    "PlainTrainer": "hfcompress.training",
    "Plan": "hfcompress.pruning",
    "PruningTrainer": "hfcompress.training",
    "Recipe": "hfcompress.config",
    "Seq2SeqCompressionTrainer": "hfcompress.training",
    "Seq2SeqDistillationTrainer": "hfcompress.training",
    "Seq2SeqPruningTrainer": "hfcompress.training",
    "cut": "hfcompress.pruning",
    "find_sites": "hfcompress.anatomy",
    "load": "hfcompress.checkpoints.io",
    "push_folder": "hfcompress.hub",
    "quantize": "hfcompress.quantization",
    "verify_folder": "hfcompress.hub",
}
__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hfcompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


_install()
