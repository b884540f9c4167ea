"""Evidence: what a criterion looks at, and how it is collected from sample data.

Everything streams: one batch at a time, and per site no more than a few numbers per unit are kept (for pairs of units, their
squared number). The model is left as it was: its mode, what is trained, its hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from hfcompress.anatomy import Site
from hfcompress.calibration import Batch, Loss, batch_loss, frozen, real_tokens, to_device, with_decoder
from hfcompress.pruning.gates import Gates
from hfcompress.pruning.obs import ReaderMoments

Reduce = Callable[[torch.Tensor], None]

# An input smaller than this share of the root mean square of all inputs of its token counts as zero.
ZERO = 0.1


@dataclass(frozen=True)
class StepGradients:
    """Gate gradients of optimizer steps, over the batch of all processes.

    Attributes:
        squares: Mean over steps of the squared gradient, float32, shape (units,).
        sums: Sum (or mean) over steps of the gradient, float32, shape (units,).
    """

    squares: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True)
class ExampleGradients:
    """Gate gradients of single examples.

    Attributes:
        absolute: Mean over examples of the absolute gradient, float32, shape (units,).
        squares: Mean over examples of the squared gradient, float32, shape (units,).
        products: Mean over examples of the products of the gradients of two units, float32, shape (units, units); None if
            pairs were not asked for.
        batches: What an optimizer step on each batch would have seen: gradients of the mean loss of a batch.
    """

    absolute: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor | None
    batches: StepGradients


@dataclass(frozen=True)
class Activations:
    """What enters the readers, summed over the input features of a unit (and over readers that decide together).

    Attributes:
        absolute: Mean over tokens of the absolute value, float32, shape (units,).
        variance: Variance over tokens, float32, shape (units,).
        zeros: Share of tokens with (nearly) no activation, times features per unit, float32, shape (units,): those whose
            value is not larger than `ZERO` times the root mean square over all features of the token.
    """

    absolute: torch.Tensor
    variance: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: the weights, and of one site what it needs.

    Attributes:
        model: The model, for its weights.
        generator: Source of randomness, the same on every process.
        steps: Gate gradients of optimizer steps.
        examples: Gate gradients of calibration examples.
        activations: What enters the readers.
        curvature: Diagonal of the Hessian of the mean loss of an example with respect to the gates, float32, shape (units,).
        moments: Of each reader its weight and second moments.
    """

    model: nn.Module
    generator: torch.Generator | None = None
    steps: StepGradients | None = None
    examples: ExampleGradients | None = None
    activations: Activations | None = None
    curvature: torch.Tensor | None = None
    moments: tuple[ReaderMoments, ...] | None = None


def collect_examples(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    *,
    loss: Loss = "self",
    seed: int = 0,
    block: bool = False,
    reduce: Reduce | None = None,
) -> dict[str, ExampleGradients]:
    """Gate gradients of each example: the gradient at a reader's input times that input, summed over tokens and features.

    One forward and one backward pass that computes no gradients of weights. Where a reader runs several times, or several
    readers share a decision, their gradients add up before anything is squared.

    Args:
        model: A transformers model, not wrapped; parameters may be frozen.
        sites: Sites with units.
        batches: Calibration inputs.
        loss: "self" (answers drawn from the model's own predictions, no labels) or "labels" (the model's own loss; each
            example's share of it times the number of examples).
        seed: Of the answers that are drawn.
        block: Whether pairs of units are collected, float32 of shape (units, units) per site.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process.

    Returns:
        Site name to gradients; zeros where the predictions do not depend on a site.

    Raises:
        ValueError: There is no data, or the model gives no loss of its own.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> batches = [{"input_ids": torch.tensor([[5, 6, 7], [7, 8, 9]])}]
        >>> seen = collect_examples(model, find_sites(model), batches, block=True)["encoder.0.neurons"]
        >>> seen.squares.shape, torch.allclose(seen.products.diagonal(), seen.squares)
        (torch.Size([4]), True)
    """
    sums = {site.name: _GradientSums.zeros(site, model, block) for site in sites}
    for number, per_site in enumerate(_example_gradients(model, sites, batches, loss=loss, seed=seed), start=1):
        for name, gradients in per_site.items():
            sums[name].add(gradients)
        for entry in sums.values():
            entry.steps.fill_(number)
    return {name: entry.means(reduce) for name, entry in sums.items()}


