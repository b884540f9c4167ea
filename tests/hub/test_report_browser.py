"""The report in a real browser: on a phone and on a screen, in light and dark, seen with the browser's own measures."""

from __future__ import annotations

import pytest

from hfcompress.hub.comparison import compare_folders, render_comparison
from hfcompress.hub.report import write_report
from tests.browser import Browser, find_browser
from tests.hub.folders import save_run
from tests.hub.test_report import NASTY

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium or Chrome on this machine")

LOOKS = [(360, False), (360, True), (1200, False), (1200, True)]

# Contrast of each piece of text with what is painted behind it (WCAG 2.2, 1.4.3), as the browser computed both.
CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest("title, details:not([open]) > pre")) continue;
    const style = getComputedStyle(e), svg = e.ownerSVGElement !== null && e.ownerSVGElement !== undefined;
    const ground = e.classList.contains("dot-number") ? parse(getComputedStyle(e.previousElementSibling).fill) : behind(e);
    const pair = [light(parse(svg ? style.fill : style.color)), light(ground)].sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), e.tagName + "." + (e.getAttribute("class") || ""), e.textContent.trim().slice(0, 30)]);
  }
  return found;
})()"""
# What sticks out of the window without a box of its own that scrolls.
OVERFLOW = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg")
  && (e.getBoundingClientRect().right > WIDTH + 1 || e.getBoundingClientRect().left < -1)).map(e => e.outerHTML.slice(0, 80))"""
# Texts of a picture that leave it.
CLIPPED = """[...document.querySelectorAll("svg text")].filter(t => {
  const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1; }).map(t => t.textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(str(PROGRAM), tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, a comparison, and a report with hostile and endless names."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("one", "other"):
        (folder / name).mkdir()
        save_run(folder / name, name=name, recipe={"seed": len(name), "output": name})
    report = write_report(folder / "one", folder / "report.html")
    compared = folder / "compare.html"
    compared.write_text(render_comparison(compare_folders([folder / "one", folder / "other"])), encoding="utf-8")
    (folder / "nasty").mkdir()
    save_run(
        folder / "nasty", name=NASTY + "x" * 300, label=NASTY + "long " * 40 + "y" * 80, command=f"echo {'z' * 400}"
    )
    return {"report": report, "compare": compared, "nasty": write_report(folder / "nasty", folder / "nasty.html")}


@pytest.mark.parametrize("name", ["report", "compare", "nasty"])
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_how_it_looks(name, width, dark, browser, pages):
    browser.open(pages[name], width=width, dark=dark)
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    # Nothing went wrong, and nothing but the page itself was asked for.
    assert browser.of("Log.entryAdded") == browser.of("Runtime.consoleAPICalled") == []
    assert browser.of("Runtime.exceptionThrown") == browser.of("Page.javascriptDialogOpening") == []
    asked = [event["request"]["url"] for event in browser.of("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].resolve().as_uri()]
    # It fits the window; what is wider scrolls in a box of its own.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.scrollingElement.clientWidth") <= width
    assert browser.evaluate(OVERFLOW.replace("WIDTH", str(width))) == []
    if name != "nasty":
        assert browser.evaluate(CLIPPED) == []
    # All of it can be read.
    texts = browser.evaluate(CONTRAST)
    assert len(texts) > 60 and [text for text in texts if text[0] < 4.5] == []


def test_dark_is_dark_and_light_is_light(browser, pages):
    grounds = []
    for dark in (False, True):
        browser.open(pages["report"], width=800, dark=dark)
        colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(int(part) for part in colour[4:-1].split(",")))
    assert grounds[0] > 700 and grounds[1] < 90


def test_on_a_phone_tables_scroll_inside(browser, pages):
    browser.open(pages["report"], width=360)
    wide = browser.evaluate("[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])")
    assert len(wide) == 4 and any(inner > outer for inner, outer in wide) and all(outer <= 360 for _, outer in wide)
    sizes = browser.evaluate(
        "[...document.querySelectorAll('p, li, td, dd')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert len(sizes) > 30 and min(sizes) >= 12


def test_a_fault_would_be_seen(browser, tmp_path):
    """A page with everything that the checks look for."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><body style="background:#fff"><p style="color:#bbb;width:900px">pale and wide</p>'
        '<img src="https://example.com/x.png"><script>console.error("oh")</script>'
    )
    browser.open(page, width=360)
    assert len(browser.of("Runtime.consoleAPICalled")) == 1
    assert any("example.com" in event["request"]["url"] for event in browser.of("Network.requestWillBeSent"))
    assert browser.evaluate("document.documentElement.scrollWidth") > 360 and browser.evaluate(
        OVERFLOW.replace("WIDTH", "360")
    )
    assert [text for text in browser.evaluate(CONTRAST) if text[0] < 4.5]


def test_scripts_in_names_do_not_run(browser, pages):
    browser.open(pages["nasty"], width=800)
    assert browser.evaluate("document.scripts.length") == 0 and browser.evaluate("document.images.length") == 0
    assert "<script>alert(1)</script>" in browser.evaluate("document.querySelector('h1').textContent")
