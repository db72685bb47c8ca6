"""A chapter's parameters: the cell that declares them, and the profiles that set them.

papermill takes unknown names with a log line, YAML 1.1 reads ``1e-3`` as text, and a value computed
in the parameters cell is computed from the defaults. All three end in a page with wrong numbers, so
they are errors here, before the first cell runs.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from companion.book.chapter import cells
from companion.book.layout import Book
from companion.core import plainyaml
from companion.core.errors import BadParameter, one_of
from companion.report.page import as_html as escape

ELSEWHERE = ("quick", "gpu", "paper")
"""Profiles whose values stand beside those of a page."""

_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
_COMPUTED = object()  # a default that is not a literal: nothing to compare a type with


@dataclass(frozen=True)
class Parameter:
    """One assignment of the parameters cell."""

    name: str
    default: Any
    optional: bool  # annotated with None
    whole: bool  # a whole number, or a list of them: by its annotation, or its default
    start: int  # byte offsets of the value in the cell's source
    end: int
    meaning: str  # its comment: behind it, or in the lines above


def cell_of(book: Book, chapter: str) -> str:
    """The source of the chapter's parameters cell.

    Raises:
        BadParameter: there is not exactly one cell tagged ``parameters``.
    """
    where = f"chapters/{chapter}.md"
    found = cells(book.source(chapter).read_text(encoding="utf-8"), where)
    tagged = [cell.source for cell in found if "parameters" in cell.tags]
    if len(tagged) != 1:
        raise BadParameter(
            f"{where} has {len(tagged)} cells tagged `parameters`; it needs exactly one."
        )
    return tagged[0]


def declared(source: str, where: str) -> dict[str, Parameter]:
    """Read the parameters cell; ``where`` names the chapter in messages.

    Raises:
        BadParameter: Something other than ``name = value``, a name twice, or a value that is
            computed from another parameter.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise BadParameter(
            f"{where}: the parameters cell does not parse: {error.msg} (line {error.lineno})."
        ) from error
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[str, Parameter] = {}
    said = _comments(source)
    last = 0
    for statement in tree.body:
        name, value, annotation = _assignment(statement)
        if name is None or value is None:
            raise BadParameter(
                f"{where}: line {statement.lineno} of the parameters cell is "
                f"`{ast.get_source_segment(source, statement)}`. Only assignments `name = value` "
                "can be set from outside; move everything else to the next cell."
            )
        if name in found:
            raise BadParameter(f"{where}: the parameters cell assigns {name!r} twice.")
        used = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)} & set(found)
        if used:
            raise BadParameter(
                f"{where}: parameter {name!r} is computed from {', '.join(sorted(used))}. It would "
                "keep the default's value when a profile sets the other: compute it in the next "
                "cell."
            )
        try:
            default = ast.literal_eval(value)
        except ValueError:
            default = _COMPUTED
        start = starts[value.lineno - 1] + value.col_offset
        assert value.end_lineno is not None and value.end_col_offset is not None  # parsed from text
        end = starts[value.end_lineno - 1] + value.end_col_offset
        kind = "" if annotation is None else ast.unparse(annotation)
        some = default[0] if isinstance(default, list | tuple) and default else default
        whole = "float" not in kind and ("int" in kind or type(some) is int)
        optional = default is None or "None" in kind
        stop = statement.end_lineno or statement.lineno
        own = [said[line] for line in range(statement.lineno, stop + 1) if line in said]
        above = [said[line] for line in range(last + 1, statement.lineno) if line in said]
        meaning = " ".join(own or above)
        last = stop
        found[name] = Parameter(name, default, optional, whole, start, end, meaning)
    return found


