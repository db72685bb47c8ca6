"""Rules for operations that sum: products, attention, norms, reductions, pooling.

See :mod:`companion.rebasin.rules`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from companion.rebasin.axes import Atom, Axis
from companion.rebasin.rules import (
    KERNEL,
    RULES,
    SPATIAL,
    Named,
    Out,
    Watch,
    fixed_like,
    pointwise,
    rule,
    tensors_in,
)


@rule("mm", "bmm", "mv", "dot", "vdot", "matmul")
def product(w: Watch, n: Named, out: Any) -> Out:
    """Sum over the last axis of the first and the last but one of the second."""
    return _product(w, *tensors_in(n.values())[:2])


def _product(w: Watch, x: Tensor, y: Tensor) -> list[Axis]:
    a, b = list(w.of(x)), list(w.of(y))
    batch = a[:1] if len(a) == 3 else []
    if batch:
        w.axes.unify(a[0], b[0])
    summed = b[-2] if len(b) > 1 else b[0]
    # Every row meets every column: inner units may depend on the batch axis, not on either of them.
    w.axes.close([*batch, a[-1]])
    w.axes.close([*batch, summed])
    w.axes.unify(a[-1], summed)
    return a[:-1] + (b[-1:] if len(b) > 1 else [])


@rule("addmm", "baddbmm", "addmv")
def add_product(w: Watch, n: Named, out: Any) -> Out:
    """A product, plus a term that is broadcast."""
    term, *factors = tensors_in(n.values())[:3]
    return _plus(w, term, _product(w, *factors))


def _plus(w: Watch, term: Tensor, axes: list[Axis]) -> list[Axis]:
    for back, axis in enumerate(reversed(w.of(term)), 1):
        if term.shape[-back] != 1:
            w.axes.unify(axes[-back], axis)
    return axes


@rule("convolution")
def convolution(w: Watch, n: Named, out: Any) -> Out:
    """Channels mix like the units of a linear layer, position by position."""
    x, weight, bias = n["input"], n["weight"], n["bias"]
    transposed, groups = n["transposed"], n["groups"]
    a, k = w.of(x), w.of(weight)
    for axis in k[2:]:
        w.axes.pin(axis, KERNEL)
    for axis in a[2:]:
        w.axes.pin(axis, SPATIAL)
    if groups == 1:
        channels, made = (k[0], k[1]) if transposed else (k[1], k[0])
        w.axes.unify(a[1], channels)
    elif groups == x.shape[1] and not transposed:
        # Depth-wise: output channel c * m + i reads input channel c alone.
        made = w.axes.merge([a[1], w.axes.fixed(weight.shape[0] // groups, KERNEL)])
        w.axes.unify(k[0], made)
    else:
        why = f"grouped convolution ({groups} groups) in {w.axes.where}"
        for axis in (a[1], k[0], k[1]):
            w.axes.pin(axis, why)
        made = w.axes.fixed(out.shape[1], why)
    if bias is not None:
        w.axes.unify(made, w.of(bias)[0])
    return [a[0], made, *fixed_like(w, out.shape[2:], SPATIAL)]


@rule("embedding")
def embedding(w: Watch, n: Named, out: Any) -> Out:
    """Rows looked up by number: their order is the vocabulary's."""
    table, indices = n["weight"], n["indices"]
    w.axes.pin(w.of(table)[0], "entries of a vocabulary")
    return [*w.of(indices), w.of(table)[1]]


@rule(
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "scaled_dot_product_attention"),
    "_scaled_dot_product_fused_attention_overrideable",
)
def attention(w: Watch, n: Named, out: Any) -> Out:
    """softmax(q k^T) v: heads in any order, units of q and k in a common one, units of v in one."""
    inputs = [n["query"], n["key"], n["value"]]
    q, k, v = (list(w.of(t)) for t in inputs)
    if len({t.shape[:-2] for t in inputs}) > 1:
        return None  # heads that share keys
    for i in range(len(q) - 2):
        w.axes.unify(q[i], k[i])
        w.axes.unify(q[i], v[i])
    w.axes.unify(q[-1], k[-1])
    w.axes.unify(k[-2], v[-2])
    for axis in (q[-2], k[-2]):
        w.axes.pin(axis, "positions of a sequence")
    for mask in tensors_in([n.get("attn_mask"), n.get("attn_bias")]):
        _plus(w, mask, [*q[:-1], k[-2]])
    made = [*q[:-1], v[-1]]
    if not isinstance(out, tuple):
        return made
    others = [[*q[:-1]] if isinstance(t, Tensor) and t.ndim == len(q) - 1 else [] for t in out[1:]]
    return [made, *others]


# Norms and reductions


