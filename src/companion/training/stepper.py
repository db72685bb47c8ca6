"""One training step of M replicas as one function of static tensors: what a CUDA graph needs.

:meth:`Stepper.one_step` reads its batch, learning rate and position out of tensors on the device
and moves the counters itself, so it takes no argument and asks the host nothing. On a CPU it is
simply called, step after step. On a GPU it is captured once, after a warm-up, and replayed:
a few hundred small kernels a replica then cost one launch for all, and the streams inside let
kernels of different replicas run side by side, which one small network cannot fill an H200 with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from companion.core.losses import mean_loss, mean_losses
from companion.core.networks import copied
from companion.data import Augmentation, Augmenter, Dataset
from companion.data.augmentation import Draws
from companion.training.feed import Epoch
from companion.training.loop import State, compiled
from companion.training.recipe import Recipe
from companion.training.stack import Stack, coefficients, update

_WARM = 3  # steps before a capture: libraries choose and load their kernels, compilers compile

Tensors = dict[str, Tensor]


def cast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, a pass computes in the recipe's precision."""
    if recipe.precision != "bf16":
        return contextlib.nullcontext()
    # A graph may not keep autocast's cache, whose tensors would be freed between replays.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def template_of(module: nn.Module) -> nn.Module:
    """A copy in training mode whose BatchNorms do not count batches (the host does)."""
    template = copied(module).train()
    for layer in template.modules():
        if isinstance(layer, _BatchNorm):
            layer.num_batches_tracked = None
    return template


