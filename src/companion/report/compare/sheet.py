"""The page of a comparison: one HTML file, with its pictures and its style in it, and no script.

The verdict comes first, in words; then what it rests on, a section a question; then what was not
asked and why, the commands that repeat each part, and the provenance. A picture is drawn once: its
ink, grid and ground are variables of the style sheet, which has a day's and a night's. Every name
and every message is shown as it is, so a file may be called whatever it is called.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.connectivity import Barrier, Curve
from companion.core import codec
from companion.core.errors import CorruptData
from companion.experiments.landscape import Geometry
from companion.features import Features
from companion.layerwise import LayerBarriers
from companion.report import figures, plots
from companion.report.compare.value import ANSWERED, Answer, Comparison
from companion.report.words import said

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNS = {"yes": "✓", "no": "✗", "undetermined": "≈", "not asked": "○"}
LINES = {
    "barrier": "as they are",
    "matched": "matched by weights",
    "activation_matched": "matched by activations",
}
"""Answers that are a line -> what was done to B before."""
PAIRS = {"pairs": "as they are", "matched_pairs": "after matching"}
"""Likewise of all pairs."""
MOST_ROWS = 60
"""Of a table; the JSON beside the page has all."""
LEAST_ANGLE = 1e-4
"""Of features, where the axis ends: a layer that is linear has the rounding of its numbers."""
PANEL = (4.7, 3.3)
"""Inches of a picture: as wide as a phone, and two beside each other on a larger screen."""


def sheet(found: Comparison) -> str:
    """The page: HTML that reads from a disk, without network and without scripts.

    Arguments:
        found: what was compared; questions without an answer are listed with the reason.
    """
    title = f"{' and '.join(found.names)}: what they are to each other"
    answered = {a.name: a for a in found.answers if a.status == ANSWERED}
    sections = [section.html(found, answered) for section in SECTIONS]
    known = {name for section in SECTIONS for name in section.names}
    more = [_plain(a) for a in answered.values() if a.name not in known]
    body = "\n".join(filter(None, [_verdict(found), *sections, *more, _missing(found)]))
    body += f"\n{_commands(found)}\n{_provenance(found)}"
    style = files("companion.report.compare").joinpath("sheet.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{shown(title)}</title>\n<style>\n{style}{_themes()}</style>\n</head>\n<body>\n"
        f"<header>\n{_head(found)}\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def findings(found: Comparison) -> str:
    """The verdict alone, as a list in HTML: for a page that has a style of its own."""
    return "".join(
        f'<li class="finding"><p><span class="verdict {_class(f.verdict)}">{SIGNS[f.verdict]} '
        f"{shown(f.verdict)}</span> <strong>{shown(f.question)}</strong> {shown(f.sentence)}</p>"
        f'<p class="rule">The rule: {shown(f.rule)}.</p></li>'
        for f in found.findings
    )


def picture(found: Comparison, path: Path) -> bool:
    """Draw the line between two networks, or the barriers of all pairs, into a file.

    Returns:
        whether there was something to draw.

    Raises:
        BadParameter: the file cannot be written.
    """
    answered = {a.name: a for a in found.answers if a.status == ANSWERED}
    pairs = {PAIRS[n]: answered[n].values for n in PAIRS if n in answered}
    lines = {n: a for n, a in answered.items() if n in LINES and "barrier" in a.values}
    if not pairs and not lines:
        return False
    with figures.file(path, "Barriers between networks", figsize=(8.6, 3.7)) as fig:
        axes = fig.subplots(1, len(pairs) or 2, squeeze=False)[0]
        if pairs:
            rows = {what: _heights(values) for what, values in pairs.items()}
            label = _what(next(iter(pairs.values())))
            plots.heat(axes, rows, [*next(iter(rows.values()))], label=label, apart=False)
            for ax, what in zip(axes, rows, strict=True):
                ax.set_title(what, fontsize=10)
        else:
            barriers, split = _barriers(lines)
            for ax, metric in zip(axes, ("error", "loss"), strict=True):
                _rise(barriers, split, metric)(ax)
            plots.legend(fig, columns=3)
    return True


def shown(text: object) -> str:
    """HTML that shows ``text`` as it is."""
    return html.escape("".join(c if c.isprintable() else " " for c in str(text)))


# --- the top


def _head(found: Comparison) -> str:
    rows = "".join(
        f"<div><dt>{_letter(i)}</dt><dd>{shown(name)}</dd></div>"
        for i, name in enumerate(found.names)
    )
    data = "no data: weights alone" if found.data is None else found.data
    return (
        '<p class="kicker">companion report</p>\n<h1>What do these networks have in common?</h1>\n'
        f'<dl class="about">{rows}<div><dt>model</dt><dd>{shown(found.model)}</dd></div>'
        f"<div><dt>data</dt><dd>{shown(data)}</dd></div></dl>"
    )


def _verdict(found: Comparison) -> str:
    return (
        f'<section id="verdict">\n<h2>The verdict</h2>\n<p class="lead">{shown(_lead(found))}</p>\n'
        f'<ul class="findings">{findings(found)}</ul>\n</section>'
    )


def _lead(found: Comparison) -> str:
    """One sentence: what a person may do with these networks."""
    words = {f.question: f.verdict for f in found.findings}

    def some(start: str) -> str:
        return next((v for q, v in words.items() if q.startswith(start)), "not asked")

    basin, matched, merge = some("Same basin"), some("Connected after matching"), some("Is a merge")
    if some("Same network") == "yes":
        first = "This is one network, saved twice."
    elif found.invalid:
        first = "A gate failed, so no barrier between these networks is a number."
    elif basin == "yes":
        first = "They lie in one basin: the straight line between them is low."
    elif basin == "no" and matched == "yes":
        first = "There is a wall between them as they are, and none once their units are matched."
    elif basin == "no":
        again = {
            "no": "Matching their units does not remove it",
            "undetermined": "Whether one is left after matching is too close to call",
        }.get(matched, "Whether matching removes it was not asked")
        first = f"There is a wall between them: do not average their weights as they are. {again}."
    else:
        first = "Whether they lie in one basin is not decided here."
    last = {"yes": " A merge is worth it.", "no": " A merge is not worth it."}.get(merge, "")
    return first + last if not found.invalid else first


# --- sections


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Arguments:
        name: of its anchor.
        title: as a heading.
        names: of the answers that it shows.
        body: the HTML below the heading and what is to be seen, of the answers that are there.
        see: one sentence: where to look.
    """

    name: str
    title: str
    names: tuple[str, ...]
    body: Callable[[Comparison, Mapping[str, Answer]], str]
    see: str

    def html(self, found: Comparison, answered: Mapping[str, Answer]) -> str:
        """The section; empty if none of its questions was answered."""
        own = {name: answered[name] for name in self.names if name in answered}
        if not own:
            return ""
        try:
            inside = self.body(found, own)
        except (CorruptData, KeyError, TypeError, ValueError):  # of another version: its numbers
            inside = "".join(_table_of(a.values) for a in own.values())
        return (
            f'<section id="{self.name}">\n<h2>{self.title}</h2>\n<p>{self.see}</p>\n{inside}\n'
            "</section>"
        )


