"""The GPU's way through a step, without a GPU: on tensors that have a device, but no memory.

Torch's fake tensors know shapes, types and devices. So a tensor left on the host, a type that
autocast does not mend, or a wrong call around the capture shows here. Kernels, gradients, streams
and the capture itself do not exist here: the tests marked ``gpu`` are for those.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from companion import data as datasets
from companion.core.theta import snapshot
from companion.data import Dataset, Split
from companion.training import Recipe, Run, State, build, pruned
from companion.training.feed import Feed
from companion.training.stepper import Stepper

CUDA = torch.device("cuda", 0)
DIGITS = datasets.load("digits")
REAL_GRAPH = torch.cuda.graph
calls: list[str] = []


class FakeStream:
    """Takes every order."""

    def __init__(self, *_: Any) -> None:
        calls.append("stream")

    def wait_stream(self, _: Any) -> None:
        calls.append("wait_stream")

    def wait_event(self, _: Any) -> None:
        calls.append("wait_event")

    def record_event(self) -> str:
        return "event"


class FakeGraph:
    """Replays nothing."""

    def replay(self) -> None:
        calls.append("replay")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine without a driver cannot do is left out; the order of calls is kept."""

    def inside(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def graph(*_: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        # By its real signature, which a release of torch could change.
        inspect.signature(REAL_GRAPH).bind(*_, **options)
        calls.append(f"capture {options['capture_error_mode']}")
        return contextlib.nullcontext()

    def cross_entropy(logits: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append("loss under vmap" if torch._C._functorch.is_batchedtensor(logits) else "loss")
        return real_loss(logits, *rest, **options)

    real_loss = torch.nn.functional.cross_entropy

    black = DIGITS.black.shape
    for name, stand_in in {
        "torch.cuda.Stream": FakeStream,
        "torch.cuda.CUDAGraph": FakeGraph,
        "torch.cuda.current_stream": lambda *_: FakeStream(),
        "torch.cuda.stream": inside,
        "torch.cuda.graph": graph,
        "torch.nn.functional.cross_entropy": cross_entropy,
        "torch.cuda.device": inside,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.is_bf16_supported": lambda *_: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.autograd.grad": lambda _, leaves: [torch.empty_like(x) for x in leaves],
        "torch.Tensor.pin_memory": lambda t: t,
        "companion.training.stepper.copied": lambda module: module,
        "companion.core.theta._has_minus_infinity": lambda tensor: False,  # asked once, at first
    }.items():
        monkeypatch.setattr(name, stand_in)
    monkeypatch.setattr(Dataset, "black", property(lambda _: torch.empty(black, device=CUDA)))
    calls.clear()


def moved(module: nn.Module) -> nn.Module:
    """``module.to("cuda", memory_format=channels_last)`` of fake tensors."""
    for layer in module.modules():
        for name, p in list(layer._parameters.items()):
            if p is not None:
                value = torch.empty(p.shape, device=CUDA)
                if value.ndim == 4:
                    value = value.to(memory_format=torch.channels_last)
                layer._parameters[name] = nn.Parameter(value)
        for name, b in list(layer._buffers.items()):
            if b is not None:
                layer._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=CUDA)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: see test_replicas.py")
@pytest.mark.parametrize(
    ("net", "engine", "precision", "optimizer"),
    [
        ("mlp:widths=16x12", "vmap", "float32", "adam"),
        ("mlp:widths=16x12,norm=layer", "vmap", "bf16", "sgd"),
        ("resnet8:width=4", "graphs", "bf16", "sgd"),
        ("resnet8:width=4,norm=layer", "graphs", "bf16", "adamw"),
        ("vgg11:width=4", "graphs", "float32", "sgd"),
    ],
)
def test_a_step_stays_on_its_device(
    net: str, engine: str, precision: str, optimizer: str, fake_cuda: None
) -> None:
    what = Recipe(
        net=net,
        data="digits",
        steps=40,
        batch=60,
        augment="flip+crop1",
        precision=precision,
        optimizer=optimizer,
        weight_decay=1e-3,
    )
    runs = [Run(what, init=i, order=i, augment=i) for i in range(3)]
    cpu = torch.device("cpu")
    modules = [build(run, DIGITS, cpu) for run in runs]
    states = [State(0, snapshot(m)) for m in modules]
    # The first is a subnetwork, whose mask has to be on the device, too.
    mask = {n: v > 0 for n, v in states[0].theta.items() if v.ndim > 1}
    states[0] = pruned(states[0], mask, modules[0])
    with Feed(runs, DIGITS) as feed:
        epoch = feed.epoch(0)
    module = copy.copy(modules[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = moved(module)
        splits = {
            name: Split(
                torch.empty(split.x.shape, device=CUDA),
                torch.empty(split.y.shape, dtype=torch.int64, device=CUDA),
            )
            for name, split in (("train", DIGITS.train), ("test", DIGITS.test))
        }
        there = replace(DIGITS, train=splits["train"], test=splits["test"])
        stepper = Stepper(module, what, there, states, 40, engine=engine, window=10)
        stepper.feed(epoch, 0)
        stepper.step()
        stepper.step()
        losses = stepper.losses()
        assert stepper.capture and calls.count("replay") == 2
        assert calls.count("capture thread_local") == 1, "a Feed's threads do not end it"
        # Under vmap the loss would be a gather: one call for all replicas instead of that.
        assert calls.count("loss") == 4 * (1 if engine == "vmap" else 3)
        assert "loss under vmap" not in calls
        # Three warm steps and the captured one, each replica on its own stream, joined each time.
        assert calls.count("wait_event") == (0 if engine == "vmap" else 4 * 3)
        assert calls.count("wait_stream") == 2 + (0 if engine == "vmap" else 4 * 3)
        kept = stepper.stack.kept
        assert kept is not None
        assert {t.device for t in (losses, stepper.stack.theta, stepper.stack.grad, kept)} == {CUDA}
        weights = [t for leaves in stepper._leaves for t in leaves.values()]
        assert all(t.device == CUDA and t.requires_grad and t.is_leaf for t in weights)
        half = {t.dtype for t in weights}
        assert (torch.bfloat16 in half) == (precision == "bf16")
