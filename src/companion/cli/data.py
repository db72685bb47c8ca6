"""``companion data``: the datasets by name, whether they are here, and how to get them."""

from __future__ import annotations

from typing import Annotated

import typer

from companion.cli.console import say, size, table

app = typer.Typer(no_args_is_help=True, help="Datasets: list, download, check.")

Name = Annotated[str, typer.Argument(help="A name that `companion data list` shows.")]


@app.command("list", epilog="Example: companion data list")
def list_() -> None:
    """Show every dataset that has a name, whether it is here, and how to get it."""
    from companion.data import catalogue
    from companion.data.parts import ALLOWED
    from companion.locations import data_root

    rows = [
        (
            entry.name,
            entry.label,
            str(entry.classes or "?"),
            "×".join(map(str, entry.shape)) if entry.shape else "?",
            "here" if entry.present else "-",
            entry.how,
        )
        for entry in catalogue()
    ]
    table(["name", "what", ">classes", "image", "files", "how to get it"], rows)
    say(f"a part of any train split: NAME@PART with PART one of {ALLOWED}")
    say(f"data root: {data_root()}")


@app.command(epilog="Example: companion data get mnist")
def get(name: Name) -> None:
    """Download a dataset into the data root (unless it is there), then compare its checksums."""
    from companion import data

    say(f"{name}: complete, in {data.get(name)}")


@app.command(epilog="Example: companion data check digits")
def check(name: Name) -> None:
    """Read a dataset, compare checksums, and say what it holds. Exit code 1 if it is not here."""
    from companion import data

    report = data.check(name)
    if not report.present:
        say(f"{report.label} is not in {report.where}: {', '.join(report.missing)} missing.")
        say(f"How to get it: {report.how}")
        raise typer.Exit(1)
    say(f"{report.label}" + (f" in {report.where}" if report.where else " (embedded)"))
    for split, shape, counts in (
        ("train", report.train_shape, report.train_counts),
        ("test", report.test_shape, report.test_counts),
    ):
        assert shape is not None
        n, *image = shape
        say(
            f"{split}: {n:,} images of {'×'.join(map(str, image))}, "
            f"{min(counts):,} to {max(counts):,} in each of {len(counts)} classes"
        )
    for file in report.files:
        say(f"{file.path.name}: {size(file.size)}, checksum {file.checksum}")
    for text in report.notes:
        say(text)
    say(f"fingerprint {report.fingerprint}")
