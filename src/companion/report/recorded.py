"""Results that were measured on larger machines and ship with the book: ``data/recorded/``.

``companion record`` writes them (:mod:`companion.book.recording`); chapters draw them beside their
own run, the claims tables give each profile a column. Every record says its dataset, its hardware
and its date. A file that is not what it should be stops the build: it is never half believed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.core import codec
from companion.core.errors import BadParameter, CorruptData
from companion.core.locations import book_root, shipped
from companion.report import claims, figures, page, plots

if TYPE_CHECKING:
    from companion.core.stats import Interval

FORMAT = 1
LIMIT = 1_000_000  # bytes of one file
NAME = r"[a-z0-9][a-z0-9_.-]{0,79}"  # of a record, and of a profile

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "chapter": str,
    "profile": str,
    "name": str,
    "parameters": dict,
    "dataset": dict,
    "hardware": str,
    "scale": str,
    "date": str,
    "seconds": (int, float),
    "claims": list,
    "figures": dict,
    "provenance": dict,
}


@dataclass(frozen=True)
class Record:
    """One recorded file.

    Arguments:
        verdicts: claim id -> verdict, by the rules of today (the statistic is what was recorded).
        data: the whole document.
    """

    chapter: str
    profile: str
    name: str
    verdicts: Mapping[str, claims.Verdict]
    data: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The profile without its variant: ``paper-mnist`` is of the family ``paper``."""
        return self.profile.partition("-")[0]

    @property
    def dataset(self) -> str:
        """The dataset's label."""
        return str(self.data["dataset"]["name"])

    @property
    def scale(self) -> str:
        """What was trained and where, with the names that people give networks."""
        from companion.models import in_words

        return in_words(str(self.data["scale"]))

    @property
    def unfinished(self) -> str:
        """What is missing, in words, if the recording was closed before its end; else empty."""
        if not self.data.get("closed"):
            return ""
        counts = ", ".join(f"{n} × {kind}" for kind, n in self.data.get("missing", {}).items())
        return f"closed before its end; missing: {counts or 'nothing that counts'}"

    @property
    def title(self) -> str:
        """Name, scale with hardware, and date, in words; and whether it is whole."""
        closed = f"; {self.unfinished}" if self.unfinished else ""
        return f"{self.name}: {self.scale} ({self.data['date']}{closed})"

    @property
    def short(self) -> str:
        """Name, dataset, hardware and date: what a number in a table has to say."""
        closed = ", closed before its end" if self.unfinished else ""
        where = f"{self.data['hardware']}, {self.data['date']}"
        return f"{self.name}: {self.dataset}, {where}{closed}"


def folder(root: Path) -> Path:
    """Where a book keeps its records."""
    return root / "data" / "recorded"


def hardware(provenance: Mapping[str, Any]) -> str:
    """What computed: the GPU's name, or the processor's and its cores."""
    gpu = provenance.get("gpu")
    if gpu and not str(provenance["device"]).startswith("cpu"):
        return str(gpu["name"])
    return f"CPU, {provenance['cpu']['cores']} cores of {provenance['cpu']['name']}"


def load(chapter: str, root: Path | None = None) -> list[Record]:
    """The records of a chapter, by name; none is no error. While recording there are none.

    Arguments:
        chapter: its name.
        root: of the book; default: the book at hand, else what came with the package.

    Raises:
        CorruptData: a file that is not a record of this chapter.
    """
    root = root or book_root()
    home = folder(root) if root else (shipped() or Path()) / "recorded"
    if page.recorder() is not None:
        return []
    return [_read(path, chapter) for path in sorted((home / chapter).glob("*.json"))]


