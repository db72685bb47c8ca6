"""Options of a network: how each is spelled, what it may be, and what it is when left out.

The canonical spelling of a network leaves defaults out, and it enters content hashes. So a default
is for ever: a new option whose default is the old behaviour changes no old spelling, but changing
the default of an option would give old spellings a new meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import nn

from companion.core.errors import BadParameter, one_of
from companion.models.layers import INITS, NORMS

Value = int | float | str | tuple[int, ...]
Shape = tuple[int, ...]
"""(C, H, W) of one image, or (L,) of a window of tokens."""

MAX_HIDDEN_LAYERS = 1000  # "100x5" mistyped as "5x100000" should be a message, not a long wait


@dataclass(frozen=True)
class Option:
    """One option of a family of networks.

    ``default`` is in canonical spelling. ``parse`` turns text into a value and raises
    ``ValueError`` if it cannot; ``show`` is its inverse and gives the canonical spelling.
    """

    default: str
    meaning: str
    allowed: str
    parse: Callable[[str], Value]
    show: Callable[[Any], str] = str
    choices: tuple[str, ...] = ()

    def read(self, where: str, text: str) -> Value:
        """The value that ``text`` spells; ``where`` names the option in the error message."""
        if self.choices:
            by_folded = {c.casefold(): c for c in self.choices}
            return one_of(where, by_folded.get(text.casefold(), text), self.choices)
        try:
            return self.parse(text)
        except ValueError:
            raise BadParameter(f"{where}: {text!r} is not {self.allowed}.") from None


@dataclass(frozen=True)
class NetworkFamily:
    """Networks that differ only in options (and, for ResNets and VGGs, in depth).

    ``make(in_shape, classes, **values)`` constructs the module without the ``init`` option, which
    is applied afterwards, if there is one. ``smallest`` is the least height and width of an image
    it takes; ``takes`` says what it maps to logits.
    """

    summary: str
    options: Mapping[str, Option]
    make: Callable[..., nn.Module]
    smallest: int = 1
    takes: Literal["images", "tokens"] = "images"


def choice(default: str, meaning: str, choices: tuple[str, ...]) -> Option:
    """An option that is one of a few words (upper and lower case are the same)."""
    return Option(default, meaning, "one of " + ", ".join(choices), str, choices=choices)


def _positive(text: str) -> int:
    # Seven digits: far beyond any width that fits in memory, and int() stays cheap.
    if not re.fullmatch(r"0*[1-9][0-9]{0,6}", text, re.ASCII):
        raise ValueError(text)
    return int(text)


def _share(text: str) -> float:
    if not re.fullmatch(r"0*(\.[0-9]{0,15})?", text, re.ASCII):
        raise ValueError(text)
    return float(text)


def _widths(text: str) -> tuple[int, ...]:
    widths: list[int] = []
    for part in text.split("-"):
        width, times, n = part.partition("x")
        repeat = _positive(n) if times else 1
        if len(widths) + repeat > MAX_HIDDEN_LAYERS:
            raise ValueError(text)
        widths += [_positive(width)] * repeat
    return tuple(widths)


def _show_widths(widths: tuple[int, ...]) -> str:
    runs = ((width, len(list(run))) for width, run in groupby(widths))
    return "-".join(f"{width}x{n}" if n > 1 else str(width) for width, n in runs)


def whole_number(default: int, meaning: str) -> Option:
    """A whole number from 1."""
    return Option(str(default), meaning, "a whole number from 1 to 9999999", _positive)


def share(default: str, meaning: str) -> Option:
    """A number from 0 to below 1, such as a probability."""
    allowed = "a number from 0 to below 1, such as 0.2"
    return Option(default, meaning, allowed, _share, lambda v: f"{v:.15g}")


_JOINED = "widths joined by '-', each with an optional 'x' and a repeat, such as"


def widths(default: str) -> Option:
    allowed = f"{_JOINED} 300-100 or 100x5 (at most {MAX_HIDDEN_LAYERS} hidden layers)"
    return Option(default, "units of each hidden layer", allowed, _widths, _show_widths)


def hidden(meaning: str) -> Option:
    """Widths of layers that need not be there; the default is that they are not."""
    allowed = f"'none', or {_JOINED} 512x2 (at most {MAX_HIDDEN_LAYERS} layers)"
    return Option(
        *("none", meaning, allowed),
        lambda text: () if text.casefold() == "none" else _widths(text),
        lambda widths: _show_widths(widths) or "none",
    )


def norm(default: str, choices: tuple[str, ...] = NORMS) -> Option:
    return choice(default, "normalisation after each hidden layer", choices)


GROUPS = Option(
    "auto",
    "groups of norm=group; auto is 4 channels a group where that divides; 1 is GroupNorm(1)",
    "'auto' or a whole number from 1 that divides the width",
    lambda text: "auto" if text.casefold() == "auto" else _positive(text),
)
INIT = choice("kaiming", "initialisation", INITS)


def check_together(where: str, values: Mapping[str, Value]) -> None:
    """Raise :class:`BadParameter` if two options, each allowed by itself, contradict each other."""
    norm, groups, heads, width = (values.get(k) for k in ("norm", "groups", "heads", "width"))
    if isinstance(groups, int) and norm != "group":
        raise BadParameter(
            f"{where}: groups={groups} needs norm=group, but norm is {norm}."
            " Leave groups out, or set norm=group."
        )
    if "headwidth" in values:  # heads of a width of their own
        heads = None
    for name, parts, verb in (("groups", groups, "does"), ("heads", heads, "do")):
        if isinstance(parts, int) and isinstance(width, int) and width % parts:
            fitting = ", ".join(str(n) for n in range(1, min(width, 64) + 1) if width % n == 0)
            raise BadParameter(
                f"{where}: {name}={parts} {verb} not divide the width {width}. Allowed: {fitting}."
            )
    widths = values.get("widths")
    if norm == "layer" and (width == 1 or (isinstance(widths, tuple) and 1 in widths)):
        raise BadParameter(
            f"{where}: LayerNorm of a single channel is always 0. Take a width of at least 2."
        )
