"""Repair after features of the residual stream were removed: the layers that read it are refitted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Stream, find_stream
from hfcompress.calibration import Batch, LayerWalk, linear_weight, real_tokens, set_linear_weight, to_device
from hfcompress.pruning.repair import solve_towards

Reduce = Callable[[torch.Tensor], None]

# A head is refitted only on so many rows per input: one that reads a single token of an example would fit the sample.
_ROWS_PER_INPUT = 8


class _Stop(Exception):
    """Ends a forward pass once what was looked for is there."""


def repair_stream(
    model: nn.Module,
    dense: nn.Module,
    kept: torch.Tensor,
    batches: Sequence[Batch],
    *,
    damping: float = 1e-1,
    reduce: Reduce | None = None,
) -> None:
    """Refit the linear layers that read a stream with fewer features by least squares, in place, in forward order.

    Each is to give what it gave in the dense model, from what enters it in the narrow one, all earlier ones being refitted: as `repair`
    does after units went. Heads are refitted where there is data enough. What is tied to something else stays as it is, and so do norms
    and the layers that write to the stream: on MiniLM, refitting them too changed nothing. A model that uses a layer several times (ALBERT)
    is left as it is: what is right for one of its calls is wrong for the others.

    Args:
        model: The narrow model, in evaluation mode.
        dense: The model before its hidden features were cut, with the same layers and units; it is not changed.
        kept: The features that were left, counted in the dense model.
        batches: Calibration inputs; labels are not used.
        damping: As in `repair`.
        reduce: Takes the mean (or sum) of a tensor over all processes, in place; None for one process.

    Raises:
        ValueError: There is no data, or the activations are not finite.

    Example:
        >>> import copy
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfcompress.pruning import Plan, cut
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        >>> dense = BertForSequenceClassification(config).eval()
        >>> batches = [{"input_ids": torch.randint(50, (8, 12))} for _ in range(8)]
        >>> def error(model):
        ...     states = [m.bert.encoder.layer[0].intermediate(m.bert.embeddings(**batches[0])) for m in (model, dense)]
        ...     return (states[0] - states[1]).square().mean().item()
        >>> model = copy.deepcopy(dense)
        >>> changes = cut(model, Plan({}, hidden=tuple(range(12))))
        >>> before = error(model)
        >>> repair_stream(model, dense, torch.arange(12), batches)
        >>> error(model) < before
        True
    """
    walks = LayerWalk(dense, batches), LayerWalk(model, batches)
    if walks[1].whole:
        return
    readers = stream_readers(model, find_stream(model))
    fitting = _Fitting(*walks, kept, damping, reduce)
    inside: list[list[str]] = [[] for _ in walks[1].steps]
    for name in readers:
        step = next((n for n, path in enumerate(walks[1].paths) if name.startswith(f"{path}.")), None)
        if step is not None:
            inside[step].append(name)
    for step in tqdm(range(len(inside)), desc="repairing the stream", leave=False, delay=2):
        for walk in walks:
            walk.enter(step)
        for names in fitting.groups(inside[step], step):
            fitting.refit(names, step)
        for walk in walks:
            walk.leave(step)
    heads = [name for name in readers if not any(name in names for names in inside)]
    for names in fitting.groups(heads, None):
        fitting.refit(names, None)


def stream_readers(model: nn.Module, stream: Stream) -> list[str]:
    """Names of the linear layers that read the stream and have weights of their own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ids = [id(parameter) for parameter in parameters.values()]
    found = [
        entry.name.rpartition(".")[0]
        for entry in stream.dims
        if entry.role == "reads" and entry.name in parameters and ids.count(id(parameters[entry.name])) == 1
    ]
    return [name for name in dict.fromkeys(found) if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]


