"""Pictures of layer barriers. Each takes values and draws on axes; none computes.

Companion to :mod:`companion.report.plots`, used by chapter 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heat(
    ax: Axes,
    values: Mapping[str, Sequence[float]],
    columns: Sequence[str],
    *,
    limit: float,
    labels: bool = True,
) -> Any:
    """A heat map with a number in every cell, the first row set apart (the paper's Fig. 1).

    Arguments:
        values: row label -> one barrier a column, in nats. columns: their labels.
        limit: upper end of the colour scale; lower end is 0, and negative barriers look like 0.
        labels: whether the rows' names are drawn.

    Returns:
        the artist, for a colour bar.
    """
    table = np.asarray(list(values.values()), dtype=float)
    picture = ax.imshow(table, cmap="cividis", vmin=0, vmax=limit, aspect="auto")
    small = 7.5 if len(values) > 25 else 8.5
    for (row, column), value in np.ndenumerate(table):
        text = "—" if np.isnan(value) else f"{value:.2f}".replace("-", "−")
        dark = np.isnan(value) or value < 0.6 * limit
        ax.text(
            column, row, text, ha="center", va="center", fontsize=small, color="w" if dark else "k"
        )
    ax.axhline(0.5, color="white", linewidth=3)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(values)), list(values) if labels else [""] * len(values))
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return picture


def profile(
    ax: Axes, pairs: Sequence[Mapping[str, float]], full: Sequence[float], *, labels: bool = True
) -> dict[str, Any]:
    """One dot a layer and pair, in the order of the layers; each pair's whole network as a line.

    Arguments:
        pairs: one mapping a pair: layer -> barrier (nats). full: the whole network's, one a pair.

    Returns:
        what was drawn.
    """
    names = list(pairs[0])
    markers = ("o", "s", "^", "D", "v", "P")
    for number, (one, whole) in enumerate(zip(pairs, full, strict=True)):
        colour = f"C{number % 7}"
        ax.plot(
            list(one.values()),
            [-i for i in range(len(names))],
            markers[number % 6],
            color=colour,
            markersize=4,
            label=f"pair {number + 1}",
        )
        ax.axvline(whole, color=colour, linestyle=("-", "--", "-.", ":")[number % 4], linewidth=1.2)
    ax.axvline(0, color="#555555", linewidth=0.6)
    ax.set_yticks([-i for i in range(len(names))], names if labels else [""] * len(names))
    ax.tick_params(axis="y", labelsize=8)
    ax.set(xlabel="train loss barrier (nats)")
    return {"layers": names, "pairs": [list(p.values()) for p in pairs], "full": list(full)}


def band(
    ax: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, number: int
) -> dict[str, Any]:
    """Mean of several curves, and their range from lowest to highest as a band.

    Arguments:
        x: shape (points,). curves: one a pair, same shape. number: chooses colour and marker.
    """
    values = np.asarray(curves, dtype=float)
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    ax.plot(
        x, mean, ("-", "--", "-.", ":")[number % 4] + "os^D"[number % 4], label=label,
        color=f"C{number}", markersize=4,
    )  # fmt: skip
    ax.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    return {"x": list(x), "mean": mean, "low": low, "high": high, "pairs": len(values)}
