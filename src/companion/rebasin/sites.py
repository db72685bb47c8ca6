"""Where activations are: reading a group's units off a forward pass, and proving that it is them.

A :class:`companion.rebasin.spec.Site` names an operation by module, kind and count. Which
operations a forward pass has depends a little on device and precision (attention is one kernel here
and a dozen operations there), so a site is tried before it is used: with permuted weights, the
units found there must be the same ones in permuted order. Used by activation matching; chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import Theta
from companion.rebasin.spec import Permutations, Site, Spec
from companion.rebasin.trace import Tracer

AGREE = 0.02
"""Relative difference up to which two passes show the same units: what half precision needs.
Activations of another operation differ by about their own size."""


@dataclass(frozen=True)
class Look:
    """An activation, seen as samples of the units of a group.

    Arguments:
        outer: the family it is for.
        group: whose units they are, the outer group itself or one of
            its inner groups (units of all outer units then, outer unit first).
        site: where it is.
        sizes: of the factors of the site's block.
        front: the positions of the factors that make up
            the units. The other factors, and all other axes, are samples.
    """

    outer: str
    group: str
    site: Site
    sizes: tuple[int, ...]
    front: tuple[int, ...]

    def __str__(self) -> str:
        where = f"of {self.site.module!r}" if self.site.module else "of the network itself"
        return (
            f"activations of {self.group!r}: operation {self.site.op!r} "
            f"number {self.site.nth} {where}"
        )

    @property
    def units(self) -> int:
        """Number of units."""
        return math.prod(self.sizes[f] for f in self.front)

    def samples(self, out: Tensor) -> Tensor:
        """The activation as a matrix, (samples, units); a view of ``out`` where that is possible.

        Raises:
            BadParameter: ``out`` has too few axes or positions.
        """
        dim, start = self.site.dim, self.site.start
        length = math.prod(self.sizes)
        if out.dim() < -dim or out.shape[dim] < start + length:
            raise BadParameter(
                f"{self} has shape {tuple(out.shape)}, which does not fit the spec. The inputs "
                "must look like those that the spec was derived with."
            )
        x = out.detach().narrow(dim, start, length).movedim(dim, -1)
        if len(self.sizes) > 1:
            x = x.unflatten(-1, self.sizes)
            lead = x.dim() - len(self.sizes)
            rest = [lead + i for i in range(len(self.sizes)) if i not in self.front]
            x = x.permute(*range(lead), *rest, *(lead + i for i in self.front))
        x = x.reshape(-1, self.units)
        return x if x.dtype in (torch.float32, torch.float64) else x.float()


def looks(spec: Spec) -> tuple[Look, ...]:
    """Where to look for each group; groups that have no usable site are not among them."""
    found: dict[tuple[str, str], Look] = {}
    for outer, *inner in spec.families:
        for name in (outer, *inner):
            site = spec.sites.get(name)
            if site is None:
                continue
            named = [f for f in site.block if isinstance(f, str)]
            if sorted(named) != sorted(set(named) & {outer, *inner}) or outer not in named:
                continue  # moved by other families too, or twice by this one: no plain assignment
            within = [f for f in named if f != outer]
            if len(within) > 1:
                continue
            group = within[0] if within else outer
            sizes = tuple(f if isinstance(f, int) else spec.groups[f].size for f in site.block)
            front = tuple(site.block.index(f) for f in ([outer, *within]))
            found.setdefault((outer, group), Look(outer, group, site, sizes, front))
    return tuple(found.values())


class Watch(Tracer):
    """Hands the activations at the sites to :meth:`found` as they come by."""

    def __init__(self, module: nn.Module, wanted: Sequence[Look]):
        super().__init__(module)
        self.module = module
        self._at: dict[tuple[str, str, int], list[Look]] = {}
        for look in wanted:
            site = look.site
            self._at.setdefault((site.module, site.op, site.nth), []).append(look)

    def found(self, look: Look, out: Tensor) -> None:
        """An activation. To be overridden."""

    def seen(
        self,
        func: Any,
        op: str,
        nth: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Any,
    ) -> None:
        """See :class:`companion.rebasin.trace.Tracer`."""
        for look in self._at.get((self.where, op, nth), ()):
            self.found(look, out[0] if isinstance(out, tuple | list) else out)

    def forward(self, args: tuple[Any, ...]) -> None:
        """One forward pass. What it returns is not needed."""
        self.begin()
        with self:
            self.module(*args)


class Keep(Watch):
    """Network A: keeps the samples of one batch."""

    def __init__(self, module: nn.Module, wanted: Sequence[Look]):
        super().__init__(module, wanted)
        self.wanted = tuple(wanted)
        self.kept: dict[Look, Tensor] = {}

    def missed(self) -> list[Look]:
        """What did not come by in the last pass."""
        return [look for look in self.wanted if look not in self.kept]

    def found(self, look: Look, out: Tensor) -> None:
        x = look.samples(out)
        # A view would change if a later operation writes into the activation.
        own = x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
        self.kept[look] = x if own else x.clone()


@contextmanager
def taken_apart(attention: bool) -> Iterator[None]:
    """Inside, attention layers of torch.nn are many operations, as when the spec was derived.

    Arguments:
        attention: so are the product of queries, keys and values, and recurrent layers.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    onednn = torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if attention:
            # And recurrent layers, which oneDNN runs as one operation in float32.
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.backends.mkldnn.enabled = onednn


class _Compare(Watch):
    """The network with permuted weights: are these the units of the first, permuted?"""

    def __init__(self, module: nn.Module, first: Keep, spec: Spec, perms: Permutations):
        super().__init__(module, first.wanted)
        self.first, self.wrong = first, ""
        self.index = {
            look: spec.block_index(tuple(str(look.site.block[f]) for f in look.front), perms)
            for look in first.wanted
        }

    def found(self, look: Look, out: Tensor) -> None:
        kept = self.first.kept.pop(look, None)
        if kept is None:
            return
        want = kept[:, self.index[look].to(kept.device)]
        got = look.samples(out)
        if want.shape != got.shape:
            self.wrong = self.wrong or f"{look} has another shape in another pass."
        elif bool(torch.isfinite(want).all()):  # others are reported as what they are, later
            off, size = (torch.linalg.vector_norm(x) for x in (got - want, want))
            if not bool(off <= AGREE * size):
                self.wrong = self.wrong or f"{look} does not show its units."


def find(spec: Spec, first: Keep, other: nn.Module, a: Theta, args: tuple[Any, ...]) -> bool:
    """Try the sites: permuted weights must show the same units in permuted order.

    Arguments:
        first: holds network A, of which ``a`` are the weights.
        other: a copy of the network, whose
            weights are overwritten; args: of one forward pass.

    Returns:
        whether attention has to be taken apart for it (see :func:`taken_apart`).

    Raises:
        BadParameter: units are not where the spec says; the message names the group.
    """
    perms = spec.random(Key("rebasin", "sites").generator())
    other.load_state_dict(spec.permute(a, perms), strict=False)
    wrong = ""
    for attention in (False, True):
        second = _Compare(other, first, spec, perms)
        with taken_apart(attention):
            first.forward(args)
            missed = first.missed()
            if not missed:
                second.forward(args)
                missed = [*first.kept]
        first.kept.clear()
        if not missed and not second.wrong:
            return attention
        wrong = wrong or (f"{missed[0]} did not come by." if missed else second.wrong)
    raise BadParameter(
        f"{wrong} The network takes another path here than on the example that the spec was "
        "derived with; derive it on this device, with inputs like these."
    )
