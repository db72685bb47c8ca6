"""Where features come from: the outputs of modules and of functional activations, as they appear.

A *site* is a place of a network that puts out one feature an input: a module, one of several runs
of a module, or a call such as ``F.relu`` inside a module, which has no module of its own (a ResNet
with functional or re-used ReLUs is not empty here). :func:`sites` finds them with one forward pass;
:class:`Taps` hands over their outputs during others, and keeps nothing beyond the current batch.
At the end: what the instruments on features share.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import activation, pooling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from companion.connectivity import Score, has_batchnorm
from companion.connectivity.batches import default_batch, fitting
from companion.connectivity.statistics import of_each_batch
from companion.connectivity.walk import Scored
from companion.core import deadline
from companion.core.errors import BadParameter, one_of, whole
from companion.core.networks import copied, private
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta, check_theta
from companion.data import Split

KINDS = ("conv", "linear", "norm", "activation", "block", "pool", "module", "output")
"""``block``: a module of the user's with children, in a list or sequence of such. ``module``: any
other, containers too. ``output``: what the network returns."""

DEFAULT_KINDS = ("conv", "linear", "norm", "activation", "block")

OUTPUT = "output"
"""The site of the network's own output; among the defaults only if no other site puts it out."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FUNCTIONS: Mapping[Any, str] = {
    f: f.__name__.rstrip("_")
    for f in (
        *(F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_),
        *(F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.gelu, F.silu),
    )
}

Visit = Callable[[str, torch.Tensor], torch.Tensor | None]
"""(site, its output (B, …)) -> None, or what the network goes on with instead, of equal shape."""


class Examples(Protocol):
    """Inputs ``x`` (N, …) and targets ``y`` (N, …): a :class:`companion.data.Split`, or tokens."""

    @property
    def x(self) -> torch.Tensor: ...
    @property
    def y(self) -> torch.Tensor: ...
    def __len__(self) -> int: ...


def examples_of(data: Any) -> Examples:
    """Examples as they are, or what :meth:`companion.data.Split.of` makes of a loader or a pair."""
    return data if hasattr(data, "x") and hasattr(data, "y") else Split.of(data)


@dataclass(frozen=True)
class Site:
    """A place that puts out one feature an input.

    Arguments:
        name: path of the module; ``name#2`` for its second run in a forward pass; ``path.relu#1``
            for the first functional ReLU in the module ``path``; ``output``: of the network.
        kind: one of :data:`KINDS`.
        shape: of the feature of one input.
        same: name of an earlier site that puts out the very same tensor, or ``""``.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    same: str = ""


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor of an output: a tensor, tuple, mapping or dataclass of them."""
    if isinstance(value, torch.Tensor):
        return value
    values = pytree.tree_leaves(list(value.values()) if isinstance(value, Mapping) else value)
    return next((v for v in values if isinstance(v, torch.Tensor)), None)


def _with_first(value: Any, tensor: torch.Tensor) -> Any:
    """``value`` with ``tensor`` in the place of its first tensor."""
    leaves, spec = pytree.tree_flatten(value)
    at = next(i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor))
    leaves[at] = tensor
    return pytree.tree_unflatten(leaves, spec)


def kind_of(module: nn.Module, parent: nn.Module | None) -> str:
    """The kind of a module, one of :data:`KINDS`, by its class."""
    name = type(module).__name__
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, nn.Linear | nn.Bilinear) or name == "Conv1D":  # transformers' Linear
        return "linear"
    if isinstance(module, _NORMS) or name.endswith("Norm"):
        return "norm"
    home = type(module).__module__
    is_torchs = home == activation.__name__ and not isinstance(module, nn.MultiheadAttention)
    if is_torchs or name.endswith(("Activation", "GELU", "ReLU")):
        return "activation"
    if home == pooling.__name__:
        return "pool"
    has_children = next(module.children(), None) is not None
    if has_children and isinstance(parent, _CONTAINERS) and not isinstance(module, _CONTAINERS):
        return "block"
    return "module"


def _label(path: str, nth: int) -> str:
    return (path or OUTPUT) + (f"#{nth}" if nth > 1 else "")