class Stepper:
    """M replicas at a step, and the step.

    Arguments:
        module: the architecture, on the device.
        recipe: of all replicas.
        data: on the device.
        states: where the replicas are, all at one step.
        stop: the last step that will be asked for.
        engine: ``vmap``, ``graphs`` or ``compile``.
        window: losses kept before :meth:`losses`.
        capture: replay a CUDA graph; default: on a GPU.
        backend: of ``torch.compile``.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        data: Dataset,
        states: Sequence[State],
        stop: int,
        *,
        engine: str,
        window: int,
        capture: bool | None = None,
        backend: str = "inductor",
    ):
        self.recipe, self.data = recipe, data
        self._stacked = engine == "vmap"
        self.stack = stack = Stack(module, recipe, states, dense=self._stacked)
        self.device, count = stack.device, len(stack)
        self.capture = self.device.type == "cuda" if capture is None else capture
        self._graph: torch.cuda.CUDAGraph | None = None
        black = data.black.to(data.train.x) if data.kind == "images" else None
        self._augmenter = Augmenter(data.train, Augmentation.parse(recipe.augment), black)
        template = template_of(module)
        device = self.device

        def logits(parameters: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
            with cast(recipe, device):
                out: Tensor = functional_call(template, (parameters, buffers), (x,))
                return out

        def loss(parameters: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
            with cast(recipe, device):
                return mean_loss(functional_call(template, (parameters, buffers), (x,)), y)

        # Of one replica; the buffers may be written.
        self._logits: Callable[[Tensors, Tensors, Tensor], Tensor] = logits
        self._loss: Callable[[Tensors, Tensors, Tensor, Tensor], Tensor] = loss
        if engine == "compile":
            key = (recipe.net, recipe.precision, data.in_shape, data.classes, recipe.batch)
            self._loss = compiled(
                (*key, str(self.device), stack.theta.dtype, backend), self._loss, backend
            )
        self._streams: list[torch.cuda.Stream] = []
        if self.device.type == "cuda" and not self._stacked:
            self._streams = [torch.cuda.Stream(self.device) for _ in range(count)]

        table = coefficients(recipe, stack.first, stop, stack.taken)
        self._table = table.to(self.device, stack.theta.dtype)

        def counter() -> Tensor:
            return torch.zeros(1, dtype=torch.int64, device=self.device)

        self._taken, self._position, self._slot = counter(), counter(), counter()
        self._window = torch.zeros(window, count, device=self.device)
        self._slots = torch.arange(window, device=self.device)[:, None]
        self._losses = torch.zeros(count, device=self.device)
        self._epoch: list[Tensor] = []
        self._has: tuple[bool, ...] = ()
        # Per replica (``vmap``: for all at once) the tensors that gradients are taken of.
        self._leaves: list[Tensors] = [
            {p.name: p.view(stack.source(p)[m]).detach().requires_grad_() for p in stack.places}
            for m in ([slice(None)] if self._stacked else range(count))
        ]

    # ---- the step

    def one_step(self) -> None:
        """One step of every replica. Reads and writes static tensors only."""
        stack = self.stack
        with torch.no_grad():
            x, y = self._batch()
            if stack.half is not None:
                stack.half.copy_(stack.theta)
        self._gradients(x, y)
        with torch.no_grad():
            row = self._table.index_select(0, self._taken)[0]
            if stack.kept is not None:
                stack.grad.mul_(stack.kept)
            update(self.recipe, stack.theta, stack.grad, stack.state, row, stack.decayed)
            # Elementwise instead of an indexed write: the same bits in every mode of torch.
            here = self._slots == self._slot
            self._window.copy_(torch.where(here, self._losses, self._window))
            for counter in (self._taken, self._position, self._slot):
                counter.add_(1)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Examples and targets of this step, (M, B, ...) each: one gather for all replicas."""
        picked = [t.index_select(0, self._position)[0] for t in self._epoch]
        rows, *rest = (t.reshape(-1) for t in picked)
        draws = Draws(*(rest.pop(0) if there else None for there in self._has))
        x, y = self._augmenter.pick_examples(rows, draws)
        if x.is_floating_point():
            x = x.to(self.stack.theta.dtype)
            if self._streams:
                x = x.contiguous(memory_format=torch.channels_last)
        shape = (len(self.stack), -1)
        return x.unflatten(0, shape), y.unflatten(0, shape)

    def _gradients(self, x: Tensor, y: Tensor) -> None:
        """Every replica's loss into ``_losses`` and its gradient into its row of ``grad``."""
        stack, buffers = self.stack, self.stack.moving()
        if self._stacked:
            leaves = self._leaves[0]
            logits = vmap(self._logits)(leaves, buffers, x)
            # Not under vmap, where the loss is a gather: the deterministic gradient of that is a
            # scatter, slow beside the step of a small network.
            with cast(self.recipe, self.device):
                losses = mean_losses(logits, y)
            # Replicas share nothing: the gradient of the sum is every replica's own.
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
            self._keep(stack.grad, grads, losses, self._losses)
            return
        # x and y stay alive in our caller until all streams are joined: no stream reuses them.
        ready = torch.cuda.current_stream(self.device).record_event() if self._streams else None
        for m, leaves in enumerate(self._leaves):
            with self._beside(m, ready):
                own = {name: value[m] for name, value in buffers.items()}
                loss = self._loss(leaves, own, x[m], y[m])
                grads = torch.autograd.grad(loss, list(leaves.values()))
                self._keep(stack.grad[m], grads, loss, self._losses[m])
        for stream in self._streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)

    @torch.no_grad()
    def _keep(self, flat: Tensor, grads: Sequence[Tensor], loss: Tensor, to: Tensor) -> None:
        to.copy_(loss)
        torch._foreach_copy_([p.view(flat) for p in self.stack.places], list(grads))

    @contextlib.contextmanager
    def _beside(self, m: int, ready: torch.cuda.Event | None) -> Iterator[None]:
        """Inside, work goes to replica m's own stream, after ``ready``."""
        if ready is None:
            yield
            return
        # An event, not the stream: torch has 32 streams, and ours may be among the replicas'.
        stream = self._streams[m]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            yield

    # ---- what the host does

    def feed(self, epoch: Epoch, position: int) -> None:
        """Put an epoch's batches where the step reads them; go on at batch ``position``.

        The copy is queued behind the steps already asked for; the host does not wait for it.
        """
        given = epoch.tensors()
        if not self._epoch:
            self._epoch = [torch.empty_like(t, device=self.device) for t in given]
            self._has = tuple(t is not None for t in epoch.draws.tensors())
        for mine, new in zip(self._epoch, given, strict=True):
            if self.device.type == "cuda":
                # Torch's pinned memory is not given to others before the copy out of it is done.
                new = new.pin_memory()
            mine.copy_(new, non_blocking=True)
        self._position.fill_(position)

    def step(self) -> None:
        """Take one step. The host returns at once; on a GPU the work is queued."""
        if not self.capture:
            self.one_step()
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def losses(self) -> Tensor:
        """The losses of the steps since the last call, (steps, M) on the device; steps <= window.

        The caller knows how many it took; the rest of the window is old.
        """
        self._slot.zero_()
        return self._window.clone()

    def _mutable(self) -> list[Tensor]:
        return [*self.stack.mutable(), *(self._taken, self._position, self._slot, self._window)]

    def warm_up(self) -> None:
        """Run the step a few times and put everything back: it takes no step."""
        kept = [t.clone() for t in self._mutable()]
        for _ in range(_WARM):
            self.one_step()
            for counter in (self._position, self._taken, self._slot):
                counter.zero_()  # in range, however near the end of an epoch we are
        for tensor, value in zip(self._mutable(), kept, strict=True):
            tensor.copy_(value)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph, as torch's documentation asks: warm up on a side stream."""
        with torch.cuda.device(self.device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                self.warm_up()
            here.wait_stream(side)
            torch.cuda.synchronize()
            graph: Any = torch.cuda.CUDAGraph()
            # The threads of a Feed go on meanwhile, and what they ask of the device is none of the
            # capture's: only this thread's mistakes may end it. A capture that fails leaves torch
            # on its stream, hence the stream around it.
            with (
                torch.cuda.stream(here),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self.one_step()
        captured: torch.cuda.CUDAGraph = graph
        return captured
