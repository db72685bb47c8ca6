"""``companion record``: a chapter's results on this machine, in pieces, as one small file."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from companion.cli import options
from companion.cli.console import note, say
from companion.core.errors import BadParameter, OutOfTime

EXAMPLE = (
    "Example: companion record 01_instability --profile gpu -p dataset=mnist --time-limit 540. "
    "Exit code 75: stopped before the limit; the same command goes on."
)

# Imported first and cheaply: a time limit counts from about here, not from after torch's import.
_STARTED = time.monotonic()


def record_chapter(
    chapter: Annotated[str, typer.Argument(help="A chapter, such as 01_instability.")],
    profile: Annotated[
        str, typer.Option(help="A folder of chapters/profiles (gpu, paper), or quick.")
    ],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", metavar="NAME=VALUE", help="One more parameter, read as YAML."
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds before which to stop, with a margin of 20 s (or a tenth) to store where "
            "it is; the exit code is then 75, and the same command goes on."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what there is to do, and how long it takes.")
    ] = False,
    name: Annotated[
        str, typer.Option(help="Of the file; default: the profile and what -p changes.")
    ] = "",
    commit: Annotated[
        str | None, typer.Option(help="Of this copy of the code, where git does not know it.")
    ] = None,
    close: Annotated[
        bool,
        typer.Option(
            "--close",
            help="Write the file of a recording that was stopped from what is measured; compute "
            "nothing. Also on a machine without a GPU, after companion runs import.",
        ),
    ] = False,
    engine: options.Engine = None,
    gpu_engine: Annotated[
        str,
        typer.Option(
            help="What trains on a GPU: auto (each network's own), loop, loop-compile, graphs, "
            "vmap or compile. Where it fails, a simpler one takes over."
        ),
    ] = "auto",
    root: Annotated[
        Path | None, typer.Option(help="The root of the book; default: this folder, or ours.")
    ] = None,
) -> None:
    """Run a chapter's experiments and write data/recorded/CHAPTER/NAME.json, and nothing else.

    With --close no experiment runs: the file has what is measured, and says what is missing.

    Exit codes: 0 written; 75 stopped before the time limit (run the same command again); 2 the
    input is wrong; 1 anything else.
    """
    from companion.book.layout import Book
    from companion.book.recording import close as closed
    from companion.book.recording import prepare, record
    from companion.core.locations import book_root

    where = root or book_root()
    if where is None or not (where / "chapters").is_dir():
        raise BadParameter(
            f"record: there is no book in {where or Path.cwd()}; give its folder with --root."
        )
    recording = prepare(Book(where.resolve()), chapter, profile, setting or [], name)
    say(f"{chapter}, profile {profile}: {dict(recording.values) or 'its own parameters'}")
    if close and dry_run:
        raise BadParameter("record: --close computes nothing; leave --dry-run out.")
    try:
        path: Path | None
        if close:
            path = closed(recording, commit=commit, say=say)
        else:
            path = record(
                recording,
                time_limit=time_limit,
                started=_STARTED,
                dry_run=dry_run,
                commit=commit,
                engine=gpu_engine,
                say=say,
            )
    except OutOfTime as e:
        say(str(e))
        say(f"To continue: companion {shlex.join(sys.argv[1:])}")
        raise typer.Exit(75) from None
    if path is not None:
        word = "left out" if close else "a picture failed, its numbers are not in the file"
        for problem in recording.problems:
            note(f"{word}: {problem}")
        say(f"recorded in {path} ({path.stat().st_size / 1000:.0f} kB)")
