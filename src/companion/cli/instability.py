"""``companion instability``: from which step on do copies of one network stay connected?"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.barrier import summary
from companion.cli.console import UNITS, end, number, output, print_table, say, write_json
from companion.core.errors import within

if TYPE_CHECKING:
    from companion.experiments.instability import Instability

EXAMPLE = (
    "Example: companion instability --net mlp:widths=100x5 --data digits --steps 2000 --batch 60 "
    "--lr 0.08 --ks 0,50,200 --json found.json --plot found.svg"
)


def measure_instability(
    net: options.Net,
    data: options.TrainedOn,
    steps: options.Steps,
    ks: Annotated[str, typer.Option(help="Fork steps, each below T, such as 0,50,200.")],
    inits: Annotated[int, typer.Option(help="Independent initialisations.")] = 3,
    copies: Annotated[int, typer.Option(help="Copies of each fork; 3 make 3 pairs.")] = 3,
    noise: Annotated[
        str,
        typer.Option(
            help="What differs between copies: both, order or augment; or perturb: nothing but one "
            "weight at step k."
        ),
    ] = "both",
    restart: Annotated[
        bool, typer.Option("--restart", help="Copies train all T steps again (the control).")
    ] = False,
    restore: Annotated[
        bool, typer.Option("--restore", help="Copies go on with the optimiser's momentum at k.")
    ] = False,
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
    max_error: Annotated[
        float | None,
        typer.Option(
            callback=lambda value: within("--max-error", value, 0, 100),
            help="A test error, in percent, that counts as trained "
            "(default: 1.5 times the median of all copies; of text, right half as often as it, and "
            "better than always the commonest token).",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Which barrier decides: error or loss (default: error; of text, loss)."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            callback=lambda value: within("--threshold", value, 0, 1e12),
            help="The barrier below which a network is called stable "
            "(default: 2 points of error, or 0.03 nats of loss).",
        ),
    ] = None,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    engine: options.Engine = None,
    dry_run: options.DryRun = False,
    json: options.Json = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw barrier against k into this file (.svg, .png, .pdf).")
    ] = None,
) -> None:
    """Train copies of one network from step k on under different SGD noise, and measure barriers.

    Algorithm 1 of Frankle et al. 2020, on any network and dataset. Trained networks go to the run
    store, so the same command continues after an interruption, and a finer grid of k trains only
    what is new.
    """
    given = dict(locals())
    output(json, "--json")
    output(plot, "--plot", options.PICTURES)

    from companion import data as datasets
    from companion.core.runs import Store
    from companion.experiments.instability import analyse, check_design, plan_forks, threshold_of
    from companion.training import check_fit

    grid = options.numbers("--ks", ks, int)
    recipe = options.recipe(given)
    how = options.evaluation(points, bn, train_examples, test_examples, bn_examples)
    forks: dict[str, Any] = {
        "inits": inits,
        "copies": copies,
        "noise": noise,
        "optimizer": "restore" if restore else "reset",
        "schedule": "restart" if restart else "continue",
    }
    where = str(datasets.resolve_device(device))
    dataset = datasets.load(recipe.data, where)
    check_fit(recipe, dataset)
    metric = metric or ("loss" if dataset.kind == "text" else "error")
    limit = threshold_of(metric, threshold)
    store = Store()
    check_design(recipe, grid, inits=inits, copies=copies, noise=noise, device=where)
    design = plan_forks(recipe, grid, how, **forks, controls=False)
    options.announce(design, how, store, where, workers, dry_run)
    found = analyse(
        *(recipe, grid),
        **forks,
        evaluation=how,
        max_error=max_error,
        store=store,
        device=where,
        workers=workers,
    )
    _show(found, dataset.label, limit, metric)
    write_json(
        json,
        {
            "command": "instability",
            "recipe": {**recipe.identity(), "net": recipe.net},
            "data": {"name": data, "label": dataset.label, "fingerprint": dataset.fingerprint},
            "inits": inits,
            "copies": copies,
            "noise": noise,
            "optimizer_at_k": forks["optimizer"],
            "schedule_at_k": forks["schedule"],
            "evaluation": how.identity(recipe.net),
            "device": where,
            "metric": metric,
            "threshold": limit,
            "onset": {split: _onset(found, split, limit, metric) for split in ("test", "train")},
            "ks": [_row(found, k, limit, metric) for k in found.ks],
            "pairs": [
                {
                    "k": sample.k,
                    "init": sample.init,
                    "copies": sample.copies,
                    "distances": sample.result.distances,
                    **summary(sample.result.barrier),
                }
                for sample in found.samples
            ],
        },
    )
    if plot:
        from companion.report import figures, plots

        values = {s: {k: found.interval(k, s, metric) for k in found.ks} for s in ("test", "train")}
        series = {s: {k: v for k, v in of.items() if v is not None} for s, of in values.items()}
        with figures.file(plot, f"{metric.capitalize()} barrier by fork step") as fig:
            ax = fig.subplots()
            plots.against_k(
                *(ax, series),
                steps=found.recipe.steps,
                threshold=limit,
                meaning=UNITS[metric],
                ylabel=f"{metric} barrier ({UNITS[metric]})",
            )
            counts = sorted({len(found.values(k)) for k in found.ks})
            pairs = "–".join(str(c) for c in dict.fromkeys((counts[0], counts[-1])))
            title = f"{found.recipe.net} on {found.recipe.data}"
            ax.set_title(f"{title}: mean of {pairs} pairs, 90 % interval", fontsize=10)
        say(f"figure drawn in {plot}")
    end(all(found.interval(k) is not None for k in found.ks))


def _row(found: Instability, k: int, threshold: float, metric: str) -> dict[str, Any]:
    """The statistics at k, for JSON: split -> metric -> interval (null without a valid pair)."""
    row: dict[str, Any] = {"k": k, "verdict": found.verdict(k, "test", threshold, metric)}
    for split in ("test", "train"):
        intervals = {each: found.interval(k, split, each) for each in UNITS}
        row[split] = {each: asdict(i) if i else None for each, i in intervals.items()}
    return row


def _interval(found: Instability, k: int, split: str, metric: str) -> str:
    """Mean and interval, to the digits that the metric deserves."""
    interval = found.interval(k, split, metric)
    if interval is None:
        return "INVALID"
    value, low, high = (number(v, metric) for v in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _show(found: Instability, label: str, threshold: float, metric: str) -> None:
    """The table, the gates that failed, and the onset."""
    rows = []
    for k in found.ks:
        pairs = found.at(k)
        valid = sum(s.result.barrier.valid for s in pairs)
        rows.append(
            (
                str(k),
                *(_interval(found, k, split, metric) for split in ("test", "train")),
                f"{valid}/{len(pairs)}",
                found.verdict(k, "test", threshold, metric),
            )
        )
    say()
    print_table(
        [">k", ">barrier test", ">barrier train", ">valid pairs", "verdict"],
        rows,
        title=f"{found.recipe.net} on {label}: {metric} barrier in {UNITS[metric]}, "
        "mean [90 % interval]; "
        f"stable = below {threshold:g}",
    )
    say()
    # G1 and G3 are asked once for the whole experiment and stand behind every pair.
    for gate in dict.fromkeys(g for s in found.samples for g in s.result.barrier.gates):
        if gate.name[:3] in ("G1 ", "G3 "):
            say(f"  {gate}")
    for sample in found.invalid():
        failed = "; ".join(str(g) for g in sample.result.barrier.gates if g.passed is False)
        say(f"  INVALID k={sample.k}, init {sample.init}, copies {sample.copies}: {failed}")
    onset, below = found.onset("test", threshold, metric), f"{threshold:g} {UNITS[metric]}"
    if not found.onset_is_told("test", metric):
        say(
            f"onset: none can be told, as no pair at k = {found.ks[-1]} is valid: see the gates "
            "above (longer training, or --max-error)"
        )
        return
    if math.isinf(onset.value):
        say(f"onset: at no k of this grid the mean test barrier stays below {below}")
    else:
        say(f"onset: from k = {onset.value} on the mean test barrier stays below {below}")
    ends = [f"k = {k}" if math.isfinite(k) else "after this grid" for k in (onset.low, onset.high)]
    say(f"by the verdicts: {ends[0]} at the earliest, {ends[1]} at the latest")


def _onset(found: Instability, split: str, threshold: float, metric: str) -> dict[str, Any]:
    """By the means, at the earliest, and at the latest; null: at no k of the grid."""
    onset = found.onset(split, threshold, metric)
    steps = {"k": onset.value, "earliest": onset.low, "latest": onset.high}
    return {name: k if math.isfinite(k) else None for name, k in steps.items()}
