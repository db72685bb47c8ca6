"""Pictures of features, layer by layer. Each takes values and draws on axes; none computes.

Companion to :mod:`companion.report.plots`, used by chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from companion.report.plots import _LINES, _MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Bands = Mapping[str, Mapping[str, Sequence[float]]]
"""layer -> ``mean``, ``low``, ``high`` … or, one level up, what :func:`by_layer` returns."""


MOST_NAMES = 14
"""Layers that are named below one panel at most."""


def by_layer(
    ax: Axes,
    series: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    ylabel: str = "",
    log: bool = True,
    names: bool = True,
    plain: Sequence[str] = (),
) -> dict[str, Any]:
    """A number of each layer: the mean over pairs, and the range over them as a band.

    Arguments:
        series: label -> one mapping a pair, layer -> value; layers in the order they compute. A
            label may lack layers of the others (a condition that only ReLUs have).
        log: a logarithmic axis; what is not above 0 is not drawn there.
        names: whether layers are named below the axis.
        plain: labels that are drawn in black, dashed, without markers: what others are held to.

    Returns:
        what was drawn: ``layers``, and for each label ``mean``, ``low``, ``high`` and ``pairs``.
    """
    layers = list(dict.fromkeys(n for group in series.values() for one in group for n in one))
    drawn: dict[str, Any] = {"layers": layers}
    for label, group in series.items():
        if not group:
            continue
        values = np.asarray([[one.get(n, np.nan) for n in layers] for one in group], dtype=float)
        drawn[label] = {
            "mean": values.mean(0),
            "low": values.min(0),
            "high": values.max(0),
            "pairs": len(group),
        }
    redraw(ax, drawn, log=log, names=names, plain=plain)
    ax.set_ylabel(ylabel)
    return drawn


def redraw(
    ax: Axes,
    drawn: Mapping[str, Any],
    *,
    log: bool = True,
    names: bool = True,
    plain: Sequence[str] = (),
) -> None:
    """Draw what :func:`by_layer` returned, now or from a record; of many layers every second or
    third is named. Without any pair the panel says so."""
    layers = drawn.get("layers") or []
    if not layers or len(drawn) == 1:
        ax.text(0.5, 0.5, "no valid pair", transform=ax.transAxes, ha="center", va="center")
        ax.set_xticks([])
        return
    at = np.arange(len(layers))
    number = 0
    for label, band in drawn.items():
        if label == "layers":
            continue
        mean, low, high = (
            np.asarray([np.nan if v is None else v for v in band[k]], dtype=float)
            for k in ("mean", "low", "high")
        )
        good = np.isfinite(mean) & ((mean > 0) | (not log))
        look: dict[str, Any] = {
            "color": f"C{number % 7}",
            "linestyle": _LINES[number % 4],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 3.5,
            "linewidth": 1.4,
        }
        if label in plain:
            look = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.2}
        else:
            number += 1
        ax.plot(at[good], mean[good], label=label, **look)
        floor = np.where(low > 0, low, mean) if log else low
        ax.fill_between(
            at[good], floor[good], high[good], color=look["color"], alpha=0.15, linewidth=0
        )
    if log:
        ax.set_yscale("log")
    every = -(-len(layers) // MOST_NAMES)
    shown = layers[::every] if names else [""] * len(layers[::every])
    ax.set_xticks(at[::every], shown, rotation=90, fontsize=8)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.grid(axis="x", visible=False)


def profile(ax: Axes, series: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Singular values over the largest, against their place among them as a share of all.

    Arguments:
        series: label -> values over the largest, in falling order.
    """
    drawn: dict[str, Any] = {}
    for number, (label, values) in enumerate(series.items()):
        shown = np.asarray(values)
        place = (np.arange(len(shown)) + 1) / len(shown)
        ax.plot(place, shown, _LINES[number % 4], color=f"C{number % 7}", label=label)
        every = max(1, len(shown) // 60)
        drawn[label] = {"place": place[::every], "value": shown[::every], "count": len(shown)}
    ax.set(
        xlabel="place of the singular value, share of all",
        ylabel="singular value / largest",
        ylim=(0, 1.02),
        xlim=(0, 1),
    )
    return drawn
