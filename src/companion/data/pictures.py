"""Pictures as files: the user's own (``images:PATH?size=32&label=NAME``), CIFAR-10's JPEG copy.

``PATH`` is an ImageFolder tree, ``train/<class>/*.png`` and ``test/<class>/`` (or val, valid,
validation), or Hugging Face's layout, ``train*.parquet`` and ``test*.parquet`` (also in ``data/``,
or as ``train/*.parquet``). ``PATH/<class>/`` alone or a single parquet file is split 80/20 by a
fixed key, stratified by class. Decoded pixels are kept in ``runs_root()/decoded/<fingerprint>/``:
every worker process needs them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from companion.core.errors import BadParameter, CompanionError, CorruptData, MissingData, one_of
from companion.core.locations import runs_root
from companion.core.seeds import Key
from companion.data.dataset import stratified_split
from companion.data.sources import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    FileReport,
    Raw,
    Source,
    cached_array,
    files_below,
    fingerprint,
    sha256_of,
)

# Part of the fingerprint: raise the version when the same files would give other pixels.
RULE = "decode v1"
GREY_MODES = {"1", "L", "LA"}


TEST_NAMES = ("test", "val", "valid", "validation")
LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "class", "target")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True, eq=False)
class PictureFiles:
    """Where the files are: train's, then test's; ``n_train`` None: one lot, still to be split."""

    kind: str  # "tree" or "parquet"
    root: Path
    files: list[Path]
    n_train: int | None


@dataclass(frozen=True, eq=False)
class Listing:
    """All images of a dataset, train's first, not decoded: row → bytes, and their labels."""

    names: Sequence[str]
    read: Callable[[int], bytes]
    labels: Sequence[str | int]
    n_train: int | None
    class_names: tuple[str, ...] = ()  # if given, labels are indices into it
    rule: str = ""
    notes: tuple[str, ...] = ()


# --- finding files


def picture_files(path: Path) -> PictureFiles:
    """Which layout ``path`` has, and its files in reading order: sorted by path within a split.

    Raises:
        MissingData: nothing there, or no image in it.
        CorruptData: a layout that is none of ours: no test split, no class folders, one class only.
    """
    if not path.exists():
        raise MissingData(f"images: {path} does not exist.")
    if path.is_file():
        if path.suffix != ".parquet":
            raise BadParameter(f"images: {path} is a file, but not a parquet file or a folder.")
        return PictureFiles("parquet", path.parent, [path], None)
    train = _shards(path, "train")
    if train or any(_shards(path, name) for name in TEST_NAMES):
        _, test = _test_split(path, bool(train), lambda name: _shards(path, name))
        return PictureFiles("parquet", path, train + test, len(train))
    if any(path.glob("*.parquet")):
        raise CorruptData(
            f"images: {path} holds parquet files, but none is called train*.parquet. "
            "Rename them, or name a single file: images:PATH/FILE.parquet."
        )
    return _find_tree(path)


def _shards(path: Path, split: str) -> list[Path]:
    patterns = (f"{split}*.parquet", f"data/{split}*.parquet", f"{split}/*.parquet")
    return next((found for p in patterns if (found := sorted(path.glob(p)))), [])


def _test_split(
    path: Path, has_train: bool, files: Callable[[str], list[Path]]
) -> tuple[str, list[Path]]:
    """The first of the names a test split can have that has files."""
    name, test = next(((n, found) for n in TEST_NAMES if (found := files(n))), ("", []))
    if not has_train or not test:
        raise CorruptData(
            f"images: {path} holds a {'train' if has_train else name} split, but no "
            f"{'test split (' + ', '.join(TEST_NAMES) + ')' if has_train else 'train split'}."
        )
    return name, test


def _find_tree(path: Path) -> PictureFiles:
    splits = {d.name for d in folders(path)}
    if "train" not in splits and not splits.intersection(TEST_NAMES):
        return PictureFiles("tree", path, _images(path), None)
    train = _images(path / "train") if "train" in splits else []
    name, test = _test_split(path, bool(train), lambda n: _images(path / n) if n in splits else [])
    kinds = [{f.relative_to(path).parts[1] for f in files} for files in (train, test)]
    if odd := sorted(kinds[0] ^ kinds[1]):
        raise CorruptData(
            f"images: the class folders of {path}/train and {path}/{name} differ: "
            f"{', '.join(odd)} in one of them only."
        )
    return PictureFiles("tree", path, train + test, len(train))


