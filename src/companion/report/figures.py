"""Figures with a message: one look, a caption, a real alt text, and the numbers behind them.

A chapter calls :func:`use_style` once and :func:`publish` for every figure::

    from companion.report import figures

    figures.use_style()
    fig, ax = plt.subplots()
    ...
    figures.publish(fig, "barrier-by-k", data={"k": ks, "barrier": b}, values={"first": b[0]})

Caption and alternative text stand in the chapter's Markdown, after the cell::

    :::{caption} barrier-by-k
    :alt: A line that falls from {{first:.0f}} points at k = 0 to almost none.
    The barrier against the step at which the copies part.
    :::

What was published travels in the metadata of the cell's output, so it survives papermill; the book
turns it into a captioned figure with a label (``fig-barrier-by-k``) and two download links.
The palette is Okabe and Ito's, legible with every common colour blindness.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.core import codec, files
from companion.core.errors import BadParameter
from companion.report import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's eight colours in the order lines take them; yellow, weak on white, is last.
OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "orange": "#E69F00",
    "black": "#000000",
    "yellow": "#F0E442",
}

#: Colour of a figure in the light -> in the dark: ink, quiet lines, grid, plates under a text, and
#: the lines that a dark ground would swallow. Whatever stands on a colour of its own, such as a
#: number in a cell of a heat map, uses ON_DARK and ON_LIGHT, which stay.
NIGHT = {
    "#1a1a1a": "#e6e6e6",
    "#000000": "#e6e6e6",
    "#555555": "#ababab",
    "#d9d9d9": "#404448",
    "#ffffff": "#14181e",
    "#bbbbbb": "#4a4f55",
    "#0072b2": "#4aa3df",
}
INK, ON_DARK, ON_LIGHT = "#1a1a1a", "#fefefe", "#010101"

# Equal input gives equal bytes: matplotlib salts the ids inside an SVG, by default at random.
_DETERMINISTIC: Any = {"svg.hashsalt": "companion", "svg.fonttype": "path"}

# Name -> (cell, execution count) that published it, so that two cells cannot claim one label.
# Process-wide on purpose: a kernel runs one notebook.
_published: dict[str, tuple[str, int]] = {}


def use_style() -> None:
    """Set matplotlib's defaults for the book: Okabe-Ito colours, readable sizes, reproducible SVG.

    Call it once per chapter, before the first figure. It changes ``matplotlib.rcParams`` and, in a
    notebook, how cells display floats: with four digits instead of seventeen.
    """
    import matplotlib as mpl
    from cycler import cycler

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        shell.display_formatter.formatters["text/plain"].float_format = "%.4g"

    colours = list(OKABE_ITO.values())
    mpl.rcParams.update(
        {
            **_DETERMINISTIC,
            "axes.prop_cycle": cycler(color=colours),
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.labelsize": 11,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "errorbar.capsize": 3,
            "figure.dpi": 100,
            "figure.figsize": (6.8, 4.0),
            "figure.constrained_layout.use": True,
            # No plate: the page shows through, and a second picture has the dark's colours.
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
            **dict.fromkeys(("xtick.color", "ytick.color"), INK),
            # DejaVu ships with matplotlib, so the picture is the same on every machine.
            "font.family": ["DejaVu Sans"],
            "font.size": 10.5,
            "grid.alpha": 0.6,
            "grid.color": "#d9d9d9",
            "grid.linewidth": 0.7,
            "image.cmap": "cividis",
            "legend.fontsize": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
        }
    )


def publish(
    fig: Figure,
    name: str,
    *,
    data: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Show a figure and hand it to the book: label, the data behind it, and what its caption says.

    Arguments:
        fig: The figure. It is closed, so nothing shows it twice.
        name: Lower-case letters, digits and hyphens. It names the files, and the label is
            ``fig-<name>`` (a leading ``fig-`` is not doubled): ``{numref}`fig-<name>```.
        data: What was drawn, as nested mappings, lists, numbers, strings, arrays or tensors.
            NaN and infinities become null. It is offered for download beside the figure.
        values: Numbers and strings for the placeholders of this figure's ``{caption}`` block; they
            come before those of :func:`companion.report.page.fill`.

    Raises:
        BadParameter: A malformed name, one that another cell already used, or data that JSON
            cannot hold.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise BadParameter(
            f"figure name {name!r}: use lower-case letters, digits and single hyphens, "
            "such as 'barrier-by-k'."
        )
    where = f"figure {name!r}, data"
    drawn = None if data is None else codec.to_json(data, where, null=True)
    entry: dict[str, Any] = {"name": name, "data": drawn}
    if values:
        entry["values"] = page.fillable(values, f"figure {name!r}, values")
    _claim_name(name)
    # A recording keeps the numbers, and the page draws them: no font or backend can lose them.
    picture = "" if page.recorder() else _svg(fig, name)

    import matplotlib.pyplot as plt

    plt.close(fig)
    page.emit({"image/svg+xml": picture, "text/plain": f"Figure {name}"}, {"figure": entry})


@contextmanager
def file(path: Path, title: str, **size: Any) -> Iterator[Figure]:
    """A figure of the book's look that is written to a file at the end; no window, no pyplot.

    Its texts are shown as they are: a name with dollars is no formula.

    Arguments:
        path: ends in .svg, .pdf or .png.
        title: in the file's metadata.
        size: for the figure, such as ``figsize``.

    Raises:
        BadParameter: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kind = path.suffix.lower().removeprefix(".")
    fixed: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with mpl.rc_context():
        use_style()
        mpl.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white"})
        fig = Figure(**size)
        yield fig
        _as_written(fig)
        try:
            with files.whole(path) as working:
                about = {"Title": title, **fixed[kind]}
                fig.savefig(working, format=kind, dpi=160, metadata=about)
        except OSError as e:
            raise BadParameter(f"--plot: {path} cannot be written ({e.strerror}).") from e


