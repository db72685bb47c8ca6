"""The built site as a browser shows it, opened from the disk with no server and no network."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import toybook

from companion.book.layout import Book

pytestmark = pytest.mark.site
CHROMIUM, DRIVER = (shutil.which(n) for n in ("chromium", "chromedriver"))
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in CI
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--proxy-server=127.0.0.1:9",  # what a page asks of the network fails at once
    "--window-size=1300,1000",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium with its chromedriver on the path")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(DRIVER, log_output=subprocess.DEVNULL, env={**os.environ, "no_proxy": "*"})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["toy", "quick"])
def site(request: pytest.FixtureRequest) -> Path:
    """The toy site, and the real one where `make book` has built it."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium with its chromedriver on the path")
    if request.param == "toy":
        return Book(request.getfixturevalue("toy")).html("other")
    real = Book(toybook.ROOT).html("quick")
    if not (real / "index.html").is_file():
        pytest.skip("the real book is not built: `make book` builds it")
    return real


@pytest.fixture
def largest(site: Path) -> Path:
    """The real site; the toy, which has nothing that it has not, only where that is not built."""
    real = Book(toybook.ROOT).html("quick")
    if (real / "index.html").is_file() and site != real:
        pytest.skip("every page of the real book is looked at")
    return site


def pages(site: Path) -> list[Path]:
    found = [p for p in sorted(site.rglob("*.html")) if p.relative_to(site).parts[0] != "_static"]
    return [p for p in found if p.name not in ("genindex.html", "search.html")]


def wait(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """The condition's value once it is true; the test fails if it never is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("the page did not get there in time")


def visit(browser: Any, page: Path) -> None:
    """Open a page and wait until MathJax has typeset it."""
    browser.get(page.resolve().as_uri())
    wait(lambda: browser.execute_script("return document.readyState") == "complete")
    script = "return !document.querySelector('.math') || !!document.querySelector('mjx-container')"
    wait(lambda: browser.execute_script(script))


def loaded(browser: Any) -> list[str]:
    """Every address that was asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith(("data:", "blob:"))]


WIDTHS, THEMES = (1400, 768, 390), ("light", "dark")
AXE = toybook.ROOT / "build" / "axe" / "package" / "axe.min.js"
# All rules on a wide and a narrow screen; in the dark those of colours, which alone it can change.
COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}}
SEEN: dict[tuple[int, str], dict[str, Any]] = {
    (1400, "light"): {},
    (768, "dark"): COLOURS,
    (390, "light"): {},
}


@contextmanager
def window(browser: Any) -> Iterator[Callable[[int], None]]:
    """Sets the window's width; afterwards it is as before."""

    def width(pixels: int) -> None:
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    try:
        yield width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def violations(browser: Any, options: dict[str, Any]) -> list[str]:
    """What axe-core calls serious or critical on the page as it is now."""
    browser.set_script_timeout(600)
    found: list[str] = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "const asked = {preload: false, resultTypes: ['violations'], ...arguments[0]};"
        "axe.run(document, asked).then(result => done("
        "result.violations.filter(v => ['serious', 'critical'].includes(v.impact))"
        ".map(v => `${v.id}: ${v.nodes.length} × ${v.nodes[0].html.slice(0, 200)}`)))",
        options,
    )
    return found


CUT = """
return [...document.querySelectorAll('.bd-article pre')]
  .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.textContent.slice(0, 60));
"""


OUT_OF_REACH = """
return [...document.querySelectorAll('pre, .pst-scrollable-table-container')]
  .filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length;
"""


PICTURES = """
const shown = i => i.checkVisibility() && !i.closest('dialog');
const all = [...document.images].filter(shown);
all.forEach(i => { i.loading = 'eager'; });  // they wait until they are scrolled to
return all.filter(i => !(i.alt.trim() && i.complete && i.naturalWidth)).map(i => i.src);
"""


WRONG_FORMULAS = """
return [...document.querySelectorAll('mjx-merror')].map(e => `formula: ${e.textContent}`)
"""


