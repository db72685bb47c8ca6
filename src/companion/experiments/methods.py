"""Every way of matching two networks, by name: what it needs, its options, its function.

To add one, write its function below and :func:`register` it. The command line's choices and help,
the experiments of chapters 2, 3 and 5 and the run store read :data:`METHOD_KINDS`. A
:class:`Method` is a kind with its options, and has an identity for the store; :func:`place` carries
it out: it returns both networks in the coordinates in which they are to be compared.

Nothing here imports PyTorch before a method is carried out, so that help is quick.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from companion.core.errors import BadParameter, one_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from companion.core.runs import Store
    from companion.core.seeds import Key
    from companion.core.theta import Theta
    from companion.data import Dataset, Split
    from companion.rebasin import Folding, Matching, Rotation, Spec
    from companion.training import Run


@dataclass(frozen=True)
class Method:
    """How B is brought to A. The defaults here are everyone's.

    Arguments:
        name: one of :data:`METHOD_KINDS`, whose ``options`` say which of the others count.
        starts: descents from as many starts, of which the best counts.
        statistic: ``moment`` or ``correlation``.
        examples: training images or windows to look at, for REPAIR too (None: all).
        steps, batch, lr: optimiser steps, images or windows a step, learning rate.
        label: of the random choices (visiting orders, random permutations, batches).
    """

    name: str = "weights"
    starts: int = 1
    statistic: str = "moment"
    examples: int | None = None
    steps: int = 200
    batch: int = 256
    lr: float = 0.01
    label: int | str = 0

    def __post_init__(self) -> None:
        one_of("method", self.name, METHOD_KINDS)
        one_of("statistic", self.statistic, ("moment", "correlation"))

    @property
    def kind(self) -> MethodKind:
        """Which of :data:`METHOD_KINDS` it is."""
        return METHOD_KINDS[self.name]

    def identity(self) -> dict[str, Any]:
        """What of it determines the permutations of this method, for the store."""
        return {"name": self.name} | {f: getattr(self, f) for f in self.kind.options}


@dataclass(frozen=True, eq=False)
class Problem:
    """Two networks to match, as the function of a method gets them.

    Arguments:
        module: the architecture, in folded form for a method that folds.
        spec: its permutations.
        a, b: state dicts of it, on the device to compute on.
        train: un-augmented training data; None only for methods that need none.
        key: of random choices.
        folding: how the networks were folded, for a method that folds.
    """

    module: nn.Module
    spec: Spec
    a: Theta
    b: Theta
    train: Split | None
    key: Key
    folding: Folding | None = None

    def seen(self, method: Method) -> Split:
        """The training data that the method looks at.

        Raises:
            BadParameter: there are none.
        """
        if self.train is None:
            raise BadParameter(f"{method.name} looks at training data; there are none.")
        return self.train.head(method.examples or len(self.train))


Find = Callable[[Method, Problem], "Matching | Rotation | None"]
"""What carries a method out. None: B stays as it is."""


@dataclass(frozen=True)
class MethodKind:
    """One way of matching.

    Arguments:
        find: its function.
        about: what the help says after its name; "" if the name says it.
        options: fields of :class:`Method` that determine what it finds. They are its identity in
            the store, so a later one must not be added to a method that has measured something.
        data: it looks at training data.
        folds: LayerNorm is folded away first.
        nets: the only networks it is for: ``gpt``, ``mlp``, or "" for any.
        control: it is there to be compared with, and the command line does not offer it.
    """

    name: str
    find: Find
    about: str = ""
    options: tuple[str, ...] = ()
    data: bool = False
    folds: bool = False
    nets: str = ""
    control: bool = False


METHOD_KINDS: dict[str, MethodKind] = {}
"""Name -> method. Those for GPT networks treat the residual stream in different ways."""


def register(name: str, *options: str, **facts: Any) -> Callable[[Find], Find]:
    """Make a function a method. Arguments as :class:`MethodKind`."""
    unknown = set(options) - {f.name for f in fields(Method)}
    if name in METHOD_KINDS or unknown:
        raise BadParameter(f"method {name!r}: it is there already, or no option: {unknown}.")

    def add(find: Find) -> Find:
        METHOD_KINDS[name] = MethodKind(name, find, options=options, **facts)
        return find

    return add


def offered(option: str | None = None) -> list[str]:
    """The methods of the command line; with ``option`` those that have it."""
    return [k.name for k in METHOD_KINDS.values() if not k.control and option in (None, *k.options)]


def described() -> str:
    """The methods of the command line in words, for its help."""

    def listed(nets: str) -> str:
        kinds = [METHOD_KINDS[name] for name in offered() if METHOD_KINDS[name].nets == nets]
        return ", ".join(f"{k.name} ({k.about})" if k.about else k.name for k in kinds)

    return f"{listed('')}. For GPT networks also: {listed('gpt')}."


# --- the methods


@register("naive", control=True)
def _naive(method: Method, problem: Problem) -> None:
    """B as it is."""


@register("weights", "starts", "label", about="needs no data")
def _weights(method: Method, problem: Problem) -> Matching:
    """Algorithm 1."""
    from companion.rebasin import weight_matching

    p = problem
    return weight_matching(p.spec, p.a, p.b, starts=method.starts, key=p.key)


@register("authors", "label", control=True)
def _authors(method: Method, problem: Problem) -> Matching:
    """Algorithm 1 as its authors run it: from the identity, the groups in random order."""
    from companion.rebasin import weight_matching

    p = problem
    theirs: Any = {"begin": "identity", "order": "random", "epsilon": 0.0}
    return weight_matching(p.spec, p.a, p.b, key=p.key, **theirs)


@register("activations", "statistic", "examples", data=True)
def _activations(method: Method, problem: Problem) -> Matching:
    from companion.rebasin import activation_matching

    p, x = problem, problem.seen(method).x
    return activation_matching(p.spec, p.module, p.a, p.b, x, statistic=method.statistic)


@register(
    *("ste", "steps", "batch", "lr", "label"),
    about="straight-through estimator: slow, trains",
    data=True,
)
def _straight_through(method: Method, problem: Problem) -> Matching:
    """Algorithm 2."""
    from companion.rebasin import straight_through

    p, m = problem, method
    assert p.train is not None
    return straight_through(
        p.spec, p.module, p.a, p.b, p.train, steps=m.steps, batch=m.batch, lr=m.lr, key=p.key
    )


@register("greedy", about="one pass from the input on")
def _greedy(method: Method, problem: Problem) -> Matching:
    from companion.rebasin import greedy

    return greedy(problem.spec, problem.a, problem.b)


@register("random", "label", control=True)
def _random(method: Method, problem: Problem) -> Matching:
    from companion.rebasin import Matching, bound, objective

    p = problem
    perms = p.spec.random(p.key.generator())
    value, before = objective(p.spec, p.a, p.b, perms), objective(p.spec, p.a, p.b)
    return Matching(p.spec, perms, "random", value, before, bound(p.a, p.b, p.spec), passes=0)


@register("steepest", "examples", "label", data=True, nets="mlp", control=True)
def _steepest(method: Method, problem: Problem) -> Matching:
    """So that the loss falls most steeply at A (App. A.11)."""
    from companion.rebasin import weight_matching

    p = problem
    down = {n: -g for n, g in gradient(p.module, p.a, p.seen(method)).items()}
    return weight_matching(p.spec, down, p.b, key=p.key)


@register(
    "units", "starts", "label", about="weights, with the residual stream in place", nets="gpt"
)
def _units(method: Method, problem: Problem) -> Matching:
    from companion.rebasin import stream_of, weight_matching

    p = problem
    held = p.spec.hold(stream_of(p.module, p.spec))
    return weight_matching(held, p.a, p.b, starts=method.starts, key=p.key)


@register("folded", about="nothing matched, LayerNorm folded", folds=True, nets="gpt")
def _folded(method: Method, problem: Problem) -> None:
    """Folded B as it is."""


@register("rotated-heads", about="and units inside of heads", folds=True, nets="gpt")
@register("rotated", about="folded, the stream rotated", folds=True, nets="gpt")
def _rotated(method: Method, problem: Problem) -> Rotation:
    """The stream is rotated while heads and units are matched by weights."""
    from companion.rebasin import rotation_matching

    assert problem.folding is not None
    heads = "rotated" if method.name == "rotated-heads" else "permuted"
    return rotation_matching(problem.folding, problem.a, problem.b, heads=heads)


@register("rotated-activations", "examples", data=True, folds=True, nets="gpt")
def _rotated_activations(method: Method, problem: Problem) -> Rotation:
    from companion.rebasin import activation_rotation

    p = problem
    assert p.folding is not None
    return activation_rotation(p.folding, p.a, p.b, p.seen(method).x)


_TRAINED: dict[str, Any] = {"data": True, "folds": True, "nets": "gpt"}


@register("learned-both", "steps", "batch", "lr", "label", about="A learns, too", **_TRAINED)
@register("learned", "steps", "batch", "lr", "label", about="rotated, then trained", **_TRAINED)
def _learned(method: Method, problem: Problem) -> Rotation:
    """From weights, then by the loss on the line; B alone learns, or A, too."""
    from companion.rebasin import learned_rotation

    p, m, both = problem, method, method.name == "learned-both"
    assert p.folding is not None and p.train is not None
    how: Any = {"steps": m.steps, "batch": m.batch, "lr": m.lr, "key": p.key}
    return learned_rotation(p.folding, p.a, p.b, p.train, both=both, **how)


# --- carrying them out


def weights_of(run: Run, step: int, store: Store, device: str) -> dict[str, torch.Tensor]:
    """The network of ``run`` at ``step``, on the device."""
    from companion.training import load_weights

    theta = load_weights(run, step, store=store, device=device)
    return {k: v.to(device) for k, v in theta.items()}


def spec_of(module: nn.Module, data: Dataset) -> Spec:
    """The module's permutation symmetries, proven on one image of ``data``."""
    from companion.rebasin import derive

    return derive(module, data.test.x[:2])


