"""The walker that starts at the first changed layer, and falls back on the plain one."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from companion.connectivity import Measure, Walker
from companion.connectivity.batches import room
from companion.core import deadline
from companion.core.errors import OutOfTime
from companion.core.theta import Theta, affine, check_theta
from companion.layerwise.replay import Replay, Tape

Weights: TypeAlias = tuple[float, float]

log = logging.getLogger("companion")

_KEPT = 1 << 30
"""Bytes of mixed weights and random directions that are kept between batches of images."""
_RECORDED = 1 << 29
"""Bytes that recorded passes may take on a CPU."""
_CACHED = 1 << 26
"""Bytes of a recorded pass that a batch aims at, on a CPU."""
_PROBE = 8  # images of the pass that measures memory and checks the replay


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


class LayerWalker(Walker):
    """Measures many paths between two networks. Arguments as :class:`Walker`.

    Without ``batch``, a replay on a CPU takes as many images at a time as suit its feature maps.
    """

    chosen = False
    """The user said how many images a batch holds."""

    def measure(
        self, a: Theta, b: Theta, paths: Sequence[Path], *, fast: bool = True
    ) -> tuple[list[list[dict[str, Measure]]], str]:
        """The measures of every path, a row each, and how they were made.

        Returns:
            for each path one :class:`Measure` a split for each of its weights; and ``replay``, or
            ``walker`` where the plain walker had to do it: BatchNorm statistics that are estimated
            anew at every point, a network that keeps state outside its outputs, or not ``fast``.
        """
        for theta, name in ((a, "A"), (b, "B")):
            check_theta(self.module, theta, name)
        # Tied tensors under their first name only, or the second would undo what the first moved.
        own = self.layout.floating + self.layout.integers
        # Copies: BatchNorm in train mode writes into its buffers.
        ends = {
            n: {k: t[k].to(self.device, copy=True) for k in own} for n, t in (("a", a), ("b", b))
        }
        if fast and self.bn != "reestimate":
            sums = None
            try:
                sums = _Replayed(self, ends, paths).sums()
            except OutOfTime:
                raise
            except Exception as e:  # if it is the network's own fault, the plain walker says so
                log.warning("replays of this network fail (%s: %s)", type(e).__name__, e)
            if sums is None:
                log.warning("every point is evaluated from the input on")
            if sums is not None:
                flat = self._read(list(sums))
                rows, at = [], 0
                for path in paths:
                    rows.append(flat[at : at + len(path.weights)])
                    at += len(path.weights)
                return rows, "replay"
        return [self._plainly(ends, path) for path in paths], "walker"

    def _plainly(self, ends: Mapping[str, Theta], path: Path) -> list[dict[str, Measure]]:
        base = ends[path.rest]
        end = ends[_other(path.rest)] if path.end is None else {**base, **path.end()}
        anchors = (base, {k: v.to(self.device) for k, v in end.items()})
        return self.walk(anchors, path.weights, names=path.names, rest=base)


class _Replayed:
    """The state of one fast measurement: networks, paths, kept mixtures.

    A network on a path agrees with its base before the first entry that moves, and with the whole
    mixture of A and B at that place before the first entry that does not (so the first k layers
    averaged, k = 1, 2, …, share the averaged network's pass). It replays whichever goes further.
    """

    def __init__(self, walker: LayerWalker, ends: Mapping[str, Theta], paths: Sequence[Path]):
        self.walker, self.ends, self.paths = walker, ends, paths
        self.replay = Replay(walker.module)
        if walker.bn == "batch":
            for m in self.replay.module.modules():
                if isinstance(m, _BatchNorm):
                    m.train()
        self.kept: dict[Any, torch.Tensor] = {}
        self.room = _KEPT
        self.last: tuple[Path, Theta] | None = None
        everything = set(walker.layout.floating)
        self.still = [tuple(everything - set(p.names)) for p in paths]
        starts = itertools.accumulate((len(p.weights) for p in paths), initial=0)
        self.count = sum(len(p.weights) for p in paths)
        # Weights of A and B -> the points there; None: random directions.
        self.points: dict[Weights | None, list[tuple[int, int, Weights]]] = {}
        for number, (path, start) in enumerate(zip(paths, starts, strict=False)):
            for row, weights in enumerate(path.weights, start):
                place = _place(path, weights) if path.end is None else None
                self.points.setdefault(place, []).append((row, number, weights))
        ignored = "num_batches_tracked"  # BatchNorm counts; no output depends on it
        self.mixed = all(
            torch.equal(ends["a"][n], ends["b"][n])
            for n in walker.layout.integers
            if not n.endswith(ignored)
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
            for x, y in walker._batches(split):
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
        if self.walker.bn != "batch":  # there, batches have a meaning
            images = self.walker.batch
            if not self.walker.chosen and self.walker.device.type == "cpu":
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
            if place == (1.0, 0.0) or place == (0.0, 1.0):
                mixture = tapes["a" if place[0] else "b"]
            elif place is not None:
                self.replay.load({**self.ends["a"], **self._mixture(place)})
                mixture = self.replay.record(x)
            for rest in ("a", "b"):
                self.replay.load(self.ends[rest])
                for row, number, weights in points:
                    path = self.paths[number]
                    if path.rest != rest:
                        continue
                    deadline.stop_if_passed()
                    tape, cut = tapes[rest], tapes[rest].cut(path.names) if weights[1] else math.inf
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

    def _mixture(self, place: Weights, names: Sequence[str] | None = None) -> Theta:
        """Entries of ``(1 - alpha) A + alpha B``."""
        mix = partial(affine, (self.ends["a"], self.ends["b"]), place)
        return self._keep(place, names or self.walker.layout.floating, mix)

    def _point(self, path: Path, weights: Weights) -> Theta:
        """The moving entries at one point of a path."""
        if path.end is None:
            return self._mixture(_place(path, weights), path.names)
        base = self.ends[path.rest]
        return self._keep(
            (id(path), weights),
            path.names,
            lambda names: affine((base, self._end(path)), weights, names),
        )

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

    def _end(self, path: Path) -> Theta:
        if path.end is None:
            return self.ends[_other(path.rest)]
        if self.last is None or self.last[0] is not path:
            moved = {k: v.to(self.walker.device) for k, v in path.end().items()}
            self.last = (path, moved)
        return self.last[1]


def _place(path: Path, weights: Weights) -> Weights:
    """The weights of A and B."""
    return weights if path.rest == "a" else weights[::-1]


def _other(rest: str) -> str:
    return "b" if rest == "a" else "a"
