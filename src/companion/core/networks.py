"""Anybody's ``nn.Module``: what is behind its wrappers, a private copy of it, and its logits.

Instruments never run the caller's own module. They run a :func:`private` copy, which is plain where
the module is compiled or wrapped, has no tensors left from training, computes in the data's
precision, and returns logits whatever its forward returns.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from companion.core.errors import BadParameter

HALF = (torch.float16, torch.bfloat16)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes that hold what torch.compile, FSDP and activation checkpointing have wrapped."""
_HOLDERS = ("DataParallel", "DistributedDataParallel", "AveragedModel")
"""Classes that hold it as ``module``."""


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper wraps; None for any other module."""
    for name in WRAPPERS:
        if name in module._modules:
            return module._modules[name]
    return module._modules.get("module") if type(module).__name__ in _HOLDERS else None


def plain(module: nn.Module) -> nn.Module:
    """The module without wrappers, around it and around its parts; itself if it has none.

    Nothing is copied but the modules above a wrapped part, and they share all tensors.
    """
    while (inner := _inside(module)) is not None:
        module = inner
    if not any(_inside(m) is not None for m in module.modules()):
        return module
    own = copy.copy(module)
    own._modules = {n: None if m is None else plain(m) for n, m in module._modules.items()}
    return own


def check_whole(module: nn.Module) -> None:
    """Refuse a network that cannot be run with a state dict's weights, or cannot be copied.

    Raises:
        BadParameter: it is of TorchScript, lazy, or on the meta device; the message says where.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise BadParameter(
            f"the network is of TorchScript ({type(module).__name__}), which has no layers to look "
            "at: give the module that was scripted or traced."
        )
    for name, tensor in plain(module).state_dict(keep_vars=True).items():
        if is_lazy(tensor):
            raise BadParameter(
                f"the network has lazy layers: {name} has no shape yet. Run it once on an example."
            )
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise BadParameter(
                f"the network is on the meta device: {name} has no values. Build it on the CPU."
            )


