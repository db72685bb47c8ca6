"""Zhou et al. 2023, Theorem 1: two conditions, layer by layer, under which features average.

What the second page of chapter 3 judges and draws, of the pairs of :mod:`companion.papers.llfc`: is
a ReLU weakly additive for two networks, and does a layer commute?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from companion.experiments.featured import (
    STATISTICS,
    Featured,
    averaged,
    comparable,
    separation,
)
from companion.features import Theorem, exact, theorem1
from companion.papers import llfc
from companion.papers.llfc import (
    ACTIVATIONS,
    INDEPENDENT,
    WEIGHTS,
    Layers,
    Number,
    Study,
    mean,
)
from companion.report import page, tables
from companion.report.claims import Statistic
from companion.report.words import listed, said


def design(**parameters: Any) -> Study:
    """Chapter 3's study with the same parameters, without its sweeps over fork steps and widths."""
    study = llfc.design(**parameters)
    return replace(study, widths=study.both, ks=(study.forks[study.swept],))


# ---- numbers of one pair


ADDITIVITY: Layers = STATISTICS["Dist_σ"]
"""ReLU -> median Dist_sigma at alpha = 1/2."""


def opposite(found: Featured) -> float:
    """Percent of a ReLU's inputs whose sign differs between A and B, mean over ReLUs."""
    assert found.additivity is not None
    return mean(x.opposite for x in found.additivity.layers)


DISTANCES = {"Dist_com": "com", "Dist_W": "weights", "Dist_H": "inputs"}
"""As the paper calls them -> as :class:`companion.features.LayerCommutativity` does."""


def distances(found: Featured, of: str) -> dict[str, float]:
    """Layer -> distance or ratio, after the first layer, whose inputs are the images."""
    assert found.commutativity is not None
    return {x.name: getattr(x, of) for x in found.commutativity.layers[1:]}


# ---- claims