def folders(path: Path) -> list[Path]:
    """The folders in one, sorted by name, without hidden ones."""
    return sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))


def _images(path: Path) -> list[Path]:
    """All images of ``path/<class>/``, at any depth, sorted by their path below ``path``."""
    found = []
    for folder in folders(path):
        images = [f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()]
        images = [f for f in images if not f.name.startswith(".")]
        if not images:
            raise CorruptData(f"images: {folder} holds no image. Fill or remove it.")
        found += images
    if not found:
        raise MissingData(
            f"images: {path} holds no class folder with images. Expected: {path}/<class>/*.png "
            f"(or another of {', '.join(sorted(SUFFIXES))})."
        )
    return sorted(found, key=lambda f: f.relative_to(path).as_posix())


# --- listing them


def _list_tree(layout: PictureFiles) -> Listing:
    relative = [f.relative_to(layout.root) for f in layout.files]
    return Listing(
        names=[str(f) for f in layout.files],
        read=lambda i: layout.files[i].read_bytes(),
        labels=[r.parts[0 if layout.n_train is None else 1] for r in relative],
        n_train=layout.n_train,
        rule="tree",
    )


def _list_parquet(layout: PictureFiles, label: str | None) -> Listing:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        files = [pq.ParquetFile(f) for f in layout.files]
        schema = files[0].schema_arrow
        image_column, label_column, notes = _columns(layout.files[0], schema, label)
        columns = [image_column, label_column]
        tables = [f.read(columns=columns).select(columns) for f in files]
        table = pa.concat_tables(tables, promote_options="permissive")
        images = pc.struct_field(table[image_column], "bytes")
    except (pa.ArrowException, KeyError, OSError) as error:
        raise CorruptData(
            f"images: the parquet files of {layout.root} ({layout.files[0].name}, …) cannot be "
            f"read: {error}. All need the same columns."
        ) from None
    labels = table[label_column].to_pylist()
    names = [
        f"{f} row {i}" for f, t in zip(layout.files, tables, strict=True) for i in range(len(t))
    ]
    for column, values in ((image_column, images), (label_column, table[label_column])):
        if values.null_count:
            raise CorruptData(
                f"images: {values.null_count} rows of {layout.root} have nothing in column "
                f"{column!r} (pictures have to be stored inside the parquet file)."
            )
    n_train = None if layout.n_train is None else sum(map(len, tables[: layout.n_train]))
    return Listing(
        names=names,
        read=lambda i: bytes(images[i].as_py()),
        labels=labels,
        n_train=n_train,
        class_names=_class_names(schema, label_column),
        rule=f"parquet {image_column}/{label_column}",
        notes=notes,
    )


