"""What cut models are compared with: the whole model with layers passed over, or with features of the stream closed.

Nothing here knows what `hfcompress.anatomy` found: layers are hooked, and features are closed wherever a module puts out
something as wide as the stream, so the widths of the tiny configs have to be unlike each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hfcompress.anatomy import family_of, find_sites
from hfcompress.anatomy.sites import find_stacks


def stack_lengths(model: nn.Module) -> dict[str, int]:
    """How many layers each stack of a model has."""
    return {stack.name: len(layers) for stack, _, layers in find_stacks(model, family_of(model))}


def skip_layers(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> int:
    """Replace layers by identity, in place: the hidden states they get are what they give. How many is returned."""

    def identity(_module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    skipped = 0
    for stack, _, layers in find_stacks(model, family_of(model)):
        for number, layer in enumerate(layers):
            if stack.name in keep and number not in keep[stack.name]:
                layer.register_forward_hook(identity, with_kwargs=True)
                skipped += 1
    return skipped


def gate_hidden(model: nn.Module, keep: Sequence[int]) -> None:
    """Close features of the residual stream, in place: zero wherever they are written, and out of every norm."""
    width = model.config.hidden_size
    index = torch.tensor(keep)
    mask = torch.zeros(width).index_fill(0, index, 1.0)
    inner = {writer.module for site in find_sites(model) for writer in site.writers}
    inner |= {
        f"{path}.{number}.{entry.query}"
        for stack, path, layers in find_stacks(model, family_of(model))
        for entry in stack.fixed
        for number in range(len(layers))
    }

    def close(values):
        return values * mask if values.shape[-1] == width else values

    def close_output(module, _args, output):
        if isinstance(module, nn.Conv1d):  # channels come before positions
            return output * mask[:, None] if output.shape[1] == width else output
        if isinstance(output, torch.Tensor):
            return close(output)
        return (close(output[0]), *output[1:]) if isinstance(output, tuple) else output

    for path, module in model.named_modules():
        if path in inner:
            continue
        if is_norm(module) and norm_width(module) == width:
            module.forward = norm_over(module, index)
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            with torch.no_grad():
                module.weight.mul_(mask)  # some read the weight itself
        if module._parameters or isinstance(module, nn.Linear):
            module.register_forward_hook(close_output)


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def norm_width(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None) or next(iter(module.parameters())).shape
    return shape[0]


def norm_over(module: nn.Module, index: torch.Tensor):
    """LayerNorm or RMSNorm by hand over some features; zero in the others."""
    epsilon = next(getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    centred = isinstance(module, nn.LayerNorm)
    # Gemma keeps the weight less one.
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0

    def forward(states):
        kept = states[..., index]
        if centred:
            kept = kept - kept.mean(-1, keepdim=True)
        kept = kept / torch.sqrt(kept.square().mean(-1, keepdim=True) + epsilon)
        if weight is not None:
            kept = kept * (weight[index] + offset)
        if bias is not None:
            kept = kept + bias[index]
        return torch.zeros_like(states).index_copy(-1, index, kept)

    return forward


def at(values: Mapping[str, torch.Tensor], index: Sequence[int], like: Mapping[str, torch.Tensor]) -> dict:
    """Outputs of a gated model as those of the cut one have them: hidden states without the features that are gone."""
    narrow = {}
    for name, value in values.items():
        if value.shape != like[name].shape:
            gone = torch.ones(value.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(index), False)
            assert float(value[..., gone].abs().max()) == 0, f"{name}: closed features are not zero"
            value = value[..., torch.tensor(index)]
        narrow[name] = value
    return narrow
