"""From a recipe's `data` section and a model's name to everything a Trainer needs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
from tqdm.auto import tqdm
from transformers import AutoConfig

from hfcompress.config import DataConfig
from hfcompress.tasks import labels as meaning
from hfcompress.tasks.columns import Columns, detect_columns
from hfcompress.tasks.errors import DataError, first_line, unknown_name
from hfcompress.tasks.image import ImageInputs
from hfcompress.tasks.inputs import Inputs
from hfcompress.tasks.labels import Head, LabelColumn, Labels, ProblemType
from hfcompress.tasks.scores import MAIN_METRIC, MetricFunction, Scores, load_metric
from hfcompress.tasks.sources import Source, read_sources
from hfcompress.tasks.splits import hold_out, take
from hfcompress.tasks.text import TextInputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskSpec:
    """What one task needs that another does not.

    Attributes:
        auto_class: Name of the class of transformers that loads its models.
        inputs: How its inputs are read, checked and encoded.
    """

    auto_class: str
    inputs: Inputs


TASKS: Mapping[str, TaskSpec] = {
    "text-classification": TaskSpec("AutoModelForSequenceClassification", TextInputs()),
    "image-classification": TaskSpec("AutoModelForImageClassification", ImageInputs()),
}


@dataclass(frozen=True)
class PreparedTask:
    """What a Trainer, and whoever loads the model for it, needs.

    Attributes:
        train_dataset: Encoded training examples; columns are what forward() takes, and "labels".
        eval_dataset: The same to evaluate on.
        processing_class: The tokenizer or image processor.
        data_collator: Makes a batch of examples; texts are padded to the longest of the batch.
        label_names: The classes in the order of the outputs; for regression the name of the quantity.
        problem_type: "single_label_classification", "multi_label_classification" or "regression".
        compute_metrics: Takes an `EvalPrediction`, returns named numbers.
        metric_name: The one of these that counts (higher is better for the built-in ones).
        auto_class: Name of the class of transformers that loads the model.
        model_kwargs: Passed to its `from_pretrained`: number and names of the classes and kind of problem; and, only
            where needed, leave to replace the output layer (`ignore_mismatched_sizes`) and `pad_token_id`.
        fingerprint: First 16 hexadecimal digits of the SHA-256 of the evaluation data (inputs as stored and names of
            the labels, in order): the same on every machine and in every run.
    """

    train_dataset: datasets.Dataset
    eval_dataset: datasets.Dataset
    processing_class: Any
    data_collator: Callable[[list[Any]], Any]
    label_names: list[str]
    problem_type: ProblemType
    compute_metrics: Scores
    metric_name: str
    auto_class: str
    model_kwargs: dict[str, Any]
    fingerprint: str

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
        Columns(label='mood', text=('utterance',), image=None)
    """
    rows = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    return detect_columns(rows.features, config, find_task(task).inputs.kind)


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
    train, evaluation = read_sources(config, kind=find_task(task).inputs.kind)
    column = find_columns(train.rows, config, task).label
    train_labels = meaning.read_labels(train.rows, column, where=train.name)
    return _split(train.rows, evaluation.rows if evaluation else None, train_labels, config, seed)


