"""Weights in as many bits as their scheme says, on disk and in memory; made whole again when they are used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy.sites import linear_features
from hfcompress.checkpoints.grids import Grid, Scheme
from hfcompress.checkpoints.inputs import snap_inputs

_TRITS = 5  # 3^5 = 243 numbers fit into a byte
_IN_BYTES = (1, 2, 4)  # no code lies in two bytes: no wider integers are needed


def pack(codes: torch.Tensor, bits: float) -> torch.Tensor:
    """Codes side by side, without room between them.

    Args:
        codes: Integers of 0 to 2^bits - 1 (0 to 2 for 1.6 bits), any shape.
        bits: 1 to 8; or 1.6 for three levels, of which five share a byte.

    Returns:
        uint8, shape (`packed_bytes`,). Eight codes take `bits` bytes, the first code in the lowest bits.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), 2).tolist()  # 1 + 2 * 4 + 3 * 16
        [57, 0]
        >>> pack(torch.tensor([1, 2, 0, 0, 1]), 1.6).tolist()  # 1 + 2 * 3 + 1 * 81
        [88]
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.to(torch.uint8)
    if bits in _IN_BYTES:
        parts = F.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8 // int(bits))
        return (parts << _shifts(bits, flat.device)).sum(1, dtype=torch.uint8)
    group, base = _group(bits)
    padded = F.pad(flat.to(torch.int64), (0, -len(flat) % group)).view(-1, group)
    places = torch.tensor([base**place for place in range(group)], device=flat.device)
    words = (padded * places).sum(1)
    count = 1 if group == _TRITS else int(bits)
    shifts = 8 * torch.arange(count, device=flat.device)
    return ((words[:, None] >> shifts) & 255).to(torch.uint8).reshape(-1)