def _barriers(answers: Mapping[str, Answer]) -> tuple[dict[str, Barrier], str]:
    """What was done to B -> the barrier; and the split that they are shown on."""
    barriers = {
        LINES[name]: codec.from_json(Barrier, a.values["barrier"])
        for name, a in answers.items()
        if name in LINES
    }
    first = next(iter(barriers.values()))
    return barriers, "test" if "test" in first.curve.values else [*first.curve.values][-1]


def _rise(barriers: Mapping[str, Barrier], split: str, metric: str) -> Callable[[Axes], None]:
    curves: dict[str, list[Curve]] = {label: [one.curve] for label, one in barriers.items()}

    def draw(ax: Axes) -> None:
        plots.lines(ax, curves, split, metric, "from A (0) to B (1)")
        ax.set_ylim(bottom=0)

    return draw


def _line(found: Comparison, answers: Mapping[str, Answer]) -> str:
    """Both ends and the line, before and after matching; heights, and what BatchNorm does."""
    barriers, split = _barriers(answers)
    first = next(iter(barriers.values()))
    tops = ", ".join(
        f"{label} {_height(one, split, one.metric)}" for label, one in barriers.items()
    )
    pictures = "".join(
        _picture(
            _rise(barriers, split, metric),
            f"line-{metric}",
            f"{split} {metric} from A to B: barrier {tops}",
        )
        for metric in ("error", "loss")
    )
    margins = {LINES[n]: a.values.get("margin") for n, a in answers.items() if n in LINES}
    rows, others = [], []
    for label, one in barriers.items():
        for mode in one.curves:
            own = margins[label] if mode == one.bn else None
            heights = [_height(one, split, m, mode, own) for m in ("error", "loss")]
            if mode == one.bn:
                rows.append([label, *heights])
            else:
                others.append([f"{label}, BatchNorm {mode}", *heights])
    heads, mode = ["line", "error barrier", "loss barrier"], first.bn
    caption = f"Barriers on {split} data" + ("" if mode == "none" else f", BatchNorm {mode}")
    table = _table(heads, rows, caption)
    if others:
        table += _folded("other modes of BatchNorm", _table(heads, others, "Other modes"))
    gates = dict.fromkeys(str(g) for one in barriers.values() for g in one.gates)
    return f'<div class="panels">{pictures}</div>{table}{_list(gates, "gates")}'


