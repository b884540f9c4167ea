"""How long a forward pass takes, and how much faster one model is than another on the same machine."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from hfcompress.anatomy import StructureError, family_of
from hfcompress.anatomy.sites import find_stacks

Scope = Literal["model", "layers"]
Inputs = Mapping[str, Any]
_ONE_SECOND = 16_000  # samples, at the rate that speech models are trained on
Name = TypeVar("Name")
Sample = TypeVar("Sample", covariant=True)


class Runs(Protocol[Sample]):
    """What can be run once and says how long it took."""

    def run(self) -> Sample:
        """One run."""


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, and the conditions it was measured under.

    Attributes:
        median_ms: Median over the rounds, in milliseconds.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        rounds: Number of timed forward passes.
        warmup: Number of untimed ones before them.
        batch: Rows per forward.
        length: Tokens per row; None for images.
        device: Name of the CPU or GPU.
        threads: CPU threads torch used within an operation.
        dtype: Floating type of the parameters and, except under autocast, of the activations, such as
            "bfloat16".
        scope: "model", or "layers": from entering the first transformer layer to leaving the last one.
        samples_ms: The time of each round, in order.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    warmup: int
    batch: int
    length: int | None
    device: str
    threads: int
    dtype: str
    scope: Scope
    samples_ms: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, as plain data for JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "samples_ms"}


@dataclass(frozen=True)
class Speedup:
    """How many times faster one model is than another: ratios of the rounds of an interleaved measurement.

    Attributes:
        median: Median ratio; 2.0 is half the time.
        p10: 10th percentile.
        p90: 90th percentile.
    """

    median: float
    p10: float
    p90: float


def measure_latency(
    model: nn.Module,
    inputs: Inputs,
    *,
    rounds: int = 15,
    warmup: int = 3,
    threads: int | None = None,
    scope: Scope = "model",
) -> Latency:
    """Time the forward pass of a model.

    Args:
        model: A transformers model; "layers" needs a known architecture. It runs in evaluation mode where it
            is, and is left in the mode it was in.
        inputs: Keyword arguments of its forward, such as those of `example_inputs`; tensors are moved to the
            model's device, floating ones take its type.
        rounds: Timed forward passes, at least 1.
        warmup: Untimed forward passes before them, at least 0.
        threads: CPU threads for the measurement; None leaves them as they are.
        scope: "model", or "layers": only what lies between entering the first transformer layer and leaving
            the last one, without embeddings and head.

    Returns:
        The times, with the conditions.

    Raises:
        ValueError: A number is out of range, the scope is not known, the inputs have no tensor, or the model
            has no layers that are known.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
        >>> latency = measure_latency(model, example_inputs(model, batch=2, length=8), rounds=5)
        >>> latency.batch, latency.length, latency.p10_ms <= latency.median_ms <= latency.p90_ms
        (2, 8, True)
    """
    only = {"model": model}
    return compare_latency(only, inputs, rounds=rounds, warmup=warmup, threads=threads, scope=scope)["model"]


def compare_latency(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    rounds: int = 15,
    warmup: int = 3,
    threads: int | None = None,
    scope: Scope = "model",
) -> dict[str, Latency]:
    """Time several models side by side: each runs once in every round, in rotating order.

    A machine that slows down or speeds up in between then does so for all of them, and the ratio of a round
    says more than the ratio of two measurements one after the other.

    Args:
        models: The models by name, for example teacher and student.
        inputs: As for `measure_latency`; all models get the same.
        rounds: As for `measure_latency`.
        warmup: As for `measure_latency`, for each model.
        threads: As for `measure_latency`.
        scope: As for `measure_latency`.

    Returns:
        The times by name, in the order of `models`.

    Raises:
        ValueError: As for `measure_latency`, or there are no models.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"large": 6, "small": 1}
        >>> models = {
        ...     name: BertModel(BertConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=4))
        ...     for name, layers in sizes.items()
        ... }
        >>> latency = compare_latency(models, example_inputs(models["large"], batch=2, length=8), rounds=5)
        >>> speedup(latency["large"], latency["small"]).median > 1
        True
    """
    if rounds < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise ValueError(f"rounds={rounds}, warmup={warmup}, threads={threads} must be at least 1, 0 and 1 (or None)")
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is not known; choose one of {', '.join(map(repr, get_args(Scope)))}")
    if not models:
        raise ValueError("there are no models to time; pass at least one, by name")
    batch, length = input_shape(inputs)
    with ExitStack() as stack:
        threads = stack.enter_context(torch_threads(threads))
        timers = {name: stack.enter_context(timed(model, inputs, scope)) for name, model in models.items()}
        samples_ms = interleave(timers, rounds=rounds, warmup=warmup)
    return {
        name: _summarize(
            samples_ms[name],
            warmup=warmup,
            batch=batch,
            length=length,
            device=device_name(placement(model)[0]),
            threads=threads,
            dtype=str(placement(model)[1]).removeprefix("torch."),
            scope=scope,
        )
        for name, model in models.items()
    }


def speedup(baseline: Latency, other: Latency) -> Speedup:
    """How many times faster `other` is than `baseline`, round by round.

    Args:
        baseline: The slower one, as a rule; from the same call of `compare_latency` as `other`.
        other: The faster one, as a rule.

    Returns:
        Median and percentiles of the ratios baseline / other.

    Raises:
        ValueError: The two were not measured under the same conditions.

    Example:
        >>> where = dict(batch=1, length=8, device="cpu", threads=1, dtype="float32", scope="model")
        >>> slow = Latency(4.0, 4.0, 6.0, rounds=3, warmup=0, samples_ms=(4.0, 6.0, 4.0), **where)
        >>> fast = Latency(2.0, 1.0, 3.0, rounds=3, warmup=0, samples_ms=(2.0, 3.0, 1.0), **where)
        >>> speedup(slow, fast).median
        2.0
    """
    for name in ("rounds", "batch", "length", "device", "threads", "scope"):
        ours, theirs = getattr(baseline, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(f"{name} differs ({ours!r} and {theirs!r}); measure both in one call of compare_latency")
    ratios = np.divide(baseline.samples_ms, other.samples_ms)
    p10, median, p90 = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    return Speedup(median=median, p10=p10, p90=p90)


def example_inputs(
    model: nn.Module, *, batch: int = 1, length: int | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs that a model accepts, on its device: token ids without padding, images, or sound.

    Args:
        model: A transformers model for text, images, both (two towers) or speech, with any head on top.
        batch: Rows, at least 1.
        length: Tokens per row, at least 1 and at most what the model has positions for; of encoder-decoders on both
            sides, of speech-to-text models in the decoder (None: 1). Samples per row for models that read sound as it is
            (None: one second). Not used for images, which have the size that the config says.
        seed: The same seed gives the same inputs.

    Returns:
        For text `input_ids` in [0, vocabulary) without the padding id, and `attention_mask` of ones, both
        int64 (batch, length), for multiple choice (batch, 2, length); for encoder-decoders also `decoder_input_ids`. For images `pixel_values`, standard
        normal, (batch, channels, height, width) in the floating type of the model; for two towers both. For speech
        `input_values` (batch, length), or `input_features` (batch, mel bins, frames) with `decoder_input_ids`.

    Raises:
        ValueError: The model takes other inputs, a number is out of range, or the text is too long for it.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
        >>> {name: tuple(value.shape) for name, value in example_inputs(model, batch=2).items()}
        {'pixel_values': (2, 3, 224, 224)}
    """
    kind = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    known = kind in ("input_ids", "pixel_values", "input_values")
    whisper = kind == "input_features" and hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins")
    if not known and not whisper:
        raise ValueError(
            f"{type(model).__name__} (main input {kind!r}) reads neither text, images nor sound; build its inputs by hand"
        )
    if batch < 1:
        raise ValueError(f"batch={batch}: need at least 1 row")
    device, dtype = placement(model)
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}
    if kind == "input_values":
        inputs["input_values"] = torch.randn((batch, length or _ONE_SECOND), generator=generator)
    if kind == "input_features":
        # The encoder halves the number of frames.
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.randn((batch, config.num_mel_bins, frames), generator=generator)
    if kind == "pixel_values" or (hasattr(config, "vision_config") and _takes(model, "pixel_values")):
        inputs["pixel_values"] = torch.randn(_image_shape(config, batch), generator=generator)
    if kind == "input_ids":
        if type(model).__name__.endswith("ForMultipleChoice"):
            ids = _token_ids(model, 2 * batch, length, generator).view(batch, 2, -1)
        else:
            ids = _token_ids(model, batch, length, generator)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False) and _takes(model, "decoder_input_ids"):
        tokens = 1 if length is None and kind != "input_ids" else length
        inputs["decoder_input_ids"] = _token_ids(model, batch, tokens, generator)
    return {name: _move(value, device, dtype) for name, value in inputs.items()}


