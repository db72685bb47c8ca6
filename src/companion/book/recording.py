"""Record a chapter's results on this machine: its own cells, in pieces, into one small JSON file.

    companion record 01_instability --profile gpu -p dataset=mnist --time-limit 540

The chapter is the only definition of its experiments. Its code cells run here one after the other,
without Jupyter; what they put on the page (:mod:`companion.report.page`) is kept instead of shown.
Runs and pairs go to the run store as always, so a recording that was stopped goes on where it was,
also from a store that was carried to another machine (``companion runs export``); or it is closed
with what is measured by then (:func:`close`), on any machine. The result is
``data/recorded/<chapter>/<name>.json``, and nothing else is written outside the store.

What is read back from these files: :mod:`companion.report.recorded`.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import hashlib
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml

from companion.book import parameters
from companion.book.chapter import Cell, cells
from companion.book.layout import Book
from companion.book.prose import Caption, captions, give, merged, places
from companion.core import closing, codec, deadline, files, plainyaml
from companion.core.errors import (
    BadParameter,
    CompanionError,
    CorruptData,
    CorruptEntry,
    DeviceUnavailable,
    MissingData,
    OutOfTime,
    StoreUnwritable,
    one_of,
)
from companion.core.runs import Entry, Store
from companion.data import resolve_device
from companion.experiments.budget import Cost, Count, count, submitted
from companion.report import claims, page, partly, provenance
from companion.report.recorded import FORMAT, LIMIT, NAME, folder, hardware
from companion.training import ENGINES, using

MARGIN_S = 20.0
"""A recording stops this long before its limit (a tenth of it, if that is less): time to store."""


LOST = "The recording was closed before everything that this figure speaks of was measured."
"""In place of a caption whose numbers are missing."""


class RecordingFailed(CompanionError):
    """A cell of the chapter failed, or its result cannot be written."""


_MACHINE = "machine.json"
_ORIGIN = ("code", "python", "packages", "os", "cpu", "gpu")  # of a provenance record


class _Planned(Exception):
    """The budget was printed, and nothing more was asked for."""


@dataclass(frozen=True)
class Recording:
    """What to record.

    Arguments:
        book: the book.
        name: the file's name, without ``.json``.
        chapter, profile: by name.
        overrides: parameters that differ from the profile's.
        cells: the chapter's code.
        captions: those of its Markdown.
        values: what profile and overrides set.
        parameters: every parameter of the chapter, and its value here.
        problems: pictures that failed while it ran; their numbers are not in the result.
    """

    book: Book
    chapter: str
    profile: str
    overrides: Mapping[str, Any]
    name: str
    cells: Sequence[Cell]
    captions: Sequence[Caption]
    values: Mapping[str, Any]
    parameters: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def target(self) -> Path:
        """The file that the result goes to."""
        return folder(self.book.root) / self.chapter / f"{self.name}.json"

    def identity(self) -> dict[str, Any]:
        """Names the recording's own entry in the run store, where its time is kept."""
        values = codec.to_json(self.parameters, "parameters", null=True)
        return {"kind": "recording", "chapter": self.chapter, "parameters": values}