@dataclass
class _GradientSums:
    absolute: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor | None
    batch_squares: torch.Tensor
    batch_means: torch.Tensor
    examples: torch.Tensor
    steps: torch.Tensor

    @classmethod
    def zeros(cls, site: Site, model: nn.Module, block: bool) -> _GradientSums:
        device = _device(site, model)

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, device=device)

        n = site.units
        return cls(empty(n), empty(n), empty(n, n) if block else None, empty(n), empty(n), empty(), empty())

    def add(self, gradients: torch.Tensor) -> None:
        self.absolute += gradients.abs().sum(0)
        self.squares += gradients.square().sum(0)
        if self.products is not None:
            self.products.addmm_(gradients.T, gradients)
        mean = gradients.mean(0)
        self.batch_squares += mean.square()
        self.batch_means += mean
        self.examples += len(gradients)

    def means(self, reduce: Reduce | None) -> ExampleGradients:
        tensors = (self.absolute, self.squares, self.products, self.batch_squares, self.batch_means)
        _reduce((*tensors, self.examples, self.steps), reduce)
        examples, steps = self.examples.clamp(min=1), self.steps.clamp(min=1)
        return ExampleGradients(
            self.absolute / examples,
            self.squares / examples,
            None if self.products is None else self.products / examples,
            StepGradients(self.batch_squares / steps, self.batch_means / steps),
        )


