"""Layer barriers between stored runs: measured once, many pairs at a time, kept in the store."""

from __future__ import annotations

from collections.abc import Sequence

from companion.layerwise.values import LayerBarriers, Sweep
from companion.pairs import Pair
from companion.runs import Store


def measure(
    pairs: Sequence[Pair],
    settings: Sweep | None = None,
    *,
    reference_error: float | None = None,
    max_error: float | None = None,
    store: Store | None = None,
    device: str = "cpu",
    workers: int = 0,
    label: str = "layers",
) -> list[LayerBarriers]:
    """Train what is missing, then sweep the layers of every pair, in that order.

    The twin of :func:`companion.pairs.measure`, with the same rule for gate G0.

    Arguments:
        pairs: :class:`companion.pairs.Pair` s; their ``step`` is the checkpoint. A pair at step 0
            of one init is a control: equal networks, so give ``max_error=100``.
        settings: see :class:`Sweep`.

    Raises:
        as :func:`companion.training.train`.
    """
    raise NotImplementedError
