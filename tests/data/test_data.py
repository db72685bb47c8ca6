"""Datasets and augmentation, on small files the tests make themselves.

The tests of real data run where COMPANION_DATA names a data root that has it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import pickle
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from companion import data
from companion.core.errors import BadParameter, CorruptData, DeviceUnavailable, MissingData
from companion.core.seeds import Key
from companion.data import Augmentation, Augmenter, Split, registry, sources
from companion.data.pictures import decode

REAL = os.environ.get("COMPANION_DATA")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root and an empty run store for every test."""
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "runs"))
    return tmp_path / "data"


def bytes_of(image: np.ndarray, kind: str = "PNG") -> bytes:
    """An encoded image: (H, W) greyscale, (H, W, 3) colour."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def picture(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape or (8, 8, 3), dtype=np.uint8)


def tree(folder: Path, classes: dict[str, list[np.ndarray]]) -> Path:
    for name, images in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            (folder / name / f"{i:03}.png").write_bytes(bytes_of(image))
    return folder


def parquet(path: Path, blobs: list[bytes | None], columns: dict, features: dict | None = None):
    """A parquet file in Hugging Face's image layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"img": [{"bytes": b, "path": f"{i}.jpg"} for i, b in enumerate(blobs)]})
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    if features is not None:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


# --- devices


def test_device_names():
    assert data.resolve_device("cpu") == torch.device("cpu")
    assert data.resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(BadParameter, match="auto, cpu, cuda"):
        data.resolve_device("gpu")


def test_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert data.resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceUnavailable, match=f"{name} was asked for.*no GPU.*Use cpu"):
            data.resolve_device(name)
    with pytest.raises(DeviceUnavailable):
        data.load("digits", "cuda")


def test_device_with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert data.resolve_device("auto") == data.resolve_device("cuda") == torch.device("cuda:1")
    assert data.resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(DeviceUnavailable, match=r"2 GPU\(s\): cuda:0, cuda:1"):
        data.resolve_device("cuda:2")


# --- values


def test_split_refuses_what_does_not_fit():
    x, y = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    for bad in ((x[0, 0, 0], y[:2]), (x.half(), y), (x, y[:3]), (x, y.int()), (x, y.to("meta"))):
        with pytest.raises(BadParameter):
            Split(*bad)


def test_tables_signals_volumes_and_tokens_with_a_label_are_splits_too():
    y, tokens = torch.zeros(4, dtype=torch.int64), torch.arange(8).reshape(4, 2)
    for x in (torch.zeros(4, 9), torch.zeros(4, 2, 9), torch.zeros(4, 1, 3, 3, 3), tokens):
        split = Split(x, y)
        assert split.kind == "images" and split.window is None and len(split.head(2)) == 2
    assert Split(tokens, tokens).kind == "text"


def test_loaders_and_pairs_become_splits():
    x, y = torch.randn(7, 3), torch.arange(7) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    records = [{"pixels": x[:4], "labels": y[:4].int()}, {"pixels": x[4:], "labels": y[4:].int()}]
    for form in (loader, (x, y), records, Split(x, y)):
        split = Split.of(form)
        assert torch.equal(split.x, x) and torch.equal(split.y, y) and split.y.dtype == torch.int64
    for bad, says in (
        (3, "got a int"),
        ([], "yields no batches"),
        ([(x, y, y)], "pairs"),
        ([{"a": x, "b": x, "labels": y}], "several inputs"),
    ):
        with pytest.raises(BadParameter, match=says):
            Split.of(bad)


def test_head_is_a_fixed_class_mixed_beginning():
    split = data.load("digits").train
    rows = {tuple(x.flatten().tolist()) for x in split.x}
    small, large = split.head(100), split.head(200)
    assert len(small) == 100 and torch.equal(large.x[:100], small.x)
    assert torch.equal(large.y[:100], small.y) and set(small.y.tolist()) == set(range(10))
    assert {tuple(x.flatten().tolist()) for x in small.x} <= rows
    assert split.head(len(split)) is split and split.head(10**9) is split
    with pytest.raises(BadParameter):
        split.head(0)


def test_to_keeps_what_is_there():
    dataset = data.load("digits")
    assert dataset.to("cpu") is dataset and dataset.train.to("cpu") is dataset.train
    moved = dataset.to("meta")
    assert moved.train.x.device.type == moved.test.y.device.type == "meta"
    assert moved.fingerprint == dataset.fingerprint and dataset.train.x.device.type == "cpu"


def test_standardise_has_torchvisions_bits():
    pixels = picture(5, 6, 7, 3)
    mean, std = sources.CIFAR10_MEAN, sources.CIFAR10_STD
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([steps(image) for image in pixels])
    assert torch.equal(data.standardise(pixels.transpose(0, 3, 1, 2), 255, mean, std), expected)


