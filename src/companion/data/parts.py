"""Parts of a dataset's train split, by a suffix of its name: ``digits@split-a``.

``@split-a`` has 20 % of each class of the lower half and 80 % of each class of the upper half,
``@split-b`` the rest; ``@random-50-3`` is a random 50 %, number 3, and contains ``random-30-3``.
Test split and normalisation stay those of the whole dataset, so networks trained on parts can be
put on one line. A path may itself hold an ``@``: a file or folder of the full name keeps its
meaning.

Source: Git Re-Basin (Ainsworth et al. 2023), Fig. 5 (there of CIFAR-100, and drawn at random rather
than class by class) and Fig. 13 (random halves); our chapter 2.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.data.sources import fingerprint

SEPARATOR = "@"
ALLOWED = "split-a, split-b, random-PERCENT-NUMBER (such as random-50-3)"
FEW = 5  # one in five examples of a class goes to the half that is to see little of it
_RANDOM = r"random-([1-9][0-9]?)-(0|[1-9][0-9]{0,5})"
_PART = re.compile(rf"split-[ab]|{_RANDOM}", re.ASCII)


@dataclass(frozen=True)
class Part:
    """A part of a train split: ``name`` as in the suffix."""

    name: str

    @property
    def label(self) -> str:
        """For figures and tables: ``split A``, ``random 50 %, no. 3``."""
        if found := re.fullmatch(_RANDOM, self.name):
            return f"random {found[1]} %, no. {found[2]}"
        return f"split {self.name[-1].upper()}"

    def rows(self, y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Which rows of the train split belong to the part: a pure function of labels and name.

        Arguments:
            y: (N,) labels ``0 … classes - 1``. The first ``classes // 2`` are the lower half.

        Returns:
            rows, int64, ascending. Those of ``split-a`` and ``split-b`` are complements.

        Raises:
            BadParameter: nothing would be left.
        """
        if found := re.fullmatch(_RANDOM, self.name):
            percent, number = int(found[1]), int(found[2])
            n = (len(y) * percent + 50) // 100
            order = Key("data", "part", "random", number).permutation(len(y)).numpy()
            chosen = np.sort(order[:n])
        else:
            in_a = np.zeros(len(y), dtype=bool)
            for c in range(classes):
                rows = np.flatnonzero(y == c)
                order = Key("data", "part", "split", "class", c).permutation(len(rows)).numpy()
                few = rows[order[: max(1, (len(rows) + FEW // 2) // FEW)]]
                in_a[few if c < classes // 2 else np.setdiff1d(rows, few)] = True
            chosen = np.flatnonzero(in_a if self.name == "split-a" else ~in_a)
        if not len(chosen):
            raise BadParameter(
                f"dataset part {self.name!r}: none of the {len(y)} training images is in it."
            )
        return chosen.astype(np.int64)

    def fingerprint(self, whole: str, rows: NDArray[np.int64]) -> str:
        """SHA-256 (hex) of the part: the dataset's own, the name and the rows that are in it."""
        chosen = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        return fingerprint(f"part v1: train={self.name}", [("whole", whole), ("rows", chosen)])


def split_name(name: str) -> tuple[str, Part | None]:
    """``digits@split-a`` -> ``digits`` and the part; ``digits`` -> itself and None.

    Raises:
        BadParameter: a suffix that is no part; a part before the options of ``images:PATH?…``.
    """
    base, separator, suffix = name.rpartition(SEPARATOR)
    if not separator:
        return name, None
    known = _PART.fullmatch(suffix) is not None
    if name.startswith("text:"):  # refused behind a text: only a path may hold what looks like one
        return (base, Part(suffix)) if known and not _exists(name) else (name, None)
    if name.startswith("images:"):
        path, question, options = suffix.partition("?")
        if question and _PART.fullmatch(path) and not _exists(f"{base}{SEPARATOR}{path}"):
            raise BadParameter(
                f"dataset {name!r}: the part stands behind the options: "
                f"{base}?{options}{SEPARATOR}{path}."
            )
        return (base, Part(suffix)) if known and not _exists(name) else (name, None)
    if not known:
        raise BadParameter(f"dataset {name!r}: {suffix!r} is no part. Allowed: {ALLOWED}.")
    return base, Part(suffix)


def _exists(name: str) -> bool:
    return Path(name.partition(":")[2]).expanduser().exists()
