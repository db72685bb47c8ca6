"""Forward passes that begin at the first changed layer, and the walker that measures with them.

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

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from companion.connectivity import Measure, Walker, statistics
from companion.connectivity.batches import room
from companion.core import deadline
from companion.core.errors import OutOfTime
from companion.core.networks import copied, private
from companion.core.numerics import exact_evaluation
from companion.core.theta import COUNTER, Theta, affine, layout

Weights: TypeAlias = tuple[float, float]

log = logging.getLogger("companion")

_KEPT = 1 << 30
"""Bytes of mixed weights and random directions that are kept between batches of images."""
_RECORDED = 1 << 29
"""Bytes that recorded passes may take on a CPU."""
_CACHED = 1 << 26
"""Bytes of a recorded pass that a batch aims at, on a CPU."""
_PROBE = 8  # images of the pass that measures memory and checks the replay


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
        self.module = copied(module).requires_grad_(False)
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
    return Replay(private(module, example)).record(example).reads


@dataclass(frozen=True, eq=False)
class Path:
    """A segment from a base network along which some entries move.

    Arguments:
        rest: the base, ``a`` or ``b``.
        names: the entries that move.
        weights: rows (weight of the base, weight of the end).
        end: where the moving entries go; called when it is needed, with equal results each time.
            None: to the other network.
    """

    rest: str
    names: tuple[str, ...]
    weights: tuple[Weights, ...]
    end: Callable[[], Theta] | None = None

    @property
    def other(self) -> str:
        """The network that is not the base."""
        return "b" if self.rest == "a" else "a"

    def mixture(self, weights: Weights) -> Weights | None:
        """The weights of A and B at a point; None in a random direction."""
        if self.end is not None:
            return None
        return weights if self.rest == "a" else weights[::-1]


class LayerWalker(Walker):
    """Measures many paths between two networks. Arguments as :class:`Walker`."""

    def measure(
        self, a: Theta, b: Theta, paths: Sequence[Path], *, fast: bool = True, adapt: bool = False
    ) -> tuple[list[list[dict[str, Measure]]], str]:
        """The measures of every path, a row each, and how they were made.

        Arguments:
            adapt: a replay on a CPU takes as many images at a time as suit its feature maps.

        Returns:
            for each path one :class:`Measure` a split for each of its weights; and ``replay``, or
            ``walker`` where the plain walker had to do it: BatchNorm statistics that are estimated
            anew at every point, a network that keeps state outside its outputs, or not ``fast``.
        """
        a, b = self.enter(a, "A"), self.enter(b, "B")
        # Tied tensors under their first name only, or the second would undo what the first moved.
        own = self.layout.floating + self.layout.integers
        # Copies: BatchNorm in train mode writes into its buffers.
        ends = {
            n: {k: t[k].to(self.device, copy=True) for k in own} for n, t in (("a", a), ("b", b))
        }
        self.check_line((ends["a"], ends["b"]))
        if fast and self.bn != "reestimate":
            try:
                if (sums := _Replayed(self, ends, paths, adapt).sums()) is not None:
                    flat = iter(self._read(list(sums)))
                    return [list(itertools.islice(flat, len(p.weights))) for p in paths], "replay"
            except OutOfTime:
                raise
            except Exception as e:  # if it is the network's own fault, the plain walker says so
                log.warning("replays of this network fail (%s: %s)", type(e).__name__, e)
            log.warning("every point is evaluated from the input on")
        out = []
        for path in paths:
            base = ends[path.rest]
            end = ends[path.other] if path.end is None else {**base, **path.end()}
            anchors = (base, {k: v.to(self.device) for k, v in end.items()})
            out.append(self.walk(anchors, path.weights, names=path.names, rest=base))
        return out, "walker"


class _Replayed:
    """The state of one fast measurement: networks, paths, kept mixtures.

    A network on a path agrees with its base before the first entry that moves, and with the whole
    mixture of A and B at that place before the first entry that does not (so the first k layers
    averaged, k = 1, 2, …, share the averaged network's pass). It replays whichever goes further.
    Entries that A and B have in common, a frozen backbone say, move nowhere and stop nothing.
    """

    def __init__(
        self, walker: LayerWalker, ends: Mapping[str, Theta], paths: Sequence[Path], adapt: bool
    ):
        self.walker, self.ends, self.paths, self.adapt = walker, ends, paths, adapt
        self.replay = Replay(walker.module)
        if walker.bn == "batch":
            for m in statistics.running(self.replay.module):
                m.train()
        self.kept: dict[Any, torch.Tensor] = {}
        self.room = _KEPT
        self.last: tuple[Path, Theta] | None = None
        a, b = ends["a"], ends["b"]
        differ = {n for n in walker.layout.floating if not torch.equal(a[n], b[n])}
        self.still = [tuple(differ - set(p.names)) for p in paths]
        # A random direction moves what is common, too.
        self.moving = [p.names if p.end else tuple(differ & set(p.names)) for p in paths]
        every = [(number, weights) for number, p in enumerate(paths) for weights in p.weights]
        self.count = len(every)
        # Weights of A and B -> the points there; None: random directions.
        self.points: dict[Weights | None, list[tuple[int, int, Weights]]] = {}
        for row, (number, weights) in enumerate(every):
            place = paths[number].mixture(weights)
            self.points.setdefault(place, []).append((row, number, weights))
        self.mixed = all(
            torch.equal(ends["a"][n], ends["b"][n])
            for n in walker.layout.integers
            if not n.endswith(COUNTER)
        )

    def sums(self) -> torch.Tensor | None:
        """Summed loss, errors, predictions: (all weights of all paths, splits, 3).

        None if a replay does not give what a plain pass gives.
        """
        walker = self.walker
        if not self._checked(next(iter(walker.splits.values())).x[:_PROBE]):
            log.warning("this network keeps state outside the outputs of its modules")
            return None
        shape = (self.count, len(walker.splits), 3)
        out = torch.zeros(shape, dtype=torch.float64, device=walker.device)
        for column, split in enumerate(walker.splits.values()):
            for x, y in walker.batches(split):
                for row, tape, cut in self._visit(x):
                    if cut < math.inf:
                        found = self._score(self.replay.run(x, tape, cut), y)
                    else:
                        if tape.score is None:
                            tape.score = self._score(tape.output, y)
                        found = tape.score
                    out[row, column] += found
        return out

    def _checked(self, x: torch.Tensor) -> bool:
        """Compare with plain passes on a few images, and make batches small enough to record."""
        seen = set()
        most = 1  # bytes of the largest record
        for _, tape, cut in self._visit(x):
            if cut < math.inf and (id(tape), cut) not in seen:
                seen.add((id(tape), cut))  # mixtures may share an id: one check fewer
                if not self.replay.agrees(x, tape, cut):
                    return False
            most = max(most, tape.bytes())
        if not self.walker.each_batch:  # there, batches have a meaning
            images = self.walker.batch
            if self.adapt and self.walker.device.type == "cpu":
                # Small feature maps want large batches, large ones small batches: both are faster.
                images = max(16, min(500, _CACHED * len(x) // most))
            kept = room(self.walker.device, _RECORDED) * len(x) // (3 * most)  # A, B and a mixture
            self.walker.batch = max(1, min(images, kept))
        return True

    def _visit(self, x: torch.Tensor) -> Iterator[tuple[int, Tape, float]]:
        """Every point, loaded: its row, the tape to replay, and how far (infinity: all of it)."""
        tapes = {}
        for rest in ("a", "b"):
            self.replay.load(self.ends[rest])
            tapes[rest] = self.replay.record(x)
        for place, points in self.points.items():
            mixture = None
            if place in ((1.0, 0.0), (0.0, 1.0)):
                mixture = tapes["a" if place == (1.0, 0.0) else "b"]
            elif place is not None:
                everything = self._mixture(place, self.walker.layout.floating)
                self.replay.load({**self.ends["a"], **everything})
                mixture = self.replay.record(x)
            for rest in ("a", "b"):
                self.replay.load(self.ends[rest])
                for row, number, weights in points:
                    path = self.paths[number]
                    if path.rest != rest:
                        continue
                    deadline.stop_if_passed()
                    names = self.moving[number] if weights[1] else ()
                    tape, cut = tapes[rest], tapes[rest].cut(names)
                    if mixture is not None and self.mixed:
                        further = mixture.cut(self.still[number])
                        if further > cut:
                            tape, cut = mixture, further
                    if cut < math.inf:
                        self.replay.load(self._point(path, weights))
                    yield row, tape, cut
                    if cut < math.inf:
                        self.replay.load({n: self.ends[rest][n] for n in path.names})

    def _score(self, outputs: Any, y: torch.Tensor) -> torch.Tensor:
        loss, wrong, count = self.walker.score(outputs, y)
        found = torch.zeros(3, dtype=torch.float64, device=self.walker.device)
        found[0], found[1], found[2] = loss, wrong, count
        return found

    def _mixture(self, place: Weights, names: Sequence[str]) -> Theta:
        mix = partial(affine, (self.ends["a"], self.ends["b"]), place)
        return self._keep(place, names, mix)

    def _point(self, path: Path, weights: Weights) -> Theta:
        """The moving entries at one point of a path."""
        place = path.mixture(weights)
        if place is not None:
            return self._mixture(place, path.names)

        def make(names: Sequence[str]) -> Theta:
            if path.end and (self.last is None or self.last[0] is not path):
                moved = {k: v.to(self.walker.device) for k, v in path.end().items()}
                self.last = (path, moved)
            assert self.last
            return affine((self.ends[path.rest], self.last[1]), weights, names)

        return self._keep((id(path), weights), path.names, make)

    def _keep(
        self, group: object, names: Sequence[str], make: Callable[[Sequence[str]], Theta]
    ) -> Theta:
        """Entries that were made before, and the others, kept as long as there is room."""
        out = {n: self.kept[group, n] for n in names if (group, n) in self.kept}
        fresh = make([n for n in names if n not in out]) if len(out) < len(names) else {}
        for name, value in fresh.items():
            size = value.numel() * value.element_size()
            if size <= self.room:
                self.kept[group, name] = value
                self.room -= size
        return {**out, **fresh}
