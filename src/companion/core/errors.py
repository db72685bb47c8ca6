"""Messages for the person who typed the command: what is wrong, where, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompanionError(Exception):
    """Base of every error this package raises on purpose. ``str(error)`` is the whole message."""


class BadParameter(CompanionError, ValueError):
    """A parameter is unknown, of the wrong type, out of range, or clashes with another one."""


class WrongShape(BadParameter):
    """A network's entry has another shape than the model's: another width, say."""


class MissingData(CompanionError, FileNotFoundError):
    """A dataset is not under the data root. The message names it, the folder and the command."""


class CorruptData(CompanionError):
    """A data file is not what it should be: truncated, wrong checksum, wrong layout."""


class DeviceUnavailable(CompanionError):
    """The requested device does not exist on this machine."""


class Diverged(CompanionError):
    """A training run produced a loss that is not finite. Nothing of the broken state is stored."""


class CorruptEntry(CompanionError):
    """An entry of the run store does not match its checksums."""


class StoreUnwritable(CompanionError, OSError):
    """The run store cannot be written: a full disk, or a read-only folder."""


class StoreUnreadable(CompanionError, OSError):
    """Something in the run store cannot be read, or is a link. It is not taken for damaged."""


class Busy(CompanionError):
    """Another process is at work on the same thing."""


class WorkerLost(CompanionError):
    """A worker process was killed, most often because the machine ran out of memory."""


class JobsFailed(CompanionError):
    """Jobs that were sent to other machines failed there; all others are done."""


class OutOfTime(CompanionError):
    """A time limit was reached. What was finished is stored; the same call goes on from there."""


class NotMeasured(CompanionError):
    """A recording is being closed, and this would have to be computed first."""


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """``value`` if it is one of ``allowed``; else :class:`BadParameter` with a hint."""
    choices = list(allowed)
    if value in choices:
        return value
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise BadParameter(f"{name}: {value!r} is not known.{hint} Allowed: {', '.join(choices)}.")


MOST = 10**8
"""No count of ours is larger: what asks for more is mistyped, and would only fill the memory."""


def whole(
    name: str, value: int | None, least: int, none: str | None = None, most: int = MOST
) -> int | None:
    """``value`` if it is a whole number from ``least`` to ``most``; else :class:`BadParameter`.

    Arguments:
        none: what the message calls None where that is allowed, too.
    """
    if value is None and none:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        other = f", or {none}" if none else ""
        raise BadParameter(f"{name}: {value!r} must be a whole number of {least} or more{other}.")
    if value > most:
        raise BadParameter(f"{name}: {value:,} is too large; {most:,} is the most.")
    return value


def within(name: str, value: float | None, low: float, high: float) -> float | None:
    """``value`` if it is a number from ``low`` to ``high``; else :class:`BadParameter`. None stays.

    NaN lies nowhere, and infinity only where ``high`` says so.
    """
    if value is not None and not low <= value <= high:
        raise BadParameter(f"{name}: {value:g} must be a number from {low:g} to {high:g}.")
    return value
