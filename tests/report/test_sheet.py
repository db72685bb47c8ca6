"""The page of a comparison: what it says, that names stay names, and how a browser shows it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import toybook
from comparisons import HOSTILE, made_up

from companion.book.site import _read
from companion.report.compare import Answer, Comparison
from companion.report.compare.sheet import MOST_ROWS, picture, sheet

NAMES = (HOSTILE, "<svg onload=alert(1)>.safetensors", "$\\alpha$ & 'x' \"y\" --> ]]>")
AXE = toybook.ROOT / "build" / "axe" / "package" / "axe.min.js"


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_verdict_comes_first_then_what_was_not_asked_and_the_commands():
    found = made_up()
    page = words(sheet(found))
    places = [
        page.index(text)
        for text in (
            "There is a wall between them as they are, and none once their units are matched.",
            "✗ no Same basin? The line rises 70.00 points",
            "an error barrier of at most 2 points on test data (chapter 1)",
            "70.00 ± 0.80 points",
            "ensemble",
            "about 90 s, 12 s left",
            "Repeat each part",
            "companion barrier a.safetensors b.safetensors --model resnet20 --data cifar10",
            "Provenance",
        )
    ]
    assert places == sorted(places)
    assert found._repr_html_().count("<iframe") == 1
    assert sheet(Comparison.from_json(json.loads(json.dumps(found.to_json())))) == sheet(found)


def test_the_lines_and_the_pairs_are_drawn_into_a_file(tmp_path):
    found, path = made_up(), tmp_path / "x.svg"
    assert picture(found, path)
    drawn = path.read_text()
    assert all(text in drawn for text in ("as they are", "matched by weights", "from A (0) to B"))
    heights = [[None, 70.0, 1.0], [70.0, None, 2.0], [1.0, 2.0, None]]
    values = {"names": list("abc"), "split": "test", "metric": "error", "heights": heights}
    many = replace(found, answers=(Answer("pairs", "", "answered", values=values),))
    assert picture(many, path) and "points of error" in path.read_text()
    assert not picture(replace(found, answers=()), tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_and_does_nothing(tmp_path, name):
    found = made_up(name, "b")
    bad = replace(found.answers[-1], why=name, title=name, command=f"companion x {name}")
    found = replace(found, answers=(*found.answers[:-1], bad), model=name, data=name)
    found = replace(found, provenance={name: {"sha256": name}})
    layers = replace(
        found.answers[0], values={**found.answers[0].values, "layers": {name: {"distance": 1.0}}}
    )
    path = tmp_path / "page.html"
    path.write_text(sheet(replace(found, answers=(layers, *found.answers[1:]))))
    page = _read(path)
    assert page.running == page.code == page.scripts == page.problems == []
    assert page.links == []
    assert sorted(re.findall(r"<(svg|img|script|math)\b", path.read_text())) == ["svg", "svg"]
    assert "MathJax" not in page.text
    frame = found._repr_html_()
    assert frame.count("<") == frame.count(">") == 2 and frame.count('"') % 2 == 0


def test_what_another_version_wrote_is_shown_as_a_table():
    found = made_up()
    odd = replace(found.answers[2], values={"barrier": {"height": 1.5}})
    new = replace(found.answers[0], name="something new", values={"rows": list(range(99))})
    page = words(sheet(replace(found, answers=(odd, new))))
    assert "barrier, height 1.5" in page and "99 values" in page
    many = {f"layer {i}": i for i in range(MOST_ROWS + 3)}
    page = words(sheet(replace(found, answers=(replace(new, values=many),))))
    assert "3 more rows are in the JSON" in page


def test_a_failed_gate_has_no_number():
    found = made_up()
    odd = replace(found.answers[2], status="invalid", why="G0 quality FAIL")
    page = words(sheet(replace(found, answers=(odd,), findings=())))
    assert "A gate failed" in page and "70.00" not in page and "G0 quality FAIL" in page


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not Path("/usr/bin/chromium").is_file():
        pytest.skip("no chromium")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service("/usr/bin/chromedriver")
    with webdriver.Chrome(options=options, service=service) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_a_browser_shows_it_from_the_disk(browser, tmp_path, width, scheme):
    """No script, nothing loaded, not wider than the screen, no violation of axe."""
    path = tmp_path / "page.html"
    path.write_text(sheet(made_up("a" * 120, "b")))
    assert path.stat().st_size < 1_000_000
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    ask = browser.execute_script
    assert ask("return document.documentElement.scrollWidth") <= width
    assert ask("return performance.getEntriesByType('resource').length") == 0
    ground = ask("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 30)"}[scheme]
    ink = "return getComputedStyle(document.querySelector('svg text, svg use')).fill"
    assert ask(ink) == {"light": "rgb(26, 26, 26)", "dark": "rgb(230, 230, 230)"}[scheme]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    if not AXE.is_file():
        pytest.skip("no axe-core: .ci/run fetches it, with npm")
    ask(AXE.read_text(encoding="utf-8"))
    bad = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(result => done("
        "result.violations.filter(v => ['serious', 'critical'].includes(v.impact))"
        ".map(v => `${v.id}: ${v.nodes.length} × ${v.nodes[0].html.slice(0, 200)}`)))"
    )
    assert bad == []
