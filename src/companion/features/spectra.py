"""Are weights and features of low rank? Singular values, whole profiles of them.

    weight_spectra(net, theta)                 # of each weight, as a matrix (outputs, the rest)
    feature_spectra(net, theta, test)          # of each layer's features, (samples, channels)
    principal_angles(net, a, b, k=5)           # between the leading subspaces of A's and B's

Zhou et al. offer low rank as the reason why matching works in wide, well trained networks only
(App. B.5, Figs. 20-22). Features are never stored: the channels' second moment is. Our chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import subspace_angles
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from companion.core.errors import BadParameter, whole
from companion.core.networks import plain
from companion.core.theta import Theta, check_theta, layout
from companion.features.taps import Examples, Site, batches, checked, examples_of, sites, tapped


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix.

    Arguments:
        name: of the entry (``weight``) or of the site (``feature``).
        kind: which of the two.
        rows, columns: of the matrix. Of a weight: outputs, and everything else. Of features:
            samples (with the positions of maps and of token sequences), and channels.
        values: the ``min(rows, columns)`` singular values, largest first. Features' come from a
            second moment: below about 1e-8 of the largest they are rounding.
        centred: whether each channel's mean was taken away before.
    """

    name: str
    kind: str
    rows: int
    columns: int
    values: tuple[float, ...]
    centred: bool = False

    @property
    def profile(self) -> tuple[float, ...]:
        """The values over the largest, from 1 down; all zeros for a matrix of zeros."""
        top = self.values[0]
        return tuple(v / top if top else 0.0 for v in self.values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values over their sum: r if r are equal and the rest are 0.

        NaN for a matrix of zeros. Source: Roy and Vetterli 2007.
        """
        total = math.fsum(self.values)
        if not total:
            return math.nan
        shares = [v / total for v in self.values if v]
        return math.exp(-math.fsum(p * math.log(p) for p in shares))

    @property
    def stable_rank(self) -> float:
        """Sum of squares over the largest square, at most the rank; NaN for a matrix of zeros."""
        return math.fsum(v * v for v in self.profile) if self.values[0] else math.nan

    def leading(self, share: float = 0.9) -> int:
        """How many values hold ``share`` of the sum of squares; 0 for a matrix of zeros.

        Raises:
            BadParameter: a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise BadParameter(f"share: {share} must be above 0 and at most 1.")
        squares = [v * v for v in self.profile]
        wanted, held = share * math.fsum(squares), 0.0
        for number, square in enumerate(squares):
            if held >= wanted:
                return number
            held += square
        return len(squares)


@dataclass(frozen=True)
class SubspaceAngles:
    """Principal angles between the leading singular subspaces of one weight in A and in B.

    Arguments:
        name: of the entry.
        k: dimensions of the subspaces, fewer where the matrix has fewer.
        left, right: in the space of outputs and in that of inputs; degrees, smallest first.
    """

    name: str
    k: int
    left: tuple[float, ...]
    right: tuple[float, ...]


def weight_spectra(
    module: nn.Module, theta: Theta, *, names: Sequence[str] | None = None
) -> tuple[Spectrum, ...]:
    """Singular values of each weight of two axes or more, in float64.

    A convolution's weight is the matrix (outputs, inputs · kernel positions); whatever the layer,
    the first axis stands against all the others. Tied weights count once.

    Arguments:
        theta: a state dict of ``module``.
        names: layers (a name, or a prefix ``"stage1"`` of names); default all.

    Raises:
        BadParameter: a state dict that does not fit, a name that fits no layer, or no such weight.

    Source: Zhou et al. 2023, App. B.5, Figs. 20-22; our chapter 3.
    """
    out = []
    theta = check_theta(module, theta, "A")
    for name in _weights(module, names):
        matrix = theta[name].detach().double().flatten(1)
        values = torch.linalg.svdvals(matrix).tolist()
        out.append(Spectrum(name, "weight", len(matrix), matrix.shape[1], tuple(values)))
    return tuple(out)


def principal_angles(
    module: nn.Module, a: Theta, b: Theta, *, k: int = 5, names: Sequence[str] | None = None
) -> tuple[SubspaceAngles, ...]:
    """Angles between the spaces of the first ``k`` singular vectors of each weight of A and of B.

    Where ``k`` is all of a space, its angles are 0 and say nothing (the left ones of a layer with
    few outputs). Where the k-th singular value is close to the next one, the subspace is hardly
    defined, and so are the angles. The scale to read them by is that of two random subspaces: in
    high dimensions nearly all their angles are close to 90 degrees.

    Arguments:
        a, b: state dicts of ``module``.
        names: as in :func:`weight_spectra`.

    Raises:
        BadParameter: as :func:`weight_spectra`, or a ``k`` below 1.

    Source: in the released code of Zhou et al. 2023, not in the paper; our chapter 3.
    """
    whole("k", k, 1)
    out = []
    a, b = check_theta(module, a, "A"), check_theta(module, b, "B")
    for name in _weights(module, names):
        parts = [
            torch.linalg.svd(t[name].detach().double().flatten(1).cpu(), False) for t in (a, b)
        ]
        (left_a, _, right_a), (left_b, _, right_b) = parts
        most = min(k, left_a.shape[1])
        left, right = (
            sorted(math.degrees(v) for v in subspace_angles(p.numpy(), q.numpy()))
            for p, q in ((left_a[:, :most], left_b[:, :most]), (right_a[:most].T, right_b[:most].T))
        )
        out.append(SubspaceAngles(name, most, tuple(left), tuple(right)))
    return tuple(out)


class _Moment:
    """Sum of outer products of rows about an origin, batch by batch, in float64."""

    def __init__(self, centred: bool):
        self.centred, self.count = centred, 0
        self.origin = self.sums = self.products = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Take in rows, shape (n, channels)."""
        rows = rows.double()
        if self.centred:
            if not self.count:  # close to the mean, so that little is lost in the subtraction
                self.origin = rows.mean(0)
            rows = rows - self.origin
            self.sums = self.sums + rows.sum(0)
        self.products = self.products + rows.T @ rows
        self.count += len(rows)

    def values(self) -> tuple[float, ...]:
        """Singular values of all the rows, largest first."""
        products = self.products
        if self.centred:
            products = products - torch.outer(self.sums, self.sums) / self.count
        found = torch.linalg.eigvalsh(products).flip(0).clamp(min=0).sqrt()
        return tuple(found[: self.count].tolist())


@torch.inference_mode()
def feature_spectra(
    module: nn.Module,
    theta: Theta,
    split: Examples,
    *,
    layers: Sequence[str] | None = None,
    centred: bool = False,
    channels: int | None = None,
    batch: int | None = None,
) -> tuple[Spectrum, ...]:
    """Singular values of every layer's features, as a matrix of samples times channels.

    Of a feature map every position is a sample, as is every token of a sequence. The values are
    those of the whole matrix, exactly, but for rounding; nothing larger than channels squared is
    kept. The networks run in eval mode: BatchNorm with the network's own statistics.

    Arguments:
        theta: a state dict of ``module``.
        split: data, on the device to compute on.
        layers: sites as in :func:`companion.features.sites`; default its default.
        centred: take the mean of each channel away first. Features after a ReLU have a mean that
            is most of them, and a first value that says little else.
        channels: axis of the channels in outputs of more than two axes. Default: 1 in feature maps
            and in the outputs of convolutions and BatchNorm, the last in token sequences (of
            three axes).
        batch: samples a forward pass.

    Raises:
        BadParameter: a state dict that does not fit, no data, or layers that are not there.

    Source: Zhou et al. 2023, App. B.5, Figs. 20-22; our chapter 3.
    """
    split = examples_of(split)
    (theta,) = checked(module, {"A": theta}, split)
    found = sites(module, split.x[:2], layers)
    moments = {site.name: _Moment(centred) for site in found}
    modules = dict(plain(module).named_modules())
    with tapped(module, theta, found, split.x) as taps:
        for x, _ in batches(module, split, batch, found):
            outputs, _ = taps.run(x)
            for site in found:
                rows = _rows(outputs[site.name], site, modules, channels)
                moments[site.name].add(rows)
    return tuple(
        Spectrum(n, "feature", m.count, m.products.shape[0], m.values(), centred)
        for n, m in moments.items()
    )


def _rows(
    out: Tensor, site: Site, modules: Mapping[str, nn.Module], channels: int | None
) -> Tensor:
    """A site's output as (samples, channels)."""
    if out.ndim <= 2:
        return out.reshape(len(out), -1)
    axis = channels
    if axis is None:
        owner = modules.get(site.name.partition("#")[0])
        axis = -1 if out.ndim == 3 and not isinstance(owner, _ConvNd | _NormBase) else 1
    return out.movedim(axis, -1).flatten(0, -2)


def _weights(module: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Names of the weights of two axes or more."""
    spec, own = layout(module), plain(module).state_dict()
    chosen = set(spec.select(names))
    found = [n for n in spec.parameters if n in chosen and own[n].ndim > 1]
    if not found:
        raise BadParameter("no weight of two axes or more is among the layers asked for.")
    return found
