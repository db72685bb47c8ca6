"""GPT networks whose residual stream may be rotated: LayerNorm folded away, writes centred.

LayerNorm subtracts the mean of the stream, divides by its spread, and multiplies every entry by a
gain of its own. Only the gain ties the stream to its coordinates. Moved into the linear maps that
read the stream, with the bias, it leaves a normalisation that commutes with every orthogonal Q that
keeps the all-ones direction. What writes to the stream may have its mean over the stream removed,
since every reader begins by removing it. The function stays what it was; the permutations of the
stream become rotations. ::

    folding = fold(module, x)                     # proven; x: a few windows of tokens
    a, b = folding.apply(theta_a), folding.apply(theta_b)
    barrier(folding.module, a, b, data)           # the same two functions, other coordinates

Source: the folding is that of pruning and quantisation methods for language models (SliceGPT,
Ashkboos et al. 2024); for the merging of transformers Theus et al. 2025. Our chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from companion.core.errors import BadParameter
from companion.core.networks import copied
from companion.core.theta import Theta, check_theta
from companion.rebasin.derive import derive
from companion.rebasin.proof import Subject, Unproven, output_gap
from companion.rebasin.spec import Spec

HEAD = "lm_head"
TOLERANCE = 1e-8
"""Relative difference of outputs, in float64, up to which two networks are the same function."""


@dataclass(frozen=True)
class Names:
    """What the layers of a family are called: in each block, each LayerNorm and what reads it."""

    kind: str  # of transformers
    blocks: str
    reads: Mapping[str, str]  # LayerNorm -> the linear map behind it; attention first
    writes: tuple[str, ...]
    last: str  # LayerNorm before the head
    tables: tuple[str, ...]

    def __str__(self) -> str:
        parts = dict.fromkeys(n.partition(".")[0] for n in (*self.reads, *self.writes))
        return f"{self.tables[0]}, {self.blocks}.N.({', '.join(parts)}), {self.last}, {HEAD}"


KNOWN = (
    Names(
        *("GPT2LMHeadModel", "transformer.h"),
        {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"},
        ("attn.c_proj", "mlp.c_proj"),
        *("transformer.ln_f", ("transformer.wte", "transformer.wpe")),
    ),
    Names(  # whether attention and MLP read the same stream or one after the other
        *("GPTNeoXForCausalLM", "gpt_neox.layers"),
        {
            "input_layernorm": "attention.query_key_value",
            "post_attention_layernorm": "mlp.dense_h_to_4h",
        },
        ("attention.dense", "mlp.dense_4h_to_h"),
        *("gpt_neox.final_layer_norm", ("gpt_neox.embed_in",)),
    ),
)


@dataclass(frozen=True)
class Parts:
    """Names of what reads and writes the residual stream of a GPT network."""

    readers: Mapping[str, tuple[str, ...]]  # LayerNorm -> the linear maps behind it
    writers: tuple[str, ...]  # linear maps whose output is added to the stream
    tables: tuple[str, ...]  # embeddings


@dataclass(frozen=True, eq=False)
class Folding:
    """The folded architecture, and how a network becomes one of it. Made by :func:`fold`.

    Arguments:
        module: the folded architecture: the original's class and names, gains 1 and biases 0 in
            every LayerNorm, and a head of its own (with a bias if the last LayerNorm has one), as
            the gain of the last LayerNorm goes into it and not into the embedding.
        spec: permutations of ``module``: the stream, heads, units. LayerNorm is not in it.
        stream: the group that is the residual stream.
        parts: what reads and writes it.
        original: the architecture that was folded.
    """

    module: nn.Module = field(repr=False)
    spec: Spec
    stream: str
    parts: Parts = field(repr=False)
    original: nn.Module = field(repr=False)

    @cached_property
    def units(self) -> Spec:
        """The spec of heads and units alone: the stream stays as it is."""
        return self.spec.hold(self.stream)

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.spec.groups[self.stream].size

    @torch.no_grad()
    def apply(self, theta: Theta, *, check_outputs: bool = True) -> dict[str, Tensor]:
        """A network of the original architecture as one of the folded architecture.

        Arguments:
            theta: its state dict. Sums are done in float64, results have the entries' own dtypes.
            check_outputs: run both on the example, in float64 throughout, and refuse if they
                differ.

        Returns:
            a new state dict of :attr:`module`.

        Raises:
            BadParameter: ``theta`` is no finite point of the original architecture.
            Unproven: the outputs differ.
        """
        theta = check_theta(self.original, theta, "to fold")
        wide = _folded({k: v.double() for k, v in theta.items()}, self.original, self.parts)
        if check_outputs:
            check_same(self.original, theta, self.module, wide, self.spec.example)
        like = next(v for v in theta.values() if v.is_floating_point()).dtype
        return {k: v.to(theta[k].dtype if k in theta else like) for k, v in wide.items()}


def check_same(one: nn.Module, a: Theta, other: nn.Module, b: Theta, example: Any) -> None:
    """Raise :class:`Unproven` if :func:`function_gap` is above :data:`TOLERANCE`."""
    gap = function_gap(one, a, other, b, example)
    if not gap <= TOLERANCE:
        raise Unproven(
            f"the folded or rotated network is not the same function: outputs differ by {gap:.2g} "
            f"of their size on the example, allowed {TOLERANCE:g}. Folding needs a pre-LN "
            "transformer: LayerNorm in front of attention, MLP and head, and nowhere else."
        )


def function_gap(one: nn.Module, a: Theta, other: nn.Module, b: Theta, example: Any) -> float:
    """The largest difference of outputs as a share of the largest output, in float64.

    Arguments:
        one, other: architectures.
        a, b: a state dict of each.
        example: what forward takes.
    """
    return output_gap(Subject(one, example, a).run(), Subject(other, example, b).run())


def fold(module: nn.Module, example: Any) -> Folding:
    """The architecture in which the residual stream of ``module`` may be rotated.

    Arguments:
        module: a GPT of ``transformers`` (GPT2LMHeadModel, or GPTNeoXForCausalLM, such as Pythia)
            or a class that has its layers under the same names, with LayerNorm before attention and
            MLP; biases or none, the head tied to the embedding or not. It is not changed.
        example: tokens, int64, shape (2, L): what forward takes.

    Returns:
        a :class:`Folding`, proven on shaken weights: outputs stay within 1e-8 in float64.

    Raises:
        BadParameter: another architecture; the message says what does not fit.
        Unproven: the layers are there, but forward does something else with them.
    """
    parts = parts_of(module)
    own = copied(module)
    head = own.get_submodule(HEAD)
    place = head.get_parameter("weight")
    bias = any(_bias(own, name) is not None for name in ([*parts.readers][-1], HEAD))
    # Without an init, which would draw from PyTorch's global random numbers.
    new = skip_init(nn.Linear, *reversed(place.shape), bias=bias, device=place.device)
    setattr(own, HEAD, new.to(place.dtype))
    config: Any = getattr(own, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
    subject = Subject(module, example, shake=("weights",))
    theta = {k: v.detach() for k, v in subject.state.items()}
    folded = _folded(theta, module, parts)
    check_same(subject.module, theta, own, folded, example)
    state = module.state_dict().items()
    double = {k: v.detach().double() for k, v in state if isinstance(v, Tensor)}
    own.load_state_dict(_folded(double, module, parts))
    own.requires_grad_(any(p.requires_grad for p in module.parameters()))
    spec = derive(own, example)
    names = {f"{n}.{kind}" for n in parts.readers for kind in ("weight", "bias")}
    spec = replace(
        spec,
        axes={t: axes for t, axes in spec.axes.items() if t not in names},
        objective=tuple(t for t in spec.objective if t not in names),
    )
    found = Folding(own, spec, stream_of(module, spec), parts, module)
    for use in spec.uses[found.stream]:
        if spec.axes[use.tensor][use.dim] != ((found.stream,),):
            raise BadParameter(
                f"fold: {use.tensor} holds the residual stream beside other units on axis "
                f"{use.dim}; only whole axes are rotated."
            )
    return found


def stream_of(module: nn.Module, spec: Spec) -> str:
    """The group of the spec that is the residual stream: what the token embedding writes to.

    Raises:
        BadParameter: the network has no token embedding, or one whose units cannot move.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            axis = spec.axes.get(f"{name}.weight", ((), ()))[1]
            if len(axis) == 1 and len(axis[0]) == 1 and isinstance(axis[0][0], str):
                return axis[0][0]
            raise BadParameter(
                f"the residual stream cannot move: {name}.weight is held in place, or is part of "
                "a larger axis."
            )
    raise BadParameter(
        f"{type(module).__name__} has no token embedding, hence no residual stream to find. "
        "Methods that hold or rotate it are for transformers."
    )


