"""Are the features of two networks linearly connected, layer by layer? ::

    found = features(net, a, b, data.test)
    found.layer("layer2.relu").gap[0.5].mean      # E[1 - cos] at the middle
    found.layer("layer2.relu").ratio(0.5)         # relative to E[1 - cos(A, B)]

``taps.py`` where features come from · ``measure.py`` the one streamed pass · ``conditions.py`` weak
additivity and commutativity · ``theorem.py`` networks that meet both exactly · ``stitching.py`` one
network's beginning, the other's end · ``spectra.py`` rank.
Source: Zhou et al. 2023 (layerwise linear feature connectivity); our chapter 3.
"""

from companion.features.conditions import (
    Additivity,
    Commutativity,
    LayerCommutativity,
    ReluAdditivity,
    commutativity,
    weak_additivity,
)
from companion.features.measure import MODES, PER, Features, LayerFeatures, Stat, features
from companion.features.spectra import (
    Spectrum,
    SubspaceAngles,
    feature_spectra,
    principal_angles,
    weight_spectra,
)
from companion.features.stitching import INPUT, Stitched, Stitching, stitch
from companion.features.taps import (
    DEFAULT_KINDS,
    KINDS,
    OUTPUT,
    Examples,
    Site,
    Taps,
    first_tensor,
    sites,
)
from companion.features.theorem import Built, LayerCheck, Theorem, exact, theorem1

__all__ = [
    "DEFAULT_KINDS",
    "INPUT",
    "KINDS",
    "MODES",
    "OUTPUT",
    "PER",
    "Additivity",
    "Built",
    "Commutativity",
    "Examples",
    "Features",
    "LayerCheck",
    "LayerCommutativity",
    "LayerFeatures",
    "ReluAdditivity",
    "Site",
    "Spectrum",
    "Stat",
    "Stitched",
    "Stitching",
    "SubspaceAngles",
    "Taps",
    "Theorem",
    "commutativity",
    "exact",
    "feature_spectra",
    "features",
    "first_tensor",
    "principal_angles",
    "sites",
    "stitch",
    "theorem1",
    "weak_additivity",
    "weight_spectra",
]
