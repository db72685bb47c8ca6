"""``companion tickets``: which sparse subnetworks train as well as the whole network?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.console import UNITS, output, print_table, say, write_json, write_tensors
from companion.core.errors import BadParameter, one_of, within

if TYPE_CHECKING:
    from companion.core.runs import Store
    from companion.core.stats import Interval
    from companion.experiments.tickets import Search, Tickets

EXAMPLE = (
    "Example: companion tickets --net mlp:widths=100x3 --data digits --steps 2000 --batch 60 "
    "--lr 0.08 --rewind 100 --rounds 9 --plot tickets.svg -o ticket.safetensors"
)


def prune_network(
    net: options.Net,
    data: options.TrainedOn,
    steps: options.Steps,
    rewind: Annotated[
        str, typer.Option(help="k, the step to rewind to, or several, such as 0,100.")
    ] = "0",
    rounds: Annotated[int, typer.Option(help="Rounds of pruning.")] = 9,
    fraction: Annotated[
        float, typer.Option(help="Of the weights that are left, pruned in each round.")
    ] = 0.2,
    scope: Annotated[
        str,
        typer.Option(
            help="What is pruned together: global (all weights), or each layer by itself."
        ),
    ] = "global",
    skip: Annotated[
        str,
        typer.Option(
            help="Layers left alone, such as head, or several with commas between. Biases and "
            "norms are never pruned."
        ),
    ] = "",
    levels: Annotated[
        str | None,
        typer.Option(help="After which rounds to measure, such as 3,6,9 (default: after each)."),
    ] = None,
    controls: Annotated[
        str,
        typer.Option(
            help="Also measure: random (as many weights a layer), reinit (the mask on new "
            "weights), permuted (carried to them by matching), one-shot; magnitude, snip, synflow "
            "(pruned at step k)."
        ),
    ] = "random",
    inits: Annotated[int, typer.Option(help="Independent initialisations, a chain each.")] = 3,
    copies: Annotated[
        int, typer.Option(help="Of each subnetwork under different SGD noise; 2 make a pair.")
    ] = 2,
    tolerance: Annotated[
        float | None,
        typer.Option(
            callback=lambda value: within("--tolerance", value, 0, 100),
            help="Points of error that a matching subnetwork may lose (default: one standard "
            "deviation of the dense network, and 0.2 at least).",
        ),
    ] = None,
    batch: options.Batch = 128,
    optimizer: options.Optimizer = "sgd",
    lr: options.Lr = 0.1,
    momentum: options.Momentum = 0.9,
    nesterov: options.Nesterov = False,
    betas: options.Betas = "0.9,0.999",
    weight_decay: options.WeightDecay = 0.0,
    weight_decay_on: options.WeightDecayOn = "all",
    schedule: options.Schedule = "constant",
    milestones: options.Milestones = "",
    gamma: options.Gamma = 0.1,
    warmup: options.Warmup = 0,
    div: options.Div = 25.0,
    final_div: options.FinalDiv = 1e4,
    augment: options.Augment = "none",
    precision: options.Precision = "float32",
    bn_examples: options.BnExamples = None,
    points: options.Points = 31,
    bn: options.Bn = "interpolate",
    train_examples: options.TrainExamples = None,
    test_examples: options.TestExamples = None,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    engine: options.Engine = None,
    dry_run: options.DryRun = False,
    json: options.Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw error and barrier against density into this file (.svg, .png, .pdf)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the sparsest network of the first initialisation, trained, to this file, "
            "its mask to NAME.mask.safetensors, and what it was trained from (the mask times "
            "W_k) to NAME.rewound.safetensors.",
        ),
    ] = None,
) -> None:
    """Prune a network round by round, rewind what is left to step k, and train it again.

    Iterative magnitude pruning, Algorithm 2 of Frankle et al. 2020, on any network and dataset. A
    subnetwork is matching if it trains to the error of the whole network, and stable if its copies
    under different SGD noise stay connected. Networks and masks go to the run store: the same
    command continues after an interruption, and more rounds train only what is new.
    """
    given = dict(locals())
    output(json, "--json")
    output(plot, "--plot", options.PICTURES)
    output(out, "--output", (".safetensors",))

    from companion import data as datasets
    from companion.core.runs import Store
    from companion.experiments.tickets import (
        CONTROLS,
        Search,
        check_search,
        find_tickets,
        plan_tickets,
    )
    from companion.tickets import Pruning

    recipe = options.recipe(given)
    kinds = _names(controls)
    for kind in kinds:
        one_of("--controls", kind, CONTROLS)
    if rounds < 1:
        raise BadParameter(f"--rounds: {rounds} must be 1 or more.")
    measured = options.numbers("--levels", levels or "", int) or list(range(1, rounds + 1))
    if not 0 <= min(measured) <= max(measured) <= rounds:
        raise BadParameter(f"--levels: {levels} must be rounds from 0 to {rounds}.")
    search = Search(
        recipe=recipe,
        ks=tuple(options.numbers("--rewind", rewind, int)),
        levels=(*measured, rounds),
        kinds=("imp", *kinds),
        inits=inits,
        copies=copies,
        pruning=Pruning(fraction, scope, tuple(_names(skip))),
    )
    how = options.evaluation(points, bn, train_examples, test_examples, bn_examples)
    where = str(datasets.resolve_device(device))
    dataset = datasets.load(recipe.data, where)
    check_search(search, where)
    store = Store()
    options.announce(plan_tickets(search, how), how, store, where, workers, dry_run)
    found = find_tickets(search, how, store=store, device=where, workers=workers)
    _show(found, dataset.label, tolerance)
    write_json(
        json,
        {
            "command": "tickets",
            "recipe": {**recipe.identity(), "net": recipe.net},
            "data": {"name": data, "label": dataset.label, "fingerprint": dataset.fingerprint},
            "pruning": asdict(search.pruning),
            "inits": inits,
            "copies": copies,
            "evaluation": how.identity(recipe.net),
            "device": where,
            "tolerance": {k: _tolerance(found, k, tolerance) for k in search.ks},
            "levels": [_row(found, *one, tolerance) for one in _rows(search)],
        },
    )
    if plot:
        _draw(found, plot)
    if out:
        _write(search, out, store, where)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rows(search: Search) -> list[tuple[str, int, int]]:
    """(kind, level, k) of the rows, in the table's order."""
    kinds = dict.fromkeys(("imp", *search.kinds))
    return [(kind, n, k) for k in search.ks for kind in kinds for n in search.levels_of(kind)]


