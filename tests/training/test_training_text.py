"""Training on text: one engine with vision, keyed shifts and dropout, exact forks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from companion import data, models
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Augmentation, Augmenter, Dataset, Split
from companion.experiments.instability import analyse, check_design
from companion.experiments.pairs import check_noise
from companion.models import parameter_count
from companion.training import (
    Fork,
    Job,
    Recipe,
    Run,
    State,
    advance,
    advance_many,
    build,
    check_fit,
    load_state,
    load_weights,
    loop,
    throughput,
    train,
)
from companion.training.replicas import choose, reproducible, unfit

CPU = torch.device("cpu")
L, K, BATCH = 8, 64, 6
NET = "gpt:layers=1,width=8,heads=2"


def stream(length: int, label: str) -> Tensor:
    """A text of which much can be learned: steps of 1 to 3 on a circle of 16 tokens."""
    return (1 + Key("text", label).integers(length, 3)).cumsum(0) % 16


def dataset(train: int = 20 * L + 5, window: int = L) -> Dataset:
    splits = (Split.windows(stream(train, "train"), window), Split.windows(stream(90, "t"), window))
    return Dataset("circle", "a circle", *splits, K, (window,), (), (), "fingerprint")


TEXT = dataset()
PER_EPOCH = len(TEXT.train) // BATCH


def recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {"net": NET, "data": "circle", "steps": 10, "batch": BATCH}
    return Recipe(**{**base, "optimizer": "adamw", "lr": 0.01, "augment": "shift", **changes})


def start(run: Run, text: Dataset = TEXT) -> State:
    return State(0, snapshot(build(run, text, CPU)))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_state(a: State, b: State) -> bool:
    return (
        a.step == b.step
        and same(a.theta, b.theta)
        and same(a.optimizer, b.optimizer)
        and torch.equal(a.trace, b.trace)
    )


def dropping(in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network of the user's own that drops units without saying so in its name."""
    return nn.Sequential(nn.Embedding(classes, 8), nn.Dropout(0.5), nn.Linear(8, classes))


