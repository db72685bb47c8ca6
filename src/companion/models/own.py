"""The user's own networks, by name, with optional ``?option=value,…``.

``package.module:factory``, ``nets:factory`` of a module without a package, ``nets.py:factory`` of a
file; and, in :mod:`companion.models.zoo`, ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER``.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from companion.core.errors import BadParameter
from companion.core.networks import check_whole
from companion.models import gpt, images, zoo
from companion.models.options import Shape

DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
CLASSES = ("classes", "num_classes", "n_classes", "nclasses", "num_labels", "n_labels")
"""What factories call the number of classes."""
CHANNELS = ("in_chans", "in_channels")
"""What they call the channels of an image."""


def place_of(spec: str) -> tuple[str, str] | None:
    """Where a network that is not ours comes from, and its name there; None for a name of ours.

    The place is ``torchvision``, ``timm``, ``hf``, a file that ends in ``.py``, or a module.
    """
    text = spec.partition("?")[0].strip()
    head, colon, rest = (part.strip() for part in text.partition(":"))
    if not colon:
        return None
    if head in zoo.PLACES:
        return head, rest
    if ".py:" in text:
        path, _, name = text.rpartition(":")
        return path.strip(), name.strip()
    ours = head.casefold() in {**images.FAMILIES, **gpt.FAMILIES} or re.fullmatch(
        r"resnet\d+", head.casefold()
    )
    if "." in head or (not ours and DOTTED.fullmatch(head) and DOTTED.fullmatch(rest)):
        return head, rest
    return None


def is_own(spec: str) -> bool:
    """Whether ``spec`` names a network that is not one of ours."""
    return place_of(spec) is not None


def example_of(spec: str) -> tuple[Shape, int] | None:
    """Shape of an example and number of classes, where the network itself says them: of ``hf:``."""
    place = place_of(spec)
    return zoo.example_of(spec, place[1]) if place is not None and place[0] == "hf" else None


def source_digest(spec: str) -> str:
    """SHA-256 of the file that defines the network of ``spec``, its imports not included.

    Raises:
        BadParameter: the factory cannot be imported.
    """
    place = place_of(spec)
    assert place is not None
    if place[0] == "hf":
        return hashlib.sha256(zoo.config_file(spec, place[1]).read_bytes()).hexdigest()
    found = zoo.builder(spec, *place) if place[0] in zoo.PLACES else import_factory(spec, *place)
    found = inspect.unwrap(found)
    try:
        source = inspect.getsourcefile(found) or inspect.getsourcefile(type(found))
    except TypeError:  # a built-in, or an instance of one
        source = None
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""


def literal(text: str) -> int | float | bool | str | None:
    """A value out of a spec: whole numbers, decimals, true, false and none; all else is text."""
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if text.casefold() in words:
        return words[text.casefold()]
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        return float(text)
    return text


def _imported(spec: str, place: str) -> ModuleType:
    """The module, or the file, that ``place`` names."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise BadParameter(f"model {spec!r}: there is no file {path}.")
    name = f"_own_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # as Python does, for classes that look themselves up
    sys.path.insert(0, str(path.parent))  # what lies beside it can be imported, as for a script
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def import_factory(spec: str, module_name: str, factory_name: str) -> Callable[..., Any]:
    """Import the factory, or raise :class:`BadParameter` that says what is missing where."""
    try:
        found: Any = _imported(spec, module_name)
    except BadParameter:
        raise
    except (Exception, SystemExit) as e:  # whatever the user's module does at import
        where = _at(e) if module_name.endswith(".py") else ""
        ours = "" if "." in module_name else " (For networks of ours: `companion models list`.)"
        raise BadParameter(
            f"model {spec!r}: cannot import {module_name!r} ({_what(e)}{where})."
            f" Is it installed, or its folder on PYTHONPATH?{ours}"
        ) from e
    for name in factory_name.split("."):
        if not hasattr(found, name):
            public = [n for n in vars(found) if not n.startswith("_")]
            close = difflib.get_close_matches(name, public, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise BadParameter(f"model {spec!r}: {module_name} has no {name!r}.{hint}")
        found = getattr(found, name)
    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)
    if not callable(found):
        raise BadParameter(
            f"model {spec!r}: {factory_name!r} is of type {type(found).__name__}, not a"
            " function or class that can be called with in_shape=..., classes=... ."
        )
    factory: Callable[..., Any] = found
    return factory


