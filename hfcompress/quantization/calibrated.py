"""Rounding a model layer by layer on sample data: each layer sees what the rounded layers before it give."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from hfcompress.calibration import (
    Batch,
    InputMoments,
    LayerWalk,
    Moments,
    StreamedLayers,
    give_back_memory,
    linear_weight,
    set_linear_weight,
)
from hfcompress.quantization.fitting import Fit
from hfcompress.quantization.formats import Rounded, format_of
from hfcompress.quantization.kept import KeptLayers
from hfcompress.quantization.rounding import Sweep, round_columns

logger = logging.getLogger(__name__)

_DAMPING = 0.01


def round_at_once(
    model: nn.Module, formats: Mapping[str, str], *, fit: Fit = "min-max", streamed: StreamedLayers | None = None
) -> dict[str, Rounded]:
    """Each weight to the nearest number of its grid, without data, in place.

    Args:
        model: The model; its weights become what the grids say.
        formats: Name of a linear layer to how it is written: see `format_of`.
        fit: See `fit_grid`.
        streamed: The layers whose weights are read from disk, if the model is in `stream_layers`.

    Returns:
        The layers, by name.
    """
    rounded = {}
    for name, written in tqdm(formats.items(), desc="rounding", delay=2, leave=False):
        linear, form = model.get_submodule(name), format_of(written)
        with _held(streamed, linear):
            weight = linear_weight(linear).float()
            grid = form.fit(weight, fit=fit)
            rounded[name] = Rounded.of(form, grid, grid.encode(weight))
            _set_weight(linear, rounded[name], streamed)
    return rounded


def round_on_data(
    model: nn.Module,
    batches: Sequence[Batch],
    formats: Mapping[str, str],
    *,
    fit: Fit = "mse",
    damping: float = _DAMPING,
    by_activation: bool = True,
    keep: str | Path | None = None,
    streamed: StreamedLayers | None = None,
) -> dict[str, Rounded]:
    """Second-order rounding on sample data, layer by layer, in place.

    Layers are rounded one after the other, each on what the rounded layers before it give; within a layer the columns not yet rounded
    make up for the error of those that are (GPTQ: Frantar et al. 2023). In memory are the model (in `stream_layers`: one of its layers,
    and what is no layer), the packed codes, the hidden states between two layers and one layer's second moments.

    Args:
        model: The model, in evaluation mode; its weights become what the grids say.
        batches: Inputs of its forward; padding does not count.
        formats: Name of a linear layer to how it is written: see `format_of`. Those outside the transformer layers, and those that no
            batch reaches, are rounded to the nearest.
        fit: How the grids are fitted; "mse" weighs errors by the second moments of the inputs.
        damping: Share of the mean second moment that is added to each.
        by_activation: Round the inputs with the largest second moment first.
        keep: A folder where each rounded transformer layer is kept, so that a run that was stopped goes on there; None keeps none.
        streamed: The layers whose weights are read from disk, if the model is in `stream_layers`; the result is the same.

    Returns:
        The layers, by name.

    Raises:
        ValueError: A format is not known, or `keep` holds the layers of another run.
    """
    kept = None
    if keep is not None:
        settings = {"formats": dict(formats), "fit": fit, "damping": damping, "by_activation": by_activation}
        weights = sorted(model.state_dict().items()) if streamed is None else streamed.named_weights()
        kept = KeptLayers(keep, weights, batches, settings)
    walk = LayerWalk(model, batches)
    rounded: dict[str, Rounded] = {}
    for step, (label, layer) in enumerate(tqdm(walk.steps, desc="rounding", unit="layer", delay=2)):
        inside = _inside(model, layer, formats)
        walk.enter(step)
        with _held(streamed, layer):
            done = kept.read(step, next(model.parameters()).device) if kept is not None else None
            if done is None:
                done = {}
                groups = _look(walk, step, inside)
                while groups:
                    done |= _round_group(inside, *groups.pop(), formats, fit, damping, by_activation)
                give_back_memory()
                if kept is not None:
                    kept.write(step, done)
            for name, layer_rounded in done.items():
                _set_weight(inside[name], layer_rounded, streamed)
            rounded |= done
            logger.debug("rounded %s", label)
            walk.leave(step)
    rest = {name: written for name, written in formats.items() if name not in rounded}
    return rounded | round_at_once(model, rest, fit=fit, streamed=streamed)


def _held(streamed: StreamedLayers | None, module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which a module has its weights."""
    return contextlib.nullcontext() if streamed is None else streamed.held(module)


def _set_weight(linear: nn.Module, rounded: Rounded, streamed: StreamedLayers | None) -> None:
    """Give a linear layer its rounded weight, now and whenever it is read again."""
    set_linear_weight(linear, rounded.weight())
    if streamed is not None:
        streamed.replace(linear, rounded.weight)


def _inside(model: nn.Module, layer: nn.Module, formats: Mapping[str, str]) -> dict[str, nn.Module]:
    """The linear layers of a transformer layer, by their name in the model."""
    here = {id(module) for module in layer.modules()}
    found = {name: model.get_submodule(name) for name in formats}
    return {name: module for name, module in found.items() if id(module) in here}


def _look(walk: LayerWalk, step: int, modules: Mapping[str, nn.Module]) -> list[tuple[list[str], Moments]]:
    """Second moments of what enters modules of a step that is not rounded yet; those that read one tensor together."""
    inputs = InputMoments(modules)
    for number, batch in enumerate(walk.batches):
        with inputs.watched(batch, decoder=modules if walk.is_decoder(step) else ()):
            walk.run(step, number)
    return inputs.groups()


def _round_group(
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    moments: Moments,
    formats: Mapping[str, str],
    fit: Fit,
    damping: float,
    by_activation: bool,
) -> dict[str, Rounded]:
    """Round layers that read the same inputs, of which nothing is left."""
    moment = moments.products.div_(moments.count)
    sweep = Sweep.of(moment, damping=damping, by_activation=by_activation)
    rounded = {}
    for name in names:
        linear, form = modules[name], format_of(formats[name])
        weight = linear_weight(linear).float()
        grid = form.fit(weight, fit=fit, importance=moment.diagonal().float())
        rounded[name] = Rounded.of(form, grid, round_columns(weight, grid, sweep))
    return rounded
