"""Running a model layer by layer over sample data, keeping nothing but the hidden states between two layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from hfcompress.anatomy import find_sites, named_layers

Batch = Mapping[str, Any]


class _Stop(Exception):
    """Ends a forward pass once what was looked for is there."""


@dataclass
class _Call:
    """How a layer is called: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: str | None  # keyword of the hidden states; None if they come first


@dataclass
class _Facts:
    """What one forward pass shows about a layer."""

    calls: int = 0
    chained: bool = False  # its input is the output of the layer before
    plain: bool = False  # its output is a tensor


_ANSWERS = ("labels", "start_positions", "end_positions", "label", "label_ids")


def with_decoder(batch: Batch, model: nn.Module) -> Batch:
    """A batch with what an encoder-decoder would make of the labels: the decoder's inputs and which of them are real.

    Other models' batches, and those without labels per token, stay as they are.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> model = T5ForConditionalGeneration(
        ...     T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ... )
        >>> batch = with_decoder({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, 8, -100]])}, model)
        >>> batch["decoder_input_ids"].tolist(), batch["decoder_attention_mask"].tolist()
        ([[0, 7, 8]], [[1, 1, 0]])
    """
    labels, shift = batch.get("labels"), getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        return batch
    added: dict[str, torch.Tensor] = {}
    if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
        added["decoder_input_ids"] = shift(labels)
    if "decoder_attention_mask" not in batch:
        real: torch.Tensor = labels != -100  # type: ignore[assignment]
        # The target of the last real token is the end: what is read there is a token, and so is all before.
        added["decoder_attention_mask"] = real.flip(1).long().cummax(1).values.flip(1)
    return {**batch, **added}