def prepare(
    book: Book, chapter_name: str, profile: str, settings: Sequence[str] = (), name: str = ""
) -> Recording:
    """Read chapter, profile and settings, and refuse what is wrong before anything runs.

    Arguments:
        book: the book.
        chapter_name, profile: by name.
        settings: ``NAME=VALUE``, the value read as YAML; they come after the profile's.
        name: of the file; by default the profile, and what the settings change.

    Raises:
        BadParameter: an unknown chapter, profile or parameter, a value of another type, a name that
            is no file name, a folder that cannot be written.
    """
    where = f"chapters/{chapter_name}.md"
    text = book.source(chapter_name).read_text(encoding="utf-8")
    _, blocks = captions(text, places(book, chapter_name))
    source = parameters.cell_of(book, chapter_name)
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, value = _setting(setting)
        if key in overrides:
            raise BadParameter(f"-p: {key} is given twice ({setting!r} is the second).")
        overrides[key] = value
    declared = parameters.declared(source, where)
    parameters.check(overrides, declared, "-p")
    values = parameters.profile_values(book, profile, chapter_name, source)
    if not values and profile != "quick":  # the result would be called what it is not
        raise BadParameter(f"profile {profile}: it sets nothing for {chapter_name}.")
    values |= overrides
    name = name or "-".join([profile, *(_slug(n, v) for n, v in overrides.items())])
    if not re.fullmatch(NAME, name):
        raise BadParameter(
            f"--name: {name!r} is needed as a file name: up to 80 lower-case letters, digits, "
            "points, hyphens and underscores."
        )
    every = {name: values.get(name, p.default) for name, p in declared.items()}
    code = [cell for cell in cells(text, where) if "solution" not in cell.tags]  # for readers
    found = Recording(book, chapter_name, profile, overrides, name, code, blocks, values, every)
    folder = found.target.parent
    exists = next(p for p in (folder, *folder.parents) if p.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        raise BadParameter(f"record: {folder} cannot be written ({exists} is not writable).")
    return found


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise BadParameter(f"-p: {text!r} is not NAME=VALUE, such as dataset=mnist.")
    try:
        return name, plainyaml.parse(value)
    except yaml.YAMLError as error:
        raise BadParameter(f"-p {name}: {value!r} is not valid YAML.") from error


def _slug(name: str, value: Any) -> str:
    text = str(value) if name == "dataset" else f"{name}-{value}"
    return re.sub(r"[^a-z0-9]+", "-", Path(text).name.lower()).strip("-")


@dataclass
class _Piece:
    """One call's share of a recording. ``lost``: names that closing it has left out."""

    recording: Recording
    entry: Entry
    dry_run: bool
    commit: str | None
    say: Callable[[str], None]
    stdout: TextIO
    budget: page.Budget | None = None
    lost: set[str] = field(default_factory=set)

    def on_budget(self, declared: page.Budget) -> None:
        """Print what is to be done and how long it may take; stop here if that was all."""
        self.budget = declared
        if closing.active():
            return
        with contextlib.redirect_stdout(self.stdout):  # the cells' own output goes nowhere
            self.announce()
        if self.dry_run:
            raise _Planned
        with contextlib.suppress(StoreUnwritable):
            self.entry.write_json(_MACHINE, self.machine())

    def machine(self) -> dict[str, Any]:
        """Where this is measured: what :func:`closing.closed` takes."""
        assert self.budget is not None
        found = {k: v for k, v in provenance.record().items() if k in _ORIGIN}
        if self.commit:
            found["code"] = {"commit": self.commit, "changed": None}
        return {"device": str(resolve_device(self.budget.device)), **found}

    def costs(self) -> list[Cost]:
        assert self.budget is not None
        b = self.budget
        return count(b.plans, device=b.device)

    def announce(self) -> None:
        assert self.budget is not None
        b, costs = self.budget, self.costs()
        for cost in costs:
            left, whole = cost.missing, cost.whole
            measured = [f"{k} {left.measured.get(k, 0)} of {n}" for k, n in whole.measured.items()]
            self.say(
                f"{cost.recipe.net}, T = {cost.recipe.steps}, lr {cost.recipe.lr:g}: "
                f"{left.runs} of {whole.runs} runs to train ({left.steps:,} of "
                f"{whole.steps:,} steps), to measure: {', '.join(measured) or 'nothing'}"
            )
        if not any(cost.missing for cost in costs):
            self.say("everything is in the run store: nothing is left to compute")
            return
        if not self.dry_run and resolve_device(b.device).type == "cuda":
            # A probe takes one or two seconds a recipe, and here they may be counted.
            self.say("no estimate while recording on a GPU; --dry-run makes one")
            return
        for line in submitted(costs, b.evaluation, device=b.device, workers=b.workers):
            self.say(line)

    def progress(self) -> str:
        """What the store has by now, in one sentence."""
        if self.budget is None:
            return "What is finished is stored."
        costs = self.costs()
        left = sum((c.missing for c in costs), Count())
        whole = sum((c.whole for c in costs), Count())
        done = [f"{k} {n - left.measured.get(k, 0)} of {n}" for k, n in whole.measured.items()]
        counts = ", ".join([f"{whole.runs - left.runs} of {whole.runs} runs", *done])
        return f"Stored: {counts}, and the states of the runs at work."


def record(
    recording: Recording,
    *,
    time_limit: float | None = None,
    started: float | None = None,
    dry_run: bool = False,
    commit: str | None = None,
    engine: str = "auto",
    say: Callable[[str], None] = print,
) -> Path | None:
    """Run the chapter's cells and write the result.

    Arguments:
        recording: from :func:`prepare`.
        time_limit: seconds after ``started`` (``time.monotonic``; default: now) before which to
            have stopped; None: no limit.
        dry_run: print the budget and stop.
        commit: of the code, if it is not what git says here (a copy without its history).
        engine: one of :data:`companion.training.ENGINES`, for all training on a GPU.
        say: prints one line.

    Returns:
        the file; None after a dry run.

    Raises:
        BadParameter: no such engine, or a limit of no time.
        OutOfTime: stopped before the limit; the same call goes on. No result is written.
        RecordingFailed: a cell failed, or the result is larger than :data:`LIMIT` bytes.
    """
    began = time.monotonic()
    one_of("--gpu-engine", engine, ENGINES)
    end = None
    if time_limit is not None:
        if not time_limit > 0:
            raise BadParameter(f"--time-limit: {time_limit:g} must be above 0 seconds.")
        start = began if started is None else started
        end = start + time_limit - min(MARGIN_S, time_limit / 10)
    entry = Store().entry(recording.identity())
    piece, refused = _Piece(recording, entry, dry_run, commit, say, sys.stdout), False
    known = bool(entry.files())
    try:
        with page.captured(piece.on_budget) as found, deadline.until(end), using(engine):
            _run_cells(piece)
    except _Planned:
        return None
    except (BadParameter, MissingData, CorruptData, DeviceUnavailable):
        refused = True
        if not known:  # nothing was done before, and nothing is kept of it
            entry.discard()
        raise
    except OutOfTime as error:
        raise OutOfTime(f"stopped before the time limit. {piece.progress()}") from error
    finally:
        if not dry_run and not refused:
            spent = {"seconds": round(time.monotonic() - began, 1)}
            with contextlib.suppress(StoreUnwritable):  # only the time; do not hide what went wrong
                entry.write_json(f"piece-{time.time_ns()}.json", spent)
    if dry_run:
        say("the chapter declares no budget (page.budget): nothing to estimate")
        return None
    document = _document(recording, found, commit)
    return _write(recording.target, document | _spent([entry]))


def _spent(entries: Sequence[Entry]) -> dict[str, Any]:
    """Seconds and pieces of recordings."""
    pieces = []
    for entry in entries:
        for name in sorted(n for n in entry.files() if n.startswith("piece-")):
            with contextlib.suppress(CorruptEntry):  # a lost time is no reason to lose the numbers
                pieces.append(float(entry.read_json(name)["seconds"]))
    return {"seconds": round(sum(pieces), 1), "pieces": len(pieces)}


def close(
    recording: Recording,
    *,
    commit: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the result of a recording that was stopped, from what is measured. Nothing is computed.

    It needs the numbers alone, on any machine: ``companion runs export FILE --kind pair --kind null
    --kind recording`` and whatever else the chapter measures. What is missing is left out and
    counted (``missing`` in the file, kind of entry -> number); claims that need it are "not
    testable". Where inits or fork steps are missing altogether, closing it under parameters that
    name those that are there gives more.

    Arguments:
        recording: from :func:`prepare`, with the parameters of the stopped one, or others under
            which more is whole.
        commit: of the code, where neither git nor the stopped recording says.
        say: prints one line.

    Raises:
        BadParameter: the store does not say where this chapter was recorded, or names several
            machines; the file is there already, from a recording that was not closed.
        RecordingFailed: nothing that a claim needs is measured.
    """
    if (path := recording.target).exists():
        known: Any = None
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_bytes())
        if not (isinstance(known, dict) and known.get("closed")):
            said = f"{path} is there already, and was not closed. Give another --name."
            raise BadParameter(f"--close: {said}")
    entry = Store().entry(recording.identity())
    own, machine = _origin(entry, recording)
    piece = _Piece(recording, entry, False, commit, say, sys.stdout)
    with page.captured(piece.on_budget) as found, closing.closed(machine) as lacking:
        _run_cells(piece)
    missing = {kind: len(keys) for kind, keys in sorted(lacking.items())}
    if not found.all("claims") or not found.all("provenance"):
        left_out = "\n".join(recording.problems)
        raise RecordingFailed(f"--close: too much is missing ({missing}). Left out:\n{left_out}")
    document = _document(recording, found, commit, closed=True)
    counts = ", ".join(f"{number} × {kind}" for kind, number in missing.items())
    for claim in document["claims"]:
        if claim["verdict"] == claims.NOT_TESTABLE:
            claim["note"] = claim["note"] or closing.WHY
        elif missing:  # a mean over fewer pairs, a maximum over fewer points
            fewer = f"closed before everything was measured, missing: {counts}"
            claim["note"] = f"{claim['note']}; {fewer}" if claim["note"] else fewer
    if all(claim["verdict"] == claims.NOT_TESTABLE for claim in document["claims"]):
        raise RecordingFailed(
            f"--close: nothing that a claim needs is measured (missing: {missing}). Import the "
            "archive of the recording first (companion runs import FILE)."
        )
    document |= _spent(own)
    document |= {"closed": True, "missing": missing}
    say(f"closed; missing: {counts or 'nothing'}")
    return _write(recording.target, document)


def _origin(entry: Entry, recording: Recording) -> tuple[list[Entry], dict[str, Any]]:
    """The stopped recordings of the chapter, and the one machine they ran on.

    The recording's own entry; without one, all of the chapter, for one that is closed under other
    parameters than it was stopped with.
    """
    alike = [
        e
        for e in entry.store.entries()
        if (e.identity.get("kind"), e.identity.get("chapter")) == ("recording", recording.chapter)
    ]
    found = [e for e in (entry,) if _MACHINE in e] or [e for e in alike if _MACHINE in e]
    machines = [dict(e.read_json(_MACHINE)) for e in found]
    places = sorted({f"{m['device']}, {hardware(m)}" for m in machines})
    if len(places) != 1:
        said = f"it names {' and '.join(places)}" if places else "it does not say"
        raise BadParameter(
            f"--close: the run store has to say where {recording.chapter} was recorded; {said}. "
            "Take the entries of that recording along (companion runs export --kind recording), "
            "and close it with its own parameters."
        )
    return found, machines[0]


def _run_cells(piece: _Piece) -> None:
    """Execute the cells in one namespace, with the parameters set as papermill sets them."""
    import matplotlib

    matplotlib.use("Agg")
    r = piece.recording
    sources: list[str] = []
    namespace: dict[str, Any] = {"__name__": "__main__", "In": sources}
    path = str(r.book.source(r.chapter))
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in r.cells:
            deadline.stop_if_passed()
            sources.append(cell.source)
            _execute(cell.source, cell.line, path, namespace, piece)
            if "parameters" in cell.tags:
                namespace |= dict(r.values)


def _execute(source: str, line: int, path: str, namespace: dict[str, Any], piece: _Piece) -> None:
    where = f"chapters/{Path(path).name}"

    def failed(statement: ast.stmt, error: Exception) -> None:  # left out of one that is closed
        what = f"{type(error).__name__}: {error}"
        piece.recording.problems.append(f"{where}, line {statement.lineno}: {what}")

    try:
        tree = ast.parse(source, path)
        ast.increment_lineno(tree, line - 1)
        if closing.active():
            partly.execute(tree, path, namespace, piece.lost, failed)
            return
        exec(compile(tree, path, "exec", dont_inherit=True), namespace)
    except (CompanionError, _Planned):
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        at = f"{where}, line {lines[-1] if lines else line}: {type(error).__name__}: {error}"
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if f"{os.sep}matplotlib{os.sep}" in last:  # a picture: the numbers are worth more
            piece.recording.problems.append(at)
            return
        shown = "".join(traceback.format_exception(error)).rstrip().splitlines()[-16:]
        raise RecordingFailed(
            f"{at}\n" + "\n".join(shown) + "\nNo result was written; what is computed is stored."
        ) from error
    finally:
        import matplotlib.pyplot as plt

        plt.close("all")


def _document(
    r: Recording, found: page.Captured, commit: str | None, *, closed: bool = False
) -> dict[str, Any]:
    """The result as plain JSON types."""
    provenance = next(iter(found.all("provenance")), None)
    claims = [entry for group in found.all("claims") for entry in group]
    if provenance is None or not {"dataset", "device"} <= set(provenance) or not claims:
        raise RecordingFailed(
            f"chapters/{r.chapter}.md: a recording needs verdicts (claims.show), and provenance "
            "with `dataset` and `device` (provenance.show); the chapter shows no such thing."
        )
    if commit:
        provenance = {**provenance, "code": {"commit": commit, "changed": None}}
    figures, tables = found.all("figure"), found.all("table")
    at = places(r.book, r.chapter)
    values = merged(found.all("values"), at(""))
    missing = LOST if closed else None
    for block in give(figures, tables, r.captions, values, at, missing=missing):
        # Its figure failed, or was left out: then that is said already.
        if not r.problems:
            raise RecordingFailed(f"{block.where}: no figure or table is called {block.name!r}.")
    document: dict[str, object] = {
        "format": FORMAT,
        "chapter": r.chapter,
        "profile": r.profile,
        "name": r.name,
        "overrides": dict(r.overrides),
        "parameters": dict(r.parameters),
        "dataset": provenance["dataset"],
        "hardware": hardware(provenance),
        "scale": claims[0]["scale"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "claims": [{k: v for k, v in c.items() if k != "scale"} for c in claims],
        "figures": {f["name"]: f for f in figures},
        "tables": tables,
        "values": values,
        "problems": list(r.problems),
        "provenance": provenance,
        "source": _source(r),
    }
    return codec.to_json(document, "record", null=True)


def _source(r: Recording) -> str:
    """SHA-256 of the package and the chapter: what computed this, also without git."""
    total = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in (*sorted(package.rglob("*.py")), r.book.source(r.chapter)):
        name = path.relative_to(package).as_posix() if path.is_relative_to(package) else path.name
        total.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n".encode())
    return total.hexdigest()


def _write(path: Path, document: Mapping[str, Any]) -> Path:
    """Write the file whole or not at all; one line a field, so that git shows what changed."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    lines = ",\n".join(f"{compact(key)}: {compact(value)}" for key, value in document.items())
    content = f"{{\n{lines}\n}}\n".encode()
    if len(content) > LIMIT:
        largest = max(document["figures"].values(), key=lambda f: len(compact(f)), default=None)
        hint = f" The largest figure's data is that of {largest['name']!r}." if largest else ""
        raise RecordingFailed(
            f"{path} would have {len(content) / 1e6:.2f} MB; recorded files have "
            f"{LIMIT / 1e6:g} MB at most. Nothing was written; what is computed is stored.{hint}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise RecordingFailed(f"record: {path} cannot be written ({error.strerror}).") from error
    return path