def device_name(device: torch.device | str) -> str:
    """The name of a device as its maker gives it.

    Args:
        device: For example "cpu" or "cuda:0".

    Returns:
        Name of the processor or GPU; for other accelerators torch's name for the device.

    Example:
        >>> bool(device_name("cpu"))
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine() or "CPU"


class Timer:
    """Runs one forward pass of a model and says how long it, or its layers, took."""

    def __init__(self, model: nn.Module, inputs: Inputs, stacks: Sequence[Sequence[nn.Module]] | None) -> None:
        device, dtype = placement(model)
        self.model = model
        self.inputs = {name: _move(value, device, dtype) for name, value in inputs.items()}
        self.stacks = stacks
        self.device = device
        self.clock: Callable[[], float] | None = None  # another one than time.perf_counter
        self.start_s = self.stop_s = math.nan

    def run(self) -> float:
        """Time of one forward pass in milliseconds."""
        self.start_s = self.stop_s = math.nan
        if self.stacks is None:
            self._start()
            self.model(**self.inputs)
            self._stop()
        else:
            self.model(**self.inputs)
        if math.isnan(self.stop_s - self.start_s):
            raise ValueError(f"{type(self.model).__name__} did not run its first and last layer; time scope='model'")
        return (self.stop_s - self.start_s) * 1000

    def _start(self, *_: object) -> None:
        if math.isnan(self.start_s):  # a layer that is used again has begun already
            self.start_s = self.now()

    def _stop(self, *_: object) -> None:
        self.stop_s = self.now()

    def now(self) -> float:
        """Seconds on the clock, once the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() if self.clock is None else self.clock()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Start at the first layer and stop at the last, outside of the hooks that are there already.

        Which of several stacks runs first is for the model to say.
        """
        handles = []
        for layers in self.stacks or ():
            handles.append(layers[0].register_forward_pre_hook(self._start, prepend=True))
            handles.append(layers[-1].register_forward_hook(self._stop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def timed(model: nn.Module, inputs: Inputs, scope: Scope) -> Iterator[Timer]:
    """A timer for a model in evaluation mode; its modes and hooks are as before afterwards."""
    timer = Timer(model, inputs, _stacks(model) if scope == "layers" else None)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with timer.hooked():
            yield timer
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """So many threads within an operation, or as many as before; how many there are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def interleave(timers: Mapping[Name, Runs[Sample]], *, rounds: int, warmup: int) -> dict[Name, list[Sample]]:
    """Run each once in every round, in rotating order; what is returned in the rounds after the warm-up."""
    samples: dict[Name, list[Sample]] = {name: [] for name in timers}
    names = itertools.cycle(timers)
    # Not inference_mode: bitsandbytes replaces biases in forward, which could then never be trained again.
    with torch.no_grad():
        for round_ in range(warmup + rounds):
            for name in itertools.islice(names, len(timers)):
                sample = timers[name].run()
                if round_ >= warmup:
                    samples[name].append(sample)
            next(names)  # the next round begins with another model
    return samples