def _read(path: Path, chapter: str) -> Record:
    where = f"data/recorded/{chapter}/{path.name}"

    def broken(why: str) -> CorruptData:
        return CorruptData(f"{where}: {why}. Record it again, or remove the file.")

    try:
        if path.stat().st_size > LIMIT:
            raise broken(f"{path.stat().st_size / 1e6:.2f} MB is more than {LIMIT / 1e6:g} MB")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise broken(f"it cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise broken("it is no JSON object")
    for name, kind in _FIELDS.items():
        if not isinstance(data.get(name), kind):
            raise broken(f"the field {name!r} is missing, or of another type")
    if data["format"] != FORMAT:
        raise broken(f"it has format {data['format']}; this version reads {FORMAT}")
    if data["chapter"] != chapter:
        raise broken(f"it is a record of {data['chapter']}")
    if not all(re.fullmatch(NAME, data[field]) for field in ("name", "profile")):
        raise broken("its name or its profile is not a file's name")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"]) or "name" not in data["dataset"]:
        raise broken("its date or its dataset is not what `companion record` writes")
    try:
        found = codec.from_json(tuple[claims.Verdict, ...], data["claims"], "claims")
        known = claims.registry()
        # The number was recorded; the word follows from the rule, as everywhere. A statistic that
        # is another one today was not measured.
        dataset = str(data["parameters"].get("dataset", ""))
        verdicts = {
            v.claim.id: claims.again(_with_student(v), dataset)
            for v in found
            if v.claim.id in known and v.claim.statistic == known[v.claim.id].statistic
        }
    except (CorruptData, BadParameter) as error:
        raise broken(f"its claims are unreadable ({error})") from error
    return Record(chapter, data["profile"], data["name"], verdicts, data)


def _with_student(verdict: claims.Verdict) -> claims.Verdict:
    """Until 2026-11-27 the interval of two or three samples was their range."""
    if verdict.value is None or verdict.interval is None or verdict.clusters is not None:
        return verdict
    from companion.core.stats import from_range

    found = from_range(verdict.value, *verdict.interval, verdict.n or 1)
    return replace(verdict, interval=(found.low, found.high), clusters=found.clusters)


def sentence(chapter: str, records: Sequence[Record]) -> str:
    """What is recorded, or that nothing is and which command changes that; Markdown."""
    if not records:
        return (
            "Nothing is recorded for this chapter yet: all numbers here are of this page's run. "
            f"`companion record {chapter} --profile gpu` makes such a file, on a GPU."
        )
    lines = [
        f"- `{r.name}`: {page.as_text(r.scale)}; {r.data['date']}, "
        f"{page.as_text(r.data['hardware'])}, {r.data['seconds'] / 60:.1f} minutes"
        + (f"; {page.as_text(r.unfinished)}" if r.unfinished else "")
        for r in records
    ]
    spent = (
        "The minutes are those of the call that wrote the record; networks that were trained "
        "before it are not counted."
    )
    return "\n\n".join(["Recorded:", "\n".join(lines), spent])


def curves(
    records: Sequence[Record], figure: str
) -> dict[str, tuple[int, dict[str, dict[int, Interval]]]]:
    """The curves against k of one figure in every record that has it, on test data.

    A curve that a record names after a network's recipe has the network's name for people.

    Returns:
        title -> (T, or 0 if the axis has no total; label -> k -> interval), as
            :func:`companion.report.plots.panels` draws them.
    """
    from companion.core.stats import Interval, from_range

    found = {}
    for record in records:
        drawn = {n: (f or {}).get("data") or {} for n, f in record.data["figures"].items()}
        data = drawn.get(figure, {})
        # Until 2026-11-27 the interval of two or three samples was their range: see _with_student.
        judged = record.data.get("claims", [])
        old = bool(judged) and not any("clusters" in claim for claim in judged)
        series = {
            _for_people(label): {
                k: from_range(mean, low, high, n) if old else Interval(mean, low, high, n, 0)
                for k, mean, low, high, n in zip(
                    *(s[name] for name in ("k", "mean", "low", "high", "pairs")), strict=True
                )
                if mean is not None
            }
            for label, s in data.items()
            if isinstance(s, dict) and label.endswith(", test") and len(s["k"]) > 1  # else no curve
        }
        if series:
            # Against the width, T is 0, as no axis runs to it; other figures of the record know T.
            steps = max(int(one.get("T") or 0) for one in drawn.values())
            title = f"{record.name}: {record.dataset}" + (f", T = {steps}" if steps else "")
            title += f"\n{record.data['hardware']}, {record.data['date']}"
            found[title] = (int(data["T"]), series)
    return found


def _for_people(label: str) -> str:
    """``mlp:widths=100x5, test`` -> ``six-layer perceptron, test``; others stay as they are."""
    from companion.models import title

    name, _, split = label.rpartition(", ")
    try:
        return f"{title(name)}, {split}"
    except BadParameter:
        return label


def ends(points: Mapping[int, Interval], axis: str = "k") -> str:
    """The first and the last value of a curve: ``21.8 points at k = 0, 1.5 at k = 100``."""
    first, last = min(points), max(points)
    a, b = points[first].value, points[last].value
    return f"{a:.1f} points at {axis} = {first}, {b:.1f} at {axis} = {last}"


def extremes(record: Record, figure: str, axis: str = "k") -> str:
    """For an alt text: the first and the last value of each curve of a figure."""
    found = [series for _, series in curves([record], figure).values()]
    words = [
        f"{label} {ends(points, axis)}" for series in found for label, points in series.items()
    ]
    return ", ".join(words) or "no curve"


def show(records: Sequence[Record], figure: str, name: str, **look: Any) -> None:
    """A figure against k from every record that has it, a panel each; nothing without one.

    Its caption may say ``{{titles}}``, of the records, and ``{{ends}}``, of their curves.

    Arguments:
        figure: what is drawn, as the records call it.
        name: of the new figure.
        look: for :func:`companion.report.plots.panels`.
    """
    if runs := curves(records, figure):
        fig, drawn = plots.panels(runs, **look)
        held = [r for r in records if figure in r.data["figures"]]
        values = {
            "ends": "; ".join(f"{r.name}: {extremes(r, figure)}" for r in held),
            "titles": " ".join(f"{r.title}." for r in held),
        }
        figures.publish(fig, name, data=drawn, values=values)