def _over(above: Mapping[str, float], below: Mapping[str, float]) -> dict[str, float]:
    """Layer -> quotient; NaN where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {n: float(np.divide(above[n], below[n])) for n in above}


def a06(study: Study) -> Statistic:
    """Median Dist_sigma of copies over that of independent pairs, mean over ReLUs and pairs."""

    def smaller(far: list[float], close: list[float]) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.mean(np.divide(close, far))) if far else math.nan

    return llfc.contrast(study, ADDITIVITY, smaller, "{:.2f}")


def a07(study: Study) -> Statistic:
    """Share of the layers that commute, Dist_com a tenth of the others or less; the smaller of
    copies' and matched pairs'."""
    return llfc.least_share(study, lambda f: (x <= 0.1 for x in distances(f, "ratio").values()))


BUILT: Mapping[str, tuple[bool, bool]] = {
    "both conditions": (True, True),
    "not additive": (False, True),
    "not commuting": (True, False),
}
"""Pairs of networks built for Theorem 1: whether they are weakly additive, and commute."""


def prove(widths: Sequence[int] = (20, 64, 48, 10)) -> dict[str, Theorem]:
    """Theorem 1 on built networks, in float64."""
    return {
        title: theorem1(exact(widths, additive=additive, commuting=commuting))
        for title, (additive, commuting) in BUILT.items()
    }


def a08(study: Study) -> Statistic:
    """The larger of |1 − cos| and |c − 1| on networks built to meet both conditions."""
    found = prove()
    one = found["both conditions"]
    met = one.conditions < 1e-20 and one.layers[-1].baseline > 0.01
    return Statistic(
        max(one.gap, one.c),
        detail=f"with one condition broken: {found['not additive'].gap:.2g} and "
        f"{found['not commuting'].gap:.2g}",
        note="" if met else "the networks miss a condition, or are one network",
        testable=met,
    )


def remaining(study: Study, net: str, method: str, of: str) -> dict[str, float]:
    """Layer -> share of a distance that is left after matching, of means over pairs."""
    value = partial(distances, of=of)
    before, after = (averaged(study.good[net, c], value) for c in (INDEPENDENT, method))
    return _over(after, before) if before else {}


def a12(study: Study) -> Statistic:
    """Dist_com after matching over that before, mean over layers, methods and pairs."""

    def share(one: Featured, two: Featured) -> float:
        return float(np.mean([*_over(distances(two, "com"), distances(one, "com")).values()]))

    every, told = llfc.left(study, share)
    need = (bool(every), "no pair was matched")
    return llfc.of_pairs(study, every, need, detail=listed(told))


CLAIMS = {f.__name__.upper(): f for f in (a06, a07, a08, a12)}


# ---- figures and tables


def show_theorem() -> None:
    """Theorem 1 on built networks, as a table."""
    proved = prove()
    tables.show(
        [
            "networks",
            "largest distance from the conditions",
            "largest |1 − cos|",
            "largest |c − 1|",
            "E[1 − cos(A, B)] at the output",
        ],
        [
            (n, f"{t.conditions:.1e}", f"{t.gap:.1e}", f"{t.c:.1e}", f"{t.layers[-1].baseline:.2f}")
            for n, t in proved.items()
        ],
        name="llfc-theorem",
        values={"samples": proved["both conditions"].samples},
    )


def show_additivity(study: Study) -> None:
    """Weak additivity of every ReLU, median over images (the paper's Figs. 5 and 6)."""
    form = "{:.3f}, and {:.0f} % of units with opposite signs"
    words = llfc.in_words(study, form, lambda f: mean(ADDITIVITY(f).values()), opposite)
    panels = llfc.by_network(study, ADDITIVITY)
    llfc.by_layer("llfc-additivity", panels, "Dist_σ at α = ½", told=words)
    page.fill(**llfc.of_main(study, {"opposite": opposite}))


def show_commutativity(study: Study) -> None:
    """Dist_com beside the distances of weights and inputs, layer by layer (Figs. 7, 16 to 19)."""
    numbers: dict[str, Number] = {
        "relative": lambda f: float(np.median([*distances(f, "ratio").values()])),
        "weights": lambda f: mean(distances(f, "weights").values()),
    }
    panels = llfc.by_kind(study, {d: partial(distances, of=of) for d, of in DISTANCES.items()})
    words = llfc.in_words(study, "{:.2f}", numbers["relative"])
    llfc.by_layer("llfc-commutativity", panels, "distance", told=words)
    page.fill(**llfc.of_main(study, numbers))


def show_factors(study: Study) -> None:
    """The two factors of equation 9 and their product: what matching leaves of each, mean over
    layers of the main network."""
    words = {
        "weights": "the weights’ distance, Dist_W",
        "inputs": "the inputs’ distance, Dist_H",
        "com": "that of their product, Dist_com",
    }
    methods, left = (WEIGHTS, ACTIVATIONS), partial(remaining, study, study.main.net)
    shares = {of: [mean(left(c, of).values()) for c in methods] for of in words}
    rows = [(words[of], *(said(v, "{:.0%}") for v in each)) for of, each in shares.items()]
    tables.show(["left after", *methods], rows, name="llfc-factors")


def show_separation(study: Study) -> None:
    """How well every number tells unconnected from connected pairs of the perceptrons: areas under
    ROC curves, as a table."""
    copied = {r.net for r in study.trees}
    pairs = [f for (n, _), fs in study.good.items() if n not in copied for f in fs]
    found = {s: separation(comparable(pairs), value) for s, value in STATISTICS.items()}
    areas = {s: (x.pooled, x.worst, x.output) for s, x in found.items()}
    tables.show(
        ["number", "hidden layers, together", "hidden layers, the worst one", "output"],
        [(s, *("—" if math.isnan(v) else f"{v:.2f}" for v in row)) for s, row in areas.items()],
        name="llfc-separation",
    )
    ratio = found["R, their ratio"]
    pooled = {s: x.pooled for s, x in found.items() if not math.isnan(x.pooled)}
    best = max(pooled, key=lambda s: pooled[s], default="none")
    page.fill(unconnected_pairs=ratio.pairs[0], connected_pairs=ratio.pairs[1])
    page.fill(ratio_pooled=ratio.pooled, ratio_output=ratio.output)
    page.fill(best=best, best_pooled=pooled.get(best, math.nan))
