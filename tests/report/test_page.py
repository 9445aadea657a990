"""The page in a real browser: it asks for nothing and runs nothing, shows the numbers where they belong, and fits."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastffl.errors import printable
from fastffl.report import svg, table, write
from fastffl.report.page import page
from fastffl.report.svg import ticks
from fastffl.report.text import summary, votes
from tests.report import made
from tests.report.browser import Browser, found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if found() is None:
        reason = "no chromium here: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


ROWS = "table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText))"
# what an axis of a chart says: [[place in pixels of the picture, number], ...], from the texts anchored as its ticks are
TICKS = "chart => [...chart.querySelectorAll('text[text-anchor=%s]')].map(t => [t.getAttribute('%s') - %d, +t.textContent])"
X_TICKS = TICKS % ("middle", "x", 0)
Y_TICKS = TICKS % ("end", "y", 4)


def on_axis(at: list[list[float]], place: float) -> float:
    """The number at a place of an axis, from its first and last tick."""
    (a, x), (b, y) = at[0], at[-1]
    return x + (y - x) * (place - a) / (b - a)


def charts(browser: Browser, code: str) -> Any:
    return browser.value(f"[...document.querySelectorAll('svg.chart')].map({code})")


def test_the_page_shows_the_tables_numbers(browser: Browser, tmp_path: Path) -> None:
    made_of = table([made.two_methods(tmp_path)])
    [file] = write(made_of, ["html"], tmp_path)
    browser.open(file)
    assert browser.asked == browser.said == browser.dialogs == []
    browser.value("document.querySelector('details').open = true")
    shown = browser.value(f"[...document.querySelectorAll('table')].map({ROWS})")
    for got, want in zip(shown, (summary(made_of), votes(made_of)), strict=False):
        assert got == [want.columns, *want.rows]
    bold = browser.value("[...document.querySelectorAll('table')[0].querySelectorAll('strong')].map(s => s.innerText)")
    assert bold == ["98.50 ± 0.50", "97.25 ± 0.25", "99.20 ± 0.20", "99.90 ± 0.00"]
    assert [row[7] for row in shown[-1][1:]] == [(r.digest or "")[:16] for r in made_of.runs]
    assert ["optim.lr", "0.1"] in shown[2] and ["data.root", "none"] not in shown[2]


def test_marks_and_lines_stand_where_the_axes_say(browser: Browser, tmp_path: Path) -> None:
    """Read the pictures back: final means, error bars, single seeds and the course of each method."""
    made_of = table([made.two_methods(tmp_path)])
    [file] = write(made_of, ["html"], tmp_path)
    browser.open(file)
    sizes = charts(browser, "chart => [chart.getBoundingClientRect()].map(r => [r.width, r.height])[0]")
    assert len(sizes) == 4 and all(w > 200 and h > 100 for w, h in sizes)

    x_ticks = charts(browser, X_TICKS)[0][:-1]  # the last is the axis' name
    circles = charts(browser, "chart => [...chart.querySelectorAll('circle.mark')].map(c => +c.getAttribute('cx'))")[0]
    assert [on_axis(x_ticks, x) for x in circles] == pytest.approx([98.0, 98.5], abs=0.01)
    seeds = charts(browser, "chart => [...chart.querySelectorAll('circle.seed')].map(c => +c.getAttribute('cx'))")[0]
    want = [97, 98, 99] * 2 + [98, 98.5, 99] + [99, 99.2, 99.4]  # none ships p0 too
    assert [on_axis(x_ticks, x) for x in seeds] == pytest.approx(want, abs=0.01)
    bars = charts(browser, "chart => [...chart.querySelectorAll('.bar')].map(b => b.getAttribute('d'))")[0]
    ends = [float(x) for x in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", bars[3]).groups()]  # type: ignore[union-attr]
    assert [on_axis(x_ticks, x) for x in ends] == pytest.approx([99.0, 99.4], abs=0.01)

    lines = charts(browser, "chart => [...chart.querySelectorAll('.line')].map(p => p.getAttribute('d'))")
    assert [len(each) for each in lines] == [0, 2, 2, 2]
    ends_at = {1: [98.0, 98.5], 2: [98.0, 99.2], 3: [2 * 2.718281828**-2] * 2}
    for k, finals in ends_at.items():
        at = charts(browser, Y_TICKS)[k]
        assert at[0][0] > at[-1][0] and at[0][1] < at[-1][1], "more is higher"
        for d, final in zip(lines[k], finals, strict=True):
            points = [tuple(map(float, p.split())) for p in d[1:].split("L")]
            assert len(points) == 3 and on_axis(at, points[-1][1]) == pytest.approx(final, abs=0.02 * (at[-1][1] - at[0][1]))
    bands = charts(browser, "chart => [...chart.querySelectorAll('.band')].map(p => p.getAttribute('d'))")[1]
    at = charts(browser, Y_TICKS)[1]
    top, low = (on_axis(at, float(re.split("[ML]", bands[0])[k].split()[1])) for k in (3, 4))  # last epoch of `none`: 97 to 99
    assert (top, low) == pytest.approx((99.0, 97.0), abs=0.05)


def test_bands_are_drawn_where_they_can_be_told_apart() -> None:
    curve = ((1.0, 90.0), (2.0, 95.0))
    for count, bands in ((svg.BANDS, svg.BANDS), (svg.BANDS + 1, 0)):
        styles = svg.styles(count, 0)
        drawn = svg.curves([svg.Series(f"m{k}", s, (curve, curve)) for k, s in enumerate(styles)], 1, "top-1", (0, 100))
        assert drawn.count('class="band"') == bands and drawn.count('class="line"') == count


@pytest.mark.parametrize("what", ["two_methods", "hostile"])
def test_it_fits_and_can_be_read_in_light_and_dark(what: str, browser: Browser, tmp_path: Path) -> None:
    [file] = write(table([getattr(made, what)(tmp_path)]), ["html"], tmp_path)
    browser.open(file)
    style = "getComputedStyle(document.querySelector('%s'))"
    page_, cards = f"{style % 'body'}.backgroundColor", f"{style % 'figure'}.backgroundColor"
    colours = f"[[{style % 'body'}.color, {page_}], [{style % '.soft'}.color, {cards}]]"
    papers = set()
    for dark in (True, False):
        browser.dark(dark)
        for width in (400, 1200):
            browser.size(width)
            wide, window = browser.value("[document.documentElement.scrollWidth, innerWidth]")
            assert wide <= window == width
        for ink, paper in browser.value(colours):
            assert contrast(ink, paper) >= 4.5, (dark, ink, paper)
            papers.add(paper)
    assert len(papers) == 4, "another page and other cards in the dark"


def contrast(a: str, b: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def light(colour: str) -> float:
        parts = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_hostile_names_are_text(browser: Browser, tmp_path: Path) -> None:
    found = table([made.hostile(tmp_path)])
    [file] = write(found, ["html"], tmp_path)
    browser.open(file)
    assert browser.asked == browser.said == browser.dialogs == []
    assert browser.value("window.pwned") is None
    assert browser.value("document.title").startswith(printable(made.HOSTILE)[:60])
    assert browser.value("document.querySelector('h1').textContent") == printable(made.HOSTILE)
    assert browser.value("[...document.querySelectorAll('script,img,a,iframe,link,object,embed,form,base')].length") == 0
    assert (
        browser.value(
            "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).filter(a => /^on/.test(a.name)).length"
        )
        == 0
    )
    rows = browser.value(f"({ROWS})(document.querySelector('table'))")
    assert rows[1:] == [[printable(c) for c in row] for row in summary(found).rows]
    assert browser.value("document.querySelectorAll('svg.chart').length") == 4


def test_the_policy_stops_what_an_escape_would_miss(browser: Browser, tmp_path: Path) -> None:
    """A page of ours with code in it, as if a name had got through: nothing runs, nothing is asked for."""
    text = page(table([made.two_methods(tmp_path)]))
    code = '<script>window.pwned=1</script><img src="http://localhost:9/x" onerror="window.pwned=2"><style>@import "http://localhost:9/s"</style>'
    file = tmp_path / "broken.html"
    file.write_text(text.replace("<main>", f"<main>{code}"))
    browser.open(file)
    assert browser.value("window.pwned") is None and len(browser.said) >= 3
    assert not browser.asked or all("localhost" in url for url in browser.asked)
    loaded = browser.value("performance.getEntriesByType('resource').filter(e => e.responseStatus > 0).length")
    assert loaded == 0


def test_the_browser_sees_requests_words_and_dialogs(browser: Browser, tmp_path: Path) -> None:
    """What the tests above look for would be found."""
    file = tmp_path / "bad.html"
    file.write_text(
        "<img src='http://localhost:9/x.png'><script>console.log('hello');window.pwned=1;alert('boo');nothing()</script>"
    )
    browser.open(file)
    assert browser.asked == ["http://localhost:9/x.png"] and browser.dialogs == ["boo"] and browser.value("window.pwned") == 1
    assert any("hello" in text for text in browser.said) and any("nothing is not defined" in text for text in browser.said)


# ---- without a browser


def test_the_file_names_nothing_outside_itself(tmp_path: Path) -> None:
    text = page(table([made.two_methods(tmp_path)]))
    assert not re.search(r"(?i)\b(src|href|srcset|action|data|poster)\s*=|<script|@import|javascript:|//", text)
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {"#plot1", "#plot2", "#plot3"}
    assert text.count("<svg") == text.count("</svg>") and "default-src 'none'" in text


def test_one_epoch_one_seed_and_equal_values_still_make_pictures(tmp_path: Path) -> None:
    for method in ("none", "dml"):
        made.run(tmp_path / method, method, 0, {"p0": [100.0]}, loss=[float("nan")])
    text = page(table([tmp_path]))
    assert text.count('class="chart') == 3 and "nan" not in text.lower().replace("nano", "") and 'class="dot"' in text
    assert "100.00 (1 seed)" in text and "inf" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).replace(
        "Coefficient", ""
    )


def test_what_is_compared_has_the_same_settings(tmp_path: Path) -> None:
    for lr, low in ((0.1, 80.5), (0.2, 85.0)):
        for method, gain in (("none", 0.0), ("dml", 1.5)):
            made.run(tmp_path / f"{method}{lr}", method, 0, {"p0": [low + gain]}, optim__lr=lr)
    text = page(table([tmp_path], by=["optim.lr"]))
    assert "<bdi>dml 0.2</bdi></strong> (<bdi>p0</bdi>) 86.50 (1 seed); p0 of none 0.2: 85.00 (1 seed)." in text
    assert "the dashed line is p0 of none under the same settings" in text
    dashed = re.findall(r'class="reference" d="M([\d.]+) (\d+)V(\d+)"', text)
    circles = re.findall(r'<circle class="mark" cx="([\d.]+)"', text)  # none 0.1, dml 0.1, none 0.2, dml 0.2
    assert [x for x, _, _ in dashed] == [circles[0], circles[2]]
    assert [int(a) - svg.TOP for _, *ends in dashed for a in ends] == [0, 2 * svg.ROW, 2 * svg.ROW, 4 * svg.ROW]
    made.run(tmp_path / "alone", "dml", 0, {"p0": [99.0]}, optim__lr=0.3)
    assert "(<bdi>p0</bdi>) 99.00 (1 seed).</p>" in page(table([tmp_path], by=["optim.lr"])), "nothing to compare it with"


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (97.1, 98.2, [97.25, 97.5, 97.75, 98.0]),
        (99.98, 100, [99.98, 99.985, 99.99, 99.995, 100]),
        (1, 300, [100, 200, 300]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, want: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(want)
