"""The last touch on the built pages: what the theme and Sphinx write, and a reader should not meet.

One pass over the HTML, after Jupyter Book. Figures get their size, their dark twin and the name of
what they download. The theme's icon font goes (1.5 MB of script for a dozen signs, which
``companion.css`` draws), and so do the formula renderer on pages without formulas, and what is
there twice.
"""

from __future__ import annotations

import re
import shutil
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote

from companion.book import searching

ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><path fill='none' "
    "stroke='#0072B2' stroke-width='3' d='M3 26 Q9 26 12 16 T20 16 T29 26'/>"
    "<path stroke='#D55E00' stroke-width='3' d='M3 26H29'/></svg>"
)
"""In the browser's tab: a line between two valleys, and what lies above it."""


def polish(html: Path) -> None:
    """Rewrite every page of a site in place, and remove files that no page loads.

    Arguments:
        html: the folder of the site, with the dark figures under ``dark/CHAPTER/``.
    """
    pages = [p for p in sorted(html.rglob("*.html")) if p.relative_to(html).parts[0] != "_static"]
    texts = {path: page(path, html) for path in pages}
    named = _figure_numbers(texts, html)
    formulas = {
        found[1]: found[2]
        for text in texts.values()
        for found in re.finditer(
            r'<div class="math notranslate nohighlight" id="(equation-[\w-]+)">\s*'
            r"(?:<span class=\"eqno\">.*?</span>)?(.*?)</div>",
            text,
            re.S,
        )
    }
    for path, text in texts.items():
        text = _with_leads(_with_cards(text, formulas), named)
        own = number(path.stem) if path.parent != html else ""
        texts[path] = _numbered(text, named, own)
        path.write_text(_unbroken(texts[path]), encoding="utf-8")
    searching.write(texts, html)
    _drop_icon_fonts(html / "_static")
    for path in [*(html / "_static").rglob("*.map"), html / "_static/scripts/fontawesome.js"]:
        path.unlink(missing_ok=True)


_UNBROKEN = (
    (r"(\d) ?%(?!\w)", "\\1\u00a0%"),
    (r"(\d) (points?|nats?|degrees|times|seconds|minutes|[MG]B)\b", "\\1\u00a0\\2"),
    (r"(\d) × (\d)", "\\1\u00a0×\u00a0\\2"),
    (r"\b([kT]) = (\d)", "\\1\u00a0=\u00a0\\2"),
)


def _unbroken(text: str) -> str:
    """A page on which no line ends between a number and its unit, nor before the full stop that
    follows a formula; code and formulas stay."""

    def joined(found: re.Match[str]) -> str:
        words = found[0]
        if not words.startswith("<"):
            for pattern, glued in _UNBROKEN:
                words = re.sub(pattern, glued, words)
        return words

    kept = r"<(script|style|pre|code|svg|template|title)\b.*?</\1>"
    formula = r"<(span|div) class=\"math.*?</\2>"
    text = re.sub(rf"{kept}|{formula}|<[^>]*>|[^<]+", joined, text, flags=re.S)
    short = r'(<span class="math[^"]*">[^<]{1,40}</span>[.,;:?!)]+)'
    return re.sub(short, r'<span class="unbroken">\1</span>', text)


def _drop_icon_fonts(static: Path) -> None:
    """Remove the theme's icon fonts; what it draws with them, ``companion.css`` draws."""
    for sheet in static.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        bare = re.sub(r"@font-face\s*\{[^}]*fontawesome[^}]*\}", "", text)
        bare = re.sub(r"(?:\.fa-[\w-]+(?:::?before)?,?)+\{(?:--fa:|content:)[^}]*\}", "", bare)
        if bare != text:
            sheet.write_text(bare, encoding="utf-8")
    shutil.rmtree(static / "vendor" / "fontawesome", ignore_errors=True)


