"""``companion rebasin``: put the units of one network into the order of another's.

Methods that permute write B in its own file's form. A rotation of a GPT network's residual stream
is no reordering of units: both networks are first brought into a form in which it keeps the
outputs, with LayerNorm folded into the layers behind it (:mod:`companion.rebasin.folding`), and
what is written is of that form, a network of another name, which :func:`folded_name` gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.barrier import draw, measured, summary
from companion.cli.console import (
    UNITS,
    end,
    mode_of,
    note,
    number,
    output,
    print_table,
    say,
    write_tensors,
)
from companion.cli.opening import LETTERS, Opened, example_for, opened
from companion.core.errors import BadParameter, WrongShape, one_of, whole
from companion.experiments.methods import METHOD_KINDS, Method, described, offered

if TYPE_CHECKING:
    import torch
    from torch import nn

    from companion.connectivity import Barrier
    from companion.core.seeds import Key
    from companion.core.theta import Theta
    from companion.data import Split
    from companion.experiments.methods import Aligned
    from companion.experiments.pairs import Evaluation
    from companion.rebasin import Matching, Permutations, Spec

EXAMPLE = (
    "Example: companion rebasin a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "-o b_aligned.safetensors"
)
DEFAULT = Method()
REPAIRS = ("reset", "forward", "closed", "none")
RESET = 1.0
"""Points of error barrier by which re-estimated BatchNorm must be better to be recommended."""


def align_networks(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A file of safetensors or torch.save, a folder or index of shards, or "
            "run:KEY[@STEP]. It stays.",
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The network whose units are reordered, likewise.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Write the aligned B here (.safetensors), as B's file "
            "has it: same names, same types.",
        ),
    ],
    model: options.Model = None,
    model_b: Annotated[
        str | None,
        typer.Option(
            help="B's architecture, where it has fewer units than A's, or more: the narrower of "
            "the two gets units of weight 0 until it has the other's shape, and still computes "
            "the same."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A dataset of `companion data list`: the barrier is measured before and after. "
            "For runs of the store it is known."
        ),
    ] = None,
    in_shape: options.InShape = None,
    classes: options.Classes = None,
    method: Annotated[str, typer.Option(help=described())] = DEFAULT.name,
    starts: Annotated[
        int, typer.Option(help="Starts of weight matching; the best is kept. The first is as-is.")
    ] = DEFAULT.starts,
    steps: Annotated[
        int | None,
        typer.Option(help=f"Optimiser steps of methods that train (default {DEFAULT.steps})."),
    ] = None,
    seed: options.MatchingSeed = 0,
    match_examples: options.MatchExamples = None,
    bn: options.Bn = "interpolate",
    bn_examples: options.BnExamples = None,
    points: options.Points = 31,
    train_examples: options.TrainExamples = None,
    test_examples: options.TestExamples = None,
    max_error: options.MaxError = None,
    device: options.Device = "auto",
    json: options.Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw both curves into this file (.svg, .png or .pdf); needs --data."),
    ] = None,
    matching: Annotated[
        Path | None, typer.Option(help="Write the permutations to this file (.safetensors).")
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            help="Write the network between A and the aligned B to this file (.safetensors)."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Where between: 0 is A, 1 the aligned B; for --merge.")
    ] = 0.5,
    repair: Annotated[
        str,
        typer.Option(
            help="For --merge, what is done about the statistics inside: reset (BatchNorm is "
            "estimated again, where there is BatchNorm and data), forward or closed (REPAIR of "
            "every layer that can take it), none."
        ),
    ] = "reset",
) -> None:
    """Reorder the units of network B so that they match those of A; B's outputs stay the same.

    The permutations are derived from the architecture and proven on random ones before they are
    used. Prints what was found, and, with data, the barrier before and after. Methods that fold or
    rotate a GPT network write networks of another form, and say under which name they load.
    """
    one_of("--method", method, offered())
    kind = METHOD_KINDS[method]
    one_of("--repair", repair, REPAIRS)
    if not 0 <= alpha <= 1:
        raise BadParameter(f"--alpha: {alpha:g} must lie between 0 (A) and 1 (the aligned B).")
    if merge is None and (alpha != 0.5 or repair != "reset"):
        raise BadParameter("--alpha and --repair belong to --merge FILE.")
    for option, changed in (("starts", starts != DEFAULT.starts), ("steps", steps is not None)):
        if changed and option not in kind.options:
            having = " or ".join(offered(option))
            raise BadParameter(f"--{option} belongs to --method {having}, not to {method}.")
    if model_b and kind.folds:
        raise BadParameter(f"--model-b is for permutations, and --method {method} does more.")
    if matching and kind.folds:
        raise BadParameter(f"--matching is for permutations, and --method {method} does more.")
    counts = {"--starts": starts, "--steps": steps, "--match-examples": match_examples}
    for option, given in counts.items():
        whole(option, given, 1, "None")
    asked = {"--output": out, "--json": json, "--plot": plot, "--matching": matching}
    check_files(asked | {"--merge": merge}, (a, b))

    from companion.connectivity.batches import examples_a_pass
    from companion.core.seeds import Key
    from companion.data import resolve_device

    measuring = options.evaluation(points, bn, train_examples, test_examples, bn_examples)
    shape_given = shape_and_classes(data, in_shape, classes)
    try:
        pair = opened(
            *(a, b, model, data, device, shape_given), optional=True, stream=True, other=model_b
        )
    except WrongShape as error:
        if model_b or kind.folds or not str(error).startswith("network B"):
            raise
        raise BadParameter(
            f"{error} If one of them has fewer units, name B's architecture with --model-b."
        ) from error
    dataset, shape = pair.dataset, pair.shape
    if dataset is None and kind.data:
        raise BadParameter(
            f"--method {method} looks at data: say which with --data. Without data there is "
            "--method weights."
        )
    if dataset is None and plot:
        raise BadParameter("--plot draws the barrier, which needs data: say which with --data.")
    check_repair(repair, dataset is not None or not merge)
    pair.announce(pair.examples())

    train = dataset.train if dataset else None
    batch = DEFAULT.batch if train is None else min(DEFAULT.batch, examples_a_pass(train.x))
    steps = DEFAULT.steps if steps is None else steps
    how = Method(method, starts, examples=match_examples, steps=steps, batch=batch)
    key = Key("rebasin", "cli", seed)
    at = train.x.device if train is not None else resolve_device(device)
    example = example_for(pair.module, shape, pair.classes, key, at)
    here = align_pair(how, pair, example, train, key, spent=True)

    places = None
    if pair.widened and here.matching:
        perms = here.matching.perms
        perms = perms if pair.narrow else pair.widened.spec.inverse(perms)
        places = {n: p.tolist() for n, p in pair.widened.places(perms).items()}
    found: dict[str, Any] | None = None
    if dataset is not None:
        before, after = _barriers(pair, here, measuring, max_error)
        found = {
            "data": {"name": dataset.name, "label": dataset.label},
            "fingerprint": dataset.fingerprint,
            "before": summary(before),
            "after": summary(after),
            "batchnorm": _show_barriers(before, after),
        }
    about = {
        "method": method,
        "model": here.model,
        "aligned to (sha256)": pair.a.sha256,
        "made from (sha256)": pair.b.sha256,
    }
    write_tensors(out, here.file, "rebasin", about, "aligned B")
    if matching:
        assert here.matching is not None
        here.matching.save(matching)
        say(f"permutations written to {matching}")
    between = None
    if merge:
        ends, shares = (here.a, here.b), (1 - alpha, alpha)
        theta, between = average(
            pair, here.module, ends, shares, measuring, form=repair, seen=match_examples
        )
        between = {"alpha": alpha, **between}
        about |= {"alpha": f"{alpha:g}", "repair": repair}
        write_tensors(merge, theta, "rebasin", about, "merged network")
        if kind.folds:
            say(f"the merged network is in folded form, too: --model {here.model}")
    if found:
        title = "Error and loss on the line before and after matching"
        draw(plot, title, "curves", 3.9, {"before": before, "after": after})
    pair.write(
        json,
        "rebasin",
        in_shape=list(shape),
        classes=pair.classes,
        output=out.name,
        **here.about,
        barrier=found,
        merged=between,
        **({"places": places} if places else {}),
    )
    if found:
        end(after.valid)


# --- input


def check_files(given: Mapping[str, Path | None], ends: Sequence[str]) -> None:
    """Refuse files that cannot be written, or that would overwrite a network or each other."""
    suffixes = {"--json": (), "--plot": options.PICTURES}
    for option, path in given.items():
        output(path, option, suffixes.get(option, (".safetensors",)))
    places = {option: path.resolve() for option, path in given.items() if path}
    for name, given_end in zip(LETTERS, ends, strict=False):
        source = Path(given_end.partition("#")[0]).expanduser().resolve()
        shards = source.parent if source.suffix == ".json" else source
        for option, path in places.items():
            if source == path or (path.exists() and path.parent == shards):
                raise BadParameter(f"{option}: {path.name} is {name}, which is not overwritten.")
    if len(set(places.values())) < len(places):
        raise BadParameter(f"{', '.join(places)}: each needs a file of its own.")


def shape_and_classes(
    data: str | None, in_shape: str | None, classes: int | None
) -> tuple[tuple[int, ...], int] | None:
    """What stands in for data; None where it is data that say it."""
    if in_shape is None and classes is None:
        return None
    if data is not None:
        raise BadParameter("--in-shape, --classes: --data says both already; leave them out.")
    if in_shape is None or classes is None:
        raise BadParameter("--in-shape and --classes: without --data both are needed.")
    parts = in_shape.split(",")
    if not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise BadParameter(
            f"--in-shape: {in_shape!r} is not channels,height,width, such as 3,32,32, nor the "
            "tokens in a window, such as 64, nor the shape of another example: whole numbers."
        )
    whole("--classes", classes, 1, most=10_000_000)
    whole("--in-shape", math.prod(map(int, parts)), 1)
    return tuple(map(int, parts)), classes


# --- alignment


@dataclass(frozen=True)
class AlignedPair:
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


def align_pair(
    method: Method,
    pair: Opened,
    example: Any,
    train: Split | None,
    key: Key,
    *,
    spent: bool = False,
) -> AlignedPair:
    """B brought to A, and as it is written: in its own file's form, or in folded form.

    Arguments:
        spent: the pair's module is used for nothing but A's and B's weights from here on.

    Raises:
        BadParameter: nothing can move; of a method that folds: no GPT network, or one whose folded
            form has no name. Unproven: a function changed.
    """
    from companion.experiments.methods import aligned
    from companion.rebasin import Folding

    ends = (pair.module, pair.a.theta, pair.b.theta)
    found = aligned(method, *ends, example, train, key, spent=spent)
    if isinstance(found.symmetries, Folding):
        name = folded_name(pair.name, found.module, pair.shape, pair.classes)
        _show_rotation(found)
        say(
            f"the aligned B is in folded form: it is a network of --model {name}, and goes with A "
            "in the same form (`companion rebasin A A --method folded` writes that)"
        )
        file = {k: v.contiguous().clone() for k, v in found.b.items()}
        return AlignedPair(found.module, found.a, found.b, file, name, None, found.about())
    return _permuted(pair, found)


def _permuted(pair: Opened, found: Aligned) -> AlignedPair:
    """B with its units in A's order, in B's own file's form."""
    import torch

    from companion import models
    from companion.core.fitting import fitted
    from companion.core.theta import layout
    from companion.rebasin import Matching, Spec

    spec, matching, aligned = found.symmetries, found.found, found.b
    assert isinstance(spec, Spec) and isinstance(matching, Matching)
    _show_matching(spec, matching, found.derived, found.gap)
    file = _in_form_of(pair.files[1].theta, pair.b.names, spec, matching.perms)
    # What the file left to the model, such as a tied output matrix, may not be the same any more.
    again = fitted(pair.module, file, layout(pair.module).ties).theta
    for name in aligned.keys() - {n for n in pair.b.names.values() if n}:
        if name not in again or not torch.equal(again[name], aligned[name]):
            file[name] = aligned[name].contiguous().clone()
    name = models.canonical(pair.name)
    return AlignedPair(pair.module, found.a, aligned, file, name, matching, found.about())


