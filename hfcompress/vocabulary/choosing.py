"""Which tokens stay: those that texts use most, and those without which other text could not be encoded."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hfcompress.vocabulary.tokenizer import (
    VocabularyError,
    backend_state,
    merge_result,
    model_vocabulary,
    needed_ids,
)

_BATCH = 1000  # texts
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# RoBERTa and its kin count positions from the padding token's id (1), so what is before it stays.
_BEFORE_PADDING = 8

Needs = Callable[[int], "frozenset[int] | None"]


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | None]) -> NDArray[np.int64]:
    """How often each token occurs in some texts, each encoded on its own, whole and without special tokens.

    Args:
        tokenizer: Any tokenizer.
        texts: The texts, read once, some at a time; None counts as no text.

    Returns:
        Occurrences by id, int64, one entry for each id up to the largest of the tokenizer.

    Raises:
        VocabularyError: There is no token in any of the texts.

    Example:
        >>> from transformers import BertTokenizer
        >>> words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##a ##b ab".split()
        >>> tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        >>> count_tokens(tokenizer, ["ab aa", "ab", None]).tolist()
        [0, 0, 0, 0, 0, 1, 0, 1, 0, 2]
    """
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    total = len(texts) if isinstance(texts, Sized) else None
    with tqdm(total=total, desc="counting tokens", unit=" texts", leave=False, delay=2) as bar:
        rest = iter(texts)
        while batch := list(itertools.islice(rest, _BATCH)):
            for ids in encode_plain(tokenizer, [text for text in batch if text]):
                counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(counts))
            bar.update(len(batch))
    if not counts.any():
        raise VocabularyError("the texts hold no token to count; give texts that are not empty")
    return counts


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts, whole and without special tokens; the padding and truncation of the tokenizer stay as they are."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    # A call forgets what tokenizer.json said about these.
    if backend is not None and truncation is not None:
        backend.enable_truncation(**truncation)
    if backend is not None and padding is not None:
        backend.enable_padding(**padding)
    return encoded["input_ids"]


def share_unchanged(
    tokenizer: PreTrainedTokenizerBase,
    smaller: PreTrainedTokenizerBase,
    kept: Iterable[int],
    texts: Iterable[str | None],
) -> float:
    """Share of texts that a tokenizer with fewer tokens splits just as the one it was made from.

    Args:
        tokenizer: The tokenizer before.
        smaller: What `cut_tokenizer` made of it.
        kept: The ids that stayed.
        texts: Texts, read once; None and empty ones do not count.

    Returns:
        A share in [0, 1]; 1 if there are no texts.

    Raises:
        VocabularyError: A text all of whose tokens stayed is split differently, which must not be.

    Example:
        >>> from transformers import BertTokenizer
        >>> from hfcompress.vocabulary import cut_tokenizer
        >>> words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##a ##b ab ba".split()
        >>> tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        >>> kept = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> share_unchanged(tokenizer, cut_tokenizer(tokenizer, kept), kept, ["ab", "ab ba", "aba", "bb"])
        0.75
    """
    new_ids = {int(old): new for new, old in enumerate(kept)}
    same = total = 0
    rest = (text for text in texts if text)
    with tqdm(desc="comparing texts", unit=" texts", leave=False, delay=2) as bar:
        while batch := list(itertools.islice(rest, _BATCH)):
            before, after = encode_plain(tokenizer, batch), encode_plain(smaller, batch)
            for text, old, new in zip(batch, before, after, strict=True):
                is_same = [new_ids.get(i) for i in old] == new
                if not is_same and all(i in new_ids for i in old):
                    raise VocabularyError(
                        f"{text[:60]!r} is split differently though all its tokens stayed; please report this with the model's name"
                    )
                same += is_same
            total += len(batch)
            bar.update(len(batch))
    return same / total if total else 1.0


def choose_tokens(
    tokenizer: PreTrainedTokenizerBase,
    counts: NDArray[np.int64],
    *,
    size: int | None = None,
    coverage: float | None = None,
    keep: Iterable[str] = (),
    multiple_of: int = 8,
) -> NDArray[np.int64]:
    """The tokens that stay: the most frequent ones, and all that the tokenizer cannot do without.

    These always stay: special and added tokens, and what text is split into when its own tokens are gone (single
    characters in all their forms, all bytes, and every token with a character that has no token of its own). Of BPE each
    token stays together with the tokens it is merged from, without which it would never be made.

    Args:
        tokenizer: A tokenizer of the tokenizers library.
        counts: Occurrences by id, as `count_tokens` returns them.
        size: Number of tokens that stay. Give this or `coverage`.
        coverage: Share of the occurrences in `counts` whose tokens stay, in (0, 1]; 1 keeps every token that occurs.
        keep: Further tokens that stay, written as in the vocabulary.
        multiple_of: The number is made a multiple of this with further tokens, as long as there are any.

    Returns:
        Ids that stay, ascending, int64.

    Raises:
        VocabularyError: Both or neither of `size` and `coverage` are given or one is out of range, a token of `keep` is not
            there, `counts` is not of this tokenizer, or the tokenizer is of a kind that cannot be cut.

    Example:
        >>> from transformers import BertTokenizer
        >>> words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##a ##b aa ab ba bb".split()
        >>> tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        >>> counts = count_tokens(tokenizer, ["ab ba ba bb", "ba ab"])
        >>> choose_tokens(tokenizer, counts, coverage=0.5, multiple_of=1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 11]
        >>> choose_tokens(tokenizer, counts, size=11, keep=["aa"], multiple_of=1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    """
    if (size is None) == (coverage is None):
        raise VocabularyError(
            "give either size (a number of tokens) or coverage (a share of the occurrences), not both"
        )
    if coverage is not None and not 0 < coverage <= 1:
        raise VocabularyError(f"coverage {coverage} is not allowed: must be above 0 and at most 1")
    if multiple_of < 1:
        raise VocabularyError(f"multiple_of {multiple_of} is not allowed: must be a whole number of 1 or more")
    state, vocabulary = backend_state(tokenizer), tokenizer.get_vocab()
    ids = np.array(sorted(set(vocabulary.values())), dtype=np.int64)
    if counts.ndim != 1 or len(counts) <= ids[-1]:
        raise VocabularyError(
            f"counts has the shape {counts.shape}, the tokenizer has ids up to {ids[-1]}; count with this tokenizer"
        )
    needs = _needs(state)
    kept = _with_parts(_always(tokenizer, state) | _named(keep, vocabulary), needs)
    ranked = ids[np.lexsort((ids, -counts[ids]))].tolist()
    if size is not None:
        if size < len(kept):
            raise VocabularyError(
                f"size {size} is too small: {len(kept)} tokens have to stay; give {len(kept)} or more"
            )
        least = size
    else:
        _cover(kept, ranked, needs, counts, float(coverage or 1.0))
        least = len(kept)
    _fill(kept, ranked, needs, -(-least // multiple_of) * multiple_of)
    return np.array(sorted(kept), dtype=np.int64)


def _cover(kept: set[int], ranked: list[int], needs: Needs, counts: NDArray[np.int64], coverage: float) -> None:
    """Add tokens, most frequent first, until they make up the asked share of all occurrences; in place."""
    wanted = coverage * float(counts.sum())
    reached = int(counts[sorted(kept)].sum())
    for token in ranked:
        if reached >= wanted or counts[token] == 0:
            return
        new = (needs(token) or frozenset({token})) - kept
        reached += int(counts[sorted(new)].sum())
        kept |= new


def _fill(kept: set[int], ranked: list[int], needs: Needs, size: int) -> None:
    """Add the most frequent tokens for which there is room, with what they are made of; in place."""
    for token in ranked:
        if len(kept) >= size:
            return
        parts = needs(token)
        if parts is not None and len(parts - kept) <= size - len(kept):
            kept |= parts


def _with_parts(tokens: set[int], needs: Needs) -> set[int]:
    return tokens.union(*(needs(token) or () for token in tokens))


def _named(tokens: Iterable[str], vocabulary: Mapping[str, int]) -> set[int]:
    named = set()
    for token in tokens:
        if token not in vocabulary:
            close = difflib.get_close_matches(token, list(vocabulary), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise VocabularyError(f"keep: {token!r} is no token of the vocabulary{hint}")
        named.add(vocabulary[token])
    return named


def _always(tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any]) -> set[int]:
    """Ids that stay whatever the counts say."""
    ids = {*needed_ids(state), *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    padding = tokenizer.pad_token_id
    if padding is not None and padding < _BEFORE_PADDING:
        ids |= set(range(padding))
    vocabulary, model = model_vocabulary(state), state["model"]
    forms = _Forms(model)
    ids |= {i for token, i in vocabulary.items() if _BYTE.fullmatch(token) or forms.is_single(token)}
    if model["type"] == "Unigram":
        # The score of unknown characters is reckoned from the lowest of all.
        scores = [score for _, score in model["vocab"]]
        ids.add(int(np.argmin(scores)))
    if model["type"] != "BPE" and not model.get("byte_fallback"):
        ids |= {i for token, i in vocabulary.items() if not all(one in vocabulary for one in forms.characters(token))}
    return ids & set(tokenizer.get_vocab().values())


class _Forms:
    """How a model writes single characters: at the start, inside and at the end of a word."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.inside = model.get("continuing_subword_prefix") or ""
        self.end = model.get("end_of_word_suffix") or ""

    def characters(self, token: str) -> list[str]:
        """The single characters that a token stands for, as the model writes them where they are.

        An ending mark belongs to the last one, a continuing mark to each but the first of a word.
        """
        end = self.end if self.end and token.endswith(self.end) and token != self.end else ""
        body = token.removesuffix(end) if end else token
        starts_inside = bool(self.inside) and body.startswith(self.inside) and body != self.inside
        letters = list(body.removeprefix(self.inside) if starts_inside else body)
        written = [self.inside + c if starts_inside or place else c for place, c in enumerate(letters)]
        return [*written[:-1], written[-1] + end] if written else []

    def is_single(self, token: str) -> bool:
        """Whether a token is one character in any form."""
        return len(self.characters(token)) == 1


def _needs(state: Mapping[str, Any]) -> Needs:
    """For each id the ids that have to stay with it for it to be made at all; None if it never is."""
    model = state["model"]
    added = {token["id"] for token in state["added_tokens"]}
    if model["type"] != "BPE":
        return lambda i: frozenset({i})
    vocabulary = model_vocabulary(state)
    tokens = {i: token for token, i in vocabulary.items()}
    paths = _MergePaths(model)

    def needs(i: int) -> frozenset[int] | None:
        if i in added or i not in tokens:
            return frozenset({i})
        path = paths.of(tokens[i])
        if path is None:
            # With `ignore_merges` a word that is a token is taken whole, even if no merges lead to it.
            return frozenset({i}) if model.get("ignore_merges") else None
        return frozenset(vocabulary[token] for token in path)

    return needs


class _MergePaths:
    """Which tokens are made on the way to a token of BPE.

    What happens inside a token does not depend on the text around it: no merge crosses its borders, so its letters are
    merged in the order in which they would be if they stood alone.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.vocabulary: Mapping[str, int] = model["vocab"]
        self.forms = _Forms(model)
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        self.ranks = {(first, second): rank for rank, (first, second) in enumerate(pairs)}
        self.paths: dict[str, frozenset[str] | None] = {}

    def of(self, token: str) -> frozenset[str] | None:
        """A token and all that it is merged from; None if the merges do not lead to it."""
        if token not in self.paths:
            made = {token}
            symbols = list(self._symbols(token))
            known = all(symbol in self.vocabulary for symbol in symbols)
            while len(symbols) > 1 and known:
                made |= set(symbols)
                ranked = [(self.ranks.get(pair), place) for place, pair in enumerate(itertools.pairwise(symbols))]
                best = min(((rank, place) for rank, place in ranked if rank is not None), default=None)
                if best is None:
                    break
                place = best[1]
                symbols[place : place + 2] = [merge_result(symbols[place], symbols[place + 1], self.forms.inside)]
            self.paths[token] = frozenset(made) if symbols == [token] else None
        return self.paths[token]

    def _symbols(self, token: str) -> Iterator[str]:
        """What a token is merged from: characters, or the bytes of those that are not in the vocabulary."""
        if token in self.vocabulary and _BYTE.fullmatch(token):
            yield token
            return
        for character in self.forms.characters(token):
            pieces = [f"<0x{byte:02X}>" for byte in character.encode("utf-8", "surrogatepass")]
            if character not in self.vocabulary and all(piece in self.vocabulary for piece in pieces):
                yield from pieces
            else:
                yield character
