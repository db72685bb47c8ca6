"""Is the straight line between two networks low? Points, segments, planes and barriers.

Works on any ``nn.Module``, two state dicts of it and any data. Source: Frankle et al. 2020,
Section 2; used in every chapter, explained in chapter 1.
"""

from companion.connectivity.barrier import (
    DEFINITIONS,
    Barrier,
    Curve,
    Plane,
    barrier,
    grid,
    plane,
    segment,
)
from companion.connectivity.walk import (
    BN_EXAMPLES,
    BN_MODES,
    Measure,
    Score,
    Walker,
    check_bn_examples,
    classification,
    has_batchnorm,
)

__all__ = [
    "BN_EXAMPLES",
    "BN_MODES",
    "DEFINITIONS",
    "Barrier",
    "Curve",
    "Measure",
    "Plane",
    "Score",
    "Walker",
    "barrier",
    "check_bn_examples",
    "classification",
    "grid",
    "has_batchnorm",
    "plane",
    "segment",
]
