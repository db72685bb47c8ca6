"""Each chapter is a text with code in it, not a program with remarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from companion.book.layout import Book
from companion.book.shape import shape

BOOK = Book(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize("chapter", BOOK.chapters())
def test_a_chapter_explains_more_than_it_computes(chapter):
    found = shape(BOOK.source(chapter).read_text(encoding="utf-8"), chapter)
    assert not found.problems(), found


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
