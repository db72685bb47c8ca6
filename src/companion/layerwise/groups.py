"""Layer groups: which entries of a state dict move together, and in which order layers compute.

A layer is all entries that share a module name: weight and bias, and for BatchNorm the running
statistics too. Tensors that are tied are one layer, so averaging "the input embedding" of a
language model moves its output matrix as well. Source: Adilova et al. 2024, Section 3; our
chapter 4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from companion.core.errors import BadParameter
from companion.core.theta import layout
from companion.layerwise.replay import first_uses

log = logging.getLogger("companion")

Groups: TypeAlias = Mapping[str, tuple[str, ...]]
"""Label -> entries (parameters and floating-point buffers), in the order the layers compute."""

By: TypeAlias = str | int | Sequence[str]
"""``"module"``: every module with entries of its own is a group. ``"block"``: modules that share a
numbered block are one (``h.0`` of a transformer, ``stage1.0`` of a ResNet). ``"part"``: within a
block, modules that share its child are one (``h.0.attn``, ``h.0.mlp``), and all norms of the block
another (``h.0.norms``). A whole number d: modules whose names agree in the first d parts (1:
``stage1``, 2: ``stage1.0``). A list of prefixes: a group each; what no prefix fits is in no
group."""


def layer_groups(
    module: nn.Module, by: By = "module", example: torch.Tensor | None = None
) -> Groups:
    """The layer groups of any network.

    Arguments:
        module: any network; not changed.
        by: how entries are grouped, see :data:`By`.
        example: a batch of inputs, on the module's device. With it, groups are in the order in
            which a forward pass first reads one of their entries; a group that is never read comes
            last. Without it they are in the order of registration, which need not be the same.

    Returns:
        label -> entries. Every entry is in one group at most, a tied tensor under its first name.

    Raises:
        BadParameter: a prefix that fits no layer, or two prefixes that fit the same one.

    Source: Adilova et al. 2024, Section 3 (21 groups of the ResNet-18 without norms); chapter 4.
    """
    layers = layout(module).groups
    groups: dict[str, list[str]] = {}
    if isinstance(by, str | int):
        for layer, names in layers.items():
            groups.setdefault(_label(module, layer, by), []).extend(names)
    else:
        taken: dict[str, str] = {}
        for prefix in by:
            hits = matching(layers, prefix)
            for layer in hits:
                if layer in taken:
                    raise BadParameter(
                        f"groups: layer {layer!r} is in {taken[layer]!r} and in {prefix!r}; "
                        "a layer can be in one group only."
                    )
                taken[layer] = prefix
            groups[prefix] = [name for layer in hits for name in layers[layer]]
    return _ordered(module, {k: tuple(v) for k, v in groups.items()}, example)


def _label(module: nn.Module, layer: str, by: str | int) -> str:
    """The group of a layer."""
    steps = layer.split(".")
    if by == "module":
        return layer
    if isinstance(by, int):
        if by < 1:
            raise BadParameter(f"groups: depth {by} must be 1 or more.")
        return ".".join(steps[:by])
    if by not in ("block", "part"):
        raise BadParameter(
            f"groups: {by!r} is not known. Allowed: 'module', 'block', 'part', a depth such as 1 "
            "or 2, or a list of layers or beginnings of their names, such as ['stem', 'stage1']."
        )
    # The block ends with the first number; a layer without one is its own group.
    number = next((i for i, step in enumerate(steps) if step.isdecimal()), len(steps))
    block = ".".join(steps[: number + 1])
    if by == "block" or len(steps) <= number + 1:
        return block
    if "norm" in type(module.get_submodule(layer)).__name__.lower():
        return f"{block}.norms"
    return ".".join(steps[: number + 2])


def _ordered(module: nn.Module, groups: Groups, example: torch.Tensor | None) -> Groups:
    """The groups in the order in which a pass of ``example`` first reads one of their entries."""
    if example is None:
        return groups
    try:
        used = first_uses(module, example)
    except Exception as e:  # a scripted module, say; whoever runs the network meets its own faults
        log.warning("layers are in the order of registration (%s: %s)", type(e).__name__, e)
        return groups
    last = 1 + max(used.values(), default=0)
    return dict(
        sorted(groups.items(), key=lambda item: min(used.get(name, last) for name in item[1]))
    )


def matching(layers: Groups, prefix: str) -> list[str]:
    """The labels that are ``prefix`` or begin with it, as ``stage1`` fits ``stage1.0.conv1``.

    Raises:
        BadParameter: none.
    """
    hits = [label for label in layers if label == prefix or label.startswith(prefix + ".")]
    if not hits:
        raise BadParameter(f"layer group {prefix!r} fits no layer. Layers: {', '.join(layers)}.")
    return hits
