"""The last touch on the built pages, and the dark twins of figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from companion.book import searching
from companion.book.layout import Book
from companion.book.polish import polish
from companion.report import figures

SVG = '<svg width="300pt" height="150pt"><path style="fill: #1a1a1a"/></svg>'
PAGE = """\
<html><head><meta name="viewport" content="a" /><meta name="viewport" content="b"/>
<title>A page &#8212; The book</title>
<script src="../_static/scripts/fontawesome.js?digest=1"></script>
<script defer="defer" src="../_static/../mathjax/startup.js?v=2"></script>
</head><body><h1>A page</h1><p>It has <em>one</em> "sentence".</p>
<p>It rises by 20.0 points, <b>from 2% to 22 %</b> at k = 0 (<code>2 %</code>,
<span class="math">\\(k = 0\\)</span>).</p>
<summary aria-label="Toggle hidden content"><span>Show</span></summary>
<figure class="lead" data-of="fig-one"></figure><figure class="lead" data-of="fig-none"></figure>
<figure class="align-default" id="fig-one"><img alt="One" src="../_images/a.svg" /></figure>
<figure class="align-default" id="fig-two"><img alt="Two" src="../_images/a.svg" />
<figcaption><span class="caption-number">Fig. 28 </span>Two.</figcaption></figure>
NUMREF
<li class="toctree-l1"><a class="reference internal" href="02b_more.html">More</a></li>
<li class="toctree-l1"><a class="reference internal" href="../using.html">Use it</a></li>
<a class="reference download internal" download="" href="../_downloads/1/one.json"><span
>data (JSON)</span></a>
</body></html>
""".replace(
    "NUMREF",
    '<a class="reference internal" href="02b_more.html#fig-far">'
    '<span class="std std-numref">Fig. 31</span></a>',
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for folder in ("chapters", "_images", "dark/01_toy", "_static/scripts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "chapters" / "01_toy.html").write_text(PAGE)
    (tmp_path / "_images" / "a.svg").write_text(SVG)
    (tmp_path / "dark" / "01_toy" / "fig-one.svg").write_text(figures.dark(SVG))
    far = '<p>Far.</p><figure class="a" id="fig-far"></figure>'
    (tmp_path / "chapters" / "02b_more.html").write_text(f"<title>More</title><h1>More</h1>{far}")
    for name in ("fontawesome.js", "a.js.map"):
        (tmp_path / "_static" / "scripts" / name).write_text("")
    (tmp_path / "_static" / "vendor" / "fontawesome").mkdir(parents=True)
    (tmp_path / "_static" / "vendor" / "fontawesome" / "a.woff2").write_text("")
    (tmp_path / "_static" / "theme.css").write_text(
        "a{b:c}@font-face{font-family:X;src:url(../vendor/fontawesome/a.woff2)}d{e:f}"
    )
    (tmp_path / "search.html").write_text("<head></head>")
    polish(tmp_path)
    return tmp_path


def test_a_figure_has_a_size_and_a_twin_for_the_dark_where_there_is_one(site):
    text = (site / "chapters" / "01_toy.html").read_text()
    pictures = re.findall(r"<img [^>]*>", text)
    pictures = pictures[2:]  # the first two lead the page
    assert len(pictures) == 3
    assert all('width="400" height="200" loading="lazy"' in one for one in pictures)
    assert 'src="../_images/a.svg"' in pictures[0] and 'class="by-day"' in pictures[0]
    assert 'src="../dark/01_toy/fig-one.svg"' in pictures[1] and 'alt="One"' in pictures[1]
    assert 'class="by-night dark-light"' in pictures[1]
    assert "by-" not in pictures[2]


def test_a_page_is_led_by_a_copy_of_its_figure(site):
    text = (site / "chapters" / "01_toy.html").read_text()
    copy, *more = re.findall(r'<figure class="lead".*?</figure>', text, re.S)
    assert not more  # of a figure that is not there, nothing
    assert '<a href="#fig-one" aria-label="Fig. 1.1, which is explained further down">' in copy
    assert copy.count('alt="One"') == 2 and "by-night" in copy and "../_images/a.svg" in copy


def test_figures_and_chapters_have_the_numbers_that_the_text_uses(site):
    text = (site / "chapters" / "01_toy.html").read_text()
    assert '<span class="caption-number">Fig. 1.2 </span>' in text
    assert '<span class="std std-numref">Fig. 2b.1</span>' in text
    assert '<a class="reference internal" href="02b_more.html">2b. More</a>' in text
    assert ">Use it</a>" in text
    assert "<h1>1. A page</h1>" in text and "<title>1. A page " in text


def test_figures_of_a_page_without_a_number_count_from_one(tmp_path):
    figure = (
        '<figure class="a" id="fig-{}"><figcaption><span class="caption-number">Fig. {} </span>'
    )
    both = "".join(figure.format(*f) + "</figcaption></figure>" for f in (("a", 65), ("b", 66)))
    (tmp_path / "using.html").write_text(f"<title>Use</title><h1>Use</h1>{both}")
    polish(tmp_path)
    text = (tmp_path / "using.html").read_text()
    assert re.findall(r"Fig\. (\d+) <", text) == ["1", "2"]


def test_no_line_ends_between_a_number_and_its_unit(site):
    text = (site / "chapters" / "01_toy.html").read_text()
    assert "by 20.0\u00a0points, <b>from 2\u00a0% to 22\u00a0%</b> at k\u00a0=\u00a00 (" in text
    assert "<code>2 %</code>" in text and "\\(k = 0\\)" in text  # code and formulas stay
    assert '<span class="unbroken"><span class="math">\\(k = 0\\)</span>).</span>' in text


def test_what_no_reader_needs_is_gone(site):
    text = (site / "chapters" / "01_toy.html").read_text()
    assert text.count("viewport") == 1
    assert "fontawesome" not in text and "mathjax" not in text and "Toggle hidden" not in text
    assert not list((site / "_static" / "scripts").iterdir())
    assert not (site / "_static" / "vendor" / "fontawesome").exists()
    assert (site / "_static" / "theme.css").read_text() == "a{b:c}d{e:f}"


def test_the_search_page_has_the_text_of_every_page(site):
    assert '<script src="_static/searchtexts.js"></script>' in (site / "search.html").read_text()
    written = (site / "_static" / "searchtexts.js").read_text(encoding="utf-8")
    texts = json.loads(written.removeprefix("const pageTexts = ").removesuffix(";\n"))
    assert set(texts) == {"chapters/01_toy", "chapters/02b_more"}
    found = searching.sections(
        '<p>out</p><article>a<br><section id="s">b<span class="math">x^2</span> <img src="i">c'
        '<a class="headerlink">#</a><script>1</script></section>d</article><p>out</p>'
    )
    assert found == {"": "a d", "s": "b c"}


def test_a_page_says_what_it_is_about(site):
    text = (site / "chapters" / "01_toy.html").read_text()
    assert '<meta name="description" content="It has one &quot;sentence&quot;."/>' in text
    assert 'aria-label="data (JSON), one.json"' in text


def test_a_link_to_a_formula_has_it_at_hand_from_any_page(tmp_path):
    (tmp_path / "_static").mkdir()
    formula = (
        '<div class="math notranslate nohighlight" id="equation-eq-b">\n<span class="eqno">(8)'
        '<a class="headerlink" href="#equation-eq-b">#</a></span>\\[\nB = 1\n\\]</div>'
    )
    link = '<a class="reference internal" href="b.html#equation-eq-b">(8)</a>'
    maths = '<span class="math notranslate"></span>'
    (tmp_path / "a.html").write_text(f"<body>{maths}{link}</body>")
    (tmp_path / "b.html").write_text(f"<body>{formula}</body>")
    polish(tmp_path)
    card = '<template id="card-equation-eq-b">\\[\nB = 1\n\\]</template>'
    assert card in (tmp_path / "a.html").read_text()


def test_a_page_with_formulas_keeps_their_renderer(tmp_path):
    (tmp_path / "_static").mkdir()
    (tmp_path / "a.html").write_text(PAGE.replace("<em>", '<em class="math notranslate">'))
    polish(tmp_path)
    assert "mathjax" in (tmp_path / "a.html").read_text()


def test_dark_colours_are_of_the_same_kind_and_what_stands_on_a_colour_stays():
    light = f"fill: #1A1A1A; #ffffff; {figures.ON_DARK}; {figures.ON_LIGHT}; #d55e00; #12345678"
    ink, plate = figures.NIGHT["#1a1a1a"], figures.NIGHT["#ffffff"]
    dark = f"fill: {ink}; {plate}; {figures.ON_DARK}; {figures.ON_LIGHT}; #d55e00; #12345678"
    assert figures.dark(light) == dark


@pytest.mark.slow
def test_every_figure_of_a_book_has_its_twin(toy):
    html = Book(toy).html("other")
    text = (html / "chapters" / "01_toy.html").read_text(encoding="utf-8")
    assert text.count('class="by-night dark-light"') == text.count('class="by-day"') == 2
    twin = (html / "dark" / "01_toy" / "fig-toy-curve.svg").read_text(encoding="utf-8")
    assert figures.INK not in twin and figures.NIGHT[figures.INK] in twin
