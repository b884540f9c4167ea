"""What a run can be told: typed sections, and the recipe (one YAML file) that composes them.

Every value is checked when it is read. What is wrong is said in one line: file, key, what is allowed,
and the nearest right name.
"""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

UnitKind = Literal["heads", "neurons", "sublayers", "layers"]
CriterionName = Literal[
    "obs",
    "first_order",
    "taylor",
    "fisher",
    "fisher_block",
    "hessian",
    "movement",
    "magnitude",
    "magnitude_l1",
    "activation_mean",
    "activation_variance",
    "activation_apoz",
    "random",
    "learned",
]
Preset = Literal["int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]
Task = Literal["text-classification", "image-classification"]


class RecipeError(ValueError):
    """A recipe says something that is not allowed; the message is one line that names file and key."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # keys and values may hold line breaks


class Section(BaseModel):
    """Base of every part of a recipe: immutable, strict about types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class TaskTerm(Section):
    """The loss on the labels, as the model itself computes it.

    Attributes:
        weight: Factor of the term in the sum, at least 0.
    """

    weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)


class LogitsTerm(Section):
    """Kullback-Leibler divergence from the teacher's to the student's softened distribution.

    Attributes:
        weight: Factor of the term in the sum, at least 0.
        temperature: Both logits are divided by it; the term is multiplied by its square (Hinton et al. 2015, section 2.1).
    """

    weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    temperature: float = Field(default=2.0, gt=0, le=100)


class HiddenTerm(Section):
    """Mean squared error between hidden states after chosen layers.

    Attributes:
        weight: Factor of the term in the sum; 0 leaves it out.
        layers: "all" (each student layer with the teacher layer at the same relative depth), "last", or
            pairs [student layer, teacher layer] counted from 0.
    """

    weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    layers: Literal["all", "last"] | list[list[int]] = "all"

    @model_validator(mode="after")
    def _pairs(self) -> HiddenTerm:
        pairs = self.layers if isinstance(self.layers, list) else [[0, 0]]
        if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise ValueError("layers must be 'all', 'last' or pairs of layer numbers such as [[0, 1], [2, 5]]")
        return self


class DistillConfig(Section):
    """Distillation: what of the teacher the student is to reproduce, and with which weight.

    Attributes:
        task: The loss on the labels.
        logits: The soft targets.
        hidden: The hidden states.

    Example:
        >>> DistillConfig(logits=LogitsTerm(weight=0.9, temperature=3.0)).logits.temperature
        3.0
    """

    task: TaskTerm = TaskTerm()
    logits: LogitsTerm = LogitsTerm()
    hidden: HiddenTerm = HiddenTerm()

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        if self.logits.weight == 0 and self.hidden.weight == 0:
            raise ValueError(
                "logits.weight and hidden.weight are both 0: nothing is left of the teacher; set one above 0 or leave out distill"
            )
        return self