def _tolerance(found: Tickets, k: int, asked: float | None) -> float:
    return found.tolerance(k) if asked is None else asked


def _row(found: Tickets, kind: str, level: int, k: int, tolerance: float | None) -> dict[str, Any]:
    """The statistics of one kind at one level, for JSON: intervals, null without a valid pair."""

    def shown(interval: Interval | None) -> dict[str, Any] | None:
        return asdict(interval) if interval else None

    noise = found.instability(kind, level)
    row: dict[str, Any] = {
        "kind": kind,
        "level": level,
        "k": k,
        "density": found.search.density(level),
        "error": {s: shown(found.error(kind, level, k, s)) for s in ("test", "train")},
        "excess": shown(found.excess(kind, level, k)),
        "barrier": {s: shown(noise.interval(k, s)) for s in ("test", "train")},
        "stable": found.stable(kind, level, k),
        "matching": found.matching(kind, level, k, tolerance),
        "weights": [dict(s.kept) for s in found.at(kind, level, k)],
    }
    if kind == "imp" and level:
        row["barrier to the level before"] = shown(found.successive(level, k))
        row["barrier to dense"] = shown(found.to_dense(level, k))
    return row


def _cell(interval: Interval | None) -> str:
    return "INVALID" if interval is None else str(interval)


