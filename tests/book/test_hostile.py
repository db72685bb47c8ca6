"""Data that would like to be markup: labels, scales, captions, record files. Nothing of it runs."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from companion.book import front, prose, site
from companion.book.finish import Page
from companion.book.layout import Book, BookError
from companion.core import codec
from companion.core.errors import CorruptData
from companion.report import claims, figures, page, provenance, recorded, tables

HOSTILE = [
    "<svg onload=alert(1)>",
    "a\n\n<script>alert(1)</script>\n\nb",
    "<img src=x onerror='alert(1)'>",
    "[click](javascript:alert(1))",
    "![x](javascript:alert(1))",
    '"><iframe srcdoc="x"></iframe>',
    "`</code><script>alert(1)</script>`",
    "```{raw} html\n<script>alert(1)</script>\n```",
    "{raw}`<b onclick=alert(1)>`",
    "a | b\n--- | ---\n<svg/onload=alert(1)>",
    "&lt;svg onload=alert(1)&gt; $x$ {{peak}}",
]


def ran(html: str) -> list[str]:
    """What of a page would run, or is a link to something that would."""
    found = site._Page(html)
    found.feed(html)
    found.close()
    return [*found.running, *found.code, *found.scripts]


def rendered(markdown: str) -> str:
    """As a page shows it: with HTML, as MyST-NB reads it."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def verdict(text: str) -> claims.Verdict:
    return claims.Verdict(claims.registry()["C01"], "reproduced", 1.0, None, 3, text, text)


@pytest.fixture
def record(tmp_path: Path) -> Any:
    """Makes a record file whose free texts are all ``text``, and reads it."""
    chapter = "01_instability"
    source = Path(__file__).resolve().parents[2] / "data/recorded" / chapter / "cpu-mnist.json"

    def make(text: str, **more: Any) -> recorded.Record:
        data = json.loads(source.read_text())
        data |= {"scale": text, "hardware": text, "closed": True, "missing": {text: 1}}
        data["dataset"]["name"] = text
        data |= more
        data["claims"] = codec.to_json([verdict(text)])
        path = tmp_path / "data/recorded" / chapter / "bad.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        (found,) = recorded.load(chapter, tmp_path)
        return found

    return make


@pytest.mark.parametrize("text", HOSTILE)
def test_data_is_shown_and_never_run(text: str, record: Any, monkeypatch: Any) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(page, "emit", lambda data, _: shown.append(dict(data)))
    kept = record(text)
    tables.show([text, text], [[text, text]], name="x")
    claims.show([verdict(text)], scale=text, recorded=[kept])
    provenance.show({"dataset": {text: text}})
    page.text(recorded.sentence("01_instability", [kept]))
    htmls = [d["text/html"] for d in shown if "text/html" in d]
    htmls += [tables.html([text], [[text]], text)]
    markdown = [d["text/markdown"] for d in shown if "text/markdown" in d]
    entry = {**codec.to_json(verdict(text)), "scale": text}
    chapter = Page("01_instability", None, claims=[entry], recorded=[kept])
    markdown.append(front.marked("# Front\n\n" + "\n\n".join(front.MARKERS), [chapter], text))
    markdown.append(prose.fill("The net {{x}} is\n\n{{x}}\n\n- {{x}}\n", {"x": text}, str))
    markdown += htmls  # also where a table of ours stands inside Markdown
    assert len(markdown) == 3 + len(htmls) and len(htmls) == 4
    for one in [*htmls, *map(rendered, markdown)]:
        assert ran(one) == [], one
        assert "alert" in one or "iframe" in one, "the text is there to be read"


@pytest.mark.parametrize("field", ["name", "profile"])
def test_the_name_of_a_record_is_a_name(record: Any, field: str) -> None:
    with pytest.raises(CorruptData, match="its name or its profile is not a file's name"):
        record("x", **{field: "`<svg onload=alert(1)>`"})


@pytest.mark.parametrize(
    "html",
    [
        "<svg onload=alert(1)>",
        "<p onclick='x()'>a</p>",
        "<button onclick='steal()'>a</button>",
        "<div onclick='window.print()'>a</div>",
        "<a href=' JavaScript:alert(1)'>a</a>",
        "<a href='java\nscript:alert(1)'>a</a>",
        "<a href='data:text/html,x'>a</a>",
        "<svg><animate attributeName='href' values='#;javascript:alert(1)'></svg>",
        "<form action='javascript:alert(1)'></form>",
        "<script>alert(1)</script>",
        "<script type='module'>alert(1)</script>",
        "<script>window.MathJax = {a: alert(1)}</script>",
        "<script>let toggleHintShow = 'x'; alert(1);</script>",
        "<script src='files/01_toy/x.json'></script>",
        "<iframe srcdoc='x'></iframe>",
        "<object data='a.svg'></object>",
        "<base href='https://example.org/'>",
        "<meta http-equiv='Refresh' content='0;url=x'>",
        "<!--><svg onload=alert(1)>-->",
    ],
)
def test_the_check_refuses_what_runs(tmp_path: Path, html: str) -> None:
    book = Book(tmp_path)
    (tmp_path / "_toc.yml").write_text("root: index\n")
    folder = book.html("quick")
    folder.mkdir(parents=True)
    (folder / "index.html").write_text("<p>ok</p>")
    site.check(book, "quick")
    (folder / "index.html").write_text(f"<p>ok</p>{html}")
    with pytest.raises(BookError, match=r"index\.html: (<|a script|the script|an empty comment)"):
        site.check(book, "quick")
    (folder / "index.html").write_text("<p>ok</p>")
    (folder / "a.svg").write_text("<svg><script>alert(1)</script></svg>")
    with pytest.raises(BookError, match=r"a\.svg: a script"):
        site.check(book, "quick")


def test_the_theme_s_own_scripts_are_let_through(tmp_path: Path) -> None:
    """As Jupyter Book 1 writes them; tests of the toy book read whole pages."""
    own = """<script>let toggleHintShow = 'Click to show';</script>
        <script>DOCUMENTATION_OPTIONS.pagename = 'chapters/01_toy';</script>
        <script>window.MathJax = {"tex": {"macros": {"E": "x"}}}</script>
        <script type="text/x-thebe-config">{ requestKernel: true }</script>
        <button onclick="window.print()">a</button>"""
    assert site._foreign_scripts(tmp_path / "a.html", site_page(own), tmp_path) == []


def site_page(html: str) -> Any:
    found = site._Page(html)
    found.feed(html)
    return found


def test_a_name_with_dollars_is_no_formula(tmp_path: Path) -> None:
    """Such as a folder's: it used to end a command in a traceback, after all the training."""
    name = r"cost $5_{ and $\nosuch"
    with figures.file(tmp_path / "a.svg", "x") as fig:
        ax = fig.subplots()
        ax.plot([1, 10], [1, 10], label=name)
        ax.set_yscale("log")
        ax.set_title(name)
        ax.legend()
    assert (tmp_path / "a.svg").stat().st_size > 1000
    other = Figure()
    other.subplots().set_title(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures._svg(other, "x")
    assert re.search(r"cost \$5", drawn), "the text stands in a comment of the picture"
