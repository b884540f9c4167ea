from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hfcompress.vocabulary import VocabularyError, choose_tokens, count_tokens, cut_tokenizer, share_unchanged
from tests.vocabulary.tokenizers import BYTES, KINDS, STRANGE, UNUSED, sentences, trained


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_each_text_alone(kind):
    tokenizer, texts = trained(kind), sentences(0)[:60]
    expected = dict.fromkeys(tokenizer.get_vocab(), 0)
    for text in texts:
        for token in tokenizer.tokenize(text):
            expected[token] += 1
    counts = count_tokens(tokenizer, iter([*texts, None, ""]))
    assert {token: counts[i] for token, i in tokenizer.get_vocab().items()} == expected
    assert counts.dtype == np.int64 and counts.sum() > 300


def test_long_texts_are_counted_whole_and_settings_stay(caplog):
    tokenizer = KINDS["wordpiece"]()
    tokenizer.backend_tokenizer.enable_truncation(8)
    text = " ".join(sentences(0)[:50])
    with caplog.at_level(logging.WARNING):
        counts = count_tokens(tokenizer, [text] * 3)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 8
    assert counts.sum() == 3 * sum(len(tokenizer.tokenize(sentence)) for sentence in sentences(0)[:50]) > 3 * 64
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_always_stays(kind):
    tokenizer = trained(kind)
    counts = count_tokens(tokenizer, ["a"])
    kept = choose_tokens(tokenizer, counts, coverage=1.0, multiple_of=1)
    tokens = set(tokenizer.convert_ids_to_tokens(kept.tolist()))
    assert set(tokenizer.all_special_tokens) <= tokens and tokenizer.all_special_tokens
    assert set(tokenizer.get_added_vocab()) <= tokens
    singles = {t for t in tokenizer.get_vocab() if len(t.removeprefix("##")) == 1}
    assert singles <= tokens and len(singles) > 15
    if kind in ("bytelevel", "roberta"):
        assert singles == set(pre_tokenizers.ByteLevel.alphabet()) and len(singles) == 256
    if kind in ("llama", "unigram"):
        assert set(BYTES) <= tokens
    if kind == "wordpiece":
        assert any(t.startswith("##") for t in singles)
        assert UNUSED not in tokens  # a token like any other
    if kind == "t5":
        assert {f"<extra_id_{i}>" for i in range(7)} <= tokens
    # Next to nothing else: a Unigram also keeps the piece with the lowest score.
    rest = tokens - singles - set(BYTES) - set(tokenizer.all_special_tokens) - set(tokenizer.get_added_vocab())
    assert len(rest) <= 2
    assert kept.tolist() == sorted(set(kept.tolist())) and kept.dtype == np.int64


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_is_reached_with_the_most_frequent_tokens(kind):
    tokenizer = trained(kind)
    counts = count_tokens(tokenizer, sentences(0))
    sizes = []
    for coverage in (0.5, 0.9, 0.99, 1.0):
        kept = choose_tokens(tokenizer, counts, coverage=coverage, multiple_of=1)
        assert counts[kept].sum() >= coverage * counts.sum()
        sizes.append(len(kept))
    assert sizes == sorted(sizes)
    assert set(np.flatnonzero(counts)) <= set(kept.tolist())
    assert len(kept) < len(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_is_as_asked(kind):
    tokenizer = trained(kind)
    counts = count_tokens(tokenizer, sentences(0))
    least = len(choose_tokens(tokenizer, counts, coverage=1e-9, multiple_of=1))
    assert len(choose_tokens(tokenizer, counts, size=least, multiple_of=1)) == least
    with pytest.raises(VocabularyError, match=f"size {least - 1} is too small: {least} tokens have to stay"):
        choose_tokens(tokenizer, counts, size=least - 1)
    small = choose_tokens(tokenizer, counts, size=least + 13, multiple_of=1)
    assert len(small) == least + 13
    rounded = choose_tokens(tokenizer, counts, size=least + 13)
    assert len(rounded) % 8 == 0 and 0 <= len(rounded) - least - 13 < 8
    assert len(choose_tokens(tokenizer, counts, coverage=0.9, multiple_of=32)) % 32 == 0
    assert len(choose_tokens(tokenizer, counts, size=10**6)) <= len(tokenizer)  # no more than there are


def test_most_frequent_first_and_then_in_the_old_order():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc", "##a", "##b", "##c", "ab", "bc", "ca", "abc", "cab"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    counts = count_tokens(tokenizer, ["cab cab cab ca ca abc"])
    chosen = [set(choose_tokens(tokenizer, counts, size=size, multiple_of=1).tolist()) for size in range(11, 17)]
    assert chosen[0] == set(range(11))
    assert [words[next(iter(b - a))] for a, b in itertools.pairwise(chosen)] == [
        "cab",
        "ca",
        "abc",
        "ab",
        "bc",
    ]


def test_tokens_that_are_named_stay():
    tokenizer = trained("wordpiece")
    counts = count_tokens(tokenizer, ["a"])
    least = set(choose_tokens(tokenizer, counts, coverage=0.1, multiple_of=1).tolist())
    word = next(t for t, i in tokenizer.get_vocab().items() if i not in least and t.isalpha() and len(t) > 4)
    kept = choose_tokens(tokenizer, counts, coverage=0.1, keep=[word, UNUSED], multiple_of=1)
    assert set(kept.tolist()) - least == {tokenizer.get_vocab()[word], tokenizer.get_vocab()[UNUSED]}
    with pytest.raises(VocabularyError, match=f"'{word}q' is no token of the vocabulary; did you mean '{word}'"):
        choose_tokens(tokenizer, counts, coverage=0.1, keep=[word + "q"])


def bpe(vocabulary, merges, **settings):
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, **settings))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_a_token_of_bpe_stays_with_what_it_is_merged_from():
    # abcd is made of ab and cd, not of abc and d, though that is a merge as well.
    merges = [("a", "b"), ("c", "d"), ("ab", "c"), ("ab", "cd"), ("abc", "d")]
    tokenizer = bpe([*"abcd", "ab", "cd", "abc", "abcd"], merges)
    counts = count_tokens(tokenizer, ["abcd"])
    kept = choose_tokens(tokenizer, counts, coverage=1.0, multiple_of=1)
    assert tokenizer.convert_ids_to_tokens(kept.tolist()) == [*"abcd", "ab", "cd", "abcd"]
    smaller = cut_tokenizer(tokenizer, kept)
    assert smaller.tokenize("abcd abc dab") == ["abcd", "ab", "c", "d", "ab"]
    # No room for all it needs: the next one that fits is taken.
    counts = count_tokens(tokenizer, ["abcd abcd abc"])
    kept = choose_tokens(tokenizer, counts, size=6, multiple_of=1)
    assert tokenizer.convert_ids_to_tokens(kept.tolist()) == [*"abcd", "ab", "abc"]


