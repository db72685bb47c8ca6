"""Placeholders and captions in a chapter's Markdown."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import toybook

from companion.book import prose
from companion.book.layout import Book, BookError
from companion.core.errors import BadParameter
from companion.report import page, tables

VALUES = {
    "peak": 86.72,
    "drop": -3.5,
    "n": 3,
    "net": "a|b <i> {{n}} `c`",
    "none": "nan",
    "up": "inf",
}
CAPTION = """\
Before.

:::{caption} line
:alt: A line
  to {{peak:.0f}}.
The {{net}}
at {{peak:.1f}}.
:::

After.
"""


def at(line: str) -> str:
    return f"x.md {line}"


def filled(text: str, **options: bool) -> str:
    return prose.fill(text, VALUES, at, **options)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{{peak}} and {{peak:.1f}}", "86.72 and 86.7"),
        ("{{ drop:.1f }}, {{n}}", "−3.5, 3"),
        ("{{none:.1f}}, {{up}}", "no valid value, ∞"),
        ("{{net}}", "a\\|b \\<i\\> \\{\\{n\\}\\} \\`c\\`"),
        ("first\n{{n}}. Then\n{{n:.1f}} more", "first\n3\\. Then\n3.0 more"),
        # Nothing is filled in code, comments and formulas.
        ("`{{n}}` {{n}} ``a ` {{n}}``", "`{{n}}` 3 ``a ` {{n}}``"),
        ("`two\nlines {{n}}` {{n}}", "`two\nlines {{n}}` 3"),
        ("one ` tick {{n}}\n\nand ` one {{n}}", "one ` tick 3\n\nand ` one 3"),
        ("$\\mathbf{{x}}$ {{n}} $x$", "$\\mathbf{{x}}$ 3 $x$"),
        ("$$\n{{x}}\n\n{{x}}\n$$\n{{n}}", "$$\n{{x}}\n\n{{x}}\n$$\n3"),
        ("```{math}\n{{x}}\n```\n{{n}}", "```{math}\n{{x}}\n```\n3"),
        ("```python\n{{n}}\n```\n{{n}}", "```python\n{{n}}\n```\n3"),
        ("````\n```\n{{n}}\n````\n{{n}}", "````\n```\n{{n}}\n````\n3"),
        ("<!-- {{x}} --> {{n}}", "<!-- {{x}} --> 3"),
        # Notes are prose.
        ("```{note}\n{{n}}\n```\n{{n}}", "```{note}\n3\n```\n3"),
        (":::{note}\n{{n}}\n:::\n{{n}}\n", ":::{note}\n3\n:::\n3\n"),
        ("````{note}\n{{n}}\n```python\n{{n}}\n```\n{{n}}\n````\n{{n}}",
         "````{note}\n3\n```python\n{{n}}\n```\n3\n````\n3"),
        ("", ""),
    ],
)  # fmt: skip
def test_placeholders_are_filled_in_prose_alone(text, wanted):
    assert filled(text) == wanted


def test_plain_text_is_not_escaped():
    assert filled("{{net}}", markup=False) == VALUES["net"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb {{lost}}\nc", "x.md b {{lost}}: {{lost}}: nobody gives 'lost'"),
        ("{{net:.1f}}", "the format does not fit 'a|b"),
        ("{{n:.1q}}", "the format does not fit 3"),
        ("{{peak-0}}", "{{peak-0}} is no placeholder"),
        ("is\n$k = {{n}}$", "x.md $k = {{n}}$: {{n}} stands inside a formula"),
        ("$$\na\n{{lost:.1f}}\n$$", "x.md {{lost:.1f}}: {{lost:.1f}} stands inside a formula"),
    ],
)
def test_what_cannot_be_filled_says_where(text, message):
    with pytest.raises(BookError, match=re.escape(message)):
        filled(text)


def test_captions_are_taken_out():
    rest, (block,) = prose.captions(CAPTION, at)
    assert rest == "Before.\n\n\nAfter.\n"
    assert (block.name, block.alt, block.optional) == ("line", "A line to {{peak:.0f}}.", False)
    figure = {"name": "line", "values": {"net": "b*"}}
    assert prose.give([figure], [], [block], VALUES, at) == []
    assert figure == {"name": "line", "caption": "The b\\* at 86.7.", "alt": "A line to 87."}
    table = {"name": "line", "rows": []}
    assert prose.give([], [table], [block], {**VALUES, "net": "b*"}, at) == []
    assert table["caption"] == "The b* at 86.7." and "alt" not in table
    code = CAPTION.replace(":::", "````").replace("{caption}", "python :::{caption}")
    assert prose.captions(code, at) == (code, [])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (":::{caption} line\nText.", "x.md :::{caption} line: the caption block is never closed"),
        (":::{caption}\nText.\n:::", "needs a figure's or table's name"),
        (":::{caption} line\n:alt: x\n:::", "and a text"),
        (":::{caption} line\n:atl: x\nText.\n:::", "has no option 'atl'"),
    ],
)
def test_a_malformed_caption_says_so(block, message):
    with pytest.raises(BookError, match=re.escape(message)):
        prose.captions(block, at)


@pytest.mark.parametrize(
    ("figures", "more", "message"),
    [
        ([{"name": "lime"}], "", "figure 'lime' has no caption. Write a block :::{caption} lime"),
        ([{"name": "line"}], CAPTION, "a second caption for 'line'"),
        ([{"name": "line"}, {"name": "line", "rows": []}], "", "two figures or tables are called"),
        ([{"name": "x"}], ":::{caption} x\nText.\n:::", "figure 'x' needs an alternative text"),
        ([{"name": "x"}], ":::{caption} x\n:alt: a\n{{lost}}\n:::", "x.md {{lost}}: {{lost}}: nob"),
    ],
)
def test_figures_and_captions_have_to_fit(figures, more, message):
    _, blocks = prose.captions(CAPTION + more, at)
    figures = [dict(f) for f in figures]
    plain, tabular = [f for f in figures if "rows" not in f], [f for f in figures if "rows" in f]
    with pytest.raises(BookError, match=re.escape(message)):
        prose.give(plain, tabular, blocks, VALUES, at)


def test_a_caption_without_a_figure_is_named_unless_it_is_optional():
    _, blocks = prose.captions(CAPTION, at)
    assert [b.name for b in prose.give([], [], blocks, VALUES, at)] == ["line"]
    _, blocks = prose.captions(CAPTION.replace(":alt:", ":optional:\n:alt:"), at)
    assert prose.give([], [], blocks, VALUES, at) == []


def test_a_value_is_given_once():
    assert prose.merged([{"a": 1}, {"b": 2}, {"a": 1}], "x.md") == {"a": 1, "b": 2}
    with pytest.raises(BookError, match=r"x.md: page.fill gives 'a' twice: 1 and 2"):
        prose.merged([{"a": 1}, {"a": 2}], "x.md")


def test_values_are_numbers_and_strings():
    with page.captured() as found:
        page.fill(a=np.float32(0.5), b=np.int64(3), c="x", d=math.nan, e=-math.inf)
    assert found.all("values") == [{"a": 0.5, "b": 3, "c": "x", "d": "nan", "e": "-inf"}]
    for bad in (None, True, [1], np.arange(2)):
        with pytest.raises(BadParameter, match=r"page\.fill: bad "):
            page.fill(bad=bad)


def test_a_table_needs_whole_rows():
    with page.captured() as found:
        tables.show(["a"], [[1]], name="t", values={"n": 1})
    (first,) = found.all("table")
    assert first == {"name": "t", "columns": ["a"], "rows": [["1"]], "values": {"n": 1}}
    with pytest.raises(BadParameter, match="table 't': a row needs as many values"):
        tables.show(["a"], [[1, 2]], name="t")


def test_a_message_names_the_line_of_the_chapter(tmp_path):
    root = toybook.make(tmp_path / "book")
    where = prose.places(Book(root), "01_toy")
    source = (root / "chapters/01_toy.md").read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(source, 1) if "falls by" in line)
    assert where(f" {source[number - 1]} ") == f"chapters/01_toy.md, line {number}"
    assert where("gone") == "chapters/01_toy.md, 'gone'"
