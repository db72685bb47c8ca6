"""Stitching: against networks put together by hand, and ends that have to be exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toypairs
from hypothesis import given, settings
from hypothesis import strategies as st
from reread import reread
from torch import Tensor, nn
from toypairs import DIGITS, Examples, Theta, pair_of

from companion.connectivity import Walker
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.features.stitching import INPUT, Stitching, stitch

TEST = DIGITS.test.head(70)


class Own(nn.Module):
    """In-place and functional ReLUs, a module called twice, an output that is no module's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x.flatten(1)))
        for _ in range(2):
            x = F.relu(self.twice(x), inplace=True) + x
        return 2 * self.head(x)


NETS: dict[str, Any] = {**toypairs.NETS, "own": Own}


def split_of(name: str) -> Any:
    return toypairs.split_of(name, 70)


def pair(name: str) -> tuple[nn.Module, Theta, Theta]:
    return pair_of(NETS[name], "stitching")


def loaded(name: str, theta: Theta) -> Any:
    module = NETS[name]()
    module.load_state_dict(theta)
    return module.eval()


def measured(output: Tensor, y: Tensor = TEST.y) -> tuple[float, float]:
    return float(F.cross_entropy(output, y)), 100 * float((output.argmax(1) != y).double().mean())


@pytest.mark.parametrize("name", NETS)
def test_the_ends_are_the_networks_exactly(name: str) -> None:
    module, a, b = pair(name)
    split = split_of(name)
    before = [v.clone() for v in (*a.values(), *b.values())]
    found = stitch(module, a, b, split, default="both", batch=16)
    assert all(torch.equal(v, w) for v, w in zip(before, (*a.values(), *b.values()), strict=True))
    assert found.closed and found.n == split.y.numel()
    assert found.bn == ("own" if name in ("batch norm", "vgg") else "none")
    assert found.outputs == (("output",) if name == "own" else ("head",))
    for default, other in (("b", "a"), ("a", "b")):
        rows = found.select(default)
        assert rows[0].name == INPUT and rows[0].error == found.ends[default].error
        assert rows[-1].name in found.outputs
        # Bit for bit, in loss as in error, and in counts.
        assert (rows[-1].loss, rows[-1].error) == (found.ends[other].loss, found.ends[other].error)
        assert rows[-1].wrong == round(found.ends[other].error * found.n / 100)
    if name != "tokens":
        walker = Walker(module, {"test": TEST})
        for end, theta in (("a", a), ("b", b)):
            plain = walker.at(theta)["test"]
            assert found.ends[end].loss == pytest.approx(plain.loss, rel=1e-5)
            assert found.ends[end].error == plain.error
    again = reread(found)
    assert again == found
    swapped = stitch(module, b, a, split, default="a", batch=16)
    assert [(r.name, r.loss, r.wrong) for r in swapped.rows] == [
        (r.name, r.loss, r.wrong) for r in found.select("b")
    ]


def test_a_chain_is_the_beginning_of_one_and_the_end_of_the_other() -> None:
    module, a, b = pair("vgg")
    found = stitch(module, a, b, TEST)
    one, two = (list(_leaves(loaded("vgg", t))) for t in (a, b))
    names = [n for n, _ in one]
    checked = 0
    assert all(r.cut for r in found.rows)
    for row in found.rows[1:]:
        cut = names.index(row.name) + 1
        with torch.no_grad():
            x = TEST.x
            for _, layer in (*one[:cut], *two[cut:]):
                x = layer(x)
        assert (row.loss, row.error) == pytest.approx(measured(x), rel=1e-5)
        checked += 1
    assert checked > 20


def _leaves(module: nn.Module) -> Any:
    return ((n, m) for n, m in module.named_modules() if not list(m.children()))


@pytest.mark.parametrize("name", ["batch norm", "group norm"])
def test_in_a_residual_block_the_shortcut_stays_the_default_networks(name: str) -> None:
    module, a, b = pair(name)
    found = stitch(module, a, b, TEST, default="both")
    inside_blocks = {r.name for r in found.rows if not r.cut}
    assert inside_blocks == {r.name for r in found.rows if r.name.startswith("stage")} - {
        r.name for r in found.rows if r.kind == "block" or r.name.endswith("relu2")
    }
    assert found.worst() >= found.worst(cuts=True) >= 0
    for default, (mine, other) in (("b", (b, a)), ("a", (a, b))):
        net, donor = loaded(name, mine), loaded(name, other)
        with torch.no_grad():
            x, z = net.stem(TEST.x), donor.stem(TEST.x)
            x, z = net.stage1(x), donor.stage1(z)
            block, theirs = net.stage2[0], donor.stage2[0]
            y = theirs.conv2(theirs.relu1(theirs.norm1(theirs.conv1(z))))
            mixed = F.relu(block.norm2(y) + block.shortcut(x))
            rest = nn.Sequential(net.stage3, net.pool, net.flatten, net.head)
            inside, whole = (measured(rest(v)) for v in (mixed, donor.stage2(z)))
        row = found.row("stage2.0.conv2", default)
        assert (row.loss, row.error) == pytest.approx(inside, rel=1e-5)
        row = found.row("stage2.0", default)
        assert (row.loss, row.error) == pytest.approx(whole, rel=1e-5)


