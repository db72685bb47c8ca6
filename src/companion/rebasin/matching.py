"""What matching finds, as a value: permutations, how good they are, and how to apply them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from companion.core import files
from companion.core.errors import BadParameter
from companion.core.fitting import each
from companion.core.theta import Theta, check_theta
from companion.rebasin.proof import check_equal
from companion.rebasin.spec import Permutations, Spec

FILE_FORMAT = "companion.rebasin/1"


class Found:
    """What every result of a search has: shares of the objective's bound, and a summary."""

    SUMMARY: ClassVar[tuple[str, ...]]

    @property
    def share(self) -> float:
        """The objective as a share of its upper bound, at most 1; NaN if nothing could match."""
        found: Any = self
        return found.objective / found.bound if found.bound else math.nan

    @property
    def share_before(self) -> float:
        """The same with nothing done."""
        found: Any = self
        return found.before / found.bound if found.bound else math.nan

    def summary(self) -> dict[str, Any]:
        """Everything but permutations, rotations and weights, JSON-able."""
        values = ((name.replace("_", " "), getattr(self, name)) for name in self.SUMMARY)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}


@dataclass(frozen=True)
class Matching(Found):
    """The permutations that bring network B close to network A.

    Arguments:
        spec: of the architecture.
        perms: for B: unit i of A is matched with unit p[i] of B.
        method: ``weights``, ``activations``, ``ste``, ``greedy``, ….
        objective: what the method maximised, at ``perms``.
        before: the same, nothing permuted.
        bound: what it cannot exceed (``objective / bound`` is :attr:`share`).
        passes: over all groups (weights), over the data (activations), optimiser steps (ste).
        starts: how many starts the best was chosen from.
        seconds: of wall-clock time.
        details: what else the method has to say, JSON-able.
    """

    spec: Spec
    perms: Permutations
    method: str
    objective: float
    before: float
    bound: float
    passes: int
    starts: int = 1
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    SUMMARY = (
        *("method", "objective", "before", "bound", "share", "share_before", "moved"),
        *("passes", "starts", "seconds", "details"),
    )

    @property
    def moved(self) -> float:
        """Share of the units that change their place. 0: the networks were aligned already."""
        stay = self.spec.identity()
        moved = sum(int((self.perms[n] != p).sum()) for n, p in stay.items())
        return moved / max(1, sum(p.numel() for p in stay.values()))

    def apply(self, module: nn.Module, theta: Theta, *, check_outputs: bool = True) -> Theta:
        """B with its units in A's order.

        Arguments:
            module: the architecture.
            theta: B.
            check_outputs: run B and the result on the spec's example (float64) and refuse if their
                outputs differ by more than the spec's tolerance.

        Returns:
            a new state dict on ``theta``'s device; entries that do not move are the same tensors.

        Raises:
            BadParameter: ``theta`` is no state dict of ``module``, or outputs differ.
        """
        theta = check_theta(module, theta, "B")
        out = each(theta, lambda name, value: self.spec.permute_tensor(value, name, self.perms))
        if check_outputs:
            check_equal(module, theta, out, self.spec)
        return out

    def save(self, path: str | Path) -> None:
        """Write permutations, summary and spec as one safetensors file, whole or not at all.

        Raises:
            BadParameter: it cannot be written.
        """
        meta = {
            "format": FILE_FORMAT,
            "summary": json.dumps(self.summary()),
            "spec": json.dumps(self.spec.to_json()),
        }
        content = save({n: p.contiguous() for n, p in self.perms.items()}, metadata=meta)
        try:
            files.write(Path(path), content)
        except OSError as e:
            raise BadParameter(f"{path} cannot be written ({e.strerror or e}).") from e

    @classmethod
    def load(cls, path: str | Path, spec: Spec) -> Matching:
        """Read what :meth:`save` wrote.

        Arguments:
            spec: derived again from the network the matching is for.

        Raises:
            BadParameter: no such file, not one of ours, or of another architecture.
        """
        try:
            with safe_open(str(path), "pt") as f:
                meta = f.metadata() or {}
                perms = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - f is no dict
        except FileNotFoundError:
            raise BadParameter(f"matching {path}: no such file.") from None
        except SafetensorError as e:
            raise BadParameter(f"matching {path}: not a safetensors file ({e}).") from e
        if meta.get("format") != FILE_FORMAT:
            raise BadParameter(
                f"matching {path}: not written by companion.rebasin ({FILE_FORMAT})."
            )
        if json.loads(meta["spec"]) != spec.to_json():
            raise BadParameter(
                f"matching {path}: it belongs to a network with other layers or sizes."
            )
        perms = {name: perms[name] for name in spec.groups if name in perms}
        spec.check(perms)
        told = json.loads(meta["summary"])
        return cls(spec, perms, **{f.name: told[f.name] for f in fields(cls)[2:]})