_Sparsity = Annotated[float, Field(ge=0, lt=1)]
_Speedup = Annotated[float, Field(ge=1, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_GOALS = ("sparsity", "speedup", "latency_ms", "parameters", "flops")


class Target(Section):
    """How small or how fast the model is to become. One of the first five is given; without any, a sparsity of 0.5.

    A list of targets, each harder than the one before, makes one run leave a model at each of them.

    Attributes:
        sparsity: Share of the prunable parameters (those of all heads and neurons of the dense model) to
            remove, in [0, 1).
        speedup: How many times faster than the dense model, measured; 1 or more.
        latency_ms: Milliseconds of one forward pass, measured.
        parameters: What may be left of all parameters of the model: their number, or up to 1 their share.
        flops: Operations of one example at `length`: their number, or up to 1 their share of the dense model's.
        max_drop: Points that the metric may fall. Alone, the fastest model within that is looked for; in training it is chosen among
            those of the list of targets (by default the speedups 1.5, 2, 3 and 4).
        batch: Examples in a batch when time is measured; by default as in the recipe's `measure`.
        length: Tokens per example; by default as in `measure`.
        threads: CPU threads; by default as in `measure`.
        device: Where time is measured, which has to be where the model is; "auto" asks for nothing.
        scope: What is timed and counted: the whole "model", or only its transformer "layers" (without embeddings and head).
    """

    sparsity: _Sparsity | list[_Sparsity] | None = None
    speedup: _Speedup | list[_Speedup] | None = None
    latency_ms: _Positive | list[_Positive] | None = None
    parameters: _Positive | list[_Positive] | None = None
    flops: _Positive | list[_Positive] | None = None
    max_drop: float | None = Field(default=None, ge=0, le=100)
    batch: int | None = Field(default=None, ge=1)
    length: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    device: str = "auto"
    scope: Literal["model", "layers"] = "model"

    @model_validator(mode="after")
    def _one_goal(self) -> Target:
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}, not {len(given)}")
        values = self.goals if given else [0.5]
        harder = values if self.quantity in ("sparsity", "speedup") else [-value for value in values]
        if not values or any(later <= earlier for earlier, later in itertools.pairwise(harder)):
            raise ValueError(
                f"{self.quantity} lists {values}: each target must be harder than the one before, and none twice"
            )
        return self

    @property
    def quantity(self) -> str:
        """Name of what is given: "sparsity", "speedup", "latency_ms", "parameters", "flops" or "max_drop"."""
        return next((name for name in (*_GOALS, "max_drop") if getattr(self, name) is not None), "sparsity")

    @property
    def goals(self) -> list[float]:
        """The values to reach, one after the other; empty for max_drop."""
        if self.quantity == "max_drop":
            return []
        value = getattr(self, self.quantity)
        return [0.5] if value is None else list(value) if isinstance(value, list) else [value]


class CriterionConfig(Section):
    """How units are ranked.

    Attributes:
        name: "obs" removes units one after the other so that the rest can make up for them best, and weighs errors by what they
            do to the predictions; "first_order" reads the importance off the gradients of training, which costs nothing;
            "learned" trains gates on all units along with the weights from the schedule's start on, and cuts what they closed at its
            end; all others are listed in `hfcompress.pruning.CRITERIA`.
        samples: Training examples that a criterion looks at which needs more than the gradients of training, and that
            repair uses.
        gate_learning_rate: With "learned", how fast gates learn: about how far one can move in one optimizer step, of the six or so
            that lie between open and closed.
    """

    name: CriterionName = "obs"
    samples: int = Field(default=512, ge=1)
    gate_learning_rate: float = Field(default=0.1, gt=0, le=10)


class ScheduleConfig(Section):
    """When the sparsity is reached, as shares of the optimizer steps of the run.

    Attributes:
        name: "polynomial" (Zhu and Gupta 2017, equation 1), "linear" or "constant" (everything at `start`).
        power: Exponent of the polynomial.
        start: Share of the run before anything is pruned (warm-up), in [0, 1).
        end: Share of the run after which nothing more is pruned (the rest is cool-down), in (0, 1].
        updates: Number of times the plan is renewed between start and end; the last one is at `end`. With the criterion "learned" the
            plan is made once, at `end`: in between the target warms up as the schedule says.
    """

    name: Literal["polynomial", "linear", "constant"] = "polynomial"
    power: float = Field(default=3.0, gt=0, le=100)
    start: float = Field(default=0.1, ge=0, lt=1)
    end: float = Field(default=0.6, gt=0, le=1)
    updates: int = Field(default=20, ge=1, le=10_000)

    @model_validator(mode="after")
    def _order(self) -> ScheduleConfig:
        if self.name != "constant" and self.end <= self.start:
            raise ValueError(f"end ({self.end}) must be after start ({self.start})")
        return self


class PerKind(Section):
    """A whole number for heads and one for neurons.

    With grouped-query attention a "head" is one key-value group with all its query heads.
    """

    heads: int = Field(default=1, ge=0)
    neurons: int = Field(default=1, ge=0)


class MultipleOf(Section):
    """Counts left in a sublayer are multiples of these, or the full count.

    "auto" is what the device computes fast.
    """

    heads: int = Field(default=1, ge=1)
    neurons: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"


class AtLeast(PerKind):
    """No sublayer keeps fewer units than these; 0 allows a sublayer to be skipped altogether."""

    heads: int = Field(default=1, ge=0)
    neurons: int = Field(default=8, ge=0)


class PruneConfig(Section):
    """Structured pruning.

    Attributes:
        target: How small or fast.
        units: What may be removed: "heads" and "neurons" one by one, whole attention or feed-forward "sublayers", whole
            "layers".
        criterion: How units are ranked; a name, or a mapping with its settings.
        repair: Refit what stays by least squares after each cut, on `criterion.samples` examples. None does so where
            the criterion looks at examples anyway.
        schedule: When, during training.
        scope: "global" takes what costs least loss anywhere; "site" takes the same share everywhere.
        multiple_of: Counts left are multiples of these.
        at_least: What every sublayer keeps.
        uniform: Make all layers alike and use only what the architecture's own config can say, so that the
            result loads with plain transformers.
        cut: "gradual" removes closed units from the weights at each update, so that training gets faster
            as it goes; "end" keeps them behind closed gates until the schedule ends. The result is the same up to
            numerical noise (with the criterion random: another draw).
    """

    target: Target = Target()
    units: list[UnitKind] = Field(default=["heads", "neurons"], min_length=1)
    criterion: CriterionConfig = CriterionConfig()
    repair: bool | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    scope: Literal["global", "site"] = "global"
    multiple_of: MultipleOf = MultipleOf()
    at_least: AtLeast = AtLeast()
    uniform: bool = False
    cut: Literal["gradual", "end"] = "gradual"

    @field_validator("criterion", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> PruneConfig:
        if len(set(self.units)) != len(self.units):
            raise ValueError(f"units names a kind twice: {self.units}")
        if self.uniform and "layers" in self.units:
            raise ValueError("uniform and units: layers cannot be had together; drop layers in a run of its own")
        if self.scope == "site" and {"sublayers", "layers"} & set(self.units):
            raise ValueError(
                "scope: site takes the same share everywhere, so whole sublayers or layers cannot go; use global"
            )
        if self.cut == "end" and ("layers" in self.units or self.repair or len(self.target.goals) > 1):
            raise ValueError(
                "cut: end only closes heads, neurons and sublayers, for one target and without repair; use cut: gradual"
            )
        if self.criterion.name == "learned":
            self._gates_can_learn()
        return self

    def _gates_can_learn(self) -> None:
        """Refuse what learned gates cannot do.

        Raises:
            ValueError: One line that says what, and what to do instead.
        """
        if self.uniform:
            raise ValueError(
                "criterion: learned finds each layer's own size, which uniform takes away; use another criterion"
            )
        if self.scope == "site":
            raise ValueError(
                "criterion: learned finds each site's own share, so scope: site has no use for it; use global"
            )
        if "layers" in self.units:
            raise ValueError("criterion: learned has no gates on whole layers; use sublayers, or another criterion")
        if len(self.target.goals) != 1:
            raise ValueError(
                "criterion: learned works towards one target; give a single number, or use another criterion"
            )
        if self.schedule.name == "constant":
            raise ValueError(
                "criterion: learned needs time between start and end; use schedule.name linear or polynomial"
            )


class QuantizeConfig(Section):
    """bitsandbytes variants to make of the result.

    Attributes:
        presets: Which ones; see `hfcompress.quantization.PRESETS`.
        skip: Names of modules to leave unquantized besides heads and poolers.
        dtype: Storage of everything that is not quantized; "auto" keeps what the model has.
    """

    presets: list[Preset] = Field(default=["int8", "nf4-dq"], min_length=1)
    skip: list[str] = []
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class DataConfig(Section):
    """Where the examples come from and which columns hold what.

    Attributes:
        name: A dataset on the Hub, or None when files are given.
        config: Its configuration, e.g. "sst2" of "nyu-mll/glue".
        title: What the card calls the data; by default the name, or that of the file.
        train: A local csv, tsv, json, jsonl or parquet file, an image folder, or the name of a Hub split.
        eval: The same for evaluation; without it a share of the training data is held out.
        text: Column or two columns of text; found by itself when there is no doubt.
        image: Column of images; found by itself when there is no doubt.
        label: Column of labels; found by itself when there is no doubt.
        max_length: Longest text in tokens.
        max_train: Use at most so many training examples (a random choice, by seed).
        max_eval: Use at most so many evaluation examples.
        holdout: Share of the training data to evaluate on when there is no evaluation data, in (0, 1).
        workers: Processes that preprocess.
    """

    name: str | None = None
    config: str | None = None
    title: str | None = None
    train: str | None = None
    eval: str | None = None
    text: str | list[str] | None = None
    image: str | None = None
    label: str | None = None
    max_length: int = Field(default=128, ge=2, le=100_000)
    max_train: int | None = Field(default=None, ge=1)
    max_eval: int | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.1, gt=0, lt=1)
    workers: int = Field(default=1, ge=1, le=256)

    @model_validator(mode="after")
    def _source(self) -> DataConfig:
        if self.name is None and self.train is None:
            raise ValueError("give data.name (a Hub dataset) or data.train (a local file or folder)")
        if isinstance(self.text, list) and not 1 <= len(self.text) <= 2:
            raise ValueError("text takes one column name or a list of two (a pair of sentences)")
        return self


class ModelConfig(Section):
    """The model to start from.

    Attributes:
        name: Folder or Hub repository.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run code from the repository. Only if you have read it.
        base_model: Repository on the Hub that the weights come from, for the card, if `name` is a folder.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    base_model: str | None = None


class TeacherConfig(Section):
    """The model to learn from.

    Attributes:
        name: Folder or Hub repository of a model already fine-tuned on the task. Without it, `model` is
            fine-tuned first and serves as teacher and as the student's starting point.
        train: Training arguments that differ from those of the recipe's `train` section while the teacher
            is fine-tuned.
    """

    name: str | None = None
    train: dict[str, Any] = {}


class MeasureConfig(Section):
    """How latency is measured.

    Attributes:
        batch: Examples in a batch.
        length: Tokens per example (text; images have the size the model wants).
        threads: CPU threads; None leaves torch's own number.
        rounds: Timed rounds; the median and the 10th and 90th percentile are reported.
        warmup: Rounds before that.
        device: "auto" is the GPU if there is one.
    """

    batch: int = Field(default=32, ge=1)
    length: int = Field(default=64, ge=1)
    threads: int | None = Field(default=None, ge=1)
    rounds: int = Field(default=15, ge=3, le=10_000)
    warmup: int = Field(default=3, ge=0, le=1_000)
    device: str = "auto"


class PushConfig(Section):
    """Where the result goes on the Hub.

    Attributes:
        repo: "user/name".
        private: Make the repository private when it is created.
        revision: Branch to commit to.
    """

    repo: str
    private: bool = False
    revision: str | None = None


class Recipe(Section):
    """Everything a run needs to know. Parts that a Trainer in your own script gets otherwise may be absent.

    Attributes:
        task: Kind of task; only `hfcompress run` and the scripts need it.
        model: Student's starting point.
        teacher: Model to learn from.
        data: Examples.
        distill: Distillation, or None.
        prune: Pruning, or None.
        quantize: Variants to make of the result, or None.
        train: Any of transformers' TrainingArguments.
        measure: How latency is measured.
        push: Where the result goes, or None.
        output: Folder of the run.
        seed: Of everything random.

    Example:
        >>> Recipe.from_dict({"prune": {"target": {"sparsity": 0.6}}}).prune.target.sparsity
        0.6
        >>> Recipe.from_dict({"prunee": {}})
        Traceback (most recent call last):
        ...
        hfcompress.config.RecipeError: recipe: prunee is not a key here; did you mean prune? Allowed: data, distill, measure, model, output, prune, push, quantize, seed, task, teacher, train
    """

    task: Task | None = None
    model: ModelConfig | None = None
    teacher: TeacherConfig | None = None
    data: DataConfig | None = None
    distill: DistillConfig | None = None
    prune: PruneConfig | None = None
    quantize: QuantizeConfig | None = None
    train: dict[str, Any] = {}
    measure: MeasureConfig = MeasureConfig()
    push: PushConfig | None = None
    output: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        reserved = {"output_dir": "output", "seed": "seed"} | ({"push_to_hub": "push"} if self.push else {})
        for section, arguments in (
            ("train", self.train),
            ("teacher.train", (self.teacher or TeacherConfig()).train),
        ):
            for key in arguments:
                if key in reserved:
                    raise ValueError(f"{section}.{key} contradicts {reserved[key]}; set {reserved[key]} only")
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "recipe") -> Recipe:
        """Check plain data and make a recipe of it.

        Args:
            values: What a YAML file would hold.
            source: Name used in error messages.

        Returns:
            The recipe.

        Raises:
            RecipeError: One line that says what is wrong, where, and what is allowed.
        """
        if not isinstance(values, dict):
            raise RecipeError(f"{source}: must be a mapping of sections, got {type(values).__name__}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(f"{source}: {_one_line(error, cls)}") from None

    @classmethod
    def from_yaml(cls, path: str | Path, *, overrides: list[str] | None = None) -> Recipe:
        """Read a recipe from a YAML file.

        Args:
            path: The file.
            overrides: Changes such as "prune.target.sparsity=0.7", applied in order; values are read as YAML.

        Returns:
            The recipe.

        Raises:
            RecipeError: One line: the file cannot be read, is not YAML, or says something not allowed.
        """
        try:
            values = _read_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path}: is not a text file in UTF-8") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
        values = {} if values is None else values
        for override in overrides or []:
            _override(values, override, source=str(path))
        return cls.from_dict(values, source=str(path))

    def to_yaml(self) -> str:
        """Write the recipe as YAML, defaults left out.

        Example:
            >>> print(Recipe.from_dict({"seed": 7}).to_yaml(), end="")
            seed: 7
        """
        return yaml.safe_dump(self.model_dump(exclude_unset=True), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 5e-5 is a number (version 1.2), not a word (version 1.1)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _override(values: Any, text: str, *, source: str) -> None:
    """Set one dotted key of plain data in place."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not all(key.split(".")):
        raise RecipeError(
            f"{source}: {text!r} is not an override; write key.key=value, such as prune.target.sparsity=0.7"
        )
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values, dict):
            break
        if values.get(parent) is None:  # an empty section in YAML is None
            values[parent] = {}
        values = values[parent]
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: {key}: a part of this key is not a section, so nothing below it can be set")
    try:
        values[last] = _read_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"{source}: {key}: {_shown(value)} is not valid YAML") from None


