"""Pictures of what the instruments return. Each takes values and draws on axes; none computes.

Labels say the unit, bands say what they are, and nothing is told by colour alone. matplotlib is
imported when a picture is drawn. Used by the chapters and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from companion.connectivity import Curve, Plane
from companion.core.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"error": "error (%)", "loss": "cross-entropy (nats)"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")


def lines(
    ax: Axes, curves: Mapping[str, Sequence[Curve]], split: str = "test", metric: str = "error"
) -> dict[str, Any]:
    """Loss or error along the line: the mean of each group of curves, and its range as a band.

    Arguments:
        curves: label -> curves of all pairs, on one grid.

    Returns:
        what was drawn, for download: alpha, and mean, lowest and highest value of each label.
    """
    drawn: dict[str, Any] = {"unit": UNITS[metric], "split": split}
    for number, (label, group) in enumerate(curves.items()):
        alphas = group[0].alphas
        values = np.asarray([c.values[split][metric] for c in group])
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        (line,) = ax.plot(alphas, mean, _LINES[number % 4], label=label)
        ax.fill_between(alphas, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        drawn["alpha"] = list(alphas)
        drawn[label] = {"mean": mean, "low": low, "high": high, "pairs": len(group)}
    ax.set(
        xlabel="α, from copy A (0) to copy B (1)", ylabel=f"{split} {UNITS[metric]}", xlim=(0, 1)
    )
    ax.legend()
    return drawn


def against_k(
    ax: Axes,
    series: Mapping[str, Mapping[int, Interval]],
    *,
    steps: int,
    threshold: float | None = 2.0,
    ylabel: str = "error barrier (points)",
) -> dict[str, Any]:
    """A statistic against the fork step k, with its intervals; k evenly spaced, in grid order.

    Arguments:
        series: label -> k -> interval. steps: T, for the second line of the tick labels.
        threshold: drawn as a dashed line; None leaves it out.
    """
    ks = sorted({k for points in series.values() for k in points})
    place = {k: i for i, k in enumerate(ks)}
    drawn: dict[str, Any] = {"T": steps}
    shift = 0.06 * (np.arange(len(series)) - (len(series) - 1) / 2)
    for number, (label, points) in enumerate(series.items()):
        at = [place[k] + shift[number] for k in points]
        value = np.asarray([p.value for p in points.values()])
        below = value - np.asarray([p.low for p in points.values()])
        above = np.asarray([p.high for p in points.values()]) - value
        ax.errorbar(
            at,
            value,
            yerr=np.maximum([below, above], 0),
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[number % 4],
            label=label,
        )
        drawn[label] = {
            "k": list(points),
            "mean": value,
            "low": value - below,
            "high": value + above,
            "pairs": [p.n for p in points.values()],
        }
    if threshold is not None:
        ax.axhline(threshold, color="#555555", linestyle=(0, (5, 4)), linewidth=1)
        ax.annotate(
            f"{threshold:g} points: the paper's line",
            (1, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="#555555",
            fontsize=9,
        )
    ax.set_xticks(range(len(ks)), [f"{k}\n{100 * k / steps:.3g} %" for k in ks])
    ax.set(xlabel="fork step k, and its share of training", ylabel=ylabel)
    ax.legend()
    return drawn


def panels(
    runs: Mapping[str, tuple[int, Mapping[str, Mapping[int, Interval]]]],
) -> tuple[Figure, dict[str, Any]]:
    """:func:`against_k` for several runs, a panel each, on one vertical scale.

    Arguments:
        runs: title -> (T, label -> k -> interval). The title says dataset, scale and hardware.

    Returns:
        the figure, and what was drawn, by title.
    """
    import matplotlib.pyplot as plt

    rows = -(-len(runs) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(9.4, 3.9 * rows), sharey=True, squeeze=False)
    drawn = {}
    for ax, (title, (steps, series)) in zip(axes.flat, runs.items(), strict=False):
        drawn[" ".join(title.split())] = against_k(ax, series, steps=steps)
        ax.set_title(title, fontsize=10)
        ax.legend(fontsize=8)
    for ax in axes.flat[len(runs) :]:
        ax.set_visible(False)
    return fig, drawn


def conditions(
    ax: Axes,
    rows: Mapping[str, Interval],
    *,
    threshold: float | None = 2.0,
    xlabel: str = "test error barrier (points)",
) -> dict[str, Any]:
    """One statistic under several named conditions: a dot and its interval each, top to bottom."""
    names = list(rows)
    for place, row in enumerate(rows.values()):
        ax.errorbar(
            row.value,
            -place,
            xerr=[[max(row.value - row.low, 0)], [max(row.high - row.value, 0)]],
            marker=_MARKERS[place % len(_MARKERS)],
            color="C0",
            linestyle="none",
        )
        ax.annotate(
            f"{row.value:.1f}",
            (row.value, -place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    if threshold is not None:
        ax.axvline(threshold, color="#555555", linestyle=(0, (5, 4)), linewidth=1)
    ax.set_yticks([-i for i in range(len(names))], names)
    right = max([r.high for r in rows.values()] + [2 * (threshold or 0)])
    ax.set(xlabel=xlabel, xlim=(-0.04 * right, 1.08 * right), ylim=(-len(names) + 0.4, 0.6))
    ax.grid(axis="y", visible=False)
    return {
        n: {"mean": r.value, "low": r.low, "high": r.high, "pairs": r.n} for n, r in rows.items()
    }


def plane(ax: Axes, found: Plane, split: str = "test", metric: str = "error") -> Any:
    """Filled contours of a plane through W_0, A and B, with the segment A–B. Returns the artist."""
    z = np.asarray(found.values[split][metric])
    levels = np.linspace(0, 100, 11) if metric == "error" else np.geomspace(z.min(), z.max(), 13)
    filled = ax.contourf(found.x, found.y, z, levels=levels, cmap="cividis_r")
    ax.contour(found.x, found.y, z, levels=levels, colors="white", linewidths=0.4)
    origin, a, b = found.points
    ax.plot(*zip(a, b, strict=True), color="#d55e00", linewidth=2)
    for (x, y), name, marker in ((origin, "W₀", "s"), (a, "A", "o"), (b, "B", "o")):
        ax.plot(x, y, marker, color="#d55e00", markeredgecolor="white", markersize=8)
        ax.annotate(
            name,
            (x, y),
            xytext=(6, 6),
            textcoords="offset points",
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
        )
    ax.set(xlabel="distance in weight space", aspect="equal")
    ax.grid(visible=False)
    return filled
