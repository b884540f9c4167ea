"""Bits where they matter: what each linear layer costs in loss and in bytes in each format, and the best format of each under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from hfcompress.anatomy.sites import linear_features
from hfcompress.calibration import (
    Batch,
    InputMoments,
    count_examples,
    divergence,
    frozen,
    linear_weight,
    output_gradients,
    prediction_mask,
    to_device,
)
from hfcompress.knapsack import Option, solve_exactly
from hfcompress.quantization.calibrated import round_at_once
from hfcompress.quantization.formats import format_of
from hfcompress.quantization.layers import layers_to_quantize

By = Literal["fisher", "divergence"]

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a weight of a layer that is not quantized
_OF_BITS = {8: "int8", 4: "nf4-dq"} | {bits: f"int{bits}-g64" for bits in (2, 3, 5, 6, 7)}
_SECOND_MOMENTS_BYTES = 2**30  # of as many layers at once as fit


@dataclass(frozen=True)
class BitCost:
    """What a layer costs in one format.

    Attributes:
        loss: Divergence of the predictions from those of the whole model, in nats per example, all other layers being whole.
        size_bytes: Of its weight on disk.
    """

    loss: float
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)


Costs = Mapping[str, Mapping[str, BitCost]]  # name of a layer, and of a format


def format_for(bits: str, *, kept: str) -> str:
    """The name of a format from what is typed: a number of bits, or a name.

    Args:
        bits: "16" or "32" leaves a layer as it is; "8" is bitsandbytes' int8 and "4" its nf4-dq; "2", "3", "5", "6" and "7" are integers in
            groups of 64; else a name as `format_of` takes it, or float32, float16, bfloat16.
        kept: The type that the model is saved in.

    Raises:
        ValueError: There is none.

    Example:
        >>> [format_for(bits, kept="float16") for bits in ("16", "8", "6", "4", "int4-g32-asym")]
        ['float16', 'int8', 'int6-g64', 'nf4-dq', 'int4-g32-asym']
    """
    if bits.isdecimal():
        if int(bits) in (16, 32):
            return kept
        if int(bits) not in _OF_BITS:
            raise ValueError(f"{bits} bits: there are 2 to 8, and 16 for a layer that is left as it is")
        return _OF_BITS[int(bits)]
    return bits if bits in FLOATS else format_of(bits).name


def bit_costs(
    model: nn.Module,
    batches: Sequence[Batch],
    formats: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    by: By = "fisher",
    seed: int = 0,
) -> dict[str, dict[str, BitCost]]:
    """What each linear layer costs in each format, rounded to the nearest with ranges of the least squared error.

    "fisher" expects it: half the quadratic form of the rounding error in the Fisher information of the model's own predictions, which is
    the second-order expansion of the divergence, with the Fisher information as a Kronecker product: 1/2 tr(G E A E^T) with the
    rounding error E, the second moment A of what enters the layer, a mean over tokens, and G of the gradients at its output, summed over
    the tokens of an example (K-FAC: Martens and Grosse 2015, section 3). All formats of all layers take one forward and one
    backward pass, or a few where second moments would take more than 1 GiB.

    "divergence" measures it: one layer at a time is really rounded and the model run, which takes as many passes as there are layers times
    formats; the predictions of the whole model on all batches are kept in memory.

    Neither sees that bitsandbytes' int8 also rounds what enters the layer.

    Args:
        model: The model; it is left as it was.
        batches: Calibration inputs; labels are not used.
        formats: Names as `format_of` takes them, and at most one of float32, float16 and bfloat16 for a layer that is not quantized:
            that costs no loss, and the bytes of this type.
        names: Linear layers; None is `layers_to_quantize`.
        by: See above.
        seed: Of the answers that "fisher" draws.

    Returns:
        Name of each layer to name of each format to its costs. A layer that no batch reaches costs no loss.

    Raises:
        ValueError: There is no data, no format or no layer, or a format is not known.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 30}
        >>> model = BertForSequenceClassification(BertConfig(**sizes)).eval()
        >>> costs = bit_costs(model, [{"input_ids": torch.randint(30, (4, 6))}], ["float32", "int8", "int3"])
        >>> query = costs["bert.encoder.layer.0.attention.self.query"]
        >>> [(name, cost.size_bytes) for name, cost in query.items()]
        [('float32', 16384), ('int8', 4352), ('int3-g64', 1664)]
        >>> query["float32"].loss == 0 < query["int8"].loss < query["int3-g64"].loss
        True
    """
    chosen = list(dict.fromkeys(name if name in FLOATS else format_of(name).name for name in formats))
    names = layers_to_quantize(model) if names is None else list(names)
    if not batches:
        raise ValueError("there is no calibration data; pass at least one batch")
    if not chosen or not names:
        raise ValueError("there is nothing to choose: pass at least one format and a model with linear layers")
    if len(FLOATS.keys() & {*chosen}) > 1:
        raise ValueError(f"layers that are not quantized are all of one type; leave all but one of {chosen} out")
    if by not in ("fisher", "divergence"):
        raise ValueError(f"costs are found by 'fisher' or 'divergence', not by {by!r}")
    modules = {name: model.get_submodule(name) for name in names}
    rounded = [name for name in chosen if name not in FLOATS]
    losses = (
        _expected(model, batches, modules, rounded, seed)
        if by == "fisher"
        else _measured(model, batches, modules, rounded)
    )
    return {
        name: {form: BitCost(losses.get((name, form), 0.0), size_bytes(module, form)) for form in chosen}
        for name, module in modules.items()
    }


def size_bytes(linear: nn.Module, form: str) -> int:
    """Bytes on disk of the weight of a linear layer in a format, or in float32, float16 or bfloat16."""
    inputs, outputs = linear_features(linear)
    return FLOATS[form] * outputs * inputs if form in FLOATS else format_of(form).size_bytes(outputs, inputs)


def assign_bits(costs: Costs, *, max_bytes: float | None = None, max_loss: float | None = None) -> dict[str, str]:
    """The best format of each layer: the least loss within some bytes, or the fewest bytes within some loss; exact.

    Losses of layers are added up, which holds as far as they are small.

    Args:
        costs: From `bit_costs`.
        max_bytes: The layers' weights take at most so many together.
        max_loss: They lose at most so much together, in nats per example. One of the two is given.

    Returns:
        Name of each layer that is quantized to the name of its format, as `round_at_once` and `round_on_data` take it; layers that are not
        quantized are left out.

    Raises:
        ValueError: No choice is within the budget, or not exactly one budget was given.

    Example:
        >>> layer = {"float16": BitCost(0.0, 200), "int8": BitCost(0.1, 110), "int4-g64": BitCost(3.0, 60)}
        >>> costs = {"first": layer, "second": {name: BitCost(cost.loss / 9, cost.size_bytes) for name, cost in layer.items()}}
        >>> assign_bits(costs, max_bytes=310)
        {'second': 'int8'}
        >>> assign_bits(costs, max_bytes=170)
        {'first': 'int8', 'second': 'int4-g64'}
        >>> assign_bits(costs, max_loss=0.15)
        {'first': 'int8', 'second': 'int8'}
    """
    if (max_bytes is None) == (max_loss is None):
        raise ValueError("give a budget of bytes or one of loss, and only one of them")
    groups = [
        [
            Option(form, cost.loss, cost.size_bytes) if max_loss is None else Option(form, cost.size_bytes, cost.loss)
            for form, cost in layer.items()
        ]
        for layer in costs.values()
    ]
    budget = max_bytes if max_bytes is not None else max_loss
    assert budget is not None
    chosen = solve_exactly(groups, budget)
    if chosen is None:
        least = sum(min(option.cost for option in group) for group in groups)
        unit, verb = ("bytes", "take") if max_loss is None else ("nats", "lose")
        raise ValueError(
            f"{budget:,.6g} {unit} are too few: these formats {verb} at least {least:,.6g}; allow more, or other formats"
        )
    pairs = zip(costs, chosen, strict=True)
    return {name: option.value for name, option in pairs if option.value not in FLOATS}


def total_cost(costs: Costs, layers: Mapping[str, str] | str) -> BitCost:
    """What all layers cost together.

    Args:
        costs: From `bit_costs`.
        layers: From `assign_bits`: those that are not named are not quantized; or the name of one format for all.

    Example:
        >>> costs = {"first": {"float16": BitCost(0.0, 200), "int8": BitCost(0.1, 110)}}
        >>> total_cost(costs, {}), total_cost(costs, "int8")
        (BitCost(loss=0.0, size_bytes=200), BitCost(loss=0.1, size_bytes=110))
    """
    taken = []
    for name, layer in costs.items():
        form = layers if isinstance(layers, str) else layers.get(name)
        taken.append(layer[form or next(kept for kept in layer if kept in FLOATS)])
    return BitCost(sum(cost.loss for cost in taken), sum(cost.size_bytes for cost in taken))


def _expected(
    model: nn.Module, batches: Sequence[Batch], modules: Mapping[str, nn.Module], formats: Sequence[str], seed: int
) -> dict[tuple[str, str], float]:
    """By the Fisher information, a few layers at a time."""
    losses = {}
    with tqdm(total=len(modules) * len(formats), desc="bits", leave=False, delay=2) as bar:
        for group in _groups(modules):
            moments = _input_moments(model, group, batches)
            gradients = output_gradients(model, group, batches, seed=seed)
            for name, module in group.items():
                weight = linear_weight(module).float()
                for form in formats:
                    if name in gradients and name in moments:
                        grid = format_of(form).fit(weight, fit="mse")
                        error = grid.decode(grid.encode(weight)) - weight
                        seen = error @ moments[name] @ error.T
                        losses[name, form] = max(0.0, 0.5 * float((gradients[name] * seen).sum()))
                    bar.update()
    return losses


def _groups(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """As many layers at a time as their second moments leave room for."""
    group: dict[str, nn.Module] = {}
    room = _SECOND_MOMENTS_BYTES
    for name, module in modules.items():
        inputs, outputs = linear_features(module)
        needed = 4 * outputs**2 + 12 * inputs**2  # of inputs the sums as well, in float64
        if group and needed > room:
            yield group
            group, room = {}, _SECOND_MOMENTS_BYTES
        group[name] = module
        room -= needed
    yield group


def _input_moments(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """Second moments of what enters layers, a mean over real tokens, float32; those that read the same tensor share one."""
    inputs = InputMoments(modules)
    decoder = {name for name in modules if "decoder" in name.split(".")}
    with frozen(model), torch.no_grad():
        for batch in batches:
            with inputs.watched(batch, decoder=decoder):
                model(**to_device(batch, model))
    means = ((names, moments.second_moment().float()) for names, moments in inputs.groups())
    return {name: mean for names, mean in means for name in names}


def _measured(
    model: nn.Module, batches: Sequence[Batch], modules: Mapping[str, nn.Module], formats: Sequence[str]
) -> dict[tuple[str, str], float]:
    """By rounding one layer at a time."""
    losses: dict[tuple[str, str], float] = {}
    problem_type = getattr(getattr(model, "config", None), "problem_type", None)
    bar = tqdm(total=len(modules) * len(formats), desc="bits", leave=False, delay=2)
    with frozen(model), torch.no_grad(), bar:
        inputs = [to_device(batch, model) for batch in batches]
        whole = [_predictions(model, each) for each in inputs]
        masks = [prediction_mask(before, each) for before, each in zip(whole, inputs, strict=True)]
        examples = sum(map(count_examples, inputs))
        for name, module in modules.items():
            for form in formats:
                with _restored(module):
                    round_at_once(model, {name: form}, fit="mse")
                    lost = sum(
                        float(divergence(before, _predictions(model, each), mask=mask, problem_type=problem_type))
                        for before, each, mask in zip(whole, inputs, masks, strict=True)
                    )
                losses[name, form] = max(0.0, lost) / examples
                bar.update()
    return losses


def _predictions(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the model returns, without caches."""
    return {name: value for name, value in model(**inputs).items() if torch.is_tensor(value)}


@contextmanager
def _restored(linear: nn.Module) -> Iterator[None]:
    """The weight of a layer is afterwards as it was, bit for bit."""
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    before = weight.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)
