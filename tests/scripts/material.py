"""Tiny models and data for each script: what stands after `model=` and `data.` in its recipe."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.families import make_config

WORDS = ["good", "bad", "fine", "dull", "great", "poor", "film", "plot", "the", "a", "is", "in"]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_model(folder: Path, name: str, auto: str = "AutoModel") -> None:
    """A model of a family with a tokenizer that knows a few words."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*MARKS, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", **names)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    getattr(transformers, auto).from_config(make_config(name)).save_pretrained(folder / "model")


def write(folder: Path, rows: list[dict]) -> list[str]:
    """Files of JSON lines to train and to evaluate on."""
    for name, part in (("train", rows[:32]), ("eval", rows[32:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    return [f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}"]


def texts(count: int = 40) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(count)]


def text_classification(folder: Path) -> list[str]:
    save_model(folder, "bert")
    labels = {"text": "what was said", "label": "mood"}
    rows = [{"what was said": text, "mood": "up" if i % 2 else "down"} for i, text in enumerate(texts())]
    return [*write(folder, rows), *(f"data.{key}={name}" for key, name in labels.items())]


def image_classification(folder: Path) -> list[str]:
    transformers.ViTForImageClassification(make_config("vit")).save_pretrained(folder / "model")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for number in range(40):
        path = folder / "images" / f"kind{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(127 * (number % 2))
        Image.fromarray(pixels).save(path)
    return [f"data.train={folder / 'images'}", "data.holdout=0.2"]


def audio_classification(folder: Path) -> list[str]:
    transformers.Wav2Vec2ForSequenceClassification(make_config("wav2vec2")).save_pretrained(folder / "model")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=4000).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for number in range(40):
        path = folder / "sounds" / f"kind{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = generator.integers(-999, 999, 300 + 10 * number) * (1 + 20 * (number % 2))
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(4000)
            file.writeframes(samples.astype("<i2").tobytes())
    return [f"data.train={folder / 'sounds'}", "data.holdout=0.2"]


def token_classification(folder: Path) -> list[str]:
    save_model(folder, "bert")
    tags = {"film": "B-THING", "plot": "B-THING", "good": "B-VIEW", "bad": "B-VIEW"}
    split = [text.split() for text in texts()]
    return write(folder, [{"tokens": words, "ner_tags": [tags.get(word, "O") for word in words]} for words in split])


def question_answering(folder: Path) -> list[str]:
    save_model(folder, "bert")
    rows = []
    for number, text in enumerate(texts()):
        context = f"the film is {WORDS[number % 6]} . {text} {text}"
        answers = {"text": [WORDS[number % 6]], "answer_start": [12]}
        rows.append({"id": str(number), "question": "is the film good", "context": context, "answers": answers})
    return [*write(folder, rows), "data.max_length=24"]


def multiple_choice(folder: Path) -> list[str]:
    save_model(folder, "bert")
    rows = [
        {"sent1": text, "sent2": "the plot is", "ending0": WORDS[i % 6], "ending1": WORDS[(i + 1) % 6], "label": i % 2}
        for i, text in enumerate(texts())
    ]
    return write(folder, rows)


def masked_lm(folder: Path) -> list[str]:
    save_model(folder, "bert", "AutoModelForMaskedLM")
    (folder / "train.txt").write_text("\n".join(texts(60)))
    return [f"data.train={folder / 'train.txt'}", "data.max_length=16"]


def causal_lm(folder: Path) -> list[str]:
    save_model(folder, "llama", "AutoModelForCausalLM")
    (folder / "train.txt").write_text("\n".join(texts(90)))
    return [f"data.train={folder / 'train.txt'}", "data.max_length=16"]


def seq2seq(folder: Path) -> list[str]:
    save_model(folder, "t5", "AutoModelForSeq2SeqLM")
    rows = [{"article": text, "summary": " ".join(text.split()[:2])} for text in texts()]
    return [*write(folder, rows), "data.max_target_length=4"]


def sentence_embeddings(folder: Path) -> list[str]:
    save_model(folder, "bert")
    (folder / "train.txt").write_text("\n".join(texts()))
    return [
        f"data.train={folder / 'train.txt'}",
        "distill={task: {weight: 0}, logits: {weight: 0}, hidden: {weight: 1.0}}",
    ]


AUTO_CLASSES: dict[Callable[[Path], list[str]], str] = {
    text_classification: "AutoModelForSequenceClassification",
    image_classification: "AutoModelForImageClassification",
    audio_classification: "AutoModelForAudioClassification",
    token_classification: "AutoModelForTokenClassification",
    question_answering: "AutoModelForQuestionAnswering",
    multiple_choice: "AutoModelForMultipleChoice",
    masked_lm: "AutoModelForMaskedLM",
    causal_lm: "AutoModelForCausalLM",
    seq2seq: "AutoModelForSeq2SeqLM",
    sentence_embeddings: "AutoModel",
}
