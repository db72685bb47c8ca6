"""The weights that a network computes with, where they are not the numbers that it stores.

Weight norm stores directions and lengths, pruning weights and masks, an orthogonal layer the
logarithm of a rotation. Half-way between the stored numbers of two networks is then another place
than half-way between their weights: masks of two become a half. Paths are walked in the weights,
so :func:`effective` gives a network of the same function that stores these. Spectral norm is the
exception: it normalises a weight as BatchNorm does features, so the weight is interpolated, and the
singular value that divides it belongs to each point anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from companion.core.errors import BadParameter
from companion.core.networks import copied
from companion.core.networks import plain as unwrapped
from companion.core.theta import PARAMETRIZATIONS, Theta

_KEPT = 8
"""Stored networks whose singular vectors are kept: as many as a path may have anchors."""

SPECTRAL = "spectral norm"


@dataclass(frozen=True)
class _Slot:
    """One tensor of a layer that is computed from stored ones.

    Arguments:
        layer: path of the module.
        tensor: name of the tensor in it.
        kind: what computes it, for messages.
        hook: the forward pre-hook that does; None: a parametrization.
    """

    layer: str
    tensor: str
    kind: str
    hook: Any = None

    def name(self, end: str) -> str:
        """An entry of the layer."""
        return f"{self.layer}.{end}" if self.layer else end

    @property
    def entry(self) -> str:
        """Name in the network of effective weights."""
        spectral = self.kind == SPECTRAL
        return self.name(f"{PARAMETRIZATIONS}.{self.tensor}.original" if spectral else self.tensor)

    def stored(self, state: Mapping[str, Any]) -> list[str]:
        """Names in the original's ``state``."""
        if self.hook is None:
            start = self.name(f"{PARAMETRIZATIONS}.{self.tensor}.")
            return [n for n in state if n.startswith(start)]
        return [n for e in _ENDS if (n := self.name(f"{self.tensor}_{e}")) in state]


_ENDS = ("g", "v", "orig", "mask", "u")
"""Of the entries of hooks: weight norm's two, a mask's two, spectral norm's three."""


def _slots(module: nn.Module) -> Iterator[_Slot]:
    for path, layer in module.named_modules():
        if parametrize.is_parametrized(layer):
            for tensor, steps in _lists(layer).items():
                if len(steps) == 1 and isinstance(steps[0], _Spectral):
                    continue  # effective already
                alone = len(steps) == 1 and type(steps[0]) is _SpectralNorm
                kinds = "+".join(type(step).__name__.strip("_") for step in steps)
                yield _Slot(path, tensor, SPECTRAL if alone else kinds)
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield _Slot(path, hook.name, "WeightNorm", hook)
            elif isinstance(hook, SpectralNorm):
                yield _Slot(path, hook.name, SPECTRAL, hook)
            elif isinstance(hook, BasePruningMethod):
                yield _Slot(path, hook._tensor_name, "pruning mask", hook)


def _lists(layer: nn.Module) -> dict[str, Any]:
    """Tensor -> its parametrizations."""
    return dict(cast(Any, layer.parametrizations).items())


