"""Which weights may go, and which go: by a score, at random, or as another mask says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.core.errors import BadParameter, one_of
from companion.core.masks import Mask, alive
from companion.core.seeds import Key
from companion.core.theta import Theta, layout
from companion.tickets.scores import Scores

_NOT_LINEAR = (
    *(nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    nn.modules.batchnorm._NormBase,
)

SCOPES = ("global", "layer")
"""What competes for the weights to keep: all tensors together, or the weights of each tensor."""


@dataclass(frozen=True)
class Pruning:
    """How much is pruned in a round, among which weights.

    Arguments:
        fraction: of the weights that are left, pruned in each round. One round with a fraction of
            0.7 is the one-shot pruning to 30 % that the paper has for ImageNet.
        scope: one of :data:`SCOPES`. ``global`` is the paper's; ``layer`` prunes every tensor by
            the same fraction.
        skip: layers left alone, by name or first part of it, such as ``("head",)``. Biases and
            norms are never pruned. Default: none; what the paper left alone it does not say, and
            its code differs from network to network.

    Raises:
        BadParameter: a fraction that is not between 0 and 1, an unknown scope.

    Source: Frankle et al. 2020, Algorithm 2 and Appendix A.
    """

    fraction: float = 0.2
    scope: str = "global"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, int | float) and not isinstance(self.fraction, bool)
        if not number or not 0 < self.fraction < 1:
            raise BadParameter(
                f"fraction: {self.fraction!r} must lie between 0 and 1; 0.2 prunes 20 % a round."
            )
        one_of("scope", self.scope, SCOPES)
        object.__setattr__(self, "skip", tuple(sorted(self.skip)))

    def density(self, level: int) -> float:
        """Share of the weights that is left after ``level`` rounds."""
        return float((1 - self.fraction) ** level)


def prunable(module: nn.Module, skip: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the weights that may be pruned: those of linear layers and convolutions.

    That is, parameters called ``weight``-something of two dimensions or more, so that attention and
    the linear layers of other libraries count, too. Neither biases nor norms nor embeddings, and so
    not a head that is tied to an embedding.

    Arguments:
        skip: layers left alone, by name or first part of it.

    Raises:
        BadParameter: a layer that is not there; nothing is left to prune.
    """
    spec = layout(module)
    left_alone = set(spec.select(skip)) if skip else set()
    layers = [
        (isinstance(layer, _NOT_LINEAR), name, p)
        for layer in module.modules()
        for name, p in layer.named_parameters(recurse=False)
    ]
    linear = {id(p) for other, name, p in layers if not other and "weight" in name and p.ndim > 1}
    linear -= {id(p) for other, _, p in layers if other}
    state = module.state_dict(keep_vars=True)
    names = tuple(n for n in spec.parameters if id(state[n]) in linear and n not in left_alone)
    if not names:
        raise BadParameter(
            "pruning: no weight of a linear layer or convolution is left to prune"
            + (f" without {', '.join(skip)}." if skip else ".")
        )
    return names


def whole(names: Sequence[str], theta: Theta) -> dict[str, Tensor]:
    """The mask of the dense network: everything is kept.

    Arguments:
        names: of :func:`prunable`.
        theta: a state dict, for the shapes.
    """
    return {name: torch.ones(theta[name].shape, dtype=torch.bool) for name in names}


def prune(score: Scores, mask: Mask, density: float, scope: str = "global") -> dict[str, Tensor]:
    """The mask that keeps the highest scores of what ``mask`` has left.

    Arguments:
        score: name -> a number for each weight; those of pruned weights do not count.
        mask: what is there now; the result is nested in it.
        density: share of all weights to keep, of each tensor (scope ``layer``) or of all of them
            together; ``round(total * density)`` are kept, of equal scores the first ones.
        scope: one of :data:`SCOPES`.

    Raises:
        BadParameter: scores that are not finite or do not fit; more weights to keep than there are.
    """
    one_of("scope", scope, SCOPES)
    parts = [[name] for name in mask] if scope == "layer" else [list(mask)]
    out = {}
    for names in parts:
        for name in names:
            if name not in score or score[name].shape != mask[name].shape:
                raise BadParameter(f"scores: none for {name} of shape {tuple(mask[name].shape)}.")
        kept = torch.cat([mask[n].cpu().flatten() for n in names])
        values = torch.cat([score[n].detach().cpu().double().flatten() for n in names])
        if not bool(torch.isfinite(values[kept]).all()):
            raise BadParameter("scores: not all are finite; the network may have diverged.")
        count = round(len(kept) * density)
        if count > int(kept.sum()):
            raise BadParameter(
                f"density: {density:g} would keep {count} weights, but {int(kept.sum())} are left."
            )
        values[~kept] = -math.inf
        order = torch.sort(values, descending=True, stable=True).indices
        new = torch.zeros_like(kept)
        new[order[:count]] = True
        for name, flat in zip(names, new.split([mask[n].numel() for n in names]), strict=True):
            out[name] = flat.reshape(mask[name].shape).clone()
    return {name: out[name] for name in mask}


def random_like(mask: Mask, key: Key) -> dict[str, Tensor]:
    """A random mask that keeps as many weights of each tensor as ``mask`` does.

    Each weight has its place in a random queue that depends on the key alone, so masks of one key
    are nested wherever the numbers they follow fall.

    Source: Frankle et al. 2020, Section 4 (random pruning).
    """
    out = {}
    for name, (count, total) in alive(mask).items():
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[key.fold(name).permutation(total)[:count]] = True
        out[name] = chosen.reshape(mask[name].shape)
    return out


def carry(mask: Mask, permute: Callable[[Theta], Theta]) -> dict[str, Tensor]:
    """The mask in the coordinates of another network: its units change places as weights do.

    Arguments:
        permute: what brings the state dict of the network the mask is from to the other one, such
            as ``lambda theta: spec.permute(theta, found.perms)``.

    Raises:
        BadParameter: it is no permutation: another number of weights would be kept.

    Source: Adnan et al. 2025 (permuting masks to new initialisations).
    """
    moved = {name: kept.to(torch.bool) for name, kept in permute(dict(mask)).items()}
    if alive(moved) != alive(mask):
        raise BadParameter("carry: not a permutation; it changes how many weights a layer keeps.")
    return {name: moved[name] for name in mask}