def _section_at(section: type[BaseModel], parents: list[str]) -> type[BaseModel] | None:
    """The section class that a list of keys leads to."""
    for part in parents:
        field = section.model_fields.get(part)
        classes = [field.annotation, *get_args(field.annotation)] if field is not None else []
        inner = [c for c in classes if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return None
        section = inner[0]
    return section


_BRANCHES = ("str", "int", "float", "constrained-float", "constrained-int", "constrained-str")


def _location(problem: ErrorDetails) -> list[str]:
    """Keys and indices that lead to a problem; pydantic's names for the branches of a union are left out."""
    parts = [str(part) or "''" for part in problem["loc"]]
    last = [parts.pop()] if problem["type"] == "extra_forbidden" else []  # the user's own word, whatever it is
    return [part for part in parts if "[" not in part and part not in _BRANCHES] + last


def _shown(value: Any) -> str:
    """A value as it stands in a message, at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no whole numbers of more than 4300 digits
        return f"this {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a validation, as one line: key, what was wrong, what is allowed."""
    problems = error.errors(include_url=False)
    first = _location(problems[0])
    # Of the branches of a union the one that got furthest into the value tells most.
    problem = max((p for p in problems if _location(p)[: len(first)] == first), key=lambda p: len(_location(p)))
    names = _location(problem)
    key = ".".join(names) or "recipe"
    if problem["type"] == "extra_forbidden":
        section = _section_at(root, names[:-1])
        allowed = sorted(section.model_fields) if section is not None else []
        close = difflib.get_close_matches(names[-1], allowed, n=1)
        hint = f"; did you mean {'.'.join([*names[:-1], close[0]])}?" if close else "."
        return f"{key} is not a key here{hint} Allowed: {', '.join(allowed)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    if problem["type"] == "literal_error":
        expected = problem["ctx"]["expected"]
        words = expected.replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(given, words, n=1) if isinstance(given, str) else []
        hint = f"; did you mean {close[0]}?" if close else ";"
        return f"{key}: {_shown(given)} is not allowed{hint} Allowed: {expected}"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if names else message
    return f"{key}: {_shown(given)} is not allowed: {message[0].lower() + message[1:]}"
