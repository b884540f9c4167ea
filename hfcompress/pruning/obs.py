"""Optimal brain surgeon for whole units: one pass over a site gives the error for every number of units left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfcompress.pruning.curves import Curve


@dataclass(frozen=True)
class ReaderMoments:
    """What is known of one reader of a site.

    Attributes:
        weight: Floating, shape (outputs, inputs).
        inputs: Second moment (or covariance, where a bias takes care of the mean) of its inputs, shape (inputs, inputs).
        gradients: Second moment of the loss's gradients at its outputs, shape (outputs, outputs); None weighs all
            outputs alike.
    """

    weight: torch.Tensor
    inputs: torch.Tensor
    gradients: torch.Tensor | None = None


def surgeon_curve(readers: Sequence[ReaderMoments], *, width: int, damping: float = 1e-2, steps: int = 192) -> Curve:
    """Remove the units of a site one after the other, always the one that costs least, the rest making up for it.

    With H the inverse of the (damped) second moment of the inputs and W the weights, removing the input features u costs

        1/2 trace(G W_u (H_uu)^-1 W_u^T),

    and the weights that stay become W - W_u (H_uu)^-1 H_u:, the least-squares solution. Sources: Hassibi and Stork 1992 for
    weights, ZipLM (Kurtic et al. 2023, section 3.1, equations 2 and 3) for structures with G = 1. With G the second moment of
    the gradients at the outputs this is the quadratic estimate of the loss under a Kronecker-factored Fisher information
    (van der Ouderaa et al. 2024, LLM Surgeon, section 3), so that errors of different sites can be compared.

    Args:
        readers: The linear layers that read the units; as a rule one.
        width: Input features per unit.
        damping: Added to the diagonal of both moments, as a share of its mean; above 0.
        steps: At most about so many rounds: of many units several go in one round (then those that cost least on their
            own, their joint cost spread over them).

    Returns:
        The curve. Its last value is what it costs to remove everything: 1/2 trace(G W C W^T).

    Example:
        >>> w, c = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> curve = surgeon_curve([ReaderMoments(w, c)], width=1, damping=1e-9)
        >>> [round(value, 3) for value in curve.loss.tolist()]  # one makes up for the other: 1/2 (1 - 0.9^2), then 1/2 3.8
        [0.0, 0.095, 1.9]
    """
    states = [_start(reader, damping) for reader in readers]
    device = states[0].weight.device
    alive = torch.arange(states[0].weight.shape[1] // width, device=device)  # the units that the states still hold
    dead = torch.zeros(len(alive), dtype=torch.bool, device=device)  # those among them that are gone
    per_round = max(1, round(len(alive) / steps))
    offsets = torch.arange(width, device=device)
    order: list[torch.Tensor] = []
    costs: list[torch.Tensor] = []
    left = len(alive)
    while left:
        alone = torch.stack([state.cost_alone(width) for state in states]).sum(0).masked_fill(dead, torch.inf)
        gone = torch.argsort(alone, stable=True)[: min(per_round, left)]
        features = (gone[:, None] * width + offsets).reshape(-1)
        joint = torch.stack([state.remove(features) for state in states]).sum()
        share = alone[gone].double().clamp(min=0)
        total = share.sum()
        order.append(alive[gone])
        costs.append(joint.clamp(min=0) * torch.where(total > 0, share / total, 1 / len(share)))
        dead[gone] = True
        left -= len(gone)
        # Squeezing out what is gone costs as much as several rounds. Whole blocks have to be regular, so there it is done at once.
        if width > 1 or 8 * (len(alive) - left) >= len(alive):
            stays = (~dead).nonzero().flatten()
            features = (stays[:, None] * width + offsets).reshape(-1)
            for state in states:
                state.squeeze(features)
            alive, dead = alive[stays], dead[stays]
    if not order:
        return Curve(torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.float64))
    loss = torch.cat([torch.zeros(1, dtype=torch.float64, device=device), torch.cat(costs).cumsum(0)])
    if not bool(torch.isfinite(loss).all()):
        raise ValueError("the second moments hold NaN or infinity, or the damping is too small")
    return Curve(torch.cat(order).cpu(), loss.cpu())


@dataclass
class _State:
    """A reader while its units go, float32; rows and columns of features that are gone hold 0."""

    weight: torch.Tensor  # seen through the gradients, (outputs, inputs)
    inverse: torch.Tensor  # of the second moment of the inputs that are left

    def cost_alone(self, width: int) -> torch.Tensor:
        """What removing each unit alone costs, shape (units,); anything for those that are gone."""
        if width == 1:
            return 0.5 * self.weight.square().sum(0) / self.inverse.diagonal()
        units = self.weight.shape[1] // width
        index = torch.arange(units, device=self.weight.device)
        blocks = self.inverse.view(units, width, units, width)[index, :, index, :]
        columns = self.weight.view(-1, units, width).permute(1, 2, 0)
        return 0.5 * (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))

    def remove(self, features: torch.Tensor) -> torch.Tensor:
        """Remove features together, in place; what that costs, a float64 scalar."""
        columns, rows = self.weight[:, features], self.inverse[features]
        factor = torch.linalg.inv(rows[:, features].double()).to(rows.dtype)
        solved = columns @ factor
        self.weight.addmm_(solved, rows, alpha=-1)
        self.inverse.addmm_(rows.T, factor @ rows, alpha=-1)
        # What is 0 but for rounding is made 0, so that it stays so.
        self.weight[:, features] = 0
        self.inverse[features] = 0
        self.inverse[:, features] = 0
        return 0.5 * (solved * columns).sum().double()

    def squeeze(self, features: torch.Tensor) -> None:
        """Keep some features only."""
        self.weight = self.weight[:, features]
        self.inverse = self.inverse[features][:, features]


def _start(reader: ReaderMoments, damping: float) -> _State:
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(reader.inputs, damping)))
        weight = reader.weight.detach().double()
        if reader.gradients is not None:
            weight = torch.linalg.cholesky(_damped(reader.gradients, 0.1 * damping)).T @ weight
    except torch.linalg.LinAlgError:
        raise ValueError("the second moments hold NaN or infinity, or the damping is too small") from None
    return _State(weight.float().contiguous(), inverse.float())


def _damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    moment = moment.detach().double()
    scale = moment.diagonal().mean().clamp(min=1e-30)
    return moment + torch.eye(len(moment), dtype=moment.dtype, device=moment.device) * share * scale