def parts_of(module: nn.Module) -> Parts:
    """What reads and writes the stream; refuses what is no pre-LN GPT of the layers known here."""
    kind = type(module).__name__
    post = (
        f"fold: {kind} normalises the residual stream itself, after each addition (post-LN). Its "
        "gains act on the stream and cannot be moved into the layers that read it, so it has no "
        "rotation symmetry. A pre-LN network is needed, such as GPT-2."
    )
    names = {name for name, _ in module.named_modules()}
    found = next((k for k in KNOWN if any(n.startswith(f"{k.blocks}.") for n in names)), None)
    late = any(getattr(part, "norm_first", True) is False for part in module.modules())
    if late or (found and found.last not in names):
        raise BadParameter(post)
    if found is None or not {found.tables[0], HEAD} <= names:
        raise BadParameter(
            f"fold: {kind} is no GPT network. Folding knows the layers of "
            f"{' and '.join(f'transformers.{k.kind} ({k})' for k in KNOWN)}. Permutation matching "
            '("weights", "activations") takes any network.'
        )
    deep = found.blocks.count(".") + 1
    blocks = [n for n in names if n.startswith(f"{found.blocks}.") and n.count(".") == deep]
    readers: dict[str, tuple[str, ...]] = {}
    writers: list[str] = []
    for b in sorted(blocks, key=lambda n: int(n.rpartition(".")[2])):
        readers |= {f"{b}.{norm}": (f"{b}.{layer}",) for norm, layer in found.reads.items()}
        writers += [f"{b}.{layer}" for layer in found.writes]
    readers[found.last] = (HEAD,)
    missing = [n for n in (*readers, *sum(readers.values(), ()), *writers) if n not in names]
    extra = [n for n in names if n.endswith("crossattention")]
    if missing or extra:
        raise BadParameter(
            f"fold: {kind} has {'no ' + missing[0] if missing else extra[0]}; layers expected: "
            f"{found}."
        )
    for norm, maps in readers.items():
        part = module.get_submodule(norm)
        if not isinstance(part, nn.LayerNorm):
            raise BadParameter(
                f"fold: {norm} is a {type(part).__name__}, not a LayerNorm. One that does not "
                "subtract the mean may be rotated by more than is known here."
            )
        for name in maps:
            if part.bias is not None and name != HEAD and _bias(module, name) is None:
                raise BadParameter(
                    f"fold: {norm} has a bias and {name}, which is to take it, has none. Give the "
                    "network biases everywhere or nowhere (bias=true or bias=false)."
                )
    return Parts(readers, tuple(writers), tuple(t for t in found.tables if t in names))


