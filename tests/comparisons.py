"""A comparison of two networks and of three, made up: for tests of how one is shown."""

from __future__ import annotations

from typing import Any

from companion.connectivity import Barrier, Curve
from companion.connectivity.gates import Gate
from companion.core import codec
from companion.report.compare import Answer, Comparison, Finding

ALPHAS = tuple(i / 10 for i in range(11))
HOSTILE = '</script><img src=x onerror="alert(1)">'


def line(height: float) -> dict[str, Any]:
    """A line as `companion barrier --json` has it: two ends of 3 % error, ``height`` half-way."""

    def bow(end: float, top: float) -> tuple[float, ...]:
        return tuple(end + top * 4 * t * (1 - t) for t in ALPHAS)

    values = {
        split: {"loss": bow(0.1, height / 20), "error": bow(end, height)}
        for split, end in (("train", 1.0), ("test", 3.0))
    }
    curves = {
        bn: Curve(ALPHAS, values, bn, {"train": 1000, "test": 500}, 500 if bn[0] == "r" else None)
        for bn in ("interpolate", "reestimate", "batch")
    }
    gates = (
        Gate("G0 quality", True, "end errors ≤ 3.00 %, bound 45.00 %"),
        Gate("G0b distinct", True, "distance 9.1"),
    )
    found = Barrier(curves, "reestimate", gates, 9.1, 10, (3.0, 3.0))
    return {
        "valid": True,
        "heights": found.heights(),
        "barrier": codec.to_json(found),
        "margin": {s: {"loss": 0.01, "error": 0.8} for s in ("train", "test")},
    }


def made_up(a: str = "a.safetensors", b: str = "b.safetensors") -> Comparison:
    """Two networks that are connected after matching only."""
    pair = f"{a} {b} --model resnet20 --data cifar10"
    row = {"train": {"loss": 0.1, "error": 1.0}, "test": {"loss": 0.2, "error": 3.0}}
    high = {"train": {"loss": 2.1, "error": 70.0}, "test": {"loss": 2.2, "error": 72.0}}
    matching = {"method": "weights", "share": 0.7, "share before": 0.1, "moved": 0.98}
    answers = (
        Answer(
            *("weights", "How far apart are their weights?", "answered"),
            values={
                "distance": 9.1,
                "relative": 1.3,
                "cosine": 0.12,
                "cosine of matrices": 0.01,
                "equal tensors": 0,
                "tensors": 12,
            },
        ),
        Answer(
            *("ends", "Has each of them been trained?", "answered"),
            values={
                "networks": {"A": row, "B": row},
                "gates": ["G0 quality pass"],
                "valid": True,
                "trained": {"A": True, "B": True},
                "split": "test",
                "metric": "error",
            },
        ),
        Answer(
            *("barrier", "Is the straight line between them low?", "answered", "", 3.0),
            command=f"companion barrier {pair}",
            values=line(70.0),
        ),
        Answer(
            *("matched", "Is it low once the units are matched by weights?", "answered", "", 4.0),
            command=f"companion rebasin {pair} -o b_aligned.safetensors",
            values={**line(1.0), "matching": matching, "equal": False},
        ),
        Answer(
            *("merged", "What is the network half-way worth?", "answered", "", 0.5),
            values={
                "networks": {"A": row, "B": row, "half-way": high, "ensemble": row},
                "chosen": "half-way",
                "best end": "A",
                "against": {
                    "half-way": {
                        "above": {"loss": 2.0, "error": 69.0},
                        "margin": {"loss": 0.1, "error": 1.0},
                    }
                },
            },
        ),
        Answer(
            *("curvature", "How curved is the loss?", "not asked"),
            why="about 90 s, 12 s left",
            command=f"companion landscape {pair}",
        ),
    )
    findings = (
        Finding(
            "Same basin?",
            "no",
            "The line rises 70.00 points of test error above its ends.",
            "an error barrier of at most 2 points on test data (chapter 1)",
            ("barrier",),
        ),
        Finding(
            "Connected after matching?",
            "yes",
            "With B's units in A's order it rises 1.00 points.",
            "an error barrier of at most 2 points on test data (chapter 2)",
            ("matched",),
        ),
    )
    return Comparison((a, b), "resnet20", "cifar10", answers, findings, {"python": "3.12"})