def to_device(batch: Batch, model: nn.Module, *, labels: bool = False) -> dict[str, Any]:
    """A batch on the model's device, floating tensors in the model's type; without labels, unless they are asked for."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    moved = {}
    for name, value in with_decoder(batch, model).items():
        if name in _ANSWERS and not labels:
            continue
        if torch.is_tensor(value):
            dtype = parameter.dtype if value.is_floating_point() else None
            value = value.to(parameter.device, dtype=dtype)
        moved[name] = value
    return moved


class LayerWalk:
    """The layers of a model, run one after the other over all batches.

    Only the hidden states that enter the present layer are kept, for all batches; so a walk over a model needs about the
    time of one forward pass however many layers there are, and layers may be changed while it goes on. Where a layer
    does not simply read what the layer before wrote (the first of a stack, of a stage), its inputs come from a run of
    the model from the start, with the layers as they are then. A model that uses a layer several times (ALBERT) is one single step.

    Args:
        model: A transformers model in evaluation mode, not wrapped.
        batches: Inputs of its forward; labels are left out, but for what an encoder-decoder makes its decoder's inputs of.

    Attributes:
        model: The model.
        batches: The inputs.
        steps: Name ("encoder.3") and module of each layer; one step "model" where a layer is used several times.
        whole: Whether the model is one step.
        hidden: What enters the present step, for each batch; empty where the model is one step.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> walk = LayerWalk(model, [{"input_ids": ids}])
        >>> for step in range(len(walk.steps)):
        ...     walk.enter(step)
        ...     walk.leave(step)
        >>> torch.allclose(walk.hidden[0], model(input_ids=ids).last_hidden_state, atol=1e-6)
        True
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        if not batches:
            raise ValueError("there is no calibration data; pass at least one batch")
        self.model = model
        self.batches = [with_decoder(batch, model) for batch in batches]
        self.hidden: list[torch.Tensor] = []
        self._calls: dict[int, list[_Call]] = {}
        self.steps = list(named_layers(model).items())
        where = {id(module): path for path, module in model.named_modules()}
        self.paths = [where[id(layer)] for _, layer in self.steps]
        self._facts = self._probe()
        self.whole = any(facts.calls != 1 for facts in self._facts)
        if self.whole:
            self.steps = [("model", model)]

    def is_decoder(self, step: int) -> bool:
        """Whether a step belongs to the decoder; of the two masks of an encoder-decoder, its tokens have that one."""
        return self.steps[step][0].startswith("decoder.")

    def readers(self, step: int) -> list[str]:
        """Paths of the linear layers inside a step that read units, in the order in which they are run."""
        paths = [path for site in find_sites(self.model) if site.units for path in site.readers]
        return paths if self.whole else [path for path in paths if path.startswith(f"{self.paths[step]}.")]

    def _probe(self) -> list[_Facts]:
        """One forward pass that shows how the layers hang together."""
        facts = [_Facts() for _ in self.steps]
        previous: list[Any] = [None]

        def before(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs.get("hidden_states")
                facts[number].calls += 1
                facts[number].chained = number > 0 and hidden is not None and hidden is previous[0]

            return hook

        def after(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                facts[number].plain = torch.is_tensor(output)
                previous[0] = output if torch.is_tensor(output) else output[0]

            return hook

        with contextlib.ExitStack() as stack:
            for number, (_, layer) in enumerate(self.steps):
                stack.enter_context(_hooked(layer.register_forward_pre_hook(before(number), with_kwargs=True)))
                stack.enter_context(_hooked(layer.register_forward_hook(after(number))))
            if (
                head := _language_head(self.model)
            ) is not None:  # a row of logits is far larger than one of hidden states
                stack.enter_context(replaced_forward(head, _stop))
            with torch.no_grad(), contextlib.suppress(_Stop):
                self.model(**to_device(self.batches[0], self.model))
        return facts

    def enter(self, step: int) -> None:
        """Make sure that the inputs of a step are there for all batches."""
        if self.whole or (step > 0 and self._facts[step].chained and step in self._calls):
            return
        end = step + 1
        while end < len(self.steps) and self._facts[end].chained:
            end += 1
        self._calls = {number: [] for number in range(step, end)}
        self.hidden = []
        with contextlib.ExitStack() as stack:
            for number in range(step, end):
                layer = self.steps[number][1]
                stack.enter_context(
                    _hooked(layer.register_forward_pre_hook(self._note(number, step), with_kwargs=True))
                )
                if number == end - 1:
                    stack.enter_context(replaced_forward(layer, _stop))
                elif self._facts[number].plain:
                    stack.enter_context(replaced_forward(layer, _pass_through))
            for batch in self.batches:
                with torch.no_grad(), contextlib.suppress(_Stop):
                    self.model(**to_device(batch, self.model))

    def _note(self, number: int, first: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            by_name = None if args else "hidden_states"
            hidden = args[0] if args else kwargs["hidden_states"]
            if number == first:
                self.hidden.append(hidden.detach().clone())
            rest = {name: _without_cache(value) for name, value in kwargs.items() if name != by_name}
            self._calls[number].append(_Call(tuple(map(_without_cache, args[1:])), rest, by_name))

        return hook

    def run(self, step: int, batch: int) -> torch.Tensor | None:
        """Run a step on one batch; what it returns are the hidden states after it (None where the model is one step)."""
        with torch.no_grad():
            if self.whole:
                self.model(**to_device(self.batches[batch], self.model))
                return None
            call, hidden = self._calls[step][batch], self.hidden[batch]
            layer = self.steps[step][1]
            if call.by_name is None:
                output = layer(hidden, *call.args, **call.kwargs)
            else:
                output = layer(**{call.by_name: hidden}, **call.kwargs)
            return output if torch.is_tensor(output) else output[0]

    def run_until(self, step: int, batch: int, module: nn.Module) -> list[torch.Tensor]:
        """The inputs of a module inside a step for one batch, one per call of it; nothing after its last call is computed."""
        found: list[torch.Tensor] = []

        def keep(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0].detach())
            if not self.whole:
                raise _Stop

        with _hooked(module.register_forward_pre_hook(keep)), contextlib.suppress(_Stop):
            self.run(step, batch)
        return found

    def leave(self, step: int, hidden: Sequence[torch.Tensor] | None = None) -> None:
        """Go on: the outputs of a step become the inputs of the next.

        Args:
            step: The step that is left.
            hidden: Its outputs for all batches, if they are known already; else it is run.
        """
        if self.whole:
            return
        for batch in range(len(self.batches)):
            after = self.run(step, batch) if hidden is None else hidden[batch]
            assert after is not None
            self.hidden[batch] = after
        self._calls.pop(step)


def _without_cache(value: Any) -> Any:
    """None in place of a cache: a layer that is run again would find the keys and values of the first time in it."""
    return None if isinstance(value, Cache) else value


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _language_head(model: Any) -> nn.Module | None:
    """What turns hidden states into logits of a vocabulary, if the model has that; it comes last."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Linear) else None


def _pass_through(*args: Any, **kwargs: Any) -> Any:
    """A layer that does nothing, for a pass that only looks at how layers are called."""
    return args[0] if args else kwargs["hidden_states"]


def _stop(*_args: Any, **_kwargs: Any) -> Any:
    """A layer with which the forward pass ends."""
    raise _Stop


@contextlib.contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which a module is run by another function."""
    had = "forward" in layer.__dict__
    before = layer.__dict__.get("forward")
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had:
            layer.forward = before  # type: ignore[method-assign, assignment]
        else:
            del layer.forward
