"""Second moments: of what enters a linear layer, and of the loss's gradients at its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration.frozen import frozen
from hfcompress.calibration.predictions import batch_loss
from hfcompress.calibration.tokens import real_tokens
from hfcompress.calibration.walk import Batch, LayerWalk

# So many tokens are multiplied at once: short batches would spend their time on adding up matrices.
_TOKENS = 4096
# Second moments are symmetric: of matrices larger than this, blocks below the diagonal are copied.
_BLOCK = 384


@dataclass
class Moments:
    """Sums over tokens of what enters a linear layer.

    Attributes:
        products: Sum of x x^T, float64, shape (inputs, inputs).
        total: Sum of x, float64, shape (inputs,).
        count: Number of tokens.
    """

    products: torch.Tensor
    total: torch.Tensor
    count: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Moments:
        """Of nothing yet."""
        options = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(width, width, **options), torch.zeros(width, **options), torch.zeros((), **options))  # type: ignore[arg-type]

    def add(self, features: torch.Tensor) -> None:
        """Add tokens, shape (tokens, inputs), in place; products in float32, sums in float64."""
        features = features.float()
        self.products += gram(features).double()
        self.total += features.double().sum(0)
        self.count += len(features)

    def covariance(self) -> torch.Tensor:
        """Mean of (x - mean x)(x - mean x)^T, float64: what is left once the bias takes care of the mean."""
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)

    def second_moment(self) -> torch.Tensor:
        """Mean of x x^T, float64."""
        return self.products / self.count


def gram(features: torch.Tensor) -> torch.Tensor:
    """x^T x, shape (features, features), in little more than half the time for many features.

    Example:
        >>> x = torch.arange(6.0).view(2, 3)
        >>> torch.equal(gram(x), x.T @ x)
        True
    """
    width = features.shape[1]
    if width < 2 * _BLOCK:
        return features.T @ features
    product = features.new_empty(width, width)
    for start in range(0, width, _BLOCK):
        end = min(width, start + _BLOCK)
        product[start:end, start:] = features[:, start:end].T @ features[:, start:]
        product[end:, start:end] = product[start:end, end:].T
    return product


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, also of transformers' Conv1D, as (outputs, inputs), without graph."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[assignment, operator, union-attr]
    return weight.T if isinstance(module, Conv1D) else weight


def step_moments(walk: LayerWalk, step: int, modules: Mapping[str, nn.Module]) -> dict[str, Moments]:
    """Second moments of what enters modules inside a step, over all batches of a walk; the step is left.

    Args:
        walk: A walk that has entered the step.
        step: Its number.
        modules: By name.

    Returns:
        Name to moments; modules that were not reached are left out.
    """
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    waiting: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    moments: dict[str, Moments] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name].append(args[0].detach())

        return hook

    def add(name: str) -> None:
        if waiting[name]:
            features = torch.cat(waiting[name])
            moments.setdefault(name, Moments.zeros(features.shape[1], features.device)).add(features)
            waiting[name].clear()

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    try:
        for number, batch in enumerate(walk.batches):
            after = walk.run(step, number)
            if after is not None:
                walk.hidden[number] = after
            for name, calls in seen.items():
                waiting[name] += [real_tokens(features, batch, decoder=walk.is_decoder(step)) for features in calls]
                calls.clear()
                if sum(map(len, waiting[name])) >= _TOKENS:
                    add(name)
    finally:
        for handle in handles:
            handle.remove()
    for name in modules:
        add(name)
    walk.leave(step, walk.hidden)
    return moments


def output_gradients(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch], *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Second moments of the gradients of the model's own predictions at the outputs of modules, per example.

    Together with the second moments of the inputs they approximate the Fisher information of a layer's weights as a
    Kronecker product (K-FAC: Martens and Grosse 2015, section 3).

    Args:
        model: The model; it is looked at in evaluation mode and left as it was.
        modules: By name; those whose gradients are wanted.
        batches: Inputs.
        seed: Of the answers that are drawn.

    Returns:
        Name to the sum over tokens of g g^T divided by the number of examples, float32, shape (outputs, outputs). Times the
        mean over tokens of x x^T this is the Fisher information per example. Modules that were not reached are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    examples = 0
    outputs: list[tuple[str, torch.Tensor]] = []

    def keep(name: str) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            outputs.append((name, output))
            return output.clone()  # some layers add to it in place

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        for batch in tqdm(batches, desc="gradients", leave=False, delay=2):
            outputs.clear()
            with frozen(model), torch.enable_grad():  # only what lies between the outputs needs a graph
                loss, count = batch_loss(model, batch, loss="self", generator=generator)
                gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
            examples += count
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                if gradient is not None:
                    product = gram(gradient.detach().reshape(-1, gradient.shape[-1]).float())
                    sums[name] = sums[name] + product if name in sums else product
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / examples for name, value in sums.items()}
