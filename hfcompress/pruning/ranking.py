"""From sample data to curves: what a criterion needs to see is collected, and every site is ranked."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from hfcompress.anatomy import Site, find_sites, named_layers
from hfcompress.calibration import (
    Batch,
    LayerWalk,
    Loss,
    Moments,
    count_examples,
    divergence,
    frozen,
    linear_weight,
    output_gradients,
    prediction_mask,
    real_tokens,
    step_moments,
    to_device,
    with_decoder,
)
from hfcompress.pruning.criteria import CRITERIA, Criterion
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.evidence import (
    Evidence,
    Reduce,
    StepGradients,
    collect_activations,
    collect_curvature,
    collect_examples,
)
from hfcompress.pruning.obs import ReaderMoments, surgeon_curve


def rank_units(
    model: nn.Module,
    name: str,
    batches: Sequence[Batch] | None = None,
    *,
    seed: int = 0,
    loss: Loss = "self",
    collected: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    reduce: Reduce | None = None,
) -> dict[str, Curve]:
    """Rank the units of all sites by a criterion, after collecting what it needs to see.

    Args:
        model: A transformers model, not wrapped; it is left as it was.
        name: A key of `CRITERIA`.
        batches: Calibration inputs, of this process; None if there are none. Criteria that look at weights, or at the
            optimizer steps of training, need none.
        seed: Of everything random.
        loss: Whose gradients: "self" (answers drawn from the model's own predictions, no labels; losses of curves are then nats of
            divergence from the model as it is, per example) or "labels" (the model's own loss). "obs" always reads "self".
        collected: What training gathered, site name to the fields of `StepGradients`.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process. With it all processes get the
            same curves.

    Returns:
        Site name to curve, for every site with units. Where a criterion can be negative, all units are raised by the same
        score per parameter, so that the lowest is 0 and which units go for a number of parameters stays the same.

    Raises:
        ValueError: There is no such criterion, what it needs is not there, or it gave scores that are not finite.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> curves = rank_units(model, "fisher", [{"input_ids": torch.tensor([[5, 6, 7], [7, 8, 9]])}])
        >>> {site: len(curve.order) for site, curve in curves.items()}
        {'encoder.0.heads': 2, 'encoder.0.neurons': 4}
    """
    if name not in CRITERIA:
        close = difflib.get_close_matches(name, CRITERIA, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        if name == "learned":
            raise ValueError(
                "learned gates need a training run to learn in; use a Trainer or `hfcompress run`, or the criterion obs"
            )
        raise ValueError(f"there is no criterion {name!r}{hint}; there are {', '.join(CRITERIA)}")
    if CRITERIA[name].needs == "moments":
        return surgeon_curves(model, _needed(name, batches), seed=seed, reduce=reduce)
    sites = [site for site in find_sites(model) if site.units]
    seen = _collect(model, sites, name, batches, seed=seed, loss=loss, collected=collected, reduce=reduce)
    generator = torch.Generator().manual_seed(seed)
    curves: dict[str, Curve] = {}
    scores: dict[str, torch.Tensor] = {}
    for site in sites:
        result = CRITERIA[name].function(site, replace(seen[site.name], generator=generator))
        if isinstance(result, Curve):
            curves[site.name] = result
        else:
            scores[site.name] = _same_everywhere(site, model, result, reduce)
    _refuse_infinite(name, {**scores, **{site: curve.loss for site, curve in curves.items()}})
    return curves | _curves(sites, scores)


def _collect(
    model: nn.Module,
    sites: Sequence[Site],
    name: str,
    batches: Sequence[Batch] | None,
    *,
    seed: int,
    loss: Loss,
    collected: Mapping[str, Mapping[str, torch.Tensor]] | None,
    reduce: Reduce | None,
) -> dict[str, Evidence]:
    """The evidence that a criterion needs, for each site."""
    criterion: Criterion = CRITERIA[name]
    found: Mapping[str, Any]
    if criterion.needs is None:
        return {site.name: Evidence(model) for site in sites}
    if criterion.needs == "steps" and collected is not None and all(site.name in collected for site in sites):
        found = {site.name: StepGradients(**collected[site.name]) for site in sites}
    elif name == "movement":
        raise ValueError(
            "the criterion movement adds up gradients of many optimizer steps, and none were made yet; start the schedule "
            "later, or use first_order, which can do with calibration data"
        )
    elif criterion.needs == "steps":
        examples = collect_examples(model, sites, _needed(name, batches), loss=loss, seed=seed, reduce=reduce)
        found = {site: seen.batches for site, seen in examples.items()}
    elif criterion.needs == "examples":
        found = collect_examples(
            model, sites, _needed(name, batches), loss=loss, seed=seed, block=criterion.pairs, reduce=reduce
        )
    elif criterion.needs == "curvature":
        found = collect_curvature(model, sites, _needed(name, batches), loss=loss, seed=seed, reduce=reduce)
    else:
        found = collect_activations(model, sites, _needed(name, batches), reduce=reduce)
    fields: dict[str, dict[str, Any]] = {site.name: {criterion.needs: found[site.name]} for site in sites}
    return {site: Evidence(model, **values) for site, values in fields.items()}


def _needed(name: str, batches: Sequence[Batch] | None) -> Sequence[Batch]:
    if not batches:
        why = "no optimizer step was made yet and there is" if CRITERIA[name].needs == "steps" else "there is"
        raise ValueError(
            f"the criterion {name} looks at examples, and {why} no calibration data; pass batches, or use magnitude"
        )
    return batches


def _same_everywhere(site: Site, model: nn.Module, scores: torch.Tensor, reduce: Reduce | None) -> torch.Tensor:
    """Scores as float64 on the CPU, the same on all processes."""
    device: torch.device = model.get_submodule(site.readers[0]).weight.device  # type: ignore[assignment]
    scores = scores.detach().float().to(scores.device if device.type == "meta" else device).contiguous()
    if reduce is not None:
        scores = scores.clone()
        reduce(scores)
    return scores.double().cpu()


def _refuse_infinite(name: str, values: Mapping[str, torch.Tensor]) -> None:
    for site, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{site}: the criterion {name} gave NaN or infinity: the training has diverged, or the model overflows in "
                "its number format; use float32, a lower learning rate, or the criterion magnitude"
            )


def _curves(sites: Sequence[Site], scores: Mapping[str, torch.Tensor]) -> dict[str, Curve]:
    """Curves of scores, all raised by the same score per parameter where some are below 0."""
    parameters = {site.name: site.parameters_per_unit for site in sites}
    lowest = min((float(score.min()) / parameters[name] for name, score in scores.items()), default=0.0)
    return {
        name: Curve.from_scores((score - min(lowest, 0.0) * parameters[name]).clamp(min=0) if lowest < 0 else score)
        for name, score in scores.items()
    }


# ---- whole layers ----


def block_influence(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """How much each layer turns the hidden states: 1 - mean cosine between what enters and what leaves it.

    ShortGPT (Men et al. 2024), equation 1; the mean is over all real tokens, and over all calls of a layer that is used
    several times.

    Args:
        model: A transformers model, not wrapped; it is left as it was.
        batches: Calibration inputs.

    Returns:
        Layer name ("encoder.3") to influence, in [0, 2]; layers that were not reached are left out.

    Raises:
        ValueError: There is no data.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4))
        >>> influence = block_influence(model, [{"input_ids": torch.tensor([[5, 6, 7]])}])
        >>> list(influence), all(0 <= value <= 2 for value in influence.values())
        (['encoder.0', 'encoder.1'], True)
    """
    _refuse_no_batches(batches)
    sums = {name: (0.0, 0) for name in named_layers(model)}
    batch: Batch = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            decoder = name.startswith("decoder.")
            before, after = (
                real_tokens(each.float(), batch, decoder=decoder) for each in _in_and_out(args, kwargs, output)
            )
            cosine = cosine_similarity(before, after, dim=-1)
            total, count = sums[name]
            sums[name] = (total + float(cosine.double().sum()), count + len(cosine))

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in named_layers(model).items():
            stack.callback(layer.register_forward_hook(keep(name), with_kwargs=True).remove)
        stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())
        for raw in tqdm(batches, desc="block influence", leave=False, delay=2):
            batch = with_decoder(raw, model)
            model(**to_device(batch, model))
    return {name: 1 - total / count for name, (total, count) in sums.items() if count}


def layer_losses(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """What dropping each layer alone does to the predictions: `divergence` from the model as it is, per example.

    One forward pass for each layer and one more.

    Args:
        model: A transformers model, not wrapped; it is left as it was.
        batches: Calibration inputs; labels are not used.

    Returns:
        Layer name ("encoder.3") to nats per example, 0 or more; of hidden states half the squared distance per example. Of
        predictions per token the sum over the real tokens. The unit is that of "obs" and "fisher".

    Raises:
        ValueError: There is no data.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4)
        >>> losses = layer_losses(BertForSequenceClassification(config), [{"input_ids": torch.tensor([[5, 6, 7]])}])
        >>> list(losses), min(losses.values()) >= 0
        (['encoder.0', 'encoder.1'], True)
    """
    _refuse_no_batches(batches)
    layers = named_layers(model)
    totals = dict.fromkeys(layers, 0.0)
    examples = 0
    with frozen(model), torch.no_grad():
        for batch in tqdm(batches, desc="losses of layers", leave=False, delay=2):
            inputs = to_device(batch, model)
            whole = model(**inputs)
            mask = prediction_mask(whole, inputs)
            problem_type = getattr(model.config, "problem_type", None)
            for name, layer in layers.items():
                with _skipped(layer):
                    without = model(**inputs)
                totals[name] += float(divergence(whole, without, mask=mask, problem_type=problem_type))
            examples += count_examples(inputs)
    return {name: max(total, 0.0) / examples for name, total in totals.items()}


@contextlib.contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """The layer's output is its input; what else it returns (a position bias that the next layers read) stays."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before, _ = _in_and_out(args, kwargs, output)
        return before if torch.is_tensor(output) else (before, *output[1:])

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _in_and_out(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that enter and leave a layer."""
    return args[0] if args else kwargs["hidden_states"], output if torch.is_tensor(output) else output[0]


def _refuse_no_batches(batches: Sequence[Batch]) -> None:
    if not batches:
        raise ValueError("there is no calibration data; pass at least one batch")


# ---- optimal brain surgeon ----


def surgeon_curves(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    damping: float = 1e-2,
    reduce: Reduce | None = None,
) -> dict[str, Curve]:
    """Rank all sites by optimal brain surgeon (`surgeon_curve`), one layer after the other.

    One forward and backward pass for the gradients of the model's own predictions (no labels), one walk for the second moments of the
    inputs, of which one layer's are kept at a time.

    Args:
        model: The model; it is left as it was.
        batches: Calibration inputs.
        seed: Of the answers that are drawn.
        damping: See `surgeon_curve`.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process.

    Returns:
        Site name to curve. The unit of the loss is nats per example: the expected Kullback-Leibler divergence from the model as it is.
    """
    sites = [site for site in find_sites(model) if site.units]
    with frozen(model):
        return _surgeon_curves(model, sites, batches, seed=seed, damping=damping, reduce=reduce)


def _surgeon_curves(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    *,
    seed: int,
    damping: float,
    reduce: Reduce | None,
) -> dict[str, Curve]:
    modules = {path: model.get_submodule(path) for site in sites for path in site.readers}
    gradients = output_gradients(model, modules, batches, seed=seed)
    walk = LayerWalk(model, batches)
    waiting = {site.name: list(site.readers) for site in sites}
    seen: dict[str, ReaderMoments] = {}
    curves: dict[str, Curve] = {}
    for step in tqdm(range(len(walk.steps)), desc="second moments", leave=False, delay=2):
        walk.enter(step)
        paths = walk.readers(step)
        moments = step_moments(walk, step, {path: modules[path] for path in paths})
        for path in paths:
            seen[path] = _reader_moments(
                modules[path], path, moments.pop(path, None), gradients.pop(path, None), reduce
            )
            for site in sites:
                if path in waiting[site.name]:
                    waiting[site.name].remove(path)
                    if not waiting[site.name]:
                        readers = [seen.pop(reader) for reader in site.readers]
                        curves[site.name] = surgeon_curve(readers, width=site.width, damping=damping)
    return {site.name: curves[site.name] for site in sites}


def _reader_moments(
    module: nn.Module,
    path: str,
    moments: Moments | None,
    gradients: torch.Tensor | None,
    reduce: Reduce | None,
) -> ReaderMoments:
    if moments is None or gradients is None:
        raise ValueError(f"{path} has no part in the model's predictions on this data, so its units cannot be ranked")
    if reduce is not None:
        for tensor in (moments.products, moments.total, moments.count, gradients):
            reduce(tensor)
    has_bias = getattr(module, "bias", None) is not None
    inputs = moments.covariance() if has_bias else moments.second_moment()
    return ReaderMoments(linear_weight(module), inputs, gradients)
