"""Students: smaller models made from a teacher, with whatever of its weights fits."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.hooks import remove_hook_from_module
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import (
    Site,
    StructureError,
    drop_layers,
    family_of,
    find_sites,
    find_stream,
    keep_units,
    uniform_config,
)
from hfcompress.anatomy.depth import check_layers
from hfcompress.anatomy.native import forget_per_layer
from hfcompress.anatomy.sites import RECORD_VERSION, check_record, find_stacks
from hfcompress.anatomy.stream import built_model, cut_stream, widen
from hfcompress.distillation.layer_maps import uniform_map
from hfcompress.measurement import count_parameters

logger = logging.getLogger(__name__)

LayerChoice = int | Sequence[int]

# Rows are padded to multiples of 8 to 512, for tensor cores and for splitting over devices.
_LEAST_MULTIPLE, _MOST_PADDING = 8, 512
# Widths of embeddings that are the hidden width where they equal it: there is no projection then.
_EMBEDDING_WIDTHS = ("embedding_size", "word_embed_proj_dim")
# What transformers raises for a config it does not take.
_CONFIG_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
    RuntimeError,
    IndexError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Copied:
    """Where the weights of a student come from.

    Attributes:
        parameters: How many of its parameters are the teacher's.
        fresh_parameters: How many are initialised anew.
        fresh: Names of the tensors that hold these, in whole or in part.
    """

    parameters: int
    fresh_parameters: int
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        """How many, in words."""
        more = f" in {len(self.fresh)} tensors ({', '.join(self.fresh[:3])}{', ...' * (len(self.fresh) > 3)})"
        return f"{self.parameters:,} parameters copied, {self.fresh_parameters:,} fresh{more if self.fresh else ''}"


def make_student(
    teacher: PreTrainedModel,
    *,
    layers: LayerChoice | Mapping[str, LayerChoice] | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    neurons: int | None = None,
    config: Mapping[str, Any] | PreTrainedConfig | None = None,
    initialize: Literal["teacher", "random"] = "teacher",
) -> PreTrainedModel:
    """A student made from a teacher: a new model of the same class, which shares nothing with it.

    First layers are chosen, then heads and neurons, then hidden features; what stays is the teacher's, and the student
    computes what the teacher computes with the rest gone. Of heads, neurons and features those with the largest weights
    stay. Where the plain config of the architecture can say the new shapes, it does (constants that follow the hidden
    width, such as Gemma's scale of the embeddings, are then those of the new width); elsewhere `config.hfcompress` says
    them, and either way `from_pretrained` loads what is saved.

    Then `config` changes the rest: a fresh model is built, and `copy_weights` fills in whatever fits.

    Source: layers as in DistilBERT (Sanh et al. 2019, section 3); width by magnitude as in Li et al. 2017 with L2.

    Args:
        teacher: A transformers model, not quantized, without adapters; left as it is.
        layers: How many layers stay, spread evenly with the last among them (every second, for half), or the numbers of
            those that stay, ascending from 0. One choice for all stacks, or stack name ("encoder", "decoder") to choice.
        hidden: Features of the residual stream that stay.
        heads: Query heads that stay at most in each attention sublayer.
        neurons: Neurons that stay at most in each feed-forward sublayer.
        config: Fields to change, or a whole config of the teacher's class (then without any of the above).
        initialize: "teacher" takes the teacher's weights, "random" draws all of them anew (by torch's global generator).

    Returns:
        The student, in eval mode, with the dtype and device of the teacher; all that its class trains is trainable.

    Raises:
        ValueError: A choice is out of range, or the architecture or config does not allow it.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> teacher = BertModel(BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64))
        >>> student = make_student(teacher, layers=2, neurons=16)
        >>> student.config.num_hidden_layers, student.config.intermediate_size, student.config.hfcompress["layers"]
        (2, 16, {'encoder': [2, 4]})
        >>> torch.equal(student.encoder.layer[1].attention.self.query.weight, teacher.encoder.layer[3].attention.self.query.weight)
        True
    """
    return derive_student(
        teacher, layers=layers, hidden=hidden, heads=heads, neurons=neurons, config=config, initialize=initialize
    )[0]


def derive_student(
    teacher: PreTrainedModel,
    *,
    layers: LayerChoice | Mapping[str, LayerChoice] | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    neurons: int | None = None,
    config: Mapping[str, Any] | PreTrainedConfig | None = None,
    initialize: Literal["teacher", "random"] = "teacher",
) -> tuple[PreTrainedModel, Copied]:
    """As `make_student`, and where the student's weights come from.

    Raises:
        ValueError: As `make_student`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> teacher = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8))
        >>> student, copied = derive_student(teacher, config={"type_vocab_size": 3})
        >>> copied.fresh, copied.fresh_parameters
        (('embeddings.token_type_embeddings.weight',), 24)
    """
    choices = {"layers": layers, "hidden": hidden, "heads": heads, "neurons": neurons}
    _check(teacher, choices, config, initialize)
    smaller = shared_copy(teacher)
    if layers is not None:
        _choose_layers(smaller, layers)
    if heads is not None or neurons is not None:
        _choose_units(smaller, heads=heads, neurons=neurons)
    if hidden is not None:
        _choose_features(smaller, hidden)
    plain = _plain_config(smaller) if {"units", "hidden"} & set(_record(smaller)) else None
    if config is None and initialize == "teacher":
        student = copy.deepcopy(smaller) if plain is None else _fresh(teacher, plain)
        if plain is not None:
            student.load_state_dict(smaller.state_dict())
        copied = Copied(count_parameters(student), 0, ())
    else:
        student = _fresh(teacher, _changed(smaller.config if plain is None else plain, config))
        copied = copy_weights(student, smaller) if initialize == "teacher" else _nothing_copied(student)
    _unfreeze(student)
    logger.info(
        "student: %s of the teacher's %s parameters; %s",
        f"{count_parameters(student):,}",
        f"{count_parameters(teacher):,}",
        copied,
    )
    return student.eval(), copied


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with the very same parameters and buffers, without hooks: cheap, and free to be cut or switched.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
        >>> other = shared_copy(model)
        >>> other is model, other.config is model.config, other.pooler.dense.weight is model.pooler.dense.weight
        (False, False, True)
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        # Hooks belong to who set them, and may hold tensors or a whole trainer.
        memo |= {id(value): type(value)() for name, value in vars(module).items() if name.endswith("_hooks")}
    return remove_hook_from_module(copy.deepcopy(model, memo), recurse=True)  # type: ignore[return-value]


def copy_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> Copied:
    """Fill a student, in place, with every tensor of a teacher that fits it.

    A tensor fits if it has the same name, with layers paired evenly by depth, and the same shape. Two things may differ:
    embeddings and language model heads whose vocabularies differ by padding share their leading rows, and classification
    heads with the same labels in another order are put in the student's order. With other labels (by `id2label`, where both
    name them) the head stays fresh.

    Args:
        student: The model to fill.
        teacher: A model of the same class.

    Returns:
        What was copied.

    Raises:
        ValueError: The vocabularies differ by more than padding.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
        >>> teacher, student = (BertModel(BertConfig(num_hidden_layers=n, **sizes)) for n in (4, 2))
        >>> copy_weights(student, teacher).fresh
        ()
        >>> torch.equal(student.encoder.layer[0].output.dense.weight, teacher.encoder.layer[1].output.dense.weight)
        True
    """
    prefixes = _layer_pairs(student, teacher)
    rows = _row_maps(student, teacher)
    theirs, fresh, fresh_parameters = teacher.state_dict(), [], 0
    parameters = {name for name, _ in student.named_parameters()}
    with torch.no_grad():
        for name, mine in student.state_dict().items():
            given = theirs.get(_paired_name(name, prefixes))
            left = mine.numel() if given is None else _fill(mine, given, rows.get(name))
            if left and name in parameters:
                fresh.append(name)
                fresh_parameters += left
    return Copied(count_parameters(student) - fresh_parameters, fresh_parameters, tuple(fresh))


def match_vocabularies(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """The number of leading classes that two language models share, whose vocabularies differ by padding at most.

    Rows beyond the last token of the tokenizer are padding. Without tokenizers sizes have to do: they may differ by less than
    512 if the larger is a multiple of 8. That cannot tell different tokenizers of one size, so pass them where they are at hand.

    Args:
        student: A model with a vocabulary.
        teacher: Another one.
        student_tokenizer: The student's tokenizer.
        teacher_tokenizer: The teacher's tokenizer.

    Returns:
        The smaller of both vocabulary sizes: logits `[..., :n]` of both are about the same tokens.

    Raises:
        ValueError: The vocabularies are not the same.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1}
        >>> one, other = (GPT2LMHeadModel(GPT2Config(vocab_size=n, **sizes)) for n in (50_265, 50_272))
        >>> match_vocabularies(one, other)
        50265
    """
    ours, theirs = _vocabulary_size(student), _vocabulary_size(teacher)
    small, large = sorted((ours, theirs))
    vocabularies = [t.get_vocab() for t in (student_tokenizer, teacher_tokenizer) if t is not None]
    reason = ""
    if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        one, other = vocabularies
        differing = {token for token, _ in one.items() ^ other.items()}
        token = min(differing, key=lambda token: (one.get(token, len(one)), other.get(token, len(other))))
        ids = " and ".join("absent" if n is None else str(n) for n in (one.get(token), other.get(token)))
        reason = f"token {token!r} is {ids}"
    elif vocabularies:
        tokens = 1 + max(max(vocabulary.values()) for vocabulary in vocabularies)
        if tokens > small:
            reason = f"the tokenizer has {tokens:,} tokens"
    elif small != large and (large % _LEAST_MULTIPLE or large - small >= _MOST_PADDING):
        reason = "more than padding"
    if reason:
        raise ValueError(
            f"the vocabularies of student ({ours:,}) and teacher ({theirs:,}) differ: {reason}; logits can be compared across "
            "tokenizers only with distill.logits.loss: uld"
        )
    return small


# ---- what is asked for ----


def _check(
    teacher: PreTrainedModel,
    choices: Mapping[str, Any],
    config: Mapping[str, Any] | PreTrainedConfig | None,
    initialize: str,
) -> None:
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}, which is no transformers model; of one with adapters, merge them first"
        )
    if any(not parameter.is_floating_point() for parameter in teacher.parameters()):
        raise ValueError("the teacher is quantized; make the student from the weights before that")
    if initialize not in ("teacher", "random"):
        raise ValueError(f"initialize={initialize!r} is not allowed; use 'teacher' or 'random'")
    given = [name for name, value in choices.items() if value is not None]
    if not isinstance(config, PreTrainedConfig):
        return
    if given:
        raise ValueError(
            f"a whole config says {given[0]} already; give a mapping of the fields to change, or leave out {given[0]}"
        )
    if type(config) is not type(teacher.config):
        raise ValueError(f"config is a {type(config).__name__}, the teacher's is a {type(teacher.config).__name__}")


def _record(model: PreTrainedModel) -> dict[str, Any]:
    return getattr(model.config, "hfcompress", None) or {}


def _named_stacks(model: PreTrainedModel) -> dict[str, tuple[str, int]]:
    """Path and number of layers of each stack, by its name.

    Raises:
        StructureError: The architecture is not known, or this is a part of a model.
    """
    stacks = find_stacks(model, family_of(model))
    if stacks is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    return {stack.name: (path, len(layers)) for stack, path, layers in stacks}


# ---- layers ----


def _choose_layers(model: PreTrainedModel, layers: LayerChoice | Mapping[str, LayerChoice]) -> None:
    """Drop layers, in place."""
    stacks = {name: count for name, (_, count) in _named_stacks(model).items()}
    repeats = getattr(model.config, "num_hidden_layers", None)
    if isinstance(layers, int) and hasattr(model.config, "num_hidden_groups") and isinstance(repeats, int):
        # Layers that share their weights (ALBERT) are one layer run several times: it is run less often.
        _require(layers, repeats, "layers")
        model.config.num_hidden_layers = layers
        return
    given = layers if isinstance(layers, Mapping) else dict.fromkeys(stacks, layers)
    keep = {}
    for stack, choice in given.items():
        if isinstance(choice, int) and stack in stacks:
            keep[stack] = _spread(model, stack, choice, stacks[stack])
        else:
            keep[stack] = tuple(choice) if isinstance(choice, Sequence) else (choice,)
    drop_layers(model, keep)


def _spread(model: PreTrainedModel, stack: str, count: int, layers: int) -> tuple[int, ...]:
    """Evenly spread layers with the last among them, and with the first where the architecture needs it."""
    _require(count, layers, f"{stack}: layers")
    evenly = tuple(number for _, number in uniform_map(count, layers))
    from_first = tuple(round(n * (layers - 1) / max(count - 1, 1)) for n in range(count))
    try:
        check_layers(model, {stack: evenly})
        return evenly
    except StructureError:
        check_layers(model, {stack: from_first})
        return from_first


def _require(count: int, most: int, what: str) -> None:
    if not 1 <= count <= most:
        raise ValueError(f"{what}={count} is not allowed: the teacher has {most}, so give 1 to {most}")


# ---- width ----


def _choose_units(model: PreTrainedModel, *, heads: int | None, neurons: int | None) -> None:
    """Keep the heads and neurons with the largest weights, in place, and write down how many there were."""
    sites = find_sites(model)
    keep: dict[str, torch.Tensor] = {}
    for kind, count in (("heads", heads), ("neurons", neurons)):
        if count is None:
            continue
        chosen = [site for site in sites if site.kind == kind]
        if not chosen:
            raise StructureError(f"{kind} of {type(model).__name__} cannot be cut, so leave out {kind}")
        _require(count, max(site.units * (site.query_heads or 1) for site in chosen), kind)
        keep |= {site.name: _largest(_unit_norms(model, site), _units(site, count)) for site in chosen}
    before = {name: pair[1] for name, pair in check_record({"version": RECORD_VERSION, **_record(model)}).items()}
    before = {site.name: before.get(site.name, site.units) for site in sites}
    keep_units(model, sites, keep)
    left = {site.name: site.units for site in find_sites(model)}
    units = {name: [count, before[name]] for name, count in left.items() if count != before[name]}
    if units:
        model.config.hfcompress = {**_record(model), "version": RECORD_VERSION, "units": units}


def _units(site: Site, count: int) -> int:
    """Units of a site with so many query heads or neurons."""
    queries = site.query_heads or 1
    if count % queries and count < site.units * queries:
        raise ValueError(f"heads={count} is not allowed: {queries} heads share a key, so give a multiple of {queries}")
    return min(site.units, count // queries)


def _unit_norms(model: nn.Module, site: Site) -> torch.Tensor:
    """Sum of squared weights of each unit, in readers and writers, float32, shape (units,)."""
    total = torch.zeros(site.units)
    for path in site.readers:
        total += _squares(model.get_submodule(path), output=False).reshape(site.units, -1).sum(1)
    for writer in site.writers:
        rows = _squares(model.get_submodule(writer.module), output=True)
        for start, width in writer.bands:
            total += rows[start : start + site.units * width].reshape(site.units, -1).sum(1)
    return total


def _squares(module: nn.Module, *, output: bool) -> torch.Tensor:
    """Squared weights of a linear layer, output (or input) features first."""
    weight: torch.Tensor = module.weight.detach().float().square().cpu()  # type: ignore[operator, union-attr, assignment]
    return weight if output != isinstance(module, Conv1D) else weight.T


def _largest(norms: torch.Tensor, count: int) -> torch.Tensor:
    return norms.topk(count).indices.sort().values


def _choose_features(model: PreTrainedModel, hidden: int) -> None:
    """Keep the features of the residual stream with the largest weights, in place, and write down how many there were."""
    stream = find_stream(model)
    _require(hidden, stream.width, "hidden")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms, seen = torch.zeros(stream.width), set()
    for entry in stream.dims:
        weight = parameters.get(entry.name)
        # Norms scale: their weights say nothing of how much a feature carries.
        if weight is None or entry.role == "scales" or (id(weight), entry.dim) in seen:
            continue
        seen.add((id(weight), entry.dim))
        squares = weight.detach().float().square().cpu().movedim(entry.dim, 0)
        norms += squares.reshape(entry.copies, stream.width, -1).sum((0, 2))
    cut_stream(model, stream, _largest(norms, hidden))
    if hidden < stream.before:
        record = {"version": RECORD_VERSION, **_record(model), "hidden": [hidden, stream.before]}
        model.config.hfcompress = record


def _plain_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """A config from which transformers alone builds the shapes of a cut model, or None if there is none.

    Where the head dimension follows from hidden width and number of heads, cutting both alike leaves it as it is.
    """
    config, family, sites = copy.deepcopy(model.config), family_of(model), find_sites(model)
    record = dict(_record(model))
    record.pop("units", None)
    hidden = record.pop("hidden", None)
    forget_per_layer(config)
    config.hfcompress = record
    try:
        if hidden is not None:
            for name in _EMBEDDING_WIDTHS:
                if getattr(config, name, None) == hidden[1]:
                    setattr(config, name, hidden[0])
            widen(config, hidden[0])
        stacks = {stack.name: stack for stack in family.stacks}
        for site in sites:
            stack = stacks[site.stack.partition(".")[0]]
            key, part = stack.heads_key or family.heads_key, getattr(config, stack.config) if stack.config else config
            if site.kind == "heads" and isinstance(getattr(part, key), int):
                setattr(part, key, site.units * site.query_heads)
                if family.kv_heads_key is not None:
                    setattr(part, family.kv_heads_key, site.units)
        plain = uniform_config(config, family, sites)
        if plain is None:
            return None
        built = built_model(model, copy.deepcopy(plain))
        return plain if _layout(built) == _layout(model) else None
    except _CONFIG_ERRORS as error:
        logger.debug("no plain config: %s", error)
        return None


def _layout(model: nn.Module) -> tuple[Any, ...]:
    """Shapes, and how the features of heads divide."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return shapes, [(site.name, site.units, site.query_heads, site.width) for site in find_sites(model)]


