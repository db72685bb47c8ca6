"""A network by name: "name", or "name:option=value,option=value", or "package.module:factory".

What is not ours is read by :mod:`companion.models.own`.

Everything that can be wrong with a name is found before anything is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, NamedTuple

import torch
from torch import nn

from companion.core.errors import BadParameter, one_of
from companion.core.seeds import Key
from companion.models import gpt, images, own, vit, zoo
from companion.models.layers import initialise
from companion.models.options import NetworkFamily, Shape, Value, check_together

FAMILIES: Mapping[str, NetworkFamily] = {**images.FAMILIES, **vit.FAMILIES, **gpt.FAMILIES}


class Listed(NamedTuple):
    """A row of :func:`names`: ``options`` maps an option to "default: meaning (allowed)"."""

    name: str
    summary: str
    options: dict[str, str]


@dataclass(frozen=True)
class _Parsed:
    name: str
    family: NetworkFamily | None  # None: a factory of the user's own
    values: Mapping[str, Any]
    options: dict[str, str]  # canonical spelling of what differs from the default


def _family(spec: str, name: str) -> NetworkFamily:
    """The family called ``name``; ResNets of every depth exist without being listed."""
    if name in FAMILIES:
        return FAMILIES[name]
    if match := re.fullmatch(r"resnet([1-9][0-9]{0,5})", name, re.ASCII):
        depth = int(match[1])
        if depth in images.NOT_OURS:
            raise BadParameter(
                f"model {spec!r}: {name} means ImageNet's bottleneck network, which is not here"
                f" (for CIFAR: resnet44, resnet56, …). Torchvision's is torchvision:{name}."
            )
        if depth % 6 == 2 and 8 <= depth <= images.MAX_DEPTH:
            return images.family_6n2(depth)
        n = min(max(round((depth - 2) / 6), 1), (images.MAX_DEPTH - 2) // 6)
        raise BadParameter(
            f"model {spec!r}: a depth of {depth} does not exist. Did you mean 'resnet{6 * n + 2}'?"
            " Allowed: 6n+2 (resnet8, resnet14, resnet20, resnet26, resnet32, … up to"
            f" resnet{images.MAX_DEPTH}), and resnet18."
        )
    allowed = [*FAMILIES, "resnet<6n+2>", "torchvision:NAME", "timm:NAME", "hf:FOLDER"]
    allowed += ["your own as package.module:factory or nets.py:factory"]
    return FAMILIES[one_of(f"model {spec!r}", name, allowed)]  # raises


def _items(spec: str, query: str) -> dict[str, str]:
    items: dict[str, str] = {}
    for item in query.split(","):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not (option and equals and value):
            raise BadParameter(
                f"model {spec!r}: {item.strip()!r} is not option=value. Options are separated by"
                " commas, as in resnet20:width=8,norm=group."
            )
        if option in items:
            raise BadParameter(f"model {spec!r}: option {option!r} is given twice.")
        items[option] = value
    return items


def _parse(spec: str) -> _Parsed:
    if not isinstance(spec, str):
        raise BadParameter(f"model: expected a name such as 'resnet20:width=8', got {spec!r}.")
    if (place := own.place_of(spec)) is not None:
        _, question, query = (part.strip() for part in spec.partition("?"))
        where, factory = place
        names = (factory,) if where.endswith(".py") else place
        for part in () if where in zoo.PLACES and factory else names:
            if not own.DOTTED.fullmatch(part):
                raise BadParameter(
                    f"model {spec!r}: {part!r} is not a Python name. A network of your own is"
                    " spelled package.module:factory or"
                    " package.module:factory?option=value,option=value."
                )
        items = _items(spec, query) if question else {}
        for key in items:
            if not key.isidentifier() or key in ("in_shape", "classes"):
                raise BadParameter(
                    f"model {spec!r}: {key!r} cannot be an option of a factory: it must be a"
                    " Python name, and in_shape and classes come from the data."
                )
        literals = {k: own.literal(v) for k, v in items.items()}
        return _Parsed(f"{where}:{factory}", None, literals, items)

    name, colon, query = (part.strip() for part in spec.partition(":"))
    name = name.casefold()
    family = _family(spec, name)
    items = _items(spec, query) if colon else {}
    values: dict[str, Value] = {}
    changed: dict[str, str] = {}
    for key in items:
        one_of(f"model {spec!r}, option", key, family.options)
    for key, option in family.options.items():
        values[key] = option.read(f"model {spec!r}, {key}", items.get(key, option.default))
        if (shown := option.show(values[key])) != option.default:
            changed[key] = shown
    check_together(f"model {spec!r}", values)
    return _Parsed(name, family, values, changed)


def canonical(spec: str) -> str:
    """The one spelling of a network: options sorted, defaults left out, numbers and lists tidied.

    ``canonical(canonical(s)) == canonical(s)``, and equal spellings build equal networks from equal
    keys, so it may stand in a content hash. A network of the user's own keeps all its options,
    because its defaults are not known here; it is not imported.

    Arguments:
        spec: "name", "name:option=value,…" or "package.module:factory?option=value,…".

    Raises: :class:`BadParameter` for an unknown name, option or value, and for clashing options.
    """
    parsed = _parse(spec)
    options = ",".join(f"{k}={v}" for k, v in sorted(parsed.options.items()))
    return parsed.name + ((":" if parsed.family else "?") + options if options else "")


def describe(spec: str) -> dict[str, Any]:
    """Every option with its value, defaults included, ready for JSON.

    ``describe("mlp:widths=300-100")`` is
    ``{"widths": [300, 100], "norm": "none", "init": "kaiming"}``. For a network of the user's own
    it holds the options given, as the factory will get them.

    Raises: :class:`BadParameter` as :func:`canonical` does.
    """
    parsed = _parse(spec)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in parsed.values.items()}


_COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_TITLES = {
    "lenet": "LeNet",
    "resnet": "ResNet-",
    "vgg": "VGG-",
    "gpt": "GPT",
    "mobilenet": "MobileNet",
    "vit": "ViT",
}


def title(spec: str) -> str:
    """What people call a network, for legends and captions.

    ``mlp:widths=100x5`` is a "six-layer perceptron", ``resnet20:width=8`` a "ResNet-20 (width 8)".
    A network of the user's own keeps its own.

    Raises: :class:`BadParameter` as :func:`canonical` does.
    """
    parsed = _parse(spec)
    options = dict(parsed.options)
    if parsed.family is None:
        return spec
    if parsed.name == "mlp":
        options.pop("widths", None)
        layers = len(parsed.values["widths"]) + 1
        found = f"{_COUNTS[layers - 1] if layers <= len(_COUNTS) else layers}-layer perceptron"
    else:
        known = re.fullmatch(r"(lenet|resnet|vgg|gpt|mobilenet|vit)(.*)", parsed.name)
        found = _TITLES[known[1]] + known[2] if known else parsed.name
    rest = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"{found} ({rest})" if rest else found


def in_words(text: str) -> str:
    """The text with people's names for networks, as :func:`title` has them, in place of specs.

    Arguments:
        text: words, such as ``digits, resnet20:width=8, T = 800``; what is no spec stays.
    """

    def named(found: re.Match[str]) -> str:
        wide = re.match(r"mlp:.*?widths=(\d+)x\d", found[0])
        try:
            return f"{wide[1]}-wide {title(found[0])}" if wide else title(found[0])
        except BadParameter:
            return found[0]

    option = r"\w+=[^\s,;]+"
    return re.sub(rf"\b(mlp|lenet|resnet|vgg|gpt)[\w-]*(:{option}(,{option})*)?", named, text)


def names() -> list[Listed]:
    """Every network that has a name here, with a line on what it is and its options.

    Each name builds. ResNets of other depths 6n+2 exist too, and so do factories of the user's own.
    """
    return [
        Listed(
            *(name, family.summary),
            {k: f"{o.default}: {o.meaning} ({o.allowed})" for k, o in family.options.items()},
        )
        for name, family in FAMILIES.items()
    ]


def takes(spec: str) -> str | None:
    """What a network maps to logits: ``images`` or ``tokens``; None where only its author knows.

    Raises as :func:`canonical`.
    """
    family = _parse(spec).family
    return family.takes if family else None


def has_dropout(spec: str) -> bool:
    """Whether a network of ours draws random numbers while it trains. False for the user's own.

    By its name; of what is built, :func:`companion.models.first_dropout`. Raises as
    :func:`canonical`.
    """
    parsed = _parse(spec)
    return parsed.family is not None and parsed.values.get("dropout", 0) > 0


def may_have_batchnorm(spec: str) -> bool:
    """Whether a network may keep running statistics; True for the user's own, which is not built.

    By its name; of what is built, :func:`companion.connectivity.has_batchnorm`. Raises as
    :func:`canonical`.
    """
    parsed = _parse(spec)
    return parsed.family is None or parsed.values.get("norm") == "batch"


def _check_data(spec: str, family: NetworkFamily | None, in_shape: Any, classes: Any) -> Shape:
    try:
        shape = tuple(index(n) for n in in_shape)
    except TypeError:
        shape = ()
    known = (1, 3) if family else range(1, 9)
    if len(shape) not in known or min(shape) < 1:
        raise BadParameter(
            f"model {spec!r}: in_shape must be (channels, height, width) of one image, such as"
            f" (3, 32, 32), or (tokens,) of one window of a text, but is {in_shape!r}."
        )
    if not isinstance(classes, int) or classes < 2:
        raise BadParameter(
            f"model {spec!r}: classes must be a whole number from 2, not {classes!r}."
        )
    if family is None:
        return shape
    if family.takes == "tokens" and len(shape) == 3:
        raise BadParameter(
            f"model {spec!r}: reads text, but the data's examples are images of shape {shape}."
            " Take a text, such as pydoc, or a network for images, such as resnet20."
        )
    if family.takes == "images" and len(shape) == 1:
        raise BadParameter(
            f"model {spec!r}: takes images, but the data's examples are windows of {shape[0]}"
            " tokens. For text take gpt, such as gpt:layers=4,width=64."
        )
    if len(shape) == 3 and min(shape[1:]) < family.smallest:
        c, h, w = shape
        raise BadParameter(
            f"model {spec!r}: takes images of {family.smallest}x{family.smallest} pixels or more,"
            f" but the data's are {h}x{w} (with {c} channels). Take larger images, or an mlp, which"
            " fits any."
        )
    return shape


def build(spec: str, in_shape: tuple[int, ...], classes: int, key: Key | None = None) -> nn.Module:
    """Build a network, on the CPU, with freshly drawn weights.

    Arguments:
        spec: "resnet20", "mlp:widths=300-100,norm=layer", "package.module:factory?width=3", …;
            :func:`names` lists what there is.
        in_shape: (C, H, W) of one image, or (L,) of one window of tokens.
        classes: number of logits.
        key: source of the weights: equal keys give equal bits, and torch's global generator stays
            where it was. None draws from the global generator.

    Returns: a module that maps images (N, C, H, W) to logits (N, classes), no softmax; a network
    for text maps tokens (N, L) to logits (N, L, classes). Networks of ours for images can be traced
    by ``torch.fx``, each ReLU is a module of its own, and the names of their parameters read as
    layer groups ("stage1.0.conv1.weight", "head.bias").

    Raises: :class:`BadParameter` for a spec that :func:`canonical` refuses, for data that the
    network does not take (images too small, text instead of images), and for a factory that cannot
    be imported, cannot be called with ``in_shape`` and ``classes``, or returns no ``nn.Module``.

    Source: the networks of the papers' own tables; see :mod:`companion.models.images` and
    :mod:`~companion.models.gpt`. Our chapter on instability.
    """
    if key is not None:
        with key.seeded():
            return build(spec, in_shape, classes)
    parsed = _parse(spec)
    shape = _check_data(spec, parsed.family, in_shape, classes)
    # Whatever the user's default device: the CPU's generator gives the same bits everywhere.
    with torch.device("cpu"):
        if parsed.family is None:
            return own.build_own(spec, parsed.name, parsed.values, shape, classes)
        options = dict(parsed.values)
        init = options.pop("init", "torch")
        make = partial(parsed.family.make, shape, classes, **options)
        _check_memory(spec, make, options)
        net = make()
        initialise(net, init)
        return net


def _check_memory(spec: str, make: Callable[[], nn.Module], options: Mapping[str, Value]) -> None:
    """Refuse a network whose weights this machine cannot hold, before any memory is asked for."""
    sizes = [v for o in options.values() for v in (o if isinstance(o, tuple) else (o,))]
    if not any(isinstance(size, int) and size > _WIDE for size in sizes):
        return
    with torch.device("meta"):
        needed = sum(p.numel() * p.element_size() for p in make().parameters())
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > have:
        raise BadParameter(
            f"net {spec!r}: its weights need {needed / 1e9:,.0f} GB, and there is not enough "
            f"memory on this machine ({have / 1e9:,.0f} GB)."
        )


_WIDE = 1 << 14  # below it no width is a mistake that fills the memory
