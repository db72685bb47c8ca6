"""Chapter 4's claims on made-up results: each comes out reproduced, not, and undetermined once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from companion.connectivity import Barrier, Curve
from companion.connectivity.gates import Gate
from companion.core.errors import BadParameter
from companion.experiments.layers import LayerSweep
from companion.layerwise import LayerBarriers, Row
from companion.papers import federated, layerwise
from companion.report import claims, page
from companion.report.words import MISSING
from companion.training import engine

SHARED: dict[str, Any] = {
    "dataset": "digits",
    "net": None,
    "steps": None,
    "lr": None,
    "batch": None,
    "train_examples": 500,
    "test_examples": None,
    "precision": "float32",
    "device": "cpu",
    "workers": 1,
}
PAGE: dict[str, Any] = {
    **SHARED,
    "plain": None,
    "others": None,
    "inits": 3,
    "looks": 5,
    "checkpoints": None,
    "together": True,
    "controls": True,
    "window": 5,
    "draws": 3,
    "max_error": 15.0,
}
CLIENTS: dict[str, Any] = {
    **SHARED,
    "apart_steps": None,
    "client_net": "mlp:widths=8x5",
    "client_steps": 20,
    "clients": 5,
    "seeds": 3,
    "pairs": 2,
}
LAYERS = [f"layer{i}" for i in range(1, 22)]
LOSS, ERROR = 0.1, 2.0  # of both networks


def pair(
    full: float = 1.0,
    layer: float = 0.01,
    *,
    bad: Mapping[str, float] | None = None,
    errors: tuple[float, float] = (40.0, 1.0),
    shallow: Sequence[float] = (),
    windows: Sequence[float] = (0.1, 0.5, 0.1),
    random: float = 0.0,
    last: float = 0.0,
    wrong: float = 0.0,
    valid: bool = True,
) -> LayerBarriers:
    """Made-up barriers of a pair of networks with 21 layers.

    Arguments:
        full, layer: of the loss, of the whole network and of every layer; bad: of some layers.
        errors: of the test error, in points, of the whole network and of every layer.
        shallow: of the first k layers, k = 1, …; what is not given has none, the last has ``full``.
        windows: one a window. random: rise in random directions. last: what the last cumulative
            step misses. wrong: error on training images, percent. valid: whether it trained.
    """

    def curve(loss: float, error: float = 0.0) -> Curve:
        values = {
            "train": {"loss": (LOSS + loss,), "error": (wrong + error,)},
            "test": {"loss": (LOSS + loss,), "error": (ERROR + error,)},
        }
        return Curve((0.5,), values, "none", {"train": 100, "test": 100})

    def both(kind: str, label: str, groups: Sequence[str], drawn: Curve) -> list[Row]:
        return [Row(kind, label, tuple(groups), rest, None, 1.0, drawn) for rest in "ab"]

    heights = dict.fromkeys(LAYERS, layer) | dict(bad or {})
    rows = both("full", "full", LAYERS, curve(full, errors[0]))
    for name, height in heights.items():
        rows += both("single", name, [name], curve(height, errors[1]))
    for kind in ("shallow", "deep"):
        for k in range(1, len(LAYERS) + 1):
            height = dict(enumerate(shallow, 1)).get(k, 0.0)
            height = full + last if k == len(LAYERS) else height
            rows += both(kind, f"first {k}", LAYERS[:k], curve(height))
    for place, height in enumerate(windows):
        rows += both("window", f"window {place}", LAYERS[place : place + 5], curve(height))
    for kind, names in (("single", LAYERS), ("full", ["full"])):
        for name in names:
            rows += [Row(kind, name, (name,), r, 0, 1.0, curve(random)) for r in "ab"]
    gates = (Gate("G0 quality", valid, "made up"),)
    whole = Barrier({"none": curve(full)}, "none", gates, 1.0, 10, (ERROR, ERROR))
    ends = {
        "train": {"loss": (LOSS, LOSS), "error": (wrong, wrong)},
        "test": {"loss": (LOSS, LOSS), "error": (ERROR, ERROR)},
    }
    return LayerBarriers({n: (n,) for n in LAYERS}, tuple(rows), whole, ends, "replay")


def three(*fulls: float, **of: Any) -> list[LayerBarriers]:
    """Three pairs whose whole networks have these barriers in turn."""
    fulls = fulls or (1.0,)
    return [pair(fulls[i % len(fulls)], **of) for i in range(3)]


@functools.cache
def designed(module: Any, **changed: Any) -> Any:
    """A study of the page's parameters, or of others; designing one takes a while."""
    return module.design(**{**(PAGE if module is layerwise else CLIENTS), **changed})


