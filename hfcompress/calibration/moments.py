"""Second moments: of what enters a linear layer, and of the loss's gradients at its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration.frozen import frozen
from hfcompress.calibration.predictions import batch_loss
from hfcompress.calibration.tokens import real_tokens
from hfcompress.calibration.walk import Batch, LayerWalk

# So many numbers are multiplied at once: short batches would spend their time on adding up matrices.
_NUMBERS = 2**20
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


def set_linear_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Give a linear layer, also transformers' Conv1D, the values of a weight of shape (outputs, inputs), in place.

    Example:
        >>> layer = Conv1D(1, 2)
        >>> set_linear_weight(layer, torch.tensor([[3.0, 4.0]]))
        >>> layer.weight.tolist(), linear_weight(layer).tolist()
        ([[3.0], [4.0]], [[3.0, 4.0]])
    """
    with torch.no_grad():
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)  # type: ignore[operator, union-attr]


class InputMoments:
    """Second moments of what enters modules while a model is run; modules that read the same tensor share them.

    Args:
        modules: By name.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> inputs, x = InputMoments({"first": first, "second": second}), torch.eye(2)
        >>> with inputs.watched({}):
        ...     y = first(x) + second(x)
        >>> [(names, moments.products.tolist()) for names, moments in inputs.groups()]
        [(['first', 'second'], [[1.0, 0.0], [0.0, 1.0]])]
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._owners: dict[str, str] = {}  # of each module that was reached the first that reads the same
        self._waiting: dict[str, list[torch.Tensor]] = {}
        self._moments: dict[str, Moments] = {}

    @contextlib.contextmanager
    def watched(self, batch: Batch, *, decoder: Container[str] = ()) -> Iterator[None]:
        """A context in which the model is run once on a batch.

        Args:
            batch: Its inputs, for what is padding.
            decoder: Names of the modules that belong to a decoder: see `real_tokens`.
        """
        tensors: dict[int, tuple[str, torch.Tensor]] = {}  # kept, for an id is that of one tensor only while it lives

        def see(name: str, tensor: torch.Tensor) -> None:
            owner = self._owners.setdefault(name, tensors.setdefault(id(tensor), (name, tensor))[0])
            if owner == name:
                # A copy, or at once: some layers change their input in place afterwards.
                features = real_tokens(tensor.detach(), batch, decoder=name in decoder)
                self._add(name, features.clone() if features.data_ptr() == tensor.data_ptr() else features)

        with contextlib.ExitStack() as stack:
            for name, module in self._modules.items():
                handle = module.register_forward_pre_hook(lambda _module, args, name=name: see(name, args[0]))
                stack.callback(handle.remove)
            yield

    def _add(self, name: str, features: torch.Tensor) -> None:
        waiting = self._waiting.setdefault(name, [])
        waiting.append(features)
        if sum(map(torch.numel, waiting)) >= _NUMBERS:
            self._sum_up(name)

    def _sum_up(self, name: str) -> None:
        features = torch.cat(self._waiting.pop(name))
        self._moments.setdefault(name, Moments.zeros(features.shape[1], features.device)).add(features)

    def groups(self) -> list[tuple[list[str], Moments]]:
        """Modules that read the same, and its moments, in the order in which they were reached; the others are left out."""
        for name in list(self._waiting):
            self._sum_up(name)
        names: dict[str, list[str]] = {}
        for name, owner in self._owners.items():
            names.setdefault(owner, []).append(name)
        return [(group, self._moments[owner]) for owner, group in names.items()]

    def by_name(self) -> dict[str, Moments]:
        """The moments of each module that was reached."""
        return {name: moments for group, moments in self.groups() for name in group}


def step_moments(walk: LayerWalk, step: int, modules: Mapping[str, nn.Module]) -> dict[str, Moments]:
    """Second moments of what enters modules inside a step, over all batches of a walk; the step is left.

    Args:
        walk: A walk that has entered the step.
        step: Its number.
        modules: By name.

    Returns:
        Name to moments; modules that were not reached are left out.
    """
    inputs = InputMoments(modules)
    for number, batch in enumerate(walk.batches):
        with inputs.watched(batch, decoder=modules if walk.is_decoder(step) else ()):
            after = walk.run(step, number)
        if after is not None:
            walk.hidden[number] = after
    walk.leave(step, walk.hidden)
    return inputs.by_name()


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