def _what(e: BaseException) -> str:
    """What happened."""
    return f"{type(e).__name__}: {e}" if str(e) else type(e).__name__


def _at(e: BaseException) -> str:
    """Where in the user's code it happened."""
    if isinstance(e, SyntaxError):
        return ""  # its own text says where
    last = traceback.extract_tb(e.__traceback__)[-1]
    return f", in {Path(last.filename).name}, line {last.lineno}"


def _choices(
    spec: str,
    name: str,
    factory: Callable[..., Any],
    values: Mapping[str, Any],
    shape: Shape,
    classes: int,
) -> list[dict[str, Any]]:
    """Arguments to call the factory with: those it names; where it takes any, several to try."""
    offered: dict[str, Any] = {"in_shape": shape}
    offered |= dict.fromkeys(CHANNELS, shape[0]) if len(shape) == 3 else {}
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # a few builtins have none
        return [{"in_shape": shape, "classes": classes, **values}, dict(values)]
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {n for n, kind in kinds.items() if kind in by_name}
    more = {n: v for n, v in offered.items() if n in named}
    counted = next((n for n in CLASSES if n in named), None)
    if counted is not None and not named.intersection(CLASSES) & values.keys():
        more[counted] = classes
    anything = inspect.Parameter.VAR_KEYWORD in kinds.values()
    choices = [{**more, **values}]
    if anything and counted is None:
        first = {"in_shape": shape, "classes": classes}
        choices = [{**more, **c, **values} for c in (first, {"num_classes": classes}, {})]
    try:
        signature.bind(**choices[0])
    except TypeError as e:
        shown = ", ".join(f"{n}={v!r}" for n, v in choices[0].items())
        raise BadParameter(
            f"model {spec!r}: {name}{signature} cannot be called with {shown or 'nothing'} ({e})."
        ) from None
    return choices


def build_own(
    spec: str, name: str, values: Mapping[str, Any], in_shape: Shape, classes: int
) -> nn.Module:
    """Build a network of the user's: with in_shape and classes as far as the factory takes them.

    Lazy layers get their shapes from one example.

    Raises:
        BadParameter: there is no such factory, it fails, or it returns no module with weights.
    """
    place = place_of(name)
    assert place is not None
    if place[0] in zoo.PLACES:
        return zoo.build(spec, *place, values, in_shape, classes)
    factory = import_factory(spec, *place)
    choices = _choices(spec, name, factory, values, in_shape, classes)
    for n, arguments in enumerate(choices, 1):
        try:
            net = factory(**arguments)
            break
        except (Exception, SystemExit) as e:  # whatever the user's code does
            refused = isinstance(e, TypeError) and "unexpected keyword argument" in str(e)
            if refused and n < len(choices):
                continue  # it passes its options on to something that does not take ours
            raise BadParameter(f"model {spec!r}: {name} failed ({_what(e)}{_at(e)}).") from e
    if not isinstance(net, nn.Module):
        raise BadParameter(
            f"model {spec!r}: {name} must return a torch.nn.Module, but returned a"
            f" {type(net).__module__}.{type(net).__qualname__}."
        )
    for x in (torch.zeros(2, *in_shape), torch.zeros(2, *in_shape, dtype=torch.int64)):
        with suppress(Exception), torch.no_grad():  # whatever forward does with such an example
            if any(is_lazy(p) for p in net.parameters()):
                net.eval()(x)
    check_whole(net)
    return net
