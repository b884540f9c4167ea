"""Criteria: a site and what is known of it in, one score per unit out (higher means keep), or the whole curve.

Scores are sums over the weights of a unit, not means: dividing them by what a unit costs makes heads and neurons comparable in
one list, which is what the allocation does. A criterion that looks at pairs of units gives the order of removal and its loss
itself, as a `Curve`. Every criterion is a pure function; a new one is a function here and an entry in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Site
from hfcompress.pruning.curves import Curve
from hfcompress.pruning.evidence import Evidence
from hfcompress.pruning.obs import surgeon_curve

Needs = Literal["steps", "examples", "activations", "curvature", "moments"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Criterion:
    """A way to rank units.

    Attributes:
        function: Site and evidence in; scores, float, shape (units,), or a curve out.
        needs: The field of `Evidence` that it reads beside model and generator; None if there is none.
        pairs: Whether it reads `ExampleGradients.products`.
    """

    function: Callable[[Site, Evidence], torch.Tensor | Curve]
    needs: Needs | None = None
    pairs: bool = False


# ---- weights ----


def magnitude(site: Site, evidence: Evidence) -> torch.Tensor:
    """Sum of squared weights of each unit, over its rows in the writers and its columns in the readers and tables.

    The squared L2 norm of the whole unit (Li et al. 2017 with L2; Han et al. 2015 for single weights).

    Returns:
        Scores, float32, shape (units,), at least 0.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> site = find_sites(model)[1]
        >>> up, down = (model.get_submodule(name).weight for name in (site.writers[0].module, site.readers[0]))
        >>> expected = up.square().sum(1) + down.square().sum(0)
        >>> torch.allclose(magnitude(site, Evidence(model)), expected, atol=1e-6)
        True
    """
    return _weights_per_unit(site, evidence.model, torch.square)


def magnitude_l1(site: Site, evidence: Evidence) -> torch.Tensor:
    """Sum of absolute weights of each unit, over its rows in the writers and its columns in the readers and tables.

    The L1 norm of the whole unit (Li et al. 2017, section 3.1, for filters).

    Returns:
        Scores, float32, shape (units,), at least 0.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> site = find_sites(model)[1]
        >>> up, down = (model.get_submodule(name).weight for name in (site.writers[0].module, site.readers[0]))
        >>> torch.allclose(magnitude_l1(site, Evidence(model)), up.abs().sum(1) + down.abs().sum(0), atol=1e-6)
        True
    """
    return _weights_per_unit(site, evidence.model, torch.abs)


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


# ---- activations ----


def activation_mean(site: Site, evidence: Evidence) -> torch.Tensor:
    """Mean absolute value of what a unit feeds into the reader, summed over its features.

    Molchanov et al. 2017, section 2.2 ("mean activation"), with absolute values, because attention heads have both signs.

    Raises:
        ValueError: No activations were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import Activations
        >>> seen = Activations(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.9, 0.25]))
        >>> activation_mean(SimpleNamespace(name="a"), Evidence(None, activations=seen)).tolist()
        [0.5, 2.0]
    """
    return _present(site, evidence.activations, "activations").absolute


def activation_variance(site: Site, evidence: Evidence) -> torch.Tensor:
    """Variance over tokens of what a unit feeds into the reader, summed over its features.

    What does not vary can go into the reader's bias (Molchanov et al. 2017, section 2.2, by its standard deviation; squared here,
    so that it adds up over features).

    Raises:
        ValueError: No activations were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import Activations
        >>> seen = Activations(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.9, 0.25]))
        >>> activation_variance(SimpleNamespace(name="a"), Evidence(None, activations=seen)).tolist()
        [1.0, 3.0]
    """
    return _present(site, evidence.activations, "activations").variance


def activation_apoz(site: Site, evidence: Evidence) -> torch.Tensor:
    """One minus the average share of zeros among what a unit feeds into the reader, summed over its features.

    Hu et al. 2016, equation 1, for ReLU. GELU, gates and attention are never exactly 0: there a value counts as 0 if it is not
    larger than a tenth (`evidence.ZERO`) of the root mean square of all the site's features at the same token. With ReLU
    exact zeros are counted, too.

    Returns:
        Scores, shape (units,), from 0 to the features of a unit.

    Raises:
        ValueError: No activations were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import Activations
        >>> seen = Activations(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.75, 0.25]))
        >>> activation_apoz(SimpleNamespace(name="a", width=1, readers=("r",)), Evidence(None, activations=seen)).tolist()
        [0.25, 0.75]
    """
    return site.width * len(site.readers) - _present(site, evidence.activations, "activations").zeros


# ---- gradients ----


def first_order(site: Site, evidence: Evidence) -> torch.Tensor:
    """First-order Taylor estimate of the squared change of the loss without each unit: (dL/dgate)^2 at gate 1.

    Source: Molchanov et al. 2019, equation 8, on the gates of section 3.2. The square is taken per optimizer step, over the
    whole batch of all processes, and averaged over steps. Squares and not absolute values (Michel et al. 2019), because the
    noise of a batch adds up in squares: a head with sixty times the weights of a neuron has about sixty times its square
    but only eight times its absolute value, and would lose to the neuron once both are divided by their parameters.

    Raises:
        ValueError: No gradients were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import StepGradients
        >>> seen = StepGradients(squares=torch.tensor([4.0, 1.0]), sums=torch.tensor([-2.0, 1.0]))
        >>> first_order(SimpleNamespace(name="a"), Evidence(None, steps=seen)).tolist()
        [4.0, 1.0]
    """
    return _present(site, evidence.steps, "gate gradients of optimizer steps").squares.float()


def movement(site: Site, evidence: Evidence) -> torch.Tensor:
    """Minus the sum over optimizer steps of weight times gradient: units that training moves away from 0 are kept.

    Sanh et al. 2020, section 4 (S = - sum over steps of dL/dW * W), summed over the columns of a unit in the readers, as
    Lagunas et al. 2021 sum it over blocks; that sum is the gradient of the unit's gate. The scores of training that is done, or
    of one batch, mean little: they need many steps far from the optimum.

    Returns:
        Scores of either sign, shape (units,).

    Raises:
        ValueError: No gradients were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import StepGradients
        >>> seen = StepGradients(squares=torch.tensor([4.0, 1.0]), sums=torch.tensor([-2.0, 1.0]))
        >>> movement(SimpleNamespace(name="a"), Evidence(None, steps=seen)).tolist()
        [2.0, -1.0]
    """
    return -_present(site, evidence.steps, "gate gradients of optimizer steps").sums.float()


def taylor(site: Site, evidence: Evidence) -> torch.Tensor:
    """Mean over examples of the absolute gradient of the gate: E |dL/dgate|.

    Michel et al. 2019, section 4.1, for heads; Molchanov et al. 2017, equation 7, for feature maps.

    Raises:
        ValueError: No gradients of examples were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import ExampleGradients
        >>> seen = ExampleGradients(torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.5]), None, None)
        >>> taylor(SimpleNamespace(name="a"), Evidence(None, examples=seen)).tolist()
        [2.0, 1.0]
    """
    return _present(site, evidence.examples, "gate gradients of examples").absolute


def fisher(site: Site, evidence: Evidence) -> torch.Tensor:
    """Half the mean over examples of the squared gradient of the gate: the loss that is expected without the unit.

    The diagonal of the empirical Fisher information of the gates in place of the Hessian in the quadratic estimate of the loss (Kwon
    et al. 2022, section 4.1; LeCun et al. 1990 for the estimate). With answers drawn from the model's own predictions it is the
    Fisher information itself, and the score is in nats per example.

    Raises:
        ValueError: No gradients of examples were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import ExampleGradients
        >>> seen = ExampleGradients(torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.5]), None, None)
        >>> fisher(SimpleNamespace(name="a"), Evidence(None, examples=seen)).tolist()
        [2.5, 0.75]
    """
    return 0.5 * _present(site, evidence.examples, "gate gradients of examples").squares


def fisher_block(site: Site, evidence: Evidence) -> Curve:
    """Remove always the unit that adds least to 1/2 m^T F m, m being 1 for the units that are gone.

    F is the mean over examples of the products of gate gradients within the site, so that of two units that do the same the
    second costs three times as much as the first, and two whose effects cancel can go together. Kwon et al. 2022,
    section 4.2 (block-diagonal Fisher information, mask rearrangement), which improves one mask; here one order for all counts.

    Returns:
        The curve, in the unit of the loss per example.

    Raises:
        ValueError: No products of gradients were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.evidence import ExampleGradients
        >>> products = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
        >>> seen = ExampleGradients(None, products.diagonal(), products, None)
        >>> curve = fisher_block(SimpleNamespace(name="a"), Evidence(None, examples=seen))
        >>> curve.order.tolist(), curve.loss.tolist()  # units 0 and 1 do the same
        ([0, 2, 1], [0.0, 1.0, 3.0, 6.0])
    """
    products = _present(site, _present(site, evidence.examples, "gate gradients of examples").products, "products")
    fisher = products.detach().double().cpu()
    # What each unit would add now; infinite once it is gone.
    added = 0.5 * fisher.diagonal().clone()
    order, losses = [], [torch.zeros((), dtype=torch.float64)]
    for _ in range(len(added)):
        unit = int(added.argmin())
        order.append(unit)
        losses.append(losses[-1] + added[unit])
        added += fisher[unit]
        added[unit] = torch.inf
    # Where effects cancel the loss can fall again; a curve never does, so there it stays at the most that there was.
    loss = torch.stack(losses).cummax(0).values
    return Curve(torch.tensor(order, dtype=torch.long), loss)


def hessian(site: Site, evidence: Evidence) -> torch.Tensor:
    """Half the diagonal of the Hessian of the loss with respect to the gates: the loss that is expected without the unit.

    LeCun et al. 1990 (optimal brain damage), equation 3 without off-diagonal terms, on gates instead of weights; the diagonal is
    estimated by products of the Hessian with random vectors (`collect_curvature`).

    Returns:
        Scores, shape (units,); negative where the loss is expected to fall.

    Raises:
        ValueError: No curvature was collected.

    Example:
        >>> from types import SimpleNamespace
        >>> hessian(SimpleNamespace(name="a"), Evidence(None, curvature=torch.tensor([3.0, -1.0]))).tolist()
        [1.5, -0.5]
    """
    return 0.5 * _present(site, evidence.curvature, "curvature")


def obs(site: Site, evidence: Evidence) -> Curve:
    """Optimal brain surgeon for whole units, the rest making up for what goes: `surgeon_curve` of the site's readers.

    Returns:
        The curve, in nats per example.

    Raises:
        ValueError: No second moments were collected.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfcompress.pruning.obs import ReaderMoments
        >>> seen = (ReaderMoments(torch.tensor([[1.0, 2.0]]), torch.eye(2)),)
        >>> curve = obs(SimpleNamespace(name="a", width=1), Evidence(None, moments=seen))
        >>> curve.order.tolist(), [round(value, 1) for value in curve.loss.tolist()]  # of independent inputs 1/2 w^2
        ([0, 1], [0.0, 0.5, 2.5])
    """
    return surgeon_curve(_present(site, evidence.moments, "second moments"), width=site.width)


def _present(site: Site, value: _T | None, what: str) -> _T:
    if value is None:
        raise ValueError(
            f"{site.name}: this criterion reads {what}, and none were collected; see hfcompress.pruning.rank_units"
        )
    return value


def _weights_per_unit(site: Site, model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sum over the weights of each unit of a function of each weight, float32, shape (units,)."""
    scores = torch.zeros(site.units, device=model.get_submodule(site.readers[0]).weight.device)  # type: ignore[arg-type]
    for reader in site.readers:
        values = _per_feature(model.get_submodule(reader), function, output=False)
        scores = scores + _per_unit(values, 0, site.width, site.units).to(scores.device)
    for table in site.tables:
        values = function(model.get_parameter(table).detach().float()).sum(0)
        scores = scores + _per_unit(values, 0, site.query_heads, site.units).to(scores.device)
    for writer in site.writers:
        values = _per_feature(model.get_submodule(writer.module), function, output=True)
        for start, width in writer.bands:
            scores = scores + _per_unit(values, start, width, site.units).to(scores.device)
    return scores


def _per_feature(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], *, output: bool) -> torch.Tensor:
    """Sum of a function of the weights per output (or input) feature, float32."""
    values = function(module.weight.detach().float())  # type: ignore[union-attr, operator]
    keep = 0 if output else 1
    return values.sum(dim=keep if isinstance(module, Conv1D) else 1 - keep)


def _per_unit(values: torch.Tensor, start: int, width: int, units: int) -> torch.Tensor:
    return values[start : start + units * width].view(units, width).sum(1)


CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(obs, "moments"),
    "first_order": Criterion(first_order, "steps"),
    "taylor": Criterion(taylor, "examples"),
    "fisher": Criterion(fisher, "examples"),
    "fisher_block": Criterion(fisher_block, "examples", pairs=True),
    "hessian": Criterion(hessian, "curvature"),
    "movement": Criterion(movement, "steps"),
    "magnitude": Criterion(magnitude),
    "magnitude_l1": Criterion(magnitude_l1),
    "activation_mean": Criterion(activation_mean, "activations"),
    "activation_variance": Criterion(activation_variance, "activations"),
    "activation_apoz": Criterion(activation_apoz, "activations"),
    "random": Criterion(random),
}
