"""Datasets as tensors that live on the device, and augmentation as a function of a key.

    dataset = load("digits")
    x, y = dataset.train.x, dataset.train.y

``dataset.py`` the values · ``registry.py`` datasets by name · ``parts.py`` parts of a train split ·
``sources.py``, ``pictures.py``, ``decoding.py`` readers · ``augmentation.py`` flips and crops ·
``device.py`` names of devices.
"""

from companion.data.augmentation import Augmentation, Augmenter, Draws
from companion.data.dataset import Dataset, Split, channel_statistics, standardise, stratified_split
from companion.data.device import resolve_device
from companion.data.registry import Entry, Report, catalogue, check, get, load
from companion.data.sources import FileReport

__all__ = [
    "Augmentation",
    "Augmenter",
    "Dataset",
    "Draws",
    "Entry",
    "FileReport",
    "Report",
    "Split",
    "catalogue",
    "channel_statistics",
    "check",
    "get",
    "load",
    "resolve_device",
    "standardise",
    "stratified_split",
]
