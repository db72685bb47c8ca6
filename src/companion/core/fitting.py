"""State dicts as people have them, under the names of a module.

What is stored and what the module calls it often differ in ways that have one meaning: wrappers
leave prefixes, averaging and old versions leave counters and masks, tied tensors are stored once,
weight norm has two spellings. :func:`fitted` undoes these and says so; what could mean two things
is left as it is, and refused by name by whoever checks the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from companion.core.errors import BadParameter
from companion.core.networks import WRAPPERS, check_whole, copied, plain

SEGMENTS = frozenset({*WRAPPERS, "module", "model"})
"""What wrappers put before the names of a module, anywhere in a name."""

GPT2 = "transformer."  # transformers' GPT2LMHeadModel has it, GPT2Model and its files do not

_LEFT_OUT: tuple[tuple[str, str], ...] = (
    ("the number of averaged networks", r"(?:.*\.)?n_averaged"),
    ("attention masks, which are constants,", r"(?:.*\.)?h\.\d+\.attn\.(?:bias|masked_bias)"),
    ("position_ids, which are constants,", r"(?:.*\.)?position_ids"),
    ("rotary frequencies, which are constants,", r"(?:.*\.)?rotary_emb\.inv_freq"),
    ("BatchNorm's counters, which the model does not have,", r"(?:.*\.)?num_batches_tracked"),
)
"""Entries that no output depends on, or that a module of today makes itself: what, and names."""

_SPELLINGS = (  # one meaning, two spellings; either may be the file's
    (r"(.*\.)?([^.]+)_g", r"\1parametrizations.\2.original0"),
    (r"(.*\.)?([^.]+)_v", r"\1parametrizations.\2.original1"),
    (r"(.*\.)?parametrizations\.([^.]+)\.original0", r"\1\2_g"),
    (r"(.*\.)?parametrizations\.([^.]+)\.original1", r"\1\2_v"),
    (r"(.*\.)?gamma", r"\1weight"),
    (r"(.*\.)?beta", r"\1bias"),
)


_HOOKED = ("_orig", "_mask", "_g", "_v")
"""Ends of what torch's hooks compute a weight from."""
_COMPUTED = ("original", "original0", "original1")
"""What its parametrizations compute one from."""


class Lazy(Mapping[str, Tensor]):
    """A state dict whose tensors are read when they are asked for, each time anew.

    Arguments:
        reads: name -> what reads it.
    """

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]):
        self.reads = dict(reads)

    def __getitem__(self, name: str) -> Tensor:
        return self.reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)

    def __contains__(self, name: object) -> bool:
        return name in self.reads


def each(
    theta: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]
) -> Mapping[str, Tensor]:
    """A state dict with every tensor changed: lazy where ``theta`` is."""
    if isinstance(theta, Lazy):
        return Lazy({k: partial(_changed, change, k, read) for k, read in theta.reads.items()})
    return {k: change(k, v) for k, v in theta.items()}


def _changed(
    change: Callable[[str, Tensor], Tensor], name: str, read: Callable[[], Tensor]
) -> Tensor:
    return change(name, read())


@dataclass(frozen=True)
class Fitted:
    """A state dict under a module's names.

    Arguments:
        theta: it, in the module's order; what the module does not know comes last. The very one
            that was given if nothing had to be done.
        names: the given name of each entry -> the module's; None where it is left out. Empty where
            there is none: one entry is made of several, or only the module's own
            ``load_state_dict`` knows.
        notes: what was done.
    """

    theta: Mapping[str, Tensor]
    names: Mapping[str, str | None]
    notes: tuple[str, ...] = ()


