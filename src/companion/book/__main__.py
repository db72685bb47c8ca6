"""The commands the Makefile calls: ``python -m companion.book --help``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from companion.book import notebooks as _notebooks
from companion.book import site
from companion.book.layout import Book
from companion.book.shape import shape as _shape
from companion.core import signals
from companion.core.errors import CompanionError


class _Steps(TyperGroup):
    """Ctrl-C and SIGTERM end a step, and what it started, with one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with signals.interruptible():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            print("Interrupted. What is finished is kept; `make book` goes on.", file=sys.stderr)
            raise typer.Exit(signals.exit_code(error)) from None


app = typer.Typer(
    cls=_Steps,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Steps of `make book`; each writes below build/.",
)
Chapters = Annotated[list[str] | None, typer.Argument(help="Chapter names; all if none is given.")]
Profile = Annotated[str, typer.Option(help="A folder of chapters/profiles, or quick.")]
Root = Annotated[Path, typer.Option(help="The root of the book.")]


@app.command()
def notebooks(chapters: Chapters = None, root: Root = Path()) -> None:
    """Turn chapters into notebooks that plain papermill runs: build/notebooks/."""
    book = Book(root)
    for chapter in chapters or book.chapters():
        print(_notebooks.build(book, chapter))


@app.command("format")
def format_(chapters: Chapters = None, root: Root = Path()) -> None:
    """Format the code cells of chapters in place, as ruff formats the package."""
    book = Book(root)
    for chapter in chapters or book.chapters():
        if _notebooks.format_cells(book, chapter):
            print(f"formatted chapters/{chapter}.md")


@app.command()
def execute(chapters: Chapters = None, profile: Profile = "quick", root: Root = Path()) -> None:
    """Run chapters' notebooks with a profile's parameters: build/PROFILE/executed/."""
    book = Book(root)
    for chapter in chapters or book.chapters():
        with book.building(profile, chapter):
            _notebooks.execute(book, profile, chapter)


@app.command()
def stage(profile: Profile = "quick", root: Root = Path()) -> None:
    """Put the site's source tree together: build/PROFILE/book/."""
    from companion.book.stage import stage as _stage  # and with it torch, which no other step needs

    book = Book(root)
    with book.building(profile, "site"):
        print(_stage(book, profile))


@app.command()
def html(profile: Profile = "quick", root: Root = Path()) -> None:
    """Build the site from the staged tree and check it: build/PROFILE/book/_build/html/."""
    book = Book(root)
    with book.building(profile, "site"):
        print(site.build(book, profile))


@app.command()
def readme(profile: Profile = "quick", root: Root = Path()) -> None:
    """Write README's table of what held, and its picture (book/plane.svg), from the built run."""
    from companion.book.stage import readme as _readme

    for path in _readme(Book(root), profile):
        print(path)


@app.command()
def check(profile: Profile = "quick", root: Root = Path()) -> None:
    """Check a built site: pages, links, alt texts, nothing from the network, no local paths."""
    site.check(Book(root), profile)


@app.command()
def shape(chapters: Chapters = None, root: Root = Path()) -> None:
    """Count lines, visible code and prose of chapters, and say what is off."""
    book = Book(root)
    for chapter in chapters or book.chapters():
        found = _shape(book.source(chapter).read_text(encoding="utf-8"), chapter)
        print(f"{chapter}: {found}")
        for problem in found.problems():
            print(f"  {problem}")


def main() -> None:
    try:
        app()
    except CompanionError as error:
        print(f"error: {error}", file=sys.stderr)
        print(f"(companion.book {shlex.join(sys.argv[1:])})", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