def test_marks_inside_and_at_the_end_of_words():
    vocabulary = ["a", "##a", "b", "##b", "b</w>", "##b</w>", "ab</w>", "##ab</w>", "##ba", "aba", "abab</w>"]
    merges = [("a", "##b</w>"), ("##a", "##b</w>"), ("##b", "##a"), ("a", "##ba"), ("aba", "##b</w>")]
    tokenizer = bpe(vocabulary, merges, continuing_subword_prefix="##", end_of_word_suffix="</w>")
    assert tokenizer.tokenize("abab ab") == ["a", "##b", "##ab</w>", "ab</w>"]
    counts = count_tokens(tokenizer, ["abab"])
    kept = choose_tokens(tokenizer, counts, coverage=1.0, multiple_of=1)
    left = set(tokenizer.convert_ids_to_tokens(kept.tolist()))
    assert {"a", "##a", "b", "##b", "b</w>", "##b</w>"} <= left
    smaller = cut_tokenizer(tokenizer, kept)
    assert smaller.tokenize("abab") == tokenizer.tokenize("abab")


def test_words_that_are_taken_whole_need_no_merges():
    tokenizer = bpe([*"ab", "aab", "ab", "bb"], [("a", "b"), ("b", "b")], ignore_merges=True)
    assert tokenizer.tokenize("aab baab") == ["aab", "b", "a", "ab"]  # no merges lead to it
    counts = count_tokens(tokenizer, ["aab aab"])
    kept = choose_tokens(tokenizer, counts, coverage=1.0, multiple_of=1)
    assert tokenizer.convert_ids_to_tokens(kept.tolist()) == ["a", "b", "aab"]
    assert cut_tokenizer(tokenizer, kept).tokenize("aab baab") == ["aab", "b", "a", "a", "b"]
    # It may fill a place, too.
    assert choose_tokens(tokenizer, count_tokens(tokenizer, ["b"]), size=5, multiple_of=1).tolist() == [0, 1, 2, 3, 4]


def test_a_token_that_is_never_made_is_not_taken_for_filling():
    tokenizer = bpe([*"ab", "ba", "aab", "ab"], [("a", "b")])
    counts = count_tokens(tokenizer, ["b"])
    assert choose_tokens(tokenizer, counts, size=5, multiple_of=1).tolist() == [0, 1, 4]


