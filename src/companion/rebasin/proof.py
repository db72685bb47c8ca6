"""The proof of a spec: random permutations leave the outputs equal.

The network is run in float64, with weights that were shaken so that no zero or equal weights can
hide a mistake, before and after every group was reordered at random. The same comparison, on the
weights themselves, guards every :meth:`companion.rebasin.Matching.apply`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from companion.core.errors import BadParameter
from companion.core.networks import copied, leaves
from companion.core.seeds import Key
from companion.core.theta import Theta
from companion.rebasin.spec import Permutations, Spec

PRIME = 1_000_003
DRAWS = 5
STRICT = 1e-6
"""Tolerances below this are for networks that compute in float64 throughout."""


class Unproven(BadParameter):
    """Permuted weights change the network's output: what was derived is no symmetry of it."""


class Chaotic(Unproven):
    """Rounding alone changes the outputs by more than a proof allows: nothing can be said."""


class Subject:
    """A private copy of a network, in float64 and eval mode, that can be run with other weights.

    Arguments:
        example: what its forward takes; floating-point tensors become float64.
        theta: weights to start from; None: the network's own.
        shake: add noise: to the ``weights``, to the ``inputs``.
        precision: of weights and inputs; less than float64 only for a forward that needs it.
        strength: of the noise in the weights, as a share of the usual one.
    """

    def __init__(
        self,
        module: nn.Module,
        example: Any,
        theta: Theta | None = None,
        *,
        shake: tuple[str, ...] = (),
        precision: torch.dtype = torch.float64,
        strength: float = 1.0,
    ):
        self.module = copied(module, precision).eval().requires_grad_(False)
        entries = self.module.state_dict(keep_vars=True)
        self.state = {k: v for k, v in entries.items() if isinstance(v, torch.Tensor)}
        device = next((v.device for v in self.state.values()), torch.device("cpu"))

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            value = value.detach().to(device, copy=True)
            return value.to(precision) if value.is_floating_point() else value

        if isinstance(example, Mapping):
            given: Any = ((), dict(example))
        else:
            given = (example if isinstance(example, tuple) else (example,), {})
        self.args, self.kwargs = pytree.tree_map(place, given)
        self.tensors = leaves((self.args, self.kwargs))
        self.raw: list[torch.Tensor] = []
        self.shaken, self.strength = shake, strength
        if theta is not None:
            self.load(theta)
        self.shake()

    @torch.no_grad()
    def shake(self, again: int = 0) -> None:
        """Add noise, another one each time: equal or zero weights could hide a wrong spec."""
        weights = list(self.state.values()) if "weights" in self.shaken else []
        inputs = self.tensors if "inputs" in self.shaken else []
        floats = [t for t in (*weights, *inputs) if t.is_floating_point() and t.numel()]
        largest = max((t.numel() for t in floats), default=0)
        # At most a prime number of draws, repeated: no two rows of any weight see the same ones.
        length = min(PRIME, largest + len(floats))
        generator = Key("rebasin", "shake", again).generator()
        draws = torch.randn(length, generator=generator, dtype=torch.float64)

        around = torch.cat([draws, draws])

        def pieces(tensor: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            """Parts of a tensor, to be written, and their noise; no copy as large as it is."""
            flat = tensor.reshape(-1)
            for part in flat.split(length):
                yield part, around[start % length :][: len(part)].to(part)
            if flat.data_ptr() != tensor.data_ptr():  # its numbers do not lie in a row
                tensor.copy_(flat.view(tensor.shape))

        for i, tensor in enumerate(floats):
            sample = tensor.flatten()[:PRIME]
            spread = float(sample.std()) if len(sample) > 1 else 0.0
            buffer = i < len(floats) - len(inputs) and not isinstance(tensor, nn.Parameter)
            if not math.isfinite(spread) or (buffer and sample.unique().tolist() == [0, 1]):
                continue  # minus infinity, or zeros and ones: what they say is not their size
            positive = buffer and bool((tensor > 0).all())  # such as running variances
            given = any(tensor is t for t in inputs)
            alpha = (spread or 1.0) if given else self.strength * (0.3 * spread or 0.1)
            for part, noise in pieces(tensor, i):
                if positive:
                    part.mul_(torch.exp(0.3 * self.strength * noise))
                else:
                    part.add_(noise, alpha=alpha)

    @torch.no_grad()
    def rounding(self, reference: list[torch.Tensor], eps: float) -> float:
        """How much the outputs change if every weight does by ``eps`` of its size."""
        generator = Key("rebasin", "rounding").generator()
        kept = {n: t.clone() for n, t in self.state.items() if t.is_floating_point()}
        for name, old in kept.items():
            signs = torch.randint(0, 2, old.shape, generator=generator).to(old) * 2 - 1
            self.state[name].copy_(old * (1 + eps * signs))
        found = output_gap(reference, self.run())
        self.load(kept)
        return found

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
                spec.permute_(tensor, name, perms)

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """Its floating-point outputs."""
        try:
            outputs = self.module(*self.args, **self.kwargs)
        except Exception as e:  # whatever the user's forward does
            shapes = [tuple(t.shape) for t in self.tensors]
            raise BadParameter(
                f"forward of {type(self.module).__name__} fails on the example of shape "
                f"{', '.join(map(str, shapes))}: {type(e).__name__}: {e}"
            ) from e
        if isinstance(outputs, Mapping):  # not a language model's memory for its own next step
            outputs = {k: v for k, v in outputs.items() if k != "past_key_values"}
        self.raw = [t for t in leaves(outputs) if t.is_floating_point() or t.is_complex()]
        if not self.raw:
            raise BadParameter(
                f"forward of {type(self.module).__name__} returns no floating-point tensor."
            )
        return [t.detach().clone() for t in self.raw]


def output_gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest difference of outputs as a share of the largest output; NaN if any is NaN."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        scale = float(x.abs().max()) if x.numel() else 1.0
        gap = float((x - y).abs().max()) if x.numel() else 0.0
        worst = max(worst, gap / scale if scale else gap) if gap == gap else float("nan")
    return worst


def prove_spec(net: Subject, spec: Spec, reference: list[torch.Tensor]) -> None:
    """Refuse a spec whose permutations change the outputs ``reference`` of ``net``.

    Raises:
        Unproven: names the layers of the groups that break it.
    """
    if not spec.groups:
        return
    stay = spec.identity()
    perms = spec.random(Key("rebasin", "proof").generator())

    def gap(chosen: Permutations) -> float:
        net.permute(spec, chosen)
        return output_gap(reference, net.run())

    found = gap(perms)
    names = list(spec.axes)
    for again in range(1, DRAWS + 1):
        if not found <= spec.tolerance:
            break
        # A proof on outputs that do not react would be empty: with part of the tensors put back,
        # they must. Two choices of the part, because one alone can be a symmetry by chance.
        for part in (names[::2], names[: len(names) // 2]):
            net.permute(spec, spec.inverse(perms), part)
            if len(names) == 1 or output_gap(reference, net.run()) > 10 * spec.tolerance:
                return
            net.permute(spec, perms, part)
        if again == DRAWS or not net.shaken:
            raise Unproven(
                "the output does not react to its weights on this example: nothing is proven."
            )
        net.shake(again)  # a small network may be dead at one point, and not at another
        reference = net.run()
        found = gap(perms)
    net.permute(spec, spec.inverse(perms))
    if not output_gap(reference, net.run()) <= spec.tolerance:
        raise Unproven(
            "forward gives other outputs for the same input and weights (or none that are finite), "
            "in eval mode: nothing can be proven of it."
        )
    kind = torch.float64 if spec.tolerance < STRICT else torch.float32
    if not net.rounding(reference, 4 * torch.finfo(kind).eps) * 10 < found:
        raise Chaotic(
            "rounding alone changes the outputs as much as permuted units do: nothing is proven."
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
    if spec.example is None:
        raise BadParameter("this spec was not derived from a network: there is no example to run.")
    net = Subject(module, spec.example, a)
    try:
        reference = net.run()
    except BadParameter:
        net = Subject(module, spec.example, a, precision=torch.float32)
        reference = net.run()
    net.load(b)
    found = output_gap(reference, net.run())
    if not found <= spec.tolerance:
        raise Unproven(
            f"the permuted network is not the same function: outputs differ by {found:.2g} of "
            f"their size on the example, allowed {spec.tolerance:g}."
        )
    return found
