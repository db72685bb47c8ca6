"""Pictures for networks that were matched: planes, sweeps, reliability, a map of settings.

As :mod:`companion.report.plots`: each function takes values and draws on axes; none computes. Used
by our chapter 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from companion.connectivity import Plane
from companion.core.stats import Interval
from companion.experiments.merged import Reading
from companion.report import plots
from companion.report.plots import _LINES, _MARKERS
from companion.report.recorded import Record, curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR = "#d55e00"
FEWEST = 10  # pairs in a bin of a reliability curve that is drawn; fewer are noise


def sweep(
    ax: Axes,
    series: Mapping[str, Mapping[int, Interval]],
    *,
    xlabel: str,
    ylabel: str,
    ticks: Mapping[int, str] | None = None,
    total: int = 0,
) -> dict[str, Any]:
    """A statistic with its intervals against a whole number (width, step), evenly spaced.

    Arguments:
        series: label -> number -> interval; ticks: number -> what the axis says there.
        total: of the axis (T, for steps), kept with the data.

    Returns:
        what was drawn, in the form that :func:`companion.report.recorded.curves` reads.
    """
    numbers = sorted({k for points in series.values() for k in points})
    place = {k: i for i, k in enumerate(numbers)}
    drawn: dict[str, Any] = {"T": total}
    shift = 0.05 * (np.arange(len(series)) - (len(series) - 1) / 2)
    for number, (label, points) in enumerate(series.items()):
        value = np.asarray([p.value for p in points.values()])
        low = np.asarray([p.low for p in points.values()])
        high = np.asarray([p.high for p in points.values()])
        ax.errorbar(
            [place[k] + shift[number] for k in points],
            value,
            yerr=np.maximum([value - low, high - value], 0),
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[number % 4],
            label=label,
        )
        drawn[label] = {
            "k": list(points),
            "mean": value,
            "low": low,
            "high": high,
            "pairs": [p.n for p in points.values()],
        }
    ax.set_xticks(range(len(numbers)), [(ticks or {}).get(k, str(k)) for k in numbers])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return drawn


def panels(records: Sequence[Record], figure: str, *, xlabel: str, ylabel: str) -> Any:
    """:func:`sweep` for what was recorded of a figure, a panel each.

    Returns:
        the figure and what was drawn, or None if no record has this figure.
    """
    import matplotlib.pyplot as plt

    found = curves(records, figure)
    if not found:
        return None
    rows = -(-len(found) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(9.4, 3.9 * rows), squeeze=False)
    drawn = {}
    for ax, (title, (total, series)) in zip(axes.flat, found.items(), strict=False):
        drawn[" ".join(title.split())] = sweep(
            ax, series, xlabel=xlabel, ylabel=ylabel, total=total
        )
        ax.set_title(title, fontsize=10)
        ax.legend(fontsize=8)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    return fig, drawn


def plane(
    ax: Axes,
    found: Plane,
    names: tuple[str, str, str] = ("A", "B", "π(B)"),
    split: str = "test",
    metric: str = "error",
) -> Any:
    """Filled contours of the plane through three networks, the segments from the first one drawn.

    Returns:
        the filled artist, for a colour bar.
    """
    z = np.asarray(found.values[split][metric])
    levels = np.linspace(0, 100, 11)
    if metric == "loss":
        z = np.minimum(z, np.nanmax(z[np.isfinite(z)]))
        levels = np.geomspace(max(float(z.min()), 1e-4), float(z.max()), 13)
    filled = ax.contourf(found.x, found.y, z, levels=levels, cmap="cividis_r")
    ax.contour(found.x, found.y, z, levels=levels, colors="white", linewidths=0.4)
    origin, b, c = found.points
    for end, style in ((b, "--"), (c, "-")):
        ax.plot(*zip(origin, end, strict=True), color=COLOUR, linewidth=2, linestyle=style)
    for (x, y), name in zip((origin, b, c), names, strict=True):
        ax.plot(x, y, "o", color=COLOUR, markeredgecolor="white", markersize=8)
        ax.annotate(
            name,
            (x, y),
            xytext=(7, 7),
            textcoords="offset points",
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
        )
    ax.set(xlabel="distance in weight space", ylabel="distance in weight space", aspect="equal")
    ax.grid(visible=False)
    return filled


def reliability(ax: Axes, readings: Mapping[str, Reading]) -> dict[str, Any]:
    """How often a stated probability comes true, for several predictors, in bins."""
    ax.plot([0, 1], [0, 1], color="#555555", linestyle=(0, (5, 4)), linewidth=1)
    drawn = {}
    for number, (label, one) in enumerate(readings.items()):
        full = [i for i, n in enumerate(one.count) if n >= FEWEST]
        ax.plot(
            [one.confidence[i] for i in full],
            [one.fraction[i] for i in full],
            _LINES[number % 4],
            marker=_MARKERS[number % len(_MARKERS)],
            label=f"{label}, ECE {one.ece:.1f}",
        )
        drawn[label] = {
            "confidence": one.confidence,
            "fraction": one.fraction,
            "count": one.count,
            "ece": one.ece,
        }
    ax.set(xlabel="stated probability", ylabel="share that is true", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
    return drawn


def heat(
    ax: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    most: float,
    form: str = "{:.1f}",
) -> Any:
    """A map of numbers in cells: each says its value; NaN cells say INVALID and are grey.

    Arguments:
        values: shape (rows, columns); most: the value at which the colour scale ends.
    """
    z = np.asarray(values, dtype=float)
    ax.set_facecolor("#bbbbbb")
    image = ax.imshow(np.ma.masked_invalid(z), cmap="cividis_r", vmin=0, vmax=most, aspect="auto")
    for (i, j), value in np.ndenumerate(z):
        dark = np.isfinite(value) and value > 0.55 * most
        ax.annotate(
            form.format(value) if np.isfinite(value) else "INVALID",
            (j, i),
            ha="center",
            va="center",
            fontsize=9 if np.isfinite(value) else 7,
            color="white" if dark else "black",
        )
    ax.set_xticks(range(len(columns)), columns, fontsize=9)
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.grid(visible=False)
    return image


def conditions(
    ax: Axes, rows: Mapping[str, Interval], *, xlabel: str, form: str = "{:.2f}"
) -> dict[str, Any]:
    """:func:`companion.report.plots.conditions` with no threshold; numbers as ``form`` says."""
    drawn = plots.conditions(ax, rows, threshold=None, xlabel=xlabel)
    for text, row in zip(list(ax.texts), rows.values(), strict=True):
        text.set_text(form.format(round(row.value, 2) + 0.0).replace("-", "−"))
    return drawn


def levels(ax: Axes, values: Mapping[str, float]) -> None:
    """Horizontal lines with their names at the right, for numbers that a curve is read against."""
    for number, (label, value) in enumerate(values.items()):
        ax.axhline(
            value,
            color=f"C{3 + number}",
            linestyle=_LINES[(1 + number) % 4],
            linewidth=1.2,
            label=label,
        )


def figure(columns: int, height: float = 3.8, rows: int = 1) -> tuple[Figure, Any]:
    """Panels of the book's width, ``height`` inches in all."""
    import matplotlib.pyplot as plt

    width = 9.2 if columns > 1 else 7.0
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=True)
