"""What distillation compares inside models, collected while they run, of exactly the layers that are asked for.

Hidden states are the outputs of layers. Queries, keys and values are taken where transformers hands them to its attention
function, after rotary embeddings and with the mask that counts; so attention maps need no eager attention and no
`output_attentions`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from hfcompress.anatomy import StructureError, family_of, find_layers, named_layers
from hfcompress.anatomy.sites import find_stacks


@dataclass(frozen=True)
class AttentionInputs:
    """What one attention sublayer computed its attention from.

    Attributes:
        queries: Shape (batch, heads, queries, features).
        keys: Shape (batch, key-value heads, keys, features).
        values: Shape (batch, key-value heads, keys, features).
        mask: Boolean (True is seen) or added to the scores, broadcastable to (batch, heads, queries, keys); or None.
        scaling: What scores are multiplied by; None is 1 / sqrt(features).
        is_causal: Whether, where there is no mask, a query sees only the keys up to its own place.
        softcap: Scores are squashed to within plus and minus this, if given.
        bias: Added to the scores besides the mask (relative positions), or None.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None = None
    scaling: float | None = None
    is_causal: bool = False
    softcap: float | None = None
    bias: torch.Tensor | None = None


@dataclass
class Captured:
    """What a model computed for a batch, by number of the layer as `find_layers` counts.

    Attributes:
        hidden: Outputs of layers, shape (batch, length, hidden).
        attention: What attention was computed from.
    """

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """Which layers are looked at, counted from 0.

    Attributes:
        hidden: Those whose outputs are compared.
        attention: Those whose queries, keys and values are.
    """

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        """Whether there is anything to collect."""
        return bool(self.hidden or self.attention)


NOTHING = Wanted()


@contextmanager
def capture(model: nn.Module, wanted: Wanted) -> Iterator[Captured]:
    """Collect what is wanted while a model runs.

    Args:
        model: A model of a known family.
        wanted: Which layers.

    Yields:
        Filled by the forward passes inside the context; later ones replace what earlier ones left.

    Raises:
        StructureError: The architecture is not known, or does its attention in a way that cannot be looked into.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(**sizes, vocab_size=20))
        >>> with capture(model, Wanted(hidden=frozenset({1}), attention=frozenset({0}))) as seen:
        ...     _ = model(torch.tensor([[5, 6, 7]]))
        >>> seen.hidden[1].shape, seen.attention[0].queries.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 4]))
    """
    captured = Captured()
    if not wanted:
        yield captured
        return
    layers = find_layers(model)
    with (
        capture_outputs({number: layers[number] for number in wanted.hidden}) as captured.hidden,
        _attention_inputs(_attentions(model, wanted.attention)) as captured.attention,
    ):
        yield captured
    missing = wanted.attention - captured.attention.keys()
    if missing:
        raise StructureError(
            f"{type(model).__name__} does its own attention, whose queries, keys and values cannot be looked at (layer {min(missing)}); "
            "compare hidden states instead: set the weights of distill.attentions and distill.relations to 0"
        )


@contextmanager
def capture_outputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the outputs of chosen layers while a model runs, without asking the model for all its hidden states.

    Args:
        modules: Number to layer.

    Yields:
        Number to the layer's hidden states, shape (batch, length, hidden), filled by the forward pass.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with capture_outputs({7: layer}) as captured:
        ...     _ = layer(torch.zeros(1, 4, 2))
        >>> captured[7].shape
        torch.Size([1, 4, 3])
    """
    captured: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            captured[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _attentions(model: nn.Module, numbers: frozenset[int]) -> dict[nn.Module, int]:
    """The self-attention module of each of these layers (not what looks at an encoder), and the layer's number."""
    if not numbers:
        return {}
    stacks = find_stacks(model, family_of(model)) or []
    found: list[nn.Module | None] = []
    for stack, _, layers in stacks:
        first = next(iter((*stack.attentions, *stack.fixed)), None)  # a decoder's second looks at the encoder
        found += [None if first is None else layer.get_submodule(first.module) for layer in layers]
    names = list(named_layers(model))
    for number in numbers:
        if found[number] is None:
            raise StructureError(f"{type(model).__name__} has no attention in layer {names[number]}")
    return {found[number]: number for number in numbers}  # type: ignore[misc]


_capturing = threading.local()  # several models may run at once, each in a thread of its own


@contextmanager
def _attention_inputs(modules: Mapping[nn.Module, int]) -> Iterator[dict[int, AttentionInputs]]:
    """Collect what these modules hand to transformers' attention functions."""
    captured: dict[int, AttentionInputs] = {}
    if not modules:
        yield captured
        return
    outer = getattr(_capturing, "sink", None)
    _capturing.sink = (modules, captured)
    _install()
    try:
        yield captured
    finally:
        _capturing.sink = outer


def _install() -> None:
    """Teach the lookup of attention functions, once per process, to note what modules that are looked at hand over."""
    if getattr(AttentionInterface.get_interface, "_notes_inputs", False):
        return
    plain = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, attn_implementation: str, default: Any) -> Any:
        function = plain(self, attn_implementation, default)
        return function if getattr(_capturing, "sink", None) is None else _noting(function)

    get_interface._notes_inputs = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def _noting(function: Any) -> Any:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        sink = getattr(_capturing, "sink", None)
        if sink is not None and module in sink[0]:
            modules, captured = sink
            causal = kwargs.get("is_causal")
            captured[modules[module]] = AttentionInputs(
                query,
                key,
                value,
                mask=attention_mask,
                scaling=kwargs.get("scaling"),
                is_causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
                softcap=kwargs.get("softcap"),
                bias=kwargs.get("position_bias"),
            )
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attend
