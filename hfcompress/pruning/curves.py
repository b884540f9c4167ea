"""What is known of a site once its units were ranked: who goes first, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Curve:
    """The order in which the units of a site go, and the loss that is expected with fewer of them.

    Attributes:
        order: Unit indices, the first to go first, int64, shape (units,), on the CPU.
        loss: Expected increase of the loss with the first k of `order` gone, float64, shape (units + 1,), from 0, never
            falling, on the CPU. Curves of one criterion can be compared between sites.

    Example:
        >>> curve = Curve.from_scores(torch.tensor([3.0, 1.0, 2.0]))
        >>> curve.order.tolist(), curve.loss.tolist()
        ([1, 2, 0], [0.0, 1.0, 3.0, 6.0])
        >>> curve.kept(2)
        (0, 2)
    """

    order: torch.Tensor
    loss: torch.Tensor

    @classmethod
    def from_scores(cls, scores: torch.Tensor) -> Curve:
        """The curve of scores that add up: the lowest goes first. Scores below 0 are raised to start at 0, all alike.

        Raises:
            ValueError: A score is not finite.
        """
        scores = scores.detach().double().cpu()
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("scores hold NaN or infinity")
        scores = scores - scores.min().clamp(max=0) if len(scores) else scores
        order = torch.argsort(scores, stable=True)
        return cls(order, torch.cat([torch.zeros(1, dtype=torch.float64), scores[order].cumsum(0)]))

    def kept(self, count: int) -> tuple[int, ...]:
        """The units that stay when so many are left, ascending."""
        return tuple(sorted(self.order[len(self.order) - count :].tolist()))
