"""Each chapter is a text with code in it, not a program with remarks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from companion.book import parameters
from companion.book.layout import Book
from companion.book.shape import shape

BOOK = Book(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize("chapter", BOOK.chapters())
def test_a_chapter_explains_more_than_it_computes(chapter):
    found = shape(BOOK.source(chapter).read_text(encoding="utf-8"), chapter)
    assert not found.problems(), found


@pytest.mark.parametrize("chapter", [c for c in BOOK.chapters() if c != "07_errata"])
def test_a_chapter_ends_with_exercises_that_have_solutions(chapter):
    """Each question stands before its solution, whose sentence takes numbers from the run."""
    text = BOOK.source(chapter).read_text(encoding="utf-8")
    exercises = re.search(r"## Exercises\n(.*?)\n## Summary", text, re.DOTALL)
    assert exercises
    asked, *solved = exercises[1].split("```{code-cell} ipython3\n:tags: [solution]\n")
    assert len(solved) >= 2 and asked.strip().startswith("1. **")
    for one in solved:
        code, _, after = one.partition("\n```\n")
        filled = set(re.findall(r"\{\{(\w+)", after.strip().split("\n\n")[0]))
        assert filled, after
        assert "page.fill(" in code


@pytest.mark.parametrize("chapter", BOOK.chapters())
def test_every_parameter_says_what_it_means(chapter):
    source = parameters.cell_of(BOOK, chapter)
    for name, one in parameters.declared(source, chapter).items():
        assert len(one.meaning.partition("None:")[0].split()) >= 2, name


def test_what_is_counted():
    text = """\
---
kernelspec: {name: python3}
---
# Two words

```{code-cell} python
:tags: [parameters]

left = "out"
```

```{code-cell} python
:tags: [solution]

folded = "on purpose"
```

```{code-cell} python
n = 1

m = 2
```

```{code-cell} python
:tags: [hide-input]
a = 1
b = 2
c = 3
```

(an-anchor)=
Three more words.

```python
not_a_cell = 1
```

$$ E = m c^2 $$

:::{caption} line
:alt: of four words more
A caption.
:::
"""
    found = shape(text, "x")
    assert (found.lines, found.code, found.visible, found.longest) == (43, 5, 2, 3)
    assert found.words == 2 + 3 + 5 + 2
    assert [p.partition(",")[0] for p in found.problems()] == [
        "2 of 5 lines of code visible",
        "12 words for 5 lines of code",
    ]