def inline(draw: Callable[[Figure], None], name: str, **size: Any) -> str:
    """An SVG of the book's look to stand inside of an HTML page, beside others.

    What changes between light and dark is a variable of the page's style sheet, :func:`variable` of
    the colours of :data:`NIGHT`. Texts are shown as they are.

    Arguments:
        draw: on the figure.
        name: unique on the page; the ids inside of the picture begin with it.
        size: for the figure, such as ``figsize``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        use_style()
        fig = Figure(**size)
        draw(fig)
        svg = _svg(fig, name)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<g id=\"[^\"]*\"(?=>)", _bare, svg, flags=re.S)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<svg ", '<svg aria-hidden="true" focusable="false" ', svg, count=1)
    return re.sub(r"#[0-9a-fA-F]{6}\b", _by_variable, svg)


def variable(colour: str) -> str:
    """The name of the style sheet's variable for a colour of :data:`NIGHT`."""
    return f"--figure-{colour.removeprefix('#')}"


def _bare(found: re.Match[str]) -> str:
    return "<g" if found[0].startswith("<g") else ""


def _by_variable(found: re.Match[str]) -> str:
    colour = found[0].lower()
    return f"var({variable(colour)})" if colour in NIGHT else found[0]


def label(name: str) -> str:
    """The cross-reference label of the figure ``name``: ``fig-<name>``."""
    return name if name.startswith("fig-") else f"fig-{name}"


def _as_written(fig: Figure) -> None:
    """Show every text as it is: a name with dollars is no formula. Ticks are matplotlib's own."""
    from matplotlib.text import Text

    for text in fig.findobj(Text):
        if isinstance(text, Text) and "\\mathdefault" not in text.get_text():
            text.set_parse_math(not text.get_text())


def dark(svg: str) -> str:
    """A figure of the book in the colours of the dark, from its SVG."""
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: NIGHT.get(found[0].lower(), found[0]), svg)


def _svg(fig: Figure, title: str) -> str:
    """The figure as SVG text; equal figures give equal text."""
    import matplotlib as mpl

    out = io.StringIO()
    _as_written(fig)
    with mpl.rc_context(_DETERMINISTIC):
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    # A hundredth of a point is finer than any screen; the digits behind are a third of a file, and
    # indentation with the letters' long names is another.
    places = r' (?:d|x|y)="[^"]*"|translate\([^)]*\)'
    text = re.sub(places, lambda at: re.sub(r"(\.\d\d)\d+", r"\1", at[0]), out.getvalue())
    return re.sub(r">\s+<", "><", text.replace("DejaVuSans-", "t-"))


def _claim_name(name: str) -> None:
    """Refuse a name that another cell published; let the same cell run again."""
    taken = BadParameter(
        f"figure name {name!r} is taken: another figure of this chapter was published under "
        "it. Each figure needs a name of its own."
    )
    if (recorder := page.recorder()) is not None:
        if any(figure["name"] == name for figure in recorder.all("figure")):
            raise taken
        return
    try:
        from IPython.core.getipython import get_ipython
    except ModuleNotFoundError:
        shell = None
    else:
        shell = get_ipython()
    cell, count = "", 0  # a plain script is one cell that runs once
    if shell is not None:
        # JupyterLab says which cell runs; papermill does not, and then the cell's text has to do.
        parent = getattr(shell, "parent_header", None) or {}
        cell = parent.get("metadata", {}).get("cellId") or shell.user_ns.get("In", [""])[-1]
        count = shell.execution_count
    before = _published.get(name)
    if before is not None and (before[0] != cell or before[1] == count):
        raise taken
    _published[name] = (cell, count)