def test_channel_statistics():
    pixels = picture(3000, 2, 3, 4)
    pixels[:, 1] = 7
    mean, std = data.channel_statistics(pixels, 255)
    assert mean[0] == pytest.approx(pixels[:, 0].mean() / 255, rel=1e-12)
    assert std[0] == pytest.approx(pixels[:, 0].std() / 255, rel=1e-12)
    assert (mean[1], std[1]) == (7 / 255, 1.0)  # a constant channel: nothing to scale


@given(st.lists(st.integers(0, 4), min_size=4, max_size=200), st.integers(1, 50), st.integers())
def test_stratified_split(labels, percent, seed):
    y = np.array(labels * 2, dtype=np.int64)  # every class at least twice
    n_test = max(1, len(y) * percent // 100)
    train, test = data.stratified_split(y, n_test, Key(seed))
    assert sorted([*train, *test]) == list(range(len(y)))
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    count = np.bincount(y)
    quota = np.bincount(y[test], minlength=len(count))
    ideal = count * n_test / len(y)
    assert all(
        q in (math.floor(i), math.ceil(i), 1) for q, i in zip(quota, ideal, strict=True) if i
    )
    assert (quota[count > 0] >= 1).all() and (quota[count > 0] < count[count > 0]).all()
    if (ideal[count > 0] >= 1).all():
        assert len(test) == n_test


# --- digits


def test_digits_split_is_stratified_disjoint_and_complete():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = data.load("digits")
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert (dataset.classes, dataset.in_shape, dataset.label) == (10, (1, 8, 8), "digits")
    share = np.bincount(dataset.test.y, minlength=10) - np.bincount(bunch.target) * 360 / 1797
    assert np.abs(share).max() < 1
    raw = sources._read_digits(Path())
    both = np.concatenate([raw.train_x, raw.test_x])[:, 0]
    labels = np.concatenate([raw.train_y, raw.test_y])
    found = Counter((x.tobytes(), int(y)) for x, y in zip(both, labels, strict=True))
    images = bunch.images.astype(np.uint8)
    all_of_them = zip(images, bunch.target, strict=True)
    assert found == Counter((x.tobytes(), int(y)) for x, y in all_of_them)
    x = dataset.train.x
    assert abs(float(x.mean())) < 1e-6 and abs(float(x.std(correction=0)) - 1) < 1e-5
    assert torch.equal(dataset.black.flatten(), x.min().flatten())


def test_digits_never_change():
    # Planted: another split, scale or scikit-learn would silently make every stored run another.
    expected = "e9cecc5a6164"
    assert data.load("digits").fingerprint.startswith(expected)


def test_load_returns_the_same_object_and_check_agrees():
    dataset, report = data.load("digits"), data.check_dataset("digits")
    assert data.load("digits") is dataset
    assert report.present and report.files == () and report.where is None
    assert report.fingerprint == dataset.fingerprint
    assert report.train_shape == (1437, 1, 8, 8) and sum(report.test_counts) == 360


# --- names, messages, downloads


def test_names_that_do_not_exist():
    with pytest.raises(BadParameter, match="Did you mean 'mnist'"):
        data.load("mnits")
    for bad in ("images:", "images:x?colour=1", "images:x?size=0", "images:x?size=a"):
        with pytest.raises(BadParameter):
            data.load(bad)


def test_missing_data_names_dataset_folder_and_command(root):
    with pytest.raises(MissingData) as error:
        data.load("mnist")
    for part in ("MNIST", str(root / "MNIST/raw"), "companion data get mnist", "COMPANION_DATA"):
        assert part in str(error.value)
    assert not root.exists()
    report = data.check_dataset("mnist")
    assert not report.present and len(report.missing) == 4 and report.fingerprint is None


def test_catalogue(root):
    entries = {entry.name: entry for entry in data.catalogue()}
    published = ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "cifar10-jpeg"]
    published += ["tiny-imagenet", "domainnet", "imagenet"]
    texts = ["pydoc", "wikitext2", "wikitext103", "text:PATH"]
    assert list(entries) == [*published, "images:PATH", *texts]
    assert [name for name, entry in entries.items() if entry.present] == ["digits", "pydoc"]
    assert entries["cifar10"].where == root / "cifar-10-batches-py"
    assert entries["cifar100"].how == "companion data get cifar100"


def test_the_jpeg_copy_is_never_a_silent_substitute(root):
    blobs = [bytes_of(picture(32, 32, 3), "JPEG") for _ in range(20)]
    for split in ("train", "test"):
        parquet(root / f"cifar10-jpeg/{split}.parquet", blobs, {"label": [*range(10)] * 2})
    with pytest.raises(MissingData, match=r"CIFAR-10 is not in.*lossy.*cifar10-jpeg"):
        data.load("cifar10")
    copy = data.load("cifar10-jpeg")
    assert copy.label == "CIFAR-10 (JPEG copy)" and copy.mean == sources.CIFAR10_MEAN
    own = data.load(f"images:{root / 'cifar10-jpeg'}")
    assert own.fingerprint != copy.fingerprint  # same bytes, other normalisation
    parquet(root / "cifar10-jpeg/train.parquet", blobs[:10], {"label": [*range(5)] * 2})
    parquet(root / "cifar10-jpeg/test.parquet", blobs[:10], {"label": [*range(5)] * 2})
    with pytest.raises(CorruptData, match="no copy of CIFAR-10"):
        data.load("cifar10-jpeg")


