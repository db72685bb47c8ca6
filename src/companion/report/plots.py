"""Pictures of what the instruments return, for chapters, records and the command line.

Each function takes values and draws on axes; none computes a statistic. Each returns what it drew,
for download. Labels say the unit, bands say what they are, nothing is told by colour alone, and
wherever colour stands for a number, dark is high. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from companion.core import codec
from companion.report.figures import ON_DARK, ON_LIGHT
from companion.report.words import said

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from companion.connectivity import Barrier, Curve, Plane
    from companion.core.stats import Interval
    from companion.experiments.landscape import Geometry
    from companion.landscape import Projected
    from companion.layerwise import LayerBarriers

Axis = Literal["even", "linear", "log"]
UNITS = {"error": "error (%)", "loss": "cross-entropy (nats)"}
MAP = "cividis_r"  # yellow is low, dark blue is high
WIDEST = 8.6  # inches: at most 620 pt, so that a label of 8 pt stays above 9 pixels on a page
MOST_NAMES = 14  # layers named below one panel at most
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")
_SPLITS: dict[str, dict[str, Any]] = {
    "test": {"color": "C0", "linestyle": "-"},
    "train": {"color": "C1", "linestyle": "--"},
}
_RED = "#d55e00"  # what is drawn on a map
_DASHED: dict[str, Any] = {"color": "#555555", "linestyle": (0, (5, 4)), "linewidth": 1}
_PLATE = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}


# --- panels, legends, lines that others are held to


def grid(
    count: int, *, columns: int = 2, height: float = 3.8, width: float | None = None, **more: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, each row ``height`` inches high; places left over are hidden.

    Arguments:
        width: of the figure in inches; default: the page's, which no figure exceeds.
        more: for ``plt.subplots``, such as ``sharey=True``.
    """
    import matplotlib.pyplot as plt

    columns = max(min(count, columns), 1)
    rows = max(-(-count // columns), 1)
    size = (min(width or (WIDEST if columns > 1 else 7.0), WIDEST), height * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **more)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:count])


def legend(fig: Figure, columns: int = 4, *, below: bool = False) -> None:
    """One legend for all panels, above or below them and in place of their own."""
    known: dict[str, Any] = {}
    for ax in fig.axes:
        known |= {t: h for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
        if own := ax.get_legend():
            own.remove()
    if known:
        place: Any = "outside lower center" if below else "outside upper center"
        fig.legend(list(known.values()), list(known), loc=place, ncols=columns)


def dashed(ax: Axes, y: float | None = None, *, x: float | None = None, text: str = "") -> None:
    """A grey dashed line that values are held to, horizontal at y or vertical at x.

    Arguments:
        text: what it is, above the right end of a horizontal line.
    """
    if x is not None:
        ax.axvline(x, **_DASHED)
    if y is not None:
        ax.axhline(y, **_DASHED)
    if y is not None and text:
        ax.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=_DASHED["color"],
            fontsize=9,
            bbox=_PLATE,
            zorder=1,  # below the curves
        )


def levels(ax: Axes, values: Mapping[str, float]) -> dict[str, float]:
    """Horizontal lines with their names in the legend, for numbers a curve is read against."""
    for number, (label, value) in enumerate(values.items()):
        style = _LINES[(1 + number) % 4]
        ax.axhline(value, color=f"C{3 + number}", linestyle=style, linewidth=1.2, label=label)
    return dict(values)


def _legend(ax: Axes, **look: Any) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**look)


# --- curves with bands


