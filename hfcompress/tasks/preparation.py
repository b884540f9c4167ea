"""From a recipe's `data` section and a model's name to everything a Trainer needs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import datasets
import numpy as np
from tqdm.auto import tqdm
from transformers import AutoConfig

from hfcompress.config import DataConfig
from hfcompress.tasks import labels as meaning
from hfcompress.tasks.audio import AudioInputs
from hfcompress.tasks.choices import ChoiceInputs
from hfcompress.tasks.columns import Columns, with_parts
from hfcompress.tasks.errors import DataError, loading, unknown_name
from hfcompress.tasks.image import ImageInputs
from hfcompress.tasks.inputs import Inputs
from hfcompress.tasks.labels import Head, LabelColumn, Labels, ProblemType
from hfcompress.tasks.language import LanguageInputs, MaskedInputs, UnlabelledInputs
from hfcompress.tasks.questions import NOTES, POSITIONS, AnswerScores, QuestionInputs
from hfcompress.tasks.scores import EmbeddingScores, MetricFunction, Scores, Scoring, TokenScores, load_metric
from hfcompress.tasks.sources import Source, read_sources
from hfcompress.tasks.splits import hold_out, take
from hfcompress.tasks.text import TextInputs
from hfcompress.tasks.words import TagScores, WordInputs
from hfcompress.tasks.writing import WritingInputs, WritingScores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """What scores may have to know of the evaluation data.

    Attributes:
        labels: The classes, or None for tasks without.
        processor: The tokenizer, image processor or feature extractor.
        config: The `data` section of a recipe.
        rows: Opened rows.
        encoded: The same, encoded.
        metric: A metric to use in place of our own, or None.
    """

    labels: Labels | None
    processor: Any
    config: DataConfig
    rows: datasets.Dataset
    encoded: datasets.Dataset
    metric: MetricFunction | None


@dataclass(frozen=True)
class TaskSpec:
    """What one task needs that another does not.

    Attributes:
        auto_class: Name of the class of transformers that loads its models.
        inputs: How its inputs are read, checked and encoded.
        scores: What scores its models.
        classes: Whether the label column holds classes to be found in the data: one for each "row" (or several, or a
            quantity), or one for each "word"; None where it holds something else, or there is none.
        heads: What the names of fine-tuned models contain; None means the last part of the auto class.
        label_columns: What forward() calls the labels; none where nothing is to be learned without a teacher.
        generates: Whether a model's answer has to be generated, token by token.
    """

    auto_class: str
    inputs: Inputs
    scores: Callable[[Evaluated], Scoring]
    classes: Literal["row", "word"] | None = None
    heads: tuple[str, ...] | None = None
    label_columns: tuple[str, ...] = ("labels",)
    generates: bool = False


def _score_classes(data: Evaluated) -> Scores:
    kind = "single_label_classification" if data.labels is None else data.labels.problem_type
    return Scores(cast(ProblemType, kind), data.metric)


TASKS: Mapping[str, TaskSpec] = {
    "text-classification": TaskSpec("AutoModelForSequenceClassification", TextInputs(), _score_classes, "row"),
    "image-classification": TaskSpec("AutoModelForImageClassification", ImageInputs(), _score_classes, "row"),
    "audio-classification": TaskSpec(
        "AutoModelForAudioClassification",
        AudioInputs(),
        _score_classes,
        "row",
        heads=("ForSequenceClassification", "ForAudioClassification"),
    ),
    "token-classification": TaskSpec(
        "AutoModelForTokenClassification",
        WordInputs(),
        lambda data: TagScores(cast(Labels, data.labels).names),
        "word",
    ),
    "question-answering": TaskSpec(
        "AutoModelForQuestionAnswering",
        QuestionInputs(),
        lambda data: AnswerScores(data.rows, data.encoded),
        label_columns=POSITIONS,
    ),
    "multiple-choice": TaskSpec("AutoModelForMultipleChoice", ChoiceInputs(), _score_classes),
    "fill-mask": TaskSpec("AutoModelForMaskedLM", MaskedInputs(), lambda _: TokenScores(shifted=False)),
    "text-generation": TaskSpec(
        "AutoModelForCausalLM",
        LanguageInputs(),
        lambda _: TokenScores(shifted=True),
        heads=("ForCausalLM", "LMHeadModel"),
    ),
    "text2text-generation": TaskSpec(
        "AutoModelForSeq2SeqLM",
        WritingInputs(),
        # The decoder's start token counts as one.
        lambda data: WritingScores(data.processor, data.config.max_target_length + 1),
        heads=("ForConditionalGeneration",),
        generates=True,
    ),
    "feature-extraction": TaskSpec(
        "AutoModel", UnlabelledInputs(), lambda _: EmbeddingScores(), heads=("",), label_columns=()
    ),
}


@dataclass(frozen=True)
class PreparedTask:
    """What a Trainer, and whoever loads the model for it, needs.

    Attributes:
        train_dataset: Encoded training examples; columns are what forward() takes, and labels.
        eval_dataset: The same to evaluate on.
        processing_class: The tokenizer, image processor or feature extractor.
        data_collator: Makes a batch of examples; texts are padded to the longest of the batch.
        label_names: The classes in the order of the outputs; for regression the name of the quantity; empty for tasks without classes.
        problem_type: "single_label_classification", "multi_label_classification" or "regression" of whole inputs; None for other tasks.
        compute_metrics: Takes an `EvalPrediction`, returns named numbers.
        metric_name: The one of these that counts.
        auto_class: Name of the class of transformers that loads the model.
        model_kwargs: Passed to its `from_pretrained`: number and names of the classes and kind of problem; and, only
            where needed, leave to replace the output layer (`ignore_mismatched_sizes`) and `pad_token_id`.
        fingerprint: First 16 hexadecimal digits of the SHA-256 of the evaluation data (inputs as stored and names of
            the labels, in order): the same on every machine and in every run.
        label_columns: What forward() calls the labels; none where nothing is to be learned without a teacher.
        generates: Whether a `Seq2SeqTrainer` has to generate the answers that are scored.
        max_length: Tokens or samples of the longest example there can be; None where all are of one size (images).
    """

    train_dataset: datasets.Dataset
    eval_dataset: datasets.Dataset
    processing_class: Any
    data_collator: Callable[[list[Any]], Any]
    label_names: list[str]
    problem_type: ProblemType | None
    compute_metrics: Scoring
    metric_name: str
    auto_class: str
    model_kwargs: dict[str, Any]
    fingerprint: str
    label_columns: tuple[str, ...] = ("labels",)
    generates: bool = False
    max_length: int | None = None

    @property
    def preprocess_logits_for_metrics(self) -> Callable[[Any, Any], Any]:
        """Keeps of a batch's outputs what `compute_metrics` needs: of a language model two numbers, not a vocabulary per token."""
        return self.compute_metrics.reduce

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class by its number."""
        return dict(enumerate(self.label_names))

    @property
    def label2id(self) -> dict[str, int]:
        """Number of each class by its name."""
        return {name: i for i, name in enumerate(self.label_names)}


def find_task(task: str) -> TaskSpec:
    """Look up a task.

    Raises:
        DataError: There is no such task.

    Example:
        >>> find_task("text-classification").auto_class
        'AutoModelForSequenceClassification'
    """
    if task not in TASKS:
        raise unknown_name("task", "task", task, TASKS)
    return TASKS[task]


def find_columns(dataset: datasets.Dataset | datasets.DatasetDict, config: DataConfig, task: str) -> Columns:
    """Which columns hold the inputs and the labels.

    Args:
        dataset: The data; of several splits the first counts.
        config: The `data` section of a recipe; columns it names are checked, the others are found by type and by
            customary name.
        task: A key of `TASKS`.

    Returns:
        The columns.

    Raises:
        DataError: A column is not there, has the wrong type, or there is doubt; the message lists the columns.

    Example:
        >>> rows = datasets.Dataset.from_dict({"utterance": ["hi"], "mood": [3]})
        >>> find_columns(rows, DataConfig(train="moods.csv"), "text-classification")
        Columns(label='mood', inputs=('utterance',), choices=())
    """
    rows = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    return find_task(task).inputs.find_columns(rows.features, config)


def load_data(config: DataConfig, *, task: str, seed: int) -> datasets.DatasetDict:
    r"""Read the data as they are, with all columns, split and limited as asked.

    Args:
        config: The `data` section of a recipe.
        task: A key of `TASKS`.
        seed: Of what is held out (stratified by class) and of the random parts taken.

    Returns:
        Splits "train" and "eval".

    Raises:
        DataError: Something cannot be found or read, a label is missing, or a column cannot be told.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "mails.csv")
        ...     _ = file.write_text("mail,verdict\n" + "buy now,spam\nsee you,ham\n" * 10)
        ...     data = load_data(DataConfig(train=str(file), label="verdict"), task="text-classification", seed=0)
        >>> data.num_rows, sorted(data["eval"]["verdict"])
        ({'train': 18, 'eval': 2}, ['ham', 'spam'])
    """
    spec = find_task(task)
    train, evaluation = read_sources(config, kind=spec.inputs.kind)
    column = find_columns(train.rows, config, task).label
    classes = (
        _classes(meaning.read_labels(train.rows, str(column), where=train.name)) if spec.classes == "row" else None
    )
    return _split(train.rows, evaluation.rows if evaluation else None, classes, config, seed)


def _classes(labels: LabelColumn) -> Sequence[Any] | None:
    """The class of each row, if it has one."""
    return labels.values if labels.problem_type == "single_label_classification" else None


def _split(
    train: datasets.Dataset,
    evaluation: datasets.Dataset | None,
    classes: Sequence[Any] | None,
    config: DataConfig,
    seed: int,
) -> datasets.DatasetDict:
    """Hold rows out where there are none to evaluate on, then take random parts."""
    sizes = len(train), len(evaluation) if evaluation is not None else 0
    if evaluation is None:
        kept, held = hold_out(len(train), share=config.holdout, seed=seed, classes=classes)
        train, evaluation = train.select(kept), train.select(held)
    data = _take(datasets.DatasetDict({"train": train, "eval": evaluation}), config, seed)
    logger.info(
        "data: %s examples to train on of %s, %s to evaluate on %s",
        f"{len(data['train']):,}",
        f"{sizes[0]:,}",
        f"{len(data['eval']):,}",
        f"of {sizes[1]:,}" if sizes[1] else "(held out of the training data)",
    )
    return data


def _take(data: datasets.DatasetDict, config: DataConfig, seed: int) -> datasets.DatasetDict:
    """Random parts, where less than all is asked for."""
    limits = {"train": config.max_train, "eval": config.max_eval}
    parts = {}
    for stream, (split, rows) in enumerate(data.items(), start=1):
        chosen = take(len(rows), limit=limits[split], seed=seed, stream=stream)
        parts[split] = rows if chosen is None else rows.select(chosen)
    return datasets.DatasetDict(parts)


def _split_text(train: datasets.Dataset, evaluation: datasets.Dataset | None, share: float) -> datasets.DatasetDict:
    """Hold the last rows of a long text out where there is nothing to evaluate on."""
    if evaluation is not None:
        return datasets.DatasetDict({"train": train, "eval": evaluation})
    held = min(max(1, round(share * len(train))), len(train) - 1)
    if held < 1:
        raise DataError("data: 1 row is too few to hold some out for evaluation; give data.eval")
    kept = len(train) - held
    return datasets.DatasetDict({"train": train.select(range(kept)), "eval": train.select(range(kept, len(train)))})


def prepare(
    config: DataConfig,
    *,
    task: str,
    model_name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 42,
    must_match: bool = False,
    label_names: Sequence[str] | None = None,
    metric: str | MetricFunction | None = None,
    main_first: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> PreparedTask:
    r"""Read the data, bring labels that are classes into the model's order, and encode everything.

    Args:
        config: The `data` section of a recipe.
        task: A key of `TASKS`.
        model_name: Folder or Hub repository of the model, whose tokenizer, image processor or feature extractor is used.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run code from the repository.
        seed: Of what is held out and of the random parts taken.
        must_match: The model's outputs are used as they are (a teacher), so they must fit the labels.
        label_names: Names and order of the classes to follow instead of the model's own, such as those of the
            teacher; they must fit the labels. Tasks without classes pass them over.
        metric: Name or path of a metric of `evaluate`, or a function of predictions and labels, instead of the
            built-in metrics; for classification.
        main_first: Returns a context in which the main process goes first and the others find its cached work, such as
            `TrainingArguments.main_process_first`.

    Returns:
        What a Trainer needs.

    Raises:
        DataError: One line that says what cannot be used, and what to do.

    Example:
        >>> import tempfile, pathlib
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, PreTrainedTokenizerFast
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vocabulary = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
        ...     words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        ...     words.pre_tokenizer = pre_tokenizers.Whitespace()
        ...     tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        ...     _ = tokenizer.save_pretrained(folder)
        ...     BertConfig(vocab_size=5).save_pretrained(folder)
        ...     file = pathlib.Path(folder, "films.csv")
        ...     _ = file.write_text("review,mood\n" + "good film,happy\nbad,sad\n" * 10)
        ...     data = DataConfig(train=str(file))
        ...     prepared = prepare(data, task="text-classification", model_name=folder)
        >>> prepared.label_names, prepared.train_dataset[0]["input_ids"], prepared.train_dataset[0]["labels"]
        (['happy', 'sad'], [2, 4], 0)
        >>> prepared.data_collator([prepared.train_dataset[i] for i in (0, 1)])["input_ids"].shape
        torch.Size([2, 8])
    """
    spec = find_task(task)
    with main_first():
        function = load_metric(metric) if isinstance(metric, str) else metric
        if function is not None and spec.scores is not _score_classes:
            raise DataError(f"metric: {task} is scored in its own way; leave the metric out")
        model_config = _load_config(model_name, revision=revision, trust_remote_code=trust_remote_code)
        endings = (spec.auto_class.removeprefix("AutoModel"),) if spec.heads is None else spec.heads
        head = meaning.read_head(model_config, model=model_name, endings=endings)
        followed = head if label_names is None else Head("label_names", len(label_names), tuple(label_names))
        data, labels = _open(config, spec, seed, followed, must_match or label_names is not None)
        processor = spec.inputs.load_processor(model_name, revision=revision, trust_remote_code=trust_remote_code)
        encoded = datasets.DatasetDict(
            {
                split: spec.inputs.encode(
                    rows, processor=processor, config=config, model_config=model_config, where=split, seed=seed
                )
                for split, rows in data.items()
            }
        )
        if spec.inputs.is_one_text(data["train"]):
            encoded = _take(encoded, config, seed)
        fingerprint = _fingerprint(data["eval"], spec.inputs, labels)
    scores = spec.scores(Evaluated(labels, processor, config, data["eval"], encoded["eval"], function))
    if notes := [name for name in NOTES if name in encoded["eval"].column_names]:
        encoded = encoded.remove_columns(notes)
    classes = {} if labels is None else _model_kwargs(labels, head)
    return PreparedTask(
        train_dataset=encoded["train"],
        eval_dataset=encoded["eval"],
        processing_class=processor,
        data_collator=spec.inputs.collator(processor, config=config, model_config=model_config),
        label_names=[] if labels is None else list(labels.names),
        problem_type=scores.problem_type if isinstance(scores, Scores) else None,
        compute_metrics=scores,
        metric_name=scores.metric_name,
        auto_class=spec.auto_class,
        model_kwargs=classes | spec.inputs.model_kwargs(processor, model_config),
        fingerprint=fingerprint,
        label_columns=spec.label_columns,
        generates=spec.generates,
        max_length=spec.inputs.longest(processor, config=config, model_config=model_config),
    )


def _open(
    config: DataConfig, spec: TaskSpec, seed: int, head: Head, must_match: bool
) -> tuple[datasets.DatasetDict, Labels | None]:
    """Both splits with their inputs checked; where there are classes, with a column "labels" in the order of the model's outputs."""
    train, evaluation = read_sources(config, kind=spec.inputs.kind)
    columns = spec.inputs.find_columns(train.rows.features, config)
    sources = [source for source in (train, evaluation) if source is not None]
    for source in sources:
        _require_columns(source, columns, like=train)
    labels, classes = None, None
    if spec.classes is not None:
        columns_of = [
            meaning.read_labels(source.rows, str(columns.label), where=source.name, by_word=spec.classes == "word")
            for source in sources
        ]
        if evaluation is not None:
            meaning.warn_of_one_class(columns_of[-1])
        # All rows count and not only those taken: which classes there are must not depend on max_train and the seed.
        labels = meaning.follow_head(
            meaning.find_classes(columns_of[0], quantity=str(columns.label)), head, must_match=must_match
        )
        classes = _classes(columns_of[0])
    elif must_match and head.size is None:
        raise DataError(f"{head.model}: is not fine-tuned on such a task (it has no output layer); fine-tune it first")
    opened = [spec.inputs.open(source, columns, config=config) for source in sources]
    if labels is not None:
        encoded = [meaning.encode_split(column, labels) for column in columns_of]
        opened = [rows.add_column("labels", each) for rows, each in zip(opened, encoded, strict=True)]
    opened_eval = opened[1] if len(opened) > 1 else None
    if spec.inputs.is_one_text(opened[0]):
        return _split_text(opened[0], opened_eval, config.holdout), labels
    data = _split(opened[0], opened_eval, classes, config, seed)
    if labels is not None and labels.problem_type == "regression":
        values = np.asarray(data["eval"]["labels"])
        if len(values) < 4 or np.ptp(values) == 0:
            raise DataError(f"data: a correlation needs 4 or more different evaluation labels, got {len(values)} rows")
    return data, labels


