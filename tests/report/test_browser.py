"""Pages in headless Chromium: charts are drawn, nothing is loaded, fails or overflows.

`make test` opens one run at one width; REPORT=full (`make test-report`) opens every kind of run at
two widths in both themes. REPORT_SHOTS=DIR keeps screenshots.
"""

import os
from pathlib import Path

import pytest

from pipeline.report.comparison import write_comparison
from pipeline.report.page import write_report
from tests.report.browser import CHROMIUM, chromium
from tests.report.folders import (
    HOSTILE_TEXT,
    build_failed_run,
    build_hostile_run,
    build_long_run,
    build_run,
    build_short_run,
)

pytestmark = [
    pytest.mark.tensor,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
IS_FULL = os.environ.get("REPORT") == "full"
needs_full = pytest.mark.skipif(not IS_FULL, reason="make test-report")
VIEWS = [(1100, "light"), (1100, "dark"), (390, "light"), (390, "dark")]  # width in pixels, theme
# With plain `make test`, only these pages are opened: kind of run, width, theme.
SHORT_FORM = [("hostile names", 390, "dark"), ("failed half-way", 1100, "light")]
BUILDERS = {
    "failed half-way": build_failed_run,
    "one step": build_short_run,
    "100,000 steps": build_long_run,
    "hostile names": build_hostile_run,
}
# JavaScript for a list of the elements whose text is wider than the element, except those that
# scroll.
CUT_OFF_ELEMENTS = """[...document.querySelectorAll('body *')].filter(e =>
    e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && !e.closest('.wide, pre, .u-wrap')
    && getComputedStyle(e).display != 'inline')
    .map(e => e.className + ': ' + e.textContent.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def check_page(browser, page: Path, width: int, theme: str) -> None:
    """Assert that the page has its charts and colours, and no error, request or cut-off text."""
    browser.open(page, width=width, theme=theme)
    if folder := os.environ.get("REPORT_SHOTS"):
        browser.screenshot(Path(folder) / f"{page.parent.name[:20]}-{width}-{theme}.png")
    assert browser.errors == []
    assert [url for url in browser.requests if url != page.resolve().as_uri()] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CUT_OFF_ELEMENTS) == []
    num_charts = browser.evaluate(
        "JSON.parse(document.getElementById('curves').textContent).charts.length"
    )
    assert browser.evaluate("document.querySelectorAll('canvas').length") == num_charts
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    # --paper of style.css
    assert background == {"light": "rgb(252, 252, 251)", "dark": "rgb(22, 24, 28)"}[theme]


@pytest.mark.parametrize(("width", "theme"), VIEWS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_page_is_complete_in_every_view(browser, tmp_path, kind, width, theme):
    if not IS_FULL and (kind, width, theme) not in SHORT_FORM:
        pytest.skip("make test-report")
    run = BUILDERS[kind](tmp_path / kind.replace(" ", "-"))
    check_page(browser, write_report(run), width, theme)


@needs_full
@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_a_comparison_is_complete_in_every_view(browser, tmp_path, width, theme):
    runs = [build_hostile_run(tmp_path), *(build_run(tmp_path / f"run-{i}") for i in range(9))]
    check_page(browser, write_comparison(runs), width, theme)


@needs_full
def test_names_reach_the_page_as_text(browser, tmp_path):
    page = write_comparison([build_hostile_run(tmp_path), build_run(tmp_path / "plain")])
    browser.open(page)
    names = browser.evaluate("[...document.querySelectorAll('.key bdi')].map(e => e.textContent)")
    assert HOSTILE_TEXT.replace("/", "|") in names


def loss_chart_box(browser) -> tuple[float, float, float, float]:
    """Scroll to the chart of the loss; its left, top, width and height in pixels."""
    box = "document.querySelector('#plot-loss .u-over').getBoundingClientRect()"
    browser.evaluate("document.querySelector('#plot-loss').scrollIntoView({block: 'center'})")
    return tuple(browser.evaluate(f"{box}.{side}") for side in ("left", "top", "width", "height"))


@needs_full
def test_moving_over_a_chart_shows_values_and_dragging_zooms_all_charts(browser, tmp_path):
    run = build_run(tmp_path)
    browser.open(write_report(run))
    left, top, width, height = loss_chart_box(browser)
    middle = top + height / 2
    browser.mouse("mouseMoved", left + width, middle)
    browser.mouse("mouseMoved", left + width - 1, middle)  # to the last step, 80
    captions_js = "[...document.querySelectorAll('figcaption')].map(e => e.textContent).join(' | ')"
    captions = browser.evaluate(captions_js)
    assert captions.count("step 80") == browser.evaluate(
        "document.querySelectorAll('.plot').length"
    )
    assert "0.0874" in captions  # the held-out loss of step 80
    is_button_hidden = "document.querySelector('.reset').hidden"
    assert browser.evaluate(is_button_hidden)
    before = chart_images(browser)
    browser.mouse("mouseMoved", left + width / 4, middle)
    browser.mouse("mousePressed", left + width / 4, middle, 1)
    browser.mouse("mouseMoved", left + width / 2, middle, 1)
    browser.mouse("mouseReleased", left + width / 2, middle, 1)
    assert not browser.evaluate(is_button_hidden)
    zoomed = chart_images(browser)
    assert all(a != b for a, b in zip(before, zoomed, strict=True))
    browser.evaluate("document.querySelector('.reset').click()")
    assert browser.evaluate(is_button_hidden)
    reset = chart_images(browser)
    assert all(a != b for a, b in zip(reset, zoomed, strict=True))
    # Only the two wide charts: in the small ones, the line of the resume differs by a shade.
    assert reset[:2] == before[:2]


def chart_images(browser) -> list[str]:
    """The image of each chart as a data URL, after the next frame is drawn."""
    wait = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    browser.evaluate(wait)
    return browser.evaluate("[...document.querySelectorAll('canvas')].map(c => c.toDataURL())")


@needs_full
def test_a_dark_page_is_printed_in_light_colours(browser, tmp_path):
    browser.open(write_report(build_run(tmp_path)), theme="dark")
    browser.send("Emulation.setEmulatedMedia", media="print")
    try:
        # --ink of the light theme in style.css
        assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(27, 29, 34)"
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")
    browser.print_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000  # more than empty pages