def lines(
    ax: Axes,
    curves: Mapping[str, Sequence[Curve]],
    split: str = "test",
    metric: str = "error",
    xlabel: str = "α, from copy A (0) to copy B (1)",
) -> dict[str, Any]:
    """Loss or error along the line: the mean of each group of curves, and its range as a band.

    Arguments:
        curves: label -> curves of all pairs, on one grid. An empty group is left out.

    Returns:
        what was drawn: alpha, and mean, lowest and highest value of each label.
    """
    drawn: dict[str, Any] = {"unit": UNITS[metric], "split": split}
    for number, (label, group) in enumerate(curves.items()):
        if group:
            drawn["alpha"] = list(group[0].alphas)
            drawn[label] = _range([c.values[split][metric] for c in group])
            style = _LINES[number % 4]
            _band(ax, drawn["alpha"], drawn[label], color=f"C{number}", ls=style, label=label)
    ax.set(xlabel=xlabel, ylabel=f"{split} {UNITS[metric]}", xlim=(0, 1))
    _legend(ax)
    return drawn


def band(
    ax: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, number: int
) -> dict[str, Any]:
    """Mean of several curves, and their range from lowest to highest as a band.

    Arguments:
        x: shape (points,).
        curves: one a pair, same shape.
        number: chooses colour and marker.
    """
    drawn = {"x": list(x)} | _range(curves)
    look = {"color": f"C{number}", "ls": _LINES[number % 4], "marker": _MARKERS[number % 7]}
    _band(ax, drawn["x"], drawn, label=label, markersize=4, **look)
    return drawn


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
        if group:
            drawn[label] = _range([[one.get(n, np.nan) for n in layers] for one in group])
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
    coloured = [label for label in drawn if label != "layers" and label not in plain]
    for label, one in drawn.items():
        if label == "layers":
            continue
        mean, low, high = (_floats(one[k]) for k in ("mean", "low", "high"))
        good = np.isfinite(mean) & ((mean > 0) | (not log))
        low = np.where(low > 0, low, mean) if log else low
        look: dict[str, Any] = {"color": "black", "ls": (0, (4, 2)), "linewidth": 1.2}
        if label in coloured:
            number = coloured.index(label)
            look = {"color": f"C{number % 7}", "ls": _LINES[number % 4], "linewidth": 1.4}
            look |= {"marker": _MARKERS[number % 7], "markersize": 3.5}
        kept = {"mean": mean[good], "low": low[good], "high": high[good]}
        _band(ax, at[good], kept, label=label, **look)
    if log:
        ax.set_yscale("log")
    every = -(-len(layers) // MOST_NAMES)
    shown = layers[::every] if names else [""] * len(layers[::every])
    ax.set_xticks(at[::every], shown, rotation=90, fontsize=8)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.grid(axis="x", visible=False)


def _floats(values: Iterable[float | None]) -> Any:
    """An array in which what is missing, as JSON has it, is NaN."""
    return np.asarray([np.nan if v is None else v for v in values], dtype=float)


def _range(curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    values = np.asarray(curves, dtype=float)
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    return {"mean": mean, "low": low, "high": high, "pairs": len(values)}


def _band(ax: Axes, x: Any, drawn: Mapping[str, Any], *, color: str, **look: Any) -> None:
    ax.plot(x, drawn["mean"], color=color, **look)
    ax.fill_between(x, drawn["low"], drawn["high"], color=color, alpha=0.15, linewidth=0)


# --- values with intervals


def sweep(
    ax: Axes,
    series: Mapping[str, Mapping[int, Interval]],
    *,
    xlabel: str,
    ylabel: str,
    ticks: Mapping[int, str] | None = None,
    total: int = 0,
    axis: Axis = "even",
) -> dict[str, Any]:
    """A statistic with its intervals against a whole number (width, step).

    Arguments:
        series: label -> number -> interval; one without any is left out.
        ticks: number -> what the axis says there.
        total: of the axis (T, for steps); then ticks say the share of it, too.
        axis: how the numbers are spaced: in even steps, linearly, or by their logarithm, with 0
            a doubling before the first. Each number has its tick.

    Returns:
        what was drawn, in the form that :func:`companion.report.recorded.curves` reads.
    """
    numbers = sorted({k for points in series.values() for k in points})
    place = _places(numbers, axis)
    drawn: dict[str, Any] = {"T": total}
    shift = 0.06 * (np.arange(len(series)) - (len(series) - 1) / 2)
    for number, (label, points) in enumerate(series.items()):
        mean = np.asarray([p.value for p in points.values()], dtype=float)
        low = np.asarray([p.low for p in points.values()], dtype=float)
        high = np.asarray([p.high for p in points.values()], dtype=float)
        if points:
            ax.errorbar(
                [place[k] + shift[number] for k in points],
                mean,
                yerr=np.maximum([mean - low, high - mean], 0),
                color=f"C{number}",
                marker=_MARKERS[number % 7],
                linestyle=_LINES[number % 4],
                label=label,
            )
        drawn[label] = {"k": list(points), "mean": mean, "low": low, "high": high}
        drawn[label]["pairs"] = [p.n for p in points.values()]
    shares = {k: f"{k}\n{100 * k / total:.3g} %" if total else str(k) for k in numbers}
    ax.set_xticks([place[k] for k in numbers], [(ticks or shares).get(k, str(k)) for k in numbers])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return drawn


def _places(numbers: Sequence[int], axis: Axis) -> dict[int, float]:
    """Where each number stands on the axis; neighbours are about one unit apart."""
    if axis == "even" or len(numbers) < 2:
        return {k: float(i) for i, k in enumerate(numbers)}
    if axis == "linear":
        unit = (numbers[-1] - numbers[0]) / (len(numbers) - 1)
        return {k: (k - numbers[0]) / unit for k in numbers}
    first = next(k for k in numbers if k > 0)
    return {k: float(np.log2(k / first)) if k else -1.0 for k in numbers}


def against_k(
    ax: Axes,
    series: Mapping[str, Mapping[int, Interval]],
    *,
    steps: int,
    threshold: float | None = 2.0,
    meaning: str = "points: the paper's line",
    axis: Axis = "log",
    xlabel: str = "fork step k (log axis, 0 set apart), and its share",
    ylabel: str = "error barrier (points)",
) -> dict[str, Any]:
    """:func:`sweep` over the fork step k, with the line that a barrier is held to.

    Arguments:
        series: label -> k -> interval.
        steps: T.
        threshold: where the dashed line is; None: none.
        meaning: what is written there behind the number.
        axis: as :func:`sweep`.
    """
    drawn = sweep(ax, series, xlabel=xlabel, ylabel=ylabel, total=steps, axis=axis)
    if threshold is not None:
        dashed(ax, threshold, text=f"{threshold:g} {meaning}")
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]), auto=True)  # a panel beside it may be higher
    _legend(ax)
    return drawn


