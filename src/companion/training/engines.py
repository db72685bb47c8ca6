"""Which engine trains on a GPU: the one that was asked for, and what stands in where it fails.

    with using("graphs"):
        analyse(...)        # whatever this trains, it trains with graphs

The choice travels with a context variable, so nobody in between has to hand it on. On a CPU every
run is trained by the loop, in a process of its own, whatever was asked for. What the engines are:
:mod:`companion.training.replicas`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from companion.core.errors import one_of
from companion.training.recipe import Recipe

ENGINES = ("auto", "loop", "loop-compile", "vmap", "graphs", "compile")

_NEXT = {"vmap": "graphs", "compile": "graphs", "graphs": "loop", "loop-compile": "loop"}


@dataclass(frozen=True)
class _Choice:
    """What was asked for, and what has failed since."""

    engine: str = "auto"
    failed: set[tuple[Recipe, str]] = field(default_factory=set)


_choice: ContextVar[_Choice | None] = ContextVar("companion_engine", default=None)


@contextmanager
def using(engine: str) -> Iterator[None]:
    """Inside, training takes this engine where it is not told another one.

    Arguments:
        engine: one of :data:`ENGINES`; ``auto``: what an outer ``using`` says, else each network's
            own (:func:`companion.training.replicas.choose`).

    Raises:
        BadParameter: no such engine.
    """
    one_of("engine", engine, ENGINES)
    outer = _choice.get() or _Choice()
    token = _choice.set(_Choice(outer.engine if engine == "auto" else engine, outer.failed))
    try:
        yield
    finally:
        _choice.reset(token)


def asked_for() -> str:
    """The engine asked for here; ``auto`` without a choice."""
    return (_choice.get() or _Choice()).engine


def fall_back(recipe: Recipe, engine: str) -> str | None:
    """What to try after ``engine`` failed to train ``recipe``; None: there is nothing simpler.

    Inside of :func:`using` the failure is remembered: :func:`working` passes over it.
    """
    if choice := _choice.get():
        choice.failed.add((recipe, engine))
    return _NEXT.get(engine)


def working(recipe: Recipe, engine: str) -> str:
    """``engine``, or what stands in for it where it has failed to train ``recipe`` here before."""
    failed = (_choice.get() or _Choice()).failed
    while (recipe, engine) in failed and engine in _NEXT:
        engine = _NEXT[engine]
    return engine
