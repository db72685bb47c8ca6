"""Commands on a page: they are run, what they print stands there, and a failure stops the build."""

from __future__ import annotations

import json

import pytest

from companion.book import shown as shown_module
from companion.book.layout import Book, BookError
from companion.book.shown import Block, networks, shown

PAGE = """# A page

```{shown}
:figure: line.svg
:alt: A line.
What it shows.
$ companion barrier a.safetensors b.safetensors \\
      --plot line.svg
```

Between.

```{shown}
$ companion models list
```
"""


def test_a_block_has_a_command_and_words_for_its_picture():
    block = Block.read(PAGE.split("```{shown}\n")[1].split("```")[0], "page.md")
    assert block.words == [
        "companion",
        "barrier",
        "a.safetensors",
        "b.safetensors",
        "--plot",
        "line.svg",
    ]
    assert (block.figure, block.alt, block.caption) == ("line.svg", "A line.", "What it shows.")
    with pytest.raises(BookError, match=r"page\.md: .* needs a line `\$ companion"):
        Block.read("$ rm -rf /\n", "page.md")
    with pytest.raises(BookError, match="needs an :alt: and a caption"):
        Block.read(":figure: x.svg\n$ companion x\n", "page.md")


def test_output_and_picture_stand_on_the_page(tmp_path, monkeypatch):
    folder = tmp_path / "ran"
    folder.mkdir()
    sentence = " ".join(["word"] * 40)
    outputs = [(0, f"{tmp_path}/x read\n    {sentence}\n"), (0, "a  b\n")]
    (folder / "outputs.json").write_text(json.dumps(outputs))
    (folder / "line.svg").write_text('<svg fill="#ffffff"/>')
    (folder / "found.html").write_text("<p>")
    monkeypatch.setattr(shown_module, "_ran", lambda *words: folder)
    text, files = shown(Book(tmp_path), "page", PAGE)
    assert "```{shown}" not in text and "Between." in text
    assert "$ companion barrier a.safetensors b.safetensors \\\n" in text
    assert "\n./x read\n" in text and str(tmp_path) not in text
    assert max(map(len, text.split("\n"))) <= shown_module.WIDTH
    assert ":name: fig-page-line\n:alt: A line.\n\nWhat it shows.\n" in text
    assert files["extra/reports/found.html"] == b"<p>"
    assert files["files/page/line.svg"] == b'<svg fill="#ffffff"/>'
    assert b"#ffffff" not in files["extra/dark/page/fig-page-line.svg"]
    assert shown(Book(tmp_path), "page", "# Plain") == ("# Plain", {})


@pytest.mark.slow
def test_commands_run_once_and_a_failure_is_said(tmp_path, monkeypatch):
    book = Book(tmp_path)
    page = "```{shown}\n:says: resnet20\n$ companion models list\n```\n"
    text, _ = shown(book, "page", page)
    assert "resnet20" in text
    monkeypatch.setattr(shown_module.subprocess, "run", None)  # a second call runs nothing
    assert shown(book, "page", page)[0] == text
    monkeypatch.undo()
    with pytest.raises(BookError, match="does not say 'resnet2000'"):
        shown(book, "page", page.replace("resnet20", "resnet2000"))
    with pytest.raises(BookError, match=r"page\.md: `companion models lisst` ended with 2"):
        shown(book, "page", "```{shown}\n$ companion models lisst\n```\n")


@pytest.mark.slow
def test_networks_of_the_pages(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path))
    found = networks({"a", "copy"})
    assert found.keys() == {"a", "copy"}
    assert any((found["a"][k] != v).any() for k, v in found["copy"].items())
    assert all(
        v.sort().values.equal(found["copy"][k].sort().values)
        for k, v in found["a"].items()
        if k == "layer1.linear.bias"
    )
