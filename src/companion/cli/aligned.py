"""What ``companion rebasin`` says and writes: the report, the barriers, the aligned file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.cli.barrier import heights
from companion.cli.console import UNITS, number, say, table
from companion.core.errors import BadParameter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from companion.connectivity import Barrier
    from companion.core.theta import Theta
    from companion.data import Dataset
    from companion.experiments.pairs import Evaluation
    from companion.rebasin import Matching, Spec

RESET = 1.0
"""Points of error barrier by which re-estimated BatchNorm must be better to be recommended."""


@dataclass(frozen=True)
class Aligned:
    """A and the aligned B, in the coordinates in which they are compared.

    Arguments:
        module: the architecture there.
        a, b: state dicts of it, B aligned.
        file: the aligned B as it is written.
        model: the name of its architecture.
        matching: the permutations; None where B's stream is rotated.
        about: ``spec``, ``matching`` and ``outputs`` for the JSON.
    """

    module: nn.Module
    a: Theta
    b: Theta
    file: dict[str, torch.Tensor]
    model: str
    matching: Matching | None
    about: Mapping[str, Any]


def in_files_form(module: nn.Module, file: Theta, found: Matching) -> dict[str, torch.Tensor]:
    """What the file holds, with its units reordered: the file's own names and number types.

    Arguments:
        file: as read, so its names may have a wrapper's prefix and its numbers another type than
            the model's. Values are moved, not computed with.
    """
    from companion.cli.checkpoints import inside

    own = module.state_dict().keys()
    out = {}
    for name, tensor in file.items():
        known = inside(name, own)
        moved = tensor if known is None else found.spec.permute_tensor(tensor, known, found.perms)
        out[name] = moved.contiguous().clone()  # tied tensors: the format allows no shared memory
    return out


def show(spec: Spec, found: Matching, derived: float, gap: float) -> None:
    """The permutations there are, what matching found, and that the outputs are equal."""
    say(
        f"permutations: {len(spec.groups)}, 10^{spec.log10_count():.0f} ways to order "
        f"{sum(p.numel() for p in found.perms.values()):,} units (derived and proven in "
        f"{derived:.1f} s)"
    )
    reasons: dict[str, list[str]] = {}
    for axis, why in spec.held.items():
        reasons.setdefault(why, []).append(axis)
    for why, held in reasons.items():
        more = f" and {len(held) - 4} more" if len(held) > 4 else ""
        say(f"  held in place: {', '.join(held[:4])}{more}: {why}")
    for text in spec.notes:
        say(f"  note: {text}")
    if blind := (found.details or {}).get("no site"):
        say(f"  left in place, since their activations cannot be told apart: {', '.join(blind)}")
    what = "step" if found.method == "ste" else "pass"
    if found.passes != 1:
        what += "s" if found.method == "ste" else "es"
    how = f", best of {found.starts} starts" if found.starts > 1 else ""
    say(
        f"matching by {found.method}: objective {100 * found.share_before:.1f} % -> "
        f"{100 * found.share:.1f} % of its upper bound, {100 * found.moved:.1f} % of the units "
        f"move, {found.passes} {what}{how}, {found.seconds:.1f} s"
    )
    if not found.moved:
        say("  already aligned: no unit moves. The networks share a start, or were aligned before.")
    say(f"equal outputs: yes, B and the aligned B differ by {gap:.1e} of the largest (float64)")


def barriers(
    module: nn.Module,
    a: Theta,
    b: Theta,
    here: Aligned,
    dataset: Dataset,
    evaluation: Evaluation,
    max_error: float | None,
) -> tuple[Barrier, Barrier]:
    """Before and after matching. If the aligned B is A, the second is a null control.

    Arguments:
        module, a, b: the networks as they were.
        here: what became of them.
    """
    import torch

    from companion.connectivity import barrier
    from companion.core.theta import layout

    equal = all(torch.equal(here.a[n], here.b[n]) for n in layout(here.module).parameters)
    if equal:
        say("  the aligned B is A, bit for bit: B is A with its units in another order.")
    splits = evaluation.splits(dataset)
    before, after = (
        barrier(
            net,
            one,
            other,
            splits,
            points=evaluation.points,
            bn=evaluation.bn,
            bn_data=dataset.train,
            bn_examples=evaluation.bn_examples,
            classes=dataset.classes,
            max_error=max_error,
            same_noise=same,
        )
        for net, one, other, same in (
            (module, a, b, False),
            (here.module, here.a, here.b, equal),
        )
    )
    return before, after


def show_barriers(before: Barrier, after: Barrier) -> dict[str, Any] | None:
    """Gates, the table, and whether BatchNorm's statistics have to be estimated again."""
    seen = {str(gate) for gate in before.gates}
    for when, found in (("before", before), ("after", after)):
        for gate in found.gates:
            if when == "before" or str(gate) not in seen:
                say(f"  {when}: {gate}")
    rows = []
    old, new = heights(before), heights(after)
    for split in old:
        for metric, unit in UNITS.items():
            values = [x[split][metric][d] for d in ("mean", "linear") for x in (old, new)]
            ends = before.curve.ends(split, metric)
            rows.append((f"{split} {metric}", *(number(v, metric) for v in (*ends, *values)), unit))
    say()
    headings = [">above mean before", ">after", ">above line before", ">after", ""]
    table(
        ["", ">A", ">B", *headings],
        rows,
        title="barrier" + ("" if before.bn == "none" else f", BatchNorm {before.bn}"),
    )
    say()
    say(f"before: {before}")
    say(f"after:  {after}")
    if after.bn == "none":
        return None
    split = "test" if "test" in after.curve.values else next(iter(after.curve.values))
    modes = {mode: after.height(split, "error", bn=mode) for mode in after.curves}
    gain = modes["interpolate"] - modes["reestimate"]
    needed = gain > RESET if after.valid else None
    text = ", ".join(f"{mode} {number(v, 'error')}" for mode, v in modes.items())
    say(f"BatchNorm, {split} error barrier after matching: {text} points")
    if needed is not None:
        say(
            "  a network between the two needs its statistics estimated again"
            if needed
            else "  estimating the statistics again gains nothing between these two"
        )
    say("  the file's running statistics are B's own, permuted: the aligned B needs no estimate")
    return {"split": split, "barriers": modes, "gain": gain, "reestimate": needed}


