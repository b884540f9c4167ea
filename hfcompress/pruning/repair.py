"""Repair: after a cut, every reader is refitted so that each sublayer gives what it gave before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from hfcompress.calibration import Batch, LayerWalk, linear_weight, real_tokens, set_linear_weight


def repair(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[Batch],
    *,
    damping: float = 1e-2,
    reduce: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Refit the readers of a cut model by least squares, in place, sublayer by sublayer in forward order.

    For each reader, with x what enters it now (all earlier ones are refitted already) and y what the dense model's reader gave for
    the same token,

        min over W, b of  sum |W x + b - y|^2 + damping * mean(x^2) * tokens * |W - W now|^2

    so that what was lost is made up for from what stays, and errors do not add up along the layers. Least-squares mask tuning
    (Kwon et al. 2022, section 4.3) generalised from one factor per unit to the whole matrix; sequential refitting as in SparseGPT
    (Frantar and Alistarh 2023) with the dense model's outputs as targets.

    Two walks go through both models once: memory is the hidden states of the batches between two layers and one layer's second moment,
    (inputs + 1)^2 float64. Solved in float64.

    Args:
        model: The cut model, in evaluation mode; readers without inputs get the mean as their bias.
        dense: The model as it was, with the same sites; it is not changed.
        batches: Calibration inputs; labels are not used.
        damping: Pull towards the present weights, as a share of the mean square of the inputs; 0 or more.
        reduce: Takes the mean (or sum) of a tensor over all processes, in place; None for one process.

    Raises:
        ValueError: There is no data, or the activations are not finite.

    Example:
        >>> import copy
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.pruning import Plan, cut
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        >>> dense = BertModel(config).eval()
        >>> batches = [{"input_ids": torch.randint(50, (8, 12))} for _ in range(8)]
        >>> def error(model):
        ...     return (model(**batches[0])[0] - dense(**batches[0])[0]).square().mean().item()
        >>> model = copy.deepcopy(dense)
        >>> changes = cut(model, Plan({"encoder.0.neurons": tuple(range(16)), "encoder.1.neurons": tuple(range(16))}))
        >>> before = error(model)
        >>> repair(model, dense, batches)
        >>> error(model) < before
        True
    """
    walks = LayerWalk(dense, batches), LayerWalk(model, batches)
    if [name for name, _ in walks[0].steps] != [name for name, _ in walks[1].steps]:
        raise ValueError("the two models differ in layers; repair compares them layer by layer")
    names = [name for name, _ in walks[0].steps]
    for step in tqdm(range(len(names)), desc="repairing", leave=False, delay=2):
        _repair_step(*walks, step, damping=damping, reduce=reduce)


def _repair_step(
    dense: LayerWalk, cut: LayerWalk, step: int, *, damping: float, reduce: Callable[[torch.Tensor], None] | None
) -> None:
    dense.enter(step)
    cut.enter(step)
    targets, after = _outputs(dense, step, dense.readers(step))
    remaining = dict(cut.model.named_modules())
    for path, wanted in targets.items():
        if path in remaining and any(wanted):  # a reader may be gone with its sublayer
            _refit(cut, step, remaining[path], wanted, damping=damping, reduce=reduce)
    dense.leave(step, after)
    cut.leave(step)


def _outputs(
    walk: LayerWalk, step: int, paths: Sequence[str]
) -> tuple[dict[str, list[list[torch.Tensor]]], list[torch.Tensor]]:
    """What the readers of the dense model give, per batch and call, and the hidden states after the step."""
    given: dict[str, list[list[torch.Tensor]]] = {path: [] for path in paths}
    after: list[torch.Tensor] = []
    handles = []
    for path in paths:
        module = walk.model.get_submodule(path)

        def keep(_module: nn.Module, _args: object, output: torch.Tensor, path: str = path) -> None:
            given[path][-1].append(output.detach().clone())  # some layers add to it in place

        handles.append(module.register_forward_hook(keep))
    try:
        for batch in range(len(walk.batches)):
            for path in paths:
                given[path].append([])
            hidden = walk.run(step, batch)
            if hidden is not None:
                after.append(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return given, after


def _refit(
    walk: LayerWalk,
    step: int,
    reader: nn.Module,
    targets: list[list[torch.Tensor]],
    *,
    damping: float,
    reduce: Callable[[torch.Tensor], None] | None,
) -> None:
    """Least squares for one reader; see `repair`."""
    weight = linear_weight(reader)
    bias = getattr(reader, "bias", None)
    outputs, inputs = weight.shape
    size = inputs + (bias is not None)
    if size == 0:
        return
    options = {"dtype": torch.float64, "device": weight.device}
    products = torch.zeros(size, size, **options)  # type: ignore[arg-type]
    mixed = torch.zeros(size, outputs, **options)  # type: ignore[arg-type]
    decoder = walk.is_decoder(step)
    for number, (batch, wanted) in enumerate(zip(walk.batches, targets, strict=True)):
        for x, y in zip(walk.run_until(step, number, reader), wanted, strict=True):
            features, values = (real_tokens(each.float(), batch, decoder=decoder) for each in (x, y))
            if bias is not None:
                features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
            products += (features.T @ features).double()
            mixed += (features.T @ values).double()
    if reduce is not None:
        reduce(products)
        reduce(mixed)
    solution = solve_towards(products, mixed, _joined(weight, bias), inputs=inputs, damping=damping)
    if not bool(torch.isfinite(solution).all()):
        raise ValueError(
            "activations are not finite: the model or the calibration data is broken; nothing was repaired"
        )
    set_linear_weight(reader, solution[:inputs].T)
    if bias is not None:
        with torch.no_grad():
            bias.copy_(solution[inputs].to(bias.dtype))


def solve_towards(
    products: torch.Tensor, mixed: torch.Tensor, present: torch.Tensor, *, inputs: int, damping: float
) -> torch.Tensor:
    """The minimiser of tr(Z^T A Z) - 2 tr(Z^T B) + r |Z - Z0|^2 over the first `inputs` rows, r = damping times the mean of A's diagonal.

    Args:
        products: A, sum of x x^T, float64, shape (n, n); the last row and column may be that of a constant 1 (the bias).
        mixed: B, sum of x y^T, float64, shape (n, outputs).
        present: Z0, float64, shape (n, outputs).
        inputs: Rows that are pulled towards `present`; the bias is free.
        damping: 0 or more.

    Returns:
        Z, float64, shape (n, outputs).

    Example:
        >>> a, b = torch.eye(1, dtype=torch.float64), torch.full((1, 1), 3.0, dtype=torch.float64)
        >>> solve_towards(a, b, torch.zeros_like(b), inputs=1, damping=0.5).round(decimals=6).item()
        2.0
    """
    diagonal = products.diagonal()
    pull = torch.zeros_like(diagonal)
    pull[:inputs] = damping * diagonal[:inputs].mean() if inputs else 0.0
    # What keeps the matrix regular where an input is never anything but 0.
    floor = 1e-10 * diagonal.mean().clamp(min=1e-30)
    matrix = products + torch.diag(pull + floor)
    return torch.linalg.solve(matrix, mixed + (pull + floor)[:, None] * present)


def _joined(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = weight.T.double()
    return rows if bias is None else torch.cat([rows, bias.detach().double()[None]])
