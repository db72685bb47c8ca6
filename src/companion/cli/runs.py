"""``companion runs``: what the run store holds, whether it is whole, what may go or travel."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli.console import print_table, say, size
from companion.core import codec
from companion.core.errors import CorruptEntry, StoreUnreadable, one_of

if TYPE_CHECKING:
    from companion.core.runs import Entry, Store

app = typer.Typer(no_args_is_help=True, help="The run store: list, show, verify, carry, clean up.")

_STEP = re.compile(r"(?:state|weights)-(\d+)\.safetensors")


def stored_steps(entry: Entry) -> dict[int, list[str]]:
    """Step -> the files of ``entry`` that hold the network at that step, in order of steps."""
    found: dict[int, list[str]] = {}
    for name in sorted(entry.files()):
        if match := _STEP.fullmatch(name):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items()))


def known_kinds() -> list[str]:
    """Every kind of entry: runs, all registered measurements, and what is kept beside them."""
    from companion.experiments.measurement import kinds

    return ["run", "mask", *kinds(), "windows", "recording"]


def describe_entry(identity: Mapping[str, Any]) -> str:
    """One line on what an entry is."""
    from companion.experiments.measurement import kinds

    kind = str(identity.get("kind"))
    try:
        if kind == "run":
            return _describe_run(identity)
        if kind == "mask":
            return f"mask: {identity['rule']}, {identity['density']:.1%} of the weights left"
        if kind == "windows":
            return f"windows of text to measure on, SHA-256 {identity['windows'][:12]}"
        if kind == "recording":
            return f"time spent on recording {identity['chapter']}"
        measured = kinds()
        if kind in measured:
            return measured[kind].describe(identity)
    except Exception:  # of any shape: whatever is wrong in it, the other entries are to be seen
        return "unreadable"
    return kind if identity else "unreadable"


def _describe_run(identity: Mapping[str, Any]) -> str:
    recipe = identity["recipe"]
    words = [recipe["net"], f"on {recipe['data']}", f"T={recipe['steps']}"]
    words += [
        f"{name} {identity[name]}"
        for name in ("init", "order", "augment", "perturb")
        if name in identity
    ]
    if fork := identity.get("fork"):
        words.append(f"fork k={fork['step']}")
    if mask := identity.get("mask"):
        words.append(f"mask {mask[:12]}")
    return ", ".join(words) + ("" if identity["device"] == "cpu" else f", {identity['device']}")


def is_current(store: Store) -> Callable[[Mapping[str, Any]], bool]:
    """A predicate on identities: would this version of the code still ask for that entry?

    A run counts while its own semantics and those of all runs it forks from are today's; what is
    measured, while its class says so. Whatever refers by key to a run or mask that is in the store,
    and is old, is old too. Other kinds are kept: whoever wrote them knows better.
    """
    from companion import training
    from companion.experiments.measurement import kinds

    measured = kinds()

    old: set[str] = set()

    def run_current(identity: Mapping[str, Any]) -> bool:
        fork = identity.get("fork")
        own: bool = identity.get("semantics") == training.SEMANTICS
        return (
            own
            and identity.get("mask") not in old
            and (fork is None or run_current(fork["parent"]))
        )

    def counts(identity: Mapping[str, Any]) -> bool:
        kind = str(identity.get("kind"))
        if kind == "run":
            return run_current(identity)
        fields = [field if isinstance(field, list) else [field] for field in identity.values()]
        if not old.isdisjoint(v for field in fields for v in field if isinstance(v, str)):
            return False
        if kind == "mask":
            rule = training.MaskRecipe.rules.get(str(identity.get("rule")))
            return bool(rule and identity.get("semantics") == rule.SEMANTICS)
        return kind not in measured or measured[kind].is_current(identity)

    def current(identity: Mapping[str, Any]) -> bool:
        try:
            return counts(identity)
        except Exception:  # of a shape that no code of ours writes: not ours to delete
            return True

    made = {e.key: e.identity for e in store.entries() if e.identity.get("kind") in ("run", "mask")}
    # A mask names the run it was pruned from, and a run its mask: until nothing more is old.
    while more := {key for key, identity in made.items() if not current(identity)} - old:
        old |= more
    return current


@app.command("list", epilog="Example: companion runs list --kind run")
def list_entries(
    kind: Annotated[str | None, typer.Option(help="Only this kind, such as run or pair.")] = None,
) -> None:
    """Show what is in the run store: key, kind, what it is, which steps are stored, size."""
    from companion.core.runs import Store

    store = Store()
    entries = list(store.entries())
    said = {e.key: describe_entry(e.identity) for e in entries}
    entries.sort(key=lambda e: (str(e.identity.get("kind")) != "run", said[e.key]))
    if kind is not None:
        there = {str(e.identity.get("kind")) for e in entries if e.identity}
        one_of("kind", kind, list(dict.fromkeys([*known_kinds(), *sorted(there)])))
        entries = [e for e in entries if e.identity.get("kind") == kind]
    rows, total = [], 0
    for entry in entries:
        try:
            count, steps = entry.bytes(), stored_steps(entry)
            shown = ", ".join(map(str, steps)) if len(steps) < 6 else f"{len(steps)} steps"
        except CorruptEntry:
            count, shown = 0, "corrupt"
        except StoreUnreadable:
            count, shown = 0, "unreadable"
        total += count
        name = str(entry.identity.get("kind", "?"))
        rows.append((entry.key[:12], name, said[entry.key], shown, size(count)))
    if rows:
        print_table(["key", "kind", "what", "steps stored", ">size"], rows)
    say(f"{len(rows)} entries, {size(total)}, in {store.root}")


@app.command("show", epilog="Example: companion runs show 3fa9c1")
def show_entry(
    key: Annotated[str, typer.Argument(help="The first 4 or more digits of a key.")],
) -> None:
    """Show one entry: its identity, its files, and a pair's barrier."""
    from companion.connectivity import Barrier
    from companion.core.runs import Store

    entry = Store().find(key)
    say(entry.key)
    say(describe_entry(entry.identity))
    say(json.dumps(entry.identity, indent=1, sort_keys=True, ensure_ascii=False))
    files = [(n, size(f["bytes"]), f["sha256"][:12]) for n, f in sorted(entry.files().items())]
    print_table(["file", ">size", "sha256"], files)
    if entry.identity.get("kind") == "pair" and "pair.json" in entry:
        found = codec.from_json(Barrier, entry.read_json("pair.json")["barrier"])
        say(str(found))
    say(f"in {entry.path}")


