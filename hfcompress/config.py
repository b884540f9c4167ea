"""What a run can be told: typed sections, and the recipe (one YAML file) that composes them.

Every value is checked when it is read. What is wrong is said in one line: file, key, what is allowed,
and the nearest right name.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

UnitKind = Literal["heads", "neurons", "sublayers", "layers", "hidden", "vocabulary"]
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
Dynamic = Literal["int8-dynamic", "fp8-dynamic"]
_BITSANDBYTES, _TORCHAO = get_args(Preset), get_args(Dynamic)
_SCHEME = re.compile(
    r"(int[2-8]|fixed[2-8]|codebook[1-8]|nf4|fp4|ternary|binary)(-(g[1-9]\d*|channel|tensor))?(-asym)?"
)


def _check_format(name: str) -> str:
    """Refuse what is neither a preset of bitsandbytes nor a scheme; `hfcompress.checkpoints.grids.Scheme` knows the details."""
    if name in _BITSANDBYTES or _SCHEME.fullmatch(name):
        return name
    near = difflib.get_close_matches(
        name, [*_BITSANDBYTES, "ternary", "binary", "int4-g64", "int8-channel", "codebook4"], n=1
    )
    hint = f"; did you mean {near[0]}?" if near else ";"
    raise ValueError(
        f"{name!r} is not allowed{hint} Allowed: {', '.join(map(repr, _BITSANDBYTES))} of bitsandbytes, and int2 to int8, fixed2 to fixed8, "
        "codebook1 to codebook8, ternary and binary, then maybe -g64, -channel or -tensor, then for int maybe -asym"
    )


def check_variant(name: str) -> str:
    """The name of a format or of a preset of torchao, as it came.

    Raises:
        ValueError: It is neither; the nearest that there is is named.

    Example:
        >>> check_variant("int8-dynamic")
        'int8-dynamic'
    """
    near = difflib.get_close_matches(name, [*_BITSANDBYTES, *_TORCHAO], n=1)
    if name not in _TORCHAO and near and near[0] in _TORCHAO:
        raise ValueError(
            f"{name!r} is not allowed; did you mean {near[0]}? Allowed: {', '.join(map(repr, _TORCHAO))} of torchao"
        )
    return name if name in _TORCHAO else _check_format(name)


WeightFormat = Annotated[str, AfterValidator(_check_format)]
Variant = Annotated[str, AfterValidator(check_variant)]
Task = Literal[
    "text-classification",
    "image-classification",
    "audio-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "fill-mask",
    "text-generation",
    "text2text-generation",
    "feature-extraction",
]


class RecipeError(ValueError):
    """A recipe says something that is not allowed; the message is one line that names file and key."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # keys and values may hold line breaks


