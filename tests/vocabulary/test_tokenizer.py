from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, TokenizersBackend

from hfcompress.vocabulary import VocabularyError, choose_tokens, count_tokens, cut_tokenizer
from tests.vocabulary.tokenizers import KINDS, STRANGE, sentences, trained


def chosen(tokenizer, coverage=1.0, **settings):
    return choose_tokens(tokenizer, count_tokens(tokenizer, sentences(0)), coverage=coverage, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_whose_tokens_stay_are_encoded_as_before(kind):
    tokenizer = trained(kind)
    kept = chosen(tokenizer)
    smaller = cut_tokenizer(tokenizer, kept)
    assert type(smaller) is type(tokenizer) and len(smaller) == len(kept) < len(tokenizer)
    assert smaller.get_vocab() == {t: kept.tolist().index(i) for t, i in tokenizer.get_vocab().items() if i in kept}
    for text in [*sentences(0), ""]:
        old, new = tokenizer(text), smaller(text)
        assert [kept[i] for i in new["input_ids"]] == old["input_ids"]
        assert new.keys() == old.keys() and new["attention_mask"] == old["attention_mask"]
        assert smaller.decode(new["input_ids"]) == tokenizer.decode(old["input_ids"])
    pair = sentences(0)[2], sentences(0)[3]
    batch = [text[:20].rpartition(" ")[0] for text in sentences(0)[:4]]
    for arguments in ((pair[0], pair[1]), (batch, batch[::-1])):
        old = tokenizer(*arguments, padding=True, truncation=True, max_length=14)
        new = smaller(*arguments, padding=True, truncation=True, max_length=14)
        rows = [new["input_ids"]] if isinstance(arguments[0], str) else new["input_ids"]
        expected = [old["input_ids"]] if isinstance(arguments[0], str) else old["input_ids"]
        assert [[kept[i] for i in row] for row in rows] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_can_still_be_encoded(kind):
    tokenizer = trained(kind)
    smaller = cut_tokenizer(tokenizer, chosen(tokenizer, 0.5))
    texts = [*sentences(1), *sentences(2), STRANGE]
    longer = 0
    for text in texts:
        old, new = tokenizer(text)["input_ids"], smaller(text)["input_ids"]
        assert smaller.decode(new) == tokenizer.decode(old)
        assert new.count(smaller.unk_token_id) == old.count(tokenizer.unk_token_id) or kind == "bytelevel"
        assert tokenizer.convert_ids_to_tokens(old)[-1] == smaller.convert_ids_to_tokens(new)[-1] or kind in (
            "bytelevel",
            "llama",
        )
        longer += len(new) > len(old)
    assert len(texts) == 401 and longer > 300
    if kind in ("bytelevel", "roberta", "llama", "unigram"):
        assert smaller.decode(smaller(STRANGE)["input_ids"], skip_special_tokens=True).strip() == STRANGE


@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_stays_and_is_saved(kind, tmp_path):
    tokenizer = KINDS[kind]()
    tokenizer.backend_tokenizer.enable_truncation(12, stride=1)
    tokenizer.backend_tokenizer.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        pad_to_multiple_of=4,
    )
    smaller = cut_tokenizer(tokenizer, chosen(tokenizer))
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    old = json.loads(tokenizer.backend_tokenizer.to_str())
    for new in (smaller, again):
        state = json.loads(new.backend_tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer", "decoder", "truncation"):
            assert state[part] == old[part], part
        assert state["padding"] == {**old["padding"], "pad_id": new.pad_token_id}
        added = {token["content"]: token for token in state["added_tokens"]}
        assert added == {t["content"]: {**t, "id": added[t["content"]]["id"]} for t in old["added_tokens"]}
        for name in ("model_max_length", "padding_side", "truncation_side", "chat_template", "model_input_names"):
            assert getattr(new, name) == getattr(tokenizer, name), name
        assert new.special_tokens_map == tokenizer.special_tokens_map
        for token in tokenizer.all_special_tokens:
            assert new(token, add_special_tokens=False)["input_ids"][-1] == new.get_vocab()[token]
    assert again.get_vocab() == smaller.get_vocab() and type(again) is type(smaller) is type(tokenizer)
    assert [again(t)["input_ids"] for t in sentences(0)] == [smaller(t)["input_ids"] for t in sentences(0)]


def test_scores_and_merges_that_stay_are_those_of_before():
    looked_at = 0
    for kind in KINDS:
        tokenizer = trained(kind)
        kept = chosen(tokenizer, 0.9)
        old = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        new = json.loads(cut_tokenizer(tokenizer, kept).backend_tokenizer.to_str())["model"]
        left = set(tokenizer.convert_ids_to_tokens(kept.tolist()))
        if old["type"] == "Unigram":
            assert new["vocab"] == [entry for entry in old["vocab"] if entry[0] in left]
            assert new["vocab"][new["unk_id"]] == old["vocab"][old["unk_id"]]
        if old["type"] == "BPE":
            assert new["merges"] == [m for m in old["merges"] if {*m, "".join(m)} <= left] != []
        rest = {"vocab", "merges", "unk_id"}
        assert {k: v for k, v in new.items() if k not in rest} == {k: v for k, v in old.items() if k not in rest}
        looked_at += 1
    assert looked_at == 7


def test_a_chat_template_is_kept():
    tokenizer = trained("bytelevel")
    smaller = cut_tokenizer(tokenizer, chosen(tokenizer))
    messages = [{"role": "user", "content": sentences(0)[0]}]
    text = smaller.apply_chat_template(messages, tokenize=False)
    assert text == sentences(0)[0] + "<|endoftext|>"
    assert smaller(text)["input_ids"][-1] == smaller.eos_token_id == len(smaller) - 1


def test_added_tokens_are_found_in_text():
    tokenizer = trained("roberta")
    smaller = cut_tokenizer(tokenizer, chosen(tokenizer))
    assert smaller.tokenize("a<custom> plenty words") == tokenizer.tokenize("a<custom> plenty words")
    assert "<custom>" in smaller.tokenize("a<custom>") and len(smaller.get_added_vocab()) >= 2


@pytest.mark.parametrize("kind", ["xlm-roberta", "llama"])
def test_where_the_class_builds_something_else_the_general_class_is_taken(tmp_path, kind):
    tokenizer = KINDS[kind]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # the class knows nothing of it
    kept = chosen(tokenizer)
    smaller = cut_tokenizer(tokenizer, kept)
    assert type(smaller) is TokenizersBackend
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for new in (smaller, again):
        old = tokenizer(sentences(0)[0].upper())
        assert [kept[i] for i in new(sentences(0)[0].upper())["input_ids"]] == old["input_ids"]
        assert new.model_input_names == tokenizer.model_input_names == ["input_ids", "attention_mask"]
        assert new.padding_side == tokenizer.padding_side
        assert new.special_tokens_map == tokenizer.special_tokens_map


def test_cutting_twice():
    tokenizer = trained("bytelevel")
    once = cut_tokenizer(tokenizer, chosen(tokenizer))
    twice = cut_tokenizer(once, chosen(once, 0.9))
    assert len(twice) < len(once) < len(tokenizer)
    assert twice.decode(twice(STRANGE)["input_ids"]) == STRANGE


def test_what_cannot_be_cut():
    tokenizer = trained("wordpiece")
    with pytest.raises(VocabularyError, match="ByT5Tokenizer has no fast tokenizer"):
        cut_tokenizer(ByT5Tokenizer(), range(10))
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(VocabularyError, match="is a WordLevel tokenizer; those that can be cut are WordPiece, BPE"):
        cut_tokenizer(words, [0, 1])
    with pytest.raises(VocabularyError, match="must be ascending"):
        cut_tokenizer(tokenizer, [3, 2])
    with pytest.raises(VocabularyError, match="there is no token with the id 400; the tokenizer has 400"):
        cut_tokenizer(tokenizer, range(401))
    with pytest.raises(VocabularyError, match=r"lack 0 \('\[PAD\]'\), which the tokenizer itself needs"):
        cut_tokenizer(tokenizer, range(1, 400))
