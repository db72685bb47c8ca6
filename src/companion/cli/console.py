"""What the commands write: tables on stdout, notes and errors on stderr, results as files.

Consoles are made when something is printed, so they follow a redirected stream. Markup is off:
names of networks and datasets may hold brackets.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from companion.core import codec, files
from companion.core.errors import BadParameter

if TYPE_CHECKING:
    import torch

INVALID = 3
"""Exit code of a command that did all it was asked, and whose barrier failed a gate: no script
should take the number for one."""

_PIPED = 200  # columns, where no terminal says how many: a key must not be cut in a log file


UNITS = {"loss": "nats", "error": "points"}
"""Of a barrier."""


def number(value: float, metric: str) -> str:
    """A loss to 4 digits, an error to 2; INVALID where a gate failed."""
    return "INVALID" if math.isnan(value) else f"{value:.{4 if metric == 'loss' else 2}f}"


def mode_of(bn: str) -> str:
    """What BatchNorm does, to end a title with; nothing without BatchNorm."""
    return "" if bn == "none" else f", BatchNorm {bn}"


def out() -> Console:
    """The console of results."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPED
    return console


def visible(text: str) -> str:
    """``text`` with what a terminal would obey, or would not show, in escapes: ``\\x1b[2J``."""
    odd = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats such as right-to-left, line breaks
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in odd else ascii(c)[1:-1] for c in text
    )


def say(text: str = "") -> None:
    """A line of the result, not wrapped: terminals do that, and files should not have it."""
    out().print(visible(text), soft_wrap=True)


def end(valid: bool) -> None:
    """The end of a command that measured barriers: exit code :data:`INVALID` if a gate failed."""
    if not valid:
        raise typer.Exit(INVALID)


def note(text: str) -> None:
    """Something done to the input that the user should know."""
    typer.echo(f"note: {visible(text)}", err=True)


def warning(text: str) -> None:
    """A warning of the package."""
    typer.echo(f"warning: {visible(text)}", err=True)


def error(text: str) -> None:
    """The one message of a command that failed."""
    said = visible(text)
    typer.echo(f"Error: {said}" if not text.startswith("Interrupted") else said, err=True)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """Print a table. Columns whose name starts with ``>`` are set to the right."""
    if title:
        say(title)  # not the table's own title: that is wrapped to the table's width
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        right = name.startswith(">")
        grid.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(visible, row))
    out().print(grid)


def size(count: int) -> str:
    """Bytes for people, in powers of ten: ``1.2 MB``."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.3g} {units[0]}"


def output(path: Path | None, option: str, suffixes: Sequence[str] = ()) -> None:
    """Refuse, before any work, a file that could not be written at the end.

    Raises:
        BadParameter: as :func:`companion.core.files.check`, or none of the ``suffixes``.
    """
    if path is None:
        return
    files.check(path, option)
    if suffixes and path.suffix.lower() not in suffixes:
        raise BadParameter(
            f"{option}: {path.name!r} must end in {', '.join(suffixes)}: that says the format."
        )


def write_json(path: Path | None, value: Mapping[str, Any]) -> None:
    """Write a result with where it comes from; NaN and infinities become null. None: nothing."""
    if path is None:
        return
    from companion.report import provenance

    whole = {**value, "provenance": provenance.record()}
    try:
        text = json.dumps(codec.to_json(whole, path.name, null=True), indent=1, allow_nan=False)
        files.write(path, f"{text}\n".encode())
    except OSError as e:
        raise BadParameter(f"--json: {path} cannot be written ({e.strerror}).") from e
    say(f"numbers written to {path}")


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    command: str,
    about: Mapping[str, str],
    what: str,
) -> None:
    """Write a safetensors file, and say so.

    Arguments:
        command: that made it, for its metadata.
        about: more metadata: where they come from.
        what: they are, in the line that is said.

    Raises:
        BadParameter: it cannot be written.
    """
    from companion import __version__
    from companion.core.writing import in_pieces

    known = {"format": "pt", "made by": f"companion {__version__} {command}", **about}
    try:
        files.write(path, in_pieces(tensors, known))
    except OSError as e:
        raise BadParameter(f"{path} cannot be written ({e.strerror}).") from e
    say(f"{what} written to {path}")
