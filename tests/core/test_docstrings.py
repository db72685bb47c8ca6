"""One dialect of docstrings: Sphinx can read it, and what it names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import companion

ROOT = Path(companion.__file__).parent
FOREIGN = re.compile(r" *(Args?|Argument|Param(eter)?s?|Keyword Arg.*|Return|Raise|Yields?):$")
NAMES = r"[`*]*\w+[`*]*(?:, [`*]*\w+[`*]*)*"
ENTRY = re.compile(rf"({NAMES})(?: \(.*\))?:(?: (.*))?")
MORE = re.compile(rf"(?:;|\.) ({NAMES}): ")


def plain(names: str) -> list[str]:
    return re.sub(r"[`*]", "", names).split(", ")


def arguments(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """What ``node`` is given: its parameters; a class its fields and those of ``__init__``."""
    if isinstance(node, ast.FunctionDef):
        a = node.args
        known = (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)
        return {x.arg for x in known if x}
    fields = [x.target for x in node.body if isinstance(x, ast.AnnAssign)]
    found = {x.id for x in fields if isinstance(x, ast.Name)}
    made = (x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
    return found.union(*map(arguments, made))


def faults(source: str) -> Iterator[str]:
    """What is wrong with the docstrings of a module, a line each."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        section = ""
        known = arguments(node)
        for line in (ast.get_docstring(node) or "").splitlines():
            if FOREIGN.match(line):
                yield f"{node.name}: {line.strip()} is not a section here"
            if line and not line.startswith(" "):
                section = line
            elif section == "Arguments:" and re.match(r" {4}\S", line):
                entry = ENTRY.fullmatch(line.strip())
                if not entry or not known.issuperset(plain(entry[1])):
                    yield f"{node.name}: no such argument: {line.strip()}"
                elif any(known.issuperset(plain(x)) for x in MORE.findall(entry[2] or "")):
                    yield f"{node.name}: an argument a line: {line.strip()}"


def test_docstrings_keep_to_one_dialect() -> None:
    found = {str(p.relative_to(ROOT)): list(faults(p.read_text())) for p in ROOT.rglob("*.py")}
    assert len(found) > 100 and {k: v for k, v in found.items() if v} == {}


@pytest.mark.parametrize(
    ("section", "line", "fault"),
    [
        ("Args", "a: one.", "Args: is not a section"),
        ("Arguments", "c: gone.", "no such argument"),
        ("Arguments", "the two numbers.", "no such argument"),
        ("Arguments", "a: one; b: other.", "an argument a line"),
        ("Arguments", "a: one. b: other.", "an argument a line"),
        ("Arguments", "a, b: numbers; None: none.", None),
    ],
)
def test_faults_are_seen(section: str, line: str, fault: str | None) -> None:
    source = f'def f(a, b):\n    """One.\n\n    {section}:\n        {line}\n    """\n'
    assert [fault in x for x in faults(source) if fault] == ([True] if fault else [])
    assert fault or not list(faults(source))
