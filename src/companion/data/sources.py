"""What a source of data is, and the published ones: files in torchvision's layout to pixels.

A :class:`Source` knows where a dataset's files are and how to read them into a :class:`Raw` (a text
into a :class:`RawText`, ``text.py``); it neither normalises nor downloads (see ``registry.py``).
Every byte read goes into the fingerprint, and every checksum that is known is compared before the
bytes are used.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from companion.core import files
from companion.core.errors import CorruptData
from companion.core.seeds import Key
from companion.data.dataset import Kind, TextFacts, stratified_split
from companion.data.streamed import Pixels

# md5 of the unzipped files of MNIST. torchvision publishes those of the zipped ones only, for MNIST
# and Fashion-MNIST; an unzipped Fashion-MNIST is therefore reported as "unknown".
UNZIPPED_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
}
IDX_FILES = tuple(UNZIPPED_MD5["mnist"])


@dataclass(frozen=True)
class FileReport:
    """A file that was read: its size in bytes, and whether its checksum is right or not known."""

    path: Path
    size: int
    checksum: Literal["ok", "unknown"]

    @classmethod
    def of(cls, path: Path) -> FileReport:
        """Of a file that nobody published a checksum of."""
        return cls(path, path.stat().st_size, "unknown")


@dataclass(frozen=True, eq=False)
class Raw:
    """A dataset as read: integer pixels, (N, C, H, W) uint8, and labels, (N,) int64.

    ``mean`` and ``std`` are None where they are to be computed on the train split. ``notes`` say in
    words what a reader had to choose. ``domains``, where there are some, are those of the
    train and of the test images, (N,) int64 each: indices into ``domain_names``.
    """

    train_x: NDArray[np.uint8]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.uint8]
    test_y: NDArray[np.int64]
    classes: int
    fingerprint: str
    white: int = 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] = ()
    files: tuple[FileReport, ...] = ()
    notes: tuple[str, ...] = ()
    domains: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    domain_names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Streamed:
    """A dataset that stays on the disk: pictures and labels, (N,) int64, of train and of test."""

    train: tuple[Pixels, NDArray[np.int64]]
    test: tuple[Pixels, NDArray[np.int64]]
    class_names: tuple[str, ...]
    fingerprint: str
    files: tuple[FileReport, ...] = ()
    notes: tuple[str, ...] = ("pictures stay on the disk; files are told apart by name and size",)


@dataclass(frozen=True, eq=False)
class RawText:
    """Two texts as read and tokenised: (T,) uint16 or int32 tokens each, in windows of ``window``.

    ``notes`` say in words what a reader had to choose.
    """

    train: NDArray[Any]
    test: NDArray[Any]
    window: int
    classes: int
    fingerprint: str
    facts: TextFacts
    files: tuple[FileReport, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """How to find and read one dataset.

    Arguments:
        name, label, classes, shape: see :class:`companion.data.Dataset`; None: known once read.
        folder: of the files, below the data root (or absolute); None: there are no files.
        files: data root → the files that are there (in reading order) and the names of those that
            are missing.
        read: data root → the data. Raises ``CorruptData``; called only if nothing is missing.
        how: one line, how to get it.
        torchvision: the torchvision class that can download it, or None.
        hub: (repository, configuration, folder below the data root, commit) of a text that Hugging
            Face's ``datasets`` can download, or None.
        hint: data root → what else there is, a sentence for the message that files are missing.
    """

    name: str
    label: str
    classes: int | None
    shape: tuple[int, ...] | None
    folder: str | None
    files: Callable[[Path], tuple[list[Path], list[str]]]
    read: Callable[[Path], Raw | RawText | Streamed]
    how: str
    torchvision: str | None = None
    hub: tuple[str, str, str, str] | None = None
    hint: Callable[[Path], str] = lambda root: ""
    kind: Kind = "images"


def fingerprint(rule: str, parts: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) of a manifest: a line with the rule, then ``sha256  name`` for each file.

    Names and contents count, times and places do not. ``sha256sum`` can reproduce it by hand.

    Arguments:
        rule: how the files become numbers: split, columns, size, normalisation.
        parts: (name, SHA-256 in hex) in reading order.
    """
    lines = [rule, *(f"{digest}  {name}" for name, digest in parts)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_array(
    path: Path, make: Callable[[], NDArray[Any]], rows: int | None = None
) -> NDArray[Any]:
    """The array stored in ``path``, read-only and memory-mapped; made and stored if need be.

    The file is a normal .npy with the SHA-256 of all its bytes appended. It is written under
    another name and renamed, so nobody reads half a file; one that does not match its checksum, or
    has not as many ``rows``, is made again. A folder that cannot be written means no cache.
    """
    stored = stored_array(path)
    if stored is not None and rows in (None, len(stored)):
        return stored
    array = make()
    with suppress(OSError):  # read-only folder, disk full: then without a cache
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as working:
            with working.open("wb") as file:
                np.save(file, array)
            digest = bytes.fromhex(sha256_of(working))
            with working.open("ab") as file:
                file.write(digest)
    return array


def stored_array(path: Path) -> NDArray[Any] | None:
    """What :func:`cached_array` stored; None: no array there, or a damaged one."""
    try:
        left = path.stat().st_size - hashlib.sha256().digest_size
        h = hashlib.sha256()
        with path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                h.update(block)
                left -= len(block)
            if h.digest() != file.read():
                return None
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return array


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _mismatch(path: Path, found: str, expected: str) -> CorruptData:
    return CorruptData(
        f"{path}: the checksum is wrong (md5 {found}, the published file has {expected}). "
        "Delete the file and get it again."
    )


def files_below(folder: str, names: Iterable[str], root: Path) -> tuple[list[Path], list[str]]:
    """Those of the files ``root / folder / name`` that are there; the names of the others."""
    paths = [root / folder / name for name in names]
    return [p for p in paths if p.is_file()], [p.name for p in paths if not p.is_file()]


# --- digits


def _read_digits(root: Path) -> Raw:
    """scikit-learn's digits: 1,437 train and 360 test images, 8x8, grey values 0 to 16.

    Its file is read as its ``load_digits`` does; to import that takes a second in every process.
    """
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)  # 64 pixels and the digit
    x = rows[:, :-1].astype(np.uint8).reshape(-1, 1, 8, 8)
    y = rows[:, -1].copy()
    train, test = stratified_split(y, n_test=360, key=Key("digits", "split"))
    # The arrays after the split: a fingerprint that would not notice another split hides it.
    splits = (x[train], y[train], x[test], y[test])
    names = ("train images", "train labels", "test images", "test labels")
    arrays = [array.astype("<i8").tobytes() for array in splits]
    return Raw(
        *splits,
        classes=10,
        white=16,
        fingerprint=fingerprint(
            'digits v1: split=stratified 1437/360 by Key("digits", "split"); normalise=train',
            [(n, hashlib.sha256(data).hexdigest()) for n, data in zip(names, arrays, strict=True)],
        ),
        class_names=tuple("0123456789"),
    )