def merged(
    module: nn.Module,
    a: Theta,
    aligned: Theta,
    dataset: Dataset | None,
    evaluation: Evaluation,
    *,
    alpha: float,
    form: str,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The network between A and the aligned B, and how it does beside them.

    Arguments:
        alpha: 0 is A.
        form: ``reset``, ``forward``, ``closed`` or ``none``.
    """
    from companion.connectivity import Walker, has_batchnorm
    from companion.rebasin import repair
    from companion.rebasin.repair import interpolated

    say()
    about: dict[str, Any] = {"alpha": alpha, "repair": form}
    if form == "none" or dataset is None or (form == "reset" and not has_batchnorm(module)):
        theta: Theta = interpolated(module, a, aligned, alpha)
        if form == "reset" and has_batchnorm(module):
            say("merged: BatchNorm has interpolated statistics; with --data they are estimated")
    else:
        layers = () if form == "reset" else None
        kind = "forward" if form == "reset" else form
        x = dataset.train.x
        found = repair(module, a, aligned, x, alpha=alpha, layers=layers, form=kind)
        theta = found.theta
        say(f"merged: {found}")
    if dataset is not None:
        walker = Walker(module, evaluation.splits(dataset))
        for name, one in (("A", a), ("B", aligned), ("merged", theta)):
            about[name] = {s: {"loss": m.loss, "error": m.error} for s, m in walker.at(one).items()}
        rows = [
            [n, *(f"{about[n][s][m]:.4g}" for s in walker.splits for m in ("error", "loss"))]
            for n in ("A", "B", "merged")
        ]
        heads = [f">{s} {m}" for s in walker.splits for m in ("error (%)", "loss (nats)")]
        table(["", *heads], rows, title=f"the network at α = {alpha:g}")
    return {k: v.contiguous().clone() for k, v in theta.items()}, about


def write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    provenance: dict[str, str],
    what: str = "aligned B",
) -> None:
    """A file of weights, with where they come from in its metadata."""
    from safetensors.torch import save

    from companion import __version__

    about = {"format": "pt", "made by": f"companion {__version__} rebasin", **provenance}
    try:
        path.write_bytes(save(tensors, metadata=about))
    except OSError as e:
        raise BadParameter(f"{path} cannot be written ({e.strerror}).") from e
    say(f"{what} written to {path}")
