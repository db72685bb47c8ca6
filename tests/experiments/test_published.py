"""Published trainings, checkpoint by checkpoint: two tiny GPT-NeoX, trained here, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from neox import train

from companion import data
from companion.core.errors import BadParameter, MissingData
from companion.experiments.pairs import Evaluation
from companion.experiments.published import along, checkpoints

ANY: dict[str, Any] = {"max_error": 100.0}
FEW = Evaluation(points=3, train_examples=8, test_examples=8)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A training, another one, and the first with its units in another order."""
    home = tmp_path_factory.mktemp("published")
    orders = None, None, torch.randperm(24, generator=torch.Generator().manual_seed(3))
    for name, seed, order in zip(("seed1", "seed2", "moved"), (1, 2, 1), orders, strict=True):
        train(home / name, seed, order)
    return [home / name for name in ("seed1", "seed2", "moved")]


def own_text(training: Path) -> data.Dataset:
    return data.load(f"pydoc?tokenizer={training / 'step0'}&window=16")


@pytest.mark.slow
def test_two_trainings_have_a_barrier_at_each_common_step(trainings: list[Path]) -> None:
    first, second, _ = trainings
    text = own_text(first)
    some = [second / f"step{step}" for step in (12, 4)]
    found = along(first, some, text, evaluation=FEW, **ANY)
    assert [*found] == [4, 12] and all([*lines] == ["naive", "weights"] for lines in found.values())
    assert all(line.valid for lines in found.values() for line in lines.values())
    # the ends are those networks, whatever was done to the second
    ends = [line.curve.ends("test", "loss") for line in found[12].values()]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


@pytest.mark.slow
def test_a_copy_in_another_order_is_found_again(trainings: list[Path]) -> None:
    first, _, moved = trainings
    how: dict[str, Any] = {"methods": ("naive", "weights", "rotated"), "evaluation": FEW}
    lines = along(first, moved, own_text(first), **how, **ANY)[12]
    assert lines["naive"].distance > 1 and lines["weights"].distance < 1e-5
    assert lines["rotated"].distance < 1e-3


def test_the_tokens_are_the_folders_own(trainings: list[Path], tmp_path: Path) -> None:
    same = data.load("pydoc?vocab=320&window=16")
    text = own_text(trainings[0])
    assert torch.equal(text.test.x, same.test.x)
    assert text.text is not None and text.text.tokenizer == "own" and text.text.vocabulary == 320
    (tmp_path / "bare").mkdir()
    with pytest.raises(MissingData, match=r"there is no .*bare.tokenizer\.json"):
        data.load(f"pydoc?tokenizer={tmp_path / 'bare'}")
    large = data.load("pydoc?vocab=512&window=16")
    with pytest.raises(BadParameter, match=r"512 tokens, .* only 320"):
        along(trainings[0], trainings[1], large, evaluation=FEW)


def test_a_step_is_the_last_number_of_a_name(tmp_path: Path) -> None:
    for name in ("seed-1-step1000", "step2", "step-10", "logs"):
        (tmp_path / name).mkdir()
    assert {k: v.name for k, v in checkpoints(tmp_path).items()} == {
        2: "step2", 10: "step-10", 1000: "seed-1-step1000",
    }  # fmt: skip
    for bad, why in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "logs", "has no sub-folders"),
        ([tmp_path / "logs"], "names no step"),
        ([tmp_path / "step2", tmp_path / "a-step2"], "step 2 once more"),
    ):
        with pytest.raises(BadParameter, match=why):
            checkpoints(bad)


def test_no_common_step_is_an_error(trainings: list[Path]) -> None:
    first, second, _ = trainings
    with pytest.raises(BadParameter, match="no step in common"):
        along([first / "step0"], [second / "step4"], own_text(first))
