"""Git Re-Basin: the permutation symmetries of any network, and matching networks by them.

    spec = derive(module, example)                  # which units may move; proven
    found = weight_matching(spec, a, b)             # or activation_matching, straight_through, …
    aligned = found.apply(module, b)                # B with its units in A's order; checked

``spec.py`` the value · ``trace.py``, ``axes.py``, ``rules*.py``, ``derive.py``, ``resolve.py``,
``proof.py`` from a network to its spec · ``assignment.py``, ``weights.py``, ``activations.py``,
``ste.py``, ``merge.py`` matching · ``repair.py``, ``calibration.py`` what to do afterwards.

Source: Ainsworth et al. 2023, and Jordan et al. 2023 for REPAIR; our chapter 2.
"""

from companion.rebasin.activations import activation_matching
from companion.rebasin.derive import derive
from companion.rebasin.matching import Matching, bound
from companion.rebasin.merge import Merged, merge_many
from companion.rebasin.proof import Unproven, check_equal
from companion.rebasin.repair import Repaired, repair, reset_batchnorm
from companion.rebasin.spec import Group, Permutations, Spec, chain
from companion.rebasin.ste import straight_through
from companion.rebasin.weights import greedy, objective, weight_matching

__all__ = [
    "Group",
    "Matching",
    "Merged",
    "Permutations",
    "Repaired",
    "Spec",
    "Unproven",
    "activation_matching",
    "bound",
    "chain",
    "check_equal",
    "derive",
    "greedy",
    "merge_many",
    "objective",
    "repair",
    "reset_batchnorm",
    "straight_through",
    "weight_matching",
]