def _in_form_of(
    theta: Theta, names: Mapping[str, str | None], spec: Spec, perms: Permutations
) -> dict[str, torch.Tensor]:
    """B's file with its units moved: its own names, with prefixes perhaps, and number types.

    Values are moved, not computed with. Tied tensors: the format allows no shared memory.
    """
    file = {}
    for name in theta if names else ():
        known = names[name]
        moved = theta[name] if known is None else spec.permute_tensor(theta[name], known, perms)
        file[name] = moved.contiguous().clone()
    return file


def _show_matching(spec: Spec, found: Matching, derived: float, gap: float) -> None:
    say(
        f"permutations: {len(spec.groups)}, 10^{spec.log10_count():.0f} ways to order "
        f"{sum(p.numel() for p in found.perms.values()):,} units (derived and proven in "
        f"{derived:.1f} s)"
    )
    _show_held(spec)
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


def _show_held(spec: Spec) -> None:
    """Which units stay in place, and why, where that does not go without saying."""
    reasons: dict[str, list[str]] = {}
    for axis, why in spec.held.items():
        reasons.setdefault(why, []).append(axis)
    for why, held in reasons.items():
        more = f" and {len(held) - 4} more" if len(held) > 4 else ""
        say(f"  held in place: {', '.join(held[:4])}{more}: {why}")


