"""Datasets as tensors that live on the device, and augmentation as a function of a key. ::

    dataset = load("digits")
    x, y = dataset.train.x, dataset.train.y

``dataset.py`` the values · ``registry.py`` datasets by name · ``parts.py`` parts of a train split ·
``sources.py``, ``pictures.py`` readers of images · ``text.py``, ``corpus.py``, ``tokens.py`` those
of texts · ``augmentation.py`` flips, crops and shifts.
"""

from companion.core.numerics import resolve_device
from companion.data.augmentation import Augmentation, Augmenter, Draws
from companion.data.dataset import (
    Dataset,
    Split,
    TextCounts,
    TextFacts,
    channel_statistics,
    head_of,
    standardise,
    stratified_split,
)
from companion.data.registry import DatasetEntry, Report, catalogue, check_dataset, download, load
from companion.data.sources import FileReport
from companion.data.text import canonical_data

__all__ = [
    "Augmentation",
    "Augmenter",
    "Dataset",
    "DatasetEntry",
    "Draws",
    "FileReport",
    "Report",
    "Split",
    "TextCounts",
    "TextFacts",
    "canonical_data",
    "catalogue",
    "channel_statistics",
    "check_dataset",
    "download",
    "head_of",
    "load",
    "resolve_device",
    "standardise",
    "stratified_split",
]
