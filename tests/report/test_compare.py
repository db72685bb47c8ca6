"""Comparisons as values: verdicts on both sides of a threshold, budgets, what stands in the way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from commands import BATCHNORM, NET, trained
from comparisons import line, made_up
from torch import nn
from toypairs import NETS, Tokens, pair_of, split_of

from companion import data, models
from companion.core.errors import BadParameter, CorruptData, OutOfTime
from companion.core.seeds import Key
from companion.report.compare import THRESHOLDS, Answer, Comparison, compare, loads
from companion.report.compare.asking import Asking
from companion.report.compare.case import Case, Reading
from companion.report.compare.questions import QUESTIONS, Question
from companion.report.compare.verdicts import decided, findings

SHORT: dict[str, Any] = {"points": 3, "train_examples": 60, "test_examples": 100}
DIGITS = data.load("digits")


def mlp(net: str = NET) -> nn.Module:
    return models.build(net, DIGITS.in_shape, 10)


def verdict(found: Comparison, question: str) -> str:
    return next(f.verdict for f in found.findings if f.question == question)


# --- verdicts


@pytest.mark.parametrize("name", sorted(THRESHOLDS))
def test_a_verdict_has_two_sides_and_a_gap(name: str) -> None:
    t = THRESHOLDS[name]
    way = -1 if t.yes > t.no else 1  # larger numbers are a no, or a yes
    assert decided(t.yes - way, 0.0, t) == "yes"
    assert decided(t.no + way, 0.0, t) == "no"
    for value in (t.yes - way, t.no + way):
        assert decided(value, 1.5 + abs(t.yes - t.no), t) == "undetermined"
    assert decided(math.nan, 0.0, t) == "undetermined"
    assert t.rule and t.reason and t.chapter


def judged(height: float, metric: str = "error", margin: float = 0.5) -> dict[str, str]:
    """Verdicts on a line of this height, before matching and after."""
    found = made_up()
    ends = next(a for a in found.answers if a.name == "ends")
    ends = replace(ends, values={**ends.values, "split": "test", "metric": metric})
    values = {**line(height), "margin": {"test": {"loss": margin, "error": margin}}}
    matching = {"moved": 0.3}
    answers = (
        found.answers[0],
        ends,
        Answer("barrier", "", "answered", values=values),
        Answer("matched", "", "answered", values={**values, "matching": matching, "equal": False}),
    )
    return {f.question: f.verdict for f in findings(("a", "b"), answers)}


@pytest.mark.parametrize(("height", "word"), [(1.4, "yes"), (1.6, "undetermined"), (2.6, "no")])
def test_a_barrier_is_judged_with_its_margin(height: float, word: str) -> None:
    found = judged(height)
    assert found["Same basin?"] == found["Connected after matching?"] == word
    assert found["Same start?"] == "undetermined" and found["Same network?"] == "no"
    assert found["Is a merge worth it?"] == "not asked"


@pytest.mark.parametrize(
    ("above", "word"), [(-1.5, "yes"), (-0.5, "undetermined"), (0.5, "undetermined"), (1.5, "no")]
)
def test_a_merge_has_to_be_better_than_both(above: float, word: str) -> None:
    found = made_up()
    against = {"half-way": {"above": {"error": above}, "margin": {"error": 1.0}}}
    answers = [
        replace(a, values={**a.values, "against": against}) if a.name == "merged" else a
        for a in found.answers
    ]
    said = {f.question: f.verdict for f in findings(found.names, answers)}
    assert said["Is a merge worth it?"] == word


@pytest.mark.parametrize(("loss", "word"), [(0.01, "yes"), (0.03, "undetermined"), (0.05, "no")])
def test_a_text_is_judged_by_its_loss(loss: float, word: str) -> None:
    assert judged(20 * loss, "loss", 0.01)["Same basin?"] == word


def test_a_pair_that_failed_a_gate_has_no_verdict() -> None:
    found = made_up()
    bad = tuple(
        replace(a, status="invalid", why="G0 quality FAIL: 90 %", values={})
        if a.name in ("barrier", "matched", "merged")
        else a
        for a in found.answers
    )
    said = {f.question: f for f in findings(found.names, bad)}
    for question in ("Same basin?", "Connected after matching?", "Is a merge worth it?"):
        assert said[question].verdict == "undetermined" and "G0" in said[question].sentence


def test_an_interval_is_over_examples_that_are_compared_with_themselves() -> None:
    def reading(wrong: list[float]) -> Reading:
        w = torch.tensor(wrong, dtype=torch.float64)
        return Reading(w / 10, w, torch.ones_like(w))

    a, b = [0.0, 1.0] * 50, [0.0, 1.0] * 50
    same, width = reading(a).above([reading(a), reading(b)])
    assert same == {"loss": 0.0, "error": 0.0}
    assert width == {"loss": 0.0, "error": 3.0}  # of 100, the rule of three
    worse, width = reading([1.0] * 50 + [0.0] * 50).above([reading([0.0] * 100)])
    assert worse["error"] == 50.0
    assert width["error"] == pytest.approx(196 * math.sqrt(0.25 / 100))


def test_parallel_features_are_not_divided_by_rounding() -> None:
    layer = {"name": "head", "baseline": {"mean": 1e-16}, "gap": {"0.5": {"mean": 1e-3}}}
    answers = [
        *made_up().answers,
        Answer("features", "", "answered", values={"features": {"none": {"layers": [layer]}}}),
    ]
    (found,) = (f for f in findings(("a", "b"), answers) if "features" in f.question)
    assert found.verdict == "undetermined" and "parallel" in found.sentence


# --- the value


def test_a_comparison_is_read_back_from_its_json() -> None:
    found = made_up()
    assert loads(json.dumps(found.to_json())) == found
    assert found.answer("barrier") and found.answer("curvature") is None
    with pytest.raises(CorruptData, match="names is missing"):
        loads("{}")


@pytest.mark.slow
def test_what_python_gets_is_what_the_text_says() -> None:
    theta = trained(NET, 1)
    found = compare(mlp(), theta, trained(NET, 2), DIGITS, minutes=2, **SHORT)
    assert {a.name for a in found.answers} == {q.name for q in QUESTIONS.values() if not q.many}
    assert all(a.answered for a in found.answers), str(found)
    assert loads(json.dumps(found.to_json(), allow_nan=False)) == found
    assert verdict(found, "Same start?") == "yes"
    for one in found.findings:
        assert one.question in str(found) and one.sentence in str(found) and one.rule
    assert all(a.command == "" for a in found.answers)  # no files are known


def test_a_network_in_another_order_is_the_same_network() -> None:
    from companion.rebasin import derive

    module, theta = mlp(), trained(NET, 1)
    spec = derive(module, DIGITS.test.x[:2])
    moved = spec.permute(theta, spec.random(Key("order").generator()))
    other = {name: value.clone() for name, value in moved.items()}
    found = compare(module, theta, other, DIGITS, **SHORT)
    assert verdict(found, "Same network?") == "yes" and verdict(found, "Same start?") == "no"
    assert verdict(found, "Same basin?") == "no"
    matched = found.answer("matched")
    assert matched and matched.values["heights"]["test"]["error"]["mean"] == 0


@pytest.mark.slow
def test_statistics_of_batchnorm_are_estimated_again() -> None:
    pair = [trained(BATCHNORM, n) for n in (1, 2)]
    found = compare(mlp(BATCHNORM), pair[0], pair[1], DIGITS, **SHORT)
    barrier = found.answer("barrier")
    assert barrier and barrier.values["barrier"]["bn"] == "reestimate"
    assert set(barrier.values["barrier"]["curves"]) == {"interpolate", "reestimate", "batch"}
    assert all(a.answered for a in found.answers), str(found)


def test_a_start_gives_an_angle() -> None:
    from companion.core.theta import snapshot

    start = snapshot(mlp())
    found = compare(mlp(), trained(NET, 1), trained(NET, 2), DIGITS, init=start, **SHORT)
    curvature, weights = found.answer("curvature"), found.answer("weights")
    assert curvature and 0 < curvature.values["angle"]["init"] < 180
    assert weights and set(weights.values["from init"]) == {"A", "B"}


# --- what stands in the way


def test_weights_alone() -> None:
    found = compare(mlp(), trained(NET, 1), trained(NET, 2, 1), example=DIGITS.test.x[:2])
    assert [a.name for a in found.answers if a.answered] == ["weights", "matched"]
    assert {a.why for a in found.answers if not a.answered} == {"there are no data"}
    assert verdict(found, "Same start?") == "no" and verdict(found, "Same basin?") == "not asked"
    raw = compare(None, trained(NET, 1), trained(NET, 2), why="the architecture is not known")
    assert [a.name for a in raw.answers if a.answered] == ["weights"]
    assert verdict(raw, "Same start?") == "yes"


def test_networks_of_other_architectures() -> None:
    theta, wide = trained(NET, 1), {k: torch.zeros(3) for k in ("head.bias", "more")}
    found = compare(mlp(), theta, wide, DIGITS)
    (weights,) = (a for a in found.answers if a.answered)
    assert weights.values["shapes in A and B"] == {"head.bias": [[10], [3]]}
    assert weights.values["only in B, not in A"] == ["more"]
    assert verdict(found, "Same network?") == "no"
    assert all("missing" in a.why for a in found.answers if not a.answered)


def test_a_dead_network() -> None:
    dead = {k: torch.zeros_like(v) for k, v in trained(NET, 1).items()}
    found = compare(mlp(), trained(NET, 1), dead, DIGITS, **SHORT)
    assert found.invalid
    assert {a.status for a in found.answers if a.name not in ("weights", "ends")} == {"invalid"}
    assert {f.verdict for f in found.findings} <= {"undetermined", "not asked"}


def test_data_that_do_not_fit() -> None:
    images = {"train": (torch.zeros(8, 3), torch.zeros(8).long())}
    images["test"] = images["train"]
    found = compare(mlp(), trained(NET, 1), trained(NET, 2), images)
    assert [a.name for a in found.answers if a.answered] == ["weights"]
    assert "RuntimeError" in next(a.why for a in found.answers if a.name == "ends")


def test_a_network_that_cannot_be_derived() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 8), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x.flatten(1)).cumsum(1))  # an order that counts

    module, a, b = pair_of(Own, "sorted")
    found = compare(module, a, b, DIGITS, max_error=100, **SHORT)
    lost = {a.name: a.why for a in found.answers if not a.answered}
    assert set(lost) == {"matched", "activation_matched", "repaired"}
    assert "nothing to match" in lost["matched"]
    assert found.answer("barrier") and found.answer("merged")


def test_data_without_training_examples() -> None:
    found = compare(mlp(), trained(NET, 1), trained(NET, 2), {"held out": DIGITS.test}, **SHORT)
    lost = {a.name: a.why for a in found.answers if not a.answered}
    assert set(lost) == {"activation_matched", "repaired"}
    assert all("no split is called 'train'" in why for why in lost.values())


def test_tokens() -> None:
    module, a, b = pair_of(Tokens)
    part = split_of("tokens", 20)
    tokens = dict.fromkeys(("train", "test"), (part.x, part.y))
    found = compare(module, a, b, tokens, max_error=100, **SHORT)
    assert all(a.answered for a in found.answers), str(found)
    rule = next(f.rule for f in found.findings if f.question == "Same basin?")
    assert rule == THRESHOLDS["loss"].rule


def test_options_that_make_no_sense() -> None:
    theta = trained(NET, 1)
    with pytest.raises(BadParameter, match="minutes: -1"):
        compare(mlp(), theta, theta, DIGITS, minutes=-1)
    with pytest.raises(BadParameter, match="names: 1 for 2 networks"):
        compare(mlp(), theta, theta, DIGITS, names=["a"])


# --- three and more


@pytest.mark.slow
def test_three_networks() -> None:
    thetas = [trained(NET, n, n) for n in (1, 2, 3)]
    found = compare(mlp(), thetas[0], thetas[1], DIGITS, more=thetas[2:], **SHORT)
    assert all(a.answered for a in found.answers), str(found)
    pairs, triangle = found.answer("pairs"), found.answer("triangle")
    assert pairs and triangle
    heights = pairs.values["heights"]
    assert heights[0][1] == heights[1][0] > 0 and heights[0][0] is None
    assert 0 < triangle.values["defect"] <= 1 and set(triangle.values["defects"]) == {"A, B, C"}
    assert verdict(found, "Same basin, all of them?") == "no"
    many, agreed = found.answer("merged_many"), found.answer("merged_c2m3")
    assert many and agreed and agreed.values["defect"] == 0
    names = [*many.values["networks"]]
    assert set(agreed.values["networks"]) == {*names, "merged by C2M3"}
    assert agreed.values["matching"]["objective"] >= many.values["matching"]["objective"]
    sentence = next(f.sentence for f in found.findings if f.question == "Do the matchings agree?")
    assert "In the one order that C2M3 finds for all of them it is 0 %" in sentence
    assert found.html().count('<th scope="row">ensemble</th>') == 1  # one table of merges


@pytest.mark.slow
def test_three_networks_with_units_inside_of_units_are_merged_without_c2m3() -> None:
    module, a, b = pair_of(NETS["group norm"])
    more = [{k: v + 0.01 for k, v in a.items()}]
    found = compare(module, a, b, DIGITS, more=more, max_error=100, **SHORT)
    asked = next(a for a in found.answers if a.name == "merged_c2m3")
    assert asked.status == "could not be asked" and "units inside of others" in asked.why
    assert verdict(found, "Is a merge worth it?") in ("yes", "no", "undetermined")


def test_of_three_networks_one_is_dead() -> None:
    dead = {k: torch.zeros_like(v) for k, v in trained(NET, 1).items()}
    found = compare(mlp(), trained(NET, 1), dead, DIGITS, more=[trained(NET, 2)], **SHORT)
    ends, pairs = found.answer("ends"), found.answer("pairs")
    assert ends and ends.values["trained"] == {"A": True, "B": False, "C": True}
    assert pairs and pairs.values["heights"][0][1] is None
    assert pairs.values["heights"][0][2] is not None
    assert found.invalid
    assert verdict(found, "Is a merge worth it?") == "undetermined"


# --- a budget


class Clock:
    """Seconds that pass when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    clock, work = Clock(), Clock()
    busy = [1.0]
    said: list[str] = []

    def question(name: str, takes: float, cost: float, **facts: Any) -> Question:
        def ask(case: Case) -> dict[str, Any]:
            clock.now += busy[0] * takes
            work.now += takes
            if name == "late":
                raise OutOfTime("now")
            return {"asked": name}

        known: dict[str, Any] = {
            "data": False,
            "module": False,
            "gated": False,
            "command": lambda case: "line",
        }
        return Question(name, name, ask, lambda case: cost, **known | facts)

    def made(
        *questions: tuple[Any, ...], seconds: float | None, others: float = 1
    ) -> tuple[dict[str, Answer], Any]:
        busy[0] = others
        own = [question(*q[:3], **(q[3] if len(q) > 3 else {})) for q in questions]
        monkeypatch.setattr("companion.report.compare.asking.asked", lambda case: own)
        case = Case(("a", "b"), (trained(NET, 1), trained(NET, 2)))
        found = Asking(case, seconds, said.append, clock, work).all()
        assert [a.name for a in found] == [q.name for q in own]
        return {a.name: a for a in found}, said

    yield made


