"""Pictures of what is left in each layer."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hfcompress.hub.picture import draw_layers, save_layers_picture, save_sensitivity_picture, save_tradeoff_picture

UNITS = {
    "encoder.0.heads": (6, 12),
    "encoder.0.neurons": (384, 1536),
    "encoder.1.heads": (0, 12),
    "encoder.1.neurons": (1, 1536),
    "encoder.10.neurons": (1536, 1536),
}


def test_bars_of_text():
    lines = draw_layers(UNITS).splitlines()
    assert len(lines) == 4 and lines[0].split() == ["layer", "heads", "neurons"]
    half, none = "#" * 12 + "." * 12, "." * 24
    assert lines[1].split() == ["encoder.0", half, "6/12", "#" * 6 + "." * 18, "384/1536"]
    # A unit that is left shows, and none does not.
    assert lines[2].split() == ["encoder.1", none, "0/12", "#" + "." * 23, "1/1536"]
    assert lines[3].split() == ["encoder.10", "#" * 24, "1536/1536"]
    assert all(line == line.rstrip() for line in lines)


def test_columns_are_aligned():
    lines = draw_layers(UNITS).splitlines()
    column = lines[0].index("neurons")
    assert {line[column] for line in lines[1:]} <= {"#", "."}
    assert {line[column - 1] for line in lines} == {" "}


@pytest.mark.parametrize("layers", [1, 6, 48])
def test_a_png_of_sane_size(layers, tmp_path):
    units = {f"encoder.{n}.{role}": (n + 1, 50) for n in range(layers) for role in ("heads", "neurons")}
    path = tmp_path / "layers.png"
    save_layers_picture(units, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (width, height) == (1260, pytest.approx(150 * (0.32 * layers + 1.5), abs=1))
    assert path.stat().st_size < 500_000
    colours = [tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) for code in ("#2b6cb0", "#d9dde3")]
    left, before = (int((pixels == colour).all(axis=1).sum()) for colour in colours)
    expected = sum(left for left, _ in units.values()) / sum(total for _, total in units.values())
    assert left / (left + before) == pytest.approx(expected, abs=0.03), "the bars are as long as they should be"


def test_one_kind_and_layers_without_it(tmp_path):
    save_layers_picture({"decoder.0.neurons": (3, 4), "decoder.1.neurons": (0, 4)}, tmp_path / "a.png", title="One")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 630
    save_layers_picture(UNITS, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 0


# ---- layers that are gone ----


def test_layers_that_are_gone_are_drawn_empty_after_those_of_their_stack():
    units = {
        "encoder.0.heads": (2, 4),
        "encoder.0.neurons": (8, 16),
        "encoder.1.neurons": (16, 16),
        "decoder.0.heads": (3, 3),
    }
    lines = draw_layers(units, layers={"encoder": (2, 4), "decoder": (1, 2)}).splitlines()
    rows = [line.split("  ")[0].strip() for line in lines[1:]]
    assert rows == ["encoder.0", "encoder.1", "encoder.gone 1", "encoder.gone 2", "decoder.0", "decoder.gone 1"]
    empty = "." * 24
    assert lines[3].split()[2:] == [empty, "0/4", empty, "0/16"] and lines[6].split()[2:] == [empty, "0/3"]
    assert draw_layers(units, layers={}) == draw_layers(units)
    assert len(draw_layers({"encoder.1.0.heads": (1, 2)}, layers={"encoder.1": (1, 2)}).splitlines()) == 3
    # What all layers of a stack decide together belongs to no layer.
    shared = {"encoder.heads": (2, 4), "encoder.0.neurons": (4, 8)}
    lines = draw_layers(shared, layers={"encoder": (1, 2)}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["encoder", "encoder.0", "encoder.gone"]


def test_a_png_with_layers_that_are_gone(tmp_path):
    units = {f"encoder.{n}.neurons": (4, 8) for n in range(2)}
    for layers, rows in (({}, 2), ({"encoder": (2, 5)}, 5)):
        save_layers_picture(units, tmp_path / "a.png", layers=layers)
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.size == (630, pytest.approx(150 * (0.32 * rows + 1.5), abs=1))
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        left, before = (count(pixels, colour) for colour in ("#2b6cb0", "#d9dde3"))
        assert left / (left + before) == pytest.approx(8 / (8 * rows), abs=0.04)


def count(pixels, code):
    colour = tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))
    return int((pixels == colour).all(axis=1).sum())


# ---- score against speed, and what layers are worth ----


def curve_of(path, code="#2b6cb0"):
    """Where a colour is in a picture: its columns and rows."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    colour = tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))
    rows, columns = np.nonzero((pixels == colour).all(axis=2))
    return columns, rows, pixels.shape


def test_score_against_speed(tmp_path):
    scores = [("teacher", 80.0, 0.9), ("pruned 2x", 40.0, 0.88), ("pruned 4x", 20.0, 0.6)]
    points = [(name, x, y, y - 0.001, y + 0.001) for name, x, y in scores]
    save_tradeoff_picture(points, tmp_path / "a.png", metric="accuracy")
    columns, rows, shape = curve_of(tmp_path / "a.png")
    assert shape[:2] == (600, 960) and (tmp_path / "a.png").stat().st_size < 200_000
    # From the lower left to the upper right: the middle point lies a third of the way and high.
    last, middle, first = (
        rows[np.abs(columns - at).argmin()]
        for at in (columns.min() + 6, columns.min() + (columns.max() - columns.min()) / 3, columns.max() - 6)
    )
    assert first < middle < last and (middle - first) / (last - first) == pytest.approx(0.02 / 0.3, abs=0.06)
    # The order in which models are given, but for the first, does not matter.
    save_tradeoff_picture([points[0], points[2], points[1]], tmp_path / "b.png", metric="accuracy")
    other = curve_of(tmp_path / "b.png")
    assert np.array_equal(other[0], columns) and np.array_equal(other[1], rows)
    # The dashed line is at the height of the first model.
    line = curve_of(tmp_path / "a.png", "#9aa3ad")[1]
    assert abs(int(np.median(line)) - first) <= 6


def test_one_point_is_enough(tmp_path):
    save_tradeoff_picture([("teacher", 1.0, 0.9, 0.89, 0.91)], tmp_path / "a.png", metric="accuracy")
    assert (tmp_path / "a.png").stat().st_size > 3000


@pytest.mark.parametrize("layers", [1, 2, 24])
def test_what_layers_are_worth(layers, tmp_path):
    lines = {
        f"encoder.{n}.{role}": [(0.75, 0.0), (0.5, 0.01 * (n + 1)), (0.0, 0.5 + n)]
        for n in range(layers)
        for role in ("heads", "neurons")
        if n or role == "neurons"
    }
    save_sensitivity_picture(lines, tmp_path / "a.png")
    roles = 1 if layers == 1 else 2
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.size == (round(5.4 * 150) * roles, 630)
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert count(pixels, "#440154") > 50, "the first layer is dark"
    assert (tmp_path / "a.png").stat().st_size < 500_000


def test_a_model_in_which_nothing_matters(tmp_path):
    save_sensitivity_picture({"encoder.0.heads": [(0.5, 0.0), (0.0, 0.0)]}, tmp_path / "a.png", title="Nothing")
    assert (tmp_path / "a.png").stat().st_size > 3000
