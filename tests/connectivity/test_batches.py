"""How many examples go through a network at a time: one policy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from companion.connectivity.batches import (
    STATISTICS,
    TOKENS,
    default_batch,
    examples_a_pass,
    fitting,
    room,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bn", ["reestimate", "batch"])
def test_where_a_batch_is_a_statistic_its_size_is_fixed(bn: str, device: str) -> None:
    assert default_batch(nn.Conv2d(1, 1, 1), torch.device(device), bn) == STATISTICS


def test_elsewhere_the_device_decides() -> None:
    convolves, flat = nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Linear(1, 1)
    assert [default_batch(m, CPU, "none") for m in (convolves, flat)] == [128, 500]
    assert default_batch(convolves, torch.device("cuda"), "interpolate") == 2500


def test_a_pass_of_windows_has_as_many_tokens_whatever_their_length() -> None:
    images = [torch.zeros(3, 1, 8, 8), torch.zeros(3, 64), torch.zeros(3, dtype=torch.int64)]
    assert {examples_a_pass(x) for x in images} == {STATISTICS}
    for length, windows in ((64, 128), (1024, 8), (TOKENS, 2)):
        assert examples_a_pass(torch.zeros(3, length, dtype=torch.int64)) == windows


def test_what_is_kept_has_to_fit() -> None:
    assert room(CPU, 1000) == 1000
    assert fitting(500, 10, CPU, 1000) == 100  # no more than there is room for
    assert fitting(50, 10, CPU, 1000) == 50  # no more than was asked for
    assert fitting(50, 2000, CPU, 1000) == 1  # but one at least
    assert fitting(50, 0, CPU, 1000) == 50  # nothing is kept
