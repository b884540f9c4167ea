"""The report as text: everything is on it, nothing on it can run or be fetched, and what is broken is one line."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from hfcompress.hub.figures import Point, draw_bars, draw_curves, draw_points
from hfcompress.hub.report import REPORT_FILE, render_page, write_report
from hfcompress.hub.results import RESULTS_FILE
from tests.hub.folders import change, row, save_pruned, save_run, speedup, write_results
from tests.hub.test_card import BROKEN

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Tags with attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_everything_is_on_it(tmp_path):
    save_run(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / REPORT_FILE
    page = read(path)
    text = page.text
    assert ("html", {"lang": "en"}) in page.tags
    viewport = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert ("meta", viewport) in page.tags and "prefers-color-scheme: dark" in path.read_text()
    for words in (
        "A bert model, distilled and pruned with hfcompress.",
        "2.11× as fast 95 % interval 2.01 to 2.21",
        "−0.72 points of accuracy 95 % interval −1.22 to −0.22",
        "contract undecided",
        "lost, points",
        "0.72 [0.22, 1.22], p = 0.046",
        "91.23 [89.13, 93.13]",
        "at most 1 points worse at least 1.8x as fast at most 100 MB on disk together",
        "0.72 points [0.22, 1.22] 2.11x [2.01, 2.21] 90.9 MB undecided",
        "1.12 points [0.52, 1.72] 1.20x [1.10, 1.30] 30.0 MB failed",
        "pruned, at most 1 points worse: about ",
        "Distilled from somebody/teacher for 1,234 steps",
        "pruned → pruned + int8 0.40 [0.10, 0.70], p = 0.046 0.57x [0.47, 0.67] -67 %",
        "What is done in one training, such as pruning and distilling, is one step here.",
        "Training: student",
        "173 seconds of training",
        "class 1 100 80.0 60.0 20.0",
        'model = hfcompress.load("path/to/',
        "google-bert/bert-base-uncased licence apache-2.0, as its card says",
        "67,349 examples for training and 1,500 for evaluation licence not known",
        "SHA-256 0123456789abcdef",
        "2 threads, batch 32 x 64 tokens, float32, 15 rounds",
        "hfcompress run recipe.yaml seed=7",
        "target: speedup: 2.0",
    ):
        assert " ".join(words.split()) in text, words
    assert [tag for tag, _ in page.tags].count("svg") == 3
    # The class that lost most comes first, one that gained last.
    assert re.findall(r"class \d", text) == ["class 1", "class 0", "class 2"]


def test_nothing_runs_and_nothing_is_fetched(tmp_path):
    save_run(tmp_path)
    page = read(write_report(tmp_path))
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & {tag for tag, _ in page.tags}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links == ["data:,"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    html = (tmp_path / REPORT_FILE).read_text()
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html


def test_hostile_names_stay_words(tmp_path):
    nasty_classes = [{"name": NASTY, "n": 10, "right": 5}]
    rows = [row(NASTY, "teacher", 0.9, classes=nasty_classes)]
    nasty_change = {**change(0.5, 0.1), "test": NASTY, "unit": NASTY}
    energy = {"joules_per_input": 1.0, "source": NASTY}
    second = {
        "speedup": speedup(2.0),
        "change": nasty_change,
        "classes": nasty_classes,
        "energy": energy,
        "origin": NASTY,
    }
    rows += [row(f"{NASTY}2", ".", 0.8, **second), row(f"{NASTY}3", "x", 0.8, **second)]
    for entry in rows:
        entry["metric"]["name"] = NASTY
        entry["latency"] |= {"device": NASTY, "dtype": NASTY}
    source = {"name": NASTY, "licence": NASTY, "said_by": NASTY}
    save_run(
        tmp_path,
        rows=rows,
        name=NASTY,
        task=NASTY,
        data={"name": NASTY, "fingerprint": NASTY},
        lineage={"base": source, "teacher": source, "data": source},
        history={NASTY: [{"step": 1, "loss": 0.5, f"loss_{NASTY}": 0.5}]},
        versions={NASTY: NASTY},
        command="echo",
        recipe={NASTY: NASTY},
        date=NASTY,
        seed=NASTY,
        commit=NASTY,
        base_model=NASTY,
    )
    page = read(write_report(tmp_path))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") >= 15
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_a_hostile_record_stays_words(tmp_path):
    save_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hfcompress"]["steps"].append({"step": NASTY, "by": NASTY})
    config["hfcompress"]["steps"][0]["teacher"] = NASTY
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = read(write_report(tmp_path))
    assert "script" not in {tag for tag, _ in page.tags} and "<script>alert(1)" in page.text


def test_old_and_scanty_results(tmp_path):
    save_pruned(tmp_path)
    write_results(tmp_path)
    page = read(write_report(tmp_path))
    assert "2.11x" in page.text and "lost" not in page.text and "By class" not in page.text
    write_results(tmp_path, rows=[], data=None)
    text = read(write_report(tmp_path)).text
    assert "Nothing was measured for this model yet" in text and "Pruned heads, neurons gradually" in text


def test_a_run_whose_models_are_gone(tmp_path):
    write_results(tmp_path)
    text = read(write_report(tmp_path)).text
    assert "Not known: the model is not in this folder." in text and "2.11x" in text


def test_a_row_cannot_point_elsewhere(tmp_path):
    save_pruned(tmp_path / "other")
    write_results(tmp_path / "run") if (tmp_path / "run").mkdir() else None
    write_results(tmp_path / "run", rows=[row("a", "teacher", 0.9), row("b", "../other", 0.9)])
    assert "Not known: the model is not in this folder." in read(write_report(tmp_path / "run")).text


def test_numbers_that_cannot_be_drawn(tmp_path):
    rows = [row("a", "teacher", 0.9), row("b", ".", 0.9, change=change(float("inf"), 0.0))]
    rows[1]["metric"] |= {"value": float("inf"), "high": float("nan")}
    save_run(tmp_path, rows=rows, history={"x": [{"step": 1, "loss": float("nan")}]})
    text = read(write_report(tmp_path)).text
    assert "Score against latency" not in text and "Training: x" not in text and "inf" in text


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_broken_results_are_one_line(text, tmp_path):
    (tmp_path / RESULTS_FILE).write_text(text)
    with pytest.raises(ValueError) as caught:
        write_report(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / REPORT_FILE).exists()


WRONG = [
    {"history": {"x": [{"step": "one"}]}},
    {"history": [1]},
    {"lineage": {"base": {"licence": "mit"}}},
    {"contract": {"max_drop": "much"}},
    {"contract": {"max_drop": 1.0, "other": 1.0}},
    {"versions": {"a": 1}},
    {"data": ["a"]},
    {"rows": [row("a", ".", 0.5, change={"drop": 1.0})]},
    {"rows": [row("a", ".", 0.5, classes=[{"name": "x"}])]},
    {"rows": [row("a", ".", 0.5, classes=[{"name": "x", "n": "1", "right": 1}])]},
    {"rows": [row("a", ".", 0.5, energy={})]},
    {"rows": [row("a", ["."], 0.5)]},
    {"name": 3},
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_wrong_parts_are_one_line(wrong, tmp_path):
    save_run(tmp_path, **wrong)
    with pytest.raises(ValueError, match="measure the model again") as caught:
        write_report(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_without_results(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"holds no results.json; give the folder of a run"):
            write_report(folder)


# ---- pictures ----


def numbers_of(svg: str, pattern: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, svg)]


def test_points_are_where_they_belong():
    points = [
        Point(str(x), (x - 1, x, x + 1), (y - 0.1, y, y + 0.1)) for x, y in ((10.0, 0.9), (20.0, 0.7), (30.0, 0.5))
    ]
    svg = draw_points(points, x_label="ms", y_label="accuracy", percent=True)
    xs, ys = (numbers_of(svg, rf'<circle class="dot" .*?{axis}="([\d.]+)"') for axis in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2) and xs[0] < xs[1]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2) and ys[0] < ys[1], "a higher score is higher up"
    assert "80 %" in svg and svg.count("whisker") == 3


def test_bars_are_as_long_as_what_is_left():
    svg = draw_bars({"encoder.0.heads": (6, 12), "encoder.0.neurons": (0, 48), "encoder.1.neurons": (48, 48)})
    full, bars = (numbers_of(svg, rf'class="{kind}".*?width="([\d.]+)"') for kind in ("track", "bar"))
    assert [bar / whole for bar, whole in zip(bars, full, strict=True)] == pytest.approx([0.5, 0.0, 1.0], abs=0.002)
    assert svg.count(">whole<") == 1, "the heads of the second layer"
    assert svg.index("heads") < svg.index("neurons")


def test_a_layer_that_is_gone_is_an_empty_bar():
    svg = draw_bars({"encoder.0.heads": (4, 4)}, layers={"encoder": (1, 3)})
    assert svg.count('class="track"') == 3 and svg.count("0/4") == 2


def test_curves_go_through_their_points():
    svg = draw_curves(
        {"loss": [(0, 1.0), (50, 0.5), (100, 0.0)], "sparsity": [(0, 0.0), (100, 0.5)], "eval_loss": [(100, 0.2)]}
    )
    (path,) = re.findall(r'<polyline class="line mark-1" points="([^"]+)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in pair.split(",")] for pair in path.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y0 < y2
    assert "sparsity 50 %" in svg and svg.count('class="line-end') == 1


def test_all_that_is_put_into_a_page_is_said():
    with pytest.raises(Exception, match="is undefined"):
        render_page("report.html", title="x")
