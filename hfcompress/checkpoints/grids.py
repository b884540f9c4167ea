"""Grids of few numbers that weights are written in: levels times a scale per block, plus an offset per block.

Every scheme here is one of these: integers with or without a zero point, power-of-two scales, NF4 and FP4, ternary, binary, a codebook. A
block is a run of consecutive weights of the flattened matrix, as in bitsandbytes: the whole matrix (per tensor), one row (per channel), or
a number of weights (per group).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

# NF4: QLoRA (Dettmers et al. 2023), appendix E. FP4: one sign bit, two of exponent, one of fraction, scaled to 1, as bitsandbytes has it.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (-1.0, -0.6666666865348816, -0.5, -0.3333333432674408, -0.25, -0.1666666716337204, -0.0052083334885537624, 0.0)
_TABLES = {
    "nf4": _NF4,
    "fp4": (*_FP4, *(-level for level in reversed(_FP4[:-1]))),
    "ternary": (-1.0, 0.0, 1.0),
    "binary": (-1.0, 1.0),
}
_NAME = re.compile(
    r"(?P<kind>int|fixed|codebook)(?P<bits>[1-8])(?P<rest>.*)|(?P<table>nf4|fp4|ternary|binary)(?P<more>.*)"
)
_LAYOUT = re.compile(r"(?:-g(?P<group>[1-9]\d*)|-(?P<whole>tensor|channel))?(?P<affine>-asym)?")
_DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Scheme:
    """How weights are written.

    Attributes:
        kind: "int", "fixed" (integers whose scale is a power of two), "codebook" (levels found by k-means, one set per matrix), "nf4",
            "fp4", "ternary" or "binary".
        bits: Of a code; 1.6 for ternary, of which five share a byte.
        group: "tensor", "channel" (one output), or a number of consecutive weights.
        affine: Whether each block has an offset as well (min-max instead of absmax).
    """

    kind: str
    bits: float
    group: int | Literal["tensor", "channel"]
    affine: bool = False

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """A scheme by its name.

        Args:
            name: int2 to int8, fixed2 to fixed8, codebook1 to codebook8, nf4, fp4, ternary or binary; then maybe -tensor, -channel or -g
                and a number of weights; then, for int, maybe -asym. Without a group int8 is per channel, fixed and codebook per
                tensor, all others in groups of 64.

        Raises:
            ValueError: It is none of these.

        Example:
            >>> Scheme.parse("int3-g32-asym")
            Scheme(kind='int', bits=3, group=32, affine=True)
            >>> Scheme.parse("ternary").name
            'ternary-g64'
        """
        found = _NAME.fullmatch(name)
        kind = found and (found["kind"] or found["table"])
        layout = _LAYOUT.fullmatch(found["rest"] or found["more"] or "") if found else None
        bits = int(found["bits"]) if found and found["bits"] else {"ternary": 1.6, "binary": 1}.get(str(kind), 4)
        if (
            not kind
            or layout is None
            or (layout["affine"] and kind != "int")
            or (kind in ("int", "fixed") and bits < 2)
        ):
            raise ValueError(
                f"no quantization scheme {name!r}; there are int2 to int8, fixed2 to fixed8, codebook1 to codebook8, nf4, fp4, ternary and "
                "binary, with -tensor, -channel or -g64 behind (any number of weights), and for int also -asym, e.g. int4-g32-asym"
            )
        whole = kind in ("fixed", "codebook")
        default = "tensor" if whole else "channel" if (kind, bits) == ("int", 8) else _DEFAULT_GROUP
        group = int(layout["group"]) if layout["group"] else layout["whole"] or default
        if kind == "codebook" and group != "tensor":
            raise ValueError(f"{name}: a codebook serves a whole matrix; leave the group away")
        return cls(kind, bits, group, bool(layout["affine"]))  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        number = "" if self.has_table else f"{self.bits:g}"
        group = self.group if isinstance(self.group, str) else f"g{self.group}"
        return f"{self.kind}{number}-{group}{'-asym' if self.affine else ''}"

    @property
    def uniform(self) -> bool:
        """Whether the levels are 1 apart before scaling."""
        return self.kind in ("int", "fixed", "ternary")

    @property
    def has_table(self) -> bool:
        """Whether the levels are symmetric about 0 and the scale is what the outermost stand for."""
        return self.kind in _TABLES

    def block_size(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Weights per block of a matrix of shape (outputs, inputs).

        Example:
            >>> Scheme.parse("int4-channel").block_size((8, 100)), Scheme.parse("int4-g32").block_size((8, 100))
            (100, 32)
        """
        outputs, inputs = shape
        if isinstance(self.group, int):
            return self.group
        return outputs * inputs if self.group == "tensor" else inputs

    def levels(self) -> torch.Tensor:
        """The numbers of the grid before scaling, ascending, float32; of a codebook there are none yet.

        Integers reach from -2^(bits-1) to 2^(bits-1) - 1 (a scale may be negative, so that the longer side is on either end), those
        of 8 bits from -127, as bitsandbytes has them; affine ones from 0.
        """
        if self.has_table:
            return torch.tensor(_TABLES[self.kind])
        count = 2 ** int(self.bits)
        if self.affine:
            return torch.arange(count, dtype=torch.float32)
        lowest = -count // 2 + (self.bits == 8)
        return torch.arange(lowest, count // 2, dtype=torch.float32)


@dataclass(frozen=True)
class Grid:
    """The numbers that each weight of one matrix may take.

    Attributes:
        levels: Ascending, shape (levels,), float32.
        scale: Per block, shape (blocks,), float32; negative ones turn the levels round, none is 0.
        offset: Per block, added after scaling; None is 0.
        block_size: Weights per block; the last block may be shorter.
        shape: Of the matrix.
        uniform: Whether the levels are 1 apart.
    """

    levels: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    block_size: int
    shape: tuple[int, int]
    uniform: bool = False

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """One value per block, for each weight: shape (outputs, inputs); memory is shared where it can be."""
        outputs, inputs = self.shape
        if inputs % self.block_size == 0:
            return values.view(outputs, -1, 1).expand(-1, -1, self.block_size).reshape(self.shape)
        return values.repeat_interleave(self.block_size)[: outputs * inputs].view(self.shape)

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """Number of the nearest level of each weight, uint8, shape (outputs, inputs).

        Example:
            >>> grid = Grid(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([2.0]), None, 4, (1, 4))
            >>> grid.encode(torch.tensor([[-3.0, 0.9, 1.1, 9.0]])).tolist()
            [[0, 1, 2, 2]]
        """
        offset = None if self.offset is None else self.spread(self.offset)
        return nearest(weight, self.levels, self.spread(self.scale), offset, uniform=self.uniform)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights that codes stand for, float32."""
        values = self.levels[codes.int()] * self.spread(self.scale)
        return values if self.offset is None else values + self.spread(self.offset)

    def snap(self, weight: torch.Tensor) -> torch.Tensor:
        """Each weight's nearest number on the grid: to the bit what `decode` makes of `encode`, in less time.

        Example:
            >>> grid = Grid(torch.arange(4.0), torch.tensor([0.5]), torch.tensor([-1.0]), 2, (1, 2), uniform=True)
            >>> grid.snap(torch.tensor([[-0.7, 3.0]])).tolist()
            [[-0.5, 0.5]]
        """
        if not self.uniform:
            return self.decode(self.encode(weight))
        scale, offset, blocks = self.scale, self.offset, weight
        if self.shape[1] % self.block_size == 0:  # blocks side by side: nothing has to be spread
            blocks = weight.reshape(-1, self.block_size)
            scale, offset = scale[:, None], None if offset is None else offset[:, None]
        else:
            scale, offset = self.spread(scale), None if offset is None else self.spread(offset)
        shifted = blocks / scale if offset is None else (blocks - offset).div_(scale)
        first = self.levels[0]
        values = shifted.sub_(first).round_().clamp_(0, len(self.levels) - 1).add_(first).mul_(scale)
        return (values if offset is None else values.add_(offset)).view(self.shape)


def nearest(
    weight: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    uniform: bool = False,
) -> torch.Tensor:
    """Number of the nearest level for each weight; all but `levels` of one shape, or such that they can be broadcast. uint8.

    No scale may be 0, but it may be negative. With `uniform` the levels are taken to be 1 apart, and rounding finds them, many times faster.
    """
    scaled = (weight if offset is None else weight - offset) / scale
    if uniform:
        return scaled.sub_(levels[0]).round_().clamp_(0, len(levels) - 1).to(torch.uint8)
    return torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