# ---- fresh models ----


def _fresh(teacher: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A newly initialised model of the teacher's class, where the teacher is."""
    try:
        model = type(teacher)._from_config(
            copy.deepcopy(config), dtype=teacher.dtype, attn_implementation=teacher.config._attn_implementation
        )
    except _CONFIG_ERRORS as error:
        raise ValueError(f"{type(teacher).__name__} cannot be built from this config: {_last_line(error)}") from None
    if getattr(teacher, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(teacher.generation_config)
    return model.to(teacher.device)


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """A config with some fields changed, checked by its own rules."""
    if changes is None or isinstance(changes, PreTrainedConfig):
        return config if changes is None else changes
    config = copy.deepcopy(config)
    for key, value in changes.items():
        if not hasattr(config, key):
            close = difflib.get_close_matches(key, vars(config), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"config: {type(config).__name__} has no field {key!r}{hint}")
        inner = getattr(config, key)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, Mapping):
            value = _changed(inner, value)
        if key == "id2label":
            value = {int(number): name for number, name in value.items()}
            config.label2id = {name: number for number, name in value.items()}
        try:
            setattr(config, key, value)
        except _CONFIG_ERRORS as error:
            raise ValueError(f"config: {key}={value!r} is not allowed: {_last_line(error)}") from None
    try:
        return type(config).from_dict(config.to_dict())
    except _CONFIG_ERRORS as error:
        raise ValueError(f"config: {type(config).__name__} does not take this: {_last_line(error)}") from None


def _last_line(error: BaseException) -> str:
    """Strict configs say first which check failed, and last why."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _nothing_copied(student: PreTrainedModel) -> Copied:
    return Copied(0, count_parameters(student), tuple(name for name, _ in student.named_parameters()))


def _unfreeze(student: PreTrainedModel) -> None:
    """Let gradients reach whatever the class trains, in place: the teacher may be frozen, sinusoids stay so."""
    if all(parameter.requires_grad for parameter in student.parameters()):
        return
    built = dict(built_model(student, copy.deepcopy(student.config)).named_parameters())
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(built[name].requires_grad if name in built else True)


# ---- copying ----


def _layer_pairs(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, str]:
    """Path of each layer of the student to the path of the teacher's layer that it takes its weights from."""
    theirs = _named_stacks(teacher)
    pairs: dict[str, str] = {}
    for stack, (path, count) in _named_stacks(student).items():
        if stack not in theirs:
            continue
        origin, layers = theirs[stack]
        index = [number for _, number in uniform_map(count, layers)]
        if 0 < count < layers:
            index = list(_spread(teacher, stack, count, layers))
        pairs |= {f"{path}.{new}.": f"{origin}.{old}." for new, old in enumerate(index)}
    return pairs


def _paired_name(name: str, prefixes: Mapping[str, str]) -> str:
    return next((old + name.removeprefix(new) for new, old in prefixes.items() if name.startswith(new)), name)


@dataclass(frozen=True)
class _Rows:
    """Which rows of a tensor come from which rows of the teacher's: the first ones, in this order."""

    dim: int
    index: tuple[int, ...]


def _row_maps(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, _Rows]:
    """The tensors with an entry per token or label whose entries are not simply the teacher's."""
    maps: dict[str, _Rows] = {}
    sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        shared = tuple(range(match_vocabularies(student, teacher)))
        maps |= {name: _Rows(dim, shared) for name, dim in _growing(student, _add_tokens).items()}
    labels = _label_order(student.config, teacher.config)
    if labels is not None:
        maps |= {name: _Rows(dim, labels) for name, dim in _growing(student, _add_label).items()}
    return maps


def _label_order(student: PreTrainedConfig, teacher: PreTrainedConfig) -> tuple[int, ...] | None:
    """For each label of the student its number with the teacher: none if they differ; None if nothing is to be done."""
    if student.num_labels != teacher.num_labels:
        return None  # shapes tell
    ours, theirs = ([str(config.id2label[n]) for n in range(config.num_labels)] for config in (student, teacher))
    if ours == theirs or any(all(name.startswith("LABEL_") for name in side) for side in (ours, theirs)):
        return None
    return tuple(theirs.index(name) for name in ours) if sorted(ours) == sorted(theirs) else ()


def _add_tokens(config: Any) -> None:
    config.get_text_config().vocab_size += _LEAST_MULTIPLE


def _add_label(config: Any) -> None:
    config.num_labels += 1


def _growing(model: PreTrainedModel, change: Callable[[Any], None]) -> dict[str, int]:
    """The dimension of each tensor that follows from something in the config, found by changing that."""
    config = copy.deepcopy(model.config)
    change(config)
    now, then = (built_model(model, c).state_dict() for c in (copy.deepcopy(model.config), config))
    return {
        name: dim
        for name, tensor in now.items()
        if name in then and tensor.dim() == then[name].dim()
        for dim in range(tensor.dim())
        if tensor.shape[dim] != then[name].shape[dim]
    }


def _fill(mine: torch.Tensor, given: torch.Tensor, rows: _Rows | None) -> int:
    """Copy what fits of a tensor, in place; the number of entries that are left as they were."""
    if rows is None:
        if mine.shape != given.shape:
            return mine.numel()
        mine.copy_(given)
        return 0
    count = len(rows.index)
    target = mine.narrow(rows.dim, 0, count)
    source = given.index_select(rows.dim, torch.tensor(rows.index, dtype=torch.long, device=given.device))
    if target.shape != source.shape:
        return mine.numel()
    target.copy_(source)
    return mine.numel() - target.numel()


def _vocabulary_size(model: PreTrainedModel) -> int:
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(model).__name__} has no vocabulary")
    return size
