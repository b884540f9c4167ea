"""How long each sublayer takes for every number of units, measured on the machine: what latency budgets are kept with.

A layer's time is fixed + attention + feed-forward. Each is measured on the model's own layers, in the model's own forward,
with the inputs that are asked for, in copies that share the model's weights. All copies run in turn, round after round.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from hfcompress.anatomy import find_layers
from hfcompress.measurement.copies import Layer, cut_copy, find_layer_sites
from hfcompress.measurement.costs import Costs, by_shape, first_of_shape
from hfcompress.measurement.latency import (
    Inputs,
    Scope,
    Timer,
    device_name,
    input_shape,
    interleave,
    placement,
    timed,
    torch_threads,
)
from hfcompress.measurement.size import count_parameters

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of all units at once: what sublayers cost beside each other
_PRECISION = 0.02  # relative error of a typical point
_DISTURBED = 1.5  # a table above this many times what a pass takes now was measured while others had the machine
_ALL_COUNTS = 32  # up to so many units, each count is measured
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation", "activation_function", "feed_forward_proj")


class TableError(ValueError):
    """A latency table does not fit a model, or is no table."""


@dataclass(frozen=True)
class ShapeTimes:
    """Times of the layers of one shape.

    Attributes:
        fixed_ms: Time of a layer all whose sites are empty.
        units: For each role ("heads", "neurons") the numbers of units that were measured, ascending from 0.
        times_ms: For each role the time that these add, never falling from 0.
    """

    fixed_ms: float
    units: Mapping[str, tuple[int, ...]]
    times_ms: Mapping[str, tuple[float, ...]]

    def line_ms(self, role: str, units: int) -> NDArray[np.float64]:
        """Time that 0 ... `units` units add, shape (units + 1,); straight lines between what was measured."""
        return np.interp(np.arange(units + 1), self.units[role], self.times_ms[role])


def _shape_times(entry: Mapping[str, Any]) -> ShapeTimes:
    """One shape as `to_dict` wrote it."""
    units = {role: tuple(int(count) for count in counts) for role, counts in entry["units"].items()}
    times_ms = {role: tuple(float(time_ms) for time_ms in times) for role, times in entry["times_ms"].items()}
    for role, counts in units.items():
        line = (*times_ms[role], math.inf)
        if len(line) != len(counts) + 1 or line[0] != 0 or any(b < a for a, b in itertools.pairwise(line)):
            raise TableError(
                f"not a latency table: the times of {role} do not rise from 0 with its {len(counts)} counts"
            )
        if counts[0] != 0 or any(b <= a for a, b in itertools.pairwise(counts)):
            raise TableError(f"not a latency table: the counts of {role} do not rise from 0")
    return ShapeTimes(float(entry["fixed_ms"]), units, times_ms)


@dataclass(frozen=True)
class LatencyTable:
    """Times of every sublayer for every number of units, and the conditions they were measured under.

    The times are medians, as in `Latency`.

    Attributes:
        shapes: Times of the layers, by what they are built like.
        rest_ms: Time of all that is not in a layer: embeddings and head for the scope "model", and in either scope
            what lies between two stacks of layers.
        conditions: What was measured, on what.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.measurement import example_inputs
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
        >>> inputs = example_inputs(model, batch=1, length=4)
        >>> table = measure_latency_table(model, inputs, rounds=1, warmup=0, widths=2, cache_dir=None)
        >>> costs = table.costs(model)
        >>> costs.quantity, costs.sites["encoder.1.heads"].shape, costs.total({}) >= costs.total({"encoder.1.heads": 1})
        ('latency_ms', (3,), True)
        >>> LatencyTable.from_dict(table.to_dict()) == table
        True
    """

    shapes: Mapping[str, ShapeTimes]
    rest_ms: float
    conditions: Mapping[str, Any]

    def costs(self, model: nn.Module) -> Costs:
        """What a model costs in milliseconds, for counts up to the units it has now.

        Args:
            model: The model that was measured, or one with the same layers and no more units.

        Raises:
            TableError: The model has layers, or more units, that were not measured.
        """
        fixed: dict[str, float] = {}
        sites: dict[str, NDArray[np.float64]] = {}
        for layer in find_layer_sites(model):
            times = self.shapes.get(layer.shape)
            if times is None:
                raise TableError(f"{layer.name} ({layer.shape}) was not measured; measure a table of this model")
            fixed[layer.name] = times.fixed_ms
            for role, site in layer.sites.items():
                if site.units > times.units[role][-1]:
                    raise TableError(
                        f"{site.name} has {site.units} units, measured were up to {times.units[role][-1]}; "
                        "measure a table of this model"
                    )
                line_ms = times.line_ms(role, site.units)
                sites[site.name] = sites[site.name] + line_ms if site.name in sites else line_ms
        return Costs("latency_ms", self.rest_ms, fixed, sites)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data for JSON."""
        shapes = {
            shape: {
                "fixed_ms": times.fixed_ms,
                "units": {role: list(units) for role, units in times.units.items()},
                "times_ms": {role: list(times_ms) for role, times_ms in times.times_ms.items()},
            }
            for shape, times in self.shapes.items()
        }
        return {
            "version": FORMAT_VERSION,
            "conditions": dict(self.conditions),
            "rest_ms": self.rest_ms,
            "shapes": shapes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """The table that `to_dict` wrote.

        Raises:
            TableError: The values are of another version, or are no table.
        """
        try:
            if values["version"] != FORMAT_VERSION:
                raise TableError(
                    f"latency table of version {values['version']!r}, this hfcompress reads {FORMAT_VERSION}"
                )
            shapes = {shape: _shape_times(entry) for shape, entry in values["shapes"].items()}
            return cls(shapes, float(values["rest_ms"]), dict(values["conditions"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise TableError(f"not a latency table: {error!r}") from None


def measure_latency_table(
    model: nn.Module,
    inputs: Inputs,
    *,
    threads: int | None = None,
    scope: Scope = "layers",
    rounds: int = 7,
    warmup: int = 2,
    widths: int = 16,
    cache_dir: str | Path | None = "default",
    refresh: bool = False,
) -> LatencyTable:
    """Measure how long every sublayer takes for every number of units, or read what was measured before.

    Each copy that is timed has a few layers of one shape, with so many units in one kind of site and none in the others;
    the last two are timed, each on its own on a CPU, together on other devices. The copies take turns, round after round,
    and the median of a copy's times counts. While these are known to no better than 2 %, up to three times as many rounds
    follow. With one CPU thread its processor time is measured, which leaves out the time that other processes had the core.
    Some copies have a share of all units at once, and set how much the sublayers cost beside each other. Times are made to
    rise with the units (isotonic regression). A table that was kept is held against a few passes of the model: others on the machine only
    ever add time, so one that says much more is measured again.

    Args:
        model: A transformers model of a known architecture, not quantized, on the device and in the type it will run in.
            It is not changed; the copies share its weights.
        inputs: Keyword arguments of its forward, such as those of `example_inputs`: they set batch and length.
        threads: CPU threads; None leaves them as they are.
        scope: "model", or "layers": without embeddings and head.
        rounds: Timed runs of each copy, at least 1.
        warmup: Untimed runs before them, at least 0.
        widths: How many numbers of neurons are measured, at least 2; with heads each number is, up to 32.
        cache_dir: Folder of tables measured before; None keeps nothing. By default `$HFCOMPRESS_CACHE`, or
            `$XDG_CACHE_HOME/hfcompress`, or `~/.cache/hfcompress`.
        refresh: Measure again even if there is a table.

    Returns:
        The table, for counts from 0 to the largest that a site of each shape has now.

    Raises:
        StructureError: The architecture is not known, or a layer is quantized.
        ValueError: A number is out of range, the scope is not known, or the inputs have no tensor.

    Example:
        See `LatencyTable`.
    """
    if rounds < 1 or warmup < 0 or widths < 2 or (threads is not None and threads < 1):
        raise ValueError(
            f"rounds={rounds}, warmup={warmup}, widths={widths}, threads={threads} must be at least 1, 0, 2 and 1 (or None)"
        )
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is not known; choose one of {', '.join(map(repr, get_args(Scope)))}")
    layers = find_layer_sites(model)
    grids = _grids(layers, widths=widths, multiple=fast_multiple(placement(model)[0]))
    with torch_threads(threads) as threads:
        conditions = _conditions(model, inputs, grids, threads=threads, scope=scope, rounds=rounds, warmup=warmup)
        file = None if cache_dir is None else _cache_file(cache_dir, conditions)
        cached = None if file is None or refresh else _read(file, conditions)
        if cached is not None:
            assert file is not None
            said_ms, now_ms = cached.costs(model).total({}), _fastest_ms(model, inputs, scope)
            if said_ms <= _DISTURBED * now_ms:
                logger.info("latency of %s is known from %s", conditions["model_type"], file)
                return cached
            logger.warning(
                "%s says %.4g ms, and a pass takes %.4g ms: the machine was busy when it was made; measured again",
                file,
                said_ms,
                now_ms,
            )
        copies = _copies(layers, grids)
        times_ms, uses = _measure(model, inputs, copies, scope=scope, rounds=rounds, warmup=warmup)
    table = _table(layers, grids, copies, times_ms, uses, conditions)
    if file is not None:
        _write(file, table)
    return table


def fast_multiple(device: torch.device | str) -> int:
    """What widths should be multiples of to be fast on a device.

    On CPUs 16, the 32-bit numbers in a register of AVX-512 (and twice those of AVX2): on a Xeon with AVX-512, widths that
    are not cost 2 to 10 % more per neuron. On CUDA 64: tensor cores are most efficient from A100 on when dimensions are
    multiples of 128 bytes, 64 numbers of 16 bit (NVIDIA, "Matrix Multiplication Background User's Guide", section 2.2, Tensor
    Core Requirements). Others are taken to be like CUDA.

    Example:
        >>> fast_multiple("cpu"), fast_multiple("cuda:0")
        (16, 64)
    """
    return 16 if torch.device(device).type == "cpu" else 64


# ---- what is measured ----

Grids = dict[str, dict[str, tuple[int, ...]]]  # shape, role: counts


class Point(NamedTuple):
    """One thing to be timed: layers of a shape with so many units by role."""

    shape: str
    units: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Copy:
    """The layers of a copy; the last two of its shape's stack are timed."""

    layers: tuple[tuple[Layer, Mapping[str, int]], ...]
    stack: str


def grid(units: int, points: int, *, multiple: int) -> tuple[int, ...]:
    """Numbers of units to measure: 0, all, and about `points` - 1 multiples between, closer where they are small.

    Example:
        >>> grid(5, 16, multiple=16), grid(512, 6, multiple=16)
        ((0, 1, 2, 3, 4, 5), (0, 32, 96, 176, 272, 384, 512))
    """
    if units <= points:
        return tuple(range(units + 1))
    between = (round(units * (number / points) ** 1.5 / multiple) * multiple for number in range(1, points))
    return tuple(sorted({0, units, *(count for count in between if 0 < count < units)}))


def _grids(layers: Sequence[Layer], *, widths: int, multiple: int) -> Grids:
    grids: Grids = {}
    for shape, members in by_shape(layers).items():
        grids[shape] = {}
        for role, site in members[0].sites.items():
            most = max(layer.sites[role].units for layer in members)
            heads = site.kind == "heads"
            points = max(widths, _ALL_COUNTS) if heads else widths
            grids[shape][role] = grid(most, points, multiple=1 if heads else multiple)
    return grids


def _copies(layers: Sequence[Layer], grids: Grids) -> dict[Point, _Copy]:
    """What to build for each point, the points of one shape after the other."""
    copies = {}
    for shape, members in by_shape(layers).items():
        turn = 0
        roles = {role: counts for role, counts in grids[shape].items() if counts[-1]}
        wanted: list[dict[str, int]] = [{}, *({role: count} for role in roles for count in roles[role][1:])]
        for units in wanted:
            able = [layer for layer in members if all(layer.sites[role].units >= n for role, n in units.items())]
            # Other layers each time: in the model too, weights are not at hand when their layer begins.
            pair = [able[turn % len(able)], able[(turn + 1) % len(able)]]
            turn += 2
            copies[_point(shape, units)] = _one_copy(layers, shape, pair, units)
        for number, fraction in enumerate(_FRACTIONS if len(roles) > 1 else ()):
            layer = members[(turn + number) % len(members)]
            units = {role: round(layer.sites[role].units * fraction) for role in roles}
            copies.setdefault(_point(shape, units), _one_copy(layers, shape, [layer, layer], units))
    return copies


def _point(shape: str, units: Mapping[str, int]) -> Point:
    return Point(shape, tuple(sorted((role, count) for role, count in units.items() if count)))


def _one_copy(layers: Sequence[Layer], shape: str, pair: Sequence[Layer], units: Mapping[str, int]) -> _Copy:
    """One layer of each shape, so that all stacks run, and then the two that are timed."""
    stack = pair[0].stack
    # What all layers of a stack share must be the same in all of them.
    shared = {role for role, site in pair[0].sites.items() if site.layer is None}
    chosen = []
    for layer in first_of_shape(layers).values():
        alike = layer.shape == shape
        chosen.append(
            (
                layer,
                {
                    role: min(site.units, units.get(role, 0))
                    if alike or (layer.stack == stack and role in shared)
                    else 0
                    for role, site in layer.sites.items()
                },
            )
        )
    chosen += [(layer, {role: units.get(role, 0) for role in layer.sites}) for layer in pair]
    return _Copy(tuple(chosen), stack)


# ---- measuring ----


class _Done(Exception):
    """Raised to end a forward whose layers have run."""


class _LapTimer:
    """Runs the copy up to the layers that are timed, and says how long each of these took, in milliseconds."""

    def __init__(self, model: nn.Module, inputs: Inputs, stack: str, bar: Callable[[], Any]) -> None:
        pairs = zip(find_layer_sites(model), find_layers(model), strict=True)
        self.layers = [module for layer, module in pairs if layer.stack == stack][-3:]
        self.timer = Timer(model, inputs, None)
        self.bar = bar
        self.timer.clock = _clock(self.timer.device)
        self.each = self.timer.device.type == "cpu"  # elsewhere, waiting for each layer would be a part of its time
        self.marks_s: list[float] = []

    def run(self) -> tuple[float, ...]:
        self.marks_s = []
        with suppress(_Done):
            self.timer.model(**self.timer.inputs)
        if len(self.marks_s) != (3 if self.each else 2):
            raise ValueError(f"{type(self.timer.model).__name__} did not run all layers with these inputs")
        self.bar()
        laps_ms = np.diff(self.marks_s) * 1000
        return tuple((laps_ms if self.each else laps_ms / 2).tolist())

    def _mark(self, number: int) -> None:
        if self.each or number != 1:
            self.marks_s.append(self.timer.now())
        if number == 2:
            raise _Done

    @contextmanager
    def hooked(self) -> Iterator[_LapTimer]:
        hooks = [
            layer.register_forward_hook(lambda *_, number=number: self._mark(number))
            for number, layer in enumerate(self.layers)
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


class _Whole:
    """Times a whole forward."""

    def __init__(self, timer: Timer, bar: Callable[[], Any]) -> None:
        self.timer, self.bar = timer, bar
        self.timer.clock = _clock(timer.device)

    def run(self) -> tuple[float, ...]:
        self.bar()
        return (self.timer.run(),)


def _measure(
    model: nn.Module, inputs: Inputs, copies: Mapping[Point, _Copy], *, scope: Scope, rounds: int, warmup: int
) -> tuple[dict[Point | None, float], dict[str, int]]:
    """Time of each point in milliseconds, under None that of one empty layer of each shape with all around them.

    Also how often the layers of each shape run in one forward.
    """
    firsts = first_of_shape(find_layer_sites(model))
    base = cut_copy(model, [(layer, dict.fromkeys(layer.sites, 0)) for layer in firsts.values()])
    inputs = Timer(base, inputs, None).inputs  # moved once for all
    uses = dict(zip(firsts, _uses(base, inputs), strict=True))
    timers: dict[Point | None, Any] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=(len(copies) + 1) * (rounds + warmup), desc="measuring latency", delay=2, leave=False)
        )
        for point, one in copies.items():
            timer = _LapTimer(cut_copy(model, one.layers), inputs, one.stack, bar.update)
            timers[point] = stack.enter_context(timer.hooked())
        timers[None] = _Whole(stack.enter_context(timed(base, inputs, scope)), bar.update)
        samples = interleave(timers, rounds=rounds, warmup=warmup)
        laps_ms = {point: [lap for run in runs for lap in run] for point, runs in samples.items()}
        for _ in range(3):
            if np.median([relative_error(laps) for laps in laps_ms.values()]) <= _PRECISION:
                break
            bar.total = bar.n + len(timers) * rounds
            # All of them again: the times of a round are comparable, those of different times of the day are not.
            for again, runs in interleave(timers, rounds=rounds, warmup=0).items():
                laps_ms[again] += [lap for run in runs for lap in run]
    return {point: float(np.median(laps)) for point, laps in laps_ms.items()}, uses


def _fastest_ms(model: nn.Module, inputs: Inputs, scope: Scope) -> float:
    """The fastest of five passes."""
    with timed(model, inputs, scope) as timer:
        timer.clock = _clock(timer.device)
        return float(min(interleave({"model": timer}, rounds=5, warmup=1)["model"]))


def _clock(device: torch.device) -> Callable[[], float] | None:
    """The processor time of this thread, where it does all the work: it stands still while others have the core."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone and time.get_clock_info("thread_time").resolution < 1e-6 else None


def _uses(model: nn.Module, inputs: Inputs) -> list[int]:
    """How often each layer runs in one forward."""
    layers = find_layers(model)
    counts = [0] * len(layers)

    def count(number: int) -> None:
        counts[number] += 1

    hooks = [layer.register_forward_hook(lambda *_, n=n: count(n)) for n, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def relative_error(samples: Sequence[float]) -> float:
    """Standard error of the median, as a share of it: 1.253 standard deviations / sqrt(n), these taken from the quartiles.

    Example:
        >>> relative_error([10.0] * 5), round(relative_error([9.0, 10.0, 11.0, 12.0, 13.0]), 3)
        (0.0, 0.076)
    """
    low, middle, high = np.percentile(samples, (25, 50, 75))
    return float(1.253 * (high - low) / 1.349 / math.sqrt(len(samples)) / middle) if middle > 0 else 0.0


# ---- from times to a table ----


def _table(
    layers: Sequence[Layer],
    grids: Grids,
    copies: Mapping[Point, _Copy],
    times_ms: Mapping[Point | None, float],
    uses: Mapping[str, int],
    conditions: Mapping[str, Any],
) -> LatencyTable:
    shapes = {
        shape: _times_of_shape(
            roles, {point.units: times_ms[point] for point in copies if point.shape == shape}, uses=uses[shape]
        )
        for shape, roles in grids.items()
    }
    stacks = {layer.stack for layer in layers}
    around_ms = times_ms[None] - sum(times.fixed_ms for times in shapes.values())
    rest_ms = 0.0 if conditions["scope"] == "layers" and len(stacks) == 1 else max(0.0, around_ms)
    return LatencyTable(shapes, rest_ms, conditions)


def _times_of_shape(
    roles: Mapping[str, tuple[int, ...]], times_ms: Mapping[tuple[tuple[str, int], ...], float], *, uses: int
) -> ShapeTimes:
    empty_ms = times_ms[()]
    added_ms = {}
    for role, counts in roles.items():
        rising = isotonic([times_ms[((role, count),)] - empty_ms for count in counts[1:]])
        added_ms[role] = np.concatenate([[0.0], np.maximum(rising, 0.0)])
    ratios = []
    for units, time_ms in times_ms.items():
        apart_ms = sum(np.interp(count, roles[role], added_ms[role]) for role, count in units)
        if len(units) > 1 and apart_ms > 0:
            ratios.append((time_ms - empty_ms) / apart_ms)
    beside = float(np.median(ratios)) if ratios else 1.0
    if beside <= 0:  # nothing but noise
        beside = 1.0
    return ShapeTimes(
        fixed_ms=empty_ms * uses,
        units=dict(roles),
        times_ms={role: tuple((added * beside * uses).tolist()) for role, added in added_ms.items()},
    )


def isotonic(values: Iterable[float]) -> NDArray[np.float64]:
    """The values that never fall and are nearest by least squares: pool adjacent violators (Barlow et al. 1972).

    Example:
        >>> isotonic([1.0, 3.0, 2.0, 5.0]).tolist()
        [1.0, 2.5, 2.5, 5.0]
    """
    pools: list[tuple[float, int]] = []  # mean, number of values
    for value in values:
        mean, number = float(value), 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, number = (mean * number + other * more) / (number + more), number + more
        pools.append((mean, number))
    return np.repeat([mean for mean, _ in pools], [number for _, number in pools]).astype(np.float64)


# ---- on disk ----


def _conditions(
    model: nn.Module, inputs: Inputs, grids: Grids, *, threads: int, scope: Scope, **knobs: int
) -> dict[str, Any]:
    """All that the times depend on, as plain data for JSON."""
    config: Any = model.config
    device, dtype = placement(model)
    batch, length = input_shape(inputs)
    mask = inputs.get("attention_mask")
    conditions: dict[str, Any] = {
        "device": device_name(device),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "length": length,
        "inputs": {name: list(value.shape) for name, value in inputs.items() if torch.is_tensor(value)},
        "padded": isinstance(mask, torch.Tensor) and not bool(mask.bool().all()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": getattr(config, "_attn_implementation", None),
        "model_type": config.model_type,
        "activation": next((str(getattr(config, name)) for name in _ACTIVATIONS if hasattr(config, name)), None),
        "scope": scope,
        "grids": {shape: {role: list(counts) for role, counts in roles.items()} for shape, roles in grids.items()},
        **knobs,
    }
    if scope == "model":
        inside = sum(count_parameters(layer) for layer in find_layers(model))
        conditions |= {"class": type(model).__name__, "other_parameters": count_parameters(model) - inside}
    return conditions


def _cache_file(folder: str | Path, conditions: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return (default_cache_dir() if folder == "default" else Path(folder)) / f"latency-{digest}.json"


def default_cache_dir() -> Path:
    """Where tables are kept: `$HFCOMPRESS_CACHE`, or `$XDG_CACHE_HOME/hfcompress`, or `~/.cache/hfcompress`.

    Example:
        >>> default_cache_dir().is_absolute()
        True
    """
    own, shared = os.environ.get("HFCOMPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    return (Path(shared) if shared else Path.home() / ".cache").expanduser().absolute() / "hfcompress"


def _read(file: Path, conditions: Mapping[str, Any]) -> LatencyTable | None:
    """The table in a file; None if there is no file, or none that fits."""
    if not file.is_file():
        return None
    try:
        table = LatencyTable.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used and is measured again: %s", file, error)
        return None
    if table.conditions != conditions:
        logger.warning("%s was measured under other conditions and is measured again", file)
        return None
    return table


def _write(file: Path, table: LatencyTable) -> None:
    """Under another name first: whoever reads sees all of it or nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=file.stem, suffix=".part", delete=False
        ) as part:
            json.dump(table.to_dict(), part, indent=1)
        os.replace(part.name, file)
    except OSError as error:
        logger.warning("the latency table is not kept: %s", error)
