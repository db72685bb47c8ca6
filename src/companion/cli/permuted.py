"""Methods of ``companion rebasin`` that permute: B's units in A's order, in B's own file's form."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from companion.cli.aligned import Aligned, in_files_form, show
from companion.core.errors import BadParameter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from companion.core.seeds import Key
    from companion.core.theta import Theta
    from companion.data import Split
    from companion.experiments.methods import Method


def permuted(
    method: Method,
    net: str,
    module: nn.Module,
    a: Theta,
    b: Theta,
    file: Theta,
    example: torch.Tensor,
    train: Split | None,
    device: torch.device,
    key: Key,
) -> Aligned:
    """B with its units in A's order; ``file`` is B as it was read."""
    from companion import models
    from companion.experiments.methods import Problem
    from companion.rebasin import Matching, derive
    from companion.rebasin.proof import check_equal

    begun = time.perf_counter()
    spec = derive(module, example, unread="hold")
    derived = time.perf_counter() - begun
    if not spec.groups:
        why = [f"{axis}: {reason}" for axis, reason in list(spec.held.items())[:3]]
        raise BadParameter(
            f"model {net!r}: no unit can be reordered without changing the outputs, so there is "
            f"nothing to match. {'; '.join(why)}"
        )
    one, two = ({k: v.to(device) for k, v in theta.items()} for theta in (a, b))
    found = method.kind.find(method, Problem(module, spec, one, two, train, key))
    assert isinstance(found, Matching)
    spec = found.spec
    aligned = found.apply(module, b, check_outputs=False)
    gap = check_equal(module, b, aligned, spec)
    show(spec, found, derived, gap)
    groups = {n: g.size for n, g in spec.groups.items()}
    return Aligned(
        module=module,
        a=a,
        b=aligned,
        file=in_files_form(module, file, found),
        model=models.canonical(net),
        matching=found,
        about={
            "spec": {
                "groups": groups,
                "log10_count": spec.log10_count(),
                "held": dict(spec.held),
                "seconds": derived,
            },
            "matching": found.summary(),
            "outputs": {"largest_relative_difference": gap, "tolerance": spec.tolerance},
        },
    )