def test_get_has_nothing_to_download():
    for name in ("digits", "cifar10-jpeg", "images:/tmp"):
        with pytest.raises(BadParameter, match="nothing to download"):
            data.download(name)


@pytest.mark.parametrize(
    "failure", [URLError("no route to host"), RuntimeError("Error downloading")]
)
def test_get_offline(root, monkeypatch, failure):
    def download(self):
        raise failure

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(
        MissingData, match=r"(?s)could not be downloaded.*Without a network"
    ) as error:
        data.download("mnist")
    assert str(root / "MNIST/raw") in str(error.value)


def test_get_downloads_once(root, monkeypatch):
    calls = []

    def download(self):
        calls.append(self.root)
        idx_dataset(Path(self.root) / "FashionMNIST/raw")

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    found = {data.download("fashion_mnist") for _ in range(2)}
    assert found == {root / "FashionMNIST/raw"}
    assert len(calls) == 1


# --- IDX files


def idx_dataset(folder: Path, zipped: bool = False, n: int = 30) -> dict[str, np.ndarray]:
    """A tiny dataset in MNIST's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": picture(n, 28, 28),
        "train-labels-idx1-ubyte": np.arange(n, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": picture(10, 28, 28),
        "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
    }
    for name, array in arrays.items():
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
        content = head + array.tobytes()
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


def test_idx_files_are_read_as_torchvision_reads_them(root):
    arrays = idx_dataset(root / "FashionMNIST/raw")
    dataset = data.load("fashion_mnist")
    theirs = torchvision.datasets.FashionMNIST(root, train=True)
    assert torch.equal(dataset.train.y, theirs.targets)
    pixels = arrays["train-images-idx3-ubyte"][:, None]
    assert torch.equal(dataset.train.x, data.standardise(pixels, 255, (0.2860,), (0.3530,)))
    assert (len(dataset.test), dataset.in_shape, dataset.label) == (
        10,
        (1, 28, 28),
        "Fashion-MNIST",
    )
    assert dataset.class_names[9] == "Ankle boot"
    assert {f.checksum for f in data.check_dataset("fashion_mnist").files} == {"unknown"}


def test_zipped_idx_files(root, monkeypatch):
    folder = root / "FashionMNIST/raw"
    idx_dataset(folder, zipped=True)
    with pytest.raises(CorruptData, match=r"train-images-idx3-ubyte.gz: the checksum is wrong"):
        data.load("fashion_mnist")
    paths = [folder / f"{name}.gz" for name in sources.IDX_FILES]
    known = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in paths]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", known)
    zipped = data.load("fashion_mnist")
    assert {f.checksum for f in data.check_dataset("fashion_mnist").files} == {"ok"}
    for path in paths:  # unzipped: the same content, so the same fingerprint
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert data.load("fashion_mnist").fingerprint == zipped.fingerprint


def test_mnist_checksums(root, monkeypatch):
    folder = root / "MNIST/raw"
    idx_dataset(folder)
    with pytest.raises(CorruptData, match="train-images-idx3-ubyte: the checksum is wrong"):
        data.load("mnist")
    known = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in sources.IDX_FILES}
    monkeypatch.setitem(sources.UNZIPPED_MD5, "mnist", known)
    assert data.load("mnist").mean == (0.1307,)
    assert [f.checksum for f in data.check_dataset("mnist").files] == ["ok"] * 4
    for name in sources.IDX_FILES:  # zipped again by somebody: the content counts
        path = folder / name
        (folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
        path.unlink()
    assert data.load("mnist").label == "MNIST"


def test_damaged_idx_files_are_named(root):
    folder = root / "FashionMNIST/raw"
    idx_dataset(folder)
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    content = images.read_bytes()
    for damage, message in (
        (content[:-1], "truncated"),
        (content[:10], "not an IDX file"),
        (b"\x00\x00\x0d\x03" + content[4:], "not an IDX file"),
        (b"", "not an IDX file"),
    ):
        images.write_bytes(damage)
        with pytest.raises(CorruptData, match=f"train-images-idx3-ubyte.*{message}"):
            data.load("fashion_mnist")
    images.write_bytes(content)
    good = labels.read_bytes()
    labels.write_bytes(good[:-1] + b"\x0a")  # a class 10
    with pytest.raises(CorruptData, match="do not fit together"):
        data.load("fashion_mnist")
    labels.unlink()
    labels.with_suffix(".gz").write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(CorruptData, match="cannot be unzipped"):
        data.load("fashion_mnist")


def test_fingerprint_sees_bytes_and_not_times(root):
    folder = root / "FashionMNIST/raw"
    idx_dataset(folder)
    before = data.load("fashion_mnist")
    path = folder / "t10k-images-idx3-ubyte"
    os.utime(path, (1, 1))
    assert data.load("fashion_mnist").fingerprint == before.fingerprint
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    after = data.load("fashion_mnist")  # and the process's cache does not hide the change
    assert after.fingerprint != before.fingerprint
    assert not torch.equal(after.test.x, before.test.x)
    assert torch.equal(after.train.x, before.train.x)


def test_fingerprint_can_be_made_by_hand():
    parts = [("a", hashlib.sha256(b"1").hexdigest()), ("b", hashlib.sha256(b"2").hexdigest())]
    manifest = f"rule\n{parts[0][1]}  a\n{parts[1][1]}  b"
    assert sources.fingerprint("rule", parts) == hashlib.sha256(manifest.encode()).hexdigest()


# --- CIFAR


class Python2Dtype:
    """Pickles as NumPy on Python 2 pickled a dtype: NumPy 2.4 warns when it is loaded."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cifar_dataset(root: Path, monkeypatch, cls: str, labels: str, names: str, classes: int):
    """A tiny dataset in CIFAR's layout, its checksums known to torchvision."""
    cifar = getattr(torchvision.datasets, cls)
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name: str) -> tuple[str, str]:
        y = list(range(classes))
        content = {"data": picture(classes, 3072), labels: y, "kind": Python2Dtype()}
        return write(name, content)

    monkeypatch.setattr(cifar, "train_list", [batch(name) for name, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [batch(name) for name, _ in cifar.test_list])
    name, md5 = write(cifar.meta["filename"], {names: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": names, "md5": md5})
    return folder


def test_cifar10(root, monkeypatch):
    folder = cifar_dataset(root, monkeypatch, "CIFAR10", "labels", "label_names", 10)
    dataset = data.load("cifar10")
    assert (dataset.label, len(dataset.train), len(dataset.test)) == ("CIFAR-10", 50, 10)
    assert dataset.in_shape == (3, 32, 32) and dataset.class_names[3] == "class 3"
    first = pickle.loads((folder / "data_batch_1").read_bytes(), encoding="latin1")  # rows are CHW
    pixels = first["data"].reshape(-1, 3, 32, 32)
    expected = data.standardise(pixels, 255, sources.CIFAR10_MEAN, sources.CIFAR10_STD)
    assert torch.equal(dataset.train.x[:10], expected)
    report = data.check_dataset("cifar10")
    assert [f.checksum for f in report.files] == ["ok"] * 7 and report.train_counts == (5,) * 10
    (folder / "batches.meta").unlink()
    with pytest.raises(MissingData, match=r"batches.meta missing"):
        data.load("cifar10")


def test_cifar100(root, monkeypatch):
    cifar_dataset(root, monkeypatch, "CIFAR100", "fine_labels", "fine_label_names", 100)
    dataset = data.load("cifar100")
    assert (dataset.label, dataset.classes, len(dataset.train)) == ("CIFAR-100", 100, 100)
    assert dataset.mean == sources.CIFAR100_MEAN


def test_a_strange_pickle_is_not_opened(root, monkeypatch, tmp_path):
    folder = cifar_dataset(root, monkeypatch, "CIFAR10", "labels", "label_names", 10)
    sprung = tmp_path / "sprung"
    for name in ("test_batch", "batches.meta"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
        with pytest.raises(CorruptData, match=f"{name}: the checksum is wrong"):
            data.load("cifar10")
        assert not sprung.exists()
        (folder / name).write_bytes(good)
    pickle.loads(pickle.dumps(Trap(sprung)))  # the trap works
    assert sprung.exists()


# --- folders of pictures


def test_image_folder_with_test_split(tmp_path):
    cats, dogs = [picture() for _ in range(3)], [picture() for _ in range(2)]
    for split in ("train", "valid"):
        tree(tmp_path / "pets" / split, {"dog": dogs, "cat": cats})
    dataset = data.load(f"images:{tmp_path / 'pets'}")
    assert dataset.class_names == ("cat", "dog") and dataset.in_shape == (3, 8, 8)
    assert dataset.label == "images: pets" and dataset.train.y.tolist() == [0, 0, 0, 1, 1]
    pixels = np.stack([*cats, *dogs]).transpose(0, 3, 1, 2)
    expected = data.standardise(pixels, 255, *data.channel_statistics(pixels, 255))
    assert torch.equal(dataset.train.x, expected) and torch.equal(dataset.test.x, expected)
    report = data.check_dataset(f"images:{tmp_path / 'pets'}")
    assert report.train_counts == report.test_counts == (3, 2)
    assert report.files[0].checksum == "unknown" and report.fingerprint == dataset.fingerprint


def test_image_folder_without_test_split(tmp_path):
    tree(tmp_path / "pets", {name: [picture(6, 6) for _ in range(10)] for name in "abc"})
    tree(tmp_path / "pets", {"rare": [picture(6, 6) for _ in range(2)]})
    dataset = data.load(f"images:{tmp_path / 'pets'}")
    assert dataset.in_shape == (1, 6, 6)  # greyscale files
    counts = np.bincount(dataset.train.y), np.bincount(dataset.test.y)
    assert counts[0].tolist() == [8, 8, 8, 1] and counts[1].tolist() == [2, 2, 2, 1]
    seen = {x.numpy().tobytes() for x in [*dataset.train.x, *dataset.test.x]}
    assert len(seen) == 32
    moved = (tmp_path / "pets").rename(tmp_path / "animals")  # its place does not count
    assert data.load(f"images:{moved}").fingerprint == dataset.fingerprint
    (moved / "a" / "000.png").rename(moved / "b" / "new.png")  # its class does
    assert data.load(f"images:{moved}").fingerprint != dataset.fingerprint


def test_colours_and_sizes(tmp_path):
    pets = tree(tmp_path / "pets", {name: [picture() for _ in range(5)] for name in "ab"})
    grey = picture(8, 8)
    (pets / "a" / "000.png").write_bytes(bytes_of(grey))
    dataset = data.load(f"images:{pets}")
    assert dataset.in_shape == (3, 8, 8)
    both = torch.cat([dataset.train.x, dataset.test.x])
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (dataset.mean, dataset.std))
    back = (both * scale + shift) * 255
    expected = torch.from_numpy(grey).float().expand(3, 8, 8)
    assert any(torch.allclose(image, expected, atol=1e-3) for image in back)
    (pets / "b" / "001.png").write_bytes(bytes_of(picture(10, 12, 3)))
    with pytest.raises(BadParameter, match=r"different sizes: 8x8 .*12x10 .*001.png.*size=32"):
        data.load(f"images:{pets}")
    sized = data.load(f"images:{pets}?size=6")
    assert sized.in_shape == (3, 6, 6)
    assert sized.fingerprint != data.load(f"images:{pets}?size=7").fingerprint


def test_decode_resizes_like_torchvision():
    images = [picture(20, 31, 3), picture(17, 9, 3), picture(12, 12, 3)]
    blobs = [bytes_of(image) for image in images]
    ours = decode(["a", "b", "c"], blobs.__getitem__, size=12)
    steps = transforms.Compose(
        [transforms.Resize(12), transforms.CenterCrop(12), transforms.PILToTensor()]
    )
    theirs = torch.stack([steps(Image.fromarray(image)) for image in images])
    assert np.array_equal(ours, theirs.numpy())


def test_decode_of_unusual_modes():
    palette = Image.fromarray(picture()).quantize(8)
    palette.info["transparency"] = bytes(8)
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert decode(["p"], lambda i: file.getvalue(), None).shape == (1, 3, 8, 8)
    deep = bytes_of(np.full((8, 8), 40000, dtype=np.uint16))
    with pytest.raises(BadParameter, match="8 bits"):
        decode(["deep.png"], lambda i: deep, None)


def test_unreadable_picture_is_named(tmp_path):
    pets = tree(tmp_path / "pets", {name: [picture() for _ in range(5)] for name in "ab"})
    path = pets / "b" / "003.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CorruptData, match=r"b/003.png: cannot be read as an image"):
        data.load(f"images:{pets}")
    path.write_bytes(b"no image")
    with pytest.raises(CorruptData, match=r"b/003.png"):
        data.load(f"images:{pets}")


def test_folders_that_are_no_dataset(tmp_path):
    def fails(kind, message):
        with pytest.raises(kind, match=message):
            data.load(f"images:{tmp_path / 'x'}")

    two = {"a": [picture()] * 2, "b": [picture()] * 2}
    fails(MissingData, "does not exist")
    (tmp_path / "x").mkdir()
    fails(MissingData, "no class folder with images")
    tree(tmp_path / "x", {"a": [picture()] * 2})
    fails(CorruptData, "one class")
    tree(tmp_path / "x", {"b": [picture()]})
    fails(CorruptData, r"class 'b' has 1 image\(s\)")
    (tmp_path / "x" / "c").mkdir()
    fails(CorruptData, "x/c holds no image")
    (tmp_path / "x").rename(tmp_path / "y")
    tree(tmp_path / "x/train", two)
    fails(CorruptData, "no test split")
    with pytest.raises(BadParameter, match="have no columns"):
        data.load(f"images:{tmp_path / 'x/train'}?label=x")
    tree(tmp_path / "x/test", {"a": [picture()], "cat": [picture()]})
    fails(CorruptData, "differ: b, cat in one of them only")
    (tmp_path / "x/train").rename(tmp_path / "z")
    fails(CorruptData, "holds a test split, but no train split")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(BadParameter, match="not a parquet file"):
        data.load(f"images:{tmp_path / 'file.txt'}")


# --- parquet


def test_parquet_shards_with_names(tmp_path):
    images = [picture(8, 8, 3) for _ in range(6)]
    blobs = [bytes_of(image, "JPEG") for image in images]
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog", "yak"]}}
    folder = tmp_path / "pets" / "data"
    for i in range(2):  # written last shard first
        rows = {"label": [i, 1, 0]}
        parquet(folder / f"train-{1 - i:05}-of-00002.parquet", blobs[3 * i :][:3], rows, features)
    parquet(folder / "validation-00000-of-00001.parquet", blobs[:2], {"label": [2, 2]}, features)
    dataset = data.load(f"images:{tmp_path / 'pets'}")
    assert dataset.class_names == ("cat", "dog", "yak") and dataset.classes == 3
    assert dataset.train.y.tolist() == [1, 1, 0, 0, 1, 0] and dataset.test.y.tolist() == [2, 2]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(blobs[i]))) for i in (3, 4, 5, 0, 1, 2)])
    pixels = expected.transpose(0, 3, 1, 2)
    assert torch.equal(
        dataset.train.x, data.standardise(pixels, 255, *data.channel_statistics(pixels, 255))
    )