@pytest.mark.slow
def test_every_page_in_every_window(browser, largest):
    """Loaded once, then at three widths, light and dark, folds open.

    Nothing comes from the network, nothing is logged as an error, no page is wider than its window;
    on a wide screen no line of code is cut. Where axe-core is there (.ci/run fetches it), it finds
    nothing serious.
    """
    loaded(browser), browser.get_log("browser")  # forget what other tests left there
    found: dict[str, list[str]] = {}
    for page in pages(largest):
        with window(browser) as width:
            visit(browser, page)
            # No half-way colours, and no folds that are still fading in.
            still = "<style>* { transition: none !important; animation: none !important; }</style>"
            browser.execute_script(
                "document.head.insertAdjacentHTML('beforeend', arguments[0]);"
                "document.querySelectorAll('details').forEach(d => { d.open = true })",
                still,
            )
            if AXE.is_file():
                browser.execute_script(AXE.read_text(encoding="utf-8"))
            for pixels in WIDTHS:
                width(pixels)
                with suppress(AssertionError):  # the theme waits a little before it looks again
                    wait(lambda: not browser.execute_script(OUT_OF_REACH), 3)
                bad = []
                for theme in THEMES:
                    browser.execute_script(f"document.documentElement.dataset.theme = '{theme}'")
                    inner, wide = browser.execute_script(
                        "return [innerWidth, Math.max(document.documentElement.scrollWidth, "
                        "document.body.scrollWidth)]"
                    )
                    if inner != pixels or wide > pixels:
                        bad.append(f"{wide} pixels wide in a window of {inner}")
                    if AXE.is_file() and (pixels, theme) in SEEN:
                        bad += violations(browser, SEEN[pixels, theme])
                bad += browser.execute_script(WRONG_FORMULAS)
                if pixels == 1400:
                    bad += [f"cut: {text}" for text in browser.execute_script(CUT)]
                if bad:
                    found[f"{page.name}, {pixels}"] = bad
        addresses = loaded(browser)
        assert any(url.endswith(page.name) for url in addresses), "the log is not working"
        with suppress(AssertionError):
            wait(lambda: browser.execute_script(PICTURES) == [])
        bad = [f"no picture or no alt text: {p}" for p in browser.execute_script(PICTURES)]
        bad += [url for url in addresses if not url.startswith("file:")]
        bad += [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        if bad:
            found[page.name] = bad
    assert found == {}, json.dumps(found, indent=1, ensure_ascii=False)


@pytest.mark.slow
def test_a_page_weighs_at_most_two_megabytes(browser, largest):
    """Over http, as static hosts send it (compressed), with every picture of the light theme."""
    handler = partial(QuietHandler, directory=str(largest))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            for page in pages(largest):
                address = page.relative_to(largest).as_posix()
                browser.get("about:blank")
                browser.execute_cdp_cmd("Network.clearBrowserCache", {})
                browser.get(f"http://127.0.0.1:{server.server_port}/{address}")
                browser.execute_script(
                    "for (const i of document.images)"
                    " if (!i.closest('.by-night')) i.loading = 'eager';"
                )
                ready = (
                    "return document.readyState === 'complete' && [...document.images]"
                    ".every(i => i.complete || !i.checkVisibility())"
                )
                wait(lambda ready=ready: browser.execute_script(ready))
                weight = browser.execute_script(
                    "return [...performance.getEntriesByType('resource'), "
                    "performance.getEntriesByType('navigation')[0]]"
                    ".map(e => e.encodedBodySize).reduce((a, b) => a + b)"
                )
                assert 10_000 < weight < 2_000_000, (page.name, weight)
        finally:
            server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Files, compressed where a host would: text, styles, scripts and drawings."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        kind = self.guess_type(str(path))
        if not path.is_file() or not re.match(r"text/|image/svg|application/(java|json)", kind):
            super().do_GET()
            return
        body = gzip.compress(path.read_bytes(), 6)
        self.send_response(200)
        for name, value in (("Type", kind), ("Encoding", "gzip"), ("Length", str(len(body)))):
            self.send_header(f"Content-{name}", value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not onto the terminal."""


def test_no_icon_font_is_shipped(site):
    fonts = [
        p.name for p in (site / "_static").rglob("*") if p.suffix in (".woff2", ".ttf", ".woff")
    ]
    assert fonts == []


# Horizontal text: where it begins, its size, and its letters.
LABEL = (
    r'<g style="fill[^"]*" transform="translate\(([-\d.]+) [-\d.]+\) '
    r'scale\(([\d.]+) -[\d.]+\)">(.*?)</g>'
)


def test_labels_in_figures_can_be_read(site):
    """At least 9 pixels in the 752 that a column of text has on a wide screen."""
    pictures = [*(site / "_images").glob("*.svg"), *(site / "dark").rglob("*.svg")]
    if not pictures:
        pytest.skip("the site has no figure")
    for picture in pictures:
        text = picture.read_text(encoding="utf-8")
        (width,) = re.findall(r'<svg [^>]*?width="([\d.]+)pt"', text, re.S)
        sizes = [float(s) * 100 for s in re.findall(r"<g [^>]*scale\(([\d.]+) -", text)]
        shown = 4 / 3 * min(1.0, 752 / (float(width) * 4 / 3))
        assert float(width) <= 620, picture.name
        assert not sizes or min(sizes) * shown >= 9, (picture.name, min(sizes))
        for left, size, letters in re.findall(LABEL, text, re.S):
            places = [float(x) for x in re.findall(r"translate\(([\d.]+)", letters)]
            right = float(left) + (max(places, default=0) + 60) * float(size)  # 60: a letter
            assert float(left) >= -0.5 and right <= float(width) + 2, f"{picture.name}: cut"


def test_math_is_typeset(browser, site):
    visit(browser, site / "notation.html")
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, "mjx-container") > 10
    assert browser.execute_script(count, "mjx-merror") == 0
    size = "return document.querySelector('mjx-container').getBoundingClientRect().width"
    assert browser.execute_script(size) > 0
    # Numbered, and the reference leads to the equation.
    assert browser.execute_script(count, "span.eqno") >= 2
    target = (
        "return document.querySelector(\"a.reference[href^='#equation']\").getAttribute('href')"
    )
    assert browser.execute_script(count, browser.execute_script(target)) == 1


def test_math_that_needs_an_extension_finds_it_on_the_disk(browser, site):
    if site.is_relative_to(toybook.ROOT):
        pytest.skip("the toy chapter has the formula for this")
    visit(browser, site / "chapters" / "01_toy.html")
    # A \\boldsymbol is not part of MathJax's core: a bold glyph says that its file was found.
    bold = "return document.querySelector('mjx-container .TEX-BI') !== null"
    wait(lambda: browser.execute_script(bold))


def test_search_works_from_the_disk_and_shows_where(browser, site):
    browser.get_log("browser")
    browser.get((site / "search.html").resolve().as_uri() + "?q=cross-entropy")
    links = "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    # Results, and what stands under them, come one after the other.
    wait(lambda: any("notation.html" in url for url in browser.execute_script(links)))
    excerpts = (
        "return [...document.querySelectorAll('#search-results p.context')].map(p => p.innerHTML)"
    )
    marked = "<mark>cross-entropy</mark>"
    wait(lambda: any(marked in text.lower() for text in browser.execute_script(excerpts)))
    said = browser.execute_script(excerpts)
    assert not any(sign in text for text in said for sign in ("\\(", "\\[", "Contents")), said
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_the_theme_button_turns_the_page_dark(browser, site):
    visit(browser, site / "index.html")
    theme = "return document.documentElement.dataset.theme"
    ground = "return getComputedStyle(document.body).backgroundColor"
    seen = {}
    for _ in range(3):  # auto, light, dark in some order
        browser.execute_script("document.querySelector('button.theme-switch-button').click()")
        seen[browser.execute_script(theme)] = browser.execute_script(ground)
    assert set(seen) == {"light", "dark"}
    assert seen["light"] != seen["dark"]


def test_verdicts_can_be_read_in_the_dark(browser, site):
    """At least 4.5 to 1 between each verdict and its ground, in both themes."""
    visit(browser, next(p for p in pages(site) if "companion-claims" in p.read_text()))
    for theme in ("light", "dark"):
        ratios = browser.execute_script(CONTRAST, theme)
        assert ratios and min(ratios) >= 4.5, (theme, ratios)


CONTRAST = """
document.documentElement.dataset.theme = arguments[0];
const parse = c => c.match(/[\\d.]+/g).map(Number);
const light = c => {
  const [r, g, b] = parse(c).slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if ((parse(c)[3] ?? 1) > 0) return c;
  }
  return "rgb(255, 255, 255)";
};
return [...document.querySelectorAll(".companion-claims td, .companion-claims small")].map(cell => {
  const a = light(getComputedStyle(cell).color), b = light(ground(cell));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
"""


def test_a_figure_opens_at_full_size_and_closes(browser, site):
    from selenium.webdriver.common.keys import Keys

    page = next((p for p in pages(site) if "<figure" in p.read_text()), None)
    if page is None:
        pytest.skip("the site has no figure")
    visit(browser, page)
    button = browser.find_element("css selector", ".zoom-open")
    browser.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    is_open = "return document.querySelector('dialog.zoom').open"
    wait(lambda: browser.execute_script(is_open))
    assert browser.execute_script("return document.querySelector('dialog.zoom img').alt.trim()")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(lambda: not browser.execute_script(is_open))
    assert browser.switch_to.active_element == button


def test_the_figures_to_play_with_answer_to_the_keyboard(browser, site):
    """The front page's: α and the fork step move what is drawn and what is said."""
    from selenium.webdriver.common.keys import Keys

    visit(browser, site / "index.html")
    if not browser.find_elements("css selector", "figure.walk"):
        pytest.skip("the toy book has no figure to play with")
    alpha, step = browser.find_elements("css selector", "figure.walk input")
    says = "return document.querySelector('figure.walk figcaption').textContent"
    place = "return document.querySelector('.walk-here-line').getAttribute('cx')"
    line = "return document.querySelector('.walk-line').getAttribute('d')"
    shown = (
        "return [...document.querySelectorAll('.walk-map')].map(m => getComputedStyle(m).display)"
    )
    before = [browser.execute_script(script) for script in (says, place, line)]
    assert "α = 0.50" in before[0]
    alpha.send_keys(Keys.HOME)
    assert "α = 0.00" in browser.execute_script(says)
    assert browser.execute_script(place) != before[1]
    assert browser.execute_script(shown).index("inline") == 0
    step.send_keys(Keys.END)
    assert browser.execute_script(line) != before[2]
    assert browser.execute_script(shown)[-1] == "inline"
    assert browser.execute_script(shown).count("inline") == 1
    assert alpha.get_attribute("aria-valuetext").startswith("α = 0.00, error ")


def test_the_claims_can_be_filtered_and_a_mark_finds_its_row(browser, site):
    visit(browser, site / "claims.html")
    visible = (
        "return [...document.querySelectorAll('.companion-claims tbody tr')]"
        ".filter(row => !row.hidden).map(row => row.id)"
    )
    everything = browser.execute_script(visible)
    assert everything
    fields = browser.find_elements("css selector", ".claims-filter select, .claims-filter input")
    if not fields:
        pytest.skip("the toy book has claims of one paper only")
    fields[-1].send_keys("embedding")
    few = browser.execute_script(visible)
    assert 0 < len(few) < len(everything)
    hidden = next(row for row in everything if row not in few)
    browser.execute_script(f"location.hash = '{hidden}'")
    wait(lambda: hidden in browser.execute_script(visible))


def test_a_link_to_a_formula_shows_it(browser, site):
    from selenium.webdriver.common.keys import Keys

    page = next(p for p in pages(site) if "<template id=" in p.read_text(encoding="utf-8"))
    visit(browser, page)
    browser.execute_script("document.querySelector('a[aria-describedby=companion-card]').focus()")
    card = "return document.querySelector('.companion-card')"
    wait(lambda: browser.execute_script(f"{card}.querySelector('mjx-container') !== null"))
    assert not browser.execute_script(f"{card}.hidden")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.execute_script(f"{card}.hidden")


@pytest.mark.parametrize("width", [1300, 390])
def test_a_chapter_s_folds_open_by_keyboard(browser, site, width):
    """Solutions and the parameters' cell open with Enter; the notebook's link is in reach."""
    from selenium.webdriver.common.keys import Keys

    page = next(p for p in pages(site) if "companion-solution" in p.read_text(encoding="utf-8"))
    with window(browser) as pixels:
        pixels(width)
        visit(browser, page)
        for selector in ("details.companion-solution > summary", ".tag_parameters summary"):
            summary = browser.find_element("css selector", selector)
            browser.execute_script("arguments[0].focus()", summary)
            assert browser.switch_to.active_element == summary
            assert not browser.execute_script("return arguments[0].parentElement.open", summary)
            summary.send_keys(Keys.ENTER)
            assert browser.execute_script("return arguments[0].parentElement.open", summary)
        link = browser.find_element("css selector", ".companion-download a")
        browser.execute_script("arguments[0].focus()", link)
        assert browser.switch_to.active_element == link
        box = browser.find_element("css selector", ".companion-parameters").rect
        assert 0 < box["width"] <= width


def test_in_print_solutions_are_open_and_plumbing_is_gone(browser, site):
    page = next(p for p in pages(site) if "companion-solution" in p.read_text(encoding="utf-8"))
    visit(browser, page)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        shown = (
            "return [...document.querySelectorAll(arguments[0])]"
            ".map(e => e.checkVisibility({contentVisibilityAuto: true}))"
        )

        def solutions() -> list[bool]:
            found: list[bool] = browser.execute_script(shown, "details.companion-solution > .cell")
            return found

        assert solutions()
        wait(lambda: all(solutions()))  # a busy browser turns to print a moment later
        assert not any(browser.execute_script(shown, "details.hide"))
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