class OneHot(nn.Module):
    """Tokens without an embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(x, K).float()


# ---- windows that shift


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(0, 9), st.integers(1, 12), st.integers(0, 11))
def test_shifted_windows(seed: int, epoch: int, window: int, rest: int) -> None:
    text = stream(7 * window + 1 + rest % window, "shift")
    augmenter = Augmenter(Split.windows(text, window), Augmentation.parse("shift"))
    draws = augmenter.draw(Key("augment", seed), epoch)
    assert draws.shift is not None and 0 <= int(draws.shift.min()) <= int(draws.shift.max())
    assert int(draws.shift.max()) < window
    rows = torch.tensor([6, 0, 3])
    x, y = augmenter.examples(rows, draws)
    for i, row in enumerate(rows.tolist()):
        begin = row * window + int(draws.shift[row])
        circle = [int(text[(begin + t) % len(text)]) for t in range(window + 1)]
        assert x[i].tolist() == circle[:-1] and y[i].tolist() == circle[1:]
    again = augmenter.draw(Key("augment", seed), epoch)
    assert again.shift is not None and torch.equal(again.shift, draws.shift)
    for mine, other in zip(augmenter.pick_examples(rows, draws.of(rows)), (x, y), strict=True):
        assert torch.equal(mine, other)


def test_every_shift_is_as_likely_as_the_others() -> None:
    augmenter = Augmenter(Split.windows(stream(8001, "even"), 8), Augmentation.parse("shift"))
    shifts = [augmenter.draw(Key("even"), e).shift for e in range(8)]
    counts = torch.bincount(torch.cat([s for s in shifts if s is not None]), minlength=8)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 24.3  # chi², 7 degrees, p = 0.001


def test_without_augmentation_windows_are_as_they_are() -> None:
    augmenter = Augmenter(TEXT.train, Augmentation())
    x, y = augmenter.examples(torch.tensor([2, 5]), augmenter.draw(Key(0), 0))
    assert torch.equal(x, TEXT.train.x[[2, 5]]) and torch.equal(y, TEXT.train.y[[2, 5]])


@pytest.mark.parametrize("differ", ["order", "augment"])
def test_order_and_shift_are_two_sources(differ: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(Augmenter):
        def examples(self, rows: Tensor, draws: Any) -> tuple[Tensor, Tensor]:
            assert draws.shift is not None
            seen.append((rows.clone(), draws.shift[rows]))
            return super().examples(rows, draws)

    monkeypatch.setattr(loop, "Augmenter", Spy)
    orders, shifts = [], []
    for label in (1, 2):
        seen.clear()
        run = Run(recipe(), **{differ: label})  # type: ignore[arg-type]  # fields by name
        advance(run, start(run), PER_EPOCH, TEXT)
        rows, by = (torch.cat(each) for each in zip(*seen, strict=True))
        orders.append(rows.tolist())
        shifts.append(dict(zip(rows.tolist(), by.tolist(), strict=True)))
    both = shifts[0].keys() & shifts[1].keys()
    unchanged = all(shifts[0][row] == shifts[1][row] for row in both)
    assert (orders[0] == orders[1], unchanged) == (differ != "order", differ != "augment")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flip+shift", "flip.shift.* is not known.*for text none or shift"),
        ("shift2", "not known"),
    ],
)
def test_augmentations_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        Augmentation.parse(text)


def test_augmentations_that_do_not_fit() -> None:
    assert str(Augmentation.parse("shift")) == "shift"
    with pytest.raises(BadParameter, match="shift is for text"):
        Augmentation(flip=True, shift=True)
    with pytest.raises(BadParameter, match="a text takes shift"):
        Augmenter(TEXT.train, Augmentation.parse("flip"))
    with pytest.raises(BadParameter, match="images take flip and crop"):
        Augmenter(data.load("digits").train, Augmentation.parse("shift"))
    with pytest.raises(BadParameter, match="copies of windows"):
        Augmenter(TEXT.train.head(3), Augmentation.parse("shift"))


# ---- the loop


@pytest.mark.parametrize("where", ["all", "matrices"])
def test_the_loop_is_a_plain_loop_bit_by_bit(where: str) -> None:
    one = Run(recipe(weight_decay=0.3, weight_decay_on=where, schedule="onecycle", warmup=3))
    found = advance(one, start(one), 7, TEXT)

    net = build(one, TEXT, CPU).train()
    text = TEXT.train.stream
    assert text is not None
    bare = {"transformer.wte.weight", "transformer.wpe.weight"}
    groups: dict[float, list[nn.Parameter]] = {0.3: [], 0.0: []}
    for name, p in net.named_parameters():
        groups[0.3 if where == "all" or (p.ndim > 1 and name not in bare) else 0.0].append(p)
    rate = one.recipe.learning_rate
    optimizer = torch.optim.AdamW(
        [{"params": p, "weight_decay": d} for d, p in groups.items() if p],
        lr=1.0,
        fused=True,
    )
    for step in range(7):
        epoch, at = divmod(step, PER_EPOCH)
        rows = one.order_key().fold("epoch", epoch).permutation(len(TEXT.train))
        rows = rows[at * BATCH : (at + 1) * BATCH]
        moved = one.augment_key().fold("shift", epoch).integers(len(TEXT.train), L)[rows]
        places = (rows * L + moved)[:, None] + torch.arange(L)
        x, y = text[places % len(text)], text[(places + 1) % len(text)]
        logits = net(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        by_hand = -logits.detach().log_softmax(2).gather(2, y[:, :, None]).mean()
        assert loss.item() == pytest.approx(float(by_hand), abs=1e-6), "every position counts once"
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        assert float(found.trace[step]) == loss.item()
    assert same(found.theta, snapshot(net))


def test_it_learns() -> None:
    one = Run(recipe(steps=150, lr=0.03))
    trace = advance(one, start(one), 150, TEXT).trace
    assert float(trace[0]) == pytest.approx(4.16, abs=0.1), "ln 64: nats a token, not a window"
    assert float(trace[-10:].mean()) < 1.6, "ln 3 = 1.1 is what there is to learn"


@pytest.mark.parametrize("options", ["", ",dropout=0.3"])
def test_a_fork_and_a_resumption_give_the_same_bits(options: str, store: Store) -> None:
    one = Run(recipe(net=NET + options))
    whole = advance(one, start(one), 10, TEXT)
    half = advance(one, start(one), PER_EPOCH + 1, TEXT)
    torch.manual_seed(77)  # nobody else's random numbers matter
    before = torch.get_rng_state()
    assert same_state(advance(one, half, 10, TEXT), whole)
    assert torch.equal(torch.get_rng_state(), before)
    back = State.from_tensors(half.tensors())
    assert same_state(advance(one, back, 10, TEXT), whole)


# ---- dropout is noise with a key


def test_dropout_has_the_augmentations_key() -> None:
    def ended(net: str, **labels: Any) -> dict[str, Tensor]:
        one = Run(recipe(net=net, augment="none", steps=4), **labels)
        return advance(one, start(one), 4, TEXT).theta

    wet, dry = NET + ",dropout=0.3", NET
    assert same(ended(wet), ended(wet))
    assert not same(ended(wet), ended(wet, augment=1))
    assert not same(ended(wet), ended(dry))
    assert same(ended(dry), ended(dry, augment=1))


def test_steps_drop_different_units() -> None:
    """With equal windows and a rate of 0, nothing but dropout can differ between steps."""
    round_and_round = Split.windows(torch.arange(10 * L + 1) % L, L)
    equal = dataclasses.replace(TEXT, train=round_and_round)
    losses = {}
    for net in (NET, NET + ",dropout=0.3"):
        one = Run(recipe(net=net, augment="none", lr=0.0))
        losses[net] = advance(one, start(one), 4, equal).trace.tolist()
    assert len(set(losses[NET])) == 1 and len(set(losses[NET + ",dropout=0.3"])) == 4
    one = Run(recipe(net=NET + ",dropout=0.3"))
    assert one.dropout_key() == Run(one.recipe, order=1).dropout_key()


def test_identity_names_the_noise_there_is() -> None:
    def label(net: str, augment: str) -> object:
        return Run(recipe(net=net, augment=augment), augment=5).identity("f", "cpu").get("augment")

    assert label(NET, "none") is None
    assert label(NET, "shift") == 5
    assert label(NET + ",dropout=0.1", "none") == 5
    assert label("mlp", "none") is None


def test_dropout_of_ones_own_network_follows_a_label_of_its_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Run(recipe(net="some.module:dropping", augment="none"))
    assert one.dropout_key() == one.order_key().fold("dropout")
    shifted = Run(recipe(net="some.module:dropping", augment="shift"))
    assert shifted.dropout_key() == shifted.augment_key().fold("dropout")
    monkeypatch.setattr(models, "build", lambda *_, **__: dropping((L,), K))
    begun = start(one)
    assert same_state(advance(one, begun, 4, TEXT), advance(one, begun, 4, TEXT))


def test_noise_of_a_network_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda *_: TEXT)
    assert check_design(recipe(net=NET + ",dropout=0.1", augment="none"), [1], noise="augment") == (
        1,
    )
    with pytest.raises(BadParameter, match=r"augment.*shift.*dropout"):
        check_design(recipe(augment="none"), [1], noise="augment")
    for net, augment in ((NET, "shift"), (NET + ",dropout=0.1", "none")):
        runs = [Run(recipe(net=net, augment=augment, steps=6), augment=i) for i in (1, 2)]
        gate = check_noise(runs)
        assert gate.passed and gate.detail == "0 collisions among 2 data orders and 4 draws"
        with monkeypatch.context() as patch:
            patch.setattr(Run, "augment_key", lambda run: Key("one for all"))
            assert check_noise(runs).passed is False


def test_one_test_of_dropout() -> None:
    for options in ("", ",dropout=0.3"):
        net = models.build(NET + options, (L,), K)
        drops = models.first_dropout(net) is not None
        assert drops == models.has_dropout(NET + options) == bool(options)
        assert drops == loop.draws_noise(Run(recipe()), net)
    assert models.first_dropout(nn.Dropout(0.5)) == "", "a network that is one layer"
    assert "dropout" in str(unfit(nn.Dropout(0.5)))


# ---- recipes


def test_one_text_is_one_identity() -> None:
    first = recipe(data="pydoc?window=64")
    assert first == recipe(data="pydoc") and first.identity()["data"] == "pydoc"
    assert recipe(data="pydoc?window=32&vocab=512").data == "pydoc?window=32"
    for images in ("digits", "digits@split-a", "images:a folder?size=32"):
        assert Recipe(net="resnet8", data=images, steps=1).identity()["data"] == images
    with pytest.raises(BadParameter, match="window"):
        recipe(data="pydoc?window=0")


def test_a_field_with_a_default_keeps_old_hashes() -> None:
    plain = recipe(weight_decay=0.1)
    assert "weight_decay_on" not in plain.identity()
    assert recipe(weight_decay=0.1, weight_decay_on="matrices").identity() == {
        **plain.identity(),
        "weight_decay_on": "matrices",
    }
    assert recipe(weight_decay_on="matrices") == recipe(), "no decay is no decay"
    with pytest.raises(BadParameter, match=r"weight_decay_on.*'matrixes'.*matrices"):
        recipe(weight_decay_on="matrixes")


@pytest.mark.parametrize("options", ["", ",tied=false", ",bias=false"])
def test_what_decays(options: str) -> None:
    one = recipe(net=NET + options, weight_decay=0.1, weight_decay_on="matrices")
    found = loop.decayed(one, models.build(one.net, (L,), K))
    linear = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    wanted = {f"transformer.h.0.{name}.weight" for name in linear}
    assert found == wanted | ({"lm_head.weight"} if "tied" in options else set())
    bare = nn.Module()
    bare.table, bare.head = nn.Parameter(torch.zeros(K, 2)), nn.Linear(2, K)
    assert loop.decayed(one, bare) == {"table", "head.weight"}, "a bare table is a matrix"
    vision = Recipe(
        net="resnet8", data="digits", steps=1, weight_decay=1, weight_decay_on="matrices"
    )
    net = models.build("resnet8", (1, 8, 8), 10)
    of = loop.decayed(vision, net)
    assert {p.ndim for n, p in net.named_parameters() if n in of} == {2, 4}
    assert {p.ndim for n, p in net.named_parameters() if n not in of} == {1}


def test_the_papers_learning_rate() -> None:
    """From 2e-5 to 2e-3 in 2 % of 15,000 steps, then to 4e-4: PyTorch's own values."""
    paper = recipe(
        steps=15_000, lr=2e-3, schedule="onecycle", warmup=300, div=100.0, final_div=0.05
    )
    at = paper.learning_rate
    assert [at(0), at(299), at(14_999)] == pytest.approx([2e-5, 2e-3, 4e-4], rel=1e-12)
    weight = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer := torch.optim.AdamW([weight]),
        max_lr=2e-3,
        total_steps=15_000,
        pct_start=0.02,
        div_factor=1e2,
        final_div_factor=0.05,
        cycle_momentum=False,
    )
    for step in range(15_000):
        if step % 500 in (0, 299):
            assert at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 21}, r"batch: 21 is more than the 20 training windows of 8 tokens of circle"),
        ({"augment": "flip"}, r"augment: 'flip' on circle: .*a text takes shift"),
        ({"augment": "crop4"}, r"augment: 'crop4' on circle"),
        ({"net": "mlp"}, r"takes images, but the data's examples are windows of 8 tokens"),
        ({"net": "torch.nn:Identity"}, r"makes \(2, 8\) of 2 windows of 8 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        check_fit(recipe(**changes), TEXT)


@pytest.mark.parametrize("rows", [16, K - 1])
def test_every_token_must_have_a_place(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the first windows do not hold would be an assertion on a GPU, hours later."""
    before = TEXT.train.x.clone()
    few = nn.Sequential(nn.Embedding(rows, 8), nn.Linear(8, K))
    monkeypatch.setattr(models, "build", lambda *_, **__: few)
    with pytest.raises(BadParameter, match=r"does not take the tokens 0 and 63 .*out of range"):
        check_fit(recipe(net="some.module:few"), TEXT)
    assert torch.equal(TEXT.train.x, before)


@pytest.mark.parametrize("kind", [IndexError, TypeError, ValueError])
def test_whatever_a_network_of_ones_own_says(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise kind("what it says")

    monkeypatch.setattr(models, "build", lambda *_, **__: Broken())
    with pytest.raises(BadParameter, match=r"does not take tokens .*what it says"):
        check_fit(recipe(net="some.module:broken"), TEXT)


def test_what_fits_is_not() -> None:
    check_fit(recipe(), TEXT)
    with pytest.raises(BadParameter, match=r"shift.*images take flip and crop"):
        check_fit(Recipe(net="mlp", data="digits", steps=1, augment="shift"), data.load("digits"))
    with pytest.raises(BadParameter, match="reads text"):
        check_fit(Recipe(net="gpt", data="digits", steps=1), data.load("digits"))


# ---- engines


@pytest.mark.parametrize("engine", ["loop-compile", "graphs", "compile"])
def test_engines_train_the_same_text(engine: str) -> None:
    one = recipe(weight_decay=0.1, weight_decay_on="matrices", steps=5)
    runs = [Run(one), Run(one, order=1, augment=1)]
    states = [start(run) for run in runs]
    plain = [advance(r, s, 5, TEXT) for r, s in zip(runs, states, strict=True)]
    many = advance_many(runs, states, 5, TEXT, engine=engine, backend="eager")
    for mine, other in zip(many, plain, strict=True):
        torch.testing.assert_close(mine.trace, other.trace, rtol=0, atol=1e-5)
        assert mine.optimizer.keys() == other.optimizer.keys()
        for name, value in other.theta.items():
            torch.testing.assert_close(mine.theta[name], value, rtol=1e-3, atol=2e-4)
        for name, value in other.optimizer.items():
            assert mine.optimizer[name].shape == value.shape, "slots stand in the module's order"
        if engine == "loop-compile":
            assert same_state(mine, other)


@pytest.mark.slow
def test_every_architecture_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives up on code that it has compiled for eight networks; ours share a forward."""
    made = []

    def backend(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr("companion.training.loop._COMPILED", {})
    for number in range(1, 11):
        one = Run(recipe(net=f"gpt:layers=1,width={2 * number},heads=1", steps=1))
        for _ in range(2):
            advance(one, start(one), 1, TEXT, compiler=backend)  # type: ignore[arg-type]  # a stand-in for a compiler
        assert len(made) == number, "once for both runs"


def test_a_state_with_two_values_of_a_tied_tensor_is_refused() -> None:
    one = Run(recipe())
    begun = start(one)
    begun.theta["lm_head.weight"] = begun.theta["lm_head.weight"] + 1
    with pytest.raises(BadParameter, match=r"lm_head.weight and transformer.wte.weight differ"):
        advance(one, begun, 1, TEXT)


def test_whatever_reads_text_is_made_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only networks whose name says so: one's own may attend as well."""
    asked = []
    real = reproducible

    def spy(*args: Any, strict: bool = False) -> Any:
        asked.append(strict)
        return real(*args, strict=strict)

    monkeypatch.setattr("companion.training.replicas.reproducible", spy)
    bare = nn.Sequential(OneHot(), nn.Linear(K, K))
    one = Run(recipe(net="some.module:bare", augment="none"))
    monkeypatch.setattr(models, "build", lambda *_, **__: bare)
    advance_many([one], [State(0, snapshot(bare))], 1, TEXT)
    assert asked == [True]
    gpu = torch.device("cuda")
    assert choose(bare, gpu, data=TEXT) == "loop" and choose(bare, gpu) == "vmap"
    with pytest.raises(BadParameter, match="'vmap' does not train networks that read tokens"):
        choose(bare, gpu, "vmap", TEXT)


def test_which_engine() -> None:
    net, gpu = models.build(NET, (L,), K), torch.device("cuda")
    assert choose(net, gpu) == "loop" == choose(net, CPU)
    assert choose(net, gpu, "graphs") == "graphs"
    with pytest.raises(BadParameter, match=r"'vmap' does not train networks that read tokens"):
        choose(net, gpu, "vmap")
    wet = models.build(NET + ",dropout=0.1", (L,), K)
    assert choose(wet, gpu, "loop-compile") == "loop-compile"
    with pytest.raises(BadParameter, match=r"dropout.*Use 'loop'"):
        choose(wet, gpu, "graphs")


def test_attention_is_made_deterministic_on_a_gpu() -> None:
    """Its kernels take the deterministic way only where a warning would not do."""
    gpu = torch.device("cuda")
    for strict in (False, True):
        with reproducible(gpu, strict=strict):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() is not strict
    assert not torch.are_deterministic_algorithms_enabled()


def test_bf16_keeps_float32_weights() -> None:
    full, half = Run(recipe(steps=5)), Run(recipe(steps=5, precision="bf16"))
    a, b = advance(full, start(full), 5, TEXT), advance(half, start(half), 5, TEXT)
    assert {v.dtype for v in b.theta.values()} == {torch.float32}
    assert not torch.equal(a.trace, b.trace)
    torch.testing.assert_close(a.trace, b.trace, rtol=0, atol=0.05)


def test_speed_counts_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by 1 s a step, and by 100 s for whatever else there is to do."""
    clock = [0.0]

    def costs(seconds: float, module: Any, name: str) -> None:
        real = getattr(module, name)

        def slow(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return real(*args, **options)

        monkeypatch.setattr(module, name, slow)

    costs(1.0, loop, "mean_loss")
    for name in ("make_optimizer", "snapshot", "check_ties"):
        costs(100.0, loop, name)
    monkeypatch.setattr("companion.training.speed.time.perf_counter", lambda: clock[0])
    whole = recipe(batch=20, steps=1000)
    for steps, rounds in ((1, 1), (2, 3), (10, 2)):
        assert throughput(whole, steps=steps, rounds=rounds, data=TEXT).seconds == 1.0
    short = throughput(recipe(steps=2), steps=4, rounds=1, data=TEXT)
    assert (short.seconds, short.steps) == (1.0, 4), "a recipe shorter than what is measured"


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rounds": 0}, {"steps": 1.5}, {"rounds": True}])
def test_speed_of_no_steps(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match="must be a whole number of 1 or more"):
        throughput(recipe(), data=TEXT, **wrong)


def test_speed_is_measured() -> None:
    found = throughput(recipe(), steps=2, rounds=1, data=TEXT)
    assert (found.examples, found.tokens, found.steps) == (BATCH, BATCH * L, 2)
    assert found.seconds > 0 and found.tokens_per_second == found.tokens / found.seconds
    assert (found.device, found.engine, found.precision) == ("cpu", "loop", "float32")
    images = throughput(Recipe(net="mlp:widths=4", data="digits", steps=2), steps=2, rounds=1)
    assert images.tokens == 0 and images.examples == 128
    with pytest.raises(BadParameter, match="'graphs' trains many runs at once"):
        throughput(recipe(), engine="graphs", data=TEXT)


# ---- the store


@pytest.fixture
def written(tmp_path: Path) -> Iterator[str]:
    """A text of one's own, by name."""
    letters = "".join(chr(97 + int(t)) for t in stream(3000, "written"))
    lines = [letters[i : i + 100] for i in range(0, 3000, 100)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    yield f"text:{tmp_path / 'text.txt'}?tokenizer=bytes&window={L}"


def test_a_stored_fork_with_its_parents_noise_is_its_parent(written: str, store: Store) -> None:
    one = recipe(data=written, net=NET + ",dropout=0.1", steps=12)
    trunk = Run(one, order="trunk", augment="trunk")
    text = data.load(written)
    straight = advance(trunk, start(trunk, text), 12, text)
    for kept, equal in (("restore", True), ("reset", False)):
        twin = Run(one, order="trunk", augment="trunk", fork=Fork(trunk, 4, kept))  # type: ignore[arg-type]  # a plain str
        assert same(load_weights(twin, store=store), straight.theta) is equal
    begun = load_state(trunk, 4, store=store)
    assert same(advance(trunk, begun, 12, text).theta, straight.theta)


@pytest.mark.slow  # two fresh processes that import transformers
def test_bits_do_not_depend_on_workers(written: str, tmp_path: Path) -> None:
    one = recipe(data=written, net=NET + ",dropout=0.1", steps=12)
    trunk = Run(one, order="trunk", augment="trunk")
    copies = [Run(one, order=i, augment=i, fork=Fork(trunk, 4)) for i in (1, 2)]
    stores = [Store(tmp_path / f"runs-{workers}") for workers in (1, 2)]
    for workers, store in enumerate(stores, start=1):
        train([Job(c, weights=(12,)) for c in copies], store=store, workers=workers)
    for copy in copies:
        mine, other = (load_weights(copy, store=s) for s in stores)
        assert same(mine, other)


def test_instability_end_to_end(written: str, store: Store) -> None:
    from companion.experiments.pairs import Evaluation

    one = recipe(data=written, steps=40, lr=0.03, net=NET + ",dropout=0.1")
    found = analyse(
        *(one, [0, 30]),
        inits=1,
        copies=2,
        evaluation=Evaluation(3, train_examples=20, test_examples=10),
        store=store,
        workers=1,
    )
    assert not found.invalid(), [str(s.result.barrier) for s in found.invalid()]
    for sample in found.samples:
        assert sample.result.barrier.gate("G1").passed and sample.result.barrier.gate("G3").passed
    early, late = (found.interval(k, metric="loss") for k in (0, 30))
    assert early and late and early.value > late.value
    assert found.verdict(0, metric="loss") == "undetermined", "one init has no interval"
    assert found.onset(threshold=early.value, metric="loss").value == 30
    assert found.onset(threshold=1e9, metric="loss").value == 0
    with pytest.raises(BadParameter, match="metric"):
        found.onset(metric="accuracy")


# ---- the paper's size


@pytest.mark.slow
def test_a_step_of_the_papers_network() -> None:
    """12 layers of width 768, vocabulary 50,304, windows of 256, no biases, dropout 0.2.

    In bf16 where the processor has it: elsewhere that takes minutes.
    """
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    text = Split.windows(Key("large").integers(2 * 256 + 1, 50_257), 256)
    large = Dataset("large", "large", text, text, 50_304, (256,), (), (), "large")
    one = Run(
        recipe(
            net="gpt:layers=12,width=768,heads=12,bias=false,dropout=0.2",
            steps=15_000,
            batch=1,
            lr=2e-3,
            betas=(0.9, 0.95),
            weight_decay=1e-3,
            weight_decay_on="matrices",
            schedule="onecycle",
            warmup=300,
            div=100.0,
            final_div=0.05,
            precision="bf16" if half else "float32",
        )
    )
    net = build(one, large, CPU)
    assert parameter_count(net) == 123_783_936
    begun = State(0, snapshot(net))
    found = advance(one, begun, 1, large, module=net)
    assert float(found.trace[0]) == pytest.approx(10.83, abs=0.3), "ln 50,304"
    moved = [k for k, v in found.theta.items() if not torch.equal(v, begun.theta[k])]
    assert set(moved) == set(found.theta)