@rule("native_layer_norm")
def layer_norm(w: Watch, n: Named, out: Any) -> Out:
    """Statistics over the last axes: their units may be in any order, with scale and shift."""
    axes, shape = w.of(n["input"]), n["normalized_shape"]
    for tensor in tensors_in([n["weight"], n["bias"]]):
        _plus(w, tensor, list(axes))
    kept = [*axes[: -len(shape)], *[() for _ in shape]]
    return [axes, kept, kept]


@rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "_batch_norm_with_update"),
    "_batch_norm_no_update",
)
def batch_norm(w: Watch, n: Named, out: Any) -> Out:
    """Channel by channel, with scale, shift and running statistics."""
    x, *others = tensors_in(n.values())
    axes = w.of(x)
    for tensor in others:
        w.axes.unify(axes[1], w.of(tensor)[0])
    if not isinstance(out, tuple | list):
        return axes
    return [axes, *[[axes[1] if len(t) else ()] if t.ndim == 1 else [] for t in out[1:]]]


@rule("native_group_norm")
def group_norm(w: Watch, n: Named, out: Any) -> Out:
    """Statistics over groups of channels: groups in any order, channels within each as well."""
    axes, channels, groups = w.of(n["input"]), n["C"], n["group"]
    for tensor in tensors_in([n["weight"], n["bias"]]):
        w.axes.unify(axes[1], w.of(tensor)[0])
    if 1 < groups < channels:
        outer = Atom(groups, inner=True)
        w.axes.unify(axes[1], ((outer, Atom(channels // groups, within=outer)),))
    other = [axes[0], () if groups == 1 else w.axes.fixed(groups, "groups of a norm")]
    return [axes, other, other]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(w: Watch, n: Named, out: Any) -> Out:
    """In any order, along its axis and along the others."""
    return w.of(n["self"])


@rule(
    *("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod", "any", "all", "nansum"),
    *("linalg_vector_norm", "norm", "count_nonzero", "max", "min"),
)
def reduce(w: Watch, n: Named, out: Any) -> Out:
    """A symmetric function along some axes: in any order there."""
    x, dim = n["self"], n.get("dim")
    if isinstance(out, tuple) and isinstance(dim, int):  # with indices, which see the order
        w.axes.pin(w.of(x)[dim], "its order is seen")
        found: Any = reduce(w, n, out[0])
        return [found, found]
    if isinstance(out, tuple):
        return None
    if "other" in n:
        return pointwise(w, n, out)  # maximum of two
    dims = range(x.ndim) if dim in (None, []) else [dim] if isinstance(dim, int) else dim
    gone = {d % max(x.ndim, 1) for d in dims}
    kept = bool(n.get("keepdim"))
    axes = enumerate(w.of(x))
    return [() if i in gone else axis for i, axis in axes if kept or i not in gone]


@rule("var_mean", "std_mean")
def moments(w: Watch, n: Named, out: Any) -> Out:
    """Two symmetric functions at once."""
    found: Any = reduce(w, n, out[0])
    return [found, found]


@rule("cumsum", "cumprod", "argsort", "sort", "topk", "argmax", "argmin")
def ordered(w: Watch, n: Named, out: Any) -> Out:
    """The order of an axis is seen; where the others only go along, they may move."""
    x, dim = n["self"], n.get("dim")
    if dim is None or isinstance(out, tuple) or out.shape != x.shape:
        return None
    axes = list(w.of(x))
    w.axes.pin(axes[dim], "its order is seen")
    return axes


def pool(w: Watch, n: Named, out: Any, dims: int) -> Out:
    """Neighbouring positions become one; channels go along."""
    axes = list(w.of(tensors_in(n.values())[0]))
    for axis in axes[-dims:]:
        w.axes.pin(axis, SPATIAL)
    first = out[0] if isinstance(out, tuple) else out
    found = [*axes[:-dims], *fixed_like(w, first.shape[-dims:], SPATIAL)]
    return [found] * len(out) if isinstance(out, tuple) else found


for _dims in (1, 2, 3):
    for _name in (
        *(f"avg_pool{_dims}d", f"_adaptive_avg_pool{_dims}d", f"max_pool{_dims}d"),
        *(f"max_pool{_dims}d_with_indices", f"adaptive_max_pool{_dims}d"),
        *(f"upsample_nearest{_dims}d", f"reflection_pad{_dims}d", f"replication_pad{_dims}d"),
    ):
        RULES[_name] = partial(pool, dims=_dims)
for _name in ("upsample_bilinear2d", "upsample_bicubic2d"):
    RULES[_name] = partial(pool, dims=2)


@rule("index")
def index(w: Watch, n: Named, out: Any) -> Out:
    """Rows looked up by number in the first axis; the other axes go along."""
    x, indices = n["self"], n["indices"]
    if len(indices) != 1 or indices[0] is None or indices[0].dtype == torch.bool:
        return None
    axes = w.of(x)
    w.axes.pin(axes[0], "looked up by number")
    return [*fixed_like(w, indices[0].shape, "looked up by number"), *axes[1:]]
