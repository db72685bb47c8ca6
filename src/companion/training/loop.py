"""The training loop: a pure function of (state, run, data) -> state, with exact steps."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from companion import models
from companion.core import closing
from companion.core.errors import BadParameter, Diverged
from companion.core.losses import IGNORED, is_label, mean_loss
from companion.core.masks import Mask, masked, pack, unpack
from companion.core.networks import returning_logits
from companion.core.numerics import exact_float32
from companion.core.pool import one_thread
from companion.core.seeds import Key
from companion.core.theta import check_ties, layout, snapshot, with_aliases
from companion.data import Augmentation, Augmenter, Dataset
from companion.training import byhand
from companion.training.recipe import Recipe, Run

F = TypeVar("F", bound=Callable[..., Any])

_LOOK_EVERY = 200  # steps between checks that the loss is finite: each one waits for the device


@dataclass
class State:
    """A run at a step: everything that the rest of the run depends on.

    Arguments:
        step: how many steps were taken.
        theta: the state dict.
        optimizer: the optimiser's tensors, ``"<index>.<slot>"`` -> tensor; empty = fresh.
        trace: the loss of each step so far on its own batch, shape (step - first step,), nats.
        mask: which weights there are; empty = all. The others are exactly 0, and stay so, like
            what the optimiser keeps of them. See :func:`pruned`.
    """

    step: int
    theta: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor] = field(default_factory=dict)
    trace: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    mask: Mask = field(default_factory=dict)

    def tensors(self, full: bool = True) -> dict[str, torch.Tensor]:
        """As one flat dictionary for safetensors; ``full=False``: to look at, not to go on from."""
        out = {f"theta/{k}": v for k, v in self.theta.items()}
        if full:
            out |= {f"optimizer/{k}": v for k, v in self.optimizer.items()}
            out |= {f"mask/{k}": v for k, v in pack(self.mask).items()}
        return out | {"trace": self.trace, "step": torch.tensor(self.step)}

    def cpu(self) -> State:
        """The same on the CPU; there, this very state's tensors."""
        theta, optimizer = (
            {k: v.cpu() for k, v in part.items()} for part in (self.theta, self.optimizer)
        )
        return State(self.step, theta, optimizer, self.trace.cpu(), self.mask)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> State:
        """The inverse of :meth:`tensors`.

        Raises:
            BadParameter: they are not those of a state.
        """
        step, trace = tensors.get("step"), tensors.get("trace")
        if step is None or trace is None or step.numel() != 1 or not 0 <= float(step) < 2**53:
            shown = "none" if step is None else f"of shape {tuple(step.shape)}"
            raise BadParameter(
                f"step: a whole number is needed in the state of a run, not {shown}."
            )

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        kept = unpack(under("mask/"))
        return cls(int(step), under("theta/"), under("optimizer/"), trace, kept)


def pruned(state: State, mask: Mask, module: nn.Module) -> State:
    """``state`` with only the weights of ``mask``: weights and the optimiser's tensors times it.

    Every further step leaves the pruned ones at exactly 0: their gradient is masked before the
    optimiser sees it, and neither momentum, nor Adam's averages, nor weight decay moves a 0.

    Arguments:
        module: of the architecture.

    Raises:
        BadParameter: the mask does not fit, or names what is not trained.
    """
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    places = {name: i for i, name in enumerate(trained)}
    if strange := [n for n in mask if n not in places]:
        raise BadParameter(f"mask: {strange[0]} is not trained in this network, or has two names.")
    theta = with_aliases(masked(state.theta, mask), layout(module).ties)
    optimizer = dict(state.optimizer)
    for slot, value in state.optimizer.items():
        name = trained[int(slot.partition(".")[0])]
        if name in mask and value.ndim:  # Adam's count of steps is one number for all weights
            optimizer |= masked({slot: value}, {slot: mask[name]})
    return State(state.step, theta, optimizer, state.trace, dict(mask))


def network(net: str, data: Dataset, key: Key) -> nn.Module:
    """A network for ``data``, which returns logits whatever the user's own forward returns."""
    module = models.build(net, data.in_shape, data.classes, key)
    return returning_logits(module) if models.is_own(net) else module