def copied(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy of the plain module.

    Pruning, and weight norm of the old kind, leave results of operations as attributes, which
    PyTorch refuses to copy; the copy's are values, and its next forward pass makes them anew.
    Dictionaries that layers call a cache are emptied before each of its forward passes: what was
    computed of other weights (LeViT's biases) would count for all that are loaded later.

    Arguments:
        dtype: as :func:`in_precision` takes it; default: of each tensor its own. There is never a
            copy of the whole network in its own type.

    Raises:
        BadParameter: it holds something that cannot be copied; :func:`check_whole` refuses it.
    """
    check_whole(module)
    module = plain(module)
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values()):
            if dtype is None or value is None or not value.is_leaf or id(value) in memo:
                continue  # a tied one is one
            if type(value) in (nn.Parameter, torch.Tensor):
                found = _cast(value.detach(), dtype)
                if found.dtype != value.dtype:
                    whole = isinstance(value, nn.Parameter)
                    memo[id(value)] = nn.Parameter(found, value.requires_grad) if whole else found
        for value in pytree.tree_leaves([vars(part), part._buffers]):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        own = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as e:
        raise BadParameter(f"the network cannot be copied ({e}).") from e
    if any(True for _ in _caches(own)):
        own.register_forward_pre_hook(_forget)
    return in_precision(own, dtype) if dtype else own


def _caches(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """Dictionaries in which layers keep what they computed of their weights."""
    for part in module.modules():
        for name, value in vars(part).items():
            if "cache" in name and isinstance(value, dict) and not name.startswith("__"):
                yield value


def _forget(module: nn.Module, args: Any) -> None:
    for cache in _caches(module):
        cache.clear()


def without_weights(module: nn.Module) -> nn.Module:
    """The very module, whose parameters take no memory from now on, and are no numbers to use.

    An architecture into whose copies state dicts are loaded. Buffers stay: not all are in those.
    """
    for p in module.parameters():
        p.data = p.data.new_zeros(()).expand(p.shape)
    return module


def private(module: nn.Module, inputs: torch.Tensor, *, narrow: bool = True) -> nn.Module:
    """A copy to run on ``inputs``: on their device, in eval mode, without gradients.

    In their precision where they are real numbers, and at least in float32: half precision is for
    storing weights, not for sums over a dataset. It returns :func:`logits`.

    Arguments:
        narrow: a network in float64 becomes float32 where the inputs are.
    """
    own = returning_logits(copied(module)).to(inputs.device).eval().requires_grad_(False)
    kinds = {t.dtype for t in own.state_dict().values() if _is_float(t)}
    narrow = narrow or torch.float64 not in kinds
    if narrow and inputs.dtype in (torch.float32, torch.float64) and kinds - {inputs.dtype}:
        return in_precision(own, inputs.dtype)
    return in_precision(own, torch.float32) if kinds.intersection(HALF) else own


def channels_last(module: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """The very module, its convolutions' weights laid out as a CPU reads them fastest.

    Convolutions of ResNet-18 take half the time; sums are the same up to rounding. A module stays
    as it is where that helps nothing (no convolution of images, another device), where its forward
    relies on how tensors lie in memory (``view`` over channels), and where a gradient would be
    written beyond its end (:func:`_unsafe_last`).

    Arguments:
        inputs: two examples that it takes, on the device to compute on.
    """
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if inputs.device.type != "cpu" or not convolutions or any(map(_unsafe_last, convolutions)):
        return module
    trial = private(module, inputs)
    try:
        with torch.no_grad():
            before, after = trial(inputs), _last(trial)(inputs)
    except RuntimeError:
        return module
    return _last(module) if torch.allclose(before, after, 1e-3, 1e-4) else module


def _unsafe_last(convolution: nn.Conv2d) -> bool:
    """Whether oneDNN's gradient of these weights, channels last, writes beyond their end.

    It does on a CPU with AVX2 and no AVX-512, for strided 1x1 convolutions of 2 to 7 channels
    (torch 2.14.1); the process dies some time later. See also
    :class:`companion.models.layers.PlainLayout`.
    """
    narrow = convolution.in_channels // convolution.groups < 8
    return narrow and convolution.kernel_size == (1, 1) and convolution.stride != (1, 1)


def _last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The very module, its real numbers in ``dtype`` and its complex ones in pairs of them.

    ``module.to(dtype)`` would drop the imaginary parts, ``module.double()`` leave them in single.
    """
    module._apply(partial(_cast, dtype=dtype))
    return module


def _cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    pairs = torch.complex128 if dtype == torch.float64 else torch.complex64
    return t.to(dtype) if t.is_floating_point() else t.to(pairs) if t.is_complex() else t


def at_least_single(tensor: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers in float32; all others as they are."""
    return tensor.float() if tensor.dtype in HALF else tensor


def returning_logits(module: nn.Module) -> nn.Module:
    """The very module; from now on it returns :func:`logits` whatever its forward returns."""
    module.register_forward_hook(_logits_hook)
    return module


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _logits_hook(module: nn.Module, args: Any, outputs: Any) -> torch.Tensor:
    return logits(outputs)


def leaves(outputs: Any) -> list[torch.Tensor]:
    """All tensors in what a forward pass returned, records of any kind included."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type | Mapping):
        outputs = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        return [t for part in outputs for t in leaves(part)]
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def logits(outputs: Any) -> torch.Tensor:
    """The logits in what a forward pass returned.

    Of a record (a dataclass, a named tuple, a dictionary) the entry ``logits``; else the first
    floating-point tensor of it. Maps of one pixel, (N, K, 1, 1), are logits (N, K).

    Raises:
        BadParameter: there is no such tensor.
    """
    found = outputs
    if not isinstance(found, torch.Tensor):
        named = outputs.get("logits") if isinstance(outputs, Mapping) else None
        found = getattr(outputs, "logits", named)
    if not isinstance(found, torch.Tensor):
        found = next((t for t in leaves(outputs) if _is_float(t)), None)
    if found is None:
        kind = type(outputs).__name__
        raise BadParameter(f"forward returns no logits: a {kind} without a floating-point tensor.")
    out: torch.Tensor = found
    return out.flatten(1) if out.ndim > 2 and set(out.shape[2:]) == {1} else out
