"""The proof of a spec: random permutations leave the outputs equal.

The network is run in float64, with weights that were shaken so that no zero or equal weights can
hide a mistake, before and after every group was reordered at random. The same comparison, on the
weights themselves, guards every :meth:`companion.rebasin.Matching.apply`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from companion.errors import BadParameter
from companion.rebasin.spec import Permutations, Spec
from companion.seeds import Key
from companion.theta import Theta

PRIME = 1_000_003
DRAWS = 5


class Unproven(BadParameter):
    """Permuted weights change the network's output: what was derived is no symmetry of it."""


def _floats(outputs: Any) -> list[torch.Tensor]:
    """The floating-point tensors of whatever forward returned; of a language model, its logits."""
    outputs = getattr(outputs, "logits", outputs)
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


class Subject:
    """A private copy of a network, in float64 and eval mode, that can be run with other weights.

    Arguments:
        module: the network; not changed.
        args: of its forward; floating-point tensors become float64.
        theta: weights to start from; None: the network's own, shaken.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], theta: Theta | None = None):
        try:
            self.module = copy.deepcopy(module).double().eval().requires_grad_(False)
        except (RuntimeError, TypeError) as e:
            raise BadParameter(f"the network cannot be copied ({e}).") from e
        entries = self.module.state_dict(keep_vars=True)
        self.state = {k: v for k, v in entries.items() if isinstance(v, torch.Tensor)}
        device = next((v.device for v in self.state.values()), torch.device("cpu"))

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            value = value.detach().to(device)
            return value.double() if value.is_floating_point() else value

        self.args = pytree.tree_map(place, args)
        self.tensors = [t for t in pytree.tree_leaves(self.args) if isinstance(t, torch.Tensor)]
        self.raw: list[torch.Tensor] = []
        if theta is None:
            self.shake()
        else:
            self.load(theta)

    @torch.no_grad()
    def shake(self, again: int = 0) -> None:
        """Add noise to every tensor, so that equal or zero weights cannot hide a wrong spec.

        Arguments:
            again: how often it was shaken before; the noise is another one each time.
        """
        floats = [t for t in (*self.state.values(), *self.tensors) if t.is_floating_point()]
        largest = max((t.numel() for t in floats), default=0)
        # At most a prime number of draws, repeated: no two rows of any weight see the same ones.
        length = min(PRIME, largest + len(floats))
        generator = Key("rebasin", "shake", again).generator()
        draws = torch.randn(length, generator=generator, dtype=torch.float64)

        def noise(like: torch.Tensor, start: int) -> torch.Tensor:
            size = like.numel()
            part = draws[start : start + size]
            if len(part) < size:
                part = draws.roll(-start).repeat(-(-size // length))[:size]
            return part.view(like.shape).to(like.device)

        for i, tensor in enumerate(floats):
            if tensor.numel() == 0:
                continue
            sample = tensor.flatten()[:PRIME]
            spread = float(sample.std()) if len(sample) > 1 else 0.0
            if any(tensor is t for t in self.tensors):  # an example of zeros would prove nothing
                tensor.add_(noise(tensor, i))
            elif not isinstance(tensor, nn.Parameter) and bool(
                (tensor > 0).all()
            ):  # such as running variances
                tensor.mul_(torch.exp(0.3 * noise(tensor, i)))
            else:
                tensor.add_(noise(tensor, i), alpha=0.3 * spread or 0.1)

    @torch.no_grad()
    def load(self, theta: Theta) -> None:
        """Take other weights."""
        for name, tensor in self.state.items():
            if name in theta:
                tensor.copy_(theta[name])

    @torch.no_grad()
    def permute(self, spec: Spec, perms: Permutations, names: Iterable[str] | None = None) -> None:
        """Reorder the units of its own weights (only of the named entries), one after the other."""
        done: set[int] = set()  # tied tensors have several names and are one
        for name in spec.axes if names is None else names:
            tensor = self.state[name]
            if id(tensor) not in done:
                done.add(id(tensor))
                tensor.copy_(spec.permute_tensor(tensor, name, perms))

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """Its floating-point outputs.

        Raises:
            BadParameter: forward fails, or has no floating-point output.
        """
        try:
            self.raw = _floats(self.module(*self.args))
        except Exception as e:  # whatever the user's forward does
            shapes = [tuple(t.shape) for t in self.tensors]
            raise BadParameter(
                f"forward of {type(self.module).__name__} fails on the example of shape "
                f"{', '.join(map(str, shapes))}: {type(e).__name__}: {e}"
            ) from e
        if not self.raw:
            raise BadParameter(
                f"forward of {type(self.module).__name__} returns no floating-point tensor."
            )
        return [t.detach().clone() for t in self.raw]


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest difference of outputs as a share of the largest output; NaN if any is NaN."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        scale = float(x.abs().max()) if x.numel() else 1.0
        gap = float((x - y).abs().max()) if x.numel() else 0.0
        worst = max(worst, gap / scale if scale else gap) if gap == gap else float("nan")
    return worst


def prove(net: Subject, spec: Spec, reference: list[torch.Tensor]) -> None:
    """Refuse a spec whose permutations change the outputs.

    Arguments:
        net: as it was watched; reference: its outputs then.

    Raises:
        Unproven: names the layers of the groups that break it.
    """
    if not spec.groups:
        return
    stay = spec.identity()
    perms = spec.random(Key("rebasin", "proof").generator())

    def gap(chosen: Permutations) -> float:
        net.permute(spec, chosen)
        return difference(reference, net.run())

    found = gap(perms)
    for again in range(1, DRAWS + 1):
        if not found <= spec.tolerance:
            break
        # A proof on outputs that do not react would be empty: with part of the tensors put back,
        # they must. Two choices of the part, because one alone can be a symmetry by chance.
        names = list(spec.axes)
        for part in (names[::2], names[: len(names) // 2]):
            net.permute(spec, spec.inverse(perms), part)
            if len(names) == 1 or difference(reference, net.run()) > 10 * spec.tolerance:
                return
            net.permute(spec, perms, part)
        net.shake(again)  # a small network may be dead at one point, and not at another
        reference = net.run()
        found = gap(perms)
    else:
        raise Unproven(
            "the output does not react to its weights on this example: nothing is proven."
        )
    net.permute(spec, spec.inverse(perms))
    if not difference(reference, net.run()) <= spec.tolerance:
        raise Unproven(
            "forward gives other outputs for the same input and weights (or none that are finite), "
            "in eval mode: nothing can be proven of it."
        )
    guilty = []
    for name in spec.groups:
        alone = {**stay, name: perms[name]}
        if not gap(alone) <= spec.tolerance:
            guilty.append(name)
        net.permute(spec, spec.inverse(alone))
    raise Unproven(
        f"permuting the units of {', '.join(guilty[:5]) or 'several layers together'} changes the "
        f"output (by {found:.2g} of its size, allowed {spec.tolerance:g}). Part of forward works "
        "on these units outside of PyTorch's operations, or depends on their order."
    )


def check_equal(module: nn.Module, a: Theta, b: Theta, spec: Spec) -> float:
    """The largest relative difference of the outputs of ``a`` and ``b`` on the spec's example.

    Raises:
        Unproven: it is above the spec's tolerance. BadParameter: the spec has no example.
    """
    if not spec.example:
        raise BadParameter("this spec was not derived from a network: there is no example to run.")
    net = Subject(module, spec.example, a)
    reference = net.run()
    net.load(b)
    found = difference(reference, net.run())
    if not found <= spec.tolerance:
        raise Unproven(
            f"the permuted network is not the same function: outputs differ by {found:.2g} of "
            f"their size on the example, allowed {spec.tolerance:g}."
        )
    return found