def build(run: Run, data: Dataset, device: torch.device) -> nn.Module:
    """The run's network at its init, on ``device``. Same init label, same bits."""
    module = network(run.recipe.net, data, run.init_key()).to(device)
    # Tensor cores want the channels last; the shapes, and so the state dict, stay as they are.
    return module.to(memory_format=torch.channels_last) if device.type == "cuda" else module


def perturbed(
    run: Run, theta: Mapping[str, torch.Tensor], module: nn.Module
) -> dict[str, torch.Tensor]:
    """The start of a run with the one weight moved that :attr:`Run.perturb` names.

    The weight is drawn uniformly from those of all matrices and convolutions, and moved up or down
    by the root mean square of its tensor: about as far as a fresh draw of it alone would be.

    Arguments:
        theta: what the run would start from.
        module: its architecture.

    Raises:
        BadParameter: the network has no matrix that is not zero.

    Source: Altıntaş et al. 2025 (one weight at initialisation is enough); claim C26, our chapter 6.
    """
    spec, key = layout(module), run.perturb_key()
    names = [n for n in spec.parameters if theta[n].dim() > 1 and bool((theta[n] != 0).any())]
    total = sum(theta[n].numel() for n in names)
    if not total:
        raise BadParameter(f"perturb: {run.recipe.net} has no matrix whose weights are not all 0.")
    place = int(key.fold("place").integers(1, total))
    for name in names:
        if place < theta[name].numel():
            break
        place -= theta[name].numel()
    value = theta[name].clone()
    step = float(value.double().square().mean().sqrt())
    up = bool(key.fold("sign").integers(1, 2))
    value[torch.unravel_index(torch.tensor(place), value.shape)] += step if up else -step
    return with_aliases({**theta, name: value}, spec.ties)


def decayed(recipe: Recipe, module: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that ``recipe.weight_decay`` acts on."""
    embeddings = {
        id(p)
        for layer in module.modules()
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag)
        for p in layer.parameters(recurse=False)
    }
    return frozenset(
        name
        for name, p in module.named_parameters()
        if p.requires_grad
        and (recipe.weight_decay_on == "all" or (p.ndim > 1 and id(p) not in embeddings))
    )


@functools.cache
def _leave_dynamo_out() -> None:
    """Spare each process seconds of imports.

    PyTorch marks these methods as none of its compiler's business, and imports the compiler for it
    when the first one is called. Nothing here compiles them, so they are left as they are.
    """
    if "torch._dynamo" not in sys.modules:
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
            method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
            if method is not None:
                setattr(method, "__dynamo_disable", method)


def make_optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.SGD | torch.optim.Adam:
    """PyTorch's own optimiser, in its fused form: one kernel for all tensors that decay alike."""
    _leave_dynamo_out()
    lr, chosen = recipe.lr, decayed(recipe, module)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            groups.setdefault(recipe.weight_decay if name in chosen else 0.0, []).append(p)
    weights = [{"params": params, "weight_decay": decay} for decay, params in groups.items()]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            weights, lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True
        )
    family = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return family(weights, lr, recipe.betas, fused=True)