def test_what_is_cheap_is_asked_first(asking: Any) -> None:
    many = [("dear", 50, 50), ("cheap", 1, 1), ("after", 2, 0.5, {"after": ("dear",)})]
    found, said = asking(*many, seconds=None)
    assert [text.split()[1] for text in said] == ["cheap", "dear", "after"]
    assert "(about 1 s; all that is left: about 52 s)" in said[0]
    assert all(a.answered for a in found.values())


def test_what_does_not_fit_is_not_asked(asking: Any) -> None:
    many = [("dear", 50, 50), ("cheap", 4, 4), ("after", 1, 1, {"needs": ("dear",)})]
    found, _ = asking(*many, seconds=20)
    assert found["cheap"].answered and found["cheap"].seconds == 4
    assert found["dear"].status == "not asked" and found["dear"].why == "about 50 s, 16 s left"
    assert found["dear"].command == "line"
    assert found["after"].status == "not asked" and "follows dear" in found["after"].why


def test_estimates_are_corrected_by_what_was_measured(asking: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Asking, "obstacle", lambda self, question: None)
    many = [("slow", 40, 4, {"data": True}), ("next", 20, 5, {"data": True})]
    assert asking(*many, seconds=60)[0]["next"].why == "about 41 s, 20 s left"
    assert asking(*many, seconds=61)[0]["next"].answered  # half of it fits


def test_what_other_programs_do_changes_how_long_it_takes_and_not_the_work(asking: Any) -> None:
    many = [("one", 10, 10), ("two", 20, 20), ("three", 40, 40)]
    found, said = asking(*many, seconds=None, others=3)
    assert "(about 10 s; all that is left: about 70 s)" in said[0]
    assert "(about 56 s; all that is left: about 3 min)" in said[1]
    assert (found["two"].seconds, found["two"].work) == (60, 20)
    assert asking(*many, seconds=160, others=3)[0]["three"].answered
    assert asking(*many, seconds=140, others=3)[0]["three"].why == "about 2 min, 50 s left"


def test_what_takes_too_long_is_stopped(asking: Any) -> None:
    found, _ = asking(("late", 30, 1), ("other", 1, 2), seconds=20)
    assert found["late"].status == "not asked"
    assert found["late"].why == "stopped after 30 s, at the limit"
    assert found["other"].why == "about 2 s, 0 s left"


def test_no_time_at_all() -> None:
    found = compare(mlp(), trained(NET, 1), trained(NET, 2), DIGITS, minutes=0, **SHORT)
    assert {a.status for a in found.answers} == {"not asked"}
    assert {f.verdict for f in found.findings} <= {"not asked", "undetermined"}