def _height(
    one: Barrier,
    split: str,
    metric: str,
    mode: str | None = None,
    margin: Mapping[str, Any] | None = None,
) -> str:
    value = one.height(split, metric, bn=mode or one.bn)
    if math.isnan(value):
        return "INVALID"
    form, unit = (".2f", "points") if metric == "error" else (".4f", "nats")
    width = ((margin or {}).get(split) or {}).get(metric)
    return said(value, f"{{:{form}}}") + (f" ± {width:{form}}" if width else "") + f" {unit}"


def _worth(found: Comparison, answers: Mapping[str, Answer]) -> str:
    """Merged networks beside their ends and the ensemble."""
    whole = {n: a for n, a in answers.items() if n.startswith("merged")} or dict(answers)
    if "merged_c2m3" in whole:  # it has the other's rows, too
        del whole["merged_many"]
    return "".join(
        _networks(a.values["networks"], "Each network on its own") for a in whole.values()
    )


def _networks(rows: Mapping[str, Mapping[str, Mapping[str, float]]], caption: str) -> str:
    splits = [*next(iter(rows.values()))]
    units = {"error": ("error (%)", "{:.2f}"), "loss": ("loss (nats)", "{:.4f}")}
    heads = ["network", *(f"{s} {units[m][0]}" for s in splits for m in units)]
    cells = [
        [name, *(said(of[s].get(m), units[m][1]) for s in splits for m in units)]
        for name, of in rows.items()
    ]
    return _table(heads, cells, caption)


def _layers(found: Comparison, answers: Mapping[str, Answer]) -> str:
    one = codec.from_json(LayerBarriers, answers["layers"].values["layers"])
    split = "test" if "test" in one.splits else one.splits[-1]
    single = one.worst("single", split)
    if not single:
        return _table_of(answers["layers"].values.get("heights", {}))
    whole = one.full_height(split)

    def draw(ax: Axes) -> None:
        label = f"{split} loss barrier at ½ (nats)"
        plots.dots(ax, [single], [whole], xlabel=label)

    worst = max(single, key=lambda name: single[name])
    alt = f"A dot a layer, highest {worst} with {single[worst]:.4f} nats; the whole {whole:.4f}"
    size = (PANEL[0] + 1, max(2.4, 0.9 + 0.19 * len(single)))
    rows = [["whole network", said(whole, "{:.4f}")]]
    rows += [[name, said(v, "{:.4f}")] for name, v in single.items()]
    table = _table(["layer that moves", f"{split} loss barrier (nats)"], rows, "Layer by layer")
    return f"{_picture(draw, 'layers', alt, size, key=False)}{_folded('the numbers', table)}"


