"""How far permutations among three networks or more are from agreeing by way of a third.

Matching A with B, B with C and A with C one pair at a time gives three permutations of which any
two compose to another than the third. Source: Crisostomi et al. 2024, Section 3; our chapter 2b.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from companion.core.errors import BadParameter
from companion.rebasin.spec import Permutations, Spec


def triangle_defect(spec: Spec, pairs: Mapping[tuple[int, int], Permutations]) -> float:
    """Share of units that come to another place by way of a third network than directly.

    Of networks i < j < k, unit u of i goes to a unit of j, and on from there to one of k; it counts
    if that is not the unit of k which u is matched with. The units of all groups and all triangles
    count alike; one inside another (of a head) counts if either differs.

    Arguments:
        spec: of the architecture.
        pairs: (i, j) -> permutations that bring network j into the order of network i, such as
            ``weight_matching(spec, thetas[i], thetas[j]).perms``; one direction of each pair.

    Returns:
        0 (they are consistent) to 1; that of random permutations of n units is 1 - 1/n.

    Raises:
        BadParameter: fewer than three networks, a pair is missing, or it does not fit the spec.
    """
    networks = sorted({n for pair in pairs for n in pair})
    if len(networks) < 3:
        raise BadParameter(f"triangles take at least three networks, got {len(networks)}.")
    both: dict[tuple[int, int], Permutations] = {}
    for i, j in combinations(networks, 2):
        if (i, j) in pairs:
            both[i, j] = pairs[i, j]
        elif (j, i) in pairs:
            both[i, j] = spec.inverse(pairs[j, i])
        else:
            raise BadParameter(f"triangles: networks {i} and {j} are not matched; every pair must.")
        spec.check(both[i, j])
    apart = total = 0
    for i, j, k in combinations(networks, 3):
        through = spec.compose(both[j, k], both[i, j])
        for name, group in spec.groups.items():
            other = through[name] != both[i, k][name]
            if group.within is not None:
                outer = through[group.within] != both[i, k][group.within]
                other |= outer.unsqueeze(1)
            apart += int(other.sum())
            total += other.numel()
    return apart / max(1, total)
