"""A figure to play with: a measured plane, a line between two networks in it, and the error there.

One place on the line is marked in both panels. The page's script (``book/walk.js``) lets a reader
move it, and change between several measured cases (fork steps; matched or not). Without scripts the
figure stands as it is drawn here. Everything in it was measured; nothing is interpolated but the
colours between two points of the grid.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from companion.report.page import as_html as escape
from companion.report.plots import MAP

Point = tuple[float, float]

_W, _H = 260.0, 220.0  # of a panel, in the units of its SVG
_LEFT, _TOP, _RIGHT, _BELOW = 50.0, 10.0, 10.0, 32.0  # around the panel with the axis
_TICKS = (0, 25, 50, 75, 100)


@dataclass(frozen=True)
class Case:
    """What one position of the switch shows.

    Arguments:
        label: what the switch says, such as ``0`` or ``after matching``.
        plane: as :func:`companion.report.plots.planes` publishes it: ``x``, ``y``, ``points``,
            ``values[split]["error"]``, percent.
        a, b: which of the plane's three points are the ends of the line.
        line: test error in percent, from a to b, at equal steps.
    """

    label: str
    plane: Mapping[str, Any]
    a: int
    b: int
    line: Sequence[float]


def html(cases: Sequence[Case], *, name: str, switch: str, names: Sequence[str]) -> str:
    """The figure.

    Arguments:
        cases: at least one; the first is shown at first. All have one plane's size on the screen.
        name: of the figure, unique on its page.
        switch: what the switch changes, such as ``copies part at step``.
        names: of the plane's three points.
    """
    drawn = [_drawn(case) for case in cases]
    first = drawn[0]
    images = "".join(
        f'<image class="walk-map" width="{_W}" height="{_H}" preserveAspectRatio="none" '
        f'href="{_map(case)}"{hidden}/>'
        for case, hidden in zip(cases, ["", *[' style="display:none"'] * len(cases)], strict=False)
    )
    marks = "".join(
        f'<g class="walk-point" transform="translate({x} {y})">'
        f'<circle r="4"/><text x="7" y="-6">{escape(label)}</text></g>'
        for label, (x, y) in zip(names, first["points"], strict=True)
    )
    (ax, ay), (bx, by) = first["ends"]
    last = len(first["line"]) - 1
    middle = last // 2
    share = middle / last
    grid = "".join(
        f'<line class="walk-grid" x1="{_LEFT}" x2="{_LEFT + _W}" y1="{_y(t)}" y2="{_y(t)}"/>'
        f'<text x="{_LEFT - 6}" y="{_y(t) + 4}" text-anchor="end">{t}</text>'
        for t in _TICKS
    )
    start, end = names[cases[0].a], names[cases[0].b]
    under = _TOP + _H + 22
    plane = (
        f'<svg viewBox="{-(_LEFT + _RIGHT) / 2} 0 {_LEFT + _W + _RIGHT} {_TOP + _H + _BELOW}" '
        f'role="img" aria-label="Map of the test '
        f'error over a plane of weight space, with the line from {escape(start)} to {escape(end)}">'
        f'<svg y="{_TOP}" width="{_W}" height="{_H}">{images}'
        f'<line class="walk-segment" x1="{ax}" y1="{ay}" x2="{bx}" y2="{by}"/>{marks}'
        f'<circle class="walk-here walk-here-map" r="6" cx="{ax + share * (bx - ax):.1f}" '
        f'cy="{ay + share * (by - ay):.1f}"/></svg>'
        f'<text x="{_W / 2}" y="{under}" text-anchor="middle">a plane through three networks; '
        "dark: high error</text></svg>"
    )
    line = (
        f'<svg viewBox="0 0 {_LEFT + _W + _RIGHT} {_TOP + _H + _BELOW}" role="img" '
        f'aria-label="Test error along the line from {escape(start)} to {escape(end)}">'
        f'{grid}<path class="walk-line" d="{first["path"]}"/>'
        f'<circle class="walk-here walk-here-line" r="6" cx="{_LEFT + _W * share:.1f}" '
        f'cy="{_y(first["line"][middle])}"/>'
        f'<text x="{_LEFT}" y="{under}">A</text>'
        f'<text x="{_LEFT + _W}" y="{under}" text-anchor="end">B</text>'
        f'<text x="{_LEFT + _W / 2}" y="{under}" text-anchor="middle">the line between them</text>'
        f'<text x="12" y="{_TOP + _H / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {_TOP + _H / 2})">test error (%)</text></svg>'
    )
    says = _says(cases[0], switch if len(cases) > 2 else "")
    return (
        f'<figure class="walk" id="walk-{name}" data-walk="{escape(json.dumps(drawn))}" '
        f'data-switch="{escape(switch)}" data-left="{_LEFT}" data-width="{_W}">'
        f'<div class="walk-panels">{plane}{line}</div>'
        f"<figcaption>{escape(says)}</figcaption></figure>"
    )


def _says(case: Case, switch: str) -> str:
    """What the figure shows at first, as the script says it of every place."""
    middle = case.line[(len(case.line) - 1) // 2]
    name = f"{switch} {case.label}".strip()
    return (
        f"{name}: half-way the test error is {middle:.1f} %, "
        f"at the ends {case.line[0]:.1f} % and {case.line[-1]:.1f} %."
    )


def _y(error: float) -> float:
    return round(_TOP + _H * (1 - error / 100), 1)


def _path(line: Sequence[float]) -> str:
    step = _W / (len(line) - 1)
    return "M" + " L".join(f"{_LEFT + step * i:.1f} {_y(value)}" for i, value in enumerate(line))


def _drawn(case: Case) -> dict[str, Any]:
    """What the script needs of a case: places in the SVG, and numbers for the sentence."""
    xs, ys = case.plane["x"], case.plane["y"]

    def spot(point: Sequence[float]) -> Point:
        return (
            _W * (point[0] - xs[0]) / (xs[-1] - xs[0]),
            _H * (1 - (point[1] - ys[0]) / (ys[-1] - ys[0])),
        )

    points = [spot(point) for point in case.plane["points"]]
    rounded = [(round(x, 1), round(y, 1)) for x, y in points]
    line = [round(float(value), 2) for value in case.line]
    return {
        "label": case.label,
        "points": rounded,
        "ends": [rounded[case.a], rounded[case.b]],
        "line": line,
        "path": _path(line),
    }


def _map(case: Case) -> str:
    """The plane's errors as a small picture, one pixel a network; browsers smooth it."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.image import imsave

    (values,) = (split["error"] for split in case.plane["values"].values())
    grid = np.clip(np.asarray(values, dtype=float) / 100, 0, 1)
    out = io.BytesIO()
    imsave(out, colormaps[MAP](grid)[::-1], format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
