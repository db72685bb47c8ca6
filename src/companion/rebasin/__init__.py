"""Git Re-Basin: the permutation symmetries of any network, and matching networks by them. ::

    spec = derive(module, example)                  # which units may move; proven
    found = weight_matching(spec, a, b)             # or activation_matching, straight_through, …
    aligned = found.apply(module, b)                # B with its units in A's order; checked

``spec.py`` the value · ``derive.py`` from a network to its spec, with ``trace.py``, ``axes.py``,
``rules.py`` and ``proof.py`` · ``weights.py``, ``activations.py``, ``ste.py``, ``merge.py``,
``universe.py`` matching, by ``assignment.py``, with ``matching.py`` as the result · ``widths.py``
a narrow network in a wide one's space · ``folding.py``, ``rotation.py``, ``learned.py`` the
residual stream of a GPT, rotated · ``repair.py``, ``calibration.py`` what to do afterwards.

Source: Ainsworth et al. 2023, and Jordan et al. 2023 for REPAIR; our chapter 2.
"""

from companion.rebasin.activations import activation_matching
from companion.rebasin.cycle import triangle_defect
from companion.rebasin.derive import derive
from companion.rebasin.folding import Folding, fold, function_gap, stream_of
from companion.rebasin.learned import learned_rotation
from companion.rebasin.matching import Matching
from companion.rebasin.merge import Merged, merge_many
from companion.rebasin.proof import Unproven, check_equal
from companion.rebasin.repair import Repaired, repair, repair_many, reset_batchnorm
from companion.rebasin.rotation import (
    Rotation,
    activation_rotation,
    procrustes,
    random_rotation,
    rotate,
    rotation_matching,
    transform,
)
from companion.rebasin.spec import Group, Permutations, Spec, chain
from companion.rebasin.ste import straight_through
from companion.rebasin.weights import bound, greedy, objective, weight_matching
from companion.rebasin.widths import Widened, widen

__all__ = [
    "Folding",
    "Group",
    "Matching",
    "Merged",
    "Permutations",
    "Repaired",
    "Rotation",
    "Spec",
    "Unproven",
    "Widened",
    "activation_matching",
    "activation_rotation",
    "bound",
    "chain",
    "check_equal",
    "derive",
    "fold",
    "function_gap",
    "greedy",
    "learned_rotation",
    "merge_many",
    "objective",
    "procrustes",
    "random_rotation",
    "repair",
    "repair_many",
    "reset_batchnorm",
    "rotate",
    "rotation_matching",
    "straight_through",
    "stream_of",
    "transform",
    "triangle_defect",
    "weight_matching",
    "widen",
]
