"""The pages around the chapters: markers and placeholders."""

from __future__ import annotations

import pytest

from companion.book.finish import Page
from companion.book.front import complete, readme
from companion.book.layout import BookError
from companion.core import codec
from companion.report import claims, provenance


def page(chapter: str = "01_toy", **values: object) -> Page:
    made = Page(chapter, None)
    made.values = values
    return made


def said(text: str, *pages: Page) -> str:
    return complete("index", text, pages, "quick")


def test_a_page_may_say_what_any_chapter_found():
    text = "It is {{01_toy.wall:.1f}}, on {{02_more.data}}; `{{01_toy.wall}}` stays."
    found = said(text, page(wall=21.83), page("02_more", data="digits"))
    assert found == "It is 21.8, on digits; `{{01_toy.wall}}` stays."


def test_a_paragraph_about_a_chapter_that_the_book_lacks_is_left_out():
    assert said("One.\n\nTwo {{05_gpt.loss}}.\n\nThree.", page(wall=1.0)) == "One.\n\nThree."


def test_a_number_that_no_chapter_gives_stops_the_build():
    with pytest.raises(BookError, match=r"index\.md: .*nobody gives '01_toy\.wal'"):
        said("{{01_toy.wal}}", page(wall=1.0))


def test_a_claim_is_judged_once():
    entry = codec.to_json(claims.judge("C01", 0.3, n=9, interval=(0.1, 0.6))) | {"scale": "toy"}
    one, two = page(), page("02_more")
    one.claims, two.claims = [entry], [entry]
    with pytest.raises(BookError, match="02_more: C01 is judged in another chapter too"):
        said("<!-- scoreboard -->", one, two)
    board = said("<!-- scoreboard -->", one)
    assert "claims.html#claim-C01" in board
    table = said("<!-- claims -->", one)
    assert 'href="chapters/01_toy.html#claim-C01"' in table and "Profile quick; what" in table


def test_figures_to_play_with_are_left_out_with_their_chapter():
    assert said("a\n\n<!-- walk -->\n\nb\n\n<!-- matching -->", page()) == "a\n\n\n\nb\n\n"


def test_provenance_has_a_row_a_chapter_with_its_seconds():
    one, two = page(), page("02_more")
    one.provenance = two.provenance = provenance.record(dataset={"name": "digits"})
    one.seconds = 41.6
    table = said("<!-- provenance -->", one, two)
    assert table.count("<td>digits</td>") == 2 and "<td>42</td>" in table
    assert table.count("<td>—</td>") == 1  # a chapter that was not timed


def test_readme_gets_its_table_again_and_again():
    entries = [
        codec.to_json(claims.judge(id, 0.3, n=9, interval=(0.1, 0.6))) | {"scale": "toy"}
        for id in ("C01", "C02")
    ]
    one = page()
    one.claims = entries
    text = "# Title\n\n<!-- held -->old<!-- /held -->\n\nThe rest.\n"
    made = readme(text, [one], "quick")
    assert "| paper | reproduced | not reproduced |" in made
    assert "| Frankle et al. 2020 | 1 | 1 |" in made and "old" not in made
    assert made.endswith("The rest.\n") and readme(made, [one], "quick") == made
    with pytest.raises(BookError, match=r"README\.md lacks"):
        readme("# Title", [one], "quick")