def _example_gradients(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], *, loss: Loss, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """For each batch, site name to gate gradients, float32, shape (examples, units)."""
    _refuse_none(batches)
    generator = torch.Generator().manual_seed(seed)
    seen: list[tuple[Site, torch.Tensor]] = []

    def track(site: Site, _path: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            features, *rest = args
            # Of its own for this reader, so that what other modules do with the same tensor does not count.
            features = features.view_as(features) if features.requires_grad else features.detach().requires_grad_()
            seen.append((site, features))
            return (features, *rest)

        return hook

    with _reader_hooks(model, sites, track):
        for batch in tqdm(batches, desc="gradients of examples", leave=False, delay=2):
            seen.clear()
            with frozen(model), torch.enable_grad():
                total, examples = batch_loss(model, batch, loss=loss, generator=generator)
                gradients = torch.autograd.grad(total, [features for _, features in seen], allow_unused=True)
            per_site: dict[str, torch.Tensor] = {}
            for (site, features), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    part = _per_example(features.detach(), gradient, site, examples).to(_device(site, model))
                    per_site[site.name] = per_site[site.name] + part if site.name in per_site else part
            yield per_site


def _per_example(features: torch.Tensor, gradient: torch.Tensor, site: Site, examples: int) -> torch.Tensor:
    # The first dimension is the batch, possibly times something (windows, tokens). The other tower of a model of pairs may
    # have a batch of its own: then its rows are the examples.
    rows = examples if features.shape[0] % examples == 0 else features.shape[0]
    product = features.float() * gradient.float()
    return product.reshape(rows, -1, site.units, site.width).sum((1, 3))


def collect_activations(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], *, reduce: Reduce | None = None
) -> dict[str, Activations]:
    """Mean absolute value, variance and share of zeros of what enters the readers, over the real tokens of all batches.

    Args:
        model: A transformers model, not wrapped.
        sites: Sites with units.
        batches: Calibration inputs.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process.

    Raises:
        ValueError: There is no data.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> seen = collect_activations(model, find_sites(model), [{"input_ids": torch.tensor([[5, 6, 7]])}])
        >>> seen["encoder.0.heads"].variance.shape
        torch.Size([2])
    """
    _refuse_none(batches)
    sums = {path: _ActivationSums.empty(site, _device(site, model, path)) for site in sites for path in site.readers}
    batch: Batch = {}

    def add(site: Site, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums[path].add(real_tokens(args[0].detach(), batch, decoder=site.stack == "decoder"))

        return hook

    with _reader_hooks(model, sites, add), frozen(model), torch.no_grad():
        for raw in tqdm(batches, desc="activations", leave=False, delay=2):
            batch = with_decoder(raw, model)
            model(**to_device(batch, model))
    found = {}
    for site in sites:
        parts = [sums[path].per_unit(site, reduce) for path in site.readers]
        home = parts[0].absolute.device
        fields = zip(*((part.absolute, part.variance, part.zeros) for part in parts), strict=True)
        found[site.name] = Activations(*(sum(value.to(home) for value in values) for values in fields))
    return found


@dataclass
class _ActivationSums:
    """Sums over tokens, float64, per input feature of a reader."""

    absolute: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    zeros: torch.Tensor
    count: torch.Tensor

    @classmethod
    def empty(cls, site: Site, device: torch.device) -> _ActivationSums:
        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        width = site.units * site.width
        return cls(empty(width), empty(width), empty(width), empty(width), empty())

    def add(self, features: torch.Tensor) -> None:
        features = features.float()
        squares = features.square()
        small = squares <= ZERO**2 * squares.mean(1, keepdim=True)
        for total, values in (
            (self.absolute, features.abs()),
            (self.total, features),
            (self.squares, squares),
            (self.zeros, small),
        ):
            total += values.sum(0, dtype=torch.float64)
        self.count += len(features)

    def per_unit(self, site: Site, reduce: Reduce | None) -> Activations:
        _reduce((self.absolute, self.total, self.squares, self.zeros, self.count), reduce)
        count = self.count.clamp(min=1)
        variance = (self.squares / count - (self.total / count).square()).clamp(min=0)
        values = (self.absolute / count, variance, self.zeros / count)
        return Activations(*(value.view(site.units, site.width).sum(1).float() for value in values))


def collect_curvature(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    *,
    loss: Loss = "self",
    seed: int = 0,
    probes: int = 4,
    reduce: Reduce | None = None,
) -> dict[str, torch.Tensor]:
    """Diagonal of the Hessian of the mean loss of an example with respect to the gates, estimated without the Hessian H.

    Hutchinson's estimator (Bekas, Kokiopoulou and Saad 2007, equation 1): the mean of z * (H z) over vectors z of random signs, drawn for all
    gates at once; each H z is one backward pass through the backward pass (Pearlmutter 1994).

    Args:
        model: A transformers model, not wrapped; parameters may be frozen.
        sites: Sites with units.
        batches: Calibration inputs.
        loss: See `collect_examples`.
        seed: Of the answers and of the signs.
        probes: Vectors z per batch; the error falls with the square root of their number times that of batches.
        reduce: Takes the mean of a tensor over all processes, in place; None for one process.

    Returns:
        Site name to the diagonal, float32, shape (units,); it may be negative.

    Raises:
        ValueError: There is no data, or the model gives no loss of its own.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
        >>> diagonal = collect_curvature(model, find_sites(model), [{"input_ids": torch.tensor([[5, 6, 7]])}])
        >>> diagonal["encoder.0.neurons"].shape
        torch.Size([4])
    """
    _refuse_none(batches)
    answers, signs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    count = 0
    gates = Gates(model, sites)
    gates.require_grad()
    total = {name: torch.zeros_like(value, requires_grad=False) for name, value in gates.values.items()}
    try:
        for batch in tqdm(batches, desc="curvature", leave=False, delay=2):
            # Of the fused kernels of attention the backward pass cannot be differentiated.
            with frozen(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                value, examples = batch_loss(model, batch, loss=loss, generator=answers)
                for name, part in _hutchinson(value, gates.values, signs, probes):
                    total[name] += part / probes
            count += examples
    finally:
        gates.remove()
    counted = torch.tensor(float(count), device=next(iter(total.values())).device) if total else torch.ones(())
    _reduce((*total.values(), counted), reduce)
    return {name: value / counted.to(value.device) for name, value in total.items()}


def _hutchinson(
    loss: torch.Tensor, gates: Mapping[str, torch.Tensor], generator: torch.Generator, probes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """For each probe z and each site, z * (H z)."""
    names = list(gates)
    gradients = torch.autograd.grad(loss, [gates[name] for name in names], create_graph=True, allow_unused=True)
    reached = [(n, g) for n, g in zip(names, gradients, strict=True) if g is not None and g.requires_grad]
    for _ in range(probes if reached else 0):
        z = {name: torch.randint(2, g.shape, generator=generator).to(g) * 2 - 1 for name, g in reached}
        product = torch.stack([(g * z[name]).sum().to(loss.device) for name, g in reached]).sum()
        second = torch.autograd.grad(
            product, [gates[name] for name, _ in reached], retain_graph=True, allow_unused=True
        )
        yield from ((name, z[name] * h) for (name, _), h in zip(reached, second, strict=True) if h is not None)


@contextlib.contextmanager
def _reader_hooks(
    model: nn.Module, sites: Sequence[Site], hook: Callable[[Site, str], Callable[..., object]]
) -> Iterator[None]:
    """Hooks before all readers, for as long as it lasts."""
    with contextlib.ExitStack() as stack:
        for site in sites:
            for path in site.readers:
                handle = model.get_submodule(path).register_forward_pre_hook(hook(site, path))
                stack.callback(handle.remove)
        yield


def _device(site: Site, model: nn.Module, path: str | None = None) -> torch.device:
    return model.get_submodule(path or site.readers[0]).weight.device  # type: ignore[return-value]


def _reduce(tensors: Iterable[torch.Tensor | None], reduce: Reduce | None) -> None:
    for tensor in tensors:
        if tensor is not None and reduce is not None:
            reduce(tensor)


def _refuse_none(batches: Sequence[Batch]) -> None:
    if not batches:
        raise ValueError("there is no calibration data; pass at least one batch")
