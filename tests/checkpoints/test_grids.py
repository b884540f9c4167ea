"""Grids: names, levels, and that encoding finds the nearest of them, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfcompress.checkpoints.grids import Grid, Scheme, nearest

# Name as written, name in full, bits, number of levels.
NAMES = [
    *((f"int{bits}", f"int{bits}-g64", bits, 2**bits) for bits in range(2, 8)),
    ("int8", "int8-channel", 8, 255),
    ("int8-g32", "int8-g32", 8, 255),
    ("int4-tensor", "int4-tensor", 4, 16),
    ("int4-channel-asym", "int4-channel-asym", 4, 16),
    ("int3-g32-asym", "int3-g32-asym", 3, 8),
    ("int8-asym", "int8-channel-asym", 8, 256),
    *((f"fixed{bits}", f"fixed{bits}-tensor", bits, 2**bits) for bits in range(2, 8)),
    ("fixed8-channel", "fixed8-channel", 8, 255),
    ("fixed4-g7", "fixed4-g7", 4, 16),
    *((f"codebook{bits}", f"codebook{bits}-tensor", bits, None) for bits in range(1, 9)),
    ("codebook4-tensor", "codebook4-tensor", 4, None),
    ("nf4", "nf4-g64", 4, 16),
    ("nf4-channel", "nf4-channel", 4, 16),
    ("fp4-g16", "fp4-g16", 4, 15),
    ("ternary", "ternary-g64", 1.6, 3),
    ("ternary-channel", "ternary-channel", 1.6, 3),
    ("binary", "binary-g64", 1, 2),
    ("binary-tensor", "binary-tensor", 1, 2),
]
WRONG = [
    *("", "int", "int1", "int9", "int12", "int0", "int4-g0", "int4-g", "int4-row", "int4g64", "INT4", " int4", "int4 "),
    *("int4-asym-g64", "int4-asym-asym", "int4-g64-channel", "nf4-asym", "fp4-g64-asym", "ternary-asym", "fixed1"),
    *("fixed4-asym", "fixed9", "codebook0", "codebook9", "codebook4-asym", "codebook4-g64", "codebook4-channel"),
    *("nf8", "nf4-dq", "nf", "float16", "binary2", "ternary3", "int4-g64\n", "int4-g-1"),
]


@pytest.mark.parametrize(("name", "full", "bits", "levels"), NAMES)
def test_names_are_read_and_written(name, full, bits, levels):
    scheme = Scheme.parse(name)
    assert scheme.name == full and Scheme.parse(full) == scheme and scheme.bits == bits
    if levels is not None:
        assert len(scheme.levels()) == levels <= 2**8


@pytest.mark.parametrize("name", WRONG)
def test_names_that_are_none(name):
    with pytest.raises(ValueError) as caught:
        Scheme.parse(name)
    message = str(caught.value)
    assert name.strip("\n") in message and len(message.splitlines()) == 1
    assert "int2 to int8" in message or message.endswith("a codebook serves a whole matrix; leave the group away")


def test_how_much_is_looked_at():
    assert len(NAMES) == 36 and len(WRONG) == len({*WRONG}) == 35


def test_levels_by_hand():
    def levels(name):
        return Scheme.parse(name).levels().tolist()

    assert levels("int2") == [-2, -1, 0, 1] and levels("fixed3") == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert levels("int2-asym") == [0, 1, 2, 3] and levels("int8-asym") == list(range(256))
    assert levels("int8") == list(range(-127, 128)) == levels("fixed8")
    assert levels("ternary") == [-1, 0, 1] and levels("binary") == [-1, 1]
    # One sign bit, two of exponent, one of fraction, the largest scaled to 1; the least above 0 as bitsandbytes has it.
    positive = [1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]
    assert levels("fp4") == pytest.approx([*(-value for value in reversed(positive)), 0, *positive], abs=1e-7)
    bnb = pytest.importorskip("bitsandbytes")
    for name in ("nf4", "fp4"):
        theirs = bnb.functional.get_4bit_type(name, device="cpu")
        assert sorted({*theirs.tolist()}) == levels(name)


@pytest.mark.parametrize(
    ("name", "size"), [("int4-tensor", 800), ("codebook2", 800), ("nf4-channel", 100), ("int4-g32", 32), ("int8", 100)]
)
def test_weights_per_block(name, size):
    assert Scheme.parse(name).block_size((8, 100)) == size


def spread(values, block, shape):
    """One value per block for each weight, one by one."""
    rows, columns = shape
    return np.array([[float(values[(r * columns + c) // block]) for c in range(columns)] for r in range(rows)])


def random_grid(name, shape, block, *, seed=0, offsets=False):
    generator = torch.Generator().manual_seed(seed)
    scheme, blocks = Scheme.parse(name), -(-shape[0] * shape[1] // block)
    scale = 0.2 + torch.rand(blocks, generator=generator)
    scale[1::2] *= -1
    offset = torch.randn(blocks, generator=generator) if offsets else None
    levels = torch.randn(2 ** int(scheme.bits), generator=generator).sort().values
    levels = levels if scheme.kind == "codebook" else scheme.levels()
    return Grid(levels, scale, offset, block, shape, scheme.uniform), generator


GRIDS = ["int2", "int3-asym", "int4", "int8", "fixed5", "nf4", "fp4", "ternary", "binary", "codebook3", "codebook1"]
# Blocks within a row, of a row, of several rows, across rows, of one weight, and of everything.
LAYOUTS = [
    ((6, 12), 4),
    ((6, 12), 12),
    ((6, 12), 24),
    ((6, 12), 7),
    ((5, 3), 4),
    ((6, 12), 1),
    ((6, 12), 72),
    ((1, 1), 1),
]


@pytest.mark.parametrize(("shape", "block"), LAYOUTS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_nearest_level(name, shape, block):
    for offsets in (False, True):
        grid, generator = random_grid(name, shape, block, offsets=offsets)
        reach = float(grid.levels.abs().max())
        weight = 1.5 * reach * torch.randn(shape, generator=generator)
        scale = spread(grid.scale, block, shape)
        offset = spread(grid.offset, block, shape) if offsets else np.zeros(shape)
        numbers = grid.levels.double().numpy() * scale[..., None] + offset[..., None]
        distances = np.abs(numbers - weight.double().numpy()[..., None])
        codes = grid.encode(weight)
        assert codes.dtype == torch.uint8 and codes.shape == weight.shape and int(codes.max()) < len(grid.levels)
        found = np.take_along_axis(distances, codes.numpy()[..., None].astype(int), 2)[..., 0]
        np.testing.assert_allclose(found, distances.min(-1), atol=1e-5)
        assert (codes.numpy() == distances.argmin(-1)).mean() > 0.99 or reach > 100
        decoded = grid.decode(codes)
        np.testing.assert_allclose(
            decoded, np.take_along_axis(numbers, codes.numpy()[..., None].astype(int), 2)[..., 0], atol=1e-4
        )
        # What is on the grid stays where it is.
        assert torch.equal(grid.decode(grid.encode(decoded)), decoded)
        assert torch.equal(grid.snap(weight), decoded)


@pytest.mark.parametrize(("shape", "block"), LAYOUTS)
def test_each_weight_has_the_value_of_its_block(shape, block):
    values = torch.arange(1.0, 1 - (-shape[0] * shape[1] // block))
    grid = Grid(torch.tensor([-1.0, 1.0]), values, None, block, shape)
    np.testing.assert_array_equal(grid.spread(values), spread(values, block, shape))


def test_rounding_finds_what_a_search_finds():
    generator = torch.Generator().manual_seed(0)
    weight, scale = 9 * torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    levels = torch.arange(-8.0, 8.0)
    uniform, searched = (nearest(weight, levels, scale, uniform=kind).int() for kind in (True, False))
    assert (uniform - searched).abs().max() <= 1 and (uniform == searched).float().mean() > 0.999
    assert uniform.unique().tolist() == list(range(16))


def test_what_is_not_contiguous_is_encoded_as_well():
    grid = Grid(torch.tensor([-1.0, 0.5, 2.0]), torch.ones(1), None, 12, (3, 4))
    weight = torch.linspace(-2, 3, 12).view(4, 3).T
    assert torch.equal(grid.encode(weight), grid.encode(weight.contiguous()))