def _features(found: Comparison, answers: Mapping[str, Answer]) -> str:
    of = answers["features"].values["features"]
    of = of if "layers" in of else next(iter(of.values()))
    one = codec.from_json(Features, of)
    middle = min(one.alphas, key=lambda t: abs(t - 0.5))
    apart = {layer.name: layer.baseline.mean for layer in one.layers}
    between = {layer.name: layer.gap[middle].mean for layer in one.layers}

    def draw(ax: Axes) -> None:
        series = {"A and B": [apart], "half-way and their mean": [between]}
        plots.by_layer(ax, series, ylabel="1 − cos of features", plain=("A and B",))
        ax.set_ylim(bottom=max(LEAST_ANGLE, ax.get_ylim()[0]))

    last = one.layers[-1]
    alt = (
        f"1 minus the cosine of features by layer; at the last, {last.name}, "
        f"{last.gap[middle].mean:.3g} half-way against {last.baseline.mean:.3g} of A and B"
    )
    rows = [
        [x.name, *(said(v, "{:.4f}") for v in (apart[x.name], between[x.name], x.ratio(middle)))]
        for x in one.layers
    ]
    heads = ["layer", "1 − cos(A, B)", "1 − cos(half-way, mean)", "ratio"]
    table = _table(heads, rows, "Features by layer")
    size = (PANEL[0] + 1, PANEL[1] + 0.6)
    return f"{_picture(draw, 'features', alt, size)}{_folded('the numbers', table)}"


def _curvature(found: Comparison, answers: Mapping[str, Answer]) -> str:
    values = answers["curvature"].values
    one = codec.from_json(Geometry, values["landscape"])
    rows = [
        [name, *(said(v, "{:.4f}") for v in (at.loss, at.slope, at.curvature))]
        for name, at in (("A", one.a), ("half-way", one.middle), ("B", one.b))
    ]
    heads = ["at", "loss (nats)", "slope", "curvature"]
    table = _table(heads, rows, "Training loss along the line")
    expected = {f"expected: {n.replace('_', ' ')}": v for n, v in one.predictions().items()}
    more: dict[str, Any] = {f"measured, {s}": one.barrier(s) for s in one.curve.values} | expected
    if isinstance(values.get("angle"), Mapping):
        more |= {f"angle at {n} (degrees)": v for n, v in values["angle"].items()}
    return table + _table_of(more, "Barrier at ½ (nats), and what the ends lead to expect")


def _weights(found: Comparison, answers: Mapping[str, Answer]) -> str:
    values = dict(answers["weights"].values)
    layers = values.pop("layers", None)
    apart = f"<p>{shown(values.pop('apart'))}</p>" if "apart" in values else ""
    if isinstance(pairs := values.pop("pairs", None), Mapping) and pairs:
        apart += _by_name("networks", pairs, "Pairs")
    out = apart + (_table_of(values, "The weights alone") if values else "")
    if isinstance(layers, Mapping) and layers:
        out += _folded("layer by layer", _by_name("layer", layers, "Weights by layer"))
    return out


def _by_name(what: str, values: Mapping[str, Mapping[str, Any]], caption: str) -> str:
    heads = [*next(iter(values.values()))]
    rows = [[n, *(_said(of.get(h)) for h in heads)] for n, of in values.items()]
    return _table([what, *heads], rows, caption)


def _heights(values: Mapping[str, Any]) -> dict[str, list[float | None]]:
    return {_letter(i): row for i, row in enumerate(values["heights"])}


