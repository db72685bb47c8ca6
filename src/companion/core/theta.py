"""State dicts as points of weight space: which entries count, their layers, sums and distances.

A ``Theta`` is a state dict (name -> tensor). A :class:`Layout`, read off an ``nn.Module``, says
which entries are trainable parameters, floating-point buffers (BatchNorm's running statistics) or
integer buffers, which names are tied, and which layer each belongs to: a layer is all entries that
share a module name, and tied tensors are one layer (Adilova et al. 2024; our chapters 1 and 4).
Complex entries are floating-point numbers in pairs: they move as real ones do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from companion.core.errors import BadParameter, WrongShape
from companion.core.fitting import fitted
from companion.core.networks import plain

Theta = Mapping[str, torch.Tensor]

COUNTER = "num_batches_tracked"
"""Batches that a norm has seen in training; no output depends on it."""

PARAMETRIZATIONS = "parametrizations"
"""Where torch keeps what a layer's weight is computed from."""


def is_continuous(tensor: torch.Tensor) -> bool:
    """Whether the numbers can be interpolated: real or complex, not whole and not quantised."""
    return tensor.is_floating_point() or tensor.is_complex()


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, or complex128: what sums over weights are computed in."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


logger = logging.getLogger("companion")


@dataclass(frozen=True)
class Layout:
    """What the entries of a module's state dict are. Names are in the module's own order."""

    parameters: tuple[str, ...]
    """Trainable tensors, each tied tensor once, under its first name."""
    buffers: tuple[str, ...]
    """Persistent floating-point buffers, such as running means and variances."""
    integers: tuple[str, ...]
    """Persistent entries that never move and are taken from the first network: whole, boolean and
    quantised numbers, and buffers that hold minus infinity, such as a causal mask, which are
    constants. A path refuses those that differ and matter (:func:`check_integers`)."""
    ties: Mapping[str, str]
    """Alias -> the first name of the tensor it shares."""
    groups: Mapping[str, tuple[str, ...]]
    """Layer -> its entries of ``parameters`` and ``buffers``."""

    @property
    def floating(self) -> tuple[str, ...]:
        """Everything a path moves: parameters, then floating-point buffers."""
        return self.parameters + self.buffers

    def select(self, groups: Sequence[str] | None) -> tuple[str, ...]:
        """The entries of the named layers (a name or a prefix ``"stage1"`` of names); None = all.

        Raises:
            BadParameter: a name that fits no layer.
        """
        if groups is None:
            return self.floating
        chosen: set[str] = set()
        for wanted in groups:
            hits = [g for g in self.groups if g == wanted or g.startswith(wanted + ".")]
            if not hits:
                raise BadParameter(
                    f"layer group {wanted!r} fits no layer. Layers: {', '.join(self.groups)}."
                )
            chosen.update(name for g in hits for name in self.groups[g])
        return tuple(name for name in self.floating if name in chosen)


def layout(module: nn.Module) -> Layout:
    """Read the :class:`Layout` of ``module``, without its wrappers. Ties are found by identity."""
    state = plain(module).state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    parameters, buffers, integers = [], [], []
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue  # get_extra_state: no point of weight space
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        if isinstance(tensor, nn.Parameter) and is_continuous(tensor):
            parameters.append(name)
        elif is_continuous(tensor) and not _has_minus_infinity(tensor):
            buffers.append(name)
        else:
            integers.append(name)
    groups: dict[str, list[str]] = {}
    for name in parameters + buffers:
        owner, _, _ = ("." + name.rpartition(".")[0]).partition(f".{PARAMETRIZATIONS}.")
        groups.setdefault(owner.removeprefix(".") or name, []).append(name)
    in_order = sorted(groups, key=lambda g: min(list(state).index(n) for n in groups[g]))
    return Layout(
        tuple(parameters),
        tuple(buffers),
        tuple(integers),
        ties,
        {g: tuple(groups[g]) for g in in_order},
    )


def _has_minus_infinity(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or tensor.is_complex()) and bool(torch.isneginf(tensor).any())


