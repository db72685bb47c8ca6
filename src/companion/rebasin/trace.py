"""Watching a forward pass, operation by operation, and knowing which module each belongs to.

Below autograd every network, whatever Python it is written in, is a sequence of a few dozen
operations on tensors (``aten``). :class:`Tracer` sees each of them with its real arguments, so
nothing has to be symbolically traceable. The derivation of a spec and activation matching read
networks through it; they name an operation by module, kind and count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def taken_apart(attention: bool = False, recurrent: bool = False) -> Iterator[None]:
    """Inside, attention layers of torch.nn are many operations and not one.

    With ``recurrent`` recurrent layers are, too; with ``attention`` they and the product of
    queries, keys and values.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    onednn, cudnn = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if attention or recurrent:
            # oneDNN and cuDNN run recurrent layers as one operation.
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # typed as torch's property
            torch.backends.cudnn.enabled = False
        with sdpa_kernel(SDPBackend.MATH) if attention else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.backends.mkldnn.enabled = onednn
        torch.backends.cudnn.enabled = cudnn


class Tracer(TorchDispatchMode):
    """Calls :meth:`seen` for every operation of the forward passes run inside.

    Arguments:
        module: the network; its submodules get forward hooks while the tracer is entered.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._stack: list[str] = []
        self._hooks: list[Any] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    @property
    def where(self) -> str:
        """Path of the submodule that is running, ``""`` for the network itself."""
        return self._stack[-1] if self._stack else ""

    def forward(self, args: tuple[Any, ...]) -> None:
        """One forward pass, operations counted from 0. What it returns is not needed."""
        self._counts.clear()
        self._stack.clear()
        with self:
            self.module(*args)

    def seen(
        self, func: Any, op: str, nth: int, args: tuple[Any, ...], kwargs: Any, out: Any
    ) -> None:
        """One operation: the overload, its name (``"relu"``), how many of that name came before it
        in :attr:`where`, its arguments and what it returned. To be overridden."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = func.overloadpacket._qualified_op_name.split("::")[-1]
        key = (self.where, op)
        nth = self._counts[key]
        self._counts[key] += 1
        self.seen(func, op, nth, args, kwargs, out)
        return out

    def __enter__(self) -> Self:
        def enter(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                self._stack.append(name)

            return hook

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._stack.pop()

        for name, module in self.module.named_modules():
            self._hooks.append(module.register_forward_pre_hook(enter(name)))
            self._hooks.append(module.register_forward_hook(leave))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