def _require_columns(source: Source, columns: Columns, *, like: Source) -> None:
    there = with_parts(source.rows.features)
    for name in columns.all:
        if name not in there:
            raise DataError(
                f"{source.name}: has no column {name!r}, which {like.name} has;"
                f" there are: {', '.join(source.rows.column_names)}"
            )


def _load_config(model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    with loading(f"{model_name}: its configuration"):
        return AutoConfig.from_pretrained(model_name, revision=revision, trust_remote_code=trust_remote_code)


def _model_kwargs(labels: Labels, head: Head) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "num_labels": len(labels.names),
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: i for i, name in enumerate(labels.names)},
    }
    if labels.problem_type != "class_per_word":
        kwargs["problem_type"] = labels.problem_type
    if head.size not in (None, len(labels.names)):
        kwargs["ignore_mismatched_sizes"] = True
    return kwargs


def _fingerprint(rows: datasets.Dataset, inputs: Inputs, labels: Labels | None) -> str:
    """Hash of inputs and label names, in order. Names and not numbers: these depend on the model's order."""
    digest = hashlib.sha256()
    names = [""] * len(rows) if labels is None else [labels.name(label) for label in rows["labels"]]
    rows = rows if labels is None else rows.remove_columns("labels")
    contents = tqdm(inputs.contents(rows), total=len(rows), desc="hashing eval", leave=False, delay=2)
    for content, name in zip(contents, names, strict=True):
        digest.update(len(content).to_bytes(8, "little") + content)
        digest.update(len(name.encode()).to_bytes(8, "little") + name.encode())
    return digest.hexdigest()[:16]