def test_every_run_and_functional_relu_is_a_site_of_its_own() -> None:
    module, a, b = pair("own")
    found = stitch(module, a, b, TEST)
    names = [r.name for r in found.rows]
    assert {"stem", "act", "twice", "twice#2", "relu#1", "relu#2", "head", "output"} <= set(names)
    net, donor = loaded("own", b), loaded("own", a)

    def relu(n: Any, x: Tensor) -> Tensor:
        return F.relu(n.twice(x))

    with torch.no_grad():
        x, z = (F.relu(n.stem(TEST.x.flatten(1))) for n in (net, donor))
        inner = relu(donor, z)
        first = inner + x
        last = 2 * net.head(relu(net, first) + first)
        again = 2 * net.head(relu(donor, inner + z) + relu(net, x) + x)
    for name, output in (("relu#1", last), ("relu#2", again)):
        row = found.row(name)
        assert (row.loss, row.error) == pytest.approx(measured(output), rel=1e-5)


def test_a_network_fits_itself_everywhere_and_its_permuted_copy_only_at_the_ends() -> None:
    module, a, _ = pair("mlp")
    same = stitch(module, a, a, TEST)
    assert {(r.loss, r.wrong) for r in same.rows} == {(same.rows[0].loss, same.rows[0].wrong)}
    assert same.worst() == same.worst("loss") == 0 and same.closed
    order = Key("test", "order").permutation(12)
    moved = dict(a)
    for entry in ("layer1.linear.weight", "layer1.linear.bias"):
        moved[entry] = a[entry][order]
    moved["layer2.linear.weight"] = a["layer2.linear.weight"][:, order]
    found = stitch(module, a, moved, TEST)
    base = found.row(INPUT).loss
    for row in found.rows:
        disturbed = abs(row.loss - base) > 1e-4
        assert disturbed == row.name.startswith("layer1"), row.name


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.sampled_from(["mlp", "batch norm", "own"]))
def test_batches_change_nothing(batch: int, name: str) -> None:
    module, a, b = pair(name)
    one, two = (stitch(module, a, b, TEST, batch=n) for n in (batch, None))
    for x, y in zip(one.rows, two.rows, strict=True):
        assert (x.name, x.wrong) == (y.name, y.wrong)
        assert x.loss == pytest.approx(y.loss, rel=1e-4)
    assert one.closed


def test_asking_for_less_and_messages() -> None:
    module, a, b = pair("mlp")
    found = stitch(module, a, b, TEST, layers=["layer1.*"])
    assert [r.name for r in found.rows] == [INPUT, "layer1.linear", "layer1.relu"]
    assert found.outputs == () and not found.closed, "the output was not among the sites"
    assert found.defaults == ("b",)
    with pytest.raises(BadParameter, match="default: 'a' is not known"):
        found.row("layer1.relu", "a")
    with pytest.raises(BadParameter, match="was not stitched"):
        found.row("head")
    with pytest.raises(BadParameter, match="metric"):
        found.worst("accuracy")
    with pytest.raises(BadParameter, match="default: 'c'"):
        stitch(module, a, b, TEST, default="c")
    with pytest.raises(BadParameter, match="network A"):
        stitch(module, {**a, "head.bias": a["head.bias"] * math.nan}, b, TEST)
    with pytest.raises(BadParameter, match="no data"):
        stitch(module, a, b, Examples(TEST.x[:0], TEST.y[:0]))
    with pytest.raises(BadParameter, match=r"targets \(70, 1\) do not fit"):
        stitch(module, a, b, Examples(TEST.x, TEST.y[:, None]))


def test_double_precision_keeps_its_ends_too() -> None:
    module, a, b = pair("mlp")
    a, b = ({k: v.double() for k, v in t.items()} for t in (a, b))
    assert stitch(module.double(), a, b, Examples(TEST.x.double(), TEST.y)).closed


def test_a_broken_end_is_seen() -> None:
    """The check of the ends can fail."""
    module, a, b = pair("mlp")
    value = codec.to_json(stitch(module, a, b, TEST))
    value["rows"][-1]["loss"] += 1e-9
    assert not codec.from_json(Stitching, value).closed
