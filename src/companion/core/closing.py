"""Closing a recording: its cells run again on what is measured, and nothing is computed for them.

Inside ``with closed(machine) as lacking`` whoever is about to train or to measure meets
:class:`companion.core.errors.NotMeasured`; :func:`companion.experiments.pairs.measure_pairs` gives
results that are not valid for the pairs that are missing. Names of devices stand for where the
measuring was done, and no such device has to be here: data stay on the CPU. Source:
data/recorded/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from companion.core.errors import NotMeasured

if TYPE_CHECKING:
    from companion.core.runs import Entry

WHY = "not measured before the recording was closed"


@dataclass(frozen=True)
class _Closed:
    """``machine``: see :func:`closed`. ``lacking``: kind -> keys of what was asked for in vain."""

    machine: Mapping[str, Any]
    lacking: dict[str, set[str]] = field(default_factory=dict)


_now: ContextVar[_Closed | None] = ContextVar("companion_closing", default=None)


@contextmanager
def closed(machine: Mapping[str, Any]) -> Iterator[dict[str, set[str]]]:
    """Inside, nothing is trained, loaded from a checkpoint, or measured.

    Arguments:
        machine: of the measurements: ``device`` as they name it (``cuda:0``), and entries of
            :func:`companion.report.provenance.record`, which it then returns as they are here.

    Returns:
        kind of entry -> keys of those that were asked for and are not there; it fills as the cells
        run.
    """
    now = _Closed(machine)
    token = _now.set(now)
    try:
        yield now.lacking
    finally:
        _now.reset(token)


def active() -> bool:
    """Whether a recording is being closed."""
    return _now.get() is not None


def device() -> str | None:
    """The device of the measurements; None outside."""
    now = _now.get()
    return None if now is None else str(now.machine["device"])


def measured_on() -> dict[str, Any]:
    """Code, versions and hardware of the measurements; {} outside."""
    now = _now.get()
    return {} if now is None else {k: v for k, v in now.machine.items() if k != "device"}


def lacks(entries: Sequence[Entry]) -> None:
    """Note entries that are not there. Outside nothing happens."""
    if now := _now.get():
        for entry in entries:
            now.lacking.setdefault(str(entry.identity.get("kind")), set()).add(entry.key)


def refuse_work(entries: Sequence[Entry] = (), what: str = "a training") -> None:
    """Stop here if a recording is being closed and something would have to be computed.

    Arguments:
        entries: what would be made, to be noted.
        what: it in words.

    Raises:
        NotMeasured: it is. Outside nothing happens.
    """
    if active():
        lacks(entries)
        raise NotMeasured(f"{what}: {WHY}.")