def _summarize(samples_ms: list[float], **conditions: Any) -> Latency:
    p10, median, p90 = (float(value) for value in np.percentile(samples_ms, (10, 50, 90)))
    return Latency(
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        rounds=len(samples_ms),
        samples_ms=tuple(samples_ms),
        **conditions,
    )


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of the first parameter, type of the first floating one."""
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    floating = (parameter.dtype for parameter in parameters if parameter.is_floating_point())
    return device, next(floating, torch.float32)


def is_movable(model: nn.Module) -> bool:
    """Whether a model can be put on a device: not where a quantizer put it already, as all do but that of torchao."""
    return getattr(model, "quantization_method", None) in (None, "torchao")


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not torch.is_tensor(value):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def input_shape(inputs: Inputs) -> tuple[int, int | None]:
    """Rows, and tokens per row (None for images)."""
    tensors = [value for value in inputs.values() if torch.is_tensor(value) and value.dim() > 0]
    if not tensors:
        raise ValueError(f"inputs ({', '.join(inputs) or 'empty'}) hold no tensor; pass what the model's forward takes")
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return tensors[0].shape[0], None if tokens is None else tokens.shape[-1 if tokens is inputs.get("input_ids") else 1]


def _stacks(model: nn.Module) -> list[Sequence[nn.Module]]:
    """The layers of each stack of a model.

    Raises:
        StructureError: The architecture is not known.
    """
    stacks = find_stacks(model, family_of(model))
    if stacks is None:
        raise StructureError(f"{type(model).__name__} is only a part of a model; pass the whole model")
    return [list(layers) for _, _, layers in stacks if len(layers)]


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has such an argument; what wraps a model and passes all on does."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or not {"input_ids", "input_features", "pixel_values"} & set(parameters)


def _image_shape(config: Any, batch: int) -> tuple[int, int, int, int]:
    config = getattr(config, "vision_config", config)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return batch, config.num_channels, height, width


def usable_positions(model: nn.Module) -> int:
    """The most tokens per row that a model takes; a very large number where positions are relative."""
    config: Any = getattr(model.config, "text_config", model.config)
    limit: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
    limit = getattr(config, "max_target_positions", None) or limit  # of the decoder, where the encoder reads sound
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the padding id + 1.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def _token_ids(model: nn.Module, batch: int, length: int | None, generator: torch.Generator) -> torch.Tensor:
    limit = usable_positions(model)
    if length is None or not 1 <= length <= limit:
        raise ValueError(f"length={length}: {type(model).__name__} takes 1 to {limit} tokens per row")
    config: Any = getattr(model.config, "text_config", model.config)
    shape = (batch, length)
    pad = getattr(config, "pad_token_id", None)
    if pad is None or not 0 <= pad < config.vocab_size:
        return torch.randint(config.vocab_size, shape, generator=generator)
    ids = torch.randint(config.vocab_size - 1, shape, generator=generator)
    return ids + (ids >= pad)