def study_with(changed: Mapping[str, Any] | None = None, /, **found: Any) -> layerwise.Study:
    """A study on ``digits`` whose experiments found this; what is not given is as claimed."""
    study: layerwise.Study = replace(designed(layerwise, **(changed or {})))
    usual: dict[str, Any] = {
        "ends": dict.fromkeys(study.recipes, three()),
        "along": {s: [pair(0.0, 0.0) if s == 0 else pair()] * 3 for s in study.places},
        "regimes": {r: three()[:2] for r in (*study.gentle, *study.variants)},
        "noise": ({kind: [2.0, 2.1, 2.2] for kind in layerwise.DIRECTIONS}, [(100, 2)] * 3),
    }
    vars(study).update(usual | found)
    return study


def residual(*fulls: float, **of: Any) -> layerwise.Study:
    """The residual network's pairs at the end."""
    study = study_with()
    vars(study)["ends"] = {**study.ends, study.residual: three(*fulls, **of)}
    return study


def mixed(name: str, *values: Any, **of: Any) -> layerwise.Study:
    """The residual network's, which differ in one thing."""
    study = study_with()
    found = [pair(**{name: value}, **of) for value in values]
    vars(study)["ends"] = {**study.ends, study.residual: found}
    return study


def plain(*fulls: float, **of: Any) -> layerwise.Study:
    """The plain network's."""
    study = study_with()
    vars(study)["ends"] = {**study.ends, study.convolutional: three(*fulls, **of)}
    return study


def wrong_example() -> layerwise.Study:
    example = layerwise.minimal()
    return study_with(example={**example, "layer 1 of A": (2.26, 2.25)})


Case = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any] | None]
ONE = {"layer3": 0.1}
FULLS = (0.8, 1.0, 1.2)

# Claim -> results under which it is reproduced, under which it is not, and under which neither
# (None: a theorem, which has no interval).
CASES: dict[str, Case] = {
    "B01": (
        lambda: residual(0.8, 0.9, 1.0),
        lambda: residual(0.2, 0.3, 0.25),
        lambda: residual(0.3, 0.4, 0.6),
    ),
    "B02": (
        lambda: residual(layer=0.05),
        lambda: residual(bad={"layer3": 0.5}),
        lambda: residual(*FULLS, bad=ONE),
    ),
    "B03": (
        lambda: residual(errors=(40.0, 2.9)),
        lambda: residual(errors=(40.0, 3.2)),
        lambda: mixed("errors", (40.0, 1.0), (40.0, 3.0), (40.0, 5.0)),
    ),
    "B04": (study_with, lambda: residual(last=0.001), None),
    "B05": (
        lambda: residual(windows=(0.1, 0.31, 0.05)),
        lambda: residual(windows=(0.3, 0.1, 0.3)),
        lambda: mixed("windows", (0.1, 0.3, 0.1), (0.1, 0.1, 0.1), (0.3, 0.2, 0.2)),
    ),
    "B06": (
        lambda: residual(shallow=(0.1, 0.1, 0.1, 0.19, 0.9)),
        lambda: residual(shallow=(0.1, 0.1, 0.1, 0.21)),
        lambda: mixed("shallow", (0.1,), (0.2,), (0.3,)),
    ),
    "B07": (
        lambda: residual(layer=0.04),
        lambda: residual(layer=0.05),
        lambda: residual(*FULLS, layer=1 / 21),
    ),
    "B08": (
        lambda: study_with(linear=([0.0, 1.0], [-0.5])),
        lambda: study_with(linear=([-0.1, 1.0], [-0.5])),
        None,
    ),
    "B09": (study_with, wrong_example, None),
    "B10": (
        lambda: residual(random=0.004),
        lambda: residual(random=0.006),
        lambda: mixed("random", 0.003, 0.005, 0.007),
    ),
    "B12": (
        lambda: plain(layer=0.05),
        lambda: plain(bad={"layer3": 0.5}),
        lambda: plain(*FULLS, bad=ONE),
    ),
    "B17": (
        lambda: residual(random=0.4),
        lambda: residual(random=0.6),
        lambda: mixed("random", 0.3, 0.5, 0.7),
    ),
}
UNTESTED = {"B18", "B19"}