def _show(found: Tickets, label: str, tolerance: float | None) -> None:
    """A table for each k, the controls of the whole experiment, and what failed a gate."""
    search = found.search
    for k in search.ks:
        rows = []
        for kind, level, at in _rows(search):
            if at != k:
                continue
            noise = found.instability(kind, level)
            along = kind == "imp" and level > 0
            rows.append(
                (
                    kind if level else "dense",
                    f"{100 * search.density(level):.1f}",
                    _cell(found.error(kind, level, k)),
                    found.matching(kind, level, k, tolerance) if level else "",
                    _cell(noise.interval(k)),
                    found.stable(kind, level, k),
                    _cell(found.successive(level, k)) if along else "",
                    _cell(found.to_dense(level, k)) if along else "",
                )
            )
        say()
        print_table(
            [
                *("kind", ">% left", ">test error", "matching?", ">barrier", "stable?"),
                *(">to level before", ">to dense"),
            ],
            rows,
            title=f"{search.recipe.net} on {label}, rewound to k = {k}: error in percent, barriers "
            f"in {_unit(found)}, mean [90 % interval]; matching = at most "
            f"{_tolerance(found, k, tolerance):.2g} points above dense",
        )
    say()
    gates = [g for s in found.subnetworks for n in s.noise for g in n.result.barrier.gates]
    for gate in dict.fromkeys(gates):
        if gate.name[:3] in ("G1 ", "G3 ") or (gate.name[:3] == "G4 " and not gate.passed):
            say(f"  {gate}")
    invalid = [s for s in found.subnetworks if any(not n.result.barrier.valid for n in s.noise)]
    for s in invalid:
        bad = next(n.result.barrier for n in s.noise if not n.result.barrier.valid)
        why = "; ".join(str(g) for g in bad.gates if g.passed is False)
        density = f"{100 * search.density(s.level):.1f} %"
        say(f"  INVALID {s.kind}, {density}, k={s.k}, init {s.init}: {why}")


def _unit(found: Tickets) -> str:
    return UNITS[found.instability("imp", 0).metric]


def _draw(found: Tickets, path: Path) -> None:
    """Error, and barrier between copies, against the share of weights left."""
    from companion.experiments.instability import threshold_of
    from companion.report import figures, plots

    search = found.search
    ticks = {n: f"{100 * search.density(n):.3g}" for n in search.levels}
    errors: dict[str, dict[int, Interval]] = {}
    barriers: dict[str, dict[int, Interval]] = {}
    for kind, level, k in _rows(search):
        name = f"{kind}, k = {k}" if len(search.ks) > 1 else kind
        values: Sequence[tuple[dict[str, dict[int, Interval]], Interval | None]] = (
            (errors, found.error(kind, level, k)),
            (barriers, found.instability(kind, level).interval(k)),
        )
        for series, value in values:
            if value is not None:
                series.setdefault(name, {})[level] = value
    with figures.file(
        path, "Error and barrier of subnetworks by density", figsize=(8.6, 4.2)
    ) as fig:
        axes = fig.subplots(1, 2)
        labels = ("test error (%)", f"barrier between copies ({_unit(found)})")
        for ax, series, ylabel in zip(axes, (errors, barriers), labels, strict=True):
            plots.sweep(
                ax, series, xlabel="weights left (%)", ylabel=ylabel, ticks=ticks, axis="linear"
            )
            ax.tick_params(axis="x", labelrotation=45)
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]), auto=True)
        threshold = threshold_of(found.instability("imp", 0).metric)
        plots.dashed(axes[1], threshold, text=f"{threshold:g} {_unit(found)}")
        axes[0].legend(fontsize=8)
    say(f"figure drawn in {path}")


def _write(search: Search, out: Path, store: Store, device: str) -> None:
    """The sparsest ticket of the first initialisation at the last k, its mask, and its start."""
    from companion.training import load_mask, load_weights

    level, k = search.levels[-1], search.ks[-1]
    run = search.chains_at(k)[0].run(level)
    assert run.mask is not None
    about = {
        "net": search.recipe.net,
        "data": search.recipe.data,
        "density": f"{search.density(level):.6g}",
        "rewound to step": str(k),
    }
    tensors = {
        out: (load_weights(run, store=store, device=device), "trained subnetwork"),
        out.with_suffix(".mask.safetensors"): (
            load_mask(run.mask, store=store, device=device),
            "its mask",
        ),
        out.with_suffix(".rewound.safetensors"): (
            load_weights(run, run.first_step, store=store, device=device),
            "mask times W_k",
        ),
    }
    for path, (values, what) in tensors.items():
        write_tensors(path, values, "tickets", about, what)