def _what(values: Mapping[str, Any]) -> str:
    """What a matrix of barriers is of."""
    unit = "points of error" if values["metric"] == "error" else "nats"
    return f"{values['split']} barrier ({unit})"


def _matrix(found: Comparison, answers: Mapping[str, Answer]) -> str:
    """Pairwise barriers as a map with a number in each cell."""
    pictures, tables = "", ""
    for name, answer in answers.items():
        heights = _heights(answer.values)
        what = f"{_what(answer.values)}, {PAIRS.get(name, name)}"

        def draw(ax: Axes, rows: Any = heights, what: str = what) -> None:
            plots.heat([ax], {"": rows}, [*rows], label="", apart=False)
            ax.set_title(what, fontsize=10)

        size = (PANEL[0], max(2.6, 1.2 + 0.42 * len(heights)))
        pictures += _picture(draw, f"matrix-{name}", f"A matrix: {what}, of each pair", size)
        rows = [
            [a, *("—" if v is None else said(v, "{:.2f}") for v in row)]
            for a, row in heights.items()
        ]
        tables += _table(["", *heights], rows, what)
    return f'<div class="panels">{pictures}</div>{_folded("the numbers", tables)}'


def _triangle(found: Comparison, answers: Mapping[str, Answer]) -> str:
    values = answers["triangle"].values
    defects = values.get("defects", values)
    rows = [[name, said(100 * v, "{:.1f}%")] for name, v in defects.items()]
    heads = ["networks", "units that come elsewhere by way of the third"]
    return _table(heads, rows, "Triangles")


SECTIONS = (
    Section(
        *("line", "The line between them", (*LINES,), _line),
        "How error and loss go from A to B. A line that stays level says one basin; a hill is a "
        "barrier, and its height is what an average costs at worst.",
    ),
    Section(
        *("pairs", "The lines between all of them", (*PAIRS,), _matrix),
        "The barrier of each pair; dark is high. One light block is one basin.",
    ),
    Section(
        *("triangle", "Do the matchings agree?", ("triangle",), _triangle),
        "B matched to A and C to B also match C to A. Where the direct matching sends a unit "
        "elsewhere, the three have no common order.",
    ),
    Section(
        *(
            "merged",
            "Is the average any good?",
            ("merged", "merged_many", "merged_c2m3", "repaired", "ends"),
            _worth,
        ),
        "The network half-way beside those it is made of. The ensemble, which averages answers and "
        "not weights, is what an average of weights could at best hope for.",
    ),
    Section(
        *("layers", "Which layers make the barrier?", ("layers",), _layers),
        "One layer moves half-way at a time, the others stay; the line is the whole network. A "
        "layer near zero costs nothing alone.",
    ),
    Section(
        *("features", "Do the features agree?", ("features",), _features),
        "How far the features of the network half-way are from the mean of those of A and B. Look "
        "at the last layer first: a small number further inside proves nothing.",
    ),
    Section(
        *("curvature", "How curved is the loss?", ("curvature",), _curvature),
        "A barrier that the curvature of both ends leads to expect is a valley's wall; more than "
        "that is something else in between.",
    ),
    Section(
        *("weights", "How far apart are the weights?", ("weights",), _weights),
        "Distance says little of connection: two networks may be far apart in one basin.",
    ),
)


# --- the end


def _missing(found: Comparison) -> str:
    rows = [
        [a.title, a.status, a.why or "—", a.command or "—"]
        for a in found.answers
        if a.status != ANSWERED
    ]
    if not rows:
        return ""
    table = _table(
        ["question", "status", "why", "the command that asks it"], rows, "Without an answer"
    )
    return f'<section id="missing">\n<h2>What was not tested, and why</h2>\n{table}\n</section>'