def gradient(module: nn.Module, theta: Theta, part: Split) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss on ``part`` at ``theta``, name -> tensor, parameters only."""
    import torch
    import torch.nn.functional as F
    from torch.func import functional_call

    from companion.connectivity.batches import examples_a_pass
    from companion.core.losses import is_label
    from companion.core.theta import layout, without_aliases

    own = layout(module)
    leaves = {n: theta[n].detach().clone().requires_grad_() for n in own.parameters}
    rest = {n: v for n, v in without_aliases(theta, own.ties).items() if n not in leaves}
    module = module.eval()
    out = {n: torch.zeros_like(v) for n, v in leaves.items()}
    size, labels = examples_a_pass(part.x), int(is_label(part.y).sum())
    for x, y in zip(part.x.split(size), part.y.split(size), strict=True):
        logits = functional_call(module, {**rest, **leaves}, (x,))
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")
        found = torch.autograd.grad(loss / labels, list(leaves.values()))
        for n, g in zip(leaves, found, strict=True):
            out[n] += g
    return out


def match(method: Method, module: nn.Module, a: Theta, b: Theta, data: Dataset) -> Matching:
    """The permutations of ``method`` for network B. ``naive`` and the foldings have none.

    Raises:
        BadParameter: ``naive``, or a method that folds; whatever the method refuses.
    """
    from companion.core.seeds import Key
    from companion.rebasin import Matching

    if method.kind.folds:
        raise BadParameter(f"{method.name} is no permutation of the network as it is: use place().")
    key = Key("aligned", method.label)
    found = method.kind.find(method, Problem(module, spec_of(module, data), a, b, data.train, key))
    if found is None:
        raise BadParameter(f"{method.name}: nothing is matched.")
    assert isinstance(found, Matching)
    return found


@dataclass(frozen=True, eq=False)
class Aligned:
    """Two networks in the coordinates in which a method compares them, each what it was before.

    Arguments:
        method: that brought B to A.
        module: the architecture there: the original one, or the folded one.
        a, b: state dicts of it, B matched.
        before: B as it is there with nothing matched.
        symmetries: what may move: a spec, or how LayerNorm was folded away.
        found: the permutations, or the rotation; None where nothing moves.
        gap: largest difference of B's outputs before and after, as a share of the largest.
        derived: seconds until the symmetries were known and proven.
    """

    method: Method
    module: nn.Module
    a: Theta
    b: Theta
    before: Theta
    symmetries: Spec | Folding
    found: Matching | Rotation | None
    gap: float
    derived: float

    def about(self) -> dict[str, Any]:
        """``spec``, ``matching`` and ``outputs``, JSON-able."""
        from companion.rebasin import Folding
        from companion.rebasin.folding import TOLERANCE

        known = self.symmetries
        folded = isinstance(known, Folding)
        spec, units = (known.spec, known.units) if isinstance(known, Folding) else (known, known)
        bound = {"before rounding, at most": TOLERANCE} if folded else {"tolerance": spec.tolerance}
        return {
            "spec": {
                "groups": {n: g.size for n, g in spec.groups.items()},
                "log10_count": units.log10_count(),
                "held": dict(spec.held),
                "seconds": self.derived,
            },
            "matching": self.found.summary() if self.found else {"method": self.method.name},
            "outputs": {"largest_relative_difference": self.gap, **bound},
        }


def aligned(
    method: Method,
    module: nn.Module,
    a: Theta,
    b: Theta,
    example: Any,
    train: Split | None,
    key: Key,
    known: Spec | Folding | None = None,
    spent: bool = False,
) -> Aligned:
    """Bring any B to any A; both compute what they did before, which is checked.

    Arguments:
        module: the architecture.
        a, b: state dicts of it.
        example: two inputs that its symmetries are proven on, on the device to compute on; as
            :func:`companion.rebasin.derive` takes them.
        train: data to look at; None for a method that needs none.
        key: of random choices.
        known: the symmetries, of an earlier call for a method that folds as this one does or not.
        spent: nobody needs the module's own weights; their memory goes once symmetries are proven.

    Raises:
        BadParameter: whatever the method refuses; there is nothing to match. Unproven: a network's
            function changed.
    """
    from companion.core.fitting import each
    from companion.core.networks import leaves, without_weights
    from companion.rebasin import Folding, Matching, Rotation, Spec, derive, fold, function_gap
    from companion.rebasin.proof import check_equal

    begun, at = time.perf_counter(), leaves(example)[0].device
    if method.kind.folds:
        module = module.to(at)
        a, b = ({k: v.to(at) for k, v in theta.items()} for theta in (a, b))
        folding = known if isinstance(known, Folding) else fold(module, example)
        here, there = folding.apply(a), folding.apply(b)
        derived = time.perf_counter() - begun
        problem = Problem(folding.module, folding.spec, here, there, train, key, folding)
        turned = method.kind.find(method, problem)
        assert turned is None or isinstance(turned, Rotation)
        moved = dict(there) if turned is None else turned.apply(there)
        gap = function_gap(module, b, folding.module, moved, folding.spec.example)
        return Aligned(method, folding.module, here, moved, there, folding, turned, gap, derived)
    spec = known if isinstance(known, Spec) else derive(module, example, unread="hold")
    derived = time.perf_counter() - begun
    if not spec.groups:
        raise BadParameter(f"there is nothing to match: {spec.why_none()}.")
    if spent:
        without_weights(module)
    one, two = (each(theta, lambda _, v: v.to(at)) for theta in (a, b))
    found = method.kind.find(method, Problem(module, spec, one, two, train, key))
    assert isinstance(found, Matching)
    put = found.apply(module, b, check_outputs=False)
    gap = check_equal(module, b, put, found.spec)
    return Aligned(method, module, a, put, b, found.spec, found, gap, derived)


@dataclass(frozen=True, eq=False)
class Placed:
    """Two networks in the coordinates in which a method compares them.

    Arguments:
        module: the architecture there: the original one, or the folded one.
        a, b: state dicts of it, B matched.
        before: B as it is there with nothing matched.
        summary: what the method has to say, JSON-able; empty for ``naive``.
    """

    module: nn.Module
    a: Theta
    b: Theta
    before: Theta
    summary: dict[str, Any]


def place(method: Method, module: nn.Module, a: Theta, b: Theta, data: Dataset) -> Placed:
    """Carry out any method: A and B in one place, each computing what it did before.

    Arguments:
        module: the architecture.
        a, b: state dicts of it.
        data: whose training part methods that
            look at activations or losses see.

    Raises:
        BadParameter: whatever the method refuses. Unproven: a network's function changed.
    """
    from companion.core.seeds import Key

    if method.name == "naive":
        return Placed(module, a, dict(b), b, {})
    key = Key("aligned", method.label)
    here = aligned(method, module, a, b, data.test.x[:2], data.train, key)
    summary = {"function gap": here.gap} if method.kind.folds else {}
    summary |= here.found.summary() if here.found else {}
    return Placed(here.module, here.a, here.b, here.before, summary)
