"""Parts of a train split: complementary, stratified, keyed, and everything else is the whole's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from companion import data
from companion.core.errors import BadParameter, MissingData
from companion.data.parts import Part, split_name
from companion.training import Recipe, Run

ROWS = {
    "split-a": [2, 6, 10, 11, 13, 15, 18, 19, 22, 23, 26, 27, 28, 30, 31, 32, 33, 34, 35, 39],
    "random-25-0": [0, 4, 7, 9, 12, 20, 30, 35, 36, 38],
}


def images_of(split) -> list[bytes]:
    return [x.numpy().tobytes() + bytes([int(y)]) for x, y in zip(split.x, split.y, strict=True)]


def test_halves_are_complementary_biased_and_stratified():
    whole, a, b = (data.load(n) for n in ("digits", "digits@split-a", "digits@split-b"))
    assert sorted(images_of(a.train) + images_of(b.train)) == sorted(images_of(whole.train))
    counts, of_a = np.bincount(whole.train.y), np.bincount(a.train.y)
    share = of_a / counts
    assert np.all(np.abs(share[:5] - 0.2) < 0.5 / counts[:5] + 1e-9)
    assert np.all(np.abs(share[5:] - 0.8) < 0.5 / counts[5:] + 1e-9)


@pytest.mark.parametrize("part", ["split-a", "split-b", "random-50-3"])
def test_only_the_train_split_is_restricted(part):
    whole, some = data.load("digits"), data.load(f"digits@{part}")
    assert torch.equal(some.test.x, whole.test.x) and torch.equal(some.test.y, whole.test.y)
    assert (some.mean, some.std, some.classes) == (whole.mean, whole.std, whole.classes)
    assert torch.equal(some.black, whole.black)
    assert set(images_of(some.train)) < set(images_of(whole.train))
    assert some.name == f"digits@{part}"
    assert data.load(f"digits@{part}") is some
    report = data.check_dataset(f"digits@{part}")
    assert report.fingerprint == some.fingerprint and report.label == some.label
    assert report.train_counts == tuple(np.bincount(some.train.y).tolist())
    assert report.test_shape == tuple(whole.test.x.shape)


def test_random_parts_have_their_size_and_differ_by_number():
    half, other, less = (data.load(f"digits@random-{n}") for n in ("50-3", "50-4", "30-3"))
    assert len(half.train) == len(other.train) == 719  # of 1,437
    common = set(images_of(half.train)) & set(images_of(other.train))
    assert 0.4 < len(common) / len(half.train) < 0.6
    assert set(images_of(less.train)) < set(images_of(half.train))
    assert len(set(half.train.y.tolist())) == 10


def test_each_part_has_a_fingerprint_and_a_label_of_its_own():
    names = ["digits", *(f"digits@{p}" for p in ("split-a", "split-b", "random-50-3"))]
    found = [data.load(name) for name in names]
    assert len({d.fingerprint for d in found}) == len(names)
    whole = found[0].label
    assert [d.label.removeprefix(whole) for d in found] == [
        "",
        ", split A",
        ", split B",
        ", random 50 %, no. 3",
    ]
    run = Run(Recipe(net="mlp", data="digits@split-a", steps=1))
    assert run.identity(found[1].fingerprint, "cpu") != run.identity(found[0].fingerprint, "cpu")


def test_parts_never_change():
    """What runs were keyed with: another draw of the same name would be a silent error."""
    y = np.arange(40) % 4
    assert Part("split-a").rows(y, 4).tolist() == ROWS["split-a"]
    assert Part("random-25-0").rows(y, 4).tolist() == ROWS["random-25-0"]


def test_small_and_odd_classes():
    y = np.array([0, 0, 1, 1, 1, 2])  # three classes: the lower half is class 0
    a = Part("split-a").rows(y, 3)
    assert np.bincount(y[a], minlength=3).tolist() == [1, 2, 0]
    with pytest.raises(BadParameter, match="'random-1-0': none of the 6 training images"):
        Part("random-1-0").rows(y, 3)


@pytest.mark.parametrize(
    "suffix",
    ["half", "split-c", "split-A", "", "random-50", "random-0-1", "random-100-1", "random-50-03"],
)
def test_unknown_parts(suffix):
    with pytest.raises(BadParameter, match=r"is no part\. Allowed: split-a, split-b, random-"):
        data.load(f"digits@{suffix}")


def test_errors_name_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))
    with pytest.raises(BadParameter, match="Did you mean 'digits'"):
        data.load("digit@split-a")
    with pytest.raises(MissingData, match="MNIST is not in"):
        data.load("mnist@split-a")
    report = data.check_dataset("mnist@split-a")
    assert not report.present and report.label == "MNIST, split A"


@pytest.fixture
def pets(tmp_path):
    for folder in ("p@ts", "p@ts@split-a"):
        for at, name in enumerate(("cat", "dog")):
            for i in range(10 if folder == "p@ts" else 5):
                path = tmp_path / folder / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 100 * at + i, np.uint8)).save(path)
    return tmp_path


def test_paths_with_an_at_sign_keep_their_meaning(pets):
    whole = data.load(f"images:{pets}/p@ts")
    assert len(whole.train) == 16 and whole.label == "images: p@ts"
    assert len(data.load(f"images:{pets}/p@ts@split-a").train) == 8  # the folder of that name
    b = data.load(f"images:{pets}/p@ts@split-b")
    assert b.label == "images: p@ts, split B" and np.bincount(b.train.y).tolist() == [6, 2]
    nested = data.load(f"images:{pets}/p@ts@split-a@split-b")
    assert nested.label == "images: p@ts@split-a, split B"
    sized = data.load(f"images:{pets}/p@ts?size=4@split-b")
    assert sized.in_shape == (1, 4, 4) and len(sized.train) == 8
    with pytest.raises(BadParameter, match=r"behind the options: .*p@ts\?size=4@split-b"):
        data.load(f"images:{pets}/p@ts@split-b?size=4")
    with pytest.raises(MissingData, match="p@ts@half does not exist"):
        data.load(f"images:{pets}/p@ts@half")


def test_a_text_has_no_parts(tmp_path):
    for name in ("pydoc@split-a", "pydoc?vocab=600@random-50-0"):
        for ask in (data.load, data.check_dataset):
            with pytest.raises(BadParameter, match="drawn by classes of images; a text has none"):
                ask(name)
    path = tmp_path / "a@b.txt"
    path.write_text("some words in a line\n" * 50)
    whole = data.load(f"text:{path}?tokenizer=bytes&window=4")
    with pytest.raises(BadParameter, match="a text has none"):
        data.load(f"text:{path}@split-a")
    path.rename(path.with_name("a@split-a"))  # a file of that name keeps its meaning
    again = data.load(f"text:{tmp_path}/a@split-a?tokenizer=bytes&window=4")
    assert again.fingerprint == whole.fingerprint


def test_split_name():
    assert split_name("digits") == ("digits", None)
    assert split_name("digits@split-b") == ("digits", Part("split-b"))


def test_the_command_line_mentions_parts():
    listed = run("data", "list").output
    assert "NAME@PART" in listed and "random-50-3" in listed
    assert "split A" in run("data", "check", "digits@split-a").output