def _columns(path: Path, schema: Any, label: str | None) -> tuple[str, str, tuple[str, ...]]:
    """Names of the image and the label column, and a note on what there was to choose."""
    import pyarrow.types as types

    def is_image(kind: Any) -> bool:
        if not types.is_struct(kind) or (at := kind.get_field_index("bytes")) < 0:
            return False
        return bool(types.is_binary(kind[at].type) or types.is_large_binary(kind[at].type))

    def is_label(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))

    images = [f.name for f in schema if is_image(f.type)]
    if not images:
        raise CorruptData(
            f"images: {path} has no image column, a struct of {{bytes, path}} as Hugging Face "
            f"writes it. Its columns: {', '.join(schema.names)}."
        )
    labels = [f.name for f in schema if is_label(f.type)]
    known = [name for name in LABEL_NAMES if name in labels]
    if label is not None:
        chosen = one_of("label", label, labels)
    elif known or len(labels) == 1:
        chosen = (known or labels)[0]
    else:
        raise BadParameter(
            f"images: which column of {path} is the label? Say it with images:PATH?label=NAME. "
            f"Integer or string columns: {', '.join(labels) or 'none'}."
        )
    others = [name for name in (*images[1:], *labels) if name != chosen]
    note = f"columns: image {images[0]!r}, label {chosen!r}"
    note += f"; not used: {', '.join(others)}" if others else ""
    return images[0], chosen, (note,)


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """Class names in Hugging Face's metadata, or ()."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(metadata["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


# --- decoding


def decode(
    names: Sequence[str], read: Callable[[int], bytes], size: int | None
) -> NDArray[np.uint8]:
    """Decode all images into one array.

    Greyscale is what the files say (their mode), not what the pixels look like. Transparency is
    dropped, and EXIF rotation is ignored, as by torchvision's ImageFolder.

    Arguments:
        names: N names, for messages.
        read: row → the encoded bytes.
        size: None: all images have one size already. Else: the shorter side is resized to ``size``
            (bilinear, antialiased) and the centre ``size x size`` is kept.

    Returns:
        (N, C, H, W) uint8; C = 1 if all images are greyscale, else 3.

    Raises:
        CorruptData: an image cannot be decoded; it is named.
        BadParameter: sizes differ and ``size`` is None, or an image has 16 bits per channel.
    """

    def decode_some(rows: range) -> list[NDArray[np.uint8]]:
        return [decode_one(names[i], read(i), size) for i in rows]

    # Pillow decodes outside Python's lock: threads help, and need no copies between processes.
    chunks = [range(i, min(i + 256, len(names))) for i in range(0, len(names), 256)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = [image for part in pool.map(decode_some, chunks) for image in part]
    shape = images[0].shape[:2]
    for name, image in zip(names, images, strict=True):
        if image.shape[:2] != shape:
            raise BadParameter(
                "The images have different sizes: "
                f"{shape[1]}x{shape[0]} ({names[0]}), {image.shape[1]}x{image.shape[0]} ({name}). "
                "Say which size to bring them to: images:PATH?size=32."
            )
    channels = 1 if all(image.ndim == 2 for image in images) else 3
    out = np.empty((len(images), channels, *shape), dtype=np.uint8)
    for i, image in enumerate(images):
        out[i] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return out


def decode_one(
    name: str, data: bytes, size: int | None, short: int | None = None, colour: bool = False
) -> NDArray[np.uint8]:
    """One image: (H, W) uint8 if its mode is greyscale, else (H, W, 3).

    Arguments:
        size: as in :func:`decode`.
        short: the shorter side is resized to this before the centre of ``size`` is kept; None: to
            ``size``, so that nothing but the ends of the longer side is cut off.
        colour: (H, W, 3) of greyscale images, too.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image: Image.Image = opened
            if image.mode.startswith(("I", "F")):
                raise BadParameter(f"{name}: {image.mode} pixels; convert it to 8 bits first.")
            grey = image.mode in GREY_MODES and not colour
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow's own advice for such palettes
            image = image.convert("L" if grey else "RGB")
            if size is not None and image.size != (size, size):
                from torchvision.transforms import functional

                whole = functional.resize(
                    image, [short or size], functional.InterpolationMode.BILINEAR
                )
                image = functional.center_crop(whole, [size, size])
            return np.asarray(image)
    except CompanionError:
        raise
    except Exception as error:  # Pillow's readers raise anything on a damaged file
        raise CorruptData(f"{name}: cannot be read as an image ({error}).") from None


# --- reading all


