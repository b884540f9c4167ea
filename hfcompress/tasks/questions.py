"""Questions whose answer stands in a context (extractive question answering): windows, spans, and SQuAD's two scores."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import DataCollatorWithPadding

from hfcompress.config import DataConfig
from hfcompress.tasks.columns import Columns, choose_column, is_list, is_string, require_distinct, told
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.labels import row_count
from hfcompress.tasks.scores import RatioScores
from hfcompress.tasks.sources import Source
from hfcompress.tasks.text import TokenizedInputs, length_limit, map_rows, padding_multiple, require_text

logger = logging.getLogger(__name__)

# Of encoded windows, what only finding the answers' texts needs: the row, the characters of each token, where "none" is.
NOTES = ("row", "offsets", "none_at")
POSITIONS = ("start_positions", "end_positions")
CANDIDATES = 20  # starts and ends that are tried with each other, as in SQuAD's reference implementations
LONGEST_ANSWER = 30  # tokens, also as there


class QuestionInputs(TokenizedInputs):
    """A question and a context, which is read in overlapping windows where it is long."""

    needs_words = True

    def load_processor(self, model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
        """Load the tokenizer; padding goes to the right, so that positions stay what they are."""
        tokenizer = super().load_processor(model_name, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer.padding_side = "right"
        return tokenizer

    def find_columns(self, features: Mapping[str, Any], config: DataConfig) -> Columns:
        """The columns of the question, the context and the answers.

        Raises:
            DataError: A column is not there, has the wrong type, or cannot be told from others.

        Example:
            >>> text, start = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int32"))
            >>> strings = dict.fromkeys(("id", "title", "context", "question"), datasets.Value("string"))
            >>> features = {**strings, "answers": {"text": text, "answer_start": start}}
            >>> QuestionInputs().find_columns(features, DataConfig(train="a.json"))
            Columns(label='answers', inputs=('question', 'context'), choices=())
        """
        names = told(config.text)
        if len(names) == 1:
            raise DataError("data.text: name two columns, the question's and the context's")
        wanted = {"fits": is_string, "wanted": "text"}
        question, context = (
            choose_column("data.text", what, features, name=names[i] if names else None, customary=customary, **wanted)  # type: ignore[arg-type]
            for i, (what, customary) in enumerate((("questions", ("question", "query")), ("contexts", _CONTEXTS)))
        )
        label = {"name": config.label, "customary": ("answers", "answer"), "fits": _holds_answers}
        answers = choose_column("data.label", "answers", features, **label, wanted=_ANSWERS)  # type: ignore[arg-type]
        require_distinct(question, context, answers)
        return Columns(answers, (question, context))

    def open(self, source: Source, columns: Columns, *, config: DataConfig) -> datasets.Dataset:
        """Check that each row has a question and a context; texts and starts of the answers as lists, empty where there is none."""
        del config
        rows = source.rows.with_format(None)
        for name in columns.inputs:
            require_text(rows, [name], where=source.name)
        question, context = (rows[name] for name in columns.inputs)
        answers = [_read_answers(value) for value in rows[str(columns.label)]]
        opened = {
            "question": [text.lstrip() for text in question],
            "context": list(context),
            "texts": [[text for text, _ in pairs] for pairs in answers],
            "starts": [[start for _, start in pairs] for pairs in answers],
        }
        odd = [
            row
            for row, (text, pairs) in enumerate(zip(opened["context"], answers, strict=True))
            if any(text[start : start + len(answer)] != answer for answer, start in pairs)
        ]
        if len(odd) == len(rows):
            raise DataError(
                f"{source.name}: no answer stands in its context at answer_start, counted in characters from 0"
            )
        if odd:
            logger.warning("%s: the answer is not at its place in the context in %s", source.name, row_count(odd))
        return datasets.Dataset.from_dict(opened, features=_OPENED)

    def encode(
        self,
        rows: datasets.Dataset,
        *,
        processor: Any,
        config: DataConfig,
        model_config: Any,
        where: str,
        seed: int = 0,
    ) -> datasets.Dataset:
        """Tokenize into windows that overlap by a quarter of the longest length, each with the positions of its answer."""
        del seed
        limit, _ = length_limit(processor, config=config, model_config=model_config)
        if limit < 24:
            raise DataError(f"data.max_length: {limit} tokens are too few for a question and a context; 24 or more are")
        encoded = map_rows(
            rows,
            tokenize_questions,
            config=config,
            where=where,
            with_indices=True,
            remove_columns=rows.column_names,
            fn_kwargs={"tokenizer": processor, "limit": limit},
        )
        logger.info("%s: %s questions in %s windows of %d tokens", where, f"{len(rows):,}", f"{len(encoded):,}", limit)
        return encoded

    def collator(self, processor: Any, *, config: DataConfig, model_config: Any) -> Callable[[list[Any]], Any]:
        """Pad each batch to its longest window."""
        multiple = padding_multiple(processor, config=config, model_config=model_config)
        return DataCollatorWithPadding(processor, pad_to_multiple_of=multiple)


_CONTEXTS = ("context", "passage", "paragraph", "document", "article", "text")
_ANSWERS = "answers (text and answer_start, each a list)"
_OPENED = datasets.Features(
    {
        "question": datasets.Value("string"),
        "context": datasets.Value("string"),
        "texts": datasets.List(datasets.Value("string")),
        "starts": datasets.List(datasets.Value("int64")),
    }
)


def _holds_answers(feature: Any) -> bool:
    inner = feature.feature if is_list(feature) else feature
    return isinstance(inner, dict) and {"text", "answer_start"} <= set(inner)


def _read_answers(value: Any) -> list[tuple[str, int]]:
    """Text and start of each answer, from a dict of lists (as in SQuAD on the Hub), a list of dicts, or a single dict."""
    if value is None:
        return []
    if isinstance(value, list):
        return [(answer["text"], answer["answer_start"]) for answer in value]
    texts, starts = value["text"], value["answer_start"]
    if texts is None or isinstance(texts, str):
        return [] if texts is None else [(texts, starts)]
    return list(zip(texts, starts, strict=True))


def tokenize_questions(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], *, tokenizer: Any, limit: int
) -> dict[str, Any]:
    """Tokenize questions with their contexts, in windows.

    Args:
        batch: Columns "question", "context", and the lists "texts" and "starts" of the answers.
        indices: Numbers of the rows.
        tokenizer: A fast Hugging Face tokenizer.
        limit: Longest length in tokens; windows overlap by a quarter of it. At most half of it is the question.

    Returns:
        What the tokenizer returns for each window; `POSITIONS`, the first and last token of the first answer, or the place that means
        "none" where the window does not hold it; and `NOTES`, offsets being -1 outside of the context.
    """
    heads = tokenizer(
        list(batch["question"]),
        add_special_tokens=False,
        truncation=True,
        max_length=limit // 2,
        return_offsets_mapping=True,
    )["offset_mapping"]
    questions = [text[: spans[-1][1]] for text, spans in zip(batch["question"], heads, strict=True)]
    encoding = tokenizer(
        questions,
        list(batch["context"]),
        truncation="only_second",
        max_length=limit,
        stride=limit // 4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    samples, offsets = encoding.pop("overflow_to_sample_mapping"), encoding.pop("offset_mapping")
    found: dict[str, list[Any]] = {name: [] for name in (*POSITIONS, *NOTES)}
    for window, sample in enumerate(samples):
        ids = encoding["input_ids"][window]
        none_at = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        inside = [part == 1 for part in encoding.sequence_ids(window)]
        spans = [
            list(span) if of_context else [-1, -1] for span, of_context in zip(offsets[window], inside, strict=True)
        ]
        texts, starts = batch["texts"][sample], batch["starts"][sample]
        span = _tokens_of(spans, starts[0], starts[0] + len(texts[0])) if texts else None
        first, last = (none_at, none_at) if span is None else span
        for name, value in zip(found, (first, last, indices[sample], spans, none_at), strict=True):
            found[name].append(value)
    return {**encoding, **found}


def _tokens_of(spans: Sequence[Sequence[int]], start: int, end: int) -> tuple[int, int] | None:
    """First and last token of some characters of the context; None where they are not all in the window."""
    inside = [token for token, span in enumerate(spans) if span[0] >= 0]
    if not inside or spans[inside[0]][0] > start or spans[inside[-1]][1] < end:
        return None
    tokens = [token for token in inside if spans[token][1] > start and spans[token][0] < end]
    return (tokens[0], tokens[-1]) if tokens else None


def normalize_answer(text: str) -> str:
    """An answer as SQuAD compares it: in small letters, without punctuation, articles and repeated spaces.

    Example:
        >>> normalize_answer("The  U.S. Army!")
        'us army'
    """
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where an answer is one of the true ones, else 0 (Rajpurkar et al. 2016, section 6.1); no truth means that "" is true.

    Example:
        >>> exact_match("the cat", ["Cat.", "dog"]), exact_match("cat", [])
        (1.0, 0.0)
    """
    return float(any(normalize_answer(answer) == normalize_answer(truth) for truth in truths or [""]))


