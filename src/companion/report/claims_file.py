"""The papers' claims as they stand in ``data/claims.yaml``: read, and checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from companion.core import plainyaml
from companion.core.codec import OMIT_DEFAULT
from companion.core.errors import BadParameter, MissingData
from companion.core.locations import shipped

#: Where a reported value was read. The letters are the fact sheets'; the words go under the tables.
EVIDENCE = {
    "P": "the paper's own words",
    "N": "reading notes of the whole paper",
    "T": "a third party's transcription of the paper's tables",
    "R": "reviews of the paper, reading notes, and its authors' posts",
    "M22": "the summary by Maene et al.",
    "C": "the authors' code",
    "D": "derived by us",
    "E": "measured by us beforehand",
    "U": "unverified",
}
#: What kind of statement a claim is, and how the front page calls several of them.
KINDS = {
    "empirical": "claims that the papers draw from experiments",
    "theorem": "theorems, constructions and counts",
    "ours": "questions and controls of our own",
}
#: The operators of a rule, and the numbers each needs.
OPERATORS: dict[str, set[str]] = {op: {"value"} for op in ("<", "<=", ">", ">=")} | {
    "between": {"low", "high"},
    "report": set(),
    "true": set(),
}


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how this book decides whether it holds here.

    ``reported`` with ``evidence`` U was never checked against the paper and is never printed.
    """

    id: str
    paper: str  # a key of references.bib
    chapter: str
    text: str  # our wording
    where: str  # the paper's section, figure or table
    reported: str
    statistic: str  # what we compute
    rule: str  # the pass rule in words
    test: Mapping[str, Any]  # the same for the machine: {"op": "<", "value": 2.0}
    profiles: tuple[str, ...]  # those that can test it
    evidence: str  # a key of EVIDENCE
    unit: str = ""
    format: str = "{:.2f}"
    changed: str = field(
        default="", metadata=OMIT_DEFAULT
    )  # if the rule changed after a run had been seen: after which, and from what
    data: tuple[str, ...] = field(
        default=(), metadata=OMIT_DEFAULT
    )  # names of the datasets that can test it; empty: any
    kind: str = field(default="empirical", metadata=OMIT_DEFAULT)  # a key of KINDS

    def takes(self, dataset: str) -> bool:
        """Whether a dataset can test it; a part (``mnist@split-a``) stands for the whole."""
        return not self.data or dataset.partition("@")[0] in self.data

    @property
    def about(self) -> str:
        """For the note of a verdict on other data."""
        return f"the claim is about {', '.join(self.data)}"


@dataclass(frozen=True)
class _Registry:
    papers: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)


def registry(path: Path | None = None) -> dict[str, Claim]:
    """All claims by id, in the file's order.

    Arguments:
        path: A claims file; by default the one of the book.

    Raises:
        MissingData: There is no such file.
        BadParameter: The file is malformed; the message names the entry and the field.
    """
    return dict(_load(_file(path)).claims)


def papers(path: Path | None = None) -> dict[str, str]:
    """Short names of the papers, by key of ``references.bib``: ``Frankle et al. 2020``."""
    return dict(_load(_file(path)).papers)


def _file(path: Path | None) -> Path:
    if path is not None:
        return path
    folder = shipped()
    if folder is None:
        raise MissingData(
            "claims.yaml: this copy of the package is neither in its git checkout nor installed "
            "with pip. Clone the repository and run `make book`, or install it."
        )
    return folder / "claims.yaml"


@lru_cache(maxsize=4)
def _parse(text: str, where: str) -> _Registry:
    try:
        document = plainyaml.parse(text)
    except yaml.YAMLError as error:
        raise BadParameter(f"{where} is not valid YAML: {error}") from error
    if not isinstance(document, dict) or set(document) != {"papers", "claims"}:
        raise BadParameter(f"{where}: the top level needs exactly two keys, papers and claims.")
    names = {str(key): str(name) for key, name in (document["papers"] or {}).items()}
    claims: dict[str, Claim] = {}
    for i, entry in enumerate(document["claims"] or []):
        claim = _claim(entry, f"{where}, entry {i + 1}", names)
        if claim.id in claims:
            raise BadParameter(f"{where}: the id {claim.id} is used twice.")
        claims[claim.id] = claim
    return _Registry(names, claims)


