"""``companion rebasin`` for GPT networks whose residual stream is rotated, and what it writes then.

A rotation is no reordering of units. Both networks are first brought into a form in which it keeps
the outputs, with LayerNorm folded into the layers behind it (:mod:`companion.rebasin.folding`), and
what is written is of that form: a network of another name, which :func:`folded_name` gives.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from companion.cli.aligned import Aligned
from companion.cli.console import say
from companion.core.errors import BadParameter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from companion.core.theta import Theta
    from companion.data import Split
    from companion.experiments.methods import Method
    from companion.rebasin.rotation import Rotation


def folded_name(net: str, module: nn.Module, shape: tuple[int, ...], classes: int) -> str:
    """The name under which the folded form of a network is built, e.g. ``gpt:tied=false``.

    Arguments:
        net: the name of the network.
        module: its folded form, for examples of ``shape``.

    Raises:
        BadParameter: there is none.
    """
    from companion import models
    from companion.core.seeds import Key

    if models.is_own(net):
        raise BadParameter(
            f"model {net!r}: its folded form has no name to load it by, as yours is a factory of "
            "your own. In Python companion.rebasin.fold(module, x).module is the folded form."
        )
    name, _, options = models.canonical(net).partition(":")
    items = dict(item.split("=") for item in options.split(",") if item)
    own = module.state_dict()
    items |= {"tied": "false", "headbias": "true" if "lm_head.bias" in own else "false"}
    found = models.canonical(f"{name}:" + ",".join(f"{k}={v}" for k, v in items.items()))
    there = models.build(found, shape, classes, Key("rebasin", "folded")).state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in there.items()}:
        raise BadParameter(f"model {net!r}: {found} is not its folded form, and there is no other.")
    return found


def rotated(
    method: Method,
    net: str,
    module: nn.Module,
    a: Theta,
    b: Theta,
    example: torch.Tensor,
    classes: int,
    train: Split | None,
) -> Aligned:
    """Fold both networks and turn B's residual stream to A's; B's outputs stay as they are.

    Arguments:
        method: one that folds.
        module: the architecture.
        a, b: state dicts, on its device.
        example: tokens (2, L).
        train: windows, for a method that looks at some.

    Raises:
        BadParameter: no GPT network, or one whose folded form has no name. Unproven: a function
            changed.
    """
    from companion.experiments.methods import turn
    from companion.rebasin import fold, function_gap
    from companion.rebasin.folding import TOLERANCE

    begun = time.perf_counter()
    folding = fold(module, example)
    name = folded_name(net, folding.module, tuple(example.shape[1:]), classes)
    here, there = folding.apply(a), folding.apply(b)
    derived = time.perf_counter() - begun
    found = turn(method, folding, here, there, train)
    moved = dict(there) if found is None else found.apply(there)
    gap = function_gap(module, b, folding.module, moved, example)
    _show(found, derived, gap)
    say(
        f"the aligned B is in folded form: it is a network of --model {name}, and goes with A in "
        "the same form (`companion rebasin A A --method folded` writes that)"
    )
    units = folding.units
    return Aligned(
        module=folding.module,
        a=here,
        b=moved,
        file={k: v.contiguous().clone() for k, v in moved.items()},
        model=name,
        matching=None,
        about={
            "spec": {
                "groups": {n: g.size for n, g in folding.spec.groups.items()},
                "log10_count": units.log10_count(),
                "held": dict(folding.spec.held),
                "seconds": derived,
            },
            "matching": found.summary() if found else {"method": method.name},
            "outputs": {"largest_relative_difference": gap, "before rounding, at most": TOLERANCE},
        },
    )


def _show(found: Rotation | None, derived: float, gap: float) -> None:
    say(f"LayerNorm's gains and biases are in the layers behind it (proven in {derived:.1f} s)")
    if found is None:
        say("nothing is matched")
    else:
        inside = ", queries, keys and values turned" if found.heads == "rotated" else ""
        say(
            f"rotation by {found.method}: a stream of {len(found.stream)} is turned (1 - trace/D = "
            f"{found.turned:.2f}), heads and units are permuted{inside}"
        )
        steps = f", {found.iterations} iterations" if found.method == "weights" else ""
        say(
            f"  objective {100 * found.before / found.bound:.1f} % -> {100 * found.share:.1f} % of "
            f"its upper bound{steps}, {found.seconds:.1f} s"
        )
    say(
        "equal outputs: yes, proven in float64; with the rounding of its weights the aligned B "
        f"differs from B by {gap:.1e} of the largest"
    )