def overlap_f1(answer: str, truths: Sequence[str]) -> float:
    """F1 of the words of an answer against those of the true answer that it is closest to (as `exact_match`).

    Example:
        >>> round(overlap_f1("the black cat", ["a cat", "black dog"]), 4)  # one of two words, against one of one
        0.6667
    """
    return max(_word_f1(normalize_answer(answer).split(), normalize_answer(truth).split()) for truth in truths or [""])


def _word_f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


@dataclass(frozen=True)
class AnswerScores(RatioScores):
    """Exact match and F1 of the answers' texts, found over all windows of a context, as in SQuAD 1.1 and 2.0.

    Attributes:
        rows: Opened evaluation rows.
        windows: Their encoded windows, with `NOTES`.
    """

    rows: datasets.Dataset
    windows: datasets.Dataset
    metric_name: str = "f1"
    in_order: ClassVar[bool] = True

    def run(self, model: nn.Module, inputs: Mapping[str, Any], labels: Any) -> Any:
        """Logits of start and end, each of shape (batch, length)."""
        del labels
        outputs = model(**inputs)
        return outputs["start_logits"], outputs["end_logits"]

    def reduce(self, outputs: Any, labels: Any) -> Any:
        """Logits of start and end."""
        del labels
        return tuple(outputs[:2])

    def parts(self, outputs: Any, labels: Any) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Both scores of each question.

        Raises:
            DataError: The windows did not come in their order.
        """
        for name, column in zip(POSITIONS, labels, strict=True):
            if not np.array_equal(np.asarray(self.windows[name]), np.asarray(column)):
                raise DataError(
                    "the windows of contexts were evaluated in another order than that of the data;"
                    " leave out train_sampling_strategy: group_by_length"
                )
        truths = list(self.rows["texts"])
        answers = self.find_answers(*(np.asarray(side) for side in outputs[:2]))
        exact = np.array([exact_match(*pair) for pair in zip(answers, truths, strict=True)])
        overlap = np.array([overlap_f1(*pair) for pair in zip(answers, truths, strict=True)])
        ones = np.ones(len(truths))
        return {"f1": (overlap, ones), "exact_match": (exact, ones)}

    def find_answers(self, starts: NDArray[Any], ends: NDArray[Any]) -> list[str]:
        """The text of the likeliest answer to each question; "" where none is likelier and some question has none.

        Args:
            starts: Logits of each window, shape (windows, length or longer).
            ends: The same of the end.
        """
        contexts, optional = self.rows["context"], not all(self.rows["texts"])
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(self.rows)
        none = np.full(len(self.rows), np.inf)
        for window, start, end in zip(self.windows, starts, ends, strict=True):
            row, spans = window["row"], np.asarray(window["offsets"])
            none[row] = min(none[row], start[window["none_at"]] + end[window["none_at"]])
            score, first, last = best_span(start[: len(spans)], end[: len(spans)], allowed=spans[:, 0] >= 0)
            if score > best[row][0]:
                best[row] = (score, contexts[row][spans[first, 0] : spans[last, 1]])
        return ["" if optional and none[row] > score else text for row, (score, text) in enumerate(best)]


def best_span(start: NDArray[Any], end: NDArray[Any], *, allowed: NDArray[np.bool_]) -> tuple[float, int, int]:
    """The first and last token with the highest sum of logits, of `CANDIDATES` starts and ends and at most `LONGEST_ANSWER` tokens.

    Args:
        start: Logits, shape (length,).
        end: Logits, shape (length,).
        allowed: Tokens that can be part of an answer, shape (length,).

    Returns:
        The sum, the first and the last token; the sum is minus infinity where there is no span.

    Example:
        >>> best_span(np.array([0.0, 3.0, 1.0]), np.array([5.0, 0.0, 2.0]), allowed=np.array([True, True, True]))
        (5.0, 1, 2)
    """
    firsts, lasts = (
        np.argsort(np.where(allowed, logits, -np.inf))[::-1][: min(CANDIDATES, int(allowed.sum()))]
        for logits in (start, end)
    )
    lengths = lasts[None, :] - firsts[:, None] + 1
    sums = np.where((lengths > 0) & (lengths <= LONGEST_ANSWER), start[firsts][:, None] + end[lasts][None, :], -np.inf)
    if not sums.size or not np.isfinite(sums.max()):
        return -np.inf, 0, 0
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    return float(sums.max()), int(firsts[first]), int(lasts[last])