def _load(path: Path) -> _Registry:
    if not path.is_file():
        raise MissingData(f"{path.name}: there is no claims file at {path}.")
    return _parse(path.read_text(encoding="utf-8"), path.name)


_FIELDS = {name: f.default for name, f in Claim.__dataclass_fields__.items()}
_TEXTS = set(_FIELDS) - {"test", "profiles", "data"}


def _claim(entry: Any, where: str, names: Mapping[str, str]) -> Claim:
    """Check one entry of the file field by field."""
    if not isinstance(entry, dict):
        raise BadParameter(f"{where}: a claim is a mapping with the fields {', '.join(_FIELDS)}.")
    if isinstance(entry.get("id"), str):
        where = f"{where} ({entry['id']})"
    unknown = sorted(set(entry) - set(_FIELDS))
    if unknown:
        raise BadParameter(
            f"{where}: unknown field {', '.join(unknown)}. Allowed: {', '.join(_FIELDS)}."
        )
    optional = {"unit", "format", "changed", "data", "kind"}
    missing = [name for name in _FIELDS if name not in entry and name not in optional]
    if missing:
        raise BadParameter(f"{where}: missing field {', '.join(missing)}.")
    for name in _TEXTS & set(entry):
        if not isinstance(entry[name], str):
            raise BadParameter(
                f"{where}: {name} is {entry[name]!r}, not text. Put it in quotation marks."
            )
    for name in ("id", "text", "statistic", "rule"):
        if not entry[name].strip():
            raise BadParameter(f"{where}: {name} is empty.")
    if entry["evidence"] not in EVIDENCE:
        raise BadParameter(
            f"{where}: evidence {entry['evidence']!r} is not known. Allowed: {', '.join(EVIDENCE)}."
        )
    if entry.get("kind", "empirical") not in KINDS:
        raise BadParameter(
            f"{where}: kind {entry['kind']!r} is not known. Allowed: {', '.join(KINDS)}."
        )
    if not entry["reported"].strip() and entry["evidence"] != "U":
        raise BadParameter(f"{where}: reported is empty; only a claim tagged U may leave it so.")
    if entry["paper"] not in names:
        raise BadParameter(
            f"{where}: paper {entry['paper']!r} has no short name. Known: {', '.join(names)}."
        )
    for name, example in (("profiles", "[quick, gpu, paper]"), ("data", "[mnist, digits]")):
        value = entry.get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise BadParameter(f"{where}: {name} is a list of names, such as {example}.")
    form = entry.get("format", Claim.format)
    try:
        form.format(0.5)
    except (ValueError, IndexError, KeyError) as error:
        raise BadParameter(
            f"{where}: format {form!r} does not format a number: {error}."
        ) from error
    _check_test(entry["test"], where)
    return Claim(**{**entry, **{n: tuple(entry.get(n, ())) for n in ("profiles", "data")}})


def _check_test(test: Any, where: str) -> None:
    """The machine's rule: an operator, and exactly the numbers it needs."""
    op = test.get("op") if isinstance(test, dict) else None
    # YAML 1.1 reads a bare `true` as a boolean.
    hint = ' (write it in quotation marks: op: "true")' if op is True else ""
    if not isinstance(op, str) or op not in OPERATORS:
        raise BadParameter(
            f"{where}: test needs an op out of {', '.join(OPERATORS)}; it has {op!r}{hint}."
        )
    if set(test) != OPERATORS[op] | {"op"}:
        keys = ", ".join(sorted(OPERATORS[op])) or "nothing else"
        raise BadParameter(f"{where}: test with op {op!r} takes {keys}; it has {dict(test)}.")
    for name in OPERATORS[op]:
        if isinstance(test[name], bool) or not isinstance(test[name], (int, float)):
            raise BadParameter(f"{where}: test.{name} is {test[name]!r}, not a number.")
    if op == "between" and not test["low"] <= test["high"]:
        raise BadParameter(f"{where}: test.low is above test.high.")
