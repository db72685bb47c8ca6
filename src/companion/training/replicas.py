"""Many replicas of one recipe on one device at once: M runs in little more than the time of one.

A step of a ResNet-20 is some hundred kernels too small to fill a large GPU, started one by one by a
host that is slower than the device. ``loop`` trains one run after the other, the reference;
``loop-compile`` fuses each network's pass, for one that fills the device. ``vmap`` makes all
replicas one network with a leading axis, for fully connected networks (grouped convolutions are
slow). ``graphs`` has M networks, each on a stream of its own, and one CUDA graph for a step of all;
``compile`` is that with loss and gradient fused by ``torch.compile``.

Same recipe, same keys: the same batches in the same order on every engine. Bits differ, as kernels
round differently; means over runs do not (tests/training). Source: benchmarks/README.md, "Engine".
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from companion import models
from companion.core import closing, slurm
from companion.core.errors import BadParameter, one_of
from companion.core.numerics import exact_float32, fix_cublas_workspace
from companion.core.pool import one_thread
from companion.data import Dataset
from companion.training import byhand, loop
from companion.training.engines import ENGINES
from companion.training.feed import Feed
from companion.training.loop import State
from companion.training.recipe import Recipe, Run
from companion.training.stepper import Stepper

MOST = 27
"""Replicas at once, at most: 3 inits with 9 copies each. More would not fill the device better."""

_WIDTHS = (1, 2, 4, 9, 16)

_LOOK_EVERY = 200  # steps between looks at the losses: each one waits for the device


def unfit(module: nn.Module) -> str | None:
    """Why the step of ``module`` cannot be one function of static tensors; None if it can."""
    if (name := models.first_dropout(module)) is not None:
        return f"{name} draws random numbers (dropout) that no key names"
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.momentum is None:
            return f"{name} averages over all batches (momentum=None), which asks the host"
    return None


def _batches_well(module: nn.Module) -> bool:
    """True if a leading replica axis turns every layer into a batched one, in every precision."""
    return all(
        isinstance(layer, nn.Linear | nn.LayerNorm)
        for layer in module.modules()
        if [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    )


def _reads_tokens(module: nn.Module, data: Dataset | None = None) -> bool:
    """Whether it may hold attention: what it is trained on is text, or it looks tokens up."""
    if data is not None and data.kind == "text":
        return True
    return any(isinstance(layer, nn.Embedding | nn.EmbeddingBag) for layer in module.modules())


def why_not(
    engine: str, module: nn.Module, data: Dataset | None = None, precision: str = "float32"
) -> str | None:
    """Why ``engine`` cannot train ``module`` on ``data`` in ``precision``; None if it can."""
    if engine in ("auto", "loop", "loop-compile"):
        return None
    if why := unfit(module):
        return f"{engine!r} cannot train this network: {why}. Use 'loop'."
    if engine == "vmap" and _reads_tokens(module, data):
        return (
            "'vmap' does not train networks that read tokens: attention has no batched form for "
            "many replicas. Use 'loop', 'loop-compile', 'graphs' or 'compile'."
        )
    if engine == "vmap" and precision == "bf16" and not _batches_well(module):
        return (
            "'vmap' does not train convolutions or BatchNorm in bf16 (autocast does not see them "
            "under torch.vmap). Use 'graphs', or precision float32."
        )
    return None


def choose(
    module: nn.Module, device: torch.device, engine: str = "auto", data: Dataset | None = None
) -> str:
    """The engine that ``engine`` stands for.

    ``auto``: ``loop`` on a CPU, for networks that :func:`unfit` names and for those that read
    tokens (``data`` is text, or they hold an embedding); on a GPU ``vmap`` for networks of linear
    maps and LayerNorm alone, ``graphs`` for the others. Not measured yet: benchmarks/README.md,
    "Engine".

    Raises:
        BadParameter: no such engine, or one that cannot train this network.
    """
    one_of("engine", engine, ENGINES)
    if engine == "auto":
        if device.type == "cpu" or unfit(module) or _reads_tokens(module, data):
            return "loop"
        return "vmap" if _batches_well(module) else "graphs"
    if why := why_not(engine, module, data):
        raise BadParameter(f"engine: {why}")
    return engine


def stacked(count: int, most: int) -> int:
    """With how many replicas ``vmap`` computes ``count`` runs, where ``most`` fit.

    Batched matrix products may round otherwise with another number of them, so it is one of a few
    numbers; and not always the largest, or one run alone would cost as much as 27.
    """
    return max(count, min(next((w for w in _WIDTHS if w >= count), most), most))


def replica_bytes(module: nn.Module, recipe: Recipe, data: Dataset) -> int:
    """Device memory that one replica may take, generously: what is kept for the backward pass.

    Counts the outputs of all layers twice (values and gradients) and six copies of the weights.
    """
    made = 0
    handles = []

    def count(layer: nn.Module, _: object, out: object) -> None:
        nonlocal made
        if isinstance(out, Tensor):
            made += out.numel() * 4

    for layer in module.modules():
        if not list(layer.children()):
            handles.append(layer.register_forward_hook(count))
    training = module.training
    try:
        with torch.no_grad():
            weight, few = next(module.parameters()), data.train.x[:2]
            few = few.to(weight) if few.is_floating_point() else few.to(weight.device)
            module.eval()(few)
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    weights = sum(p.numel() for p in module.parameters()) * 4
    return made // 2 * recipe.batch * 2 + 6 * weights + (64 << 20)


def most_replicas(recipe: Recipe, data: Dataset, device: torch.device) -> int:
    """How many replicas fit at once: a function of recipe and device, not of what else runs.

    So a run trained again meets the same shapes. Half the device's memory is left alone.
    """
    if device.type != "cuda":
        return MOST
    if (cluster := slurm.asked_for()) and cluster.gpus:
        return cluster.replicas
    # On the CPU: cuBLAS must not start before reproducible() has set its environment.
    module = loop.build(Run(recipe), data, torch.device("cpu"))
    total = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MOST, int(total // 2 // replica_bytes(module, recipe, data))))


@contextlib.contextmanager
def reproducible(device: torch.device, on: bool = True, *, strict: bool = False) -> Iterator[None]:
    """Inside, the same work gives the same bits; with ``on=False``, cuDNN may time its kernels.

    Turns on :func:`torch.use_deterministic_algorithms` and turns ``cudnn.benchmark`` off; cuBLAS
    gets its workspace. Operations without a deterministic form are let through: in our networks
    that is at most max-pooling's gradient, a sum of one term as our windows do not overlap.
    Attention has deterministic kernels but uses them only when ``strict``: then an operation
    without one is an error. Whether the bits are the same the null control checks.
    """
    if device.type != "cuda":
        yield
        return
    fix_cublas_workspace()
    cudnn = torch.backends.cudnn
    already = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    before = cudnn.benchmark, cudnn.deterministic
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic impl.*")
            warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores.*")
            warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")  # speed advice
            torch.use_deterministic_algorithms(on, warn_only=not strict)
            # Else every new tensor is first filled with NaN: a kernel for each.
            memory.fill_uninitialized_memory = False
            cudnn.benchmark, cudnn.deterministic = not on, on
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(already, warn_only=warn)


def advance_many(
    runs: Sequence[Run],
    states: Sequence[State],
    stop: int,
    data: Dataset,
    *,
    engine: str = "auto",
    module: nn.Module | None = None,
    checkpoints: Iterable[int] = (),
    save: Callable[[int, State], None] | None = None,
    tick: Callable[[int], bool] | None = None,
    deterministic: bool = True,
    width: int = 0,
    capture: bool | None = None,
    backend: str = "inductor",
) -> list[State]:
    """Train every run from its state to step ``stop``: :func:`companion.training.advance`, M times.

    Arguments:
        runs: M runs of one recipe.
        states: where each starts, all at one step.
        data: on the device to train on.
        engine: one of :data:`companion.training.ENGINES`.
        module: a network of the right architecture, on that device; its weights do not count.
        checkpoints: steps at which ``save(m, state)`` is called for each m, with a copy.
        tick: asked after every step; True = ``save`` all states here too (resume points).
        deterministic: the same call gives the same bits; a null control is then exactly 0.
        width: compute with this many replicas at least; the last is repeated to fill up. Kernels
            for stacked replicas may depend on their number, so whoever compares bits fixes it.
        capture, backend: see :class:`companion.training.stepper.Stepper`.

    Returns:
        the states at ``stop``, on the CPU.

    Raises:
        BadParameter: runs of different recipes, states at different steps; an engine that cannot
            train the network.
        Diverged: a loss is not finite; the first such run is named. Nothing of a broken state was
            handed to ``save``, of any run.
    """
    closing.refuse_work()
    if not runs or len(runs) != len(states):
        raise BadParameter(f"advance_many: {len(runs)} runs and {len(states)} states.")
    if len({run.recipe for run in runs}) > 1:
        raise BadParameter("advance_many: all runs must have one recipe.")
    if len({(state.step, len(state.trace)) for state in states}) > 1:
        raise BadParameter("advance_many: all states must be at one step of their runs.")
    loop.check_start(runs, states, data)
    recipe, device, first = runs[0].recipe, data.train.x.device, states[0].step
    module = module if module is not None else loop.build(runs[0], data, device)
    engine = choose(module, device, engine, data)
    if why := why_not(engine, module, data, recipe.precision):
        raise BadParameter(f"engine: {why}")
    wanted = set(checkpoints)
    with reproducible(device, deterministic, strict=_reads_tokens(module, data)):
        if engine == "loop" and device.type == "cpu" and 1 < len(runs) <= byhand.at_once(module):
            more = [loop.build(run, data, device) for run in runs[1:]]
            return loop.advance_together(
                *(runs, states, stop, data),
                modules=[module, *more],
                checkpoints=wanted,
                save=save,
                tick=tick,
            )
        if engine in ("loop", "loop-compile"):
            # To the CPU one by one: the device need not hold what it has finished.
            return [
                loop.advance(
                    *(run, state, stop, data),
                    module=module,
                    checkpoints=wanted,
                    save=(lambda s, m=m: save(m, s)) if save else None,  # type: ignore[misc]  # mypy infers no lambda with a default
                    tick=tick,
                    compiler=backend if engine == "loop-compile" else None,
                ).cpu()
                for m, (run, state) in enumerate(zip(runs, states, strict=True))
            ]
        if stop <= first:
            return [replace(s, theta=dict(s.theta), optimizer=dict(s.optimizer)) for s in states]
        extra = max(width - len(runs), 0)
        full_runs = [*runs, *[runs[-1]] * extra]
        stepper = Stepper(
            *(module, recipe, data, [*states, *[states[-1]] * extra], stop),
            engine=engine,
            window=_LOOK_EVERY,
            capture=capture,
            backend=backend,
        )
        calm = one_thread() if device.type == "cpu" else torch.cuda.device(device)
        exact = exact_float32(recipe.precision == "float32")
        with calm, exact, Feed(full_runs, data) as feed:
            return _train(stepper, runs, states, stop, feed, wanted, save, tick)


def _train(
    stepper: Stepper,
    runs: Sequence[Run],
    states: Sequence[State],
    stop: int,
    feed: Feed,
    wanted: set[int],
    save: Callable[[int, State], None] | None,
    tick: Callable[[int], bool] | None,
) -> list[State]:
    first, count = states[0].step, len(runs)
    what = f"the loss of {runs[0].recipe.net} on {stepper.data.name} is"
    before = len(states[0].trace)
    trace = torch.full((len(runs), before + stop - first), float("nan"), device=stepper.device)
    trace[:, :before] = torch.stack([s.trace.to(stepper.device) for s in states])
    looked, epoch = first, -1

    def look(step: int) -> None:
        """Move the losses up to ``step`` out of the window; one wait for the device."""
        nonlocal looked
        losses = stepper.losses()[: step - looked, :count]
        trace[:, before + looked - first : before + step - first] = losses.T
        bad = ~torch.isfinite(losses)
        if bool(bad.any()):
            at, m = (int(i) for i in bad.nonzero()[0])
            raise loop.diverged(what, looked + at, runs[m])
        looked = step

    def here(step: int) -> list[State]:
        if step > looked:
            look(step)
        found = stepper.stack.states(step, list(trace[:, : before + step - first].cpu()))
        for run, state in zip(runs, found, strict=True):
            loop.check_finite(state.theta, stepper.data, step, run)
        return found

    for step in range(first, stop):
        now, position = divmod(step, feed.per_epoch)
        if now != epoch:
            epoch = now
            stepper.feed(feed.epoch(now, ahead=(now + 1) * feed.per_epoch < stop), position)
        stepper.step()
        done = step + 1
        if done - looked == _LOOK_EVERY:
            look(done)
        if save and (done in wanted or (done < stop and tick and tick(done))):
            for m, state in enumerate(here(done)):
                save(m, state)
    return here(stop)
