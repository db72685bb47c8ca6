"""The one way from a chapter to its page: in a notebook it shows, under a recorder it is kept.

    page.text(f"The barrier falls below 2 points at k = {k}.")
    page.fill(peak=86.7, network="ResNet-20")  # for {{peak:.0f}} and {{network}} in prose

Figures, tables, verdicts and provenance go through :func:`emit` too. A chapter therefore imports
neither IPython nor MyST-NB, and ``companion record`` runs its cells on a machine that has neither:
:func:`captured` collects what they emit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from companion.core.errors import BadParameter

if TYPE_CHECKING:
    from companion.experiments.budget import Plan
    from companion.experiments.pairs import Evaluation


@dataclass(frozen=True)
class Budget:
    """What a chapter is about to train and measure, and where."""

    plans: tuple[Plan, ...]
    evaluation: Evaluation
    device: str
    workers: int


@dataclass
class Captured:
    """What the cells of a chapter put on the page, in order.

    Arguments:
        entries: one mapping an emission, such as ``{"figure": {...}}`` or ``{"claims": [...]}``.
        on_budget: called when the chapter declares its budget; it may stop the recording.
    """

    on_budget: Callable[[Budget], None] | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)

    def all(self, kind: str) -> list[Any]:
        """The contents of every entry of one kind."""
        return [entry[kind] for entry in self.entries if kind in entry]


_recorder: ContextVar[Captured | None] = ContextVar("companion_recorder", default=None)


def recorder() -> Captured | None:
    """Who captures what is emitted now; None in a notebook."""
    return _recorder.get()


@contextmanager
def captured(on_budget: Callable[[Budget], None] | None = None) -> Iterator[Captured]:
    """Inside, nothing is displayed; what would be is in the value."""
    found = Captured(on_budget)
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def emit(data: Mapping[str, str], entry: Mapping[str, Any]) -> None:
    """Put one thing on the page.

    Arguments:
        data: what to show, MIME type -> text; ``text/plain`` is always there.
        entry: the same for programs; it travels in the metadata of the cell's output, where the
            book finds it, and is what a recorder keeps.
    """
    if (found := recorder()) is not None:
        found.entries.append(dict(entry))
        return
    try:
        from IPython.display import display
    except ModuleNotFoundError:  # a plain script
        print(data["text/plain"])
        return
    display(dict(data), metadata={"companion": dict(entry)}, raw=True)


_MARKUP = re.compile(r"[\\`*_{}\[\]<>#+\-:!|~$&=^@]")


def as_text(data: object) -> str:
    """Markdown that shows ``data`` as it is, in one line: no markup, no HTML, no formula."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(data).split()))


def as_html(data: object) -> str:
    """HTML that shows ``data`` as it is. In one line: a blank one would end a block of HTML inside
    Markdown, and what follows would be read as markup."""
    return escape(re.sub(r"\s*[\r\n]\s*", " ", str(data)))


def text(markdown: str) -> None:
    """Prose whose numbers come from the run, as Markdown."""
    emit({"text/markdown": markdown, "text/plain": markdown}, {"text": markdown})


def fill(**values: Any) -> None:
    """Give the prose and the captions of the chapter what stands in ``{{name}}``, ``{{name:.1f}}``.

    Arguments:
        values: numbers and strings, by name. A string is data: it is shown as it is, not as markup.

    Raises:
        BadParameter: a value of another kind.
    """
    plain = fillable(values, "page.fill")
    said = ", ".join(f"{name} = {value}" for name, value in plain.items())
    emit({"text/plain": said}, {"values": plain})


def fillable(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values for placeholders as JSON has them; numbers that are not finite as "nan", "inf".

    Arguments:
        values: numbers of any library, and strings.
        where: who gives them, for messages.

    Raises:
        BadParameter: a value of another kind.
    """
    found: dict[str, Any] = {}
    for name, given in values.items():
        value = given.item() if getattr(given, "ndim", None) == 0 else given
        if not isinstance(value, (int, float, str)) or isinstance(value, bool):
            kind = type(given).__name__
            raise BadParameter(f"{where}: {name} is of type {kind}; give a number or a string.")
        odd = isinstance(value, float) and not math.isfinite(value)
        found[name] = str(value) if odd else value
    return found


class Planned(Protocol):
    """An experiment that knows what it will train and measure, and where."""

    def plans(self) -> Sequence[Plan]:
        """What :func:`companion.experiments.instability.plan_forks` and its like return."""

    @property
    def evaluation(self) -> Evaluation:
        """How pairs are measured."""

    @property
    def device(self) -> str:
        """Where."""

    @property
    def workers(self) -> int:
        """Processes on a CPU; 0: one a core."""


def budget(study: Planned) -> None:
    """Say what the chapter is about to train and measure. In a notebook nothing happens."""
    if (found := recorder()) is not None and found.on_budget is not None:
        found.on_budget(Budget(tuple(study.plans()), study.evaluation, study.device, study.workers))
