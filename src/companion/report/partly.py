"""Executing a cell as far as it goes: what depends on something missing is left out, and no more.

A recording that is closed runs its chapter's cells on what is measured. One statement after the
other: one that fails is left out, with every name it would have bound, so that no later statement
takes an older value of that name for the new one. Claims are judged each by itself by
:func:`companion.report.claims.verdicts`, so that one without its numbers takes no other along.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from companion.core.errors import BadParameter, CompanionError, NotMeasured

_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Failed = Callable[[ast.stmt, Exception], None]


def execute(
    tree: ast.Module, path: str, namespace: dict[str, Any], lost: set[str], failed: Failed
) -> None:
    """Execute the statements of a cell, and leave out those that cannot be.

    Arguments:
        tree: the cell.
        path: of its file, for tracebacks.
        lost: the names that this and earlier cells left out; changed in place.
        failed: told of every statement that fails by itself, and not for want of a name left out.

    Raises:
        CompanionError: an error that has nothing to do with what is missing, such as a dataset
            that is not here.
    """
    for statement in tree.body:
        try:
            module = ast.Module([statement], [])
            exec(compile(module, path, "exec", dont_inherit=True), namespace)
            lost -= _bound(statement)
        except Exception as error:
            wrong = isinstance(error, CompanionError) and not isinstance(error, NotMeasured)
            if wrong and not (lost and isinstance(error, BadParameter)):
                raise
            if not (isinstance(error, NameError) and error.name in lost):
                failed(statement, error)
            lost |= _bound(statement)
            for name in _bound(statement):
                namespace.pop(name, None)


def _bound(statement: ast.stmt) -> set[str]:
    """The names of the module that a statement binds."""
    found: set[str] = set()
    nodes: list[ast.AST] = [statement]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue  # what is bound inside is its own
        if isinstance(
            node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
        ):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        nodes += ast.iter_child_nodes(node)
    return found
