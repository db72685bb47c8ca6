"""Which layers make the barrier? Segments along which only some layers move. ::

    found = sweep(net, a, b, data, Sweep(kinds=("single", "window"), draws=5))
    found.worst("single", "train")      # layer -> barrier in nats, the larger of both defaults
    found.full_height("train")          # of the whole network
    found.additivity("train").ratio     # full / sum of the single layers

``groups.py`` what a layer is · ``sweep.py`` what is asked, the sets, and what comes back ·
``replay.py`` forward passes that begin at the first changed layer. Pairs of the run store:
:func:`companion.experiments.layers.sweep_pairs`. Source: Adilova et al. 2024; explained in
chapter 4.
"""

from companion.layerwise.groups import Groups, layer_groups
from companion.layerwise.sweep import (
    DEFINITIONS,
    KINDS,
    LayerBarriers,
    Parts,
    Rise,
    Row,
    Sweep,
    sweep,
)

__all__ = [
    "DEFINITIONS",
    "KINDS",
    "Groups",
    "LayerBarriers",
    "Parts",
    "Rise",
    "Row",
    "Sweep",
    "layer_groups",
    "sweep",
]
