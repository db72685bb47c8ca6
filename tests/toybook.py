"""A book of one tiny chapter, with the real book's configuration, styles and pages around it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from filelock import FileLock

from companion.book import __main__ as book

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A toy chapter

The definition is {eq}`eq-toy`, the curve {numref}`fig-toy-curve`; it is {cite:t}`frankle2020lmc`.

$$
B = \\max_\\alpha \\norm{\\boldsymbol{\\theta}_\\alpha}
$$ (eq-toy)

```{code-cell} python
:tags: [parameters]

n = 3  # how many points
slope = 0.5  # of the line
# fork steps; all of them
ks = [0, 25, 100]
```

```{code-cell} python
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt

from companion.report import claims, figures, page, provenance, tables

figures.use_style()
parameters = {"n": n, "slope": slope, "ks": ks}
print("here:", Path.cwd())
warnings.warn("a warning with a place", stacklevel=1)
print("x is being worked on by y;", "waiting for it to finish", file=sys.stderr)
y = [slope * i for i in range(n)]
for name in ("toy-curve", "toy-twin"):
    fig, ax = plt.subplots()
    ax.plot(y)
    ax.set_xlabel("step k")
    ax.set_ylabel("barrier (points)")
    drawn = {"y": y, "broken": float("nan")}
    figures.publish(fig, name, data=drawn, values={"end": y[-1]})
```

:::{caption} toy-curve
:alt: A straight line from 0
  to {{end:.3f}}, of the {{network}}.
The line of the {{network}} ends at {{end:.3f}} points, $\\alpha = 1$;
see {numref}`fig-toy-twin`.
:::

:::{caption} toy-twin
:alt: A straight line.
The line ends at {{end:.3f}} points.
:::

```{code-cell} python
tables.show(["k", "<y>"], [(k, slope * k) for k in ks], name="toy-table")
page.fill(network="net|{{end}} <b>*1*</b>", fall=-slope, points=n)
```

:::{caption} toy-table
The {{network}} at {{points}} points.
:::

The {{network}} falls by {{fall:.2f}}, and `{{fall}}` stays as it is.

| what | how many |
|---|---|
| {{network}} | {{points}} |

```{code-cell} python
claims.show(
    [
        claims.judge("C01", 0.3, n=9, interval=(0.1, 0.6)),
        claims.judge("C02", 4.0, n=9, interval=(2.0, 6.0), detail="3 of 3 <inits>"),
        claims.judge("C05", None, note="not run in the toy"),
    ],
    scale="toy data, no network",
)
```

## Exercises

1. Which slope is twice as steep?

```{code-cell} python
:tags: [solution]

page.fill(steep=2 * slope)
2 * slope
```

Twice as steep is {{steep:.1f}}.

Another one is left to the {cite:p}`frankle2020lmc`; see [the curve](01_toy).

```{code-cell} python
:tags: [hide-input]

tables.show(["k", "2k"], [(k, 2 * k) for k in ks], name="toy-twice")
```

:::{caption} toy-twice
Twice as many.
:::

```{code-cell} python
entry = provenance.record(dataset="toy")
provenance.show({**entry, "code": None})  # the checkout may change between two runs of a test
provenance.show_rerun("01_toy", parameters)
```
"""
TOC = """\
format: jb-book
root: index
chapters:
  - file: chapters/01_toy
  - file: using
  - file: report
  - file: families
  - file: claims
  - file: promises
  - file: notation
  - file: provenance
  - file: bibliography
"""


def make(root: Path, chapter: str = CHAPTER) -> Path:
    """Write a book of one chapter to the empty folder ``root`` and return it."""
    (root / "chapters" / "profiles" / "other").mkdir(parents=True)
    (root / "chapters" / "01_toy.md").write_text(chapter, encoding="utf-8")
    (root / "chapters" / "profiles" / "other" / "01_toy.yaml").write_text("n: 5\nslope: 0.25\n")
    (root / "_toc.yml").write_text(TOC)
    for name in (
        "_config.yml",
        "references.bib",
        "index.md",
        "using.md",
        "report.md",
        "families.md",
        "claims.md",
        "promises.md",
        "provenance.md",
        "notation.md",
        "bibliography.md",
    ):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "book", root / "book")
    for name, commands in (("using.md", 2), ("report.md", 1)):
        _shorten(root / name, commands)
    return root


def _shorten(page: Path, commands: int) -> None:
    """Leave the first few commands that a page runs; the others stand there as they are typed."""
    first, *others = page.read_text(encoding="utf-8").split("```{shown}\n")
    shown = [f"```{{shown}}\n{part}" for part in others[:commands]]
    typed = []
    for part in others[commands:]:
        block, fence, rest = part.partition("```\n")
        typed.append(f"```console\n{block[block.index('$ ') :]}{fence}{rest}")
    text = "".join([first, *shown, *typed])
    text = re.sub(r'<a href="reports/(?!report|copies)\w+\.html">(.*?)</a>', r"\1", text)
    page.write_text(text, encoding="utf-8")


def built(folder: Path) -> Path:
    """The root of a book in ``folder`` whose site is built with the profile ``other``."""
    root, whole = folder / "toybook", folder / "toybook.whole"
    with FileLock(folder / "toybook.lock"):
        if not whole.exists():
            shutil.rmtree(root, ignore_errors=True)
            make(root)
            for words in (
                ["notebooks"],
                *([w, "--profile", "other"] for w in ("execute", "stage", "html")),
            ):
                done = run(root, *words)
                assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
            whole.touch()
    return root


@dataclass(frozen=True)
class Done:
    """What a command said, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run(root: Path, *words: str) -> Done:
    """One command of companion.book in that book, as the Makefile calls it, in this process."""
    out, err, code, usual = io.StringIO(), io.StringIO(), 0, os.dup(2)
    with (
        tempfile.TemporaryFile("w+") as children,
        contextlib.chdir(root),
        patch.object(sys, "argv", ["companion.book", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.dup2(children.fileno(), 2)
        try:
            book.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os.dup2(usual, 2)
            os.close(usual)
        children.seek(0)
        return Done(code, out.getvalue(), err.getvalue() + children.read())
