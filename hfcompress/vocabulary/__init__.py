"""Fewer tokens: which ones stay, and their removal from tokenizer and embeddings."""

from hfcompress.vocabulary.choosing import choose_tokens, count_tokens, share_unchanged
from hfcompress.vocabulary.embeddings import cut_vocabulary, named_ids
from hfcompress.vocabulary.tokenizer import VocabularyError, cut_tokenizer

__all__ = [
    "VocabularyError",
    "choose_tokens",
    "count_tokens",
    "cut_tokenizer",
    "cut_vocabulary",
    "named_ids",
    "share_unchanged",
]