def _commands(found: Comparison) -> str:
    blocks = "".join(
        f'<dt>{shown(a.title)} <span class="muted">{a.seconds:.1f} s</span></dt>'
        f"<dd>{_command(a.command)}</dd>"
        for a in found.answers
        if a.command and a.status == ANSWERED
    )
    if not blocks:
        return ""
    return (
        '<section id="commands">\n<h2>Repeat each part</h2>\n<p>A click selects a whole line. Each '
        f'prints the numbers that stand above.</p>\n<dl class="commands">{blocks}</dl>\n</section>'
    )


def _command(line: str) -> str:
    """A line to be copied, which breaks between its words."""
    return f"<code>{' '.join(f'<span>{shown(word)}</span>' for word in line.split())}</code>"


def _provenance(found: Comparison) -> str:
    table = _table_of(found.provenance, "Made by") if found.provenance else "<p>Not recorded.</p>"
    return (
        f'<section id="provenance">\n<h2>Provenance</h2>\n{_folded("made by", table)}\n</section>'
    )


def _plain(answer: Answer) -> str:
    """A question that this page knows no picture for: its numbers."""
    return (
        f'<section id="answer-{shown(answer.name)}">\n<h2>{shown(answer.title)}</h2>\n'
        f"{_table_of(answer.values)}\n</section>"
    )


# --- pieces


def _letter(i: int) -> str:
    return chr(65 + i) if i < 26 else f"network {i + 1}"


def _class(word: str) -> str:
    return "is-" + word.replace(" ", "-")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table in a box of its own, which scrolls where the page is narrow."""
    top = "".join(f'<th scope="col">{shown(h)}</th>' if h else "<td></td>" for h in heads)
    body = "".join(
        f'<tr><th scope="row">{shown(first)}</th>'
        + "".join(f"<td>{shown(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows[:MOST_ROWS]
    )
    left = len(rows) - MOST_ROWS
    more = f'<p class="muted">{left} more rows are in the JSON.</p>' if left > 0 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{shown(caption)}"><table>'
        f"<caption>{shown(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
        f"</table></div>{more}"
    )


def _table_of(values: Mapping[str, Any], caption: str = "Values") -> str:
    """Nested values as rows."""
    return _table(["", "value"], [*_rows(values)], caption)


def _rows(values: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    out: list[list[str]] = []
    for name, value in values.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            out += _rows(value, f"{label}, ")
        elif isinstance(value, list | tuple) and len(value) > 8:
            out.append([label, f"{len(value)} values"])
        elif isinstance(value, list | tuple):
            out.append([label, ", ".join(map(_said, value))])
        else:
            out.append([label, _said(value)])
    return out


def _said(value: Any) -> str:
    real = isinstance(value, float)
    return said(value, "{:.4g}") if real else "—" if value is None else str(value)


def _list(lines: Sequence[str] | Mapping[str, Any], title: str) -> str:
    items = "".join(f"<li>{shown(line)}</li>" for line in lines)
    return _folded(title, f"<ul>{items}</ul>")


def _folded(title: str, inside: str) -> str:
    return f"<details><summary>{shown(title)}</summary>{inside}</details>"


def _picture(
    draw: Callable[[Axes], None],
    name: str,
    alt: str,
    size: tuple[float, float] = PANEL,
    key: bool = True,
) -> str:
    """One panel as SVG, with its key above it, and a text for those who do not see it."""

    def on(fig: Figure) -> None:
        draw(fig.subplots())
        if key:
            plots.legend(fig, columns=2)

    svg = figures.inline(on, name, figsize=size)
    return f'<figure role="img" aria-label="{shown(alt)}">{svg}</figure>'


def _themes() -> str:
    """The colours of pictures by day and by night, as the style sheet's variables."""
    day = "".join(f"{figures.variable(c)}: {c};" for c in figures.NIGHT)
    night = "".join(f"{figures.variable(c)}: {n};" for c, n in figures.NIGHT.items())
    return (
        f"\n:root {{ {day} }}\n@media screen and (prefers-color-scheme: dark) "
        f"{{ :root {{ {night} }} }}\n"
    )
