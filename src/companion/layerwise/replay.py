"""Forward passes that begin at the first changed layer.

One pass of a network on a batch is recorded: the outputs of all calls of all its modules, and when
each parameter was first read. If later only some parameters change, nothing before their first read
can, so the real forward runs again with every call that had ended by then answered from the record.
Python code between the modules is simply executed again, which is why this works for any network:
no graph is traced, modules may be called several times, and parameters may be read without their
module being called (tied weights, functional code), since reads are seen by the tensor operations
themselves. What it cannot see is state that a module keeps outside its outputs; so
:meth:`Replay.agrees` compares with a plain pass before a sweep relies on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, layout


@dataclass
class _Call:
    """One call of a module: how many calls it and what it called make, and what it returned."""

    module: nn.Module
    size: int = 1
    end: float = float("inf")
    """Operations done when it returned."""
    output: Any = None
    mutated: bool = False
    """Somebody wrote into the output later; ``output`` is a copy from before."""

    def answer(self) -> Any:
        return _copied(self.output) if self.mutated else self.output


def _copied(value: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class Tape:
    """The record of one forward pass.

    Arguments:
        calls: in the order they began.
        reads: entry -> number of the operation that read it first.
        output: of the whole network.
        score: room for what somebody makes of the output.
    """

    calls: list[_Call] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)
    output: Any = None
    score: torch.Tensor | None = None

    def cut(self, names: Iterable[str]) -> float:
        """The operation up to which nothing depends on ``names``; infinity if nothing does."""
        return min((self.reads[n] for n in names if n in self.reads), default=float("inf"))

    def bytes(self) -> int:
        """Memory of what is recorded."""
        sizes = {
            _place(t): t.untyped_storage().nbytes()
            for call in self.calls
            for t in tree_leaves(call.output)
            if isinstance(t, torch.Tensor)
        }
        return sum(sizes.values())


class _Recorder(TorchDispatchMode):
    """Sees every operation: which entry it reads, and whether it writes into a recorded output."""

    def __init__(self, entries: Mapping[str, torch.Tensor]):
        super().__init__()
        self.tape = Tape()
        self.clock = 0
        self.names = {_place(t): name for name, t in entries.items() if t.numel()}
        self.outputs: dict[int, list[_Call]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                name = self.names.get(_place(tensor))
                if name is not None:
                    self.tape.reads.setdefault(name, self.clock)
        if func._schema.is_mutable:
            for number, spec in enumerate(func._schema.arguments):
                if spec.alias_info is not None and spec.alias_info.is_write:
                    value = args[number] if number < len(args) else kwargs.get(spec.name)
                    self._protect(value)
        self.clock += 1
        return func(*args, **kwargs)

    def _protect(self, written: Any) -> None:
        for tensor in tree_leaves(written):
            if isinstance(tensor, torch.Tensor):
                for call in self.outputs.pop(_place(tensor), []):
                    call.output, call.mutated = _copied(call.output), True

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``forward`` and record what it returns."""
        call = _Call(module)
        first = len(self.tape.calls)
        self.tape.calls.append(call)
        output = forward(*args, **kwargs)
        call.size = len(self.tape.calls) - first
        call.end, call.output = self.clock, output
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.outputs.setdefault(_place(tensor), []).append(call)
        return output


class Replay:
    """A private copy of a network that can leave out what a recorded pass has computed.

    Arguments:
        module: any network, in the mode (eval) and on the device to use; it is copied.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).requires_grad_(False)
        state = self.module.state_dict(keep_vars=True)
        self._entries = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        self._floating = layout(self.module).floating
        self._recorder: _Recorder | None = None
        self._tape: Tape | None = None
        self._cut, self._at = 0.0, 0
        for part in self.module.modules():
            self._patch(part)

    def _patch(self, part: nn.Module) -> None:
        forward = part.forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            if self._recorder is not None:
                return self._recorder.call(part, forward, args, kwargs)
            if self._tape is not None and self._at < len(self._tape.calls):
                call = self._tape.calls[self._at]
                if call.module is part and call.end <= self._cut:
                    self._at += call.size
                    return call.answer()
                self._at += 1
            return forward(*args, **kwargs)

        part.forward = patched

    def load(self, theta: Theta) -> None:
        """Let entries be these tensors: they are used, not copied, and may not change."""
        for name, value in theta.items():
            self._entries[name].data = value

    @exact_evaluation()
    @torch.no_grad()
    def record(self, x: torch.Tensor) -> Tape:
        """Run the network as loaded and keep what its modules return."""
        entries = {name: self._entries[name] for name in self._floating}
        self._recorder = recorder = _Recorder(entries)
        try:
            with recorder:
                recorder.tape.output = self.module(x)
        finally:
            self._recorder = None
        return recorder.tape

    @exact_evaluation()
    @torch.no_grad()
    def run(self, x: torch.Tensor, tape: Tape | None = None, cut: float = 0.0) -> Any:
        """Outputs of the network as loaded.

        Arguments:
            tape: of a pass on the same ``x`` by the network as it was before entries changed that
                are first read at ``cut`` (:meth:`Tape.cut`); None computes everything.
        """
        self._tape, self._cut, self._at = tape, cut, 0
        try:
            return self.module(x)
        finally:
            self._tape = None

    def agrees(self, x: torch.Tensor, tape: Tape, cut: float) -> bool:
        """Whether a replay gives what a plain pass of the network as loaded gives.

        The replay comes first: a plain pass would put right what an earlier one left elsewhere.
        """
        again = self.run(x, tape, cut)
        plain = self.run(x)
        scale = float(plain.abs().nan_to_num(0, 0, 0).max()) if plain.numel() else 0.0
        return bool(torch.allclose(plain, again, rtol=0, atol=1e-5 * scale, equal_nan=True))


def first_uses(module: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Entry -> when a pass of ``example`` first reads it; what is never read is left out."""
    return Replay(copy.deepcopy(module).eval()).record(example).reads