def table(
    book: Book, profile: str, chapter: str, cell: str, used: Mapping[str, Any] | None = None
) -> str:
    """The parameters of a page as HTML: value here, values of other profiles, and what it means.

    Arguments:
        profile: the one the page ran with.
        cell: its parameters cell with the values used, as :func:`substituted` gives it.
        used: what the run took where a parameter is None, where that is known.
    """
    where = f"chapters/{chapter}.md"
    source = cell_of(book, chapter)
    others = {
        name: profile_values(book, name, chapter, source)
        for name in ELSEWHERE
        if name != profile and name in book.profiles()
    }
    own = {name: p.default for name, p in declared(source, where).items()}
    rows = ""
    for name, one in declared(cell, where).items():
        meaning, unset = _meaning(one.meaning)
        value = (used or {}).get(name) if one.default is None else one.default
        there: dict[str, list[str]] = {}  # value -> profiles
        for other, values in others.items():
            if values or other == "quick":
                found = values.get(name, own[name])
                if found != one.default or (found is None and value is not None):
                    there.setdefault(_value(found, unset), []).append(other)
        elsewhere = "<br>".join(f"{escape(', '.join(names))}: {v}" for v, names in there.items())
        rows += (
            f'<tr><th scope="row"><code>{escape(name)}</code></th><td>{_value(value, unset)}</td>'
            f"<td>{escape(meaning)}</td><td>{elsewhere}</td></tr>"
        )
    heads = ("Parameter", "Here", "What it means", "In other profiles")
    title = "Parameters of this page"
    return (
        f'<div class="companion-scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="companion-table companion-parameters"><caption>{title}</caption><thead><tr>'
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def profile_values(book: Book, profile: str, chapter: str, source: str) -> dict[str, Any]:
    """What a profile sets for a chapter; empty if it has no file for it.

    Arguments:
        source: the text of its parameters cell, see :func:`cell_of`.

    Raises:
        BadParameter: An unknown profile, a file that is not YAML or belongs to no chapter, an
            unknown parameter, or a value of the wrong type.
    """
    folder = book.profile_folder(profile)
    for path in sorted(folder.glob("*")):
        if path.suffix != ".yaml" or path.stem not in book.chapters():
            raise BadParameter(
                f"chapters/profiles/{profile}/{path.name} belongs to no chapter. "
                f"Name it after one: {', '.join(c + '.yaml' for c in book.chapters())}."
            )
    path = folder / f"{chapter}.yaml"
    if not path.is_file():
        return {}
    where = f"chapters/profiles/{profile}/{path.name}"
    try:
        values = plainyaml.parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadParameter(f"{where} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadParameter(f"{where}: it has to be lines of `name: value`.")
    check(values, declared(source, f"chapters/{chapter}.md"), where)
    return values


def check(values: Mapping[str, Any], parameters: Mapping[str, Parameter], where: str) -> None:
    """Refuse values of unknown parameters, and values whose type cannot be meant.

    Arguments:
        where: who sets the values, for messages.
    """
    for name, value in values.items():
        one_of(f"{where}: parameter", name, parameters)
        _check(value, parameters[name], f"{where}: {name}")


def substituted(source: str, values: Mapping[str, Any], where: str) -> str:
    """The parameters cell with other values, by name, in place of its defaults; comments stay."""
    text = source.encode()
    parameters = declared(source, where)
    for parameter in sorted((parameters[name] for name in values), key=lambda p: -p.start):
        new = repr(values[parameter.name]).encode()
        text = text[: parameter.start] + new + text[parameter.end :]
    return text.decode()


def _comments(source: str) -> dict[int, str]:
    """Line, from 1 -> the comment on it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _meaning(comment: str) -> tuple[str, str]:
    """A comment without its words on None, and these: `steps; None: as many as …`."""
    parts = [part.strip() for part in comment.split(";")]
    unset = [part.removeprefix("None:").strip() for part in parts if part.startswith("None:")]
    return "; ".join(p for p in parts if not p.startswith("None:")), "; ".join(unset)


def _value(value: Any, unset: str) -> str:
    if value is _COMPUTED or value is None:
        return escape(unset or "none")
    shown = ", ".join(map(repr, value)) if isinstance(value, list) and value else repr(value)
    return f"<code>{escape(shown)}</code>"


def _assignment(node: ast.stmt) -> tuple[str | None, ast.expr | None, ast.expr | None]:
    """Name, value and annotation of a plain assignment; None for anything else."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, value, annotation = node.targets[0], node.value, None
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        target, value, annotation = node.target, node.value, node.annotation
    else:
        return None, None, None
    return (target.id if isinstance(target, ast.Name) else None), value, annotation


def _check(value: Any, parameter: Parameter, where: str) -> None:
    """Refuse a value whose type cannot be meant."""
    default = parameter.default
    _no_text_floats(value, where, parameter.whole)
    if isinstance(value, dict) or (isinstance(value, list) and not _as_flat(value, default)):
        raise BadParameter(
            f"{where}: {value!r} has values inside of values; a plain value is needed, or a list "
            f"of plain values, as the chapter's own {default!r}."
        )
    if default is _COMPUTED or default is None or (value is None and parameter.optional):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: number,
        list: isinstance(value, list),
        tuple: isinstance(value, list),
    }.get(type(default), isinstance(value, type(default)))
    if not fits:
        raise BadParameter(
            f"{where}: {value!r} is of type {type(value).__name__}; "
            f"the chapter's own value {default!r} is of type {type(default).__name__}."
        )


def _as_flat(value: list[Any], default: Any) -> bool:
    """Whether a list is one of plain values, unless the chapter's own is not, either."""
    nested = isinstance(default, list | tuple) and any(isinstance(v, list | tuple) for v in default)
    return nested or not any(isinstance(v, list | dict) for v in value)


def _no_text_floats(value: Any, where: str, whole: bool) -> None:
    """YAML 1.1 reads 1e-3 as text: it wants a point in the mantissa and a sign in the exponent.

    Where a ``whole`` number is needed, a float is no advice.
    """
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        number, plain = float(value), repr(float(value))
        forms = [plainyaml.number(value)] + ([] if "e" in plain else [plain])
        if whole:
            forms = [str(int(number))] if number.is_integer() else ["a whole number"]
        raise BadParameter(
            f"{where}: YAML reads {value} as text, not as a number. Write {' or '.join(forms)}."
        )
    if isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            _no_text_floats(item, where, whole)
