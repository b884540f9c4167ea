"""A tokenizer with fewer tokens: its JSON is rewritten, so that everything else about it stays as it is.

Ids are given anew, without gaps, in the old order. A text whose tokens all stay is split as before: WordPiece takes the
longest piece, Unigram the most likely pieces, BPE the first merge in its list, and each is still there to be taken.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TokenizersBackend

logger = logging.getLogger(__name__)

MODELS = ("WordPiece", "BPE", "Unigram")
# What a tokenizer's Python class could rebuild in its own way when it is loaded.
_PARTS = (
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
    "padding",
    "truncation",
)


class VocabularyError(ValueError):
    """A vocabulary cannot be cut as asked; one line says why and what to do."""


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Iterable[int]) -> PreTrainedTokenizerBase:
    """A tokenizer with only some of the tokens of another one; the other is left as it is.

    Special and added tokens, scores, merges, the post-processor, padding, truncation, the chat template and the longest
    length stay what they were; ids are new: the i-th id kept becomes i.

    Args:
        tokenizer: A tokenizer of the tokenizers library: WordPiece, BPE (of bytes or of characters) or Unigram.
        kept: Ids that stay, ascending, as `choose_tokens` returns them.

    Returns:
        The new tokenizer, of the same class wherever this class loads what was written.

    Raises:
        VocabularyError: The tokenizer is of another kind, an id has no token, or a token is missing that the tokenizer
            itself needs.

    Example:
        >>> from transformers import BertTokenizer
        >>> words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##a ##b ab ba".split()
        >>> tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        >>> tokenizer("ab ba")["input_ids"]
        [2, 9, 10, 3]
        >>> smaller = cut_tokenizer(tokenizer, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10])
        >>> smaller("ab ba")["input_ids"], smaller.tokenize("ab ba")
        ([2, 5, 8, 9, 3], ['a', '##b', 'ba'])
    """
    state = backend_state(tokenizer)
    old_vocabulary = tokenizer.get_vocab()
    new_ids = _new_ids(state, old_vocabulary, kept)
    wanted = {token: new_ids[i] for token, i in old_vocabulary.items() if i in new_ids}
    state = _renumbered(state, new_ids)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # `ensure_ascii`: half of a surrogate pair is a token of some vocabularies and cannot be written in UTF-8.
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        for cls in dict.fromkeys((type(tokenizer), TokenizersBackend)):
            new = cls.from_pretrained(folder, **({} if cls is type(tokenizer) else _class_settings(tokenizer)))
            difference = _difference(new, state, wanted)
            if difference is None:
                new.name_or_path = tokenizer.name_or_path
                return new
            logger.debug("%s does not load the smaller vocabulary as it was written: %s", cls.__name__, difference)
    raise VocabularyError(
        f"{type(tokenizer).__name__} with {len(wanted):,} tokens does not load as it was written ({difference}); "
        "please report this with the name of the model"
    )


def backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Raises:
        VocabularyError: The tokenizer does not run on the tokenizers library, or splits words in a way that is not known
            here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(
            f"{type(tokenizer).__name__} has no fast tokenizer (a tokenizer.json of the tokenizers library), and only those "
            "can be cut; convert it first, or use a model that has one"
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    if state["model"].get("type") not in MODELS:
        raise VocabularyError(
            f"{type(tokenizer).__name__} is a {state['model'].get('type')} tokenizer; those that can be cut are {', '.join(MODELS)}"
        )
    return state


def model_vocabulary(state: Mapping[str, Any]) -> dict[str, int]:
    """Token to id of the pieces that words are split into; added tokens that are no pieces are left out."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: i for i, (piece, _) in enumerate(vocabulary)}


def needed_ids(state: Mapping[str, Any]) -> dict[int, str]:
    """Ids that a tokenizer names itself, to their tokens: added tokens, the unknown token, template and padding."""
    needed = {int(token["id"]): str(token["content"]) for token in state["added_tokens"]}
    needed |= {i: token for token, i in _template_ids(state.get("post_processor"))}
    if state.get("padding"):
        needed[int(state["padding"]["pad_id"])] = str(state["padding"]["pad_token"])
    model, vocabulary = state["model"], model_vocabulary(state)
    unknown = model.get("unk_token")
    if unknown in vocabulary:
        needed[vocabulary[unknown]] = unknown
    if model.get("unk_id") is not None:
        needed[int(model["unk_id"])] = model["vocab"][model["unk_id"]][0]
    return needed


