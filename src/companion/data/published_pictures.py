"""Published datasets that are folders of pictures: Tiny ImageNet, DomainNet and ImageNet.

``tiny-imagenet`` is ``tiny-imagenet-200/`` as published: ``train/<class>/images/*.JPEG``, and
``val/images/*.JPEG`` with the classes in ``val/val_annotations.txt`` (its test labels are not
public, so val is the test split). ``domainnet`` is ``domainnet/<domain>/<class>/*``, with the
splits in ``<domain>_train.txt`` and ``<domain>_test.txt``;
``domainnet?size=64&classes=10&domains=clipart-real`` takes the first ten classes and two domains.
``imagenet`` is torchvision's layout, ``imagenet/{train,val}/<class>/*.JPEG``: it stays on the disk
(:mod:`companion.data.streamed`), is resized to 256 and cropped to 224 pixels, and serves
evaluation, matching and merging; ``imagenet?size=299&short=342`` is Inception's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from companion.core.errors import BadParameter, CorruptData, one_of
from companion.data.pictures import Listing, decode_one, folders, read_listing
from companion.data.sources import Raw, Source, Streamed, fingerprint
from companion.data.streamed import Pixels

TINY = "tiny-imagenet-200"
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
"""Of DomainNet (Peng et al. 2019)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _tiny_files(root: Path) -> tuple[list[Path], list[str]]:
    folder = root / TINY
    marks = [folder / "train", folder / "val" / "val_annotations.txt"]
    missing = [m.relative_to(root).as_posix() for m in marks if not m.exists()]
    return [m for m in marks if m.exists()], missing


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptData(f"{path}: cannot be read ({error}).") from None


def _read_tiny(root: Path) -> Raw:
    folder = root / TINY
    classes = [d.name for d in folders(folder / "train")]
    index = {name: i for i, name in enumerate(classes)}
    train = [
        (path, index[name])
        for name in classes
        for path in sorted((folder / "train" / name / "images").glob("*.JPEG"))
    ]
    notes = folder / "val" / "val_annotations.txt"
    test = []
    for line in _lines(notes):
        name, *label = line.split("\t")[:2]
        if not label or label[0] not in index:
            raise CorruptData(f"{notes}: no line 'picture, class, …' with a class of train: {line}")
        test.append((folder / "val" / "images" / name, index[label[0]]))
    raw = _read(folder, train, test, classes, None, "tiny-imagenet")
    if raw.train_x.shape[1:] != (3, 64, 64):
        raise CorruptData(f"{folder}: images of {raw.train_x.shape[1:]} are not Tiny ImageNet's.")
    return raw


