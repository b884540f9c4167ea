"""Does an exported model give what the model gives in torch?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hfcompress.export.families import longest_text, padded_inputs
from hfcompress.export.formats import ExportError
from hfcompress.export.running import ExportedModel

FLOAT_DIFFERENCE = 1e-3
LEAST_COSINE = 0.9
_SHAPES = ((1, 5), (3, 16), (2, 33))


@dataclass(frozen=True)
class Check:
    """How near the outputs of an exported model are to those of the model in torch.

    Attributes:
        difference: Largest absolute difference over the largest absolute value, of the worst output.
        cosine: Cosine of the angle between all first outputs, taken as one vector.
        agreement: Share of the same likeliest classes, of all rows (or tokens); None without classes.
        rows: Rows that were compared.
        shapes: (batch, length) of what was compared; length is None for images.
    """

    difference: float
    cosine: float
    agreement: float | None
    rows: int
    shapes: tuple[tuple[int, int | None], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def check_inputs(model: nn.Module, batches: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, torch.Tensor]]:
    """What is compared: the given batches, and made-up ones of odd numbers of rows and tokens, with padding."""
    names = list(padded_inputs(model, batch=1, length=2))
    made = [
        padded_inputs(model, batch=rows, length=min(length, longest_text(model)), seed=seed)
        for seed, (rows, length) in enumerate(_SHAPES)
    ]
    given = [{name: torch.as_tensor(batch[name]) for name in names if name in batch} for batch in batches]
    return [*given, *made]


def check_outputs(model: nn.Module, exported: nn.Module, inputs: Sequence[Mapping[str, torch.Tensor]]) -> Check:
    """Run both on the same inputs and compare all outputs that the exported model has.

    Args:
        model: In evaluation mode, in 32 bits, on the CPU.
        exported: For example an `ExportedModel`.
        inputs: Batches, as from `check_inputs`.

    Returns:
        How near they are.

    Raises:
        ExportError: Other shapes.
    """
    difference, rows, shapes = 0.0, 0, []
    firsts: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in inputs:
        with torch.no_grad():
            wanted, found = model(**batch), exported(**batch)
        for name in found:
            one, other = wanted[name].float().numpy(), found[name].float().numpy()
            if one.shape != other.shape:
                raise ExportError(
                    f"the export gives {name} of shape {other.shape}, torch of shape {one.shape}; nothing was written"
                )
            difference = max(difference, float(np.abs(one - other).max() / max(float(np.abs(one).max()), 1e-12)))
        name = next(iter(found))
        firsts.append((wanted[name].float().numpy(), found[name].float().numpy()))
        first = next(iter(batch.values()))
        rows += len(first)
        shapes.append((len(first), None if first.is_floating_point() else first.shape[1]))
    one, other = (np.concatenate([pair[side].ravel() for pair in firsts]) for side in (0, 1))
    cosine = float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12))
    agreement = None
    if next(iter(found)) == "logits" and firsts[0][0].shape[-1] > 1:
        same = [(one.argmax(-1) == other.argmax(-1)).ravel() for one, other in firsts]
        agreement = float(np.concatenate(same).mean())
    return Check(difference, cosine, agreement, rows, tuple(dict.fromkeys(shapes)))


def require_equal(check: Check, exported: ExportedModel) -> None:
    """Refuse an export that computes something else.

    Raises:
        ExportError: A float form differs by more than 1e-3 of the largest output, or an int8 form is turned to a cosine below 0.9.
    """
    form = exported.format
    good = check.cosine >= LEAST_COSINE if form.int8 else check.difference <= FLOAT_DIFFERENCE
    if not good:  # not a number is not good, either
        raise ExportError(
            f"{form.name} gives something else than torch: largest difference {check.difference:.2g} (float forms: at most "
            f"{FLOAT_DIFFERENCE:g}), cosine {check.cosine:.3f} (int8 forms: at least {LEAST_COSINE:g}); nothing was written"
        )
