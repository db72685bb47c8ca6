"""``companion data``: the datasets by name, whether they are here, and how to get them."""

from __future__ import annotations

from typing import Annotated

import typer

from companion.cli.console import print_table, say, size

app = typer.Typer(no_args_is_help=True, help="Datasets: list, download, check.")

Name = Annotated[str, typer.Argument(help="A name that `companion data list` shows.")]


@app.command("list", epilog="Example: companion data list")
def list_datasets() -> None:
    """Show every dataset that has a name, whether it is here, and how to get it."""
    from companion.core.locations import data_root
    from companion.data import catalogue
    from companion.data.parts import ALLOWED

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
    print_table(["name", "what", ">classes", "image", "files", "how to get it"], rows)
    say("of a text: tokens in its vocabulary, and in a window")
    say("options of a text, quoted: 'NAME?vocab=1024&window=128'")
    say(f"a part of any train split of images: NAME@PART with PART one of {ALLOWED}")
    say(f"data root: {data_root()}")


@app.command("get", epilog="Example: companion data get mnist")
def download_dataset(name: Name) -> None:
    """Download a dataset into the data root (unless it is there), then compare its checksums.

    A text needs Hugging Face's library: pip install 'companion[hub]'.
    """
    from companion import data

    say(f"{name}: complete, in {data.download(name)}")


@app.command("check", epilog="Example: companion data check digits")
def say_what_it_holds(name: Name) -> None:
    """Read a dataset, compare checksums, and say what it holds. Exit code 1 if it is not here."""
    from companion import data

    report = data.check_dataset(name)
    if not report.present:
        place = f" is not in {report.where}" if report.where else ""
        say(f"{report.label}{place}: {', '.join(report.missing)} missing.")
        say(f"How to get it: {report.how}")
        for text in report.notes:
            say(text)
        raise typer.Exit(1)
    say(f"{report.label}" + (f" in {report.where}" if report.where else " (embedded)"))
    facts = report.text
    if facts:
        say(f"tokenizer: {facts.tokenizer}, {facts.vocabulary:,} tokens in its vocabulary")
    for split in ("train", "test"):
        n, *shape = getattr(report, f"{split}_shape")
        if facts:
            of = getattr(facts, split)
            say(
                f"{split}: {n:,} windows of {shape[0]} tokens; {of.tokens:,} tokens, {of.bytes:,} "
                f"bytes, {of.words:,} words; {of.bytes_per_token:.2f} bytes per token"
            )
        else:
            counts = getattr(report, f"{split}_counts")
            say(
                f"{split}: {n:,} images of {'×'.join(map(str, shape))}, "
                f"{min(counts):,} to {max(counts):,} in each of {len(counts)} classes"
            )
    if facts:
        say(f"evaluated on {facts.evaluated_on}")
    for file in report.files:
        say(f"{file.path.name}: {size(file.size)}, checksum {file.checksum}")
    for text in report.notes:
        say(text)
    say(f"fingerprint {report.fingerprint}")