def without_aliases(theta: Theta, ties: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A state dict with every tied tensor once, under its first name.

    That is what ``torch.func.functional_call`` takes: two names of one tensor are too many for it.

    Arguments:
        theta: whole or in part; of a tied tensor it may hold either name or both.
        ties: :attr:`Layout.ties` of the architecture.
    """
    out = {n: v for n, v in theta.items() if n not in ties}
    for alias, first in ties.items():
        if alias in theta:
            out.setdefault(first, theta[alias])
    return out


def with_aliases(theta: Theta, ties: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A state dict in which every further name of a tied tensor holds what its first name holds.

    For networks made of several: an alias that still held another network's tensor would be loaded
    over the right one. Arguments as of :func:`without_aliases`.
    """
    return {**theta, **{alias: theta[first] for alias, first in ties.items() if first in theta}}


@torch.no_grad()
def put(module: nn.Module, theta: Theta, ties: Mapping[str, str]) -> None:
    """Copy a (partial) state dict into the module, entry by entry.

    Unlike ``load_state_dict`` it asks for no version that a plain mapping does not have. Of a tied
    tensor with both its names, the first name's value counts.
    """
    own = module.state_dict(keep_vars=True)
    for name, value in without_aliases(theta, ties).items():
        own[name].copy_(value)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """A detached copy of the module's state dict; later training does not touch it."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def check_ties(theta: Theta, ties: Mapping[str, str], name: str) -> None:
    """Refuse a state dict whose two names of one tensor hold different values.

    Loading it would keep one of the two, and not the same one everywhere.

    Arguments:
        ties: :attr:`Layout.ties` of the architecture.
        name: what the message calls the network.

    Raises:
        BadParameter: two entries of a tied tensor differ; the message names both.
    """
    for alias, first in ties.items():
        if alias in theta and first in theta and not torch.equal(theta[alias], theta[first]):
            raise BadParameter(
                f"network {name}: {alias} and {first} differ, but the model ties them: one tensor "
                "for both. Take a model that does not (of gpt: tied=false)."
            )


def check_is_theta(theta: object, name: str) -> None:
    """Refuse what is no state dict: a module, a checkpoint with a state dict inside.

    Arguments:
        name: what the message calls the network.

    Raises:
        BadParameter: it says what was given, and what to give.
    """
    if isinstance(theta, nn.Module):
        raise BadParameter(
            f"network {name}: a state dict is needed, but this is the module itself "
            f"({type(theta).__name__}). Give its state_dict(), or companion.core.theta.snapshot() "
            "of it, which later training does not change."
        )
    if not isinstance(theta, Mapping):
        raise BadParameter(
            f"network {name}: a state dict (name -> tensor) is needed, got a "
            f"{type(theta).__name__}."
        )
    for key in theta if isinstance(theta, dict) else ():
        if isinstance(value := theta[key], Mapping | nn.Module):
            end = "" if isinstance(value, Mapping) else ".state_dict()"
            raise BadParameter(
                f"network {name}: a state dict (name -> tensor) is needed, but {key!r} holds a "
                f"{type(value).__name__}. If that is the network, give it: [{key!r}]{end}."
            )


def check_theta(module: nn.Module, theta: Theta, name: str) -> Theta:
    """A state dict under ``module``'s own names; refused if it is no finite point there.

    Names that differ in ways that have one meaning are undone (:mod:`companion.core.fitting`).

    Returns:
        the state dict to go on with: ``theta`` itself, if it has the module's names.

    Raises:
        BadParameter: no state dict at all; missing or extra entries, a shape that differs, NaN or
            infinite values (but in constants), two values of a tied tensor; the message names the
            entry. ``name`` is what the message calls the network.
    """
    if not isinstance(module, nn.Module):
        raise BadParameter(
            "module: the architecture, an nn.Module, is needed, got a "
            f"{type(module).__name__}. The order is: module, network A, network B."
        )
    check_is_theta(theta, name)
    module = plain(module)
    spec = layout(module)
    found = fitted(module, theta, spec.ties)
    for text in found.notes:
        logger.info("network %s: %s", name, text)
    theta = found.theta
    own = {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    missing = [k for k in own if k not in theta and k not in spec.ties]
    extra = [k for k in theta if k not in own]
    if missing or extra:
        raise BadParameter(
            f"network {name} does not fit the model: missing {missing[:5] or 'none'}, "
            f"not in the model {extra[:5] or 'none'}. Both networks must be the same architecture."
        )
    constants = set(spec.integers)
    for k in own:  # in the module's order: the first complaint is the first layer's
        if k not in theta:
            continue
        v = theta[k]
        if v.shape != own[k].shape:
            raise WrongShape(
                f"network {name}: {k} has shape {tuple(v.shape)}, the model {tuple(own[k].shape)}."
            )
        if v.layout is not torch.strided or v.is_meta:
            kind = "is on the meta device" if v.is_meta else f"is sparse ({v.layout})"
            raise BadParameter(f"network {name}: {k} {kind}; a tensor with all values is needed.")
        if not is_continuous(v):
            continue
        if not _is_finite(v, infinity=k in constants):
            raise BadParameter(f"network {name}: {k} holds NaN or infinite values; it diverged.")
    check_ties(theta, spec.ties, name)
    return theta


def _is_finite(x: torch.Tensor, infinity: bool) -> bool:
    """Whether no entry is NaN, nor, but with ``infinity``, infinite. No copy of a large tensor."""
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.float() if x.element_size() == 1 else x  # which has no largest and smallest
    if not x.numel():
        return True
    ends = torch.stack(torch.aminmax(x.detach()))  # of NaN both are NaN
    return bool((~torch.isnan(ends) if infinity else torch.isfinite(ends)).all())


def check_integers(
    thetas: Sequence[Theta], spec: Layout, found: Callable[[Theta], torch.Tensor] | None = None
) -> None:
    """Refuse networks between which there is no line, as whole numbers differ that they compute by.

    Arguments:
        thetas: state dicts; the first is where :attr:`Layout.integers` stay.
        spec: of their architecture.
        found: what a network computes of a few examples. Whole numbers that change nothing there
            may differ. None: none may, but counters of batches.

    Raises:
        BadParameter: the message names the entries.
    """
    first, *others = thetas
    for number, theta in enumerate(others, start=1):
        apart = [
            n
            for n in spec.integers
            if not n.endswith(COUNTER) and not torch.equal(first[n], theta[n].to(first[n].device))
        ]
        if not apart:
            continue
        if found is not None:
            own, moved = found(theta), found({**theta, **{n: first[n] for n in apart}})
            if torch.allclose(own, moved, rtol=1e-5, atol=1e-6, equal_nan=True):
                continue
        raise BadParameter(
            f"networks A and {chr(65 + number)}: {', '.join(apart[:3])} "
            f"({str(first[apart[0]].dtype).removeprefix('torch.')}) differ. Whole and quantised "
            "numbers are not interpolated, and what the networks compute depends on these: there "
            "is no line between the two. Dequantise weights first; give both networks the same "
            "indices and masks."
        )


_PART = 1 << 16
"""Entries that are mixed at a time on a CPU, whose float64 then stays in the cache."""


def affine(thetas: Sequence[Theta], weights: Sequence[float], names: Sequence[str]) -> Theta:
    """``sum_i weights[i] * thetas[i]`` over ``names``, in float64, rounded to the entries' dtype.

    Float64 with separate products makes two promises that float32 does not keep: swapping two
    networks and their weights together changes no bit, and a combination of equal float32 networks
    with weights that sum to one is that network, so a null control is exactly 0 (gates G1 and G2).
    Networks that are float64 themselves have no bits to spare: there, entries that are equal in all
    networks are taken as they are. Of complex entries the same holds, part by part.
    """
    unit = abs(sum(weights) - 1) < 1e-12

    def mixed(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        total = wide(first) * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            total += wide(other) * weight
        if unit and first.dtype in (torch.float64, torch.complex128):
            equal = torch.stack([other == first for other in others]).all(0)
            total = torch.where(equal, first, total)
        return total.to(first.dtype)

    out = {}
    for name in names:
        ends = [t[name] for t in thetas]
        if ends[0].device.type == "cpu" and ends[0].numel() > _PART:
            parts = zip(*(end.flatten().split(_PART) for end in ends), strict=True)
            out[name] = torch.cat([mixed(*part) for part in parts]).view(ends[0].shape)
        else:
            out[name] = mixed(*ends)
    return out


def flatten(theta: Theta, names: Sequence[str]) -> torch.Tensor:
    """The named entries as one float64 vector, shape (sum of sizes,); complex ones are two each."""
    found = (wide(theta[n].detach()) for n in names)
    return torch.cat([(torch.view_as_real(x) if x.is_complex() else x).flatten() for x in found])


def distance(a: Theta, b: Theta, names: Sequence[str]) -> float:
    """Euclidean distance over the named entries (App. B and G of Frankle et al. use parameters)."""
    return math.sqrt(sum(float(((wide(a[n]) - wide(b[n])).abs() ** 2).sum()) for n in names))


def cosine_distance(a: Theta, b: Theta, names: Sequence[str]) -> float:
    """``1 - <a, b> / (|a| |b|)`` over the named entries."""
    x, y = flatten(a, names), flatten(b, names)
    return float(1 - (x @ y) / (x.norm() * y.norm()))


def shares_storage(a: Theta, b: Theta) -> bool:
    """True if any tensor of ``a`` lives in the same memory as one of ``b``."""
    held = dict(a)  # as long as they are looked at: tensors that are read anew may take turns
    where = {v.untyped_storage().data_ptr() for v in held.values() if v.numel()}
    return any(v.untyped_storage().data_ptr() in where for v in b.values() if v.numel())
