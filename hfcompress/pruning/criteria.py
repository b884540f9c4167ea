"""Criteria: a site and what is known of it in, one score per unit out; higher means keep.

Scores are sums over the weights of a unit, not means: dividing them by the unit's parameters makes heads and
neurons comparable in one list, which is what the allocation does. Every criterion is a pure function; a new one is a
function here and an entry in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Site


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        model: The model, for its weights.
        gate_gradients: Mean over optimizer steps of the squared gradient of the loss with respect to each gate,
            float32, shape (units,); None if none were collected.
        generator: Source of randomness, the same on every process.
    """

    model: nn.Module
    gate_gradients: torch.Tensor | None = None
    generator: torch.Generator | None = None


Criterion = Callable[[Site, Evidence], torch.Tensor]


def magnitude(site: Site, evidence: Evidence) -> torch.Tensor:
    """Sum of squared weights of each unit, over its rows in the writers and its columns in the reader.

    The squared L2 norm of the whole unit (Li et al. 2017 with L2; Han et al. 2015 for single weights).

    Returns:
        Scores, float32, shape (units,), at least 0.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> site = find_sites(model)[1]
        >>> up, down = (model.get_submodule(name).weight for name in (site.writers[0].module, site.reader))
        >>> expected = up.square().sum(1) + down.square().sum(0)
        >>> torch.allclose(magnitude(site, Evidence(model)), expected, atol=1e-6)
        True
    """
    scores = _per_unit(_squares(evidence.model.get_submodule(site.reader), output=False), 0, site.width, site.units)
    for writer in site.writers:
        squares = _squares(evidence.model.get_submodule(writer.module), output=True)
        for start, width in writer.bands:
            scores = scores + _per_unit(squares, start, width, site.units)
    return scores


def first_order(site: Site, evidence: Evidence) -> torch.Tensor:
    """First-order Taylor estimate of the squared change of the loss without each unit: (dL/dgate)^2 at gate 1.

    Source: Molchanov et al. 2019, equation 8, on the gates of section 3.2. The square is taken per optimizer step, over the
    whole batch of all processes, and averaged over steps. Squares and not absolute values (Michel et al. 2019), because the
    noise of a batch adds up in squares: a head with sixty times the weights of a neuron has about sixty times its square
    but only eight times its absolute value, and would lose to the neuron once both are divided by their parameters.

    Raises:
        ValueError: No gradients were collected.
    """
    if evidence.gate_gradients is None:
        raise ValueError(
            f"{site.name}: the criterion first_order needs gate gradients, and no optimizer step was made yet; "
            "start the schedule later or use magnitude"
        )
    return evidence.gate_gradients.float()


def random(site: Site, evidence: Evidence) -> torch.Tensor:
    """Uniform scores times the unit's parameters: the baseline every criterion has to beat.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> site = find_sites(model)[1]
        >>> draws = [random(site, Evidence(model, generator=torch.Generator().manual_seed(3))) for _ in range(2)]
        >>> bool((draws[0] == draws[1]).all()), draws[0].shape
        (True, torch.Size([4]))
    """
    return torch.rand(site.units, generator=evidence.generator) * site.parameters_per_unit


def _squares(module: nn.Module, *, output: bool) -> torch.Tensor:
    """Sum of squared weights per output (or input) feature, float32."""
    weight = module.weight.detach().float().square()  # type: ignore[union-attr, operator]
    keep = 0 if output else 1
    return weight.sum(dim=keep if isinstance(module, Conv1D) else 1 - keep)


def _per_unit(values: torch.Tensor, start: int, width: int, units: int) -> torch.Tensor:
    return values[start : start + units * width].view(units, width).sum(1)


CRITERIA: dict[str, Criterion] = {"first_order": first_order, "magnitude": magnitude, "random": random}