def _read(
    folder: Path,
    train: Sequence[tuple[Path, int]],
    test: Sequence[tuple[Path, int]],
    classes: Sequence[str],
    size: int | None,
    rule: str,
) -> Raw:
    """Pictures with their classes, train's and test's, normalised with ImageNet's numbers."""
    rows = [*train, *test]
    paths = [path for path, _ in rows]
    if not train or not test:
        raise CorruptData(f"{folder}: no pictures to {'test' if train else 'train'} on.")
    if gone := next((path for path in paths if not path.is_file()), None):
        raise CorruptData(f"{folder}: {gone.relative_to(folder)} is listed, and is not there.")
    listing = Listing(
        names=[str(path) for path in paths],
        read=lambda i: paths[i].read_bytes(),
        labels=[label for _, label in rows],
        n_train=len(train),
        class_names=tuple(classes),
        rule=rule,
    )
    return read_listing(listing, folder, paths, size, IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class _Asked:
    """What of DomainNet: ``classes`` None: all."""

    size: int = 64
    classes: int | None = None
    domains: tuple[str, ...] = DOMAINS


def _asked(name: str) -> _Asked:
    found = _Asked()
    for option in filter(None, name.partition("?")[2].split("&")):
        key, _, value = option.partition("=")
        if one_of(f"{name}: option", key, ("size", "classes", "domains")) == "domains":
            domains = tuple(one_of(f"{name}: domain", d, DOMAINS) for d in value.split("-"))
            found = replace(found, domains=tuple(d for d in DOMAINS if d in domains))
        elif value.isdecimal() and int(value) > (key == "classes"):
            found = (
                replace(found, size=int(value))
                if key == "size"
                else replace(found, classes=int(value))
            )
        else:
            raise BadParameter(f"{name}: {key} is a whole number, not {value!r}.")
    return found


def _lists(asked: _Asked, root: Path) -> tuple[list[Path], list[str]]:
    names = [f"{d}_{split}.txt" for split in ("train", "test") for d in asked.domains]
    paths = [root / "domainnet" / name for name in names]
    return [p for p in paths if p.is_file()], [p.name for p in paths if not p.is_file()]


def _read_domains(asked: _Asked, root: Path) -> Raw:
    folder = root / "domainnet"
    rows: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    domains: dict[str, list[int]] = {"train": [], "test": []}
    called: dict[int, str] = {}
    for split, found in rows.items():
        for number, domain in enumerate(asked.domains):
            source = folder / f"{domain}_{split}.txt"
            for line in _lines(source):
                path, _, label = line.rpartition(" ")
                parts = Path(path).parts
                if not label.isdecimal() or len(parts) != 3 or ".." in parts:
                    raise CorruptData(f"{source}: 'domain/class/picture number' expected: {line}")
                if asked.classes is None or int(label) < asked.classes:
                    if called.setdefault(int(label), parts[1]) != parts[1]:
                        raise CorruptData(f"{source}: class {label} has two names: {line}")
                    found.append((folder / path, int(label)))
                    domains[split].append(number)
    if sorted(called) != list(range(len(called))):
        raise CorruptData(f"{folder}: classes are numbered {sorted(called)}, with gaps.")
    names = [called[i] for i in range(len(called))]
    what = f"domainnet {'-'.join(asked.domains)} {asked.classes or 'all'}"
    raw = _read(folder, rows["train"], rows["test"], names, asked.size, what)
    of = (np.array(domains["train"], np.int64), np.array(domains["test"], np.int64))
    return replace(raw, domains=of, domain_names=asked.domains)


def is_domainnet(name: str) -> bool:
    """Whether a dataset's name asks for DomainNet."""
    return name.partition("?")[0] == "domainnet"


def domainnet(name: str) -> Source:
    """The source of ``domainnet?size=64&classes=10&domains=clipart-real``.

    Raises:
        BadParameter: an option that does not exist or make sense.

    Source: Peng et al. 2019; the feature shift of Adilova et al. 2024, Section 6.
    """
    asked = _asked(name)
    return Source(
        name=name,
        label="DomainNet",
        classes=asked.classes or 345,
        shape=(3, asked.size, asked.size),
        folder="domainnet",
        files=partial(_lists, asked),
        read=partial(_read_domains, asked),
        how="as published: domainnet/<domain>/<class>/ with <domain>_train.txt, <domain>_test.txt",
    )


def _sizes(name: str) -> dict[str, int]:
    """Of ``imagenet?size=224&short=256``: pixels."""
    found = {"size": 224, "short": 256}
    for option in filter(None, name.partition("?")[2].split("&")):
        key, _, value = option.partition("=")
        one_of(f"{name}: option", key, tuple(found))
        if not value.isdecimal() or int(value) < 1:
            raise BadParameter(f"{name}: {key} is a number of pixels, not {value!r}.")
        found[key] = int(value)
    if found["short"] < found["size"]:
        raise BadParameter(
            f"{name}: a shorter side of {found['short']} pixels has no centre of {found['size']}."
        )
    return found


def _imagenet_files(root: Path) -> tuple[list[Path], list[str]]:
    parts = [root / "imagenet" / split for split in ("train", "val")]
    return [p for p in parts if p.is_dir()], [p.name for p in parts if not p.is_dir()]


def _read_imagenet(size: int, short: int, root: Path) -> Streamed:
    folder = root / "imagenet"
    classes = [d.name for d in folders(folder / "train")]
    index = {name: i for i, name in enumerate(classes)}
    splits: list[tuple[Pixels, NDArray[np.int64]]] = []
    manifest: list[tuple[str, str]] = []
    for split in ("train", "val"):
        paths: list[Path] = []
        labels: list[int] = []
        for own in folders(folder / split):
            if own.name not in index:
                raise CorruptData(f"{own}: train has no such class.")
            pictures = sorted((e.name, e.stat().st_size) for e in os.scandir(own) if e.is_file())
            paths += [own / name for name, _ in pictures]
            labels += [index[own.name]] * len(pictures)
            manifest += [(f"{split}/{own.name}/{name}", str(bytes_)) for name, bytes_ in pictures]
        if not paths:
            raise CorruptData(f"{folder / split}: no class folder with pictures.")

        def read(i: int, paths: list[Path] = paths) -> NDArray[np.uint8]:
            return decode_one(str(paths[i]), paths[i].read_bytes(), size, short, colour=True)

        shape = (len(paths), 3, size, size)
        rows = np.arange(len(paths), dtype=np.int64)
        splits.append(
            (
                Pixels(read, rows, shape, IMAGENET_MEAN, IMAGENET_STD),
                np.array(labels, dtype=np.int64),
            )
        )
    rule = f"imagenet v1: short={short} size={size}; names and sizes of files"
    train, test = splits
    return Streamed(train, test, tuple(classes), fingerprint(rule, manifest))


def is_imagenet(name: str) -> bool:
    """Whether a dataset's name asks for ImageNet."""
    return name.partition("?")[0] == "imagenet"


def imagenet(name: str) -> Source:
    """The source of ``imagenet?size=224&short=256``.

    Raises:
        BadParameter: an option that does not exist or make sense.

    Source: Russakovsky et al. 2015; Git Re-Basin (Ainsworth et al. 2023), section 5.2.
    """
    sizes = _sizes(name)
    return Source(
        name=name,
        label="ImageNet",
        classes=1000,
        shape=(3, sizes["size"], sizes["size"]),
        folder="imagenet",
        files=_imagenet_files,
        read=partial(_read_imagenet, sizes["size"], sizes["short"]),
        how="in torchvision's layout, imagenet/train/<class>/ and imagenet/val/<class>/",
    )


TINY_IMAGENET = Source(
    name="tiny-imagenet",
    label="Tiny ImageNet",
    classes=200,
    shape=(3, 64, 64),
    folder=TINY,
    files=_tiny_files,
    read=_read_tiny,
    how=f"as published: {TINY}/ with train/ and val/",
)
