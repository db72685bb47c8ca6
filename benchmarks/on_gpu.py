"""All that a few minutes of a GPU are for, in one command: is it right, how fast, and the records.

    make gpu-pack                                              # at home: data and commit
    python3 benchmarks/on_gpu.py --minutes 6 --out DIR         # on the GPU machine
    python benchmarks/on_gpu.py --unpack DIR                   # at home: results into place
    python benchmarks/on_gpu.py --rehearse --out DIR           # anywhere: the same, tiny, on a CPU

The stages run in order of worth, each in processes of its own and for a limited time; one that
fails or hangs stops no other, and what is done is on disk before the next one starts. First every
record is tried out, all side by side and tiny, beside the tests: what breaks should break in the
first minute. The records run ``--lanes`` at a time, as none of them fills the device all the while.
A second call goes on where the first stopped: with the same ``--out``, or with ``--carry`` and the
archive that the first one left; ``--stages tried right speed`` is a first call that only looks.
The machine needs a plain ``python3`` with torch, and neither git nor Jupyter nor a network.

``--out`` gets five files, each below 16 MB: ``table.txt``, ``log.txt``, ``stages.json``,
``engine.json`` and ``carry.tar.gz``, which holds the others' state, the records, and the measured
entries of the run store.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gpu_pack
from gpu_sizes import DESIGNS, SLOW, TINY, TRIALS, Design, Sized, Trial, size, speeds

ROOT = Path(__file__).resolve().parents[1]
PACK_S = 15.0
"""Seconds at the end that no stage gets: to pack what there is."""
LIMIT = 15_500_000
"""Bytes of the archive; a file of 16 MB comes back, and a little is kept free."""
LOG_LIMIT, LOGS_LIMIT = 700_000, 12_000_000
"""Bytes that one stage's log, and the whole log, may have; of a longer one the middle goes."""
ATTEMPTS = 2
"""A stage that failed is tried once more, in the next call."""
ROOM = 8_000_000_000
"""Bytes that have to be free in memory for the run store to lie there."""
LANES = 2
"""Records that run at a time."""
UNFINISHED = 75
"""Exit code of a record that stopped before its limit; the same command goes on."""

MEASURED = (
    *("pair", "null", "recording", "aligned", "merged", "halves", "layers", "features"),
    *("federated", "landscape", "logits", "bend", "subnetwork", "agreed", "windows"),
)
"""Kinds of entries that travel: all but the runs, whose weights are large."""

SETTLED = ("done", "given up")
GOES_ON = ("unfinished", "interrupted")
"""States of a stage that goes on with what it was sized for: another T would be other runs."""


# ---- one process, and where


@dataclass(frozen=True)
class Site:
    """Where a call works.

    Arguments:
        out: gets the results; work: run store, data and caches, large and fast.
        commit: of the code; tiny: a rehearsal on a CPU.
        data: the data root, if it is not ``work/data``.
    """

    out: Path
    work: Path
    commit: str
    tiny: bool = False
    data: Path | None = None

    @property
    def book(self) -> Path:
        """The chapters' copy that records are made in, so that the tree stays as it is."""
        return self.work / "book"

    @property
    def recorded(self) -> Path:
        return self.book / "data" / "recorded"

    @property
    def log(self) -> Path:
        return self.out / "log.txt"

    def environment(self) -> dict[str, str]:
        """Of every child; absolute paths, as children start children elsewhere."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # read at the first product of a process
            "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # the default runs 8 streams side by side
            # Several processes share the cores; each with all of them would slow all of them.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4)),
            "COMPANION_RUNS": str(self.work / "runs"),
            "COMPANION_DATA": str(self.data or self.work / "data"),
            # Compiled kernels are loaded from there, which a memory file system may not allow.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "companion-inductor"),
            **({"CUDA_VISIBLE_DEVICES": ""} if self.tiny else {}),
        }


@dataclass(frozen=True)
class Step:
    """One process of a stage: its command and its limit in seconds."""

    words: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code, or None if it was killed at its limit; what it said."""

    code: int | None
    log: str


