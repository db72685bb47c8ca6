"""Encoded images (PNG, JPEG, …) to one array of pixels, once: decoded arrays are cached on disk.

Decoding CIFAR-10's 60,000 JPEGs takes seconds, and every worker process needs them. The cache is
``runs_root()/decoded/<fingerprint>/images.npy`` (``arrays.py``); one that does not match its
checksum is made again; a folder that cannot be written means no cache.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from companion.core.errors import BadParameter, CompanionError, CorruptData
from companion.data import arrays

# Part of the fingerprint: raise the version when the same files would give other pixels.
RULE = "decode v1"
GREY_MODES = {"1", "L", "LA"}


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
    shape = _decode_one(names[0], read(0), size).shape[:2]

    def decode_some(rows: range) -> list[NDArray[np.uint8]]:
        images = [_decode_one(names[i], read(i), size) for i in rows]
        for i, image in zip(rows, images, strict=True):
            if image.shape[:2] != shape:
                raise BadParameter(
                    "The images have different sizes: "
                    f"{shape[1]}x{shape[0]} ({names[0]}), "
                    f"{image.shape[1]}x{image.shape[0]} ({names[i]}). "
                    "Say which size to bring them to: images:PATH?size=32."
                )
        return images

    # Pillow decodes outside Python's lock: threads help, and need no copies between processes.
    chunks = [range(i, min(i + 256, len(names))) for i in range(0, len(names), 256)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(decode_some, chunk) for chunk in chunks]
        try:
            images = [image for future in futures for image in future.result()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    channels = 1 if all(image.ndim == 2 for image in images) else 3
    out = np.empty((len(images), channels, *shape), dtype=np.uint8)
    for i, image in enumerate(images):
        out[i] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return out


def _decode_one(name: str, data: bytes, size: int | None) -> NDArray[np.uint8]:
    """One image: (H, W) uint8 if its mode is greyscale, else (H, W, 3)."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image: Image.Image = opened
            if image.mode.startswith(("I", "F")):
                raise BadParameter(f"{name}: {image.mode} pixels; convert it to 8 bits first.")
            grey = image.mode in GREY_MODES
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow's own advice for such palettes
            image = image.convert("L" if grey else "RGB")
            if size is not None and image.size != (size, size):
                image = _resize(image, size)
            return np.asarray(image)
    except CompanionError:
        raise
    except Exception as error:  # Pillow's readers raise anything on a damaged file
        raise CorruptData(f"{name}: cannot be read as an image ({error}).") from None


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size``, centre crop: torchvision's Resize and CenterCrop."""
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def cached(folder: Path, n: int, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The array stored in ``folder``, read-only and memory-mapped; made and stored if need be.

    Arguments:
        folder: one per fingerprint.
        n: expected number of images.
        make: decodes them.
    """
    path = folder / "images.npy"
    stored = arrays.load(path)
    if stored is not None and len(stored) == n:
        return stored
    made = make()
    with contextlib.suppress(OSError):  # read-only folder, disk full: then without a cache
        arrays.store(path, made)
    return made