def folded_name(net: str, module: nn.Module, shape: tuple[int, ...], classes: int) -> str:
    """The name under which the folded form of a network is built, e.g. ``gpt:tied=false``, or
    ``hf:FOLDER?headbias=true,tie_word_embeddings=false``.

    Arguments:
        net: the name of the network.
        module: its folded form, for examples of ``shape``.

    Raises:
        BadParameter: there is none.
    """
    from companion import models
    from companion.core.seeds import Key

    full = models.canonical(net)
    hub = full.startswith("hf:")
    if models.is_own(net) and not hub:
        raise BadParameter(
            f"model {net!r}: its folded form has no name to load it by, as yours is a factory of "
            "your own. In Python companion.rebasin.fold(module, x).module is the folded form."
        )
    mark, tied = ("?", "tie_word_embeddings") if hub else (":", "tied")
    name, _, given = full.partition(mark)
    items = dict(item.split("=") for item in given.split(",") if item)
    own = module.state_dict()
    items |= {tied: "false"} | ({"headbias": "true"} if "lm_head.bias" in own else {})
    found = models.canonical(name + mark + ",".join(f"{k}={v}" for k, v in items.items()))
    there = models.build(found, shape, classes, Key("rebasin", "folded")).state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in there.items()}:
        raise BadParameter(f"model {net!r}: {found} is not its folded form, and there is no other.")
    return found