def clients(**given: Sequence[float]) -> federated.Study:
    """Clients with this accuracy, one a seed: ``mild_shallow``; what is not given has 90 %."""
    study: federated.Study = replace(designed(federated))
    vars(study)["accuracy"] = {
        (kind, group, seed): given.get(f"{kind}_{group}", (90.0, 90.0, 90.0))[seed]
        for kind in study.splits
        for group in federated.GROUPS
        for seed in range(3)
    }
    vars(study)["between"] = [pair()] * 4
    return study


def apart(*found: LayerBarriers) -> federated.Study:
    """Pairs of clients that never average, in two splits, trained for long enough."""
    study: federated.Study = replace(designed(federated), pairs=len(found) // 2, enough=100)
    vars(study)["between"] = list(found)
    return study


BETTER, MIXED, WORSE = (92.5, 93.0, 93.5), (88.0, 90.0, 92.0), (80.0, 81.0, 82.0)
ALL_WORSE = {f"pathological_{group}": WORSE for group in federated.PARTIAL}
FEDERATED: dict[str, Case] = {
    "B14": (
        lambda: apart(*[pair(layer=0.05)] * 4),
        lambda: apart(*[pair(bad={"layer3": 0.5})] * 4),
        lambda: apart(*[pair(layer=0.05), pair(layer=0.15)] * 2),
    ),
    "B15": (
        lambda: clients(pathological_deep=BETTER),
        lambda: clients(pathological_deep=BETTER, mild_body=BETTER),
        lambda: clients(pathological_deep=MIXED),
    ),
}
EVERY = [
    (module, id, made)
    for module, cases in ((layerwise, CASES), (federated, FEDERATED))
    for id, made in cases.items()
]


def filled(draw: Callable[[Any], None], study: Any) -> dict[str, Any]:
    """What a figure or a table hands to the prose around it."""
    with page.captured() as found:
        draw(study)
    return {name: value for values in found.all("values") for name, value in values.items()}


def verdict(module: Any, id: str, study: Any) -> claims.Verdict:
    """The verdict of one claim by its rule in data/claims.yaml."""
    (found,) = claims.verdicts({id: module.CLAIMS[id]}, study)
    return found


@pytest.mark.parametrize(("module", "id", "made"), EVERY, ids=[id for _, id, _ in EVERY])
def test_a_claim_is_reproduced_by_some_results_and_not_by_others(
    module: Any, id: str, made: Case
) -> None:
    words = ("reproduced", "not reproduced", "undetermined")
    for word, results in zip(words, made, strict=True):
        if results:
            assert verdict(module, id, results()).verdict == word


def test_every_claim_of_both_pages_has_its_function_and_its_case() -> None:
    for module, cases, chapter in (
        (layerwise, CASES, "04_layerwise"),
        (federated, FEDERATED, "04b_federated"),
    ):
        known = {c.id: c for c in claims.registry().values() if c.chapter == chapter}
        judged = {id for id, c in known.items() if c.test["op"] != "report"}
        assert list(module.CLAIMS) == sorted(known) and set(cases) == judged - UNTESTED
        theorems = {id for id, made in cases.items() if made[2] is None}
        assert theorems == {id for id in cases if known[id].kind == "theorem"}


def test_what_no_profile_trains_says_so() -> None:
    for id in UNTESTED:
        found = verdict(layerwise, id, study_with())
        assert found.verdict == claims.NOT_TESTABLE and "no profile" in found.note
        assert not found.claim.profiles


def test_what_is_only_reported() -> None:
    study = study_with()
    vars(study)["regimes"] = {study.gentle[0]: [pair(0.1), pair(0.3)]}
    found = verdict(layerwise, "B11", study)
    assert (found.verdict, found.value, found.n) == ("reported", pytest.approx(0.2), 2)
    kinds = {kind: [1.0, 1.0, 1.0] for kind in layerwise.DIRECTIONS}
    kinds |= {"inside": [30.0, 10.0, 20.0], "outside": [1.0, 2.0, 1.0]}
    study = study_with(noise=(kinds, [(100, 2)] * 3))
    found = verdict(layerwise, "B16", study)
    # The mean of the pairs' ratios, not the ratio of the means (15), and the page says the same.
    assert (found.verdict, found.value) == ("reported", pytest.approx(55 / 3))
    assert filled(layerwise.show_noise, study)["noise_times"] == "18.3"


def test_what_lacks_its_premise_is_not_judged() -> None:
    alone = study_with({"inits": 1})
    vars(alone)["ends"] = {recipe: [pair()] for recipe in alone.recipes}
    for id in ("B01", "B02", "B03", "B05", "B06", "B07", "B10", "B16", "B17"):
        assert "one pair decides nothing" in verdict(layerwise, id, alone).note, id
    assert "fewer than two" in verdict(layerwise, "B12", alone).note
    for id in ("B02", "B03", "B07"):
        assert "cut short: 20 %" in verdict(layerwise, id, residual(wrong=20.0)).note, id
    for id in ("B02", "B05", "B06", "B07", "B10", "B11", "B17"):
        assert "no barrier of the whole" in verdict(layerwise, id, residual(0.05)).note, id
    left_out = study_with({"together": False, "controls": False})
    for id in ("B04", "B05", "B06", "B10", "B17"):
        assert "groups of layers and random" in verdict(layerwise, id, left_out).note, id
    assert "controls were left out" in verdict(layerwise, "B11", left_out).note
    differ = study_with()
    vars(differ)["along"] = {**differ.along, 0: [pair(0.01)] * 3}
    assert "differ at initialisation" in verdict(layerwise, "B01", differ).note
    normed = study_with({"net": "resnet18:width=12,norm=batch"})
    assert "has BatchNorm" in verdict(layerwise, "B01", normed).note
    assert "no joint path" in verdict(layerwise, "B08", study_with(linear=([0.1], [0.1]))).note
    assert "no window lies" in verdict(layerwise, "B05", residual(windows=(0.1, 0.2))).note
    assert "no VGG" in verdict(layerwise, "B12", study_with({"plain": "resnet8:width=4"})).note
    assert "costs anything" in verdict(layerwise, "B10", residual(layer=-0.01)).note
    one_seed = apart(pair(), pair(-1.0), pair(), pair(-1.0))
    assert "fewer than two seeds" in verdict(federated, "B14", one_seed).note
    short = replace(designed(federated))
    vars(short)["between"] = [pair()] * 4
    assert "cut short: 200 steps" in verdict(federated, "B14", short).note


def test_a_group_that_is_the_better_one_by_chance_decides_nothing() -> None:
    """Seeds that all gain a little: enough for one group, not for the best of four."""
    lucky = clients(pathological_deep=(91.0, 92.0, 93.0))
    assert lucky.gain("pathological", "deep").low > 0 > lucky.gain("pathological", "deep", 4).low
    assert verdict(federated, "B15", lucky).verdict == "undetermined"
    wide = clients(pathological_deep=BETTER, mild_body=MIXED)  # it may be two points better
    assert verdict(federated, "B15", wide).verdict == "undetermined"
    assert verdict(federated, "B15", clients(**ALL_WORSE)).verdict == "not reproduced"
    full = clients(pathological_deep=BETTER)
    few = replace(full, seeds=2)
    vars(few)["accuracy"] = full.accuracy
    assert "fewer than three seeds" in verdict(federated, "B15", few).note


def test_pairs_that_failed_a_gate_count_nowhere() -> None:
    study = study_with()
    given = [pair(0.5), pair(0.6), pair(0.0, valid=False)]
    vars(study)["ends"] = {**study.ends, study.residual: given}
    found = verdict(layerwise, "B01", study)
    assert (found.verdict, found.value, found.n) == ("undetermined", 0.55, 2)
    vars(study)["ends"] = {recipe: [pair(valid=False)] for recipe in study.recipes}
    with pytest.raises(BadParameter, match="no pair of resnet18"):
        verdict(layerwise, "B01", study)
    assert filled(layerwise.show_layers, study)["plain_whole"] == MISSING


def test_the_worst_layer_is_each_pairs_own_everywhere_on_the_page() -> None:
    """0.2, in each pair of another layer: no layer has more than 0.2 / 3 on average."""
    found = [pair(1.0, 0.0, bad={f"layer{i}": 0.2}) for i in (1, 2, 3)]
    study = study_with()
    vars(study)["ends"] = {**study.ends, study.residual: found}
    vars(study)["along"] = {**study.along, study.residual.steps: found}
    values = filled(layerwise.show_layers, study) | filled(layerwise.show_time, study)
    assert values["residual_layer"] == values["top_end"] == "0.20"
    assert values["residual_share"] == values["share_end"] == "20 %"
    assert (values["heaviest"], values["heaviest_end"]) == ("layer1", "0.07")


def test_sentences_follow_the_results() -> None:
    low, high = residual(), residual(layer=0.5)
    assert "In none of these" in str(filled(layerwise.show_layers, low)["answer"])
    assert "In some networks a layer alone" in str(filled(layerwise.show_layers, high)["answer"])
    front = filled(layerwise.show_groups, residual(windows=(0.5, 0.1, 0.1)))
    assert (
        "1 of 3: in the first third" in str(front["where"]) and front["window_peak"] == "window 0"
    )
    assert "2 of 3: in the middle" in str(filled(layerwise.show_groups, low)["where"])
    back = filled(layerwise.show_groups, residual(windows=(0.1, 0.1, 0.5)))
    assert "3 of 3: in the last third" in str(back["where"])
    assert "left out" in str(
        filled(layerwise.show_groups, study_with({"together": False}))["where"]
    )
    shrinks = study_with()
    steps = {s: [pair(1.0, 0.3 if s < 480 else 0.1)] * 3 for s in shrinks.along}
    vars(shrinks)["along"] = steps
    assert "lose their barriers" in str(filled(layerwise.show_time, shrinks)["story"])
    assert filled(layerwise.show_time, shrinks)["middle"] == 400
    assert "does not shrink" in str(filled(layerwise.show_time, low)["story"])
    leave = clients(pathological_deep=BETTER, pathological_none=(96.0, 96.0, 96.0))
    assert "leaving the clients alone" in str(filled(federated.show_averages, leave)["lesson"])
    choose = filled(federated.show_averages, clients(pathological_deep=BETTER))
    assert "more than averaging none" in str(choose["lesson"])
    assert (choose["best"], choose["best_gain"]) == ("the last third", "+3.0")
    assert "No choice" in str(filled(federated.show_averages, clients())["lesson"])
    assert "1 of 2 pairs" in str(filled(federated.show_apart, apart(pair(), pair(-1.0)))["below"])
    assert filled(federated.show_apart, apart())["two_whole"] == MISSING


def test_networks_without_norms_need_not_say_so() -> None:
    assert layerwise.called("vgg11:norm=none,width=8") == "VGG-11 (width 8)"
    assert layerwise.called("vgg11:norm=none") == "VGG-11"


def test_theory_is_computed_and_not_assumed() -> None:
    single, joint = layerwise.second_differences(networks=3, layers=3)
    assert (len(single), len(joint)) == (9, 3)
    assert min(single) >= -1e-9 and min(joint) < -1e-6


@pytest.mark.parametrize(
    ("design", "changed", "words"),
    [
        (layerwise.design, {"inits": 0}, "inits: 0 must be 1 or more"),
        (layerwise.design, {"looks": 1}, "looks: 1 must be 2 or more"),
        (layerwise.design, {"window": 50}, "window: 50 layers, but resnet18"),
        (layerwise.design, {"checkpoints": [10, 999]}, "0 to 800"),
        (layerwise.design, {"batch": 5000}, "batch: 5000"),
        (federated.design, {"clients": 400}, "400 clients"),
        (federated.design, {"seeds": 0}, "seeds: 0 must be 1 or more"),
        (federated.design, {"pairs": -1}, "pairs: -1 must be 0 or more"),
    ],
)
def test_bad_parameters_are_refused(
    design: Callable[..., Any], changed: dict[str, Any], words: str
) -> None:
    base = PAGE if design is layerwise.design else CLIENTS
    with pytest.raises(BadParameter, match=words):
        design(**{**base, **changed})


def test_networks_with_a_recipe_of_their_own_have_it() -> None:
    """FedBABU's: batches of 128, a learning rate of 0.1, divided by 10 twice; as the paper's."""
    own = {"plain": "mobilenet:statistics=batch,width=4", "others": ("vit:width=8,layers=1",)}
    study = layerwise.design(**{**PAGE, **own, "steps": 320})
    plain = study.convolutional
    assert (plain.lr, plain.batch, plain.steps, plain.warmup) == (0.1, 128, 320, 0)
    assert (plain.schedule, plain.milestones, plain.weight_decay) == ("step", (0.5, 0.75), 5e-4)
    (vit,) = study.variants
    assert (vit.lr, vit.batch, vit.schedule, vit.weight_decay) == (0.005, 128, "cosine", 0.0)
    assert study.residual.batch == designed(layerwise).residual.batch


def test_a_network_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at the end of training first has it all trained and kept."""
    tiny = {"net": "resnet8:norm=none,width=2", "plain": "mlp:widths=4x1", "others": ()}
    few = {"steps": 6, "inits": 1, "looks": 3, "together": False, "controls": False}
    study = designed(layerwise, **tiny, **few, train_examples=20, test_examples=20)
    assert len(study.ends[study.residual]) == 1
    monkeypatch.delattr(engine, "_advance")
    assert list(study.along) == [0, 3, 6]


def test_the_runs_are_those_of_before() -> None:
    """Recipes as this chapter always had them: with others, stored runs would be trained again."""
    study = designed(layerwise)
    main = study.residual
    gentle = replace(main, lr=0.003, batch=64, steps=400, warmup=40)
    assert study.gentle[0].identity() == gentle.identity()
    own = {"net": "mlp:widths=100x5", "steps": 1200, "lr": 0.08, "batch": 60}
    perceptron = replace(main, **own, warmup=0, weight_decay=0.0)
    assert study.perceptron.identity() == perceptron.identity()
    assert (study.convolutional.steps, study.convolutional.warmup) == (1200, 80)
    assert study.places == (0, 200, 400, 600, 800)
    first = study.plans()[0][0]
    assert isinstance(first, LayerSweep) and first.pair.step == 0
    two = designed(federated).apart
    assert (two.net, two.steps, two.warmup) == (study.residual.net, 200, 80)
    cifar = designed(layerwise, net="resnet20:width=8", steps=1600, lr=0.1)
    assert (cifar.residual.schedule, cifar.residual.warmup) == ("step", 0)
    assert (cifar.convolutional.schedule, cifar.convolutional.warmup) == ("cosine", 100)