def unpack(packed: torch.Tensor, bits: float, count: int) -> torch.Tensor:
    """The codes that `pack` was given, uint8, shape (count,).

    Example:
        >>> unpack(torch.tensor([57, 0], dtype=torch.uint8), 2, 3).tolist()
        [1, 2, 3]
    """
    if bits == 8:
        return packed[:count]
    if bits in _IN_BYTES:
        return (packed[:, None] >> _shifts(bits, packed.device) & 2 ** int(bits) - 1).reshape(-1)[:count]
    group, base = _group(bits)
    if group == _TRITS:
        places = torch.tensor([base**place for place in range(group)], device=packed.device, dtype=torch.uint8)
        return ((packed[:, None] // places) % base).reshape(-1)[:count]
    width = int(bits)
    words = (packed.view(-1, width).to(torch.int64) << 8 * torch.arange(width, device=packed.device)).sum(1)
    shifts = width * torch.arange(group, device=packed.device)
    return ((words[:, None] >> shifts) & (base - 1)).to(torch.uint8).reshape(-1)[:count]


def packed_bytes(count: int, bits: float) -> int:
    """Bytes that so many codes take.

    Example:
        >>> packed_bytes(3, 2), packed_bytes(64, 3), packed_bytes(11, 1.6)
        (2, 24, 3)
    """
    if bits == 8:
        return count
    group, _ = _group(bits)
    return -(-count // group) * (1 if group == _TRITS else int(bits))


def _shifts(bits: float, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, int(bits), dtype=torch.uint8, device=device)


def _group(bits: float) -> tuple[int, int]:
    """Codes that are packed together, and how many values each may have."""
    return (_TRITS, 3) if bits == 1.6 else (8, 2 ** int(bits))


class PackedLinear(nn.Module):
    """A linear layer whose weights are codes on a grid; they are decoded for each product.

    This saves memory, not time: decoding costs about as much as reading the weights.

    Args:
        scheme: How the weights are written.
        inputs: Features in.
        outputs: Features out.
        bias: Whether there is one.
        dtype: Of the bias and of what the products are computed in.
        scale_dtype: Of the scales and offsets on disk and in memory.
        device: Where the empty tensors are made.
        rounds_inputs: Whether what enters is rounded to 8 bits first.

    Attributes:
        codes: uint8, shape (`packed_bytes`,).
        scale: Shape (blocks,).
        offset: Shape (blocks,), or None.
        levels: Of a codebook, float, shape (levels,); None for other schemes, whose levels follow from their name.
        input_step: Distance of the numbers that inputs are rounded to, scalar in float32, or None.
        input_zero: How many of them are below 0, scalar in float32, or None.
        source_cls: What it was made from, nn.Linear or Conv1D: named as in the layers of bitsandbytes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    levels: torch.Tensor | None
    input_step: torch.Tensor | None
    input_zero: torch.Tensor | None
    source_cls: type[nn.Module] = nn.Linear

    def __init__(
        self,
        scheme: Scheme,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        rounds_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.scheme, self.in_features, self.out_features, self.dtype = scheme, inputs, outputs, dtype
        size = scheme.block_size((outputs, inputs))
        blocks = -(-inputs * outputs // size)
        empty = {"device": device}
        self.register_buffer(
            "codes", torch.empty(packed_bytes(inputs * outputs, scheme.bits), dtype=torch.uint8, **empty)
        )
        self.register_buffer("scale", torch.empty(blocks, dtype=scale_dtype, **empty))
        self.register_buffer("offset", torch.empty(blocks, dtype=scale_dtype, **empty) if scheme.affine else None)
        book = scheme.kind == "codebook"
        self.register_buffer("levels", torch.empty(2 ** int(scheme.bits), dtype=scale_dtype, **empty) if book else None)
        for name in ("input_step", "input_zero"):
            self.register_buffer(name, torch.empty((), dtype=torch.float32, **empty) if rounds_inputs else None)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, **empty), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls, linear: nn.Module, scheme: Scheme, grid: Grid, codes: torch.Tensor, *, scale_dtype: torch.dtype
    ) -> PackedLinear:
        """The packed form of a linear layer (or Conv1D) whose weights were put on a grid.

        Raises:
            ValueError: A scale is too large for its type.
        """
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        bias: torch.Tensor | None = linear.bias  # type: ignore[assignment]
        outputs, inputs = grid.shape
        packed = cls(
            scheme,
            inputs,
            outputs,
            bias=bias is not None,
            dtype=weight.dtype,
            scale_dtype=scale_dtype,
            device=weight.device,
        )
        values = {"scale": grid.scale, "offset": grid.offset, "levels": grid.levels}
        for name, value in values.items():
            target = getattr(packed, name)
            if target is not None:
                assert value is not None
                if not torch.isfinite(value.to(scale_dtype)).all():
                    raise ValueError(f"a scale of {float(value.abs().max()):g} does not fit into {scale_dtype}")
                target.copy_(value)
        packed.codes.copy_(pack(codes, scheme.bits))
        if bias is not None:
            assert packed.bias is not None
            packed.bias.data.copy_(bias.detach())
        packed.source_cls = type(linear)
        return packed.train(linear.training)

    def grid(self) -> Grid:
        """The numbers that the weights may take."""
        shape = (self.out_features, self.in_features)
        levels = self.scheme.levels().to(self.scale.device) if self.levels is None else self.levels.float()
        offset = None if self.offset is None else self.offset.float()
        size = min(self.scheme.block_size(shape), self.in_features * self.out_features)
        return Grid(levels, self.scale.float(), offset, size, shape, self.scheme.uniform)

    @property
    def weight(self) -> torch.Tensor:
        """The weights that the codes stand for, shape (outputs, inputs), computed anew each time."""
        count = self.in_features * self.out_features
        codes = unpack(self.codes, self.scheme.bits, count).view(self.out_features, self.in_features)
        return self.grid().decode(codes).to(self.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs, rounded if they are to be, times the decoded weights, plus bias."""
        if self.input_step is not None and self.input_zero is not None:
            inputs = snap_inputs(inputs, self.input_step, self.input_zero)
        return F.linear(inputs, self.weight.to(inputs.dtype), self.bias)

    def round_inputs(self, step: torch.Tensor, zero: torch.Tensor) -> None:
        """Round what enters from now on; see `hfcompress.checkpoints.inputs.snap_inputs`."""
        self.input_step, self.input_zero = (value.detach().float().to(self.codes.device) for value in (step, zero))

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """As nn.Module, which moves and casts; but scales keep their type, or the weights would be others."""
        names = ("scale", "offset", "levels", "input_step", "input_zero")
        kept = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if getattr(self, name).dtype != before.dtype:
                setattr(self, name, before.to(getattr(self, name).device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and scheme."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"


def put_packed(
    model: nn.Module,
    schemes: Mapping[str, str],
    *,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    rounds_inputs: Collection[str] = (),
) -> None:
    """Replace linear layers by empty packed ones, in place, on the device they are on.

    Raises:
        ValueError: A name is not a linear layer of the model.
    """
    modules = dict(model.named_modules())
    for name, scheme in schemes.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear | Conv1D):
            raise ValueError(f"the checkpoint says {name} is quantized, but the model has no linear layer of that name")
        inputs, outputs = linear_features(linear)
        packed = PackedLinear(
            Scheme.parse(scheme),
            inputs,
            outputs,
            bias=linear.bias is not None,
            dtype=dtype,
            scale_dtype=scale_dtype,
            device=linear.weight.device,
            rounds_inputs=name in rounds_inputs,
        )
        packed.source_cls = type(linear)
        model.set_submodule(name, packed.train(linear.training))


def unpacked(model: nn.Module) -> dict[str, Any]:
    """Replace packed layers by ordinary ones with the weights they stand for, in place; their schemes by name.

    Example:
        >>> from hfcompress.quantization.fitting import fit_grid
        >>> linear, scheme = nn.Linear(8, 4), Scheme.parse("int4-channel")
        >>> grid = fit_grid(linear.weight, scheme, scale_dtype=torch.float16)
        >>> packed = PackedLinear.of(linear, scheme, grid, grid.encode(linear.weight), scale_dtype=torch.float16)
        >>> model, x = nn.Sequential(packed), torch.randn(2, 8)
        >>> before = model(x)
        >>> unpacked(model)
        {'0': 'int4-channel'}
        >>> torch.equal(model(x), before), type(model[0]).__name__
        (True, 'Linear')
    """
    schemes = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                device=module.codes.device,
                dtype=module.dtype,
            )
            linear.weight.data.copy_(module.weight)
            if module.bias is not None:
                linear.bias.data.copy_(module.bias)
            model.set_submodule(name, as_source(linear, module.source_cls).train(module.training))
            schemes[name] = module.scheme.name
    return schemes


def as_source(linear: nn.Linear, source_cls: type[nn.Module]) -> nn.Module:
    """A linear layer in the form its model is made of: with the same weights turned round where that is a Conv1D."""
    if not issubclass(source_cls, Conv1D):
        return linear
    turned = Conv1D(linear.out_features, linear.in_features).to(linear.weight)
    turned.weight.data.copy_(linear.weight.T)
    turned.bias.data.copy_(linear.bias)
    return turned
