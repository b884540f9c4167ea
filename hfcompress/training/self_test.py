"""Before the first step: is the gradient of a batch that of its parts together, as accumulation and processes need it?"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfcompress.config import ever_positive
from hfcompress.distillation import LOGIT_LOSSES
from hfcompress.training.items import ItemCounts, batch_size, count_items

if TYPE_CHECKING:
    from hfcompress.training.distilling import DistillationMixin

logger = logging.getLogger(__name__)

_EXAMPLES = 4
# Of the largest entry of a parameter's gradient; sums in another order differ by far less.
_TOLERANCE = 1e-3
_TOLERANCE_OF_HALF_PRECISION = 0.1
_SHARE = 1e-3


def check_gradients(trainer: DistillationMixin) -> None:
    """Compare the gradients of the total loss for a few examples in one batch and in two, padding included.

    A loss that divides by what is in its own batch, such as a `compute_loss_func` that passes over `num_items_in_batch`, trains
    something else with gradient accumulation or several processes than without. Dropout is off while this looks.

    Raises:
        ValueError: They differ; the line says where and by how much.
    """
    batch = _examples(trainer)
    if batch is None:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = model.training
    trainer._testing = True
    model.eval()
    try:
        with _same_random_numbers():
            counts = _counts(trainer, batch)
            whole = _gradients(trainer, model, [batch], counts)
            parts = _gradients(trainer, model, _split(batch), counts)
    finally:
        model.train(training)
        trainer._testing = False
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    pairs = [(n, a, b) for n, a, b in zip(names, whole, parts, strict=True) if a is not None and b is not None]
    # Some gradients are 0 but for rounding, such as that of a key's bias: none is held to more than its share of the largest.
    floor = max((_SHARE * float(one.abs().max()) for _, one, _ in pairs), default=0.0)
    worst, where = 0.0, ""
    for name, one, other in pairs:
        apart = float((one - other).abs().max()) / max(float(one.abs().max()), floor, torch.finfo(torch.float32).tiny)
        if apart > worst:
            worst, where = apart, name
    tolerance = _TOLERANCE if _full_precision(trainer, model) else _TOLERANCE_OF_HALF_PRECISION
    if worst > tolerance:
        raise ValueError(
            f"the gradient of {batch_size(batch)} examples is not that of their parts together (off by {100 * worst:.1f} % in {where}), so gradient "
            "accumulation and several processes would train something else; a loss of your own has to divide its sum by "
            "num_items_in_batch (or set distill.self_test to false)"
        )
    logger.info("gradients of a batch and of its parts agree (to %.1e)", worst)


def _examples(trainer: DistillationMixin) -> dict[str, Any] | None:
    """A small batch; None where the test cannot be done or would say nothing."""
    dataset = trainer.train_dataset
    reason = ""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        reason = "parameters are in shards"
    elif dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        reason = "the training data is a stream"
    elif len(dataset) < 2:
        reason = "there is only one example"
    elif _within_batch(trainer):
        reason = f"{_within_batch(trainer)} compares examples within a batch, so it depends on the batch by its nature"
    if reason:
        logger.info("gradients of a batch and of its parts are not compared: %s", reason)
        return None
    with _same_random_numbers():
        examples, collate = trainer._examples("self-test")
        count = min(_EXAMPLES, len(examples))
        batch = trainer._with_cache(collate)([examples[index] for index in range(count)])
    return dict(trainer._prepare_inputs(batch))  # type: ignore[arg-type]


def _within_batch(trainer: DistillationMixin) -> str:
    """The setting that makes examples of a batch be compared with each other; empty if there is none."""
    distill = trainer.distill
    assert distill is not None
    if ever_positive(distill.embeddings.weight) and distill.embeddings.loss in ("similarity", "contrastive"):
        return f"embeddings.loss: {distill.embeddings.loss}"
    loss = LOGIT_LOSSES.get(distill.logits.loss)
    if ever_positive(distill.logits.weight) and loss is not None and not loss.itemwise:
        return f"logits.loss: {distill.logits.loss}"
    return ""


def _counts(trainer: DistillationMixin, batch: Mapping[str, Any]) -> ItemCounts:
    shifted = trainer._predicts_next_token
    return ItemCounts.from_tensor(count_items([batch], shifted=shifted, device=trainer.args.device))


def _split(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two parts of unequal size, so that a mean of means is not the mean."""
    size = batch_size(batch)
    first = max(1, size // 3)
    parts = []
    for part in (slice(0, first), slice(first, size)):
        cut = {}
        for name, value in batch.items():
            has_rows = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == size
            cut[name] = value[part] if has_rows else value
        parts.append(cut)
    return parts


def _gradients(
    trainer: DistillationMixin, model: Any, batches: list[dict[str, Any]], counts: ItemCounts
) -> list[torch.Tensor | None]:
    """Sum over the batches; what accumulates elsewhere (`.grad`, gates) is left alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total: list[torch.Tensor | None] = [None] * len(parameters)
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
        for number, gradient in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
            if gradient is not None:
                before = total[number]
                total[number] = gradient.float() if before is None else before + gradient.float()
    return total


def _full_precision(trainer: DistillationMixin, model: Any) -> bool:
    halves = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    quantized = getattr(model, "quantization_method", None) is not None
    return not (halves or quantized or trainer.args.bf16 or trainer.args.fp16)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside, the run goes on as if nothing had been."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
