"""How like a model's outputs are to another's, where nothing says what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from hfcompress.config import MeasureConfig
from hfcompress.hub.verify import PREDICTIONS
from hfcompress.measurement import Answers, Metric, accuracy, example_inputs
from hfcompress.measurement.latency import placement
from hfcompress.runs.evaluation import Rate, length_for
from hfcompress.tasks.scores import EmbeddingScores, Scores

Kind = Literal["classes", "quantity", "hidden"]
MADE_UP = 32  # examples, where none are given
_ROWS = 4


def rate_beside_first(batches: Sequence[Mapping[str, torch.Tensor]] = (), *, measure: MeasureConfig) -> Rate:
    """What scores models by the outputs of the first of them.

    Classes, of each example or of each token that is no padding: the share that is the same ("agreement"). A quantity: the correlation.
    Hidden states: the mean cosine of those of an example.

    Args:
        batches: What all of them see; without any, `MADE_UP` examples are made up.
        measure: The length of those.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
        >>> rate = rate_beside_first(measure=MeasureConfig(length=5))
        >>> [(metric.name, metric.value, metric.n) for metric, _ in (rate(model), rate(model))]
        [('agreement', 1.0, 32), ('agreement', 1.0, 32)]
    """
    given, reference = list(batches), None

    def rate(model: nn.Module) -> tuple[Metric, Answers | None]:
        nonlocal reference
        if not given:
            length = length_for(model, measure)
            seeds = range(MADE_UP // _ROWS)
            given.extend(example_inputs(model, batch=_ROWS, length=length, seed=seed) for seed in seeds)
        model.eval()
        kinds, parts = zip(*(_said(model, batch) for batch in given), strict=True)
        found = np.concatenate(parts)
        reference = found if reference is None else reference
        if kinds[0] == "hidden":
            return EmbeddingScores().measure(found, reference)
        if kinds[0] == "quantity":
            return Scores("regression").measure(found, reference)
        return replace(accuracy(found, reference), name="agreement"), Answers.of_classes(found, reference)

    return rate


def _said(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[Kind, np.ndarray]:
    """Of a batch: class numbers or quantities, shape (n,), or mean hidden states, shape (n, features)."""
    device, dtype = placement(model)
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if name != "labels"
    }
    with torch.inference_mode():
        outputs = model(**inputs)
    name = next(name for name in PREDICTIONS if name in outputs)
    values, mask = outputs[name].float(), inputs.get("attention_mask")
    if mask is None or mask.shape != values.shape[:2] or values.dim() < 3:
        mask = torch.ones(values.shape[:2] if values.dim() > 2 else values.shape[:1], device=device)
    if name == "last_hidden_state":
        mask = mask.view(*mask.shape, *(1,) * (values.dim() - mask.dim()))
        steps = tuple(range(1, values.dim() - 1))
        return "hidden", ((values * mask).sum(steps) / mask.sum(steps)).cpu().numpy()
    values = values[mask.bool()]
    if values.shape[-1] == 1:
        return "quantity", values.flatten().cpu().numpy()
    return "classes", values.argmax(-1).cpu().numpy()
