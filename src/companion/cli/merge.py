"""``companion merge``: two or more networks of one architecture averaged into one.

Two go through the matching, the statistics and the table of ``companion rebasin --merge``; more are
brought into one order of units by MergeMany (:mod:`companion.rebasin.merge`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.barrier import measured, summary
from companion.cli.console import end, note, number, print_table, say, write_tensors
from companion.cli.opening import LETTERS, Opened, example_for, opened
from companion.cli.rebasin import (
    DEFAULT,
    REPAIRS,
    align_pair,
    average,
    check_files,
    check_repair,
    shape_and_classes,
)
from companion.core.errors import BadParameter, one_of, whole
from companion.experiments.methods import METHOD_KINDS, Method, offered

if TYPE_CHECKING:
    import torch
    from torch import nn

    from companion.connectivity import Barrier
    from companion.core.seeds import Key
    from companion.core.theta import Theta
    from companion.experiments.pairs import Evaluation

EXAMPLE = (
    "Example: companion merge a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "-o merged.safetensors"
)
SHARED_START = 0.5
"""Networks of which weight matching moves less than this share of the units have one start: their
units are in one order already. Between independent networks nearly all units move."""
BESIDE = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "*.model"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
"""What of a folder of transformers belongs to the network, besides its weights."""


def merge_networks(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C …]",
            help="Files of safetensors or torch.save, folders or indexes of shards, or "
            "run:KEY[@STEP]; two or more.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Write the merged network here: a .safetensors file, as A's file has it; where A "
            "is a folder of transformers, also a folder (config and tokenizer are A's).",
        ),
    ],
    model: options.Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A dataset of `companion data list`: statistics are estimated on it, and the "
            "barrier is measured. For runs of the store it is known."
        ),
    ] = None,
    in_shape: options.InShape = None,
    classes: options.Classes = None,
    method: Annotated[
        str,
        typer.Option(
            help="How the units are matched first: auto (by weights, where they are in different "
            "orders), none, or a method of `companion rebasin`. Of three networks and more: auto, "
            "none, weights (MergeMany) or c2m3 (and Frank-Wolfe steps)."
        ),
    ] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(help="Of each network in the mean, such as 0.7,0.3 (default: equal)."),
    ] = None,
    repair: Annotated[
        str,
        typer.Option(
            help="What is done about the statistics inside: reset (BatchNorm is estimated again, "
            "where there is BatchNorm and data), forward or closed (REPAIR), none."
        ),
    ] = "reset",
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
) -> None:
    """Average networks of one architecture into one network.

    Units are matched where the networks do not share a start, and statistics of BatchNorm are
    estimated again. With data, the merged network is measured beside those it was made of, and the
    barrier between these says whether the average was a good idea. If a gate fails, the barrier is
    INVALID, and the exit code is 3; the file is written all the same.
    """
    if len(networks) < 2:
        raise BadParameter("merge takes two networks or more, such as A.safetensors B.safetensors.")
    many = len(networks) > 2
    allowed = ("auto", "none", "weights", "c2m3") if many else ("auto", "none", *offered())
    one_of("--method" + (" of three networks and more" if many else ""), method, allowed)
    one_of("--repair", repair, REPAIRS)
    shares = _shares(weights, len(networks))
    folder = _folder(out, networks[0])
    check_files({"--output": None if folder else out, "--json": json}, networks)

    from companion.core.seeds import Key

    how = options.evaluation(points, bn, train_examples, test_examples, bn_examples)
    pair = opened(
        *(networks[0], networks[1], model, data, device),
        shape_and_classes(data, in_shape, classes),
        more=networks[2:],
        optional=True,
    )
    kind = METHOD_KINDS.get(method)
    if kind and kind.data and pair.dataset is None:
        raise BadParameter(f"--method {method} looks at data: say which with --data.")
    if kind and kind.folds and folder:
        raise BadParameter(f"--method {method} writes networks of another form, and no folder.")
    check_repair(repair, pair.dataset is not None)
    pair.announce(pair.examples())
    whole("--match-examples", match_examples, 1, "None")
    placed = _placed(pair, method, Key("rebasin", "cli", seed), match_examples)
    theta, beside = average(
        pair, placed.module, placed.thetas, shares, how, form=repair, seen=match_examples
    )
    lines = _lines(pair, placed, how, max_error)
    about = {
        "method": placed.method,
        "weights": ", ".join(f"{w:g}" for w in shares),
        "repair": repair,
        "model": placed.model,
        "made from (sha256)": ", ".join(one.sha256 for one in pair.ends),
    }
    file = theta if kind and kind.folds else _as_first(pair, theta)
    if folder:
        _write_folder(out, Path(networks[0]).expanduser(), file, about)
    else:
        write_tensors(out, file, "merge", about, "merged network")
    if kind and kind.folds:
        say(f"the merged network is in folded form: --model {placed.model}")
    pair.write(
        json,
        "merge",
        output=out.name,
        **{**about, "weights": shares},
        matching=placed.about,
        merged=beside,
        barriers={name: summary(line) for name, line in lines.items()},
    )
    end(all(line.valid for line in lines.values()))


def _shares(text: str | None, networks: int) -> list[float]:
    """``--weights``, one a network, to the sum 1."""
    if text is None:
        return [1 / networks] * networks
    found: list[float] = options.numbers("--weights", text, float)
    if len(found) != networks or any(not 0 <= w < math.inf for w in found) or not sum(found):
        raise BadParameter(
            f"--weights: {text!r} must be {networks} numbers of 0 or more, one a network, such as "
            f"{','.join(['1'] * networks)}; only their ratios count."
        )
    return [w / sum(found) for w in found]


def _folder(out: Path, first: str) -> bool:
    """Whether the output is a folder of transformers, which is new or empty.

    Raises:
        BadParameter: it is one, and A is none, or something is in it.
    """
    if out.suffix == ".safetensors":
        return False
    if not (Path(first).expanduser() / "config.json").is_file():
        raise BadParameter(
            f"--output: {out.name!r} must end in .safetensors. (A folder is written where A is a "
            "folder of transformers with its config.json.)"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadParameter(f"--output: {out} is there already; name a folder that is new.")
    if not out.parent.is_dir():
        raise BadParameter(f"--output: there is no folder {out.parent}.")
    return True


@dataclass(frozen=True, eq=False)
class _Placed:
    """Networks in the coordinates in which they are averaged.

    Arguments:
        module: the architecture there, of the name ``model``.
        method: that brought them there.
        about: the matching, for the JSON.
    """

    module: nn.Module
    model: str
    thetas: tuple[Theta, ...]
    method: str = "none"
    about: Any = None


def _placed(pair: Opened, method: str, key: Key, seen: int | None) -> _Placed:
    """All networks in A's order of units, or as they are."""
    as_they_are = _Placed(pair.module, pair.model, tuple(one.theta for one in pair.ends))
    if method == "none":
        return as_they_are
    try:
        two = len(pair.ends) == 2
        found, moved = _two(pair, method, key, seen) if two else _many(pair, method, key)
    except BadParameter as e:
        if method != "auto":
            raise
        note(f"the networks are averaged as they are: {e}")
        return as_they_are
    if method == "auto" and moved < SHARED_START:
        say(f"{100 * moved:.0f} % of the units: the networks share a start, and are averaged as is")
        return replace(as_they_are, about=found.about)
    return found