def _encode(listing: Listing, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as (N,) indices into the class names."""
    n_train = len(listing.labels) if listing.n_train is None else listing.n_train
    train, test = set(listing.labels[:n_train]), set(listing.labels[n_train:])
    if listing.class_names:
        values: list[Any] = list(range(len(listing.class_names)))
        unknown = sorted((train | test).difference(values), key=str)
        why = f"the metadata names {len(values)} classes"
    else:
        values = sorted(train)
        unknown = sorted(test - train, key=str)
        why = "train does not have it"
    if not train or (listing.n_train is not None and not test):
        raise CorruptData(f"images: {where}: a split without images.")
    if unknown:
        raise CorruptData(f"images: {where}: class {unknown[0]!r} in the data, but {why}.")
    if len(train) < 2:
        raise CorruptData(f"images: {where}: all images are of one class; at least 2 are needed.")
    index = {value: i for i, value in enumerate(values)}
    y = np.array([index[value] for value in listing.labels], dtype=np.int64)
    return y, listing.class_names or tuple(str(value) for value in values)


def read_pictures(
    path: Path,
    size: int | None,
    label: str | None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Raw:
    """Read the pictures under ``path``; ``mean`` and ``std`` None: computed on the train split.

    Raises:
        MissingData, CorruptData, BadParameter: see the module's parts; each names the file.
    """
    layout = picture_files(path)
    if layout.kind == "tree" and label is not None:
        raise BadParameter(
            f"images: {path}: label={label}, but folders of pictures have no columns."
        )
    listing = _list_tree(layout) if layout.kind == "tree" else _list_parquet(layout, label)
    return read_listing(listing, layout.root, layout.files, size, mean, std, where=str(path))


def read_listing(
    listing: Listing,
    root: Path,
    paths: Sequence[Path],
    size: int | None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    where: str | None = None,
) -> Raw:
    """Decode what is listed; the pixels are kept under the fingerprint of the files ``paths``.

    Arguments:
        root: the folder below which the files' names count.
        where: what messages call it; None: ``root``.

    Raises:
        CorruptData, BadParameter: as :func:`read_pictures`.
    """
    where = where or str(root)
    y, class_names = _encode(listing, where)
    if listing.n_train is None:
        counts = np.bincount(y, minlength=len(class_names))
        if counts.min() < 2:
            raise CorruptData(
                f"images: {where}: class {class_names[int(counts.argmin())]!r} has "
                f"{counts.min()} image(s); 2 are needed to split them into train and test."
            )
        train: Any
        test: Any
        train, test = stratified_split(y, round(len(y) / 5), Key("images", "split"))
        # The rows are hashed too: a fingerprint that would not notice another split hides it.
        rows = hashlib.sha256(test.astype("<i8").tobytes()).hexdigest()[:16]
        split = f'stratified 80/20 by Key("images", "split"), rows {rows}'
    else:
        train, test = slice(listing.n_train), slice(listing.n_train, None)
        split = f"as given, {listing.n_train} first"
    rule = (
        f"{RULE}: {listing.rule}; classes={json.dumps(class_names)}; split={split}; "
        f"size={size or 'as it is'}; normalise={f'{mean}/{std}' if mean else 'train'}"
    )
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(sha256_of, paths))
    names = [f.relative_to(root).as_posix() for f in paths]
    digest = fingerprint(rule, zip(names, digests, strict=True))
    images = cached_array(
        runs_root() / "decoded" / digest / "images.npy",
        lambda: decode(listing.names, listing.read, size),
        len(y),
    )
    return Raw(
        *(images[train], y[train], images[test], y[test]),
        classes=len(class_names),
        fingerprint=digest,
        mean=mean,
        std=std,
        class_names=class_names,
        files=tuple(map(FileReport.of, paths)),
        notes=(*listing.notes, f"split: {split}"),
    )


def user_images(name: str) -> Source:
    """The source that ``images:PATH?size=…&label=…`` stands for. PATH may start with ``~``.

    Raises:
        BadParameter: no path, or an option that does not exist or make sense.
    """
    text, _, options = name.removeprefix("images:").partition("?")
    if not text:
        raise BadParameter("dataset: images:PATH needs a path, as in images:~/pictures.")
    size, label = None, None
    for option in options.split("&") if options else ():
        key, _, value = option.partition("=")
        if one_of(f"{name}: option", key, ("size", "label")) == "label":
            label = value
        elif value.isdecimal() and int(value) > 0:
            size = int(value)
        else:
            raise BadParameter(f"{name}: size is a number of pixels, not {value!r}.")
    path = Path(text).expanduser().absolute()
    return Source(
        name=name,
        label=f"images: {path.stem if path.is_file() else path.name}",
        classes=None,
        shape=None,
        folder=str(path),
        files=lambda root: (picture_files(path).files, []),
        read=lambda root: read_pictures(path, size, label),
        how="your own pictures: class folders, or parquet in Hugging Face's image layout",
    )


def _read_jpeg(root: Path) -> Raw:
    folder = "cifar10-jpeg"
    raw = read_pictures(root / folder, None, None, CIFAR10_MEAN, CIFAR10_STD)
    if raw.classes != 10 or raw.train_x.shape[1:] != (3, 32, 32):
        raise CorruptData(
            f"{root / folder}: {raw.classes} classes of images {raw.train_x.shape[1:]} are no copy "
            "of CIFAR-10. Load them as images:PATH."
        )
    return raw


# Lossy, so never a stand-in for cifar10. Normalised with CIFAR-10's numbers; its own are near.
CIFAR10_JPEG = Source(
    name="cifar10-jpeg",
    label="CIFAR-10 (JPEG copy)",
    classes=10,
    shape=(3, 32, 32),
    folder="cifar10-jpeg",
    files=partial(files_below, "cifar10-jpeg", ("train.parquet", "test.parquet")),
    read=_read_jpeg,
    how="your own copy: train.parquet and test.parquet in Hugging Face's image layout",
)
