"""The trainers."""

from hfcompress.training.trainers import (
    CompressionTrainer,
    DistillationTrainer,
    PlainTrainer,
    PruningTrainer,
    Seq2SeqCompressionTrainer,
    Seq2SeqDistillationTrainer,
    Seq2SeqPlainTrainer,
    Seq2SeqPruningTrainer,
)

__all__ = [
    "CompressionTrainer",
    "DistillationTrainer",
    "PlainTrainer",
    "PruningTrainer",
    "Seq2SeqCompressionTrainer",
    "Seq2SeqDistillationTrainer",
    "Seq2SeqPlainTrainer",
    "Seq2SeqPruningTrainer",
]
