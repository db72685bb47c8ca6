"""The pipeline end to end on a book of one chapter: papermill runs it, Jupyter Book renders it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toybook
import yaml

from companion.book import notebooks, parameters, site
from companion.book.layout import Book, BookError
from companion.core.errors import BadParameter
from companion.report import figures, provenance

CELL = (
    'n: int = 3  # points\nname = "a"  # a word\nks = [0, 1]\nlr: float | None = 0.1\nfree = None\n'
)


@pytest.fixture(scope="module")
def page(toy: Path) -> str:
    return (Book(toy).html("other") / "chapters" / "01_toy.html").read_text(encoding="utf-8")


@pytest.fixture
def copied(toy: Path, tmp_path: Path) -> Path:
    """A copy of the built book that a test may break."""
    root = tmp_path / "book"
    shutil.copytree(toy, root)
    return root


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


# What the page shows


def test_a_figure_has_alt_text_caption_label_and_numbers_of_the_run(page):
    # 0.25 * (5 - 1): both factors come from the profile.
    name = "net|{{end}} &lt;b&gt;*1*&lt;/b&gt;"
    assert f'alt="A straight line from 0 to 1.000, of the {name}."' in page
    assert page.count('alt="A straight line."') == 2  # by day and by night
    assert "The line ends at 1.000 points" in text_of(page)
    (caption, _) = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert f"of the {name} ends at 1.000 points" in caption
    assert 'href="#fig-toy-twin"' in caption and "{caption}" not in page
    assert 'id="fig-toy-curve"' in page and 'href="#fig-toy-curve"' in page
    assert 'id="fig-toy-twin"' in page  # the second figure of the same cell


def test_prose_and_tables_have_the_values_of_the_run(page):
    name = "net|{{end}} &lt;b&gt;*1*&lt;/b&gt;"
    assert f"The {name} falls by −0.25, and " in page
    assert re.search(r"<code[^>]*><span[^>]*>{{fall}}</span></code> stays as it is", page)
    assert f"<caption>The {name} at 5 points.</caption>" in page
    assert re.search(rf"<td[^>]*><p>{re.escape(name)}</p></td>\s*<td[^>]*><p>5</p></td>", page)
    assert "points = 5" not in page  # what page.fill shows in a notebook


def test_downloads_are_there_and_hold_the_data(toy, page):
    folder = Book(toy).html("other") / "chapters"
    found = [
        folder / link for link in re.findall(r'class="[^"]*download[^"]*"[^>]*href="([^"]+)"', page)
    ]
    assert [p.name for p in found if "toy" in p.name] == [
        "toy-curve.json",
        "toy-curve.svg",
        "toy-twin.json",
        "toy-twin.svg",
    ]
    data = json.loads(next(p for p in found if p.name == "toy-curve.json").read_text())
    assert data["data"] == {"y": [0.0, 0.25, 0.5, 0.75, 1.0], "broken": None}
    assert data["parameters"] == {"n": 5, "slope": 0.25, "ks": [0, 25, 100]}
    assert data["provenance"]["dataset"] == "toy"


def test_the_parameters_used_are_shown_once(page):
    text = text_of(page)
    assert len(re.findall(r"slope = 0\.25 # of the line", text)) == 1
    assert "slope = 0.5" not in text


def test_parameters_are_a_table_with_what_they_mean(page):
    (table,) = re.findall(r'<table class="companion-table companion-parameters">.*?</table>', page)
    rows = [text_of(row).split() for row in re.findall(r"<tr>.*?</tr>", table)]
    assert rows == [
        ["Parameter", "Here", "What", "it", "means", "In", "other", "profiles"],
        ["n", "5", "how", "many", "points", "quick:", "3"],
        ["slope", "0.25", "of", "the", "line", "quick:", "0.5"],
        ["ks", "0,", "25,", "100", "fork", "steps;", "all", "of", "them"],
    ]
    assert page.index(table) < page.index("Show the cell that sets them")


def test_a_solution_is_folded_and_says_what_comes_out(page):
    (solution,) = re.findall(
        r'<details class="companion-solution">(.*?)\n</details>\n<p>', page, re.S
    )
    text = text_of(solution)
    assert text.split()[0] == "Solution" and "Twice as steep is 0.5." in text
    assert "page . fill" in text and "Another one" not in text


def test_what_a_cell_shows_comes_before_its_folded_code(page):
    table, prompt = page.index("<caption>Twice as many.</caption>"), "Show the code of this table"
    assert table < page.index(prompt) < page.index("Hide the code of this table")
    assert "Toggle hidden" not in page and "Show code cell" not in page


def test_the_page_can_be_taken_along_as_a_notebook(toy, page):
    address = "../_sources/chapters/01_toy.ipynb"
    assert f'<a href="{address}" download="01_toy.ipynb">' in page
    path = Book(toy).html("other") / "chapters" / address
    first, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert "pip install" in "".join(first["source"])
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert "Frankle et al. (2020)" in text and "(Frankle et al., 2020)" in text
    assert (
        "ends at 1.000 points" in text
        and "\\tag{toy}" in text
        and "[the curve](01_toy.ipynb)" in text
    )
    assert not re.search(r"\{\w+:?\w*\}`|:::|\{\{(?!fall|end)|<details|_downloads", text)
    assert str(toy) not in path.read_text(encoding="utf-8")


def test_nothing_of_this_machine_or_moment_is_published(toy, page):
    staged = (Book(toy).staged("other") / "chapters" / "01_toy.ipynb").read_text()
    executed = Book(toy).executed("other", "01_toy").read_text()
    for pattern in (
        r"\d{4}-\d\d-\d\dT\d\d:",
        r'"papermill"',
        r"ipykernel_\d+",
        re.escape(str(toy)),
    ):
        assert re.search(pattern, executed), f"the toy does not exercise {pattern}"
        assert not re.search(pattern, staged), pattern
        assert not re.search(pattern, page), pattern
    assert "here: ." in page
    assert "&lt;cell&gt;:" in page  # the warning's place


def test_the_front_page_collects_the_claims(toy):
    site = Book(toy).html("other")
    front = (site / "index.html").read_text(encoding="utf-8")
    for id in ("C01", "C02", "C05"):
        assert f'href="claims.html#claim-{id}"' in front
    text = text_of((site / "claims.html").read_text(encoding="utf-8"))
    assert "Claims that the papers draw from experiments (1): 1 reproduced." in text
    ours = "Questions and controls of our own (2): 1 undetermined, 1 not testable at this scale."
    assert ours in text
    assert "Profile other: toy data, no network" in text
    results = json.loads((Book(toy).html("other") / "results.json").read_text())
    assert [c["claim"]["id"] for c in results["chapters"]["01_toy"]["claims"]] == [
        "C01",
        "C02",
        "C05",
    ]


@pytest.mark.slow
def test_two_executions_publish_the_same_bytes(toy, tmp_path):
    """In another folder, even: nothing of the place or the moment is left in the notebook."""
    again = toybook.make(tmp_path / "elsewhere")
    shutil.copytree(toy / "build/shown", again / "build/shown")  # the pages around have run
    for words in (
        ["notebooks"],
        ["execute", "--profile", "other"],
        ["stage", "--profile", "other"],
    ):
        assert toybook.run(again, *words).returncode == 0
    first, second = Book(toy).staged("other"), Book(again).staged("other")
    names = [p.relative_to(second) for p in sorted(second.glob("chapters/**/*")) if p.is_file()]
    assert len(names) == 5
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize(("jobs", "expected"), [("", 6), ("1", 6), ("2", 3), ("9", 1), ("x", 6)])
def test_chapters_that_run_at_once_share_the_cores(monkeypatch, jobs, expected):
    monkeypatch.setattr(notebooks, "cpu_count", lambda: 6)
    monkeypatch.setenv("JOBS", jobs)
    assert notebooks.threads() == expected


def test_only_staging_imports_torch():
    """Make calls a step for each chapter; torch takes longer than most steps."""
    code = "import sys, companion.book.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# What stops the build


@pytest.mark.slow
def test_a_failing_cell_fails_and_leaves_no_result(copied):
    chapter = copied / "chapters" / "01_toy.md"
    chapter.write_text(chapter.read_text().replace("import sys", 'raise ValueError("boom")', 1))
    book = Book(copied)
    assert toybook.run(copied, "notebooks").returncode == 0
    done = toybook.run(copied, "execute", "--profile", "other")
    assert done.returncode == 1
    assert "ValueError: boom" in done.stderr, done.stderr
    assert "src/companion/book" not in done.stderr, done.stderr  # the cell's trace, not ours
    assert "build/other/failed/01_toy.ipynb" in done.stderr
    assert list(book.executed("other", "01_toy").parent.iterdir()) == []
    staged = toybook.run(copied, "stage", "--profile", "other")
    assert staged.returncode == 1 and "was not executed, or it failed" in staged.stderr


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("falls by {{fall:.2f}}", "falls by {{fell:.2f}}", "falls by", "nobody gives 'fell'"),
        ("{caption} toy-table", "{caption} toy-tabel", None, "table 'toy-table' has no caption"),
        (
            "The {{network}} falls",
            ":::{caption} x\ny\n:::\nIt falls",
            ":::{caption} x",
            "called 'x'",
        ),
    ],
)
def test_a_text_that_does_not_fit_the_run_stops_the_build(copied, old, new, line, message):
    """The notebook is staged as it was executed; its text is changed as a rebuild would."""
    for path in (copied / "chapters/01_toy.md", Book(copied).executed("other", "01_toy")):
        escaped = new if path.suffix == ".md" else new.replace("\n", "\\n")
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        path.write_text(text.replace(old, escaped), encoding="utf-8")
    done = toybook.run(copied, "stage", "--profile", "other")
    assert done.returncode == 1 and message in done.stderr, done.stderr
    if line:
        lines = (copied / "chapters/01_toy.md").read_text(encoding="utf-8").splitlines()
        number = next(i for i, text in enumerate(lines, 1) if line in text)
        assert f"chapters/01_toy.md, line {number}: " in done.stderr


@pytest.mark.slow
def test_a_sphinx_warning_fails_every_time(copied):
    page = copied / "notation.md"
    page.write_text(page.read_text() + "\nSee {ref}`nowhere-at-all`.\n")
    assert toybook.run(copied, "stage", "--profile", "other").returncode == 0
    for _ in range(2):  # the second time Sphinx would not read the page, and not warn, again
        done = toybook.run(copied, "html", "--profile", "other")
        assert done.returncode == 1
        assert "nowhere-at-all" in done.stderr + done.stdout
        assert "error: Jupyter Book failed, or Sphinx warned" in done.stderr


def test_a_page_without_a_source_fails(copied):
    toc = copied / "_toc.yml"
    toc.write_text(toc.read_text() + "  - file: nothing\n")
    done = toybook.run(copied, "stage", "--profile", "other")
    assert done.returncode == 1 and "_toc.yml lists nothing" in done.stderr


def test_a_page_missing_from_the_site_fails(copied):
    (Book(copied).html("other") / "notation.html").unlink()
    done = toybook.run(copied, "check", "--profile", "other")
    assert done.returncode == 1
    assert "notation.html: the page is missing" in done.stderr


def test_a_chapter_that_is_not_in_the_table_of_contents_fails(copied):
    (copied / "chapters" / "02_more.md").write_text(toybook.CHAPTER)
    done = toybook.run(copied, "stage", "--profile", "other")
    assert done.returncode == 1 and "_toc.yml does not list chapters/02_more" in done.stderr


def test_an_unknown_parameter_fails_before_anything_runs(copied):
    profile = copied / "chapters" / "profiles" / "other" / "01_toy.yaml"
    profile.write_text("slop: 0.25\n")
    done = toybook.run(copied, "execute", "--profile", "other")
    assert done.returncode == 1
    assert "parameter: 'slop' is not known. Did you mean 'slope'?" in done.stderr
    assert "Allowed: n, slope, ks." in done.stderr


def test_an_unknown_profile_lists_the_known_ones(copied):
    done = toybook.run(copied, "execute", "--profile", "huge")
    assert done.returncode == 1
    assert "'huge' is not known. Allowed: other, quick." in done.stderr


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<img src="a.svg">', "has no alt text"),
        ('<img src="a.svg" alt=" ">', "has no alt text"),
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "loads //cdn.example/x.css"),
        ('<a href="gone.html">x</a>', "the link gone.html leads nowhere"),
        ('<a href="#gone">x</a>', "the link #gone leads to a page without that anchor"),
        ("<p>{root}/data</p>", "prints a folder of this machine"),
        ('<a href="https://example.org">x</a><a href="#here" id="here">y</a>', None),
    ],
)
def test_the_check_reads_pages_as_a_reader_would(tmp_path, html, problem):
    book = Book(tmp_path)
    (tmp_path / "_toc.yml").write_text("root: index\n")
    folder = book.html("quick")
    folder.mkdir(parents=True)
    (folder / "a.svg").write_text("<svg/>")
    (folder / "index.html").write_text(html.replace("{root}", str(tmp_path)))
    if problem is None:
        site.check(book, "quick")
        return
    with pytest.raises(BookError, match=re.escape(problem)):
        site.check(book, "quick")


# The parameters cell and the profiles


def test_values_replace_defaults_and_comments_stay():
    new = parameters.substituted(CELL, {"n": 7, "ks": [1, 2], "name": "ü#'"}, "x")
    assert new == CELL.replace("= 3", "= 7").replace("[0, 1]", "[1, 2]").replace('"a"', '"ü#\'"')
    assert parameters.substituted(CELL, {}, "x") == CELL


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("import os", "line 1 of the parameters cell is `import os`"),
        ("a = 1\nprint(a)", "line 2 of the parameters cell is `print(a)`"),
        ("a, b = 1, 2", "Only assignments"),
        ("a = 1\nb = 2 * a", "'b' is computed from a"),
        ("a = 1\na = 2", "assigns 'a' twice"),
        ("a = (", "does not parse"),
    ],
)
def test_a_parameters_cell_holds_plain_assignments(cell, message):
    with pytest.raises(BadParameter, match=re.escape(message)):
        parameters.declared(cell, "chapters/x.md")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m: 1", "parameter: 'm' is not known"),
        ("lr: 1e-3", "YAML reads 1e-3 as text, not as a number. Write 1.0e-3 or 0.001."),
        ("ks: [1, 1e3]", "Write 1000."),
        ("n: 1.5", "1.5 is of type float; the chapter's own value 3 is of type int"),
        ("n: true", "True is of type bool"),
        ("n: null", "None is of type NoneType"),
        ("ks: 3", "3 is of type int"),
        ("name: 3", "3 is of type int"),
        ("[1]", "lines of `name: value`"),
        ("n: [", "is not valid YAML"),
        ("n: 4\nname: b\nks: []\nlr: 1\nfree: [x]", None),
        ("lr: null", None),
        ("", None),
    ],
)
def test_profiles_are_checked(tmp_path, text, message):
    root = toybook.make(tmp_path / "book")
    path = root / "chapters" / "profiles" / "other" / "01_toy.yaml"
    path.write_text(text)
    if message is None:
        found = parameters.profile_values(Book(root), "other", "01_toy", CELL)
        assert found == (yaml.safe_load(text) or {})
        return
    with pytest.raises(BadParameter, match=re.escape(message)) as caught:
        parameters.profile_values(Book(root), "other", "01_toy", CELL)
    assert "chapters/profiles/other/01_toy.yaml" in str(caught.value)


def test_a_profile_for_no_chapter_is_a_typing_error(tmp_path):
    root = toybook.make(tmp_path / "book")
    (root / "chapters" / "profiles" / "other" / "01_tony.yaml").write_text("n: 1\n")
    with pytest.raises(BadParameter, match=r"01_tony.yaml belongs to no chapter.*01_toy.yaml"):
        parameters.profile_values(Book(root), "other", "01_toy", CELL)


def test_a_notebook_needs_one_parameters_cell(tmp_path):
    root = toybook.make(tmp_path / "book", toybook.CHAPTER.replace("[parameters]", "[other]"))
    with pytest.raises(BadParameter, match="has 0 cells tagged `parameters`"):
        notebooks.build(Book(root), "01_toy")


def test_formatting_touches_code_cells_only(tmp_path):
    long = toybook.CHAPTER.replace("n = 3  #", "n   =   3 #")
    root = toybook.make(tmp_path / "book", long)
    assert notebooks.format_cells(Book(root), "01_toy")
    assert (root / "chapters" / "01_toy.md").read_text() == toybook.CHAPTER
    assert not notebooks.format_cells(Book(root), "01_toy")


# What chapters call


def test_the_rerun_command_gives_papermill_the_same_values():
    values = {
        "n": 3,
        "lr": 1e-5,
        "text": "1e-3",
        "word": "a b",
        "ks": [0, 1e-5, "x: y"],
        "nothing": None,
        "yes": True,
        "map": {"k": [1e20, 0.5]},
    }
    words = shlex.split(provenance.rerun("01_x", values))
    assert words[:3] == ["papermill", "build/notebooks/01_x.ipynb", "out.ipynb"]
    from papermill.cli import _resolve_type

    back, rest = {}, words[3:]
    while rest:
        option = rest.pop(0)
        if option == "-y":
            back |= yaml.safe_load(rest.pop(0))
        else:
            name, text = rest.pop(0), rest.pop(0)
            back[name] = text if option == "-r" else _resolve_type(text)
    assert back == values
    assert [type(v) for v in back.values()] == [type(v) for v in values.values()]


def test_a_record_has_no_place_person_or_time():
    text = json.dumps(provenance.record(dataset={"name": "digits"}))
    for secret in (str(toybook.ROOT), str(Path.home()), time.strftime("%Y-%m-%d")):
        assert secret not in text
    with pytest.raises(BadParameter, match="python is filled in already"):
        provenance.record(python="4")


def test_figures_need_a_name_and_data_that_can_be_written():
    for name, words, message in (
        ("Bad Name", {}, "lower-case"),
        ("x", {"data": {"f": [{1, 2}]}}, r"data\['f'\]\[0\]: a set cannot be written"),
    ):
        with pytest.raises(BadParameter, match=message):
            figures.publish(None, name, **words)


def test_a_figure_name_is_used_once(capsys):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figures.publish(plt.figure(), "only-once")
    with pytest.raises(BadParameter, match="'only-once' is taken"):
        figures.publish(plt.figure(), "only-once")
    plt.close("all")