def test_pieces_with_characters_that_have_no_piece_of_their_own_stay():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "q", "qa", "aq", "aa"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    kept = choose_tokens(tokenizer, count_tokens(tokenizer, ["a"]), coverage=1.0, multiple_of=1)
    # "q" is no piece inside a word, so without "aq" the word aq could not be encoded.
    assert tokenizer.convert_ids_to_tokens(kept.tolist())[5:] == ["a", "##a", "q", "aq"]


def test_unigram_keeps_what_the_score_of_unknown_characters_is_reckoned_from():
    # An unknown character costs the lowest score less 10: here 40, so that qa x x (39) is better than ? axx (41).
    scores = {"az": -2.0, "?": 0.0, "qa": -25.0, "x": -7.0, "a": -8.0, "axx": -1.0, "z": -5.0, "zz": -30.0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([*scores.items()], unk_id=1)))
    assert tokenizer.tokenize("qaxx") == ["qa", "x", "x"]
    kept = choose_tokens(tokenizer, count_tokens(tokenizer, ["qaxx", "axx"]), coverage=1.0, multiple_of=1)
    assert tokenizer.convert_ids_to_tokens(kept.tolist()) == ["?", "qa", "x", "a", "axx", "z", "zz"]
    smaller = cut_tokenizer(tokenizer, kept)
    assert smaller.tokenize("qaxx") == ["qa", "x", "x"]
    assert (tokenizer("!")["input_ids"], smaller("!")["input_ids"]) == ([1], [0])


@pytest.mark.parametrize("kind", KINDS)
def test_words_whose_tokens_stay_are_split_as_before(kind):
    tokenizer = trained(kind)
    counts = count_tokens(tokenizer, sentences(0))
    words = sorted({f"{a} {b}" for seed in (0, 1, 2) for s in sentences(seed) for a, b in [s.rstrip(".").split()[:2]]})
    compared = 0
    for coverage in (0.3, 0.6, 0.9):
        kept = choose_tokens(tokenizer, counts, coverage=coverage, multiple_of=1)
        smaller, left = cut_tokenizer(tokenizer, kept), set(kept.tolist())
        for word in words:
            ids = tokenizer(word)["input_ids"]
            if left.issuperset(ids):
                assert kept[smaller(word)["input_ids"]].tolist() == ids
                compared += 1
    assert 30 < compared < 3 * len(words)


def test_tokens_before_the_padding_token_stay():
    # RoBERTa's positions start at the id of the padding token.
    words = ["aaa", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "aa"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    kept = choose_tokens(tokenizer, count_tokens(tokenizer, ["a"]), coverage=1.0, multiple_of=1)
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_unchanged_texts(kind):
    tokenizer = trained(kind)
    counts = count_tokens(tokenizer, sentences(0))
    kept = choose_tokens(tokenizer, counts, coverage=0.95, multiple_of=1)
    smaller = cut_tokenizer(tokenizer, kept)
    texts = [*sentences(0), STRANGE]
    same = [tokenizer.tokenize(text) == smaller.tokenize(text) for text in texts]
    assert 0 < sum(same) < len(same)
    assert share_unchanged(tokenizer, smaller, kept, [*texts, "", None]) == pytest.approx(sum(same) / len(same))


def test_what_is_not_allowed():
    tokenizer = trained("wordpiece")
    counts = count_tokens(tokenizer, sentences(0))
    for settings in ({}, {"size": 300, "coverage": 0.9}):
        with pytest.raises(VocabularyError, match="give either size"):
            choose_tokens(tokenizer, counts, **settings)
    for coverage in (0, 1.01, float("nan")):
        with pytest.raises(VocabularyError, match=r"coverage .* is not allowed: must be above 0 and at most 1"):
            choose_tokens(tokenizer, counts, coverage=coverage)
    with pytest.raises(VocabularyError, match="multiple_of 0 is not allowed"):
        choose_tokens(tokenizer, counts, coverage=1.0, multiple_of=0)
    with pytest.raises(VocabularyError, match=r"counts has the shape \(399,\), the tokenizer has ids up to 399"):
        choose_tokens(tokenizer, counts[:-1], coverage=1.0)
    with pytest.raises(VocabularyError, match="the texts hold no token to count"):
        count_tokens(tokenizer, ["", None])
    with pytest.raises(VocabularyError, match="split differently though all its tokens stayed"):
        share_unchanged(tokenizer, trained("xlm-roberta"), range(len(tokenizer)), sentences(0))
