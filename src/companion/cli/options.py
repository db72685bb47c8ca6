"""Options that several commands share, with one wording each."""

from __future__ import annotations

from typing import Annotated

import typer

from companion.core.errors import BadParameter

BnExamples = Annotated[
    int | None,
    typer.Option(
        "--bn-examples",
        help="Training examples that BatchNorm's mode reestimate averages over at each point; 0: "
        "all of them (default: 2000, which is nearly always enough, and quick).",
    ),
]


def averaged(bn_examples: int | None) -> int | None:
    """What ``--bn-examples`` asks for, as :class:`companion.connectivity.Walker` takes it.

    Raises:
        BadParameter: a negative number, or 1, of which there is no variance.
    """
    from companion.connectivity import BN_EXAMPLES

    if bn_examples is None:
        return BN_EXAMPLES
    if bn_examples < 0 or bn_examples == 1:
        raise BadParameter(f"--bn-examples: {bn_examples} must be 2 or more, or 0 for all.")
    return bn_examples or None
