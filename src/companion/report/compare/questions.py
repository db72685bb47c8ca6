"""What is asked, at which cost: a function a question, registered in the order of a report.

To add one, write its function below and :func:`register` it. It gets the :class:`Case` and returns
the values of its answer, under the names that the single command's ``--json`` has; what a later
question needs it leaves in ``case.found``. What it costs is told before, in seconds of CPU time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from companion.connectivity import BN_MODES, gates
from companion.core.effective import effective
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import Theta, distance, is_continuous, layout
from companion.experiments.landscape import Survey, geometry
from companion.experiments.methods import Aligned, Method, aligned
from companion.features import features
from companion.landscape import logit_gap
from companion.layerwise import Sweep, sweep
from companion.rebasin import (
    Merged,
    Spec,
    derive,
    merge_many,
    repair,
    reset_batchnorm,
    triangle_defect,
)
from companion.rebasin.repair import averaged
from companion.report.compare.case import Case, Reading, means
from companion.report.compare.value import Json

KEY = Key("rebasin", "cli", 0)
"""Of all random choices: that of ``companion rebasin --seed 0``, so that numbers are the same."""

FEW_LAYERS = 40
"""More layers than these are taken block by block."""

STEPS = 20
"""Of Frank-Wolfe, that C2M3 usually takes."""

SLOPES = 100
"""Training examples that slopes and curvatures are of, at most: they are in float64."""

Ask = Callable[[Case], Mapping[str, Any]]
Cost = Callable[[Case], float]


@dataclass(frozen=True)
class Question:
    """One question to networks.

    Arguments:
        name: of the answer.
        title: as a person asks it.
        ask: its function.
        cost: seconds of CPU time that it will take, roughly.
        command: the line that repeats it.
        many: whether it is of three networks and more, of two, or (None) of both.
        data: it needs data.
        module: it needs the architecture.
        gated: it says something of two trained networks, and nothing of others.
        after: questions that are asked before.
        needs: likewise, and they must have been answered.
    """

    name: str
    title: str
    ask: Ask
    cost: Cost
    command: Callable[[Case], str]
    many: bool | None = False
    data: bool = True
    module: bool = True
    gated: bool = True
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


QUESTIONS: dict[str, Question] = {}
"""Name -> question, in the order of the report."""


def register(name: str, title: str, **facts: Any) -> Callable[[Ask], Ask]:
    """Make a function a question. Arguments as :class:`Question`."""
    facts.setdefault("command", lambda case: "")

    def add(ask: Ask) -> Ask:
        QUESTIONS[name] = Question(name, title, ask, **facts)
        return ask

    return add


# --- costs: seconds of CPU time, of a measured forward pass and of the sizes of the network


def _examples(case: Case) -> int:
    return sum(map(len, case.splits.values()))


def _average(case: Case) -> int:
    """Inputs that norms average over at a point."""
    if not case.batchnorm or case.train is None:
        return 0
    return min(case.how.bn_examples or len(case.train), len(case.train))


def _seen(case: Case) -> int:
    n = 0 if case.train is None else len(case.train)
    return min(case.how.train_examples or n, n)


def _line(case: Case) -> float:
    """One line in all BatchNorm modes, with its margins."""
    modes = len(BN_MODES) if case.batchnorm else 1
    a_point = modes * _examples(case) + _average(case)
    points = (case.how.points + 3) * (case.pace * a_point + 6e-9 * modes * case.weights)
    return points + 4 * case.pace * _examples(case)


def _matching(case: Case) -> float:
    """Weight matching: a product of matrices and an assignment for each layer and pass."""
    return 1.0 + 1e-7 * case.weights + 3 * _step(case)


def _step(case: Case, products: int = 1) -> float:
    """One assignment for each layer, and so many products of its matrices."""
    sizes = [v.shape for v in case.thetas[0].values() if v.ndim > 1]
    each = sum(4 * s[0] * math.prod(s) for s in sizes)
    return products * each / 2e10 + sum(s[0] ** 3 for s in sizes) * 1e-9


def _pairs(case: Case) -> int:
    return math.comb(len(case.thetas), 2)


# --- two networks, or more


@register(
    *("weights", "How far apart are their weights?"),
    cost=lambda case: 0.1 + 1e-7 * case.weights,
    many=None,
    data=False,
    module=False,
    gated=False,
)
def _weights(case: Case) -> Json:
    """Distances and angles, of the networks and of their layers."""
    if case.module is None and (unlike := _unlike(case)):
        return unlike
    thetas, groups = _comparable(case)
    names = [n for group in groups.values() for n in group]
    pairs = {}
    for i, j in combinations(range(len(thetas)), 2):
        a, b = thetas[i], thetas[j]
        pairs[f"{case.letters[i]}, {case.letters[j]}"] = {
            **_apart(a, b, names),
            "cosine of matrices": _apart(a, b, [n for n in names if a[n].ndim > 1])["cosine"],
            "tensors": len(names),
            "equal tensors": sum(torch.equal(a[n], b[n]) for n in names),
        }
    norms = [float(_norm(t, names)) for t in thetas]
    found: Json = {"parameters": case.weights, "norms": dict(zip(case.letters, norms, strict=True))}
    if case.init is not None:
        (start,), _ = _comparable(case, (case.init,))
        found["from init"] = {
            letter: distance(t, start, names)
            for letter, t in zip(case.letters, thetas, strict=True)
        }
    if len(pairs) > 1:
        return found | {"pairs": pairs}
    (of_pair,) = pairs.values()
    layers = {label: _apart(thetas[0], thetas[1], own) for label, own in groups.items()}
    return found | of_pair | {"layers": layers}


def _unlike(case: Case) -> Json:
    """What networks of no known architecture have not in common; empty if nothing."""
    first = case.thetas[0]
    found: Json = {}
    for letter, theta in zip(case.letters[1:], case.thetas[1:], strict=True):
        shapes = {n: [list(first[n].shape), list(theta[n].shape)] for n in first if n in theta}
        found |= {
            f"only in A, not in {letter}": [n for n in first if n not in theta],
            f"only in {letter}, not in A": [n for n in theta if n not in first],
            f"shapes in A and {letter}": {n: s for n, s in shapes.items() if s[0] != s[1]},
        }
    found = {k: v for k, v in found.items() if v}
    if not found:
        return {}
    counts = "; ".join(
        f"{len(v)} {'shapes differ' if 'shapes' in k else k}" for k, v in found.items()
    )
    return {
        "apart": f"They are no networks of one architecture: {counts} (of {len(first)}).",
        **found,
    }


def _comparable(
    case: Case, given: tuple[Theta, ...] | None = None
) -> tuple[list[Theta], dict[str, tuple[str, ...]]]:
    """The networks as the weights that layers compute with, and their parameters layer by layer."""
    given = case.thetas if given is None else given
    if case.module is not None:
        space = effective(case.module)
        entries = layout(space.module)
        own = set(entries.parameters)
        kept = {k: tuple(n for n in v if n in own) for k, v in entries.groups.items()}
        return [space.enter(t) for t in given], {k: v for k, v in kept.items() if v}
    groups: dict[str, list[str]] = {}
    for name, value in case.thetas[0].items():
        if is_continuous(value):
            groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return list(given), {k: tuple(v) for k, v in groups.items()}


def _norm(theta: Theta, names: Sequence[str]) -> float:
    squares = (float(torch.linalg.vector_norm(theta[n].double().cpu())) ** 2 for n in names)
    return math.sqrt(sum(squares))


def _apart(a: Theta, b: Theta, names: Sequence[str]) -> dict[str, float]:
    """Distance, the same as a share of the mean norm, and the cosine of the angle at the origin."""
    far, one, two = distance(a, b, names), _norm(a, names), _norm(b, names)
    mean = (one + two) / 2
    # Of |a - b|^2: no third pass, and exactly 1 for equal networks.
    cosine = (one**2 + two**2 - far**2) / (2 * one * two) if one and two else math.nan
    return {"distance": far, "relative": far / mean if mean else math.nan, "cosine": cosine}


@register(
    *("ends", "Has each of them been trained?"),
    cost=lambda case: case.pace * _examples(case) * len(case.thetas),
    many=None,
    gated=False,
)
def _ends(case: Case) -> Json:
    """Loss and error of each network, and the gates that a pair has to pass."""
    readings = case.read({n: (case.net, t) for n, t in zip(case.letters, case.thetas, strict=True)})
    case.found["ends"] = readings
    held = case.splits[case.held_out]
    errors = {name: of[case.held_out].mean()["error"] for name, of in readings.items()}
    classes = case.classes or 1 + int(held.y.max())
    space = effective(case.net)
    names, entered = layout(space.module).parameters, [space.enter(t) for t in case.thetas]
    bounds: Any = {"guess": gates.guessing(held), "commonest": gates.commonest(held)}
    bounds |= {"max_error": case.max_error}
    trained = {n: gates.quality((e,), classes, **bounds).passed for n, e in errors.items()}
    checks = [gates.quality(list(errors.values()), classes, **bounds)]
    checks += [gates.distinct(a, b, names) for a, b in combinations(entered, 2)]
    bad = [str(g) for g in checks if g.passed is False]
    # Of three or more the others may be compared without the one that failed.
    case.found["gates"] = bad if len(case.letters) == 2 else []
    return {
        "networks": means(readings),
        "gates": [str(g) for g in checks],
        "valid": not bad,
        "trained": trained,
        "split": case.held_out,
        "metric": case.metric,
        "examples": {name: len(s) for name, s in case.splits.items()},
    }


# --- two networks


def _as_measured(case: Case) -> list[object]:
    words: list[object] = ["--points", case.how.points, *case.examples()]
    if case.batchnorm:
        words += ["--bn", case.how.bn, "--bn-examples", case.how.bn_examples or 0]
    return words


@register(
    *("barrier", "Is the straight line between them low?"),
    cost=_line,
    after=("ends",),
    command=lambda case: case.command("barrier", *_as_measured(case)),
)
def _barrier(case: Case) -> Json:
    case.found["barrier"], values = case.line(*case.pair)
    return values


def _rebasin(case: Case, kind: str, *words: object) -> str:
    method = case.method(kind)
    given = ["--method", method.name, "-o", "b_aligned.safetensors"]
    if method.examples is not None and (method.kind.data or words):
        given += ["--match-examples", str(method.examples)]
    return case.command("rebasin", *given, *words, *(_as_measured(case) if case.splits else []))


def _align(case: Case, kind: str) -> Json:
    """B brought to A, and with data the barrier behind it."""
    method = case.method(kind)
    if case.example is None:
        raise BadParameter(
            "what may move is proven on an example: give data, or the shape of an example."
        )
    train = case.train if method.kind.data else None
    known = case.found.get("symmetries")
    here = aligned(method, *case.pair, case.example, train, KEY, known)
    case.found["symmetries"], case.found[kind] = here.symmetries, here
    values: Json = dict(here.about())
    names = layout(here.module).parameters
    same = all(torch.equal(here.a[n], here.b[n]) for n in names)
    values["equal"] = same
    values["distances"] = {
        "before": distance(here.a, here.before, names),
        "after": distance(here.a, here.b, names),
    }
    if case.splits:
        values |= case.line(here.module, here.a, here.b, same_noise=same)[1]
    return values


@register(
    *("matched", "Is it low once B is brought to A, by their weights?"),
    cost=lambda case: _matching(case) + (_line(case) if case.splits else 0.0),
    data=False,
    after=("barrier",),
    command=lambda case: _rebasin(case, "weights"),
)
def _matched(case: Case) -> Json:
    return _align(case, "weights")


@register(
    *("activation_matched", "Is it low once B is brought to A, by their activations?"),
    cost=lambda case: 10 * case.pace * _seen(case) + _matching(case) / 5 + _line(case),
    after=("matched",),
    command=lambda case: _rebasin(case, "activations"),
)
def _activation_matched(case: Case) -> Json:
    case.seen  # noqa: B018  there are training data
    return _align(case, "activations")


def _half_way(case: Case, here: Aligned | None, *, mend: bool = False) -> Theta:
    """The network half-way, as ``companion rebasin --merge`` writes it."""
    module, a, b = case.pair if here is None else (here.module, here.a, here.b)
    if mend:
        return repair(module, a, b, case.seen.x).theta
    if case.batchnorm and case.train is not None:
        return repair(module, a, b, case.seen.x, layers=()).theta
    return averaged(module, (a, b), (0.5, 0.5))


@register(
    *("repaired", "What does REPAIR make of the network half-way?"),
    cost=lambda case: case.pace * (8 * _seen(case) + 3 * _examples(case)),
    after=("matched",),
    needs=("matched",),
    command=lambda case: _rebasin(
        case, "weights", "--merge", "merged.safetensors", "--repair", "forward"
    ),
)
def _repaired(case: Case) -> Json:
    here = case.found["weights"]
    reading = case.read({"merged": (here.module, _half_way(case, here, mend=True))})
    case.found["repaired"] = reading["merged"]
    return {"alpha": 0.5, "repair": "forward", "networks": means(case.found["ends"] | reading)}


def _merge(case: Case, of: Sequence[int], *words: object) -> str:
    look = ["--match-examples", case.how.train_examples] if case.how.train_examples else []
    return case.command(
        "merge", "-o", "merged.safetensors", *words, *look, *_as_measured(case), of=of
    )


@register(
    *("merged", "What is a merge worth, and what their ensemble?"),
    cost=lambda case: case.pace * (6 * _seen(case) + 6 * _examples(case)),
    after=("matched", "activation_matched", "repaired"),
    needs=("ends",),
    command=lambda case: _merge(case, (0, 1)),
)
def _merged(case: Case) -> Json:
    """The networks half-way, of which the one with the lowest training loss counts."""
    here = {"half-way": None, "half-way, matched": case.found.get("weights")}
    here["half-way, matched by activations"] = case.found.get("activations")
    wanted = {n: one for n, one in here.items() if one is not None or n == "half-way"}
    networks = {
        n: (case.net if one is None else one.module, _half_way(case, one))
        for n, one in wanted.items()
    }
    made = case.read(networks)
    if "repaired" in case.found:
        made["half-way, matched and repaired"] = case.found["repaired"]
    return _worth(case, made)


def _worth(case: Case, made: Mapping[str, Mapping[str, Reading]]) -> Json:
    """Merged networks beside their ends and their ensemble, on the split that is held out."""
    ends: Mapping[str, Mapping[str, Reading]] = case.found["ends"]
    ensemble = case.ensemble()
    judge = "train" if "train" in case.splits else case.held_out
    chosen = min(made, key=lambda n: made[n][judge].mean()["loss"])
    held, metric = case.held_out, case.metric
    best = min(ends, key=lambda n: ends[n][held].mean()[metric])
    against = {}
    for name, one in ((chosen, made[chosen]), ("ensemble", ensemble)):
        above, width = one[held].above([ends[best][held]])
        against[name] = {"above": above, "margin": width}
    return {
        "networks": means({**ends, **made, "ensemble": ensemble}),
        "chosen": chosen,
        "best end": best,
        "against": against,
    }


def _by(case: Case) -> str:
    """What a layer is."""
    if case.splits[case.held_out].kind == "text":
        return "part"
    return "module" if len(layout(case.net).groups) <= FEW_LAYERS else "block"


@register(
    *("layers", "Which layers make the barrier?"),
    cost=lambda case: (
        case.pace * _examples(case) * (4 * min(FEW_LAYERS, len(layout(case.net).groups)) + 8)
    ),
    after=("barrier",),
    command=lambda case: case.command("layers", "--by", _by(case), "--points", 1, *case.examples()),
)
def _layers(case: Case) -> Json:
    how = Sweep(
        by=_by(case),
        points=1,
        train_examples=case.how.train_examples,
        test_examples=case.how.test_examples,
    )
    more: Any = {"bn_data": case.train, "classes": case.classes, "max_error": case.max_error}
    found = sweep(*case.pair, case.splits, how, **more)
    return {
        "settings": how.identity(),
        "valid": found.valid,
        "heights": found.all_heights(),
        "layers": found,
    }


def _bn_of_features(case: Case) -> str:
    return "reestimate" if case.batchnorm and case.train is not None else "interpolate"


def _feature_words(case: Case) -> list[object]:
    words: list[object] = ["--alphas", 0.5, "--bn", _bn_of_features(case)]
    words += ["--examples", len(case.splits[case.held_out])]
    return words + (["--bn-examples", case.how.bn_examples or 0] if case.batchnorm else [])


@register(
    *("features", "Are their features linearly connected?"),
    cost=lambda case: 12 * case.pace * len(case.splits[case.held_out]),
    after=("barrier",),
    command=lambda case: case.command("features", *_feature_words(case)),
)
def _features(case: Case) -> Json:
    found = features(
        *case.pair,
        case.splits[case.held_out],
        alphas=(0.5,),
        bn=_bn_of_features(case),
        bn_data=case.train,
        bn_examples=case.how.bn_examples,
    )
    return {"valid": True, "features": {found.bn: found}}


def _few(case: Case) -> int:
    return min(SLOPES, len(next(iter(case.splits.values()))))


@register(
    *("curvature", "How curved is the loss between them, and what does that lead to expect?"),
    cost=lambda case: case.pace * (250 * _few(case) + 12 * _examples(case)),  # in float64
    after=("barrier",),
    command=lambda case: case.command(
        *("landscape", "--by", "none", "--eigenvalues", 0, "--points", 3),
        *("--train-examples", _few(case), *case.examples()[2:]),
    ),
)
def _curvature(case: Case) -> Json:
    first = next(iter(case.splits))
    splits = {**case.splits, first: case.splits[first].head(_few(case))}
    bases = {} if case.init is None else {"init": (case.init, case.init)}
    found = geometry(*case.pair, splits, Survey(points=3, by=None), bases)
    gap = logit_gap(*case.pair, splits[first])
    return {
        "valid": True,
        "barrier": {split: found.barrier(split) for split in splits},
        "predictions": found.predictions(),
        "controls": found.controls(),
        "logits": gap,
        "landscape": found,
        "angle": {n: math.degrees(math.acos(c)) for n, c in found.cosines.items()},
    }


# --- three networks and more


def _ways(case: Case) -> Iterator[tuple[int, int]]:
    return combinations(range(len(case.thetas)), 2)


def _matrix(case: Case, lines: Mapping[tuple[int, int], Json]) -> Json:
    """Barriers of all pairs, as judged: null where a gate failed."""
    n, held, metric = len(case.thetas), case.held_out, case.metric
    heights: list[list[float | None]] = [[None] * n for _ in range(n)]
    margins: list[list[float | None]] = [[None] * n for _ in range(n)]
    for (i, j), line in lines.items():
        if line["valid"]:
            height, margin = line["heights"][held][metric]["mean"], line["margin"][held][metric]
            heights[i][j] = heights[j][i] = height
            margins[i][j] = margins[j][i] = margin
    return {
        "names": list(case.names),
        "split": held,
        "metric": metric,
        "heights": heights,
        "margins": margins,
        "lines": {f"{case.letters[i]}, {case.letters[j]}": v for (i, j), v in lines.items()},
        "commands": {
            f"{case.letters[i]}, {case.letters[j]}": case.command(
                "barrier", *_as_measured(case), of=(i, j)
            )
            for i, j in lines
        },
    }


@register(
    *("pairs", "Are the straight lines between them low?"),
    cost=lambda case: _pairs(case) * _line(case),
    many=True,
    after=("ends",),
)
def _all_pairs(case: Case) -> Json:
    return _matrix(
        case,
        {(i, j): case.line(case.net, case.thetas[i], case.thetas[j])[1] for i, j in _ways(case)},
    )


@register(
    *("triangle", "Do the matchings of the pairs agree?"),
    cost=lambda case: _pairs(case) * _matching(case),
    many=True,
    data=False,
    gated=False,
)
def _triangle(case: Case) -> Json:
    """Weight matching of every pair, and the share of units that end elsewhere by a third one."""
    spec = _spec(case)
    method = Method("weights")
    found = {
        (i, j): aligned(
            method, case.net, case.thetas[i], case.thetas[j], spec.example, None, KEY, spec
        )
        for i, j in _ways(case)
    }
    case.found["matchings"] = found
    perms = {pair: one.found.perms for pair, one in found.items() if one.found is not None}
    defects = {}
    for corners in combinations(range(len(case.thetas)), 3):
        own = {pair: perms[pair] for pair in combinations(corners, 2)}
        label = ", ".join(case.letters[i] for i in corners)
        defects[label] = triangle_defect(spec, own)
    return {
        "defects": defects,
        "defect": triangle_defect(spec, perms),
        "units": sum(p.numel() for p in spec.identity().values()),
        "matchings": {
            f"{case.letters[i]}, {case.letters[j]}": one.about()["matching"]
            for (i, j), one in found.items()
        },
    }


def _spec(case: Case) -> Spec:
    """The permutations of the architecture, derived once."""
    if "spec" not in case.found:
        if case.example is None:
            raise BadParameter(
                "what may move is proven on an example: give data, or the shape of an example."
            )
        spec = derive(case.net, case.example, unread="hold")
        if not spec.groups:
            raise BadParameter(f"there is nothing to match: {spec.why_none()}.")
        case.found["spec"] = spec
    known: Spec = case.found["spec"]
    return known


@register(
    *("matched_pairs", "Are they low once the units of each pair are matched?"),
    cost=lambda case: _pairs(case) * _line(case),
    many=True,
    after=("pairs", "triangle"),
    needs=("triangle",),
)
def _matched_pairs(case: Case) -> Json:
    lines = {
        pair: case.line(one.module, one.a, one.b)[1]
        for pair, one in case.found["matchings"].items()
    }
    return _matrix(case, lines)


@register(
    *("merged_many", "What is a merge of all of them worth, and what their ensemble?"),
    cost=lambda case: (
        len(case.thetas) * 2 * _matching(case)
        + case.pace * (2 * _seen(case) + 4 * len(case.thetas) * _examples(case))
    ),
    many=True,
    after=("ends", "triangle"),
    needs=("ends",),
    command=lambda case: _merge(case, range(len(case.thetas))),
)
def _merged_many(case: Case) -> Json:
    spec, thetas = _spec(case), case.thetas
    found = merge_many(spec, thetas, key=KEY)
    networks = {"mean": _mean(case, thetas), "merged": _mean(case, _moved(case, found))}
    made = case.read({n: (case.net, theta) for n, theta in networks.items()})
    case.found["merged_many"] = found, made
    return _worth(case, made) | {"matching": found.summary()}


@register(
    *("merged_c2m3", "Is a merge better in the one order that all of them agree on?"),
    cost=lambda case: (
        len(case.thetas) * (STEPS * _step(case, 8) + _matching(case))
        + case.pace * (_seen(case) + 2 * len(case.thetas) * _examples(case))
    ),
    many=True,
    after=("merged_many",),
    needs=("ends", "merged_many"),
    command=lambda case: _merge(case, range(len(case.thetas)), "--method", "c2m3"),
)
def _merged_c2m3(case: Case) -> Json:
    """C2M3 goes on where MergeMany ended, with all networks and layers at once."""
    spec, (start, made) = _spec(case), case.found["merged_many"]
    found = merge_many(spec, case.thetas, key=KEY, method="c2m3", start=start)
    theta = _mean(case, _moved(case, found))
    made = made | case.read({"merged by C2M3": (case.net, theta)})
    perms = {(i, j): found.between(i, j) for i, j in _ways(case)}
    more = {"matching": found.summary(), "defect": triangle_defect(spec, perms)}
    return _worth(case, made) | more


def _moved(case: Case, found: Merged) -> list[Theta]:
    """All networks in the order of the first."""
    return [found.spec.permute(t, found.between(0, i)) for i, t in enumerate(case.thetas)]


def _mean(case: Case, thetas: Sequence[Theta]) -> Theta:
    """The mean, with BatchNorm's statistics estimated again."""
    theta = averaged(case.net, thetas, [1 / len(thetas)] * len(thetas))
    if not case.batchnorm or case.train is None:
        return theta
    return reset_batchnorm(case.net, theta, case.seen.x)


def asked(case: Case) -> list[Question]:
    """The questions to these networks, in the order of the report."""
    many = len(case.thetas) > 2
    return [q for q in QUESTIONS.values() if q.many in (None, many)]