def _split(
    train: datasets.Dataset, evaluation: datasets.Dataset | None, labels: LabelColumn, config: DataConfig, seed: int
) -> datasets.DatasetDict:
    """Hold rows out where there are none to evaluate on, then take random parts."""
    sizes = len(train), len(evaluation) if evaluation is not None else 0
    if evaluation is None:
        classes = labels.values if labels.problem_type == "single_label_classification" else None
        kept, held = hold_out(len(train), share=config.holdout, seed=seed, classes=classes)
        train, evaluation = train.select(kept), train.select(held)
    for_train = take(len(train), limit=config.max_train, seed=seed, stream=1)
    for_eval = take(len(evaluation), limit=config.max_eval, seed=seed, stream=2)
    train = train if for_train is None else train.select(for_train)
    evaluation = evaluation if for_eval is None else evaluation.select(for_eval)
    logger.info(
        "data: %s examples to train on of %s, %s to evaluate on %s",
        f"{len(train):,}",
        f"{sizes[0]:,}",
        f"{len(evaluation):,}",
        f"of {sizes[1]:,}" if sizes[1] else "(held out of the training data)",
    )
    return datasets.DatasetDict({"train": train, "eval": evaluation})


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
    r"""Read the data, bring the labels into the model's order, and encode everything.

    Args:
        config: The `data` section of a recipe.
        task: A key of `TASKS`.
        model_name: Folder or Hub repository of the model, whose tokenizer or image processor is used.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run code from the repository.
        seed: Of what is held out and of the random parts taken.
        must_match: The model's outputs are used as they are (a teacher), so they must fit the labels.
        label_names: Names and order of the classes to follow instead of the model's own, such as those of the
            teacher; they must fit the labels.
        metric: Name or path of a metric of `evaluate`, or a function of predictions and labels, instead of the
            built-in metrics.
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
        model_config = _load_config(model_name, revision=revision, trust_remote_code=trust_remote_code)
        head = meaning.read_head(model_config, model=model_name, suffix=spec.auto_class.removeprefix("AutoModel"))
        followed = head if label_names is None else Head("label_names", len(label_names), tuple(label_names))
        data, columns, labels = _open(config, spec, seed, followed, must_match or label_names is not None)
        processor = spec.inputs.load_processor(model_name, revision=revision, trust_remote_code=trust_remote_code)
        encoded = {
            split: spec.inputs.encode(
                rows, columns=columns, processor=processor, config=config, model_config=model_config, where=split
            )
            for split, rows in data.items()
        }
        fingerprint = _fingerprint(data["eval"], spec.inputs, columns, labels)
    return PreparedTask(
        train_dataset=encoded["train"],
        eval_dataset=encoded["eval"],
        processing_class=processor,
        data_collator=spec.inputs.collator(processor, config=config, model_config=model_config),
        label_names=list(labels.names),
        problem_type=labels.problem_type,
        compute_metrics=Scores(labels.problem_type, function),
        metric_name=_metric_name(metric, labels.problem_type),
        auto_class=spec.auto_class,
        model_kwargs=_model_kwargs(labels, head) | spec.inputs.model_kwargs(processor, model_config),
        fingerprint=fingerprint,
    )


def _open(
    config: DataConfig, spec: TaskSpec, seed: int, head: Head, must_match: bool
) -> tuple[datasets.DatasetDict, Columns, Labels]:
    """Both splits with their inputs checked and a column "labels" in the order of the model's outputs."""
    train, evaluation = read_sources(config, kind=spec.inputs.kind)
    columns = detect_columns(train.rows.features, config, spec.inputs.kind)
    train_labels = meaning.read_labels(train.rows, columns.label, where=train.name)
    # All rows count and not only those taken: which classes there are must not depend on max_train and the seed.
    labels = meaning.find_classes(train_labels, quantity=columns.label)
    labels = meaning.follow_head(labels, head, must_match=must_match)
    opened: list[datasets.Dataset | None] = []
    for source in (train, evaluation):
        opened.append(None if source is None else _labelled(source, columns, labels, spec.inputs, train))
    data = _split(cast(datasets.Dataset, opened[0]), opened[1], train_labels, config, seed)
    if labels.problem_type == "regression":
        values = np.asarray(data["eval"]["labels"])
        if len(values) < 4 or np.ptp(values) == 0:
            raise DataError(f"data: a correlation needs 4 or more different evaluation labels, got {len(values)} rows")
    return data, columns, labels


def _labelled(source: Source, columns: Columns, labels: Labels, inputs: Inputs, train: Source) -> datasets.Dataset:
    """The inputs of a split, checked, and their encoded labels."""
    for name in columns.all:
        if name not in source.rows.features:
            raise DataError(
                f"{source.name}: has no column {name!r}, which {train.name} has;"
                f" there are: {', '.join(source.rows.column_names)}"
            )
    column = meaning.read_labels(source.rows, columns.label, where=source.name)
    encoded = meaning.encode_split(column, labels)
    rows = inputs.open(source, columns)
    return rows.add_column("labels", encoded)


def _load_config(model_name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(model_name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{model_name}: its configuration cannot be loaded: {first_line(error)}") from error


def _model_kwargs(labels: Labels, head: Head) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "num_labels": len(labels.names),
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: i for i, name in enumerate(labels.names)},
        "problem_type": labels.problem_type,
    }
    if head.size not in (None, len(labels.names)):
        kwargs["ignore_mismatched_sizes"] = True
    return kwargs


def _metric_name(metric: str | MetricFunction | None, problem_type: ProblemType) -> str:
    """Metrics of evaluate return their number under their own name; a path's last part is that name."""
    if metric is None:
        return MAIN_METRIC[problem_type]
    if isinstance(metric, str):
        return metric.rstrip("/").rsplit("/", 1)[-1].removesuffix(".py")
    return getattr(metric, "name", getattr(metric, "__name__", "metric"))


def _fingerprint(rows: datasets.Dataset, inputs: Inputs, columns: Columns, labels: Labels) -> str:
    """Hash of inputs and label names, in order. Names and not numbers: these depend on the model's order."""
    digest = hashlib.sha256()
    contents = tqdm(inputs.contents(rows, columns), total=len(rows), desc="hashing eval", leave=False, delay=2)
    for content, label in zip(contents, rows["labels"], strict=True):
        digest.update(len(content).to_bytes(8, "little") + content)
        if labels.problem_type == "single_label_classification":
            name = labels.keys[label]
        elif labels.problem_type == "regression":
            name = repr(float(label))
        else:
            name = "\x1f".join(sorted(key for key, flag in zip(labels.keys, label, strict=True) if flag))
        digest.update(len(name.encode()).to_bytes(8, "little") + name.encode())
    return digest.hexdigest()[:16]