class Taps:
    """A private copy of a network whose sites are looked at while it runs.

        with Taps(net, sites(net, x)) as taps:
            features, output = taps.run(x)

    Arguments:
        module: any network; copied, in eval mode, never changed.
        sites: of :func:`sites`.
        inputs: also keep what went into each site, in :attr:`inputs`.
    """

    def __init__(self, module: nn.Module, sites: Sequence[Site], *, inputs: bool = False):
        self.module = copied(module).eval().requires_grad_(False)
        self.sites = tuple(sites)
        self.inputs: dict[str, torch.Tensor] = {}
        """Site -> the first tensor that went into it, of the last :meth:`run`."""
        self._keep_inputs = inputs
        self._wanted: frozenset[str] | None = frozenset(s.name for s in sites)  # None: all
        self._outputs: dict[str, torch.Tensor] = {}
        self._visit: Visit | None = None
        self._probing: list[tuple[str, str, torch.Tensor, int]] | None = None
        self._written: set[tuple[str, str]] | None = None
        self._counts: Counter[str] = Counter()
        self._stack: list[tuple[str, str]] = []  # (path, kind) of what is running
        self._hooks: list[Any] = []
        self._mode: _Functions | None = None

    def __enter__(self) -> Self:
        named = dict(self.module.named_modules())
        self.kinds = {
            path: kind_of(m, named.get(path.rpartition(".")[0]) if path else None)
            for path, m in named.items()
        }
        own = {path or OUTPUT for path in named}
        stem = {name.rpartition("#")[0] or name for name in self._wanted or ()}
        functional = self._wanted is None or bool(stem - own)
        for path, module in named.items():
            label = path or OUTPUT
            if functional or label in stem:
                hooks = partial(self._before, path), partial(self._after, path)
                keys: Any = {"with_kwargs": True}
                self._hooks.append(module.register_forward_pre_hook(hooks[0], **keys))
                self._hooks.append(module.register_forward_hook(hooks[1], **keys))
        self._mode = _Functions(self) if functional else None
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def load(self, theta: Theta) -> None:
        """Put a (partial) state dict into the private copy."""
        state = self.module.state_dict()
        for name, value in theta.items():
            state[name].copy_(value)

    def use(self, theta: Theta) -> Self:
        """Let entries of the private copy be these tensors: used, not copied, so leave them be."""
        state = self.module.state_dict(keep_vars=True)
        for name, value in theta.items():
            state[name].data = value
        return self

    @exact_evaluation()
    def run(
        self, x: torch.Tensor, visit: Visit | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Run the network on a batch of inputs.

        Arguments:
            visit: called at each site, in order, with what it puts out; nothing is kept then. A
                tensor it returns takes the output's place and the network goes on with that.

        Returns:
            site -> its output, (B, …), as it was before anything wrote into it; and the output of
            the network. Where those are tuples or records, their first tensor.
        """
        if self._hooks == [] and self.sites:
            raise RuntimeError("Taps.run: only inside `with Taps(…) as taps`.")
        if self._written is None and (visit is None or self._keep_inputs):
            self._probe(x[:2])
        self._visit = visit
        try:
            with torch.inference_mode():
                output = self._pass(x)
        finally:
            self._visit = None
        found, self._outputs = self._outputs, {}
        return found, output

    def _pass(self, x: torch.Tensor) -> torch.Tensor:
        self._counts.clear()
        self._stack.clear()
        self._outputs, self.inputs = {}, {}
        with self._mode or nullcontext():
            output = first_tensor(self.module(x))
        if output is None:
            raise BadParameter("the network's output holds no tensor; features need one.")
        return output

    def _probe(self, x: torch.Tensor) -> list[tuple[str, str, torch.Tensor, int]]:
        """See on a few inputs which tensors are written into later: those have to be copied."""
        self._probing = []
        try:
            with torch.inference_mode(False), torch.no_grad():  # there, tensors count writes
                self._pass(x)
            found = self._probing
        finally:
            self._probing = None
        self._written = {(w, n) for w, n, t, v in found if v < 0 or t._version != v}
        return found

    def _before(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append((path, self.kinds[path]))
        self._take("input", _label(path, self._counts[path] + 1), (args, kwargs))

    def _after(self, path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        self._stack.pop()
        self._counts[path] += 1
        return self._see(_label(path, self._counts[path]), out)

    def _take(self, what: str, label: str, value: Any) -> torch.Tensor | None:
        """Keep a tensor of a wanted site, or a copy where it will be written into."""
        wanted = self._wanted is None or label in self._wanted
        tensor = first_tensor(value) if wanted and (what == "output" or self._keep_inputs) else None
        if tensor is None:
            return None
        if self._probing is not None:
            version = -1 if tensor.is_inference() else tensor._version
            self._probing.append((what, label, tensor, version))
        elif self._visit is None or what == "input":
            kept = self.inputs if what == "input" else self._outputs
            copied = self._written is None or (what, label) in self._written
            kept[label] = tensor.clone() if copied else tensor
        return tensor

    def _see(self, label: str, out: Any) -> Any:
        tensor = self._take("output", label, out)
        if tensor is not None and self._probing is None and self._visit is not None:
            other = self._visit(label, tensor)
            if other is not None:  # a copy: the network may write into it
                return _with_first(out, other.clone())
        return None

    def function(self, name: str, call: Callable[[], Any], args: Any) -> Any:
        """A functional activation is called; ``call`` does it."""
        path, kind = self._stack[-1] if self._stack else ("", "module")
        if kind == "activation":  # the module's own call: it is the site
            return call()
        stem = f"{path}.{name}" if path else name
        stem += "()" if stem in self.kinds else ""  # a module has that name
        self._counts[f"{stem}#"] += 1
        label = f"{stem}#{self._counts[f'{stem}#']}"
        self._take("input", label, args)
        out = call()
        other = self._see(label, out)
        if other is None:
            return out
        if any(out is a for a in args):  # in place: others may hold it
            return out.copy_(other)
        return other


class _Functions(TorchFunctionMode):
    """Tells the taps about functional activations."""

    def __init__(self, taps: Taps):
        super().__init__()
        self._taps = taps

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _FUNCTIONS.get(func)
        if name is None:
            return func(*args, **kwargs)
        given = (*args, *kwargs.values())
        return self._taps.function(name, lambda: func(*args, **kwargs), given)


def sites(
    module: nn.Module,
    example: torch.Tensor,
    layers: Sequence[str] | None = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
) -> tuple[Site, ...]:
    """The places of a network whose features can be looked at, in the order they are computed.

    Arguments:
        module: any network; copied.
        example: a batch of inputs (B, …), B of 2 or more, on the
            device to compute on.
        layers: names of sites; or beginnings of names (``stage1``: the sites of ``kinds`` in it,
            unless a site has that very name); or patterns with ``*``, ``?`` and ``[…]``. A name
            without ``#`` stands for all runs. None: all sites of ``kinds``, and the output.
        kinds: of :data:`KINDS`.

    Raises:
        BadParameter: a name that fits no site, or a site that has no feature for each input.
    """
    for kind in kinds:
        one_of("kinds", kind, KINDS)
    if example.ndim < 1 or len(example) < 1:
        raise BadParameter("sites: an example, a batch of inputs (B, …), is needed.")
    taps = Taps(private(module, example), ())
    taps._wanted = None
    with taps:
        seen = [s for s in taps._probe(example) if s[0] == "output"]
    every: dict[str, Site] = {}
    tensors: dict[str, tuple[torch.Tensor, int]] = {}
    for _, name, tensor, version in seen:
        if name == OUTPUT and name in every:
            continue  # a module has that name
        stem = name.rpartition("#")[0] or name
        at = taps.kinds.get(stem, "activation")
        kind = "output" if name == OUTPUT and OUTPUT not in taps.kinds else at
        every[name] = Site(name, kind, tuple(tensor.shape[1:]))
        tensors[name] = (tensor, version)
    batch = len(example)
    fit = [n for n, (t, _) in tensors.items() if t.ndim and len(t) == batch and t.numel()]
    chosen = _chosen(every, fit, layers, kinds, tensors)
    if not chosen:
        raise BadParameter(f"sites: this network has none of the kinds {', '.join(kinds)}.")
    out: list[Site] = []
    for name in chosen:
        same = next((s for s in out if _equal(tensors[s.name], tensors[name])), None)
        out.append(replace(every[name], same="" if same is None else same.same or same.name))
    return tuple(out)


def _equal(one: tuple[torch.Tensor, int], other: tuple[torch.Tensor, int]) -> bool:
    """Whether two sites put out the same tensor, with no write in between."""
    return one[0] is other[0] and one[1] == other[1] >= 0


def _chosen(
    every: Mapping[str, Site],
    fit: Sequence[str],
    layers: Sequence[str] | None,
    kinds: Sequence[str],
    tensors: Mapping[str, tuple[torch.Tensor, int]],
) -> list[str]:
    """Names of the sites that are asked for, in order."""
    usual = [n for n in fit if every[n].kind in kinds]
    wanted: list[str] = []
    if layers is None:
        wanted = list(usual)
        if OUTPUT in fit and usual and not any(_equal(tensors[n], tensors[OUTPUT]) for n in usual):
            wanted.append(OUTPUT)
    for pattern in (layers,) if isinstance(layers, str) else layers or ():
        hits = [n for n in every if pattern in (n, n.rpartition("#")[0])]
        if not hits and any(sign in pattern for sign in "*?["):
            hits = [n for n in fit if fnmatch.fnmatchcase(n, pattern)]
        hits = hits or [n for n in usual if n.startswith(pattern + ".")]
        hits = hits or [n for n in fit if n.startswith(pattern + ".")]
        if not hits:
            close = difflib.get_close_matches(pattern, list(fit), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise BadParameter(
                f"layers: {pattern!r} fits no site of this network.{hint} "
                f"Sites: {', '.join(usual or fit)}."
            )
        for name in set(hits).difference(fit):
            raise BadParameter(
                f"layers: {name} puts out {tuple(tensors[name][0].shape)} for "
                f"{len(tensors[fit[0]][0]) if fit else 'the'} inputs, not one feature for each."
            )
        wanted += hits
    return [n for n in every if n in set(wanted)]


# --- what the instruments share


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


def named(rows: Sequence[N], name: str, what: str = "layer", done: str = "measured") -> N:
    """The row called ``name``; the message of BadParameter lists those that are there."""
    for row in rows:
        if row.name == name:
            return row
    there = ", ".join(row.name for row in rows)
    raise BadParameter(f"{what} {name!r} was not {done}. {done.capitalize()}: {there}.")


@dataclass(frozen=True)
class Layered(Generic[N]):
    """What an instrument found, one row a layer, in the order they compute."""

    layers: tuple[N, ...]

    def layer(self, name: str) -> N:
        """The layer called ``name``.

        Raises:
            BadParameter: it was not measured.
        """
        return named(self.layers, name)


def checked(module: nn.Module, networks: Mapping[str, Theta], split: Examples) -> list[Theta]:
    """The networks (what messages call them -> state dict) under the module's names.

    Raises:
        BadParameter: one does not fit, or there is no data.
    """
    found = [check_theta(module, theta, name) for name, theta in networks.items()]
    if not len(split):
        raise BadParameter("split: there is no data to measure features on.")
    return found


def no_output(name: str, output: torch.Tensor) -> None:
    """A visitor that keeps nothing; of taps on inputs, only these."""


def rates(alphas: Sequence[float]) -> tuple[float, ...]:
    """Weights of B, refused unless they are different numbers in [0, 1]."""
    found = tuple(float(t) for t in alphas)
    if not found or len(set(found)) < len(found) or not all(0 <= t <= 1 for t in found):
        raise BadParameter(
            f"alphas: {list(alphas)} must be one or more different numbers from 0 (A) to 1 (B)."
        )
    return found


def own_statistics(module: nn.Module) -> str:
    """The BatchNorm mode where only A and B run, as they are: ``own``; ``none`` without any."""
    return "own" if has_batchnorm(module) else "none"


def tapped(
    module: nn.Module, theta: Theta, found: Sequence[Site], x: torch.Tensor, *, inputs: bool = False
) -> Taps:
    """Taps on a copy of the network, with the weights ``theta``, on the device of ``x``."""
    taps = Taps(private(module, x), found, inputs=inputs)
    taps.load(theta)
    return taps


def batches(
    module: nn.Module, split: Examples, batch: int | None, found: Sequence[Site]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, at most ``batch`` at a time.

    Default: as for barriers, and no more than lets the features of two networks at the sites
    ``found`` fit into 256 MB, or a quarter of a GPU.
    """
    device = split.x.device
    if (batch := whole("batch", batch, 1, "None")) is None:
        batch = default_batch(module, device, "none")
        if not of_each_batch(module):
            each = 2 * 4 * sum(math.prod(s.shape) for s in found if not s.same)
            batch = fitting(batch, each, device, 1 << 28)
    for x, y in zip(split.x.split(batch), split.y.split(batch), strict=True):
        deadline.stop_if_passed()
        yield x, y


def scored(score: Score, output: torch.Tensor, y: torch.Tensor) -> Scored:
    """Summed loss, errors and predictions of logits (N, …, K) against targets (N, …)."""
    if output.shape[:-1] != y.shape:
        raise BadParameter(
            f"targets {tuple(y.shape)} do not fit outputs {tuple(output.shape)}: one class index "
            "for each row of logits is needed, (N,) or, for tokens, (N, L)."
        )
    return score(output.flatten(0, -2), y.flatten())