def _bias(module: nn.Module, name: str) -> Tensor | None:
    found = getattr(module.get_submodule(name), "bias", None)
    return found if isinstance(found, Tensor) else None


def _folded(theta: Theta, module: nn.Module, parts: Parts) -> dict[str, Tensor]:
    """The entries of the folded architecture, from float64 ones of the original."""
    out = dict(theta)
    out.setdefault(f"{HEAD}.weight", theta[f"{parts.tables[0]}.weight"])  # tied: one name may lack
    for norm, maps in parts.readers.items():
        gain, shift = theta.get(f"{norm}.weight"), theta.get(f"{norm}.bias")
        for name in maps:
            weight = f"{name}.weight"
            dim = 1 if isinstance(module.get_submodule(name), nn.Linear) else 0  # Conv1D: (in, out)
            x = out[weight].movedim(dim, -1)
            if shift is not None:
                old = theta.get(f"{name}.bias")
                out[f"{name}.bias"] = x @ shift if old is None else old + x @ shift
            out[weight] = _centred(x if gain is None else x * gain).movedim(-1, dim)
        if gain is not None:
            out[f"{norm}.weight"] = torch.ones_like(gain)
        if shift is not None:
            out[f"{norm}.bias"] = torch.zeros_like(shift)
    for name in parts.tables:
        out[f"{name}.weight"] = _centred(theta[f"{name}.weight"])
    for name in parts.writers:
        dim = 0 if isinstance(module.get_submodule(name), nn.Linear) else 1
        out[f"{name}.weight"] = _centred(theta[f"{name}.weight"].movedim(dim, -1)).movedim(-1, dim)
        if f"{name}.bias" in theta:
            out[f"{name}.bias"] = _centred(theta[f"{name}.bias"])
    return {k: v.contiguous() for k, v in out.items()}


def _centred(x: Tensor) -> Tensor:
    """Without its mean over the last axis."""
    return x - x.mean(-1, keepdim=True)