@dataclass(frozen=True)
class Planned:
    """What a stage will do: its processes, and what the next call has to know of it.

    Arguments:
        together: they run side by side, instead of one after the other.
    """

    steps: tuple[Step, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    together: bool = False


@dataclass(frozen=True)
class Stage:
    """One line of the table.

    Arguments:
        limit_s: for all its processes together; least_s: with less it is not started.
        plan: given the seconds it gets and its notes of an earlier call: the processes, or why it
            is left out.
        finish: the outcomes -> state (``done``, ``failed``, ``unfinished``) and result.
        group: stages of one group that follow each other may run side by side; without one it has
            the machine to itself.
    """

    name: str
    limit_s: float
    least_s: float
    plan: Callable[[Site, float, Mapping[str, Any]], Planned | str]
    finish: Callable[[Site, Sequence[Outcome], Mapping[str, Any]], tuple[str, str]]
    group: str = ""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; return when they are gone, as their memory has to be.

    Those that do not listen are killed. The group outlives its leader while a child of it does.
    """
    for sign, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 1.0)):
        until = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
            while time.monotonic() < until:
                process.poll()  # a leader that nobody waits for stays in its group
                os.killpg(process.pid, 0)
                time.sleep(0.02)


class Desk:
    """Processes at work, so that all of them can be ended at once, and the one log they share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stopped = False
        self._working: set[subprocess.Popen[bytes]] = set()

    def start(self, process: subprocess.Popen[bytes]) -> None:
        with self.lock:
            self._working.add(process)
            stopped = self.stopped
        if stopped:
            end_group(process)

    def done(self, process: subprocess.Popen[bytes]) -> None:
        with self.lock:
            self._working.discard(process)

    def stop(self) -> None:
        """End every process, and each that starts from now on."""
        with self.lock:
            self.stopped = True
            working = list(self._working)
        for process in working:
            end_group(process)


def run(step: Step, limit_s: float, site: Site, desk: Desk | None = None) -> Outcome:
    """Run a process in a group of its own; what it said goes to the end of the log when it ends."""
    desk = desk or Desk()
    limit = min(limit_s, step.limit_s)
    head = f"$ {shlex.join(step.words)}  # at most {limit:.0f} s\n"
    start = time.monotonic()
    with tempfile.TemporaryFile(dir=site.work) as own:
        process = subprocess.Popen(
            step.words,
            cwd=ROOT,
            env=site.environment(),
            stdin=subprocess.DEVNULL,
            stdout=own,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            desk.start(process)
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_group(process)
            desk.done(process)
            own.seek(0)
            said = own.read()
            how = "killed at its limit" if code is None else f"exit code {code}"
            foot = f"# {how}, {time.monotonic() - start:.1f} s\n"
            with desk.lock, site.log.open("ab") as log:
                log.write(head.encode() + shortened(said, LOG_LIMIT) + foot.encode())
    return Outcome(code, said.decode(errors="replace"))


def shortened(said: bytes, limit: int) -> bytes:
    """Without its middle, if it is longer than allowed."""
    if len(said) <= limit:
        return said
    cut = f"\n… {len(said) - limit:,} bytes cut …\n".encode()
    return said[: limit // 2] + cut + said[-(limit // 2) :]


def first_error(log: str) -> str:
    """The line of a log that says what went wrong: the first error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        # An exception's name begins its line; pytest puts "E" before it.
        if re.match(
            r"(E +)?([\w.]+(Error|Exception|Failed|Warning)\b|error: |FAILED |ERROR )", line
        ):
            return re.sub(r"^E +", "", line)
    return lines[-1] if lines else "it said nothing"


def why(outcomes: Sequence[Outcome]) -> str:
    """The first outcome that is not a success, in one line."""
    bad = next(o for o in outcomes if o.code != 0)
    if bad.code is None:
        last = bad.log.strip().splitlines()[-1:]
        return f"killed at its limit; last line: {last[0].strip() if last else 'none'}"
    return f"exit code {bad.code}: {first_error(bad.log)}"


# ---- the stages


def python(*words: str | Path) -> tuple[str, ...]:
    """A command of this Python."""
    return (sys.executable, *map(str, words))


def right(tiny: bool) -> Stage:
    """The tests that need a GPU; in a rehearsal what a CPU can run of their kind."""
    folders = ["training", "data", "core", "connectivity", "features"]
    chosen = ["-m", "gpu", "-k", "not compile", *(f"tests/{name}" for name in folders)]
    if tiny:
        chosen = ["-k", "the_null_control_trains", "tests/training/test_replicas.py"]
    # A new warning of a new torch must not fail a test here; the project's options do that.
    plain = ["-q", "-W", "default", "-o", "addopts=", "-p", "no:cacheprovider"]

    def plan(site: Site, slot: float, notes: Mapping[str, Any]) -> Planned:
        return Planned((Step(python("-m", "pytest", *plain, *chosen), slot),))

    def finish(
        site: Site, outcomes: Sequence[Outcome], notes: Mapping[str, Any]
    ) -> tuple[str, str]:
        found = re.findall(
            r"^(?:=+ )?(\d+ (?:passed|failed|skipped).*?)(?: =+)?$", outcomes[0].log, re.M
        )
        summary = found[-1] if found else "no summary"
        if outcomes[0].code == 0:
            return "done", summary
        return "failed", f"{why(outcomes)} ({summary})"

    return Stage("right", SLOW if tiny else 110, 15, plan, finish, group="right")


def tried(tiny: bool, trials: Sequence[Trial]) -> Stage:
    """Every record, so small that only its running counts, all side by side; nothing is kept."""

    def plan(site: Site, slot: float, notes: Mapping[str, Any]) -> Planned:
        steps = []
        for number, trial in enumerate(trials):
            words = ["-m", "companion", "record", trial.chapter, "--profile", trial.profile]
            for setting in trial.settings:
                words += ["-p", setting]
            words += ["--name", f"tried-{number}", "--commit", site.commit]
            words += ["--root", str(site.book), *(["--dry-run"] if trial.dry else [])]
            steps.append(Step(python(*words), slot))
        return Planned(tuple(steps), {}, together=True)

    def finish(
        site: Site, outcomes: Sequence[Outcome], notes: Mapping[str, Any]
    ) -> tuple[str, str]:
        for path in site.recorded.glob("*/tried-*.json"):
            path.unlink()
        bad = [
            f"{trial.stage}: {why([outcome])}"
            for trial, outcome in zip(trials, outcomes, strict=True)
            if outcome.code != 0
        ]
        if bad:
            return "failed", f"{len(bad)} of {len(trials)}: " + "; ".join(bad)
        return "done", f"{len(trials)} of {len(trials)} records run"

    return Stage("tried", SLOW if tiny else 110, 15, plan, finish, group="right")


def speed(tiny: bool) -> Stage:
    """The engines' table: likely winners first, each call with a limit of its own."""

    def plan(site: Site, slot: float, notes: Mapping[str, Any]) -> Planned:
        folder = site.work / "speed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

        def engines(
            number: int, nets: str, which: str, copies: str, limit: float, seconds: float = 0.6
        ) -> Step:
            words = ["--nets", *nets.split(), "--engines", *which.split(), "--copies"]
            words += [*copies.split(), "--seconds", f"{seconds}", "--processes", "0"]
            # No row starts after three quarters of the limit: the last one needs time, too.
            words += ["--time-limit", f"{0.75 * limit:g}"]
            words += ["--json", str(folder / f"{number}.json")]
            return Step(python("benchmarks/engine.py", *words), limit)

        pairs = ("benchmarks/pair_cost.py", "--json", folder / "pairs.json", "--seconds")
        if tiny:
            return Planned(
                (
                    engines(1, "lenet gpt", "loop graphs vmap", "1 2", 200, 0.02),
                    Step(python(*pairs, "0.01"), 100),
                )
            )
        return Planned(
            (
                engines(1, "lenet resnet20", "graphs vmap loop", "9 27 1", 46),
                Step(python(*pairs, "0.3"), 20),
                # The checks of the two large networks alone took half a minute.
                engines(2, "vgg16", "graphs loop", "9 1", 60),
                engines(3, "gpt", "graphs loop", "1", 45),
                # Compiling costs 20 to 90 s a network: what is left, and no more.
                engines(4, "resnet20 lenet gpt", "compile loop-compile", "9", 60),
            )
        )

    def finish(
        site: Site, outcomes: Sequence[Outcome], notes: Mapping[str, Any]
    ) -> tuple[str, str]:
        parts = []
        for path in sorted((site.work / "speed").glob("*.json")):
            with contextlib.suppress(ValueError):  # a process that is killed may leave half a file
                parts.append(finite(json.loads(path.read_text(encoding="utf-8"))))
        found = merged(parts)
        bad = [why([o]) for o in outcomes if o.code != 0]
        if not any("error" not in row for row in found.get("rows", [])):
            return "failed", "; ".join(bad) or "no row was measured"
        write(site.out / "engine.json", found)
        best = [
            f"{net} {c['engine']} M={c['replicas']}: {c['seconds_per_copy']:.3g} s a copy"
            for net, c in found["choice"].items()
        ]
        return "done", "; ".join([*best, *(f"left: {line}" for line in bad)])

    return Stage("speed", SLOW if tiny else 180, 15, plan, finish)


def finite(value: Any) -> Any:
    """The same JSON with null where a number is not finite, as of weights that diverged."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results of ``engine.py`` and ``pair_cost.py`` as one, with one choice a network."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, list):
                found[key] = [*found.get(key, []), *value]
            elif isinstance(value, dict):
                known = found.setdefault(key, {})
                known |= {name: one for name, one in value.items() if name not in known}
            else:
                found.setdefault(key, value)
    found["benchmark"] = "engine"
    best: dict[str, Any] = {}
    targets = {net: c["target_s"] for p in parts for net, c in p.get("choice", {}).items()}
    for row in found.get("rows", []):
        fair = "error" not in row and row.get("finite", True) and row.get("deterministic")
        if not fair or row["engine"] == "processes" or row["net"] not in targets:
            continue
        old = best.get(row["net"])
        if old is None or row["seconds_per_copy"] < old["seconds_per_copy"]:
            best[row["net"]] = {k: row[k] for k in ("engine", "replicas", "seconds_per_copy")}
    found["choice"] = {net: c | {"target_s": targets[net]} for net, c in best.items()}
    return found


def offers(option: str) -> bool:
    """Whether ``companion record`` has an option; read, because importing it costs seconds."""
    text = (ROOT / "src/companion/cli/record.py").read_text(encoding="utf-8")
    name = option.lstrip("-").replace("-", "_")
    return re.search(rf"^    {name}: Annotated", text, re.M) is not None


def recording(design: Design) -> Stage:
    """One record, as long as its slot allows."""

    def plan(site: Site, slot: float, notes: Mapping[str, Any]) -> Planned | str:
        measured = site.out / "engine.json"
        known = speeds(
            json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
        )
        if notes.get("sized"):  # it goes on as it began: another T would be other runs
            sized = Sized(**notes["sized"])
        else:
            found = size(design, slot, known, choose=offers("--gpu-engine"))
            if found is None:
                return f"does not fit: {design.least} steps need more than its {slot:.0f} s"
            sized = found
        words = ["-m", "companion", "record", design.chapter, "--profile", design.profile]
        for setting in sized.settings:
            words += ["-p", setting]
        words += ["--name", design.name, "--commit", site.commit, "--root", str(site.book)]
        words += ["--gpu-engine", sized.engine] if sized.engine else []
        words += ["--time-limit", f"{slot - 5:.0f}"]  # the process needs a moment to end, too
        return Planned((Step(python(*words), slot),), {"sized": asdict(sized)})

    def finish(
        site: Site, outcomes: Sequence[Outcome], notes: Mapping[str, Any]
    ) -> tuple[str, str]:
        sized = Sized(**notes["sized"])
        how = f"T = {sized.steps:,}"
        how += f", engine {sized.engine}" if sized.engine else ""
        source = "measured" if sized.measured else "guessed"
        how += f", {sized.expected_s:.0f} s expected from {source} speeds"
        if outcomes[0].code == 0:
            return "done", f"{design.name}: {how}"
        if outcomes[0].code == UNFINISHED:
            said = [line for line in outcomes[0].log.splitlines() if "Stored:" in line]
            return "unfinished", f"{how}. {said[-1] if said else 'It goes on in the next call.'}"
        return "failed", f"{why(outcomes)} ({how})"

    return Stage(design.stage, design.limit_s, design.least_s, plan, finish, group="records")


def stages(tiny: bool) -> tuple[Stage, ...]:
    """All of them, the most valuable first."""
    designs = TINY if tiny else DESIGNS
    trials = TRIALS if tiny else tuple(d.trial for d in designs)
    return (tried(tiny, trials), right(tiny), speed(tiny), *(recording(d) for d in designs))


# ---- state, archive and table


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def entries(store: Path) -> Iterator[tuple[str, int, Path, dict[str, Any]]]:
    """Measured entries of a run store on disk: kind, bytes, folder, manifest.

    Read without the package: importing torch for it would cost seconds after every stage.
    """
    for path in sorted(store.glob("[0-9a-f][0-9a-f]/*/manifest.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            kind = json.loads((path.parent / "identity.json").read_bytes())["kind"]
            manifest = json.loads(path.read_bytes())
            if kind in MEASURED:
                yield (
                    kind,
                    sum(f["bytes"] for f in manifest["files"].values()),
                    path.parent,
                    manifest,
                )


def export(store: Path, path: Path, without: Sequence[str] = ()) -> dict[str, int]:
    """Write measured entries as ``companion runs import`` reads them; kind -> bytes."""
    sizes: dict[str, int] = {}
    with tarfile.open(path, "w") as tar:
        for kind, count, folder, manifest in entries(store):
            if kind in without:
                continue
            files = manifest["files"]
            # On disk a file that was replaced has another name; in an archive it has its own.
            names = {name: str(record.get("file", name)) for name, record in files.items()}
            if not all((folder / real).is_file() for real in names.values()):
                continue
            plain = {n: {k: r[k] for k in ("sha256", "bytes")} for n, r in files.items()}
            head = json.dumps({"key": folder.name, "files": plain}).encode()
            member = tarfile.TarInfo(f"{folder.name}/manifest.json")
            member.size = len(head)
            tar.addfile(member, io.BytesIO(head))
            tar.add(folder / "identity.json", f"{folder.name}/identity.json")
            for name, real in names.items():
                tar.add(folder / real, f"{folder.name}/{name}")
            sizes[kind] = sizes.get(kind, 0) + count
    return sizes


def pack(site: Site, state: dict[str, Any], limit: int = LIMIT) -> None:
    """State, table, measured speeds, records and the store's measured entries, as one archive.

    If it would be too large, the largest kinds of entries stay behind, and the state says which.
    """
    target = site.out / gpu_pack.CARRY
    temporary = site.out / f".tmp-{gpu_pack.CARRY}"
    dropped: list[str] = state.setdefault("not carried", [])  # the store only grows
    while True:
        write(site.out / "stages.json", state)
        (site.out / "table.txt").write_text(table(state), encoding="utf-8")
        sizes = export(site.work / "runs", site.work / "store.tar", dropped)
        with tarfile.open(temporary, "w:gz", compresslevel=3) as tar:
            for name in ("stages.json", "table.txt", "engine.json"):
                if (site.out / name).is_file():
                    tar.add(site.out / name, name)
            for path in sorted(site.recorded.glob("*/*.json")):
                tar.add(path, f"records/{path.parent.name}/{path.name}")
            if sizes:
                tar.add(site.work / "store.tar", "store.tar")
        if temporary.stat().st_size <= limit or not sizes:
            break
        dropped.append(max(sizes, key=lambda kind: sizes[kind]))
    temporary.replace(target)
    shutil.copy(target, site.work / gpu_pack.CARRY)  # for a call with another --out, here


def earlier(site: Site, asked: Path | None) -> Path | None:
    """The archive to go on from: the one asked for, that of the same --out, or the last one that
    this machine made of the same commit (on a borrowed machine --out may be empty each time)."""
    if asked or (site.out / gpu_pack.CARRY).is_file():
        return asked or site.out / gpu_pack.CARRY
    last = site.work / gpu_pack.CARRY
    try:
        with tarfile.open(last) as tar:
            content = tar.extractfile("stages.json")
            same = content is not None and json.load(content)["commit"] == site.commit
    except (OSError, tarfile.TarError, KeyError, ValueError):
        return None
    return last if same else None


def restore(site: Site, archive: Path) -> dict[str, Any]:
    """Lay out what an earlier call left; its state. What lies here already stays."""
    folder = site.work / "carried"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    if (folder / "engine.json").is_file():
        shutil.copy(folder / "engine.json", site.out / "engine.json")
    for path in folder.glob("records/*/*.json"):
        place = site.recorded / path.parent.name / path.name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    if (folder / "store.tar").is_file() and not (site.work / "runs").is_dir():
        step = Step(python("-m", "companion", "runs", "import", folder / "store.tar"), 40)
        run(step, 40, site)  # if it fails, the records measure again what it held
    state: dict[str, Any] = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    return state


def trim(path: Path, limit: int) -> None:
    """Cut the middle out of a log that is longer than allowed."""
    if path.stat().st_size > limit:
        path.write_bytes(shortened(path.read_bytes(), limit))


def table(state: Mapping[str, Any]) -> str:
    """The stages: state, seconds, result or error."""
    rows = [("stage", "state", "seconds", "result")]
    for row in state["stages"]:
        line = " ".join(str(row["result"]).split())
        rows.append((row["name"], row["state"], f"{row['seconds']:.0f}", line[:300]))
    wide = [max(len(r[i]) for r in rows) for i in range(3)]
    lines = [f"{a:{wide[0]}}  {b:{wide[1]}}  {c:>{wide[2]}}  {d}".rstrip() for a, b, c, d in rows]
    if state.get("cards"):
        where = ", then ".join(state["cards"])
        lines.append(f"on {where}, commit {state['commit'][:12]}")
    if len(set(state.get("cards", []))) > 1:
        lines.append("The calls ran on different cards: compare numbers of one card only.")
    if state.get("not carried"):
        lines.append(f"too large to come back, left behind: {', '.join(state['not carried'])}")
    if any(row["state"] in (*GOES_ON, "failed", "left out") for row in state["stages"]):
        lines.append("A second call goes on: with the same --out, or with --carry carry.tar.gz.")
        if any(row["state"] == "unfinished" for row in state["stages"]) and offers("--close"):
            lines.append(
                "Or close an unfinished record with what is measured: `companion runs import` of "
                "the archive's store.tar, and the record's command with --close."
            )
    return "\n".join(lines) + "\n"


def card() -> str:
    """The GPU's name, as the driver says it; empty without one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
        return done.stdout.strip().splitlines()[0] if done.returncode == 0 else ""
    return ""


def ask_anew(state: dict[str, Any], found: str) -> None:
    """Measure the speed again on a card that no call before ran on: records are sized by it."""
    if state.get("cards") and found not in state["cards"]:
        for row in state["stages"]:
            if row["name"] == "speed":
                row |= {"state": "new", "attempts": 0}


def groups(todo: Sequence[Stage]) -> list[list[Stage]]:
    """Stages that may run side by side: those of one group that follow each other."""
    found: list[list[Stage]] = []
    for stage in todo:
        if stage.group and found and found[-1][0].group == stage.group:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def go(
    site: Site,
    todo: Sequence[Stage],
    state: dict[str, Any],
    until: float,
    archive: int = LIMIT,
    lanes: int = LANES,
) -> dict[str, Any]:
    """Run the stages that are not settled, until ``until`` (``time.monotonic``) at the latest.

    Arguments:
        lanes: stages of one group that run at a time.
    """
    desk = Desk()
    rows = {row["name"]: row for row in state.get("stages", [])}
    others = [name for name in rows if name not in {stage.name for stage in todo}]

    def save() -> None:
        state["stages"] = [rows[n] for n in (*others, *(s.name for s in todo)) if n in rows]
        pack(site, state, archive)

    def work(stage: Stage) -> None:
        slot = min(stage.limit_s, until - PACK_S - time.monotonic())
        start = time.monotonic()
        with desk.lock:
            old = rows.get(stage.name, {"seconds": 0.0, "attempts": 0, "notes": {}, "state": "new"})
            if old["state"] in SETTLED or desk.stopped:
                return
            row = rows[stage.name] = {**old, "name": stage.name}
            if slot < stage.least_s:
                if old["state"] in ("new", "left out"):
                    row |= {"state": "left out", "result": "no time was left for it"}
                return
            with site.log.open("a", encoding="utf-8") as log:
                log.write(f"=== {stage.name}: {slot:.0f} s\n")
        # Sized anew, unless it goes on where it stopped.
        notes = old["notes"] if old["state"] in GOES_ON else {}
        found: dict[str, Any]
        try:
            planned = stage.plan(site, slot, notes)
            if isinstance(planned, str):
                row |= {"state": "left out", "result": planned}
                print(f"{stage.name}: left out, {planned}", flush=True)
                return
            print(f"{stage.name}: at most {slot:.0f} s", flush=True)
            # Should this call be ended from outside, the next one knows that it was at work.
            row |= {"state": "interrupted", "result": "the call ended while it ran"}
            row |= {"notes": dict(planned.notes)}
            outcomes = processes(planned, start + slot)
            if desk.stopped:
                return
            ended, said = stage.finish(site, outcomes, planned.notes)
            found = {"state": ended, "result": said}
        except Exception as error:  # of the plan or of reading results: the others still run
            found = {"state": "failed", "result": f"{type(error).__name__}: {error}"}
        with desk.lock:
            row |= found
            row["seconds"] = round(old["seconds"] + time.monotonic() - start, 1)
            row["attempts"] = old["attempts"] + (row["state"] == "failed")
            if row["state"] == "failed" and row["attempts"] >= ATTEMPTS:
                row["state"] = "given up"
            trim(site.log, LOGS_LIMIT)
            save()
        said = f"{row['state']}, {row['seconds']:.0f} s, {row['result']}"
        print(f"{stage.name}: {said}", flush=True)

    def processes(planned: Planned, deadline: float) -> list[Outcome]:
        def one(step: Step) -> Outcome | None:
            left = deadline - time.monotonic()
            return run(step, left, site, desk) if left > 1 and not desk.stopped else None

        if not planned.together:
            done = [one(step) for step in planned.steps]
        else:
            with ThreadPoolExecutor(max(1, len(planned.steps))) as pool:
                done = list(pool.map(one, planned.steps))
        return [outcome for outcome in done if outcome is not None]

    try:
        for group in groups(todo):
            with ThreadPoolExecutor(max(1, lanes)) as pool:
                try:
                    # The main thread only waits, so that a signal reaches it.
                    futures = [pool.submit(work, stage) for stage in group]
                    wait(futures, return_when=FIRST_EXCEPTION)
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    desk.stop()
                    raise
    finally:
        save()
    return state


def workspace(tiny: bool) -> Path:
    """A folder for the run store and caches: in memory if there is room, else on the disk.

    The same for every call, so that a second one on a warm machine finds the first one's runs.
    """
    if tiny:
        return Path(tempfile.mkdtemp(prefix="companion-rehearsal-"))
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM
    return (memory if roomy else Path(tempfile.gettempdir())) / "companion-on-gpu"


def furnish(site: Site, packed: Path) -> None:
    """The data, and a copy of the chapters for the records to be made in."""
    if site.data is None and not site.tiny and not (site.work / "data").is_dir():
        with tarfile.open(packed / gpu_pack.DATA) as tar:
            tar.extractall(site.work / "data", filter="data")
    shutil.rmtree(site.book / "chapters", ignore_errors=True)
    shutil.copytree(ROOT / "chapters", site.book / "chapters")
    shutil.copy(ROOT / "_toc.yml", site.book / "_toc.yml")


def unpack(folder: Path, root: Path) -> list[str]:
    """Put what a call brought back where the book and the benchmarks look for it; lines to print.

    Raises:
        FileNotFoundError: the folder is not what a call leaves.
    """
    said = []
    with tempfile.TemporaryDirectory() as name, tarfile.open(folder / gpu_pack.CARRY) as tar:
        tar.extractall(name, filter="data")
        for path in sorted(Path(name).glob("records/*/*.json")):
            place = root / "data" / "recorded" / path.parent.name / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            said.append(f"{'replaced' if place.exists() else 'new'}: {place.relative_to(root)}")
            shutil.copy(path, place)
        engine = Path(name) / "engine.json"
        if engine.is_file():
            device = str(json.loads(engine.read_text(encoding="utf-8"))["device"])
            if device.startswith("cpu"):
                said.append("engine.json is of a CPU, which measures nothing: left where it is")
            else:
                slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
                place = root / "benchmarks" / "results" / f"engine-{slug}.json"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(engine, place)
                said.append(f"engine: {place.relative_to(root)}")
    return said


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, or put their results into place."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything together")
    parser.add_argument("--out", type=Path, help="gets the results; five files")
    parser.add_argument("--carry", type=Path, help="carry.tar.gz of an earlier call: go on")
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", help="only these, by the beginning of their names"
    )
    parser.add_argument("--lanes", type=int, default=LANES, help="records that run at a time")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU, in a minute")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="results into place, at home")
    parser.add_argument("--pack", type=Path, default=ROOT / gpu_pack.FOLDER)
    parser.add_argument("--commit", help="of the code; default: what the pack says")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="for --unpack: whose data and results"
    )
    options = parser.parse_args(arguments)
    if options.unpack:
        try:
            said = unpack(options.unpack, options.root)
        except (OSError, tarfile.TarError) as error:
            parser.error(f"--unpack: {options.unpack} is not what a call left in --out ({error})")
        log = options.unpack / "log.txt"
        if log.is_file():
            print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]))
        shown = options.unpack / "table.txt"
        print(shown.read_text(encoding="utf-8") if shown.is_file() else "", *said, sep="\n")
        print("Now: python benchmarks/report.py, which writes them into the tables.")
        return 0
    if not options.out:
        parser.error("--out DIR is needed")
    tiny = options.rehearse
    commit = options.commit or "rehearsal"
    if not tiny:
        if not (options.pack / gpu_pack.DATA).is_file() and "COMPANION_DATA" not in os.environ:
            parser.error(f"there is no data in {options.pack}: run `make gpu-pack` at home first")
        stamp = options.pack / gpu_pack.COMMIT
        commit = options.commit or (stamp.read_text().strip() if stamp.is_file() else "unknown")
    packed = (options.pack / gpu_pack.DATA).is_file()
    own = None if packed or tiny else Path(os.environ["COMPANION_DATA"]).absolute()
    out = options.out.absolute()
    site = Site(out, workspace(tiny), commit, tiny, own)
    for folder in (site.out, site.work):
        folder.mkdir(parents=True, exist_ok=True)

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        furnish(site, options.pack)
        carried = earlier(site, options.carry)
        state: dict[str, Any] = {"format": 1, "stages": []}
        if carried:
            state = restore(site, carried)
            print(f"going on from {carried}", flush=True)
        found = "a CPU, as a rehearsal" if tiny else card() or "no GPU"
        cards = [*state.get("cards", []), found]
        ask_anew(state, found)
        state |= {"commit": commit, "cards": list(dict.fromkeys(cards)), "not carried": []}
        todo = [s for s in stages(tiny) if s.name.startswith(tuple(options.stages or [""]))]
        go(site, todo, state, began + 60 * options.minutes, lanes=options.lanes)
    finally:
        if (out / "table.txt").is_file():
            print((out / "table.txt").read_text(encoding="utf-8"), flush=True)
        if tiny:
            shutil.rmtree(site.work, ignore_errors=True)
    return int(any(row["state"] in ("failed", "given up") for row in state["stages"]))


if __name__ == "__main__":
    sys.exit(main())
