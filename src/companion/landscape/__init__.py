"""The loss around networks and between them: slopes, curvatures, what makes a barrier. ::

    surface = Surface(net, data.train)
    delta = towards(net, a, b)
    ends = [surface.local(theta, delta) for theta in (a, b)]
    predictions(*ends)                          # the barrier that the ends lead to expect
    top_eigenvalues(surface, a).values          # of the Hessian at A
    logit_gap(net, a, b, data.train).ensemble   # and what the logits say

``directions.py`` where to go · ``slices.py`` lines, planes and trajectories on them · ``local.py``
slope and curvature, of layer blocks too · ``spectrum.py`` eigenvalues and trace · ``predict.py``
predictors and the exact identity · ``logits.py`` a barrier at the logits · ``bends.py`` curved
paths. Pairs of the run store: :mod:`companion.experiments.landscape`. Explained in chapter 6.
"""

from companion.landscape.bends import Bend, bend_path, fit_bend
from companion.landscape.directions import (
    Direction,
    Principal,
    combined,
    inner,
    length,
    moved,
    principal_directions,
    random_direction,
    restricted,
    scaled,
    towards,
)
from companion.landscape.local import SURFACE_MODES, Blocks, Local, Surface
from companion.landscape.logits import LogitGap, logit_gap
from companion.landscape.predict import (
    PREDICTORS,
    cos_of_branches,
    group_prediction,
    layer_predictions,
    path_curvature,
    predictions,
    weighted_curvature,
)
from companion.landscape.slices import Projected, line_along, plane_along, project_path
from companion.landscape.spectrum import (
    Estimate,
    Spectrum,
    Trace,
    hessian_trace,
    top_eigenvalues,
)

__all__ = [
    "PREDICTORS",
    "SURFACE_MODES",
    "Bend",
    "Blocks",
    "Direction",
    "Estimate",
    "Local",
    "LogitGap",
    "Principal",
    "Projected",
    "Spectrum",
    "Surface",
    "Trace",
    "bend_path",
    "combined",
    "cos_of_branches",
    "fit_bend",
    "group_prediction",
    "hessian_trace",
    "inner",
    "layer_predictions",
    "length",
    "line_along",
    "logit_gap",
    "moved",
    "path_curvature",
    "plane_along",
    "predictions",
    "principal_directions",
    "project_path",
    "random_direction",
    "restricted",
    "scaled",
    "top_eigenvalues",
    "towards",
    "weighted_curvature",
]
