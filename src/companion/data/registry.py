"""Datasets by name: load, list, download, check. Only :func:`download` downloads anything.

``digits``, ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``cifar10-jpeg`` (lossy,
labelled as such), ``tiny-imagenet``, ``domainnet?size=64&classes=10``, ``imagenet``
(``published_pictures.py``),
``images:PATH`` (``pictures.py``), texts (``text.py``), and with ``@split-a`` behind any images a
part of them (``parts.py``). Source: our chapter 1 ("The data").
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from companion.core import files
from companion.core.errors import BadParameter, CorruptData, MissingData, one_of
from companion.core.locations import data_root
from companion.core.numerics import memory_of, resolve_device
from companion.data import text
from companion.data.dataset import Dataset, Split, TextFacts, channel_statistics, standardise
from companion.data.parts import SEPARATOR, Part, split_name
from companion.data.pictures import CIFAR10_JPEG, user_images
from companion.data.published_pictures import (
    TINY_IMAGENET,
    domainnet,
    imagenet,
    is_domainnet,
    is_imagenet,
)
from companion.data.sources import PUBLISHED, FileReport, RawText, Source, Streamed
from companion.data.streamed import as_tensor, rows_of

NAMED = (*PUBLISHED, CIFAR10_JPEG, TINY_IMAGENET, domainnet("domainnet"), imagenet("imagenet"))
SOURCES = {source.name: source for source in NAMED}
MOVE = "Set COMPANION_DATA to look in another data root."


@dataclass(frozen=True)
class DatasetEntry:
    """A line of ``companion data list``. ``where`` None: embedded; classes, shape None: it depends.

    Of a text, classes are the size of its vocabulary (rounded up), and the shape is its window's.

    ``present`` says that all files are there, not that they are right:
    :func:`check_dataset` reads them.
    """

    name: str
    label: str
    classes: int | None
    shape: tuple[int, ...] | None
    where: Path | None
    present: bool
    how: str


@dataclass(frozen=True)
class Report(DatasetEntry):
    """What ``companion data check`` found. If not present, only ``missing`` and ``notes`` are added
    to the entry; a checksum that is wrong is not reported but raised.

    Arguments:
        missing: names of the files that are not there.
        files: those that were read, with sizes in bytes and checksums "ok" or "unknown".
        train_shape, test_shape: (N, C, H, W); of a text (N, L), its windows.
        train_counts, test_counts: images per class, in the order of ``class_names``.
        notes: what a reader had to choose, such as the label column; if files are missing, what
            else there is.
        text: how a text was tokenised; None for images.
    """

    missing: tuple[str, ...] = ()
    files: tuple[FileReport, ...] = ()
    fingerprint: str | None = None
    train_shape: tuple[int, ...] | None = None
    test_shape: tuple[int, ...] | None = None
    train_counts: tuple[int, ...] = ()
    test_counts: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    text: TextFacts | None = None


def load(name: str, device: str | torch.device = "cpu") -> Dataset:
    """Load a dataset onto a device. The last few are kept, so asking again costs nothing.

    Arguments:
        name: of the catalogue (see the module), e.g. ``"mnist"``; or ``"images:PATH"``,
            ``"images:PATH?size=32&label=fine_label"``; with a part, ``"mnist@split-a"``; a text,
            ``"pydoc"``, ``"text:PATH?vocab=1024"``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"auto"``.

    Returns:
        The dataset; the same object for the same files. Files that changed are read again.

    Raises:
        BadParameter: the name, an option, the part or the device is not known.
        DeviceUnavailable: there is no such GPU.
        MissingData: files are missing; the message names them, the folder and the command.
        CorruptData: files are damaged; the message names the file.
    """
    target = memory_of(resolve_device(device))
    base, part, source = _asked(name)
    root = data_root()
    files, missing = source.files(root)
    if missing:
        raise _missing(source, root, missing)
    stats = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    stamp = hashlib.sha256(repr(stats).encode()).hexdigest()
    if part is not None:
        return _load_part(base, part, root, str(target), stamp)
    return _load(source.name, root, str(target), stamp)


@lru_cache(maxsize=4)  # two halves and what else a chapter compares them with
def _load_part(base: str, part: Part, root: Path, device: str, stamp: str) -> Dataset:
    whole = _load(base, root, device, stamp)
    rows = part.rows(whole.train.y.cpu().numpy(), whole.classes)
    at = torch.from_numpy(rows).to(whole.train.x.device)
    return replace(
        whole,
        name=f"{base}{SEPARATOR}{part.name}",
        label=f"{whole.label}, {part.label}",
        train=Split(rows_of(whole.train.x, at), whole.train.y[at]),
        domains=whole.domains and (whole.domains[0][rows], whole.domains[1]),
        fingerprint=part.fingerprint(whole.fingerprint, rows),
    )


@lru_cache(maxsize=2)  # 0.7 GB each for 60,000 images of 32x32: a chapter uses one or two
def _load(name: str, root: Path, device: str, stamp: str) -> Dataset:
    """``stamp`` (paths, sizes, times of the files) is there for the cache to see a change."""
    source = _source(name)
    raw = source.read(root)
    if isinstance(raw, RawText):

        def windows(tokens: NDArray[np.integer]) -> Split:
            return Split.windows(torch.from_numpy(tokens.astype(np.int64)).to(device), raw.window)

        train, test = windows(raw.train), windows(raw.test)
        return Dataset(
            *(name, source.label, train, test, raw.classes, (raw.window,), (), (), raw.fingerprint),
            text=raw.facts,
        )
    if isinstance(raw, Streamed):
        (train_x, train_y), (test_x, test_y) = raw.train, raw.test
        return Dataset(
            name,
            source.label,
            Split(as_tensor(train_x.to(device)), torch.from_numpy(train_y).to(device)),
            Split(as_tensor(test_x.to(device)), torch.from_numpy(test_y).to(device)),
            *(len(raw.class_names), train_x.shape[1:], train_x.mean, train_x.std, raw.fingerprint),
            class_names=raw.class_names,
        )
    mean, std = raw.mean, raw.std
    if mean is None or std is None:
        mean, std = channel_statistics(raw.train_x, raw.white)

    def split(x: NDArray[np.uint8], y: NDArray[np.int64]) -> Split:
        labels = torch.from_numpy(y.copy())  # not a view of the whole dataset's labels
        return Split(standardise(x, raw.white, mean, std).to(device), labels.to(device))

    train, test = split(raw.train_x, raw.train_y), split(raw.test_x, raw.test_y)
    shape = tuple(raw.train_x.shape[1:])
    return Dataset(
        *(name, source.label, train, test, raw.classes, shape, mean, std, raw.fingerprint),
        class_names=raw.class_names,
        domains=raw.domains
        and (torch.from_numpy(raw.domains[0]), torch.from_numpy(raw.domains[1])),
        domain_names=raw.domain_names,
    )


def catalogue() -> list[DatasetEntry]:
    """All datasets that have a name, whether they are there, and how to get them. Reads no data."""
    root = data_root()

    images = [_entry(source, root) for source in SOURCES.values()]
    texts = [_entry(text.text_source(name), root) for name in text.TEXTS]
    how = "class folders of pictures, or parquet in Hugging Face's image layout"
    images.append(DatasetEntry("images:PATH", "your pictures", None, None, None, False, how))
    how = "a text file, or a folder with train.txt and valid.txt (or parquet)"
    texts.append(DatasetEntry("text:PATH", "your text", None, None, None, False, how))
    return [*images, *texts]


def _entry(s: Source, root: Path, present: bool | None = None) -> DatasetEntry:
    here = not s.files(root)[1] if present is None else present
    return DatasetEntry(s.name, s.label, s.classes, s.shape, _where(s, root), here, s.how)


def download(name: str) -> Path:
    """Download a dataset into the data root, unless it is there; then check it.

    Images come with torchvision, texts with Hugging Face's ``datasets`` (if it is installed).

    Returns:
        The folder that holds its files.

    Raises:
        BadParameter: there is nothing to download under this name.
        MissingData: the download failed (no network, say); the message says what to do by hand.
        CorruptData: what is there, or what came, has a wrong checksum.
    """
    name, _, source = _asked(name)
    root = data_root()
    where = _where(source, root)
    if (source.torchvision is None and source.hub is None) or where is None:
        raise BadParameter(f"{name}: nothing to download. How to get it: {source.how}.")
    if missing := source.files(root)[1]:
        (_from_torchvision if source.torchvision else _from_hub)(source, root)
        source = _asked(name)[2]
        where = _where(source, root) or where
    report = check_dataset(name)
    if missing and source.hub and report.present:
        text.record(where)
    if report.missing and source.torchvision:
        raise CorruptData(
            f"{source.label}: torchvision downloaded it, but {', '.join(report.missing)} is not in "
            f"{where}. An old MNIST/processed folder beside it can cause this: remove that."
        )
    return where


def _from_torchvision(source: Source, root: Path) -> None:
    import torchvision.datasets

    assert source.torchvision is not None
    try:
        getattr(torchvision.datasets, source.torchvision)(root, download=True)
    except (OSError, RuntimeError) as error:
        raise MissingData(
            f"{source.label} could not be downloaded into {_where(source, root)}: {error}\n"
            "Without a network, get the files elsewhere and copy them into that folder, in "
            f"torchvision's layout ({', '.join(source.files(root)[1])})."
        ) from error


def _from_hub(source: Source, root: Path) -> None:
    """The three splits of a text, with Hugging Face's ``datasets``, as parquet files."""
    assert source.hub is not None
    repository, configuration, name, revision = source.hub
    folder = root / name
    by_hand = (
        f"get {repository} ({configuration}) elsewhere and copy its train, validation "
        f"and test files into {folder} (parquet or text)."
    )
    try:
        import datasets
    except ImportError:
        raise MissingData(
            f"{source.label} is downloaded with the library datasets, which is not installed: "
            f"pip install 'companion[hub]'. Without it, {by_hand}"
        ) from None
    try:
        found = datasets.load_dataset(repository, configuration, revision=revision)
        splits = {split: found[split] for split in ("train", "validation", "test")}
    except Exception as error:  # its HTTP libraries raise errors of their own
        raise MissingData(
            f"{source.label} could not be downloaded into {folder}: {error}\n"
            f"Without a network, {by_hand}"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with files.whole(folder / f"{split}.parquet") as working:
            rows.to_parquet(str(working))


def check_dataset(name: str) -> Report:
    """Read a dataset, compare checksums, and say what it holds.

    Raises:
        BadParameter, CorruptData: as :func:`load`. What is missing is reported, not raised, except
            under ``images:PATH``; of a text that means a path with nothing there, and GPT-2's
            tokeniser, too.
    """
    _, part, source = _asked(name)
    root = data_root()
    label = source.label if part is None else f"{source.label}, {part.label}"
    entry = asdict(_entry(source, root, False)) | {"name": name, "label": label}
    try:
        missing = tuple(source.files(root)[1])
    except MissingData as error:
        if source.kind != "text":
            raise
        which = ("its files, or those of its tokeniser",)  # the note says which
        return Report(**entry, missing=which, notes=(str(error),))
    if missing:
        hint = source.hint(root)
        return Report(**entry, missing=missing, notes=(hint,) if hint else ())
    raw = source.read(root)
    entry |= {"present": True, "name": name if part else source.name}
    found = Report(**entry, files=raw.files, notes=raw.notes)
    if isinstance(raw, RawText):
        train, test = (((len(s) - 1) // raw.window, raw.window) for s in (raw.train, raw.test))
        of, facts = raw.fingerprint, raw.facts
        return replace(found, fingerprint=of, train_shape=train, test_shape=test, text=facts)
    if isinstance(raw, Streamed):
        (train_x, train_labels), (test_x, test_labels) = raw.train, raw.test
        return replace(
            found,
            fingerprint=raw.fingerprint,
            train_shape=train_x.shape,
            test_shape=test_x.shape,
            train_counts=tuple(np.bincount(train_labels).tolist()),
            test_counts=tuple(np.bincount(test_labels).tolist()),
            class_names=raw.class_names,
        )
    train_y, of = raw.train_y, raw.fingerprint
    if part is not None:
        rows = part.rows(train_y, raw.classes)
        train_y, of = train_y[rows], part.fingerprint(of, rows)
    return replace(
        found,
        fingerprint=of,
        train_shape=(len(train_y), *raw.train_x.shape[1:]),
        test_shape=raw.test_x.shape,
        train_counts=tuple(np.bincount(train_y, minlength=raw.classes).tolist()),
        test_counts=tuple(np.bincount(raw.test_y, minlength=raw.classes).tolist()),
        class_names=raw.class_names,
    )


def _asked(name: str) -> tuple[str, Part | None, Source]:
    """A name without its part, the part, and the source.

    Raises:
        BadParameter: nothing has this name, or it is a part of a text.
    """
    base, part = split_name(name)
    source = _source(base)
    if part is not None and source.kind == "text":
        raise BadParameter(
            f"dataset {name!r}: a part ({part.name}) is drawn by classes of images; a text has "
            f"none. Use {base}, or give text:PATH the text you want."
        )
    return base, part, source


def _source(name: str) -> Source:
    if name.startswith("images:"):
        return user_images(name)
    if text.is_text(name):
        return text.text_source(name)
    if is_domainnet(name):
        return domainnet(name)
    if is_imagenet(name):
        return imagenet(name)
    names = [*SOURCES, *text.TEXTS, "images:PATH", "text:PATH"]
    return SOURCES[one_of("dataset", name, names)]


def _where(source: Source, root: Path) -> Path | None:
    return None if source.folder is None else root / source.folder


def _missing(source: Source, root: Path, missing: list[str]) -> MissingData:
    message = f"{source.label} is not in {_where(source, root)}: {', '.join(missing)} missing."
    can_get = source.torchvision or source.hub
    message += f" Get it with: {source.how}." if can_get else f" How to get it: {source.how}."
    if said := source.hint(root):
        message += f" {said}"
    if source.name == "cifar10" and not CIFAR10_JPEG.files(root)[1]:
        message += (
            f" There is a {CIFAR10_JPEG.label} in {_where(CIFAR10_JPEG, root)}: lossy, so never "
            f"taken for CIFAR-10, but you can ask for it by its name, {CIFAR10_JPEG.name}."
        )
    return MissingData(f"{message} {MOVE}")
