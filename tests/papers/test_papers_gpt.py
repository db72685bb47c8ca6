"""Every claim of chapter 5 on made-up results: once as the paper has it, once not, once neither."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from companion.connectivity import Barrier, Curve
from companion.connectivity.gates import Gate
from companion.core import closing, stats
from companion.core.errors import BadParameter
from companion.experiments.aligned import Aligned, Method
from companion.experiments.instability import Instability, Sample
from companion.experiments.pairs import PairResult
from companion.papers import gpt as paper
from companion.report import claims, page, recorded

T = 100
BLOCKS = (
    paper.EMBEDDING,
    "transformer.wpe",
    "transformer.h.0",
    "transformer.h.1",
    "transformer.ln_f",
)


@pytest.fixture(scope="module")
def design() -> paper.Study:
    return paper.design(
        dataset="pydoc?vocab=320&window=16",
        net="gpt:layers=2,width=16,heads=2",
        steps=T,
        batch=8,
        device="cpu",
    )


def barrier(height: float, valid: bool = True) -> Barrier:
    """The test loss rises by ``height`` half-way."""
    line = {"loss": (3.6, 3.6 + height, 3.6), "error": (70.0, 71.0, 70.0)}
    curve = Curve((0.0, 0.5, 1.0), {"test": line, "train": line}, "none", {"test": 96, "train": 24})
    gate = Gate("G0 quality", valid, "")
    return Barrier({"none": curve}, "none", (gate,), 9.0, 320, (70.0, 70.0), guess=95.0)


def swept(whole: float, top: float = 0.01, valid: bool = True) -> Any:
    """Layers of two networks: the first block alone costs ``top``, the others next to nothing."""
    each = dict.fromkeys(BLOCKS, 0.1 * top) | {"transformer.h.0": top}
    row = SimpleNamespace(groups=BLOCKS, half=lambda *_: 3.6 + whole)
    return SimpleNamespace(
        valid=valid,
        groups=dict.fromkeys(BLOCKS, ()),
        ends={"test": {"loss": (3.6, 3.64), "error": (70.0, 71.0)}},
        full_height=lambda *_: whole if valid else math.nan,
        worst=lambda kind="single", _="": dict(list(each.items())[: 4 if kind == "window" else 5]),
        heights=lambda _: {name: {"a": v, "b": v} for name, v in each.items()},
        select=lambda _: [row],
    )


def stream(gap: float) -> Any:
    """Features whose gap is this share of the baseline after every block."""
    return SimpleNamespace(layers=[SimpleNamespace(ratio=lambda _: gap)] * 4)


def three(value: float, shift: int = 0) -> list[float]:
    """Three pairs that differ a little; ``shift``: which of them is the lowest."""
    return [value * (0.98, 1, 1.02)[(i + shift) % 3] for i in range(3)]


def both(of: Mapping[str, float], **more: Any) -> paper.Swept:
    """Three pairs of both kinds."""
    return {
        kind: [swept(whole, **more) for whole in three(of[kind], shift)]
        for shift, kind in enumerate(paper.PAIRS)
    }


LEFT = {
    "naive": 0.8,
    "units": 0.6,
    "weights": 0.7,
    "folded": 0.9,
    "rotated": 0.15,
    "rotated-heads": 0.2,
    "learned": 0.08,
    "learned-both": 0.07,
}


def world(
    design: paper.Study,
    *,
    forks: Sequence[float] = (0.3, 0.1, 0.005),
    whole: Mapping[str, float] | None = None,
    top: float = 0.01,
    start: float = 0.001,
    left: Mapping[str, float] | None = None,
    gaps: Sequence[float] = (0.03, 0.2, 0.4),
    valid: bool = True,
    changed: Mapping[str, Any] | None = None,
) -> paper.Study:
    """A study in which all that the papers claim holds, and what a test changes of it."""
    study = replace(design, **(changed or {}))
    whole = {"same": 0.3, "different": 0.8} | dict(whole or {})
    ends = both(whole, top=top, valid=valid)
    samples = [
        Sample(init, k, (1, 2), PairResult(barrier(height * (1 + 0.02 * (init - 1))), {}, {}))
        for k, height in zip(study.ks, forks, strict=True)
        for init in range(3)
    ]
    matched = {
        way: [
            Aligned(
                pair,
                Method(way),
                barrier(height, valid),
                {"before": 2.0, "after": 1.0},
            )
            for height, pair in zip(three(mean, shift), study.strangers(), strict=False)
        ]
        for shift, (way, mean) in enumerate((LEFT | dict(left or {})).items())
    }
    untrained = both({"same": 0.0, "different": start}, top=0.001)
    study.__dict__.update(  # as if they had been run
        along={step: untrained if step == 0 else ends for step in study.looks},
        forks=Instability(study.recipe, study.ks, tuple(samples)),
        parts=ends,
        modules=ends,
        groups=ends,
        matched=matched,
        turned_twins={way: matched[way] for way in ("naive", "rotated")},
        streams={
            name: [stream(one) for one in three(gap)]
            for name, gap in zip(study.conditions, gaps, strict=True)
        },
    )
    return study


def verdict(id: str, study: paper.Study) -> claims.Verdict:
    (found,) = claims.verdicts({id: paper.CLAIMS[id]}, study)
    return found


def test_the_claims_are_those_of_the_chapter() -> None:
    listed = [c.id for c in claims.registry().values() if c.chapter == paper.CHAPTER]
    assert list(paper.CLAIMS) == listed


@pytest.mark.parametrize("id", paper.CLAIMS)
def test_it_is_reproduced(design: paper.Study, id: str) -> None:
    as_theirs = {"weights": 0.7} if id == "G06" else {}
    found = verdict(id, world(design, left=as_theirs))
    assert found.verdict == "reproduced", found


@pytest.mark.parametrize(
    ("id", "otherwise"),
    [
        ("B13", {"top": 0.5}),
        ("G01", {"start": 0.2}),
        ("G02", {"forks": (0.05, 0.04, 0.03)}),
        ("G03", {"forks": (0.3, 0.2, 0.1)}),
        ("G04", {"whole": {"different": 0.2}}),
        ("G05", {"left": {"units": 1.0}}),
        ("G06", {"left": {"weights": 0.4}}),
        ("G07", {"left": {"rotated": 0.8}}),
        ("G08", {"left": {"rotated": 0.6}}),
        ("G09", {"gaps": (0.3, 0.4, 0.4)}),
        ("G09", {"gaps": (0.2, 0.2, 0.4)}),
    ],
)
def test_it_is_not_reproduced(design: paper.Study, id: str, otherwise: dict[str, Any]) -> None:
    found = verdict(id, world(design, **otherwise))
    assert found.verdict == "not reproduced", found


@pytest.mark.parametrize(
    ("id", "otherwise"),
    [
        ("B13", {"top": 0.08}),
        ("G01", {"start": 0.01}),
        ("G02", {"forks": (0.1, 0.04, 0.03)}),
        ("G03", {"forks": (0.3, 0.2, 0.03)}),
        ("G04", {"whole": {"different": 0.3}}),
        ("G05", {"left": {"units": 0.8}}),
        ("G06", {"left": {"weights": 0.6}}),
        ("G07", {"left": {"rotated": 0.6, "units": 0.9, "weights": 0.6}}),
        ("G08", {"left": {"rotated": 0.4}}),
        ("G09", {"gaps": (0.25, 0.4, 0.4)}),
    ],
)
def test_it_is_undetermined(design: paper.Study, id: str, otherwise: dict[str, Any]) -> None:
    found = verdict(id, world(design, **otherwise))
    assert found.verdict == "undetermined", found


def test_every_claim_has_these_tests() -> None:
    for test in (test_it_is_not_reproduced, test_it_is_undetermined):
        (cases,) = getattr(test, "pytestmark")  # noqa: B009 - mypy knows no such attribute
        assert {id for id, _ in cases.args[1]} == set(paper.CLAIMS)


@pytest.mark.parametrize(
    ("id", "otherwise", "why"),
    [
        ("B13", {"whole": {"different": 0.05}}, "no barrier of the whole network"),
        ("B13", {"valid": False}, "one pair decides nothing"),
        ("G01", {"changed": {"looks": (T,)}}, "step 0 is not among the looks"),
        ("G03", {"forks": (0.05, 0.04, 0.03)}, "no barrier at k = 0"),
        ("G03", {"changed": {"ks": (0, 10, 60)}}, "behind half of training"),
        ("G04", {"whole": {"same": -0.1}}, "have no barrier"),
        ("G05", {"left": {"naive": 0.05}}, "no barrier to take away"),
        ("G06", {"valid": False}, "one pair decides nothing"),
        ("G07", {"left": {"naive": 0.05}}, "no barrier to take away"),
        ("G08", {"left": {"naive": 0.05}}, "no barrier to take away"),
        ("G09", {"forks": (0.3, 0.2, 0.1)}, "are not connected"),
    ],
)
def test_what_it_lacks_is_said(
    design: paper.Study, id: str, otherwise: dict[str, Any], why: str
) -> None:
    found = verdict(id, world(design, **otherwise))
    assert found.verdict == claims.NOT_TESTABLE and why in found.note


def test_two_initialisations_make_one_pair(design: paper.Study) -> None:
    study = world(design, changed={"inits": 2})
    for id in ("B13", "G01", "G04", "G05", "G06", "G07", "G08"):
        assert "two initialisations make one pair" in verdict(id, study).note, id
    found = paper.over_inits([1.0, 3.0])
    assert found == stats.Interval(2.0, 2.0, 2.0, 2, 1)


def test_a_pair_that_failed_leaves_no_interval_and_a_figure(design: paper.Study) -> None:
    """Without the init that the two others share there is no pair."""
    study = world(design)
    for way, results in study.matched.items():
        broken = replace(results[0], barrier=barrier(0.0, valid=False))
        study.matched[way] = [broken, *results[1:]]
    assert math.isinf(paper.left(study)["naive"].high)
    assert verdict("G08", study).verdict == "undetermined"
    assert "as trained" in captions(study, paper.show_matching)["barriers"]


def test_the_permutation_is_chosen_on_the_training_text(design: paper.Study) -> None:
    """Where the other one does better on the test text, pair by pair or on average, no matter."""
    study = world(design, left={"rotated": 0.3})
    assert verdict("G08", study).value == pytest.approx(0.3 / 0.8)
    assert "of the folded networks' barrier, nothing moved: 33 %" in verdict("G08", study).detail
    assert verdict("G07", study).value == pytest.approx(0.3 / 0.6)

    def on_test(result: Aligned, height: float) -> Aligned:
        curve = result.barrier.curve
        values = {**curve.values, "test": barrier(height).curve.values["test"]}
        return replace(
            result, barrier=replace(result.barrier, curves={"none": replace(curve, values=values)})
        )

    study.matched["weights"] = [on_test(r, 0.1) for r in study.matched["weights"]]
    found = verdict("G07", study)
    assert found.value == pytest.approx(0.3 / 0.6) and "training text: units" in found.detail
    study.matched["units"] = [
        replace(r, barrier=barrier(0, valid=False)) for r in study.matched["units"]
    ]
    assert verdict("G07", study).value == pytest.approx(0.3 / 0.1)


def test_pairs_share_initialisations(design: paper.Study) -> None:
    """As if they were independent, the interval would be half as wide."""
    found, narrow = paper.over_inits([1.0, 2.0, 3.0]), stats.over_pairs([1.0, 2.0, 3.0])
    assert found is not None and narrow is not None
    assert found.clusters == 3
    assert found.high - found.value == pytest.approx(2 * (narrow.high - narrow.value))
    assert paper.over_inits([math.nan] * 3) is None


def test_intervals_over_the_cycle_hold_their_level() -> None:
    """Inits that differ: 90 of 100 intervals hold the mean; as if pairs were independent, 70."""
    rng = np.random.default_rng(0)
    held = {paper.over_inits: 0, stats.over_pairs: 0}
    for _ in range(500):
        luck = rng.normal(0, 1, 3)
        for of in held:
            found = of((luck + np.roll(luck, -1)).tolist())
            held[of] += found is not None and found.low <= 0 <= found.high
    assert held[paper.over_inits] >= 430 and held[stats.over_pairs] <= 380


def test_a_ratio_whose_lower_side_may_vanish_has_no_bounds() -> None:
    found = paper.ratio([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert found is not None and (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    found = paper.ratio([1.0, 1.0, 1.0], [4.0, -1.0, 3.0])
    assert found is not None and found.value == 0.5 and math.isinf(found.high)
    assert paper.ratio([1.0], [0.0]) is None and paper.ratio([math.nan], [1.0]) is None


def test_zero_is_not_the_least_that_a_layer_can_show(design: paper.Study) -> None:
    study = world(design, top=0.5)
    assert paper.floor(study.parts["same"][0]) == pytest.approx(0.02)
    said = paper.values(study)  # of both kinds, three pairs each
    assert said["dots"] == 6 * len(BLOCKS) and said["dots_near"] == 6 * (len(BLOCKS) - 1)


def captions(study: paper.Study, *shows: Callable[[paper.Study], None]) -> dict[str, str]:
    """What the captions of these figures say."""
    with page.captured() as found:
        for show in shows:
            show(study)
    said: dict[str, str] = {}
    for figure in found.all("figure"):
        said |= page.fillable(figure["values"], figure["name"])
    return said


def test_captions_and_prose_say_what_was_measured(design: paper.Study) -> None:
    study = world(design, top=1.0)
    assert captions(study, paper.show_instability)["barriers"] == (
        "0.300 at k = 0, 0.100 at k = 12, 0.005 at k = 38"
    )
    assert "units and heads permuted 0.60" in captions(study, paper.show_matching)["barriers"]
    shown = captions(
        study, paper.show_heatmap, paper.show_parts, paper.show_groups, paper.show_features
    )
    assert shown["at_the_end"].endswith(
        "different initialisations: whole network 0.80, largest of the blocks block 1 with 1.00"
    )
    assert "block 1 1.00, block 1 1.00, block 1 1.00" in shown["largest"]
    assert "block 1 and what follows, 1.00" in shown["peaks"]
    assert "k = 38: 0.03; " in shown["medians"]
    said = paper.values(study) | study.words()
    assert said["first_k"] == "0.30" and said["factor"] == "1.35" and said["late_share"] == "38 %"
    assert said["choices"] == "37" and said["left_rotated_heads"] == "0.20"
    assert said["near_rotated"] == "50 %" and (said["dots"], said["dots_near"]) == (30, 0)
    assert "does not help here: it leaves 0.70" in str(said["stream_sentence"])
    assert "block 1 costs 1.00 nats, more than averaging everything (0.80)" in (
        str(said["embedding_sentence"])
    )
    low = world(design, left={"weights": 0.4})
    assert "helps here" in paper.stream_sentence(low)
    assert "No group alone" in paper.embedding_sentence(low)
    page.fillable(said, "values")  # numbers and strings


def test_pairs_that_failed_a_check_leave_sentences(design: paper.Study) -> None:
    study = world(design, valid=False)
    assert captions(study, paper.show_parts)["largest"] == paper.NONE
    assert captions(study, paper.show_matching)["barriers"] == paper.NONE
    assert "no valid pair" in paper.embedding_sentence(study)
    assert "cannot say" in paper.stream_sentence(study)
    assert "lacks" in paper.features_sentence(study)
    with pytest.raises(BadParameter, match="no pair trained"):
        paper.values(study)


def test_figures_are_drawn(design: paper.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper.Study, "digest", "abc")
    for study in (world(design, top=1.0), world(design, valid=False)):
        with page.captured() as found:
            for show in (
                paper.show_text,
                paper.show_instability,
                paper.show_matching,
                paper.show_heatmap,
                paper.show_parts,
                paper.show_groups,
                paper.show_features,
            ):
                show(study)
        assert len(found.all("figure")) == 6
        for figure in found.all("figure"):
            page.fillable(figure["values"], figure["name"])


def test_the_record_on_another_text(design: paper.Study) -> None:
    records = recorded.load(paper.CHAPTER)
    said = paper.record_values(records)
    assert said["record_naive"] == "1.20" and said["record_rotated"] == "0.10"
    assert said["record_embedding"] == "1.75" and said["record_first"] == "0.38"
    assert set(paper.record_values([]).values()) == {"not recorded"}
    with page.captured() as found:
        paper.show_recorded(records)
        paper.show_recorded([])
    (figure,) = found.all("figure")
    assert "1.20 nats (different initialisations)" in figure["values"]["ends"]


def test_names_of_layers(design: paper.Study) -> None:
    assert design.blocks[0] == paper.EMBEDDING
    assert design.short("transformer.h.0.attn") == "block 1 attention"
    assert design.short(paper.EMBEDDING) == "embedding = output"
    assert design.places == ["transformer.h.0", "transformer.h.1", "transformer.ln_f", "lm_head"]
    assert design.network == "GPT of 2 layers, width 16"


def test_a_closed_recording_judges_what_is_there(design: paper.Study) -> None:
    study = world(design)
    del study.__dict__["matched"]
    with closing.closed({"device": "cpu"}):
        words = {v.claim.id: v.verdict for v in claims.verdicts(paper.CLAIMS, study)}
    lost = [name for name, word in words.items() if word == claims.NOT_TESTABLE]
    assert lost == ["G05", "G06", "G07", "G08"]
    assert set(words.values()) == {claims.NOT_TESTABLE, "reproduced"}


def test_checkpoints_are_trained_before_anything_later(
    design: paper.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def sweeps(pairs: Sequence[Any], *_: Any, **__: Any) -> list[Any]:
        asked.append("sweep")
        return [SimpleNamespace(judged=lambda max_error: None)] * len(pairs)

    def analysed(*_: Any, **__: Any) -> Any:
        asked.append("forks")
        return "found"

    monkeypatch.setattr(paper, "sweep_pairs", sweeps)
    monkeypatch.setattr(paper, "analyse", analysed)
    study = replace(design)
    _ = study.forks, study.forks
    assert asked == ["sweep"] * 3 + ["forks"]