@app.command(epilog="Example: companion runs verify")
def verify(
    key: Annotated[str | None, typer.Argument(help="One entry; without it, all of them.")] = None,
) -> None:
    """Read every stored byte and compare it with its checksum. Exit code 1 if anything is wrong."""
    from companion.core.runs import Store

    store = Store()
    entries = [store.find(key)] if key else list(store.entries())
    problems = [line for entry in entries for line in entry.verify()]
    problems += [f"run store: {path} is a link; none is followed" for path in store.links()]
    for line in problems:
        say(line)
    say(f"{len(entries)} entries read, {len(problems)} problems, in {store.root}")
    if problems:
        say("A command that needs such an entry makes it again; `companion runs gc` removes it.")
        raise typer.Exit(1)


Archive = Annotated[Path, typer.Argument(help="A file; its name should end in .tar.")]


@app.command("export", epilog="Example: companion runs export carried.tar")
def export_entries(
    archive: Archive,
    keys: Annotated[
        list[str] | None, typer.Argument(help="Only these entries; without them, all.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind; may be given several times.")
    ] = None,
) -> None:
    """Write entries to one file, to carry them to another machine's store.

    Measured pairs need no networks: `--kind pair --kind null --kind recording` makes a small file.
    """
    from companion.core import archive as archives
    from companion.core.runs import Store

    for name in kind or []:
        one_of("kind", name, known_kinds())
    moved = archives.write_archive(
        archives.chosen_entries(Store(), kind or (), keys or ()), archive
    )
    say(f"{moved.entries} entries, {moved.files} files, {size(moved.bytes)}, in {archive}")


@app.command("import", epilog="Example: companion runs import carried.tar")
def import_entries(archive: Archive) -> None:
    """Add the entries of an exported file to the store. What is here already stays as it is."""
    from companion.core import archive as archives
    from companion.core.runs import Store

    store = Store()
    moved = archives.read_archive(archive, store)
    say(
        f"{moved.entries} entries: {moved.files} files, {size(moved.bytes)} added, "
        f"{moved.kept} were here, in {store.root}"
    )


@app.command(epilog="Example: companion runs gc --dry-run")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Remove what no longer counts: made by older code, corrupt, left by killed writes."""
    from companion.core.runs import Store

    store = Store()
    current = is_current(store)
    found = store.garbage(current)
    if not found:
        say(f"nothing to remove in {store.root}")
        return
    weights = {path: _weight(path) for path, _ in found}
    locks = [path for path, _ in found if path.suffix == ".lock"]
    rows = [
        (str(path.relative_to(store.root)), why, size(weights[path]))
        for path, why in found
        if path not in locks
    ]
    if locks:
        what = str(locks[0].parent.relative_to(store.root))
        rows.append((what, f"{len(locks)} locks that nobody holds", size(0)))
    print_table(["what", "why", ">size"], rows)
    say(f"{len(found)} to remove, {size(sum(weights.values()))}, in {store.root}")
    if dry_run:
        return
    if not yes:
        typer.confirm("Delete them?", abort=True)
    left = dict(store.clear(found, current))
    gone = [path for path, _ in found if path not in left]
    say(f"removed {len(gone)}, {size(sum(weights[path] for path in gone))}")
    for path, why in left.items():
        say(f"still there: {path.relative_to(store.root)}: {why}")
    if left:
        raise typer.Exit(1)


def _weight(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, as far as they can be seen."""
    inside = [path] if not path.is_dir() else [p for p in path.rglob("*") if p.is_file()]
    total = 0
    for one in inside:
        with suppress(OSError):
            total += one.lstat().st_size
    return total