def panels(
    runs: Mapping[str, tuple[int, Mapping[str, Mapping[int, Interval]]]],
    *,
    threshold: float | None = 2.0,
    xlabel: str = "fork step k (log axis, 0 set apart), and its share",
    ylabel: str = "error barrier (points)",
) -> tuple[Figure, dict[str, Any]]:
    """:func:`against_k` for several runs, a panel each, on one vertical scale.

    Arguments:
        runs: title -> (T, or 0 if the axis has no total; label -> k -> interval). The title says
            dataset, scale and hardware.

    Returns:
        the figure, and what was drawn, by title.
    """
    fig, axes = grid(len(runs), columns=2, height=3.9, sharey=True)
    drawn = {}
    for ax, (title, (steps, series)) in zip(axes, runs.items(), strict=True):
        drawn[" ".join(title.split())] = against_k(
            ax,
            series,
            steps=steps,
            threshold=threshold,
            axis="log" if steps else "even",
            xlabel=xlabel,
            ylabel=ylabel,
        )
        ax.set_title(title, fontsize=10)
        _legend(ax, fontsize=8)
    return fig, drawn


def conditions(
    ax: Axes,
    rows: Mapping[str, Interval],
    *,
    threshold: float | None = 2.0,
    xlabel: str = "test error barrier (points)",
    form: str = "{:.1f}",
    colours: Sequence[str] | None = None,
    from_zero: bool = True,
) -> dict[str, Any]:
    """One statistic under several named conditions: a dot and its interval each, top to bottom.

    Arguments:
        form: of the numbers at the dots.
        colours: one a row; default: the same for all.
        from_zero: whether 0 is on the axis.
    """
    for place, row in enumerate(rows.values()):
        ax.errorbar(
            row.value,
            -place,
            xerr=[[max(row.value - row.low, 0)], [max(row.high - row.value, 0)]],
            marker=_MARKERS[place % 7],
            color=colours[place] if colours else "C0",
            linestyle="none",
        )
        ax.annotate(
            said(row.value, form),
            (row.value, -place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    if threshold is not None:
        dashed(ax, x=threshold)
    if from_zero:
        right = max([r.high for r in rows.values()] + [2 * (threshold or 0), 0]) or 1
        left = min([r.low for r in rows.values()] + [0])
        margin = right - left
        ax.set_xlim(left - 0.04 * margin, right + 0.08 * margin)
    ax.set_yticks([-i for i in range(len(rows))], list(rows))
    ax.set(xlabel=xlabel, ylim=(-len(rows) + 0.4, 0.6))
    ax.grid(axis="y", visible=False)
    return {
        n: {"mean": r.value, "low": r.low, "high": r.high, "pairs": r.n} for n, r in rows.items()
    }


def quadrants(
    ax: Axes,
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    lines: tuple[float, float],
    xlabel: str,
    ylabel: str,
    corners: tuple[str, str, str, str],
) -> dict[str, Any]:
    """Two numbers of each thing against each other, and a line that each is held to.

    Both axes are linear up to twice their line, and logarithmic beyond.

    Arguments:
        groups: label -> (x, y) of each.
        lines: where x and y are cut.
        corners: what the four parts mean: lower left, lower right, upper left, upper right.

    Returns:
        label -> ``x`` and ``y``.
    """
    drawn = {}
    for number, (label, points) in enumerate(groups.items()):
        x, y = ([p[i] for p in points] for i in (0, 1))
        ax.plot(x, y, _MARKERS[number % 7], color=f"C{number}", label=label, alpha=0.8)
        drawn[label] = {"x": x, "y": y}
    dashed(ax, lines[1], x=lines[0])
    ax.set_xscale("symlog", linthresh=2 * lines[0])
    ax.set_yscale("symlog", linthresh=2 * lines[1])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    places = ((0, 0), (1, 0), (0, 1), (1, 1))
    for (right, top), text in zip(places, corners, strict=True):
        ax.annotate(
            text,
            (0.99 if right else 0.01, 0.98 if top else 0.02),
            xycoords="axes fraction",
            ha="right" if right else "left",
            va="top" if top else "bottom",
            color=_DASHED["color"],
            fontsize=9,
            bbox=_PLATE,
        )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.margins(0.08)
    _legend(ax)
    return drawn


# --- maps


def planes(
    axes: Iterable[Axes],
    found: Mapping[str, Plane],
    *,
    names: Sequence[str] = ("W₀", "A", "B"),
    segments: Sequence[tuple[int, int]] = ((1, 2),),
    split: str = "test",
    metric: str = "error",
) -> dict[str, Any]:
    """Filled contours of planes through three networks, on one scale with its colour bar.

    Arguments:
        found: title -> plane; a panel each.
        names: of the three networks.
        segments: which of them are joined, the last by a solid line.

    Returns:
        title -> the plane as JSON has it.
    """
    axes = list(axes)
    grids = [np.asarray(one.values[split][metric], dtype=float) for one in found.values()]
    finite = np.concatenate([z[np.isfinite(z)] for z in grids])
    steps = np.linspace(0, 100, 11)
    if metric == "loss":
        low = max(float(finite.min()), 1e-4)
        steps = np.geomspace(low, max(float(finite.max()), 1.01 * low), 13)
    for ax, one, z in zip(axes, found.values(), grids, strict=True):
        z = np.clip(z, steps[0], steps[-1])
        filled = ax.contourf(one.x, one.y, z, levels=steps, cmap=MAP)
        ax.contour(one.x, one.y, z, levels=steps, colors=ON_DARK, linewidths=0.4)
        for segment in segments:
            style = "-" if segment == segments[-1] else "--"
            ends = zip(*(one.points[i] for i in segment), strict=True)
            ax.plot(*ends, color=_RED, linewidth=2, linestyle=style)
        for place, ((x, y), name) in enumerate(zip(one.points, names, strict=True)):
            joined = any(place in segment for segment in segments)
            marker = "o" if joined else "s"
            ax.plot(x, y, marker, color=_RED, markeredgecolor=ON_DARK, markersize=8)
            ax.annotate(
                name,
                (x, y),
                xytext=(7, 7),
                textcoords="offset points",
                fontweight="bold",
                bbox=_PLATE,
            )
        ax.set(xlabel="distance in weight space", aspect="equal")
        ax.grid(visible=False)
    axes[0].set_ylabel("distance in weight space")
    axes[0].figure.colorbar(filled, ax=axes, label=f"{split} {UNITS[metric]}", shrink=0.8)
    return codec.to_json(found)


def heat(
    axes: Iterable[Axes],
    maps: Mapping[str, Mapping[str, Sequence[float | None]]],
    columns: Sequence[object] | Mapping[str, Sequence[object]],
    *,
    label: str,
    form: str = "{:.2f}",
    missing: str = "—",
    apart: bool = True,
) -> dict[str, dict[str, list[float | None]]]:
    """Heat maps with a number in every cell, all on one scale, with its colour bar.

    The scale reaches from 0, or the lowest value below it, to the highest value of all maps.

    Arguments:
        maps: key -> row label -> one value a column; a panel each.
        columns: their labels, for all panels or by key.
        label: of the colour bar, with the unit.
        form: of the numbers.
        missing: what a cell says without one; it is grey.
        apart: whether the first row is set apart from the others.

    Returns:
        the maps.
    """
    axes = list(axes)
    tables = {key: np.asarray([_floats(r) for r in rows.values()]) for key, rows in maps.items()}
    finite = np.concatenate([t[np.isfinite(t)] for t in tables.values()])
    scale = {"vmin": min(finite.min(initial=0), 0), "vmax": max(finite.max(initial=0), 0.1)}
    rows_of_first = list(next(iter(maps.values())))
    for ax, (key, table) in zip(axes, tables.items(), strict=True):
        ax.set_facecolor("#bbbbbb")
        picture = ax.imshow(np.ma.masked_invalid(table), cmap=MAP, aspect="auto", **scale)
        shades = picture.to_rgba(np.nan_to_num(table))[..., :3] @ (0.3, 0.59, 0.11)
        for (row, column), value in np.ndenumerate(table):
            text = missing if np.isnan(value) else said(value, form)
            size = 8.0 if len(text) > 6 or len(table) > 25 else 8.5
            dark = np.isfinite(value) and shades[row, column] < 0.5
            ax.text(
                column,
                row,
                text,
                fontsize=size,
                ha="center",
                va="center",
                color=ON_DARK if dark else ON_LIGHT,
            )
        if apart:
            ax.axhline(0.5, color="#ffffff", linewidth=3)
        ticks = columns[key] if isinstance(columns, Mapping) else columns
        ax.set_xticks(range(len(ticks)), [str(c) for c in ticks])
        ax.set_yticks(range(len(table)), list(maps[key]))
        named = ax is axes[0] or list(maps[key]) != rows_of_first
        ax.tick_params(length=0, labelleft=named)
        ax.grid(visible=False)
        ax.spines[["left", "bottom"]].set_visible(False)
    axes[0].figure.colorbar(picture, ax=axes, label=label, shrink=0.8)
    return {key: {name: list(row) for name, row in rows.items()} for key, rows in maps.items()}


def scatter(
    ax: Axes,
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    equal: bool = False,
) -> dict[str, Any]:
    """One number against another, a dot each; groups differ in colour and marker.

    Arguments:
        groups: label -> (x, y) of each dot.
        equal: whether x should be y; then there is a dashed line where it is.
    """
    for number, (label, dots) in enumerate(groups.items()):
        look: dict[str, Any] = {"color": f"C{number % 7}", "marker": _MARKERS[number % 7]}
        x, y = ([dot[axis] for dot in dots] for axis in (0, 1))
        ax.plot(
            x, y, linestyle="none", markersize=4, markeredgewidth=0, alpha=0.8, label=label, **look
        )
    if equal:
        ax.axline((0, 0), slope=1, zorder=0, **_DASHED)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return {label: [list(dot) for dot in dots] for label, dots in groups.items()}


# --- layers, spectra, calibration


def dots(
    ax: Axes,
    pairs: Sequence[Mapping[str, float]],
    full: Sequence[float],
    *,
    labels: bool = True,
    xlabel: str = "train loss barrier (nats)",
) -> dict[str, Any]:
    """One dot a layer and pair, in the order of the layers; each pair's whole network as a line.

    Arguments:
        pairs: one mapping a pair: layer -> barrier (nats).
        full: the whole network's, one a pair.
        labels: whether layers are named.
    """
    names = list(pairs[0])
    rows = [-i for i in range(len(names))]
    for number, (one, whole) in enumerate(zip(pairs, full, strict=True)):
        colour, marker = f"C{number % 7}", _MARKERS[number % 7]
        label = f"pair {number + 1}"
        ax.plot(list(one.values()), rows, marker, color=colour, markersize=4, label=label)
        ax.axvline(whole, color=colour, linestyle=_LINES[number % 4], linewidth=1.2)
    ax.axvline(0, color="#555555", linewidth=0.6)
    ax.set_yticks(rows, names if labels else [""] * len(names))
    ax.tick_params(axis="y", labelsize=8)
    ax.set(xlabel=xlabel)
    return {"layers": names, "pairs": [list(p.values()) for p in pairs], "full": list(full)}


def spectrum(ax: Axes, series: Mapping[str, Sequence[float]]) -> dict[str, Any]:
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


# --- one pair, for the command line


def barriers(fig: Figure, found: Mapping[str, Barrier]) -> dict[str, Any]:
    """Error and loss along the lines, train and test, under each headline BatchNorm mode.

    Arguments:
        found: what the line is, such as ``before``; ``""`` if there is only one -> its barrier.
    """
    drawn: dict[str, Any] = {}
    for ax, metric in zip(fig.subplots(1, 2), ("error", "loss"), strict=True):
        for number, (name, one) in enumerate(found.items()):
            for split, values in one.curve.values.items():
                label = f"{name}, {split}".removeprefix(", ")
                drawn.setdefault(label, {"alpha": one.curve.alphas})[metric] = values[metric]
                look = dict(_SPLITS.get(split, {"linestyle": ":"}))
                if len(found) > 1:
                    look["color"] = f"C{len(found) - 1 - number}"
                label += f" (n = {one.curve.sizes[split]:,})"
                ax.plot(one.curve.alphas, values[metric], label=label, **look)
        ax.set(xlabel="position on the line (0 = A, 1 = B)", ylabel=UNITS[metric])
        ax.set_ylim(bottom=0)
    legend(fig, columns=len(drawn), below=True)
    heading(fig, "\n".join(f"{name}: {one}".removeprefix(": ") for name, one in found.items()))
    return drawn


def layers(fig: Figure, found: LayerBarriers) -> dict[str, Any]:
    """A bar for each layer and the whole network, and curves for the first, the last and
    neighbouring layers together, as far as they were measured."""
    words = {"shallow": "first layers", "deep": "last layers", "window": "window"}
    cumulative = [kind for kind in words if found.select(kind)]
    single = bool(found.select("single"))
    axes = list(fig.subplots(1, max(single + bool(cumulative), 1), squeeze=False)[0])
    drawn: dict[str, Any] = {}
    if single:
        ax = axes.pop(0)
        names = ["whole network", *found.groups]
        for shift, split in zip((-0.2, 0.2), found.splits, strict=False):
            heights = found.worst("single", split)
            values = [found.full_height(split), *(heights[label] for label in found.groups)]
            drawn[split] = dict(zip(names, values, strict=True))
            ax.barh(
                [place + shift for place in range(len(values))],
                values,
                height=0.4,
                color=_SPLITS.get(split, {}).get("color"),
                hatch="//" if split == "train" else None,
                label=f"{split} (n = {found.full.curve.sizes[split]:,})",
            )
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel("loss barrier at ½ (nats), larger of both defaults")
        _legend(ax)
    split = found.splits[-1]
    for number, kind in enumerate(cumulative):
        values = list(found.worst(kind, split).values())
        drawn[kind] = band(axes[0], range(1, len(values) + 1), [values], words[kind], number)
    if cumulative:
        axes[0].locator_params(axis="x", integer=True)
        axes[0].set_xlabel("number of layers (of the window: its place)")
        axes[0].set_ylabel(f"{split} loss barrier at ½ (nats)")
        _legend(axes[0])
    title = "layer by layer" + ("" if found.bn == "none" else f", BatchNorm {found.bn}")
    heading(fig, title if found.valid else str(found.full))
    return drawn


def trajectory(ax: Axes, found: Projected, label: str = "training") -> dict[str, Any]:
    """A trajectory's shadow on a plane that is drawn; the legend says what it leaves out."""
    x, y = zip(*found.coordinates, strict=True)
    said_outside = f"{label} ({said(100 * found.share, '{:.0f}')} % of it outside the plane)"
    ax.plot(x, y, "o-", color=_RED, markersize=3, linewidth=1, label=said_outside)
    ax.legend()
    return codec.to_json(found)


def landscape(fig: Figure, found: Geometry) -> dict[str, Any]:
    """The losses between two networks with the parabolas that both ends expect, and the curvature.

    Returns:
        alpha, losses by split, parabolas and curvature as drawn.
    """
    left, right = fig.subplots(1, 2)
    alphas = np.asarray(found.curve.alphas)
    drawn: dict[str, Any] = {"alpha": found.curve.alphas}
    for split, values in found.curve.values.items():
        drawn[split] = values["loss"]
        label = f"{split} (n = {found.curve.sizes[split]:,})"
        left.plot(alphas, values["loss"], label=label, **_SPLITS.get(split, {"linestyle": ":"}))
    left.set_ylim(left.get_ylim())  # parabolas may leave the picture
    for name, end, at, label in (("A", found.a, 0.0, "from the ends"), ("B", found.b, 1.0, "")):
        t = alphas - at
        parabola = end.loss + end.slope * t + end.curvature / 2 * t**2
        drawn[f"from {name}"] = parabola
        left.plot(alphas, parabola, color=_RED, linewidth=1, linestyle="--", label=label)
    _legend(left)
    left.set(xlabel="position on the line (0 = A, 1 = B)", ylabel=UNITS["loss"])
    if len(alphas) >= 7:
        drawn["curvature"] = found.curvatures()
        right.plot(alphas, drawn["curvature"], color="C0", label="of the train losses")
    places = np.linspace(0, 1, len(found.locals))
    drawn["hessian"] = [one.curvature for one in found.locals]
    right.plot(places, drawn["hessian"], "o", color=_RED, label="of the Hessian, between kinks")
    right.axhline(0, color="gray", linewidth=0.8)
    right.set(
        xlabel="position on the line (0 = A, 1 = B)", ylabel="curvature (nats); below 0 a ridge"
    )
    _legend(right)
    heading(fig, f"barrier at ½: {found.barrier():.4f} nats on train")
    return drawn


def heading(fig: Figure, text: str) -> None:
    """Small words above a figure, from the left."""
    fig.suptitle(text, x=0.01, ha="left", fontsize=9, wrap=True)