def test_single_parquet_file_with_string_labels(tmp_path):
    blobs = [bytes_of(picture()) for _ in range(20)]
    path = parquet(tmp_path / "all.parquet", blobs, {"breed": ["yak", "cat"] * 10})
    dataset = data.load(f"images:{path}")
    assert dataset.class_names == ("cat", "yak") and dataset.label == "images: all"
    assert np.bincount(dataset.test.y).tolist() == [2, 2] and len(dataset.train) == 16


def test_label_columns(tmp_path):
    blobs = [bytes_of(picture()) for _ in range(8)]
    fine, coarse = [3, 5, 7, 9] * 2, [0, 1] * 4
    path = parquet(tmp_path / "a.parquet", blobs, {"coarse_label": coarse, "fine_label": fine})
    assert data.load(f"images:{path}").class_names == ("3", "5", "7", "9")
    (columns, split) = data.check_dataset(f"images:{path}").notes
    assert columns == "columns: image 'img', label 'fine_label'; not used: coarse_label"
    assert split.startswith("split: stratified 80/20")
    other = data.load(f"images:{path}?label=coarse_label")
    assert other.classes == 2
    assert other.fingerprint != data.load(f"images:{path}").fingerprint
    with pytest.raises(BadParameter, match="Did you mean 'fine_label'"):
        data.load(f"images:{path}?label=fine_labels")
    path = parquet(tmp_path / "b.parquet", blobs, {"x": fine, "y": coarse})
    with pytest.raises(BadParameter, match=r"which column .* x, y"):
        data.load(f"images:{path}")


