"""What each operation does to the axes of its tensors: one rule per kind of operation.

A rule reads the axes of the inputs, unifies or pins some, and returns the axes of the output. The
operations are ATen's, below autograd; there is no rule for any network. An operation without a
rule pins every axis it touches, which is always right. Explained in our chapter 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from companion.rebasin.axes import Atom, Axes, Axis, total

SPATIAL = "positions of an image"
KERNEL = "positions of a kernel"
ONE: Axis = ((Atom(1, pinned="one unit"),),)


class Watch(Protocol):
    """What a rule sees."""

    axes: Axes

    def of(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor."""
        ...

    def refuse(self, tensors: Iterable[Tensor], why: str) -> None:
        """Pin every axis of these tensors, and note why as a refusal."""
        ...


Named = Mapping[str, Any]
"""The arguments of an operation by the names of its schema, in its order, defaults filled in."""
Out = list[Axis] | list[list[Axis]] | None
"""Axes of the output; of each output, where there are several; None: no rule after all."""
Rule = Callable[[Watch, Named, Any], Out]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by ATen's names, their in-place forms included."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            RULES[name + "_"] = function
        return function

    return register


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among the arguments, those in lists included."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def fixed_like(w: Watch, shape: Sequence[int], why: str) -> list[Axis]:
    """Axes of ``shape`` whose positions stay."""
    return [w.axes.fixed(n, why) for n in shape]


def broadcast(w: Watch, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Axis]:
    """Element by element, aligned at the last axis: what lies at one place is one unit."""
    out: list[Axis] = [() for _ in shape]
    pairs: list[tuple[Axis, int]] = []
    for tensor in tensors:
        for back, axis in enumerate(reversed(w.of(tensor)), 1):
            if tensor.shape[-back] != 1:
                pairs.append((axis, len(shape) - back))
    # Outer units first: whether inner ones share an order depends on them.
    pairs.sort(key=lambda p: any(a.within is not None for a in w.axes.atoms(p[0])))
    for axis, dim in pairs:
        if out[dim]:
            w.axes.unify(out[dim], axis)
        else:
            out[dim] = axis
    return [
        axis if axis or size == 1 else w.axes.free(size)
        for axis, size in zip(out, shape, strict=True)
    ]


def pointwise(w: Watch, n: Named, out: Any) -> Out:
    """Element by element."""
    return broadcast(w, tensors_in(n.values()), out.shape)


rule(
    *("clone", "_to_copy", "detach", "alias", "contiguous", "lift", "lift_fresh", "to", "copy"),
    *("dropout", "_prelu_kernel", "where", "masked_fill", "lerp", "fill", "zero"),
    *("hardswish", "hardsigmoid", "rrelu", "rrelu_with_noise"),
)(pointwise)


@rule("empty", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "new_empty")
def constant(w: Watch, n: Named, out: Any) -> Out:
    """One number everywhere looks the same in any order."""
    return [w.axes.free(n) for n in out.shape]


rule(*("empty_like", "zeros_like", "ones_like", "full_like", "scalar_tensor"))(constant)


# Shapes


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten")
def reshape(w: Watch, n: Named, out: Any) -> Out:
    """The same numbers in row-major order under another shape."""
    x = n["self"]
    return w.axes.reshape(w.of(x), x.shape, out.shape)


rule("unflatten")(reshape)


@rule("as_strided")
def as_strided(w: Watch, n: Named, out: Any) -> Out:
    """Only where it changes nothing but the memory behind the numbers."""
    return w.of(n["self"]) if n["self"].shape == out.shape else None


@rule("t", "numpy_T")
def transpose_all(w: Watch, n: Named, out: Any) -> Out:
    """Axes in reverse."""
    return w.of(n["self"])[::-1]


@rule("transpose")
def transpose(w: Watch, n: Named, out: Any) -> Out:
    """Two axes change places."""
    axes = list(w.of(n["self"]))
    i, j = n["dim0"], n["dim1"]
    if axes:
        axes[i], axes[j] = axes[j], axes[i]
    return axes


@rule("permute")
def permute(w: Watch, n: Named, out: Any) -> Out:
    """Axes in another order."""
    axes = w.of(n["self"])
    return [axes[i] for i in n["dims"]]


@rule("expand")
def expand(w: Watch, n: Named, out: Any) -> Out:
    """Copies along an axis look the same in any order."""
    return broadcast(w, [n["self"]], out.shape)


@rule("repeat")
def repeat(w: Watch, n: Named, out: Any) -> Out:
    """Copies one behind the other: the copies, times the units."""
    axes: list[Axis] = [()] * (out.ndim - n["self"].ndim) + list(w.of(n["self"]))
    found = []
    for axis, times in zip(axes, n["repeats"], strict=True):
        copies = w.axes.free(times)
        found.append(w.axes.merge([copies, axis]) if copies and axis else copies or axis)
    return found


@rule("cat")
def cat(w: Watch, n: Named, out: Any) -> Out:
    """Along the axis one behind the other, along the others element by element."""
    tensors = [t for t in n["tensors"] if t.ndim == out.ndim]
    dim = n["dim"] % out.ndim
    axes: list[Axis] = list(w.of(tensors[0]))
    for tensor in tensors[1:]:
        for i, (mine, other) in enumerate(zip(axes, w.of(tensor), strict=True)):
            if i != dim:
                w.axes.unify(mine, other)
    parts = [w.of(t)[dim] or ONE for t in tensors if t.shape[dim]]
    axes[dim] = tuple(block for part in parts for block in part)
    return axes


