"""What a model predicts, as distributions: losses that need no labels, and the distance between two models' predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax

from hfcompress.calibration.tokens import token_mask
from hfcompress.calibration.walk import Batch, to_device

Loss = Literal["self", "labels"]
_Kind = Literal["normal", "bernoulli", "categorical"]


def batch_loss(model: nn.Module, batch: Batch, *, loss: Loss, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Run a model on a batch: the sum over its examples of a loss, with a graph, and the number of examples.

    Args:
        model: A transformers model.
        batch: Its inputs.
        loss: "self" for `self_loss`, "labels" for the model's own loss; a mean over tokens counts an example by its tokens.
        generator: For the answers that are drawn, on the CPU.

    Raises:
        ValueError: The model gives no loss of its own.
    """
    if loss not in ("self", "labels"):
        raise ValueError(f"there is no loss {loss!r}; allowed are 'self' and 'labels'")
    inputs = to_device(batch, model, labels=loss == "labels")
    outputs = model(**inputs)
    examples = count_examples(inputs)
    if loss == "self":
        return self_loss(
            outputs, mask=prediction_mask(outputs, inputs), problem_type=_problem(model), generator=generator
        ), examples
    if outputs.get("loss") is None:
        raise ValueError(
            f"{type(model).__name__} gave no loss: the batches hold no labels or it has no head; use the loss 'self'"
        )
    return outputs["loss"].float() * examples, examples


def count_examples(inputs: Batch) -> int:
    """Examples of a batch: the first dimension of its first tensor."""
    return len(next(value for value in inputs.values() if torch.is_tensor(value)))


def prediction_mask(outputs: Mapping[str, Any], inputs: Batch) -> torch.Tensor | None:
    """Which positions of a model's predictions are real, shape (batch, length); None where that is not known."""
    first = next(
        (outputs[name] for name in ("logits", "start_logits", "last_hidden_state") if outputs.get(name) is not None),
        None,
    )
    return None if first is None or first.dim() < 2 else token_mask(inputs, first.shape, decoder=True)


def self_loss(
    outputs: Mapping[str, Any], *, mask: torch.Tensor | None, problem_type: str | None, generator: torch.Generator
) -> torch.Tensor:
    """Sum over a batch of the negative log-likelihood of answers drawn from the model's own distribution.

    The mean outer product of its gradients is the Fisher information of the model's predictions, which equals the Hessian of the
    Kullback-Leibler divergence to the model as it is (Martens 2020, section 5): with squared gradients of this loss, half
    of what a change of the weights costs in divergence from the original model is known without any label.

    Args:
        outputs: What the model returned. The first of logits, start_logits and end_logits, logits_per_image,
            last_hidden_state that is there is used; of a quantity (regression, hidden states) the noise is normal with variance 1.
        mask: Which positions count where there is a prediction per token, or can be the answer where there is one per
            sequence, shape (batch, length); None means all.
        problem_type: `config.problem_type`: "regression" and "multi_label_classification" are not read as one distribution.
        generator: On the CPU.

    Returns:
        A scalar with a graph.

    Example:
        >>> logits = torch.tensor([[30.0, 0.0]], requires_grad=True)
        >>> loss = self_loss({"logits": logits}, mask=None, problem_type=None, generator=torch.Generator().manual_seed(0))
        >>> round(loss.item(), 4)
        0.0
    """
    parts = []
    for kind, values, weights in _distributions(outputs, mask, problem_type):
        parts.append((_nll(kind, values, generator) * weights).sum())
    return torch.stack(parts).sum()


def divergence(
    teacher: Mapping[str, Any], student: Mapping[str, Any], *, mask: torch.Tensor | None, problem_type: str | None
) -> torch.Tensor:
    """Sum over a batch of the Kullback-Leibler divergence from one model's predictions to another's, in nats.

    Of quantities (regression, hidden states) half the squared distance, which is the divergence between normal
    distributions with variance 1: what half a squared gradient of `self_loss` estimates.

    Args:
        teacher: What the model returned whose distribution the mean is taken over.
        student: What the other model returned.
        mask: See `self_loss`.
        problem_type: See `self_loss`.

    Returns:
        A scalar, 0 or more.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> value = divergence({"logits": p}, {"logits": q}, mask=None, problem_type=None)
        >>> round(value.item(), 4)  # 1/2 ln(0.5/0.25) + 1/2 ln(0.5/0.75)
        0.1438
    """
    total = []
    pairs = zip(_distributions(teacher, mask, problem_type), _distributions(student, mask, problem_type), strict=True)
    for (kind, p, weights), (_, q, _) in pairs:
        total.append((_kl(kind, p, q) * weights).sum())
    return torch.stack(total).sum()


def _problem(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "problem_type", None)


def _distributions(
    outputs: Mapping[str, Any], mask: torch.Tensor | None, problem_type: str | None
) -> Iterator[tuple[_Kind, torch.Tensor, torch.Tensor]]:
    """The predictions: of which kind, their parameters as (rows, ...), and the weight of each row."""
    names = ["logits"] if outputs.get("logits") is not None else []
    names = names or [name for name in ("start_logits", "end_logits") if outputs.get(name) is not None]
    names = names or [name for name in ("logits_per_image", "logits_per_text") if outputs.get(name) is not None]
    kind: _Kind = "categorical"
    if not names:
        named = (name for name in ("last_hidden_state", *outputs) if outputs.get(name) is not None)
        names = [next(n for n in named if torch.is_tensor(outputs[n]) and outputs[n].is_floating_point())]
        kind = "normal"
    elif problem_type == "regression":
        kind = "normal"
    elif problem_type == "multi_label_classification":
        kind = "bernoulli"
    for name in names:
        values = outputs[name].float()
        weights = torch.ones((), device=values.device)
        if mask is not None and values.shape == mask.shape and name in ("start_logits", "end_logits"):
            values = values.masked_fill(~mask, torch.finfo(values.dtype).min)  # the answer is one of the real positions
        elif mask is not None and values.dim() == 3 and values.shape[:2] == mask.shape:
            weights = mask.reshape(-1, 1).to(values.dtype)
        yield "normal" if values.shape[-1] == 1 else kind, values.reshape(-1, values.shape[-1]), weights


def _nll(kind: _Kind, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Surprise at a draw for each row, shape (rows, 1) or (rows, values)."""
    if kind == "normal":
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        return 0.5 * (values - (values.detach() + noise)).square()
    uniform = torch.rand(values.shape, generator=generator).to(values.device)
    if kind == "bernoulli":
        drawn = uniform < values.detach().sigmoid()
        return binary_cross_entropy_with_logits(values, drawn.to(values.dtype), reduction="none")
    # Gumbel's trick on the CPU generator, so that the draw is the same wherever the model is.
    noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    return cross_entropy(values, (values.detach() + noise).argmax(-1), reduction="none").unsqueeze(1)


def _kl(kind: _Kind, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Divergence for each row, shape (rows, values)."""
    if kind == "normal":
        return 0.5 * (p - q).square()
    if kind == "categorical":
        return kl_div(log_softmax(q, -1), log_softmax(p, -1), reduction="none", log_target=True)
    share = p.sigmoid()
    return binary_cross_entropy_with_logits(q, share, reduction="none") - binary_cross_entropy_with_logits(
        p, share, reduction="none"
    )