def test_parquet_files_that_are_no_dataset(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    blobs = [bytes_of(picture()) for _ in range(4)]
    folder = tmp_path / "x"

    def fails(message, kind=CorruptData):
        with pytest.raises(kind, match=message):
            data.load(f"images:{folder}")

    parquet(folder / "train.parquet", blobs, {"label": [0, 1, 0, 1]})
    fails("no test split")
    parquet(folder / "test.parquet", blobs, {"label": [0, 1, 2, 1]})
    fails("class 2 in the data, but train does not have it")
    parquet(folder / "test.parquet", blobs, {"label": [0, 1, None, 1]})
    fails("1 rows .* nothing in column 'label'")
    parquet(folder / "test.parquet", [*blobs[:3], None], {"label": [0, 1, 0, 1]})
    fails("1 rows .* nothing in column 'img'")
    parquet(folder / "test.parquet", [*blobs[:3], b"?"], {"label": [0, 1, 0, 1]})
    fails(r"test.parquet row 3: cannot be read as an image")
    parquet(folder / "test.parquet", blobs, {"other": [0, 1, 0, 1]})
    fails("same columns")
    parquet(folder / "test.parquet", blobs, {"label": ["a", "b", "a", "b"]})
    fails("same columns")
    parquet(folder / "test.parquet", [], {"label": pa.array([], pa.int64())})
    fails("a split without images")
    (folder / "test.parquet").write_bytes(b"PAR1 not really")
    fails("cannot be read")
    (folder / "train.parquet").rename(folder / "a.parquet")
    (folder / "test.parquet").unlink()
    fails("none is called train")
    (folder / "a.parquet").rename(folder / "validation.parquet")
    fails("no train split")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "text.parquet")
    with pytest.raises(CorruptData, match=r"no image column.*text, label"):
        data.load(f"images:{tmp_path / 'text.parquet'}")
    names = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    hidden = parquet(tmp_path / "hidden.parquet", blobs, {"label": [0, 1, 0, -1]}, names)
    with pytest.raises(CorruptData, match="class -1 in the data, but the metadata names 2 classes"):
        data.load(f"images:{hidden}")


