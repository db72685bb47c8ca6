"""Executing a cell as far as it goes: what depends on something missing is left out, and no more.

A recording that is closed runs its chapter's cells on what is measured. One statement after the
other: one that fails is left out, with every name it would have bound, so that no later statement
takes an older value of that name for the new one. Two kinds of statement are taken apart: of a list
of verdicts the claims that cannot be judged become "not testable", and a figure whose caption or
alternative text cannot be written says so instead.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from companion.core.closing import WHY
from companion.core.errors import BadParameter, CompanionError, NotMeasured
from companion.report import claims

Failed = Callable[[ast.stmt, Exception], None]

TEXT = "The recording was closed before everything that this figure speaks of was measured."
_SAVED = "_companion_saved"


class Left:
    """The names that are left out by now, over all cells of a chapter."""

    def __init__(self) -> None:
        self.names: set[str] = set()


def execute(
    tree: ast.Module, path: str, namespace: dict[str, Any], left: Left, failed: Failed
) -> None:
    """Execute the statements of a cell, and leave out those that cannot be.

    Arguments:
        tree: the cell.
        path: of its file, for tracebacks.
        left: what earlier cells left out; it grows.
        failed: told of every statement that fails by itself, and not for want of a name left out.

    Raises:
        CompanionError: an error that has nothing to do with what is missing, such as a dataset
            that is not here.
    """
    for statement in tree.body:
        try:
            _run(statement, path, namespace)
        except Exception as error:
            wrong = isinstance(error, CompanionError) and not isinstance(error, NotMeasured)
            if wrong and not (left.names and isinstance(error, BadParameter)):
                raise
            if not (isinstance(error, NameError) and error.name in left.names):
                failed(statement, error)
            if not _saved(statement, path, namespace):
                lost = _bound(statement)
                left.names |= lost
                for name in lost:
                    namespace.pop(name, None)
                continue
        left.names -= _bound(statement)


def _run(statement: ast.stmt, path: str, namespace: dict[str, Any]) -> None:
    exec(compile(ast.Module([statement], []), path, "exec", dont_inherit=True), namespace)


def _value(node: ast.expr, path: str, namespace: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(node), path, "eval", dont_inherit=True), namespace)


def _bound(statement: ast.stmt) -> set[str]:
    """The names of the module that a statement binds."""
    found: set[str] = set()
    nodes: list[ast.AST] = [statement]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue  # what is bound inside is its own
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        nodes += ast.iter_child_nodes(node)
    return found


def _saved(statement: ast.stmt, path: str, namespace: dict[str, Any]) -> bool:
    """Do what can be done of a failed statement; False if that is nothing."""
    try:
        if isinstance(statement, ast.Assign | ast.AugAssign):
            return _assigned(statement, path, namespace)
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            return _called(statement.value, path, namespace)
    except Exception:  # then it is left out
        return False
    return False


def _verdicts(node: ast.expr, path: str, namespace: dict[str, Any]) -> list[Any] | None:
    """``[claim("C01", …), …]``, each by itself; None if something else in it fails."""
    if not isinstance(node, ast.List):
        return None
    found = []
    for element in node.elts:
        try:
            found.append(_value(element, path, namespace))
        except Exception:
            first = element.args[0] if isinstance(element, ast.Call) and element.args else None
            name = first.value if isinstance(first, ast.Constant) else None
            if name not in claims.registry():
                return None
            found.append(claims.judge(str(name), None, testable=False, note=WHY))
    return found


def _assigned(statement: ast.Assign | ast.AugAssign, path: str, namespace: dict[str, Any]) -> bool:
    """``verdicts = [claim("C01", …), …]``."""
    found = _verdicts(statement.value, path, namespace)
    if found is None:
        return False
    namespace[_SAVED] = found
    place = ast.copy_location(ast.Name(_SAVED, ast.Load()), statement.value)
    if isinstance(statement, ast.Assign):
        again: ast.stmt = ast.Assign(statement.targets, place)
    else:
        again = ast.AugAssign(statement.target, statement.op, place)
    _run(ast.copy_location(again, statement), path, namespace)
    del namespace[_SAVED]
    return True


def _called(call: ast.Call, path: str, namespace: dict[str, Any]) -> bool:
    """``claims.show([…], …)`` with the verdicts that can be judged, or ``figures.publish(fig,
    "name", caption=…, alt=…, data=…)`` with the texts that can be written."""
    name = ast.unparse(call.func).rpartition(".")[2]
    if name not in ("show", "publish"):
        return False
    given: list[Any] = []
    for argument in call.args:
        found = _verdicts(argument, path, namespace) if name == "show" else None
        given.append(_value(argument, path, namespace) if found is None else found)
    named: dict[str, Any] = {}
    for keyword in call.keywords:
        assert keyword.arg is not None
        try:
            named[keyword.arg] = _value(keyword.value, path, namespace)
        except Exception:
            if keyword.arg == "values":  # the caption that wants them will say so
                named[keyword.arg] = {}
            elif name == "publish" and keyword.arg in ("caption", "alt"):
                named[keyword.arg] = TEXT
            else:
                raise
    _value(call.func, path, namespace)(*given, **named)
    return True