def _show_rotation(aligned: Aligned) -> None:
    from companion.rebasin import Folding, Rotation

    found = aligned.found
    assert found is None or isinstance(found, Rotation)
    derived, gap = aligned.derived, aligned.gap
    say(f"LayerNorm's gains and biases are in the layers behind it (proven in {derived:.1f} s)")
    assert isinstance(aligned.symmetries, Folding)
    _show_held(aligned.symmetries.spec)
    if found is None:
        say("nothing is matched")
    else:
        inside = ", queries, keys and values turned" if found.heads == "rotated" else ""
        say(
            f"rotation by {found.method}: a stream of {len(found.stream)} is turned (1 - trace/D = "
            f"{found.turned:.2f}), heads and units are permuted{inside}"
        )
        steps = {"weights": "iterations", "learned": "steps"}.get(found.method, "")
        steps = steps and f", {found.iterations} {steps}"
        say(
            f"  objective {100 * found.before / found.bound:.1f} % -> {100 * found.share:.1f} % of "
            f"its upper bound{steps}, {found.seconds:.1f} s"
        )
    say(
        "equal outputs: yes, proven in float64; with the rounding of its weights the aligned B "
        f"differs from B by {gap:.1e} of the largest"
    )


# --- what it is worth


def _barriers(
    pair: Opened, here: AlignedPair, how: Evaluation, max_error: float | None
) -> tuple[Barrier, Barrier]:
    """Before and after matching. If the aligned B is A, the second is a null control."""
    import torch

    from companion.core.theta import layout

    equal = all(torch.equal(here.a[n], here.b[n]) for n in layout(here.module).parameters)
    if equal:
        say("  the aligned B is A, bit for bit: B is A with its units in another order.")
    before, after = (
        measured(pair, how, max_error, line, same_noise=same)
        for line, same in (
            ((pair.module, pair.a.theta, pair.b.theta), False),
            ((here.module, here.a, here.b), equal),
        )
    )
    return before, after


