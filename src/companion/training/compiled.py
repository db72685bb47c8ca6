"""``torch.compile`` for many architectures in one process."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_COMPILED: dict[Any, Any] = {}
"""What torch.compile made, by everything it depends on: a minute's work, done once a process."""


def compiled(key: Any, function: F, backend: str) -> F:
    """``function`` compiled for ``key``, and the same again for the same key.

    Code that was compiled for eight different networks is left uncompiled by torch from then on,
    and little is said. So every key gets code of its own.

    Arguments:
        key: everything that the compiled code depends on: architecture, precision, shapes, device.
        function: a plain function; what it closes over is that of the first call with this key.
        backend: of ``torch.compile``.
    """
    if key not in _COMPILED:
        assert isinstance(function, FunctionType)
        code = function.__code__.replace(co_name=f"{function.__name__}_{len(_COMPILED)}")
        own = FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
        _COMPILED[key] = torch.compile(own, backend=backend, dynamic=False)
    made: F = _COMPILED[key]
    return made
