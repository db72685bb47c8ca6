"""Build the site with Jupyter Book, and check what came out as a reader would meet it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from companion.book.layout import Book, BookError
from companion.book.polish import polish


def build(book: Book, profile: str) -> Path:
    """Run Jupyter Book on the staged tree, check the site, and return its front page.

    Raises:
        BookError: Sphinx failed or warned, or :func:`check` found something.
    """
    staged, html = book.staged(profile), book.html(profile)
    if not staged.is_dir():
        raise BookError(f"{staged.relative_to(book.root)} is missing: run the stage step first.")
    # Sphinx writes what is missing and removes nothing: a page that left the book would stay.
    shutil.rmtree(html, ignore_errors=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(staged), "-n", "-W", "--keep-going", "-q"]
    print(f"building the site: {len(book.pages())} pages", file=sys.stderr, flush=True)
    # Warnings go to stderr as they come; the rest is only worth reading if it failed.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        # A page that is not read again does not warn again: without this, a second try would pass.
        shutil.rmtree(html.parent / ".doctrees", ignore_errors=True)
        raise BookError("Jupyter Book failed, or Sphinx warned: see above.")
    # The theme's download button gives a page's source: here, the notebook that runs anywhere.
    shutil.copytree(staged / "taken", html / "_sources", dirs_exist_ok=True)
    polish(html)
    check(book, profile)
    return html / "index.html"


def check(book: Book, profile: str) -> None:
    """Read every page of the site and refuse what a reader would stumble over.

    Checks: each page of ``_toc.yml`` and ``index.html`` is there; no page loads anything from the
    network; every link and resource inside the site exists, with its anchor; every picture has an
    alt text; no path of this machine is printed; nothing runs on a page, nor in a picture, but the
    theme's own scripts.

    Raises:
        BookError: What was found, one line each.
    """
    html = book.html(profile).resolve()
    problems = []
    for name in sorted({"index", *book.pages()}):
        if not (html / f"{name}.html").is_file():
            problems.append(f"{name}.html: the page is missing from the site")
    found = (p for p in sorted(html.rglob("*.html")) if p.relative_to(html).parts[0] != "_static")
    pages = {path: _read(path) for path in found}
    for path, page in pages.items():
        where = path.relative_to(html)
        problems += [f"{where}: {text}" for text in page.problems]
        problems += [f"{where}: {text}" for text in _broken_links(path, page, html, pages)]
        problems += [f"{where}: {text}" for text in _foreign_scripts(path, page, html)]
        for folder in {str(book.root.resolve()), str(Path.home())} - {"/"}:
            if re.search(re.escape(folder) + r"(?![\w.-])", page.text):
                problems.append(f"{where}: prints a folder of this machine, {folder}")
    for path in sorted(p for p in html.rglob("*.svg") if p.relative_to(html).parts[0] != "_static"):
        page = _read(path)
        scripts = [f"a script: {text[:60]}" for text in (*page.code, *page.scripts)]
        problems += [f"{path.relative_to(html)}: {text}" for text in (*page.running, *scripts)]
    if problems:
        raise BookError("The site is not fit to be read:\n" + "\n".join(f"  {p}" for p in problems))


@dataclass
class _Page(HTMLParser):
    """What of a page can be checked: its anchors, its links, and what is wrong in itself."""

    text: str = ""
    anchors: set[str] = field(default_factory=lambda: {""})  # "": the page's top
    links: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)  # what would run beside scripts
    code: list[str] = field(default_factory=list)  # of scripts inside the page
    scripts: list[str] = field(default_factory=list)  # addresses of the others
    inside: bool = False  # a script

    def __post_init__(self) -> None:
        super().__init__()
        if re.search(r"<!--+>", self.text):  # where browsers and this parser see two things
            self.running.append("an empty comment, which may hide a tag")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._runs(tag, values)
        for name in ("id", "name"):
            if name in values:
                self.anchors.add(values[name])
        if tag == "img" and not values.get("alt", "").strip():
            self.problems.append(
                f"the picture {values.get('src', '?')[:60]} has no alt text "
                "(figures.publish asks for one)"
            )
        loads = [values[name] for name in ("src", "poster", "data") if name in values]
        if tag == "link" and values.get("rel", "") not in ("canonical", "alternate"):
            loads.append(values.get("href", ""))
        for address in loads:
            if urlsplit(address).netloc:
                self.problems.append(f"<{tag}> loads {address} from the network")
        if tag == "a" and "href" in values:
            loads.append(values["href"])
        self.links += loads

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.code[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def _runs(self, tag: str, values: dict[str, str]) -> None:
        """Note what of a tag would run in a browser."""
        if tag == "script" and "src" in values:
            self.scripts.append(values["src"])
        elif tag == "script" and values.get("type", "") not in _INERT:
            self.code.append("")
            self.inside = True
        for name, value in values.items():
            own = tag == "button" and value in _OWN_HANDLERS
            address = re.sub(r"[\x00-\x20]", "", value).casefold()
            runs = name not in _WORDS and re.search(_RUNS, address)
            if (name.startswith("on") and not own) or runs:
                self.running.append(f"<{tag}> has {name}={value[:60]!r}")
        refresh = tag == "meta" and values.get("http-equiv", "").casefold() == "refresh"
        if tag in _FOREIGN or "srcdoc" in values or refresh:
            self.running.append(f"<{tag}> has no place on a page")


_INERT = ("text/x-thebe-config", "application/json")  # types of data that no browser runs
_OWN_HANDLERS = ("window.print()", "toggleFullScreen()")  # of the theme's buttons
_FOREIGN = ("applet", "base", "embed", "foreignobject", "frame", "iframe", "object")
_WORDS = ("alt", "title", "content", "aria-label")  # attributes that are never an address
_RUNS = r"(^|;)(java|vb)script:|^data:(text/html|application)"
# The theme's own scripts inside its pages, white space as one space. MathJax's is JSON.
_OWN_CODE = re.compile(
    r'document\.documentElement\.dataset\.mode = localStorage\.getItem\("mode"\) \|\| "\w*"; '
    r'document\.documentElement\.dataset\.theme = localStorage\.getItem\("theme"\) \|\| "\w*";'
    r"|let toggle\w+ = '[\w ]*';"
    r"|var togglebuttonSelector = '[\w .,-]*';"
    r'|(const (THEBE_JS_URL|thebe_selector|thebe_selector_(input|output)) = "[^"]*"(; |$))+'
    r"|DOCUMENTATION_OPTIONS\.pagename = '[\w/.-]*';"
    r"|kernelName = '[\w.-]*'"
    r"|// Activate the search field on page load let searchInput = "
    r'document\.querySelector\("form\.bd-search input"\); if \(searchInput\) \{ '
    r"searchInput\.focus\(\); searchInput\.select\(\); "
    r'console\.log\("\[PST\]: Set focus on search field\."\); \}'
)


def _foreign_scripts(path: Path, page: _Page, html: Path) -> list[str]:
    """What runs on a page and is not the site's own."""
    found = list(page.running)
    for address in page.scripts:
        target = (path.parent / unquote(urlsplit(address).path)).resolve()
        place = target.relative_to(html).parts[0] if target.is_relative_to(html) else ""
        if urlsplit(address).scheme or place not in ("_static", "mathjax", "searchindex.js"):
            found.append(f"the script {address[:60]} is not the site's own")
    for text in (" ".join(code.split()) for code in page.code):
        if not text or _OWN_CODE.fullmatch(text):
            continue
        head, _, rest = text.partition(" = ")
        try:
            json.loads(rest)
        except ValueError:
            head = ""
        if head != "window.MathJax":
            found.append(f"a script inside the page is not the site's own: {text[:60]!r}")
    return found


def _read(path: Path) -> _Page:
    page = _Page(path.read_text(encoding="utf-8"))
    page.feed(page.text)
    return page


def _broken_links(path: Path, page: _Page, html: Path, pages: dict[Path, _Page]) -> list[str]:
    """Links of a page that lead nowhere inside the site."""
    broken = []
    for address in dict.fromkeys(page.links):
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir():
            target /= "index.html"
        if not target.is_file() or not target.is_relative_to(html):
            broken.append(f"the link {address} leads nowhere")
        elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
            broken.append(f"the link {address} leads to a page without that anchor")
    return broken
