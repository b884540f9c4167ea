"""One vector per site, multiplied into the reader's input: the mask of the site, and its gradient the importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Site


class Gates:
    """Gates on the sites of a model: 1 is open, 0 is closed.

    A gate multiplies what its unit feeds into the reader, so a closed gate equals a removed unit, and the gradient of
    the loss with respect to an open gate is the first-order change of the loss when the unit goes (Michel et al. 2019,
    equation 5; Molchanov et al. 2019).

    The gates are no parameters of the model: optimizers, DistributedDataParallel and checkpoints do not see them.

    Args:
        model: The model, not wrapped.
        sites: Sites to gate.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8))
        >>> gates = Gates(model, find_sites(model))
        >>> gates.close({"encoder.0.heads": [0, 3]})
        >>> gates.open_units("encoder.0.heads").tolist()
        [1, 2]
        >>> gates.remove()
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.sites = {site.name: site for site in sites if site.units}
        self.values: dict[str, torch.Tensor] = {}
        self._model = model
        self._handles = []
        for site in self.sites.values():
            readers = [model.get_submodule(path) for path in site.readers]
            device = readers[0].weight.device
            self.values[site.name] = torch.ones(site.units, device=device)  # type: ignore[arg-type]
            hook = self._hook(site.name, site.width)
            self._handles += [reader.register_forward_pre_hook(hook) for reader in readers]

    def _hook(self, name: str, width: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def multiply(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            features, *rest = args
            gate = self.values[name]
            if gate.device != features.device:
                gate = self.values[name] = gate.detach().to(features.device).requires_grad_(gate.requires_grad)
            if width > 1:
                gate = gate.repeat_interleave(width)
            return (features * gate.to(features.dtype), *rest)

        return multiply

    def require_grad(self, required: bool = True) -> None:
        """Collect gradients on the gates at each backward pass (they add up until `take_gradients`), or stop."""
        for value in self.values.values():
            value.requires_grad_(required)
            if not required:
                value.grad = None

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients added up since the last call, float32, shape (units,) per site; then start from zero."""
        taken = {}
        for name, value in self.values.items():
            taken[name] = torch.zeros_like(value) if value.grad is None else value.grad.detach().clone()
            value.grad = None
        return taken

    def close(self, units: Mapping[str, Iterable[int] | torch.Tensor]) -> None:
        """Close gates, in place: site name to unit indices. What is closed stays closed."""
        for name, indices in units.items():
            index = torch.as_tensor(list(indices), dtype=torch.long, device=self.values[name].device)
            with torch.no_grad():
                self.values[name][index] = 0.0

    def take_over(self, other: Gates) -> None:
        """Close what other gates on the same sites close."""
        self.close({name: (value.detach() == 0).nonzero().flatten() for name, value in other.values.items()})

    def open_units(self, name: str) -> torch.Tensor:
        """Indices of the open units of a site, int64, ascending, on the CPU."""
        return (self.values[name].detach() != 0).nonzero().flatten().cpu()

    def write_into_weights(self) -> None:
        """Zero the reader's columns of closed units, in place, so that the weights alone compute what the gates do."""
        for name, site in self.sites.items():
            closed = (self.values[name].detach() == 0).repeat_interleave(site.width)
            if not bool(closed.any()):
                continue
            for path in site.readers:
                reader = self._model.get_submodule(path)
                # A linear layer keeps input features in columns, transformers' Conv1D in rows.
                columns = (slice(None), closed) if isinstance(reader, nn.Linear) else (closed, slice(None))
                with torch.no_grad():
                    reader.weight[columns] = 0.0  # type: ignore[index, operator]

    def remove(self) -> None:
        """Take the gates off the model; units that were closed count again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def gate_gradients(model: nn.Module, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Gradient of the loss with respect to an open gate on every unit, read off the gradients of the readers' weights.

    A gate g_u scales column u of the reader, so dL/dg_u at 1 is the sum over the column of weight times gradient. No hook
    and no second pass is needed, and whatever the weights' gradients were summed over (accumulated batches, processes)
    the gates' are too. Where several readers share a decision, or one is run several times, the gradients add up.

    Args:
        model: The model after a backward pass, not wrapped.
        sites: Sites with units.

    Returns:
        Site name to float32, shape (units,); zeros where this backward pass did not reach the layer.

    Raises:
        ValueError: A reader is frozen.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.anatomy import find_sites
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4)).eval()
        >>> gates = Gates(model, find_sites(model))
        >>> gates.require_grad()
        >>> model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state.square().sum().backward()
        >>> by_hook, by_weight = gates.take_gradients(), gate_gradients(model, find_sites(model))
        >>> all(torch.allclose(by_hook[name], by_weight[name], atol=1e-3) for name in by_weight)
        True
    """
    gradients = {}
    for site in sites:
        device = model.get_submodule(site.readers[0]).weight.device
        total = torch.zeros(site.units, device=device)  # type: ignore[arg-type]
        for path in site.readers:
            total = total + _reader_gradient(model, path, site).to(total.device)
        gradients[site.name] = total
    return gradients


def _reader_gradient(model: nn.Module, path: str, site: Site) -> torch.Tensor:
    """What one reader adds to the gradient of the gates of a site, float32, shape (units,)."""
    reader = model.get_submodule(path)
    weight: nn.Parameter = reader.weight  # type: ignore[assignment]
    if not weight.requires_grad:
        raise ValueError(
            f"{path} is frozen, so the criterion first_order cannot see its units; train it, or use magnitude"
        )
    if weight.grad is None:
        return torch.zeros(site.units, device=weight.device)
    rows = 1 if isinstance(reader, Conv1D) else 0
    product = (weight.detach().float() * weight.grad.detach().float()).sum(rows)
    return product.view(site.units, site.width).sum(1)