class Section(BaseModel):
    """Base of every part of a recipe: immutable, strict about types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Ramp(Section):
    """A number that changes during training.

    Attributes:
        first: Its value at the start.
        last: Its value at the end.
        start: Share of the run before it begins to change, in [0, 1).
        end: Share of the run after which it stays, in (0, 1].
        name: "linear" or "cosine".

    Example:
        >>> ramp = Ramp(first=1.0, last=0.0, end=0.5)
        >>> [value_at(ramp, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.5, 0.0, 0.0]
    """

    first: float = Field(ge=0, allow_inf_nan=False)
    last: float = Field(ge=0, allow_inf_nan=False)
    start: float = Field(default=0.0, ge=0, lt=1)
    end: float = Field(default=1.0, gt=0, le=1)
    name: Literal["linear", "cosine"] = "linear"

    @model_validator(mode="after")
    def _order(self) -> Ramp:
        if self.end <= self.start:
            raise ValueError(f"end ({self.end}) must be after start ({self.start})")
        return self


def value_at(setting: float | Ramp, progress: float) -> float:
    """A setting that may change, at a share of the run in [0, 1].

    Example:
        >>> value_at(0.5, 0.9)
        0.5
        >>> value_at(Ramp(first=4.0, last=2.0, name="cosine"), 0.5)
        3.0
    """
    if not isinstance(setting, Ramp):
        return setting
    share = min(max((progress - setting.start) / (setting.end - setting.start), 0.0), 1.0)
    if setting.name == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return setting.first + (setting.last - setting.first) * share


def ever_positive(setting: float | Ramp) -> bool:
    """Whether a weight is above 0 at any time.

    Example:
        >>> ever_positive(0.0), ever_positive(Ramp(first=0.0, last=1.0))
        (False, True)
    """
    return max(setting.first, setting.last) > 0 if isinstance(setting, Ramp) else setting > 0


_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)] | Ramp
_Layers = Literal["all", "last", "skip", "dynamic"] | list[list[int]]


def _check_layers(layers: str | list[list[int]], *, dynamic: bool = False) -> None:
    if layers == "dynamic" and not dynamic:
        raise ValueError("layers: dynamic is for hidden states only; use all, last, skip or pairs")
    pairs = layers if isinstance(layers, list) else [[0, 0]]
    if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(
            "layers must be 'all', 'last', 'skip', 'dynamic' or pairs of layer numbers such as [[0, 1], [2, 5]]"
        )


class TaskTerm(Section):
    """The loss on the labels, as the model itself computes it.

    Attributes:
        weight: Factor of the term in the sum, at least 0; or a ramp.
    """

    weight: _Weight = 0.5


class LogitsTerm(Section):
    """How far the student's predictions are from the teacher's.

    Attributes:
        weight: Factor of the term in the sum, at least 0; or a ramp.
        loss: "kl" (Hinton et al. 2015), "reverse_kl", "jensen_shannon" (with `beta`), "total_variation", "mse", "cosine", "hard_label"
            (DeiT), "decoupled" (Zhao et al. 2022, with `beta`), "dist" (Huang et al. 2022), or "uld" (Boizard et al. 2024), for
            vocabularies that differ.
        temperature: Both logits are divided by it; the divergences are multiplied by its square (Hinton et al. 2015, section 2.1).
            Losses that know no temperature pass it over. A number above 0, or a ramp.
        standardize: Compare logits less their mean, divided by their standard deviation (Sun et al. 2024).
        beta: Of "jensen_shannon" the share of the teacher in the mixture, in (0, 1), by default 0.5; of "decoupled" the weight of the
            classes that are not the target, by default 8.
    """

    weight: _Weight = 0.5
    loss: Literal[
        "kl",
        "reverse_kl",
        "jensen_shannon",
        "total_variation",
        "mse",
        "cosine",
        "hard_label",
        "decoupled",
        "dist",
        "uld",
    ] = "kl"
    temperature: Annotated[float, Field(gt=0, le=100)] | Ramp = 2.0
    standardize: bool = False
    beta: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _own_settings(self) -> LogitsTerm:
        if isinstance(self.temperature, Ramp) and min(self.temperature.first, self.temperature.last) <= 0:
            raise ValueError("temperature must stay above 0 from first to last")
        if self.beta is not None and self.loss not in ("jensen_shannon", "decoupled"):
            raise ValueError(f"beta belongs to jensen_shannon and decoupled, not to {self.loss}; leave it out")
        if self.loss == "jensen_shannon" and (self.beta or 0.5) >= 1:
            raise ValueError(f"beta of jensen_shannon is a share in (0, 1), not {self.beta}")
        return self


class HiddenTerm(Section):
    """How far the hidden states after chosen layers are from the teacher's.

    Attributes:
        weight: Factor of the term in the sum; 0 leaves it out; or a ramp.
        layers: "all" (each student layer with the teacher layer at the same relative depth), "last", "skip" (every so many-th teacher
            layer, its last left out: Sun et al. 2019), "dynamic" (every third teacher layer with the student layer that is nearest
            to it, found anew at each step: Xia et al. 2022), or pairs [student layer, teacher layer] counted from 0.
        loss: "mse", "cosine" (DistilBERT) or "patient" (mean squared error of vectors of length one: Sun et al. 2019).
    """

    weight: _Weight = 0.0
    layers: _Layers = "all"
    loss: Literal["mse", "cosine", "patient"] = "mse"

    @model_validator(mode="after")
    def _pairs(self) -> HiddenTerm:
        _check_layers(self.layers, dynamic=True)
        return self


class AttentionsTerm(Section):
    """How far the attention maps of chosen layers are from the teacher's (TinyBERT: Jiao et al. 2020, equation 7).

    Attributes:
        weight: Factor of the term in the sum; 0 leaves it out; or a ramp.
        layers: As of the hidden states; not "dynamic".
        loss: "mse", or "kl" from the teacher's to the student's map, row by row.
        heads: "each" compares head by head, "mean" the means over heads, for models with different heads or while heads are pruned.
    """

    weight: _Weight = 0.0
    layers: _Layers = "all"
    loss: Literal["mse", "kl"] = "mse"
    heads: Literal["each", "mean"] = "each"

    @model_validator(mode="after")
    def _pairs(self) -> AttentionsTerm:
        _check_layers(self.layers)
        return self


class RelationsTerm(Section):
    """How far the relations between tokens are from the teacher's (MiniLMv2: Wang et al. 2021): models may differ in width and heads.

    Attributes:
        weight: Factor of the term in the sum; 0 leaves it out; or a ramp.
        layers: As of the hidden states; not "dynamic". Usually one layer is compared.
        of: Of which vectors: "queries", "keys", "values".
        heads: Relation heads, by which both widths have to be divisible; None is the largest number up to 12 that does.
    """

    weight: _Weight = 0.0
    layers: _Layers = "last"
    of: list[Literal["queries", "keys", "values"]] = Field(default=["queries", "keys", "values"], min_length=1)
    heads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _pairs(self) -> RelationsTerm:
        _check_layers(self.layers)
        return self


class EmbeddingsTerm(Section):
    """How far one vector per example is from the teacher's: sentence and image embeddings.

    Attributes:
        weight: Factor of the term in the sum; 0 leaves it out; or a ramp.
        loss: "cosine", "mse", "similarity" (similarity-preserving: Tung and Mori 2019), or "contrastive" (InfoNCE: the teacher's vector
            of the same example against those of the others). The last two compare within the batch at hand.
        pooling: How a vector is made of the hidden states after the last layer: their "mean" over tokens, the first ("cls") or
            the "last" token.
        temperature: Of "contrastive".
    """

    weight: _Weight = 0.0
    loss: Literal["cosine", "mse", "similarity", "contrastive"] = "cosine"
    pooling: Literal["mean", "cls", "last"] = "mean"
    temperature: float = Field(default=0.05, gt=0, le=100)


class OnPolicyConfig(Section):
    """The student writes, and the teacher says what it would have written (generalized distillation: Agarwal et al. 2024).

    Attributes:
        share: Share of the batches whose answers are replaced by the student's own, in (0, 1] (lambda of the paper).
        max_new_tokens: Length of what is written.
        temperature: Of the student while it writes; 0 takes the likeliest token.
    """

    share: float = Field(default=0.5, gt=0, le=1)
    max_new_tokens: int = Field(default=64, ge=1, le=100_000)
    temperature: float = Field(default=1.0, ge=0, le=100)


class DistillConfig(Section):
    """Distillation: what of the teacher the student is to reproduce, and with which weight.

    Attributes:
        task: The loss on the labels; left out where there are none.
        logits: The predictions.
        hidden: The hidden states.
        attentions: The attention maps.
        relations: Relations between queries, keys and values.
        embeddings: One vector per example.
        on_policy: For language models and sequence-to-sequence: the student's own answers. None is the data's.
        dropout: Whether the student's dropout stays on. What the teacher says is richer than labels, and a smaller student has nothing to
            spare: half of MiniLM learned SST-2 0.6 points better without, in the mean of three seeds.
        self_test: Before the first step, check on a few examples that the gradient of a batch is that of its halves together.

    Example:
        >>> DistillConfig(logits=LogitsTerm(weight=0.9, temperature=3.0)).logits.temperature
        3.0
    """

    task: TaskTerm = TaskTerm()
    logits: LogitsTerm = LogitsTerm()
    hidden: HiddenTerm = HiddenTerm()
    attentions: AttentionsTerm = AttentionsTerm()
    relations: RelationsTerm = RelationsTerm()
    embeddings: EmbeddingsTerm = EmbeddingsTerm()
    on_policy: OnPolicyConfig | None = None
    dropout: bool = False
    self_test: bool = True

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        terms = (self.logits, self.hidden, self.attentions, self.relations, self.embeddings)
        if not any(ever_positive(term.weight) for term in terms):
            raise ValueError(
                "all weights but that of task are 0: nothing is left of the teacher; set logits.weight or another above 0, or leave out distill"
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
    """Counts left in a sublayer, and features left in the hidden states, are multiples of these, or the full count.

    "auto" is what the device computes fast.
    """

    heads: int = Field(default=1, ge=1)
    neurons: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    hidden: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"


class AtLeast(PerKind):
    """No sublayer keeps fewer units than these; 0 allows a sublayer to be skipped altogether.

    The hidden states keep at least `hidden` features; None is half of those there were.
    """

    heads: int = Field(default=1, ge=0)
    neurons: int = Field(default=8, ge=0)
    hidden: int | None = Field(default=None, ge=1)


class PruneConfig(Section):
    """Structured pruning.

    Attributes:
        target: How small or fast.
        units: What may be removed: "heads" and "neurons" one by one, whole attention or feed-forward "sublayers", whole
            "layers", features of the "hidden" states everywhere at once, tokens of the "vocabulary" that the training data hardly uses.
        criterion: How units are ranked; a name, or a mapping with its settings.
        repair: Refit what stays by least squares after each cut, on `criterion.samples` examples. None does so where
            the criterion looks at examples anyway.
        schedule: When, during training.
        scope: "global" takes what costs least loss anywhere; "site" takes the same share everywhere.
        multiple_of: Counts left are multiples of these.
        at_least: What every sublayer keeps.
        coverage: Of the vocabulary: the tokens that stay make up at least this share of the training data. Where nothing else is pruned,
            as many stay as the target leaves room for.
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
    coverage: float = Field(default=0.999, gt=0, le=1)
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
        if self.units == ["vocabulary"]:
            self._vocabulary_can_do_it()
        if self.uniform and "layers" in self.units:
            raise ValueError("uniform and units: layers cannot be had together; drop layers in a run of its own")
        if self.scope == "site" and {"sublayers", "layers"} & set(self.units):
            raise ValueError(
                "scope: site takes the same share everywhere, so whole sublayers or layers cannot go; use global"
            )
        if self.cut == "end" and ({"layers", "hidden"} & set(self.units) or self.repair or len(self.target.goals) > 1):
            raise ValueError(
                "cut: end only closes heads, neurons and sublayers, for one target and without repair; use cut: gradual"
            )
        if self.criterion.name == "learned":
            self._gates_can_learn()
        return self

    def _vocabulary_can_do_it(self) -> None:
        """Refuse targets that a smaller vocabulary alone cannot reach.

        Raises:
            ValueError: One line that says what, and what to do instead.
        """
        target = self.target
        if target.quantity != "parameters" or target.scope != "model" or len(target.goals) > 1:
            raise ValueError(
                "units: vocabulary alone changes the number of parameters of the whole model, once, and no speed; give one "
                "target.parameters, or more units"
            )

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
        if "hidden" in self.units:
            raise ValueError("criterion: learned has no gates on hidden features; use another criterion, such as obs")
        if len(self.target.goals) != 1:
            raise ValueError(
                "criterion: learned works towards one target; give a single number, or use another criterion"
            )
        if self.schedule.name == "constant":
            raise ValueError(
                "criterion: learned needs time between start and end; use schedule.name linear or polynomial"
            )


class ActivationConfig(Section):
    """How what enters the layers is rounded to 8 bits, one range for each layer.

    Attributes:
        ranges: "learned" with the weights (learned step size quantization: Esser et al. 2020), or "moving-average" of the extremes of
            each step (Jacob et al. 2018).
        samples: Training examples that the first ranges are found on.
    """

    ranges: Literal["learned", "moving-average"] = "learned"
    samples: int = Field(default=256, ge=1)


class QATConfig(Section):
    """Quantization-aware training: layers multiply with rounded weights while they are trained, and these are what is saved.

    Attributes:
        format: How weights are written in the end: "int8", "nf4", "nf4-dq", "fp4", "fp4-dq" for bitsandbytes; or a scheme such as
            "int4-g64", "int2-g32-asym", "ternary", "binary-channel" (see `hfcompress.checkpoints.grids.Scheme`).
        first: Formats on the way there, each for an equal share of the time between start and end.
        start: Share of the run before which weights stay whole.
        end: Share of the run from which on `format` holds; counts only where there is a `first`.
        skip: Names of modules to leave whole besides heads and poolers.
        activations: How what enters the layers is rounded, from the first format on; None leaves it whole.
    """

    format: WeightFormat
    activations: ActivationConfig | None = None
    first: list[WeightFormat] = []
    start: float = Field(default=0.0, ge=0, lt=1)
    end: float = Field(default=0.5, gt=0, le=0.9)
    skip: list[str] = []

    @model_validator(mode="after")
    def _in_order(self) -> QATConfig:
        if self.first and self.end <= self.start:
            raise ValueError(f"end ({self.end}) must come after start ({self.start})")
        if self.activations is not None and self.format in _BITSANDBYTES:
            raise ValueError(
                f"activations cannot be rounded beside {self.format}: bitsandbytes multiplies in its own way; use a scheme such as "
                "int8-channel or int4-g64"
            )
        return self

    def format_at(self, progress: float) -> str | None:
        """The format at a share of the run, or None.

        Example:
            >>> config = QATConfig(format="int2", first=["int8", "int4"], start=0.1, end=0.5)
            >>> [config.format_at(progress) for progress in (0.0, 0.1, 0.3, 0.5, 1.0)]
            [None, 'int8', 'int4', 'int2', 'int2']
        """
        if progress < self.start:
            return None
        if not self.first or progress >= self.end:
            return self.format
        # 0.1 + 0.2 is a little more than 0.3: a step that stands on the border belongs to what follows.
        return self.first[int((progress - self.start) / (self.end - self.start) * len(self.first) + 1e-9)]


def _refuse_tokens(section: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError if training arguments of a recipe, which is kept beside what it makes, hold a token."""
    for key in arguments:
        if key.endswith("_token"):
            raise ValueError(
                f"{section}.{key} would be written down with the recipe; leave it out, and log in with hf auth login or set HF_TOKEN"
            )


class RecoverConfig(Section):
    """Low-rank adapters (LoRA: Hu et al. 2021) on a quantized model, trained against the model in full precision.

    Attributes:
        rank: Of the adapters; what they learn is a matrix of this rank for each layer.
        alpha: Their product counts alpha / rank times.
        targets: "all-linear" (every layer that was quantized), or names of layers as they end, such as [query, value].
        init: "loftq" starts the adapters at the best approximation of what quantization took away (LoftQ: Li et al. 2023), "lora" at
            zero.
        iterations: Of loftq: with 1 the quantized model stays as it is; with more, its weights are quantized anew around the
            adapters, and it is only of use together with them.
        dropout: In front of the adapters.
        distill: What of the model in full precision they are to reproduce; None is the recipe's `distill`, or its defaults.
        train: Training arguments, over those of the recipe's `train`.
    """

    rank: int = Field(default=8, ge=1, le=1024)
    alpha: int = Field(default=16, ge=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    init: Literal["loftq", "lora"] = "loftq"
    iterations: int = Field(default=1, ge=1, le=100)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    distill: DistillConfig | None = None
    train: dict[str, Any] = {}

    @model_validator(mode="after")
    def _own_settings(self) -> RecoverConfig:
        if self.iterations > 1 and self.init != "loftq":
            raise ValueError("iterations are those of init: loftq; leave them out")
        if not self.targets:
            raise ValueError("targets names no layer; give all-linear or names")
        _refuse_tokens("train", self.train)
        for key in ("output_dir", "seed", "push_to_hub"):
            if key in self.train:
                raise ValueError(f"train.{key} is the recipe's own to set; leave it out")
        return self


class QuantizeConfig(Section):
    """Quantized variants to make of the result.

    Attributes:
        presets: Which ones: int8, nf4, nf4-dq, fp4, fp4-dq for bitsandbytes; or a scheme that hfcompress packs, such as int3-g64-asym
            (see `hfcompress.checkpoints.grids.Scheme`); or int8-dynamic and fp8-dynamic for torchao, which are faster when compiled: measure
            them with `measure.compile`.
        samples: Training examples that the weights are rounded on, layer by layer; None rounds each to the nearest number. Worth it below
            8 bits.
        skip: Names of modules to leave unquantized besides heads and poolers.
        dtype: Storage of everything that is not quantized; "auto" keeps what the model has.
        compute_dtype: Of bitsandbytes: what 4-bit weights are multiplied in; "auto" is `dtype`.
        storage: Of bitsandbytes: the type in which 4-bit codes are held. FSDP needs that of everything else.
        threshold: Of int8: inputs of this size and more are multiplied in float (LLM.int8); 0 multiplies all in int8.
        recover: Adapters that win back what each variant of bitsandbytes lost, or None.
    """

    presets: list[Variant] = Field(default=["int8", "nf4-dq"], min_length=1)
    samples: int | None = Field(default=None, ge=1)
    skip: list[str] = []
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    storage: Literal["uint8", "float32", "bfloat16", "float16"] = "uint8"
    threshold: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    recover: RecoverConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> QuantizeConfig:
        packed = [preset for preset in self.presets if preset not in _BITSANDBYTES]
        if self.recover is not None and packed:
            raise ValueError(
                f"recover puts adapters on layers of bitsandbytes, not on {packed[0]}; leave one of them out"
            )
        if "fp8-dynamic" in self.presets and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"fp8-dynamic multiplies in bfloat16, not {self.dtype}; leave out one of them")
        if self.samples is not None:
            dynamic = next((preset for preset in self.presets if preset in _TORCHAO), None)
            if dynamic is not None:
                raise ValueError(f"{dynamic} rounds each weight to the nearest number; leave out it or samples")
            if self.recover is not None and self.recover.iterations > 1:
                raise ValueError("samples and recover.iterations both change the weights; leave one of them out")
            for name in ("compute_dtype", "storage", "threshold"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for weights that are rounded to the nearest; leave out it or samples")
        return self

    def while_loading(self, preset: str) -> bool:
        """Whether bitsandbytes or torchao rounds a variant while it is loaded."""
        return preset in _TORCHAO or (preset in _BITSANDBYTES and self.samples is None)

    def settings_of(self, preset: str) -> dict[str, Any]:
        """Those that concern a variant that bitsandbytes or torchao rounds, as `hfcompress.quantize` takes them.

        Example:
            >>> QuantizeConfig(threshold=0.0).settings_of("int8")
            {'skip': [], 'dtype': 'auto', 'threshold': 0.0}
        """
        own: dict[str, Any] = {"skip": self.skip, "dtype": self.dtype}
        if preset in _TORCHAO:
            return own
        if preset == "int8":
            return own if self.threshold == 6.0 else own | {"threshold": self.threshold}
        return own | {
            "compute_dtype": self.compute_dtype,
            "storage": None if self.storage == "uint8" else self.storage,
        }


class DataConfig(Section):
    """Where the examples come from and which columns hold what.

    Attributes:
        name: A dataset on the Hub, or None when files are given.
        config: Its configuration, e.g. "sst2" of "nyu-mll/glue".
        title: What the card calls the data; by default the name, or that of the file.
        train: A local csv, tsv, json, jsonl, parquet or txt file (a text a line), a folder with one folder of images or sounds
            per class, or the name of a Hub split.
        eval: The same for evaluation; without it a share of the training data is held out.
        text: Column of text, of lists of words, or of chat messages; or two columns: a pair of sentences, question and context, a
            sentence and the start of the next. As all columns, found by itself when there is no doubt.
        image: Column of images.
        audio: Column of sounds.
        choices: Column of lists of choices, or as many columns as there are choices.
        label: Column of what is to be predicted: labels, tags of words, answers, the number of the right choice, or the text to be
            written.
        max_length: Longest text in tokens.
        max_target_length: Longest text to be written, in tokens.
        max_seconds: Longest sound; the rest is cut off.
        prefix: Put before every text that another is to be written for, such as "summarize: " for T5.
        fixed_masks: Mask the same tokens in every epoch, as it must be where a teacher's outputs are kept.
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
    audio: str | None = None
    choices: str | list[str] | None = None
    label: str | None = None
    max_length: int = Field(default=128, ge=2, le=100_000)
    max_target_length: int = Field(default=64, ge=2, le=100_000)
    max_seconds: float = Field(default=20.0, gt=0, le=3600)
    prefix: str = ""
    fixed_masks: bool = False
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


class AssistantConfig(Section):
    """A model between teacher and student, distilled first, from which the student then learns (Mirzadeh et al. 2020).

    Attributes:
        layers: How many layers of the teacher it keeps.
        train: Training arguments that differ from those of the recipe's `train` section.
    """

    layers: int = Field(ge=1)
    train: dict[str, Any] = {}


class TeacherConfig(Section):
    """The model to learn from.

    Attributes:
        name: Folder or Hub repository of a model already fine-tuned on the task, or several of them. Without it, `model` is
            fine-tuned first and serves as teacher and as the student's starting point.
        weights: With several, one number each; by default equal.
        combine: With several, how their predictions become one: the mean of "probabilities" or of "logits", or for each item the
            most "confident" one, or the one that is most "correct" by the labels.
        train: Training arguments that differ from those of the recipe's `train` section while the teacher
            is fine-tuned.
        precision: In which it runs: "float32", "bfloat16", "int8" or "nf4" (by bitsandbytes). "auto" is the highest that fits into
            memory.
        device: Where it runs, such as "cuda:1" or "cpu"; "auto" is where the student is, if it fits.
        cache: Let it run once over the training data and read from disk after that. Needs a collator that leaves the inputs as they are.
        average: Instead of another model, the average of the student's own weights teaches: the share that stays at each step,
            such as 0.999.
        assistants: Models in between, each distilled from the one before.
    """

    name: str | list[str] | None = None
    weights: list[float] | None = None
    combine: Literal["probabilities", "logits", "confident", "correct"] = "probabilities"
    train: dict[str, Any] = {}
    precision: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    device: str = "auto"
    cache: bool = False
    average: float | None = Field(default=None, ge=0, lt=1)
    assistants: list[AssistantConfig] = []

    @model_validator(mode="after")
    def _fits_together(self) -> TeacherConfig:
        if isinstance(self.name, list) and len(self.name) < 2:
            raise ValueError("name lists fewer than two teachers; give one name, or two and more")
        several = isinstance(self.name, list)
        if self.weights is not None and (not several or len(self.weights) != len(self.name or [])):
            raise ValueError("weights has one number for each teacher that name lists")
        if self.average is not None and (self.name is not None or self.cache or self.assistants):
            raise ValueError("average lets the student teach itself: leave out name, cache and assistants")
        if several and self.assistants:
            raise ValueError("assistants learn from one teacher; name lists several")
        return self

    @property
    def names(self) -> list[str]:
        """The teachers that are named."""
        return [] if self.name is None else [self.name] if isinstance(self.name, str) else list(self.name)


class StudentConfig(Section):
    """The student, where it is not the teacher's copy: it starts from the teacher's weights, as far as they fit.

    Attributes:
        layers: Layers that stay: their number (evenly spread, the last one among them) or their indices; for encoder and decoder a mapping.
        hidden: Features of the hidden states.
        heads: Heads of each attention sublayer.
        neurons: Neurons of each feed-forward sublayer.
        initialize: "teacher" copies weights, "random" starts from nothing.
    """

    layers: int | list[int] | dict[str, int] | None = None
    hidden: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    neurons: int | None = Field(default=None, ge=1)
    initialize: Literal["teacher", "random"] = "teacher"


class MeasureConfig(Section):
    """How latency is measured.

    Attributes:
        batch: Examples in a batch.
        length: Tokens per example (text; images have the size the model wants).
        threads: CPU threads; None leaves torch's own number.
        rounds: Timed rounds; the median and the 10th and 90th percentile are reported.
        warmup: Rounds before that.
        device: "auto" is the GPU if there is one.
        compile: All models go through `torch.compile`, and are timed as a whole only. What torchao quantized is slow without.
    """

    batch: int = Field(default=32, ge=1)
    length: int = Field(default=64, ge=1)
    threads: int | None = Field(default=None, ge=1)
    rounds: int = Field(default=15, ge=3, le=10_000)
    warmup: int = Field(default=3, ge=0, le=1_000)
    device: str = "auto"
    compile: bool = False


class ContractConfig(Section):
    """What the result has to keep, as measured beside its baseline on the same examples: see `hfcompress check`.

    Attributes:
        max_drop: It loses at most so many points of its score (per cent of a perplexity), by the whole 95 % interval.
        min_speedup: It is at least so many times as fast, by the whole 95 % interval.
        max_mb: Its weights take at most so many million bytes on disk.
        max_latency_ms: A batch takes at most so long, by the whole 95 % interval.

    Example:
        >>> ContractConfig(max_drop=1.0, min_speedup=1.8).model_dump(exclude_none=True)
        {'max_drop': 1.0, 'min_speedup': 1.8}
    """

    max_drop: float | None = Field(default=None, allow_inf_nan=False)
    min_speedup: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_mb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _says_something(self) -> ContractConfig:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError(f"a contract has at least one of {', '.join(type(self).model_fields)}")
        return self


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
        student: What the student has less than the teacher, or None.
        data: Examples.
        distill: Distillation, or None.
        prune: Pruning, or None.
        qat: Training with rounded weights, or None.
        quantize: Variants to make of the result, or None.
        train: Any of transformers' TrainingArguments.
        measure: How latency is measured.
        contract: What the result has to keep, or None; the run's exit status says whether it does.
        push: Where the result goes, or None.
        output: Folder of the run.
        seed: Of everything random.

    Example:
        >>> Recipe.from_dict({"prune": {"target": {"sparsity": 0.6}}}).prune.target.sparsity
        0.6
        >>> Recipe.from_dict({"prunee": {}})
        Traceback (most recent call last):
        ...
        hfcompress.config.RecipeError: recipe: prunee is not a key here; did you mean prune? Allowed: contract, data, distill, measure, model, output, prune, push, qat, quantize, seed, student, task, teacher, train
    """

    task: Task | None = None
    model: ModelConfig | None = None
    teacher: TeacherConfig | None = None
    student: StudentConfig | None = None
    data: DataConfig | None = None
    distill: DistillConfig | None = None
    prune: PruneConfig | None = None
    qat: QATConfig | None = None
    quantize: QuantizeConfig | None = None
    train: dict[str, Any] = {}
    measure: MeasureConfig = MeasureConfig()
    contract: ContractConfig | None = None
    push: PushConfig | None = None
    output: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.qat is not None and self.quantize is not None:
            raise ValueError("qat leaves a model that is quantized; leave quantize out, or quantize without qat")
        reserved = {"output_dir": "output", "seed": "seed"} | ({"push_to_hub": "push"} if self.push else {})
        for section, arguments in (
            ("train", self.train),
            ("teacher.train", (self.teacher or TeacherConfig()).train),
        ):
            _refuse_tokens(section, arguments)
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


_MOST_VALUES = 100_000  # in a recipe, anchors written out


def _read_yaml(text: str) -> Any:
    """Plain data from YAML; a key that stands twice is an error, and so are anchors that contain themselves or write out to millions."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"with its anchors written out it has more than {_MOST_VALUES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counted: dict[yaml.Node, int | None]) -> int:
    if node in counted:
        known = counted[node]
        if known is None:
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        return known
    counted[node] = None
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.MarkedYAMLError(problem=f"{_shown(key.value)} stands twice", problem_mark=key.start_mark)
                names.add(key.value)
    counted[node] = 1 + sum(_count_values(part, counted) for part in inner)
    return counted[node] or 1


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
    # Of the branches of a union the one that got furthest into the value tells most: it came to keys, or to our own checks.
    branches = (p for p in problems if _location(p)[: len(first)] == first)
    problem = max(branches, key=lambda p: (len(_location(p)), p["type"] == "value_error"))
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
