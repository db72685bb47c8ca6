"""Texts from Hugging Face's hub, with its library ``datasets``: only when the user asks."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from companion.core.errors import MissingData
from companion.data.sources import Source


def from_hub(source: Source, root: Path) -> None:
    """Download the three splits of a text and write them as parquet below the data root.

    Arguments:
        source: one whose ``hub`` is not None.
        root: the data root.

    Raises:
        MissingData: ``datasets`` is not installed, or the download failed; the message says what
            to do by hand.
    """
    assert source.hub is not None
    repository, configuration, name = source.hub
    folder = root / name
    by_hand = (
        f"Without it, get {repository} ({configuration}) elsewhere and copy its train, validation "
        f"and test files into {folder} (parquet or text)."
    )
    try:
        import datasets
    except ImportError:
        raise MissingData(
            f"{source.label} is downloaded with the library datasets, which is not installed: "
            f"pip install 'companion[hub]'. {by_hand}"
        ) from None
    try:
        found = datasets.load_dataset(repository, configuration)
        splits = {split: found[split] for split in ("train", "validation", "test")}
    except Exception as error:  # its HTTP libraries raise errors of their own
        raise MissingData(
            f"{source.label} could not be downloaded into {folder}: {error}\n"
            f"{by_hand.replace('Without it', 'Without a network')}"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        temporary = folder / f".{split}-{uuid4().hex}.tmp"
        try:
            rows.to_parquet(str(temporary))
            temporary.replace(folder / f"{split}.parquet")
        finally:
            temporary.unlink(missing_ok=True)