# --- MNIST and Fashion-MNIST (IDX)


def _idx_paths(folder: str, root: Path) -> tuple[list[Path], list[str]]:
    """The four files, unzipped if there (as torchvision reads them), else ``.gz``."""
    found, missing = [], []
    for name in IDX_FILES:
        plain = root / folder / name
        zipped = plain.with_name(f"{name}.gz")
        if path := next((p for p in (plain, zipped) if p.is_file()), None):
            found.append(path)
        else:
            missing.append(name)
    return found, missing


def _idx_array(path: Path, data: bytes, ndim: int) -> NDArray[np.uint8]:
    """The array in an IDX file: magic 0 0 8 ndim, big-endian sizes, bytes. Source: LeCun's page."""
    start = 4 + 4 * ndim
    if len(data) < start or data[:4] != bytes([0, 0, 8, ndim]):
        raise CorruptData(f"{path}: not an IDX file of unsigned bytes in {ndim} dimension(s).")
    shape = [int(size) for size in np.frombuffer(data[4:start], dtype=">i4")]
    if min(shape) < 1 or len(data) - start != math.prod(shape):
        raise CorruptData(
            f"{path}: {len(data) - start} bytes of data where its header announces "
            f"{' x '.join(map(str, shape))}. The file is truncated or damaged: get it again."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _read_idx(name: str, cls: str, folder: str, mean: float, std: float, root: Path) -> Raw:
    import torchvision.datasets

    zipped_md5 = dict(getattr(torchvision.datasets, cls).resources)
    unzipped_md5 = UNZIPPED_MD5.get(name, {})
    arrays, files, parts = [], [], []
    for path, ndim in zip(_idx_paths(folder, root)[0], (3, 1, 3, 1), strict=True):
        data = stored = path.read_bytes()
        if path.suffix == ".gz":
            try:
                data = gzip.decompress(stored)
            except (OSError, EOFError, zlib.error) as error:
                raise CorruptData(f"{path}: cannot be unzipped ({error}). Get it again.") from None
        plain_name = path.name.removesuffix(".gz")
        # The content's checksum is the better one: it allows files that somebody zipped again.
        known = unzipped_md5.get(plain_name) or zipped_md5.get(path.name)
        if known and (found := _md5(data if plain_name in unzipped_md5 else stored)) != known:
            raise _mismatch(path, found, known)
        files.append(FileReport(path, len(stored), "ok" if known else "unknown"))
        arrays.append(_idx_array(path, data, ndim))
        parts.append((plain_name, hashlib.sha256(data).hexdigest()))
    train_x, train_y, test_x, test_y = arrays
    for x, y, of in ((train_x, train_y, "train"), (test_x, test_y, "test")):
        if len(x) != len(y) or y.max() > 9 or x.shape[1:] != train_x.shape[1:]:
            raise CorruptData(
                f"{root / folder}: the {of} files do not fit together: images {x.shape}, "
                f"labels {y.shape} up to {y.max()} (at most 9). Get them again."
            )
    rule = f"idx v1: split=as published; normalise={mean}/{std}"
    return Raw(
        train_x[:, None],
        train_y.astype(np.int64),
        test_x[:, None],
        test_y.astype(np.int64),
        classes=10,
        fingerprint=fingerprint(rule, parts),
        mean=(mean,),
        std=(std,),
        class_names=tuple(getattr(torchvision.datasets, cls).classes),
        files=tuple(files),
    )


# --- CIFAR-10 and CIFAR-100


def _cifar_md5(cls: str) -> dict[str, str]:
    """torchvision's own list: file name → md5, train files, then test, then the class names."""
    import torchvision.datasets

    cifar = getattr(torchvision.datasets, cls)
    entries = [*cifar.train_list, *cifar.test_list]
    return {**dict(entries), cifar.meta["filename"]: cifar.meta["md5"]}


def _read_cifar(
    cls: str, folder: str, mean: tuple[float, ...], std: tuple[float, ...], root: Path
) -> Raw:
    import torchvision.datasets

    # These files are pickles: loading one runs what it says. Not a byte of them is unpickled before
    # all of them are the published ones.
    files, parts = [], []
    for name, expected in _cifar_md5(cls).items():
        path = root / folder / name
        data = path.read_bytes()
        if (found := _md5(data)) != expected:
            raise _mismatch(path, found, expected)
        files.append(FileReport(path, len(data), "ok"))
        parts.append((name, hashlib.sha256(data).hexdigest()))
    with warnings.catch_warnings():
        # NumPy deprecates how Python 2 pickled dtypes; the published files will not change.
        warnings.simplefilter("ignore")
        train, test = (
            getattr(torchvision.datasets, cls)(root, train=train, download=False)
            for train in (True, False)
        )

    def split(part: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return part.data.transpose(0, 3, 1, 2), np.array(part.targets, dtype=np.int64)

    rule = f"cifar v1: split=as published; normalise={mean}/{std}"
    return Raw(
        *(*split(train), *split(test)),
        classes=len(train.classes),
        fingerprint=fingerprint(rule, parts),
        mean=mean,
        std=std,
        class_names=tuple(train.classes),
        files=tuple(files),
    )


# --- the table

# Mean and std over all pixels of the train split, to four digits; MNIST's are those of PyTorch's
# example. Much code copies std .2023/.1994/.2010 for CIFAR-10, the mean of per-image deviations
# (kuangliu/pytorch-cifar, issues 8 and 16); open_lth normalises with ImageNet's numbers.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)


def _idx(name: str, label: str, cls: str, mean: float, std: float) -> Source:
    folder = f"{cls}/raw"
    files = partial(_idx_paths, folder)
    read = partial(_read_idx, name, cls, folder, mean, std)
    how = f"companion data get {name}"
    return Source(name, label, 10, (1, 28, 28), folder, files, read, how, cls)


def _cifar(classes: int, folder: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Source:
    name, cls = f"cifar{classes}", f"CIFAR{classes}"
    files = lambda root: files_below(folder, _cifar_md5(cls), root)  # noqa: E731 - one line, named
    read = partial(_read_cifar, cls, folder, mean, std)
    how = f"companion data get {name}"
    return Source(name, f"CIFAR-{classes}", classes, (3, 32, 32), folder, files, read, how, cls)


PUBLISHED = (
    Source(
        name="digits",
        label="digits",
        classes=10,
        shape=(1, 8, 8),
        folder=None,
        files=lambda root: ([], []),
        read=_read_digits,
        how="nothing to get: it comes with scikit-learn",
    ),
    _idx("mnist", "MNIST", "MNIST", 0.1307, 0.3081),
    _idx("fashion_mnist", "Fashion-MNIST", "FashionMNIST", 0.2860, 0.3530),
    _cifar(10, "cifar-10-batches-py", CIFAR10_MEAN, CIFAR10_STD),
    _cifar(100, "cifar-100-python", CIFAR100_MEAN, CIFAR100_STD),
)