def _places(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[int]:
    """Where the optimiser's i-th tensor stands among the trainable parameters of the module.

    Stored states count in the module's order, however an optimiser groups its tensors.
    """
    trained = [id(p) for p in module.parameters() if p.requires_grad]
    at = {key: place for place, key in enumerate(trained)}
    return [at[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, places: list[int]
) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{places[index]}.{slot}": value.detach().clone()
        for index, slots in state.items()
        for slot, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], places: list[int]
) -> None:
    if not tensors:
        return
    index = {place: i for i, place in enumerate(places)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        place, _, slot = name.partition(".")
        state.setdefault(index[int(place)], {})[slot] = value.clone()  # written in place later
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def draws_noise(run: Run, module: nn.Module) -> bool:
    """Whether a training step of the network may draw random numbers: dropout, or one's own."""
    return models.is_own(run.recipe.net) or models.first_dropout(module) is not None


@contextlib.contextmanager
def own_generator(device: torch.device) -> Iterator[Callable[[Key], None]]:
    """Inside, the value sets torch's generators by a key; outside, they are as they were before."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):

        def seed(key: Key) -> None:
            torch.default_generator.manual_seed(key.seed())
            if gpu:
                at = torch.cuda.current_device() if device.index is None else device.index
                torch.cuda.default_generators[at].manual_seed(key.seed())

        yield seed


_COMPILED: dict[Any, Any] = {}
"""What torch.compile made, by everything it depends on: a minute's work, done once a process."""


def compiled(key: Any, function: F, backend: str) -> F:
    """``function`` compiled for ``key``, and the same again for the same key.

    Code that was compiled for eight different networks is left uncompiled by torch from then on,
    and little is said. So every key gets code of its own.

    Arguments:
        key: everything that the compiled code depends on: architecture, precision, shapes, device.
        function: a plain function; what it closes over is that of the first call with this key.
        backend: of ``torch.compile``.
    """
    if key not in _COMPILED:
        assert isinstance(function, FunctionType)
        code = function.__code__.replace(co_name=f"{function.__name__}_{len(_COMPILED)}")
        own = FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
        _COMPILED[key] = torch.compile(own, backend=backend, dynamic=False)
    made: F = _COMPILED[key]
    return made


def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A forward pass as a function of the network: what ``torch.compile`` is given."""
    out: torch.Tensor = module(x)
    return out


def check_fit(recipe: Recipe, data: Dataset) -> None:
    """Refuse, before any work, a recipe that its dataset cannot serve.

    Raises:
        BadParameter: a learning rate of 0; batch above the number of training images (of text:
            windows); a network that
            does not take the examples' shape, or not every token of a vocabulary; an augmentation
            wider than the image, or of images for text and the other way round.
    """
    if recipe.lr == 0:
        raise BadParameter("lr: 0 trains nothing; a learning rate above 0 is needed.")
    text = data.kind == "text"
    things = f"windows of {data.in_shape[0]} tokens" if text else "images"
    if recipe.batch > len(data.train):
        raise BadParameter(
            f"batch: {recipe.batch} is more than the {len(data.train)} training {things} "
            f"of {data.name}." + (" Take a smaller batch or window." if text else "")
        )
    augmentation = Augmentation.parse(recipe.augment)
    if not text and 2 * augmentation.pad >= min(data.in_shape[1:]):
        raise BadParameter(
            f"augment: {recipe.augment!r} shifts images of {data.name} "
            f"({data.in_shape[1]}×{data.in_shape[2]}) by half their size or more."
        )
    if why := augmentation.fits(data.in_shape):
        raise BadParameter(f"augment: {recipe.augment!r} on {data.name}: {why}.")
    module = network(recipe.net, data, Key("fit")).eval()
    few = data.train.x[:2].cpu()
    wanted = (*data.train.y[:2].shape, data.classes)
    taken = f"{'tokens' if text else 'images'} of shape {data.in_shape}"
    try:
        with torch.no_grad():
            shape = tuple(module(few).shape)
            if text:  # these windows need not hold the last token, which a GPU would crash on
                taken = f"the tokens 0 and {data.classes - 1} of a vocabulary of {data.classes}"
                ends = [torch.full_like(few[0], token) for token in (0, data.classes - 1)]
                module(torch.stack(ends))
    except (RuntimeError, AttributeError, IndexError, TypeError, ValueError) as e:  # one's own
        raise BadParameter(f"net: {recipe.net} does not take {taken} ({data.name}): {e}") from e
    if shape != wanted:
        raise BadParameter(
            f"net: {recipe.net} makes {shape} of {len(few)} {things} of {data.name}; "
            f"logits of shape {wanted} are needed."
        )


def diverged(what: str, step: int, run: Run) -> Diverged:
    """The error of a run in which ``what`` is not finite."""
    recipe = run.recipe
    return Diverged(
        f"training diverged: {what} not finite at step {step} of {recipe.steps} "
        f"(init {run.init!r}, order {run.order!r}, {recipe.optimizer}, lr {recipe.lr:g}). "
        "Nothing of it was stored. Lower lr, or add warmup."
    )


def check_finite(theta: Mapping[str, torch.Tensor], data: Dataset, step: int, run: Run) -> None:
    """Refuse weights that are not finite: a loss that was can still have a gradient that is not."""
    for name, value in theta.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise diverged(f"{name} of {run.recipe.net} on {data.name} is", step, run)


def check_start(runs: Sequence[Run], states: Sequence[State], data: Dataset) -> None:
    """Refuse to train a subnetwork from a state that does not know which weights it has.

    And on labels that are left out elsewhere: steps and orders count all examples of a recipe.

    Raises:
        BadParameter: it is so.
    """
    if not bool(is_label(data.train.y).all()):
        raise BadParameter(
            f"data {data.name}: labels of {IGNORED} in its training split. A run counts its steps "
            "and epochs by examples, each with a label: leave the others out "
            "(Split.labelled(), for examples without any)."
        )
    if any(run.mask and not state.mask for run, state in zip(runs, states, strict=True)):
        raise BadParameter("mask: the run has one, the state none. Start from pruned(state, mask).")


_AHEAD = 1 << 22
"""Bytes of the examples that are gathered in one go, at least those of one batch."""


def _batches(
    run: Run, data: Dataset, start: int, stop: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Augmented examples and targets of the steps from ``start`` to ``stop - 1``."""
    device, n, batch = data.train.x.device, len(data.train), run.recipe.batch
    black = data.black if data.kind == "images" else None
    augmenter = Augmenter(data.train, Augmentation.parse(run.recipe.augment), black)
    at_once = max(1, _AHEAD // (batch * data.train.x[0].nbytes))
    step, per_epoch = start, n // batch
    while step < stop:
        epoch, position = divmod(step, per_epoch)
        order = run.order_key().fold("epoch", epoch).permutation(n).to(device)
        draws = augmenter.draw(run.augment_key(), epoch)
        end = min(per_epoch, position + stop - step)
        for some in order[position * batch : end * batch].split(at_once * batch):
            x, y = augmenter.examples(some, draws)
            yield from zip(x.split(batch), y.split(batch), strict=True)
        step += end - position


class _Training:
    """A run as it trains: its network, its optimiser, its losses."""

    def __init__(
        self,
        run: Run,
        state: State,
        stop: int,
        data: Dataset,
        module: nn.Module,
        compiler: str | None,
    ):
        recipe, device = run.recipe, data.train.x.device
        check_ties(state.theta, layout(module).ties, f"{recipe.net} at step {state.step}")
        module.load_state_dict(state.theta)
        module.train()
        self.run, self.data, self.module, self.mask = run, data, module, state.mask
        named = module.named_parameters()
        self.masks = [(p, state.mask[n].to(p)) for n, p in named if n in state.mask]
        self.optimizer = make_optimizer(recipe, module)
        self.places = _places(self.optimizer, module)
        _load_optimizer(self.optimizer, state.optimizer, self.places)
        self.net: Callable[[torch.Tensor], torch.Tensor] = module
        if compiler:
            shapes = (recipe.net, recipe.precision, data.in_shape, data.classes, recipe.batch)
            key = (forward, *shapes, str(device), compiler)
            self.net = partial(compiled(key, forward, compiler), module)
        self.noisy = draws_noise(run, module)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        on_cpu = device.type == "cpu"
        self.take_step = byhand.step_of(self.optimizer) if on_cpu else self.optimizer.step
        self.first, self.looked = state.step - len(state.trace), state.step
        self.trace = torch.full((stop - self.first,), float("nan"), device=device)
        self.trace[: len(state.trace)] = state.trace
        half = recipe.precision == "bf16"
        self.cast = (
            torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
        )

    def gradients(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """The loss of a batch, and of each parameter the gradient, or None."""
        with self.cast:
            loss = mean_loss(self.net(x), y)
        for p in self.parameters:
            p.grad = None
        loss.backward()
        return loss.detach(), [p.grad for p in self.parameters]

    def step(self, step: int, loss: torch.Tensor, grads: Sequence[Any]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.recipe.learning_rate(step)
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad
        for p, kept in self.masks:
            if p.grad is not None:
                p.grad.mul_(kept)
        self.take_step()
        self.trace[step - self.first] = loss
        if (step + 1) % _LOOK_EVERY == 0:
            self.look(step + 1)

    def look(self, step: int) -> None:
        bad = ~torch.isfinite(self.trace[self.looked - self.first : step - self.first])
        if bool(bad.any()):
            what = f"the loss of {self.run.recipe.net} on {self.data.name} is"
            raise diverged(what, self.looked + int(bad.nonzero()[0, 0]), self.run)
        self.looked = step

    def here(self, step: int) -> State:
        self.look(step)
        theta = snapshot(self.module)
        check_finite(theta, self.data, step, self.run)
        kept = _optimizer_tensors(self.optimizer, self.places)
        return State(step, theta, kept, self.trace[: step - self.first].clone(), self.mask)


def advance(
    run: Run,
    state: State,
    stop: int,
    data: Dataset,
    *,
    module: nn.Module | None = None,
    checkpoints: Iterable[int] = (),
    save: Callable[[State], None] | None = None,
    tick: Callable[[int], bool] | None = None,
    compiler: str | None = None,
) -> State:
    """Train ``run`` from ``state`` to step ``stop`` and return the new state.

    On a CPU it computes with one thread, wherever it is called: the number of threads changes how
    sums round, and with it every bit of the result.

    Arguments:
        run: recipe, noise labels; its fork is not looked at, ``state`` already is the start.
        state: where to start; ``state.step`` counts in the schedule and the data order.
        stop: last step, ``state.step <= stop <= T``.
        data: on the device to train on.
        module: a network of the right architecture to reuse; its weights are overwritten.
        checkpoints: steps at which ``save`` is called with a full state (a copy).
        tick: asked after every step; True = ``save`` the state here too (a resume point).
        compiler: a backend of ``torch.compile`` for the network's forward and backward pass;
            kernels that it fuses round differently.

    Raises:
        BadParameter: a state whose two names of a tied tensor hold different values.
        Diverged: the loss is not finite. Nothing of the broken state was handed to ``save``.
    """
    keep = (lambda _, reached: save(reached)) if save else None
    (reached,) = advance_together(
        *([run], [state], stop, data),
        modules=[module] if module is not None else None,
        checkpoints=checkpoints,
        save=keep,
        tick=tick,
        compiler=compiler,
    )
    return reached


def advance_together(
    runs: Sequence[Run],
    states: Sequence[State],
    stop: int,
    data: Dataset,
    *,
    modules: Sequence[nn.Module] | None = None,
    checkpoints: Iterable[int] = (),
    save: Callable[[int, State], None] | None = None,
    tick: Callable[[int], bool] | None = None,
    compiler: str | None = None,
) -> list[State]:
    """:func:`advance` for R runs of one recipe from one step, with the same bits.

    Small perceptrons on a CPU share their steps (:mod:`companion.training.byhand`); where that
    would change a bit, and for every other network, each makes its own.

    Arguments:
        modules: one a run.
        save: called with the number of the run and its state.
    """
    closing.refuse_work()
    recipe, device = runs[0].recipe, data.train.x.device
    modules = modules or [build(run, data, device) for run in runs]
    check_start(runs, states, data)
    all_of = [
        _Training(run, state, stop, data, module, compiler)
        for run, state, module in zip(runs, states, modules, strict=True)
    ]
    by_hand = device.type == "cpu" and recipe.precision == "float32" and not compiler
    layers = byhand.stacked(modules) if by_hand else []
    first, wanted = states[0].step, set(checkpoints)
    calm = one_thread() if device.type == "cpu" else contextlib.nullcontext()
    exact = exact_float32(recipe.precision == "float32")
    with calm, exact, own_generator(device) as seed:
        feeds = zip(*(_batches(run, data, first, stop) for run in runs), strict=True)
        for step, batches in enumerate(feeds, first):
            if layers:
                x, y = (torch.stack(part) for part in zip(*batches, strict=True))
                if step == first and len(runs) > 1 and not byhand.steady(layers, x, y):
                    layers = []
            if layers:
                losses, grads = byhand.gradients(layers, x, y)
                found = zip(losses, zip(*grads, strict=True), strict=True)
                for one, (loss, own) in zip(all_of, found, strict=True):
                    one.step(step, loss, own)
            else:
                for one, batch in zip(all_of, batches, strict=True):
                    if one.noisy:
                        seed(one.run.dropout_key().fold(step))
                    one.step(step, *one.gradients(*batch))
            done = step + 1
            if save and (done in wanted or (done < stop and tick and tick(done))):
                for m, one in enumerate(all_of):
                    save(m, one.here(done))
    return [one.here(stop) for one in all_of]