class _Spectral(nn.Module):
    """Division by the largest singular value: that of the vectors a network stores, if the weight
    is the one it stores them with; else the weight's own, exactly.

    Arguments:
        dim: axis of the weight that stands for the rows of the matrix.
        eps: of torch's spectral norm.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.known: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, u, v
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def learn(self, weight: Tensor, u: Tensor, v: Tensor) -> None:
        """Remember the vectors that a network stores with its weight."""
        self.known = [k for k in self.known if not torch.equal(k[0], weight)][1 - _KEPT :]
        self.known.append((weight, u, v))

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as a matrix."""
        return weight.movedim(self.dim, 0).flatten(1)

    @torch.no_grad()
    def vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The left and right singular vector of the largest singular value."""
        for known in (*self.known, *([self._last] if self._last else [])):
            same, u, v = (t.to(weight.device, weight.dtype) for t in known)
            if torch.equal(same, weight):
                return u, v
        m = self.rows(weight).double()
        flat = len(m) <= m.shape[1]
        top = torch.linalg.eigh(m @ m.T if flat else m.T @ m).eigenvectors[:, -1]
        other = F.normalize(m.T @ top if flat else m @ top, dim=0, eps=self.eps)
        u, v = (x.to(weight.dtype) for x in ((top, other) if flat else (other, top)))
        self._last = (weight.detach().clone(), u, v)
        return u, v

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:  # torch normalises a vector by its length
            return F.normalize(weight, dim=0, eps=self.eps)
        u, v = self.vectors(weight)
        return weight / torch.dot(u, self.rows(weight) @ v)


@dataclass(frozen=True, eq=False)
class Effective:
    """A network of effective weights, and the way there and back.

    Arguments:
        module: it stores the weights that layers use; a plain network is its own.
        original: what it was made of.
        slots: the tensors that the original computes from stored ones.
    """

    module: nn.Module
    original: nn.Module
    slots: tuple[_Slot, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a path does instead of interpolating what is stored, for the user."""
        layers: dict[str, list[str]] = {}
        for slot in self.slots:
            layers.setdefault(slot.kind, []).append(slot.layer or "the network")
        out = []
        for kind, names in layers.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            what = (
                "between the networks, weights are divided by their own largest singular values"
                if kind == SPECTRAL
                else "the path is that of the effective weights"
            )
            out.append(f"{kind} in {', '.join(names[:3])}{more}: {what}")
        return tuple(out)

    def of(self, theta: Theta) -> nn.Module:
        """The network that ``theta`` is of by its names: :attr:`module`, or the original."""
        return self.module if theta.keys() <= self.module.state_dict().keys() else self.original

    @torch.no_grad()
    def enter(self, theta: Theta) -> Theta:
        """A state dict of the original as one of :attr:`module`; one that is that already, itself.

        The weights are those that the original's own layers compute, bit by bit.
        """
        if not self.slots:
            return theta
        own = self.module.state_dict()
        if self.of(theta) is self.module:
            return theta
        state = self.original.state_dict()
        out = {n: v for n, v in theta.items() if n in own}
        for slot in self.slots:
            names = slot.stored(state)
            for name in names:
                state[name].copy_(theta[name])
            device = theta[names[0]].device
            layer = self.original.get_submodule(slot.layer)
            out[slot.entry] = _computed(layer, slot).detach().to(device, copy=True)
            if (there := self._spectral(slot)) is not None and out[slot.entry].ndim > 1:
                there.learn(*(t.detach().clone() for t in _vectors(layer, slot)))
        return out

    @torch.no_grad()
    def leave(self, theta: Theta) -> dict[str, Tensor]:
        """A state dict of :attr:`module` as one of the original, of the same function.

        Raises:
            BadParameter: a parametrization without a way back from these weights (no orthogonal
                matrix is half-way between two); the message names the layer.
        """
        if not self.slots:
            return dict(theta)
        for slot in self.slots:
            layer = self.original.get_submodule(slot.layer)
            _store(layer, slot, theta[slot.entry], self._spectral(slot))
        state = self.original.state_dict()
        whole = dict(theta)
        for slot in self.slots:
            device = theta[slot.entry].device
            whole |= {n: state[n].to(device, copy=True) for n in slot.stored(state)}
        return {n: whole[n] for n in state if n in whole}

    def pulled_back(self, theta: Theta, slope: Theta) -> dict[str, Tensor]:
        """Gradients by effective weights, as gradients by what the original stores.

        Arguments:
            theta: a state dict of the original: where.
            slope: entry of :attr:`module` -> gradient; others are taken as they are.
        """
        out = dict(slope)
        self.enter(theta)  # into the original
        for slot in self.slots:
            if (own := out.pop(slot.entry, None)) is None:
                continue
            layer = self.original.get_submodule(slot.layer)
            held = self.original.state_dict(keep_vars=True)
            leaves = {n: held[n] for n in slot.stored(held) if isinstance(held[n], nn.Parameter)}
            with torch.enable_grad():
                for leaf in leaves.values():
                    leaf.requires_grad_()
                weight = _computed(layer, slot)
                found = torch.autograd.grad(weight, list(leaves.values()), own, allow_unused=True)
            for (name, leaf), g in zip(leaves.items(), found, strict=True):
                leaf.requires_grad_(False)
                if g is not None:
                    out[name] = g
        return out

    def _spectral(self, slot: _Slot) -> _Spectral | None:
        if slot.kind != SPECTRAL:
            return None
        (step,) = _lists(self.module.get_submodule(slot.layer))[slot.tensor]
        return cast(_Spectral, step)


@torch.no_grad()
def effective(module: nn.Module) -> Effective:
    """``module`` as a network of effective weights. It is not changed, and not copied if plain.

    Raises:
        BadParameter: a layer computes a weight in two steps that do not come apart.
    """
    module = unwrapped(module)
    slots = tuple(_slots(module))
    if not slots:
        return Effective(module, module)
    original, plain = copied(module).eval(), copied(module).eval()
    for slot in slots:
        try:
            _make_plain(plain.get_submodule(slot.layer), slot)
        except (KeyError, AttributeError, ValueError) as e:
            raise BadParameter(
                f"layer {slot.layer or slot.tensor!r}: its {slot.tensor} ({slot.kind}) is computed "
                "from what is computed itself. Store both networks without one of the two: "
                "torch.nn.utils.prune.remove, remove_weight_norm, remove_parametrizations."
            ) from e
    return Effective(plain, original, slots)


