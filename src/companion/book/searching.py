"""The text of each page, for the excerpts of the search page.

Sphinx's search page fetches every page it found, which a browser does not do from a disk; what it
shows over the network is cut from the page with its menus and raw formulas. So the text is kept in
one script, ``_static/searchtexts.js``, which only the search page loads; ``search.js`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

SCRIPT = "_static/searchtexts.js"
_VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
_SILENT = {"script", "style", "template", "button", "svg", "dialog"}
_SILENT_CLASSES = {"math", "headerlink", "companion-downloads", "eqno"}


def write(texts: Mapping[Path, str], html: Path) -> None:
    """Write the script, and let the search page load it.

    Arguments:
        texts: the HTML of the site's pages.
        html: its folder.
    """
    search = html / "search.html"
    if not search.is_file():
        return
    found = {
        path.relative_to(html).with_suffix("").as_posix(): sections(text)
        for path, text in texts.items()
        if path != search
    }
    body = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    (html / SCRIPT).write_text(f"const pageTexts = {body};\n", encoding="utf-8")
    page = search.read_text(encoding="utf-8")
    tag = f'<script src="{SCRIPT}"></script>\n</head>'
    search.write_text(page.replace("</head>", tag, 1), encoding="utf-8")


def sections(page: str) -> dict[str, str]:
    """The page's own text by section, in order: anchor -> words, without code of formulas."""
    reader = _Reader()
    reader.feed(page)
    texts = {anchor: " ".join("".join(words).split()) for anchor, words in reader.found.items()}
    return {anchor: text for anchor, text in texts.items() if text}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.article = self.silent = 0  # how deep they began; 0: outside
        self.section = [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        self.open.append(tag)
        values = {name: value or "" for name, value in attrs}
        if tag == "article":
            self.article = self.article or len(self.open)
        if tag in _SILENT or _SILENT_CLASSES & {*values.get("class", "").split()}:
            self.silent = self.silent or len(self.open)
        if tag == "section":
            self.section.append(values.get("id", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.open:
            return
        while (last := self.open.pop()) != tag:
            pass
        if last == "section":
            self.section.pop()
        depth = len(self.open)
        self.article = self.article if depth >= self.article else 0
        self.silent = self.silent if depth >= self.silent else 0
        self.handle_data(" ")  # words of two elements are two words

    def handle_data(self, data: str) -> None:
        if self.article and not self.silent:
            self.found.setdefault(self.section[-1], []).append(data)