def _two(pair: Opened, method: str, key: Key, seen: int | None) -> tuple[_Placed, float]:
    """Two networks, matched as ``companion rebasin`` does, and the share of the units that move."""
    from companion.data import resolve_device

    how = Method(DEFAULT.name if method == "auto" else method, examples=seen)
    train = pair.dataset.train if pair.dataset else None
    at = train.x.device if train is not None else resolve_device("auto")
    example = example_for(pair.module, pair.shape, pair.classes, key, at)
    found = align_pair(how, pair, example, train, key)
    moved = found.matching.moved if found.matching else 1.0
    ends = (found.a, found.b)
    return _Placed(found.module, found.model, ends, how.name, found.about), moved


def _many(pair: Opened, method: str, key: Key) -> tuple[_Placed, float]:
    """Any number, by MergeMany or C2M3, in A's order; and the largest share of units that move."""
    from companion.rebasin import derive, merge_many

    example = example_for(pair.module, pair.shape, pair.classes, key)
    spec = derive(pair.module, example, unread="hold")
    if not spec.groups:
        raise BadParameter(f"model {pair.name!r}: there is nothing to match: {spec.why_none()}.")
    thetas = [one.theta for one in pair.ends]
    how = "c2m3" if method == "c2m3" else "passes"
    found = merge_many(spec, thetas, key=key, method=how)
    perms = [found.between(0, i) for i in range(len(thetas))]
    moved = max(_moved(perm) for perm in perms)
    before, after = (100 * x / found.bound for x in (found.before, found.objective))
    say(
        f"{'C2M3' if how == 'c2m3' else 'MergeMany'}: objective {before:.1f} % -> {after:.1f} % "
        f"of its upper bound, up to {100 * moved:.1f} % of the units of a network move, "
        f"{found.passes} passes, "
        f"{found.seconds:.1f} s"
    )
    ends = tuple(spec.permute(t, p) for t, p in zip(thetas, perms, strict=True))
    about = found.summary() | {"moved": moved}
    return _Placed(
        pair.module, pair.model, ends, "c2m3" if how == "c2m3" else "weights", about
    ), moved


