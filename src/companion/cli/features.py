"""``companion features``: are the features of two checkpoints linearly connected?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.cli import options
from companion.cli.console import end, mode_of, note, number, output, print_table, say
from companion.cli.opening import amount, opened
from companion.core.errors import BadParameter, one_of

if TYPE_CHECKING:
    from companion.features import Features
    from companion.features.conditions import Additivity, Commutativity
    from companion.features.stitching import Stitching

EXAMPLE = (
    "Example: companion features a.safetensors b.safetensors --model resnet20 --data cifar10 "
    "--layers 'stage?.*' --stitch --json features.json"
)
BN = ("both", "interpolate", "reestimate")


def compare_features(
    a: options.A,
    b: options.B,
    model: options.Model = None,
    data: options.Data = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Look at these layers: a module's name, the beginning of names, or a pattern such "
            "as '*.relu*'; may be given several times (default: outputs of convolutions, linear "
            "layers, norms, activations and blocks)."
        ),
    ] = None,
    alphas: Annotated[
        str, typer.Option(help="Weights of B, comma-separated, from 0 (A) to 1 (B).")
    ] = "0.25,0.5,0.75",
    bn: Annotated[
        str,
        typer.Option(
            help="What BatchNorm does: interpolate (its statistics, like weights), reestimate "
            "(them, on training data) or both in turn."
        ),
    ] = "both",
    bn_examples: options.BnExamples = None,
    examples: Annotated[
        int | None, typer.Option(help="Measure on this many test examples instead of all.")
    ] = None,
    per: Annotated[
        str,
        typer.Option(
            help="sample: one feature an input, flattened; position: one a token, for token "
            "networks."
        ),
    ] = "sample",
    stitch: Annotated[
        bool,
        typer.Option("--stitch", help="Also replace B's output at each layer by A's: test error."),
    ] = False,
    conditions: Annotated[
        bool,
        typer.Option(
            "--conditions",
            help="Also measure weak additivity of every ReLU and commutativity of every layer.",
        ),
    ] = False,
    max_error: options.MaxError = None,
    device: options.Device = "auto",
    json: options.Json = None,
) -> None:
    """Compare the features of two checkpoints with those of the networks between them.

    For each layer: 1 - cos of the feature of the network (1 - α) A + α B and the interpolated
    feature (1 - α) f(A) + α f(B), beside 1 - cos of f(A) and f(B), means over test examples; their
    ratio; and the coefficient c (Zhou et al. 2023, Definition 2). Then the error of those networks
    and of the mixed outputs, which is at most the sum of the two networks' errors (Lemma 1).
    """
    output(json, "--json")
    one_of("--bn", bn, BN)
    rates = _alphas(alphas)
    average = options.bn_average(bn_examples)
    if examples is not None and examples < 1:
        raise BadParameter(f"--examples: {examples} must be 1 or more.")

    from companion.connectivity import gates, has_batchnorm
    from companion.core.theta import layout
    from companion.features import features

    pair = opened(a, b, model, data, device)
    dataset, module, theta_a, theta_b = pair.data, pair.module, pair.a.theta, pair.b.theta
    test = dataset.test.head(len(dataset.test) if examples is None else examples)
    pair.announce(f"{dataset.label}: test ({amount(test)})")
    modes = BN[1:] if bn == "both" and has_batchnorm(module) else (bn,)
    found: dict[str, Features] = {}
    for mode in modes:
        one = features(
            *(module, theta_a, theta_b, test),
            layers=layers or None,
            alphas=rates,
            bn=mode if mode in BN[1:] else "interpolate",
            bn_data=dataset.train,
            bn_examples=average,
            per=per,
        )
        found[one.bn] = one
    errors = next(iter(found.values())).errors
    checks = gates.of_ends(
        *(theta_a, theta_b, layout(module).parameters, [errors["a"], errors["b"]]),
        *(dataset.classes, test),
        max_error=max_error,
    )
    for check in checks:
        say(f"  {check}")
    for one in found.values():
        _show(one, "images" if test.kind == "images" else "windows")
    more: dict[str, Any] = {}
    if conditions:
        from companion.features import commutativity, weak_additivity
        from companion.features.conditions import measurable

        among = [x.name for x in next(iter(found.values())).layers] if layers else None
        relus, linears = measurable(module.to(test.x.device), test, among)
        ends_of = (module, theta_a, theta_b, test)
        additive = weak_additivity(*ends_of, layers=relus, alphas=rates) if relus else None
        commuting = commutativity(*ends_of, layers=linears) if linears else None
        _show_conditions(additive, commuting)
        more["conditions"] = {"weak_additivity": additive, "commutativity": commuting}
    if stitch:
        from companion.features import stitch as stitched

        sewn = stitched(module, theta_a, theta_b, test, layers=layers or None)
        _show_stitching(sewn)
        more["stitching"] = sewn
    settings = {"layers": layers or None, "examples": len(test), "per": per}
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        say()
        say(f"INVALID as a statement about two trained networks: {', '.join(failed)} failed")
    about = {"gates": [str(check) for check in checks], "valid": not failed, "features": found}
    pair.write(json, "features", **pair.about_data(), settings=settings, **about, **more)
    end(not failed)


def _alphas(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise BadParameter(
            f"--alphas: {text!r} must be numbers from 0 to 1, comma-separated, such as 0.25,0.5."
        ) from None


def small(value: float) -> str:
    """A number from 0 to 2, or a distance: four decimals, or a power of ten below them."""
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _alpha(value: float) -> str:
    return f"{value:.4g}"


def _show(found: Features, what: str) -> None:
    """A table of layers, and the errors that Lemma 1 is about."""
    middle = min(found.alphas, key=lambda t: abs(t - 0.5))
    columns = ["", ">1−cos(A, B)", *(f">at α={_alpha(t)}" for t in found.alphas)]
    columns += [f">ratio at {_alpha(middle)}", f">c at {_alpha(middle)}", ">undefined"]
    rows = []
    for layer in found.layers:
        spreads = (layer.baseline, *(layer.gap[t] for t in found.alphas))
        c = layer.c[middle].median
        rows.append(
            [
                layer.name,
                *(f"{small(s.mean)} ± {small(s.std)}" for s in spreads),
                small(layer.ratio(middle)),
                "–" if math.isnan(c) else f"{c:.3f}",
                str(max(s.undefined for s in spreads) or ""),
            ]
        )
    mode = mode_of(found.bn)
    mode += "" if found.bn_examples is None else f" on {found.bn_examples:,} training examples"
    what = "tokens" if found.per == "position" else what
    say()
    title = f"features: mean ± standard deviation over {found.n:,} {what}, median of c{mode}"
    print_table(columns, rows, title=title)
    say()
    ends = " + ".join(f"{number(found.errors[e], 'error')}" for e in "ab")
    rows = []
    for t in found.alphas:
        errors = (found.path[t], found.mixture[t], found.bound)
        losses = (number(v, "loss") for v in (found.path_loss[t], found.mixture_loss[t]))
        rows.append([_alpha(t), *(number(v, "error") for v in errors), *losses])
    columns = [">α", ">network (%)", ">mixed outputs (%)", ">bound (%)"]
    columns += [">network (nats)", ">mixed outputs (nats)"]
    print_table(columns, rows, title=f"test error and loss; Lemma 1's bound: {ends}{mode}")


def _show_conditions(additive: Additivity | None, commuting: Commutativity | None) -> None:
    say()
    if additive is None:
        note("weak additivity: there is no ReLU among these layers, so it is left out")
    else:
        middle = min(additive.alphas, key=lambda t: abs(t - 0.5))
        rows = [
            [
                relu.name,
                f"{small(relu.distance[middle].mean)} ± {small(relu.distance[middle].std)}",
                small(relu.distance[middle].median),
                small(relu.whole[middle]),
                f"{relu.opposite:.2f}",
            ]
            for relu in additive.layers
        ]
        columns = ["", ">mean", ">median", ">whole set", ">opposite signs (%)"]
        print_table(columns, rows, title=f"weak additivity: Dist_σ at α={_alpha(middle)}")
    say()
    if commuting is None:
        note(
            "commutativity: there is no linear layer or convolution among these, so it is left out"
        )
        return
    rows = [
        [x.name, *(small(v) for v in (x.com, x.weights, x.inputs, x.ratio))]
        for x in commuting.layers
    ]
    columns = ["", ">Dist_com", ">Dist_W", ">Dist_H", ">com / smaller of W, H"]
    print_table(columns, rows, title="commutativity")


def _show_stitching(found: Stitching) -> None:
    rows = [[r.name, number(r.error, "error"), number(r.loss, "loss")] for r in found.select()]
    say()
    columns = ["", ">test error (%)", ">test loss (nats)"]
    print_table(columns, rows, title="stitching: B with its output at one layer replaced by A's")
