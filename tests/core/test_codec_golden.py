"""What entries, records and ``--json`` files hold is written as it always was, and read again.

``codec_golden.json`` holds one example of each value as JSON, written by the ``to_json`` methods
that the codec replaced. Whoever changes a value's JSON has to keep what was written readable.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion.connectivity import Barrier, Curve, Measure, Plane
from companion.connectivity.gates import Gate
from companion.core import codec
from companion.experiments import merged
from companion.experiments.featured import Scope
from companion.features import (
    Additivity,
    Commutativity,
    Features,
    Spectrum,
    Stitching,
)
from companion.features.conditions import LayerCommutativity, ReluAdditivity
from companion.features.measure import LayerFeatures, Stat
from companion.features.spectra import SubspaceAngles
from companion.features.stitching import Stitched
from companion.features.theorem import LayerCheck, Theorem
from companion.layerwise import LayerBarriers, Row, Sweep
from companion.rebasin.spec import chain
from companion.report import claims
from companion.training import Recipe

GOLDEN = json.loads((Path(__file__).parent / "codec_golden.json").read_text())

LINE = Curve(
    (0.0, 0.5, 1.0),
    {"train": {"loss": (0.1, math.inf, 0.30000000000000004), "error": (0.0, math.nan, 1e-17)}},
    "none",
    {"train": 1797},
)
AVERAGED = replace(LINE, bn="reestimate", bn_examples=1000)
PLANE = Plane(
    (-1.0, 2.5),
    (0.0, 1e300),
    {"test": {"loss": ((1.0, math.inf), (math.nan, -math.inf))}},
    ((0.0, 0.0), (1.5, 0.0), (0.25, 2.0)),
    "batch",
)
GATES = (
    Gate("G0 quality", True, "end errors ≤ 3.00 %"),
    Gate("G1 null control", False, "largest weight difference 1", 0.5),
    Gate("G5 BatchNorm mode", None, "no running statistics in this network"),
)
BARRIER = Barrier({"none": LINE}, "none", GATES, 12.5, 10, (2.5, 3.0))
OF_TEXT = replace(BARRIER, curves={"reestimate": AVERAGED, "none": LINE}, guess=93.25)
ROWS = (
    Row("single", "conv1", ("conv1",), "a", None, 0.5, LINE),
    Row("window", "conv1 … fc", ("conv1", "fc"), "b", 3, 0.0, AVERAGED),
)
LAYERS = LayerBarriers(
    {"conv1": ("conv1.weight", "conv1.bias"), "fc": ("fc.weight",)},
    ROWS,
    BARRIER,
    {"test": {"loss": (math.inf, 0.5), "error": (2.0, math.nan)}},
    "replay",
)
STAT = Stat(0.5, 0.1, 12, float(np.float64(0.1) + 0.2), 0.0, 1.0, 2)
EMPTY = Stat(math.nan, math.nan, 0, math.nan, math.nan, math.nan, 7)
SITE = LayerFeatures(
    "fc1", "linear", 64, STAT, {0.25: STAT, 0.5: EMPTY}, {0.25: EMPTY}, {1.0: STAT}
)
FEATURES = Features(
    (SITE, replace(SITE, name="head")),
    (0.0, 0.25, 1.0),
    100,
    "sample",
    "none",
    100,
    {"a": 1.0, "b": math.nan},
    {"a": math.inf, "b": 0.25},
    {0.0: 1.0, 0.25: math.nan},
    {0.25: math.inf},
    {0.1: 2.0, 1e-07: 3.0},
    {0.5: 0.0},
)
RELU = ReluAdditivity("relu1", 32, {0.5: STAT}, {0.25: math.nan, 0.5: 0.125}, 12.5)
COMMUTES = LayerCommutativity("fc1", "linear", 0.5, math.nan, 0.0)
CHECKS = (
    LayerCheck("fc1", 0.0, 1e-9, 0.5, math.nan, 0.0, 0.0, math.inf),
    LayerCheck("fc2", None, 0.0, 1.0, 1.0, 0.0, 2.0, 0.5),
)
STITCHED = (
    Stitched("input", "input", "b", loss=0.5, error=2.0, wrong=2, cut=True),
    Stitched("fc1", "linear", "b", loss=math.inf, error=90.0, wrong=90, cut=False),
)
STITCHING = Stitching(
    STITCHED, {"a": Measure(math.nan, 1.0), "b": Measure(0.5, 2.0)}, ("head",), 100, "own"
)
CLAIM = claims.Claim(
    "C01",
    "frankle2020",
    "01_instability",
    "stable from early on",
    "Figure 3",
    "0",
    "the barrier",
    "below 2",
    {"op": "between", "low": 0, "high": 2.0},
    ("quick", "gpu"),
    "P",
    "points",
)
VERDICTS = {
    "judged": claims.Verdict(CLAIM, "reproduced", 0.5, (0.25, math.inf), 9, "all", "of digits"),
    "infinite": claims.Verdict(CLAIM, "not reproduced", math.inf),
    "undetermined": claims.Verdict(CLAIM, "undetermined", math.nan, None, 3),
    "not measured": claims.Verdict(CLAIM, "not testable at this scale"),
}
READINGS = {
    "input 0": {
        "test": merged.Reading(0.5, math.nan, math.inf, (0.25, 0.75), (0.5, 1.0), (3, 97)),
        "train": merged.Reading(0.5, 1.0, 2.0),
    }
}
RECIPE = Recipe(
    net="mlp:widths=8",
    data="digits",
    steps=100,
    lr=0.5,
    schedule="step",
    milestones=(0.5, 75),
)

WRITTEN: dict[str, Any] = {
    "Curve": LINE,
    "Curve, averaged": AVERAGED,
    "Plane": PLANE,
    "Barrier": BARRIER,
    "Barrier of a text": OF_TEXT,
    "Row": ROWS[1],
    "LayerBarriers": LAYERS,
    "Stat": STAT,
    "Stat of nothing": EMPTY,
    "LayerFeatures": SITE,
    "Features": FEATURES,
    "Features, averaged": replace(FEATURES, bn="reestimate", bn_examples=64),
    "ReluAdditivity": RELU,
    "Additivity": Additivity((RELU,), (0.25, 0.5), 10, "own"),
    "LayerCommutativity": COMMUTES,
    "Commutativity": Commutativity((COMMUTES,), 10, "none"),
    "LayerCheck": CHECKS[1],
    "Theorem": Theorem(CHECKS, (0.25, 0.5), 8, 1),
    "Stitching": STITCHING,
    "Spectrum": Spectrum("fc1.weight", "weight", 3, 2, (2.0, 0.5), True),
    "SubspaceAngles": SubspaceAngles("fc1.weight", 2, (0.0, 90.0), (1.5, 1e-9)),
    **{f"Verdict, {name}": verdict for name, verdict in VERDICTS.items()},
    "Readings": READINGS,
}
IDENTITIES: dict[str, Any] = {
    "recipe": RECIPE.identity(),
    "sweep of defaults": Sweep().identity(),
    "sweep": Sweep(
        by=("conv1", "fc"), subsets=(("ends", ("conv1", "fc")),), points=1, bn_examples=64, draws=2
    ).identity(),
    "scope": Scope(alphas=(0.5,), bn=("interpolate",)).identity(),
    "spec": chain(4, 3, 2).to_json(),
}


def text(value: Any) -> str:
    """JSON as a store writes it: order of keys and digits count."""
    return json.dumps(value, allow_nan=False)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_value_is_written_as_ever_and_read_again(name: str) -> None:
    value, golden = WRITTEN[name], GOLDEN["values"][name]
    assert text(codec.to_json(value)) == text(golden)
    again = codec.from_json(merged.Readings if name == "Readings" else type(value), golden)
    assert repr(again) == repr(value)  # NaN is no equal of itself
    assert text(codec.to_json(again)) == text(golden)


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_names_an_entry_is_as_ever(name: str) -> None:
    assert text(IDENTITIES[name]) == text(GOLDEN["identities"][name])


def test_there_is_an_example_of_each_value_in_the_golden_file() -> None:
    assert GOLDEN["values"].keys() == WRITTEN.keys()
    assert GOLDEN["identities"].keys() == IDENTITIES.keys()