def page(path: Path, html: Path) -> str:
    """The polished text of one page."""
    text = path.read_text(encoding="utf-8")
    for ballast in ("fontawesome", "sphinx-thebe"):
        text = re.sub(rf"<script[^>]*src=\"[^\"]*{ballast}\.js[^>]*></script>", "", text)
    if "math notranslate" not in text:
        text = re.sub(r"<script[^>]*src=\"[^\"]*mathjax/[^>]*></script>", "", text)
    text = _once(r"<meta name=\"viewport\"[^>]*/?>", text)
    text = text.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    # Its words are "Search" and the keys: a label of "Search" alone would hide them.
    text = re.sub(
        r'(<button class="btn search-button-field[^>]*?) aria-label="Search"', r"\1", text
    )
    text = text.replace('role="doc-biblioentry"', 'role="listitem"')
    text = re.sub(r"<title>(.*?) &#8212; \1</title>", r"<title>\1</title>", text)
    text = text.replace("</title>", f"</title>\n{_described(text)}", 1)
    chapter = path.relative_to(html).with_suffix("").as_posix().removeprefix("chapters/")
    up = "../" * (len(path.relative_to(html).parts) - 1)
    figure = r'<figure [^>]*id="(?P<name>fig-[\w-]+)">.*?</figure>'
    text = re.sub(figure, lambda found: _figure(found, path, html, chapter, up), text, flags=re.S)
    return _downloads(text)


def number(chapter: str) -> str:
    """What the text calls a chapter: ``2b`` of ``02b_merging``; empty if it has no number."""
    found = re.match(r"0*(\d+[a-z]?)_", chapter)
    return found[1] if found else ""


def _figure_numbers(texts: dict[Path, str], html: Path) -> dict[str, str]:
    """Label of a figure -> ``2b.3``, the third of chapter 2b; ``3`` on a page without a number."""
    return {
        label: f"{chapter}.{i}" if chapter else str(i)
        for path, text in texts.items()
        for chapter in [number(path.stem) if path.parent != html else ""]
        for i, label in enumerate(re.findall(r'<figure [^>]*id="(fig-[\w-]+)"', text), start=1)
    }


def _numbered(text: str, named: dict[str, str], own: str) -> str:
    """A page with the chapters' numbers at figures, references to figures, and titles."""

    def caption(found: re.Match[str]) -> str:
        return f"{found[1]}{named.get(found[2], found[3])} </span>"

    def reference(found: re.Match[str]) -> str:
        return f"{found[1]}{named.get(found[2], found[3])}</span>"

    def title(found: re.Match[str]) -> str:
        given = number(found["chapter"])
        return f"{found['before']}{given}. {found['title']}" if given else found[0]

    text = re.sub(
        r'(<figure [^>]*id="(fig-[\w-]+)"(?:(?!</figure>).)*?<span class="caption-number">Fig\. )'
        r"(\d+) </span>",
        caption,
        text,
        flags=re.S,
    )
    text = re.sub(
        r'(<a class="reference internal" href="[^"]*#(fig-[\w-]+)"><span class="std std-numref">'
        r"Fig\. )(\d+)</span>",
        reference,
        text,
    )
    entry = r'href="(?:[^"]*/)?(?P<chapter>[\w-]+)\.html"'
    for before in (
        rf'<li class="toctree-l1[^>]*><a class="[^"]*"[^>]*?{entry}>',
        rf'<a class="(?:left-prev|right-next)"\s+{entry}.*?<p class="prev-next-title">',
    ):
        text = re.sub(rf"(?P<before>{before})(?P<title>[^<]*)", title, text, flags=re.S)
    if own:
        here = r'(<li class="toctree-l1 current[^>]*><a class="[^"]*" href="#">|<h1>|<title>)'
        text = re.sub(here, rf"\g<1>{own}. ", text)
    return text


def lead(figure: str) -> str:
    """The place of a copy of a figure further down, for a page's first screen."""
    return f'<figure class="lead" data-of="{figure}"></figure>'


