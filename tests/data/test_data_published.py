"""Tiny ImageNet and DomainNet in their published layouts, and clients of one domain each."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import data
from companion.core.errors import BadParameter, CorruptData, MissingData
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
