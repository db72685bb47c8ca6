"""The networks that most commands are tried on."""

from __future__ import annotations

import pytest
from commands import BATCHNORM, NET, Nets, files, trained


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    """Two MLPs and two with BatchNorm, as files: a, b, bn_a, bn_b."""
    found = {
        prefix + end: trained(net, order)
        for prefix, net in (("", NET), ("bn_", BATCHNORM))
        for order, end in enumerate("ab", 1)
    }
    return files(tmp_path_factory.mktemp("checkpoints"), found)