# --- the cache of decoded pictures


@pytest.fixture
def pets(tmp_path) -> Path:
    return tree(tmp_path / "pets", {name: [picture() for _ in range(5)] for name in "ab"})


def reload(pets: Path) -> data.Dataset:
    registry._load.cache_clear()
    return data.load(f"images:{pets}")


def test_decoded_pictures_are_cached(pets, tmp_path, monkeypatch):
    dataset = reload(pets)
    (path,) = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert path == tmp_path / "runs/decoded" / dataset.fingerprint / "images.npy"
    assert np.load(path, mmap_mode="r").shape == (10, 3, 8, 8)

    def broken(*args):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("companion.data.pictures.decode", broken)
        again = reload(pets)
    assert again is not dataset and torch.equal(again.train.x, dataset.train.x)
    assert torch.equal(again.test.x, dataset.test.x)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other"])
def test_a_corrupt_cache_is_rebuilt(pets, tmp_path, damage):
    dataset = reload(pets)
    (path,) = (tmp_path / "runs").rglob("images.npy")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[300] ^= 1
    broken = {"flip": bytes(flipped), "truncate": good[:200], "empty": b"", "other": b"x" * 500}
    path.write_bytes(broken[damage])
    assert torch.equal(reload(pets).train.x, dataset.train.x)
    assert path.read_bytes() == good
    assert len(list(path.parent.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(pets, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / "file"))
    assert len(reload(pets).train) == 8


# --- augmentation


@pytest.mark.parametrize("text", ["none", "flip", "crop4", "flip+crop4", "crop1", "flip+crop12"])
def test_augmentation_reads_what_it_writes(text):
    assert str(Augmentation.parse(text)) == text


def test_augmentation_names():
    assert Augmentation.parse("crop4+flip") == Augmentation(flip=True, pad=4)
    assert str(Augmentation()) == "none" and hash(Augmentation()) == hash(Augmentation(False, 0))
    for bad in ("", "crop", "crop0", "crop-1", "flip+flip", "none+flip", "rotate", "crop2+crop3"):
        with pytest.raises(BadParameter, match="Allowed: none, flip"):
            Augmentation.parse(bad)
    with pytest.raises(BadParameter):
        Augmentation(pad=-1)


def split_of(n: int, *shape: int) -> Split:
    x = torch.from_numpy(RNG.standard_normal((n, *shape), dtype=np.float32))
    return Split(x, torch.zeros(n, dtype=torch.int64))


SMALL = split_of(12, 2, 5, 6)
BLACK = torch.tensor([-1.5, -2.5]).view(2, 1, 1)


def by_hand(x: torch.Tensor, pad: int, flip: bool, top: int, left: int) -> torch.Tensor:
    """One (C, H, W) image, padded with black, cropped, flipped."""
    _, height, width = x.shape
    planes = [F.pad(c, (pad,) * 4, value=float(b)) for c, b in zip(x, BLACK, strict=True)]
    crop = torch.stack(planes)[:, top : top + height, left : left + width]
    return crop.flip(2) if flip else crop


@settings(deadline=None, max_examples=40)
@given(
    flip=st.booleans(),
    pad=st.integers(0, 4),
    rows=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    seed=st.integers(),
    epoch=st.integers(0, 1000),
)
def test_every_augmented_image_is_one_of_the_shifts(flip, pad, rows, seed, epoch):
    augmenter = Augmenter(SMALL, Augmentation(flip, pad), BLACK)
    draws = augmenter.draw(Key("augment", seed), epoch)
    batch, _ = augmenter.examples(torch.tensor(rows), draws)
    assert batch.shape == (len(rows), 2, 5, 6)
    places = range(2 * pad + 1)
    for row, image in zip(rows, batch, strict=True):
        candidates = [
            (f, top, left)
            for f in ((False, True) if flip else (False,))
            for top in places
            for left in places
            if torch.equal(image, by_hand(SMALL.x[row], pad, f, top, left))
        ]
        drawn = (
            bool(draws.flip[row]) if flip else False,
            int(draws.top[row]) if pad else 0,
            int(draws.left[row]) if pad else 0,
        )
        assert candidates == [drawn]


def test_draws_are_a_function_of_key_and_epoch():
    split = split_of(200, 1, 9, 9)
    augmenter = Augmenter(split, Augmentation.parse("flip+crop4"), torch.zeros(1, 1, 1))

    def bits(key: Key, epoch: int) -> tuple:
        draws = augmenter.draw(key, epoch)
        return tuple(tuple(v.tolist()) for v in (draws.flip, draws.top, draws.left))

    torch.manual_seed(1)
    first = bits(Key(0), 0)
    torch.manual_seed(2)
    augmenter.examples(torch.arange(10), augmenter.draw(Key(5), 3))
    assert bits(Key(0), 0) == first
    # Neighbours share nothing: not seed 0 at epoch 1 with seed 1 at epoch 0, nor any other pair.
    every = [bits(Key(seed), epoch) for seed in range(4) for epoch in range(4)]
    for part in range(3):
        assert len({draw[part] for draw in every}) == 16
    other = Augmenter(split, Augmentation.parse("flip"), torch.zeros(1, 1, 1))
    assert tuple(other.draw(Key(0), 0).flip.tolist()) == first[0]  # crops leave the flips alone


def test_batch_composition_does_not_matter():
    augmenter = Augmenter(SMALL, Augmentation(True, 2), BLACK)
    draws = augmenter.draw(Key("a"), 7)
    whole, _ = augmenter.examples(torch.arange(12), draws)
    order = Key("order").permutation(12)
    for rows in (order, order[:5], order[5:], torch.tensor([3]), torch.tensor([3, 3, 0])):
        assert torch.equal(augmenter.examples(rows, draws)[0], whole[rows])


def test_without_augmentation_images_are_as_they_are():
    augmenter = Augmenter(SMALL, Augmentation(), BLACK)
    draws = augmenter.draw(Key(0), 0)
    assert draws.flip is draws.top is draws.left is None
    rows = torch.tensor([4, 1, 1])
    batch, _ = augmenter.examples(rows, draws)
    assert torch.equal(batch, SMALL.x[rows])
    before = SMALL.x.clone()
    batch.zero_()
    assert torch.equal(SMALL.x, before)  # a batch is a copy


def test_draws_are_uniform():
    n = 20_000
    split = split_of(n, 1, 3, 3)
    augmenter = Augmenter(split, Augmentation(True, 2), torch.zeros(1, 1, 1))
    draws = augmenter.draw(Key("uniform"), 0)

    def within(count: int, p: float) -> bool:
        return abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))

    assert within(int(draws.flip.sum()), 1 / 2)
    corners = Counter(zip(draws.top.tolist(), draws.left.tolist(), strict=True))
    assert len(corners) == 25 and all(within(count, 1 / 25) for count in corners.values())
    flipped = Counter(draws.top[draws.flip].tolist())  # flips and offsets are independent
    assert all(within(count, 1 / 10) for count in flipped.values())


