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
    from companion.data import Dataset
    from companion.rebasin import Matching, Spec

METHODS = ("weights", "activations", "ste", "greedy", "units")
STARTS = ("weights", "units")


def permuted(
    method: str,
    net: str,
    module: nn.Module,
    a: Theta,
    b: Theta,
    file: Theta,
    example: torch.Tensor,
    dataset: Dataset | None,
    device: torch.device,
    starts: int,
    steps: int | None,
    key: Key,
) -> Aligned:
    """B with its units in A's order; ``file`` is B as it was read."""
    from companion import models
    from companion.rebasin import derive, stream_of
    from companion.rebasin.proof import check_equal

    begun = time.perf_counter()
    spec = derive(module, example, unread="hold")
    if method == "units":
        spec = spec.hold(stream_of(module, spec))
    derived = time.perf_counter() - begun
    if not spec.groups:
        why = [f"{axis}: {reason}" for axis, reason in list(spec.held.items())[:3]]
        raise BadParameter(
            f"model {net!r}: no unit can be reordered without changing the outputs, so there is "
            f"nothing to match. {'; '.join(why)}"
        )
    found = _match(method, spec, module, a, b, dataset, device, starts, steps, key)
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


def _match(
    method: str,
    spec: Spec,
    module: nn.Module,
    a: Theta,
    b: Theta,
    dataset: Dataset | None,
    device: torch.device,
    starts: int,
    steps: int | None,
    key: Key,
) -> Matching:
    from companion import rebasin
    from companion.experiments.matchers import examples_a_pass
    from companion.rebasin import ste

    a, b = ({k: v.to(device) for k, v in theta.items()} for theta in (a, b))
    if method in STARTS:
        return rebasin.weight_matching(spec, a, b, starts=starts, key=key)
    if method == "greedy":
        return rebasin.greedy(spec, a, b)
    assert dataset is not None
    train = dataset.train
    batch = examples_a_pass(train.x)
    if method == "activations":
        return rebasin.activation_matching(spec, module, a, b, train, batch=batch)
    steps = ste.STEPS if steps is None else steps
    return rebasin.straight_through(spec, module, a, b, train, steps=steps, batch=batch, key=key)