def _show_barriers(before: Barrier, after: Barrier) -> dict[str, Any] | None:
    """Gates, the table, and whether BatchNorm's statistics have to be estimated again."""
    seen = {str(gate) for gate in before.gates}
    for text in dict.fromkeys(before.notes + after.notes):
        note(text)
    for gate in before.gates:
        say(f"  before: {gate}")
    for gate in after.gates:
        if str(gate) not in seen:
            say(f"  after: {gate}")
    rows = []
    old, new = before.heights(), after.heights()
    for split in old:
        for metric, unit in UNITS.items():
            values = [x[split][metric][d] for d in ("mean", "linear") for x in (old, new)]
            ends = before.curve.ends(split, metric)
            rows.append((f"{split} {metric}", *(number(v, metric) for v in (*ends, *values)), unit))
    say()
    columns = ["", ">A", ">B", ">above mean before", ">after", ">above line before", ">after", ""]
    print_table(columns, rows, title="barrier" + mode_of(before.bn))
    say()
    say(f"before: {before}")
    say(f"after:  {after}")
    if "reestimate" not in after.curves:  # no running statistics
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


def check_repair(form: str, data: bool) -> None:
    """Refuse a ``--repair`` that lacks its data."""
    one_of("--repair", form, REPAIRS)
    if form in ("forward", "closed") and not data:
        raise BadParameter(f"--repair {form} looks at data: say which with --data.")


def average(
    pair: Opened,
    module: nn.Module,
    ends: Sequence[Theta],
    weights: Sequence[float],
    how: Evaluation,
    *,
    form: str,
    seen: int | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weighted mean of networks, beside them (``form`` of :data:`REPAIRS`).

    Arguments:
        module: the architecture of ``ends``, which are in one order of units.
        weights: one a network; they sum to 1.
        seen: training examples that statistics are of; None: all.
    """
    from companion.connectivity import Walker, has_batchnorm
    from companion.rebasin import repair_many, reset_batchnorm
    from companion.rebasin.repair import averaged

    say()
    dataset = pair.dataset
    about: dict[str, Any] = {"repair": form}
    if form == "none" or dataset is None or (form == "reset" and not has_batchnorm(module)):
        theta: Theta = averaged(module, ends, weights)
        if form == "reset" and has_batchnorm(module):
            say("merged: BatchNorm has interpolated statistics; with --data they are estimated")
    elif len(ends) > 2 and form == "reset":
        x = dataset.train.head(seen or len(dataset.train)).x
        theta = reset_batchnorm(module, averaged(module, ends, weights), x)
        say(f"merged: BatchNorm estimated again on {len(x):,} inputs")
    else:
        layers, kind = ((), "forward") if form == "reset" else (None, form)
        x = dataset.train.head(seen or len(dataset.train)).x
        found = repair_many(module, ends, x, weights, layers=layers, form=kind)
        theta = found.theta
        say(f"merged: {found}")
    if dataset is not None:
        walker = Walker(module, how.splits(dataset))
        networks = {**dict(zip(LETTERS, ends, strict=False)), "merged": theta}
        for name, one in networks.items():
            about[name] = {s: {"loss": m.loss, "error": m.error} for s, m in walker.at(one).items()}
        rows = [
            [n, *(f"{about[n][s][m]:.4g}" for s in walker.splits for m in ("error", "loss"))]
            for n in networks
        ]
        heads = [f">{s} {m}" for s in walker.splits for m in ("error (%)", "loss (nats)")]
        where = f"α = {weights[1]:g}" if len(ends) == 2 else "the weighted mean"
        print_table(["", *heads], rows, title=f"the network at {where}")
    return {k: v.contiguous().clone() for k, v in theta.items()}, about
