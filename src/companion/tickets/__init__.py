"""Which weights a network can do without: lottery tickets (Frankle & Carbin 2019, Frankle 2020). ::

    names = prunable(net, skip=("head",))
    mask = whole(names, theta_0)
    for level in range(1, 10):                           # iterative magnitude pruning
        theta_T = train(masked(theta_k, mask))           # rewound to step k, pruned weights at 0
        mask = prune(magnitude(theta_T, names), mask, 0.8**level)

``masks.py`` which weights may go, and which go · ``scores.py`` magnitude, SNIP, SynFlow. The
loop above, over stored runs and with its controls: :mod:`companion.experiments.tickets`.

How this differs from ``torch.nn.utils.prune`` and open_lth (facebookresearch, at its only version):

- *Pruned weights are 0, and stay 0.* Both keep the full tensor and multiply it by the mask in the
  forward pass. The tensor underneath is still moved by momentum and weight decay, and a checkpoint
  holds weights that the network does not have. Here the start is ``mask * W_k`` and the gradient is
  masked before the optimiser sees it, so weights, momentum and Adam's averages are exactly 0
  throughout, and a stored network is its own proof.
- *The number of weights is exact.* open_lth keeps what is larger than the n-th magnitude: it prunes
  n + 1, and every weight that ties with it. ``global_unstructured`` rounds in each round, so that
  errors add up. Here ``round(total * density)`` weights stay at every level, ties broken by place.
- *A fraction is a fraction of what may be pruned.* open_lth's counts the weights of the layers it
  leaves alone, too.
- *Which tensors are pruned is read off the modules* (weights of linear layers and convolutions),
  and a layer is left alone by its name; open_lth has a list for each of its networks, which differ
  in whether the head is pruned.
- *Random masks are drawn from a key,* are nested along the levels, and have the layers' own numbers
  to a weight.
- *A rewind is a stored state,* with the same bits for every level, and not a second training.

Source: Frankle et al. 2020, Algorithm 2; Frankle & Carbin 2019; our chapter on lottery tickets.
"""

from companion.tickets.masks import SCOPES, Pruning, carry, prunable, prune, random_like, whole
from companion.tickets.scores import Scores, magnitude, snip, synflow

__all__ = [
    "SCOPES",
    "Pruning",
    "Scores",
    "carry",
    "magnitude",
    "prunable",
    "prune",
    "random_like",
    "snip",
    "synflow",
    "whole",
]
