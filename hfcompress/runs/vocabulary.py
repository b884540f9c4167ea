"""From a saved model and some texts to a folder with a smaller vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from hfcompress.checkpoints.io import load
from hfcompress.checkpoints.staging import is_empty
from hfcompress.config import PruneConfig
from hfcompress.hub import save_probe, write_card
from hfcompress.measurement import count_parameters, memory_bytes
from hfcompress.tasks.corpus import Corpus
from hfcompress.tasks.text import open_tokenizer
from hfcompress.vocabulary import (
    VocabularyError,
    choose_tokens,
    count_tokens,
    cut_tokenizer,
    cut_vocabulary,
    named_ids,
    share_unchanged,
)

_SAMPLE = 10_000  # texts


@dataclass(frozen=True)
class VocabularyCut:
    """What a smaller vocabulary changed.

    Attributes:
        tokens: Rows of the embeddings (before, after).
        parameters: Of the model (before, after).
        size_bytes: Of the weights in memory (before, after).
        tokens_share: Share of the tokens in the texts that are still in the vocabulary, in [0, 1].
        texts_share: Share of the texts that are encoded as before, in [0, 1]; of at most 10,000, evenly spaced.
    """

    tokens: tuple[int, int]
    parameters: tuple[int, int]
    size_bytes: tuple[int, int]
    tokens_share: float
    texts_share: float


def cut_folder(
    path_or_repo: str | Path,
    texts: Corpus | Sequence[str | None],
    output: str | Path,
    *,
    size: int | None = None,
    coverage: float | None = None,
    counts: NDArray[np.int64] | None = None,
) -> VocabularyCut:
    """Cut the vocabulary of a saved model and its tokenizer to what some texts use, and save both.

    What was saved is loaded again, and has to be the same.

    Args:
        path_or_repo: A folder, or a repository on the Hub, with model and tokenizer.
        texts: Texts like those that the model is for; read twice.
        output: Folder to write; must be new or empty.
        size: Number of tokens that stay. Give this or `coverage`.
        coverage: Share of the token occurrences in the texts whose tokens stay, in (0, 1].
        counts: How often each token occurs, if that is known already; the texts are then compared only, and there may be none.

    Returns:
        What changed.

    Raises:
        ValueError: The folder is not empty, the tokenizer or model cannot be cut, or nothing would be removed.
    """
    target = Path(output)
    if not is_empty(target):
        raise ValueError(f"{target} is not empty; give another folder")
    tokenizer, model = open_tokenizer(path_or_repo), load(path_or_repo)
    rows, parameters, size_bytes = model.config.vocab_size, count_parameters(model), memory_bytes(model)  # type: ignore[union-attr]
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    named = [tokens[i] for i in named_ids(model) if i in tokens]
    counts = count_tokens(tokenizer, texts) if counts is None else counts
    kept = choose_tokens(tokenizer, counts, size=size, coverage=coverage, keep=named)
    if len(kept) >= rows:
        raise VocabularyError(f"nothing to remove: all {rows:,} tokens would stay; give a smaller size or coverage")
    smaller = cut_tokenizer(tokenizer, kept)
    sample = itertools.islice(texts, 0, None, max(1, -(-len(texts) // _SAMPLE)))
    unchanged = share_unchanged(tokenizer, smaller, kept, sample)
    cut_vocabulary(model, kept)
    model.save_pretrained(target)  # type: ignore[operator]
    smaller.save_pretrained(target)
    save_probe(model, target)
    write_card(target)
    _require_same(model, target, smaller.get_vocab())
    return VocabularyCut(
        tokens=(rows, len(kept)),
        parameters=(parameters, count_parameters(model)),
        size_bytes=(size_bytes, memory_bytes(model)),
        tokens_share=float(counts[kept].sum() / counts.sum()),
        texts_share=unchanged,
    )


def cut_for(
    source: str | Path, texts: Corpus | Sequence[str | None], output: str | Path, config: PruneConfig, **known: Any
) -> VocabularyCut:
    """`cut_folder` as a recipe asks for it: by its coverage, or where nothing else goes as far as its target says.

    Args:
        source: As for `cut_folder`.
        texts: As for `cut_folder`.
        output: As for `cut_folder`.
        config: With "vocabulary" among its units.
        **known: Token counts, as for `cut_folder`.

    Raises:
        ValueError: See `cut_folder`; or the target is out of reach.
    """
    if set(config.units) != {"vocabulary"}:
        return cut_folder(source, texts, output, coverage=config.coverage, **known)
    goal = config.target.goals[0]
    try:
        return cut_folder(source, texts, output, size=_size_for(load(source), goal), **known)
    except VocabularyError as error:
        raise VocabularyError(f"target parameters {goal:g}: {error}; or prune more units") from None


def _size_for(model: torch.nn.Module, goal: float) -> int:
    """The number of tokens with which a model has so many parameters, or up to 1 such a share of them."""
    rows, total = int(model.config.vocab_size), count_parameters(model)  # type: ignore[union-attr, arg-type]
    each = sum(parameter.numel() // rows for parameter in model.parameters() if parameter.shape[:1] == (rows,))
    allowed = goal * total if goal <= 1 else goal
    return max(0, int(rows - (total - allowed) / max(each, 1)) // 8 * 8)


def counts_in(rows: datasets.Dataset, tokens: int, *, columns: Sequence[str] = ("input_ids",)) -> NDArray[np.int64]:
    """How often each token occurs in encoded examples.

    Args:
        rows: Encoded examples.
        tokens: Ids there are.
        columns: Where token ids are; ids below 0 mean none.

    Example:
        >>> counts_in(datasets.Dataset.from_dict({"input_ids": [[1, 2], [2, 3]]}), 5).tolist()
        [0, 1, 2, 1, 0]
    """
    counts = np.zeros(tokens, dtype=np.int64)
    for batch in rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            ids = batch.column(name)
            while pa.types.is_nested(ids.type):
                ids = pc.list_flatten(ids)
            flat = ids.to_numpy()
            counts += np.bincount(flat[flat >= 0], minlength=tokens)
    return counts


def _require_same(model: torch.nn.Module, folder: Path, vocabulary: dict[str, int]) -> None:
    """Load a folder again and make sure that it holds what was saved."""
    again = load(folder).state_dict()
    saved = model.state_dict()
    if again.keys() != saved.keys() or not all(torch.equal(again[name], tensor) for name, tensor in saved.items()):
        raise RuntimeError(f"the model in {folder} does not load as it was saved; please report this with its name")
    if AutoTokenizer.from_pretrained(folder).get_vocab() != vocabulary:
        raise RuntimeError(f"the tokenizer in {folder} does not load as it was saved; please report this with its name")
