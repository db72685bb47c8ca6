"""Tiny ImageNet and DomainNet in their published layouts, and clients of one domain each."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from commands import run
from PIL import Image
from torchvision import transforms

from companion import data, models
from companion.connectivity import barrier
from companion.core.errors import BadParameter, CorruptData, MissingData
from companion.core.seeds import Key
from companion.experiments.federated import Federation, client_data, measure_federations
from companion.training import Recipe

CLASSES = ("bird", "whale")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))
    return tmp_path


def paint(path: Path, value: int, side: int = 64, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    Image.new(mode, (side, side), value if mode == "L" else (value, 40, 90)).save(out, "JPEG")
    path.write_bytes(out.getvalue())


def tiny(root: Path) -> Path:
    folder = root / "tiny-imagenet-200"
    for i, name in enumerate(("n02", "n01")):
        for n in range(3):
            paint(folder / "train" / name / "images" / f"{name}_{n}.JPEG", 60 * i + n)
    paint(folder / "train" / "n01" / "images" / "n01_3.JPEG", 200, mode="L")  # some are grey
    paint(folder / "val" / "images" / "val_0.JPEG", 5)
    paint(folder / "val" / "images" / "val_1.JPEG", 250)
    lines = "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
    (folder / "val" / "val_annotations.txt").write_text(lines)
    return folder


def test_tiny_imagenet_has_its_validation_set_for_a_test(root: Path) -> None:
    with pytest.raises(MissingData, match=r"tiny-imagenet-200.*val_annotations"):
        data.load("tiny-imagenet")
    folder = tiny(root)
    found = data.load("tiny-imagenet")
    assert found.in_shape == (3, 64, 64) and found.class_names == ("n01", "n02")
    assert found.train.y.tolist() == [0, 0, 0, 0, 1, 1, 1] and found.test.y.tolist() == [1, 0]
    assert found.mean == (0.485, 0.456, 0.406)
    red = found.test.x[:, 0].mean((1, 2)) * found.std[0] + found.mean[0]
    assert red[0] < 0.1 and red[1] > 0.9
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    (folder / "val" / "val_annotations.txt").touch()
    with pytest.raises(CorruptData, match=r"val/images/val_1.JPEG is listed, and is not there"):
        data.check_dataset("tiny-imagenet")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(CorruptData, match="with a class of train"):
        data.check_dataset("tiny-imagenet")


def domains(root: Path, each: int = 24) -> Path:
    """Three domains of two classes; a picture's brightness tells the class, its blue the domain."""
    folder = root / "domainnet"
    for d, domain in enumerate(("clipart", "real", "sketch")):
        for split, count in (("train", each), ("test", 6)):
            lines = []
            for n in range(count):
                name = f"{domain}/{CLASSES[n % 2]}/{split}_{n}.jpg"
                paint(folder / name, 30 + 180 * (n % 2) + 5 * d, side=20 + d)
                lines.append(f"{name} {n % 2}")
            (folder / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


ASKED = "domainnet?size=16&domains=real-clipart-sketch"


def test_domainnet_knows_the_domain_of_each_picture(root: Path) -> None:
    domains(root)
    found = data.load(ASKED)
    assert found.in_shape == (3, 16, 16) and found.class_names == CLASSES
    assert found.domain_names == ("clipart", "real", "sketch")
    assert found.domains is not None
    assert found.domains[0].bincount().tolist() == [24, 24, 24]
    assert found.domains[1].bincount().tolist() == [6, 6, 6]
    part = data.load(f"{ASKED}@split-a")  # a part keeps the domains of its images
    assert part.domains is not None and len(part.domains[0]) == len(part.train)
    with pytest.raises(MissingData, match=r"infograph_train\.txt"):
        data.load("domainnet?size=16")
    for wrong in ("domainnet?size=0", "domainnet?classes=1", "domainnet?colour=1"):
        with pytest.raises(BadParameter, match=r"size|classes|colour"):
            data.load(wrong)
    with pytest.raises(BadParameter, match="photo"):
        data.load("domainnet?domains=photo")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("../../etc/passwd 0", "domain/class/picture"),
        ("clipart/bird/x.jpg bird", "domain/class/picture"),
        ("clipart/whale/train_1.jpg 0", "two names"),
        ("clipart/bird/gone.jpg 0", "is not there"),
        ("clipart/owl/train_0.jpg 5", "gaps"),
    ],
)
def test_a_list_that_is_wrong_is_refused_with_its_line(root: Path, line: str, words: str) -> None:
    folder = domains(root)
    with (folder / "clipart_train.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CorruptData, match=words):
        data.load(ASKED)


@pytest.mark.slow  # it trains
def test_with_feature_shift_every_client_has_one_domain_and_all_classes(root: Path) -> None:
    domains(root)
    images = data.load(ASKED)
    assert images.domains is not None
    recipe = Recipe(net="mlp:widths=8", data=ASKED, steps=4, batch=4, lr=0.05)
    rule = Federation(recipe=recipe, clients=4, split="domains", every=2)
    clients = client_data(rule, images, 0)
    assert [len(c.train) for c in clients] == [12, 24, 24, 12]  # the first domain has two clients
    for number, client in enumerate(clients):
        rows = [(images.train.x == x).flatten(1).all(1).nonzero()[0, 0] for x in client.train.x]
        of = images.domains[0][torch.stack(rows)]
        assert np.array_equal(of.unique(), [number % 3])
    assert all(client.train.y.unique().tolist() == [0, 1] for client in clients[1:3])
    (found,) = measure_federations([(rule, 0)])
    assert len(found.history[-1]) == 4 and found.test_sizes == (3, 6, 6, 3)
    with pytest.raises(BadParameter, match="2 clients for 3 domains"):
        client_data(Federation(recipe=recipe, clients=2, split="domains", every=2), images, 0)
    digits = Recipe(net="mlp:widths=8", data="digits", steps=4, batch=4)
    with pytest.raises(BadParameter, match="digits has no domains"):
        client_data(Federation(recipe=digits, split="domains", every=2), data.load("digits"), 0)


# ---- ImageNet, which stays on the disk

SMALL = "imagenet?size=32&short=40"


def imagenet(root: Path, val: int = 7) -> Path:
    folder = root / "imagenet"
    for split, count in (("train", 5), ("val", val)):
        for i, name in enumerate(("n01", "n02", "n03")):
            for n in range(count):
                paint(folder / split / name / f"{n}.JPEG", 20 + 90 * i + 3 * n, side=50 + n)
    paint(folder / "val" / "n02" / "grey.JPEG", 77, side=48, mode="L")
    return folder


def decoded(path: Path) -> torch.Tensor:
    """By torchvision's own transforms."""
    steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()]
    steps += [transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    found: torch.Tensor = transforms.Compose(steps)(Image.open(path).convert("RGB"))
    return found


def test_imagenet_is_read_as_torchvision_reads_it_and_only_when_asked(root: Path) -> None:
    folder = imagenet(root)
    found = data.load(SMALL)
    x, y = found.test.x, found.test.y
    assert found.in_shape == (3, 32, 32) and found.class_names == ("n01", "n02", "n03")
    assert tuple(x.shape) == (22, 3, 32, 32) and y.bincount().tolist() == [7, 8, 7]
    paths = sorted((folder / "val").rglob("*.JPEG"))
    expected = torch.stack([decoded(path) for path in paths])
    assert torch.equal(x[:5], expected[:5]) and torch.equal(x[3], expected[3])
    some = torch.tensor([9, 2, 21])
    assert torch.equal(x[some], expected[some])
    for size in (1, 3, 22):
        assert torch.equal(torch.cat(list(x.split(size))), expected)
        assert torch.equal(torch.cat(list(x.tensor_split(size))), expected)
    head = found.test.head(6)  # a head is in memory
    assert isinstance(head.x, torch.Tensor) and len(head) == 6
    (folder / "val" / "n01" / "0.JPEG").write_bytes(b"no picture")
    with pytest.raises(CorruptData, match=r"0.JPEG: cannot be read as an image"):
        list(x.split(5))
    part = data.load(f"{SMALL}@split-a")
    assert not isinstance(part.train.x, torch.Tensor) and len(part.train) == len(part.train.y)


def test_a_line_over_pictures_on_the_disk_is_that_over_the_same_in_memory(root: Path) -> None:
    imagenet(root)
    found = data.load(SMALL)
    whole = {n: data.Split(s.x[:], s.y) for n, s in (("train", found.train), ("test", found.test))}
    net = "resnet8:width=4"
    a, b = (models.build(net, (3, 32, 32), 3, Key(k)).state_dict() for k in "ab")
    module = models.build(net, (3, 32, 32), 3)
    how: dict[str, Any] = {"points": 3, "bn": "reestimate"}
    streamed, kept = (barrier(module, a, b, d, **how) for d in (found, whole))
    assert streamed.curves == kept.curves


@pytest.mark.slow  # networks of 25 million weights
@pytest.mark.parametrize(
    ("net", "data"),
    [
        ("torchvision:resnet50", SMALL),
        (
            "torchvision:inception_v3?aux_logits=false",
            "imagenet?size=75&short=80",
        ),
    ],
)
def test_the_papers_networks_are_evaluated_from_the_disk(root: Path, net: str, data: str) -> None:
    imagenet(root, val=2)
    for name in "ab":
        torch.save(models.build(net, (3, 75, 75), 3, Key(name)).state_dict(), root / f"{name}.pth")
    ends = [root / "a.pth", root / "b.pth"]
    asked = ["--model", net, "--data", data, "--points", 3, "--json", root / "out.json"]
    run("barrier", *ends, *asked, code=3)  # INVALID: nobody trained them
    assert json.loads((root / "out.json").read_text())


@pytest.mark.slow  # a proof of ResNet-18
def test_networks_are_matched_and_merged_from_the_disk(root: Path) -> None:
    imagenet(root, val=2)
    for name in "ab":
        module = torchvision.models.resnet18(num_classes=3)
        torch.save(module.state_dict(), root / f"{name}.pth")
    ends = [root / "a.pth", root / "b.pth"]
    asked = ["--model", "torchvision:resnet18", "--data", SMALL, "--points", 3]
    made = ["-o", root / "moved.safetensors", "--merge", root / "merged.safetensors"]
    run("rebasin", *ends, *asked, *made, "--method", "activations", code=3)
    assert (root / "moved.safetensors").is_file() and (root / "merged.safetensors").is_file()


def test_imagenet_in_another_size_or_with_gaps_is_refused(root: Path) -> None:
    for wrong in ("imagenet?size=0", "imagenet?colour=1", "imagenet?size=300"):
        with pytest.raises(BadParameter, match=r"size|colour|centre"):
            data.load(wrong)
    with pytest.raises(MissingData, match="train, val missing"):
        data.load("imagenet")
    folder = imagenet(root)
    (folder / "val" / "n99").mkdir()
    with pytest.raises(CorruptData, match="train has no such class"):
        data.load(SMALL)