def _with_leads(text: str, named: dict[str, str]) -> str:
    """The page with copies of figures where :func:`lead` left room: the same files, and a link."""
    for name in dict.fromkeys(re.findall(lead(r"([\w-]+)"), text)):
        found = re.search(rf'<figure [^>]*id="{name}">(.*?)</figure>', text, re.S)
        images = re.findall(r"<img [^>]*>", found[1]) if found else []
        words = f"Fig. {named.get(name, '')}, which is explained further down"
        link = f'<a href="#{name}" aria-label="{words}">{"".join(images)}</a>'
        made = f'<figure class="lead">{link}</figure>' if images else ""
        text = text.replace(lead(name), made)
    return text


def _with_cards(text: str, formulas: dict[str, str]) -> str:
    """The page with a copy of each formula it refers to, which ``cards.js`` shows at the link."""
    asked = dict.fromkeys(re.findall(r'href="[^"]*#(equation-[\w-]+)">', text))
    cards = "".join(
        f'<template id="card-{name}">{formulas[name]}</template>\n'
        for name in asked
        if name in formulas and "math notranslate" in text
    )
    return text.replace("</body>", f"{cards}</body>", 1)


def _described(text: str) -> str:
    """Description for search engines and previews: the page's first sentences; and the icon."""
    title = re.search(r"<title>(.*?)</title>", text, re.S)
    body = text[text.find("<h1") :]
    found = re.search(r"<p>(?P<words>.*?)</p>", body, re.S)
    words = " ".join(re.sub(r"<[^>]+>", "", found["words"]).split()) if found else ""
    short = words if len(words) < 200 else words[:200].rpartition(" ")[0] + " …"
    name = escape(unescape(title[1] if title else ""), quote=True)
    tags = f'<link rel="icon" href="data:image/svg+xml,{quote(ICON)}"/>'
    if short:
        says = escape(unescape(short), quote=True)
        tags += (
            f'\n<meta name="description" content="{says}"/>'
            f'\n<meta property="og:title" content="{name}"/>'
            f'\n<meta property="og:description" content="{says}"/>'
            '\n<meta property="og:type" content="article"/>'
        )
    return tags


def _figure(found: re.Match[str], path: Path, html: Path, chapter: str, up: str) -> str:
    """A figure with the size of its picture, so that the page does not jump, and its dark twin."""

    def twins(image: re.Match[str]) -> str:
        tag = image[0].rstrip("/> ").rstrip()
        source = re.search(r'src="([^"]+)"', tag)
        if not source:
            return image[0]
        tag += _size(path.parent / source[1]) + ' loading="lazy"'
        night = f"dark/{chapter}/{found['name']}.svg"
        if not (html / night).is_file():
            return tag + " />"
        dark = tag.replace(source[0], f'src="{up}{night}"')
        return f'{tag} class="by-day" />\n{dark} class="by-night dark-light" />'

    return re.sub(r"<img [^>]*>", twins, found[0], count=1)


def _size(picture: Path) -> str:
    """`` width="" height=""`` of an SVG, in CSS pixels; nothing if it does not say."""
    if picture.suffix != ".svg" or not picture.is_file():
        return ""
    head = picture.read_text(encoding="utf-8")[:2000]
    sizes = re.findall(r'\b(width|height)="([\d.]+)pt"', head)
    return "".join(f' {name}="{float(value) * 4 / 3:.0f}"' for name, value in sizes[:2])


def _downloads(text: str) -> str:
    """Download links that a screen reader can tell apart: each says its file, too."""

    def named(found: re.Match[str]) -> str:
        words = re.sub(r"<[^>]+>", "", found["inside"]).strip()
        return f'{found["tag"]} aria-label="{words}, {found["file"]}">{found["inside"]}</a>'

    link = r'(?P<tag><a class="reference download internal"[^>]*/(?P<file>[^"/]+)")>'
    return re.sub(rf"{link}(?P<inside>.*?)</a>", named, text, flags=re.S)


def _once(pattern: str, text: str) -> str:
    """The text with the first of several matches alone."""
    seen = iter([True])
    return re.sub(pattern, lambda found: found[0] if next(seen, False) else "", text)