def only_plain(module: nn.Module) -> None:
    """Refuse a network whose weights are computed or complex: for instruments of directions.

    Raises:
        BadParameter: the message names a layer.
    """
    module = unwrapped(module)
    for slot in _slots(module):
        raise BadParameter(
            f"layer {slot.layer or slot.tensor!r}: its {slot.tensor} is computed from what is "
            f"stored ({slot.kind}), and directions are of weights. Store the networks without it: "
            "torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove."
        )
    for name, tensor in module.named_parameters():
        if tensor.is_complex():
            raise BadParameter(f"{name} holds complex numbers, and directions are of real ones.")


def computed_from(theta: Theta) -> list[str]:
    """Names of entries that weights are computed from, by their spelling: no module is needed."""
    pairs = (("_mask", "_orig"), ("_u", "_orig"), ("_g", "_v"))
    hooks = {n for n in theta for a, b in pairs if n.endswith(a) and n.removesuffix(a) + b in theta}
    return [n for n in theta if n in hooks or f".{PARAMETRIZATIONS}." in f".{n}"]


def _vectors(layer: nn.Module, slot: _Slot) -> tuple[Tensor, ...]:
    """The weight before spectral norm, and the two vectors it stores."""
    if slot.hook is None:
        steps = _lists(layer)[slot.tensor]
        return steps.original, steps[0]._u, steps[0]._v
    return tuple(getattr(layer, f"{slot.tensor}_{end}") for end in ("orig", "u", "v"))


def _computed(layer: nn.Module, slot: _Slot) -> Tensor:
    """What a path moves: the weight of the layer; with spectral norm, before the division."""
    if slot.kind == SPECTRAL:
        steps = _lists(layer)[slot.tensor] if slot.hook is None else None
        return cast(Tensor, steps.original if steps else getattr(layer, f"{slot.tensor}_orig"))
    if slot.hook is None:
        return cast(Tensor, getattr(layer, slot.tensor))
    if isinstance(slot.hook, WeightNorm):
        return cast(Tensor, slot.hook.compute_weight(layer))
    return cast(Tensor, slot.hook.apply_mask(layer))


def _make_plain(layer: nn.Module, slot: _Slot) -> None:
    """Let ``layer`` store the tensor that it computes."""
    tensor, hook = slot.tensor, slot.hook
    if parametrize.is_parametrized(layer):
        # torch gives such a layer a class of its own, which all its copies share: the caller's
        # module would lose the tensor, too.
        kind = type(layer)
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(kind.__name__, kind.__bases__, own)
    if slot.kind == SPECTRAL:
        if hook is None:
            steps = _lists(layer)[tensor]
            steps[0] = _Spectral(steps[0].dim, steps[0].eps)
            return
        weight = getattr(layer, f"{tensor}_orig").detach().clone()
        remove_spectral_norm(layer, tensor)
        getattr(layer, tensor).copy_(weight)
        division = _Spectral(hook.dim, hook.eps)
        parametrize.register_parametrization(layer, tensor, division, unsafe=True)
    elif hook is None:
        steps = _lists(layer)[tensor]
        if isinstance(getattr(steps, "original", None), nn.Parameter):
            # Its own, or a tensor tied to it would become the computed one, too.
            steps.original = nn.Parameter(steps.original.detach().clone())
        learnt = any(True for _ in steps.parameters(recurse=False))
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
        if learnt and tensor in layer._buffers:  # computed from several, without gradients
            value = layer._buffers.pop(tensor)
            layer.register_parameter(tensor, nn.Parameter(cast(Tensor, value)))
    elif isinstance(hook, WeightNorm):
        remove_weight_norm(layer, tensor)
    else:
        prune.remove(layer, tensor)


def _store(layer: nn.Module, slot: _Slot, weight: Tensor, own: _Spectral | None) -> None:
    """Let the original's ``layer`` store what computes ``weight``."""
    tensor, hook = slot.tensor, slot.hook
    if own is not None and weight.ndim > 1:
        for place, value in zip(_vectors(layer, slot), (weight, *own.vectors(weight)), strict=True):
            place.copy_(value)
    elif slot.kind == SPECTRAL:  # of a vector, which has no singular vectors
        _computed(layer, slot).copy_(weight)
    elif hook is None:
        try:
            setattr(layer, tensor, weight.to(getattr(layer, tensor)))
            found = getattr(layer, tensor)
            fits = torch.allclose(found, weight.to(found), rtol=1e-4, atol=1e-6)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            fits = False
        if not fits:
            raise BadParameter(
                f"layer {slot.layer or tensor!r}: {slot.kind} cannot hold the merged weight, which "
                "is none that it makes. Store both networks without it first: "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, "
                f"{tensor!r})."
            )
    elif isinstance(hook, WeightNorm):
        getattr(layer, f"{tensor}_g").copy_(torch.norm_except_dim(weight, 2, hook.dim))
        getattr(layer, f"{tensor}_v").copy_(weight)
    else:
        getattr(layer, f"{tensor}_orig").copy_(weight)
        getattr(layer, f"{tensor}_mask").copy_(weight != 0)