def fitted(module: nn.Module, theta: Mapping[str, Tensor], ties: Mapping[str, str]) -> Fitted:
    """``theta`` under the names of ``module``, as far as there is one meaning.

    Undone: prefixes of wrappers anywhere in a name, or any prefix that leaves just the module's
    names; masks, counters and other constants that the module makes itself, or that it has and the
    file has not; the second name of a tied tensor; an untied output matrix that is not stored
    because it was tied to the embedding; the old and the new names of weight norm; pruning and
    weight norm that only one of file and module has; whatever else the module's own
    ``load_state_dict`` accepts.

    Arguments:
        ties: :attr:`companion.core.theta.Layout.ties` of the module.

    Raises:
        BadParameter: the module is one that :func:`companion.core.networks.check_whole` refuses.
    """
    check_whole(module)
    module = plain(module)
    own = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    needed = own.keys() - ties.keys()
    if needed <= theta.keys() <= own.keys():
        return Fitted(theta, {k: k for k in theta})
    work = _Fit(module, own, ties, theta)
    for step in (
        *(work.wrappers, work.prefix, work.gpt2, work.published, work.spellings, work.masks),
        *(work.lengths, work.removed, work.constants),
        *(work.shared, work.output, work.defaults, work.beside),
    ):
        if work.done():
            break
        step()
    if not work.done() and (found := work.accepted() or work.inside()) is not None:
        return found
    return work.result()


