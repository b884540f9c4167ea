"""How a linear layer is written: in a layer of bitsandbytes, or packed by a scheme of our own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hfcompress.checkpoints.grids import Grid, Scheme
from hfcompress.checkpoints.packed import PackedLinear, pack, packed_bytes, unpack
from hfcompress.checkpoints.quantizer import PRESETS
from hfcompress.quantization.fitting import Fit, fit_grid

SCALE_DTYPE = torch.float16  # of packed layers
_NESTED_BLOCK = 256  # scales that share a scale, where bitsandbytes quantizes twice
_NESTED_MAP_BYTES = 4 * 256  # of the table that it stores with each layer
_MAP_BYTES = 4 * 16
_STATE_BYTES = {False: 80, True: 170}  # about: names, shape and block size in text, without and with nested scales


@dataclass(frozen=True, kw_only=True)
class NestedGrid(Grid):
    """A grid whose scales are written in 8 bits themselves, as bitsandbytes does it (double quantization).

    Attributes:
        whole_scale: The scales before that, shape (blocks,).
        scale_codes: uint8, one per block.
        scale_state: How bitsandbytes reads them.
        scale_mean: What was taken from the scales before; a scalar.
    """

    whole_scale: torch.Tensor
    scale_codes: torch.Tensor
    scale_state: Any
    scale_mean: torch.Tensor


@dataclass(frozen=True)
class Format:
    """How one linear layer is written.

    Attributes:
        name: "int8", "nf4", "nf4-dq", "fp4", "fp4-dq": a layer of bitsandbytes; else that of a `Scheme`.
        scheme: The numbers there are, and the size of their blocks.
    """

    name: str
    scheme: Scheme

    @property
    def bitsandbytes(self) -> bool:
        """Whether bitsandbytes has it."""
        return self.name in PRESETS

    def fit(self, weight: torch.Tensor, *, fit: Fit, importance: torch.Tensor | None = None) -> Grid:
        """The grid for a matrix of shape (outputs, inputs); see `fit_grid`. Its scales are those that will be read from disk."""
        dtype = torch.float32 if self.bitsandbytes else SCALE_DTYPE
        grid = fit_grid(weight, self.scheme, fit=fit, importance=importance, scale_dtype=dtype)
        return self.as_read(grid)

    def as_read(self, grid: Grid) -> Grid:
        """A grid with the scales that will be read from disk, in the place of those that were fitted."""
        return _nested(grid) if self.name.endswith("-dq") else grid

    def size_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes on disk of a matrix, with its scales (of 4 bits of bitsandbytes to a few bytes).

        Example:
            >>> format_of("nf4").size_bytes(64, 64), format_of("int3-g64").size_bytes(64, 64)
            (2448, 1664)
        """
        count = outputs * inputs
        blocks = -(-count // self.scheme.block_size((outputs, inputs)))
        codes = packed_bytes(count, self.scheme.bits)
        if not self.bitsandbytes:
            book = 2 * 2 ** int(self.scheme.bits) if self.scheme.kind == "codebook" else 0
            return codes + 2 * blocks * (2 if self.scheme.affine else 1) + book
        if self.name == "int8":
            return codes + 4 * outputs
        nested = self.name.endswith("-dq")
        scales = blocks + 4 * -(-blocks // _NESTED_BLOCK) + _NESTED_MAP_BYTES if nested else 4 * blocks
        return codes + scales + _MAP_BYTES + _STATE_BYTES[nested]

    def layer(
        self, linear: nn.Module, grid: Grid, codes: torch.Tensor, *, compute_dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """The layer that holds a linear layer's weights in this form.

        Args:
            linear: nn.Linear or Conv1D; its bias is taken over.
            grid: As `fit` gave it.
            codes: uint8, shape (outputs, inputs).
            compute_dtype: What 4-bit weights of bitsandbytes are multiplied in.
        """
        if not self.bitsandbytes:
            return PackedLinear.of(linear, self.scheme, grid, codes, scale_dtype=SCALE_DTYPE)
        layer = _int8_layer(grid, codes) if self.name == "int8" else self._layer_4bit(grid, codes, linear)
        if self.name != "int8":
            layer.compute_dtype = compute_dtype
        bias: torch.Tensor | None = linear.bias  # type: ignore[assignment]
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.source_cls = type(linear)  # transformers asks for it
        return layer.train(linear.training)

    def _layer_4bit(self, grid: Grid, codes: torch.Tensor, linear: nn.Module) -> Any:
        import bitsandbytes as bnb

        outputs, inputs = grid.shape
        table = bnb.functional.get_4bit_type(self.scheme.kind, device=codes.device)
        theirs = (grid.levels[:, None] - table).abs().argmin(1).to(torch.uint8)  # their FP4 is not in ascending order
        flat = theirs[codes.reshape(-1).int()]
        flat = nn.functional.pad(flat, (0, len(flat) % 2))
        packed = (flat[0::2] << 4 | flat[1::2]).view(-1, 1)
        nested = isinstance(grid, NestedGrid)
        state = bnb.functional.QuantState(
            absmax=grid.scale_codes if isinstance(grid, NestedGrid) else grid.scale.clone(),
            shape=torch.Size(grid.shape),
            code=table,
            blocksize=self.scheme.group,
            quant_type=self.scheme.kind,
            dtype=_float_type(linear),
            offset=grid.scale_mean if isinstance(grid, NestedGrid) else None,
            state2=grid.scale_state if isinstance(grid, NestedGrid) else None,
        )
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(inputs, outputs, False, compress_statistics=nested, quant_type=self.scheme.kind)
        layer.weight = bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=self.scheme.group,
            compress_statistics=nested,
            quant_type=self.scheme.kind,
            module=layer,
            bnb_quantized=True,
        )
        layer.quant_state = state
        return layer


@dataclass(frozen=True)
class Rounded:
    """The weights of one linear layer on a grid.

    Attributes:
        format: How they are written.
        grid: The numbers they may take.
        packed: Which of them each takes, in as few bytes as on disk: see `pack`.
    """

    format: Format
    grid: Grid
    packed: torch.Tensor

    @classmethod
    def of(cls, form: Format, grid: Grid, codes: torch.Tensor) -> Rounded:
        """From codes, uint8, shape (outputs, inputs)."""
        return cls(form, grid, pack(codes, form.scheme.bits))

    @property
    def codes(self) -> torch.Tensor:
        """Which number each weight takes, uint8, shape (outputs, inputs), unpacked anew each time."""
        outputs, inputs = self.grid.shape
        return unpack(self.packed, self.format.scheme.bits, outputs * inputs).view(outputs, inputs)

    def weight(self) -> torch.Tensor:
        """The weights, float32, shape (outputs, inputs)."""
        return self.grid.decode(self.codes)


def format_of(name: str) -> Format:
    """A format by its name.

    Args:
        name: One of bitsandbytes ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq"), or a scheme: see `Scheme.parse`. "int8" is that of
            bitsandbytes; "int8-channel" is packed by a scheme.

    Raises:
        ValueError: There is none of that name.

    Example:
        >>> format_of("nf4-dq").scheme.name, format_of("int3").name
        ('nf4-g64', 'int3-g64')
    """
    if name == "int8":
        return Format(name, Scheme.parse("int8-channel"))
    if name in PRESETS:
        return Format(name, Scheme.parse(name.removesuffix("-dq")))
    scheme = Scheme.parse(name)
    return Format(scheme.name, scheme)


def _nested(grid: Grid) -> NestedGrid:
    import bitsandbytes.functional as functional

    mean = grid.scale.mean()
    codes, state = functional.quantize_blockwise(grid.scale - mean, blocksize=_NESTED_BLOCK)
    scale = functional.dequantize_blockwise(codes, state) + mean
    plain = replace(grid, scale=scale)
    return NestedGrid(**vars(plain), whole_scale=grid.scale, scale_codes=codes, scale_state=state, scale_mean=mean)


def _int8_layer(grid: Grid, codes: torch.Tensor) -> Any:
    import bitsandbytes as bnb

    outputs, inputs = grid.shape
    weight = (codes.int() + int(grid.levels[0])).to(torch.int8)
    with torch.device("meta"):
        layer = bnb.nn.Linear8bitLt(
            inputs,
            outputs,
            False,
            has_fp16_weights=False,
            threshold=PRESETS["int8"]["llm_int8_threshold"],
        )
    layer.weight = bnb.nn.Int8Params(
        weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=grid.scale * float(grid.levels[-1])
    )
    return layer


def _float_type(linear: nn.Module) -> torch.dtype:
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    return weight.dtype