class _Fitting:
    """Two models in step, one of which is refitted to the other."""

    def __init__(
        self, dense: LayerWalk, narrow: LayerWalk, kept: torch.Tensor, damping: float, reduce: Reduce | None
    ) -> None:
        self.dense, self.narrow, self.damping, self.reduce = dense, narrow, damping, reduce
        self.kept = kept

    def groups(self, names: Sequence[str], step: int | None) -> list[list[str]]:
        """Modules in the order in which they are run, those that read the same together; the others are left out."""
        order: list[list[str]] = []
        last: torch.Tensor | None = None
        seen = self._see(self.narrow, names, step, 0)
        for name, calls in seen.items():
            if order and calls[0][0] is last:
                order[-1].append(name)
            else:
                order.append([name])
            last = calls[0][0]
        return order

    def refit(self, names: Sequence[str], step: int | None) -> None:
        """Refit modules that read the same."""
        modules = {name: self.narrow.model.get_submodule(name) for name in names}
        weight = linear_weight(modules[names[0]])
        size = weight.shape[1] + 1  # with a constant 1, for those that have a bias
        options: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}
        products = torch.zeros(size, size, **options)
        mixed = {name: torch.zeros(size, len(linear_weight(module)), **options) for name, module in modules.items()}
        for number, batch in enumerate(self.narrow.batches):
            theirs, ours = (self._see(walk, names, step, number) for walk in (self.dense, self.narrow))
            for call in range(len(ours.get(names[0], ()))):
                features = self._real(ours[names[0]][call][0], batch, step)
                features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
                products += (features.T @ features).double()
                for name in names:
                    wanted = self._real(theirs[name][call][1], batch, step)
                    outputs = mixed[name].shape[1]
                    if outputs < wanted.shape[1]:  # it also writes features that went
                        wanted = wanted[:, self.kept.to(wanted.device)]
                    mixed[name] += (features.T @ wanted).double()
        if self.reduce is not None:
            self.reduce(products)
            for name in names:
                self.reduce(mixed[name])
        rows = float(products[-1, -1])
        if not rows or (step is None and rows < _ROWS_PER_INPUT * size):
            return
        for name, module in modules.items():
            self._solve(module, products, mixed[name])

    def _solve(self, module: nn.Module, products: torch.Tensor, mixed: torch.Tensor) -> None:
        present, bias = linear_weight(module).T.double(), getattr(module, "bias", None)
        inputs = len(present)
        if bias is None:
            products, mixed = products[:inputs, :inputs], mixed[:inputs]
        else:
            present = torch.cat([present, bias.detach().double()[None]])
        solution = solve_towards(products, mixed, present, inputs=inputs, damping=self.damping)
        if not bool(torch.isfinite(solution).all()):
            raise ValueError(
                "activations are not finite: the model or the calibration data is broken; nothing was repaired"
            )
        set_linear_weight(module, solution[:inputs].T)
        if bias is not None:
            with torch.no_grad():
                bias.copy_(solution[inputs].to(bias.dtype))

    def _real(self, x: torch.Tensor, batch: Batch, step: int | None) -> torch.Tensor:
        decoder = step is None or self.narrow.is_decoder(step)
        return real_tokens(x.float(), batch, decoder=decoder)

    def _see(
        self, walk: LayerWalk, names: Sequence[str], step: int | None, number: int
    ) -> Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        """What enters and leaves modules at each call, in a step on a batch, or without a step in the whole model."""
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        each_once = step is not None
        with contextlib.ExitStack() as stack:
            for name in names:

                def keep(_module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                    # A copy, for some layers add to it in place.
                    seen.setdefault(name, []).append((args[0].detach(), output.detach().clone()))
                    if each_once and len(seen) == len(names):
                        raise _Stop

                stack.callback(walk.model.get_submodule(name).register_forward_hook(keep).remove)
            stack.enter_context(contextlib.suppress(_Stop))
            stack.enter_context(torch.no_grad())
            if step is None:
                walk.model(**to_device(walk.batches[number], walk.model))
            else:
                walk.run(step, number)
        return seen
