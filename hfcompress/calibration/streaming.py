"""Layers whose weights stay in the files they were loaded from, but for the layer that is run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import StructureError, named_layers
from hfcompress.calibration.walk import replaced_forward

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stream_layers(model: nn.Module) -> Iterator[StreamedLayers]:
    """A context in which a model computes in float32, with the matrices of one transformer layer in memory at a time.

    transformers does not read the weights of a file of safetensors: it maps them into memory, and the system reads what is looked at. So
    a layer is copied when it is run, and the pages it was copied from are given back. What transformers has converted or cast while it was
    loading is in no file; it stays in memory. Of a model of an unknown architecture all is.

    Args:
        model: As `hfcompress.load` gave it, on the CPU, in evaluation mode. Before the end of the context linear layers may be replaced by
            others; what is left then has its weights again, in the type that the model was given.

    Yields:
        The layers. Outside of `StreamedLayers.held` their matrices are empty; to run the model, or a layer, nothing needs to be held.

    Example:
        >>> import tempfile, hfcompress
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = hfcompress.load(folder)
        ...     with stream_layers(again) as streamed:
        ...         hidden = again(input_ids=ids).last_hidden_state
        ...         weight = again.encoder.layer[1].intermediate.dense.weight
        ...         sizes = [weight.numel()]
        ...         with streamed.held(again.encoder.layer[1]):
        ...             sizes.append(weight.numel())
        >>> torch.equal(hidden, model(input_ids=ids).last_hidden_state), sizes, weight.numel()
        (True, [0, 32], 32)
    """
    streamed = StreamedLayers(model)
    with contextlib.ExitStack() as stack:
        stack.callback(streamed.restore)
        for layer in streamed.layers:
            stack.enter_context(replaced_forward(layer, streamed.holding(layer)))
        yield streamed


class StreamedLayers:
    """The transformer layers of a model whose matrices are read when they are needed; see `stream_layers`.

    Args:
        model: The model; the matrices of its layers become empty, everything else float32.

    Attributes:
        model: The model.
        layers: Its transformer layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        try:
            self.layers = list(dict.fromkeys(named_layers(model).values()))
        except StructureError:
            self.layers = []
        inside = {module for layer in self.layers for module in layer.modules()}
        outside = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
        matrices = {p for layer in self.layers for p in layer.parameters() if p.dim() > 1 and p.is_floating_point()}
        self._stored = {p: p.data for p in matrices - outside if p.numel()}
        self._replaced: dict[nn.Parameter, Callable[[], torch.Tensor]] = {}
        self._mapped = _mapped(self._stored)
        in_memory = sum(tensor.nbytes for p, tensor in self._stored.items() if p not in self._mapped)
        if in_memory:
            size = sum(tensor.nbytes for tensor in self._stored.values())
            logger.info("%.0f of %.0f MB of the layers are held in memory, not on disk", in_memory / 1e6, size / 1e6)
        for parameter, tensor in self._stored.items():
            if parameter in self._mapped:
                _forget_pages(tensor)
            _empty(parameter)
        model.float()

    @contextlib.contextmanager
    def held(self, module: nn.Module) -> Iterator[None]:
        """A context in which the layers in a module, or a part of one, have their weights, float32."""
        here = [p for p in module.parameters() if p in self._stored and not p.numel()]
        for parameter in here:
            parameter.data = self._read(parameter)
        try:
            yield
        finally:
            for parameter in here:
                _empty(parameter)
            give_back_memory()

    def holding(self, module: nn.Module) -> Callable[..., Any]:
        """The forward of a module, with its weights held."""
        forward = module.forward

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.held(module):
                return forward(*args, **kwargs)

        return run

    def replace(self, linear: nn.Module, weight: Callable[[], torch.Tensor]) -> None:
        """From now on a linear layer has another weight, if it is one of a layer.

        Args:
            linear: nn.Linear or Conv1D.
            weight: What makes it each time: float32, shape (outputs, inputs).
        """
        parameter: nn.Parameter = linear.weight  # type: ignore[assignment]
        turned = isinstance(linear, Conv1D)
        self._replaced[parameter] = (lambda: weight().T.contiguous()) if turned else weight

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What `state_dict` would hold, in the order of the names, one after the other."""
        streamed = {name: p for name, p in self.model.named_parameters(remove_duplicate=False) if p in self._stored}
        for name, tensor in sorted(self.model.state_dict().items()):
            yield name, self._read(streamed[name]) if name in streamed else tensor

    def restore(self) -> None:
        """Give the layers that are in the model now their weights."""
        for parameter in self.model.parameters():
            if parameter in self._stored:
                replaced = self._replaced.get(parameter)
                weight = self._stored[parameter] if replaced is None else replaced()
                parameter.data = weight.to(parameter.dtype)

    def _read(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter in self._replaced:
            return self._replaced[parameter]()
        stored = self._stored[parameter]
        weight = stored.to(torch.float32, copy=True)
        if parameter in self._mapped:
            _forget_pages(stored)
        return weight


def give_back_memory() -> None:
    """Give to the system what glibc keeps for later: of work in many steps it would keep several times what is in use.

    Example:
        >>> give_back_memory()
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _empty(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.new_empty(0)


def _mapped(stored: dict[nn.Parameter, torch.Tensor]) -> set[nn.Parameter]:
    """Those that lie in a mapped file, of which nothing was changed: only what can be read again may be forgotten. Linux."""
    smaps = Path("/proc/self/smaps")
    files = []
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text()) if smaps.is_file() else ():
        span, _, _, _, inode, _ = area.split(maxsplit=5)
        if inode != "0" and re.search(r"^Anonymous: +0 kB", area, re.MULTILINE):
            start, end = (int(bound, 16) for bound in span.split("-"))
            files.append(range(start, end))
    return {
        parameter
        for parameter, tensor in stored.items()
        if tensor.is_contiguous()
        and any(tensor.data_ptr() in file and tensor.data_ptr() + tensor.nbytes - 1 in file for file in files)
    }


def _forget_pages(tensor: torch.Tensor) -> None:
    """Unmap the whole pages of a mapped tensor; they are in the file, and come again when they are looked at."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