def _moved(perms: dict[str, torch.Tensor]) -> float:
    """Share of the units that a permutation moves."""
    import torch

    count = sum(p.numel() for p in perms.values())
    moved = sum(int((p.cpu() != torch.arange(len(p))).sum()) for p in perms.values())
    return moved / count if count else 0.0


def _lines(
    pair: Opened, placed: _Placed, how: Evaluation, max_error: float | None
) -> dict[str, Barrier]:
    """Barriers between every two networks, as they were averaged; without data none."""
    if pair.dataset is None:
        note("without --data nobody knows whether the merged network is any good")
        return {}
    lines = {
        f"{LETTERS[i]}, {LETTERS[j]}": measured(
            pair, how, max_error, (placed.module, placed.thetas[i], placed.thetas[j])
        )
        for i, j in combinations(range(len(placed.thetas)), 2)
    }
    first = next(iter(lines.values()))
    for gate in first.gates:
        say(f"  {gate}")
    for text in dict.fromkeys(text for line in lines.values() for text in line.notes):
        note(text)
    say()
    if len(lines) == 1:
        say(str(first))
    else:
        splits = tuple(first.curve.values)
        rows = [
            [name, *(number(line.height(split), line.metric) for split in splits)]
            for name, line in lines.items()
        ]
        unit = {"error": "points", "loss": "nats"}[first.metric]
        heads = ["", *(f">{s} {first.metric} ({unit})" for s in splits)]
        print_table(heads, rows, title="barriers")
    if all(line.valid for line in lines.values()):
        verdict, rule = _judged(pair, placed, how, lines)
        say(f"one basin: {verdict} (the rule: {rule})")
    return lines


def _judged(
    pair: Opened, placed: _Placed, how: Evaluation, lines: Mapping[str, Barrier]
) -> tuple[str, str]:
    """Whether all lines are low, by the rule of `companion report`; and that rule."""
    from companion.report.compare.case import margins
    from companion.report.compare.verdicts import THRESHOLDS, all_low

    splits, metric = how.splits(pair.data), next(iter(lines.values())).metric
    average = {"bn_data": pair.data.train, "bn_examples": how.bn_examples}
    ends = combinations(placed.thetas, 2)
    heights = [
        (
            line.height("test"),
            margins(placed.module, a, b, splits, line, **average)["test"][metric],
        )
        for (a, b), line in zip(ends, lines.values(), strict=True)
    ]
    verdict = all_low(heights, metric)
    widest = max(margin for _, margin in heights)
    return verdict, f"{THRESHOLDS[metric].rule} on test data, known up to ± {widest:.2g}"


def _as_first(pair: Opened, theta: Theta) -> dict[str, torch.Tensor]:
    """The merged network as A's file has it: its names and number types, each tied tensor once.

    Where that form does not hold it (two outputs that are tied in A's file and not in B's, say), it
    has the model's own names.
    """
    import torch

    from companion.core.fitting import fitted
    from companion.core.theta import layout, without_aliases

    ties = layout(pair.module).ties
    raw, names = pair.files[0].theta, pair.a.names
    stored = {name: known for name, known in names.items() if known is not None}
    file = {}
    for name, known in stored.items():
        if ties.get(known) in stored.values():
            continue
        like = raw[name]
        value = theta[known].to(like.dtype) if like.is_floating_point() else theta[known]
        file[name] = value.contiguous().clone()
    again = fitted(pair.module, file, ties).theta if file else {}
    types = {k: again[k].dtype for k in again if k in theta}
    holds = theta.keys() <= again.keys() | ties.keys() and all(
        torch.equal(again[k].cpu(), theta[k].to(types[k]).cpu()) for k in types
    )
    return file if holds else dict(without_aliases(theta, ties))


def _write_folder(out: Path, source: Path, file: Theta, about: dict[str, str]) -> None:
    """A folder that transformers loads: A's configuration and tokenizer, the merged weights."""
    source = source.parent if source.is_file() else source
    made = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        for pattern in BESIDE:
            for path in sorted(source.glob(pattern)):
                shutil.copyfile(path, out / path.name)
        write_tensors(out / "model.safetensors", file, "merge", about, "merged network")
    except BaseException:
        if made:
            shutil.rmtree(out, ignore_errors=True)
        raise