def merge_result(first: str, second: str, prefix: str) -> str:
    """The token that two tokens merge into; `prefix` marks tokens inside a word and is left out of the second."""
    return first + (second.removeprefix(prefix) if prefix else second)


def _new_ids(state: Mapping[str, Any], vocabulary: Mapping[str, int], kept: Iterable[int]) -> dict[int, int]:
    """Old id to new id, with everything checked."""
    ids = [int(i) for i in kept]
    if any(later <= earlier for earlier, later in itertools.pairwise(ids)):
        raise VocabularyError("the ids to keep must be ascending, each one once; sort them first")
    unknown = sorted(set(ids) - set(vocabulary.values()))
    if unknown:
        raise VocabularyError(
            f"there is no token with the id {unknown[0]}; the tokenizer has {len(vocabulary):,}, and choose_tokens picks among them"
        )
    left = set(ids)
    missing = sorted((i, token) for i, token in needed_ids(state).items() if i not in left)
    if missing:
        i, token = missing[0]
        raise VocabularyError(
            f"the ids to keep lack {i} ({token!r}), which the tokenizer itself needs; choose_tokens keeps such tokens"
        )
    return {old: new for new, old in enumerate(ids)}


def _renumbered(state: dict[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The content of `tokenizer.json` with the tokens that stay."""
    model, old = dict(state["model"]), model_vocabulary(state)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            token: new_ids[i] for token, i in sorted(old.items(), key=lambda item: item[1]) if i in new_ids
        }
    else:
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_ids]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    if "merges" in model:
        model["merges"] = list(
            _merges_left(model["merges"], model["vocab"], model.get("continuing_subword_prefix") or "")
        )
    added = [{**token, "id": new_ids[token["id"]]} for token in state["added_tokens"]]
    padding = state.get("padding")
    if padding:
        padding = {**padding, "pad_id": new_ids[padding["pad_id"]]}
    template = _renumbered_template(state.get("post_processor"), new_ids)
    return {**state, "model": model, "added_tokens": added, "padding": padding, "post_processor": template}


def _merges_left(merges: Sequence[Any], vocabulary: Mapping[str, int], prefix: str) -> Iterator[list[str]]:
    """The merges whose parts and whose result stay, in their order."""
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        if first in vocabulary and second in vocabulary and merge_result(first, second, prefix) in vocabulary:
            yield [first, second]


def _template_ids(processor: Mapping[str, Any] | None) -> Iterator[tuple[str, int]]:
    """Tokens and ids that a post-processor puts around a text."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        yield from _template_ids(inner)
    for name in ("sep", "cls"):  # those of BERT and RoBERTa
        if name in processor:
            token, i = processor[name]
            yield str(token), int(i)
    for special in processor.get("special_tokens", {}).values():
        yield from zip(special["tokens"], special["ids"], strict=True)


def _renumbered_template(processor: Mapping[str, Any] | None, new_ids: Mapping[int, int]) -> dict[str, Any] | None:
    if processor is None:
        return None
    new = dict(processor)
    if "processors" in new:
        new["processors"] = [_renumbered_template(inner, new_ids) for inner in new["processors"]]
    for name in ("sep", "cls"):
        if name in new:
            new[name] = [new[name][0], new_ids[new[name][1]]]
    if "special_tokens" in new:
        new["special_tokens"] = {
            name: {**special, "ids": [new_ids[i] for i in special["ids"]]}
            for name, special in new["special_tokens"].items()
        }
    return new


def _class_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the class of a tokenizer sets and the general class has to be told."""
    return {
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
    }


def _difference(
    tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> str | None:
    """The first part of a loaded tokenizer that is not as it was written, or None."""
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in _PARTS:
        same = _same_model(loaded[part], state[part]) if part == "model" else loaded.get(part) == state.get(part)
        if not same:
            return part
    return None if tokenizer.get_vocab() == vocabulary else "ids"


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two models are the same; the tokenizers library reads scores up to their last bit."""
    if one["type"] != "Unigram" or other["type"] != "Unigram":
        return one == other
    pairs = list(zip(one["vocab"], other["vocab"], strict=False))
    return (
        {**one, "vocab": len(one["vocab"])} == {**other, "vocab": len(other["vocab"])}
        and all(a[0] == b[0] for a, b in pairs)
        and all(math.isclose(a[1], b[1], rel_tol=1e-12) for a, b in pairs)
    )