class _Fit:
    """A state dict on its way to the module's names."""

    def __init__(
        self,
        module: nn.Module,
        own: Mapping[str, Tensor],
        ties: Mapping[str, str],
        theta: Mapping[str, Tensor],
    ):
        self.module, self.own, self.ties, self.theta = module, own, ties, theta
        self.needed = own.keys() - ties.keys()
        self.names: dict[str, str | None] = {k: k for k in theta}
        self.more: dict[str, Callable[[], Tensor]] = {}  # entries that are made
        self.notes: list[str] = []
        self.anew = False  # some entries have no one place in the file

    @property
    def there(self) -> set[str]:
        """The module's names that have something, and names it does not know."""
        return {n for n in self.names.values() if n is not None} | self.more.keys()

    def done(self) -> bool:
        there = self.there
        return self.needed <= there <= self.own.keys()

    def rename(self, change: Callable[[str], str | None]) -> list[tuple[str, str | None]]:
        """Rename what the module does not know, unless two entries would have one name."""
        new = {k: n if n is None or n in self.own else change(n) for k, n in self.names.items()}
        counts = Counter(n for n in new.values() if n is not None)
        new = {k: n if n is None or counts[n] == 1 else self.names[k] for k, n in new.items()}
        changed = [(str(old), new[k]) for k, old in self.names.items() if new[k] != old]
        self.names = new
        return changed

    def prefix(self) -> None:
        """Any one prefix under which the file holds all that the module needs."""
        if self.needed <= self.there or len(fits := self.copies(self.there)) != 1:
            return
        front = fits[0]
        cut = {n: n.removeprefix(front) for n in self.there if n.startswith(front)}
        self.names = {k: cut.get(str(n), n) for k, n in self.names.items()}
        every = "all" if len(cut) == len(self.names) else "its"
        self.say(f"the prefix {front!r} of {every} names is left out")

    def copies(self, names: Collection[str]) -> list[str]:
        """Prefixes under which ``names`` has all that the module needs."""
        some = max(self.needed, key=len, default="")
        ends = sorted(n.removesuffix(some) for n in names if some and n.endswith("." + some))
        return [p for p in ends if all(p + n in names for n in self.needed)]

    def beside(self) -> None:
        """What lies beside a network that has a prefix: a loss's weights, say, of a training."""
        mine = {k: n for k, n in self.names.items() if n in self.own}
        fronts = {k.removesuffix(n) if k.endswith(n) else k for k, n in mine.items() if n}
        extra = [k for k, n in self.names.items() if n is not None and k not in mine]
        if not (self.needed <= self.there and extra and len(fronts) == 1 and "" not in fronts):
            return
        if any(k.startswith(tuple(fronts)) for k in extra) or self.copies(
            self.theta.keys() - mine.keys()
        ):
            return
        self.names |= dict.fromkeys(extra)
        self.say(f"what is stored beside the network ({_listed(extra)}) is left out")

    def wrappers(self) -> None:
        """Segments of wrappers, in the file's names or in the module's."""

        def bare(name: str) -> str:
            return ".".join(s for s in name.split(".") if s not in SEGMENTS)

        counts = Counter(map(bare, self.own))
        known = {bare(n): n for n in self.own if counts[bare(n)] == 1}
        changed = self.rename(lambda n: known.get(bare(n), n))
        for segment in sorted(SEGMENTS):
            less = sum(_has(old, segment) and not _has(str(new), segment) for old, new in changed)
            more = sum(_has(str(new), segment) and not _has(old, segment) for old, new in changed)
            whole = "all" if len(changed) == len(self.names) else str(less or more)
            if less:
                self.say(f"the prefix '{segment}.' of {whole} names is left out")
            if more:
                self.say(f"'{segment}.' is put into {whole} names")

    def gpt2(self) -> None:
        """Names of GPT-2 without a head, where the module has one."""
        if not any(k.startswith(GPT2 + "h.") for k in self.own):
            return
        if self.rename(lambda n: GPT2 + n if GPT2 + n in self.own else n):
            self.say(
                f"names are those of GPT-2 without a head; {GPT2!r} is put before them (the "
                "published networks have gelu=tanh)"
            )

    def published(self) -> None:
        """Names of transformers' files, which its own loading translates; its base prefix."""
        renamings = _renamings(self.module)
        front = getattr(self.module, "base_model_prefix", "") if renamings is not None else ""

        def native(name: str) -> str:
            for one in renamings or ():
                name = one.rename_source_key(name)[0]
            forms = (name, f"{front}.{name}", name.removeprefix(f"{front}."))
            return next((f for f in forms if f in self.own), name)

        if changed := self.rename(native):
            self.say(f"{changed[0][0]} is {changed[0][1]}{_more(len(changed) - 1)}")

    def spellings(self) -> None:
        """The two spellings of weight norm, and of the entries of norms in converted networks."""

        def other(name: str) -> str:
            forms = (re.sub(f"^{a}$", b, name) for a, b in _SPELLINGS if re.fullmatch(a, name))
            return next((f for f in forms if f in self.own), name)

        if changed := self.rename(other):
            self.say(f"{changed[0][0]} is {changed[0][1]}{_more(len(changed) - 1)}")

    def masks(self) -> None:
        """A pruned network as weight and mask, where the module has the weight alone."""
        found = []
        at = {n: k for k, n in self.names.items() if n is not None}
        for name in self.needed - self.there:
            weight, mask = at.get(name + "_orig"), at.get(name + "_mask")
            if weight is not None and mask is not None:
                self.more[name] = partial(self.pruned, weight, mask)
                self.names[weight] = self.names[mask] = name
                found.append(name)
        if found:
            self.say(f"{found[0]} is pruned: weight times mask{_more(len(found) - 1)}")

    def lengths(self) -> None:
        """Weight norm as directions and lengths, where the module has the weight alone."""
        found = []
        at = {n: k for k, n in self.names.items() if n is not None}
        for name in self.needed - self.there:
            path, _, last = name.rpartition(".")
            new = f"{path}.parametrizations.{last}.original".removeprefix(".")
            for length, way in ((name + "_g", name + "_v"), (new + "0", new + "1")):
                if length in at and way in at and self.theta[at[way]].shape == self.own[name].shape:
                    self.more[name] = partial(self.normed, at[length], at[way])
                    self.names[at[length]] = self.names[at[way]] = name
                    found.append(name)
        if found:
            self.anew = True
            self.say(f"{found[0]} is weight-normed: direction times length{_more(len(found) - 1)}")

    def removed(self) -> None:
        """Weights stored as they are, where the module computes them: pruning or weight norm was
        removed before the file was written."""
        from companion.core.effective import SPECTRAL, effective  # which builds on this module

        missing, there = self.needed - self.there, self.there
        if not any(n.rpartition(".")[2] in _COMPUTED for n in missing) and not any(
            n.endswith(_HOOKED) for n in missing
        ):
            return
        space = effective(self.module)
        state = self.module.state_dict()
        at = {n: k for k, n in self.names.items() if n is not None}
        slots = [
            s
            for s in space.slots
            if s.kind != SPECTRAL and s.entry in there and not there & {*s.stored(state)}
        ]
        if not slots:
            return
        weights = {s.entry: self.theta[at[s.entry]] for s in slots}
        try:
            made = replace(space, slots=tuple(slots)).leave(weights)
        except BadParameter:  # none that its parametrization makes
            return
        for slot in slots:
            self.names[at[slot.entry]] = slot.stored(state)[0]
            self.more |= {n: partial(made.__getitem__, n) for n in slot.stored(state)}
        self.anew = True
        self.say(
            f"{slots[0].entry} is stored as it is, without {slots[0].kind}{_more(len(slots) - 1)}"
        )

    def constants(self) -> None:
        """Entries that the module makes itself."""
        passing = {
            n: b for n, b in self.module.named_buffers(remove_duplicate=False) if n not in self.own
        }
        left: dict[str, list[str]] = {}
        for key, name in self.names.items():
            if name is None or name in self.own:
                continue
            why = next((what for what, form in _LEFT_OUT if re.fullmatch(form, name)), None)
            if why is None and (same := passing.get(name)) is not None:
                value = self.theta[key]
                close = value.shape == same.shape and torch.allclose(
                    value.double(), same.detach().to(value.device).double(), equal_nan=True
                )
                why = "constants" if close else None
            if why:
                left.setdefault(why, []).append(key)
        for why, keys in left.items():
            self.names |= dict.fromkeys(keys)
            named = f"{_listed(keys)}, which the model makes itself," if why == "constants" else why
            self.say(f"{named} {'is' if why.startswith('the ') else 'are'} left out")

    def shared(self) -> None:
        """A tied tensor under another of its names."""
        at = {n: k for k, n in self.names.items() if n is not None}
        for alias, first in self.ties.items():
            if alias in at and first not in at:
                self.names[at[alias]] = first
                at[first] = at.pop(alias)
                self.say(f"{alias} is the tied {first}")

    def output(self) -> None:
        """An output matrix that is missing since it was tied to the embedding."""
        missing = self.needed - self.there
        tables = [n for n, m in self.module.named_modules() if isinstance(m, nn.Embedding)]
        for name in sorted(missing):
            path, _, last = name.rpartition(".")
            if last != "weight" or isinstance(self.module.get_submodule(path), nn.Embedding):
                continue
            shape = self.own[name].shape
            same = [f"{t}.weight" for t in tables if self.own.get(f"{t}.weight") is not None]
            same = [t for t in same if self.own[t].shape == shape and len(shape) == 2]
            at = {n: k for k, n in self.names.items() if n is not None}
            if len(same) == 1 and same[0] in at:
                self.more[name] = partial(self.copy_of, at[same[0]])
                self.say(f"{name} is not stored, since it was tied: it is {same[0]}")

    def defaults(self) -> None:
        """Whole numbers that the file lacks and that the module has as constants or counters."""
        missing = sorted(self.needed - self.there)
        whole = [n for n in missing if not self.own[n].is_floating_point()]
        whole = [n for n in whole if not self.own[n].is_complex() and n not in self.parameters]
        if len(whole) == len(missing):
            for name in whole:
                self.more[name] = partial(self.default, name)
            what = "BatchNorm's counters" if all(map(_counts, whole)) else _listed(whole)
            if whole:
                self.say(f"{what}, which it lacks, are the model's own")

    def pruned(self, weight: str, mask: str) -> Tensor:
        value = self.theta[weight]
        return value * self.theta[mask].to(value.dtype)

    def normed(self, length: str, way: str) -> Tensor:
        g, v = self.theta[length], self.theta[way]
        dims = [d for d in range(v.ndim) if g.ndim == 0 or g.shape[d] == 1]
        scale: Tensor = g / torch.linalg.vector_norm(v, dim=dims, keepdim=True)
        return v * scale.to(v.dtype)

    def copy_of(self, key: str) -> Tensor:
        return self.theta[key].clone()

    def default(self, name: str) -> Tensor:
        return self.own[name].detach().cpu().clone()

    @property
    def parameters(self) -> set[str]:
        return {n for n, _ in self.module.named_parameters(remove_duplicate=False)}

    def accepted(self) -> Fitted | None:
        """What the module's own ``load_state_dict`` makes of it, if it takes it."""
        theta = self.theta
        if any(n not in theta for n in self.names) or not theta:
            return None
        try:
            net = _loaded(self.module, dict(theta))
        except Exception:  # whatever a module's own hooks do with what is not theirs
            return None
        state = {k: v.detach() for k, v in net.state_dict().items() if k in self.own}
        same = {k: v for k, v in theta.items() if k in state and v.shape == state[k].shape}
        note = "its names are as the model's own load_state_dict takes them"
        return Fitted({**state, **same}, {}, (note,))

    def inside(self) -> Fitted | None:
        """What lies under one prefix, where more has to be done than to leave the prefix out."""
        layers = {
            n.partition(".parametrizations.")[0]
            if ".parametrizations." in n
            else n.rpartition(".")[0]
            for n in self.needed
        } - {""}
        some = sorted(layers, key=lambda n: (-len(n), n))[:3]
        fronts = {k[: k.index(f".{n}.") + 1] for k in self.theta for n in some if f".{n}." in k}
        found = []
        for front in sorted(fronts):
            part = {
                k: partial(self.theta.__getitem__, k) for k in self.theta if k.startswith(front)
            }
            inner = {k.removeprefix(front): read for k, read in part.items()}
            done = fitted(self.module, Lazy(inner), self.ties)
            if self.needed <= done.theta.keys() <= self.own.keys():
                found.append((front, part.keys(), done))
        if len(found) != 1:
            return None
        front, part_names, done = found[0]
        rest = self.theta.keys() - part_names
        notes = [
            f"the prefix {front!r} of {'its' if rest else 'all'} names is left out",
            *done.notes,
        ]
        if rest:
            notes.append(f"what is stored beside the network ({_listed(sorted(rest))}) is left out")
        names = {k: done.names.get(k.removeprefix(front)) for k in part_names} | dict.fromkeys(rest)
        theta = done.theta if isinstance(self.theta, Lazy) else dict(done.theta)
        return Fitted(theta, names if done.names else {}, tuple(notes))

    def result(self) -> Fitted:
        theta = self.theta
        reads: dict[str, Any] = {n: k for k, n in self.names.items() if n is not None}
        reads = {n: partial(theta.__getitem__, k) for n, k in reads.items()} | self.more
        # Files keep no order; the module's own makes the first complaint the first layer's.
        order = [*self.own, *sorted(reads.keys() - self.own.keys())]
        found = Lazy({n: reads[n] for n in order if n in reads})
        lazy = isinstance(theta, Lazy)
        names = {} if self.anew else self.names
        return Fitted(found if lazy else dict(found), names, tuple(self.notes))

    def say(self, note: str) -> None:
        self.notes.append(note)


