"""What a comparison of checkpoints found: answers to questions, and findings that rest on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, TypeAlias

from companion.core import codec

Json: TypeAlias = dict[str, Any]

ANSWERED, NOT_ASKED, IMPOSSIBLE, INVALID = (
    "answered",
    "not asked",
    "could not be asked",
    "invalid",
)
STATUSES = (ANSWERED, NOT_ASKED, IMPOSSIBLE, INVALID)
"""Of an answer. ``invalid``: a gate failed, so that a number would say nothing of two trained
networks."""

YES, NO, UNDETERMINED = "yes", "no", "undetermined"
VERDICTS = (YES, NO, UNDETERMINED, NOT_ASKED)
"""Of a finding."""


@dataclass(frozen=True)
class Answer:
    """What was found of one question.

    Arguments:
        name: of the question, such as ``barrier``.
        title: the question as a person asks it.
        status: one of :data:`STATUSES`.
        why: one line, where there is no answer.
        seconds: of wall-clock time that it took.
        command: the line that repeats this part alone; "" where there is none.
        values: plain JSON, under the names that the command's ``--json`` has.
        work: seconds of CPU time that it took, of all threads together.
    """

    name: str
    title: str
    status: str
    why: str = ""
    seconds: float = 0.0
    command: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    work: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether there are values."""
        return self.status == ANSWERED


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    Arguments:
        question: such as ``Same basin?``.
        verdict: one of :data:`VERDICTS`.
        sentence: what a person reads, with the number.
        rule: the threshold in words.
        because: names of the answers that it rests on.
    """

    question: str
    verdict: str
    sentence: str
    rule: str
    because: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What is known of two networks or more, and what is not, and why.

    Arguments:
        names: of the networks.
        model: the architecture.
        data: what was measured on; None: weights alone were looked at.
        answers: to every question, also to those that were not asked.
        findings: the verdict, line by line.
        provenance: versions, device, files, seconds and budget.
    """

    names: tuple[str, ...]
    model: str
    data: str | None
    answers: tuple[Answer, ...]
    findings: tuple[Finding, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the networks before they were measured."""
        found = (a.values.get("barrier") for a in self.answers)
        lines = (b.get("notes", ()) for b in found if isinstance(b, Mapping))
        return tuple(dict.fromkeys(note for notes in lines for note in notes))

    def answer(self, name: str) -> Answer | None:
        """The answer to a question, if it has been answered."""
        return next((a for a in self.answers if a.name == name and a.answered), None)

    @property
    def invalid(self) -> bool:
        """Whether a gate failed: barriers of such networks are no numbers."""
        ends = self.answer("ends")
        gated = ends is not None and ends.values.get("valid") is False
        return gated or any(a.status == INVALID for a in self.answers)

    def to_json(self) -> Json:
        """As plain JSON; :meth:`from_json` reads it back."""
        plain: Json = codec.to_json(self, "comparison")
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """What :meth:`to_json` wrote.

        Raises:
            CorruptData: something is missing or of another type.
        """
        return codec.from_json(cls, data)

    def html(self) -> str:
        """One self-contained HTML page."""
        from companion.report.compare.sheet import sheet

        return sheet(self)

    def _repr_html_(self) -> str:
        """In a notebook: the page in a frame of its own, so that neither style meets the other."""
        look = "width: 100%; height: 40rem; border: 1px solid #8888"
        page = escape(self.html())
        return f'<iframe sandbox title="report" style="{look}" srcdoc="{page}"></iframe>'

    def __str__(self) -> str:
        letters = [chr(65 + i) for i in range(len(self.names))]
        lines = [f"{a} = {b}" for a, b in zip(letters, self.names, strict=True) if a != b]
        lines += [f"{self.model} on {self.data}" if self.data else f"{self.model}, no data", ""]
        for f in self.findings:
            lines += [f"{f.question} {f.verdict}", f"    {f.sentence}"]
        reasons: dict[tuple[str, str], list[str]] = {}
        for a in self.answers:
            if not a.answered:
                reasons.setdefault((a.status, a.why), []).append(a.title)
        for (status, why), titles in reasons.items():
            lines += ["", f"{status} ({why}):", *(f"    {title}" for title in titles)]
        return "\n".join(lines)


def loads(text: str) -> Comparison:
    """A comparison of a report's JSON file.

    Raises:
        CorruptData: it is none.
    """
    return Comparison.from_json(json.loads(text))
