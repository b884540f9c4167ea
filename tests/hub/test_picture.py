"""Pictures of what is left in each layer."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hfcompress.hub.picture import draw_layers, save_layers_picture

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