@rule("stack")
def stack(w: Watch, n: Named, out: Any) -> Out:
    """A new axis; along the others element by element."""
    dim = n["dim"] % out.ndim
    axes = broadcast(w, n["tensors"], n["tensors"][0].shape)
    axes.insert(dim, w.axes.fixed(out.shape[dim], "stacked in order"))
    return axes


def _piece(w: Watch, tensor: Tensor, dim: int, start: int, stop: int) -> list[Axis]:
    axes = list(w.of(tensor))
    if (start, stop) != (0, tensor.shape[dim]):
        _, rest = w.axes.cut(axes[dim], start)
        axes[dim], _ = w.axes.cut(rest, stop - start)
        if stop - start == 1:
            w.axes.pin(axes[dim], "one unit is picked out")
            axes[dim] = ()
    return axes


@rule("slice")
def slice_(w: Watch, n: Named, out: Any) -> Out:
    """A stretch of an axis."""
    x = n["self"]
    dim = n["dim"] % x.ndim
    if n["step"] != 1:
        axes = list(w.of(x))
        w.axes.pin(axes[dim], "every so many are picked out")
        axes[dim] = w.axes.fixed(out.shape[dim], "every so many are picked out")
        return axes
    low, high, _ = slice(n["start"], n["end"]).indices(x.shape[dim])
    return _piece(w, x, dim, low, high)


@rule("narrow")
def narrow(w: Watch, n: Named, out: Any) -> Out:
    """A stretch of an axis."""
    return _piece(w, n["self"], n["dim"] % out.ndim, n["start"], n["start"] + n["length"])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def split(w: Watch, n: Named, out: Any) -> Out:
    """An axis cut into stretches."""
    dim = n["dim"] % n["self"].ndim
    found, start = [], 0
    for piece in out:
        found.append(_piece(w, n["self"], dim, start, start + piece.shape[dim]))
        start += piece.shape[dim]
    return found


@rule("select")
def select(w: Watch, n: Named, out: Any) -> Out:
    """One position of an axis: it stays, and what lies within it is that position's own."""
    x = n["self"]
    return _select(w, x, n["dim"] % x.ndim, n["index"] % x.shape[n["dim"]])


@rule("unbind")
def unbind(w: Watch, n: Named, out: Any) -> Out:
    """Every position of an axis for itself."""
    x = n["self"]
    return [_select(w, x, n["dim"] % x.ndim, i) for i in range(len(out))]


def _select(w: Watch, x: Tensor, dim: int, i: int) -> list[Axis]:
    axes = list(w.of(x))
    axis = w.axes.normal(axes.pop(dim))
    w.axes.pin(axis, "one unit is picked out")
    if len(axis) != 1 or len(axis[0]) != 1:
        return axes
    outer = axis[0][0]

    def own(atom: Atom) -> Atom:
        return w.axes.member(atom, outer, i) if w.axes.lies_within(atom, outer) else atom

    return [tuple(tuple(own(a) for a in b) for b in w.axes.normal(other)) for other in axes]


@rule("glu")
def glu(w: Watch, n: Named, out: Any) -> Out:
    """The first half times the sigmoid of the second: unit by unit."""
    x = n["self"]
    dim = n["dim"] % x.ndim
    axes = list(w.of(x))
    axes[dim], gates = w.axes.cut(axes[dim], out.shape[dim])
    w.axes.unify(axes[dim], gates)
    return axes


@rule("log_sigmoid_forward")
def log_sigmoid(w: Watch, n: Named, out: Any) -> Out:
    """Element by element, with a buffer of the same shape or none."""
    axes = w.of(n["self"])
    none: list[Axis] = [() for _ in out[1].shape]
    return [axes, axes if out[1].numel() else none]


@rule("_weight_norm_interface")
def weight_norm(w: Watch, n: Named, out: Any) -> Out:
    """Directions times lengths: the norm is over all axes but one."""
    return [broadcast(w, [n["v"], n["g"]], out[0].shape), w.of(n["g"])]


@rule("pixel_shuffle")
def pixel_shuffle(w: Watch, n: Named, out: Any) -> Out:
    """Channels in blocks become pixels; the blocks keep their inside."""
    axes = list(w.of(n["self"]))
    channels, inside = w.axes.divide(axes[-3], [out.shape[-3], n["upscale_factor"] ** 2])
    w.axes.pin(inside, SPATIAL)
    for axis in axes[-2:]:
        w.axes.pin(axis, SPATIAL)
    return [*axes[:-3], channels, *fixed_like(w, out.shape[-2:], SPATIAL)]


@rule("constant_pad_nd")
def pad(w: Watch, n: Named, out: Any) -> Out:
    """Equal numbers before and after: new units, in any order among themselves."""
    axes = list(w.of(n["self"]))
    for i in range(len(n["pad"]) // 2):
        before, after = n["pad"][2 * i : 2 * i + 2]
        dim = len(axes) - 1 - i
        if before < 0 or after < 0:
            return None
        if before or after:
            middle = axes[dim] or ONE
            axes[dim] = (
                *((Atom(before),),) * bool(before),
                *middle,
                *((Atom(after),),) * bool(after),
            )
    return axes


@rule("roll", "flip")
def shuffle(w: Watch, n: Named, out: Any) -> Out:
    """Positions change places among themselves."""
    axes = list(w.of(n["self"]))
    for dim in n["dims"] or range(len(axes)):
        w.axes.pin(axes[dim], "positions change places")
        axes[dim] = w.axes.fixed(out.shape[dim], "positions change places")
    return axes


# Products


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


def fits(axes: Sequence[Axis], shape: Sequence[int]) -> bool:
    """True if the axes have the sizes of a tensor of ``shape``."""
    return len(axes) == len(shape) and all(
        size in (0, total(axis)) for axis, size in zip(axes, shape, strict=True)
    )
