"""The walker that starts at the first changed layer, and falls back on the plain one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from companion import deadline
from companion.connectivity import Measure, Walker
from companion.layerwise.replay import Replay, Tape
from companion.theta import Theta, affine, check

log = logging.getLogger("companion")

_KEPT = 1 << 30
"""Bytes of mixed weights and random directions that are kept between batches of images."""
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
    weights: tuple[tuple[float, float], ...]
    end: Callable[[], Theta] | None = None


class LayerWalker(Walker):
    """Measures many paths between two networks. Arguments as :class:`Walker`."""

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
            check(self.module, theta, name)
        # Copies: BatchNorm in train mode writes into its buffers.
        ends = {
            n: {k: v.to(self.device, copy=True) for k, v in t.items()}
            for n, t in (("a", a), ("b", b))
        }
        if fast and self.bn != "reestimate":
            sums = _Replayed(self, ends, paths).sums()
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
    """The state of one fast measurement: networks, paths, kept mixtures, sums."""

    def __init__(self, walker: LayerWalker, ends: Mapping[str, Theta], paths: Sequence[Path]):
        self.walker, self.ends, self.paths = walker, ends, paths
        self.kept: dict[Any, torch.Tensor] = {}
        self.room = _KEPT
        self.last: tuple[Path, Theta] | None = None
        self.bases = [r for r in ("a", "b") if any(p.rest == r for p in paths)]

    def sums(self) -> torch.Tensor | None:
        """Summed loss, errors, predictions: (all weights of all paths, splits, 3), or None."""
        walker = self.walker
        try:
            self.replay = Replay(walker.module)
        except (AttributeError, RuntimeError) as e:  # a scripted module cannot be patched
            log.warning("layers are evaluated from the input on: %s", e)
            return None
        if walker.bn == "batch":
            for m in self.replay.module.modules():
                if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
                    m.train()
        if not self._checked():
            log.warning(
                "this network keeps state outside the outputs of its modules; "
                "layers are evaluated from the input on"
            )
            return None
        count = sum(len(p.weights) for p in self.paths)
        out = torch.zeros(
            count, len(walker.splits), 3, dtype=torch.float64, device=walker.device
        )
        for column, split in enumerate(walker.splits.values()):
            for x, y in walker._batches(split):
                for rest in self.bases:
                    self._batch(rest, x, y, out[:, column])
        return out

    def _batch(self, rest: str, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        """All paths of one base on one batch: the base once, then every point from its cut on."""
        self.replay.load(self.ends[rest])
        tape = self.replay.record(x)
        base = self._score(tape.output, y)
        at = 0
        for path in self.paths:
            if path.rest == rest:
                deadline.check()
                cut = tape.cut(path.names)
                for row, weights in enumerate(path.weights, at):
                    if weights[1] == 0 or cut == float("inf"):
                        out[row] += base
                        continue
                    self.replay.load(self._point(path, weights))
                    out[row] += self._score(self.replay.run(x, tape, cut), y)
                self._restore(path)
            at += len(path.weights)

    def _score(self, outputs: Any, y: torch.Tensor) -> torch.Tensor:
        loss, wrong, count = self.walker.score(outputs, y)
        found = torch.zeros(3, dtype=torch.float64, device=self.walker.device)
        found[0], found[1], found[2] = loss, wrong, count
        return found

    def _restore(self, path: Path) -> None:
        base = self.ends[path.rest]
        self.replay.load({name: base[name] for name in path.names})

    def _point(self, path: Path, weights: tuple[float, float]) -> Theta:
        """The moving entries at one point of a path."""
        # Towards the other network, paths share their mixtures: equal weights of (A, B), equal bits.
        shared = path.end is None
        place = weights[::-1] if shared and path.rest == "b" else weights
        keys = {name: ("shared" if shared else id(path), place, name) for name in path.names}
        missing = [name for name, key in keys.items() if key not in self.kept]
        fresh: dict[str, torch.Tensor] = {}
        if missing:
            end = self._end(path)
            if weights[0] == 0:
                fresh = {n: end[n] for n in missing}
            else:
                fresh = dict(affine((self.ends[path.rest], end), weights, missing))
            for name, value in fresh.items():
                size = value.numel() * value.element_size()
                if size <= self.room:
                    self.kept[keys[name]] = value
                    self.room -= size
        return {n: fresh[n] if n in fresh else self.kept[k] for n, k in keys.items()}

    def _end(self, path: Path) -> Theta:
        if path.end is None:
            return self.ends[_other(path.rest)]
        if self.last is None or self.last[0] is not path:
            moved = {k: v.to(self.walker.device) for k, v in path.end().items()}
            self.last = (path, moved)
        return self.last[1]

    @torch.no_grad()
    def _checked(self) -> bool:
        """Compare with plain passes on a few images, and make batches small enough to record."""
        walker = self.walker
        x = next(iter(walker.splits.values())).x[:_PROBE]
        for rest in self.bases:
            self.replay.load(self.ends[rest])
            tape = self.replay.record(x)
            seen = set()
            for path in self.paths:
                cut = tape.cut(path.names)
                moved = [w for w in path.weights if w[1]]
                if path.rest != rest or cut in seen or cut == float("inf") or not moved:
                    continue
                seen.add(cut)
                self.replay.load(self._point(path, moved[0]))
                if not self.replay.agrees(x, tape, cut):
                    return False
                self._restore(path)
        if walker.bn != "batch" and self.bases:
            walker.batch = min(walker.batch, _images(tape, len(x), walker.device))
        return True


def _images(tape: Tape, probe: int, device: torch.device) -> int:
    """Images whose recorded outputs fit: half a gigabyte, on a GPU an eighth of its memory."""
    room = 1 << 29
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory // 8
    return max(1, room * probe // max(tape.bytes(), 1))


def _other(rest: str) -> str:
    return "b" if rest == "a" else "a"