def _renamings(module: nn.Module) -> list[Any] | None:
    """What transformers does to the names in files of this network; None for any other network."""
    if not any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        found = get_model_conversion_mapping(cast(Any, module))
    except (ImportError, TypeError):  # a version that keeps this elsewhere
        return []
    return [one for one in found if isinstance(one, WeightRenaming)]


def _loaded(module: nn.Module, theta: dict[str, Tensor]) -> nn.Module:
    """A network with these weights, read by its own code.

    Raises:
        Exception: whatever that raises, also for missing and unexpected entries.
    """
    if _renamings(module) is None:
        net = copied(module)
        net.load_state_dict(theta, strict=True)
        return net
    from transformers.utils import logging

    read: Any = type(module)
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        how: Any = {"config": module.config, "state_dict": theta, "dtype": torch.float32}
        net, told = read.from_pretrained(None, output_loading_info=True, **how)
    finally:
        if bar:
            logging.enable_progress_bar()
    if any(told.get(k) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise KeyError("it does not fit")
    return cast(nn.Module, net)


def _has(name: str, segment: str) -> bool:
    return segment in name.split(".")


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _more(count: int) -> str:
    return f", and {count} more likewise" if count else ""


def _listed(names: Collection[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def in_type_of(
    theta: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Floating-point entries in the number types of ``own``, and a note on each kind of change."""
    casts = {
        f"{_kind(v)} weights are cast to {_kind(own[k])}"
        for k, v in theta.items()
        if k in own and v.dtype != own[k].dtype and v.is_floating_point()
    }
    if not casts:
        return theta, ()

    def change(name: str, value: Tensor) -> Tensor:
        if name in own and value.is_floating_point() and own[name].is_floating_point():
            return value.to(own[name].dtype)
        return value

    return each(theta, change), tuple(sorted(casts))


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