def test_padding_is_black_as_cropping_before_normalising_makes_it():
    dataset = data.load("digits")
    raw = sources._read_digits(Path())
    augmenter = Augmenter(dataset.train, Augmentation(True, 3), dataset.black)
    rows = torch.arange(50)
    draws = augmenter.draw(Key(1), 0)
    pixels = np.pad(raw.train_x[:50], ((0, 0), (0, 0), (3, 3), (3, 3)))  # with 0, black
    out = np.empty((50, 1, 8, 8), dtype=np.uint8)
    for i in range(50):
        top, left = int(draws.top[i]), int(draws.left[i])
        out[i] = pixels[i, :, top : top + 8, left : left + 8]
        out[i] = out[i, :, :, ::-1].copy() if draws.flip[i] else out[i]
    expected = data.standardise(out, raw.white, dataset.mean, dataset.std)
    assert torch.equal(augmenter.examples(rows, draws)[0], expected)


def test_padding_as_large_as_the_image():
    with pytest.raises(BadParameter, match=r"crop5 on 5x6 images.*crop1 to crop4"):
        Augmenter(SMALL, Augmentation(pad=5), BLACK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_augmentation_has_the_same_bits_on_a_gpu():
    here, there = data.load("digits"), data.load("digits", "cuda")
    assert torch.equal(there.train.x.cpu(), here.train.x) and there.black.is_cuda
    augmentation = Augmentation.parse("flip+crop2")
    batches = []
    for dataset in (here, there):
        augmenter = Augmenter(dataset.train, augmentation, dataset.black)
        draws = augmenter.draw(Key(0), 1)
        rows = torch.arange(100, device=dataset.train.x.device)
        batches.append(augmenter.examples(rows, draws)[0].cpu())
    assert torch.equal(*batches)


# --- real data


def real(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if REAL is None:
        pytest.skip("COMPANION_DATA is not set: no real data to test")
    monkeypatch.setenv("COMPANION_DATA", REAL)
    if not {entry.name: entry for entry in data.catalogue()}[name].present:
        pytest.skip(f"{name} is not under COMPANION_DATA")


def test_real_mnist(monkeypatch, tmp_path):
    real(monkeypatch, "mnist")
    report = data.check_dataset("mnist")
    assert [f.checksum for f in report.files] == ["ok"] * 4
    dataset = data.load("mnist")
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert dataset.train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert abs(float(dataset.train.x.mean())) < 1e-3
    assert abs(float(dataset.train.x.std()) - 1) < 1e-3
    raw = tmp_path / "MNIST" / "raw"  # torchvision itself reads unzipped files only
    raw.mkdir(parents=True)
    for path in (Path(REAL) / "MNIST" / "raw").iterdir():
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (raw / path.name.removesuffix(".gz")).write_bytes(content)
    first = torchvision.datasets.MNIST(tmp_path, train=False)[0][0]
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    assert torch.equal(dataset.test.x[0], transforms.Compose(steps)(first))


@pytest.mark.slow
def test_real_jpeg_copy_of_cifar10(monkeypatch):
    real(monkeypatch, "cifar10-jpeg")
    dataset = data.load("cifar10-jpeg")
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    assert np.bincount(dataset.train.y).tolist() == [5000] * 10
    assert dataset.train.x.mean((0, 2, 3)).abs().max() < 5e-3  # near CIFAR-10's own numbers
    assert (dataset.train.x.std((0, 2, 3)) - 1).abs().max() < 1e-2
