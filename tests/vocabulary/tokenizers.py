"""Tiny tokenizers of every kind, trained on made-up words."""

from __future__ import annotations

import functools
import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

_ONSETS = ("b", "d", "gr", "k", "l", "m", "pl", "st", "t", "v")
_VOWELS = ("a", "e", "i", "o", "u", "ou")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNUSED = "mebeko"  # in no sentence
STRANGE = "Zyx qué ☃ 日本 🤗 naïve"


@functools.cache
def sentences(seed: int = 0, words: int = 150) -> tuple[str, ...]:
    """Sentences of made-up words, some of which are frequent; another seed gives other words."""
    draw = random.Random(seed)
    vocabulary = [
        "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(draw.randint(2, 4))) for _ in range(words)
    ]
    weights = [1 / (rank + 1) for rank in range(words)]
    return tuple(" ".join(draw.choices(vocabulary, weights, k=draw.randint(4, 9))) + "." for _ in range(200))


def _text() -> list[str]:
    return [*sentences(0), *sentences(1)]


def _vocabulary(tokenizer: Tokenizer) -> list[str]:
    return [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def wordpiece() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", UNUSED, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw.train_from_iterator(
        _text(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    # As in BERT, the special tokens are not all at the front.
    order = ["[PAD]", UNUSED, *[t for t in _vocabulary(raw) if t not in special], *special[2:]]
    return BertTokenizer(vocab={token: i for i, token in enumerate(order)}, model_max_length=64)


def _bpe_of_bytes() -> tuple[dict[str, int], list[tuple[str, str]]]:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator(_text(), trainer)
    model = json.loads(raw.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def bytelevel() -> PreTrainedTokenizerFast:
    """As GPT-2's, with an end-of-text token behind all others and a chat template."""
    vocabulary, merges = _bpe_of_bytes()
    rest = [token for token in vocabulary if token not in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    tokenizer = GPT2Tokenizer(
        vocab={token: i for i, token in enumerate([*rest, "<|endoftext|>"])}, merges=merges, pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
    return tokenizer


def roberta() -> PreTrainedTokenizerFast:
    """With a RobertaProcessing, which holds ids of its own, and tokens that were added later."""
    vocabulary, merges = _bpe_of_bytes()
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=32)
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    tokenizer.add_tokens(["<custom>", "plenty words"])
    return tokenizer


def llama() -> PreTrainedTokenizerFast:
    """BPE of characters with bytes to fall back to; every way to split a token is a merge, as from SentencePiece."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(_text(), trainers.BpeTrainer(vocab_size=350, show_progress=False))
    vocabulary = ["<unk>", "<s>", "</s>", *BYTES, *[token for token in _vocabulary(raw) if token != "<unk>"]]
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [(t[:i], t[i:]) for t in vocabulary[259:] for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids]
    return LlamaTokenizer(vocab=ids, merges=merges, pad_token="</s>")


def _unigram_pieces(size: int) -> list[tuple[str, float]]:
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(_text(), trainers.UnigramTrainer(vocab_size=size, show_progress=False))
    return [tuple(entry) for entry in json.loads(raw.to_str())["model"]["vocab"]]


def unigram() -> PreTrainedTokenizerFast:
    """Unigram with bytes to fall back to, the unknown token at another place than the first."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*special, *((token, 0.0) for token in BYTES), *_unigram_pieces(300)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    raw.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def t5() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_unigram_pieces(300)]
    return T5Tokenizer(vocab=pieces, extra_ids=7)


def xlm_roberta() -> PreTrainedTokenizerFast:
    front = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return XLMRobertaTokenizer(vocab=[*front, *_unigram_pieces(300), ("<mask>", 0.0)])


KINDS = {
    "wordpiece": wordpiece,
    "bytelevel": bytelevel,
    "roberta": roberta,
    "llama": llama,
    "unigram": unigram,
    "t5": t5,
    "xlm-roberta": xlm_roberta,
}


@functools.cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    """One of the kinds; nobody may change it."""
    return KINDS[kind]()
